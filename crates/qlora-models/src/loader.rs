//! Streaming load: each tensor goes from the mapped file through the quantizer to the device before the
//! next one is touched.
//!
//! Peak host memory is the mapped file (page cache, reclaimable) and a few tensors; peak device
//! memory is the finished model and one tensor.

use crate::ModelError;
use crate::adapters::Embedding;
use crate::config::ModelConfig;
use crate::decoder::{Block, Decoder, LINEARS, RmsNorm, linear_path};
use adapter_io::{Checkpoint, Floats, TensorView};
use burn::tensor::{DType, Device, FloatDType, Tensor, TensorData};
use nf4_quant::{FloatFormat, QuantConfig, Quantized4bit};
use qlora_layers::{FrozenLinear, Linear4bit, LoraLinear};
use std::path::Path;

/// How weights are held.
#[derive(Clone, Copy, Debug)]
pub struct LoadOptions {
    /// 4-bit quantization of the linear layers; `None` keeps them dense in the compute dtype.
    /// A checkpoint that is already in 4 bits keeps its own quantization, and is expanded for `None`.
    pub quantization: Option<QuantConfig>,
    /// Dtype of activations and of everything that stays dense.
    pub dtype: FloatDType,
}

/// How far loading is.
#[derive(Clone, Copy, Debug)]
pub struct LoadProgress<'a> {
    /// The module that was just loaded.
    pub module: &'a str,
    /// Bytes of the checkpoint that are loaded.
    pub loaded_bytes: u64,
    /// Bytes of the checkpoint.
    pub total_bytes: u64,
}

impl Decoder {
    /// Loads a checkpoint folder: `config.json` and safetensors, single or sharded, plain or
    /// already quantized by bitsandbytes.
    ///
    /// # Errors
    /// [`ModelError`] naming the file, tensor or field: unknown architecture, missing shard, wrong shape,
    /// a dtype that the device lacks.
    pub fn load(
        dir: &Path,
        options: LoadOptions,
        device: &Device,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<Self, ModelError> {
        let config = ModelConfig::from_dir(dir)?;
        options.quantization.map(|q| q.validate()).transpose()?;
        if !device.supports_dtype(options.dtype) {
            return Err(ModelError::Dtype { dtype: format!("{:?}", options.dtype), device: format!("{device:?}") });
        }
        let checkpoint = Checkpoint::open(dir)?;
        let total_bytes = checkpoint.total_bytes();
        Loader { checkpoint: &checkpoint, config, options, device, progress, loaded_bytes: 0, total_bytes }.decoder()
    }
}

struct Loader<'a> {
    checkpoint: &'a Checkpoint,
    config: ModelConfig,
    options: LoadOptions,
    device: &'a Device,
    progress: &'a mut dyn FnMut(LoadProgress),
    loaded_bytes: u64,
    total_bytes: u64,
}

