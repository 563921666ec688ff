//! Tokenized rows on disk, so that the next start does not tokenize them again.
//!
//! An entry is one file whose name is a hash of everything that the rows depend on: each file by its path, size, time of change and its
//! first and last bytes; the tokenizer's files; the keys of `[data]` that have a part in it; the model's sizes; the version of this
//! program; the hour, where a chat template writes the time. What has changed has another name, and nothing is looked up that would have to be compared.
//! Entries that nobody used for a month are removed when a new one is written. A cache that can't be used costs a note, never the run.
//!
//! Rows go to the entry's file while they are tokenized, and a run reads them from there, mapped ([`Examples`](crate::Examples)), so that its memory does not grow
//! with them. The file has another name until it is complete: runs that begin at once write one each, and the last one stays.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use chat_text::{ChatTemplate, Tokenizer};
use serde::{Deserialize, Serialize};
use serde_json::json;
use sha2::{Digest, Sha256};

use crate::config::DataConfig;
use crate::dataset::{Dataset, SourceWeight};
use crate::examples::{Mapped, Stored, UNFINISHED, Unfinished};
use crate::judged::Judged;
use crate::load::LoadOptions;
use crate::report::DataReport;

/// Bytes of files below which tokenizing takes no time worth a copy on disk.
const WORTH_IT: u64 = 8 << 20;

/// Bytes of a file's beginning and end that are part of its name.
const ENDS: u64 = 1 << 20;

/// After so long without use an entry is removed.
const KEPT: Duration = Duration::from_secs(30 * 24 * 3600);

/// After so long without a word more, nobody is writing what is unfinished.
const ABANDONED: Duration = Duration::from_secs(24 * 3600);

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

/// What an entry holds beside rows.
#[derive(Serialize, Deserialize)]
struct Header {
    report: DataReport,
    weights: Vec<SourceWeight>,
    /// What rows say of their answers, as numbers.
    judged: Vec<u64>,
}

/// The header of an entry.
pub(crate) fn header(report: &DataReport, weights: &[SourceWeight], judged: &[Judged]) -> Vec<u8> {
    let judged: Vec<u64> = judged.iter().map(|judged| judged.code()).collect();
    // Of numbers, texts and lists of them there is always JSON.
    serde_json::to_vec(&json!({"report": report, "weights": weights, "judged": judged})).unwrap_or_default()
}

