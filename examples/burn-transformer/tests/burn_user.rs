//! What a Burn user can count on: 4-bit layers with adapters inside a module of burn-nn layers train, move, record and save like any
//! other part of a Burn module, and compute what a dense model computes.

#![allow(clippy::unwrap_used, reason = "a failing unwrap is a failing test")]

use std::collections::BTreeMap;

use burn::module::{Lora, Module, ModuleMapper, ModuleVisitor, Param, ParamGroup};
use burn::nn::EmbeddingConfig;
use burn::optim::{AdamWConfig, GradientsParams};
use burn::store::ModuleRecord;
use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_transformer::{Transformer, VOCABULARY, WIDTH, batch};
use nf4_quant::{QuantConfig, QuantType};
use paged_optim::PagedAdamWConfig;
use qlora_layers::peft::{load_adapter, save_adapter};
use qlora_layers::{LayerError, LoraConfig, LoraEmbedding, LoraEmbeddingConfig, TargetModules, apply_lora};

const RANK: usize = 4;

fn config() -> LoraConfig {
    LoraConfig { rank: RANK, alpha: 8.0, ..LoraConfig::default() }
}

fn device() -> Device {
    let device = Device::flex().autodiff();
    device.seed(1);
    device
}

fn adapted(device: &Device) -> Transformer {
    apply_lora(Transformer::init(device), &config(), QuantConfig::default(), 3).unwrap()
}

/// After one step of Burn's AdamW.
fn trained(model: Transformer, device: &Device) -> Transformer {
    let grads = GradientsParams::from_grads(model.loss(batch(0, 0, 4, 12, device)).backward(), &model);
    AdamWConfig::new().init().step(1e-2, model, grads)
}

fn logits(model: &Transformer, device: &Device) -> Vec<f32> {
    model.forward(batch(0, 0, 2, 9, device)).try_into_vec_as::<f32>().unwrap()
}

/// The largest difference of two lists of numbers.
fn difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// Values of all float parameters by path; of the gradients instead, where there are some.
#[derive(Default)]
struct Values<'a> {
    path: Vec<String>,
    grads: Option<&'a GradientsParams>,
    found: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
    integers: usize,
}

impl ModuleVisitor for Values<'_> {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let tensor = match self.grads {
            Some(grads) => grads.get::<D>(param.id),
            None => Some(param.val()),
        };
        if let Some(tensor) = tensor {
            let values = tensor.clone().try_into_vec_as::<f32>().unwrap();
            self.found.insert(self.path.join("."), (tensor.dims().to_vec(), values));
        }
    }

    fn visit_int<const D: usize>(&mut self, _: &Param<Tensor<D, Int>>) {
        self.integers += 1;
    }
}

fn values<'a>(model: &Transformer, grads: Option<&'a GradientsParams>) -> Values<'a> {
    let mut values = Values { grads, ..Values::default() };
    model.visit(&mut values);
    values
}

/// `[rows, columns]` to `[columns, rows]`.
fn transposed((shape, values): &(Vec<usize>, Vec<f32>)) -> Vec<f32> {
    (0..shape[1]).flat_map(|column| (0..shape[0]).map(move |row| values[row * shape[1] + column])).collect()
}

/// Burn's own LoRA over the dequantized weights, with the factors of `model`: everything dense, no code of ours.
fn dense_reference(model: &Transformer) -> Transformer {
    struct Factors(Vec<String>, BTreeMap<String, (Vec<usize>, Vec<f32>)>);

    impl ModuleMapper for Factors {
        fn enter_module(&mut self, name: &str, _: &str) {
            self.0.push(name.into());
        }

        fn exit_module(&mut self, _: &str, _: &str) {
            self.0.pop();
        }

        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            let path = self.0.join(".");
            let name = path.replace(".weight.lora.", ".weight.lora_linear.adapter.lora_");
            if name == path {
                return param;
            }
            let ours = &self.1[&name];
            let data = TensorData::new(transposed(ours), [ours.0[1], ours.0[0]]);
            param.map(|old| Tensor::from_data(data, &old.device()).require_grad())
        }
    }

    let factors = values(model, None).found;
    let adapted = factors.keys().filter_map(|path| path.strip_suffix(".lora_linear.adapter.lora_a"));
    let adapted = ParamGroup::from_paths(adapted.map(str::to_owned).collect());
    // The adapters' updates are zero, so what is merged are the dequantized weights.
    let dense = model.clone().materialize();
    dense.apply_lora(Lora::new(RANK, 8.0).set_param_group(adapted)).map(&mut Factors(Vec::new(), factors))
}

