//! How fresh adapters start: from nothing, from the weights (PiSSA, OLoRA, LoftQ), or from activations (EVA).
//!
//! What starts from weights needs them in full precision. A base in 4 bits holds what is left of them, so they are read
//! from the checkpoint again, one at a time; of a checkpoint that is in 4 bits itself, or
//! stacks its experts in one tensor, the decoded weights are taken.

use super::export::host_values;
use crate::ModelError;
use crate::decoder::Decoder;
use crate::family::Root;
use adapter_io::low_rank::{Components, Factors, orthonormal, principal, quantization_error};
use adapter_io::{Checkpoint, FormatError, HostTensor};
use burn::tensor::{DType, Device, FloatDType, Tensor, TensorData};
use nf4_quant::{QuantConfig, Quantized4bit};
use qlora_layers::target_modules::Target;
use qlora_layers::{
    FrozenLinear, Initialization, InputObserver, Linear4bit, LoraAdapter, LoraConfig, LoraLinear, LoraLinearConfig,
    Pass, mix,
};
use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, Mutex, PoisonError};

/// Rows of activations that go into one step of the components' update.
const CHUNK: usize = 512;

/// A batch whose activations are looked at.
#[derive(Clone, Debug)]
pub struct CalibrationBatch {
    /// `rows * len` ids, row-major.
    pub ids: Vec<u32>,
    /// Rows.
    pub rows: usize,
    /// Which of the tokens count.
    pub counted: Vec<bool>,
}

/// A fresh adapter, and the weight it belongs to where that is another one.
pub(super) struct Start {
    pub(super) adapter: LoraAdapter,
    pub(super) base: Option<FrozenLinear>,
}

/// Makes fresh adapters.
pub(super) struct Starter<'a> {
    config: &'a LoraConfig,
    seed: u64,
    device: Device,
    /// Where the model may lie in the checkpoint; the decoder's own paths begin with the first.
    roots: &'static [Root],
    checkpoint: Option<Checkpoint>,
    components: Option<HashMap<String, HostTensor>>,
}

impl<'a> Starter<'a> {
    pub(super) fn new(
        model: &Decoder,
        config: &'a LoraConfig,
        seed: u64,
        components: Option<HashMap<String, HostTensor>>,
    ) -> Result<Self, ModelError> {
        let from_weights =
            matches!(config.init, Initialization::Pissa { .. } | Initialization::Olora | Initialization::Loftq);
        let quantized = model.linears().any(|(_, linear)| matches!(linear.base, FrozenLinear::Quantized(_)));
        let dir = model.config.path().parent();
        let checkpoint = match dir {
            Some(dir) if from_weights && quantized => Some(Checkpoint::open(dir)?),
            _ => None,
        };
        let roots = model.config.roots;
        Ok(Self { config, seed, device: model.device.clone(), roots, checkpoint, components })
    }

    pub(super) fn linear(&self, linear: &LoraLinear, target: &Target, index: u32) -> Result<Start, ModelError> {
        let (shape, dropout) = (linear.base.shape(), self.config.dropout);
        let &Target { rank, scaling, ref path, .. } = target;
        let plain = |adapter| Ok(Start { adapter, base: None });
        match self.config.init {
            Initialization::Default | Initialization::Gaussian => {
                let settings = LoraLinearConfig::new(rank)
                    .with_alpha(target.alpha)
                    .with_dropout(dropout)
                    .with_use_rslora(self.config.use_rslora)
                    .with_init(self.config.init)
                    .with_seed(self.seed)
                    .with_index(Some(index));
                plain(settings.adapter(shape, &self.device)?)
            }
            Initialization::Eva => {
                let components = self.components.as_ref().and_then(|all| all.get(path));
                let a = components.ok_or_else(|| self.fail(path, "no activations reached it".into()))?;
                let lora_b = Tensor::zeros([shape[0], rank], (&self.device, DType::F32));
                plain(LoraAdapter::from_factors(self.upload(a), lora_b, scaling, dropout, index))
            }
            Initialization::Pissa { .. } | Initialization::Olora | Initialization::Loftq => {
                let weight = self.weight(path, linear)?;
                let (factors, rest) = self.decompose(path, linear, &weight, rank, scaling, index)?;
                let (lora_a, lora_b) = (self.upload(&factors.a), self.upload(&factors.b));
                let adapter = LoraAdapter::from_factors(lora_a, lora_b, scaling, dropout, index);
                let base = rest.map(|rest| self.hold(path, linear, &rest)).transpose()?;
                let adapter = if base.is_some() { adapter.with_initial() } else { adapter };
                Ok(Start { adapter, base })
            }
        }
    }

    fn fail(&self, path: &str, problem: String) -> ModelError {
        ModelError::Initialization { init: self.config.init.to_string(), module: Some(path.into()), problem }
    }

