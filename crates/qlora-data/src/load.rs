//! Sources to data sets.
//!
//! A file is read piece by piece. The rows of a piece are encoded in parallel, and a piece is begun
//! when the one before is done: what is held beyond the tokens is bounded by the largest row, a broken
//! row is reported when it is met, and of several the first in the file is. Tokens go to a file of the cache
//! as they are made, or stay in memory where there is none.

mod file;

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use chat_text::{ChatTemplate, Tokenizer};
use model_hub::Hub;

use crate::cache::{self, Entry, Part};
use crate::config::{DataConfig, Format};
use crate::dataset::{Dataset, SourceWeight};
use crate::encode::EndTokens;
use crate::error::DataError;
use crate::examples::Writer;
use crate::find::{self, Found, Role, Wanted};
use crate::judged::Judged;
use crate::mapping::{Columns, Renaming};
use crate::report::DataReport;
use crate::source;
use crate::sources::{Source, Sources};
use crate::split::Split;
use crate::words::list;
use file::{FileLoader, OfSource};

/// How far the reading of rows is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadProgress<'a> {
    /// The file that is read.
    pub path: &'a Path,
    /// Rows read, of all files.
    pub rows: usize,
    /// Bytes read, of all files.
    pub bytes: u64,
    /// Bytes of all files; 0 if one of them is a pipe.
    pub total_bytes: u64,
}

/// What a caller knows of the model, and wants to know while rows are read.
#[derive(Clone, Copy)]
pub struct LoadOptions<'a> {
    /// Positions that the model was made for (`max_position_embeddings`). Rows that are longer than these, or than
    /// the tokenizer's `model_max_length`, are told.
    pub max_positions: Option<usize>,
    /// Rows of the model's embedding: a token beyond them is an error.
    pub embedding_rows: Option<usize>,
    /// Rows that are read, from the first one on, 1 or more; `None` for all.
    pub max_rows: Option<usize>,
    /// Whether rows are to evaluate on: of a folder or data set of several splits one has to be named then.
    pub evaluates: bool,
    /// Where data sets of the hub come from; `None` for the one that the environment names.
    pub hub: Option<&'a Hub>,
    /// Asked before every row, from several threads: whether to stop with [`DataError::Interrupted`].
    pub should_stop: &'a (dyn Fn() -> bool + Sync),
    /// Told after every piece of a file.
    pub progress: &'a (dyn Fn(LoadProgress<'_>) + Sync),
}

impl Default for LoadOptions<'_> {
    fn default() -> Self {
        Self {
            max_positions: None,
            embedding_rows: None,
            max_rows: None,
            evaluates: false,
            hub: None,
            should_stop: &|| false,
            progress: &|_| {},
        }
    }
}

impl std::fmt::Debug for LoadOptions<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut fields = f.debug_struct("LoadOptions");
        fields.field("max_positions", &self.max_positions).field("embedding_rows", &self.embedding_rows);
        fields.field("max_rows", &self.max_rows).field("evaluates", &self.evaluates).field("hub", &self.hub);
        fields.finish_non_exhaustive()
    }
}

/// Reads the rows of a file, folder, glob or data set of the hub.
///
/// # Errors
/// As [`load_sources`].
pub fn load_rows(path: &Path, config: &DataConfig, tokenizer: &Tokenizer) -> Result<Dataset, DataError> {
    load_rows_with(path, config, tokenizer, &LoadOptions::default())
}

/// Reads the rows of a file, folder, glob or data set of the hub, with what is known of the model.
///
/// # Errors
/// As [`load_sources`].
pub fn load_rows_with(
    path: &Path,
    config: &DataConfig,
    tokenizer: &Tokenizer,
    options: &LoadOptions<'_>,
) -> Result<Dataset, DataError> {
    load_sources(&Sources::from(path), config, tokenizer, options)
}

/// Reads the rows of sources as rows to train on, with what is known of the model.
///
/// # Errors
/// [`DataError::Source`] and [`DataError::Hub`] name a source whose files can't be found.
/// [`DataError::Read`], [`DataError::FileKind`] and [`DataError::Empty`] name the file,
/// [`DataError::Line`], [`DataError::Row`], [`DataError::OutsideEmbedding`] and [`DataError::Strict`] the first row
/// at fault and what was expected; [`DataError::AllMasked`] says why no row has anything to learn from.
/// A conversation without a usable chat template is [`DataError::Chat`]. [`DataError::Interrupted`] if the caller
/// asked to stop.
pub fn load_sources(
    sources: &Sources,
    config: &DataConfig,
    tokenizer: &Tokenizer,
    options: &LoadOptions<'_>,
) -> Result<Dataset, DataError> {
    let role = if options.evaluates { Role::Eval } else { Role::Train };
    load(sources, role, config, tokenizer, options)
}

/// Reads the training rows and the evaluation rows; the latter from their own file, or held out
/// from the training rows, or none.
///
/// # Errors
/// As [`load_splits_with`].
pub fn load_splits(config: &DataConfig, tokenizer: &Tokenizer, seed: u64) -> Result<(Dataset, Dataset), DataError> {
    load_splits_with(config, tokenizer, seed, &LoadOptions::default())
}

