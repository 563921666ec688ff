//! Tokenized rows on disk, so that the next start does not tokenize them again.
//!
//! An entry is one file whose name is a hash of everything that the rows depend on: each file by its path, size, time of change and its
//! first and last bytes; the tokenizer's files; the keys of `[data]` that have a part in it; the model's sizes; the version of this
//! program; the hour, where a chat template writes the time. What has changed has another name, and nothing is looked up that would have to be compared.
//! Entries that nobody used for a month are removed when a new one is written. A cache that can't be used costs a note, never the run.
//!
//! The file: [`MAGIC`]; the length of a JSON header as u64 and the header, with the report and the weights; for each row its tokens as u32 and its line as
//! u64; all ids as u32; for each token a bit, whether it is learned, in bytes; and a CRC-32 of all of it. Little-endian.

use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use chat_text::{ChatTemplate, MASKED_LABEL, Tokenizer};
use flate2::Crc;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::json;
use sha2::{Digest, Sha256};

use crate::config::DataConfig;
use crate::dataset::{Dataset, SourceWeight};
use crate::example::Example;
use crate::load::LoadOptions;
use crate::report::DataReport;

/// What an entry begins with; its last byte is the version of its form.
const MAGIC: &[u8; 8] = b"qlrows\0\x01";

/// Bytes of files below which tokenizing takes no time worth a copy on disk.
const WORTH_IT: u64 = 8 << 20;

/// Bytes of a file's beginning and end that are part of its name.
const ENDS: u64 = 1 << 20;

/// After so long without use an entry is removed.
const KEPT: Duration = Duration::from_secs(30 * 24 * 3600);

/// What rows come from the tokenizer's folder by.
const TOKENIZER_FILES: [&str; 10] = [
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
    "config.json",
];

/// `data.cache`: where tokenized rows are kept.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub enum RowCache {
    /// `burn-qlora/rows` in the user's cache directory, for files of 8 MiB and more.
    #[default]
    Auto,
    /// Nowhere.
    Off,
    /// A folder, for files of any size.
    Folder(PathBuf),
}

impl From<String> for RowCache {
    fn from(text: String) -> Self {
        match text.as_str() {
            "auto" | "" => Self::Auto,
            "off" => Self::Off,
            _ => Self::Folder(text.into()),
        }
    }
}

impl From<RowCache> for String {
    fn from(cache: RowCache) -> Self {
        match cache {
            RowCache::Auto => "auto".into(),
            RowCache::Off => "off".into(),
            RowCache::Folder(folder) => folder.to_string_lossy().into_owned(),
        }
    }
}

impl RowCache {
    pub(crate) fn is_auto(&self) -> bool {
        *self == Self::Auto
    }

    /// A folder for something else that is worth keeping for the next start, under this name beside the rows; `None` where nothing is kept.
    pub fn folder_of(&self, name: &str) -> Option<PathBuf> {
        let rows = self.folder(u64::MAX)?;
        match self {
            Self::Folder(folder) => Some(folder.clone()),
            _ => Some(rows.with_file_name(name)),
        }
    }

    /// The folder for files of so many bytes; 0 for those that are no plain files and are never kept.
    fn folder(&self, bytes: u64) -> Option<PathBuf> {
        match self {
            Self::Off => None,
            Self::Folder(folder) => (bytes > 0).then(|| folder.clone()),
            Self::Auto if bytes < WORTH_IT => None,
            Self::Auto => {
                let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
                let cache =
                    set("XDG_CACHE_HOME").or_else(|| Some(set("HOME").or_else(std::env::home_dir)?.join(".cache")))?;
                Some(cache.join("burn-qlora").join("rows"))
            }
        }
    }
}

/// The place of one data set in the cache.
pub(crate) struct Entry {
    path: PathBuf,
}

/// A source: its files, and what else of it decides on rows.
pub(crate) struct Part<'a> {
    pub files: &'a [PathBuf],
    /// In words that differ where the rows may.
    pub settings: String,
}

/// The header of an entry.
#[derive(Serialize, Deserialize)]
struct Header {
    rows: usize,
    tokens: usize,
    report: DataReport,
    weights: Vec<SourceWeight>,
}

