//! Names inside adapters: keys, null in the configuration, modules that are not there or are called otherwise.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::path::Path;

use adapter_io::{
    Adapter, AdapterConfig, Checkpoint, Dtype, HostTensor, MergeOptions, OneOrMany, Pattern, TargetModules, TensorSpec,
    merge_checkpoint,
};
use serde_json::{Value, json};

const BLOCK: &str = "base_model.model.model.layers";

fn names(list: &[&str]) -> Option<TargetModules> {
    Some(TargetModules::List(list.iter().map(ToString::to_string).collect()))
}

/// Factors [2, 16] and [16, 2] under these module paths.
fn adapter(paths: &[&str]) -> Adapter {
    let config = AdapterConfig { r: 2, target_modules: names(&["q_proj", "v_proj"]), ..AdapterConfig::default() };
    let mut adapter = Adapter::new(config);
    for path in paths {
        for (factor, shape) in [("A", [2, 16]), ("B", [16, 2])] {
            let data = (0..32).map(|i| (i as f32 + path.len() as f32).sin()).collect();
            let tensor = HostTensor { shape: shape.to_vec(), data };
            adapter.tensors.insert(format!("base_model.model.{path}.lora_{factor}.weight"), tensor);
        }
    }
    adapter
}

/// Saves an adapter under other keys.
fn save_as(adapter: &Adapter, dir: &Path, key: impl Fn(&str) -> String) {
    adapter.config.save(dir).unwrap();
    let tensors = adapter.tensors.iter().map(|(name, tensor)| (key(name), tensor));
    let views: Vec<_> = tensors
        .map(|(name, t)| {
            let bytes = bytemuck::cast_slice(&t.data);
            (name, safetensors::tensor::TensorView::new(Dtype::F32, t.shape.clone(), bytes).unwrap())
        })
        .collect();
    fs::write(dir.join("adapter_model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
}

/// PEFT 0.21 loads these keys (measured with its `PeftModel.from_pretrained`).
#[test]
fn the_name_default_inside_is_taken_out() {
    let dir = tempfile::tempdir().unwrap();
    let q = format!("{BLOCK}.0.self_attn.q_proj");
    let mut plain = adapter(&["model.layers.0.self_attn.q_proj"]);
    plain.config.use_dora = true;
    plain.config.lora_bias = true;
    plain.config.modules_to_save = Some(vec!["norm".into()]);
    let vector = |n: usize| HostTensor { shape: vec![n], data: vec![1.5; n] };
    plain.tensors.insert(format!("{q}.lora_magnitude_vector"), vector(16));
    plain.tensors.insert(format!("{q}.lora_B.bias"), vector(16));
    plain.tensors.insert("base_model.model.model.norm.modules_to_save.weight".into(), vector(16));
    save_as(&plain, dir.path(), |key| {
        let key = key.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default.");
        let key = key.replace("modules_to_save.", "modules_to_save.default.");
        key.replace("magnitude_vector", "magnitude_vector.default.weight")
    });
    assert_eq!(Adapter::load(dir.path()).unwrap(), plain);
    assert_eq!(plain.saved_tensors().map(|(name, _)| name).collect::<Vec<_>>(), ["model.norm.weight"]);
    save_as(&plain, dir.path(), |key| key.replace("magnitude_vector", "magnitude_vector.weight"));
    assert_eq!(Adapter::load(dir.path()).unwrap(), plain);
    // Saving takes the names out.
    plain.save(dir.path()).unwrap();
    let saved = Checkpoint::open_file(&dir.path().join("adapter_model.safetensors")).unwrap();
    assert!(saved.names().all(|name| !name.contains("default")));
}

#[test]
fn a_key_that_is_there_with_and_without_the_name_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut both = adapter(&["model.layers.0.self_attn.q_proj"]);
    let key = format!("{BLOCK}.0.self_attn.q_proj.lora_A");
    let again = both.tensors[&format!("{key}.weight")].clone();
    both.tensors.insert(format!("{key}.default.weight"), again);
    save_as(&both, dir.path(), str::to_string);
    let message = Adapter::load(dir.path()).unwrap_err().to_string();
    assert!(message.contains("there twice") && message.contains(&key), "{message}");
}

#[test]
fn an_adapter_without_weights_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    adapter(&[]).save(dir.path()).unwrap();
    let message = Adapter::load(dir.path()).unwrap_err().to_string();
    assert!(message.contains("holds no tensors") && message.contains("adapter_model.safetensors"), "{message}");
}

