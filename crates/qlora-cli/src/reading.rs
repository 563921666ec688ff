//! A bar that shows how far rows are read and tokenized.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use burn_qlora::adapter_io::printable::printable;
use burn_qlora::qlora_data::LoadProgress;
use burn_qlora::qlora_train::OnRows;
use indicatif::{ProgressBar, ProgressStyle};

/// Rows that are read sooner need no bar.
const PATIENCE: Duration = Duration::from_millis(500);

/// What draws the bar. It hides itself where stderr is no terminal, and goes with the last byte.
pub fn bar() -> OnRows {
    let shown = Shown { start: Instant::now(), bar: Mutex::new(None) };
    Arc::new(move |progress| shown.update(progress))
}

struct Shown {
    start: Instant,
    bar: Mutex<Option<ProgressBar>>,
}

impl Shown {
    fn update(&self, progress: LoadProgress<'_>) {
        let LoadProgress { path, rows, bytes, total_bytes } = progress;
        let mut shown = self.bar.lock().unwrap_or_else(PoisonError::into_inner);
        let is_done = total_bytes > 0 && bytes >= total_bytes;
        if is_done || self.start.elapsed() < PATIENCE {
            if let Some(bar) = shown.take() {
                bar.finish_and_clear();
            }
            return;
        }
        let bar = shown.get_or_insert_with(|| new_bar(total_bytes));
        bar.set_position(bytes);
        let name = path.file_name().map_or_else(|| path.to_string_lossy(), |name| name.to_string_lossy());
        bar.set_message(format!("{rows} rows, {}", printable(&name)));
    }
}

impl Drop for Shown {
    fn drop(&mut self) {
        if let Some(bar) = self.bar.get_mut().unwrap_or_else(PoisonError::into_inner) {
            bar.finish_and_clear();
        }
    }
}

fn new_bar(total_bytes: u64) -> ProgressBar {
    // A pipe's end is not known.
    let (bar, template) = match total_bytes {
        0 => (ProgressBar::new_spinner(), "Tokenizing {binary_bytes} {wide_msg:.dim}"),
        total => (
            ProgressBar::new(total),
            "Tokenizing {bar:16.cyan/black} {binary_bytes}/{binary_total_bytes} {eta} {wide_msg:.dim}",
        ),
    };
    bar.set_style(ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar
}
