//! Token-by-token generation.

use crate::ModelError;
use crate::decoder::Decoder;
use crate::kv_cache::KvCache;
use host_copies::DeviceError;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// How the next token is chosen.
#[derive(Clone, Debug)]
pub struct GenerateOptions {
    /// Tokens to generate at most.
    pub max_new_tokens: usize,
    /// 0 takes the likeliest token; above, logits are divided by it before sampling.
    pub temperature: f64,
    /// Sample among the likeliest tokens whose probabilities reach this sum (Holtzman et al., 2020,
    /// arXiv 1904.09751).
    pub top_p: f64,
    /// Seed of sampling.
    pub seed: u64,
    /// Ids that end the text.
    pub stop_ids: Vec<u32>,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        Self { max_new_tokens: 128, temperature: 0.0, top_p: 1.0, seed: 0, stop_ids: Vec::new() }
    }
}

/// What was generated.
#[derive(Clone, Debug)]
pub struct Generation {
    /// The new tokens, a stop id included.
    pub ids: Vec<u32>,
    /// Whether a stop id ended the text.
    pub stopped: bool,
}

/// Continues `prompt`, calling `on_token` with each new id.
///
/// # Errors
/// The prompt is empty, or holds a token that the model has no embedding for; the logits are NaN; the device fails.
pub fn generate(
    model: &Decoder,
    prompt: &[u32],
    options: &GenerateOptions,
    mut on_token: impl FnMut(u32),
) -> Result<Generation, ModelError> {
    if prompt.is_empty() {
        return Err(ModelError::EmptyPrompt);
    }
    let [vocab_size, _] = model.embed_tokens.dims();
    if let Some(&token) = prompt.iter().find(|&&token| token as usize >= vocab_size) {
        return Err(ModelError::BeyondVocabulary { token, vocab_size });
    }
    let mut rng = ChaCha8Rng::seed_from_u64(options.seed);
    let mut cache = KvCache::new();
    let mut ids = Vec::new();
    let mut next_input = prompt.to_vec();
    while ids.len() < options.max_new_tokens {
        let Some(logits) = model.forward_cached(&next_input, &mut cache) else { break };
        let logits = logits.try_into_vec_as::<f32>().map_err(DeviceError::from)?;
        if logits.iter().any(|x| x.is_nan()) {
            return Err(ModelError::NotANumber);
        }
        let id = choose(&logits, options, &mut rng);
        ids.push(id);
        on_token(id);
        if options.stop_ids.contains(&id) {
            return Ok(Generation { ids, stopped: true });
        }
        next_input = vec![id];
    }
    Ok(Generation { ids, stopped: false })
}

/// The next token; the first of equally likely ones when the temperature is 0.
fn choose(logits: &[f32], options: &GenerateOptions, rng: &mut impl Rng) -> u32 {
    let best = (0..logits.len()).fold(0, |best, i| if logits[i] > logits[best] { i } else { best });
    if options.temperature <= 0.0 {
        return best as u32;
    }
    let mut tokens: Vec<(usize, f64)> = logits
        .iter()
        .enumerate()
        .map(|(i, &logit)| (i, (f64::from(logit - logits[best]) / options.temperature).exp()))
        .collect();
    tokens.sort_by(|a, b| b.1.total_cmp(&a.1));
    let total: f64 = tokens.iter().map(|(_, weight)| weight).sum();
    let mut kept = 0.0;
    let nucleus = tokens.iter().position(|(_, weight)| {
        kept += weight;
        kept >= options.top_p * total
    });
    let nucleus = &tokens[..nucleus.map_or(tokens.len(), |last| last + 1)];
    let mass: f64 = nucleus.iter().map(|(_, weight)| weight).sum();
    let mut point = mass * (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
    for &(token, weight) in nucleus {
        point -= weight;
        if point < 0.0 {
            return token as u32;
        }
    }
    best as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(temperature: f64, top_p: f64) -> GenerateOptions {
        GenerateOptions { temperature, top_p, ..Default::default() }
    }

    #[test]
    fn greedy_takes_the_first_of_equals() {
        assert_eq!(choose(&[0.0, 2.0, 2.0, 1.0], &options(0.0, 1.0), &mut ChaCha8Rng::seed_from_u64(0)), 1);
    }

    #[test]
    fn the_nucleus_bounds_the_choice_and_frequencies_follow_the_softmax() {
        let mut rng = ChaCha8Rng::seed_from_u64(7);
        let logits = [0.0f32, 1.0, 2.0, -1.0];
        let draws = 20_000;
        let count = |options: &GenerateOptions, rng: &mut ChaCha8Rng| {
            (0..draws).fold([0u32; 4], |mut counts, _| {
                counts[choose(&logits, options, rng) as usize] += 1;
                counts
            })
        };
        // Probabilities are 0.087, 0.237, 0.644, 0.032: two tokens reach 0.8.
        let narrow = count(&options(1.0, 0.8), &mut rng);
        assert_eq!((narrow[0], narrow[3]), (0, 0));
        let all = count(&options(1.0, 1.0), &mut rng);
        let total: f64 = logits.iter().map(|l| f64::from(*l).exp()).sum();
        for (count, logit) in all.iter().zip(logits) {
            let expected = f64::from(logit).exp() / total;
            // Four standard deviations of a binomial with 20,000 draws are below 0.015.
            assert!((f64::from(*count) / f64::from(draws) - expected).abs() < 0.015);
        }
    }
}
