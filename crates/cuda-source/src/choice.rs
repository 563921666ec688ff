//! Which of several kernels takes a problem: what was forced, and a log line for each kind of problem.

use std::sync::{Mutex, OnceLock, PoisonError};

/// The choices of one operation: the environment variable that forces one, and the kinds of problem that were logged.
///
/// ```
/// use cuda_source::{Choices, choose};
///
/// static CHOICES: Choices<usize> = Choices::new("MY_KERNELS");
///
/// let candidates = [("wide", 4), ("narrow", 1)];
/// assert_eq!(choose(candidates, CHOICES.forced()), Some(4));
/// assert_eq!(choose(candidates, Some("narrow")), Some(1));
/// assert!(CHOICES.is_new(4096) && !CHOICES.is_new(4096));
/// ```
#[derive(Debug)]
pub struct Choices<Kind> {
    variable: &'static str,
    forced: OnceLock<Option<String>>,
    // Few enough that a scan is the fastest search.
    logged: Mutex<Vec<Kind>>,
}

impl<Kind: PartialEq> Choices<Kind> {
    /// Choices that the environment variable `variable` forces.
    pub const fn new(variable: &'static str) -> Self {
        Self { variable, forced: OnceLock::new(), logged: Mutex::new(Vec::new()) }
    }

    /// The variable's value; the environment is read once.
    pub fn forced(&self) -> Option<&str> {
        self.forced.get_or_init(|| std::env::var(self.variable).ok()).as_deref()
    }

    /// Whether this is the first call with an equal `kind`, which is when its choice is worth a line in the log.
    pub fn is_new(&self, kind: Kind) -> bool {
        let mut logged = self.logged.lock().unwrap_or_else(PoisonError::into_inner);
        let is_new = !logged.contains(&kind);
        if is_new {
            logged.push(kind);
        }
        is_new
    }
}

/// The first candidate, or the first of the forced name. Candidates come by preference, each with the name that forces
/// it.
pub fn choose<Path>(candidates: impl IntoIterator<Item = (&'static str, Path)>, forced: Option<&str>) -> Option<Path> {
    let mut candidates = candidates.into_iter();
    candidates.find(|(name, _)| forced.is_none_or(|forced| forced == *name)).map(|(_, path)| path)
}
