//! Which GGUF tensors a checkpoint becomes: names, order of rows, shifts, stacks of experts.

use std::collections::BTreeMap;

use super::architecture::{Model, table};
use super::blocks::GgmlType;
use super::writer::Planned;
use crate::checkpoint::Checkpoint;
use crate::error::{FormatError, nearest_names};

/// What is done to a tensor's elements.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Op {
    None,
    /// Rows of each of so many heads: halves become adjacent pairs.
    Permute(usize),
    Add(f32),
}

/// Where a GGUF tensor comes from.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Source {
    One(String, Op),
    /// One tensor for each expert.
    Stack(Vec<String>),
    Values(Vec<f32>),
}

/// A GGUF name, and whether it is one expert of a stack.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Mapped {
    pub name: String,
    pub expert: Option<usize>,
    pub op: Op,
}

/// What is added to a router's scores for the choice: a bias without a module of its own.
const CORRECTION: &str = ".e_score_correction_bias";

/// The GGUF tensor of a tensor of the checkpoint; `None` for those that llama.cpp has no use for.
pub(super) fn map_name(model: &Model, tensor: &str) -> Result<Option<Mapped>, FormatError> {
    let (module, suffix) = match tensor.ends_with(CORRECTION) {
        true => (tensor, "bias"),
        false => tensor.rsplit_once('.').unwrap_or((tensor, "")),
    };
    if suffix == "inv_freq" || (model.kind.skip_head && module == "lm_head") {
        return Ok(None);
    }
    let unknown = || FormatError::MissingTensor {
        path: model.config.path.clone(),
        tensor: format!("{tensor} (there is no place for it in a GGUF file of this model type)"),
        nearest: nearest_names(module, table().names.keys().map(String::as_str)),
    };
    if !["weight", "bias"].contains(&suffix) {
        return Err(unknown());
    }
    let look = |name: &str| model.kind.names.get(name).or_else(|| table().names.get(name));
    let in_block = module.strip_prefix("model.layers.").and_then(|rest| {
        let (index, rest) = rest.split_once('.')?;
        Some((index.parse::<usize>().ok()?, rest))
    });
    if let Some((block, _)) = in_block
        && model.predicts_further(block)?
    {
        return Ok(None);
    }
    let Some((block, rest)) = in_block else {
        let name = look(module).ok_or_else(unknown)?;
        let op = if name.ends_with("_norm") && model.kind.norm_shift != 0.0 {
            Op::Add(model.kind.norm_shift)
        } else {
            Op::None
        };
        return Ok(Some(Mapped { name: format!("{name}.{suffix}"), expert: None, op }));
    };
    if let Some((head, expert, weight)) = split_expert(rest) {
        let stack = table().experts.get(&format!("{head}.{weight}")).ok_or_else(unknown)?;
        let name = format!("blk.{block}.{stack}.{suffix}");
        return Ok(Some(Mapped { name, expert: Some(expert), op: Op::None }));
    }
    let name = look(rest).ok_or_else(unknown)?;
    let (heads, kv_heads) = model.heads()?;
    let op = match name.as_str() {
        "attn_q" if model.kind.permute_rotary => Op::Permute(heads as usize),
        "attn_k" if model.kind.permute_rotary => Op::Permute(kv_heads as usize),
        name if name.ends_with("_norm") && model.kind.norm_shift != 0.0 => Op::Add(model.kind.norm_shift),
        _ => Op::None,
    };
    Ok(Some(Mapped { name: format!("blk.{block}.{name}.{suffix}"), expert: None, op }))
}

/// `mlp.experts.7.up_proj` is `("mlp.experts", 7, "up_proj")`.
fn split_expert(rest: &str) -> Option<(&str, usize, &str)> {
    let (head, tail) = rest.split_once(".experts.")?;
    let (index, weight) = tail.split_once('.')?;
    Some((&rest[..head.len() + ".experts".len()], index.parse().ok()?, weight))
}

/// The type a tensor gets in a file that is mostly of type `kind`: norms, biases and routers stay in 32-bit
/// floats, and rows that are no whole blocks become F16, as the converter does. Under 5 bits the output head
/// (or the embedding in its place) is in Q8_0: llama.cpp's own quantizer gives it more bits, too.
pub(super) fn kind_for(name: &str, shape: &[usize], kind: GgmlType, tied: bool) -> GgmlType {
    let keep = shape.len() <= 1 || name.ends_with("_norm.weight") || name.ends_with("ffn_gate_inp.weight");
    if keep || !name.ends_with(".weight") {
        return GgmlType::F32;
    }
    let head = name == "output.weight" || (tied && name == "token_embd.weight");
    let few_bits = matches!(kind, GgmlType::Q4_0 | GgmlType::Q4_1 | GgmlType::Q5_0);
    let kind = if head && few_bits { GgmlType::Q8_0 } else { kind };
    if kind.num_bytes(shape).is_some() { kind } else { GgmlType::F16 }
}

