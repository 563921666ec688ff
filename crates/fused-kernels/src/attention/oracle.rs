//! The scalar oracle: the definitions in f64, one row and head after the other, scores and all.

use half::{bf16, f16};

use super::Options;
use crate::FloatFormat;

/// The rows of a batch: queries and keys of each. The queries are the last tokens of their row.
#[derive(Clone, Debug, PartialEq)]
pub struct Batch {
    /// Queries and keys of each row.
    pub rows: Vec<(usize, usize)>,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads, a divisor of `heads`.
    pub kv_heads: usize,
    /// Dimensions of a head.
    pub head_dim: usize,
    /// A logit of each query head that joins its softmax and has no value.
    pub sinks: Option<Vec<f32>>,
}

/// What [`forward`] computes.
#[derive(Clone, Debug, PartialEq)]
pub struct Forward {
    /// `[queries, heads, head_dim]`.
    pub o: Vec<f64>,
    /// Log-sum-exp of a query's scores, `[heads, queries]`.
    pub lse: Vec<f64>,
}

/// What [`backward`] computes, each in the layout of what it is the gradient of.
#[derive(Clone, Debug, PartialEq)]
pub struct Gradients {
    /// Of the queries.
    pub q: Vec<f64>,
    /// Of the keys.
    pub k: Vec<f64>,
    /// Of the values.
    pub v: Vec<f64>,
}

fn rounded(value: f64, rounding: Option<FloatFormat>) -> f64 {
    match rounding {
        None => value,
        Some(FloatFormat::BF16) => bf16::from_f64(value).to_f64(),
        Some(FloatFormat::F16) => f16::from_f64(value).to_f64(),
        Some(FloatFormat::F32) => f64::from(value as f32),
    }
}

/// Probabilities of one query over the keys from `first` on, the derivatives of its capped scores, and its lse.
struct Weights {
    first: usize,
    p: Vec<f64>,
    slope: Vec<f64>,
    lse: f64,
}

/// Heads' elements as `[token, head, head_dim]`.
struct Heads<'a>(&'a [f32], usize, usize);

impl Heads<'_> {
    fn at(&self, token: usize, head: usize) -> &[f32] {
        let start = (token * self.1 + head) * self.2;
        &self.0[start..start + self.2]
    }
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

/// The weights of the query at `position` among its row's keys, which start at token `row`.
fn weights(
    q: &[f32],
    keys: &Heads<'_>,
    row: usize,
    head: usize,
    position: usize,
    options: Options,
    sink: Option<f64>,
) -> Weights {
    let first = options.window.map_or(0, |window| (position + 1).saturating_sub(window));
    let (mut scores, mut slope) = (Vec::new(), Vec::new());
    for key in first..=position {
        let score = dot(q, keys.at(row + key, head)) * f64::from(options.scale);
        match options.softcap.map(f64::from) {
            None => (scores.push(score), slope.push(1.0)),
            Some(cap) => {
                let t = (score / cap).tanh();
                (scores.push(cap * t), slope.push(1.0 - t * t))
            }
        };
    }
    let most = scores.iter().copied().chain(sink).fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = scores.iter().copied().chain(sink).map(|s| (s - most).exp()).sum();
    let p = scores.iter().map(|s| (s - most).exp() / sum).collect();
    Weights { first, p, slope, lse: most + sum.ln() }
}

impl Batch {
    fn sink(&self, head: usize) -> Option<f64> {
        self.sinks.as_ref().map(|sinks| f64::from(sinks[head]))
    }
}

/// Calls `f` with the number and row start of each query: (query, position, first key of the row).
fn queries(batch: &Batch, mut f: impl FnMut(usize, usize, usize)) {
    let (mut query, mut key) = (0, 0);
    for &(q_len, kv_len) in &batch.rows {
        for i in 0..q_len {
            f(query + i, kv_len - q_len + i, key);
        }
        (query, key) = (query + q_len, key + kv_len);
    }
}

/// Attention's output. With a `rounding`, what a computation that stores its probabilities in that format gives.
///
/// # Shapes
/// `q` `[queries, heads, head_dim]`; `k`, `v` `[keys, kv_heads, head_dim]`, the rows of the batch one after the other.
pub fn forward(
    q: &[f32],
    k: &[f32],
    v: &[f32],
    batch: &Batch,
    options: Options,
    rounding: Option<FloatFormat>,
) -> Forward {
    let &Batch { heads, kv_heads, head_dim, .. } = batch;
    let total: usize = batch.rows.iter().map(|row| row.0).sum();
    let (query_heads, keys) = (Heads(q, heads, head_dim), Heads(k, kv_heads, head_dim));
    let values = Heads(v, kv_heads, head_dim);
    let (mut o, mut lse) = (vec![0.0; q.len()], vec![0.0; heads * total]);
    queries(batch, |query, position, row| {
        for head in 0..heads {
            let kv_head = head / (heads / kv_heads);
            let weights =
                weights(query_heads.at(query, head), &keys, row, kv_head, position, options, batch.sink(head));
            lse[head * total + query] = weights.lse;
            let o = &mut o[(query * heads + head) * head_dim..][..head_dim];
            for (i, p) in weights.p.iter().enumerate() {
                let p = rounded(*p, rounding);
                for (o, v) in o.iter_mut().zip(values.at(row + weights.first + i, kv_head)) {
                    *o += p * f64::from(*v);
                }
            }
            o.iter_mut().for_each(|o| *o = rounded(*o, rounding));
        }
    });
    Forward { o, lse }
}