/// Reads the training rows and the evaluation rows, with what is known of the model.
///
/// # Errors
/// As [`load_sources`] and [`DataConfig::validate`].
pub fn load_splits_with(
    config: &DataConfig,
    tokenizer: &Tokenizer,
    seed: u64,
    options: &LoadOptions<'_>,
) -> Result<(Dataset, Dataset), DataError> {
    config.validate()?;
    let train = load(&config.train, Role::Train, config, tokenizer, options)?;
    match &config.eval {
        Some(sources) => Ok((train, load(sources, Role::Eval, config, tokenizer, options)?)),
        None if config.eval_fraction > 0.0 => train.split(config.eval_fraction, seed),
        None => Ok((train, Dataset::default())),
    }
}

/// A source with its files and what holds for it.
struct Planned<'a> {
    source: &'a Source,
    files: Vec<PathBuf>,
    format: Format,
    columns: &'a Columns,
    split: Split,
}

impl Planned<'_> {
    /// What of it decides on rows.
    fn cached(&self) -> Part<'_> {
        let Self { source, files, format, columns, split } = self;
        Part { files, settings: format!("{format} {columns:?} {split:?} {}", source.weight) }
    }

    /// The rows that are read of all that its files have.
    fn part(&self) -> Result<std::ops::Range<usize>, DataError> {
        if let Some(fixed) = self.split.fixed() {
            return Ok(fixed);
        }
        let mut rows = 0;
        for file in &self.files {
            rows += source::count(file)?;
        }
        let fail = |problem| DataError::Source { path: self.source.path.clone(), problem };
        self.split.of(rows).map_err(fail)
    }
}

fn load(
    sources: &Sources,
    role: Role,
    config: &DataConfig,
    tokenizer: &Tokenizer,
    options: &LoadOptions<'_>,
) -> Result<Dataset, DataError> {
    let mut report = DataReport::new(sources.to_string(), config.max_length);
    let (mut planned, mut any_chosen) = (Vec::new(), false);
    for source in &sources.0 {
        let split = source.split.as_deref().or(config.split.as_deref().filter(|_| role == Role::Train));
        let split: Split = split
            .map(str::parse)
            .transpose()
            .map_err(|problem| DataError::Config { key: "split", problem })?
            .unwrap_or_default();
        let wanted = Wanted {
            role,
            subset: source.subset.as_deref().or(config.subset.as_deref()),
            subset_is_of_all: source.subset.is_none(),
            split: split.name.as_deref(),
            files: source.files.as_deref(),
            revision: source.revision.as_deref(),
        };
        let Found { files, are_chosen, notes } = find::files(source, &wanted, options.hub)?;
        any_chosen |= are_chosen;
        report.notes.extend(notes.into_iter().map(|note| format!("{}: {note}", source.path.display())));
        let columns = source.columns.as_ref().unwrap_or(&config.columns);
        planned.push(Planned { source, files, format: source.format.unwrap_or(config.format), columns, split });
    }
    if let (Some(subset), Role::Train, false) = (&config.subset, role, any_chosen) {
        let problem = format!(
            "= {subset:?} chooses among the files of a folder or hub id, and {sources} names files; leave it out"
        );
        return Err(DataError::Config { key: "subset", problem });
    }
    let files: Vec<&Path> = planned.iter().flat_map(|planned| planned.files.iter().map(PathBuf::as_path)).collect();
    let loader = FileLoader {
        config,
        tokenizer,
        options,
        given: given_template(config)?,
        end: EndTokens::new(config, tokenizer)?,
        positions: positions(options, tokenizer),
        total_bytes: total_bytes(&files),
        is_alone: files.len() == 1,
    };
    let of_parts: Vec<_> = planned.iter().map(Planned::cached).collect();
    let entry = Entry::of(config, tokenizer, loader.given.as_ref(), options, &of_parts, loader.total_bytes);
    if let Some(mut data) = entry.as_ref().and_then(Entry::read) {
        // Notes are of what was found this time.
        (data.report.notes, data.report.sources) = (report.notes, report.sources);
        if let Some(path) = files.last() {
            let (rows, total_bytes) = (data.report.rows, loader.total_bytes);
            (options.progress)(LoadProgress { path, rows, bytes: total_bytes, total_bytes });
        }
        return Ok(data);
    }
    if !loader.is_alone {
        check_keys(config, &formats(&planned)?, sources)?;
    }
    let rows = Writer::new(entry.map(|entry| entry.begin()));
    let (mut data, mut weights) = (Loading { report, rows, judged: Vec::new() }, Vec::new());
    let mut done = file::Done { rows: 0, bytes: 0 };
    for (number, planned) in planned.iter().enumerate() {
        let part = planned.part()?;
        let (first, rows_before) = (data.rows.len(), done.rows);
        let renaming = Renaming::new(planned.columns);
        let of_source = OfSource { number, format: planned.format, renaming: &renaming };
        let (mut skip, mut left) = (part.start, part.len());
        for path in &planned.files {
            left = left.min(options.max_rows.map_or(usize::MAX, |rows| rows - done.rows));
            if left == 0 {
                break;
            }
            let read = loader.load(path, &of_source, (skip, left), &mut done, &mut data)?;
            skip -= read.skipped;
            left -= read.rows;
        }
        if part.start > 0 && done.rows == rows_before && left > 0 {
            let problem = "its rows end before the split begins".into();
            return Err(DataError::Source { path: planned.source.path.clone(), problem });
        }
        let unseen = renaming.unseen();
        if !unseen.is_empty() && options.max_rows.is_none() {
            let path = planned.source.path.display();
            let problem = format!(
                "reads {}, which no row of {path} has; name a column that is there (a source's own columns go before data.columns)",
                list(&unseen)
            );
            return Err(DataError::Config { key: "columns", problem });
        }
        let rows = data.rows.len() - first;
        weights.push(SourceWeight { rows, weight: planned.source.weight });
    }
    if weights.iter().all(|source| source.weight == 1.0) {
        weights.clear();
    }
    if data.rows.len() == 0 {
        return Err(DataError::AllMasked { sources: sources.to_string(), reasons: data.report.masked_reasons() });
    }
    let Loading { mut report, rows, judged } = data;
    let (examples, problem) = rows.finish(&cache::header(&report, &weights, &judged))?;
    report.notes.extend(problem.or_else(|| much(examples.held_bytes())));
    Ok(Dataset { examples, judged, report, weights })
}