impl Entry {
    /// The entry of a data set; `None` where none is kept. What can't be read here is told when its rows are.
    pub fn of(
        config: &DataConfig,
        tokenizer: &Tokenizer,
        template: Option<&ChatTemplate>,
        options: &LoadOptions<'_>,
        parts: &[Part<'_>],
        total_bytes: u64,
    ) -> Option<Self> {
        let folder = config.cache.folder(total_bytes)?;
        let template = template.or(tokenizer.chat_template()).map(ChatTemplate::source).unwrap_or_default();
        let hour = template
            .contains("strftime_now")
            .then(|| SystemTime::UNIX_EPOCH.elapsed().ok().map(|now| now.as_secs() / 3600));
        let mut hash = Sha256::new();
        let settings = json!({
            "version": env!("CARGO_PKG_VERSION"),
            "max_length": config.max_length,
            "loss_on": config.loss_on,
            "system_prompt": config.system_prompt,
            "template": template,
            "template_kwargs": config.template_kwargs,
            "end_token": config.end_token,
            "strict": config.strict,
            "max_positions": options.max_positions,
            "embedding_rows": options.embedding_rows,
            "max_rows": options.max_rows,
            "hour": hour,
        });
        add(&mut hash, settings.to_string().as_bytes());
        for name in TOKENIZER_FILES {
            add(&mut hash, &fs::read(tokenizer.dir().join(name)).unwrap_or_default());
        }
        for part in parts {
            add(&mut hash, part.settings.as_bytes());
            for file in part.files {
                add(&mut hash, &identity(file).ok()?);
            }
        }
        let name: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        Some(Self { path: folder.join(format!("{name}.rows")) })
    }

    /// The data set as it was kept; `None` if it was not, or is damaged.
    pub fn read(&self) -> Option<Dataset> {
        let file = File::open(&self.path).ok()?;
        let length = file.metadata().ok()?.len();
        // For whoever removes what is not used.
        drop(file.set_modified(SystemTime::now()));
        match read(BufReader::with_capacity(1 << 20, file), length) {
            Ok(data) => Some(data),
            Err(_) => {
                drop(fs::remove_file(&self.path));
                None
            }
        }
    }

    /// Keeps a data set; the error says why it is not.
    pub fn write(&self, data: &Dataset) -> Result<(), String> {
        let fail = |error: io::Error| {
            format!(
                "rows are not kept in {}: {error}; data.cache names another folder, or \"off\"",
                self.path.display()
            )
        };
        let folder = self.path.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(folder).map_err(fail)?;
        remove_unused(folder);
        static WRITTEN: AtomicU64 = AtomicU64::new(0);
        let count = WRITTEN.fetch_add(1, Ordering::Relaxed);
        let unfinished = folder.join(format!("unfinished-{}-{count}.rows", std::process::id()));
        let written = File::create(&unfinished).and_then(|file| write(file, data));
        let written = written.and_then(|()| fs::rename(&unfinished, &self.path));
        written.map_err(|error| {
            drop(fs::remove_file(&unfinished));
            fail(error)
        })
    }
}

/// Adds bytes that end where they end.
fn add(hash: &mut Sha256, bytes: &[u8]) {
    hash.update((bytes.len() as u64).to_le_bytes());
    hash.update(bytes);
}

/// What a file is known by.
fn identity(path: &Path) -> io::Result<Vec<u8>> {
    let mut file = File::open(path)?;
    let about = file.metadata()?;
    let changed = about.modified()?.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let mut identity = fs::canonicalize(path)?.into_os_string().into_encoded_bytes();
    identity.extend(about.len().to_le_bytes());
    identity.extend(changed.as_nanos().to_le_bytes());
    let mut ends = Vec::new();
    Read::by_ref(&mut file).take(ENDS).read_to_end(&mut ends)?;
    if about.len() > 2 * ENDS {
        io::Seek::seek(&mut file, io::SeekFrom::End(-(ENDS as i64)))?;
    }
    file.take(ENDS).read_to_end(&mut ends)?;
    identity.extend(Sha256::digest(&ends));
    Ok(identity)
}

fn remove_unused(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let is_ours = entry.path().extension().is_some_and(|extension| extension == "rows");
        let used = entry.metadata().and_then(|about| about.modified());
        if is_ours && used.is_ok_and(|used| used.elapsed().is_ok_and(|age| age > KEPT)) {
            drop(fs::remove_file(entry.path()));
        }
    }
}

/// Writes and reads through a checksum.
struct Checked<T> {
    inner: T,
    crc: Crc,
}

impl<W: Write> Checked<W> {
    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.crc.update(bytes);
        self.inner.write_all(bytes)
    }
}

impl<R: Read> Checked<R> {
    fn take(&mut self, length: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        self.inner.read_exact(&mut bytes)?;
        self.crc.update(&bytes);
        Ok(bytes)
    }
}

