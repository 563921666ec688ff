//! The rows of a column: as training would label them, with the settings that the adapter was trained with.

use std::collections::HashSet;
use std::rc::Rc;

use anyhow::Result;
use burn_qlora::chat_text::{PromptLayout, Prompting};
use burn_qlora::qlora_data::{DataReport, LoadOptions, LoadProgress, MASKED_LABEL, Source, Sources, load_sources};
use burn_qlora::qlora_serve::eval::{Question, Row};
use burn_qlora::{DataConfig, DataError, Dataset, ModelConfig, Tokenizer, TrainConfig};

use super::Column;
use crate::args::EvalArgs;
use crate::exit::{Code, InputError, UsageError, chain, code_of};
use crate::hub;
use crate::output::say;
use crate::prompts::Voice;
use crate::reading;

/// A row that is measured.
pub struct EvalRow {
    /// The number of its file in the report.
    pub file: usize,
    /// Its line of the file.
    pub line: usize,
    /// Its tokens.
    pub row: Row,
    /// What is asked, where the row has a question and its answer was not cut.
    pub question: Option<Question>,
}

/// The rows of a file, in one way of writing them.
pub struct Rows {
    /// How they were read.
    config: DataConfig,
    /// The tokens that end an answer.
    pub stop_ids: Vec<u32>,
    /// The rows.
    pub rows: Vec<EvalRow>,
    /// What was read, cut and left out.
    pub report: DataReport,
    /// The SHA-256 of tokens and labels.
    pub fingerprint: String,
    /// Rows whose answer was cut to the length that rows may have.
    pub cut: usize,
}

impl Rows {
    /// How many rows have something to ask.
    pub fn questions(&self) -> usize {
        self.rows.iter().filter(|row| row.question.is_some()).count()
    }

    fn load(args: &EvalArgs, voice: &Voice, tokenizer: &Tokenizer, model: &ModelConfig) -> Result<Self> {
        let mut config = data_config(args, &voice.prompting)?;
        let (hub, reading) = (hub::hub(), reading::bar());
        let progress = |progress: LoadProgress<'_>| reading(progress);
        let options = LoadOptions {
            max_positions: Some(model.max_position_embeddings),
            embedding_rows: Some(model.vocab_size),
            max_rows: args.limit.map(|rows| rows as usize),
            evaluates: true,
            hub: Some(&hub),
            progress: &progress,
            ..LoadOptions::default()
        };
        let data = loop {
            match load_sources(&config.train, &config, tokenizer, &options) {
                Err(DataError::Config { key, .. }) if forget(&mut config, args, key) => {
                    if voice.adapter.is_some() {
                        let (name, file) = (&voice.name, args.data.display());
                        say!("note: {name} has a {} that has no place in the rows of {file}", key.replace('_', " "));
                    }
                }
                loaded => break loaded.map_err(|error| of_flags(&error.into()))?,
            }
        };
        let stop_ids = voice.prompting.stop_ids(tokenizer);
        let files = data.report.files.iter().enumerate();
        let was_cut: HashSet<(usize, usize)> =
            files.flat_map(|(number, file)| file.truncated.iter().map(move |row| (number, row.line))).collect();
        let (fingerprint, mut cut) = (data.fingerprint(), 0);
        let Dataset { examples, report, .. } = data;
        let files = report.files.iter().enumerate();
        let file_of_rows = files.flat_map(|(number, file)| std::iter::repeat_n(number, file.rows));
        let rows = examples.iter().zip(file_of_rows).map(|(example, file)| {
            let is_cut = was_cut.contains(&(file, example.line));
            let learned = example.labels.iter().map(|label| *label != MASKED_LABEL).collect();
            let row = Row { ids: example.input_ids, learned };
            let question = match is_cut {
                true => None,
                false => row.question(tokenizer, &stop_ids)?,
            };
            cut += usize::from(is_cut);
            Ok(EvalRow { file, line: example.line, row, question })
        });
        let rows = rows.collect::<Result<_>>()?;
        Ok(Self { config, stop_ids, rows, report, fingerprint, cut })
    }
}

