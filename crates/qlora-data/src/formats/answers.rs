//! Rows with two answers, of which one is preferred, or with one that is judged.
//!
//! `chosen` and `rejected` stand in the place of a layout's answer, as texts, as messages, or as whole conversations that begin alike;
//! `label` (or `kto_tag`, by `data.columns`) stands beside an answer and says whether it is wanted.

use serde_json::{Value as Json, json};

use crate::config::Format;
use crate::source::Object;

/// A row's object, by how its answers are judged.
#[derive(Debug, PartialEq)]
pub(super) enum Answers {
    /// There is one to learn.
    One(Object),
    /// There is one, and whether it is wanted.
    Judged(Object, bool),
    /// There are two: an object for each, the preferred one first.
    Pair(Object, Object),
}

/// Whether an object has two answers.
pub(super) fn is_pair(object: &Object) -> bool {
    object.contains_key("chosen") && object.contains_key("rejected")
}

/// Whether its answers are messages.
pub(super) fn are_messages(object: &Object) -> bool {
    let is_some = |value: &Json| value.is_array() || value.is_object() || messages_in(value).is_some();
    ["chosen", "rejected"].iter().any(|key| object.get(*key).is_some_and(is_some))
}

/// The messages that a text holds as JSON, as tables have them.
fn messages_in(value: &Json) -> Option<Vec<Json>> {
    let text = value.as_str().filter(|text| text.trim_start().starts_with("[{"))?;
    let messages: Vec<Json> = serde_json::from_str(text).ok()?;
    let is_message = |message: &Json| message.get("role").or(message.get("from")).is_some_and(Json::is_string);
    (!messages.is_empty() && messages.iter().all(is_message)).then_some(messages)
}

impl Answers {
    /// Takes the answers of an object of a layout apart.
    ///
    /// # Errors
    /// In words, what is wrong with them.
    pub fn of(format: Format, mut object: Object) -> Result<Self, String> {
        if !is_pair(&object) {
            return match label(&mut object)? {
                Some(wanted) => Ok(Self::Judged(object, wanted)),
                None => Ok(Self::One(object)),
            };
        }
        let [chosen, rejected] = ["chosen", "rejected"].map(|key| object.shift_remove(key).unwrap_or_default());
        let (key, [chosen, rejected]) = match format {
            Format::Chat => ("completion", messages(&mut object, [chosen, rejected])?),
            Format::Alpaca => ("output", [text(chosen, "chosen")?, text(rejected, "rejected")?]),
            _ => ("completion", texts(&mut object, [text(chosen, "chosen")?, text(rejected, "rejected")?])),
        };
        if object.contains_key(key) {
            return Err(format!("`{key}` stands beside `chosen` and `rejected`: give it or them"));
        }
        let with = |answer: Json| {
            let mut object = object.clone();
            object.insert(key.into(), answer);
            object
        };
        Ok(Self::Pair(with(chosen), with(rejected)))
    }
}

/// Whether an answer is wanted, where the object says it: `true`, `false`, or 1 and 0, or these as texts, as tables have them.
fn label(object: &mut Object) -> Result<Option<bool>, String> {
    let wanted = match object.get("label") {
        Some(Json::Bool(wanted)) => Some(*wanted),
        Some(Json::Number(number)) if number.as_f64() == Some(1.0) => Some(true),
        Some(Json::Number(number)) if number.as_f64() == Some(0.0) => Some(false),
        Some(Json::String(text)) => match text.trim().to_ascii_lowercase().as_str() {
            "true" | "1" => Some(true),
            "false" | "0" => Some(false),
            _ => None,
        },
        // Some other label, which is told as a key that is not read.
        _ => None,
    };
    if wanted.is_some() {
        object.shift_remove("label");
    }
    Ok(wanted)
}

fn text(value: Json, key: &str) -> Result<Json, String> {
    match value {
        Json::String(_) => Ok(value),
        _ => Err(format!("`{key}` is not a string")),
    }
}

