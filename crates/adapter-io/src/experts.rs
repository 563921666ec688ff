//! Adapters on stacked experts, as PEFT writes them over transformers 5 (`target_parameters`).
//!
//! In memory transformers 5 keeps a block's experts in two parameters, `mlp.experts.gate_up_proj` [experts, 2 *
//! intermediate, hidden] and `mlp.experts.down_proj`; checkpoints and everything here keep one module per expert and
//! projection. PEFT adapts a parameter by one pair of factors for all experts:
//!
//! | tensor | shape | expert e, rank index i |
//! |---|---|---|
//! | `lora_A` | [experts * r, in] | row `e * r + i` |
//! | `lora_B` | [out, r * experts] | column `i * experts + e` |
//!
//! Its wrappers are nested, so with both parameters adapted those of `gate_up_proj` are called
//! `mlp.experts.base_layer.lora_A`, and those of `down_proj`, outside, `mlp.experts.lora_A`.
//!
//! [`unstack`] makes an adapter of modules of it: gate and input projection of an expert get its `lora_A` both, and a
//! half of its `lora_B`'s rows each. [`stack`] goes back. Where gate and input projection have come to differ in
//! `lora_A`, the stacked rank is the sum of both, with a block-diagonal `lora_B`, as PEFT itself fuses adapters of
//! separate projections. [`unstack`] takes those that [`stack`] made of two apart again.
//!
//! gpt-oss has `gate_up_proj` as [experts, hidden, 2 * intermediate], whose columns are a gate's and an input's by turns. PEFT's factors
//! are the same, but the rows of `lora_B` take turns, too.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use crate::adapter::{A, Adapter, B, KEY_PREFIX};
use crate::adapter_config::{AdapterConfig, ModuleScaling, Pattern, TargetModules};
use crate::error::FormatError;
use crate::host_tensor::HostTensor;

const GATE_UP: &str = "gate_up_proj";
const DOWN: &str = "down_proj";
const INNER: &str = ".base_layer";
/// What a block's experts are called in checkpoints: their list, the router, gate, input and output projection.
const NAMES: [(&str, &str, [&str; 3]); 3] = [
    ("mlp.experts", "mlp.gate", ["gate_proj", "up_proj", "down_proj"]),
    ("block_sparse_moe.experts", "block_sparse_moe.gate", ["w1", "w3", "w2"]),
    ("mlp.experts", TURNS, ["gate_proj", "up_proj", "down_proj"]),
];
/// The same in transformers 5's memory.
const LIST: &str = "mlp.experts";
const ROUTER: &str = "mlp.gate";
/// The router of experts whose gate and input projection take turns; it has this name in memory, too.
const TURNS: &str = "mlp.router";
/// What `rank_pattern` and `alpha_pattern` have for two projections in one.
const FUSED: &str = r".*\.gate_up_proj";

/// A block's experts.
struct Stack {
    /// Path of the list in memory: `model.layers.0.mlp.experts`.
    path: String,
    /// Path of the router in memory, and as a module.
    router: [String; 2],
    /// Paths of gate, input and output projection of each expert.
    experts: Vec<[String; 3]>,
    /// Whether outputs of gate and input projection take turns.
    turns: bool,
}

/// The stacks among a model's modules.
fn stacks(modules: &[String]) -> Vec<Stack> {
    let known: BTreeSet<&str> = modules.iter().map(String::as_str).collect();
    let mut found = Vec::new();
    for (list, router, [gate, up, down]) in NAMES {
        let first = format!(".{list}.0.{gate}");
        let of_kind = |block: &&str| known.contains(&*format!("{block}.{TURNS}")) == (router == TURNS);
        for block in modules.iter().filter_map(|module| module.strip_suffix(&first)).filter(of_kind) {
            let expert = |e: usize| [gate, up, down].map(|name| format!("{block}.{list}.{e}.{name}"));
            let experts = (0..).map(expert).take_while(|paths| paths.iter().all(|path| known.contains(path.as_str())));
            found.push(Stack {
                path: format!("{block}.{LIST}"),
                router: [if router == TURNS { TURNS } else { ROUTER }, router].map(|name| format!("{block}.{name}")),
                experts: experts.collect(),
                turns: router == TURNS,
            });
        }
    }
    found
}

