//! `qlora generate`: a model, with or without adapters, answers a prompt or a file of them.

use std::io::{IsTerminal, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};
use burn_qlora::chat_text::{PromptLayout, Prompting};
use burn_qlora::qlora_serve::text::{Conversation, write};
use burn_qlora::qlora_serve::{CacheSize, EngineConfig, FinishReason, Usage};
use burn_qlora::{AdapterSet, AdapterSource, Combination, Decoder, Message, Tokenizer};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::adapters;
use crate::answers::{Asker, Running};
use crate::args::GenerateArgs;
use crate::exit::{Code, InputError, UsageError};
use crate::model::{Placement, base_dir, base_name, default_cache};
use crate::output::{print, say, show};
use crate::prompts;
use crate::sources::{NamedBase, warn_of_missing};

/// Runs the command. Answers go to stdout, a single one as it comes; everything else to stderr.
pub fn run(args: &GenerateArgs) -> Result<Code> {
    let sampling = args.choice.sampling()?;
    let place = Placement::new(&args.base)?;
    let adapters = Adapters::load(args)?;
    let named = adapters.base_model();
    let dir = base_dir(&args.base, base_name(&args.base, &named)?, &named)?;
    let tokenizer = Arc::new(Tokenizer::from_dir(&dir)?);
    let prompting = prompting(args, &adapters, &dir)?;
    let writer = Writer { args, tokenizer: &tokenizer, prompting: &prompting };
    let asker = Asker {
        tokenizer: &tokenizer,
        sampling,
        stop_ids: prompting.stop_ids(&tokenizer),
        stops: args.choice.stop.clone(),
        max_tokens: args.choice.max_new_tokens,
    };
    if let Some(file) = &args.prompts {
        let prompts = writer.file(file)?;
        let mut model = place.load(&dir)?;
        adapters.put_on(&mut model)?;
        let config = EngineConfig {
            cache: default_cache(model.device()),
            max_batch: args.max_batch as usize,
            max_waiting: prompts.len(),
            ..EngineConfig::default()
        };
        answer_all(&asker, model, &config, prompts)?;
        return Ok(Code::Done);
    }
    let ids = writer.prompt()?;
    let mut model = place.load(&dir)?;
    if !args.each {
        adapters.put_on(&mut model)?;
        answer(&asker, model, &ids)?;
        return Ok(Code::Done);
    }
    for AdapterSource { name, weight } in adapters.sources() {
        let put_on = adapters.set.activate_weighted(&mut model, &[AdapterSource { name, weight }]);
        put_on.with_context(|| adapters.unfit(name))?;
        print(&format!("[{name}]\n"))?;
        answer(&asker, model.clone(), &ids)?;
    }
    Ok(Code::Done)
}

/// Prints the model's answer as it comes.
fn answer(asker: &Asker<'_>, model: Decoder, ids: &[u32]) -> Result<()> {
    let start = Instant::now();
    let cache = CacheSize::Tokens(ids.len() + asker.max_tokens);
    let engine = Running::start(model, &EngineConfig { cache, ..EngineConfig::default() })?;
    let ended = asker.ask(&engine.handle, ids, None)?.follow(show)?;
    engine.end()?;
    print("\n")?;
    if std::io::stderr().is_terminal() {
        let seconds = start.elapsed().as_secs_f64();
        let tokens = ended.usage.completion_tokens;
        let end = match ended.reason {
            FinishReason::Stop => "",
            FinishReason::Length if tokens == asker.max_tokens => "; stopped by --max-new-tokens",
            FinishReason::Length => "; the model has no further positions",
        };
        say!("{tokens} tokens in {seconds:.1} s, {:.1} tok/s{end}", tokens as f64 / seconds);
    }
    Ok(())
}

