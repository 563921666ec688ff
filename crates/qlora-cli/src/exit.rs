//! Exit codes, and how a failure reads.

use std::panic::Location;
use std::process::ExitCode;

use burn_qlora::adapter_io::printable::printable_lines;
use burn_qlora::qlora_dist::DistError;
use burn_qlora::qlora_serve::ServeError;
use burn_qlora::{ChatError, DataError, FormatError, HubError, LayerError, ModelError, TrainError};

use crate::output::say;
/// How a command ended; `qlora --help` documents the numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// Done.
    Done = 0,
    /// Failed while running.
    Failed = 1,
    /// The command line or the configuration is wrong.
    Usage = 2,
    /// The data, the checkpoint or the adapter can't be used.
    Input = 3,
    /// Another rank of the run failed.
    OtherRank = 4,
    /// Interrupted; a checkpoint was saved.
    Interrupted = 130,
}

impl From<Code> for ExitCode {
    fn from(code: Code) -> Self {
        Self::from(code as u8)
    }
}

/// A mistake on the command line that clap can't know of.
#[derive(Debug)]
pub struct UsageError(pub String);

impl std::fmt::Display for UsageError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for UsageError {}

/// A file of the command line that can't be used.
#[derive(Debug)]
pub struct InputError(pub String);

impl std::fmt::Display for InputError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for InputError {}

/// The exit code of a failure: that of the first error in its chain that is one of ours.
pub fn code_of(error: &anyhow::Error) -> Code {
    let of_one = |cause: &(dyn std::error::Error + 'static)| {
        if cause.is::<UsageError>() {
            return Some(Code::Usage);
        }
        if let Some(error) = cause.downcast_ref::<TrainError>() {
            return Some(of_train(error));
        }
        if let Some(error) = cause.downcast_ref::<DistError>() {
            return Some(of_ranks(error));
        }
        if let Some(error) = cause.downcast_ref::<DataError>() {
            return Some(of_data(error));
        }
        if let Some(error) = cause.downcast_ref::<ServeError>() {
            return Some(of_serve(error));
        }
        if cause.is::<ChatError>() || cause.is::<InputError>() {
            return Some(Code::Input);
        }
        if let Some(error) = cause.downcast_ref::<ModelError>() {
            return Some(of_model(error));
        }
        if let Some(error) = cause.downcast_ref::<HubError>() {
            return Some(of_hub(error));
        }
        cause.downcast_ref::<FormatError>().map(of_format)
    };
    error.chain().find_map(of_one).unwrap_or(Code::Failed)
}

fn of_train(error: &TrainError) -> Code {
    match error {
        TrainError::ConfigRead { .. }
        | TrainError::ConfigForeign { .. }
        | TrainError::ConfigSyntax { .. }
        | TrainError::UnknownKey { .. }
        | TrainError::ConfigMissing { .. }
        | TrainError::ConfigRange { .. } => Code::Usage,
        TrainError::Chat(_)
        | TrainError::Checkpoint { .. }
        | TrainError::Optimizer { .. }
        | TrainError::Held { .. }
        | TrainError::Occupied { .. }
        | TrainError::NothingToResume { .. } => Code::Input,
        TrainError::Stopped => Code::Interrupted,
        TrainError::Data(error) => of_data(error),
        TrainError::Ranks(error) => of_ranks(error),
        TrainError::Layer(error) => of_layer(error),
        TrainError::Hub(error) => of_hub(error),
        TrainError::Model(error) => of_model(error),
        TrainError::Format(error) => of_format(error),
        _ => Code::Failed,
    }
}

fn of_ranks(error: &DistError) -> Code {
    match error {
        DistError::Variable { .. } | DistError::Missing { .. } => Code::Usage,
        DistError::Differs { .. } => Code::Input,
        DistError::Rank { .. } => Code::OtherRank,
        _ => Code::Failed,
    }
}

fn of_data(error: &DataError) -> Code {
    match error {
        DataError::Config { .. } => Code::Usage,
        _ => Code::Input,
    }
}

fn of_model(error: &ModelError) -> Code {
    match error {
        ModelError::Device(_) | ModelError::Slots { .. } => Code::Failed,
        ModelError::NoDevice { .. }
        | ModelError::Dtype { .. }
        | ModelError::AdapterClash { .. }
        | ModelError::AdapterName { .. }
        | ModelError::Initialization { .. } => Code::Usage,
        ModelError::Layer(error) => of_layer(error),
        ModelError::Format(error) => of_format(error),
        _ => Code::Input,
    }
}

fn of_serve(error: &ServeError) -> Code {
    match error {
        ServeError::EmptyPrompt
        | ServeError::TooLong { .. }
        | ServeError::NameTaken { .. }
        | ServeError::TooManyAdapters { .. }
        | ServeError::CacheTooSmall { .. } => Code::Usage,
        ServeError::Adapter { source, .. } => of_model(source),
        ServeError::BeyondVocabulary { .. } => Code::Input,
        _ => Code::Failed,
    }
}