fn write(file: File, data: &Dataset) -> io::Result<()> {
    let tokens = data.examples.iter().map(|example| example.input_ids.len()).sum();
    let header =
        Header { rows: data.examples.len(), tokens, report: data.report.clone(), weights: data.weights.clone() };
    let header = serde_json::to_vec(&header)?;
    let mut out = Checked { inner: BufWriter::with_capacity(1 << 20, file), crc: Crc::new() };
    out.put(MAGIC)?;
    out.put(&(header.len() as u64).to_le_bytes())?;
    out.put(&header)?;
    let mut bytes = Vec::new();
    for example in &data.examples {
        let length = u32::try_from(example.input_ids.len()).map_err(io::Error::other)?;
        out.put(&length.to_le_bytes())?;
        out.put(&(example.line as u64).to_le_bytes())?;
    }
    for example in &data.examples {
        bytes.clear();
        bytes.extend(example.input_ids.iter().flat_map(|id| id.to_le_bytes()));
        out.put(&bytes)?;
    }
    let (mut byte, mut filled) = (0_u8, 0);
    for label in data.examples.iter().flat_map(|example| &example.labels) {
        byte |= u8::from(*label != MASKED_LABEL) << filled;
        filled += 1;
        if filled == 8 {
            out.put(&[byte])?;
            (byte, filled) = (0, 0);
        }
    }
    if filled > 0 {
        out.put(&[byte])?;
    }
    let sum = out.crc.sum();
    out.inner.write_all(&sum.to_le_bytes())?;
    out.inner.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()
}

fn read(reader: impl Read, length: u64) -> io::Result<Dataset> {
    let damaged = || io::Error::from(io::ErrorKind::InvalidData);
    let mut from = Checked { inner: reader, crc: Crc::new() };
    if from.take(MAGIC.len())? != MAGIC {
        return Err(damaged());
    }
    let of_header = u64::from_le_bytes(from.take(8)?.try_into().map_err(|_| damaged())?);
    if of_header > length {
        return Err(damaged());
    }
    let Header { rows, tokens, report, weights } = serde_json::from_slice(&from.take(of_header as usize)?)?;
    // A damaged header must not ask for more memory than the file could fill.
    let whole = 8 + 8 + u128::from(of_header) + 12 * rows as u128 + 4 * tokens as u128 + tokens.div_ceil(8) as u128 + 4;
    if whole != u128::from(length) {
        return Err(damaged());
    }
    let index = from.take(12 * rows)?;
    let ids = from.take(4 * tokens)?;
    let learned = from.take(tokens.div_ceil(8))?;
    let mut sum = [0; 4];
    from.inner.read_exact(&mut sum)?;
    if u32::from_le_bytes(sum) != from.crc.sum() {
        return Err(damaged());
    }
    let mut places = Vec::with_capacity(rows);
    let mut first = 0_usize;
    for entry in index.as_chunks::<12>().0 {
        let [a, b, c, d, line @ ..] = *entry;
        let count = u32::from_le_bytes([a, b, c, d]) as usize;
        places.push((first, count, u64::from_le_bytes(line) as usize));
        first += count;
    }
    if first != tokens {
        return Err(damaged());
    }
    let ids = ids.as_chunks::<4>().0;
    let examples = places.into_par_iter().map(|(first, count, line)| {
        let input_ids: Vec<u32> = ids[first..first + count].iter().map(|id| u32::from_le_bytes(*id)).collect();
        let is_learned = |at: usize| learned[at / 8] >> (at % 8) & 1 == 1;
        let label = |(at, id): (usize, &u32)| if is_learned(first + at) { i64::from(*id) } else { MASKED_LABEL };
        let labels = input_ids.iter().enumerate().map(label).collect();
        Example { input_ids, labels, line }
    });
    Ok(Dataset { examples: examples.collect(), report, weights, ..Dataset::default() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data() -> Dataset {
        let row = |length: u32, line: usize| Example {
            input_ids: (0..length).map(|id| id * 7).collect(),
            labels: (0..length).map(|id| if id % 3 == 0 { MASKED_LABEL } else { i64::from(id * 7) }).collect(),
            line,
        };
        let report = DataReport { sources: "rows".into(), rows: 3, notes: vec!["a".into()], ..DataReport::default() };
        Dataset {
            examples: vec![row(13, 1), row(0, 4), row(20, 9)],
            report,
            weights: vec![SourceWeight { rows: 3, weight: 0.5 }],
            ..Dataset::default()
        }
    }

    #[test]
    fn what_is_read_is_what_was_written() {
        let folder = tempfile::tempdir().unwrap();
        let entry = Entry { path: folder.path().join("a/b.rows") };
        assert!(entry.read().is_none());
        entry.write(&data()).unwrap();
        let read = entry.read().unwrap();
        assert_eq!((read.examples, read.report, read.weights), (data().examples, data().report, data().weights));
    }

    #[test]
    fn a_damaged_entry_is_none_and_goes_away() {
        let folder = tempfile::tempdir().unwrap();
        let entry = Entry { path: folder.path().join("b.rows") };
        entry.write(&data()).unwrap();
        let whole = fs::read(&entry.path).unwrap();
        for at in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= 0x40;
            fs::write(&entry.path, bytes).unwrap();
            assert!(entry.read().is_none(), "byte {at}");
            assert!(!entry.path.exists());
            fs::write(&entry.path, &whole[..at]).unwrap();
            assert!(entry.read().is_none(), "the first {at} bytes");
        }
    }
}