#[test]
fn gradients_and_losses_are_those_of_a_dense_reference() {
    let device = device();
    let mut model = adapted(&device);
    let mut reference = dense_reference(&model);
    let gradients = |model: &Transformer| {
        let grads = GradientsParams::from_grads(model.loss(batch(0, 0, 4, 12, &device)).backward(), model);
        values(model, Some(&grads)).found
    };
    let (ours, theirs) = (gradients(&model), gradients(&reference));
    let theirs: Vec<_> = theirs.into_iter().filter(|(path, _)| path.contains(".lora.")).collect();
    // Two factors of twelve layers.
    assert_eq!((ours.len(), theirs.len()), (24, 24));
    for ((path, ours), (other, theirs)) in ours.iter().zip(&theirs) {
        assert_eq!(path.replace("lora_linear.adapter.lora_", "lora."), *other);
        let error = difference(&ours.1, &transposed(theirs));
        // f32 sums in another order, of gradients that are at most of order 1e-1.
        assert!(error < 1e-7, "{path}: gradients differ by {error}");
        // The gradient of `lora_a` is zero while `lora_b` is.
        assert!(path.ends_with("_a") || ours.1.iter().any(|x| x.abs() > 1e-5), "{path}: no gradient");
    }
    // The same optimizer leads both to the same losses. Burn's default epsilon of 1e-5 keeps first steps from amplifying rounding.
    let (mut ours, mut theirs) = (AdamWConfig::new().init(), AdamWConfig::new().init());
    let mut first_and_last = [0.0; 2];
    for step in 0..20 {
        let [a, b] = [(&mut model, &mut ours), (&mut reference, &mut theirs)].map(|(model, optimizer)| {
            let loss = model.loss(batch(0, step, 4, 12, &device));
            let grads = GradientsParams::from_grads(loss.backward(), model);
            *model = optimizer.step(2e-3, model.clone(), grads);
            loss.into_scalar::<f32>()
        });
        assert!((a - b).abs() <= 1e-6 * b.abs(), "step {step}: losses {a} and {b}");
        first_and_last[usize::from(step > 0)] = a;
    }
    assert!(first_and_last[1] < 0.95 * first_and_last[0], "nothing was learned: {first_and_last:?}");
}

#[test]
fn burns_adamw_and_the_paged_one_agree_in_each_step() {
    let device = device();
    let start = adapted(&device);
    // Burn's defaults, which are not PyTorch's.
    let config = PagedAdamWConfig::new().with_epsilon(1e-5).with_weight_decay(1e-4);
    let train = |step: &mut dyn FnMut(Transformer, GradientsParams) -> Transformer| {
        let mut model = start.clone();
        let mut losses = Vec::new();
        for i in 0..20 {
            let loss = model.loss(batch(0, i, 4, 12, &device));
            let grads = GradientsParams::from_grads(loss.backward(), &model);
            model = step(model, grads);
            losses.push(loss.into_scalar::<f32>());
        }
        (losses, logits(&model, &device))
    };
    let (mut by_burn, mut tensorwise, mut paged) = (AdamWConfig::new().init(), config.init(), config.init_paged());
    let (burn, _) = train(&mut |model, grads| by_burn.step(1e-3, model, grads));
    let (by_tensor, logits_by_tensor) = train(&mut |model, grads| tensorwise.step(1e-3, model, grads));
    let (whole, logits_of_whole) = train(&mut |model, grads| paged.step(1e-3, model, grads));
    // Burn applies the same rule in another order of operations.
    for (step, (ours, theirs)) in whole.iter().zip(&burn).enumerate() {
        assert!((ours - theirs).abs() <= 1e-6 * theirs.abs(), "step {step}: losses {ours} and {theirs}");
    }
    assert_eq!((by_tensor, logits_by_tensor), (whole, logits_of_whole), "both forms give the same bits");
}