    /// The factors, and what is left of the weight where it changes.
    fn decompose(
        &self,
        path: &str,
        linear: &LoraLinear,
        weight: &HostTensor,
        rank: usize,
        scaling: f32,
        index: u32,
    ) -> Result<(Factors, Option<HostTensor>), ModelError> {
        let seed = mix(self.seed ^ mix(u64::from(index)));
        let named = |e: FormatError| self.fail(path, e.to_string());
        let factors = match self.config.init {
            Initialization::Pissa { iterations } => {
                principal(weight, rank, scaling, iterations, seed).map_err(named)?
            }
            Initialization::Olora => orthonormal(weight, rank).map_err(named)?,
            _ => {
                let FrozenLinear::Quantized(base) = &linear.base else {
                    return Err(self.fail(
                        path,
                        "it makes up for what quantization loses, and this base is not quantized: set quantization.quant_type to \"nf4\" or \"fp4\", or choose another initialisation".into(),
                    ));
                };
                let config = quant_config(base);
                let quantize = |w: &HostTensor| -> Result<HostTensor, ModelError> {
                    let failed = |source| ModelError::Quantize { module: path.to_string(), source };
                    let weight = Quantized4bit::quantize(&w.data, &w.shape, &config).map_err(failed)?;
                    Ok(HostTensor { shape: w.shape.clone(), data: weight.dequantize().map_err(failed)? })
                };
                let rounds = self.config.loftq_iterations;
                let (factors, rest) = quantization_error(weight, rank, scaling, rounds, seed, quantize)?;
                return Ok((factors, (rounds > 1).then_some(rest)));
            }
        };
        let rest = factors.taken_from(weight, scaling).map_err(named)?;
        Ok((factors, Some(rest)))
    }

    /// The full-precision weight.
    fn weight(&self, path: &str, linear: &LoraLinear) -> Result<HostTensor, ModelError> {
        let shape = linear.base.shape();
        let data = match (&linear.base, &self.checkpoint) {
            (FrozenLinear::Quantized(_), Some(file)) => match self.name_in(file, path)? {
                Some(name) => {
                    let tensor = file.dense(&name)?;
                    tensor.expect_shape(&shape)?;
                    Some(tensor.to_f32_vec()?)
                }
                None => None,
            },
            _ => None,
        };
        let data = match data {
            Some(data) => data,
            None => host_values(&linear.base.to_dense(FloatDType::F32))?,
        };
        Ok(HostTensor { shape: shape.into(), data })
    }

    /// The full-precision weight's name in a checkpoint, if it is there by itself.
    fn name_in(&self, file: &Checkpoint, path: &str) -> Result<Option<String>, ModelError> {
        let own = self.roots[0];
        for root in self.roots {
            let module = match path.strip_prefix(own.model) {
                Some(rest) => root.below(rest),
                None => root.head.to_string(),
            };
            let name = format!("{module}.weight");
            if file.contains(&name) && file.quantized(&module)?.is_none() {
                return Ok(Some(name));
            }
        }
        Ok(None)
    }

    /// A changed weight, held as the layer's own was.
    fn hold(&self, path: &str, linear: &LoraLinear, weight: &HostTensor) -> Result<FrozenLinear, ModelError> {
        Ok(match &linear.base {
            FrozenLinear::Quantized(base) => {
                let failed = |source| ModelError::Quantize { module: path.to_string(), source };
                let mut quantized =
                    Quantized4bit::quantize(&weight.data, &weight.shape, &quant_config(base)).map_err(failed)?;
                quantized.state.dtype = base.layout().dtype;
                FrozenLinear::Quantized(Linear4bit::from_quantized(&quantized, &self.device)?)
            }
            FrozenLinear::Dense(base) => {
                let data = TensorData::new(weight.data.clone(), base.dims());
                FrozenLinear::dense(Tensor::from_data(data, (&self.device, base.dtype())))
            }
        })
    }

    fn upload(&self, matrix: &HostTensor) -> Tensor<2> {
        let shape = [matrix.shape[0], matrix.shape[1]];
        Tensor::from_data(TensorData::new(matrix.data.clone(), shape), (&self.device, DType::F32))
    }
}

/// The settings that a weight was quantized with.
fn quant_config(base: &Linear4bit) -> QuantConfig {
    let layout = base.layout();
    QuantConfig {
        quant_type: layout.quant_type,
        blocksize: layout.blocksize,
        double_quant: layout.nested_blocksize.is_some(),
    }
}

/// What the observers of all layers share.
struct Seen {
    counted: Vec<bool>,
    /// Of the first batch: which components saw these very inputs.
    inputs: HashMap<u64, usize>,
    /// Components, and the layer that feeds them; layers with equal inputs share them.
    components: Vec<(usize, Components)>,
    /// By layer.
    component_of: Vec<Option<usize>>,
    failure: Option<ModelError>,
}

