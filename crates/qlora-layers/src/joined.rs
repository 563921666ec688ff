//! Frozen 4-bit layers that share an input, in one launch, for a few tokens with adapters of their own.
//!
//! Generation multiplies one token of each sequence by every weight: what a launch costs, and a factor that is rounded anew in
//! each, are then as dear as the product. Here the projections of attention, or of a gated MLP, are one launch of
//! [`nf4_quant::matmul::joined`], on CUDA. A layer's adapters lie in an [`AdapterStack`] in the dtype of activations, and
//! [`AdapterSpans`] say which token has which. More tokens than that launch takes go through [`crate::forward_stacked`].

use crate::lora_linear::LoraLinear;
use crate::ops::{cube_tensors::device_weight, format_of};
use crate::params::constant;
use crate::{FrozenLinear, Linear4bit, LoraAdapter};
use burn::tensor::{DType, Device, FloatDType, Int, Shape, Slice, Tensor, TensorData};
use burn_cubecl::tensor::CubeTensor;
use cubecl::server::Handle;
use host_copies::{as_cube, client_of, cube_of_int, from_cube, overwrite_int};
use nf4_quant::kernels::DeviceWeight;
use nf4_quant::matmul::joined::{Joined, JoinedWeight, Spans, Stack, TOKENS, launch, supports};
use nf4_quant::matmul::{Direction, Problem};

/// Adapters of one layer, each in a slot. Vectors, because devices may hold the rows of a matrix at distances.
#[derive(Clone, Debug)]
pub struct AdapterStack {
    /// `[slots * rank * in_features]`.
    lora_a: Tensor<1>,
    /// `[slots * out_features * rank]`.
    lora_b: Tensor<1>,
    /// `[slots]`, f32.
    scalings: Tensor<1>,
    /// Output and input features.
    shape: [usize; 2],
    slots: usize,
    rank: usize,
}

impl AdapterStack {
    /// Room for `slots` adapters of a rank up to `rank` on `layer`, in the dtype that inputs will have.
    pub fn new(layer: &LoraLinear, slots: usize, rank: usize, dtype: FloatDType, device: &Device) -> Self {
        let [out_features, in_features] = layer.base.shape();
        let rank = padded(rank);
        let zeros = |len: usize, dtype: FloatDType| Tensor::zeros([len], (device, DType::from(dtype)));
        Self {
            lora_a: zeros(slots * rank * in_features, dtype),
            lora_b: zeros(slots * out_features * rank, dtype),
            scalings: zeros(slots, FloatDType::F32),
            shape: [out_features, in_features],
            slots,
            rank,
        }
    }

    /// Makes room for as many slots and ranks, if there is less; what slots hold stays.
    pub fn make_room(&mut self, slots: usize, rank: usize) {
        let (slots, rank) = (slots.max(self.slots), padded(rank).max(self.rank));
        if (slots, rank) == (self.slots, self.rank) {
            return;
        }
        let [out_features, in_features] = self.shape;
        let moved = |old: Tensor<1>, old_shape: [usize; 3], shape: [usize; 3]| {
            let room = Tensor::zeros(shape, (&old.device(), old.dtype()));
            let filled = room.slice_assign(old_shape.map(|len| 0..len), old.reshape(old_shape));
            filled.reshape([shape.iter().product::<usize>()])
        };
        let (old_slots, old_rank) = (self.slots, self.rank);
        self.lora_a.inplace(|old| moved(old, [old_slots, old_rank, in_features], [slots, rank, in_features]));
        self.lora_b.inplace(|old| moved(old, [old_slots, out_features, old_rank], [slots, out_features, rank]));
        self.scalings.inplace(|old| moved(old, [old_slots, 1, 1], [slots, 1, 1]));
        (self.slots, self.rank) = (slots, rank);
    }

