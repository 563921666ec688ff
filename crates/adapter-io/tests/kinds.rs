//! Every kind of module that PEFT writes: round trips, merging against the definition, combinations.
#![allow(clippy::unwrap_used)]

use std::fs;

use adapter_io::{
    Adapter, AdapterConfig, Combination, FormatError, HostTensor, InitLoraWeights, ModuleKind, Pattern, TargetModules,
    combine,
};
use half::bf16;

const PREFIX: &str = "base_model.model.";
const Q: &str = "model.layers.0.self_attn.q_proj";
const EMBED: &str = "model.embed_tokens";

/// Reproducible numbers in (-1, 1), other ones for another seed.
fn noise(shape: &[usize], seed: u64) -> HostTensor {
    HostTensor::new(shape, test_support::noise(seed, shape.iter().product())).unwrap()
}

fn config(rank: usize) -> AdapterConfig {
    AdapterConfig {
        r: rank,
        lora_alpha: 6.0,
        target_modules: Some(TargetModules::List(vec!["q_proj".into(), "embed_tokens".into()])),
        ..AdapterConfig::default()
    }
}

/// One linear module [5, 6] and one embedding [11, 6], with everything the configuration asks for.
fn adapter(config: AdapterConfig, seed: u64) -> Adapter {
    let mut adapter = Adapter::new(config);
    let (dora, bias, r) = (adapter.config.use_dora, adapter.config.lora_bias, adapter.config.r);
    let mut put = |name: String, tensor| adapter.tensors.insert(format!("{PREFIX}{name}"), tensor);
    put(format!("{Q}.lora_A.weight"), noise(&[r, 6], seed));
    put(format!("{Q}.lora_B.weight"), noise(&[5, r], seed + 1));
    put(format!("{EMBED}.lora_embedding_A"), noise(&[r, 11], seed + 2));
    put(format!("{EMBED}.lora_embedding_B"), noise(&[6, r], seed + 3));
    if dora {
        put(format!("{Q}.lora_magnitude_vector"), noise(&[5], seed + 4));
        put(format!("{EMBED}.lora_magnitude_vector"), noise(&[6], seed + 5));
    }
    if bias {
        put(format!("{Q}.lora_B.bias"), noise(&[5], seed + 6));
    }
    adapter
}

/// The update by its definition, in 64-bit floats and the weight's layout.
fn exact_delta(adapter: &Adapter, path: &str) -> Vec<f64> {
    let module = adapter.lora_module(path).unwrap().unwrap();
    let (a, b, r) = (module.lora_a, module.lora_b, module.lora_a.shape[0]);
    let (rows, columns) = (b.shape[0], a.shape[1]);
    let entry = |i: usize, j: usize| {
        let sum: f64 = (0..r).map(|k| f64::from(b.data[i * r + k]) * f64::from(a.data[k * columns + j])).sum();
        sum * f64::from(module.scaling)
    };
    match module.kind {
        ModuleKind::Linear => (0..rows * columns).map(|i| entry(i / columns, i % columns)).collect(),
        ModuleKind::Embedding => (0..rows * columns).map(|i| entry(i % rows, i / rows)).collect(),
    }
}

fn assert_close(actual: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(actual.len(), expected.len());
    for (i, (a, e)) in actual.iter().zip(expected).enumerate() {
        assert!((f64::from(*a) - e).abs() <= tolerance, "{i}: {a} {e}");
    }
}

#[test]
fn every_kind_survives_save_and_load() {
    let dir = tempfile::tempdir().unwrap();
    for (i, (use_dora, lora_bias)) in [(false, false), (true, false), (false, true)].into_iter().enumerate() {
        let mut adapter = adapter(AdapterConfig { use_dora, lora_bias, ..config(3) }, 7);
        adapter.config.modules_to_save = Some(vec!["norm".into()]);
        adapter.config.exclude_modules = Some(TargetModules::List(vec!["v_proj".into()]));
        adapter.tensors.insert(format!("{PREFIX}model.norm.weight"), noise(&[6], 9));
        let (first, second) = (dir.path().join(format!("{i}a")), dir.path().join(format!("{i}b")));
        adapter.save(&first).unwrap();
        let loaded = Adapter::load(&first).unwrap();
        assert_eq!(loaded, adapter);
        assert_eq!(loaded.embeddings(), [EMBED]);
        let saved: Vec<_> = loaded.saved_tensors().map(|(name, _)| name).collect();
        assert_eq!(saved, ["model.norm.weight"]);
        loaded.save(&second).unwrap();
        for name in ["adapter_config.json", "adapter_model.safetensors"] {
            assert_eq!(fs::read(first.join(name)).unwrap(), fs::read(second.join(name)).unwrap());
        }
    }
}

