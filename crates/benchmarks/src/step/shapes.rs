//! The models whose steps are timed, as their `config.json` describes them.

use std::path::Path;

use anyhow::{Context, Result};
use burn_qlora::qlora_models::{LinearRole, ModelConfig};
use serde_json::{Map, Value, json};

/// The models' own `config.json`, by the names that `--shape` takes.
const SHAPES: [&str; 4] = [
    include_str!("../../../../testdata/llama_shapes.json"),
    include_str!("../../../../testdata/moe_shapes.json"),
    include_str!("../../../../testdata/linear_shapes.json"),
    include_str!("../../../../testdata/latent_shapes.json"),
];
/// Contexts are what lengths are measured with, not what the models were made for.
const CONTEXT: usize = 131_072;

/// The configuration of a shape, with another number of layers or words where one is given.
pub(crate) fn config(name: &str, layers: Option<usize>, words: Option<usize>) -> Result<ModelConfig> {
    Ok(ModelConfig::from_json(&json(name, layers, words)?, Path::new(name))?)
}

/// [`config`] as it stands in a `config.json`.
pub(crate) fn json(name: &str, layers: Option<usize>, words: Option<usize>) -> Result<Value> {
    let mut shapes = Map::<String, Value>::new();
    for file in SHAPES {
        shapes.extend(serde_json::from_str::<Map<String, Value>>(file).context("a file of shapes in testdata")?);
    }
    let names = shapes.keys().cloned().collect::<Vec<_>>().join(", ");
    let mut config = shapes.remove(name).with_context(|| format!("no shape `{name}`; there are {names}"))?;
    config["max_position_embeddings"] = json!(CONTEXT);
    // The output head is one more product, as in the large models.
    config["tie_word_embeddings"] = json!(false);
    if let Some(layers) = layers {
        config["num_hidden_layers"] = json!(layers);
    }
    if let Some(words) = words {
        config["vocab_size"] = json!(words);
    }
    Ok(config)
}

