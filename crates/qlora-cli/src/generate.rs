//! `qlora generate`: a model, with or without an adapter, answers a prompt.

use std::io::{IsTerminal, Read};
use std::time::Instant;

use anyhow::{Context, Result};
use burn_qlora::qlora_models::hub;
use burn_qlora::qlora_train::compute_dtype;
use burn_qlora::{
    Adapter, Decoder, GenerateOptions, LoadOptions, Message, Tokenizer, TrainConfig, generate, select_device,
};

use crate::args::GenerateArgs;
use crate::exit::{Code, UsageError};
use crate::output::print;
use crate::progress::LoadBar;

/// Runs the command. The answer goes to stdout as it comes, everything else to stderr.
pub fn run(args: &GenerateArgs) -> Result<Code> {
    check(args)?;
    // The keys mean what they mean in a configuration, and are checked as there.
    let mut config = TrainConfig::default();
    config.set("quantization.quant_type", &args.quant_type)?;
    config.set("quantization.compute_dtype", &args.compute_dtype)?;
    let device = select_device(&args.device)?;
    let dtype = compute_dtype(config.quantization.compute_dtype, &device);
    let adapter = args.adapter.as_deref().map(Adapter::load).transpose()?;
    let named = adapter.as_ref().and_then(|adapter| adapter.config.base_model_name_or_path.as_deref());
    let model = args
        .model
        .as_deref()
        .or(named)
        .ok_or_else(|| UsageError("the adapter names no base model: give --model".into()))?;
    let dir = hub::resolve(model, args.revision.as_deref())?;
    let tokenizer = Tokenizer::from_dir(&dir)?;
    let ids = prompt_ids(args, &tokenizer)?;

    let mut bar = LoadBar::new();
    let options = LoadOptions { quantization: config.quantization.quant_config(), dtype };
    let mut model = Decoder::load(&dir, options, &device, &mut |progress| bar.update(progress))?;
    bar.finish();
    if let Some(adapter) = &adapter {
        model.load_adapter(adapter)?;
    }

    let options = GenerateOptions {
        max_new_tokens: args.max_new_tokens,
        temperature: args.temperature,
        top_p: args.top_p,
        seed: args.seed,
        stop_ids: tokenizer.eos_token_ids().to_vec(),
    };
    let start = Instant::now();
    let mut text = tokenizer.stream_decoder_after(&ids, true);
    let mut failure = None;
    let generation = generate(&model, &ids, &options, |id| {
        let shown = text.push(id).map_err(anyhow::Error::from).and_then(|piece| print(&piece));
        failure = failure.take().or(shown.err());
    })?;
    failure.map_or(Ok(()), Err)?;
    print(&(text.finish()? + "\n"))?;
    if std::io::stderr().is_terminal() {
        let seconds = start.elapsed().as_secs_f64();
        let tokens = generation.ids.len();
        let end = if generation.stopped { "" } else { "; stopped by --max-new-tokens" };
        eprintln!("{tokens} tokens in {seconds:.1} s, {:.1} tok/s{end}", tokens as f64 / seconds);
    }
    Ok(Code::Done)
}

fn check(args: &GenerateArgs) -> Result<(), UsageError> {
    let wrong = |flag: &str, allowed: &str| Err(UsageError(format!("{flag} must be {allowed}")));
    if args.max_new_tokens == 0 {
        return wrong("--max-new-tokens", "1 or more");
    }
    if !(args.temperature >= 0.0 && args.temperature.is_finite()) {
        return wrong("--temperature", "a finite number, 0 or more");
    }
    if !(args.top_p > 0.0 && args.top_p <= 1.0) {
        return wrong("--top-p", "above 0 and at most 1");
    }
    Ok(())
}

fn prompt_ids(args: &GenerateArgs, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
    let mut prompt = args.prompt.clone();
    if prompt == "-" {
        prompt.clear();
        std::io::stdin().read_to_string(&mut prompt).context("can't read the prompt from the standard input")?;
    }
    if args.no_chat_template {
        return Ok(tokenizer.encode(&prompt, true)?.ids);
    }
    let system = args.system.iter().map(Message::system);
    let messages: Vec<Message> = system.chain([Message::user(prompt)]).collect();
    let text = tokenizer
        .render_chat(&messages, true)
        .context("can't write the prompt as a conversation; --no-chat-template gives it to the model as it is")?;
    Ok(tokenizer.encode(&text, false)?.ids)
}
