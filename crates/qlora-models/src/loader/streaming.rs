//! Weights that a device quantizes while the next ones are read.
//!
//! A tensor is read in slices. All processor cores copy a slice from the file's pages into pinned memory, or decode it there
//! where the file holds it in another storage, and look at what they copied while it is in their caches: for numbers that are not finite, and for the absmax of the blocks, whose mean double
//! quantization wants. The device fetches the slice and encodes it while the cores fill the next one. It never holds more of
//! a weight's original than one slice, and the host three slices at most.
//!
//! Nothing waits for the device, and what it makes is the host codec's to the last bit (`nf4_quant::kernels::StreamedQuantize`).
//! That takes a division that is rounded correctly, which CUDA has and Vulkan need not have: there the host quantizes.

use crate::ModelError;
use adapter_io::{DenseTensor, Dtype};
use burn::tensor::{DType, Device, Tensor};
use bytemuck::Pod;
use cubecl::client::Client;
use cubecl::server::Handle;
use half::{bf16, f16};
use host_copies::{client_of, from_buffer, is_cuda, staging};
use nf4_quant::kernels::{DeviceWeight, StreamedQuantize, supports};
use nf4_quant::{Element, FloatFormat, NestedAbsmax, QuantConfig, block_absmax};
use qlora_layers::Linear4bit;
use rayon::prelude::*;

/// Bytes of a slice: enough that threads and launches cost little beside it.
const SLICE: usize = 32 << 20;
/// Bytes that one thread copies and looks at: they fit its core's own cache.
const CHUNK: usize = 512 << 10;
/// A dense tensor of fewer bytes is sent in one piece.
const SMALL: usize = 1 << 20;
/// The blocks in which a dense tensor is looked at.
const LOOK: usize = 4096;

const _: () = assert!((SLICE / 4).is_multiple_of(StreamedQuantize::PART) && (CHUNK / 4).is_multiple_of(LOOK));

/// The environment's word on where weights are quantized.
const VARIABLE: &str = "BURN_QLORA_LOADING";

/// Where weights are quantized.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Quantizer {
    /// By the processor.
    Host,
    /// By the device, where it has a CubeCL runtime.
    Device,
}

impl Quantizer {
    /// The one for a device: itself on CUDA, unless `BURN_QLORA_LOADING=host` stands in the environment.
    pub(super) fn of(device: &Device) -> Result<Self, ModelError> {
        let value = std::env::var_os(VARIABLE).filter(|value| !value.is_empty());
        match value {
            Some(value) if value != "host" => {
                Err(ModelError::Loading { variable: VARIABLE, value: value.to_string_lossy().into() })
            }
            None if client_of(device).is_some_and(|client| is_cuda(&client)) => Ok(Self::Device),
            _ => Ok(Self::Host),
        }
    }
}

/// The way of tensors to a device.
pub(super) struct Streaming<'a> {
    device: &'a Device,
    client: Client,
    /// Where slices arrive, one over the other.
    slice: Option<(Handle, usize)>,
    /// Bytes of a slice.
    slice_bytes: usize,
}

impl<'a> Streaming<'a> {
    /// To a device that quantizes itself.
    pub(super) fn to(device: &'a Device, quantizer: Quantizer) -> Option<Self> {
        let client = client_of(device).filter(|_| quantizer == Quantizer::Device)?;
        Some(Self { device, client, slice: None, slice_bytes: SLICE })
    }

    /// A weight, quantized on the device. `None`, and nothing done, for what it can't do: a format that it has not, or numbers
    /// that are not finite.
    pub(super) fn quantize(
        &mut self,
        tensor: &DenseTensor,
        shape: [usize; 2],
        config: &QuantConfig,
        dtype: FloatFormat,
    ) -> Result<Option<Linear4bit>, ModelError> {
        let weight = match tensor.dtype {
            Dtype::F32 => self.quantize_as::<f32>(tensor, shape, config)?,
            Dtype::F16 => self.quantize_as::<f16>(tensor, shape, config)?,
            Dtype::BF16 => self.quantize_as::<bf16>(tensor, shape, config)?,
            _ => None,
        };
        let layer = |weight| Linear4bit::from_device(weight, shape, dtype, self.device);
        Ok(weight.map(layer).transpose()?)
    }

