//! The adapter that is on a decoder, as PEFT stores it.
//!
//! An initialisation that took the factors' start A₀, B₀ out of the weights (PiSSA, OLoRA, LoftQ of several rounds)
//! trains over `W - s·B₀A₀`. Its adapter is written for the original base all the same, as PEFT's
//! `path_initial_model_for_weight_conversion` does: A and A₀ one above the other, B and -B₀ side by side, twice the
//! rank at the same scaling, since `W - s·B₀A₀ + s·BA = W + s·(BA - B₀A₀)`. Over a base in 4 bits the two differ by
//! what quantization loses of `W` and of `W - s·B₀A₀`.

use crate::ModelError;
use crate::decoder::Decoder;
use adapter_io::adapter::KEY_PREFIX;
use adapter_io::experts::stack;
use adapter_io::{Adapter, AdapterConfig, HostTensor};
use burn::tensor::{FloatDType, Tensor};
use host_copies::DeviceError;
use qlora_layers::LoraAdapter;

impl Decoder {
    /// The adapter that is on, as PEFT stores it; `base_model` is what `adapter_config.json` names as the base.
    ///
    /// # Errors
    /// No adapter is on, or the device fails to hand a tensor over.
    pub fn export_adapter(&self, base_model: &str, revision: Option<&str>) -> Result<Adapter, ModelError> {
        let model = self.parted();
        let mut config = self.adapter_config.clone().ok_or(ModelError::NoAdapter)?;
        config.base_model_name_or_path = Some(base_model.into());
        config.revision = revision.map(Into::into);
        if model.adapters().any(|(_, adapter)| adapter.initial.is_some()) {
            double_rank(&mut config);
        }
        let mut adapter = Adapter::new(config);
        let embed = self.config.embed_path();
        let mut put = |name: String, tensor| adapter.tensors.insert(format!("{KEY_PREFIX}{name}"), tensor);
        for (path, linear) in model.linears() {
            if let Some(lora) = &linear.adapter {
                let (lora_a, lora_b) = factors(lora)?;
                put(format!("{path}.lora_A.weight"), lora_a);
                put(format!("{path}.lora_B.weight"), lora_b);
                if let Some(bias) = &lora.bias {
                    put(format!("{path}.lora_B.bias"), host_vector(bias)?);
                }
                if let Some(dora) = &lora.dora {
                    put(format!("{path}.lora_magnitude_vector"), host_vector(&dora.magnitude)?);
                }
            }
            let Some(whole) = &linear.whole else { continue };
            if let Some(weight) = &whole.weight {
                put(format!("{path}.weight"), host_tensor(weight)?);
            }
            if let Some(bias) = &whole.bias {
                // PEFT wraps a layer that has factors, and its bias sits inside.
                let wrapper = if linear.adapter.is_some() { ".base_layer" } else { "" };
                put(format!("{path}{wrapper}.bias"), host_vector(bias)?);
            }
        }
        for (path, norm) in self.norms() {
            if let Some(trained) = &norm.trained {
                put(format!("{path}.weight"), host_vector(trained)?);
            }
        }
        if let Some(lora) = &self.embedding.lora {
            put(format!("{embed}.lora_embedding_A"), host_tensor(&lora.lora_a)?);
            put(format!("{embed}.lora_embedding_B"), host_tensor(&lora.lora_b)?);
            if let Some(dora) = &lora.dora {
                put(format!("{embed}.lora_magnitude_vector"), host_vector(&dora.magnitude)?);
            }
        }
        for (path, suffix) in &self.embedding.brought {
            let base = match self.linears().find(|(other, _)| other == path) {
                Some((_, linear)) => linear.base.to_dense(FloatDType::F32),
                None => self.embed_tokens.val(),
            };
            put(format!("{path}{suffix}"), host_tensor(&base)?);
        }
        if let Some(whole) = &self.embedding.whole {
            put(format!("{embed}.weight"), host_tensor(whole)?);
        }
        let tables = [(embed, &self.embedding.tokens), (self.head_path().into(), &self.head_tokens)];
        for (path, tokens) in tables {
            if let Some(tokens) = tokens {
                adapter.tensors.insert(Adapter::token_rows_key(&path), host_tensor(&tokens.rows)?);
            }
        }
        // As it came, when PEFT wrote it over stacked experts; and where experts have no names of their own anywhere.
        if adapter.config.parameters().is_empty() && self.config.family.interleaved_experts {
            adapter.config.target_parameters = stacked_parameters(&adapter);
        }
        if !adapter.config.parameters().is_empty() {
            adapter = stack(adapter, &self.linear_paths())?;
        }
        Ok(adapter)
    }
}

/// The parameters that PEFT has for adapted experts: `None` without any, and where they have more than factors, which PEFT can't put
/// on parameters.
fn stacked_parameters(adapter: &Adapter) -> Option<serde_json::Value> {
    const EXPERTS: &str = ".experts.";
    let of_experts = || adapter.tensors.keys().filter(|key| key.contains(EXPERTS));
    let more = |key: &String| !key.ends_with(".lora_A.weight") && !key.ends_with(".lora_B.weight");
    let has = |name: &str| of_experts().any(|key| key.contains(name));
    let found = [("gate_proj.", "gate_up_proj"), ("down_proj.", "down_proj")].into_iter().filter(|(own, _)| has(own));
    let names: Vec<String> = found.map(|(_, parameter)| format!("mlp.experts.{parameter}")).collect();
    (!names.is_empty() && !of_experts().any(more)).then(|| names.into())
}

/// A module's factors on the host, beside their start where the weights lack it.
fn factors(lora: &LoraAdapter) -> Result<(HostTensor, HostTensor), ModelError> {
    let (a, b) = (lora.lora_a.val().without_autodiff(), lora.lora_b.val().without_autodiff());
    match &lora.initial {
        None => Ok((host_tensor(&a)?, host_tensor(&b)?)),
        Some([a0, b0]) => {
            let a = Tensor::cat(vec![a, a0.val()], 0);
            let b = Tensor::cat(vec![b, b0.val().neg()], 1);
            Ok((host_tensor(&a)?, host_tensor(&b)?))
        }
    }
}

/// A matrix on the host.
fn host_tensor(tensor: &Tensor<2>) -> Result<HostTensor, ModelError> {
    let shape = tensor.dims().to_vec();
    Ok(HostTensor { shape, data: host_values(tensor)? })
}

/// A row `[1, n]` on the host, as a vector.
fn host_vector(row: &Tensor<2>) -> Result<HostTensor, ModelError> {
    let data = host_values(row)?;
    Ok(HostTensor { shape: vec![data.len()], data })
}

/// A tensor's values on the host, in f32.
pub(super) fn host_values(tensor: &Tensor<2>) -> Result<Vec<f32>, ModelError> {
    Ok(tensor.clone().without_autodiff().try_into_vec_as::<f32>().map_err(DeviceError::from)?)
}

/// Twice the rank at the same scaling, everywhere.
fn double_rank(config: &mut AdapterConfig) {
    let alpha = if config.use_rslora { std::f64::consts::SQRT_2 } else { 2.0 };
    config.r *= 2;
    config.lora_alpha *= alpha;
    config.rank_pattern.0.iter_mut().for_each(|(_, rank)| *rank *= 2.0);
    config.alpha_pattern.0.iter_mut().for_each(|(_, value)| *value *= alpha);
}