impl Loader<'_> {
    fn decoder(mut self) -> Result<Decoder, ModelError> {
        let ModelConfig { vocab_size, hidden_size, num_hidden_layers, tie_word_embeddings, .. } = self.config;
        let embed_tokens = self.matrix("model.embed_tokens", [vocab_size, hidden_size])?;
        let blocks = (0..num_hidden_layers).map(|index| self.block(index)).collect::<Result<_, _>>()?;
        let norm = self.norm("model.norm")?;
        let lm_head = match tie_word_embeddings {
            true => None,
            false => {
                let head = self.matrix("lm_head", [vocab_size, hidden_size])?;
                Some(LoraLinear::frozen(FrozenLinear::Dense(head), None))
            }
        };
        Ok(Decoder {
            config: self.config,
            device: self.device.clone(),
            dtype: self.options.dtype,
            embed_tokens,
            blocks,
            norm,
            lm_head,
            embedding: Embedding::default(),
            adapter_config: None,
        })
    }

    fn block(&mut self, index: usize) -> Result<Block, ModelError> {
        let mut linears = Vec::with_capacity(LINEARS.len());
        for (name, (shape, bias)) in LINEARS.iter().zip(self.config.block_shapes()) {
            linears.push(self.linear(&linear_path(index, name), shape, bias)?);
        }
        let linears: [LoraLinear; 7] = match linears.try_into() {
            Ok(linears) => linears,
            Err(_) => unreachable!("one linear layer was pushed per name"),
        };
        Ok(Block {
            index,
            input_norm: self.norm(&format!("model.layers.{index}.input_layernorm"))?,
            post_attention_norm: self.norm(&format!("model.layers.{index}.post_attention_layernorm"))?,
            linears,
        })
    }

    fn linear(&mut self, module: &str, shape: [usize; 2], bias: bool) -> Result<LoraLinear, ModelError> {
        let base = self.frozen_linear(module, shape)?;
        let bias = match bias {
            true => Some(self.vector(&format!("{module}.bias"), shape[0])?),
            false => None,
        };
        Ok(LoraLinear::frozen(base, bias))
    }

    fn frozen_linear(&mut self, module: &str, shape: [usize; 2]) -> Result<FrozenLinear, ModelError> {
        if let Some(weight) = self.checkpoint.quantized(module)? {
            if weight.state.shape != shape {
                return Err(ModelError::WeightShape {
                    module: module.into(),
                    expected: shape.into(),
                    found: weight.state.shape,
                });
            }
            self.advance(module, weight.codes.len());
            let linear = Linear4bit::from_quantized(&weight, self.device)?;
            return Ok(match self.options.quantization {
                Some(_) => FrozenLinear::Quantized(linear),
                None => FrozenLinear::Dense(linear.dequantize(self.options.dtype)),
            });
        }
        let Some(quantization) = self.options.quantization.filter(|_| self.config.bnb.is_none()) else {
            return Ok(FrozenLinear::Dense(self.matrix(module, shape)?));
        };
        let view = self.checkpoint.tensor(&format!("{module}.weight"))?;
        view.expect_shape(&shape)?;
        let mut weight = match view.floats()? {
            Floats::F32(values) => Quantized4bit::quantize(&values, &shape, &quantization),
            Floats::F16(values) => Quantized4bit::quantize(&values, &shape, &quantization),
            Floats::BF16(values) => Quantized4bit::quantize(&values, &shape, &quantization),
        }
        .map_err(|source| ModelError::Quantize { module: module.into(), source })?;
        // The state's dtype is that of the weight as the model would hold it unquantized.
        weight.state.dtype = match self.options.dtype {
            FloatDType::BF16 => FloatFormat::BF16,
            FloatDType::F16 => FloatFormat::F16,
            _ => FloatFormat::F32,
        };
        self.advance(module, view.data.len());
        Ok(FrozenLinear::Quantized(Linear4bit::from_quantized(&weight, self.device)?))
    }

    fn norm(&mut self, module: &str) -> Result<RmsNorm, ModelError> {
        let weight = self.dense(&format!("{module}.weight"), [self.config.hidden_size], DType::F32)?;
        Ok(RmsNorm { weight, trained: None, eps: self.config.rms_norm_eps })
    }

    fn vector(&mut self, name: &str, len: usize) -> Result<Tensor<1>, ModelError> {
        self.dense(name, [len], self.options.dtype.into())
    }

    fn matrix(&mut self, module: &str, shape: [usize; 2]) -> Result<Tensor<2>, ModelError> {
        self.dense(&format!("{module}.weight"), shape, self.options.dtype.into())
    }

    fn dense<const D: usize>(&mut self, name: &str, shape: [usize; D], dtype: DType) -> Result<Tensor<D>, ModelError> {
        let view = self.checkpoint.tensor(name)?;
        view.expect_shape(&shape)?;
        let tensor = upload(&view, shape, dtype, self.device)?;
        self.advance(name, view.data.len());
        Ok(tensor)
    }

    fn advance(&mut self, module: &str, bytes: usize) {
        self.loaded_bytes += bytes as u64;
        (self.progress)(LoadProgress {
            module,
            loaded_bytes: self.loaded_bytes.min(self.total_bytes),
            total_bytes: self.total_bytes,
        });
    }
}

/// Uploads a tensor in `dtype`; values that are in it already travel as they are.
fn upload<const D: usize>(
    view: &TensorView,
    shape: [usize; D],
    dtype: DType,
    device: &Device,
) -> Result<Tensor<D>, ModelError> {
    let data = match (view.floats()?, dtype) {
        (Floats::BF16(values), DType::BF16) => TensorData::new(values.into_owned(), shape),
        (Floats::F16(values), DType::F16) => TensorData::new(values.into_owned(), shape),
        _ => TensorData::new(view.to_f32_vec()?, shape),
    };
    Ok(Tensor::from_data(data, (device, dtype)))
}
