//! Heads that attention has no kernel for.

use crate::config::ModelConfig;
use burn::tensor::{Device, FloatDType};
use qlora_layers::ops::attention_kernel;

/// What the heads of some blocks cost on a device that has a kernel for others, in words.
pub(super) fn note(config: &ModelConfig, dtype: FloatDType, device: &Device) -> Option<String> {
    // Where there is none for any head, there is nothing that these are slower than.
    attention_kernel(device, dtype, 128).then_some(())?;
    let is_composed = |index: &usize| !attention_kernel(device, dtype, config.attention(*index).head_dim);
    let blocks: Vec<usize> = config.attended().filter(is_composed).collect();
    let head_dim = config.attention(*blocks.first()?).head_dim;
    Some(format!(
        "{} of {} blocks have heads of {head_dim} elements, for which attention has no kernel of its own in training: it is computed by \
         products over 256 queries at a time, several times as slowly over long rows",
        blocks.len(),
        config.num_hidden_layers
    ))
}
