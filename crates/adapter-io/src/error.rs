//! The one error type of this crate.

use std::path::PathBuf;

use safetensors::Dtype;

/// What can be wrong with a checkpoint or an adapter, or with writing one.
///
/// Every variant names the file, and where there is one the tensor or field, and says what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FormatError {
    /// A file or folder could not be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// A file or folder could not be written; what was there before is still there.
    #[error("cannot write {}: {source}{}; nothing was replaced, what was there before is unchanged", path.display(), write_hint(source))]
    Write {
        /// The file or folder that was to be written.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// A file or folder could not be removed.
    #[error("cannot remove {}: {source}; remove it by hand", path.display())]
    Remove {
        /// The file or folder.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// A folder that was to be removed holds something that this program did not write.
    #[error("{} is not removed: it holds `{entry}`, which this program did not write; move that elsewhere", dir.display())]
    Foreign {
        /// The folder.
        dir: PathBuf,
        /// The first name that is not known.
        entry: String,
    },
    /// A file is not what its checksum says.
    #[error("{} is damaged: {reason}", file.display())]
    Damaged {
        /// The file.
        file: PathBuf,
        /// What differs, and what to do.
        reason: String,
    },
    /// A folder holds no checkpoint that can be read.
    #[error("{} holds neither model.safetensors nor model.safetensors.index.json{hint}", dir.display())]
    NoCheckpoint {
        /// The folder.
        dir: PathBuf,
        /// What it holds instead, as the end of a sentence; may be empty.
        hint: String,
    },
    /// The index of a sharded checkpoint names a file that is not there.
    #[error(
        "{} is missing: {} names it for {tensors} tensors (the first is `{first}`); download the file again, the checkpoint is incomplete",
        shard.display(), index.display()
    )]
    MissingShard {
        /// The index.
        index: PathBuf,
        /// The file it names.
        shard: PathBuf,
        /// How many tensors the index places there.
        tensors: usize,
        /// The first of them.
        first: String,
    },
    /// A file name inside a checkpoint leads out of the checkpoint's folder.
    #[error("{} names the file `{entry}`, which {reason}; only files inside the checkpoint's own folder are opened", source_file.display())]
    UnsafePath {
        /// The index, or the folder, that holds the name.
        source_file: PathBuf,
        /// The name.
        entry: String,
        /// Why it is refused.
        reason: String,
    },
    /// A safetensors header, or the index of a sharded checkpoint, breaks the rules of its format.
    #[error("{}: {reason}", file.display())]
    Header {
        /// The file.
        file: PathBuf,
        /// What is wrong, with the tensor's name where one is at fault.
        reason: String,
    },
    /// A safetensors file ends before its data does.
    #[error(
        "{} is cut short: tensor `{tensor}` needs {expected} bytes of file, there are {actual}; download or copy the file again",
        file.display()
    )]
    Truncated {
        /// The file.
        file: PathBuf,
        /// The first tensor that does not lie wholly in it.
        tensor: String,
        /// The size the header asks for.
        expected: u64,
        /// The size the file has.
        actual: u64,
    },
    /// A tensor that is needed is not there.
    #[error("{} has no tensor `{tensor}`{}", path.display(), nearest_hint(nearest))]
    MissingTensor {
        /// The checkpoint or file.
        path: PathBuf,
        /// The name asked for.
        tensor: String,
        /// The names that come closest.
        nearest: Vec<String>,
    },
    /// A tensor has another shape than its place in the model asks for.
    #[error(
        "{}: tensor `{tensor}` has shape {actual:?}, expected {expected:?}; do config.json and the weights belong together?",
        file.display()
    )]
    Shape {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// The shape that was asked for.
        expected: Vec<usize>,
        /// The shape the file gives.
        actual: Vec<usize>,
    },
    /// A tensor has a data type that cannot be used where it stands.
    #[error("{}: tensor `{tensor}` has data type {dtype}, expected {expected}", file.display())]
    Dtype {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// The data type the file gives.
        dtype: Dtype,
        /// What would do, in words.
        expected: &'static str,
    },
    /// A tensor holds NaN or an infinity.
    #[error(
        "{}: tensor `{tensor}` is {value} at element {index}: whatever is computed with it is no number either; download or copy the file again, or take an earlier checkpoint",
        file.display()
    )]
    NotFinite {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// The first such element, counted row-major from 0.
        index: usize,
        /// Its value.
        value: f64,
    },
    /// A bitsandbytes 4-bit weight is inconsistent.
    #[error("{}: the 4-bit weight `{tensor}` cannot be read: {reason}", file.display())]
    QuantState {
        /// The file.
        file: PathBuf,
        /// The tensor at fault.
        tensor: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A weight in another storage than plain floats is inconsistent.
    #[error("{}: `{tensor}`, of which a weight is decoded: {reason}", file.display())]
    Coded {
        /// The file.
        file: PathBuf,
        /// The tensor at fault.
        tensor: String,
        /// What is wrong with it, and what to do.
        reason: String,
    },
    /// A JSON file is not JSON, or not an object.
    #[error("{} is not valid JSON: {reason}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why.
        reason: String,
    },
    /// A field of a JSON file has a value that cannot be used.
    #[error("{}: field `{field}`: {reason}", path.display())]
    Field {
        /// The file.
        path: PathBuf,
        /// The field's name.
        field: String,
        /// What is wrong and what would be right.
        reason: String,
    },
    /// A folder is not a PEFT adapter.
    #[error("{} is not a PEFT adapter: {reason}", dir.display())]
    NotAnAdapter {
        /// The folder.
        dir: PathBuf,
        /// What is missing.
        reason: String,
    },
    /// A key of `adapter_model.safetensors` does not follow PEFT's scheme.
    #[error("{}: key `{key}`: {reason}", file.display())]
    AdapterKey {
        /// The file.
        file: PathBuf,
        /// The key.
        key: String,
        /// What is wrong, and the cure.
        reason: String,
    },
    /// The two factors of an adapter module do not fit together, or not the weight they adapt.
    #[error("adapter module `{module}`: {reason}")]
    Factors {
        /// The module's path.
        module: String,
        /// What does not fit.
        reason: String,
    },
    /// A weight has no low-rank part of the kind asked for.
    #[error("a weight of shape {shape:?} cannot be decomposed: {reason}")]
    Decompose {
        /// The weight's shape.
        shape: Vec<usize>,
        /// Why, and what would do.
        reason: String,
    },
    /// A module cannot be quantized by GPTQ.
    #[error("module `{module}` cannot be quantized by GPTQ: {reason}")]
    Gptq {
        /// The module's path.
        module: String,
        /// Why, and what would do.
        reason: String,
    },
    /// Adapters cannot be combined.
    #[error("these adapters cannot be combined: {reason}")]
    Combine {
        /// Why, and what would do.
        reason: String,
    },
    /// A writer was given something other than what was announced to it.
    #[error("{}: tensor `{tensor}`: {reason}", path.display())]
    Plan {
        /// The folder that is written.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// What differs.
        reason: String,
    },
}