    fn quantize_as<E: Element + Pod>(
        &mut self,
        tensor: &DenseTensor,
        [rows, columns]: [usize; 2],
        config: &QuantConfig,
    ) -> Result<Option<DeviceWeight>, ModelError> {
        if !supports(&self.client, E::FORMAT) {
            return Ok(None);
        }
        let (elements, size) = (rows * columns, E::FORMAT.size());
        let blocksize = config.blocksize;
        let mut weight = StreamedQuantize::new(&self.client, elements, E::FORMAT, config)?;
        let mut absmax = vec![0.0; elements.div_ceil(blocksize)];
        let buffer = self.slice(self.slice_bytes.min(elements * size));
        let slice = self.slice_bytes / size;
        for (i, absmax) in absmax.chunks_mut(slice / blocksize).enumerate() {
            let len = slice.min(elements - i * slice);
            // Runtimes copy whole words.
            let mut bytes = staging(&self.client, (len * size).next_multiple_of(4));
            if !fill::<E>(tensor, i * slice * size, &mut bytes[..len * size], blocksize, absmax)? {
                return Ok(None);
            }
            self.client.write(&buffer, bytes);
            weight.push(&self.client, &buffer, len)?;
        }
        let offset = if config.double_quant { NestedAbsmax::mean(&absmax) } else { 0.0 };
        Ok(Some(weight.finish(&self.client, offset)?))
    }

    /// A tensor that stays as it is, in `dtype`. `None`, and nothing done, for what is small, in another format, or not finite.
    pub(super) fn dense<const D: usize>(
        &mut self,
        tensor: &DenseTensor,
        shape: [usize; D],
        dtype: DType,
    ) -> Result<Option<Tensor<D>>, ModelError> {
        match (tensor.dtype, dtype) {
            (Dtype::F32, DType::F32) => self.dense_as::<f32, D>(tensor, shape, dtype),
            (Dtype::F16, DType::F16) => self.dense_as::<f16, D>(tensor, shape, dtype),
            (Dtype::BF16, DType::BF16) => self.dense_as::<bf16, D>(tensor, shape, dtype),
            _ => Ok(None),
        }
    }

    fn dense_as<E: Element + Pod, const D: usize>(
        &mut self,
        tensor: &DenseTensor,
        shape: [usize; D],
        dtype: DType,
    ) -> Result<Option<Tensor<D>>, ModelError> {
        let total = tensor.num_bytes();
        if total < SMALL || !total.is_multiple_of(4) || !supports(&self.client, E::FORMAT) {
            return Ok(None);
        }
        let buffer = self.client.memory_persistent_allocation((), |()| self.client.empty(total));
        let mut absmax = vec![0.0; self.slice_bytes / E::FORMAT.size() / LOOK];
        for start in (0..total).step_by(self.slice_bytes) {
            let len = self.slice_bytes.min(total - start);
            let mut bytes = staging(&self.client, len);
            let absmax = &mut absmax[..(len / E::FORMAT.size()).div_ceil(LOOK)];
            if !fill::<E>(tensor, start, &mut bytes, LOOK, absmax)? {
                return Ok(None);
            }
            let place = buffer.clone().offset_start(start as u64).offset_end((total - start - len) as u64);
            self.client.write(&place, bytes);
        }
        Ok(from_buffer(self.device, buffer, shape, dtype))
    }

    /// A buffer of the device for this many bytes or more, the same for every slice.
    fn slice(&mut self, bytes: usize) -> Handle {
        match &self.slice {
            Some((buffer, room)) if *room >= bytes => buffer.clone(),
            _ => {
                let room = bytes.next_multiple_of(4);
                let buffer = self.client.memory_dedicated_allocation((), |()| self.client.empty(room));
                self.slice = Some((buffer.clone(), room));
                buffer
            }
        }
    }
}