/// PEFT 0.21 computes the plain adapter with each of these.
#[test]
fn null_and_empty_are_off() {
    let path = Path::new("adapter_config.json");
    for key in [
        "use_dora",
        "use_rslora",
        "lora_bias",
        "fan_in_fan_out",
        "init_lora_weights",
        "inference_mode",
        "use_qalora",
        "qalora_group_size",
        "ensure_weight_tying",
        "trainable_token_indices",
        "layer_replication",
        "modules_to_save",
    ] {
        for value in [Value::Null, json!([]), json!({})] {
            let lists = ["trainable_token_indices", "layer_replication"];
            if !value.is_null() && !lists.contains(&key) {
                continue;
            }
            let text = json!({key: value, "r": 2}).to_string();
            let config = AdapterConfig::from_json(&text, path).unwrap_or_else(|e| panic!("{key}: {e}"));
            assert_eq!(config.beyond_plain_lora(), Vec::<&str>::new(), "{key} = {value}");
            assert_eq!((config.use_rslora, config.scaling_for("x").unwrap()), (false, 4.0), "{key}");
            AdapterConfig::from_json(&config.to_json(), path).unwrap();
        }
    }
    for key in ["r", "lora_alpha", "lora_dropout", "bias", "peft_type"] {
        let message = AdapterConfig::from_json(&json!({key: null}).to_string(), path).unwrap_err().to_string();
        assert!(message.contains(&format!("`{key}`")), "{message}");
    }
    let set = json!({"trainable_token_indices": [1], "use_bdlora": false}).to_string();
    assert_eq!(AdapterConfig::from_json(&set, path).unwrap().beyond_plain_lora(), ["trainable_token_indices"]);
}

#[test]
fn targets_without_weights_are_told() {
    let mut one = adapter(&["model.layers.0.self_attn.q_proj"]);
    assert_eq!(one.missing_targets(), ["v_proj"]);
    one.config.target_modules = names(&["self_attn.q_proj", "model.layers.0.self_attn.q_proj", "proj"]);
    one.config.modules_to_save = Some(vec!["norm".into(), "classifier".into(), "lm_head".into()]);
    for name in ["model.norm.weight", "classifier.dense.weight"] {
        let tensor = HostTensor { shape: vec![1], data: vec![1.0] };
        one.tensors.insert(format!("base_model.model.{name}"), tensor);
    }
    assert_eq!(one.missing_targets(), ["proj", "lm_head"]);
    one.config.target_modules = Some(TargetModules::Pattern(".*".into()));
    assert_eq!(one.missing_targets(), ["lm_head"]);
}

#[test]
fn modules_of_a_model_without_weights_are_told() {
    let path = |layer: usize, name: &str| format!("model.layers.{layer}.self_attn.{name}");
    let mut model: Vec<String> =
        (0..3).flat_map(|layer| ["q_proj", "k_proj", "v_proj"].map(|name| path(layer, name))).collect();
    model.extend(["lm_head".into(), "vision_tower.layers.0.self_attn.q_proj".into()]);
    let mut one = adapter(&[&path(0, "q_proj"), &path(0, "v_proj"), &path(2, "q_proj"), &path(2, "v_proj")]);
    let missing = |adapter: &Adapter| adapter.missing_modules(&model).unwrap();
    // The tower is another list of layers, which the adapter leaves alone.
    assert_eq!(missing(&one), [path(1, "q_proj"), path(1, "v_proj")]);
    one.config.layers_to_transform = Some(OneOrMany::Many(vec![0, 2]));
    assert_eq!(missing(&one), Vec::<String>::new());
    one.config.layers_pattern = Some(OneOrMany::One("layers".into()));
    assert_eq!(missing(&one), Vec::<String>::new());
    one.config.layers_to_transform = None;
    one.config.exclude_modules = Some(TargetModules::Pattern(r".*\.1\..*q_proj".into()));
    assert_eq!(missing(&one), [path(1, "v_proj")]);
    one.config.target_modules = Some(TargetModules::Pattern(r"model\.layers\.\d+\.self_attn\.[qk]_proj".into()));
    assert_eq!(missing(&one), [path(0, "k_proj"), path(1, "k_proj"), path(2, "k_proj")]);
    one.config.target_modules = Some(TargetModules::Pattern("all-linear".into()));
    assert_eq!(missing(&one), Vec::<String>::new());
    one.config.target_modules = Some(TargetModules::Pattern("(".into()));
    assert!(one.missing_modules(&model).unwrap_err().to_string().contains("target_modules"));
}

