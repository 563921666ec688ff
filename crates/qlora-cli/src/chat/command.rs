//! What is typed: a prompt, or a command.

use crate::args::SamplingArgs;
use crate::exit::UsageError;

/// The commands, as /help shows them.
pub const HELP: &str = "\
/adapter NAME     answer with this adapter from now on; /adapter base with none
/compare A B      answer with both, one after the other
/system TEXT      a system message before the conversation; without TEXT, the adapter's own
/reset            begin anew
/regenerate       answer once more, with another seed; at temperature 0 it is the same answer
/set NAME VALUE   temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty,
                  max_new_tokens or seed; /set alone shows them
/help             these lines
/quit             end; so does Ctrl-D
//text            a prompt that begins with a slash
A line that ends with a backslash goes on in the next one, and so do all lines between two of \"\"\".";

/// What is typed.
#[derive(Debug, PartialEq, Eq)]
pub enum Entry {
    /// To be answered.
    Prompt(String),
    /// To be done.
    Command(Command),
}

/// A command.
#[derive(Debug, PartialEq, Eq)]
pub enum Command {
    /// `/adapter NAME`
    Adapter(String),
    /// `/compare A B`
    Compare(String, String),
    /// `/system [TEXT]`
    System(Option<String>),
    /// `/reset`
    Reset,
    /// `/regenerate`
    Regenerate,
    /// `/set [NAME VALUE]`
    Set(Option<(String, String)>),
    /// `/help`
    Help,
    /// `/quit`
    Quit,
}