/// A data set that is being read.
struct Loading {
    report: DataReport,
    rows: Writer,
    /// What rows say of their answers, where they say something.
    judged: Vec<Judged>,
}

/// What is to be known of rows that fill memory.
fn much(held_bytes: u64) -> Option<String> {
    const MUCH: u64 = 1 << 30;
    (held_bytes >= MUCH).then(|| {
        format!(
            "rows take {:.1} GiB of memory; of files and with data.cache = \"auto\", or a folder, a run reads them from there instead",
            held_bytes as f64 / MUCH as f64
        )
    })
}

/// Bytes of files; 0 if one is no plain file.
fn total_bytes(files: &[&Path]) -> u64 {
    let sizes = files.iter().map(|path| {
        let about = std::fs::metadata(path).ok().filter(std::fs::Metadata::is_file)?;
        Some(about.len())
    });
    sizes.sum::<Option<u64>>().unwrap_or(0)
}

/// The layouts of all files, each by its first row.
fn formats(planned: &[Planned<'_>]) -> Result<Vec<Format>, DataError> {
    let mut formats = Vec::new();
    for planned in planned {
        let renaming = Renaming::new(planned.columns);
        for path in planned.files.iter().filter(|path| path.is_file()) {
            formats.push(file::format_of(path, planned.format, &renaming)?);
        }
    }
    Ok(formats)
}

/// Refuses keys that have no place in rows of any of the layouts.
fn check_keys(config: &DataConfig, formats: &[Format], sources: &Sources) -> Result<(), DataError> {
    let chat = |format: &Format| *format == Format::Chat;
    let system = |format: &Format| matches!(format, Format::Chat | Format::Alpaca);
    for (key, is_given, is_used) in [
        ("chat_template", config.chat_template.is_some(), formats.iter().any(chat)),
        ("template_kwargs", !config.template_kwargs.is_empty(), formats.iter().any(chat)),
        ("system_prompt", config.system_prompt.is_some(), formats.iter().any(system)),
    ] {
        if is_given && !is_used {
            let format = formats.first().copied().unwrap_or_default();
            let problem = format!("has no place in {format} rows, which {sources} holds; leave it out");
            return Err(DataError::Config { key, problem });
        }
    }
    Ok(())
}

/// The template that `[data]` gives in place of the tokenizer's.
fn given_template(config: &DataConfig) -> Result<Option<ChatTemplate>, DataError> {
    let template = config.chat_template.as_deref().map(ChatTemplate::from_setting);
    template.transpose().map_err(|error| match error {
        // The template was compiled before a row was read: the key is what is at fault.
        error @ chat_text::ChatError::NotATemplate { .. } => {
            DataError::Config { key: "chat_template", problem: format!("= {error}") }
        }
        error => error.into(),
    })
}

/// The smaller of the lengths that model and tokenizer name, and who names it.
fn positions(options: &LoadOptions<'_>, tokenizer: &Tokenizer) -> Option<(usize, Cow<'static, str>)> {
    let of_model = options.max_positions.map(|positions| (positions, "max_position_embeddings of its config.json"));
    let of_tokenizer =
        tokenizer.model_max_length().map(|length| (length, "model_max_length of its tokenizer_config.json"));
    let least = of_model.into_iter().chain(of_tokenizer).min_by_key(|(positions, _)| *positions);
    least.map(|(positions, source)| (positions, source.into()))
}
