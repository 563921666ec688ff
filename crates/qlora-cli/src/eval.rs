//! `qlora eval`: a model and its adapters measured on rows.

mod measure;
mod report;
mod rows;

use std::rc::Rc;
use std::sync::Arc;

use anyhow::Result;
use burn_qlora::qlora_serve::EngineConfig;
use burn_qlora::qlora_serve::eval::Pattern;
use burn_qlora::report::device_name;
use burn_qlora::{Decoder, ModelConfig, Tokenizer, atomic};

use crate::adapters;
use crate::answers::Running;
use crate::args::{EvalArgs, Metric};
use crate::exit::{Code, InputError, UsageError};
use crate::model::{Placement, base_dir, base_name, cache_for};
use crate::output::{print, say};
use crate::outputs;
use crate::prompts::{self, BASE, Voice};
use measure::{Figure, Measured, Measurement};
use report::Ran;
use rows::Rows;

/// Logits of a pass that are read from the device at most: 256 MiB.
const MAX_LOGITS: usize = 1 << 26;

/// A column of the table: who is measured, and on what.
struct Column {
    voice: Voice,
    rows: Rc<Rows>,
}

/// Runs the command. The table goes to stdout, notes to stderr.
pub fn run(args: &EvalArgs) -> Result<Code> {
    let asked = Asked::new(args)?;
    let place = Placement::new(&args.base)?;
    let files: Vec<_> = args.json.iter().chain(&args.output).map(|path| path.as_path()).collect();
    if let [json, output] = files[..]
        && json == output
    {
        return Err(UsageError("--json and --output name one file: give two".into()).into());
    }
    if !files.is_empty() {
        outputs::files(&files, args.force)?;
    }
    let (adapters, named) = adapters::named(&args.adapter)?;
    adapters::check_names(&adapters, BASE)?;
    let base = base_name(&args.base, &named)?;
    let dir = base_dir(&args.base, base, &named)?;
    let tokenizer = Arc::new(Tokenizer::from_dir(&dir)?);
    let mut voices = prompts::voices(&args.writing, &adapters, &dir)?;
    if let [first, others @ ..] = &mut voices[..]
        && let [adapter, ..] = others
    {
        first.prompting = adapter.prompting.clone();
    }
    let voices = voices.into_iter().skip(usize::from(args.no_base));
    let shape = ModelConfig::from_dir_with(&dir, &place.config_options())?;
    let columns = rows::columns(args, voices, &tokenizer, &shape)?;
    if asked.answers() && columns.iter().all(|column| column.rows.questions() == 0) {
        let problem = "no row has an answer to compare with behind something that asks for it";
        return Err(InputError(format!("{}: {problem}", args.data.display())).into());
    }

    let quant_type = place.quant_type();
    let model = place.load(&dir)?;
    let ran = Ran {
        model: base,
        quant_type,
        device: device_name(model.device()),
        compute_dtype: format!("{:?}", model.dtype()).to_lowercase(),
        adapters: &adapters,
    };
    let config = engine_config(args, &asked, &columns, &model, adapters.len());
    let engine = Running::start(model, &config)?;
    engine.load_adapters(&adapters)?;
    let measurement = Measurement { args, asked: &asked, tokenizer: &tokenizer, handle: &engine.handle };
    let measured = columns.iter().map(|column| measurement.column(column)).collect::<Result<Vec<Measured>>>()?;
    engine.end()?;

    for (column, measured) in columns.iter().zip(&measured) {
        measured.notes(&column.voice.name).iter().for_each(|note| say!("note: {note}"));
    }
    if let Some(path) = &args.output {
        atomic::write_bytes(path, report::lines(&columns, &measured).as_bytes())?;
    }
    if let Some(path) = &args.json {
        let text = report::json(args, &asked, &ran, &columns, &measured);
        atomic::write_bytes(path, format!("{text:#}\n").as_bytes())?;
    }
    print(&report::table(&asked, &columns, &measured).to_string())?;
    Ok(Code::Done)
}

/// What is to be measured.
struct Asked {
    loss: bool,
    exact: bool,
    pattern: Option<Pattern>,
}

impl Asked {
    fn new(args: &EvalArgs) -> Result<Self> {
        args.choice.sampling()?;
        let metrics = args.metrics();
        let has = |metric| metrics.contains(&metric);
        let wrong = |text: &str| Err(UsageError(text.into()).into());
        let pattern = match (&args.regex, has(Metric::Regex)) {
            (None, false) => None,
            (None, true) => return wrong("--metric regex needs --regex, the expression that finds what is compared"),
            (Some(_), false) => return wrong("--regex belongs to --metric regex"),
            (Some(text), true) => Some(Pattern::new(text).map_err(|e| UsageError(format!("--regex {text}: {e}")))?),
        };
        let asked = Self { loss: has(Metric::Loss), exact: has(Metric::Exact), pattern };
        match asked.answers() || args.choice.is_default() {
            true => Ok(asked),
            false => wrong("the flags that say how tokens are chosen belong to --metric exact and regex"),
        }
    }

    /// The figures, in the table's order.
    fn figures(&self) -> Vec<Figure> {
        let loss = self.loss.then_some([Figure::Loss, Figure::Accuracy]).into_iter().flatten();
        let answers = self.exact.then_some(Figure::Exact).into_iter();
        loss.chain(answers).chain(self.pattern.as_ref().map(|_| Figure::Regex)).collect()
    }

    /// Whether anything is generated.
    fn answers(&self) -> bool {
        self.exact || self.pattern.is_some()
    }
}

fn engine_config(args: &EvalArgs, asked: &Asked, columns: &[Column], model: &Decoder, adapters: usize) -> EngineConfig {
    let most = model.config().max_tokens();
    let rows = columns.iter().flat_map(|column| &column.rows.rows);
    let needed = rows.map(|row| {
        let whole = if asked.loss { row.row.ids.len() } else { 0 };
        let prompt = row.question.as_ref().filter(|_| asked.answers()).map_or(0, |question| question.prompt_len);
        // One more than there are: the engine keeps room for an answer.
        whole.max(prompt + args.choice.max_new_tokens * usize::from(prompt > 0)) + 1
    });
    let longest = needed.max().unwrap_or(1).min(most);
    let max_batch = args.max_batch as usize;
    EngineConfig {
        cache: cache_for(model, longest * max_batch),
        max_batch,
        max_batch_tokens: (MAX_LOGITS / model.vocab_size().max(1)).clamp(max_batch, 1024.max(max_batch)),
        max_adapters: adapters,
        ..EngineConfig::default()
    }
}
