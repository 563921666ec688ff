//! Instructions: the layout of the Stanford Alpaca data set, with LLaMA-Factory's `system` and
//! `history`.

use serde_json::Value as Json;

use super::{Row, Turn, take_optional_text, take_text};
use crate::source::Object;

/// Takes an instruction out of an object. A `system` of the row goes before the configuration's.
///
/// Earlier turns are written as the last one is, without an introduction of their own, a blank line
/// after each answer; as in LLaMA-Factory their answers are learned too.
pub(super) fn read(object: &mut Object, system_prompt: Option<&str>) -> Result<Row, String> {
    let instruction = take_text(object, "instruction")?;
    let output = take_text(object, "output")?;
    let input = match object.shift_remove("input") {
        None | Some(Json::Null) => String::new(),
        Some(Json::String(text)) => text,
        Some(_) => return Err("`input` is not a string".into()),
    };
    let system = take_optional_text(object, "system")?;
    let history = match object.shift_remove("history") {
        None | Some(Json::Null) => Vec::new(),
        Some(Json::Array(pairs)) => pairs.into_iter().enumerate().map(pair).collect::<Result<_, _>>()?,
        Some(_) => return Err("`history` is not a list of pairs [instruction, output]".into()),
    };
    let first = |instruction: &str, input: &str| {
        chat_text::alpaca_prompt(instruction, input, system.as_deref().or(system_prompt))
    };
    let later = |instruction: &str, input: &str| format!("\n\n{}", chat_text::alpaca_turn(instruction, input));
    let earlier = history.into_iter().map(|(instruction, output)| (instruction, String::new(), output));
    let turns = earlier.chain([(instruction, input, output)]).enumerate();
    Ok(Row::Completion(
        turns
            .map(|(index, (instruction, input, completion))| Turn {
                prompt: if index == 0 { first(&instruction, &input) } else { later(&instruction, &input) },
                completion,
            })
            .collect(),
    ))
}

fn pair((index, pair): (usize, Json)) -> Result<(String, String), String> {
    let texts = match pair {
        Json::Array(texts) => <[Json; 2]>::try_from(texts).ok(),
        _ => None,
    };
    match texts {
        Some([Json::String(instruction), Json::String(output)]) => Ok((instruction, output)),
        _ => Err(format!("`history[{index}]` is not a pair of strings [instruction, output]")),
    }
}