#[test]
fn parts_that_contradict_the_configuration_are_refused() {
    type Change = fn(&mut Adapter);
    let cases: [(Change, &str); 6] = [
        (|a| drop(a.tensors.remove(&format!("{PREFIX}{Q}.lora_magnitude_vector"))), "no lora_magnitude_vector"),
        (|a| a.config.use_dora = false, "`use_dora` of adapter_config.json is false"),
        (|a| a.config.lora_bias = true, "no lora_B.bias"),
        (|a| drop(a.tensors.insert(format!("{PREFIX}{EMBED}.lora_magnitude_vector"), noise(&[5], 1))), "[5]"),
        (|a| drop(a.tensors.insert(format!("{PREFIX}{EMBED}.lora_embedding_A"), noise(&[2, 11], 1))), "rank 2"),
        (|a| a.config.rank_pattern = Pattern(vec![("embed_tokens".into(), 9.0)]), "rank 9"),
    ];
    for (change, says) in cases {
        let mut adapter = adapter(AdapterConfig { use_dora: true, ..config(3) }, 1);
        change(&mut adapter);
        let message = adapter.save(tempfile::tempdir().unwrap().path()).unwrap_err().to_string();
        assert!(message.contains(says), "{says}: {message}");
    }
    // A part without its counterpart is seen when the file is read.
    for lost in ["lora_A.weight", "lora_B.weight"] {
        let dir = tempfile::tempdir().unwrap();
        let mut adapter = adapter(AdapterConfig { lora_bias: true, ..config(3) }, 1);
        adapter.tensors.remove(&format!("{PREFIX}{Q}.{lost}"));
        adapter.save(dir.path()).unwrap();
        assert!(Adapter::load(dir.path()).unwrap_err().to_string().contains("incomplete"));
    }
}

#[test]
fn every_kind_merges_by_its_definition() {
    for use_dora in [false, true] {
        let adapter = adapter(AdapterConfig { use_dora, use_rslora: use_dora, ..config(3) }, 3);
        for (path, shape) in [(Q, [5, 6]), (EMBED, [11, 6])] {
            let module = adapter.lora_module(path).unwrap().unwrap();
            let before = noise(&shape, 20);
            let delta = exact_delta(&adapter, path);
            // Three products of numbers below 1, scaled by at most 3.5, in f32.
            assert_close(&module.delta().unwrap().data, &delta, 2e-6);
            let mut expected: Vec<f64> = before.data.iter().zip(&delta).map(|(w, d)| f64::from(*w) + d).collect();
            if let Some(magnitude) = module.magnitude {
                let feature = |i: usize| if path == Q { i / shape[1] } else { i % shape[1] };
                let norms: Vec<f64> = (0..magnitude.data.len())
                    .map(|f| {
                        let own = expected.iter().enumerate().filter(|(i, _)| feature(*i) == f);
                        own.map(|(_, x)| x * x).sum::<f64>().sqrt()
                    })
                    .collect();
                for (i, x) in expected.iter_mut().enumerate() {
                    *x *= f64::from(magnitude.data[feature(i)]) / norms[feature(i)];
                }
            }
            let mut merged = before.data.clone();
            let change = module.merge_into(&mut merged, &shape).unwrap();
            assert_close(&merged, &expected, 4e-6);
            let largest = merged.iter().zip(&before.data).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert_eq!(change.largest, largest);
            assert!(change.relative > 0.1 && change.relative < 20.0, "{change:?}");
            // In half precision the sum is rounded once.
            let mut half: Vec<bf16> = before.data.iter().map(|x| bf16::from_f32(*x)).collect();
            let mut wide: Vec<f32> = half.iter().map(|x| x.to_f32()).collect();
            module.merge_into(&mut half, &shape).unwrap();
            module.merge_into(&mut wide, &shape).unwrap();
            assert_eq!(half, wide.iter().map(|x| bf16::from_f32(*x)).collect::<Vec<_>>());
            let message = module.merge_into(&mut merged, &[shape[1], shape[0]]).unwrap_err().to_string();
            assert!(message.contains(path) && message.contains("another base model"), "{message}");
        }
    }
    let adapter = adapter(AdapterConfig { lora_bias: true, ..config(3) }, 3);
    let module = adapter.lora_module(Q).unwrap().unwrap();
    let mut bias = noise(&[5], 2).data;
    module.merge_bias(&mut bias, &[5]).unwrap();
    let lora = &adapter.tensors[&format!("{PREFIX}{Q}.lora_B.bias")].data;
    let sum: Vec<f64> =
        noise(&[5], 2).data.iter().zip(lora).map(|(b, l)| f64::from(*b) + 2.0 * f64::from(*l)).collect();
    assert_close(&bias, &sum, 1e-6);
    assert!(module.merge_bias(&mut bias[..4], &[4]).is_err());
}

