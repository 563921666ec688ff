//! Adapters on stacked experts: what a stack means, there and back, and what does not fit.
#![allow(clippy::unwrap_used, reason = "a failing unwrap is a failing test")]

use adapter_io::adapter::KEY_PREFIX;
use adapter_io::experts::{is_fused, one_rank, stack, unstack};
use adapter_io::{Adapter, AdapterConfig, FormatError, HostTensor, Pattern, TargetModules};
use serde_json::json;

const EXPERTS: usize = 3;
const HIDDEN: usize = 4;
const INTER: usize = 2;
/// Of `gate_up_proj`, by its pattern, and of `down_proj`.
const RANKS: [usize; 2] = [2, 1];

fn modules(list: &str, names: [&str; 3]) -> Vec<String> {
    let expert = |e: usize| names.map(|name| format!("model.layers.1.{list}.{e}.{name}"));
    (0..EXPERTS).flat_map(expert).chain(["model.layers.1.self_attn.q_proj".into()]).collect()
}

fn mixtral() -> Vec<String> {
    let mut modules = modules("block_sparse_moe.experts", ["w1", "w3", "w2"]);
    modules.push("model.layers.1.block_sparse_moe.gate".into());
    modules
}

fn qwen() -> Vec<String> {
    modules("mlp.experts", ["gate_proj", "up_proj", "down_proj"])
}

/// Gate and input projection take turns.
fn gpt_oss() -> Vec<String> {
    qwen().into_iter().chain(["model.layers.1.mlp.router".into()]).collect()
}

fn counting(shape: [usize; 2], start: f32) -> HostTensor {
    HostTensor { shape: shape.into(), data: (0..shape[0] * shape[1]).map(|i| start + i as f32).collect() }
}

/// As PEFT writes it: both parameters adapted, the wrapper of `gate_up_proj` inside.
fn stacked(parameters: &[&str]) -> Adapter {
    let mut adapter = Adapter::new(AdapterConfig {
        r: RANKS[1],
        lora_alpha: 3.0,
        target_modules: Some(TargetModules::List(vec!["q_proj".into()])),
        target_parameters: Some(json!(parameters)),
        rank_pattern: Pattern(vec![(r".*\.gate_up_proj".into(), RANKS[0] as f64)]),
        alpha_pattern: Pattern(vec![(r".*\.gate_up_proj".into(), 8.0)]),
        ..AdapterConfig::default()
    });
    let mut put = |module: &str, rank: usize, [out, width]: [usize; 2], start: f32| {
        let key = format!("{KEY_PREFIX}model.layers.1.{module}");
        adapter.tensors.insert(format!("{key}.lora_A.weight"), counting([rank * EXPERTS, width], start));
        adapter.tensors.insert(format!("{key}.lora_B.weight"), counting([out, rank * EXPERTS], -start));
    };
    put("mlp.experts.base_layer", RANKS[0], [2 * INTER, HIDDEN], 100.0);
    put("mlp.experts", RANKS[1], [HIDDEN, INTER], 500.0);
    if parameters.contains(&"gate.weight") {
        let key = format!("{KEY_PREFIX}model.layers.1.mlp.gate");
        adapter.tensors.insert(format!("{key}.lora_A.weight"), counting([1, HIDDEN], 900.0));
        adapter.tensors.insert(format!("{key}.lora_B.weight"), counting([EXPERTS, 1], 950.0));
    }
    adapter
}

/// `B A` of a module.
fn product(adapter: &Adapter, module: &str) -> Vec<f32> {
    let (a, b) = adapter.lora(module).unwrap();
    let (rank, width) = (a.shape[0], a.shape[1]);
    let dot = |row: &[f32], column: usize| (0..rank).map(|i| row[i] * a.data[i * width + column]).sum::<f32>();
    b.data.chunks(rank).flat_map(|row| (0..width).map(move |column| (row, column))).map(|(r, c)| dot(r, c)).collect()
}

