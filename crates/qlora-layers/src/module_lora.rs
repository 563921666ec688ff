//! LoRA on the linear layers of a Burn module, by path.
//!
//! [`apply_lora`] goes through Burn's own hook for this, [`Module::apply_reparameterization`]: each matching burn-nn
//! [`Linear`] keeps its place and type, its weight parameter gets a [`LoraLinear`] attached, and the dense weight is dropped.
//! From then on Burn does the rest: visitors, optimizers and records see the factors and the packed codes, `to_device` moves
//! them, `valid` and `train` switch them, `materialize` merges them into a dense weight.
//!
//! # Which `forward` to call
//!
//! `Linear::forward` multiplies by one dense weight, so Burn asks the attached layer for it: `W + s·BA` is computed in each
//! pass, kept for the backward pass, and gets a gradient of its own size. The results are right, and LoRA needs as much
//! memory as Burn's `apply_qlora`. [`LoraForward::lora_forward`] takes the same layer through [`LoraLinear::forward`]
//! instead: one operation that dequantizes while it multiplies and saves nothing dense. Only this way a 4-bit base saves memory
//! in training, and only this way dropout acts.
//!
//! Burn's own `apply_lora` and `apply_qlora` can't be combined with this on one parameter: Burn keeps one reparameterization
//! a parameter, and the first one stays.

use crate::lora_linear_config::LoraLinearConfig;
use crate::module_paths::{Found, LORA_LINEAR, WEIGHT, adaptable, inside};
use crate::params::in_pass;
use crate::target_modules::{Target, resolve, resolve_saved};
use crate::token_rows::refuse;
use crate::{FrozenLinear, Initialization, LayerError, LoraConfig, LoraLinear, Pass};
use burn::module::{Module, Param, Reparameterization, Reparameterizer};
use burn::nn::Linear;
use burn::tensor::{FloatDType, Tensor};
use nf4_quant::QuantConfig;
use std::collections::{HashMap, HashSet};

/// Puts fresh adapters on the burn-nn linear layers of `module` whose path matches `config.target_modules`, over weights that are
/// quantized or, with `None`, stay dense. Everything else is frozen, but for `modules_to_save`.
///
/// A module's path is what Burn's records call it, such as `layers.0.attention.query`. `"all-linear"` leaves out a layer whose
/// name is `lm_head`, as PEFT leaves out the output head. Initial values depend on `seed` and the order of the layers alone.
///
/// ```
/// use burn::module::Module;
/// use burn::nn::{Linear, LinearConfig};
/// use burn::tensor::{Device, Tensor};
/// use nf4_quant::QuantConfig;
/// use qlora_layers::{LoraConfig, LoraForward, apply_lora};
///
/// #[derive(Module, Debug)]
/// struct Mlp {
///     up: Linear,
///     down: Linear,
/// }
///
/// let device = Device::flex().autodiff();
/// let mlp = Mlp { up: LinearConfig::new(64, 128).init(&device), down: LinearConfig::new(128, 64).init(&device) };
/// let config = LoraConfig { rank: 8, ..LoraConfig::default() };
/// let mlp = apply_lora(mlp, &config, QuantConfig::default(), 0)?;
/// let x = Tensor::<2>::ones([3, 64], &device);
/// let y = mlp.down.lora_forward(mlp.up.lora_forward(x));
/// assert_eq!(y.dims(), [3, 64]);
/// # Ok::<(), qlora_layers::LayerError>(())
/// ```
///
/// # Errors
/// A setting is out of range or matches nothing ([`LayerError::Config`], [`LayerError::Pattern`], [`LayerError::NoTarget`],
/// [`LayerError::NoSavedModule`]) or belongs to decoders (`trainable_token_indices`); a layer has an adapter already ([`LayerError::Adapted`]); a weight can't be quantized.
pub fn apply_lora<M: Module>(
    module: M,
    config: &LoraConfig,
    base: impl Into<Option<QuantConfig>>,
    seed: u64,
) -> Result<M, LayerError> {
    if !matches!(config.init, Initialization::Default | Initialization::Gaussian) {
        return Err(LayerError::Config {
            field: "init",
            value: config.init.to_string(),
            reason: "must be default or gaussian for a Burn module",
        });
    }
    refuse(config)?;
    let found = Found::of(&module);
    let all: Vec<String> = found.linears.iter().chain(&found.adapted).cloned().collect();
    let targets = resolve(config, &adaptable(&all))?;
    if let Some(target) = targets.iter().find(|target| found.adapted.contains(&target.path)) {
        return Err(LayerError::Adapted { path: target.path.clone() });
    }
    let saved = resolve_saved(&config.modules_to_save, &found.modules)?;
    let layers = targets.into_iter().zip(0..).map(|(target, index)| {
        let Target { path, rank, alpha, .. } = target;
        let settings = LoraLinearConfig::new(rank)
            .with_alpha(alpha)
            .with_dropout(config.dropout)
            .with_use_rslora(config.use_rslora)
            .with_use_dora(config.use_dora)
            .with_lora_bias(config.lora_bias)
            .with_init(config.init)
            .with_seed(seed)
            .with_index(Some(index));
        (path, settings)
    });
    let mut layers: HashMap<String, LoraLinearConfig> = layers.collect();
    let base = base.into();
    attach(module, &found, &saved, |path, weight| {
        let Some(settings) = layers.remove(path) else { return Ok(None) };
        let device = weight.device();
        let frozen = FrozenLinear::from_weight(weight, base.as_ref())?;
        settings.over(frozen, None, &device).map(Some)
    })
}

