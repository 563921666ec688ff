//! Activation functions under the names of transformers.

use super::fields::Fields;
use crate::ModelError;
use qlora_layers::ops::fused::Activation;

const NAMES: &[(&str, Activation)] = &[
    ("silu", Activation::Silu),
    ("swish", Activation::Silu),
    ("gelu", Activation::Gelu),
    ("gelu_pytorch_tanh", Activation::GeluTanh),
    ("gelu_new", Activation::GeluTanh),
    ("relu", Activation::Relu),
];

/// What a key names, or `default` when it is absent. A family whose activation is silu with bounds calls it that.
pub(super) fn activation(fields: &Fields, (key, default): (&str, Activation)) -> Result<Activation, ModelError> {
    let Some(name) = fields.text(key)? else { return Ok(default) };
    let found = NAMES.iter().find(|(known, _)| *known == name).map(|(_, activation)| *activation);
    let found = found.map(|found| match (found, default) {
        (Activation::Silu, Activation::ClampedSwish) => default,
        _ => found,
    });
    found.ok_or_else(|| {
        let supported = NAMES.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
        fields.error(key, format!("is \"{name}\", which is not supported; supported: {supported}"))
    })
}
