//! `qlora doctor`: what of this host a run uses, what is missing, and what to do about it.
//!
//! Nothing is changed and no run is disturbed: memory of a card is taken for a measurement of some tenths of a second, and the
//! rendezvous's port is tried and let go. Each finding is fine (`ok`), worth knowing (`note`), or would stop a run
//! (`problem`); the exit code tells whether there is one of the last kind.

mod adapters;
pub mod cards;
mod copies;
mod folders;
mod host;
mod launcher;
mod libraries;

use std::fmt;
use std::fmt::Write as _;

use anyhow::Result;
use burn_qlora::adapter_io::printable::printable;
use burn_qlora::qlora_dist::Place;
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::args::DoctorArgs;
use crate::exit::Code;
use crate::output::print;

/// Runs the command.
pub fn run(args: &DoctorArgs) -> Result<Code> {
    if args.adapters {
        adapters::answer()?;
        return Ok(Code::Done);
    }
    let mut report = Report::default();
    let place = launcher::place();
    // Processes of one host find the same; one of them tells it.
    if place.as_ref().map_or(0, |place| place.local_rank) == 0 {
        let cards = cards::inspect(&mut report, place.as_ref().ok());
        libraries::inspect(&mut report, cards);
        adapters::inspect(&mut report, cards);
        host::inspect(&mut report, cards);
        folders::inspect(&mut report);
    }
    launcher::inspect(&mut report, place.as_ref());
    let text = match args.json {
        true => format!("{}\n", serde_json::to_string_pretty(&report.to_json(place.as_ref().ok()))?),
        false => report.to_string(),
    };
    print(&text)?;
    Ok(if report.problems() == 0 { Code::Done } else { Code::Failed })
}

/// What a finding is for a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// As it should be.
    Ok,
    /// A run works, and something about it is worth knowing.
    Note,
    /// A run would stop.
    Problem,
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Ok => "ok",
            Self::Note => "note",
            Self::Problem => "problem",
        })
    }
}

/// One thing that was looked at.
#[derive(Debug, Serialize)]
pub struct Finding {
    section: &'static str,
    state: State,
    text: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    what_to_do: Option<String>,
    #[serde(skip_serializing_if = "Map::is_empty")]
    values: Map<String, Value>,
}

impl Finding {
    /// Adds a number or a name that programs read, in bytes, bytes per second and the like.
    pub fn value(&mut self, name: &str, value: impl Into<Value>) -> &mut Self {
        self.values.insert(name.into(), value.into());
        self
    }

    /// What to do where it is not as it should be.
    pub fn cure(&mut self, text: impl Into<String>) -> &mut Self {
        self.what_to_do = Some(text.into());
        self
    }
}

/// All findings.
#[derive(Debug, Default)]
pub struct Report {
    section: &'static str,
    findings: Vec<Finding>,
}

impl Report {
    /// What follows belongs to this part.
    pub fn section(&mut self, name: &'static str) {
        self.section = name;
    }

    /// Adds a finding.
    pub fn add(&mut self, state: State, text: impl Into<String>) -> &mut Finding {
        let (section, text) = (self.section, text.into());
        self.findings.push(Finding { section, state, text, what_to_do: None, values: Map::new() });
        let last = self.findings.len() - 1;
        &mut self.findings[last]
    }

    /// Something that is as it should be.
    pub fn ok(&mut self, text: impl Into<String>) -> &mut Finding {
        self.add(State::Ok, text)
    }

    /// Something that is worth knowing.
    pub fn note(&mut self, text: impl Into<String>) -> &mut Finding {
        self.add(State::Note, text)
    }

    /// Something that would stop a run, and what to do about it.
    pub fn problem(&mut self, text: impl Into<String>, cure: impl Into<String>) -> &mut Finding {
        self.add(State::Problem, text).cure(cure)
    }

    fn problems(&self) -> usize {
        self.findings.iter().filter(|finding| finding.state == State::Problem).count()
    }

    fn to_json(&self, place: Option<&Place>) -> Value {
        let place = place.map(|place| {
            json!({
                "rank": place.rank, "world_size": place.world_size,
                "local_rank": place.local_rank, "local_world_size": place.local_world_size,
            })
        });
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "problems": self.problems(),
            "place": place,
            "findings": self.findings,
        })
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut section = "";
        for finding in &self.findings {
            if section != finding.section {
                let gap = if section.is_empty() { "" } else { "\n" };
                section = finding.section;
                writeln!(f, "{gap}{section}")?;
            }
            // Names of cards, folders and variables are others' words.
            let mut line = format!("  {:<8} {}", finding.state, printable(&finding.text));
            if let Some(cure) = &finding.what_to_do {
                write!(line, "\n           -> {}", printable(cure))?;
            }
            writeln!(f, "{line}")?;
        }
        match self.problems() {
            0 => writeln!(f, "\nNothing here would stop a run."),
            1 => writeln!(f, "\n1 problem would stop a run."),
            more => writeln!(f, "\n{more} problems would stop a run."),
        }
    }
}

/// `1 card`, `2 cards`.
fn counted(count: usize, name: &str) -> String {
    format!("{count} {name}{}", if count == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_says_what_to_do() {
        let mut report = Report::default();
        report.section("Cards");
        report.ok("a \u{1b}[2Jcard").value("bytes", 7);
        report.note("slow");
        report.section("Host");
        report.problem("no memory", "buy some");
        let text = report.to_string();
        let expected = "Cards\n  ok       a \\u{1b}[2Jcard\n  note     slow\n\nHost\n  problem  no memory\n           -> buy \
                        some\n\n1 problem would stop a run.\n";
        assert_eq!(text, expected);
        let json = report.to_json(None);
        assert_eq!((&json["problems"], &json["place"]), (&json!(1), &Value::Null));
        assert_eq!(json["findings"][0]["values"]["bytes"], 7);
        assert_eq!(json["findings"][2]["what_to_do"], "buy some");
        assert_eq!(json["findings"][1], json!({ "section": "Cards", "state": "note", "text": "slow" }));
    }
}
