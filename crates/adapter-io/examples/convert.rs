//! The conversions of this crate from a shell, for the scripts in `benches/peers` that read the results back
//! with other programs: `convert gguf BASE OUT q8_0`, `convert lora ADAPTER BASE OUT f32`,
//! `convert merge BASE ADAPTER OUT`, `convert bnb BASE OUT`,
//! `convert gptq BASE OUT GROUP_SIZE` (rounded to the nearest), `convert resave ADAPTER OUT`,
//! `convert combine linear|cat|svd OUT ADAPTER WEIGHT ADAPTER WEIGHT ..`. `qlora` is the program for people.

use std::error::Error;
use std::path::Path;

use adapter_io::gguf::{GgmlType, GgufOptions, export_gguf, export_lora_gguf};
use adapter_io::{
    Adapter, BnbOptions, Combination, GptqOptions, MergeOptions, combine, gptq_checkpoint, merge_checkpoint,
    quantize_checkpoint,
};

fn kind(name: &str) -> Result<GgmlType, String> {
    let found = GgmlType::ALL.into_iter().find(|t| t.name().eq_ignore_ascii_case(name));
    found.ok_or_else(|| format!("unknown type {name}"))
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments.as_slice() {
        ["gguf", base, out, name] => {
            let without_tokenizer = !Path::new(base).join("tokenizer.json").exists();
            let options = GgufOptions { kind: kind(name)?, without_tokenizer, ..GgufOptions::default() };
            export_gguf(base.as_ref(), out.as_ref(), &options, &mut |_| {})?;
        }
        ["lora", adapter, base, out, name] => {
            export_lora_gguf(&Adapter::load(adapter.as_ref())?, base.as_ref(), out.as_ref(), kind(name)?)?;
        }
        ["merge", base, adapter, out] => {
            let adapter = Adapter::load(adapter.as_ref())?;
            merge_checkpoint(base.as_ref(), &adapter, out.as_ref(), &MergeOptions::default(), &mut |_| {})?;
        }
        ["bnb", base, out] => {
            quantize_checkpoint(base.as_ref(), out.as_ref(), &BnbOptions::default(), &mut |_| {})?;
        }
        ["gptq", base, out, group] => {
            let options = GptqOptions { group_size: Some(group.parse()?), ..GptqOptions::default() };
            let nearest = &mut |_: &str, _| Ok(None);
            gptq_checkpoint(base.as_ref(), out.as_ref(), &options, &[], 1 << 32, nearest, &mut |_| {})?;
        }
        ["resave", adapter, out] => Adapter::load(adapter.as_ref())?.save(out.as_ref())?,
        ["combine", how, out, parts @ ..] => {
            let how = match *how {
                "linear" => Combination::Linear,
                "cat" => Combination::Cat,
                _ => Combination::Svd { rank: None },
            };
            let mut adapters = Vec::new();
            for pair in parts.chunks(2) {
                let [adapter, weight] = pair else { return Err("every adapter needs a weight".into()) };
                adapters.push((Adapter::load(adapter.as_ref())?, weight.parse()?));
            }
            let adapters: Vec<(&Adapter, f64)> = adapters.iter().map(|(a, w)| (a, *w)).collect();
            combine(&adapters, how)?.save(out.as_ref())?;
        }
        _ => return Err("see the head of examples/convert.rs".into()),
    }
    Ok(())
}
