//! Several adapters in one: PEFT's `add_weighted_adapter` on host tensors.
//!
//! With weights w_i and scalings s_i the update wanted is sum_i w_i s_i B_i A_i. The new adapter has the
//! scaling 1 (alpha = r).
//!
//! - `cat`: the factors side by side, w_i s_i folded into A; exact, of the ranks' sum.
//! - `svd`: the best update of the wanted rank (Eckart and Young). PEFT decomposes the whole [out, in] sum;
//!   here the sum stays factored, and only a core of rank by rank is decomposed: the same answer.
//! - `linear`: A and B are summed by themselves with weights sqrt(|w_i s_i|), the sign on A. It is what PEFT
//!   calls a very rough approximation: it holds cross terms B_i A_j.
//!
//! Where we differ: `use_rslora` is reset (PEFT keeps it from the first adapter, and the combination then
//! has the scaling sqrt(r)), and the biases of `lora_bias` are combined (PEFT leaves them zero). Not here:
//! `ties`, `dare` and `magnitude_prune`; DoRA, whose magnitudes have no sum.

use std::collections::{BTreeMap, BTreeSet};

use crate::adapter::{Adapter, KEY_PREFIX};
use crate::adapter_config::{AdapterConfig, Pattern, TargetModules, TokenIndices};
use crate::error::FormatError;
use crate::host_tensor::HostTensor;
use crate::linalg::{Matrix, row_basis, svd};
use crate::lora_module::{LoraModule, ModuleKind};
use crate::token_rows::WRAPPER;

/// How adapters are combined.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Combination {
    /// Weighted sums of the factors; all ranks must be equal.
    Linear,
    /// Factors side by side.
    Cat,
    /// The best approximation of this rank, of the largest rank combined when `None`.
    Svd {
        /// The new rank.
        rank: Option<usize>,
    },
}

