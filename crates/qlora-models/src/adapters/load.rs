//! PEFT's adapters onto a decoder.

use super::export::host_values;
use crate::ModelError;
use crate::decoder::Decoder;
use adapter_io::experts::{is_fused, one_rank, unstack};
use adapter_io::low_rank::{Factors, orthonormal, principal, quantization_error};
use adapter_io::{Adapter, AdapterConfig, HostTensor, LoraModule};
use burn::tensor::{DType, Device, FloatDType, Tensor, TensorData};
use nf4_quant::{QuantConfig, Quantized4bit};
use qlora_layers::{
    EmbeddingAdapter, FrozenLinear, Initialization, LoraAdapter, LoraConfig, LoraLinear, WholeLinear, frozen, trainable,
};
use std::collections::HashMap;

/// Keys of `adapter_config.json` beyond plain LoRA that are implemented, or change nothing in the layers there are
/// (`fan_in_fan_out` means transposed layers of another kind, and PEFT ignores it elsewhere).
const IMPLEMENTED: [&str; 7] = [
    "bias",
    "fan_in_fan_out",
    "lora_bias",
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
    "use_dora",
];
/// What PEFT calls the base's weight of an adapted layer behind its path.
const BASE_LAYER: &str = ".base_layer.weight";

/// Quantization that PEFT's LoftQ works with.
const LOFTQ: QuantConfig = QuantConfig { quant_type: nf4_quant::QuantType::Nf4, blocksize: 64, double_quant: false };

impl Decoder {
    /// Puts a PEFT adapter on this model, in place of any that is there.
    ///
    /// One that was initialised by PiSSA, OLoRA or LoftQ and not converted belongs to a changed base: as PEFT does,
    /// the change is made again, which takes the full-precision base.
    ///
    /// # Errors
    /// The adapter uses a feature that is not implemented, names a module that this model lacks, or a part has
    /// the wrong shape. The model and its adapter are unchanged then.
    pub fn load_adapter(&mut self, adapter: &Adapter) -> Result<(), ModelError> {
        let mut model = self.clone();
        model.unload_adapter()?;
        model.put(adapter)?;
        model.keep_scales();
        *self = model;
        Ok(())
    }

    /// The linear layers of this model that an adapter's configuration names and its file has no weights for. They stay the base's, and
    /// [`load_adapter`](Self::load_adapter) warns of them.
    ///
    /// # Errors
    /// A pattern in the configuration is no regular expression.
    pub fn missing_modules(&self, adapter: &Adapter) -> Result<Vec<String>, ModelError> {
        let paths = self.linear_paths();
        Ok(adapter.named_as(&paths)?.missing_modules(&paths)?)
    }

    /// Goes on with an adapter that was [exported](Self::export_adapter) while it was trained with this `config` and
    /// `seed`: the initialisation is made again where it changes the weights, and the trained values put in place.
    ///
    /// # Errors
    /// As [`attach_lora`](Self::attach_lora) and [`load_adapter`](Self::load_adapter).
    pub fn resume_lora(&mut self, config: &LoraConfig, seed: u64, adapter: &Adapter) -> Result<(), ModelError> {
        // EVA looks at data, but leaves the weights alone, and its ranks are in the adapter.
        if config.init == Initialization::Eva || !config.init.changes_base(config.loftq_iterations) {
            return self.load_adapter(adapter);
        }
        let mut model = self.clone();
        model.attach_lora(config, seed)?;
        let mut trained = model.clone();
        // The file holds the start beside the trained factors; what it is put on must not be changed twice.
        trained.linears_mut().for_each(|(_, linear)| linear.adapter = None);
        trained.put(adapter)?;
        let device = model.device.clone();
        for ((path, linear), (_, new)) in model.linears_mut().zip(trained.linears()) {
            if let (Some(old), Some(new)) = (&mut linear.adapter, &new.adapter) {
                let rank = old.rank();
                if new.rank() != 2 * rank {
                    let (expected, found) = (vec![2 * rank], vec![new.rank()]);
                    return Err(ModelError::WeightShape { module: format!("{path}.lora_A"), expected, found });
                }
                // Copies, so that the file's second half does not stay in memory beside them.
                old.lora_a = trainable(copy(&new.lora_a.val().narrow(0, 0, rank), &device)?);
                old.lora_b = trainable(copy(&new.lora_b.val().narrow(1, 0, rank), &device)?);
                if let (Some(old), Some(new)) = (&mut old.dora, &new.dora) {
                    old.magnitude = new.magnitude.clone();
                }
            }
            linear.whole = new.whole.clone();
        }
        for ((_, norm), (_, new)) in model.norms_mut().zip(trained.norms()) {
            norm.trained = new.trained.clone();
        }
        model.embedding = trained.embedding;
        model.head_tokens = trained.head_tokens;
        *self = model;
        Ok(())
    }

