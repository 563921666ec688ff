//! Rows of single tokens: trained in tables that stay frozen, and in tables that grow for them.
#![allow(clippy::unwrap_used, reason = "a failing unwrap is a failing test")]

use adapter_io::{Adapter, Checkpoint, HostTensor, TokenIndices};
use burn::tensor::activation::log_softmax;
use burn::tensor::{DType, FloatDType, Int, Tensor, TensorData};
use qlora_layers::{LoraConfig, Pass, TargetModules};
use qlora_models::{AdapterSet, Decoder, LoadOptions, ModelConfig, ModelError};

const PREFIX: &str = "base_model.model.";
const EMBED: &str = "model.embed_tokens";
const HEAD: &str = "lm_head";
const VOCAB: usize = 40;
const WIDTH: usize = 16;
/// Tokens of a pass, those with trained rows among them, one of them twice.
const IDS: [u32; 6] = [7, 3, 39, 12, 7, 0];

fn small(tied: bool, device: &burn::tensor::Device) -> Decoder {
    let shape = serde_json::json!({"model_type": "llama", "vocab_size": VOCAB, "hidden_size": WIDTH,
        "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": tied});
    let shape = ModelConfig::from_json(&shape, "config.json".as_ref()).unwrap();
    let options = LoadOptions { quantization: None, dtype: FloatDType::F32 };
    Decoder::random(shape, options, 1, device, &mut |_| {}).unwrap()
}

fn values(tensor: Tensor<2>) -> Vec<f32> {
    tensor.without_autodiff().try_into_vec_as::<f32>().unwrap()
}

fn logits(model: &Decoder) -> Vec<f32> {
    values(model.forward(&IDS, 1, Pass::INFERENCE))
}

fn close(what: &str, found: &[f32], expected: &[f32]) {
    // Sums of 16 products in f32, whose tiles may add them in another order, through two blocks.
    test_support::assert_close(what, found, expected, |_, expected| 2e-5 * (1.0 + expected.abs()));
}

fn lora() -> LoraConfig {
    LoraConfig { rank: 2, target_modules: TargetModules::Names(vec!["q_proj".into()]), ..Default::default() }
}

fn tables(embedding: &[u32], head: &[u32]) -> Option<TokenIndices> {
    let named = [("embed_tokens", embedding), (HEAD, head)];
    let named = named.into_iter().filter(|(_, tokens)| !tokens.is_empty());
    Some(TokenIndices::ByModule(named.map(|(name, tokens)| (name.to_string(), tokens.to_vec())).collect()))
}

fn list(tokens: &[u32]) -> Option<TokenIndices> {
    Some(TokenIndices::Embedding(tokens.to_vec()))
}

fn noise(shape: &[usize], seed: u64) -> HostTensor {
    let mut noise = HostTensor::new(shape, test_support::noise(seed, shape.iter().product())).unwrap();
    noise.data.iter_mut().for_each(|x| *x *= 0.1);
    noise
}

/// The adapter with other rows than it starts with.
fn shaken(model: &Decoder) -> Adapter {
    let mut adapter = model.export_adapter("base", None).unwrap();
    for (seed, (_, tensor)) in adapter.tensors.iter_mut().enumerate() {
        *tensor = noise(&tensor.shape.clone(), seed as u64);
    }
    adapter
}

/// The same as modules that are trained in full: tables with the rows in them.
fn whole(model: &Decoder, adapter: &Adapter) -> Adapter {
    let mut base = model.clone();
    base.unload_adapter().unwrap();
    let config = LoraConfig { modules_to_save: vec!["embed_tokens".into(), HEAD.into()], ..lora() };
    base.attach_lora(&config, 0).unwrap();
    let mut whole = base.export_adapter("base", None).unwrap();
    let of_tables = adapter.token_rows().unwrap();
    for path in [EMBED, HEAD] {
        let shared = model.config().tie_word_embeddings;
        let Some(rows) = of_tables.iter().find(|rows| rows.module == path || shared) else { continue };
        let table = whole.tensors.get_mut(&format!("{PREFIX}{path}.weight")).unwrap();
        for (token, row) in rows.tokens.iter().zip(rows.rows.data.chunks(WIDTH)) {
            table.data[*token as usize * WIDTH..][..WIDTH].copy_from_slice(row);
        }
    }
    for (key, tensor) in adapter.tensors.iter().filter(|(key, _)| key.contains("lora_")) {
        whole.tensors.insert(key.clone(), tensor.clone());
    }
    whole
}

