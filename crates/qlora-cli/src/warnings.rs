//! What libraries log. By default their warnings and errors reach whoever runs the program, above the bar and each once; RUST_LOG brings a log
//! instead, with times and places, and so does `qlora serve`.

use std::collections::{HashMap, HashSet};
use std::fmt::{self, Write as _};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use burn_qlora::adapter_io::printable::{printable_lines, shortened};
use tracing::field::{Field, Visit};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::Context;
use tracing_subscriber::{EnvFilter, Layer};

use crate::output::{Paint, say, say_wrapped};
use crate::progress::json_warning;

/// What is told unless RUST_LOG says otherwise. hf-hub and Xet log what comes back as an error, too, with the addresses of storage, which let who
/// has them in. What fails on a thread of CubeCL's devices comes back as an error, too, or was a look for a device that is not there. CubeCL says on stderr
/// itself that its configuration can't be read.
const TOLD: &str = "warn,hf_hub=off,xet=off,xet_client=off,xet_data=off,xet_runtime=off,xet_core_structures=off,\
                    cubecl_common::device::handle::channel=off,cubecl_environment::config=off";
/// Texts that one place in a library may have told.
const OF_A_PLACE: usize = 5;
/// Characters of a text.
const LONGEST: usize = 2000;

/// Whether stdout gets JSON.
static JSON: AtomicBool = AtomicBool::new(false);

/// Has warnings of libraries told in JSON from here on, as those of the run are.
pub fn as_json() {
    JSON.store(true, Ordering::Relaxed);
}

/// What passes by default.
pub fn filter() -> EnvFilter {
    EnvFilter::new(TOLD)
}

/// The filter that RUST_LOG asks for, where it does.
pub fn asked_for() -> Option<EnvFilter> {
    let text = std::env::var(EnvFilter::DEFAULT_ENV).ok().filter(|text| !text.trim().is_empty())?;
    match EnvFilter::try_new(&text) {
        Ok(filter) => Some(filter),
        Err(error) => {
            say!("{} RUST_LOG = \"{text}\": {error}; it is left out", Paint::of_stderr().warning("warning:"));
            None
        }
    }
}

/// Tells warnings and errors, each once.
#[derive(Default)]
pub struct Once(Mutex<Seen>);

/// What was told.
#[derive(Default)]
struct Seen {
    texts: HashSet<String>,
    /// By place.
    counts: HashMap<String, usize>,
}

impl Seen {
    /// What is told of an event: nothing where it was told before, or where its place had its share.
    fn news(&mut self, event: &Told) -> Option<String> {
        let text = event.text();
        if !self.texts.insert(text.clone()) {
            return None;
        }
        let count = self.counts.entry(event.place.clone()).or_default();
        *count += 1;
        match (*count).cmp(&OF_A_PLACE) {
            std::cmp::Ordering::Less => Some(text),
            std::cmp::Ordering::Equal => {
                Some(format!("{text}; more of this kind is not told (RUST_LOG=warn shows all)"))
            }
            std::cmp::Ordering::Greater => {
                // Texts that nobody sees are not kept.
                self.texts.remove(&text);
                None
            }
        }
    }
}

impl<S: tracing::Subscriber> Layer<S> for Once {
    fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
        let told = Told::of(event);
        let news = self.0.lock().unwrap_or_else(PoisonError::into_inner).news(&told);
        let Some(news) = news else { return };
        if JSON.load(Ordering::Relaxed) {
            json_warning(&news);
        } else {
            let is_error = *event.metadata().level() == tracing::Level::ERROR;
            let word = if is_error { "error:" } else { "warning:" };
            say_wrapped(2, &format!("{} {news}", Paint::of_stderr().warning(word)));
        }
    }
}

/// An event as it is told.
#[derive(Debug, Default, PartialEq, Eq)]
struct Told {
    message: String,
    /// The other fields.
    fields: String,
    /// The library.
    of: String,
    /// Where in it.
    place: String,
}

impl Told {
    fn of(event: &tracing::Event<'_>) -> Self {
        let metadata = event.metadata();
        let place = format!("{}:{}", metadata.file().unwrap_or_default(), metadata.line().unwrap_or_default());
        let mut told = Self { of: metadata.target().to_owned(), place, ..Self::default() };
        // Records of the crate `log` have one place, and say theirs in fields.
        let mut of_log = Log::default();
        event.record(&mut Fields { told: &mut told, log: &mut of_log });
        if let Some(target) = of_log.target {
            told.place = format!("{}:{}", of_log.file, of_log.line);
            told.of = target;
        }
        told.of.truncate(told.of.find("::").unwrap_or(told.of.len()));
        told
    }

