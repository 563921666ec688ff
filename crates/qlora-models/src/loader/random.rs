//! Random weights, so that a model of any shape can be measured without its checkpoint.
//!
//! Making and quantizing 70 billion numbers takes longer than measuring with them, and no kernel's time depends on
//! which numbers they are. So a few matrices are made for each shape, quantized once, and every layer of the shape
//! uploads one of them into its own memory.

use super::options::LoadOptions;
use super::source::Source;
use crate::ModelError;
use crate::config::ModelConfig;
use adapter_io::{DenseTensor, Dtype, FormatError, TensorView};
use half::bf16;
use nf4_quant::Quantized4bit;
use qlora_layers::mix;
use rayon::prelude::*;
use std::borrow::Cow;
use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::path::PathBuf;

/// Matrices of each shape.
const EACH: usize = 2;
/// Deviation of the weights: the usual initialisation's.
const DEVIATION: f32 = 0.02;

/// Random tensors for the modules of a configuration.
pub(super) struct Random {
    path: PathBuf,
    /// In 4 bits, where that is asked for.
    quantized: HashMap<[usize; 2], Vec<Quantized4bit>>,
    dense: HashMap<[usize; 2], Vec<Vec<bf16>>>,
    /// Modules that are dense, where others of their shape may be in 4 bits.
    left_dense: HashSet<String>,
    /// By shape: what linear attention and short convolutions have beside projections, a norm as `[1, width]`, the corrections of
    /// routers, and sinks.
    linear: HashMap<Vec<usize>, Vec<bf16>>,
    /// The name of that norm.
    linear_norm: Option<&'static str>,
    /// By width: the weights of norms, and biases.
    norms: HashMap<usize, Vec<bf16>>,
    biases: HashMap<usize, Vec<bf16>>,
    total_bytes: u64,
}

impl Random {
    pub(super) fn new(config: &ModelConfig, options: &LoadOptions, seed: u64) -> Result<Self, ModelError> {
        let mut source = Self {
            path: config.path().into(),
            quantized: HashMap::new(),
            dense: HashMap::new(),
            left_dense: HashSet::new(),
            linear: HashMap::new(),
            linear_norm: config.family.linear.map(|names| names.norm),
            norms: HashMap::new(),
            biases: HashMap::new(),
            total_bytes: 0,
        };
        let mut dense = vec![[config.vocab_size, config.hidden_size]];
        for spec in config.linear_specs() {
            let [rows, columns] = spec.shape;
            if spec.bias {
                source.biases.entry(rows).or_insert_with(|| vec![bf16::ZERO; rows]);
                source.total_bytes += 2 * rows as u64;
            }
            let Some(quantization) = options.quantization.filter(|_| spec.role.is_quantized()) else {
                dense.push(spec.shape);
                source.left_dense.insert(spec.path);
                continue;
            };
            source.total_bytes += (rows * columns).div_ceil(2) as u64;
            if let Entry::Vacant(place) = source.quantized.entry(spec.shape) {
                let make = |index| {
                    let values = normal(rows * columns, stream(seed, spec.shape, index));
                    let mut weight = Quantized4bit::quantize(&values, &spec.shape, &quantization)
                        .map_err(|source| ModelError::Quantize { module: spec.path.clone(), source })?;
                    weight.state.dtype = options.state_dtype();
                    Ok(weight)
                };
                place.insert((0..EACH).map(make).collect::<Result<_, ModelError>>()?);
            }
        }
        for shape in dense {
            let [rows, columns] = shape;
            source.total_bytes += 2 * (rows * columns) as u64;
            let make = |index| normal(rows * columns, stream(seed, shape, index));
            source.dense.entry(shape).or_insert_with(|| (0..EACH).map(make).collect());
        }
        // Convolutions of the usual size, and states that keep nine tenths and more.
        let scale = bf16::from_f64(0.5 / f64::from(DEVIATION));
        let filter = |len: usize| normal(len, mix(seed)).into_iter().map(|value| value * scale).collect::<Vec<bf16>>();
        for index in 0..config.num_hidden_layers {
            if let Some((taps, _)) = config.short_convolution(index) {
                let width = config.hidden_size;
                source.linear.entry(vec![width, 1, taps]).or_insert_with(|| filter(width * taps));
                source.total_bytes += 2 * (width * taps) as u64;
            }
            let Some((linear, _)) = config.linear_attention(index) else { continue };
            let filters = linear.channels() * linear.taps;
            source.linear.entry(vec![linear.channels(), 1, linear.taps]).or_insert_with(|| filter(filters));
            source
                .linear
                .entry(vec![linear.value_heads])
                .or_insert_with(|| vec![bf16::from_f64(-2.0); linear.value_heads]);
            source.linear.entry(vec![1, linear.value_dim]).or_insert_with(|| vec![bf16::ONE; linear.value_dim]);
            source.total_bytes += 2 * (filters + 2 * linear.value_heads) as u64;
        }
        let sigmoid = config.experts.filter(|experts| experts.sigmoid.is_some());
        let corrections = sigmoid.map(|experts| (experts.count, config.sparse_blocks()));
        let sinks = config.family.sinks.map(|_| (config.num_attention_heads, config.attention_blocks()));
        for (len, blocks) in corrections.into_iter().chain(sinks) {
            source.linear.entry(vec![len]).or_insert_with(|| vec![bf16::ZERO; len]);
            source.total_bytes += 2 * (len * blocks) as u64;
        }
        // What norms multiply by is one plus the weight in some families.
        let one = bf16::from_f64(1.0 - config.family.norm_offset);
        for (_, width) in config.norms() {
            source.norms.entry(width).or_insert_with(|| vec![one; width]);
            source.total_bytes += 2 * width as u64;
        }
        Ok(source)
    }
}

