//! `config.json` held against the tensors: a GGUF file's metadata come from the one and its data from the other, and
//! llama.cpp loads what agrees.

use std::collections::{BTreeMap, BTreeSet};

use super::architecture::Model;
use super::tensors::Source;
use super::writer::Planned;
use crate::error::FormatError;

/// A dimension, and the key of `config.json` that it comes from.
type Dim = (usize, &'static str);

/// What a configuration says about shapes.
struct Sizes {
    layers: usize,
    hidden: Dim,
    vocabulary: Dim,
    /// Of the feed-forward network, and of one expert.
    inner: Dim,
    expert: Dim,
    experts: Dim,
    /// Of the expert of all tokens.
    shared: Dim,
    /// All heads of queries, keys, and of a fused projection.
    queries: Dim,
    keys: Dim,
    fused: Dim,
    /// Of the norms of queries and keys.
    norms: [Dim; 2],
}

impl Sizes {
    fn read(model: &Model) -> Result<Self, FormatError> {
        let dim = |key: &'static str| Ok::<_, FormatError>((model.needed(&[key])? as usize, key));
        let ((heads, kv_heads), head) = (model.heads()?, model.head_dim()? as usize);
        let (heads, kv_heads) = (heads as usize, kv_heads as usize);
        if !heads.is_multiple_of(kv_heads) {
            let reason = format!("it is {kv_heads}, which does not divide the {heads} heads of num_attention_heads");
            return Err(model.fail("num_key_value_heads", reason));
        }
        let inner = dim("intermediate_size")?;
        let expert = if model.kind.has("expert_feed_forward") { dim("moe_intermediate_size")? } else { inner };
        let shared = match model.kind.has("corrected_experts") {
            true => (expert.0 * dim("n_shared_experts")?.0, "n_shared_experts"),
            false => (0, "n_shared_experts"),
        };
        Ok(Self {
            layers: dim("num_hidden_layers")?.0,
            hidden: dim("hidden_size")?,
            vocabulary: dim("vocab_size")?,
            inner,
            expert,
            experts: model.experts()?.map_or((0, "num_experts"), |(n, key)| (n as usize, key)),
            shared,
            queries: (heads * head, "num_attention_heads"),
            keys: (kv_heads * head, "num_key_value_heads"),
            fused: ((heads + 2 * kv_heads) * head, "num_attention_heads"),
            norms: match model.kind.has("whole_heads") {
                true => [(heads * head, "num_attention_heads"), (kv_heads * head, "num_key_value_heads")],
                false => [(head, "head_dim"); 2],
            },
        })
    }

    /// The shape of a tensor of a block, or outside of the blocks; `None` for those that have none by the
    /// configuration.
    fn shape(&self, name: &str, gate_is_apart: bool) -> Option<Vec<Dim>> {
        let (module, kind) = name.rsplit_once('.')?;
        let Self { hidden, vocabulary, inner, expert, experts, shared, queries, keys, fused, norms, .. } = *self;
        let shape = match module {
            "token_embd" | "output" => vec![vocabulary, hidden],
            "attn_q_norm" => vec![norms[0]],
            "attn_k_norm" => vec![norms[1]],
            norm if norm.ends_with("_norm") => vec![hidden],
            "attn_q" => vec![queries, hidden],
            "attn_k" | "attn_v" => vec![keys, hidden],
            "attn_qkv" => vec![fused, hidden],
            "attn_output" => vec![hidden, queries],
            "ffn_gate" => vec![inner, hidden],
            "ffn_up" if gate_is_apart => vec![inner, hidden],
            "ffn_up" => vec![(2 * inner.0, inner.1), hidden],
            "ffn_down" => vec![hidden, inner],
            "ffn_gate_exps" | "ffn_up_exps" => vec![experts, expert, hidden],
            "ffn_down_exps" => vec![experts, hidden, expert],
            "ffn_gate_inp" => vec![experts, hidden],
            "exp_probs_b" => vec![experts],
            "ffn_gate_shexp" | "ffn_up_shexp" => vec![shared, hidden],
            "ffn_down_shexp" => vec![hidden, shared],
            _ => return None,
        };
        // A bias has the outputs alone.
        Some(if kind == "bias" { shape[..1].to_vec() } else { shape })
    }
}

/// What every block has, one of each row.
const NEEDED: [&[&str]; 7] = [
    &["attn_norm.weight", "post_attention_norm.weight"],
    &["attn_q.weight", "attn_qkv.weight"],
    &["attn_k.weight", "attn_qkv.weight"],
    &["attn_v.weight", "attn_qkv.weight"],
    &["attn_output.weight"],
    &["ffn_up.weight", "ffn_up_exps.weight"],
    &["ffn_down.weight", "ffn_down_exps.weight"],
];

/// Refuses a configuration that is not the tensors'.
pub(super) fn check(model: &Model, tensors: &[(Planned, Source)]) -> Result<(), FormatError> {
    let sizes = Sizes::read(model)?;
    if model.number("rms_norm_eps")?.is_some_and(|eps| eps.is_nan() || eps <= 0.0) {
        return Err(model.fail("rms_norm_eps", "it must be above 0"));
    }
    let mut blocks: BTreeMap<usize, BTreeSet<&str>> = BTreeMap::new();
    let mut outside = BTreeSet::new();
    let split = |name: &'_ str| -> Option<(usize, usize)> {
        let (number, rest) = name.strip_prefix("blk.")?.split_once('.')?;
        Some((number.parse().ok()?, name.len() - rest.len()))
    };
    for (planned, _) in tensors {
        match split(&planned.name) {
            Some((block, at)) => drop(blocks.entry(block).or_default().insert(&planned.name[at..])),
            None => drop(outside.insert(planned.name.as_str())),
        }
    }
    let numbers = || blocks.keys().copied();
    if sizes.layers == 0 || blocks.len() != sizes.layers || numbers().ne(0..sizes.layers) {
        let found = numbers().next_back().map_or("no layer".into(), |last| match blocks.len() {
            count if count == last + 1 => format!("{count} layers"),
            count => format!("{count} layers, the last of which is layer {last}"),
        });
        let reason = format!("it is {}, the checkpoint has {found}", sizes.layers);
        return Err(model.fail("num_hidden_layers", reason));
    }
    let lacks = |what: &str, name: &str| {
        model.fail("model_type", format!("{what} has no tensor for `{name}`; the checkpoint is incomplete"))
    };
    if let Some(name) = ["token_embd.weight", "output_norm.weight"].into_iter().find(|name| !outside.contains(name)) {
        return Err(lacks("the checkpoint", name));
    }
    let has_experts = |names: &BTreeSet<&str>| names.contains("ffn_gate_inp.weight");
    if model.kind.has("corrected_experts") {
        let dense = blocks.values().take_while(|names| !has_experts(names)).count();
        let first = model.needed(&["first_k_dense_replace"])? as usize;
        if dense != first.min(sizes.layers) {
            let reason = format!("it is {first}, and the checkpoint's first {dense} layers have no experts");
            return Err(model.fail("first_k_dense_replace", reason));
        }
    }
    for (number, names) in &blocks {
        // The first layer, or of those that have experts, or have none, the first.
        let kinds_differ = model.kind.has("corrected_experts");
        let like = blocks.iter().find(|(_, other)| !kinds_differ || has_experts(other) == has_experts(names));
        let (first_number, first) = like.unwrap_or((number, names));
        let what = format!("layer {number}");
        if let Some(one_of) = NEEDED.iter().find(|one_of| !one_of.iter().any(|name| names.contains(name))) {
            return Err(lacks(&what, one_of[0]));
        }
        if let Some(name) = first.symmetric_difference(names).next() {
            let other = format!("layer {first_number}");
            return Err(lacks(if names.contains(name) { &other } else { &what }, name));
        }
    }
    let first = blocks.get(&0).cloned().unwrap_or_default();
    for (planned, source) in tensors {
        let name = split(&planned.name).map_or(planned.name.as_str(), |(_, at)| &planned.name[at..]);
        let Some(shape) = sizes.shape(name, first.contains("ffn_gate.weight")) else { continue };
        let numbers: Vec<usize> = shape.iter().map(|(size, _)| *size).collect();
        if numbers == planned.shape {
            continue;
        }
        let other = shape.iter().zip(&planned.shape).find(|((size, _), have)| size != *have);
        let key = other.or_else(|| shape.first().zip(planned.shape.first())).map_or("model_type", |((_, key), _)| key);
        let name = if let Source::One(name, _) = source { name } else { &planned.name };
        let have = &planned.shape;
        return Err(
            model.fail(key, format!("by the configuration `{name}` is {numbers:?}, the checkpoint has {have:?}"))
        );
    }
    Ok(())
}