/// All tensors of a checkpoint.
pub(super) fn plan(
    model: &Model,
    base: &Checkpoint,
    kind: GgmlType,
    extra: Vec<(String, Vec<f32>)>,
) -> Result<Vec<(Planned, Source)>, FormatError> {
    let quantized: std::collections::BTreeSet<String> =
        base.quantized_modules().into_iter().map(str::to_string).collect();
    let mut stacks: BTreeMap<String, BTreeMap<usize, (String, Vec<usize>)>> = BTreeMap::new();
    let mut found: Vec<(String, Vec<usize>, Source)> = Vec::new();
    for (name, values) in extra {
        found.push((name, vec![values.len()], Source::Values(values)));
    }
    // A checkpoint of the bare model lacks the model's own path.
    let bare = base.contains("embed_tokens.weight") && !base.contains("model.embed_tokens.weight");
    for name in base.names_in_file_order() {
        let shape = match name.split_once(".weight").filter(|(module, _)| quantized.contains(*module)) {
            Some((_, part)) if !part.is_empty() => continue,
            Some((module, _)) => base.quantized(module)?.map(|w| w.state.shape).unwrap_or_default(),
            None => base.dense(name)?.shape,
        };
        let full_name = if bare && !name.starts_with("lm_head.") { &format!("model.{name}") } else { name };
        let Some(mapped) = map_name(model, full_name)? else { continue };
        if let Op::Permute(heads) = mapped.op
            && !shape.first().is_some_and(|rows| rows.is_multiple_of(2 * heads))
        {
            return Err(
                model.fail("num_attention_heads", format!("`{name}` {shape:?} does not divide into {heads} heads"))
            );
        }
        match mapped.expert {
            Some(expert) => {
                stacks.entry(mapped.name).or_default().insert(expert, (name.to_string(), shape));
            }
            None => found.push((mapped.name, shape, Source::One(name.to_string(), mapped.op))),
        }
    }
    for (name, parts) in stacks {
        let (names, shape) = stack(model, &name, parts)?;
        found.push((name, shape, Source::Stack(names)));
    }
    let tied = !found.iter().any(|(name, _, _)| name == "output.weight");
    found.sort_by(|a, b| order(&a.0).cmp(&order(&b.0)));
    if let Some(pair) = found.windows(2).find(|w| w[0].0 == w[1].0) {
        return Err(model.fail("model_type", format!("two tensors would become `{}`", pair[0].0)));
    }
    let planned = |(name, shape, source): (String, Vec<usize>, Source)| {
        let kind = kind_for(&name, &shape, kind, tied);
        (Planned { name, shape, kind }, source)
    };
    Ok(found.into_iter().map(planned).collect())
}

/// The tensors of one stack in order, and the stack's shape.
pub(super) fn stack(
    model: &Model,
    name: &str,
    parts: BTreeMap<usize, (String, Vec<usize>)>,
) -> Result<(Vec<String>, Vec<usize>), FormatError> {
    let missing = || model.fail("num_local_experts", "it is missing");
    let (experts, key) = model.experts()?.ok_or_else(missing)?;
    let experts = experts as usize;
    let shape = parts.values().next().map(|(_, shape)| shape.clone()).unwrap_or_default();
    if parts.len() != experts || parts.keys().copied().ne(0..experts) || parts.values().any(|(_, s)| *s != shape) {
        let reason = format!("`{name}` needs {experts} experts of one shape, {} are there", parts.len());
        return Err(model.fail(key, reason));
    }
    let names = parts.into_values().map(|(name, _)| name).collect();
    Ok((names, [&[experts], shape.as_slice()].concat()))
}

/// Embedding first, then the blocks in order, then the rest.
fn order(name: &str) -> (usize, usize, &str) {
    let block = name.strip_prefix("blk.").and_then(|rest| rest.split_once('.')?.0.parse().ok());
    match (block, name) {
        (Some(block), _) => (2, block, name),
        (None, "token_embd.weight") => (1, 0, name),
        (None, "output_norm.weight" | "output.weight") => (3, 0, name),
        _ => (0, 0, name),
    }
}

/// Rows [head, half, j] to rows [head, j, half]: from halves that are rotated together to adjacent pairs.
pub(super) fn permute(values: &[f32], heads: usize, rows: usize) -> Vec<f32> {
    let (columns, half) = (values.len() / rows.max(1), rows / heads.max(1) / 2);
    let mut out = Vec::with_capacity(values.len());
    for head in 0..heads {
        for j in 0..half {
            for part in 0..2 {
                let row = (head * 2 + part) * half + j;
                out.extend_from_slice(&values[row * columns..][..columns]);
            }
        }
    }
    out
}
