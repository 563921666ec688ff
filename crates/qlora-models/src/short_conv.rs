//! A gated short convolution in the place of attention: `c · conv(b · x)`, where one projection gives `b`, `c` and `x`
//! (Liquid AI, 2025, "LFM2 Technical Report", arXiv 2511.23404).

use crate::sequence::Sequence;
use burn::tensor::{DType, Device, Tensor, TensorData};
use host_copies::persistent;
use qlora_layers::ops::fused::{Conv, causal_conv};

/// A block's short convolution between its projections.
#[derive(Clone, Debug)]
pub(crate) struct ShortConv {
    /// f32 `[taps, width]`.
    weight: Tensor<2>,
}

impl ShortConv {
    /// Of a checkpoint's weight, `[width, 1, taps]`.
    pub fn new(weight: &[f32], taps: usize, device: &Device) -> Self {
        Self { weight: filter(weight, taps, device) }
    }

    /// What it gives for rows that start here.
    ///
    /// # Shapes
    /// `[rows * len, 3 * width]` to `[rows * len, width]`.
    pub fn forward(&self, all: Tensor<2>, sequence: &Sequence) -> Tensor<2> {
        let [b, c, x] = thirds(all);
        let conv =
            Conv { packed: sequence.packed.clone(), silu: false, ..Conv::new(sequence.len, self.weight.dims()[0]) };
        c * causal_conv(b * x, self.weight.clone(), conv)
    }

    /// [`forward`](Self::forward) of one row that goes on from the [last inputs](convolved) of its convolution, or starts here
    /// without them, and those behind it.
    pub fn forward_after(&self, all: Tensor<2>, tail: Option<Tensor<2>>) -> (Tensor<2>, Tensor<2>) {
        let [b, c, x] = thirds(all);
        let (mixed, tail) = convolved(b * x, &self.weight, false, tail);
        (c * mixed, tail)
    }
}

/// A weight `[width, 1, taps]` as the convolution takes it, f32 `[taps, width]`.
pub(crate) fn filter(weight: &[f32], taps: usize, device: &Device) -> Tensor<2> {
    let width = weight.len() / taps;
    let transposed: Vec<f32> = (0..weight.len()).map(|i| weight[i % width * taps + i / width]).collect();
    persistent(device, TensorData::new(transposed, [taps, width]), |data| Tensor::from_data(data, (device, DType::F32)))
}

/// The convolution of one row that goes on from the last inputs of what came before it, `[taps - 1, width]`, or starts here
/// without them, and its own last inputs.
pub(crate) fn convolved(
    x: Tensor<2>,
    weight: &Tensor<2>,
    silu: bool,
    tail: Option<Tensor<2>>,
) -> (Tensor<2>, Tensor<2>) {
    let ([len, width], taps) = (x.dims(), weight.dims()[0]);
    let tail = tail.unwrap_or_else(|| Tensor::zeros([taps - 1, width], (&x.device(), x.dtype())));
    let all = match taps {
        1 => x,
        _ => Tensor::cat(vec![tail, x], 0),
    };
    let tail = all.clone().narrow(0, len, taps - 1);
    let conv = Conv { silu, ..Conv::new(len + taps - 1, taps) };
    (causal_conv(all, weight.clone(), conv).narrow(0, taps - 1, len), tail)
}

/// The three parts of each row.
fn thirds(all: Tensor<2>) -> [Tensor<2>; 3] {
    let width = all.dims()[1] / 3;
    [0, 1, 2].map(|i| all.clone().narrow(1, i * width, width))
}
