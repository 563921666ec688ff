//! A bar that shows how far rows are read and tokenized.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use burn_qlora::qlora_data::LoadProgress;
use burn_qlora::qlora_train::OnRows;

use crate::bars::{Bar, Counts, Figure};

/// Rows that are read sooner need no bar.
const PATIENCE: Duration = Duration::from_millis(500);

/// What draws the bar. It goes with the last byte.
pub fn bar() -> OnRows {
    let (start, shown) = (Instant::now(), Mutex::new(None));
    Arc::new(move |progress| update(&mut shown.lock().unwrap_or_else(PoisonError::into_inner), start, progress))
}

fn update(shown: &mut Option<Bar>, start: Instant, progress: LoadProgress<'_>) {
    let LoadProgress { path, rows, bytes, total_bytes } = progress;
    let is_done = total_bytes > 0 && bytes >= total_bytes;
    if is_done || start.elapsed() < PATIENCE {
        *shown = None;
        return;
    }
    // A pipe's end is not known.
    let bar = shown.get_or_insert_with(|| Bar::new("Tokenizing", total_bytes, Counts::Bytes));
    bar.at(bytes);
    let name = path.file_name().map_or_else(|| path.to_string_lossy(), |name| name.to_string_lossy());
    bar.show(vec![Figure::new(2, format!("{rows} rows")), Figure::name(&name)]);
}
