//! What is asked of the engine, and what it answers with: token ids in, token ids out.

use std::fmt;
use std::sync::Arc;

use crate::served::ServedAdapter;

/// Token ids to continue, and how.
#[derive(Debug)]
pub struct Request {
    /// The tokens to continue.
    pub prompt: Arc<[u32]>,
    /// The adapter that answers, as [`Handle::adapter`](crate::Handle::adapter) gives it; `None` is the base model.
    pub adapter: Option<ServedAdapter>,
    /// New tokens at most.
    pub max_tokens: usize,
    /// How each token is chosen.
    pub sampling: Sampling,
    /// Ids that end the answer; the one that ended it is among the answer's tokens.
    pub stop_ids: Arc<[u32]>,
    /// Log probabilities of each new token and of this many of the likeliest; `None` for none.
    pub logprobs: Option<usize>,
    /// Log probabilities of the prompt's tokens too, as many likeliest as [`logprobs`](Self::logprobs) asks for. The
    /// prompt is computed in full then: no prefix of it is taken from other requests.
    pub prompt_logprobs: bool,
    /// What the answer must look like.
    pub constraint: Option<Box<dyn Constraint>>,
}

impl Request {
    /// A request for the likeliest continuation.
    pub fn new(prompt: impl Into<Arc<[u32]>>, max_tokens: usize) -> Self {
        Self {
            prompt: prompt.into(),
            adapter: None,
            max_tokens,
            sampling: Sampling::default(),
            stop_ids: Arc::default(),
            logprobs: None,
            prompt_logprobs: false,
            constraint: None,
        }
    }
}

/// How a token is chosen. Penalties come first, then the temperature, then `top_k`, `top_p` and `min_p`, each on what
/// the one before left.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// 0 takes the likeliest token; above, logits are divided by it.
    pub temperature: f64,
    /// Only this many of the likeliest tokens; 0 for all.
    pub top_k: usize,
    /// Only the likeliest tokens whose probabilities reach this sum (Holtzman et al., 2020, arXiv 1904.09751).
    pub top_p: f64,
    /// Only tokens at least this likely, as a part of the likeliest one's probability (Nguyen et al., 2024,
    /// arXiv 2407.01082).
    pub min_p: f64,
    /// Divides positive logits and multiplies negative ones of every token in prompt or answer (Keskar et al., 2019,
    /// arXiv 1909.05858); 1 for none.
    pub repetition_penalty: f64,
    /// Taken off the logits of every token in the answer.
    pub presence_penalty: f64,
    /// Taken off the logits of the answer's tokens, once for each time.
    pub frequency_penalty: f64,
    /// Added to the logits of tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// The same seed gives the same answer, whatever else is in the batch.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
        }
    }
}

/// What an answer must look like, token by token.
pub trait Constraint: Send + fmt::Debug {
    /// The tokens that may come next, one bit for each id, the lowest bit of the first word first; `None` for all.
    ///
    /// # Errors
    /// What can't be decided ends the request with this text.
    fn allowed(&mut self) -> Result<Option<Vec<u32>>, String>;

    /// Takes the token that was chosen.
    ///
    /// # Errors
    /// As [`allowed`](Self::allowed).
    fn accept(&mut self, token: u32) -> Result<(), String>;

    /// Whether nothing may follow.
    fn is_complete(&self) -> bool;
}

/// What comes of a request, in order.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The prompt is computed from now on.
    Started {
        /// Its tokens that were taken from other requests' prefixes.
        cached_tokens: usize,
    },
    /// Log probabilities of the prompt's tokens: one for each, `None` for the first.
    Prompt(Vec<Option<TokenLogprobs>>),
    /// A new token.
    Token(Token),
    /// The end of the answer; nothing follows.
    Finished(Finished),
    /// The request failed; nothing follows.
    Failed(String),
}

/// A new token.
#[derive(Clone, Debug, PartialEq)]
pub struct Token {
    /// Its id.
    pub id: u32,
    /// Where [`Request::logprobs`] asks for them.
    pub logprobs: Option<TokenLogprobs>,
}

/// Natural logarithms of the probabilities that the model gives, before penalties, biases and temperature.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprobs {
    /// The token's own.
    pub logprob: f32,
    /// The likeliest tokens and theirs, the likeliest first.
    pub top: Vec<(u32, f32)>,
}

/// How an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Finished {
    /// Why.
    pub reason: FinishReason,
    /// What it took.
    pub usage: Usage,
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// At a stop id, or because the constraint was complete.
    Stop,
    /// At [`Request::max_tokens`], or at the model's last position.
    Length,
}

impl FinishReason {
    /// OpenAI's name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
        }
    }
}

/// Tokens of a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Of the prompt.
    pub prompt_tokens: usize,
    /// Of these, taken from other requests' prefixes.
    pub cached_tokens: usize,
    /// New ones.
    pub completion_tokens: usize,
}