#[test]
fn a_merge_tells_what_the_adapter_lacks() {
    let folder = tempfile::tempdir().unwrap();
    let (base, out) = (folder.path().join("base"), folder.path().join("out"));
    common::model(&base);
    let adapter = adapter(&["model.layers.0.self_attn.q_proj"]);
    let report = merge_checkpoint(&base, &adapter, &out, &MergeOptions::default(), &mut |_| {}).unwrap();
    assert_eq!(report.missing, ["model.layers.0.self_attn.v_proj"]);
    assert_eq!(report.tensors.len(), 1);
}

/// A language model inside a larger one, under the names before and since transformers 4.52, and a bare one.
const ROOTS: [(&str, &str); 4] = [
    ("model.language_model", "language_model.model"),
    ("language_model.model", "model.language_model"),
    ("model", ""),
    ("", "model"),
];

fn join(root: &str, path: &str) -> String {
    if root.is_empty() { path.into() } else { format!("{root}.{path}") }
}

#[test]
fn an_adapter_merges_under_either_name_of_its_modules() {
    for (in_adapter, in_base) in ROOTS {
        let folder = tempfile::tempdir().unwrap();
        let (base, out) = (folder.path().join("base"), folder.path().join("out"));
        let q = "layers.0.self_attn.q_proj";
        let spec = |path: &str, shape: &[usize]| TensorSpec::new(join(in_base, path), Dtype::F32, shape);
        let specs = [
            spec("embed_tokens.weight", &[8, 16]),
            spec(&format!("{q}.weight"), &[16, 16]),
            spec("layers.0.self_attn.v_proj.weight", &[16, 16]),
            spec("norm.weight", &[16]),
        ];
        common::write(&base, &specs, 1 << 30);
        fs::write(base.join("config.json"), r#"{"tie_word_embeddings": true}"#).unwrap();
        let mut adapter = adapter(&[&join(in_adapter, q)]);
        adapter.config.alpha_pattern = Pattern(vec![(join(in_adapter, q), 4.0)]);
        adapter.config.modules_to_save = Some(vec!["norm".into()]);
        let norm = HostTensor { shape: vec![16], data: vec![2.5; 16] };
        adapter.tensors.insert(format!("base_model.model.{}", join(in_adapter, "norm.weight")), norm);
        let report = merge_checkpoint(&base, &adapter, &out, &MergeOptions::default(), &mut |_| {}).unwrap();
        let mut changed: Vec<&str> = report.tensors.iter().map(|t| t.name.as_str()).collect();
        changed.sort_unstable();
        let mut expected = [join(in_base, &format!("{q}.weight")), join(in_base, "norm.weight")];
        expected.sort();
        assert_eq!(changed, expected);
        assert_eq!(report.missing, [join(in_base, "layers.0.self_attn.v_proj")]);
        // The scaling of the pattern goes along: 4 / 2 times B A.
        let read = |dir: &Path, name: &str| Checkpoint::open(dir).unwrap().tensor(name).unwrap().to_f32_vec().unwrap();
        let name = join(in_base, &format!("{q}.weight"));
        let module = adapter.lora_module(&join(in_adapter, q)).unwrap().unwrap();
        assert_eq!(module.scaling, 2.0);
        let update = module.delta().unwrap();
        let wanted: Vec<f32> = read(&base, &name).iter().zip(&update.data).map(|(w, d)| w + d).collect();
        assert_eq!(read(&out, &name), wanted);
        assert_eq!(read(&out, &join(in_base, "norm.weight")), vec![2.5; 16]);
    }
}

/// As in the files of Qwen 2.5 VL, and in adapters of their day.
#[test]
fn a_language_model_may_lie_where_one_without_images_lies() {
    let names = ["model.language_model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj"];
    for (from, to) in [(names[0], names[1]), (names[1], names[0])] {
        assert_eq!(adapter(&[from]).named_as(&[to.into(), "visual.blocks.0.attn.qkv".into()]).unwrap().modules(), [to]);
        assert_eq!(adapter(&[from]).named_as(&[from.into()]).unwrap().modules(), [from]);
    }
}

#[test]
fn names_that_fit_stay_as_they_are() {
    let paths = ["model.layers.0.self_attn.q_proj", "layers.0.self_attn.q_proj"];
    for path in paths {
        let one = adapter(&[path]);
        // The model has both, or neither.
        assert_eq!(*one.named_as(&paths.map(Into::into)).unwrap(), one);
        assert_eq!(*one.named_as(&["encoder.0.q_proj".into()]).unwrap(), one);
    }
    // A head that is tied has no tensor of its own in either.
    let old = adapter(&["language_model.model.layers.0.self_attn.q_proj", "language_model.lm_head"]);
    let new = old.named_as(&["model.language_model.layers.0.self_attn.q_proj".into()]).unwrap();
    assert_eq!(new.modules(), ["lm_head", "model.language_model.layers.0.self_attn.q_proj"]);
}
