//! What a loaded model's weights are held in, read from the weights themselves.

use crate::config::LinearRole;
use crate::decoder::Decoder;
use burn::tensor::DType;
use qlora_layers::FrozenLinear;
use qlora_layers::ops::Layout4bit;
use std::fmt;

/// Bytes of a model's frozen weights by what they are held in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HeldWeights {
    /// In 4 bits, with their statistics.
    pub four_bit: usize,
    /// In bf16 or f16.
    pub sixteen_bit: usize,
    /// In f32.
    pub f32: usize,
    /// Projections, those of experts among them, that are not in 4 bits although others are: the first, and how many.
    pub left_dense: Option<(String, usize)>,
    /// The 4-bit formats, each named once: `NF4, blocksize 64 with double quantization`.
    pub formats: Vec<String>,
}

impl HeldWeights {
    /// The weights' format in words, `unquantized` without one in 4 bits.
    pub fn format(&self) -> String {
        match self.formats.is_empty() {
            true => "unquantized".into(),
            false => self.formats.join(" and "),
        }
    }

    fn add(&mut self, dtype: DType, elements: usize) {
        match dtype.size() {
            2 => self.sixteen_bit += 2 * elements,
            size => self.f32 += size * elements,
        }
    }
}

impl fmt::Display for HeldWeights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kinds = [(self.four_bit, "in 4 bits"), (self.sixteen_bit, "in 16 bits"), (self.f32, "in f32")];
        let mut parts = kinds.into_iter().filter(|(bytes, _)| *bytes > 0);
        let (first, name) = parts.next().unwrap_or((0, "in all"));
        write!(f, "{} {name}", size(first))?;
        parts.try_for_each(|(bytes, name)| write!(f, ", {} {name}", size(bytes)))?;
        match &self.left_dense {
            Some((first, 1)) => write!(f, "; {first} is not in 4 bits"),
            Some((first, count)) => write!(f, "; {count} projections are not in 4 bits, {first} the first of them"),
            None => Ok(()),
        }
    }
}

fn size(bytes: usize) -> String {
    let bytes = bytes as f64;
    match bytes {
        bytes if bytes < 1e4 => format!("{bytes} bytes"),
        bytes if bytes < 1e7 => format!("{:.1} KiB", bytes / 1024.0),
        bytes if bytes < 1e10 => format!("{:.1} MiB", bytes / 1024.0 / 1024.0),
        bytes => format!("{:.1} GiB", bytes / 1024.0 / 1024.0 / 1024.0),
    }
}

fn format_of(layout: &Layout4bit) -> String {
    let nested = if layout.nested_blocksize.is_some() { " with double quantization" } else { "" };
    format!("{}, blocksize {}{nested}", layout.quant_type.to_string().to_uppercase(), layout.blocksize)
}

impl Decoder {
    /// What the frozen weights are held in.
    pub fn held_weights(&self) -> HeldWeights {
        let mut held = HeldWeights::default();
        held.add(self.embed_tokens.dtype(), self.embed_tokens.shape().num_elements());
        self.norms().for_each(|(_, norm)| held.add(DType::F32, norm.weight.dims()[0]));
        let mut dense: Vec<String> = Vec::new();
        let roles = self.config.linear_specs().into_iter().map(|spec| spec.role);
        for ((path, linear), role) in self.linears().zip(roles) {
            match &linear.base {
                FrozenLinear::Quantized(weight) => {
                    held.four_bit += weight.device_bytes();
                    let format = format_of(weight.layout());
                    if !held.formats.contains(&format) {
                        held.formats.push(format);
                    }
                }
                FrozenLinear::Dense(weight) => {
                    held.add(weight.dtype(), weight.shape().num_elements());
                    if matches!(role, LinearRole::Projection | LinearRole::Expert) {
                        dense.push(path);
                    }
                }
            }
            if let Some(bias) = &linear.bias {
                held.add(bias.dtype(), bias.dims()[0]);
            }
        }
        let count = dense.len();
        held.left_dense = dense.into_iter().next().filter(|_| !held.formats.is_empty()).map(|first| (first, count));
        held
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_is_told() {
        let mut held = HeldWeights { four_bit: 4 << 30, sixteen_bit: 300 << 20, f32: 1200, ..HeldWeights::default() };
        assert_eq!(held.to_string(), "4096.0 MiB in 4 bits, 300.0 MiB in 16 bits, 1200 bytes in f32");
        held.left_dense = Some(("model.layers.0.mlp.experts.3.up_proj".into(), 2));
        assert!(
            held.to_string()
                .ends_with("; 2 projections are not in 4 bits, model.layers.0.mlp.experts.3.up_proj the first of them")
        );
    }
}