/// The gradient of a weighted sum of the logits in a parameter.
fn gradient(model: &Decoder, name: &str) -> Vec<f32> {
    let mut model = model.clone();
    model.track();
    let logits = model.forward(&IDS, 1, Pass { tracked: true, dropout_seed: None });
    let weights = TensorData::new(test_support::noise(9, logits.shape().num_elements()), logits.dims());
    let weights = Tensor::<2>::from_data(weights, (model.device(), DType::F32));
    let mut gradients = (logits * weights).sum().backward();
    let parameters = model.parameters();
    let (_, parameter) = parameters.iter().find(|(found, _)| found == name).unwrap();
    values(parameter.grad_remove(&mut gradients).unwrap())
}

#[test]
fn output_and_gradients_are_those_of_tables_that_hold_the_rows() {
    for (device_name, device) in test_support::devices() {
        for (tied, tokens) in [
            (true, list(&[39, 7])),
            (true, tables(&[7, 20], &[7, 20])),
            (false, list(&[7, 12])),
            (false, tables(&[39, 7], &[0, 7, 11])),
            (false, tables(&[], &[3])),
        ] {
            let what = format!("{device_name}, tied: {tied}, {tokens:?}");
            let mut model = small(tied, &device);
            let base = logits(&model);
            model.attach_lora(&LoraConfig { trainable_token_indices: tokens, ..lora() }, 0).unwrap();
            assert_eq!(logits(&model), base, "{what}: they start as the table's");
            let adapter = shaken(&model);
            model.load_adapter(&adapter).unwrap();
            assert!(model.export_adapter("base", None).unwrap() == adapter, "{what}");

            let mut reference = small(tied, &device);
            reference.load_adapter(&whole(&model, &adapter)).unwrap();
            let expected = logits(&reference);
            close(&what, &logits(&model), &expected);
            assert_ne!(expected, base);

            let mut checked = 0;
            let shared = tied && adapter.token_rows().unwrap().len() == 1;
            for rows in adapter.token_rows().unwrap() {
                let of_table = |path: &str| gradient(&reference, &format!("{path}.weight"));
                let mut expected = of_table(&rows.module);
                if shared {
                    expected.iter_mut().zip(of_table(HEAD)).for_each(|(sum, x)| *sum += x);
                }
                let expected: Vec<f32> = rows
                    .tokens
                    .iter()
                    .flat_map(|token| expected[*token as usize * WIDTH..][..WIDTH].to_vec())
                    .collect();
                let found = gradient(&model, &format!("{}.trainable_tokens_delta", rows.module));
                assert!(found.iter().any(|x| *x != 0.0), "{what}");
                close(&format!("{what}: gradient of {}", rows.module), &found, &expected);
                checked += 1;
            }
            assert!(checked > 0);

            let mut merged = model.clone();
            merged.merge_adapters().unwrap();
            close(&format!("{what}, merged"), &logits(&merged), &expected);
            assert_eq!((merged.config().tie_word_embeddings, merged.parameters().len()), (tied, 0));
            model.unload_adapter().unwrap();
            assert_eq!(logits(&model), base, "{what}: the base is as it was");
        }
    }
}