impl AdapterConfig {
    /// The names under `target_parameters`.
    pub fn parameters(&self) -> Vec<&str> {
        self.target_parameters
            .as_ref()
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .collect()
    }

    fn adapts(&self, parameter: &str) -> bool {
        self.parameters().iter().any(|name| *name == parameter || name.ends_with(&format!(".{parameter}")))
    }
}

/// The adapter with a module for each expert and projection; as it is when it has no stacked experts.
///
/// `modules` are the paths of the model's linear modules, as checkpoints name them.
///
/// # Errors
/// [`FormatError::Factors`] when a stack's factors do not fit the model's number of experts or the configured rank;
/// [`FormatError::Field`] when `target_parameters` holds anything but a model's experts and routers.
pub fn unstack<'a>(adapter: &'a Adapter, modules: &[String]) -> Result<Cow<'a, Adapter>, FormatError> {
    let config = &adapter.config;
    if config.parameters().is_empty() {
        return Ok(Cow::Borrowed(adapter));
    }
    let known = |name: &&str| {
        [GATE_UP, DOWN, "gate.weight", "router.weight"]
            .iter()
            .any(|known| name == known || name.ends_with(&format!(".{known}")))
    };
    if let Some(other) = config.parameters().into_iter().find(|name| !known(name)) {
        let reason = format!(
            "`{other}` is not supported; only experts (gate_up_proj, down_proj) and routers (gate.weight, router.weight) are"
        );
        return Err(FormatError::Field {
            path: crate::adapter_config::CONFIG_FILE.into(),
            field: "target_parameters".into(),
            reason,
        });
    }
    let mut out = Adapter { config: config.clone(), tensors: adapter.tensors.clone() };
    out.config.target_parameters = None;
    let (mut ranks, mut alphas, mut targets) = (Vec::new(), Vec::new(), Vec::new());
    let stacks = stacks(modules);
    let names = |stack: &Stack| {
        [format!("{}.{GATE_UP}", stack.path), format!("{}.{DOWN}", stack.path), stack.router[0].clone()]
    };
    let scalings = config.scalings(&stacks.iter().flat_map(names).collect::<Vec<_>>())?;
    let apart = is_fused(config) && are_two(adapter, &stacks);
    if apart {
        one_rank(&mut out.config);
    }
    for (Stack { path, router, experts, turns }, scalings) in stacks.into_iter().zip(scalings.chunks_exact(3)) {
        let count = experts.len();
        let inner = adapter.lora(&format!("{path}{INNER}")).is_some();
        for (wrapper, parameter) in
            [(INNER, GATE_UP), ("", if inner || !config.adapts(GATE_UP) { DOWN } else { GATE_UP })]
        {
            let module = format!("{path}{wrapper}");
            let Some((a, b)) = take(&mut out.tensors, &module) else { continue };
            let name = format!("{path}.{parameter}");
            let ModuleScaling { rank, alpha, .. } = scalings[usize::from(parameter == DOWN)];
            let fail = |reason| Err(FormatError::Factors { module: name.clone(), reason });
            let (&[rows, _], &[height, columns]) = (a.shape.as_slice(), b.shape.as_slice()) else {
                return fail(format!("lora_A {:?} and lora_B {:?} must be matrices", a.shape, b.shape));
            };
            if rows != rank * count || columns != rows {
                return fail(format!(
                    "lora_A {:?} and lora_B {:?} do not hold rank {rank} for each of {count} experts",
                    a.shape, b.shape
                ));
            }
            let parts = if parameter == GATE_UP { 2 } else { 1 };
            if !height.is_multiple_of(parts) {
                return fail(format!("lora_B {:?} has no two halves, for gate and input projection", b.shape));
            }
            for (e, projections) in experts.iter().enumerate() {
                let targeted = if parts == 2 { &projections[..2] } else { &projections[2..] };
                for (half, target) in targeted.iter().enumerate() {
                    let own_a = expert_a(&a, e, rank);
                    let own_b = expert_b(&b, e, count, rows_of_half(half, parts, height, turns));
                    let (own_a, own_b, rank, alpha) = match apart && parts == 2 {
                        true => {
                            let alpha = if config.use_rslora { alpha / std::f64::consts::SQRT_2 } else { alpha / 2.0 };
                            (half_of_rows(&own_a, half), half_of_columns(&own_b, half), rank / 2, alpha)
                        }
                        false => (own_a, own_b, rank, alpha),
                    };
                    out.tensors.insert(format!("{KEY_PREFIX}{target}{A}"), own_a);
                    out.tensors.insert(format!("{KEY_PREFIX}{target}{B}"), own_b);
                    targets.push(target.clone());
                    let key = target.replace('.', r"\.");
                    ranks.push((key.clone(), rank as f64));
                    alphas.push((key, alpha));
                }
            }
        }
        let [stacked, plain] = router;
        if let Some((a, b)) = take(&mut out.tensors, &stacked) {
            let ModuleScaling { rank, alpha, .. } = scalings[2];
            out.tensors.insert(format!("{KEY_PREFIX}{plain}{A}"), a);
            out.tensors.insert(format!("{KEY_PREFIX}{plain}{B}"), b);
            ranks.push((plain.replace('.', r"\."), rank as f64));
            alphas.push((plain.replace('.', r"\."), alpha));
            targets.push(plain);
        }
    }
    // Whole paths, before the patterns that were there.
    ranks.append(&mut out.config.rank_pattern.0);
    alphas.append(&mut out.config.alpha_pattern.0);
    (out.config.rank_pattern, out.config.alpha_pattern) = (Pattern(ranks), Pattern(alphas));
    if let Some(TargetModules::List(names)) = &mut out.config.target_modules {
        names.append(&mut targets);
    }
    Ok(Cow::Owned(out))
}