    fn text(&self) -> String {
        // Some say themselves what they are.
        let message = self.message.strip_prefix("Warning: ").unwrap_or(&self.message);
        let mut text = shortened(message, LONGEST).into_owned();
        if !self.fields.is_empty() {
            // Writing to a string cannot fail.
            let _ = write!(text, " ({})", shortened(&self.fields, LONGEST));
        }
        let ours = ["qlora", "adapter_io", "chat_text", "model_hub", "nf4_quant", "paged_optim", "fused_kernels"];
        let ours = ours.iter().chain(&["host_copies", "cuda_source", "device_collectives"]);
        if !ours.into_iter().any(|name| self.of.starts_with(name)) {
            let _ = write!(text, " [{}]", self.of);
        }
        printable_lines(&text).into_owned()
    }
}

/// What records of the crate `log` say of themselves.
#[derive(Default)]
struct Log {
    target: Option<String>,
    file: String,
    line: String,
}

struct Fields<'a> {
    told: &'a mut Told,
    log: &'a mut Log,
}

impl Fields<'_> {
    fn note(&mut self, name: &str, value: String) {
        match name {
            "message" => self.told.message = value,
            "log.target" => self.log.target = Some(value),
            "log.file" => self.log.file = value,
            "log.line" => self.log.line = value,
            name if name.starts_with("log.") => {}
            name => {
                let comma = if self.told.fields.is_empty() { "" } else { ", " };
                // Writing to a string cannot fail.
                let _ = write!(self.told.fields, "{comma}{name}: {value}");
            }
        }
    }
}

impl Visit for Fields<'_> {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.note(field.name(), value.to_owned());
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.note(field.name(), format!("{value:?}"));
    }
}

/// Writes the lines of a log above the bar.
#[derive(Clone, Copy, Debug)]
pub struct AboveTheBar;

impl io::Write for AboveTheBar {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        say!("{}", String::from_utf8_lossy(bytes).trim_end_matches('\n'));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for AboveTheBar {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        *self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(message: &str, of: &str, place: &str) -> Told {
        Told { message: message.into(), of: of.into(), place: place.into(), fields: String::new() }
    }

    #[test]
    fn a_warning_is_told_once_and_a_place_has_its_share() {
        let mut seen = Seen::default();
        let mut news = |message: &str, place: &str| seen.news(&told(message, "cubecl_wgpu", place));
        assert_eq!(news("no memory", "a:1"), Some("no memory [cubecl_wgpu]".into()));
        assert_eq!(news("no memory", "a:1"), None);
        assert_eq!(news("no memory", "a:2"), None);
        let more: Vec<_> = (1..9).map(|k| news(&format!("no memory for {k}"), "a:1")).collect();
        let count = more.iter().flatten().count();
        assert_eq!(count, OF_A_PLACE - 1, "{more:?}");
        assert!(
            more[OF_A_PLACE - 2].as_ref().is_some_and(|text| text.ends_with("(RUST_LOG=warn shows all)")),
            "{more:?}"
        );
        assert_eq!(news("too hot", "a:2"), Some("too hot [cubecl_wgpu]".into()));
    }

    #[test]
    fn our_own_crates_are_not_named_and_terminals_are_safe() {
        let mut event = told("a\u{1b}[2J", "qlora_models", "a:1");
        event.fields = "error: gone".into();
        assert_eq!(event.text(), "a\\u{1b}[2J (error: gone)");
    }

    /// What a subscriber with our filter and layer makes of events.
    #[derive(Clone, Default)]
    struct Noted(std::sync::Arc<Mutex<Vec<Told>>>);

    impl<S: tracing::Subscriber> Layer<S> for Noted {
        fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
            self.0.lock().expect("no panic").push(Told::of(event));
        }
    }

    #[test]
    fn warnings_pass_and_addresses_of_storage_do_not() {
        use tracing_subscriber::layer::SubscriberExt as _;
        let noted = Noted::default();
        let subscriber = tracing_subscriber::registry().with(noted.clone().with_filter(filter()));
        tracing::subscriber::with_default(subscriber, || {
            tracing::warn!(target: "cubecl_wgpu::stream", device = 3, "lost");
            tracing::info!(target: "cubecl_wgpu::stream", "found");
            tracing::warn!(target: "cubecl_common::device::handle::channel", "no such card");
            tracing::warn!(target: "hf_hub::download", url = "https://storage/?signature=s", "no length");
            tracing::error!(target: "xet_client", "403");
        });
        let noted = noted.0.lock().expect("no panic");
        let texts: Vec<_> = noted.iter().map(Told::text).collect();
        assert_eq!(texts, ["lost (device: 3) [cubecl_wgpu]"]);
    }
}
