//! Fields of OpenAI's and other servers' requests that this one does not do, and that would change the answer. Fields
//! that nobody knows are ignored.

use std::fmt;

use serde::Deserializer as _;
use serde::de::{IgnoredAny, MapAccess, Visitor};
use serde_json::{Value as Json, json};

use super::body::malformed;
use super::error::ApiError;

/// A field, the value that changes nothing (beside null), and what to do instead.
type Field = (&'static str, fn() -> Json, &'static str);

/// Of both kinds of requests.
const FIELDS: [Field; 34] = [
    ("suffix", || json!(""), "models are not asked to fill a gap"),
    ("audio", || Json::Null, "answers are text"),
    ("modalities", || json!(["text"]), "answers are text"),
    ("functions", || json!([]), "use `tools`"),
    ("function_call", || json!("none"), "use `tool_choice`"),
    ("web_search_options", || Json::Null, "the server does not search"),
    ("moderation", || Json::Null, "the server does not moderate"),
    ("min_tokens", || json!(0), "set `logit_bias` of the end token instead"),
    ("use_beam_search", || json!(false), "use `n`"),
    ("length_penalty", || json!(1.0), "there is no beam search"),
    ("early_stopping", || json!(false), "there is no beam search"),
    ("include_stop_str_in_output", || json!(false), "stop strings are left out"),
    ("truncate_prompt_tokens", || Json::Null, "shorten the prompt"),
    ("prompt_logprobs", || Json::Null, "use `echo` and `logprobs` of /v1/completions"),
    ("guided_json", || Json::Null, "use `response_format`"),
    ("guided_regex", || Json::Null, "use `response_format`"),
    ("guided_choice", || Json::Null, "use `response_format`"),
    ("guided_grammar", || Json::Null, "use `response_format`"),
    ("structured_outputs", || Json::Null, "use `response_format`"),
    ("grammar", || Json::Null, "use `response_format`"),
    ("json_schema", || Json::Null, "use `response_format`"),
    ("regex", || Json::Null, "use `response_format`"),
    ("ebnf", || Json::Null, "use `response_format`"),
    ("bad_words", || json!([]), "use `logit_bias`"),
    ("allowed_token_ids", || Json::Null, "use `logit_bias`"),
    ("logits_processors", || Json::Null, "use `logit_bias`"),
    ("continue_final_message", || json!(false), "write the prompt and use /v1/completions"),
    ("chat_template", || Json::Null, "the template is the model's or the adapter's"),
    ("documents", || Json::Null, "write them into a message"),
    ("typical_p", || json!(1.0), "use `top_p` or `min_p`"),
    ("mirostat", || json!(0), "use `top_p` or `min_p`"),
    ("dry_multiplier", || json!(0.0), "use `frequency_penalty`"),
    ("xtc_probability", || json!(0.0), "use `min_p`"),
    ("return_tokens_as_token_ids", || json!(false), "POST /tokenize gives ids"),
];

/// Fields that only chats have.
pub(super) const OF_CHATS: [Field; 7] = [
    ("messages", || Json::Null, "use /v1/chat/completions"),
    ("tools", || json!([]), "use /v1/chat/completions"),
    ("tool_choice", || json!("none"), "use /v1/chat/completions"),
    ("top_logprobs", || Json::Null, "`logprobs` is a number here"),
    ("max_completion_tokens", || Json::Null, "use `max_tokens`"),
    ("chat_template_kwargs", || Json::Null, "use /v1/chat/completions"),
    ("reasoning_effort", || Json::Null, "use /v1/chat/completions"),
];

/// Fields that only completions have.
pub(super) const OF_COMPLETIONS: [Field; 3] = [
    ("prompt", || Json::Null, "use /v1/completions"),
    ("echo", || json!(false), "use /v1/completions"),
    ("best_of", || json!(1), "answers are not ranked; use `n`"),
];

/// Refuses a request with a field that is known and not supported, or is one of `others`.
///
/// # Errors
/// It names the field. The body is no JSON object.
pub(super) fn refuse(body: &[u8], others: &[Field]) -> Result<(), ApiError> {
    let mut json = serde_json::Deserializer::from_slice(body);
    let found = json.deserialize_map(Fields(others)).map_err(|error| malformed(&error))?;
    match found {
        None => Ok(()),
        Some((name, instead)) => {
            let message = format!("{name}: this server does not support it: {instead}");
            Err(ApiError::field(name, message).with_code("unsupported_parameter"))
        }
    }
}

/// Finds the first field that is not supported, and what to do instead.
struct Fields<'a>(&'a [Field]);

impl<'de> Visitor<'de> for Fields<'_> {
    type Value = Option<(&'static str, &'static str)>;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Self::Value, M::Error> {
        let mut found = None;
        while let Some(key) = map.next_key::<String>()? {
            match FIELDS.iter().chain(self.0).find(|(name, _, _)| *name == key) {
                None => drop(map.next_value::<IgnoredAny>()?),
                Some((name, neutral, instead)) => {
                    let value: Json = map.next_value()?;
                    if !value.is_null() && !same(&value, &neutral()) {
                        found.get_or_insert((*name, *instead));
                    }
                }
            }
        }
        Ok(found)
    }
}

/// Whether two values are the same; 0 and 0.0 are.
fn same(a: &Json, b: &Json) -> bool {
    a == b || matches!((a.as_f64(), b.as_f64()), (Some(a), Some(b)) if a == b)
}