/// Operations of a step over rows of `len` tokens at least: two per weight and token for the forward product, two for
/// the gradient of its input, two more where blocks run again; causal attention with two products forward and five
/// backward. Linear attention between its projections, adapters, norms and the optimizer are left out, and so is what an
/// implementation computes twice of its own accord.
pub(crate) fn flops(config: &ModelConfig, rows: usize, len: usize, recomputed: bool) -> f64 {
    let weights = |wanted: fn(LinearRole) -> bool| {
        let specs = config.linear_specs().into_iter().filter(|spec| wanted(spec.role));
        specs.map(|spec| spec.shape.iter().product::<usize>() as f64).sum::<f64>()
    };
    let head = match config.tie_word_embeddings {
        true => (config.vocab_size * config.hidden_size) as f64,
        false => weights(|role| role == LinearRole::Head),
    };
    // Of the experts, a token meets some.
    let experts: f64 = config.experts.map_or(0.0, |experts| {
        let specs = config.linear_specs().into_iter().filter(|spec| spec.path.contains(".experts."));
        let all = specs.map(|spec| spec.shape.iter().product::<usize>() as f64).sum::<f64>();
        all * (1.0 - experts.per_token as f64 / experts.count as f64)
    });
    let blocks = weights(|role| role != LinearRole::Head) - experts;
    // One of two products: half of len x len scores, a multiplication and an addition for each feature of a head.
    // Those of latent attention have other features for scores than for values.
    let features =
        config.latent.map_or(config.head_dim as f64, |latent| (latent.query_dim() + latent.value_dim) as f64 / 2.0);
    let heads = features * (config.num_attention_heads * config.attention_blocks()) as f64;
    let scores = rows as f64 * heads * (len as f64).powi(2);
    let again = f64::from(u8::from(recomputed));
    let tokens = (rows * len) as f64;
    tokens * ((4.0 + 2.0 * again) * blocks + 4.0 * head) + (7.0 + 2.0 * again) * scores
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_have_their_parameters() {
        for (name, billions) in [
            ("llama-2-7b", 6.738),
            ("llama-2-13b", 13.016),
            ("llama-3.1-8b", 8.030),
            ("llama-2-70b", 68.977),
            ("qwen3.5-9b", 8.954),
            ("qwen3.5-35b-a3b", 34.661),
            ("qwen3-next-80b-a3b", 79.674),
        ] {
            let config = config(name, None, None).unwrap();
            let linear: usize = config.linear_specs().iter().map(|spec| spec.shape[0] * spec.shape[1]).sum();
            let norms: usize = config.norms().iter().map(|(_, width)| width).sum();
            let others = config.vocab_size * config.hidden_size + config.further_values();
            let count = (linear + norms + others) as f64 / 1e9;
            // The figures above have three digits.
            assert!((count - billions).abs() < 5e-4, "{name}: {count}");
        }
        assert_eq!(config("tiny", Some(5), None).unwrap().num_hidden_layers, 5);
        assert_eq!(config("tiny-moe", None, Some(99)).unwrap().vocab_size, 99);
        let message = config("llama-9", None, None).unwrap_err().to_string();
        assert!(message.contains("llama-2-70b"), "{message}");
    }

    #[test]
    fn a_token_meets_some_of_the_experts() {
        let config = config("qwen3-30b-a3b", None, None).unwrap();
        let linear: usize = config.linear_specs().iter().map(|spec| spec.shape[0] * spec.shape[1]).sum();
        let all = (linear + config.vocab_size * config.hidden_size) as f64;
        assert!((all / 1e9 - 30.53).abs() < 0.01, "{all}");
        // Without attention's scores, four operations per weight that a token meets: 3.34 billion with embeddings, which
        // are none.
        let met = flops(&config, 1, 1, false) / 4.0;
        assert!((met / 1e9 - 3.04).abs() < 0.01, "{met}");
        let config = self::config("gpt-oss-20b", None, None).unwrap();
        let linear: usize = config.linear_specs().iter().map(|spec| spec.shape[0] * spec.shape[1]).sum();
        // 20.91 billion with biases, norms and sinks.
        let all = (linear + config.vocab_size * config.hidden_size) as f64;
        assert!((all / 1e9 - 20.91).abs() < 0.02, "{all}");
    }

    /// In billions, all and those that a token meets beside embeddings: what their publishers say, without blocks that predict further
    /// tokens.
    #[test]
    fn shapes_with_shared_experts_have_their_parameters() {
        for (name, billions, met) in
            [("glm-4.5-air", 106.851, 12.802), ("glm-4.7-flash", 29.943, 3.579), ("deepseek-v3", 671.025, 36.625)]
        {
            let config = config(name, None, None).unwrap();
            let linear: usize = config.linear_specs().iter().map(|spec| spec.shape[0] * spec.shape[1]).sum();
            let all = (linear + config.vocab_size * config.hidden_size) as f64 / 1e9;
            assert!((all - billions).abs() < 1e-3, "{name}: {all}");
            let found = flops(&config, 1, 1, false) / 4e9;
            assert!((found - met).abs() < 2e-3, "{name}: {found}");
        }
    }

    #[test]
    fn a_7b_step_is_bounded_by_the_known_rates() {
        let config = config("llama-2-7b", None, None).unwrap();
        let rate = |recomputed| 680e12 / (flops(&config, 4, 2048, recomputed) / 8192.0);
        // 680 TFLOP/s over 6 and 4 operations per weight and token are 17,200 and 25,700 tokens/s; attention over 2,048
        // tokens adds 6 % and 7 %.
        assert!((16_000.0..17_200.0).contains(&rate(true)), "{}", rate(true));
        assert!((23_500.0..25_700.0).contains(&rate(false)), "{}", rate(false));
    }
}
