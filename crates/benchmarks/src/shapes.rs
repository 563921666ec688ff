//! The linear layers of models that people fine-tune, and shapes that fit no fast path.

/// A weight `[out_features, in_features]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shape {
    /// Where it occurs.
    pub model: &'static str,
    pub out_features: usize,
    pub in_features: usize,
}

impl Shape {
    pub(crate) fn elements(self) -> usize {
        self.out_features * self.in_features
    }
}

const fn shape(model: &'static str, out_features: usize, in_features: usize) -> Shape {
    Shape { model, out_features, in_features }
}

/// Weights that are quantized, the first of each model its most frequent one.
pub(crate) const LINEAR: &[Shape] = &[
    shape("Llama-2-7B", 4096, 4096),
    shape("Llama-2-7B", 11008, 4096),
    shape("Llama-2-7B", 4096, 11008),
    shape("Llama-3-8B", 1024, 4096),
    shape("Llama-3-8B", 14336, 4096),
    shape("Llama-3-8B", 4096, 14336),
    shape("Llama-2-70B", 8192, 8192),
    shape("Llama-2-70B", 28672, 8192),
    shape("Llama-2-70B", 8192, 28672),
    shape("Qwen3-4B", 4096, 2560),
    shape("Qwen3-4B", 9728, 2560),
    shape("Qwen3-4B", 2560, 9728),
    // Not quantized by default, but `quantize` and `merge` meet it.
    shape("Qwen3-4B head", 151_936, 2560),
    // Blocks that end inside a row, rows that end inside a word, an odd number of rows.
    shape("in not 64 n", 4096, 4064),
    shape("in not 8 n", 4096, 4090),
    shape("odd rows", 4095, 4096),
];