    /// Puts an adapter, a plain low-rank update of a rank that there is room for, into a slot; `None` empties it.
    pub fn set(&mut self, slot: usize, adapter: Option<&LoraAdapter>) {
        let ([out_features, in_features], rank) = (self.shape, self.rank);
        let place = (&self.lora_a.device(), self.lora_a.dtype());
        let (mut a, mut b) = (Tensor::zeros([rank, in_features], place), Tensor::zeros([out_features, rank], place));
        let mut scaling = 0.0;
        if let Some(adapter) = adapter {
            let dtype: FloatDType = self.lora_a.dtype().into();
            let own = adapter.rank();
            a = a.slice_assign([0..own, 0..in_features], constant(&adapter.lora_a).cast(dtype));
            b = b.slice_assign([0..out_features, 0..own], constant(&adapter.lora_b).cast(dtype));
            scaling = adapter.scaling.get();
        }
        let scaling = Tensor::full([1], scaling, (&self.scalings.device(), DType::F32));
        let put = |all: Tensor<1>, values: Tensor<1>| {
            let len = values.dims()[0];
            all.slice_assign([Slice::from(slot * len..(slot + 1) * len)], values)
        };
        self.lora_a.inplace(|all| put(all, a.reshape([rank * in_features])));
        self.lora_b.inplace(|all| put(all, b.reshape([out_features * rank])));
        self.scalings.inplace(|all| put(all, scaling));
    }
}

/// A rank as stacks hold it.
fn padded(rank: usize) -> usize {
    rank.next_multiple_of(16).max(16)
}

/// Tokens that lie beside each other and have one adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AdapterSpan {
    /// The first token.
    pub first: usize,
    /// The one behind the last.
    pub end: usize,
    /// The adapter's slot in every layer's stack.
    pub slot: usize,
}

/// Which tokens of a pass have which adapter, on the device.
#[derive(Clone, Debug)]
pub struct AdapterSpans(Tensor<1, Int>);

/// The most spans of a pass: adapters that its tokens have.
pub const SPANS: usize = 64;

impl AdapterSpans {
    /// At most [`SPANS`] of them; later ones have no adapter.
    pub fn new(spans: &[AdapterSpan], device: &Device) -> Self {
        let words: Vec<i32> = words(spans).into_iter().map(|word| word as i32).collect();
        let len = words.len();
        Self(Tensor::from_data(TensorData::new(words, [len]), (device, DType::I32)))
    }

    /// Puts others in their place. `false` where the device refuses.
    pub fn overwrite(&self, spans: &[AdapterSpan]) -> bool {
        overwrite_int(&self.0, &words(spans))
    }

    /// The words; `None` in the host's memory.
    pub(crate) fn handle(&self) -> Option<Handle> {
        Some(cube_of_int(self.0.clone())?.handle)
    }
}

fn words(spans: &[AdapterSpan]) -> Vec<u32> {
    let spans = &spans[..spans.len().min(SPANS)];
    let mut words = vec![spans.len() as u32];
    words.extend(spans.iter().flat_map(|span| [span.first, span.end, span.slot]).map(|word| word as u32));
    words.resize(1 + 3 * SPANS, 0);
    words
}

/// The most tokens that [`forward_joined`] takes.
pub const JOINED_TOKENS: usize = TOKENS;

/// A layer of a joined product: its frozen weight and bias, with the adapters of a stack.
#[derive(Clone, Copy, Debug)]
pub struct JoinedLayer<'a> {
    /// The layer; its own adapter is not looked at.
    pub layer: &'a LoraLinear,
    /// Adapters of its tokens.
    pub stack: Option<&'a AdapterStack>,
}

/// Whether [`forward_joined`] takes a layer with inputs of a dtype on a device, its own adapter aside.
pub fn can_join(layer: &LoraLinear, dtype: FloatDType, device: &Device) -> bool {
    let FrozenLinear::Quantized(weight) = &layer.base else { return false };
    let [out_features, _] = layer.base.shape();
    layer.observer.is_none()
        && client_of(device).is_some_and(|client| supports(&client, &problem(weight, 1, dtype.into()), &[out_features]))
}