    /// Puts an adapter on a model without one.
    fn put(&mut self, adapter: &Adapter) -> Result<(), ModelError> {
        let paths = self.linear_paths();
        let adapter = &*adapter.named_as(&paths)?;
        // Names that nothing is there for at all are told by those who read the file.
        let (nowhere, mut missing) = (adapter.missing_targets(), adapter.missing_modules(&paths)?);
        missing.retain(|path| !nowhere.iter().any(|name| path.rsplit('.').next() == name.rsplit('.').next()));
        if let Some(first) = missing.first() {
            let modules = missing.len();
            tracing::warn!(
                first,
                modules,
                "an adapter has no weights for modules that its configuration names: they stay the base's"
            );
        }
        let config = &adapter.config;
        if let Some(feature) = config.beyond_plain_lora().into_iter().find(|key| !IMPLEMENTED.contains(key)) {
            return Err(ModelError::AdapterFeature { feature: feature.into() });
        }
        let adapter = &*unstack(adapter, &paths)?;
        self.grow_for(adapter)?;
        let modules = adapter.lora_modules()?;
        let saved: Vec<(String, &HostTensor)> = adapter.saved_tensors().collect();
        let (embed, head) = (self.config.embed_path(), self.head_path());
        let is_head = |name: &str| name.rsplit_once('.').is_some_and(|(module, _)| module == head);
        if modules.iter().any(|module| module.path == head) || saved.iter().any(|(name, _)| is_head(name)) {
            self.own_head();
        }
        let (device, dropout) = (self.device.clone(), config.lora_dropout as f32);
        // Adapters are numbered in the model's order.
        let (mut found, mut brought) = (0, Vec::new());
        let by_path: HashMap<&str, &LoraModule<'_>> = modules.iter().map(|m| (m.path.as_str(), m)).collect();
        for (path, linear) in self.linears_mut() {
            let Some(module) = by_path.get(path.as_str()) else { continue };
            let lora = linear_adapter(module, dropout, found, &device)?;
            linear.set_adapter(&path, lora)?;
            if let Some(base) = adapter.saved_base(&path) {
                put_base(&path, linear, base)?;
                brought.push((path.clone(), BASE_LAYER));
            }
            change_base(config, &path, linear)?;
            if let Some(magnitude) = module.magnitude {
                let magnitude = row(magnitude, &device);
                linear.adapter = linear.adapter.take().map(|adapter| adapter.with_dora(&linear.base, Some(magnitude)));
            }
            found += 1;
        }
        // A tied head brings the table along that both share.
        if self.config.tie_word_embeddings
            && let Some(head) = &self.lm_head
            && let (Some(_), FrozenLinear::Dense(table)) = (&head.original, &head.base)
            && brought.iter().any(|(path, _)| path == self.head_path())
        {
            self.embedding.original = Some(std::mem::replace(&mut self.embed_tokens, frozen(table.val())));
        }
        self.embedding.brought = brought;
        let mut placed = found as usize;
        if let Some(module) = by_path.get(embed.as_str()) {
            self.put_embedding(module, adapter.saved_base(&embed))?;
            placed += 1;
        }
        if placed < modules.len() {
            let paths: Vec<String> = self.linears().map(|(path, _)| path).chain([embed]).collect();
            let unknown = modules.iter().find(|module| !paths.contains(&module.path));
            return Err(ModelError::AdapterModule { module: unknown.map_or(String::new(), |m| m.path.clone()) });
        }
        for (name, tensor) in saved {
            if !self.put_frozen_table(adapter, &name, tensor)? {
                self.put_saved(&name, tensor)?;
            }
        }
        self.put_token_rows(adapter)?;
        let mut kept = config.clone();
        if is_fused(config) && !is_fused(&adapter.config) {
            one_rank(&mut kept);
        }
        self.adapter_config = Some(kept);
        Ok(())
    }

