//! What this implementation computes, for the scripts in `benches/peers` to compare with other programs:
//!
//! ```text
//! logits MODEL IDS OUT [ADAPTER [RESAVED]]
//! ```
//!
//! `IDS` is a safetensors file with `input_ids` [rows, tokens]; `OUT` becomes the logits [rows, tokens, vocabulary] as
//! bare f32. With `RESAVED` the adapter is written there as it was read. All in f32 on the CPU; the base is dense,
//! unless its checkpoint is in 4 bits.

use std::error::Error;
use std::path::Path;

use burn_qlora::qlora_layers::Pass;
use burn_qlora::{Adapter, Checkpoint, Decoder, LoadOptions, QuantConfig, select_device};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, ids, out, rest @ ..] = arguments.as_slice() else {
        return Err("logits MODEL IDS OUT [ADAPTER [RESAVED]]".into());
    };
    let device = select_device("cpu")?;
    // A checkpoint in 4 bits keeps its own; what stands here is then not used.
    let quantized = !Checkpoint::open(model.as_ref())?.quantized_modules().is_empty();
    let quantization = quantized.then(QuantConfig::default);
    let options = LoadOptions { quantization, dtype: burn::tensor::FloatDType::F32 };
    let mut decoder = Decoder::load(Path::new(model), options, &device, &mut |_| {})?;
    if let [adapter, resaved @ ..] = rest {
        let adapter = Adapter::load(adapter.as_ref())?;
        decoder.load_adapter(&adapter)?;
        if let [resaved] = resaved {
            adapter.save(resaved.as_ref())?;
        }
    }
    let ids = Checkpoint::open_file(ids.as_ref())?;
    let ids = ids.tensor("input_ids")?;
    let tokens: Vec<u32> = ids.to_i64_vec()?.into_iter().map(u32::try_from).collect::<Result<_, _>>()?;
    let logits = decoder.forward(&tokens, ids.shape[0], Pass::INFERENCE);
    let logits: Vec<u8> = logits.try_into_vec_as::<f32>()?.into_iter().flat_map(f32::to_le_bytes).collect();
    std::fs::write(out, logits)?;
    Ok(())
}
