//! Bars on stderr, as wide as the terminal, and lines that go above them.
//!
//! One bar is shown at a time. Where stderr is no terminal there is none.

use std::fmt::{self, Write as _};
use std::io::{IsTerminal as _, Write as _};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use burn_qlora::adapter_io::printable::{printable, shortened};
use burn_qlora::report::duration;
use console::{Term, measure_text_width};
use indicatif::style::ProgressTracker;
use indicatif::{BinaryBytes, ProgressBar, ProgressState, ProgressStyle, WeakProgressBar};

/// The bar that is shown.
static SHOWN: Mutex<Option<WeakProgressBar>> = Mutex::new(None);
/// What the bar itself has of a line at least.
const LEAST_BAR: usize = 10;
/// A name that would be cut down to less is left out.
const LEAST_NAME: usize = 12;
/// Columns where the terminal says nothing.
const COLUMNS: usize = 80;

/// A line for stderr: above the bar, or on its own where none is shown. Where stderr is gone there is nowhere left to say why.
pub fn line(text: fmt::Arguments<'_>) {
    let shown = lock(&SHOWN).as_ref().and_then(WeakProgressBar::upgrade);
    match shown.filter(|bar| !bar.is_hidden() && !bar.is_finished()) {
        Some(bar) => bar.println(text.to_string()),
        None => drop(writeln!(std::io::stderr().lock(), "{text}")),
    }
}

/// Columns of stderr, where it is a terminal.
pub fn columns() -> Option<usize> {
    std::io::stderr()
        .is_terminal()
        .then(|| Term::stderr().size_checked().map_or(COLUMNS, |(_, columns)| columns.into()))
}

/// What a bar counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counts {
    /// Steps, rows.
    Things,
    /// Bytes.
    Bytes,
}

/// A part of what stands behind a bar.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Figure {
    text: String,
    /// Where there is no room for all, the highest goes first.
    rank: u8,
    /// Whether it may be shortened.
    is_name: bool,
}

impl Figure {
    /// A figure, which is shown as it is or not at all.
    pub fn new(rank: u8, text: impl Into<String>) -> Self {
        Self { text: text.into(), rank, is_name: false }
    }

    /// What it says.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// A name, which goes first, and may be shortened.
    pub fn name(text: &str) -> Self {
        Self { text: printable(text).into_owned(), rank: u8::MAX, is_name: true }
    }
}

/// A bar, the count, and figures behind it. It goes when it is dropped.
pub struct Bar {
    bar: ProgressBar,
    behind: Arc<Mutex<Behind>>,
}

/// What stands behind a bar.
struct Behind {
    counts: Counts,
    figures: Vec<Figure>,
    /// Whether the time left is guessed from the count's pace.
    tells_left: bool,
    before: usize,
}

impl Bar {
    /// A bar of `total`, 0 where that is not known, after what is done.
    pub fn new(what: &str, total: u64, counts: Counts) -> Self {
        let bar = if total == 0 { ProgressBar::no_length() } else { ProgressBar::new(total) };
        let before = if what.is_empty() { 0 } else { what.chars().count() + 1 };
        let tells_left = total > 0;
        let behind = Arc::new(Mutex::new(Behind { counts, figures: Vec::new(), tells_left, before }));
        let tracker = Fitted(Arc::clone(&behind));
        // Colours that are seen on black and on white (256 colours, whatever the sixteen of the terminal are).
        let template = format!("{}{{wide_bar:.30/244}} {{behind}}", if what.is_empty() { "" } else { "{prefix} " });
        // A broken template, which a test excludes, shows the plain style.
        let style = ProgressStyle::with_template(&template).unwrap_or_else(|_| ProgressStyle::default_bar());
        bar.set_style(style.with_key("behind", tracker));
        bar.set_prefix(what.to_owned());
        *lock(&SHOWN) = Some(bar.downgrade());
        Self { bar, behind }
    }

    /// Draws the bar four times a second, whatever happens.
    pub fn ticking(self) -> Self {
        self.bar.enable_steady_tick(Duration::from_millis(250));
        self
    }

    /// The time left is told by a figure, if at all.
    pub fn without_left(self) -> Self {
        lock(&self.behind).tells_left = false;
        self
    }

    /// How far it is.
    pub fn at(&self, position: u64) {
        self.bar.set_position(position);
    }

    /// One further.
    pub fn advance(&self) {
        self.bar.inc(1);
    }