    fn put_embedding(&mut self, module: &LoraModule<'_>, table: Option<&HostTensor>) -> Result<(), ModelError> {
        let (shape, embed) = (self.embed_tokens.dims(), self.config.embed_path());
        let fits = |what: &str, found: &[usize]| match found == shape {
            true => Ok(()),
            false => Err(ModelError::WeightShape {
                module: format!("{embed}.{what}"),
                expected: shape.into(),
                found: found.into(),
            }),
        };
        fits("lora_embedding_B @ lora_embedding_A, transposed,", &module.weight_shape())?;
        if let Some(table) = table {
            fits("base_layer", &table.shape)?;
            if let Some(own) = other_base(&self.embed_tokens, table)? {
                let before = std::mem::replace(&mut self.embed_tokens, frozen(own));
                self.embedding.original.get_or_insert(before);
            }
            self.embedding.brought.push((embed.clone(), BASE_LAYER));
            // A tied head sees the same table.
            if self.config.tie_word_embeddings
                && let Some(head) = &mut self.lm_head
            {
                head.base = FrozenLinear::dense(self.embed_tokens.val());
            }
        }
        let (lora_a, lora_b) = (matrix(module.lora_a, &self.device), matrix(module.lora_b, &self.device));
        let lora = EmbeddingAdapter::from_factors(lora_a, lora_b, module.scaling);
        self.embedding.lora = Some(match module.magnitude {
            Some(magnitude) => lora.with_dora(&self.embed_tokens, Some(row(magnitude, &self.device))),
            None => lora,
        });
        Ok(())
    }

    /// A tensor of a module that was trained in full, or a bias.
    fn put_saved(&mut self, name: &str, tensor: &HostTensor) -> Result<(), ModelError> {
        let unknown = || ModelError::AdapterModule { module: name.to_string() };
        let (module, part) = name.rsplit_once('.').ok_or_else(unknown)?;
        let module = module.strip_suffix(".base_layer").unwrap_or(module);
        let device = self.device.clone();
        let expect = |expected: &[usize]| match tensor.shape == expected {
            true => Ok(()),
            false => Err(ModelError::WeightShape {
                module: name.to_string(),
                expected: expected.into(),
                found: tensor.shape.clone(),
            }),
        };
        if module == self.config.embed_path() && part == "weight" {
            expect(&self.embed_tokens.dims())?;
            self.embedding.whole = Some(trainable(matrix(tensor, &device)));
            return Ok(());
        }
        if let Some((_, norm)) = self.norms_mut().find(|(path, _)| path == module)
            && part == "weight"
        {
            expect(&norm.weight.dims())?;
            norm.trained = Some(trainable(row(tensor, &device)));
            return Ok(());
        }
        let (_, linear) = self.linears_mut().find(|(path, _)| path == module).ok_or_else(unknown)?;
        let [out_features, in_features] = linear.base.shape();
        let adapted = linear.adapter.is_some();
        let whole = linear.whole.get_or_insert(WholeLinear { weight: None, bias: None });
        match part {
            "weight" if !adapted => {
                expect(&[out_features, in_features])?;
                whole.weight = Some(trainable(matrix(tensor, &device)));
            }
            "bias" => {
                expect(&[out_features])?;
                whole.bias = Some(trainable(row(tensor, &device)));
            }
            _ => return Err(unknown()),
        }
        Ok(())
    }
}

fn linear_adapter(
    module: &LoraModule<'_>,
    dropout: f32,
    index: u32,
    device: &Device,
) -> Result<LoraAdapter, ModelError> {
    let (lora_a, lora_b) = (matrix(module.lora_a, device), matrix(module.lora_b, device));
    let mut adapter = LoraAdapter::from_factors(lora_a, lora_b, module.scaling, dropout, index);
    adapter.bias = module.bias.map(|bias| trainable(row(bias, device)));
    Ok(adapter)
}