/// Combines adapters of one base model, each with its weight; a single one is only scaled.
///
/// # Errors
/// [`FormatError::Combine`] when there is nothing to combine, an adapter uses DoRA, two adapters replace the
/// same tensor (`modules_to_save`) or both have trained rows (`trainable_token_indices`), ranks differ for [`Combination::Linear`], or target modules are a list
/// in one adapter and a pattern in another, or an adapter has stacked experts; [`FormatError::Field`] for one whose initialisation changed the base; the
/// errors of [`Adapter::lora_module`].
pub fn combine(adapters: &[(&Adapter, f64)], combination: Combination) -> Result<Adapter, FormatError> {
    let fail = |reason: String| Err(FormatError::Combine { reason });
    let Some((first, _)) = adapters.first() else { return fail("there is no adapter to combine".into()) };
    // The factors are 32-bit floats.
    if let Some((_, weight)) = adapters.iter().find(|(_, weight)| !(*weight as f32).is_finite()) {
        return fail(format!("the weight {weight:e} is not a finite number, or beyond 32-bit floats"));
    }
    if adapters.iter().any(|(adapter, _)| adapter.config.use_dora) {
        return fail("an adapter uses DoRA, whose magnitudes cannot be added; merge it into its base instead".into());
    }
    if adapters.iter().any(|(adapter, _)| !adapter.config.parameters().is_empty()) {
        return fail("an adapter has stacked experts (target_parameters), whose ranks depend on the model; load it into its model and save it from there, or merge it into its base".into());
    }
    adapters.iter().try_for_each(|(adapter, _)| adapter.config.refuse_changed_base())?;
    let combination = if adapters.len() == 1 { Combination::Linear } else { combination };
    let ranks: Vec<usize> = adapters.iter().map(|(adapter, _)| largest_rank(&adapter.config)).collect();
    let largest = ranks.iter().copied().max().unwrap_or(0);
    let rank = match combination {
        Combination::Cat => ranks.iter().sum(),
        Combination::Svd { rank } => rank.unwrap_or(largest),
        Combination::Linear if ranks.iter().any(|r| *r != largest) => {
            return fail(format!("a linear combination needs equal ranks, these are {ranks:?}; use cat or svd"));
        }
        Combination::Linear => largest,
    };
    if rank == 0 {
        return fail("a rank of 0 adapts nothing; it must be at least 1".into());
    }
    let mut combined = Adapter::new(AdapterConfig {
        r: rank,
        lora_alpha: rank as f64,
        rank_pattern: Pattern::default(),
        alpha_pattern: Pattern::default(),
        use_rslora: false,
        lora_bias: adapters.iter().any(|(adapter, _)| adapter.config.lora_bias),
        target_modules: targets(adapters)?,
        ..first.config.clone()
    });
    combined.config.modules_to_save = saved_modules(adapters, &mut combined.tensors)?;
    combined.config.trainable_token_indices = token_rows(adapters, &mut combined.tensors)?;
    let mut modules: BTreeMap<String, Vec<(LoraModule<'_>, f64)>> = BTreeMap::new();
    for (adapter, weight) in adapters {
        for module in adapter.lora_modules()? {
            modules.entry(module.path.clone()).or_default().push((module, *weight));
        }
    }
    for (path, parts) in modules {
        let (a, b) = match combination {
            Combination::Cat => cat(&parts, rank),
            Combination::Svd { .. } => truncated(&parts, rank),
            Combination::Linear => linear(&parts, rank),
        }
        .map_err(|reason| FormatError::Factors { module: path.clone(), reason })?;
        let bias = bias(&parts);
        if [Some(&a), Some(&b), bias.as_ref()].into_iter().flatten().any(|t| t.data.iter().any(|x| !x.is_finite())) {
            let reason = "the combined factors overflow 32-bit floats; take smaller weights".into();
            return Err(FormatError::Factors { module: path, reason });
        }
        let (a_key, b_key) = match parts[0].0.kind {
            ModuleKind::Linear => ("lora_A.weight", "lora_B.weight"),
            ModuleKind::Embedding => ("lora_embedding_A", "lora_embedding_B"),
        };
        if combined.config.lora_bias && parts[0].0.kind == ModuleKind::Linear {
            let bias = bias.unwrap_or_else(|| HostTensor { shape: vec![b.shape[0]], data: vec![0.0; b.shape[0]] });
            combined.tensors.insert(format!("{KEY_PREFIX}{path}.lora_B.bias"), bias);
        }
        combined.tensors.insert(format!("{KEY_PREFIX}{path}.{a_key}"), a);
        combined.tensors.insert(format!("{KEY_PREFIX}{path}.{b_key}"), b);
    }
    Ok(combined)
}

fn largest_rank(config: &AdapterConfig) -> usize {
    config.rank_pattern.0.iter().map(|(_, r)| *r as usize).fold(config.r, usize::max)
}

fn targets(adapters: &[(&Adapter, f64)]) -> Result<Option<TargetModules>, FormatError> {
    let targets: Vec<TargetModules> = adapters.iter().map(|(a, _)| a.config.target_modules_or_default()).collect();
    let mut names = BTreeSet::new();
    let mut patterns = Vec::new();
    for target in &targets {
        match target {
            TargetModules::List(list) => names.extend(list.iter().cloned()),
            TargetModules::Pattern(pattern) => patterns.push(format!("({pattern})")),
        }
    }
    match (names.is_empty(), patterns.is_empty()) {
        (_, true) => Ok(Some(TargetModules::List(names.into_iter().collect()))),
        (true, false) if targets.len() == 1 => Ok(targets.into_iter().next()),
        (true, false) => Ok(Some(TargetModules::Pattern(patterns.join("|")))),
        (false, false) => Err(FormatError::Combine {
            reason: "target_modules is a list in one adapter and a pattern in another; write both in one way".into(),
        }),
    }
}

fn saved_modules(
    adapters: &[(&Adapter, f64)],
    tensors: &mut BTreeMap<String, HostTensor>,
) -> Result<Option<Vec<String>>, FormatError> {
    let mut names = Vec::new();
    for (adapter, _) in adapters {
        for (name, tensor) in adapter.saved_tensors() {
            if tensors.insert(format!("{KEY_PREFIX}{name}"), tensor.clone()).is_some() {
                return Err(FormatError::Combine {
                    reason: format!("two adapters replace the tensor `{name}` (modules_to_save); only one may"),
                });
            }
        }
        for name in adapter.config.modules_to_save.iter().flatten() {
            if !names.contains(name) {
                names.push(name.clone());
            }
        }
    }
    Ok((!names.is_empty()).then_some(names))
}

/// Takes over the trained rows of the one adapter that has some.
fn token_rows(
    adapters: &[(&Adapter, f64)],
    tensors: &mut BTreeMap<String, HostTensor>,
) -> Result<Option<TokenIndices>, FormatError> {
    let tokens = |adapter: &Adapter| adapter.config.trainable_token_indices.clone().filter(|t| !t.is_empty());
    let mut with = adapters.iter().filter_map(|(adapter, _)| Some((*adapter, tokens(adapter)?)));
    let Some((adapter, tokens)) = with.next() else { return Ok(None) };
    if with.next().is_some() {
        let reason =
            "two adapters replace rows of single tokens (trainable_token_indices), which have no sum; only one may"
                .into();
        return Err(FormatError::Combine { reason });
    }
    let rows = adapter.tensors.iter().filter(|(key, _)| key.contains(WRAPPER));
    tensors.extend(rows.map(|(key, tensor)| (key.clone(), tensor.clone())));
    Ok(Some(tokens))
}

type Parts<'a> = [(LoraModule<'a>, f64)];

