//! Latent attention and its routers: what configurations say, a cache against whole sequences, and checkpoints as they are published.
#![allow(clippy::unwrap_used, reason = "a failing unwrap is a failing test")]

use adapter_io::{Checkpoint, Dtype, ShardedWriter, TensorSpec};
use burn::tensor::{DType, Device, FloatDType, Tensor, TensorData};
use nf4_quant::QuantConfig;
use qlora_layers::{LoraConfig, Pass, trainable};
use qlora_models::{CachedRow, Decoder, LoadOptions, ModelConfig, ModelError, PagedCache, Part, RowLogits};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use test_support::{devices, noise};

const BLOCK: usize = 16;
/// Of a sequence.
const BLOCKS: usize = 6;

fn arch(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/reference/archs").join(name)
}

fn json_of(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(arch(name).join("config.json")).unwrap()).unwrap()
}

fn parse(config: &Value) -> Result<ModelConfig, ModelError> {
    ModelConfig::from_json(config, Path::new("config.json"))
}

fn load(dir: &Path, quantization: Option<QuantConfig>, dtype: FloatDType, device: &Device) -> Decoder {
    Decoder::load(dir, LoadOptions { quantization, dtype }, device, &mut |_| {}).unwrap()
}

fn adapted(model: &Decoder, lora: &LoraConfig, device: &Device) -> Decoder {
    let mut model = model.clone();
    model.attach_lora(lora, 5).unwrap();
    for (number, (_, linear)) in model.linears_mut().enumerate() {
        let Some(adapter) = &mut linear.adapter else { continue };
        let random = |[rows, columns]: [usize; 2]| {
            let values: Vec<f32> = noise(number as u64, rows * columns).into_iter().map(|value| 0.3 * value).collect();
            trainable(Tensor::from_data(TensorData::new(values, [rows, columns]), (device, DType::F32)))
        };
        adapter.lora_b = random(adapter.lora_b.dims());
        adapter.bias = adapter.bias.as_ref().map(|bias| random(bias.dims()));
    }
    model
}

/// The length of the difference by the length of the second.
fn distance(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let difference: f32 = found.iter().zip(expected).map(|(a, b)| (a - b).powi(2)).sum();
    (difference / expected.iter().map(|b| b.powi(2)).sum::<f32>()).sqrt()
}

fn values(tensor: Tensor<2>) -> Vec<f32> {
    tensor.into_data().iter::<f32>().collect()
}

/// Rows of several models in one pass, their prompts in chunks: a long one first, which has attention by itself where the device has
/// a kernel for it, once without and once with tokens before it, and then a few tokens, which attend to what the cache holds.
#[test]
fn a_cache_of_vectors_gives_what_whole_sequences_give() {
    for (device_name, device) in devices() {
        let shapes = [("deepseek_v3", 12 + 4), ("deepseek_v3_whole", 16 + 6), ("glm4_moe_lite", 10 + 4)];
        // Where a processor emulates a GPU, one of them takes half a minute.
        let shapes = if device_name == "vulkan" { &shapes[..1] } else { &shapes[..] };
        for &(name, width) in shapes {
            for dtype in [FloatDType::F32, FloatDType::BF16] {
                if !device.supports_dtype(dtype) {
                    continue;
                }
                let model = load(&arch(name), Some(QuantConfig::default()), dtype, &device);
                assert_eq!(PagedCache::token_bytes(model.config(), FloatDType::BF16), 2 * 2 * width, "{name}");
                let lora = LoraConfig { rank: 3, ..LoraConfig::default() };
                let plain = adapted(&model, &lora, &device);
                let biased = adapted(&model, &LoraConfig { lora_bias: true, ..lora.clone() }, &device);
                let dora = adapted(&model, &LoraConfig { use_dora: true, ..lora }, &device);
                let models = if name == "deepseek_v3" { [&model, &plain, &biased] } else { [&dora, &model, &biased] };
                let ids: Vec<Vec<u32>> =
                    (0..3).map(|row| (0..90).map(|i| (7 * i + 3 * row) % 38 + 3).collect()).collect();
                let blocks: Vec<Vec<u32>> =
                    (0..3).map(|row| (row * BLOCKS as u32..(row + 1) * BLOCKS as u32).collect()).collect();
                let mut cache = PagedCache::new(&model, 3 * BLOCKS, BLOCK);
                let mut found = vec![Vec::new(); 3];
                // Chunks of each row; those of other rows differ, so that long and short ones are in one pass.
                let ends = [[1, 70, 87, 90], [65, 66, 80, 90], [70, 85, 89, 90]];
                for step in 0..4 {
                    let part = |row: usize| {
                        let past = if step == 0 { 0 } else { ends[row][step - 1] };
                        let ids = &ids[row][past..ends[row][step]];
                        CachedRow { ids, past, rotated_for: ids.len(), blocks: &blocks[row], logits: RowLogits::All }
                    };
                    let parts: Vec<Part<'_>> =
                        (0..3).map(|row| Part { model: models[row], rows: vec![part(row)] }).collect();
                    let logits = values(Decoder::forward_paged(&parts, &mut cache).unwrap());
                    let mut rest = &logits[..];
                    for (row, found) in found.iter_mut().enumerate() {
                        let (own, others) = rest.split_at(parts[row].rows[0].ids.len() * model.vocab_size());
                        found.extend_from_slice(own);
                        rest = others;
                    }
                }
                for (row, found) in found.iter().enumerate() {
                    let expected = values(models[row].forward(&ids[row], 1, Pass::INFERENCE));
                    // Sums in another order; in 16 bits the queries are rounded once more, and a token may go to another expert for
                    // it.
                    let bar = if dtype == FloatDType::F32 { 1e-4 } else { 6e-2 };
                    let distance = distance(found, &expected);
                    assert!(distance < bar, "{device_name}, {name}, {dtype:?}, row {row}: {distance}");
                }
            }
        }
    }
}

