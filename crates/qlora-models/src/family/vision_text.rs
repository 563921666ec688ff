//! Language models of types that read images, where they have a type of their own: Qwen 2 and 3 with other defaults.
//!
//! A token has three positions there, of which `mrope_section` says what each rotates. Text has one position for all three, so that
//! the rotation is the plain one. What deeper blocks of Qwen 3 VL add of images is absent from text, too.

use super::{Family, QWEN2, QWEN3, Rotary, Sizes, Window, Windowed};

const MROPE: &[&str] = &["mrope_interleaved", "mrope_section"];

/// Qwen 2 VL.
pub(super) const QWEN2_VL_TEXT: Family = Family {
    model_type: "qwen2_vl_text",
    window: Window { blocks: Windowed::From("max_window_layers", 80), ..QWEN2.window },
    rotary: Rotary { theta: 1_000_000.0, harmless: MROPE, ..QWEN2.rotary },
    sizes: Sizes {
        vocab_size: Some(152_064),
        hidden_size: Some(8192),
        intermediate_size: Some(29_568),
        num_hidden_layers: Some(80),
        num_attention_heads: Some(64),
        num_key_value_heads: Some(8),
        ..QWEN2.sizes
    },
    rms_norm_eps: 1e-5,
    // The file of the whole model is the section, too, in the type's first files.
    harmless: &["vision_config"],
    ..QWEN2
};

/// Qwen 2.5 VL.
pub(super) const QWEN2_5_VL_TEXT: Family = Family { model_type: "qwen2_5_vl_text", ..QWEN2_VL_TEXT };

/// Qwen 3 VL.
pub(super) const QWEN3_VL_TEXT: Family = Family {
    model_type: "qwen3_vl_text",
    window: Window { blocks: Windowed::None, width: None, switch: None },
    rotary: Rotary { theta: 500_000.0, harmless: MROPE, ..QWEN3.rotary },
    sizes: Sizes { max_position_embeddings: 128_000, ..QWEN3.sizes },
    ..QWEN3
};
