//! `qlora generate`: a model, with or without adapters, answers a prompt.

use std::io::{IsTerminal, Read};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};
use burn_qlora::adapter_io::checkpoint::refuse_adapter;
use burn_qlora::chat_text::{PromptLayout, Prompting};
use burn_qlora::{
    AdapterSet, AdapterSource, ChatTemplate, Combination, Decoder, GenerateOptions, LoadOptions, Tokenizer,
    TrainConfig, compute_dtype, generate, select_device,
};

use crate::args::GenerateArgs;
use crate::exit::{Code, UsageError};
use crate::hub;
use crate::output::{print, say};
use crate::progress::LoadBar;
use crate::sources::warn_of_missing;

/// Runs the command. The answer goes to stdout as it comes, everything else to stderr.
pub fn run(args: &GenerateArgs) -> Result<Code> {
    check(args)?;
    // The keys mean what they mean in a configuration, and are checked as there.
    let mut config = TrainConfig::default();
    config.set("quantization.quant_type", &args.quant_type)?;
    config.set("quantization.compute_dtype", &args.compute_dtype)?;
    let device = select_device(&args.device)?;
    let dtype = compute_dtype(config.quantization.compute_dtype, &device);
    let adapters = Adapters::load(args)?;
    let named = adapters.base_model();
    let model = args
        .model
        .as_deref()
        .or(named)
        .ok_or_else(|| UsageError("the adapter names no base model: give --model".into()))?;
    let dir = hub::resolve(model, args.revision.as_deref())?;
    refuse_adapter(&dir)?;
    let tokenizer = Tokenizer::from_dir(&dir)?;
    let prompting = prompting(args, &adapters, &dir)?;
    let ids = prompt_ids(args, &tokenizer, &prompting)?;

    let mut bar = LoadBar::new();
    let options = LoadOptions { quantization: config.quantization.quant_config(), dtype };
    let mut model = Decoder::load(&dir, options, &device, &mut |progress| bar.update(progress))?;
    bar.finish();
    let options = GenerateOptions {
        max_new_tokens: args.max_new_tokens,
        temperature: args.temperature,
        top_p: args.top_p,
        seed: args.seed,
        stop_ids: prompting.stop_ids(&tokenizer),
    };
    if !args.each {
        adapters.put_on(&mut model)?;
        answer(&model, &tokenizer, &ids, &options)?;
        return Ok(Code::Done);
    }
    for AdapterSource { name, weight } in adapters.sources() {
        adapters.set.activate_weighted(&mut model, &[AdapterSource { name, weight }])?;
        print(&format!("[{name}]\n"))?;
        answer(&model, &tokenizer, &ids, &options)?;
    }
    Ok(Code::Done)
}

/// Prints the model's answer as it comes.
fn answer(model: &Decoder, tokenizer: &Tokenizer, ids: &[u32], options: &GenerateOptions) -> Result<()> {
    let start = Instant::now();
    let mut text = tokenizer.stream_decoder(ids, true);
    let mut failure = None;
    let generation = generate(model, ids, options, |id| {
        let shown = text.push(id).map_err(anyhow::Error::from).and_then(|piece| print(&piece));
        failure = failure.take().or(shown.err());
    })?;
    failure.map_or(Ok(()), Err)?;
    print(&(text.finish()? + "\n"))?;
    if std::io::stderr().is_terminal() {
        let seconds = start.elapsed().as_secs_f64();
        let tokens = generation.ids.len();
        let end = if generation.stopped { "" } else { "; stopped by --max-new-tokens" };
        say!("{tokens} tokens in {seconds:.1} s, {:.1} tok/s{end}", tokens as f64 / seconds);
    }
    Ok(())
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
            let dir = hub::resolve(dir, None)?;
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
    fn base_model(&self) -> Option<&str> {
        let first = self.set.get(&self.weights.first()?.0).ok()?;
        first.config.base_model_name_or_path.as_deref()
    }

    fn put_on(&self, model: &mut Decoder) -> Result<()> {
        let sources: Vec<AdapterSource<'_>> = self.sources().collect();
        match sources.as_slice() {
            [] => {}
            [_] => self.set.activate_weighted(model, &sources)?,
            _ => {
                let mut set = self.set.clone();
                // No folder can have this name.
                const COMBINED: &str = "/";
                set.combine(COMBINED, &sources, self.combination)?;
                set.activate(model, COMBINED)?;
            }
        }
        Ok(())
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

fn check(args: &GenerateArgs) -> Result<(), UsageError> {
    let wrong = |flag: &str, allowed: &str| Err(UsageError(format!("{flag} must be {allowed}")));
    if args.max_new_tokens == 0 {
        return wrong("--max-new-tokens", "1 or more");
    }
    if !(args.temperature >= 0.0 && args.temperature.is_finite()) {
        return wrong("--temperature", "a finite number, 0 or more");
    }
    if !(args.top_p > 0.0 && args.top_p <= 1.0) {
        return wrong("--top-p", "above 0 and at most 1");
    }
    Ok(())
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
    if args.no_chat_template {
        prompting.settings.layout = PromptLayout::Plain;
    }
    if let Some(setting) = &args.chat_template {
        prompting.template = Some(ChatTemplate::from_setting(setting)?);
        prompting.settings.layout = PromptLayout::Chat;
    }
    for text in &args.template_kwarg {
        let (name, value) = text.split_once('=').ok_or_else(|| {
            UsageError(format!("--template-kwarg {text}: write NAME=VALUE, e.g. enable_thinking=true"))
        })?;
        let value = serde_json::from_str(value).unwrap_or_else(|_| value.into());
        prompting.settings.template_kwargs.insert(name.to_string(), value);
    }
    let ignored = match prompting.settings.layout {
        PromptLayout::Chat => None,
        _ if !args.template_kwarg.is_empty() => Some("--template-kwarg"),
        PromptLayout::Plain if args.system.is_some() => Some("--system"),
        _ => None,
    };
    match ignored {
        Some(flag) => {
            let text = format!("{flag} has no place where the prompt is no conversation; --chat-template makes it one");
            Err(UsageError(text).into())
        }
        None => Ok(prompting),
    }
}

fn prompt_ids(args: &GenerateArgs, tokenizer: &Tokenizer, prompting: &Prompting) -> Result<Vec<u32>> {
    let mut prompt = args.prompt.clone();
    if prompt == "-" {
        prompt.clear();
        std::io::stdin().read_to_string(&mut prompt).context("can't read the prompt from the standard input")?;
    }
    let ids = prompting.prompt(tokenizer, args.system.as_deref(), &prompt);
    match prompting.settings.layout {
        PromptLayout::Chat => {
            ids.context("can't write the prompt as a conversation; --no-chat-template gives it to the model as it is")
        }
        _ => Ok(ids?),
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