#[test]
fn latent_attention_and_its_routers_are_read_or_refused() {
    let config = parse(&json_of("deepseek_v3")).unwrap();
    let latent = config.latent.unwrap();
    assert_eq!((latent.query_rank, latent.query_dim(), latent.value_dim, config.head_dim), (Some(10), 12, 6, 12));
    // YaRN's factor of longer contexts, squared.
    let magnitude = 0.1 * 4f64.ln() + 1.0;
    assert!((config.score_scale - magnitude * magnitude / 12f64.sqrt()).abs() < 1e-12, "{}", config.score_scale);
    let whole = parse(&json_of("deepseek_v3_whole")).unwrap();
    assert_eq!((whole.latent.unwrap().query_rank, whole.head_dim), (None, 10));
    assert_eq!(whole.experts.unwrap().shared_size, 24);
    let absent = |c: &mut Value| drop(c.as_object_mut().unwrap().remove("q_lora_rank"));
    let mut config = json_of("deepseek_v3_whole");
    absent(&mut config);
    assert_eq!(parse(&config).unwrap().latent.unwrap().query_rank, Some(1536));
    let sparse = |edit: fn(&mut Value)| {
        let mut config = json_of("glm4_moe_lite_layers");
        edit(&mut config);
        let specs = parse(&config).unwrap().linear_specs();
        [0, 1, 2].map(|block| specs.iter().any(|spec| spec.path.contains(&format!("layers.{block}.mlp.experts"))))
    };
    assert_eq!(sparse(|_| ()), [true, false, true]);
    assert_eq!(sparse(|c| c["mlp_layer_types"] = Value::Null), [false, true, true]);

    for (name, key, value, expected) in [
        ("deepseek_v3", "num_key_value_heads", json!(2), "as many as the 4"),
        ("deepseek_v3", "n_group", json!(3), "8 experts into groups"),
        ("deepseek_v3", "n_group", json!(8), "groups of two and more"),
        ("deepseek_v3", "topk_group", json!(5), "of 4 groups"),
        ("deepseek_v3", "scoring_func", json!("softmax"), "only \"sigmoid\""),
        ("deepseek_v3", "kv_lora_rank", json!(1021), "up to 1024"),
        ("glm4_moe_lite_layers", "mlp_layer_types", json!(["sparse"]), "has 1 entries"),
        ("glm4_moe", "n_shared_experts", json!(-1), "a number from 0 on"),
    ] {
        let mut config = json_of(name);
        config[key] = value;
        let message = parse(&config).unwrap_err().to_string();
        assert!(message.contains(key) && message.contains(expected), "{name}: {message}");
    }
}