/// An adapter whose configuration has `target_parameters` and whose experts are modules, as PEFT writes it.
///
/// `modules` are as in [`unstack`].
///
/// # Errors
/// [`FormatError::Factors`] when the experts of a block are not adapted alike.
pub fn stack(mut adapter: Adapter, modules: &[String]) -> Result<Adapter, FormatError> {
    let stacks = stacks(modules);
    // One rank for all blocks: that of the sum where any expert's projections differ.
    let differ = stacks.iter().flat_map(|stack| &stack.experts).any(|[gate, up, _]| {
        let factor = |module: &str| adapter.lora(module).map(|(a, _)| a);
        factor(gate) != factor(up)
    });
    for Stack { path, router: [stacked, plain], experts, turns } in &stacks {
        if let Some((a, b)) = take(&mut adapter.tensors, plain) {
            adapter.tensors.insert(format!("{KEY_PREFIX}{stacked}{A}"), a);
            adapter.tensors.insert(format!("{KEY_PREFIX}{stacked}{B}"), b);
        }
        let both = adapter.config.adapts(GATE_UP) && adapter.config.adapts(DOWN);
        for parameter in [GATE_UP, DOWN] {
            let apart = || {
                let reason = "the experts of a block must be adapted alike, at one rank".to_string();
                Err(FormatError::Factors { module: format!("{path}.{parameter}"), reason })
            };
            let mut factors: Vec<Option<(HostTensor, HostTensor)>> = Vec::new();
            for [gate, up, down] in experts {
                factors.push(match parameter {
                    DOWN => take(&mut adapter.tensors, down),
                    _ => match (take(&mut adapter.tensors, gate), take(&mut adapter.tensors, up)) {
                        (Some(gate), Some(up)) => Some(fuse(gate, up, differ, *turns)),
                        (None, None) => None,
                        _ => return apart(),
                    },
                });
            }
            if factors.iter().all(Option::is_none) {
                continue;
            }
            let alike = |f: &Option<(HostTensor, HostTensor)>| {
                f.as_ref().map(|(a, b)| (&a.shape, &b.shape)) == factors[0].as_ref().map(|(a, b)| (&a.shape, &b.shape))
            };
            if !factors.iter().all(alike) {
                return apart();
            }
            let (a, b) = stacked_factors(&factors.into_iter().flatten().collect::<Vec<_>>());
            let wrapper = if parameter == GATE_UP && both { INNER } else { "" };
            adapter.tensors.insert(format!("{KEY_PREFIX}{path}{wrapper}{A}"), a);
            adapter.tensors.insert(format!("{KEY_PREFIX}{path}{wrapper}{B}"), b);
        }
    }
    if differ && adapter.config.adapts(GATE_UP) {
        let name = stacks.first().map_or(String::new(), |stack| format!("{}.{GATE_UP}", stack.path));
        let ModuleScaling { rank, alpha, .. } = adapter.config.of_one(&name)?;
        // The scaling stays what it was: alpha / rank, or alpha / sqrt(rank).
        let alpha = if adapter.config.use_rslora { alpha * std::f64::consts::SQRT_2 } else { alpha * 2.0 };
        one_rank(&mut adapter.config);
        for (pattern, value) in
            [(&mut adapter.config.rank_pattern, rank as f64 * 2.0), (&mut adapter.config.alpha_pattern, alpha)]
        {
            pattern.0.insert(0, (FUSED.into(), value));
        }
    }
    Ok(adapter)
}