#[test]
fn tables_grow_at_the_mean_and_shrink_with_the_adapter_that_made_them_grow() {
    for (device_name, device) in test_support::devices() {
        for tied in [true, false] {
            let what = format!("{device_name}, tied: {tied}");
            let mut model = small(tied, &device);
            let base = logits(&model);
            let mut trained = model.clone();
            assert_eq!(trained.resize_embeddings(VOCAB + 2).unwrap(), 2);
            assert_eq!(trained.config().vocab_size, VOCAB + 2);
            let grown = logits(&trained);
            for (old, new) in base.chunks(VOCAB).zip(grown.chunks(VOCAB + 2)) {
                close(&what, &new[..VOCAB], old);
                let mean = old.iter().sum::<f32>() / VOCAB as f32;
                close(&format!("{what}: x · mean(W) is mean(x · W)"), &new[VOCAB..], &[mean; 2]);
            }
            let new = [VOCAB as u32, VOCAB as u32 + 1];
            let tokens = if tied { list(&new) } else { tables(&new, &new) };
            trained.attach_lora(&LoraConfig { trainable_token_indices: tokens, ..lora() }, 0).unwrap();
            assert_eq!(logits(&trained), grown, "{what}");
            assert!(matches!(trained.resize_embeddings(VOCAB + 3), Err(ModelError::ResizeAdapted)));
            let adapter = shaken(&trained);
            trained.load_adapter(&adapter).unwrap();
            assert_eq!(trained.config().vocab_size, VOCAB + 2, "a base that grew by itself stays so");

            model.load_adapter(&adapter).unwrap();
            assert_eq!(model.config().vocab_size, VOCAB + 2);
            assert_eq!(logits(&model), logits(&trained), "{what}: the adapter brings the rows");
            let ids = [VOCAB as u32 + 1, 4, VOCAB as u32];
            let of_new = values(model.forward(&ids, 1, Pass::INFERENCE));
            assert_eq!(of_new, values(trained.forward(&ids, 1, Pass::INFERENCE)), "{what}");
            let mut merged = model.clone();
            merged.merge_adapters().unwrap();
            assert_eq!(merged.config().vocab_size, VOCAB + 2);
            close(&what, &values(merged.forward(&ids, 1, Pass::INFERENCE)), &of_new);
            model.unload_adapter().unwrap();
            assert_eq!((model.config().vocab_size, logits(&model)), (VOCAB, base), "{what}");
        }
    }
}

/// PEFT writes both tables along where the vocabulary grew (`save_embedding_layers = "auto"`), a tied head's too.
#[test]
fn tables_that_a_file_brings_along_are_the_frozen_ones() {
    let device = burn::tensor::Device::flex();
    for tied in [true, false] {
        let mut model = small(tied, &device);
        let base = logits(&model);
        model.attach_lora(&LoraConfig { trainable_token_indices: list(&[7]), ..lora() }, 0).unwrap();
        let mut adapter = shaken(&model);
        let plain = adapter.clone();
        let table = noise(&[VOCAB + 3, WIDTH], 20);
        let mut put = |key: &str, tensor: &HostTensor| adapter.tensors.insert(format!("{PREFIX}{key}"), tensor.clone());
        put(&format!("{EMBED}.token_adapter.base_layer.weight"), &table);
        let rows = plain.tensors[&Adapter::token_rows_key(EMBED)].clone();
        let head = match tied {
            true => {
                put(&format!("{HEAD}.token_adapter.base_layer.weight"), &table);
                put(&format!("{HEAD}.token_adapter.trainable_tokens_delta"), &rows);
                table.clone()
            }
            false => {
                let head = noise(&[VOCAB + 3, WIDTH], 21);
                put(&format!("{HEAD}.weight"), &head);
                head
            }
        };
        model.load_adapter(&adapter).unwrap();
        let with = logits(&model);
        assert_eq!(with.len(), IDS.len() * (VOCAB + 3));
        assert_eq!(model.parameters().len(), plain.tensors.len(), "tables that were not trained are not");

        let mut reference = small(tied, &device);
        reference.resize_embeddings(VOCAB + 3).unwrap();
        let config = LoraConfig { modules_to_save: vec!["embed_tokens".into(), HEAD.into()], ..lora() };
        reference.attach_lora(&config, 0).unwrap();
        let mut whole = reference.export_adapter("base", None).unwrap();
        let with_row = |mut table: HostTensor, replace: bool| {
            if replace {
                table.data[7 * WIDTH..][..WIDTH].copy_from_slice(&rows.data);
            }
            table
        };
        whole.tensors.insert(format!("{PREFIX}{EMBED}.weight"), with_row(table.clone(), true));
        whole.tensors.insert(format!("{PREFIX}{HEAD}.weight"), with_row(head, tied));
        for (key, tensor) in plain.tensors.iter().filter(|(key, _)| key.contains("lora_")) {
            whole.tensors.insert(key.clone(), tensor.clone());
        }
        reference.load_adapter(&whole).unwrap();
        close("tables of the file", &with, &logits(&reference));

        // What it hands out holds the tables again, once, and is the same adapter.
        let again = model.export_adapter("base", None).unwrap();
        assert!(!again.tensors.keys().any(|key| tied && key.contains(HEAD)));
        let mut other = small(tied, &device);
        other.load_adapter(&again).unwrap();
        assert_eq!(logits(&other), with);
        model.unload_adapter().unwrap();
        assert_eq!(logits(&model), base);
    }
}