fn write_hint(source: &std::io::Error) -> &'static str {
    use std::io::ErrorKind;
    match source.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => " (free some space, or write to another disk)",
        ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => " (choose a folder that you may write to)",
        ErrorKind::NotFound => " (does the folder exist?)",
        _ => "",
    }
}

fn nearest_hint(nearest: &[String]) -> String {
    match nearest {
        [] => String::new(),
        [one] => format!("; the nearest name is `{one}`"),
        many => {
            format!("; the nearest names are {}", many.iter().map(|n| format!("`{n}`")).collect::<Vec<_>>().join(", "))
        }
    }
}

/// The longest name that others are compared with: the comparison takes the square of it.
const MAX_COMPARED: usize = 512;

/// The names most like `name`, at most three, best first; nothing when none is alike.
pub(crate) fn nearest_names<'a>(name: &str, candidates: impl Iterator<Item = &'a str>) -> Vec<String> {
    // Whole names differ in one path segment as a rule, so a plain edit distance ranks well; beyond
    // half the length two names have little to do with each other.
    let limit = name.len().div_ceil(2);
    if name.len() > MAX_COMPARED {
        return Vec::new();
    }
    let mut scored: Vec<(usize, &str)> = candidates
        .filter(|c| c.len().abs_diff(name.len()) <= limit)
        .map(|c| (strsim::levenshtein(name, c), c))
        .filter(|(distance, _)| *distance <= limit)
        .collect();
    scored.sort_unstable();
    scored.into_iter().take(3).map(|(_, c)| c.to_string()).collect()
}