/// EVA: gives the targets the ranks at which components of their inputs explain most, within the same sum of ranks,
/// and returns those components by module. Targets that explain least may lose their adapter.
///
/// As in PEFT a module has at most `eva_rho` times its rank, and its alpha grows with its rank so that the
/// scaling stays.
pub(super) fn explain(
    model: &Decoder,
    config: &LoraConfig,
    targets: &mut Vec<Target>,
    calibration: &[CalibrationBatch],
) -> Result<HashMap<String, HostTensor>, ModelError> {
    let fail = |problem: String| ModelError::Initialization { init: "eva".into(), module: None, problem };
    if targets.iter().any(|target| target.path == model.config.embed_path()) {
        return Err(fail("the embedding has no activations before it: leave it out of lora.target_modules".into()));
    }
    if calibration.is_empty() {
        return Err(fail("it needs rows to look at".into()));
    }
    let limits: Vec<usize> = targets.iter().map(|t| (t.rank as f64 * config.eva_rho).round() as usize).collect();
    let most = limits.iter().copied().max().unwrap_or(0);
    let seen = Arc::new(Mutex::new(Seen {
        counted: Vec::new(),
        inputs: HashMap::new(),
        components: Vec::new(),
        component_of: vec![None; targets.len()],
        failure: None,
    }));
    let mut observed = model.clone();
    for (path, linear) in observed.linears_mut() {
        if let Some(layer) = targets.iter().position(|target| target.path == path) {
            let seen = seen.clone();
            linear.observer = Some(InputObserver::new(move |x| {
                seen.lock().unwrap_or_else(PoisonError::into_inner).add_inputs(layer, x, most);
            }));
        }
    }
    let with_head = targets.iter().any(|target| target.path == model.head_path());
    for batch in calibration {
        lock(&seen).counted = batch.counted.clone();
        let sequence = observed.sequence(batch.rows, batch.ids.len() / batch.rows.max(1), 0);
        let x = observed.begin(&sequence, &batch.ids, Pass::INFERENCE);
        let blocks = observed.blocks.iter();
        let x = blocks.fold(x, |x, block| observed.run_block(block, x, &sequence, Pass::INFERENCE));
        if with_head {
            observed.logits(x, Pass::INFERENCE);
        }
        let mut seen = lock(&seen);
        seen.inputs.clear();
        if let Some(failure) = seen.failure.take() {
            return Err(failure);
        }
    }
    let seen = lock(&seen);
    let components_of = |layer: usize| seen.component_of[layer].map(|i| &seen.components[i].1);
    let mut ratios: Vec<(usize, f64)> = Vec::new();
    for (layer, target) in targets.iter().enumerate() {
        let tokens = components_of(layer).map_or(0, Components::seen);
        if tokens < limits[layer] {
            return Err(fail(format!(
                "{} saw {tokens} tokens that count, {} components need more: raise lora.eva_batches or lower lora.rank or lora.eva_rho",
                target.path, limits[layer]
            )));
        }
        let explained = components_of(layer).map(Components::explained).unwrap_or_default();
        ratios.extend(explained.into_iter().take(limits[layer]).map(|ratio| (layer, ratio)));
    }
    // A stable sort: of equal ratios the earlier layer's counts first.
    ratios.sort_by(|a, b| b.1.total_cmp(&a.1));
    let budget: usize = targets.iter().map(|target| target.rank).sum();
    let mut ranks = vec![0; targets.len()];
    ratios.iter().take(budget).for_each(|(layer, _)| ranks[*layer] += 1);
    let mut found = HashMap::new();
    let mut kept = Vec::new();
    for (layer, target) in targets.iter().enumerate() {
        let (Some(components), rank @ 1..) = (components_of(layer), ranks[layer]) else { continue };
        let alpha = target.alpha * rank as f32 / target.rank as f32;
        found.insert(target.path.clone(), components.leading(rank));
        kept.push(Target { path: target.path.clone(), rank, alpha, scaling: config.scaling(rank, alpha) });
    }
    *targets = kept;
    Ok(found)
}

fn lock(seen: &Arc<Mutex<Seen>>) -> std::sync::MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Seen {
    fn add_inputs(&mut self, layer: usize, x: &Tensor<2>, most: usize) {
        let [rows, features] = x.dims();
        let known = self.component_of[layer];
        if known.is_some_and(|i| self.components[i].0 != layer) {
            return;
        }
        let values = match host_values(x) {
            Ok(values) => values,
            Err(e) => {
                self.failure.get_or_insert(e);
                return;
            }
        };
        // Experts see some of the tokens only, in an order of their own: they count all.
        let counted = |row: usize| self.counted.len() != rows || self.counted[row];
        let rows = values.chunks_exact(features).enumerate().filter(|(row, _)| counted(*row));
        let kept: Vec<f32> = rows.flat_map(|(_, row)| row.iter().copied()).collect();
        let component = match known {
            Some(component) => component,
            None => {
                let mut hasher = DefaultHasher::new();
                (features, kept.iter().map(|x| x.to_bits()).collect::<Vec<_>>()).hash(&mut hasher);
                let next = self.components.len();
                let component = *self.inputs.entry(hasher.finish()).or_insert(next);
                self.component_of[layer] = Some(component);
                if component != next {
                    return;
                }
                self.components.push((layer, Components::new(features, most)));
                component
            }
        };
        kept.chunks(CHUNK * features).for_each(|chunk| self.components[component].1.add(chunk));
    }
}