fn problem(weight: &Linear4bit, tokens: usize, dtype: DType) -> Problem {
    let layout = weight.layout();
    Problem {
        tokens,
        out_features: layout.out_features,
        in_features: layout.in_features,
        direction: Direction::Forward,
        rank: 0,
        format: format_of(dtype),
        out: format_of(dtype),
        blocksize: Some(layout.blocksize),
    }
}

/// `x` through each of up to three layers, in one launch; without `spans` no adapter is looked at. `None` where the device
/// or the layers have no such product.
///
/// # Shapes
/// - `x`: `[tokens, in_features]`, at most [`JOINED_TOKENS`]
/// - outputs: `[tokens, out_features]` of each layer, dtype of `x`
pub fn forward_joined(
    x: &Tensor<2>,
    layers: &[JoinedLayer<'_>],
    spans: Option<&AdapterSpans>,
) -> Option<Vec<Tensor<2>>> {
    let (dtype, [tokens, in_features]) = (x.dtype(), x.dims());
    if tokens > TOKENS
        || dtype == DType::F32
        || !layers.iter().all(|each| can_join(each.layer, dtype.into(), &x.device()))
    {
        return None;
    }
    let x = as_cube(x)?;
    let held: Vec<Held> = layers.iter().map(|each| Held::new(each, &x)).collect::<Option<_>>()?;
    let outs: Vec<CubeTensor> = held.iter().map(|held| room(&x, tokens, held.shape[0])).collect();
    let words = match spans {
        Some(spans) => Some(spans.handle()?),
        None => None,
    };
    let weights: Vec<JoinedWeight<'_>> = held.iter().zip(&outs).map(|(held, out)| held.operand(out)).collect();
    let format = format_of(dtype);
    let joined = Joined {
        x: &x.handle,
        tokens,
        in_features,
        format,
        out: format,
        weights: &weights,
        spans: words.as_ref().map(|words| Spans { words }),
    };
    // What is refused, weights of different kinds for example, is left to the caller.
    launch(&x.client, &joined).ok()?;
    Some(outs.into_iter().map(from_cube).collect())
}

/// The buffers of a layer.
struct Held {
    weight: DeviceWeight,
    shape: [usize; 2],
    bias: Option<Handle>,
    stack: Option<HeldStack>,
}

/// The buffers of a stack: first factors, second factors, scalings.
pub(crate) struct HeldStack {
    pub factors: [Handle; 3],
    pub rank: usize,
    pub slots: usize,
}

impl HeldStack {
    /// `None` in the host's memory.
    pub fn new(AdapterStack { lora_a, lora_b, scalings, rank, slots, .. }: &AdapterStack) -> Option<Self> {
        let factors = [as_cube(lora_a)?.handle, as_cube(lora_b)?.handle, as_cube(scalings)?.handle];
        Some(Self { factors, rank: *rank, slots: *slots })
    }
}

/// A layer's bias in the dtype of `x`.
pub(crate) fn bias_for(layer: &LoraLinear, x: &CubeTensor) -> Option<Handle> {
    Some(as_cube(&layer.bias.as_ref()?.val().cast(FloatDType::from(x.dtype)))?.handle)
}

/// Room for a layer's output, `[tokens, out_features]` in the dtype of `x`.
pub(crate) fn room(x: &CubeTensor, tokens: usize, out_features: usize) -> CubeTensor {
    let shape = Shape::new([tokens, out_features]);
    let handle = x.client.empty(shape.num_elements() * x.dtype.size());
    CubeTensor::new_contiguous(x.client.clone(), x.device.clone(), shape, handle, x.dtype)
}

impl Held {
    fn new(JoinedLayer { layer, stack }: &JoinedLayer<'_>, x: &CubeTensor) -> Option<Self> {
        let FrozenLinear::Quantized(weight) = &layer.base else { return None };
        let bias = bias_for(layer, x);
        let stack = match stack {
            Some(stack) => Some(HeldStack::new(stack)?),
            None => None,
        };
        Some(Self { weight: device_weight(&weight.on_cube()?), shape: layer.base.shape(), bias, stack })
    }

    fn stack(&self) -> Option<Stack<'_>> {
        self.stack.as_ref().map(|HeldStack { factors: [lora_a, lora_b, scalings], rank, slots }| Stack {
            lora_a,
            lora_b,
            scalings,
            rank: *rank,
            slots: *slots,
        })
    }

    fn operand<'a>(&'a self, out: &'a CubeTensor) -> JoinedWeight<'a> {
        let (weight, [out_features, _], bias) = (&self.weight, self.shape, self.bias.as_ref());
        JoinedWeight { weight, out_features, bias, stack: self.stack(), out: &out.handle }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Distribution;
    use test_support::devices;

    fn values<const D: usize>(tensor: &Tensor<D>) -> Vec<f32> {
        tensor.clone().cast(FloatDType::F32).into_data().iter::<f32>().collect()
    }

    /// What a slot holds, as matrices of the stack's rank.
    fn slot(stack: &AdapterStack, slot: usize) -> [Vec<f32>; 3] {
        [&stack.lora_a, &stack.lora_b, &stack.scalings].map(|all| {
            let all = values(all);
            let len = all.len() / stack.slots;
            all[slot * len..][..len].to_vec()
        })
    }

    #[test]
    fn slots_keep_their_adapters_while_others_come() {
        for (name, device) in devices() {
            let random = |shape: [usize; 2]| Tensor::<2>::random(shape, Distribution::Normal(0.0, 1.0), &device);
            let layer = LoraLinear::frozen(FrozenLinear::dense(random([5, 7])), None);
            let adapter =
                |rank: usize, scaling| LoraAdapter::from_factors(random([rank, 7]), random([5, rank]), scaling, 0.0, 0);
            let (small, large) = (adapter(3, 0.5), adapter(20, 2.0));
            // Rows of lora_a, then rows of lora_b, filled up with zeros.
            let expect = |adapter: &LoraAdapter, rank: usize| {
                let (mut a, b) = (values(&adapter.lora_a.val()), values(&adapter.lora_b.val()));
                a.resize(rank * 7, 0.0);
                let b = b
                    .chunks(adapter.rank())
                    .flat_map(|row| row.iter().copied().chain(std::iter::repeat(0.0)).take(rank).collect::<Vec<_>>());
                [a, b.collect(), vec![adapter.scaling.get()]]
            };
            let mut stack = AdapterStack::new(&layer, 1, 3, FloatDType::F32, &device);
            stack.set(0, Some(&small));
            assert_eq!(slot(&stack, 0), expect(&small, 16), "{name}");
            stack.make_room(3, 20);
            stack.set(2, Some(&large));
            assert_eq!(slot(&stack, 0), expect(&small, 32), "{name}");
            assert_eq!(slot(&stack, 2), expect(&large, 32), "{name}");
            stack.set(0, None);
            assert!(slot(&stack, 0).concat().iter().all(|value| *value == 0.0), "{name}");
            assert_eq!(slot(&stack, 2), expect(&large, 32), "{name}");
        }
    }

    #[test]
    fn spans_have_one_layout() {
        let span = |first, slot| AdapterSpan { first, end: first + 1, slot };
        assert_eq!(words(&[span(2, 5)])[..5], [1, 2, 3, 5, 0]);
        let many: Vec<AdapterSpan> = (0..SPANS + 3).map(|i| span(i, 0)).collect();
        assert_eq!(words(&many).len(), words(&[]).len());
        assert_eq!(words(&many)[0] as usize, SPANS);
    }
}
