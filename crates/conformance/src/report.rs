//! What was compared and what came of it.

use std::fmt;

/// One comparison.
#[derive(Debug, Clone)]
pub struct Case {
    /// Section, subject and quantity.
    pub name: String,
    /// The error, in the unit that the name or the section's documentation gives; NaN when there was
    /// nothing to compare because something failed.
    pub error: f64,
    /// The largest error that passes.
    pub bar: f64,
    /// Whether it passes.
    pub ok: bool,
    /// What else is to be said; often empty.
    pub note: String,
}

/// One line of a report.
#[derive(Debug, Clone)]
pub enum Line {
    /// A comparison.
    Case(Case),
    /// Something that was not compared.
    Skipped {
        /// What.
        name: String,
        /// Why.
        reason: String,
    },
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Skipped { name, reason } => write!(f, "skip  {name}: {reason}"),
            Self::Case(Case { name, error, bar, ok, note }) => {
                let status = if *ok { "ok  " } else { "FAIL" };
                write!(f, "{status}  {name}  error {} bar {}", number(*error), number(*bar))?;
                if note.is_empty() { Ok(()) } else { write!(f, "  ({note})") }
            }
        }
    }
}

fn number(x: f64) -> String {
    if x == 0.0 || (x.fract() == 0.0 && x.abs() < 1e6) { format!("{x}") } else { format!("{x:.2e}") }
}

/// What is called with every line.
type Listener<'a> = Box<dyn FnMut(&Line) + 'a>;

/// Collects lines, and passes each on as it comes.
#[derive(Default)]
pub struct Report<'a> {
    lines: Vec<Line>,
    on_line: Option<Listener<'a>>,
}

impl<'a> Report<'a> {
    /// An empty report.
    pub fn new() -> Self {
        Self::default()
    }

    /// An empty report that calls `on_line` with every line as it is added.
    pub fn with_listener(on_line: impl FnMut(&Line) + 'a) -> Self {
        Self { lines: Vec::new(), on_line: Some(Box::new(on_line)) }
    }

    /// Adds a comparison, which passes when `error` is at most `bar`.
    pub fn compare(&mut self, name: impl Into<String>, error: f64, bar: f64) {
        self.compare_noted(name, error, bar, "");
    }

    /// [`Self::compare`] with something else to be said.
    pub fn compare_noted(&mut self, name: impl Into<String>, error: f64, bar: f64, note: impl Into<String>) {
        let case = Case { name: name.into(), error, bar, ok: error <= bar, note: note.into() };
        self.push(Line::Case(case));
    }

    /// Adds a failure that left nothing to compare.
    pub fn fail(&mut self, name: impl Into<String>, reason: &str) {
        self.compare_noted(name, f64::NAN, 0.0, reason);
    }

    /// Adds something that was not compared.
    pub fn skip(&mut self, name: impl Into<String>, reason: impl Into<String>) {
        self.push(Line::Skipped { name: name.into(), reason: reason.into() });
    }

    fn push(&mut self, line: Line) {
        if let Some(on_line) = &mut self.on_line {
            on_line(&line);
        }
        self.lines.push(line);
    }

    /// All lines so far.
    pub fn lines(&self) -> &[Line] {
        &self.lines
    }

    /// The comparisons.
    pub fn cases(&self) -> impl Iterator<Item = &Case> {
        self.lines.iter().filter_map(|line| match line {
            Line::Case(case) => Some(case),
            Line::Skipped { .. } => None,
        })
    }

    /// How many comparisons passed.
    pub fn passed(&self) -> usize {
        self.cases().filter(|case| case.ok).count()
    }

    /// How many comparisons failed.
    pub fn failed(&self) -> usize {
        self.cases().filter(|case| !case.ok).count()
    }
}
