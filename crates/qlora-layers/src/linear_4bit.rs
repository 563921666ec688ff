//! A frozen 4-bit linear layer.

use crate::LayerError;
use crate::ops::cube_tensors::scaled_rows;
use crate::ops::{self, Layout4bit, LoraTerms, Packed4bit};
use crate::params::{flattened, frozen};
use crate::streamed::{BlockHome, Views};
use burn::backend::Dispatch;
use burn::config::Config;
use burn::module::{Content, DisplaySettings, Initializer, Module, ModuleDisplay, Param, ParamId};
use burn::tensor::{DType, Device, FloatDType, Int, Tensor, TensorData};
use burn_cubecl::CubeBackend;
use host_copies::{as_cube, cube_of_int, int_from_buffer, persistent};
use nf4_quant::kernels::{DeviceAbsmax, DeviceWeight};
use nf4_quant::{Absmax, FloatFormat, QuantConfig, QuantType, Quantized4bit};
use rayon::prelude::*;

/// Makes a [`Linear4bit`] with random weights, to be filled from a record.
///
/// A layer over weights that exist comes from [`Linear4bit::from_linear`] or [`Linear4bit::from_quantized`].
#[derive(Config, Debug)]
pub struct Linear4bitConfig {
    /// Size of the input features.
    pub d_input: usize,
    /// Size of the output features.
    pub d_output: usize,
    /// Codebook, blocks and double quantization.
    #[config(default = "QuantConfig::default()")]
    pub quant: QuantConfig,
}

impl Linear4bitConfig {
    /// A layer of uniform weights in ±1/sqrt(d_input), burn-nn's default for a linear layer, quantized from f32.
    ///
    /// # Errors
    /// [`LayerError::Weight`] when a size is 0 or the blocksize is not allowed.
    pub fn init(&self, device: &Device) -> Result<Linear4bit, LayerError> {
        let bound = 1.0 / (self.d_input.max(1) as f64).sqrt();
        let weight = Initializer::Uniform { min: -bound, max: bound }
            .init::<2, _>([self.d_output, self.d_input], &device.clone().without_autodiff())
            .into_value();
        Linear4bit::quantize(weight, &self.quant, device)
    }
}

/// A frozen 4-bit weight of shape `[out_features, in_features]` on a device.
///
/// It holds 4 bits per weight and its block statistics, double-quantized ones in their 8-bit form. No dense copy of the
/// weight outlives one product; see [`ops`].
///
/// As a Burn module it consists of integer parameters: visitors, mappers and records see them, `to_device` moves them,
/// and no optimizer touches them, because Burn's optimizers update float parameters only. For the same reason
/// `num_params`, which counts floats, leaves them out; [`num_weights`](Self::num_weights) counts them.
///
/// A record fits a layer of the same codebook, dtype, blocks and shape; Burn refuses any other by the shape of a
/// parameter (see `format`).
#[derive(Module, Debug)]
#[module(custom_display)]
pub struct Linear4bit {
    codes: Param<Tensor<1, Int>>,
    absmax: Param<Tensor<1, Int>>,
    nested_absmax: Param<Tensor<1, Int>>,
    /// Zeros whose *shape* stands for codebook and dtype: shapes are what Burn compares when it loads a record.
    format: Param<Tensor<2, Int>>,
    #[module(skip)]
    layout: Layout4bit,
    /// Where the words are while the device has others in their place.
    #[module(skip)]
    home: Option<Home>,
}

/// The place of a weight whose block is streamed.
#[derive(Clone, Debug)]
struct Home {
    block: BlockHome,
    /// The number of the first of its tensors in the block; `None` where they are views of some of these.
    first: Option<usize>,
}

impl Linear4bit {
    /// Uploads a quantized weight.
    ///
    /// # Errors
    /// [`LayerError::Weight`] when the weight is no matrix, or its parts do not fit together.
    pub fn from_quantized(weight: &Quantized4bit, device: &Device) -> Result<Self, LayerError> {
        weight.validate().map_err(|e| LayerError::Weight(e.to_string()))?;
        let state = &weight.state;
        let &[out_features, in_features] = state.shape.as_slice() else {
            return Err(LayerError::Weight(format!("expected a matrix, found shape {:?}", state.shape)));
        };
        let f32_bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        let (absmax, nested_absmax, nested_blocksize) = match &state.absmax {
            Absmax::Plain(absmax) => (f32_bits(absmax), vec![0], None),
            Absmax::Nested(nested) => (
                pack_words(&nested.codes),
                f32_bits(&[&nested.absmax[..], &[nested.offset]].concat()),
                Some(nested.blocksize),
            ),
        };
        let layout = Layout4bit {
            out_features,
            in_features,
            quant_type: state.quant_type,
            blocksize: state.blocksize,
            dtype: state.dtype,
            nested_blocksize,
        };
        Ok(Self {
            codes: frozen(upload(pack_words(&weight.codes), device)),
            absmax: frozen(upload(absmax, device)),
            nested_absmax: frozen(upload(nested_absmax, device)),
            format: format_of(&layout, device),
            layout,
            home: None,
        })
    }