#[test]
fn a_plain_forward_gives_what_lora_forward_gives() {
    let device = device();
    let model = adapted(&device);
    // `materialize` and `Linear::forward` take the dense weight that the adapted layer stands for.
    assert!(difference(&logits(&model, &device), &logits(&model.clone().materialize(), &device)) < 1e-5);
}

#[test]
fn only_factors_are_trained_and_everything_is_seen() {
    let device = device();
    let plain = Transformer::init(&device);
    let dense_linears = 2 * (4 * WIDTH * WIDTH + 2 * 4 * WIDTH * WIDTH);
    let factors = 2 * RANK * (4 * 2 * WIDTH + 2 * (WIDTH + 4 * WIDTH));
    let model = apply_lora(plain.clone(), &config(), QuantConfig::default(), 3).unwrap();
    // `num_params` counts floats: the dense weights are gone, the factors have come.
    assert_eq!(model.num_params(), plain.num_params() - dense_linears + factors);
    let seen = values(&model, None);
    // Codes, statistics, nested statistics and the format of twelve layers, and the scaling of their adapters.
    assert_eq!(seen.integers, 5 * 12);
    assert_eq!(seen.found.values().map(|(_, values)| values.len()).sum::<usize>(), model.num_params());
    let before = values(&model, None).found;
    let grads = GradientsParams::from_grads(model.loss(batch(0, 0, 4, 12, &device)).backward(), &model);
    assert_eq!(grads.len(), 24, "gradients of the factors and of nothing else");
    let trained = AdamWConfig::new().init().step(1e-2, model, grads);
    for (path, (_, after)) in values(&trained, None).found {
        let same = before[&path].1 == after;
        // `lora_a` has no gradient yet, but decays by Burn's default weight decay.
        assert_eq!(same, !path.contains(".adapter.lora_"), "{path}");
    }
}

#[test]
fn validation_and_another_device_change_nothing() {
    let device = device();
    let model = adapted(&device);
    let before = logits(&model, &device);
    let valid = model.valid();
    let plain = Device::flex();
    // Without autodiff Burn runs some of its own operations in other kernels.
    assert!(difference(&logits(&valid, &plain), &before) < 1e-5);
    let trainable = |model: &Transformer| {
        let grads = GradientsParams::from_grads(model.loss(batch(0, 0, 2, 9, &device)).backward(), model);
        grads.len()
    };
    assert_eq!(trainable(&valid.train()), 24, "the same parameters train again");
    assert_eq!(trainable(&model.clone().fork(&device)), 24);
    assert_eq!(logits(&model.to_device(&device), &device), before);
}

