//! `config.json` as GGUF metadata: the keys of `set_gguf_parameters` in llama.cpp's converter.

use serde_json::Value as Json;

use super::architecture::{Model, table};
use super::blocks::GgmlType;
use super::value::Value;
use crate::error::FormatError;

/// Keys and values, and tensors that exist only in GGUF.
pub(super) struct ModelMetadata {
    pub entries: Vec<(String, Value)>,
    /// Factors of the rotary frequencies.
    pub tensors: Vec<(String, Vec<f32>)>,
}

pub(super) fn model_metadata(model: &Model, kind: GgmlType) -> Result<ModelMetadata, FormatError> {
    let mut out = ModelMetadata { entries: Vec::new(), tensors: Vec::new() };
    let architecture = &model.kind.architecture;
    let mut put = |key: &str, value: Value| out.entries.push((format!("{architecture}.{key}"), value));
    let (heads, kv_heads) = model.heads()?;
    put("block_count", Value::U32(model.needed(&["num_hidden_layers"])?));
    put("context_length", Value::U32(model.needed(&["max_position_embeddings"])?));
    put("embedding_length", Value::U32(model.needed(&["hidden_size"])?));
    put("feed_forward_length", Value::U32(model.needed(&["intermediate_size"])?));
    put("attention.head_count", Value::U32(heads));
    put("attention.head_count_kv", Value::U32(kv_heads));
    let eps = model.number("rms_norm_eps")?.unwrap_or(1e-6);
    put("attention.layer_norm_rms_epsilon", Value::F32(eps as f32));
    if let Some((experts, _)) = model.experts()? {
        put("expert_count", Value::U32(experts));
        put("expert_used_count", Value::U32(model.needed(&["num_experts_per_tok"])?));
    }
    if model.kind.has("expert_feed_forward") {
        put("expert_feed_forward_length", Value::U32(model.needed(&["moe_intermediate_size"])?));
    }
    if model.kind.has("corrected_experts") {
        /// The converter's number of scores that are sigmoids.
        const SIGMOID: u32 = 2;
        put("expert_shared_count", Value::U32(model.needed(&["n_shared_experts"])?));
        put("leading_dense_block_count", Value::U32(model.needed(&["first_k_dense_replace"])?));
        put("expert_gating_func", Value::U32(SIGMOID));
        put("expert_weights_scale", Value::F32(model.number("routed_scaling_factor")?.unwrap_or(1.0) as f32));
        put("expert_weights_norm", Value::Bool(model.flag("norm_topk_prob")?.unwrap_or(true)));
    }
    if let Some(dim) = model.size("head_dim")? {
        put("attention.key_length", Value::U32(dim));
        put("attention.value_length", Value::U32(dim));
    }
    if model.kind.has("vocab_size") {
        put("vocab_size", Value::U32(model.needed(&["vocab_size"])?));
    }
    if model.kind.has("softcaps") {
        for (key, name) in [
            ("attn_logit_softcapping", "attn_logit_softcapping"),
            ("final_logit_softcapping", "final_logit_softcapping"),
        ] {
            if let Some(cap) = model.number(key)? {
                put(name, Value::F32(cap as f32));
            }
        }
    }
    if model.kind.has("factors") {
        for (key, name) in [
            ("attention_multiplier", "attention.scale"),
            ("embedding_multiplier", "embedding_scale"),
            ("residual_multiplier", "residual_scale"),
            ("logits_scaling", "logit_scale"),
        ] {
            // Absent means 1, and to readers something else.
            put(name, Value::F32(model.number(key)?.unwrap_or(1.0) as f32));
        }
    }
    if model.kind.has("sliding_window") {
        put("attention.sliding_window", Value::U32(model.needed(&["sliding_window"])?));
    }
    if model.kind.has("sliding_window_or_zero") {
        put("attention.sliding_window", Value::U32(model.size("sliding_window")?.unwrap_or(0)));
    }
    rope(model, &mut out)?;
    check_fixed(model)?;
    out.entries.push(("general.file_type".into(), Value::U32(kind.file_type())));
    Ok(out)
}