    /// A layer over a weight that was quantized on `device`. Its buffers become the layer's.
    ///
    /// `dtype` is that of the quantization state, see [`Layout4bit::dtype`].
    ///
    /// # Errors
    /// [`LayerError::Weight`] when the buffers are too small for the shape, or `device` is the host.
    pub fn from_device(
        weight: DeviceWeight,
        [out_features, in_features]: [usize; 2],
        dtype: FloatFormat,
        device: &Device,
    ) -> Result<Self, LayerError> {
        weight.validate().map_err(|e| LayerError::Weight(e.to_string()))?;
        if weight.num_elements != out_features * in_features {
            let DeviceWeight { num_elements, .. } = weight;
            return Err(LayerError::Weight(format!("{num_elements} elements are no {out_features} x {in_features}")));
        }
        let words = |buffer, len| {
            int_from_buffer(device, buffer, [len], DType::U32).map(frozen).ok_or_else(|| {
                LayerError::Weight("its buffers are on a GPU, and its layer is to be on the host".into())
            })
        };
        let blocks = weight.num_blocks();
        let (absmax, nested_absmax, nested_blocksize) = match weight.absmax {
            DeviceAbsmax::Plain(absmax) => (words(absmax, blocks)?, frozen(upload(vec![0], device)), None),
            DeviceAbsmax::Nested { codes, absmax, blocksize } => {
                let nested_absmax = words(absmax, blocks.div_ceil(blocksize) + 1)?;
                (words(codes, blocks.div_ceil(4))?, nested_absmax, Some(blocksize))
            }
        };
        let codes = words(weight.codes, weight.num_elements.div_ceil(8))?;
        let DeviceWeight { quant_type, blocksize, .. } = weight;
        let layout = Layout4bit { out_features, in_features, quant_type, blocksize, dtype, nested_blocksize };
        Ok(Self { codes, absmax, nested_absmax, format: format_of(&layout, device), layout, home: None })
    }

    /// Names the weight: clones of it have the same name, other weights have others.
    pub fn id(&self) -> ParamId {
        self.codes.id
    }

    /// Quantizes a dense weight `[out_features, in_features]`, f32, bf16 or f16, on the host; the result is on `device`.
    ///
    /// # Errors
    /// [`LayerError::Weight`] when the blocksize is not allowed, the weight is empty or its values can't be read.
    pub fn quantize(weight: Tensor<2>, quant: &QuantConfig, device: &Device) -> Result<Self, LayerError> {
        let dtype = ops::format_of(weight.dtype());
        let (shape, weight) = (weight.dims(), weight.without_autodiff().cast(FloatDType::F32));
        let values = weight.try_into_vec_as::<f32>();
        let values =
            values.map_err(|e| LayerError::Read { what: "the weight to quantize".into(), source: e.into() })?;
        let mut quantized =
            Quantized4bit::quantize(&values, &shape, quant).map_err(|e| LayerError::Weight(e.to_string()))?;
        quantized.state.dtype = dtype;
        Self::from_quantized(&quantized, device)
    }

    /// Quantizes the weight of a burn-nn layer, which stays on the layer's device. The bias is not part of the result.
    ///
    /// # Errors
    /// As [`quantize`](Self::quantize).
    pub fn from_linear(linear: &burn::nn::Linear, quant: &QuantConfig) -> Result<Self, LayerError> {
        let weight = linear.weight.val();
        let device = weight.device();
        Self::quantize(weight.transpose(), quant, &device)
    }