#[test]
fn an_expert_gets_its_rows_and_columns() {
    let adapter = stacked(&["gate_up_proj", "down_proj", "gate.weight"]);
    let plain = unstack(&adapter, &mixtral()).unwrap();
    let (a, b) = adapter.lora("model.layers.1.mlp.experts.base_layer").unwrap();
    for e in 0..EXPERTS {
        // PEFT's definition: A as [experts, r, in], B as [out, r, experts].
        let expected = |o: usize, i: usize| -> f32 {
            let b = |r: usize| b.data[o * RANKS[0] * EXPERTS + r * EXPERTS + e];
            (0..RANKS[0]).map(|r| b(r) * a.data[(e * RANKS[0] + r) * HIDDEN + i]).sum()
        };
        for (name, first) in [("w1", 0), ("w3", INTER)] {
            let module = format!("model.layers.1.block_sparse_moe.experts.{e}.{name}");
            let wanted: Vec<f32> = (first..first + INTER)
                .flat_map(|o| (0..HIDDEN).map(move |i| (o, i)))
                .map(|(o, i)| expected(o, i))
                .collect();
            assert_eq!(product(&plain, &module), wanted, "{module}");
            assert_eq!(plain.config.scaling_for(&module).unwrap(), 8.0 / 2.0);
        }
        let down = format!("model.layers.1.block_sparse_moe.experts.{e}.w2");
        assert_eq!(plain.lora(&down).unwrap().0.data, [500.0 + 2.0 * e as f32, 501.0 + 2.0 * e as f32]);
        assert_eq!(plain.config.scaling_for(&down).unwrap(), 3.0);
    }
    assert!(plain.lora("model.layers.1.block_sparse_moe.gate").is_some());
    assert!(plain.lora_modules().is_ok(), "every rank is the configured one");
    assert_eq!(plain.modules().len(), 3 * EXPERTS + 1);
}

