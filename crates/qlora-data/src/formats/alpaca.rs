//! Instructions: the layout of the Stanford Alpaca data set, with LLaMA-Factory's `system` and
//! `history`.

use serde_json::Value as Json;

use super::{Row, Turn, take_optional_text, take_text};
use crate::source::Object;

/// What introduces an instruction in the Alpaca data set, without and with an input
/// (tatsu-lab/stanford_alpaca, `train.py`).
const INTRODUCTION: &str = "Below is an instruction that describes a task. \
    Write a response that appropriately completes the request.";
const INTRODUCTION_WITH_INPUT: &str = "Below is an instruction that describes a task, paired with an \
    input that provides further context. Write a response that appropriately completes the request.";

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
    let default = if input.is_empty() { INTRODUCTION } else { INTRODUCTION_WITH_INPUT };
    let introduction = system.as_deref().or(system_prompt).unwrap_or(default);
    let input = if input.is_empty() { String::new() } else { format!("### Input:\n{input}\n\n") };
    let earlier = history.into_iter().map(|(instruction, output)| (instruction, String::new(), output));
    let turns = earlier.chain([(instruction, input, output)]).enumerate();
    Ok(Row::Completion(
        turns
            .map(|(index, (instruction, input, completion))| {
                let before = if index == 0 { introduction } else { "" };
                Turn {
                    prompt: format!("{before}\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"),
                    completion,
                }
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