    /// `y = x Wᵀ`.
    ///
    /// # Shapes
    /// - `x`: `[.., in_features]`
    /// - output: `[.., out_features]`, dtype of `x`
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let out = x.dtype().into();
        flattened(x, |x| self.forward_into(x, out))
    }

    /// [`forward`](Self::forward) of `[tokens, in_features]` with the sums kept in `out`, the dtype of `x` or f32.
    pub fn forward_into(&self, x: Tensor<2>, out: FloatDType) -> Tensor<2> {
        ops::linear_4bit(x, self.packed(), out)
    }

    /// `y = x Wᵀ + scaling·dropout(x) lora_aᵀ lora_bᵀ`, one operation with one backward.
    ///
    /// # Shapes
    /// - `x`: `[tokens, in_features]`
    /// - `lora_a`: `[rank, in_features]`, `lora_b`: `[out_features, rank]`, f32
    /// - output: `[tokens, out_features]`, dtype of `x`
    pub fn lora_forward(&self, x: Tensor<2>, lora_a: Tensor<2>, lora_b: Tensor<2>, terms: LoraTerms) -> Tensor<2> {
        ops::lora_linear_4bit(x, self.packed(), lora_a, lora_b, terms)
    }

    /// The dense weight `[out_features, in_features]` in `dtype`, without autodiff.
    pub fn dequantize(&self, dtype: FloatDType) -> Tensor<2> {
        ops::dequantize_4bit(self.packed(), dtype)
    }

    /// The weight as the operations take it.
    pub fn packed(&self) -> Packed4bit<Dispatch> {
        self.ensure();
        let tensor = |param: &Param<Tensor<1, Int>>| param.val().into_dispatch();
        Packed4bit {
            codes: tensor(&self.codes),
            absmax: tensor(&self.absmax),
            nested_absmax: tensor(&self.nested_absmax),
            layout: self.layout,
        }
    }

    /// The weight on a CubeCL runtime; `None` on the host.
    pub(crate) fn on_cube(&self) -> Option<Packed4bit<CubeBackend>> {
        self.ensure();
        let tensor = |param: &Param<Tensor<1, Int>>| cube_of_int(param.val());
        Some(Packed4bit {
            codes: tensor(&self.codes)?,
            absmax: tensor(&self.absmax)?,
            nested_absmax: tensor(&self.nested_absmax)?,
            layout: self.layout,
        })
    }

    /// The weight with each row multiplied by its factor, `[1, out_features]` in f32 without autodiff, for activations in `dtype`.
    /// It shares this one's codes, and its own statistics take 4 bytes for each block. Elements are rounded once, to the dtype that
    /// they are multiplied in.
    ///
    /// `None` on the host, where blocks cross rows, and where the quantization state's dtype is narrower than `dtype`: there the
    /// products of [`ops`] round elements to that dtype, before anything may scale them. `factors` is not called then.
    pub(crate) fn scaled_rows(
        &self,
        dtype: DType,
        factors: impl FnOnce() -> Tensor<2>,
    ) -> Option<(Packed4bit<Dispatch>, Tensor<2>)> {
        let Layout4bit { in_features, blocksize, dtype: state, .. } = self.layout;
        let weight = self.on_cube()?;
        let rounded_before = dtype == DType::F32 && state != FloatFormat::F32;
        if !in_features.is_multiple_of(blocksize) || rounded_before {
            return None;
        }
        let factors = factors();
        Some((scaled_rows(&weight, &as_cube(&factors)?), factors))
    }

    /// Codes, absmax and nested absmax: the words of a [streamed](crate::streamed) block that are this weight's, in their order.
    pub fn tensors(&self) -> [Tensor<1, Int>; 3] {
        self.ensure();
        [&self.codes, &self.absmax, &self.nested_absmax].map(|param| param.val())
    }

    /// Takes codes, absmax and nested absmax of equal values from another memory, and the format of an equal layer.
    pub(crate) fn become_view(&mut self, [codes, absmax, nested_absmax]: [Tensor<1, Int>; 3], format: Tensor<2, Int>) {
        let parts = [(&mut self.codes, codes), (&mut self.absmax, absmax), (&mut self.nested_absmax, nested_absmax)];
        for (param, view) in parts {
            *param = Param::initialized(param.id, view).set_require_grad(false);
        }
        self.format = Param::initialized(self.format.id, format).set_require_grad(false);
    }

    /// Lets the weight go, until it [settles](Self::settle) in a streamed block. Its words have to be [elsewhere](Self::tensors)
    /// before.
    pub fn leave(&mut self) {
        let nothing = || Tensor::<1, Int>::empty([0], (&Device::flex(), DType::U32));
        self.become_view([nothing(), nothing(), nothing()], self.format());
    }

    /// Takes the next tensors of a streamed block, which have the words of this weight's.
    ///
    /// # Errors
    /// [`LayerError::Weight`]: there are no more.
    pub fn settle(&mut self, views: &mut Views) -> Result<(), LayerError> {
        let (tensors, block, first) = views.next::<3>()?;
        self.format = format_of(&self.layout, &tensors[0].device());
        self.become_view(tensors, self.format());
        self.home = Some(Home { block, first: Some(first) });
        Ok(())
    }

    /// Takes views of tensors that have settled.
    pub(crate) fn settle_within(&mut self, tensors: [Tensor<1, Int>; 3], format: Tensor<2, Int>, block: &BlockHome) {
        self.become_view(tensors, format);
        self.home = Some(Home { block: block.clone(), first: None });
    }

    /// Whether the weight waits elsewhere while the device has others in its place.
    pub fn is_streamed(&self) -> bool {
        self.home.is_some()
    }

    /// Takes the values of another weight. One that is streamed stays so, if the other has the same layout.
    ///
    /// # Errors
    /// [`LayerError::Weight`] for one of a stack of experts' weights that is streamed; [`LayerError::Read`] where a device failed.
    pub fn become_equal(&mut self, other: Self) -> Result<(), LayerError> {
        let Some(Home { block, first }) = self.home.as_ref().filter(|_| self.layout == other.layout) else {
            *self = other;
            return Ok(());
        };
        let Some(first) = *first else {
            return Err(LayerError::Weight(
                "experts' weights that are streamed can't be changed one by one: have them stay on the device".into(),
            ));
        };
        for (part, tensor) in (first..).zip(other.tensors()) {
            let failed = |source| LayerError::Read { what: "a changed weight".into(), source };
            let words = tensor.try_into_vec_as::<u32>().map_err(|error| failed(error.into()))?;
            block.write(part, &words)?;
        }
        Ok(())
    }

    /// Has a streamed weight on the device for what is queued now.
    fn ensure(&self) {
        if let Some(home) = &self.home {
            home.block.ensure();
        }
    }

    /// What stands for codebook and dtype.
    pub(crate) fn format(&self) -> Tensor<2, Int> {
        self.format.val()
    }

    /// Codebook, blocks and shape.
    pub fn layout(&self) -> &Layout4bit {
        &self.layout
    }

    /// Elements of the weight.
    pub fn num_weights(&self) -> usize {
        self.layout.num_elements()
    }

    /// Where the weight lies.
    pub fn device(&self) -> Device {
        self.codes.lazy_device()
    }

    /// Bytes that codes and statistics take on the device; none where they are streamed, through slots that have room for any block.
    pub fn device_bytes(&self) -> usize {
        if self.is_streamed() {
            return 0;
        }
        4 * [&self.codes, &self.absmax, &self.nested_absmax].map(|words| words.dims()[0]).iter().sum::<usize>()
    }
}