impl Random {
    fn is_linear_norm(&self, tensor: &str) -> bool {
        let module = tensor.strip_suffix(".weight");
        self.linear_norm.zip(module).is_some_and(|(norm, module)| module.ends_with(norm))
    }
}

impl Source for Random {
    fn release(&self, _: &str) {}

    fn total_bytes(&self) -> u64 {
        self.total_bytes
    }

    fn names(&self) -> Box<dyn Iterator<Item = &str> + '_> {
        Box::new(std::iter::empty())
    }

    /// Nothing is stacked, and what is asked for by module and shape is made for them.
    fn contains(&self, _: &str) -> bool {
        false
    }

    fn quantized(&self, module: &str, shape: [usize; 2]) -> Result<Option<Cow<'_, Quantized4bit>>, ModelError> {
        let made = self.quantized.get(&shape).filter(|_| !self.left_dense.contains(module));
        Ok(made.map(|all| Cow::Borrowed(pick(all, module))))
    }

    fn tensor<'a>(&'a self, name: &'a str, shape: &[usize]) -> Result<DenseTensor<'a>, ModelError> {
        let values = match *shape {
            [rows, columns] => self.dense.get(&[rows, columns]).map(|all| pick(all, name)),
            [width] if name.ends_with(".bias") => self.biases.get(&width),
            [width] if self.is_linear_norm(name) => self.linear.get(&[1, width][..]),
            [width] if name.ends_with(".weight") => self.norms.get(&width),
            _ => self.linear.get(shape),
        };
        let missing = || FormatError::MissingTensor { path: self.path.clone(), tensor: name.into(), nearest: vec![] };
        let data = bytemuck::cast_slice(values.ok_or_else(missing)?);
        Ok(TensorView { file: &self.path, name, dtype: Dtype::BF16, shape: shape.into(), data }.into())
    }
}

/// One of the matrices of a shape, the same for the same name.
fn pick<'a, T>(all: &'a [T], name: &str) -> &'a T {
    let hash = name.bytes().fold(0, |hash, byte| mix(hash ^ u64::from(byte)));
    &all[(hash % all.len() as u64) as usize]
}

/// The generator's start for a matrix.
fn stream(seed: u64, [rows, columns]: [usize; 2], index: usize) -> u64 {
    mix(seed ^ mix(rows as u64 ^ mix(columns as u64 ^ mix(index as u64))))
}

/// Values close to a normal distribution: the sum of four random bytes for each.
fn normal(len: usize, start: u64) -> Vec<bf16> {
    // Four bytes have the mean 510 and the variance 4 (256^2 - 1) / 12.
    let factor = DEVIATION / (f32::from(u16::MAX) / 3.0).sqrt();
    let mut values = vec![bf16::ZERO; len];
    values.par_chunks_mut(2).enumerate().with_min_len(1 << 14).for_each(|(i, pair)| {
        let bytes = mix(start.wrapping_add(i as u64)).to_le_bytes();
        for (value, bytes) in pair.iter_mut().zip(bytes.chunks(4)) {
            let sum: i32 = bytes.iter().map(|&byte| i32::from(byte)).sum();
            *value = bf16::from_f32((sum - 510) as f32 * factor);
        }
    });
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_have_the_moments_of_a_normal_distribution() {
        let values = normal(1_000_001, 7);
        let moment = |k: i32| {
            values.iter().map(|v| f64::from(v.to_f32() / DEVIATION).powi(k)).sum::<f64>() / values.len() as f64
        };
        // Five standard errors of a million samples: 1 and sqrt(2) over 1,000, and bf16's rounding of 0.2 % squared.
        assert!(moment(1).abs() < 0.005 && (moment(2) - 1.0).abs() < 0.009, "{} {}", moment(1), moment(2));
        assert_ne!(normal(64, 1), normal(64, 2));
    }
}