/// Answers a file's prompts, many at once, and writes them out in the file's order.
fn answer_all(asker: &Asker<'_>, model: Decoder, config: &EngineConfig, prompts: Vec<Prompt>) -> Result<()> {
    let start = Instant::now();
    let engine = Running::start(model, config)?;
    let asked = prompts.into_iter().map(|Prompt { line, row, ids }| {
        let answering = asker.ask(&engine.handle, &ids, None).with_context(|| format!("line {line}"))?;
        Ok((line, row, answering))
    });
    let (mut answers, mut tokens) = (0, 0);
    for asked in asked.collect::<Result<Vec<_>>>()? {
        let (line, mut row, answering) = asked;
        let mut text = String::new();
        let ended = answering.follow(|piece| {
            text += piece;
            Ok(())
        });
        let ended = ended.with_context(|| format!("line {line}"))?;
        row.insert("answer".into(), text.into());
        row.insert("finish_reason".into(), ended.reason.as_str().into());
        let Usage { prompt_tokens, completion_tokens, .. } = ended.usage;
        let usage = json!({ "prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens });
        row.insert("usage".into(), usage);
        print(&format!("{}\n", Value::Object(row)))?;
        answers += 1;
        tokens += completion_tokens;
    }
    engine.end()?;
    let seconds = start.elapsed().as_secs_f64();
    say!("{answers} answers, {tokens} tokens in {seconds:.1} s, {:.1} tok/s", tokens as f64 / seconds);
    Ok(())
}

/// A prompt of a file.
struct Prompt {
    /// Its line, from 1 on.
    line: usize,
    /// The line's object.
    row: Map<String, Value>,
    ids: Vec<u32>,
}

/// Writes prompts as tokens.
struct Writer<'a> {
    args: &'a GenerateArgs,
    tokenizer: &'a Arc<Tokenizer>,
    prompting: &'a Prompting,
}

impl Writer<'_> {
    /// The prompt of the command line.
    fn prompt(&self) -> Result<Vec<u32>> {
        let mut prompt = self.args.prompt.clone().unwrap_or_default();
        if prompt == "-" {
            prompt.clear();
            std::io::stdin().read_to_string(&mut prompt).context("can't read the prompt from the standard input")?;
        }
        self.text(&prompt)
    }

    fn text(&self, prompt: &str) -> Result<Vec<u32>> {
        let ids = self.prompting.prompt(self.tokenizer, self.args.prompting.writing.system.as_deref(), prompt);
        match self.prompting.settings.layout {
            PromptLayout::Chat => ids
                .context("can't write the prompt as a conversation; --no-chat-template gives it to the model as it is"),
            _ => Ok(ids?),
        }
    }

    /// The prompts of a file.
    fn file(&self, path: &Path) -> Result<Vec<Prompt>> {
        let text = std::fs::read_to_string(path).map_err(|e| unusable(path, None, e.to_string()))?;
        let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
        let prompts = lines.map(|(index, text)| {
            let line = index + 1;
            let wrong = |problem: String| unusable(path, Some(line), problem);
            let row: Map<String, Value> = serde_json::from_str(text).map_err(|e| wrong(of_line(&e)))?;
            let ids = match (row.get("prompt"), row.get("messages")) {
                (Some(Value::String(prompt)), None) => self.text(prompt)?,
                (None, Some(messages)) => {
                    let messages = Vec::<Message>::deserialize(messages).map_err(|e| wrong(e.to_string()))?;
                    self.conversation(&messages, row.get("tools")).map_err(|e| wrong(format!("{e:#}")))?
                }
                _ => return Err(wrong("needs a `prompt`, a text, or `messages`, a conversation".into()).into()),
            };
            if ids.is_empty() {
                return Err(wrong("the prompt is empty".into()).into());
            }
            Ok(Prompt { line, row, ids })
        });
        let prompts = prompts.collect::<Result<Vec<_>>>()?;
        match prompts.is_empty() {
            true => Err(unusable(path, None, "there is no prompt in it".into()).into()),
            false => Ok(prompts),
        }
    }

    fn conversation(&self, messages: &[Message], tools: Option<&Value>) -> Result<Vec<u32>> {
        let system =
            self.args.prompting.writing.system.as_deref().filter(|_| messages.iter().all(|m| m.role != "system"));
        let messages: Vec<Message> = system.into_iter().map(Message::system).chain(messages.iter().cloned()).collect();
        let conversation =
            Conversation { messages: &messages, tools, template_kwargs: None, add_generation_prompt: true };
        Ok(write(self.prompting, self.tokenizer, &conversation)?.tokens)
    }
}

/// What is wrong with a line of JSON. The place in it is a column; the line's number is known to others.
fn of_line(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let problem = text.rsplit_once(" at line ").map_or(text.as_str(), |(problem, _)| problem);
    format!("{problem} at column {}", error.column())
}

/// A file of prompts that can't be used.
fn unusable(path: &Path, line: Option<usize>, problem: String) -> InputError {
    let line = line.map(|line| format!(", line {line}")).unwrap_or_default();
    InputError(format!("{}{line}: {problem}", path.display()))
}

/// The adapters of the command line.
struct Adapters {
    set: AdapterSet,
    weights: Vec<(String, f64)>,
    /// Names and folders.
    dirs: Vec<(String, PathBuf)>,
    combination: Combination,
}

impl Adapters {
    fn load(args: &GenerateArgs) -> Result<Self> {
        let combination = match args.combine.as_str() {
            "cat" => Combination::Cat,
            "svd" => Combination::Svd { rank: None },
            "linear" => Combination::Linear,
            other => return Err(UsageError(format!("--combine {other}: must be cat, svd or linear")).into()),
        };
        let mut found = Self { set: AdapterSet::new(), weights: Vec::new(), dirs: Vec::new(), combination };
        for text in &args.adapter {
            let (name, dir, weight) = adapter_argument(text)?;
            let dir = adapters::folder(dir)?;
            found.set.load(name, &dir)?;
            warn_of_missing(name, found.set.get(name)?);
            found.dirs.push((name.to_string(), dir));
            found.weights.push((name.to_string(), weight));
        }
        Ok(found)
    }