fn rope(model: &Model, out: &mut ModelMetadata) -> Result<(), FormatError> {
    let architecture = model.kind.architecture.clone();
    let mut put = |key: &str, value: Value| out.entries.push((format!("{architecture}.rope.{key}"), value));
    let mut rope = model.rope();
    let dim = model.head_dim()?;
    let alpha = rope.get("alpha").and_then(Json::as_f64).filter(|alpha| *alpha != 0.0);
    if let (true, Some(alpha), Some("dynamic")) =
        (model.kind.has("alpha"), alpha, ["rope_type", "type"].into_iter().find_map(|k| rope.get(k)?.as_str()))
    {
        // A fixed theta under the name of one that grows.
        let (theta, dim) = (rope.get("rope_theta").and_then(Json::as_f64).unwrap_or(10_000.0), f64::from(dim));
        rope.insert("rope_theta".into(), (theta * alpha.powf(dim / (dim - 2.0))).into());
        rope.insert("rope_type".into(), "default".into());
    }
    let number = |key: &str| rope.get(key).and_then(Json::as_f64);
    let needed = |key: &str| number(key).ok_or_else(|| model.fail(&format!("rope_parameters.{key}"), "it is missing"));
    if let Some(theta) = number("rope_theta") {
        put("freq_base", Value::F32(theta as f32));
    }
    if let Some(theta) = model.local_rope_theta() {
        put("freq_base_swa", Value::F32(theta as f32));
    }
    let partial = number("partial_rotary_factor").unwrap_or(1.0);
    if model.kind.has("rope_dimensions") {
        put("dimension_count", Value::U32((f64::from(dim) * partial) as u32));
    } else if partial != 1.0 {
        return Err(model.fail("rope_parameters.partial_rotary_factor", format!("it is {partial}, expected 1")));
    }
    let original = number("original_max_position_embeddings");
    if let (true, Some(original)) = (model.kind.has("original_context"), original) {
        put("scaling.original_context_length", Value::U32(original as u32));
    }
    let name = ["rope_type", "type"].into_iter().find_map(|k| rope.get(k)?.as_str()).unwrap_or("default");
    if model.kind.rope_types.as_ref().is_some_and(|known| !known.iter().any(|k| k == name)) {
        return Err(model.fail("rope_parameters.rope_type", format!("`{name}` is not known to readers of GGUF here")));
    }
    match table().rope_scalings.get(name).map_or("", String::as_str) {
        "none" => {}
        "linear" => {
            put("scaling.type", "linear".into());
            put("scaling.factor", Value::F32(needed("factor")? as f32));
        }
        "yarn" => {
            put("scaling.type", "yarn".into());
            put("scaling.factor", Value::F32(needed("factor")? as f32));
            put("scaling.original_context_length", Value::U32(needed("original_max_position_embeddings")? as u32));
            if model.kind.has("yarn_by_factor") {
                // Readers have the factor of cosines from that of the context.
                let own = 0.1 * needed("factor")?.ln() + 1.0;
                if let Some(other) = number("attention_factor").filter(|other| (other - own).abs() > 1e-4) {
                    let reason = format!("it is {other}, and readers of GGUF compute with {own:.4} here");
                    return Err(model.fail("rope_parameters.attention_factor", reason));
                }
                return Ok(());
            }
            for (key, names) in [
                ("scaling.yarn_ext_factor", &["extrapolation_factor"][..]),
                ("scaling.yarn_attn_factor", &["attention_factor", "attn_factor"]),
                ("scaling.yarn_beta_fast", &["beta_fast"]),
                ("scaling.yarn_beta_slow", &["beta_slow"]),
            ] {
                if let Some(x) = names.iter().find_map(|n| number(n)) {
                    put(key, Value::F32(x as f32));
                }
            }
        }
        "bands" => {
            let (theta, factor) = (number("rope_theta").unwrap_or(10_000.0), number("factor").unwrap_or(8.0));
            let (low, high) = (number("low_freq_factor").unwrap_or(1.0), number("high_freq_factor").unwrap_or(4.0));
            let original = original.unwrap_or(8192.0);
            let scale = |i: u32| {
                // Every step in 32-bit floats, as the converter computes on PyTorch's tensors.
                let power = theta.powf(f64::from(2.0 * i as f32 / dim as f32)) as f32;
                let wavelength = 2.0 * std::f32::consts::PI / (1.0 / power);
                if f64::from(wavelength) < original / high {
                    1.0
                } else if f64::from(wavelength) > original / low {
                    factor as f32
                } else {
                    let smooth = (original as f32 / wavelength - low as f32) / (high - low) as f32;
                    1.0 / ((1.0 - smooth) / factor as f32 + smooth)
                }
            };
            out.tensors.push(("rope_freqs.weight".into(), (0..dim / 2).map(scale).collect()));
        }
        "long" => {
            let original = needed("original_max_position_embeddings")?;
            let scale = f64::from(model.needed(&["max_position_embeddings"])?) / original;
            let attention = if scale > 1.0 { (1.0 + scale.ln() / original.ln()).sqrt() } else { 1.0 };
            put("scaling.attn_factor", Value::F32(attention as f32));
            for which in ["long", "short"] {
                let key = format!("{which}_factor");
                let factors: Option<Vec<f32>> = rope
                    .get(&key)
                    .and_then(Json::as_array)
                    .and_then(|list| list.iter().map(|x| x.as_f64().map(|x| x as f32)).collect());
                let factors =
                    factors.filter(|f| f.len() == (f64::from(dim) * partial) as usize / 2).ok_or_else(|| {
                        model.fail(
                            &format!("rope_parameters.{key}"),
                            "it must hold one number for each rotary frequency",
                        )
                    })?;
                out.tensors.push((format!("rope_factors_{which}.weight"), factors));
            }
        }
        _ => {
            return Err(model.fail("rope_parameters.rope_type", format!("`{name}` cannot be written as GGUF")));
        }
    }
    Ok(())
}

