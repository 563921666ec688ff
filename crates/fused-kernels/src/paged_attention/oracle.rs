//! The scalar oracle: the definition in f64, one token and head after the other, scores and all.

use super::{Batch, Options, slot};

/// What [`attend`](super::attend) computes.
///
/// # Shapes
/// `q` `[tokens, heads, head_dim]`; `keys`, `values` `[slots, kv_heads, head_dim]`; `sinks` `[heads]`; the result as `q`.
pub fn attend(
    q: &[f32],
    keys: &[f32],
    values: &[f32],
    batch: &Batch,
    [heads, kv_heads, head_dim]: [usize; 3],
    sinks: Option<&[f32]>,
    options: Options,
) -> Vec<f64> {
    let mut out = Vec::with_capacity(q.len());
    for row in 0..batch.rows() {
        let (start, end) = (batch.starts()[row] as usize, batch.starts()[row + 1] as usize);
        let len = batch.lens()[row] as usize;
        for token in start..end {
            let position = len - (end - token);
            let first = options.window.map_or(0, |window| (position + 1).saturating_sub(window));
            for head in 0..heads {
                let q = &q[(token * heads + head) * head_dim..][..head_dim];
                let of = |cache: &[f32], seen: usize| -> Vec<f64> {
                    let slot = slot(batch.table(row), seen, batch.block_tokens());
                    let start = (slot * kv_heads + head / (heads / kv_heads)) * head_dim;
                    cache[start..start + head_dim].iter().map(|x| f64::from(*x)).collect()
                };
                let score = |seen| {
                    let dot: f64 = of(keys, seen).iter().zip(q).map(|(k, q)| k * f64::from(*q)).sum();
                    let score = dot * f64::from(options.scale);
                    options.softcap.map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh())
                };
                let scores: Vec<f64> = (first..=position).map(score).collect();
                let sink = sinks.map(|sinks| f64::from(sinks[head]));
                let most = scores.iter().copied().chain(sink).fold(f64::NEG_INFINITY, f64::max);
                let sum: f64 = scores.iter().copied().chain(sink).map(|s| (s - most).exp()).sum();
                let mut o = vec![0.0; head_dim];
                for (i, s) in scores.iter().enumerate() {
                    let p = (s - most).exp() / sum;
                    o.iter_mut().zip(of(values, first + i)).for_each(|(o, v)| *o += p * v);
                }
                out.extend(o);
            }
        }
    }
    out
}