#[test]
fn weights_that_overflow_are_refused() {
    let mut adapter = adapter(config(1), 3);
    adapter.tensors.get_mut(&format!("{PREFIX}{Q}.lora_B.weight")).unwrap().data[2] = f32::NAN;
    let module = adapter.lora_module(Q).unwrap().unwrap();
    let message = module.merge_into(&mut [0.5f32; 30], &[5, 6]).unwrap_err().to_string();
    assert!(message.contains("not finite") && message.contains(Q), "{message}");
}

/// The weighted sum of updates.
fn wanted(parts: &[(&Adapter, f64)], path: &str) -> Vec<f64> {
    let mut sum = vec![0.0; exact_delta(parts[0].0, path).len()];
    for (adapter, weight) in parts {
        sum.iter_mut().zip(exact_delta(adapter, path)).for_each(|(s, d)| *s += weight * d);
    }
    sum
}

#[test]
fn combinations_give_the_weighted_sum_of_updates() {
    let (one, mut two) = (adapter(config(2), 30), adapter(AdapterConfig { use_rslora: true, ..config(3) }, 40));
    two.config.alpha_pattern = Pattern(vec![("q_proj".into(), 2.0)]);
    let parts = [(&one, 0.7), (&two, -1.3)];
    // Rank 5 holds the whole sum.
    for (how, rank) in
        [(Combination::Cat, 5), (Combination::Svd { rank: Some(5) }, 5), (Combination::Svd { rank: Some(8) }, 8)]
    {
        let combined = combine(&parts, how).unwrap();
        assert_eq!((combined.config.r, combined.config.lora_alpha), (rank, rank as f64));
        for path in [Q, EMBED] {
            let delta = combined.lora_module(path).unwrap().unwrap().delta().unwrap();
            // Five products around 3, rounded to f32 at each factor.
            assert_close(&delta.data, &wanted(&parts, path), 1e-5);
        }
        let dir = tempfile::tempdir().unwrap();
        combined.save(dir.path()).unwrap();
        assert_eq!(Adapter::load(dir.path()).unwrap(), combined);
    }
    // The best update of rank 3 (the default): its residual is orthogonal to what was kept, and shrinks
    // with every rank.
    let residual = |rank| {
        let delta =
            combine(&parts, Combination::Svd { rank }).unwrap().lora_module(Q).unwrap().unwrap().delta().unwrap();
        let wanted = wanted(&parts, Q);
        let rest: Vec<f64> = wanted.iter().zip(&delta.data).map(|(w, d)| w - f64::from(*d)).collect();
        let inner: f64 = rest.iter().zip(&delta.data).map(|(r, d)| r * f64::from(*d)).sum();
        assert!(inner.abs() < 1e-4, "{inner}");
        rest.iter().map(|r| r * r).sum::<f64>().sqrt()
    };
    let errors: Vec<f64> = [Some(1), Some(2), None, Some(4)].into_iter().map(residual).collect();
    assert!(errors.windows(2).all(|w| w[0] > w[1]) && errors[2] > 1e-3, "{errors:?}");
}

