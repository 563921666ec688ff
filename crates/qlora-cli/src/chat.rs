//! `qlora chat`: a conversation with a model and its adapters in the terminal.

mod command;
mod input;
mod interrupts;
mod session;

use std::sync::Arc;

use anyhow::{Context, Result};
use burn_qlora::Tokenizer;
use burn_qlora::qlora_serve::EngineConfig;
use burn_qlora::qlora_serve::text::template;

use crate::adapters;
use crate::answers::Running;
use crate::args::ChatArgs;
use crate::exit::{Code, chain};
use crate::model::{Placement, base_dir, base_name, cache_for};
use crate::output::say;
use crate::prompts::{self, BASE};
use command::{Command, Entry, HELP};
use input::{Entered, Input};
use interrupts::Interrupts;
use session::Session;

/// Answers at once: /compare asks two.
const ANSWERS: usize = 2;

/// Runs the command until its input ends. Answers go to stdout, everything else to stderr.
pub fn run(args: &ChatArgs) -> Result<Code> {
    args.choice.sampling()?;
    let place = Placement::new(&args.base)?;
    let (adapters, named) = adapters::named(&args.adapter)?;
    adapters::check_names(&adapters, BASE)?;
    let dir = base_dir(&args.base, base_name(&args.base, &named)?, &named)?;
    let tokenizer = Arc::new(Tokenizer::from_dir(&dir)?);
    let voices = prompts::voices(&args.writing, &adapters, &dir)?;
    let first = usize::from(!adapters.is_empty());
    template(&voices[first].prompting, &tokenizer).context("--chat-template gives the conversation a template")?;

    let model = place.load(&dir)?;
    let longest = model.config().max_tokens();
    let max_tokens = args.max_tokens.map_or(longest, |tokens| longest.min(tokens as usize));
    let config = EngineConfig {
        cache: cache_for(&model, ANSWERS * max_tokens),
        max_batch: ANSWERS,
        max_tokens: Some(max_tokens),
        max_adapters: adapters.len(),
        ..EngineConfig::default()
    };
    let engine = Running::start(model, &config)?;
    engine.load_adapters(&adapters)?;
    let room = engine.handle.limits().max_tokens;
    if let Some(asked) = args.max_tokens.filter(|asked| *asked as usize > room) {
        say!("note: model and memory have room for {room} tokens of a conversation, not for --max-tokens {asked}");
    }
    let mut input = Input::new()?;
    let interrupts = Interrupts::listen(input.is_terminal())?;
    let mut session = Session::new(args, voices, first, tokenizer, engine.handle.clone(), interrupts)?;
    if input.is_terminal() {
        say!("{} answers; /help lists the commands, Ctrl-D ends", session.names());
    }
    while let Some(entered) = input.next()? {
        match enter(&mut session, entered) {
            Ok(true) => {}
            Ok(false) => break,
            // A person corrects the mistake; a script's next lines depend on it.
            Err(error) if input.is_terminal() && !engine.handle.is_closed() => say!("{}", chain(&error)),
            Err(error) => {
                return Err(match input.place() {
                    Some(place) => error.context(place),
                    None => error,
                });
            }
        }
    }
    drop(session);
    engine.end()?;
    Ok(Code::Done)
}

/// Answers a prompt or obeys a command; `false` ends the conversation.
fn enter(session: &mut Session, entered: Entered) -> Result<bool> {
    let Entered { text, quoted } = entered;
    let entry = match quoted {
        true if text.trim().is_empty() => None,
        true => Some(Entry::Prompt(text)),
        false => command::parse(&text)?,
    };
    match entry {
        None => {}
        Some(Entry::Prompt(text)) => session.prompt(text)?,
        Some(Entry::Command(command)) => match command {
            Command::Adapter(name) => session.speak_with(&[&name])?,
            Command::Compare(one, other) => session.speak_with(&[&one, &other])?,
            Command::System(text) => session.set_system(text)?,
            Command::Reset => session.reset(),
            Command::Regenerate => session.regenerate()?,
            Command::Set(None) => say!("{}", command::settings(&session.choice)),
            Command::Set(Some((name, value))) => command::set(&mut session.choice, &name, &value)?,
            Command::Help => say!("{HELP}"),
            Command::Quit => return Ok(false),
        },
    }
    Ok(true)
}