#[test]
fn a_record_brings_everything_back_or_says_why_not() {
    let device = device();
    let trained = trained(adapted(&device), &device);
    let bytes = trained.clone().into_record().into_bytes().unwrap();
    let other = || Transformer::init(&device);
    let record = || ModuleRecord::from_bytes(bytes.clone()).unwrap();
    let loaded = apply_lora(other(), &config(), QuantConfig::default(), 9).unwrap();
    assert!(difference(&logits(&loaded, &device), &logits(&trained, &device)) > 1e-2);
    let loaded = loaded.try_load_record(record()).unwrap();
    assert_eq!(logits(&loaded, &device), logits(&trained, &device));
    // The scaling is part of what is saved.
    let alpha = LoraConfig { alpha: 64.0, ..config() };
    let loaded = apply_lora(other(), &alpha, QuantConfig::default(), 9).unwrap().try_load_record(record()).unwrap();
    assert_eq!(logits(&loaded, &device), logits(&trained, &device));
    // FP4 codes have the same sizes as NF4's, and would be read as nonsense.
    let fp4 = QuantConfig { quant_type: QuantType::Fp4, ..QuantConfig::default() };
    for wrong in [fp4, QuantConfig { blocksize: 128, ..QuantConfig::default() }] {
        let refused = apply_lora(other(), &config(), wrong, 9).unwrap().try_load_record(record());
        assert!(refused.unwrap_err().to_string().contains("query"), "{wrong:?}");
    }
}

#[test]
fn an_adapter_in_pefts_files_comes_back() {
    let device = device();
    let folder = tempfile::tempdir().unwrap();
    let plain = Transformer::init(&device);
    let config = LoraConfig { modules_to_save: vec!["blocks.1.attention_norm".into()], ..config() };
    for (kind, config) in [
        ("lora", config.clone()),
        ("dora", LoraConfig { use_dora: true, use_rslora: true, ..config.clone() }),
        ("bias", LoraConfig { lora_bias: true, rank_pattern: vec![("query".into(), 8)], ..config }),
    ] {
        let model = apply_lora(plain.clone(), &config, QuantConfig::default(), 3).unwrap();
        let trained = trained(model.clone(), &device);
        let dir = folder.path().join(kind);
        save_adapter(&trained, &config, "burn-transformer", &dir).unwrap();
        let expected = logits(&trained, &device);
        assert!(difference(&expected, &logits(&model, &device)) > 1e-3, "{kind}: training changed nothing");
        // On the plain module, and on those that have adapters already, whose scaling becomes the file's.
        let alpha = LoraConfig { alpha: 64.0, use_rslora: !config.use_rslora, ..config.clone() };
        let scaled = apply_lora(plain.clone(), &alpha, QuantConfig::default(), 9).unwrap();
        for start in [plain.clone(), model, scaled] {
            let loaded = load_adapter(start, &dir, QuantConfig::default()).unwrap();
            assert!(difference(&logits(&loaded, &device), &expected) < 1e-6, "{kind}");
        }
        let other = LoraConfig { rank: 3, ..config };
        assert!(matches!(
            save_adapter(&trained, &other, "burn-transformer", &dir),
            Err(LayerError::OtherAdapters { expected: 3, .. })
        ));
        let other = LoraConfig { rank: RANK, alpha: 64.0, ..other };
        let refused = save_adapter(&trained, &other, "burn-transformer", &dir).unwrap_err();
        assert!(matches!(refused, LayerError::OtherScaling { .. }), "{kind}: {refused}");
    }
}

#[test]
fn adapters_of_another_kind_are_refused_by_the_part_that_differs() {
    let device = device();
    let folder = tempfile::tempdir().unwrap();
    let plain = Transformer::init(&device);
    let kinds = [
        ("lora", config()),
        ("dora", LoraConfig { use_dora: true, ..config() }),
        ("bias", LoraConfig { lora_bias: true, ..config() }),
        ("fewer", LoraConfig { target_modules: TargetModules::Names(vec!["query".into()]), ..config() }),
    ];
    let adapted = |config: &LoraConfig| apply_lora(plain.clone(), config, QuantConfig::default(), 3).unwrap();
    for (kind, config) in &kinds {
        save_adapter(&adapted(config), config, "burn-transformer", folder.path().join(kind)).unwrap();
    }
    // What is on the module, what is in the file, and what the message says.
    for (module, file, part) in [
        (0, "dora", "holds blocks.0.attention.key.lora_magnitude_vector"),
        (0, "bias", "holds blocks.0.attention.key.lora_B.bias"),
        (1, "lora", "adapters with blocks.0"),
        (2, "lora", "adapters with blocks.0"),
        (0, "fewer", "adapters with blocks.0"),
    ] {
        let refused = load_adapter(adapted(&kinds[module].1), folder.path().join(file), QuantConfig::default());
        let refused = refused.map(|_| ()).unwrap_err().to_string();
        assert!(refused.contains(part), "{file} on {}: {refused}", kinds[module].0);
    }
    // The file's adapters go on what is still plain.
    let mixed = load_adapter(adapted(&kinds[3].1), folder.path().join("lora"), QuantConfig::default()).unwrap();
    assert_eq!(logits(&mixed, &device), logits(&adapted(&kinds[0].1), &device));
}