impl ModuleDisplay for Linear4bit {
    fn custom_settings(&self) -> Option<DisplaySettings> {
        DisplaySettings::new().with_new_line_after_attribute(false).optional()
    }

    fn custom_content(&self, content: Content) -> Option<Content> {
        let Layout4bit { out_features, in_features, quant_type, blocksize, nested_blocksize, .. } = self.layout;
        content
            .add("d_input", &in_features)
            .add("d_output", &out_features)
            .add_formatted(&format!("{quant_type}, blocksize {blocksize}"))
            .add("double_quant", &nested_blocksize.is_some())
            .optional()
    }
}

/// A shape of its own for each codebook and dtype.
fn format_shape(layout: &Layout4bit) -> [usize; 2] {
    let quant_type = match layout.quant_type {
        QuantType::Nf4 => 1,
        QuantType::Fp4 => 2,
    };
    let dtype = match layout.dtype {
        FloatFormat::F32 => 1,
        FloatFormat::F16 => 2,
        FloatFormat::BF16 => 3,
    };
    [quant_type, dtype]
}

/// The parameter that stands for codebook and dtype.
pub(crate) fn format_of(layout: &Layout4bit, device: &Device) -> Param<Tensor<2, Int>> {
    frozen(persistent(device, format_shape(layout), |format| Tensor::zeros(format, (device, DType::U32))))
}

/// A byte stream as little-endian words, zero-padded to a multiple of four.
fn pack_words(bytes: &[u8]) -> Vec<u32> {
    const CHUNK: usize = 1 << 18;
    let mut words = vec![0; bytes.len().div_ceil(4)];
    words.par_chunks_mut(CHUNK).zip(bytes.par_chunks(4 * CHUNK)).for_each(|(words, bytes)| {
        let (whole, tail) = bytes.as_chunks::<4>();
        words.iter_mut().zip(whole).for_each(|(word, bytes)| *word = u32::from_le_bytes(*bytes));
        if let Some(word) = words.get_mut(whole.len()) {
            let mut last = [0; 4];
            last[..tail.len()].copy_from_slice(tail);
            *word = u32::from_le_bytes(last);
        }
    });
    words
}

fn upload(words: Vec<u32>, device: &Device) -> Tensor<1, Int> {
    let len = words.len();
    persistent(device, TensorData::new(words, [len]), |words| Tensor::from_data(words, (device, DType::U32)))
}