/// Whether gate and input projections of stacks are two in one, as [`stack`] makes them.
pub fn is_fused(config: &AdapterConfig) -> bool {
    config.rank_pattern.0.iter().any(|(key, _)| key == FUSED)
}

/// The configuration of an adapter whose gate and input projections have been taken apart again.
pub fn one_rank(config: &mut AdapterConfig) {
    for pattern in [&mut config.rank_pattern, &mut config.alpha_pattern] {
        pattern.0.retain(|(known, _)| known != FUSED);
    }
}

/// Whether every stack of gate and input projections is two in one: a half of the rank for each.
fn are_two(adapter: &Adapter, stacks: &[Stack]) -> bool {
    stacks.iter().all(|Stack { path, experts, turns, .. }| {
        let inner = format!("{path}{INNER}");
        let module = if adapter.lora(&inner).is_some() { inner } else { path.clone() };
        let Some((_, b)) = adapter.lora(&module).filter(|_| adapter.config.adapts(GATE_UP)) else { return true };
        let (&[height, columns], count) = (&b.shape[..], experts.len()) else { return false };
        columns.is_multiple_of(2 * count)
            && [0, 1].into_iter().all(|half| {
                // Column `i * experts + e` is rank index i's.
                let others = if half == 0 { columns / 2..columns } else { 0..columns / 2 };
                rows_of_half(half, 2, height, *turns).all(|row| {
                    b.data[row * columns..(row + 1) * columns][others.clone()].iter().all(|value| *value == 0.0)
                })
            })
    })
}

/// The rows of `lora_B` that belong to one of `parts` projections.
fn rows_of_half(half: usize, parts: usize, height: usize, turns: bool) -> impl ExactSizeIterator<Item = usize> {
    match turns {
        true => (half..height).step_by(parts),
        false => (half * height / parts..(half + 1) * height / parts).step_by(1),
    }
}

fn half_of_rows(a: &HostTensor, half: usize) -> HostTensor {
    let (rows, width) = (a.shape[0] / 2, a.shape[1]);
    HostTensor { shape: vec![rows, width], data: a.data[half * rows * width..(half + 1) * rows * width].to_vec() }
}

