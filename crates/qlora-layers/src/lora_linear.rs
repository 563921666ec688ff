//! A linear layer as a model holds it: frozen, adapted, or trained in full.

use crate::ops::matmul_into;
use crate::params::{constant, flattened, frozen, in_pass, track, trainable};
use crate::{FrozenLinear, LayerError, LoraAdapter, Pass};
use burn::module::{Module, Param};
use burn::tensor::{FloatDType, Tensor};
use std::fmt;
use std::sync::Arc;

/// Sees the input of a layer, `[tokens, in_features]`, in every forward pass: for initialisations and quantizers
/// that look at activations.
#[derive(Clone)]
pub struct InputObserver(Arc<dyn Fn(&Tensor<2>) + Send + Sync>);

impl InputObserver {
    /// An observer that calls `see`.
    pub fn new(see: impl Fn(&Tensor<2>) + Send + Sync + 'static) -> Self {
        Self(Arc::new(see))
    }
}

impl fmt::Debug for InputObserver {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("InputObserver")
    }
}

/// What takes the place of a layer's weight and bias: trained in full, or replaced by an adapter's file.
#[derive(Module, Debug)]
pub struct WholeLinear {
    /// `[out_features, in_features]`, f32; `None` leaves the frozen weight.
    pub weight: Option<Param<Tensor<2>>>,
    /// `[1, out_features]`, f32; `None` leaves the frozen bias.
    pub bias: Option<Param<Tensor<2>>>,
}

/// A frozen linear layer with an optional bias and an optional adapter:
/// `y = x Wᵀ + b + scaling · dropout(x) lora_aᵀ lora_bᵀ`.
///
/// As a Burn module it trains with any optimizer: the factors are parameters that require gradients, everything else is
/// frozen. [`LoraLinearConfig`](crate::LoraLinearConfig) makes one out of a burn-nn layer;
/// [`apply_lora`](crate::apply_lora) adapts the linear layers of a whole module.
#[derive(Module, Debug)]
pub struct LoraLinear {
    /// The frozen weight.
    pub base: FrozenLinear,
    /// The frozen bias `[out_features]` in the compute dtype.
    pub bias: Option<Param<Tensor<1>>>,
    /// The trainable update.
    pub adapter: Option<LoraAdapter>,
    /// What replaces weight or bias.
    pub whole: Option<WholeLinear>,
    /// The weight before an initialisation took the adapter's start out of it, where it must come back.
    pub original: Option<FrozenLinear>,
    /// Sees the layer's inputs.
    #[module(skip)]
    pub observer: Option<InputObserver>,
}

impl LoraLinear {
    /// A layer without an adapter.
    pub fn frozen(base: FrozenLinear, bias: Option<Tensor<1>>) -> Self {
        let bias = bias.map(|bias| frozen(bias.without_autodiff()));
        Self { base, bias, adapter: None, whole: None, original: None, observer: None }
    }