/// Copies or decodes bytes of a tensor on all processor cores, and finds the absmax of its blocks; `false` where a number is
/// not finite.
fn fill<E: Element + Pod>(
    tensor: &DenseTensor,
    start: usize,
    to: &mut [u8],
    blocksize: usize,
    absmax: &mut [f32],
) -> Result<bool, ModelError> {
    let blocks = CHUNK / E::FORMAT.size() / blocksize;
    let chunks = to.par_chunks_mut(CHUNK).zip(absmax.par_chunks_mut(blocks)).enumerate();
    let fill = |(i, (to, absmax)): (usize, (&mut [u8], &mut [f32]))| {
        tensor.read(start + i * CHUNK, to)?;
        let finite = match bytemuck::try_cast_slice::<u8, E>(to) {
            Ok(values) => block_absmax(values, blocksize, absmax),
            Err(_) => block_absmax(&bytemuck::pod_collect_to_vec::<u8, E>(to), blocksize, absmax),
        };
        Ok(finite?)
    };
    chunks.map(fill).try_reduce(|| true, |a, b| Ok(a && b))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failing unwrap is a failing test")]

    use super::*;
    use crate::config::ModelConfig;
    use crate::decoder::Decoder;
    use crate::loader::{LoadOptions, Loader};
    use adapter_io::{Checkpoint, ShardedWriter};
    use burn::tensor::{FloatDType, Int};
    use nf4_quant::QuantType;
    use qlora_layers::FrozenLinear;
    use std::path::Path;
    use test_support::{devices, noise};

    /// Three slices of a large weight in f32, and two in 16 bits.
    const SMALL_SLICE: usize = 4 << 20;

    fn load(
        dir: &Path,
        config: QuantConfig,
        dtype: FloatDType,
        to: (&Device, Quantizer),
    ) -> Result<Decoder, ModelError> {
        let checkpoint = Checkpoint::open(dir)?;
        let mut streaming = Streaming::to(to.0, to.1);
        if let Some(streaming) = &mut streaming {
            streaming.slice_bytes = SMALL_SLICE;
        }
        let options = LoadOptions { quantization: Some(config), dtype };
        let model = ModelConfig::from_dir(dir)?;
        let root = model.root();
        let holds = |root: &&crate::family::Root| checkpoint.contains(&root.below(".embed_tokens.weight"));
        let root = *model.roots.iter().find(holds).unwrap_or(&root);
        Loader::new(&checkpoint, model, options, to.0, &mut |_| {}, root, streaming).decoder()
    }

    /// Every tensor of a model, by name and part, in bits.
    fn states(model: &Decoder) -> Vec<(String, Vec<u32>)> {
        let floats = |tensor: Tensor<2>| tensor.into_data().iter::<f32>().map(f32::to_bits).collect::<Vec<_>>();
        let mut found = vec![("embed_tokens".into(), floats(model.embed_tokens.val()))];
        for (name, linear) in model.linears() {
            match &linear.base {
                FrozenLinear::Dense(weight) => found.push((name, floats(weight.val()))),
                FrozenLinear::Quantized(weight) => {
                    let packed = weight.packed();
                    let parts = [packed.codes, packed.absmax, packed.nested_absmax];
                    for (i, part) in parts.into_iter().enumerate() {
                        let words = Tensor::<1, Int>::from_dispatch(part).into_data().iter::<u32>().collect();
                        found.push((format!("{name} {i} {:?}", packed.layout), words));
                    }
                }
            }
        }
        found
    }

    fn check(dir: &Path, config: QuantConfig, dtype: FloatDType) {
        for (name, device) in devices() {
            if Streaming::to(&device, Quantizer::Device).is_none() || !device.supports_dtype(dtype) {
                continue;
            }
            let [host, on_device] = [Quantizer::Host, Quantizer::Device]
                .map(|quantizer| states(&load(dir, config, dtype, (&device, quantizer)).unwrap()));
            assert_eq!(host.len(), on_device.len());
            for (host, on_device) in host.iter().zip(on_device) {
                assert_eq!(host.0, on_device.0);
                assert!(host.1 == on_device.1, "{name} {}: {} differs", dir.display(), host.0);
            }
        }
    }

    /// A model of one block, of odd sizes whose rows no block fits, in a format. One number of `bad` may not be finite.
    fn odd_model(dtype: Dtype, bad: Option<&str>) -> tempfile::TempDir {
        let (hidden, inner, words, heads, head) = (1002, 2999, 1500, 10, 100);
        let config = serde_json::json!({
            "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": 1,
            "num_attention_heads": heads, "num_key_value_heads": 1, "head_dim": head, "vocab_size": words,
            "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": false, "max_position_embeddings": 512,
        });
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        let block = |name: &str| format!("model.layers.0.{name}.weight");
        let tensors: Vec<(String, Vec<usize>)> = vec![
            ("model.embed_tokens.weight".into(), vec![words, hidden]),
            ("model.norm.weight".into(), vec![hidden]),
            ("lm_head.weight".into(), vec![words, hidden]),
            (block("input_layernorm"), vec![hidden]),
            (block("post_attention_layernorm"), vec![hidden]),
            (block("self_attn.q_proj"), vec![heads * head, hidden]),
            (block("self_attn.k_proj"), vec![head, hidden]),
            (block("self_attn.v_proj"), vec![head, hidden]),
            (block("self_attn.o_proj"), vec![hidden, heads * head]),
            (block("mlp.gate_proj"), vec![inner, hidden]),
            (block("mlp.up_proj"), vec![inner, hidden]),
            (block("mlp.down_proj"), vec![hidden, inner]),
        ];
        let specs = tensors.iter().map(|(name, shape)| adapter_io::TensorSpec::new(name, dtype, shape)).collect();
        let mut writer = ShardedWriter::create(dir.path(), specs, u64::MAX).unwrap();
        for (i, (name, shape)) in tensors.iter().enumerate() {
            let mut values = noise(i as u64, shape.iter().product());
            values.iter_mut().enumerate().for_each(|(i, value)| *value *= if i / 64 % 9 == 3 { 0.0 } else { 0.03 });
            if Some(name.as_str()) == bad {
                let last = values.len() - 5;
                values[last] = f32::NEG_INFINITY;
            }
            let bytes: Vec<u8> = match dtype {
                Dtype::F32 => bytemuck::cast_slice(&values).to_vec(),
                Dtype::F16 => values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect(),
                _ => values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect(),
            };
            writer.write(name, &bytes).unwrap();
        }
        writer.finish().unwrap();
        dir
    }

    #[test]
    fn devices_quantize_as_the_host_does() {
        let nested = QuantConfig::default();
        let plain = QuantConfig { quant_type: QuantType::Fp4, blocksize: 128, double_quant: false };
        for (dtype, compute) in
            [(Dtype::F32, FloatDType::F32), (Dtype::F16, FloatDType::F16), (Dtype::BF16, FloatDType::BF16)]
        {
            let dir = odd_model(dtype, None);
            check(dir.path(), nested, compute);
            check(dir.path(), plain, FloatDType::F32);
        }
    }

    /// Also with an expert's weights in a tensor each, and in stacked ones.
    #[test]
    fn devices_quantize_every_family_as_the_host_does() {
        let reference = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/reference");
        let mut names = vec![reference.join("tiny-llama")];
        names.extend(std::fs::read_dir(reference.join("archs")).unwrap().map(|entry| entry.unwrap().path()));
        let models: Vec<_> = names.iter().filter(|dir| dir.join("model.safetensors").exists()).collect();
        assert!(models.len() > 10);
        for dir in models {
            check(dir, QuantConfig { blocksize: 32, ..QuantConfig::default() }, FloatDType::F32);
        }
    }

    /// A model with the recorded block of a storage that is decoded.
    fn coded_model(case: &Path) -> tempfile::TempDir {
        let said = std::fs::read(case.join("quantization_config.json")).unwrap();
        let mut config: serde_json::Value = serde_json::from_slice(&said).unwrap();
        let sizes = serde_json::json!({
            "model_type": "llama", "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 300, "rms_norm_eps": 1e-5,
            "hidden_act": "silu", "tie_word_embeddings": true, "max_position_embeddings": 512,
        });
        config.as_object_mut().unwrap().extend(sizes.as_object().unwrap().clone());
        let coded = Checkpoint::open_file(&case.join("coded.safetensors")).unwrap();
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        // Weights of odd sizes lie beside those of the block.
        let names: Vec<&str> = coded.names().filter(|name| !name.contains(".odd.")).collect();
        let spec = |name: &&str| {
            let view = coded.tensor(name).unwrap();
            adapter_io::TensorSpec::new(*name, view.dtype, &view.shape)
        };
        let rest = ["model.norm", "model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm"];
        let rest = rest.map(|name| (name, vec![64])).into_iter().chain([("model.embed_tokens", vec![300, 64])]);
        let rest: Vec<_> = rest
            .map(|(name, shape)| adapter_io::TensorSpec::new(format!("{name}.weight"), Dtype::F32, &shape))
            .collect();
        let specs = names.iter().map(spec).chain(rest.clone()).collect();
        let mut writer = ShardedWriter::create(dir.path(), specs, u64::MAX).unwrap();
        names.iter().for_each(|name| writer.write(name, coded.tensor(name).unwrap().data).unwrap());
        for spec in rest {
            let values = noise(7, spec.shape.iter().product());
            writer.write(&spec.name, bytemuck::cast_slice(&values)).unwrap();
        }
        writer.finish().unwrap();
        dir
    }

    #[test]
    fn devices_quantize_what_is_decoded_as_the_host_does() {
        let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/reference/sources");
        let cases = std::fs::read_dir(sources).unwrap().map(|entry| entry.unwrap().path());
        // gpt-oss's experts are no llama's.
        let cases: Vec<_> = cases.filter(|case| !case.ends_with("mxfp4-gpt-oss")).collect();
        assert!(cases.len() > 10);
        for case in cases {
            let dir = coded_model(&case);
            let config = QuantConfig { blocksize: 32, ..QuantConfig::default() };
            let model = load(dir.path(), config, FloatDType::F32, (&Device::flex(), Quantizer::Host)).unwrap();
            assert_eq!(model.linears().filter(|(_, l)| matches!(l.base, FrozenLinear::Quantized(_))).count(), 7);
            check(dir.path(), config, FloatDType::F32);
        }
    }

    #[test]
    fn what_is_not_finite_is_named_as_the_host_names_it() {
        for bad in ["model.layers.0.mlp.up_proj.weight", "lm_head.weight"] {
            let dir = odd_model(Dtype::F32, Some(bad));
            for (name, device) in devices() {
                let [host, on_device] = [Quantizer::Host, Quantizer::Device].map(|quantizer| {
                    let loaded = load(dir.path(), QuantConfig::default(), FloatDType::F32, (&device, quantizer));
                    loaded.err().map(|error| error.to_string())
                });
                assert_eq!(host, on_device, "{name}");
                assert!(host.unwrap().contains(bad), "{name}");
            }
        }
    }

    /// Nothing of it is read where the device is the host.
    #[test]
    fn the_host_is_no_device_that_quantizes() {
        assert_eq!(Quantizer::of(&Device::flex()).unwrap(), Quantizer::Host);
        assert!(Streaming::to(&Device::flex(), Quantizer::Device).is_none());
    }
}
