//! Frozen layers that share an input, for tokens that have different adapters, whatever the number of tokens.
//!
//! The product with the frozen weight runs once for all tokens, with its sums kept in f32; the updates of all layers are two
//! launches of [`fused_kernels::low_rank::stacked`], on CUDA, and each sum is rounded once. Up to [`JOINED_TOKENS`]
//! tokens [`forward_joined`] is faster.
//!
//! [`JOINED_TOKENS`]: crate::JOINED_TOKENS
//! [`forward_joined`]: crate::forward_joined

use crate::joined::{AdapterSpans, HeldStack, JoinedLayer, bias_for, room};
use crate::lora_linear::LoraLinear;
use burn::tensor::{DType, Device, FloatDType, Tensor};
use burn_cubecl::tensor::CubeTensor;
use cubecl::server::Handle;
use fused_kernels::FloatFormat;
use fused_kernels::low_rank::stacked::{Input, Stack, Update, project, supports_weight, update};
use host_copies::{as_cube, client_of, from_cube};

/// Whether [`forward_stacked`] takes a layer with inputs of a dtype on a device, its own adapter aside.
pub fn can_stack(layer: &LoraLinear, dtype: FloatDType, device: &Device) -> bool {
    let [out_features, in_features] = layer.base.shape();
    layer.observer.is_none()
        && half_format(dtype.into()).is_some()
        && client_of(device).is_some_and(|client| supports_weight(&client, out_features, in_features))
}

fn half_format(dtype: DType) -> Option<FloatFormat> {
    match dtype {
        DType::BF16 => Some(FloatFormat::BF16),
        DType::F16 => Some(FloatFormat::F16),
        _ => None,
    }
}

/// `x` through each of up to three layers. `None` where the device or a layer has no kernel; see [`can_stack`].
///
/// # Shapes
/// - `x`: `[tokens, in_features]`
/// - outputs: `[tokens, out_features]` of each layer, dtype of `x`
pub fn forward_stacked(x: &Tensor<2>, layers: &[JoinedLayer<'_>], spans: &AdapterSpans) -> Option<Vec<Tensor<2>>> {
    let (format, device, [tokens, in_features]) = (half_format(x.dtype())?, x.device(), x.dims());
    let takes = |each: &JoinedLayer<'_>| each.stack.is_none() || can_stack(each.layer, x.dtype().into(), &device);
    if !layers.iter().all(takes) {
        return None;
    }
    let (cube, words) = (as_cube(x)?, spans.handle()?);
    let held: Vec<Option<Held>> = layers
        .iter()
        .map(|each| match each.stack {
            Some(stack) => Some(Some(Held::new(each.layer, HeldStack::new(stack)?, &cube))),
            None => Some(None),
        })
        .collect::<Option<_>>()?;
    let stacks: Vec<Stack<'_>> = held.iter().flatten().map(Held::stack).collect();
    if stacks.is_empty() {
        return Some(layers.iter().map(|each| each.layer.forward_bare(x.clone())).collect());
    }
    let input = Input { x: &cube.handle, spans: &words, tokens, in_features, format };
    // What is refused is left to the caller.
    let product = project(&cube.client, &input, &stacks).ok()?;
    let mut outputs = Vec::new();
    let mut sums: Vec<CubeTensor> = Vec::new();
    for (held, each) in held.iter().zip(layers) {
        outputs.push(match held {
            Some(held) => {
                sums.push(as_cube(&each.layer.base.forward_into(x.clone(), FloatDType::F32))?);
                room(&cube, tokens, held.out_features)
            }
            None => as_cube(&each.layer.forward_bare(x.clone()))?,
        });
    }
    let adapted = held.iter().zip(&outputs).filter_map(|(held, out)| Some((held.as_ref()?, out)));
    let updates: Vec<Update<'_>> = adapted
        .zip(&sums)
        .map(|((held, out), sums)| Update { sums: &sums.handle, bias: held.bias.as_ref(), out: &out.handle })
        .collect();
    update(&cube.client, &input, &stacks, &product, &updates).ok()?;
    Some(outputs.into_iter().map(from_cube).collect())
}

/// The buffers of a layer with a stack.
struct Held {
    bias: Option<Handle>,
    stack: HeldStack,
    out_features: usize,
}

impl Held {
    fn new(layer: &LoraLinear, stack: HeldStack, x: &CubeTensor) -> Self {
        Self { bias: bias_for(layer, x), stack, out_features: layer.base.shape()[0] }
    }

    fn stack(&self) -> Stack<'_> {
        let HeldStack { factors: [lora_a, lora_b, scalings], rank, slots } = &self.stack;
        Stack { lora_a, lora_b, scalings, rank: *rank, slots: *slots, out_features: self.out_features }
    }
}