/// The gradients for `d_out`, that of the output. With a `rounding`, of a computation that stores its probabilities,
/// their gradients and `o` in that format.
///
/// # Shapes
/// As [`forward`]; `d_out` as `q`.
pub fn backward(
    q: &[f32],
    k: &[f32],
    v: &[f32],
    d_out: &[f32],
    batch: &Batch,
    options: Options,
    rounding: Option<FloatFormat>,
) -> Gradients {
    let &Batch { heads, kv_heads, head_dim, .. } = batch;
    let o = forward(q, k, v, batch, options, rounding).o;
    let (query_heads, keys) = (Heads(q, heads, head_dim), Heads(k, kv_heads, head_dim));
    let (values, outs) = (Heads(v, kv_heads, head_dim), Heads(d_out, heads, head_dim));
    let scale = f64::from(options.scale);
    let (mut dq, mut dk, mut dv) = (vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]);
    queries(batch, |query, position, row| {
        for head in 0..heads {
            let kv_head = head / (heads / kv_heads);
            let (this, out) = (query_heads.at(query, head), outs.at(query, head));
            let weights = weights(this, &keys, row, kv_head, position, options, batch.sink(head));
            let start = (query * heads + head) * head_dim;
            let delta: f64 = out.iter().zip(&o[start..]).map(|(d, o)| f64::from(*d) * o).sum();
            for (i, (p, slope)) in weights.p.iter().zip(&weights.slope).enumerate() {
                let key = row + weights.first + i;
                let ds = p * (dot(out, values.at(key, kv_head)) - delta) * slope;
                let (p, ds) = (rounded(*p, rounding), rounded(ds, rounding) * scale);
                let at = (key * kv_heads + kv_head) * head_dim;
                for d in 0..head_dim {
                    dq[start + d] += ds * f64::from(keys.at(key, kv_head)[d]);
                    dk[at + d] += ds * f64::from(this[d]);
                    dv[at + d] += p * f64::from(out[d]);
                }
            }
        }
    });
    for values in [&mut dq, &mut dk, &mut dv] {
        values.iter_mut().for_each(|value| *value = rounded(*value, rounding));
    }
    Gradients { q: dq, k: dk, v: dv }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Options = Options { scale: 1.0, window: None, softcap: None };

    #[test]
    fn two_tokens_by_hand() {
        let batch = Batch { rows: vec![(2, 2)], heads: 1, kv_heads: 1, head_dim: 1, sinks: None };
        let Forward { o, lse } = forward(&[0.0, 1.0], &[0.0, 3f32.ln()], &[2.0, 6.0], &batch, PLAIN, None);
        // The first sees itself; the second weighs 1 : 3.
        assert!((o[0] - 2.0).abs() < 1e-12 && (o[1] - 5.0).abs() < 1e-6, "{o:?}");
        assert!(lse[0].abs() < 1e-12 && (lse[1] - 4f64.ln()).abs() < 1e-6, "{lse:?}");
        let Forward { o, .. } =
            forward(&[0.0, 1.0], &[0.0, 3f32.ln()], &[2.0, 6.0], &batch, Options { window: Some(1), ..PLAIN }, None);
        assert_eq!(o, [2.0, 6.0]);
        // A sink of as much as the first key halves the first, and weighs 1 : 3 : 1 beside the second.
        let batch = Batch { sinks: Some(vec![0.0]), ..batch };
        let Forward { o, lse } = forward(&[0.0, 1.0], &[0.0, 3f32.ln()], &[2.0, 6.0], &batch, PLAIN, None);
        assert!((o[0] - 1.0).abs() < 1e-12 && (o[1] - 4.0).abs() < 1e-6, "{o:?}");
        assert!((lse[0] - 2f64.ln()).abs() < 1e-12 && (lse[1] - 5f64.ln()).abs() < 1e-6, "{lse:?}");
    }

    /// Central differences of f64: h^2 / 6 of a third derivative of order one, and 1e-16 / h of rounding.
    #[test]
    fn gradients_are_the_differences() {
        let whole = Batch { rows: vec![(3, 5), (4, 4)], heads: 4, kv_heads: 2, head_dim: 3, sinks: None };
        let sinks = Batch { sinks: Some(vec![-1.0, 0.5, 2.0, 0.0]), ..whole.clone() };
        let values = |n: usize, phase: f32| (0..n).map(|i| (i as f32 * 0.7 + phase).sin()).collect::<Vec<f32>>();
        let (q, d_out) = (values(7 * 12, 0.1), values(7 * 12, 0.2));
        let (k, v) = (values(9 * 6, 0.3), values(9 * 6, 0.4));
        for (batch, options) in [
            (&whole, Options { scale: 0.6, window: None, softcap: None }),
            (&whole, Options { scale: 0.9, window: Some(2), softcap: Some(0.8) }),
            (&sinks, Options { scale: 0.6, window: Some(3), softcap: None }),
        ] {
            let loss = |q: &[f32], k: &[f32], v: &[f32]| -> f64 {
                let o = forward(q, k, v, batch, options, None).o;
                o.iter().zip(&d_out).map(|(o, d)| o * f64::from(*d)).sum()
            };
            let gradients = backward(&q, &k, &v, &d_out, batch, options, None);
            let h = 2f32.powi(-8);
            let operands = [&q, &k, &v];
            for (which, gradient) in [&gradients.q, &gradients.k, &gradients.v].into_iter().enumerate() {
                for i in 0..gradient.len() {
                    let at = |h: f32| {
                        let mut moved = operands.map(Clone::clone);
                        moved[which][i] += h;
                        (loss(&moved[0], &moved[1], &moved[2]), f64::from(moved[which][i]))
                    };
                    let ((above, high), (below, low)) = (at(h), at(-h));
                    let difference = (above - below) / (high - low);
                    assert!((difference - gradient[i]).abs() < 1e-4, "{which} {i}: {difference} {}", gradient[i]);
                }
            }
        }
    }
}