    /// The layer as a Burn module runs it: what [`LoraAdapter::next_pass`] says is recorded and dropped.
    ///
    /// # Shapes
    /// - `x`: `[.., in_features]`
    /// - output: `[.., out_features]`, dtype of `x`
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let pass = match &self.adapter {
            Some(adapter) => adapter.next_pass(&x.device()),
            None => Pass { tracked: true, dropout_seed: None },
        };
        flattened(x, |x| self.forward_in(x, pass))
    }

    /// The layer in a pass whose caller decides what is recorded and which masks are drawn.
    ///
    /// With an adapter the sum is taken in f32 and rounded once. Rounding the base's part to bf16 first would
    /// swallow every update below half an ulp of it, which is what updates are in the first steps: measured
    /// on the reference run, the loss after two steps was then off by 1 %.
    ///
    /// # Shapes
    /// - `x`: `[tokens, in_features]`
    /// - output: `[tokens, out_features]`, dtype of `x`
    pub fn forward_in(&self, x: Tensor<2>, pass: Pass) -> Tensor<2> {
        self.run(x, pass, false, false)
    }

    /// [`forward_in`](Self::forward_in) with the sums kept in f32 whatever the dtype of `x`: where much hangs on small differences.
    ///
    /// # Shapes
    /// As there; the output is f32.
    pub fn forward_wide(&self, x: Tensor<2>, pass: Pass) -> Tensor<2> {
        self.run(x, pass, false, true)
    }

    /// The frozen weight and bias alone, in a pass without a graph.
    ///
    /// # Shapes
    /// As [`forward_in`](Self::forward_in).
    pub fn forward_bare(&self, x: Tensor<2>) -> Tensor<2> {
        self.plus_bias(self.base.forward(x))
    }

    /// With the frozen bias, in the dtype of `y`.
    pub(crate) fn plus_bias(&self, y: Tensor<2>) -> Tensor<2> {
        let held = y.dtype();
        match &self.bias {
            Some(bias) => y + bias.val().without_autodiff().cast(held).unsqueeze(),
            None => y,
        }
    }

    /// [`forward_in`](Self::forward_in) for its gradients alone. The gradients of `x Wᵀ` need no `x Wᵀ`, so over a 4-bit
    /// weight the product is left out, and the returned tensor is then uninitialised.
    pub fn record(&self, x: Tensor<2>, pass: Pass) -> Tensor<2> {
        self.run(x, pass, true, false)
    }

    fn run(&self, x: Tensor<2>, pass: Pass, gradients_only: bool, wide: bool) -> Tensor<2> {
        if let Some(InputObserver(see)) = &self.observer {
            see(&x);
        }
        let dtype = x.dtype();
        let whole = self.whole.as_ref();
        let more = self.bias.is_some() || whole.is_some_and(|whole| whole.bias.is_some());
        let out = if more || wide { FloatDType::F32 } else { dtype.into() };
        let held = if wide { FloatDType::F32 } else { dtype.into() };
        let y = match (&self.adapter, whole.and_then(|whole| whole.weight.as_ref())) {
            (Some(adapter), _) => adapter.apply(&self.base, x, pass, gradients_only, out),
            (None, Some(weight)) => {
                let weight = in_pass(weight, pass).cast(dtype);
                matmul_into(x, weight.transpose(), held)
            }
            (None, None) => self.base.forward_into(x, held),
        };
        // A sum that is still in f32 is rounded after the bias.
        match whole.and_then(|whole| whole.bias.as_ref()) {
            Some(bias) => (y.cast(FloatDType::F32) + in_pass(bias, pass)).cast(held),
            None => self.plus_bias(y).cast(held),
        }
    }

    /// Everything that is trained, by name, in a fixed order.
    pub fn parameters(&self) -> Vec<(&'static str, &Tensor<2>)> {
        match (&self.adapter, &self.whole) {
            (Some(adapter), _) => adapter.parameters(),
            (None, Some(whole)) => {
                let weight = whole.weight.iter().map(|weight| ("weight", &**weight));
                weight.chain(whole.bias.iter().map(|bias| ("bias", &**bias))).collect()
            }
            (None, None) => Vec::new(),
        }
    }

    /// As [`parameters`](Self::parameters).
    pub fn parameters_mut(&mut self) -> Vec<(&'static str, &mut Param<Tensor<2>>)> {
        match (&mut self.adapter, &mut self.whole) {
            (Some(adapter), _) => adapter.parameters_mut(),
            (None, Some(whole)) => {
                let weight = whole.weight.iter_mut().map(|weight| ("weight", weight));
                weight.chain(whole.bias.iter_mut().map(|bias| ("bias", bias))).collect()
            }
            (None, None) => Vec::new(),
        }
    }

    /// Starts recording: everything that is trained becomes a leaf of the autodiff graph.
    pub fn track(&mut self) {
        match &mut self.adapter {
            Some(adapter) => adapter.track(),
            None => self.parameters_mut().into_iter().for_each(|(_, parameter)| track(parameter)),
        }
    }

    /// Computes what stays the same while nothing is trained, DoRA's norms, and keeps it for passes without a graph.
    pub fn keep_scale(&mut self) {
        if let Some(adapter) = &mut self.adapter {
            adapter.keep_scale(&self.base);
        }
    }

    /// Makes the layer trained in full: f32 copies of weight and bias.
    pub fn train_whole(&mut self) {
        self.whole = Some(WholeLinear {
            weight: Some(trainable(self.base.to_dense(FloatDType::F32))),
            bias: self.bias.as_ref().map(|bias| trainable(bias.val().cast(FloatDType::F32).unsqueeze())),
        });
    }

    /// Takes off whatever was put on the frozen layer.
    pub fn unload(&mut self) {
        self.adapter = None;
        self.whole = None;
        if let Some(original) = self.original.take() {
            self.base = original;
        }
    }

    /// Makes adapter and replacements part of the dense weight and bias, in `dtype`.
    pub fn merge(&mut self, dtype: FloatDType) {
        if let Some(adapter) = self.adapter.take() {
            self.base = FrozenLinear::dense(adapter.merged(&self.base).cast(dtype));
            if let Some(update) = &adapter.bias {
                let update = constant(update).mul_scalar(adapter.scaling.get()).squeeze_dim::<1>(0);
                let update = match self.bias.take() {
                    Some(bias) => bias.into_value().cast(FloatDType::F32) + update,
                    None => update,
                };
                self.bias = Some(frozen(update.cast(dtype)));
            }
        }
        if let Some(WholeLinear { weight, bias }) = self.whole.take() {
            if let Some(weight) = weight {
                self.base = FrozenLinear::dense(constant(&weight).cast(dtype));
            }
            if let Some(bias) = bias {
                self.bias = Some(frozen(constant(&bias).squeeze_dim::<1>(0).cast(dtype)));
            }
        }
    }

    /// What the layer computes as one dense weight `[out_features, in_features]` and a bias `[out_features]`, in `dtype` and without a
    /// graph: adapter and replacements are part of both.
    pub fn effective(&self, dtype: FloatDType) -> (Tensor<2>, Option<Tensor<1>>) {
        let mut merged = self.clone();
        merged.merge(dtype);
        (merged.base.to_dense(dtype), merged.bias.map(|bias| bias.into_value().without_autodiff().cast(dtype)))
    }

    /// Puts an adapter of given factors in place, as a loaded one.
    ///
    /// # Errors
    /// [`LayerError::Shape`] when a part does not fit this layer; `name` names it in the message.
    pub fn set_adapter(&mut self, name: &str, adapter: LoraAdapter) -> Result<(), LayerError> {
        let [out_features, in_features] = self.base.shape();
        let rank = adapter.rank();
        let row = [1, out_features];
        for (part, found, expected) in [
            ("lora_A.weight", Some(adapter.lora_a.dims()), [rank, in_features]),
            ("lora_B.weight", Some(adapter.lora_b.dims()), [out_features, rank]),
            ("lora_B.bias", adapter.bias.as_ref().map(|bias| bias.dims()), row),
            ("lora_magnitude_vector", adapter.dora.as_ref().map(|dora| dora.magnitude.dims()), row),
        ] {
            if found.is_some_and(|found| found != expected) {
                return Err(LayerError::Shape {
                    what: format!("{name}.{part} (the adapter was made for another model?)"),
                    expected: expected.into(),
                    found: found.unwrap_or_default().into(),
                });
            }
        }
        self.adapter = Some(adapter);
        Ok(())
    }
}