fn of_layer(error: &LayerError) -> Code {
    match error {
        LayerError::Read { .. } => Code::Failed,
        LayerError::Config { .. }
        | LayerError::Pattern { .. }
        | LayerError::NoTarget { .. }
        | LayerError::NoSavedModule { .. } => Code::Usage,
        _ => Code::Input,
    }
}

fn of_hub(error: &HubError) -> Code {
    match error {
        HubError::Write { .. } => Code::Failed,
        _ => Code::Input,
    }
}

fn of_format(error: &FormatError) -> Code {
    match error {
        FormatError::Write { .. } => Code::Failed,
        _ => Code::Input,
    }
}

/// The error and its causes on one line each; a cause whose text its parent repeats is left out.
pub fn chain(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1) {
        let cause = cause.to_string();
        if !text.contains(&cause) {
            text += &format!("\n  because: {cause}");
        }
    }
    // Names of files' content are in it.
    printable_lines(&text).into_owned()
}

/// Replaces Rust's panic message: a panic is a bug or a driver's failure, and a backtrace is no help
/// to the person who sees it.
pub fn install_panic_message() {
    if std::env::var_os("RUST_BACKTRACE").is_some() {
        return;
    }
    std::panic::set_hook(Box::new(|panic| {
        // chat-text catches what these libraries do with broken files, and says so in errors of its own.
        let caught = |place: &Location| ["/tokenizers-", "/minijinja-"].iter().any(|part| place.file().contains(part));
        if panic.location().is_some_and(caught) {
            return;
        }
        let message = panic.payload_as_str().unwrap_or("no message");
        let place =
            panic.location().map_or(String::new(), |place| format!(" ({}:{})", file_name(place.file()), place.line()));
        say!("error: {message}{place}");
        say!("  This is a failure of the device or a bug. RUST_BACKTRACE=1 shows where it comes from.");
    }));
}

fn file_name(path: &str) -> &str {
    path.rsplit(['/', '\\']).next().unwrap_or(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;
    use burn_qlora::TrainConfig;
    use burn_qlora::qlora_train::DeviceError;

    #[test]
    fn failures_have_their_codes() {
        let code = |error: TrainError| code_of(&anyhow::Error::from(error).context("while testing"));
        let Err(syntax) = TrainConfig::parse("[lora]\nrnak = 1\n", "x.toml") else { panic!("unknown key") };
        assert_eq!(code(syntax), Code::Usage);
        let config = |key: &str, value: &str| {
            let mut config = TrainConfig::default();
            for (key, value) in [("model.path", "m"), ("data.train", "d"), (key, value)] {
                config.set(key, value).expect("a valid key");
            }
            config.validate().expect_err("out of range")
        };
        assert_eq!(code(config("lora.rank", "0")), Code::Usage);
        assert_eq!(code(config("train.batch_size", "0")), Code::Usage);
        assert_eq!(code(config("data.max_length", "0")), Code::Usage);
        assert_eq!(code(DataError::Empty { path: "x.jsonl".into() }.into()), Code::Input);
        // Commands that read rows or a tokenizer without a run around it meet these errors bare.
        let key = DataError::Config { key: "train", problem: "is missing".into() };
        assert_eq!(code_of(&key.into()), Code::Usage);
        let template = || ChatError::NoChatTemplate { dir: "x".into() };
        assert_eq!(code_of(&template().into()), Code::Input);
        assert_eq!(code(template().into()), Code::Input);
        assert_eq!(code(TrainError::Device(DeviceError::Failed("gone".into()))), Code::Failed);
        let slots = ModelError::Slots { source: DeviceError::Host("1 MiB".into()) };
        assert_eq!(code(slots.into()), Code::Failed);
        let read = LayerError::Read { what: "a weight".into(), source: DeviceError::Host("1 MiB".into()) };
        assert_eq!(code(ModelError::Layer(read).into()), Code::Failed);
        let full = || FormatError::Write { path: "x".into(), source: std::io::ErrorKind::StorageFull.into() };
        assert_eq!(code(full().into()), Code::Failed);
        assert_eq!(code(ModelError::Format(full()).into()), Code::Failed);
        let unknown = ModelError::NoDevice { device: "x".into(), reason: "y".into() };
        assert_eq!(code(unknown.into()), Code::Usage);
        assert_eq!(code_of(&UsageError("x".into()).into()), Code::Usage);
        assert_eq!(code_of(&anyhow::anyhow!("anything else")), Code::Failed);
    }

    #[test]
    fn a_chain_does_not_repeat_itself() {
        let io = std::io::Error::other("disk on fire");
        let error = Err::<(), _>(io).context("can't save x: disk on fire").context("saving").expect_err("an error");
        assert_eq!(chain(&error), "saving\n  because: can't save x: disk on fire");
    }
}