/// Two texts behind a prompt: where the object has none, it is what they begin with alike, up to the last blank of it.
fn texts(object: &mut Object, [chosen, rejected]: [Json; 2]) -> [Json; 2] {
    let (Some(first), Some(second)) = (chosen.as_str(), rejected.as_str()) else { return [chosen, rejected] };
    if object.contains_key("prompt") {
        return [chosen, rejected];
    }
    let alike = first.bytes().zip(second.bytes()).take_while(|(a, b)| a == b).count();
    let mut prompt = first.floor_char_boundary(alike).min(second.floor_char_boundary(alike));
    // A word that both begin with is part of both answers, with the blank before it, as models write their words.
    if prompt < first.len() && prompt < second.len() {
        prompt = first[..prompt].rfind(char::is_whitespace).unwrap_or(prompt);
    }
    let answers = [first[prompt..].to_owned(), second[prompt..].to_owned()];
    object.insert("prompt".into(), first[..prompt].into());
    answers.map(Json::String)
}

/// Two lists of messages behind a prompt, which becomes a list, too: `prompt`, `messages` or `conversations`, or what both begin with.
fn messages(object: &mut Object, answers: [Json; 2]) -> Result<[Json; 2], String> {
    let [mut chosen, mut rejected] = answers.map(list);
    let given = ["messages", "conversations"].iter().find_map(|key| object.shift_remove(*key));
    let prompt = match (given, object.shift_remove("prompt")) {
        (Some(Json::Array(prompt)), None) | (None, Some(Json::Array(prompt))) => Some(prompt),
        (None, None | Some(Json::Null)) => None,
        // Conversations that begin with the prompt say it twice.
        (None, Some(Json::String(text))) => match chosen.first().is_some_and(is_answer) {
            true => Some(vec![json!({ "role": "user", "content": text })]),
            false => None,
        },
        (Some(_), Some(_)) => return Err("`prompt` stands beside a conversation: give one of them".into()),
        _ => return Err("the prompt of `chosen` and `rejected` is neither a text nor a list of messages".into()),
    };
    let prompt = match prompt {
        Some(prompt) => {
            // Both may hold the prompt once more.
            if chosen.starts_with(&prompt) && rejected.starts_with(&prompt) && !prompt.is_empty() {
                chosen.drain(..prompt.len());
                rejected.drain(..prompt.len());
            }
            prompt
        }
        None => {
            let alike = chosen.iter().zip(&rejected).take_while(|(a, b)| a == b).count();
            // Of two conversations that are one and the same the last message is the answer of both.
            let alike = if alike == chosen.len() { alike.saturating_sub(1) } else { alike };
            rejected.drain(..alike.min(rejected.len()));
            chosen.drain(..alike).collect()
        }
    };
    if prompt.is_empty() {
        return Err("`chosen` and `rejected` have no first message in common, and there is no `prompt`".into());
    }
    for (answer, key) in [(&chosen, "chosen"), (&rejected, "rejected")] {
        if !answer.iter().any(is_answer) {
            return Err(format!("`{key}` has no answer of the assistant behind the prompt"));
        }
    }
    object.insert("prompt".into(), prompt.into());
    Ok([chosen.into(), rejected.into()])
}

/// An answer as a list of messages: a text is the assistant's.
fn list(answer: Json) -> Vec<Json> {
    if let Some(messages) = messages_in(&answer) {
        return messages;
    }
    match answer {
        Json::Array(messages) => messages,
        Json::String(text) => vec![json!({ "role": "assistant", "content": text })],
        message => vec![message],
    }
}