/// Says that an entry is not written, and what to do.
pub(crate) fn not_kept(path: &Path, error: &io::Error) -> String {
    format!(
        "rows are not kept in {}, but in memory, and are tokenized again at the next start: {error}; data.cache names another folder, or \"off\"",
        path.display()
    )
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
        // For whoever removes what is not used.
        drop(file.set_modified(SystemTime::now()));
        let read = Mapped::open(file).and_then(|(mapped, header)| {
            let Header { report, weights, judged } = serde_json::from_slice(&header)?;
            let judged = judged.into_iter().map(Judged::of_code).collect();
            Ok(Dataset { examples: Stored::Mapped(mapped).into(), judged, report, weights })
        });
        match read {
            Ok(data) => Some(data),
            Err(_) => {
                drop(fs::remove_file(&self.path));
                None
            }
        }
    }

    /// Begins to keep rows; the error says why they are not kept.
    pub fn begin(&self) -> Result<Unfinished, String> {
        let folder = self.path.parent().unwrap_or(Path::new("."));
        let begun = fs::create_dir_all(folder).and_then(|()| {
            remove_unused(folder);
            Unfinished::create(&self.path)
        });
        begun.map_err(|error| not_kept(&self.path, &error))
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
        let is_unfinished = entry.file_name().as_encoded_bytes().starts_with(UNFINISHED.as_bytes());
        let kept = if is_unfinished { ABANDONED } else { KEPT };
        let used = entry.metadata().and_then(|about| about.modified());
        if is_ours && used.is_ok_and(|used| used.elapsed().is_ok_and(|age| age > kept)) {
            drop(fs::remove_file(entry.path()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use crate::example::Example;
    use crate::examples::{Examples, Writer};
    use chat_text::MASKED_LABEL;

    fn rows() -> Vec<Example> {
        let row = |length: u32, line: usize| Example {
            input_ids: (0..length).map(|id| id * 7).collect(),
            labels: (0..length).map(|id| if id % 3 == 0 { MASKED_LABEL } else { i64::from(id * 7) }).collect(),
            line,
        };
        vec![row(13, 1), row(0, 4), row(20, 9 << 32 | 5)]
    }

    fn data() -> Dataset {
        let report = DataReport { sources: "rows".into(), rows: 3, notes: vec!["a".into()], ..DataReport::default() };
        Dataset {
            examples: rows().into(),
            report,
            weights: vec![SourceWeight { rows: 3, weight: 0.5 }],
            ..Dataset::default()
        }
    }

    fn keep(entry: &Entry, copies: usize) -> (Examples, Option<String>) {
        let (mut writer, data) = (Writer::new(Some(entry.begin())), data());
        for _ in 0..copies {
            data.examples.iter().for_each(|row| writer.push(&row).unwrap());
        }
        writer.finish(&header(&data.report, &data.weights, &data.judged)).unwrap()
    }

    #[test]
    fn what_is_read_is_what_was_written() {
        let folder = tempfile::tempdir().unwrap();
        let entry = Entry { path: folder.path().join("a/b.rows") };
        assert!(entry.read().is_none());
        let (written, problem) = keep(&entry, 1);
        assert_eq!((&written, problem, written.held_bytes()), (&data().examples, None, 0));
        assert!(data().examples.held_bytes() > 100);
        let read = entry.read().unwrap();
        assert_eq!((&read.examples, &read.report, &read.weights), (&written, &data().report, &data().weights));
        assert_eq!(read.examples.iter().collect::<Vec<_>>(), rows());
        assert_eq!(read.examples.lengths().collect::<Vec<_>>(), [13, 0, 20]);
        assert_eq!((read.examples.get(3), read.fingerprint()), (None, data().fingerprint()));
        assert_eq!(fs::read_dir(folder.path().join("a")).unwrap().count(), 1);
        // Whoever has a file mapped keeps it when it is removed or replaced.
        keep(&entry, 2);
        fs::remove_file(&entry.path).unwrap();
        assert_eq!((read.examples, written), (data().examples, data().examples));
    }

    /// Of a file that can't be written any more, as on a full disk, the rows go on in memory.
    #[cfg(target_os = "linux")]
    #[test]
    fn rows_of_a_file_that_breaks_off_are_taken_back() {
        let folder = tempfile::tempdir().unwrap();
        let entry = Entry { path: folder.path().join("b.rows") };
        let rows: Examples = (0..40_000).flat_map(|_| rows()).collect();
        for appends in 0..6 {
            let mut file = entry.begin().unwrap();
            file.break_after(appends);
            let mut writer = Writer::new(Some(Ok(file)));
            rows.iter().for_each(|row| writer.push(&row).unwrap());
            let (written, problem) = writer.finish(&header(&DataReport::default(), &[], &[])).unwrap();
            assert!(problem.unwrap().contains("in memory"), "{appends}");
            assert!(written == rows && written.held_bytes() > 0, "{appends}");
            assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "{appends}");
        }
    }

    #[test]
    fn a_damaged_entry_is_none_and_goes_away() {
        let folder = tempfile::tempdir().unwrap();
        let entry = Entry { path: folder.path().join("b.rows") };
        keep(&entry, 1);
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

    #[test]
    fn what_nobody_writes_or_uses_goes_away() {
        let folder = tempfile::tempdir().unwrap();
        let day = Duration::from_secs(24 * 3600);
        for (name, days) in [("unfinished-1-0.rows", 2), ("a.rows", 2), ("b.rows", 40), ("c.txt", 40)] {
            let file = File::create(folder.path().join(name)).unwrap();
            file.set_modified(SystemTime::now() - days * day).unwrap();
        }
        drop(File::create(folder.path().join("unfinished-2-0.rows")).unwrap());
        remove_unused(folder.path());
        let mut left: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["a.rows", "c.txt", "unfinished-2-0.rows"]);
    }
}