/// What llama.cpp has built in and no key can change.
fn check_fixed(model: &Model) -> Result<(), FormatError> {
    if model.kind.has("query_scalar")
        && let Some(scalar) = model.number("query_pre_attn_scalar")?
    {
        // llama.cpp knows the largest model of these families by its number of layers.
        let layers = model.needed(&["num_hidden_layers"])?;
        let (wanted, what) = if model.kind.layers_scaled_by_width == Some(layers) {
            let (heads, _) = model.heads()?;
            (f64::from(model.needed(&["hidden_size"])?) / f64::from(heads), "the width over the heads")
        } else {
            (f64::from(model.head_dim()?), "the width of a head")
        };
        if scalar != wanted {
            return Err(model.fail(
                "query_pre_attn_scalar",
                format!("it is {scalar}, and readers of GGUF scale queries of {layers} layers by {what}, {wanted}"),
            ));
        }
    }
    let (heads, _) = model.heads()?;
    let (width, dim) = (model.needed(&["hidden_size"])?, model.head_dim()?);
    if model.kind.has("whole_heads") && u64::from(heads) * u64::from(dim) != u64::from(width) {
        let reason = format!("it is {dim}, and readers of GGUF take the width over the heads for it here");
        return Err(model.fail("head_dim", reason));
    }
    if model.kind.has("unrotated_4") {
        let layers = model.needed(&["num_hidden_layers"])? as usize;
        let wrong =
            |key: &str| Err(model.fail(key, "readers of GGUF take one layer in 4 for one without rotary embeddings"));
        match model.unrotated(layers) {
            Some(found) if found.iter().enumerate().any(|(i, rotated)| *rotated != ((i + 1) % 4 != 0)) => {
                return wrong("no_rope_layers");
            }
            None if model.size("no_rope_layer_interval")?.is_some_and(|every| every != 4) => {
                return wrong("no_rope_layer_interval");
            }
            _ => {}
        }
    }
    for (key, every) in [("layer_pattern_2", 2), ("layer_pattern_4", 4), ("layer_pattern_6", 6)] {
        let Some(layers) = model.layer_types().filter(|_| model.kind.has(key)) else { continue };
        if layers.iter().enumerate().any(|(i, kind)| (*kind == "full_attention") != ((i + 1) % every == 0)) {
            return Err(
                model.fail("layer_types", format!("readers of GGUF take one layer in {every} for a global one"))
            );
        }
    }
    Ok(())
}