/// Subtracts from a layer's weight what the adapter's initialisation had subtracted from it.
fn change_base(config: &AdapterConfig, path: &str, linear: &mut LoraLinear) -> Result<(), ModelError> {
    let Some(method) = config.changed_base() else { return Ok(()) };
    let fail = |problem: &str| Err(ModelError::AdapterInit { method: method.into(), problem: problem.into() });
    const CONVERT: &str = "or have PEFT convert it when it saves (path_initial_model_for_weight_conversion)";
    let known = method.to_lowercase();
    match known.as_str() {
        "pissa" | "olora" | "loftq" => {}
        m if m.starts_with("pissa_niter_") => {
            return fail(&format!("its base can't be made again, the fast decomposition is random; {CONVERT}"));
        }
        _ => return fail(&format!("its base can't be made again here; {CONVERT}")),
    }
    let FrozenLinear::Dense(weight) = &linear.base else {
        return fail(&format!(
            "it belongs to a base without its start, which is made from the full-precision weights: load the base with quantization off, {CONVERT}"
        ));
    };
    let Some(adapter) = &linear.adapter else { return Ok(()) };
    let (rank, scaling, dtype) = (adapter.rank(), adapter.scaling.get(), weight.dtype());
    let shape = weight.dims();
    let host = HostTensor { shape: shape.into(), data: host_values(weight)? };
    let named = |e: adapter_io::FormatError| ModelError::Initialization {
        init: known.clone(),
        module: Some(path.to_string()),
        problem: e.to_string(),
    };
    let taken = |factors: Factors| factors.taken_from(&host, scaling).map_err(named);
    let rest = match known.as_str() {
        "pissa" => taken(principal(&host, rank, scaling, None, 0).map_err(named)?)?,
        "olora" => taken(orthonormal(&host, rank).map_err(named)?)?,
        _ => {
            let setting = |key: &str, default| config.loftq_config.get(key).and_then(|v| v.as_u64()).unwrap_or(default);
            if setting("loftq_bits", 4) != 4 {
                return fail("loftq_bits is not 4");
            }
            let quantize = |w: &HostTensor| -> Result<HostTensor, ModelError> {
                let failed = |source| ModelError::Quantize { module: path.to_string(), source };
                let weight = Quantized4bit::quantize(&w.data, &w.shape, &LOFTQ).map_err(failed)?;
                Ok(HostTensor { shape: w.shape.clone(), data: weight.dequantize().map_err(failed)? })
            };
            // PEFT's factors stand for what was lost without the scaling.
            let rounds = setting("loftq_iter", 1) as usize;
            let (_, rest) = quantization_error(&host, rank, 1.0, rounds, 0, quantize)?;
            quantize(&rest)?
        }
    };
    let base = Tensor::<2>::from_data(TensorData::new(rest.data, shape), (&weight.device(), dtype));
    let before = std::mem::replace(&mut linear.base, FrozenLinear::dense(base));
    linear.original.get_or_insert(before);
    Ok(())
}

/// The weight that an adapter's file holds for its base, where it is another one than the base's own. PEFT writes it
/// along even where nothing changed it: then one copy is enough.
pub(super) fn other_base(base: &Tensor<2>, file: &HostTensor) -> Result<Option<Tensor<2>>, ModelError> {
    let data = TensorData::new(file.data.clone(), base.dims());
    let own = Tensor::<2>::from_data(data, (&base.device(), base.dtype()));
    let difference = own.clone().cast(FloatDType::F32) - base.clone().cast(FloatDType::F32);
    Ok((host_values(&difference.abs().max().reshape([1, 1]))? != [0.0]).then_some(own))
}

/// Gives a dense layer the weight that the adapter's file holds for it.
pub(super) fn put_base(path: &str, linear: &mut LoraLinear, file: &HostTensor) -> Result<(), ModelError> {
    let shape = linear.base.shape();
    if file.shape != shape {
        return Err(ModelError::WeightShape {
            module: format!("{path}.base_layer"),
            expected: shape.into(),
            found: file.shape.clone(),
        });
    }
    let FrozenLinear::Dense(base) = &linear.base else {
        return Err(ModelError::AdapterFeature { feature: format!("{path}.base_layer.weight of a quantized layer") });
    };
    if let Some(own) = other_base(base, file)? {
        linear.original = Some(std::mem::replace(&mut linear.base, FrozenLinear::dense(own)));
    }
    Ok(())
}

/// Uploads a matrix whose number of dimensions is known.
pub(super) fn matrix(tensor: &HostTensor, device: &Device) -> Tensor<2> {
    let columns = tensor.shape.last().copied().unwrap_or(1).max(1);
    let shape = [tensor.data.len() / columns, columns];
    Tensor::from_data(TensorData::new(tensor.data.clone(), shape), (device, DType::F32))
}

/// Uploads a vector as a row.
fn row(tensor: &HostTensor, device: &Device) -> Tensor<2> {
    Tensor::from_data(TensorData::new(tensor.data.clone(), [1, tensor.data.len()]), (device, DType::F32))
}

fn copy(tensor: &Tensor<2>, device: &Device) -> Result<Tensor<2>, ModelError> {
    let shape = tensor.dims();
    Ok(Tensor::from_data(TensorData::new(host_values(tensor)?, shape), (device, DType::F32)))
}