    /// What stands behind it.
    pub fn show(&self, figures: Vec<Figure>) {
        lock(&self.behind).figures = figures;
        self.bar.tick();
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Writes what stands behind a bar, as much of it as fits.
struct Fitted(Arc<Mutex<Behind>>);

impl ProgressTracker for Fitted {
    fn clone_box(&self) -> Box<dyn ProgressTracker> {
        Box::new(Self(Arc::clone(&self.0)))
    }

    fn tick(&mut self, _: &ProgressState, _: Instant) {}

    fn reset(&mut self, _: &ProgressState, _: Instant) {}

    fn write(&self, state: &ProgressState, out: &mut dyn fmt::Write) {
        let behind = lock(&self.0);
        let (at, total) = (state.pos(), state.len());
        let counted = match (behind.counts, total) {
            (Counts::Things, Some(total)) => format!("{at}/{total}"),
            (Counts::Things, None) => format!("{at}"),
            (Counts::Bytes, Some(total)) => format!("{}/{}", BinaryBytes(at), BinaryBytes(total)),
            (Counts::Bytes, None) => BinaryBytes(at).to_string(),
        };
        let mut figures = vec![Figure::new(0, counted)];
        let eta = state.eta();
        if behind.tells_left && at > 0 && eta > Duration::ZERO {
            figures.push(Figure::new(1, format!("{} left", duration(eta.as_secs_f64()))));
        }
        figures.extend(behind.figures.iter().cloned());
        let room = columns().unwrap_or(COLUMNS).saturating_sub(behind.before + LEAST_BAR + 1);
        // Writing to a string cannot fail.
        let _ = write!(out, "{}", fit(figures, room));
    }
}

/// The figures with a space between them, of which those go that leave no room.
fn fit(mut figures: Vec<Figure>, room: usize) -> String {
    let width = |figures: &[Figure]| {
        figures.iter().map(|figure| measure_text_width(&figure.text) + 1).sum::<usize>().saturating_sub(1)
    };
    while width(&figures) > room && figures.len() > 1 {
        let over = width(&figures) - room;
        let Some(last) = (1..figures.len()).max_by_key(|at| (figures[*at].rank, *at)) else { break };
        let figure = &mut figures[last];
        let left = measure_text_width(&figure.text).saturating_sub(over);
        if figure.is_name && left >= LEAST_NAME && shortened(&figure.text, left) != figure.text {
            figure.text = shortened(&figure.text, left).into_owned();
        } else {
            figures.remove(last);
        }
    }
    let mut text = String::new();
    for figure in &figures {
        // Writing to a string cannot fail.
        let _ = write!(text, "{}{}", if text.is_empty() { "" } else { " " }, figure.text);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figures() -> Vec<Figure> {
        vec![
            Figure::new(0, "45/150"),
            Figure::new(1, "loss 0.6246"),
            Figure::new(5, "lr 2.0e-4"),
            Figure::new(3, "1911 tok/s"),
            Figure::new(2, "58 s left"),
        ]
    }

    #[test]
    fn what_matters_most_stays_where_there_is_little_room() {
        let of = |room| fit(figures(), room);
        assert_eq!(of(49), "45/150 loss 0.6246 lr 2.0e-4 1911 tok/s 58 s left");
        assert_eq!(of(48), "45/150 loss 0.6246 1911 tok/s 58 s left");
        assert_eq!(of(30), "45/150 loss 0.6246 58 s left");
        assert_eq!(of(20), "45/150 loss 0.6246");
        // The count stays, whatever the room.
        assert_eq!(of(0), "45/150");
    }

    #[test]
    fn a_name_is_shortened_before_a_figure_goes() {
        let of = |room| {
            fit(
                vec![Figure::new(0, "1/2"), Figure::new(1, "3 s left"), Figure::name("model.layers.11.mlp.down_proj")],
                room,
            )
        };
        assert_eq!(of(80), "1/2 3 s left model.layers.11.mlp.down_proj");
        assert_eq!(of(30), "1/2 3 s left model.la…own_proj");
        assert_eq!(of(20), "1/2 3 s left");
        assert_eq!(Figure::name("a\u{1b}[2J").text, "a\\u{1b}[2J");
    }

    #[test]
    fn the_template_is_valid() {
        assert!(ProgressStyle::with_template("{prefix} {wide_bar:.30/244} {behind}").is_ok());
    }
}