#[test]
fn adapters_with_other_tokens_take_turns() {
    let device = burn::tensor::Device::flex();
    let base = small(true, &device);
    let adapter = |rows: usize| {
        let mut model = base.clone();
        model.resize_embeddings(rows).unwrap();
        model.attach_lora(&LoraConfig { trainable_token_indices: list(&[rows as u32 - 1]), ..lora() }, 0).unwrap();
        shaken(&model)
    };
    let mut set = AdapterSet::new();
    for rows in [VOCAB + 4, VOCAB, VOCAB + 1] {
        set.insert(&rows.to_string(), adapter(rows)).unwrap();
    }
    let mut model = base.clone();
    for rows in [VOCAB + 4, VOCAB, VOCAB + 1, VOCAB + 4] {
        set.activate(&mut model, &rows.to_string()).unwrap();
        assert_eq!(logits(&model).len(), IDS.len() * rows);
        let mut alone = base.clone();
        alone.load_adapter(&adapter(rows)).unwrap();
        assert_eq!(logits(&model), logits(&alone));
    }
}

#[test]
fn what_can_not_be_trained_is_refused_with_the_reason() {
    let device = burn::tensor::Device::flex();
    let message = |tied: bool, config: LoraConfig| {
        let mut model = small(tied, &device);
        let message = model.attach_lora(&config, 0).unwrap_err().to_string();
        assert!(model.parameters().is_empty(), "the model is unchanged");
        message
    };
    let with = |tokens| LoraConfig { trainable_token_indices: tokens, ..lora() };
    let names = |names: &[&str]| names.iter().map(ToString::to_string).collect::<Vec<_>>();
    for (tied, config, says) in [
        (true, with(list(&[40])), "token 40 is beyond the model's tables of 40 rows; model.resize_embeddings = true"),
        (true, with(tables(&[1], &[2])), "the output head is the embedding's table"),
        (true, with(tables(&[], &[2])), "the output head is the embedding's table"),
        (
            true,
            LoraConfig { modules_to_save: names(&["embed_tokens"]), ..with(list(&[1])) },
            "embed_tokens is named by",
        ),
        (true, LoraConfig { modules_to_save: names(&["lm_head"]), ..with(list(&[1])) }, "lm_head is named by"),
        (
            false,
            LoraConfig { target_modules: TargetModules::Names(names(&["lm_head"])), ..with(tables(&[], &[1])) },
            "lm_head is named by",
        ),
        (true, with(list(&[1, 2, 1])), "trainable_token_indices = 1: a token can be named once only"),
    ] {
        let message = message(tied, config);
        assert!(message.contains(says), "{message}");
    }
    let unknown = TokenIndices::ByModule([("wte".to_string(), vec![1])].into());
    assert!(message(true, with(Some(unknown))).contains("`wte` is no table of this model"));
    // A head that is adapted beside rows of the embedding is another matter where it is a table of its own.
    let head = LoraConfig { target_modules: TargetModules::Names(names(&["lm_head"])), ..with(list(&[1])) };
    small(false, &device).attach_lora(&head, 0).unwrap();

    let mut model = small(true, &device);
    model.attach_lora(&with(list(&[1])), 0).unwrap();
    let adapter = model.export_adapter("base", None).unwrap();
    let key = Adapter::token_rows_key(EMBED);
    let mut refused = |change: &dyn Fn(&mut Adapter)| {
        let mut adapter = adapter.clone();
        change(&mut adapter);
        model.load_adapter(&adapter).unwrap_err().to_string()
    };
    let far = refused(&|a| a.config.trainable_token_indices = list(&[4_000_000_000]));
    assert!(far.contains("token 4000000000") && far.contains("another base"), "{far}");
    let wide = refused(&|a| drop(a.tensors.insert(key.clone(), noise(&[1, 8], 0))));
    assert!(wide.contains("trainable_tokens_delta: expected shape [1, 16], found [1, 8]"), "{wide}");
    let own = refused(&|a| {
        a.config.trainable_token_indices = tables(&[1], &[2]);
        a.tensors.insert(Adapter::token_rows_key(HEAD), noise(&[1, WIDTH], 0));
    });
    assert!(own.contains("rows of its own for lm_head; merge it"), "{own}");
}