/// E4M3 without its not-a-number.
fn e4m3(code: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7) / 8.0);
    let size = if exponent == 0 { mantissa * 2f32.powi(-6) } else { (1.0 + mantissa) * 2f32.powi(exponent - 7) };
    if code & 0x80 == 0 { size } else { -size }
}

/// As DeepSeek V3 is published: projections in FP8, with a scale for each block, ragged ones too, a tensor for each expert; routers,
/// norms and embeddings in BF16, corrections in F32, and a block behind the last one that predicts the token after the next.
#[test]
fn a_checkpoint_in_fp8_is_what_it_stands_for() {
    const SIDE: usize = 8;
    let checkpoint = Checkpoint::open(&arch("deepseek_v3_whole")).unwrap();
    let mut config = json_of("deepseek_v3_whole");
    let (mut coded, mut decoded) = (Vec::new(), Vec::new());
    for (number, name) in checkpoint.names().enumerate() {
        let view = checkpoint.tensor(name).unwrap();
        let of_values = |values: &[f32]| values.iter().flat_map(|x| half::bf16::from_f32(*x).to_le_bytes()).collect();
        let is_projection = name.ends_with("_proj.weight");
        if name.ends_with("e_score_correction_bias") {
            let values = view.to_f32_vec().unwrap();
            let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
            coded.push((name.to_string(), Dtype::F32, view.shape.clone(), bytes));
            decoded.push((name.to_string(), Dtype::BF16, view.shape.clone(), of_values(&values)));
            continue;
        }
        if !is_projection {
            for all in [&mut coded, &mut decoded] {
                all.push((name.to_string(), Dtype::BF16, view.shape.clone(), view.data.to_vec()));
            }
            continue;
        }
        let [rows, columns] = view.shape[..] else { panic!("{name}") };
        // Codes of every kind but not-a-number, and scales that are powers of two, so that BF16 holds the products.
        let codes: Vec<u8> = (0..rows * columns)
            .map(|i| (i * 37 + number * 11) as u8)
            .map(|c| if c & 0x7f == 0x7f { c ^ 8 } else { c })
            .collect();
        let across = columns.div_ceil(SIDE);
        let scales: Vec<f32> = (0..rows.div_ceil(SIDE) * across).map(|i| 2f32.powi(-9 - (i % 3) as i32)).collect();
        let value = |i: usize| e4m3(codes[i]) * scales[i / columns / SIDE * across + i % columns / SIDE];
        let values: Vec<f32> = (0..rows * columns).map(value).collect();
        decoded.push((name.to_string(), Dtype::BF16, view.shape.clone(), of_values(&values)));
        coded.push((name.to_string(), Dtype::F8_E4M3, view.shape.clone(), codes));
        let bytes = scales.iter().flat_map(|x| x.to_le_bytes()).collect();
        coded.push((format!("{name}_scale_inv"), Dtype::F32, vec![rows.div_ceil(SIDE), across], bytes));
    }
    coded.push(("model.layers.2.enorm.weight".into(), Dtype::BF16, vec![24], vec![0; 48]));
    let write = |tensors: &[(String, Dtype, Vec<usize>, Vec<u8>)], config: &Value| {
        let dir = tempfile::tempdir().unwrap();
        let specs = tensors.iter().map(|(name, dtype, shape, _)| TensorSpec::new(name, *dtype, shape)).collect();
        let mut writer = ShardedWriter::create(dir.path(), specs, 1 << 30).unwrap();
        tensors.iter().for_each(|(name, _, _, data)| writer.write(name, data).unwrap());
        writer.finish().unwrap();
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        dir
    };
    let plain = write(&decoded, &config);
    config["quantization_config"] = json!({"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [SIDE, SIDE]});
    config["num_nextn_predict_layers"] = json!(1);
    let coded = write(&coded, &config);
    for quantization in [None, Some(QuantConfig::default())] {
        let logits = |dir: &Path| {
            let model = load(dir, quantization, FloatDType::F32, &Device::flex());
            values(model.forward(&[3, 4, 5, 6, 7], 1, Pass::INFERENCE))
        };
        assert_eq!(logits(coded.path()), logits(plain.path()), "{quantization:?}");
    }
    let model = load(coded.path(), None, FloatDType::F32, &Device::flex());
    let [note] = &model.config().notes[..] else { panic!("{:?}", model.config().notes) };
    assert!(note.contains("model.layers.2 (1 tensors"), "{note}");
}