fn half_of_columns(b: &HostTensor, half: usize) -> HostTensor {
    let columns = b.shape[1] / 2;
    let data = b.data.chunks(2 * columns.max(1)).flat_map(|row| row[half * columns..(half + 1) * columns].to_vec());
    HostTensor { shape: vec![b.shape[0], columns], data: data.collect() }
}

/// Takes a module's factors out of the tensors.
fn take(tensors: &mut BTreeMap<String, HostTensor>, module: &str) -> Option<(HostTensor, HostTensor)> {
    let [a, b] = [A, B].map(|factor| format!("{KEY_PREFIX}{module}{factor}"));
    if !tensors.contains_key(&a) || !tensors.contains_key(&b) {
        return None;
    }
    Some((tensors.remove(&a)?, tensors.remove(&b)?))
}

/// The rows of expert `e`.
fn expert_a(a: &HostTensor, e: usize, rank: usize) -> HostTensor {
    let width = a.shape[1];
    HostTensor { shape: vec![rank, width], data: a.data[e * rank * width..(e + 1) * rank * width].to_vec() }
}

/// Every `count`th column from `e` on, of some rows.
fn expert_b(b: &HostTensor, e: usize, count: usize, rows: impl ExactSizeIterator<Item = usize>) -> HostTensor {
    let (columns, height) = (b.shape[1], rows.len());
    let data = rows.flat_map(|row| b.data[row * columns..(row + 1) * columns].iter().skip(e).step_by(count));
    HostTensor { shape: vec![height, columns / count], data: data.copied().collect() }
}

/// Gate and input projection in one: `lora_b` one above the other where `lora_a` is shared, else block-diagonal; row by row where
/// they take turns.
fn fuse(
    gate: (HostTensor, HostTensor),
    up: (HostTensor, HostTensor),
    differ: bool,
    turns: bool,
) -> (HostTensor, HostTensor) {
    let (a, b) = one_above_the_other(gate, up, differ);
    if !turns {
        return (a, b);
    }
    let (height, columns) = (b.shape[0], b.shape[1]);
    let row = |row: usize| &b.data[row * columns..(row + 1) * columns];
    let data = (0..height).flat_map(|at| row(at % 2 * (height / 2) + at / 2)).copied().collect();
    (a, HostTensor { data, shape: b.shape.clone() })
}

fn one_above_the_other(
    gate: (HostTensor, HostTensor),
    up: (HostTensor, HostTensor),
    differ: bool,
) -> (HostTensor, HostTensor) {
    let ((mut a, mut b), (up_a, up_b)) = (gate, up);
    if !differ {
        b.data.extend(up_b.data);
        b.shape[0] += up_b.shape[0];
        return (a, b);
    }
    let (left, right) = (b.shape[1], up_b.shape[1]);
    let above = b.data.chunks(left.max(1)).flat_map(|row| row.iter().copied().chain(std::iter::repeat_n(0.0, right)));
    let below =
        up_b.data.chunks(right.max(1)).flat_map(|row| std::iter::repeat_n(0.0, left).chain(row.iter().copied()));
    let b = HostTensor { shape: vec![b.shape[0] + up_b.shape[0], left + right], data: above.chain(below).collect() };
    a.data.extend(up_a.data);
    a.shape[0] += up_a.shape[0];
    (a, b)
}

/// All experts' factors, which have the same shapes, in one pair.
fn stacked_factors(experts: &[(HostTensor, HostTensor)]) -> (HostTensor, HostTensor) {
    let count = experts.len();
    let (rank, width, height) = (experts[0].0.shape[0], experts[0].0.shape[1], experts[0].1.shape[0]);
    let a = experts.iter().flat_map(|(a, _)| a.data.iter().copied()).collect();
    let mut b = vec![0.0; height * rank * count];
    for (e, (_, factor)) in experts.iter().enumerate() {
        for (to, value) in b.iter_mut().skip(e).step_by(count).zip(&factor.data) {
            *to = *value;
        }
    }
    (
        HostTensor { shape: vec![rank * count, width], data: a },
        HostTensor { shape: vec![height, rank * count], data: b },
    )
}