/// Attaches the layers that `layer` makes for a path and a weight `[out_features, in_features]`, and freezes everything else but
/// `saved` modules.
pub(crate) fn attach<M: Module>(
    module: M,
    found: &Found,
    saved: &[String],
    layer: impl FnMut(&str, Tensor<2>) -> Result<Option<LoraLinear>, LayerError>,
) -> Result<M, LayerError> {
    let mut failure = None;
    let attach = Attach {
        linears: found.linears.iter().cloned().collect(),
        saved: saved.iter().cloned().collect(),
        adapted: &found.adapted,
        layer,
        failure: &mut failure,
    };
    let module = module.apply_reparameterization(attach);
    match failure {
        Some(error) => Err(error),
        None => Ok(module),
    }
}

struct Attach<'a, F> {
    linears: HashSet<String>,
    saved: HashSet<String>,
    adapted: &'a HashSet<String>,
    layer: F,
    failure: &'a mut Option<LayerError>,
}

impl<F: FnMut(&str, Tensor<2>) -> Result<Option<LoraLinear>, LayerError>> Reparameterizer for Attach<'_, F> {
    type Reparam = LoraLinear;

    fn reparameterize<const D: usize>(
        &mut self,
        path: &str,
        param: Param<Tensor<D>>,
    ) -> (Param<Tensor<D>>, Option<LoraLinear>) {
        let module = path.rsplit_once('.').map_or("", |(module, _)| module);
        // The parts of an adapted layer come after its weight, on a path below it.
        if self.saved.contains(module) || self.adapted.iter().any(|layer| inside(path, layer)) {
            return (param, None);
        }
        let param = param.set_require_grad(false);
        if D != 2 || self.failure.is_some() || !self.linears.contains(module) || !path.ends_with(WEIGHT) {
            return (param, None);
        }
        let weight = param.base();
        let [d_input, d_output] = [weight.shape()[0], weight.shape()[1]];
        // Burn keeps [d_input, d_output].
        let weight: Tensor<2> = weight.reshape([d_input, d_output]).transpose();
        match (self.layer)(module, weight) {
            Ok(None) => (param, None),
            Ok(Some(layer)) => {
                let empty: Tensor<D> = Tensor::zeros([0; D], &param.lazy_device());
                (param.map(|weight| empty.cast(weight.dtype())), Some(layer))
            }
            Err(error) => {
                *self.failure = Some(error);
                (param, None)
            }
        }
    }
}

impl Reparameterization for LoraLinear {
    const NAME: &'static str = LORA_LINEAR;

    /// The dense weight `[in_features, out_features]`, as burn-nn's layers have it, in the dtype of `base`, which holds nothing
    /// else.
    fn apply<const D: usize>(&self, base: Tensor<D>) -> Tensor<D> {
        let [out_features, in_features] = self.base.shape();
        let weight = match &self.adapter {
            Some(adapter) => {
                if adapter.dropout > 0.0 && adapter.training.is_enabled() && adapter.lora_a.is_require_grad() {
                    tell_once();
                }
                adapter.effective(&self.base, Pass { tracked: true, dropout_seed: None })
            }
            None => match self.whole.as_ref().and_then(|whole| whole.weight.as_ref()) {
                Some(weight) => in_pass(weight, Pass { tracked: true, dropout_seed: None }),
                None => self.base.to_dense(FloatDType::F32),
            },
        };
        let mut shape = [1; D];
        (shape[0], shape[D - 1]) = (in_features, out_features);
        weight.cast(base.dtype()).transpose().reshape(shape)
    }
}

fn tell_once() {
    static TOLD: std::sync::Once = std::sync::Once::new();
    TOLD.call_once(|| {
        tracing::warn!(
            "LoRA's dropout does not act where Linear::forward asks for a dense weight: call lora_forward instead"
        );
    });
}

/// The forward pass of a burn-nn layer that may have an adapter.
pub trait LoraForward {
    /// `Linear::forward`, through [`LoraLinear::forward`] where [`apply_lora`] attached one.
    ///
    /// # Shapes
    /// `[.., d_input]` to `[.., d_output]`, dtype of `x`.
    fn lora_forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D>;
}

impl LoraForward for Linear {
    fn lora_forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let Some(layer) = self.weight.reparameterization::<LoraLinear>() else { return self.forward(x) };
        let y = layer.forward(x);
        match &self.bias {
            Some(bias) => y + bias.val().unsqueeze(),
            None => y,
        }
    }
}
