//! How tokens are chosen: a request's fields, checked, over the server's defaults.

use super::HttpConfig;
use super::error::ApiError;
use super::types::SamplingFields;
use crate::error::ServeError;
use crate::handle::Limits;
use crate::request::Sampling;

/// Stop strings at most, and bytes of each.
const MOST_STOPS: usize = 16;
const LONGEST_STOP: usize = 1024;

/// Tokens of `stop_token_ids` and of `logit_bias` at most: each answer holds them, and looks through them at each token.
const MOST_STOP_IDS: usize = 1024;
const MOST_BIASES: usize = 4096;

/// The least `repetition_penalty`. Logits are divided by it: far below, they would no longer be finite.
const LEAST_PENALTY: f64 = 0.01;

/// What a request says about tokens, checked.
#[derive(Clone, Debug)]
pub(super) struct Choice {
    pub sampling: Sampling,
    /// Answers to each prompt.
    pub n: usize,
    pub stops: Vec<String>,
    pub stop_ids: Vec<u32>,
    pub ignore_eos: bool,
}

/// Checks a request's fields.
///
/// # Errors
/// A value that can't be; the error names the field.
pub(super) fn read(fields: SamplingFields, config: &HttpConfig, vocab_size: usize) -> Result<Choice, ApiError> {
    let default = &config.sampling;
    let number = |name: &str, value: Option<f64>, default: f64, low: f64, high: f64| match value {
        None => Ok(default),
        Some(value) if (low..=high).contains(&value) => Ok(value),
        Some(value) => Err(ApiError::field(name, format!("{name}: {value} is not between {low} and {high}"))),
    };
    let sampling = Sampling {
        temperature: number("temperature", fields.temperature, default.temperature, 0.0, 2.0)?,
        top_p: above_zero("top_p", number("top_p", fields.top_p, default.top_p, 0.0, 1.0)?)?,
        top_k: match fields.top_k {
            None => default.top_k,
            // As in vLLM, -1 is for all too.
            Some(-1) => 0,
            Some(k) => usize::try_from(k).map_err(|_| ApiError::field("top_k", format!("top_k: {k} is negative")))?,
        },
        min_p: number("min_p", fields.min_p, default.min_p, 0.0, 1.0)?,
        repetition_penalty: number(
            "repetition_penalty",
            fields.repetition_penalty,
            default.repetition_penalty,
            LEAST_PENALTY,
            10.0,
        )?,
        presence_penalty: number("presence_penalty", fields.presence_penalty, default.presence_penalty, -2.0, 2.0)?,
        frequency_penalty: number("frequency_penalty", fields.frequency_penalty, default.frequency_penalty, -2.0, 2.0)?,
        logit_bias: match fields.logit_bias {
            None => default.logit_bias.clone(),
            Some(biases) if biases.len() > MOST_BIASES => {
                let message = format!("logit_bias: {} tokens, more than {MOST_BIASES}", biases.len());
                return Err(ApiError::field("logit_bias", message));
            }
            Some(biases) => {
                biases.iter().map(|(id, bias)| self::bias(id, *bias, vocab_size)).collect::<Result<_, _>>()?
            }
        },
        seed: fields.seed.map_or_else(rand::random, |seed| seed as u64),
    };
    let n = fields.n.unwrap_or(1);
    if !(1..=config.max_choices).contains(&n) {
        return Err(ApiError::field("n", format!("n: {n} is not between 1 and {}", config.max_choices)));
    }
    let stops = fields.stop.unwrap_or_default().0;
    if stops.len() > MOST_STOPS {
        return Err(ApiError::field("stop", format!("stop: {} stop strings, more than {MOST_STOPS}", stops.len())));
    }
    if let Some(stop) = stops.iter().find(|stop| stop.len() > LONGEST_STOP || stop.is_empty()) {
        let message = format!("stop: a stop string has {} bytes; it may have 1 to {LONGEST_STOP}", stop.len());
        return Err(ApiError::field("stop", message));
    }
    let stop_ids = fields.stop_token_ids.unwrap_or_default();
    if stop_ids.len() > MOST_STOP_IDS {
        let message = format!("stop_token_ids: {} tokens, more than {MOST_STOP_IDS}", stop_ids.len());
        return Err(ApiError::field("stop_token_ids", message));
    }
    if let Some(id) = stop_ids.iter().find(|&&id| id as usize >= vocab_size) {
        let message = format!("stop_token_ids: {id} is no token: the vocabulary ends at {vocab_size}");
        return Err(ApiError::field("stop_token_ids", message));
    }
    Ok(Choice { sampling, n, stops, stop_ids, ignore_eos: fields.ignore_eos.unwrap_or(false) })
}

/// The tokens that are left for an answer to a prompt: known before anything is made for each of many answers.
///
/// # Errors
/// There are none.
pub(super) fn room(prompt: &[u32], limits: Limits) -> Result<usize, ApiError> {
    let (tokens, max_tokens) = (prompt.len(), limits.max_tokens);
    match max_tokens.saturating_sub(tokens) {
        0 => Err(ServeError::TooLong { tokens, max_tokens }.into()),
        room => Ok(room),
    }
}

fn above_zero(name: &str, value: f64) -> Result<f64, ApiError> {
    if value > 0.0 { Ok(value) } else { Err(ApiError::field(name, format!("{name}: {value} is not above 0"))) }
}

fn bias(id: &str, bias: f64, vocab_size: usize) -> Result<(u32, f32), ApiError> {
    let fail = |message: String| Err(ApiError::field("logit_bias", format!("logit_bias: {message}")));
    match id.parse::<u32>() {
        Ok(token) if (token as usize) < vocab_size => match bias {
            -100.0..=100.0 => Ok((token, bias as f32)),
            _ => fail(format!("{bias} is not between -100 and 100")),
        },
        Ok(token) => fail(format!("{token} is no token: the vocabulary ends at {vocab_size}")),
        Err(_) => fail(format!("{id:?} is no token id")),
    }
}
