//! Streaming load: each tensor goes from the mapped file through the quantizer to the device before the
//! next one is touched.
//!
//! On CUDA the quantizer is the device itself, which works while the next part is read (`streaming`).
//!
//! Peak host memory is the mapped file (page cache, reclaimable) and a few tensors; peak device
//! memory is the finished model and one tensor.
//!
//! One walk over the modules serves every origin of tensors, a [`Source`]: a checkpoint, or random numbers.

mod aside;
mod experts;
mod options;
mod random;
mod source;
mod streaming;

use crate::ModelError;
use crate::block::{Block, FeedForward, Recurrence};
use crate::config::{LinearSpec, ModelConfig};
use crate::decoder::Decoder;
use crate::delta_net::DeltaNet;
use crate::embedding::Embedding;
use crate::family::Root;
use crate::mlp::Mlp;
use crate::named::Named;
use crate::norm::RmsNorm;
use crate::rope::RotaryTables;
use crate::short_conv::ShortConv;
use crate::streamed::Streams;
use adapter_io::{Checkpoint, DenseTensor, Floats};
use burn::tensor::{DType, Device, Tensor, TensorData};
use host_copies::persistent;
use nf4_quant::Quantized4bit;
pub use options::LoadOptions;
use qlora_layers::ops::Sinks;
use qlora_layers::{FrozenLinear, Linear4bit, LoraLinear, frozen};
use random::Random;
use source::Source;
use std::collections::BTreeSet;
use std::path::Path;
use streaming::{Quantizer, Streaming};