#[test]
fn there_and_back_nothing_changes() {
    for (modules, parameters) in [
        (mixtral(), vec!["gate.weight", "gate_up_proj", "down_proj"]),
        (qwen(), vec!["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
        (gpt_oss(), vec!["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
    ] {
        let adapter = stacked(&parameters);
        let mut plain = unstack(&adapter, &modules).unwrap().into_owned();
        plain.config = adapter.config.clone();
        assert_eq!(stack(plain, &modules).unwrap(), adapter);
    }
}

#[test]
fn one_parameter_alone_has_no_wrapper_inside() {
    let mut adapter = stacked(&["down_proj"]);
    adapter.tensors.retain(|key, _| !key.contains("base_layer"));
    let plain = unstack(&adapter, &qwen()).unwrap().into_owned();
    assert_eq!(plain.modules().len(), EXPERTS);
    assert!(plain.modules().iter().all(|module| module.ends_with("down_proj")));
    let again = stack(Adapter { config: adapter.config.clone(), ..plain }, &qwen()).unwrap();
    assert_eq!(again, adapter);
}

#[test]
fn projections_that_differ_are_fused_block_diagonally() {
    let adapter = stacked(&["gate_up_proj", "down_proj"]);
    let mut plain = unstack(&adapter, &qwen()).unwrap().into_owned();
    let moved = format!("{KEY_PREFIX}model.layers.1.mlp.experts.1.up_proj.lora_A.weight");
    plain.tensors.get_mut(&moved).unwrap().data[0] += 1.0;
    let fused = stack(Adapter { config: adapter.config.clone(), ..plain.clone() }, &qwen()).unwrap();
    let parameter = "model.layers.1.mlp.experts.gate_up_proj";
    assert_eq!(fused.config.rank_for(parameter).unwrap(), 2 * RANKS[0]);
    assert_eq!(fused.config.scaling_for(parameter).unwrap(), adapter.config.scaling_for(parameter).unwrap());
    let again = unstack(&fused, &qwen()).unwrap();
    for module in plain.modules() {
        assert_eq!(product(&again, &module), product(&plain, &module), "{module}");
    }
}

#[test]
fn outputs_that_take_turns_are_every_other_row() {
    let adapter = stacked(&["gate_up_proj", "down_proj"]);
    let (halves, turns) = (unstack(&adapter, &qwen()).unwrap(), unstack(&adapter, &gpt_oss()).unwrap());
    for e in 0..EXPERTS {
        let factor = |adapter: &Adapter, name: &str| {
            adapter.lora(&format!("model.layers.1.mlp.experts.{e}.{name}")).unwrap().1.data.clone()
        };
        // Rows 0 and 1 are the gate's, 2 and 3 the input projection's; or 0 and 2, 1 and 3.
        let rows = [factor(&halves, "gate_proj"), factor(&halves, "up_proj")].concat();
        let row = |i: usize| &rows[i * RANKS[0]..(i + 1) * RANKS[0]];
        assert_eq!(factor(&turns, "gate_proj"), [row(0), row(2)].concat());
        assert_eq!(factor(&turns, "up_proj"), [row(1), row(3)].concat());
        assert_eq!(factor(&turns, "down_proj"), factor(&halves, "down_proj"));
    }
}

/// Saved, loaded and saved again, an adapter has the ranks that it was trained with.
#[test]
fn what_was_fused_comes_apart() {
    for (modules, use_rslora) in [(qwen(), false), (gpt_oss(), false), (gpt_oss(), true)] {
        let mut adapter = stacked(&["gate_up_proj", "down_proj"]);
        adapter.config.use_rslora = use_rslora;
        adapter.config.rank_pattern = Pattern(vec![("down_proj".into(), 1.0)]);
        adapter.config.alpha_pattern = Pattern(vec![("down_proj".into(), 3.0)]);
        (adapter.config.r, adapter.config.lora_alpha) = (RANKS[0], 8.0);
        let mut plain = unstack(&adapter, &modules).unwrap().into_owned();
        for (key, tensor) in plain.tensors.iter_mut().filter(|(key, _)| key.contains("up_proj.lora_A")) {
            tensor.data.iter_mut().for_each(|value| *value += key.len() as f32);
        }
        let fused = stack(Adapter { config: adapter.config.clone(), ..plain.clone() }, &modules).unwrap();
        assert!(is_fused(&fused.config) && !is_fused(&adapter.config));
        let again = unstack(&fused, &modules).unwrap();
        assert_eq!(again.tensors, plain.tensors);
        for module in plain.modules() {
            let scaling = |adapter: &Adapter| adapter.config.scaling_for(&module).unwrap();
            assert!((scaling(&again) - scaling(&plain)).abs() < 1e-6, "{module}");
        }
        let mut kept = fused.config.clone();
        one_rank(&mut kept);
        assert_eq!(kept, adapter.config);
    }
}

#[test]
fn what_does_not_fit_is_named() {
    let error = unstack(&stacked(&["q_proj.weight"]), &qwen()).unwrap_err();
    assert!(matches!(&error, FormatError::Field { field, .. } if field == "target_parameters"), "{error}");
    let fewer: Vec<String> = qwen().into_iter().filter(|module| !module.contains("experts.2")).collect();
    let error = unstack(&stacked(&["gate_up_proj", "down_proj"]), &fewer).unwrap_err();
    assert!(error.to_string().contains("for each of 2 experts"), "{error}");
    let adapter = stacked(&["gate_up_proj", "down_proj"]);
    let mut plain = unstack(&adapter, &qwen()).unwrap().into_owned();
    plain.config = adapter.config.clone();
    plain.tensors.retain(|key, _| !key.contains("experts.1.down_proj"));
    let error = stack(plain, &qwen()).unwrap_err();
    assert!(error.to_string().contains("alike"), "{error}");
}