/// Whether a message is the assistant's, in either way of writing it.
fn is_answer(message: &Json) -> bool {
    let of = |key: &str| message.get(key).and_then(Json::as_str);
    of("role") == Some("assistant")
        || of("from").is_some_and(|from| super::chat::is_assistant(from) || super::chat::is_call(from))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(format: Format, value: Json) -> Result<Vec<Json>, String> {
        let Json::Object(object) = value else { panic!("an object") };
        Ok(match Answers::of(format, object)? {
            Answers::One(object) => vec![object.into()],
            Answers::Judged(object, wanted) => vec![object.into(), wanted.into()],
            Answers::Pair(chosen, rejected) => vec![chosen.into(), rejected.into()],
        })
    }

    #[test]
    fn texts_stand_in_the_place_of_the_answer() {
        let pair = of(Format::PromptCompletion, json!({"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}));
        assert_eq!(
            pair.unwrap(),
            [json!({"prompt": "2 + 2 =", "completion": " 4"}), json!({"prompt": "2 + 2 =", "completion": " 5"})]
        );
        let pair = of(Format::Alpaca, json!({"instruction": "Add.", "chosen": "4", "rejected": "5"})).unwrap();
        assert_eq!(pair[1], json!({"instruction": "Add.", "output": "5"}));
        // What both begin with is the prompt, whole words of it.
        let pair =
            of(Format::PromptCompletion, json!({"chosen": "Sum of 2 and 2: four", "rejected": "Sum of 2 and 2: five"}));
        let [chosen, rejected] = &pair.unwrap()[..] else { panic!("a pair") };
        assert_eq!(*chosen, json!({"prompt": "Sum of 2 and 2:", "completion": " four"}));
        assert_eq!(rejected["completion"], " five");
        let pair = of(Format::PromptCompletion, json!({"chosen": "Yes", "rejected": "Yes"})).unwrap();
        assert_eq!((&pair[0]["prompt"], &pair[0]["completion"]), (&json!("Yes"), &json!("")));
    }

    #[test]
    fn conversations_are_taken_apart_where_they_differ() {
        let (user, good, bad) = (
            json!({"role": "user", "content": "2 + 2?"}),
            json!({"role": "assistant", "content": "4"}),
            json!({"role": "assistant", "content": "5"}),
        );
        let expected =
            [json!({"prompt": [user], "completion": [good]}), json!({"prompt": [user], "completion": [bad]})];
        for object in [
            json!({"prompt": [user], "chosen": [good], "rejected": [bad]}),
            json!({"chosen": [user, good], "rejected": [user, bad]}),
            json!({"messages": [user], "chosen": good, "rejected": bad}),
            json!({"messages": [user], "chosen": "4", "rejected": "5"}),
            json!({"prompt": "2 + 2?", "chosen": [user, good], "rejected": [user, bad]}),
            json!({"chosen": json!([user, good]).to_string(), "rejected": json!([user, bad]).to_string()}),
            json!({"prompt": "2 + 2?", "chosen": [good], "rejected": [bad]}),
            json!({"prompt": [user], "chosen": [user, good], "rejected": [user, bad]}),
        ] {
            assert_eq!(of(Format::Chat, object.clone()).unwrap(), expected, "{object}");
        }
        let human = json!({"from": "human", "value": "2 + 2?"});
        let (four, five) = (json!({"from": "gpt", "value": "4"}), json!({"from": "gpt", "value": "5"}));
        let pair = of(Format::Chat, json!({"conversations": [human], "chosen": four, "rejected": five})).unwrap();
        assert_eq!(pair[0], json!({"prompt": [human], "completion": [four]}));
        let same = of(Format::Chat, json!({"chosen": [user, good], "rejected": [user, good]})).unwrap();
        assert_eq!(same[0], same[1]);
    }

    #[test]
    fn what_is_no_pair_is_told() {
        let user = json!({"role": "user", "content": "2 + 2?"});
        let answer = json!({"role": "assistant", "content": "4"});
        for (format, object, words) in [
            (
                Format::PromptCompletion,
                json!({"prompt": "a", "chosen": "b", "rejected": 5}),
                "`rejected` is not a string",
            ),
            (
                Format::Alpaca,
                json!({"instruction": "a", "output": "c", "chosen": "b", "rejected": "d"}),
                "`output` stands beside",
            ),
            (Format::Chat, json!({"chosen": [answer], "rejected": [user]}), "no first message in common"),
            (Format::Chat, json!({"chosen": [user, answer], "rejected": [user]}), "`rejected` has no answer"),
            (
                Format::Chat,
                json!({"messages": [user], "prompt": "a", "chosen": [answer], "rejected": [answer]}),
                "`prompt` stands beside",
            ),
        ] {
            let error = of(format, object.clone()).unwrap_err();
            assert!(error.contains(words), "{object}: {error}");
        }
    }

    #[test]
    fn a_label_says_whether_an_answer_is_wanted() {
        for (label, wanted) in
            [(json!(true), true), (json!(false), false), (json!(1), true), (json!(0.0), false), (json!("False"), false)]
        {
            let judged =
                of(Format::PromptCompletion, json!({"prompt": "a", "completion": "b", "label": label})).unwrap();
            assert_eq!(judged, [json!({"prompt": "a", "completion": "b"}), json!(wanted)]);
        }
        let other = json!({"prompt": "a", "completion": "b", "label": "spam"});
        assert_eq!(of(Format::PromptCompletion, other.clone()).unwrap(), [other]);
    }
}