/// Loss and gradients of one batch that PEFT computed (`testdata/make_tokens.py`), over tokens of the base and added ones
/// in a table that is the head too.
#[test]
fn loss_and_gradients_are_pefts() {
    let reference = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/reference");
    let recorded = Checkpoint::open_file(&reference.join("adapters/tokens/training.safetensors")).unwrap();
    let adapter = Adapter::load(&reference.join("adapters/tokens")).unwrap();
    let ids = recorded.tensor("input_ids").unwrap().to_i64_vec().unwrap();
    let ids: Vec<u32> = ids.into_iter().map(|id| id as u32).collect();
    let (rows, len) = (2, ids.len() / 2);
    for (name, device) in test_support::devices() {
        let options = LoadOptions { quantization: None, dtype: FloatDType::F32 };
        let mut model = Decoder::load(&reference.join("tiny-llama"), options, &device, &mut |_| {}).unwrap();
        model.load_adapter(&adapter).unwrap();
        assert!(model.export_adapter("tiny-llama", None).unwrap() == adapter);
        model.track();
        let logits = model.forward(&ids, rows, Pass { tracked: true, dropout_seed: None });
        let judged: Vec<i32> = (0..rows * len).filter(|i| i % len + 1 < len).map(|i| i as i32).collect();
        let targets: Vec<i32> = judged.iter().map(|i| ids[*i as usize + 1] as i32).collect();
        let count = judged.len();
        let index =
            |values: Vec<i32>| Tensor::<1, Int>::from_data(TensorData::new(values, [count]), (&device, DType::I32));
        let chosen = log_softmax(logits, 1).select(0, index(judged));
        let loss = chosen.gather(1, index(targets).reshape([count, 1])).mean().neg();
        let of_file = |name: &str| recorded.tensor(name).unwrap().to_f32_vec().unwrap();
        let value = values(loss.clone().reshape([1, 1]))[0];
        let expected = of_file("loss")[0];
        assert!((value / expected - 1.0).abs() < 1e-5, "{name}: {value}, PEFT's {expected}");

        let mut gradients = loss.backward();
        for (ours, theirs) in [
            ("model.embed_tokens.trainable_tokens_delta", "model.embed_tokens.token_adapter.trainable_tokens_delta"),
            ("model.layers.3.self_attn.q_proj.lora_a", "model.layers.3.self_attn.q_proj.lora_A.weight"),
            ("model.layers.3.self_attn.q_proj.lora_b", "model.layers.3.self_attn.q_proj.lora_B.weight"),
        ] {
            let parameters = model.parameters();
            let (_, parameter) = parameters.iter().find(|(found, _)| found == ours).unwrap();
            let found = values(parameter.grad_remove(&mut gradients).unwrap());
            let expected = of_file(&format!("grad.{theirs}"));
            let largest = expected.iter().fold(0.0_f64, |largest, x| largest.max(f64::from(x.abs())));
            // f32 through six blocks, in two libraries: some 1e-6 of the largest are measured between any two.
            test_support::assert_close(format!("{name}: {ours}"), &found, &expected, |_, _| 1e-4 * largest);
        }
    }
}