/// The weight of a part with its scaling, rounded as PEFT's tensors of 32-bit floats are.
fn weight((module, weight): &(LoraModule<'_>, f64)) -> f64 {
    weight * f64::from(module.scaling)
}

fn same_shapes(parts: &Parts<'_>) -> Result<[usize; 2], String> {
    let shape = parts[0].0.weight_shape();
    match parts.iter().find(|(m, _)| m.weight_shape() != shape || m.kind != parts[0].0.kind) {
        None => Ok(shape),
        Some((m, _)) => Err(format!(
            "the adapters disagree about its weight, {shape:?} and {:?}; they belong to different base models",
            m.weight_shape()
        )),
    }
}

/// A [rank, in] and B [out, rank] from rows of A and columns of B, zeros beyond.
fn padded(a_rows: Vec<f32>, b_columns: Vec<Vec<f32>>, rank: usize, parts: &Parts<'_>) -> (HostTensor, HostTensor) {
    let (columns, out) = (parts[0].0.lora_a.shape[1], parts[0].0.lora_b.shape[0]);
    let mut a = a_rows;
    a.resize(rank * columns, 0.0);
    let mut b = vec![0.0; out * rank];
    for (k, column) in b_columns.iter().take(rank).enumerate() {
        column.iter().enumerate().for_each(|(row, x)| b[row * rank + k] = *x);
    }
    (HostTensor { shape: vec![rank, columns], data: a }, HostTensor { shape: vec![out, rank], data: b })
}

fn columns_of(b: &HostTensor) -> impl Iterator<Item = Vec<f32>> {
    let rank = b.shape[1];
    (0..rank).map(move |k| b.data.iter().skip(k).step_by(rank).copied().collect())
}

fn cat(parts: &Parts<'_>, rank: usize) -> Result<(HostTensor, HostTensor), String> {
    same_shapes(parts)?;
    let (mut a, mut b) = (Vec::new(), Vec::new());
    for (module, weight) in parts {
        let (weight, scaling) = (*weight as f32, module.scaling);
        // In this order: the same rounding as PEFT's.
        a.extend(module.lora_a.data.iter().map(|x| x * weight * scaling));
        b.extend(columns_of(module.lora_b));
    }
    Ok(padded(a, b, rank, parts))
}

fn linear(parts: &Parts<'_>, rank: usize) -> Result<(HostTensor, HostTensor), String> {
    same_shapes(parts)?;
    let own = parts[0].0.lora_a.shape[0];
    if let Some((m, _)) = parts.iter().find(|(m, _)| m.lora_a.shape[0] != own) {
        let other = m.lora_a.shape[0];
        return Err(format!("a linear combination needs equal ranks, these are {own} and {other}; use cat or svd"));
    }
    let sum = |side: fn(&LoraModule<'_>) -> Vec<f32>, signed: bool| {
        let mut out = vec![0.0f32; side(&parts[0].0).len()];
        for part in parts {
            let weight = weight(part);
            let sign = if signed && weight < 0.0 { -1.0 } else { 1.0 };
            let root = (weight.abs().sqrt() * sign) as f32;
            out.iter_mut().zip(side(&part.0)).for_each(|(o, x)| *o += x * root);
        }
        out
    };
    let a = sum(|m| m.lora_a.data.clone(), true);
    let b = HostTensor { shape: parts[0].0.lora_b.shape.clone(), data: sum(|m| m.lora_b.data.clone(), false) };
    let b_columns = columns_of(&b).collect();
    Ok(padded(a, b_columns, rank, parts))
}

fn truncated(parts: &Parts<'_>, rank: usize) -> Result<(HostTensor, HostTensor), String> {
    same_shapes(parts)?;
    let (columns, out) = (parts[0].0.lora_a.shape[1], parts[0].0.lora_b.shape[0]);
    let (mut a, mut b) = (Matrix::zeros(0, columns), Matrix::zeros(0, out));
    for part in parts {
        let weight = weight(part);
        a.data.extend(part.0.lora_a.data.iter().map(|x| f64::from(*x) * weight));
        b.data.extend(columns_of(part.0.lora_b).flatten().map(f64::from));
        a.rows += part.0.lora_a.shape[0];
        b.rows += part.0.lora_b.shape[1];
    }
    // sum B A = (Cb Qb)^T (Ca Qa) = Qb^T (Cb^T Ca) Qa, with orthonormal rows in Qa and Qb.
    let ((qa, ca), (qb, cb)) = (row_basis(&a), row_basis(&b));
    let (u, s, v) = svd(&cb.transpose().product(&ca));
    let (u, v) = (u.product(&qb), v.product(&qa));
    let kept = rank.min(s.len());
    let a = v.data[..kept * columns].iter().map(|x| *x as f32).collect();
    let b = (0..kept).map(|k| u.row(k).iter().map(|x| (x * s[k]) as f32).collect()).collect();
    Ok(padded(a, b, rank, parts))
}

fn bias(parts: &Parts<'_>) -> Option<HostTensor> {
    let mut sum: Option<HostTensor> = None;
    for part in parts {
        let Some(bias) = part.0.bias else { continue };
        let weight = weight(part) as f32;
        let sum = sum.get_or_insert_with(|| HostTensor { shape: bias.shape.clone(), data: vec![0.0; bias.data.len()] });
        sum.data.iter_mut().zip(&bias.data).for_each(|(o, x)| *o += x * weight);
    }
    sum
}