#[test]
fn combinations_that_overflow_are_refused() {
    let (one, other) = (adapter(config(2), 1), adapter(config(2), 2));
    for how in [Combination::Cat, Combination::Linear, Combination::Svd { rank: None }] {
        for weight in [1e39, 1e300, f64::NAN] {
            let error = combine(&[(&one, weight), (&other, 1.0)], how).unwrap_err();
            assert!(matches!(error, FormatError::Combine { .. }), "{how:?}: {error}");
        }
        // The weight is a 32-bit float; of its product with the scaling, 12, only the root is one.
        let large = adapter(AdapterConfig { lora_alpha: 24.0, ..config(2) }, 3);
        let result = combine(&[(&large, 3e38), (&other, 1.0)], how);
        if how == Combination::Linear {
            result.unwrap();
        } else {
            let error = result.unwrap_err();
            assert!(matches!(&error, FormatError::Factors { .. }) && error.to_string().contains("overflow"), "{error}");
        }
    }
}

#[test]
fn a_linear_combination_sums_the_factors() {
    let (one, two) = (adapter(config(2), 30), adapter(config(2), 40));
    let combined = combine(&[(&one, 0.25), (&two, -0.5)], Combination::Linear).unwrap();
    let part = |suffix: &str| {
        let key = format!("{PREFIX}{Q}.{suffix}");
        (&combined.tensors[&key].data, &one.tensors[&key].data, &two.tensors[&key].data)
    };
    // Scaling 6 / 2: the roots of 0.75 and 1.5, the sign on A.
    for (suffix, sign) in [("lora_A.weight", -1.0), ("lora_B.weight", 1.0)] {
        let (sum, a, b) = part(suffix);
        let expected: Vec<f64> = a
            .iter()
            .zip(b)
            .map(|(x, y)| f64::from(*x) * 0.75f64.sqrt() + sign * f64::from(*y) * 1.5f64.sqrt())
            .collect();
        assert_close(sum, &expected, 1e-6);
    }
    // One adapter alone is scaled, whatever is asked for.
    let scaled = combine(&[(&one, 0.5)], Combination::Cat).unwrap();
    assert_eq!(scaled.config.r, 2);
    assert_close(&scaled.lora_module(Q).unwrap().unwrap().delta().unwrap().data, &wanted(&[(&one, 0.5)], Q), 1e-5);
}

#[test]
fn combinations_carry_biases_and_saved_modules() {
    let (mut one, two) = (adapter(AdapterConfig { lora_bias: true, ..config(2) }, 1), adapter(config(2), 2));
    one.config.modules_to_save = Some(vec!["norm".into()]);
    one.tensors.insert(format!("{PREFIX}model.norm.weight"), noise(&[6], 9));
    let combined = combine(&[(&one, 0.5), (&two, 2.0)], Combination::Cat).unwrap();
    let bias = |a: &Adapter| a.tensors[&format!("{PREFIX}{Q}.lora_B.bias")].data.clone();
    let half: Vec<f64> = bias(&one).iter().map(|x| f64::from(*x) * 1.5).collect();
    assert_close(&bias(&combined), &half, 1e-6);
    assert_eq!(combined.saved_tensors().count(), 1);
    let message = |adapters: &[(&Adapter, f64)], how| combine(adapters, how).unwrap_err().to_string();
    assert!(message(&[(&one, 1.0), (&one, 1.0)], Combination::Cat).contains("model.norm.weight"));
    assert!(message(&[], Combination::Cat).contains("no adapter"));
    assert!(message(&[(&two, f64::NAN)], Combination::Cat).contains("finite"));
    assert!(message(&[(&two, 1.0), (&adapter(config(3), 1), 1.0)], Combination::Linear).contains("[2, 3]"));
    let dora = adapter(AdapterConfig { use_dora: true, ..config(2) }, 1);
    assert!(message(&[(&two, 1.0), (&dora, 1.0)], Combination::Cat).contains("DoRA"));
    let olora = InitLoraWeights::Method("olora".into());
    let changed = adapter(AdapterConfig { init_lora_weights: olora, ..config(2) }, 1);
    assert!(message(&[(&two, 1.0), (&changed, 1.0)], Combination::Cat).contains("olora"));
    let pattern = adapter(AdapterConfig { target_modules: Some(TargetModules::Pattern(".*".into())), ..config(2) }, 1);
    assert!(message(&[(&two, 1.0), (&pattern, 1.0)], Combination::Cat).contains("pattern"));
}