/// The columns, with rows that are read once for all that have them written alike.
pub fn columns(
    args: &EvalArgs,
    voices: impl Iterator<Item = Voice>,
    tokenizer: &Tokenizer,
    model: &ModelConfig,
) -> Result<Vec<Column>> {
    let (mut columns, mut told): (Vec<Column>, HashSet<String>) = (Vec::new(), HashSet::new());
    for voice in voices {
        let config = data_config(args, &voice.prompting)?;
        let alike = columns.iter().find(|other| {
            let theirs = data_config(args, &other.voice.prompting).ok();
            theirs.as_ref() == Some(&config)
        });
        let rows = match alike {
            Some(other) => other.rows.clone(),
            None => Rc::new(Rows::load(args, &voice, tokenizer, model)?),
        };
        for warning in rows.report.warnings().iter().map(|warning| with_flags(warning)) {
            if told.insert(warning.clone()) {
                say!("warning: {warning}");
            }
        }
        columns.push(Column { voice, rows });
    }
    Ok(columns)
}

/// `[data]` of a run whose rows would be written as this adapter is prompted.
fn data_config(args: &EvalArgs, prompting: &Prompting) -> Result<DataConfig> {
    // The keys mean what they mean in a configuration, and are checked as there.
    let mut config = TrainConfig::default();
    for (key, value) in [("data.format", &args.format), ("data.loss_on", &args.loss_on)] {
        config.set(key, value).map_err(|error| of_flags(&error.into()))?;
    }
    let is_chat = prompting.settings.layout == PromptLayout::Chat;
    let settings = &prompting.settings;
    let kept = settings.system_prompt.clone().filter(|_| settings.layout != PromptLayout::Plain);
    Ok(DataConfig {
        train: Sources(vec![Source {
            subset: args.subset.clone(),
            split: args.split.clone(),
            ..Source::new(&args.data)
        }]),
        max_length: args.max_length as usize,
        system_prompt: args.writing.system.clone().or(kept),
        chat_template: prompting.template.as_ref().filter(|_| is_chat).map(|template| template.source().to_string()),
        template_kwargs: if is_chat { settings.template_kwargs.clone() } else { Default::default() },
        end_token: settings.end_token.clone(),
        ..config.data
    })
}

/// The flags that stand for keys of `[data]` here; rows are read by what knows of the keys.
const FLAGS: [(&str, &str); 13] = [
    ("data.eval = { path = \"..\", split = \"..\" }", "--split NAME"),
    ("data.loss_on = \"all\"", "--loss-on all"),
    ("data.max_length = ", "--max-length "),
    ("data.loss_on = ", "--loss-on "),
    ("data.format = ", "--format "),
    ("data.max_length", "--max-length"),
    ("data.loss_on", "--loss-on"),
    ("data.format", "--format"),
    ("data.subset", "--subset"),
    ("data.split", "--split"),
    ("data.system_prompt", "--system"),
    ("data.chat_template", "--chat-template"),
    ("data.template_kwargs", "--template-kwarg"),
];

/// What is said of a configuration's keys, said of flags.
fn with_flags(text: &str) -> String {
    FLAGS.iter().fold(text.to_string(), |text, (key, flag)| text.replace(key, flag))
}

/// The same for an error, with its exit code.
fn of_flags(error: &anyhow::Error) -> anyhow::Error {
    let text = with_flags(&chain(error));
    match code_of(error) {
        Code::Usage => UsageError(text).into(),
        _ => InputError(text).into(),
    }
}

/// Takes a key out that no flag gave; `false` where one did.
fn forget(config: &mut DataConfig, args: &EvalArgs, key: &str) -> bool {
    let flags = &args.writing;
    match key {
        "system_prompt" if flags.system.is_none() => config.system_prompt.take().is_some(),
        "chat_template" if flags.chat_template.is_none() => config.chat_template.take().is_some(),
        "template_kwargs" if flags.template_kwarg.is_empty() => !std::mem::take(&mut config.template_kwargs).is_empty(),
        _ => false,
    }
}

impl Rows {
    /// How the rows were read, for the record of what was run.
    pub fn settings(&self) -> &DataConfig {
        &self.config
    }
}