    fn sources(&self) -> impl Iterator<Item = AdapterSource<'_>> {
        self.weights.iter().map(|(name, weight)| AdapterSource { name, weight: *weight })
    }

    /// The base that the first adapter names.
    fn base_model(&self) -> NamedBase {
        let first = self.weights.first().and_then(|(name, _)| self.set.get(name).ok());
        first.map(|adapter| NamedBase::of(&adapter.config)).unwrap_or_default()
    }

    fn put_on(&self, model: &mut Decoder) -> Result<()> {
        let sources: Vec<AdapterSource<'_>> = self.sources().collect();
        match sources.as_slice() {
            [] => {}
            [AdapterSource { name, .. }] => {
                self.set.activate_weighted(model, &sources).with_context(|| self.unfit(name))?;
            }
            _ => {
                let mut set = self.set.clone();
                // No folder can have this name.
                const COMBINED: &str = "/";
                set.combine(COMBINED, &sources, self.combination)?;
                let names: Vec<&str> = self.dirs.iter().map(|(name, _)| name.as_str()).collect();
                let unfit = || format!("what {} are together can't be put on the model", names.join(", "));
                set.activate(model, COMBINED).with_context(unfit)?;
            }
        }
        Ok(())
    }

    /// Says where the adapter is that the model does not take.
    fn unfit(&self, name: &str) -> String {
        let dir = self.dirs.iter().find(|(other, _)| other == name).map(|(_, dir)| dir.display().to_string());
        format!("the adapter in {} can't be put on the model", dir.as_deref().unwrap_or(name))
    }
}

/// `[NAME=]DIR[:WEIGHT]`; the folder is the name if none is given. What is behind the last colon is a weight only
/// if it is a number, and what is before the first equals sign a name only if it has no slash and is no folder.
pub fn adapter_argument(text: &str) -> Result<(&str, &str, f64), UsageError> {
    let (name, rest) = match text.split_once('=') {
        Some((name, rest)) if !name.contains(['/', '\\']) && !Path::new(text).is_dir() => (Some(name), rest),
        _ => (None, text),
    };
    let (dir, weight) = match rest.rsplit_once(':').map(|(dir, weight)| (dir, weight.parse::<f64>())) {
        Some((dir, Ok(weight))) if !Path::new(rest).is_dir() => (dir, weight),
        _ => (rest, 1.0),
    };
    if dir.is_empty() || !weight.is_finite() {
        return Err(UsageError(format!("--adapter {text}: must be DIR, DIR:WEIGHT or NAME=DIR:WEIGHT")));
    }
    Ok((name.unwrap_or(dir), dir, weight))
}

/// How the prompt is written: as the flags say, else as the first adapter's rows were, else by the model's chat template.
fn prompting(args: &GenerateArgs, adapters: &Adapters, model: &Path) -> Result<Prompting> {
    let mut found: Option<(&str, Prompting)> = None;
    for (name, dir) in &adapters.dirs {
        let Some(other) = Prompting::of_adapter(dir)? else { continue };
        match &found {
            None => found = Some((name, other)),
            Some((first, prompting)) if prompting.settings != other.settings => {
                say!(
                    "note: {first} and {name} were trained on rows of different kinds; the prompt is written as for {first}"
                );
            }
            Some(_) => {}
        }
    }
    let mut prompting = match found {
        Some((_, prompting)) => prompting,
        // A merged model has what its adapter had.
        None if adapters.dirs.is_empty() => Prompting::of_adapter(model)?.unwrap_or_default(),
        None => Prompting::default(),
    };
    if args.prompting.no_chat_template {
        prompting.settings.layout = PromptLayout::Plain;
    }
    prompts::apply(&args.prompting.writing, &mut prompting)?;
    match prompts::out_of_place(&args.prompting.writing, prompting.settings.layout) {
        Some(error) => Err(error.into()),
        None => Ok(prompting),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::adapter_argument;

    #[test]
    fn adapters_have_a_folder_and_perhaps_a_name_and_a_weight() {
        assert_eq!(adapter_argument("runs/a/adapter").unwrap(), ("runs/a/adapter", "runs/a/adapter", 1.0));
        assert_eq!(adapter_argument("runs/a:0.5").unwrap(), ("runs/a", "runs/a", 0.5));
        assert_eq!(adapter_argument("maths=runs/a:-1").unwrap(), ("maths", "runs/a", -1.0));
        assert_eq!(adapter_argument("runs/lr=3/a").unwrap(), ("runs/lr=3/a", "runs/lr=3/a", 1.0));
        assert_eq!(adapter_argument("C:/a").unwrap(), ("C:/a", "C:/a", 1.0));
        for wrong in ["", "maths=", "a:nan"] {
            assert!(adapter_argument(wrong).unwrap_err().0.contains("NAME=DIR:WEIGHT"));
        }
    }
}
