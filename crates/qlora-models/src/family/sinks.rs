//! gpt-oss: attention with sinks, windows in every other block, and experts that files hold stacked, with biases.

use super::experts::ROUTED;
use super::{Activation, BASE, Experts, Family, Only, Rotary, Sizes, Switch, Window, Windowed};

/// Its files call the activation silu; what experts compute has a factor in it, and bounds.
pub(super) const GPT_OSS: Family = Family {
    model_type: "gpt_oss",
    qkv_bias: Switch::Unless("attention_bias"),
    output_bias: Switch::Unless("attention_bias"),
    sinks: Some("self_attn.sinks"),
    activation: ("hidden_act", Activation::ClampedSwish),
    experts: Some(Experts {
        router: "mlp.router",
        stacked_router: "mlp.router",
        count: (&["num_local_experts", "num_experts"], 128),
        per_token: ("num_experts_per_tok", 4),
        width: ("intermediate_size", Some(2880)),
        normalise: Switch::On,
        ..ROUTED
    }),
    interleaved_experts: true,
    window: Window { blocks: Windowed::AllButEvery(None, 2), width: Some(128), switch: None },
    // Without a scaling transformers takes one that its files all have.
    rotary: Rotary { theta: 150_000.0, needs_scaling: true, ..BASE.rotary },
    sizes: Sizes {
        vocab_size: Some(201_088),
        hidden_size: Some(2880),
        intermediate_size: Some(2880),
        num_hidden_layers: Some(36),
        num_attention_heads: Some(64),
        num_key_value_heads: Some(8),
        head_dim: Some(64),
        max_position_embeddings: 131_072,
    },
    rms_norm_eps: 1e-5,
    fixed: &[("swiglu_alpha", Only::Number(1.702)), ("swiglu_limit", Only::Number(7.0))],
    // The experts of a token again, and the context before its extension, which the scaling says.
    harmless: &["output_router_logits", "router_aux_loss_coef", "experts_per_token", "initial_context_length"],
    ..BASE
};