/// Epsilon of the norms between the projections of latent attention, whatever `rms_norm_eps` says.
const LATENT_EPS: f64 = 1e-6;

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
        Self::load_as(ModelConfig::from_dir(dir)?, dir, options, None, device, progress)
    }

    /// [`load`](Self::load) with the folder's configuration as it was read, some of its layers [kept dense](ModelConfig::keep_dense),
    /// and with the frozen weights of some blocks elsewhere, from where they come when they are needed. Each such block leaves the
    /// device before the next one is loaded.
    ///
    /// # Errors
    /// As there; [`ModelError::Streamed`] without quantization, [`ModelError::Layer`] where a block's weights can't be moved.
    pub fn load_as(
        mut config: ModelConfig,
        dir: &Path,
        options: LoadOptions,
        streams: Option<Streams>,
        device: &Device,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<Self, ModelError> {
        check(&options, device)?;
        let checkpoint = Checkpoint::open(dir)?;
        if checkpoint.quantized_modules().is_empty() {
            // Weights in 16 bits under the configuration of a 4-bit model: they are what counts.
            config.bnb = None;
        }
        let holds = |root: &&Root| checkpoint.contains(&root.below(".embed_tokens.weight"));
        let root = *config.roots.iter().find(holds).unwrap_or(&config.root());
        config.notes.extend(aside::note(&checkpoint, &config, &root));
        let streaming = Streaming::to(device, Quantizer::of(device)?);
        Loader::new(&checkpoint, config, options, device, progress, root, streaming).streams(streams)?.decoder()
    }

    /// A model of a shape with random weights, to measure with: normal with deviation 0.02, norms that change nothing.
    ///
    /// Matrices of one shape share a few sets of numbers, each in its own device memory. The weights are those of
    /// the seed on every machine.
    ///
    /// # Errors
    /// A dtype that the device lacks, or a quantization that does not exist.
    pub fn random(
        config: ModelConfig,
        options: LoadOptions,
        seed: u64,
        device: &Device,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<Self, ModelError> {
        Self::random_streamed(config, options, None, seed, device, progress)
    }

    /// [`random`](Self::random) with the frozen weights of some blocks elsewhere, as in [`load_as`](Self::load_as).
    ///
    /// # Errors
    /// As there.
    pub fn random_streamed(
        config: ModelConfig,
        options: LoadOptions,
        streams: Option<Streams>,
        seed: u64,
        device: &Device,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<Self, ModelError> {
        check(&options, device)?;
        let source = Random::new(&config, &options, seed)?;
        let root = config.root();
        Loader::new(&source, config, options, device, progress, root, None).streams(streams)?.decoder()
    }
}

/// What can be refused before anything is read.
fn check(options: &LoadOptions, device: &Device) -> Result<(), ModelError> {
    options.quantization.map(|q| q.validate()).transpose()?;
    match device.supports_dtype(options.dtype) {
        true => Ok(()),
        false => Err(ModelError::Dtype { dtype: format!("{:?}", options.dtype), device: format!("{device:?}") }),
    }
}

struct Loader<'a> {
    source: &'a dyn Source,
    config: ModelConfig,
    options: LoadOptions,
    device: &'a Device,
    progress: &'a mut dyn FnMut(LoadProgress),
    /// Where the model lies in the source.
    root: Root,
    /// Where the device quantizes.
    streaming: Option<Streaming<'a>>,
    /// The blocks that leave the device again.
    streams: Option<Streams>,
    /// Where 4-bit weights that the host has made go.
    weights_to: Device,
    /// The tensors that were read, and the 4-bit modules.
    read: BTreeSet<String>,
    loaded_bytes: u64,
    total_bytes: u64,
}

impl<'a> Loader<'a> {
    fn new(
        source: &'a dyn Source,
        config: ModelConfig,
        options: LoadOptions,
        device: &'a Device,
        progress: &'a mut dyn FnMut(LoadProgress),
        root: Root,
        streaming: Option<Streaming<'a>>,
    ) -> Self {
        let total_bytes = source.total_bytes();
        let (read, weights_to) = (BTreeSet::new(), device.clone());
        Self {
            source,
            config,
            options,
            device,
            progress,
            root,
            streaming,
            streams: None,
            weights_to,
            read,
            loaded_bytes: 0,
            total_bytes,
        }
    }

    fn streams(mut self, streams: Option<Streams>) -> Result<Self, ModelError> {
        self.streams = streams.filter(|streams| streams.placement.streamed() > 0);
        match self.streams.is_some() && self.options.quantization.is_none() {
            true => Err(ModelError::Streamed),
            false => Ok(self),
        }
    }

    fn decoder(mut self) -> Result<Decoder, ModelError> {
        let ModelConfig { vocab_size, hidden_size, num_hidden_layers, tie_word_embeddings, .. } = self.config;
        let Root { head, .. } = self.config.root();
        let embed_tokens = self.matrix(&self.config.embed_path(), [vocab_size, hidden_size])?;
        let mut blocks = Vec::with_capacity(num_hidden_layers);
        let (mut streams, mut moved) = (self.streams.take(), Vec::new());
        for index in 0..num_hidden_layers {
            let streams = streams.as_mut().filter(|streams| streams.placement.is_streamed(index));
            // What the host has made need not see the device; of experts, only a block on the device knows whether it can be moved.
            let by_host = streams.is_some() && self.config.experts_specs(index).is_none();
            self.weights_to = if by_host { Device::flex() } else { self.device.clone() };
            let mut block = self.block(index)?;
            match streams {
                Some(streams) if block.can_stream() => {
                    block.move_to(&mut *streams.store)?;
                    moved.push(index);
                }
                Some(_) => tracing::warn!(block = index, "experts of such shapes stay on the device"),
                None => {}
            }
            blocks.push(block);
        }
        self.weights_to = self.device.clone();
        if let Some(streams) = streams.filter(|_| !moved.is_empty()) {
            // What passed through is given back before there are slots.
            self.device.memory_cleanup();
            let homes = streams.store.finish().map_err(|source| ModelError::Slots { source })?;
            for (number, index) in moved.into_iter().enumerate() {
                blocks[index].settle(homes.home(number))?;
            }
        }
        let norm = self.norm(self.config.last_norm())?;
        let lm_head = match tie_word_embeddings {
            true => None,
            false => {
                let head = self.matrix(head, [vocab_size, hidden_size])?;
                Some(LoraLinear::frozen(FrozenLinear::dense(head), None))
            }
        };
        self.nothing_left()?;
        let streamed = self.streaming.take().is_some();
        if streamed || self.config.experts.is_some() {
            // What slices passed through, and the memory that each expert's weights had before they were brought into one.
            self.device.memory_cleanup();
        }
        let rotary = self.config.attention_kinds.iter().map(|_| RotaryTables::default()).collect();
        Ok(Decoder {
            config: self.config,
            rotary,
            device: self.device.clone(),
            dtype: self.options.dtype,
            embed_tokens: frozen(embed_tokens),
            blocks,
            norm,
            lm_head,
            narrow_head: None,
            embedding: Embedding::default(),
            head_tokens: None,
            rows_before: None,
            adapter_config: None,
        })
    }

    fn block(&mut self, index: usize) -> Result<Block, ModelError> {
        let qkv = self.linears(self.config.qkv_specs(index))?;
        let output = self.linear(self.config.output_spec(index))?;
        let feed_forward = match self.config.experts_specs(index) {
            Some(specs) => FeedForward::Experts(Box::new(self.experts(index, specs)?)),
            None => {
                let (gate_up, down) = self.config.mlp_specs(index);
                let (gate_up, down) = (self.linears(gate_up)?, self.linear(down)?);
                FeedForward::Dense(Box::new(Mlp { gate_up, down, activation: self.config.activation }))
            }
        };
        let mut norms = self.config.block_norms(index).try_map(|norm| self.norm(norm))?;
        if let Some(norm) = &mut norms.linear {
            // Families that store other norms' distance from 1 store this one as it is.
            norm.module.offset = 0.0;
        }
        for norm in [&mut norms.latent_queries, &mut norms.latent_keys].into_iter().flatten() {
            norm.module.eps = LATENT_EPS;
        }
        let recurrence = self.recurrence(index)?;
        let kind = self.config.layer(index).kind;
        let sinks = match self.config.sinks(index) {
            Some(name) => {
                let values = self.values(&self.file_name(&name), &[self.config.num_attention_heads])?;
                Some(Sinks::new(&values, self.device))
            }
            None => None,
        };
        Ok(Block { index, kind, qkv, recurrence, sinks, output, feed_forward, norms, home: None })
    }

    /// What a block has in the place of attention, without projections and norm.
    fn recurrence(&mut self, index: usize) -> Result<Option<Recurrence>, ModelError> {
        let block = self.file_name(&self.config.block_path(index));
        if let Some((taps, names)) = self.config.short_convolution(index) {
            let weight = self.values(&format!("{block}.{}.weight", names.conv), &[self.config.hidden_size, 1, taps])?;
            return Ok(Some(Recurrence::Conv(Box::new(ShortConv::new(&weight, taps, self.device)))));
        }
        let Some((config, names)) = self.config.linear_attention(index) else { return Ok(None) };
        let [rates, dt_bias] = names.rates.map(|name| format!("{block}.{name}"));
        let conv = self.values(&format!("{block}.{}.weight", names.conv), &[config.channels(), 1, config.taps])?;
        let rates = self.values(&rates, &[config.value_heads])?;
        let dt_bias = self.values(&dt_bias, &[config.value_heads])?;
        let by_head = names.projections.len() == 2;
        let delta = DeltaNet::new(config, by_head, &conv, &rates, dt_bias, self.device);
        Ok(Some(Recurrence::Delta(Box::new(delta))))
    }

    /// A small tensor, in the host's memory.
    fn values(&mut self, name: &str, shape: &[usize]) -> Result<Vec<f32>, ModelError> {
        let view = self.source.tensor(name, shape)?;
        view.expect_finite()?;
        let values = view.to_f32_vec()?;
        self.read.insert(name.into());
        self.advance(name, view.num_bytes());
        self.source.release(name);
        Ok(values)
    }

    fn linears(&mut self, specs: Vec<LinearSpec>) -> Result<Vec<Named<LoraLinear>>, ModelError> {
        specs.into_iter().map(|spec| self.linear(spec)).collect()
    }

    fn linear(&mut self, spec: LinearSpec) -> Result<Named<LoraLinear>, ModelError> {
        let name = self.file_name(&spec.path);
        let base = self.frozen_linear(&name, &spec)?;
        let bias = match spec.bias {
            true => Some(self.dense(&format!("{name}.bias"), [spec.shape[0]], self.options.dtype.into())?),
            false => None,
        };
        Ok(Named { path: spec.path, module: LoraLinear::frozen(base, bias) })
    }

    /// The weight of the module `name` of the file.
    fn frozen_linear(&mut self, name: &str, spec: &LinearSpec) -> Result<FrozenLinear, ModelError> {
        if let Some(weight) = self.source.quantized(name, spec.shape)? {
            if weight.state.shape != spec.shape {
                return Err(ModelError::WeightShape {
                    module: name.into(),
                    expected: spec.shape.into(),
                    found: weight.state.shape.clone(),
                });
            }
            self.read.insert(name.into());
            self.advance(name, weight.codes.len());
            let linear = Linear4bit::from_quantized(&weight, &self.weights_to)?;
            self.source.release(&format!("{name}.weight"));
            return Ok(match self.options.quantization.filter(|_| spec.role.is_quantized()) {
                Some(_) => FrozenLinear::Quantized(linear),
                None => FrozenLinear::dense(linear.dequantize(self.options.dtype)),
            });
        }
        let weight = format!("{name}.weight");
        let tensor = self.source.tensor(&weight, &spec.shape)?;
        self.read.insert(weight.clone());
        let base = self.weight(&tensor, spec)?;
        self.source.release(&weight);
        Ok(base)
    }

    /// A weight, quantized if that is asked for and it is none that stays dense.
    fn weight(&mut self, tensor: &DenseTensor, spec: &LinearSpec) -> Result<FrozenLinear, ModelError> {
        let wanted = self.options.quantization.filter(|_| self.config.bnb.is_none());
        let Some(quantization) = wanted.filter(|_| spec.role.is_quantized()) else {
            let weight = self.upload(tensor, spec.shape, self.options.dtype.into())?;
            self.advance(&spec.path, tensor.num_bytes());
            return Ok(FrozenLinear::dense(weight));
        };
        if let Some(streaming) = &mut self.streaming {
            let layer = streaming.quantize(tensor, spec.shape, &quantization, self.options.state_dtype());
            let failed = |error| match error {
                ModelError::Quantization(source) => ModelError::Quantize { module: spec.path.clone(), source },
                other => other,
            };
            if let Some(layer) = layer.map_err(failed)? {
                self.advance(&spec.path, tensor.num_bytes());
                return Ok(FrozenLinear::Quantized(layer));
            }
        }
        let mut weight = tensor.with_values(|view| {
            match view.expect_finite()?.floats()? {
                Floats::F32(values) => Quantized4bit::quantize(&values, &spec.shape, &quantization),
                Floats::F16(values) => Quantized4bit::quantize(&values, &spec.shape, &quantization),
                Floats::BF16(values) => Quantized4bit::quantize(&values, &spec.shape, &quantization),
            }
            .map_err(|source| ModelError::Quantize { module: spec.path.clone(), source })
        })?;
        weight.state.dtype = self.options.state_dtype();
        self.advance(&spec.path, tensor.num_bytes());
        Ok(FrozenLinear::Quantized(Linear4bit::from_quantized(&weight, &self.weights_to)?))
    }

    fn norm(&mut self, (path, width): (String, usize)) -> Result<Named<RmsNorm>, ModelError> {
        let weight = self.dense(&format!("{}.weight", self.file_name(&path)), [width], DType::F32)?;
        let (eps, offset) = (self.config.rms_norm_eps, self.config.family.norm_offset);
        Ok(Named { path, module: RmsNorm { weight, trained: None, eps, offset } })
    }

    fn matrix(&mut self, path: &str, shape: [usize; 2]) -> Result<Tensor<2>, ModelError> {
        self.dense(&format!("{}.weight", self.file_name(path)), shape, self.options.dtype.into())
    }

    fn dense<const D: usize>(&mut self, name: &str, shape: [usize; D], dtype: DType) -> Result<Tensor<D>, ModelError> {
        let stored = self.source.tensor(name, &shape)?;
        let tensor = self.upload(&stored, shape, dtype)?;
        self.read.insert(name.into());
        self.advance(name, stored.num_bytes());
        self.source.release(name);
        Ok(tensor)
    }

    /// What a module is called in the source.
    fn file_name(&self, path: &str) -> String {
        let Root { model, head } = self.config.root();
        match path.strip_prefix(model) {
            Some(rest) => self.root.below(rest),
            None if path == head => self.root.head.into(),
            None => path.into(),
        }
    }

    /// Refuses tensors of the language model that nothing has read: the model would compute without them.
    fn nothing_left(&self) -> Result<(), ModelError> {
        let head = self.root.head;
        // A tied head is saved by some and is the embedding table. Early files hold the rotary frequencies.
        let harmless = |name: &str| name == format!("{head}.weight") || name.ends_with(".rotary_emb.inv_freq");
        // The parts of a 4-bit weight all begin with the weight's name.
        let read = |name: &str| {
            let module = name.split_once(".weight").map_or(name, |(module, _)| module);
            self.read.contains(name) || self.read.contains(module)
        };
        let further = |name: &str| aside::predicts_further(&self.config, &self.root, name);
        let left = |name: &&str| self.root.has(name) && !harmless(name) && !read(name) && !further(name);
        match self.source.names().find(left) {
            None => Ok(()),
            Some(tensor) => Err(ModelError::UnexpectedTensor {
                dir: self.config.path().parent().unwrap_or(Path::new("")).into(),
                tensor: tensor.into(),
                model_type: self.config.family.model_type,
            }),
        }
    }

    fn advance(&mut self, module: &str, bytes: usize) {
        self.loaded_bytes += bytes as u64;
        (self.progress)(LoadProgress {
            module,
            loaded_bytes: self.loaded_bytes.min(self.total_bytes),
            total_bytes: self.total_bytes,
        });
    }

    /// Uploads a tensor in `dtype`; values that are in it already travel as they are.
    fn upload<const D: usize>(
        &mut self,
        tensor: &DenseTensor,
        shape: [usize; D],
        dtype: DType,
    ) -> Result<Tensor<D>, ModelError> {
        if let Some(streaming) = &mut self.streaming
            && let Some(tensor) = streaming.dense(tensor, shape, dtype)?
        {
            return Ok(tensor);
        }
        let data = tensor.with_values(|view| {
            Ok::<_, ModelError>(match (view.expect_finite()?.floats()?, dtype) {
                (Floats::BF16(values), DType::BF16) => TensorData::new(values.into_owned(), shape),
                (Floats::F16(values), DType::F16) => TensorData::new(values.into_owned(), shape),
                _ => TensorData::new(view.to_f32_vec()?, shape),
            })
        })?;
        Ok(persistent(self.device, data, |data| Tensor::from_data(data, (self.device, dtype))))
    }
}