/// Reads an entry; `None` for one without words.
///
/// # Errors
/// The command is unknown, or lacks a word.
pub fn parse(text: &str) -> Result<Option<Entry>, UsageError> {
    let trimmed = text.trim();
    let Some(line) = trimmed.strip_prefix('/') else {
        return Ok((!trimmed.is_empty()).then(|| Entry::Prompt(text.to_string())));
    };
    if line.starts_with('/') {
        return Ok(Some(Entry::Prompt(line.to_string())));
    }
    let (name, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
    let rest = rest.trim();
    let words: Vec<&str> = rest.split_whitespace().collect();
    let command = match (name, words.as_slice()) {
        ("adapter", [name]) => Command::Adapter((*name).to_string()),
        ("compare", [one, other]) if one != other => Command::Compare((*one).to_string(), (*other).to_string()),
        ("system", _) => Command::System((!rest.is_empty()).then(|| rest.to_string())),
        ("reset", []) => Command::Reset,
        ("regenerate", []) => Command::Regenerate,
        ("set", []) => Command::Set(None),
        ("set", [name, value]) => Command::Set(Some(((*name).to_string(), (*value).to_string()))),
        ("help", []) => Command::Help,
        ("quit" | "exit", []) => Command::Quit,
        _ => {
            // What the command takes, if it is one.
            let takes = HELP.lines().find(|line| line.strip_prefix('/').is_some_and(|line| line.starts_with(name)));
            let takes = takes.filter(|_| !name.is_empty()).and_then(|line| line.split("  ").next());
            return Err(UsageError(match takes {
                Some(takes) => format!("/{line}: the command is {takes}"),
                None => {
                    format!("/{line}: there is no such command; /help lists them, and // begins a prompt with a slash")
                }
            }));
        }
    };
    Ok(Some(Entry::Command(command)))
}

/// Changes one of the flags that say how tokens are chosen.
///
/// # Errors
/// There is none of this name, or the value is not in its range; nothing is changed then.
pub fn set(choice: &mut SamplingArgs, name: &str, value: &str) -> Result<(), UsageError> {
    fn read<T: std::str::FromStr>(place: &mut T, name: &str, value: &str) -> Result<(), UsageError> {
        *place = value.parse().map_err(|_| UsageError(format!("/set {name} {value}: {value} is no such number")))?;
        Ok(())
    }
    let mut changed = choice.clone();
    match name.replace('-', "_").as_str() {
        "temperature" => read(&mut changed.temperature, name, value),
        "top_k" => read(&mut changed.top_k, name, value),
        "top_p" => read(&mut changed.top_p, name, value),
        "min_p" => read(&mut changed.min_p, name, value),
        "repetition_penalty" => read(&mut changed.repetition_penalty, name, value),
        "presence_penalty" => read(&mut changed.presence_penalty, name, value),
        "frequency_penalty" => read(&mut changed.frequency_penalty, name, value),
        "max_new_tokens" => read(&mut changed.max_new_tokens, name, value),
        "seed" => read(&mut changed.seed, name, value),
        _ => Err(UsageError(format!("/set {name}: there is no such setting; /set alone shows them"))),
    }?;
    if let Some((_, allowed)) = changed.out_of_range() {
        return Err(UsageError(format!("/set {name} {value}: must be {allowed}")));
    }
    *choice = changed;
    Ok(())
}

/// The settings as /set shows them.
pub fn settings(choice: &SamplingArgs) -> String {
    let SamplingArgs { temperature, top_k, top_p, min_p, repetition_penalty, .. } = choice;
    let SamplingArgs { presence_penalty, frequency_penalty, max_new_tokens, seed, .. } = choice;
    format!(
        "temperature {temperature}, top_k {top_k}, top_p {top_p}, min_p {min_p}, repetition_penalty {repetition_penalty}, \
         presence_penalty {presence_penalty}, frequency_penalty {frequency_penalty}, max_new_tokens {max_new_tokens}, \
         seed {seed}"
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use clap::Parser;

    #[test]
    fn commands_begin_with_a_slash() {
        let command = |text: &str| match parse(text).unwrap() {
            Some(Entry::Command(command)) => command,
            other => panic!("{other:?}"),
        };
        assert_eq!(command("/adapter maths"), Command::Adapter("maths".into()));
        assert_eq!(command(" /compare a  b "), Command::Compare("a".into(), "b".into()));
        assert_eq!(command("/system Be brief, please."), Command::System(Some("Be brief, please.".into())));
        assert_eq!(command("/system"), Command::System(None));
        assert_eq!(command("/set top_p 0.9"), Command::Set(Some(("top_p".into(), "0.9".into()))));
        assert_eq!(command("/quit"), Command::Quit);
        assert_eq!(parse("//etc/hosts?").unwrap(), Some(Entry::Prompt("/etc/hosts?".into())));
        assert_eq!(parse("  a / b\n").unwrap(), Some(Entry::Prompt("  a / b\n".into())));
        assert_eq!(parse(" \t").unwrap(), None);
        let fails = |text: &str, word: &str| assert!(parse(text).unwrap_err().0.contains(word), "{text}");
        fails("/compare a", "/compare A B");
        fails("/compare a a", "/compare A B");
        fails("/adapter", "/adapter NAME");
        fails("/", "no such command");
        fails("/resett", "no such command");
    }

    #[test]
    fn settings_keep_their_ranges() {
        #[derive(Parser)]
        struct Alone {
            #[command(flatten)]
            choice: SamplingArgs,
        }
        let mut choice = Alone::parse_from(["qlora"]).choice;
        for (name, value) in [
            ("temperature", "0.7"),
            ("top_k", "20"),
            ("top-p", "0.9"),
            ("min_p", "0.1"),
            ("repetition_penalty", "1.1"),
            ("presence_penalty", "-1"),
            ("frequency_penalty", "0.5"),
            ("max_new_tokens", "9"),
            ("seed", "3"),
        ] {
            set(&mut choice, name, value).unwrap();
            let shown = format!("{} {value}", name.replace('-', "_"));
            assert!(settings(&choice).contains(&shown), "{shown}: {}", settings(&choice));
        }
        let before = choice.clone();
        for (name, value, word) in [
            ("temperature", "-1", "/set temperature -1: must be from 0 to 2"),
            ("temperature", "9", "/set temperature 9: must be from 0 to 2"),
            ("temperature", "nan", "must be from 0 to 2"),
            ("top_p", "0", "/set top_p 0: must be above 0 and at most 1"),
            ("presence_penalty", "3", "must be from -2 to 2"),
            ("temperature", "hot", "hot is no such number"),
            ("max_new_tokens", "0", "1 or more"),
            ("warmth", "1", "no such setting"),
        ] {
            assert!(set(&mut choice, name, value).unwrap_err().0.contains(word), "{name} {value}");
            assert_eq!(choice, before);
        }
    }
}