#[test]
fn mistakes_are_named() {
    let device = device();
    let plain = Transformer::init(&device);
    let apply =
        |config: &LoraConfig| apply_lora(plain.clone(), config, QuantConfig::default(), 0).map(|_| ()).unwrap_err();
    let nothing = LoraConfig { target_modules: TargetModules::Names(vec!["q_proj".into()]), ..config() };
    assert!(apply(&nothing).to_string().contains("query"), "the message lists what there is");
    assert!(apply(&LoraConfig { rank: 0, ..config() }).to_string().contains("rank"));
    let twice = apply_lora(adapted(&device), &config(), QuantConfig::default(), 0);
    assert!(matches!(twice, Err(LayerError::Adapted { .. })));
    assert_eq!(VOCABULARY, logits(&plain, &device).len() / 18);
}

#[test]
fn an_adapted_embedding_is_a_module_of_its_own() {
    #[derive(Module, Debug)]
    struct Words {
        words: LoraEmbedding,
    }

    let device = device();
    let table = EmbeddingConfig::new(16, 8).init(&device);
    let settings = LoraEmbeddingConfig::new(4).with_alpha(8.0).with_use_dora(true);
    let fresh = || Words { words: settings.from_embedding(&table).unwrap() };
    let ids = Tensor::<2, Int>::from_data([[3, 1, 15], [0, 3, 3]], &device);
    let rows = |model: &Words| model.words.forward(ids.clone()).try_into_vec_as::<f32>().unwrap();
    let plain = table.forward(ids.clone()).try_into_vec_as::<f32>().unwrap();
    let model = fresh();
    // DoRA divides each feature by its norm and multiplies by it again.
    assert!(difference(&rows(&model), &plain) < 1e-6, "a fresh adapter changes nothing");
    assert_eq!(model.num_params(), 16 * 8 + 4 * (16 + 8) + 2 * 8, "table, factors, magnitudes and squared norms");
    let loss = model.words.forward(ids.clone()).powi_scalar(2).sum();
    let grads = GradientsParams::from_grads(loss.backward(), &model);
    assert_eq!(grads.len(), 3, "both factors and the magnitudes");
    let trained = PagedAdamWConfig::new().init_paged().step(1e-2, model, grads);
    assert!(difference(&rows(&trained), &plain) > 1e-3);
    let merged = trained.words.merged().select(0, Tensor::<1, Int>::from_data([3], &device));
    let merged = merged.try_into_vec_as::<f32>().unwrap();
    assert!(difference(&rows(&trained)[..8], &merged) < 1e-6);

    let folder = tempfile::tempdir().unwrap();
    let config = LoraConfig {
        use_dora: true,
        rank: 4,
        alpha: 8.0,
        target_modules: TargetModules::Names(vec!["words".into()]),
        ..LoraConfig::default()
    };
    save_adapter(&trained, &config, "words", folder.path()).unwrap();
    let loaded = load_adapter(fresh(), folder.path(), None).unwrap();
    assert_eq!(rows(&loaded), rows(&trained));
    let all_linear = LoraConfig { target_modules: TargetModules::AllLinear, ..config };
    assert!(save_adapter(&trained, &all_linear, "words", folder.path()).is_err(), "it would lack the embedding");
}
