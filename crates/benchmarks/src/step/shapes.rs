//! The models whose steps are timed, as their `config.json` describes them.

use std::path::Path;

use anyhow::{Context, Result};
use burn_qlora::qlora_models::{LinearRole, ModelConfig};
use serde_json::{Value, json};

/// Names that `--shape` takes.
const NAMES: [&str; 4] = ["llama-2-7b", "llama-3.1-8b", "llama-2-70b", "tiny"];

/// The configuration of a shape, with another number of layers where one is given.
pub(crate) fn config(name: &str, layers: Option<usize>) -> Result<ModelConfig> {
    let mut value = json(name).with_context(|| format!("no shape `{name}`; there are {}", NAMES.join(", ")))?;
    if let Some(layers) = layers {
        value["num_hidden_layers"] = json!(layers);
    }
    Ok(ModelConfig::from_json(&value, Path::new(name))?)
}

fn json(name: &str) -> Option<Value> {
    let llama = |[vocab, hidden, intermediate, layers, heads, kv_heads, context]: [usize; 7]| {
        json!({
            "model_type": "llama",
            "vocab_size": vocab,
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "max_position_embeddings": context,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": false,
        })
    };
    // Contexts are what lengths are measured with, not what the models were made for.
    Some(match name {
        "llama-2-7b" => llama([32_000, 4096, 11_008, 32, 32, 32, 131_072]),
        "llama-3.1-8b" => {
            let mut config = llama([128_256, 4096, 14_336, 32, 32, 8, 131_072]);
            config["rope_theta"] = json!(500_000.0);
            config["rope_scaling"] = json!({
                "factor": 8.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            });
            config
        }
        "llama-2-70b" => llama([32_000, 8192, 28_672, 80, 64, 8, 131_072]),
        "tiny" => llama([4096, 128, 344, 2, 4, 2, 4096]),
        _ => return None,
    })
}

/// Operations of a step over rows of `len` tokens at least: two per weight and token for the forward product, two for
/// the gradient of its input, two more where blocks run again; causal attention with two products forward and five
/// backward. Adapters, norms and the optimizer are left out, and so is what an implementation computes twice of its own
/// accord.
pub(crate) fn flops(config: &ModelConfig, rows: usize, len: usize, recomputed: bool) -> f64 {
    let weights = |wanted: fn(LinearRole) -> bool| {
        let specs = config.linear_specs().into_iter().filter(|spec| wanted(spec.role));
        specs.map(|spec| spec.shape.iter().product::<usize>() as f64).sum::<f64>()
    };
    let head = match config.tie_word_embeddings {
        true => (config.vocab_size * config.hidden_size) as f64,
        false => weights(|role| role == LinearRole::Head),
    };
    let blocks = weights(|role| role != LinearRole::Head);
    // One of two products: half of len x len scores, a multiplication and an addition for each feature of a head.
    let heads = config.num_attention_heads * config.head_dim * config.num_hidden_layers;
    let scores = (rows * heads) as f64 * (len as f64).powi(2);
    let again = f64::from(u8::from(recomputed));
    let tokens = (rows * len) as f64;
    tokens * ((4.0 + 2.0 * again) * blocks + 4.0 * head) + (7.0 + 2.0 * again) * scores
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_have_their_parameters() {
        for (name, billions) in [("llama-2-7b", 6.738), ("llama-3.1-8b", 8.030), ("llama-2-70b", 68.977)] {
            let config = config(name, None).unwrap();
            let linear: usize = config.linear_specs().iter().map(|spec| spec.shape[0] * spec.shape[1]).sum();
            let norms: usize = config.norms().iter().map(|(_, width)| width).sum();
            let count = (linear + norms + config.vocab_size * config.hidden_size) as f64 / 1e9;
            // The figures above have three digits.
            assert!((count - billions).abs() < 5e-4, "{name}: {count}");
        }
        assert_eq!(config("tiny", Some(5)).unwrap().num_hidden_layers, 5);
        let message = config("llama-9", None).unwrap_err().to_string();
        assert!(message.contains("llama-2-70b"), "{message}");
    }

    #[test]
    fn a_7b_step_is_bounded_by_the_known_rates() {
        let config = config("llama-2-7b", None).unwrap();
        let rate = |recomputed| 680e12 / (flops(&config, 4, 2048, recomputed) / 8192.0);
        // 680 TFLOP/s over 6 and 4 operations per weight and token are 17,200 and 25,700 tokens/s; attention over 2,048
        // tokens adds 6 % and 7 %.
        assert!((16_000.0..17_200.0).contains(&rate(true)), "{}", rate(true));
        assert!((23_500.0..25_700.0).contains(&rate(false)), "{}", rate(false));
    }
}
