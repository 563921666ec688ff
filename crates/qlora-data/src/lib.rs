//! Rows of text to batches of tokens. Host memory only; no Burn.
//!
//! [`load_rows`] reads files of JSON lines, a JSON array, CSV, TSV or Parquet, plain or packed, of a folder, a glob or a data set of the hub,
//! writes each row as one text (a conversation through the chat
//! template), turns it into tokens and gives every token a label: its own id where the loss counts
//! it, [`MASKED_LABEL`] where it does not. Which tokens count is decided on the text, by byte
//! ranges, and carried to the tokens by their offsets; both are done by `chat_text`. [`BatchOrder`]
//! then puts the rows into batches, in an order that depends on the seed and the epoch alone. [`Examples`] are read from a file of
//! the cache where there is one, so that memory does not grow with the data.
//!
//! What is left out, cut, not read or not learned is never silent: [`DataReport`] counts it and names the lines, and
//! with [`DataConfig::strict`] it is an error. [`Preview`] shows rows as they are trained.
//!
//! ```
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata/reference/tiny-llama");
//! # let folder = tempfile::tempdir()?;
//! # let path = folder.path().join("rows.jsonl");
//! use chat_text::Tokenizer;
//! use qlora_data::{BatchOrder, DataConfig, Position, load_rows};
//!
//! std::fs::write(&path, r#"{"prompt": "2 + 2 =", "completion": " 4"}"#)?;
//! let tokenizer = Tokenizer::from_dir(dir)?;
//! let config = DataConfig::default();
//! let rows = load_rows(&path, &config, &tokenizer)?;
//! // Batches of 4 rows with seed 42; one can begin anywhere.
//! let order = BatchOrder::new(&rows.examples, &config, 4, 42, tokenizer.padding_id());
//! let mut batches = order.batches_from(&rows.examples, Position { epoch: 3, batch: 0 });
//! let batch = batches.next().expect("the file has a row");
//! assert_eq!((batch.rows, batch.label_tokens()), (1, 2)); // ` 4` and the end of the text
//! # Ok(())
//! # }
//! ```

mod batch;
mod cache;
mod config;
mod dataset;
mod encode;
mod error;
mod example;
mod examples;
mod find;
mod formats;
mod judged;
mod load;
mod mapping;
mod notice;
mod order;
mod packing;
mod place;
pub mod preview;
mod report;
mod shuffle;
mod source;
mod sources;
mod split;
mod visible;
mod words;

pub use batch::{Batch, Padding, padding_id};
pub use cache::RowCache;
pub use chat_text::MASKED_LABEL;
pub use config::{DataConfig, Format, LossOn};
pub use dataset::{Dataset, SourceWeight};
pub use error::DataError;
pub use example::Example;
pub use examples::Examples;
pub use judged::{Judged, JudgedRows, Side};
pub use load::{LoadOptions, LoadProgress, load_rows, load_rows_with, load_sources, load_splits, load_splits_with};
pub use mapping::Columns;
pub use notice::{Notice, NoticeFacts, NoticeKind};
pub use order::{BatchOrder, Batches, Position};
pub use packing::{Packed, Packing};
pub use place::{Place, Unit};
pub use preview::{Preview, PreviewChoice, PreviewRow, PreviewToken};
pub use report::{DataReport, FileReport, MaskReason, MaskedRow, TruncatedRow};
pub use sources::{Source, Sources};
