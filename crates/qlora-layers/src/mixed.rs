//! One linear layer over rows that have different adapters.

use crate::lora_linear::LoraLinear;
use crate::ops::low_rank_update;
use crate::params::constant;
use crate::{FrozenLinear, Pass};
use burn::module::ParamId;
use burn::tensor::{DType, FloatDType, Tensor};

/// `x` through a layer that the rows of `x` see with different adapters: the first part's rows come first.
///
/// Where the layers of all parts hold the same frozen weight, and adapters are plain low-rank updates, the product with
/// the weight runs once for all rows. Otherwise (magnitudes, weights trained in full, weights that an adapter changed) each
/// part runs by itself. Passes have no graph and no dropout.
///
/// # Shapes
/// - `parts`: numbers of rows, and the layer as these rows see it
/// - `x`: `[tokens, in_features]`, the parts' rows one after the other
/// - output: `[tokens, out_features]`, dtype of `x`
pub fn forward_mixed(parts: &[(usize, &LoraLinear)], x: Tensor<2>) -> Tensor<2> {
    let [(_, first), others @ ..] = parts else { return x };
    let shares = |layer: &LoraLinear| layer.is_plain() && layer.base.is_same(&first.base);
    if others.is_empty() || !parts.iter().all(|(_, layer)| shares(layer)) {
        return by_part(parts, x, |layer, x| layer.forward_in(x, Pass::INFERENCE));
    }
    let dtype = x.dtype();
    if parts.iter().all(|(_, layer)| layer.adapter.is_none()) {
        return first.forward_in(x, Pass::INFERENCE);
    }
    let [out_features, _] = first.base.shape();
    let update = |layer: &LoraLinear, x: Tensor<2>| match &layer.adapter {
        None => Tensor::zeros([x.dims()[0], out_features], (&x.device(), DType::F32)),
        Some(adapter) => {
            let scaling = adapter.scaling.get();
            let update = low_rank_update(x, constant(&adapter.lora_a), constant(&adapter.lora_b), scaling);
            match &adapter.bias {
                Some(bias) => update + constant(bias).mul_scalar(scaling),
                None => update,
            }
        }
    };
    let updates = by_part(parts, x.clone(), update);
    first.plus_bias(first.base.forward_into(x, FloatDType::F32) + updates).cast(dtype)
}

/// Runs each part's rows by themselves: `parts` are numbers of rows and what runs them, the first part's rows come first.
pub fn by_part<'a, T>(
    parts: &[(usize, &'a T)],
    x: Tensor<2>,
    run: impl Fn(&'a T, Tensor<2>) -> Tensor<2>,
) -> Tensor<2> {
    if let [(_, part)] = *parts {
        return run(part, x);
    }
    let mut start = 0;
    let outputs = parts.iter().map(|&(rows, part)| {
        let output = run(part, x.clone().narrow(0, start, rows));
        start += rows;
        output
    });
    Tensor::cat(outputs.collect(), 0)
}

impl LoraLinear {
    /// Whether the layer is its frozen weight, its bias and at most a low-rank update.
    fn is_plain(&self) -> bool {
        self.whole.is_none() && self.adapter.as_ref().is_none_or(|adapter| adapter.dora.is_none())
    }

    /// Whether the layer is its frozen weight and bias alone.
    pub fn is_bare(&self) -> bool {
        self.adapter.is_none() && self.whole.is_none()
    }
}

impl FrozenLinear {
    /// Names the weight: clones of it have the same name, other weights have others.
    pub fn id(&self) -> ParamId {
        match self {
            Self::Quantized(weight) => weight.id(),
            Self::Dense(weight) => weight.id,
        }
    }

    /// Whether both are the same weight, not only equal ones: clones of one layer, or of modules that hold it.
    pub fn is_same(&self, other: &Self) -> bool {
        self.id() == other.id()
    }
}
