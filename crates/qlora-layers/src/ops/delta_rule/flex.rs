//! The CPU implementation: token by token, the heads of keys on all threads.
//!
//! The backward pass goes forward once for the states before every [`SPAN`] tokens, and then from the last span to the first,
//! with the states before each token of a span at hand.

use super::{DeltaRows, DeltaRuleOps, DeltaRulePasses, Operands};
use crate::ops::vectors::{LANES, for_processor, joined};
use burn::backend::ops::FloatTensorOps;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Flex, TensorMetadata};
use burn::tensor::{FloatDType, TensorData};
use burn_flex::FlexTensor;
use rayon::prelude::*;
use std::borrow::Cow;
use std::ops::Range;

/// Tokens whose states the backward pass holds at a time.
const SPAN: usize = 32;

#[inline(always)]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0; LANES];
    let ((whole_a, rest_a), (whole_b, rest_b)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for (a, b) in whole_a.iter().zip(whole_b) {
        for i in 0..LANES {
            lanes[i] += a[i] * b[i];
        }
    }
    joined(&lanes) + rest_a.iter().zip(rest_b).map(|(a, b)| a * b).sum::<f32>()
}

/// `sum += factor · row`.
#[inline(always)]
fn add(sum: &mut [f32], factor: f32, row: &[f32]) {
    sum.iter_mut().zip(row).for_each(|(sum, x)| *sum += factor * x);
}

/// One token of one head.
#[derive(Clone, Copy)]
struct Token<'a> {
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    /// `exp(g)`.
    decay: f32,
    beta: f32,
}

#[inline(always)]
fn step_body(state: &mut [f32], token: Token<'_>, out: &mut [f32], update: &mut [f32]) {
    let width = out.len();
    update.fill(0.0);
    for (row, k) in state.chunks_exact_mut(width).zip(token.k) {
        row.iter_mut().for_each(|s| *s *= token.decay);
        add(update, *k, row);
    }
    update.iter_mut().zip(token.v).for_each(|(u, v)| *u = token.beta * (v - *u));
    out.fill(0.0);
    for ((row, k), q) in state.chunks_exact_mut(width).zip(token.k).zip(token.q) {
        add(row, *k, update);
        add(out, *q, row);
    }
}

for_processor! {
    /// The state goes on by a token, whose output this writes; `update` is scratch.
    fn step(state: &mut [f32], token: Token<'_>, out: &mut [f32], update: &mut [f32]) = step_body
}

/// Gradients of one token of one head; those of queries and keys are added.
struct TokenGradients<'a> {
    q: &'a mut [f32],
    k: &'a mut [f32],
    v: &'a mut [f32],
    g: f32,
    beta: f32,
}

#[inline(always)]
fn step_back_body(
    before: &[f32],
    gradient: &mut [f32],
    token: Token<'_>,
    d_out: &[f32],
    grads: &mut TokenGradients<'_>,
    scratch: &mut [f32],
) {
    let (width, decay) = (d_out.len(), token.decay);
    let (missing, rest) = scratch.split_at_mut(width);
    let (update, d_update) = rest.split_at_mut(width);
    missing.fill(0.0);
    for (row, k) in before.chunks_exact(width).zip(token.k) {
        add(missing, decay * k, row);
    }
    missing.iter_mut().zip(token.v).for_each(|(m, v)| *m = v - *m);
    update.iter_mut().zip(&*missing).for_each(|(u, m)| *u = token.beta * m);
    d_update.fill(0.0);
    let update_share = dot(update, d_out);
    for (i, (before, gradient)) in before.chunks_exact(width).zip(gradient.chunks_exact_mut(width)).enumerate() {
        grads.q[i] += decay * dot(before, d_out) + token.k[i] * update_share;
        add(gradient, token.q[i], d_out);
        grads.k[i] += dot(gradient, update);
        add(d_update, token.k[i], gradient);
    }
    grads.beta = dot(d_update, missing);
    grads.v.iter_mut().zip(&*d_update).for_each(|(v, d)| *v = token.beta * d);
    grads.g = 0.0;
    for (i, (before, gradient)) in before.chunks_exact(width).zip(gradient.chunks_exact_mut(width)).enumerate() {
        grads.k[i] -= decay * dot(before, grads.v);
        add(gradient, -token.k[i], grads.v);
        grads.g += decay * dot(gradient, before);
        gradient.iter_mut().for_each(|d| *d *= decay);
    }
}

for_processor! {
    /// The gradient of the state behind a token becomes that of the state before it, which is `before`; `scratch` has room
    /// for three outputs.
    fn step_back(
        before: &[f32],
        gradient: &mut [f32],
        token: Token<'_>,
        d_out: &[f32],
        grads: &mut TokenGradients<'_>,
        scratch: &mut [f32],
    ) = step_back_body
}

fn f32s(x: &FlexTensor) -> Vec<f32> {
    let x = Flex::float_cast(x.clone(), FloatDType::F32);
    let values: Cow<'_, [f32]> = match x.as_slice::<f32>() {
        Some(slice) => slice.into(),
        None => x.to_contiguous().storage::<f32>().to_vec().into(),
    };
    values.into_owned()
}

/// The operands in f32, all tokens in a line.
struct Values {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    g: Vec<f32>,
    beta: Vec<f32>,
    key_heads: usize,
    heads: usize,
    key_dim: usize,
    value_dim: usize,
    /// Tokens of each row.
    rows: Vec<Range<usize>>,
}

impl Values {
    fn new(operands: &Operands<FlexTensor>, packed: &DeltaRows) -> Self {
        let ([rows, len, key_heads, key_dim], [_, _, heads, value_dim]) =
            (operands.k.shape().dims(), operands.v.shape().dims());
        let rows = match &packed.packed {
            None => (0..rows).map(|row| row * len..(row + 1) * len).collect(),
            Some(bounds) => bounds.windows(2).map(|row| row[0] as usize..row[1] as usize).collect(),
        };
        let Operands { q, k, v, g, beta } = operands;
        let [q, k, v, g, beta] = [q, k, v, g, beta].map(f32s);
        Self { q, k, v, g, beta, key_heads, heads, key_dim, value_dim, rows }
    }

    fn group(&self) -> usize {
        self.heads / self.key_heads
    }

    fn state_len(&self) -> usize {
        self.key_dim * self.value_dim
    }

    fn keys(&self, token: usize, head: usize) -> Range<usize> {
        let start = (token * self.key_heads + head / self.group()) * self.key_dim;
        start..start + self.key_dim
    }

    fn values(&self, token: usize, head: usize) -> Range<usize> {
        let start = (token * self.heads + head) * self.value_dim;
        start..start + self.value_dim
    }

    fn token(&self, token: usize, head: usize) -> Token<'_> {
        let (keys, at) = (self.keys(token, head), token * self.heads + head);
        Token {
            q: &self.q[keys.clone()],
            k: &self.k[keys],
            v: &self.v[self.values(token, head)],
            decay: self.g[at].exp(),
            beta: self.beta[at],
        }
    }
}

/// The outputs of one head over a row, and the state behind it.
fn head_forward(all: &Values, tokens: Range<usize>, head: usize, mut state: Vec<f32>) -> (Vec<f32>, Vec<f32>) {
    let mut out = vec![0.0; tokens.len() * all.value_dim];
    let mut update = vec![0.0; all.value_dim];
    for (token, out) in tokens.zip(out.chunks_mut(all.value_dim)) {
        step(&mut state, all.token(token, head), out, &mut update);
    }
    (out, state)
}

/// Gradients of a head of keys over a row: its own, and those of its group's values.
struct HeadGradients {
    q: Vec<f32>,
    k: Vec<f32>,
    /// One of each of the group's heads: `[len, value_dim]`, `[len]`, `[len]`.
    heads: Vec<[Vec<f32>; 3]>,
}

fn head_backward(all: &Values, d_out: &[f32], tokens: Range<usize>, key_head: usize) -> HeadGradients {
    let (len, width) = (tokens.len(), all.value_dim);
    let zeros = |len: usize| vec![0.0_f32; len];
    let (mut q, mut k) = (zeros(len * all.key_dim), zeros(len * all.key_dim));
    let (mut out, mut update, mut scratch) = (zeros(width), zeros(width), zeros(3 * width));
    let of_head = |head: usize| {
        let mut state = zeros(all.state_len());
        let mut starts = Vec::with_capacity(len.div_ceil(SPAN));
        for (position, token) in tokens.clone().enumerate() {
            if position % SPAN == 0 {
                starts.push(state.clone());
            }
            step(&mut state, all.token(token, head), &mut out, &mut update);
        }
        let mut gradient = zeros(all.state_len());
        let mut own = [zeros(len * width), zeros(len), zeros(len)];
        for (span, mut state) in starts.into_iter().enumerate().rev() {
            let positions = span * SPAN..len.min((span + 1) * SPAN);
            let mut befores = Vec::with_capacity(positions.len());
            for position in positions.clone() {
                befores.push(state.clone());
                step(&mut state, all.token(tokens.start + position, head), &mut out, &mut update);
            }
            for (position, before) in positions.zip(&befores).rev() {
                let token = tokens.start + position;
                let keys = position * all.key_dim..(position + 1) * all.key_dim;
                let [v, g, beta] = &mut own;
                let mut grads = TokenGradients {
                    q: &mut q[keys.clone()],
                    k: &mut k[keys],
                    v: &mut v[position * width..(position + 1) * width],
                    g: 0.0,
                    beta: 0.0,
                };
                let d_out = &d_out[all.values(token, head)];
                step_back(before, &mut gradient, all.token(token, head), d_out, &mut grads, &mut scratch);
                (g[position], beta[position]) = (grads.g, grads.beta);
            }
        }
        own
    };
    let heads = (key_head * all.group()..(key_head + 1) * all.group()).map(of_head).collect();
    HeadGradients { q, k, heads }
}

/// Writes `[len, width]` of one head into `[tokens, heads, width]`.
fn scatter(to: &mut [f32], from: &[f32], first: usize, head: usize, heads: usize, width: usize) {
    for (position, values) in from.chunks(width).enumerate() {
        let start = ((first + position) * heads + head) * width;
        to[start..start + width].copy_from_slice(values);
    }
}

fn tensor(values: Vec<f32>, like: &FlexTensor) -> FlexTensor {
    let shape = like.shape().to_vec();
    let tensor = FlexTensor::from_data(TensorData::new(values, shape));
    Flex::float_cast(tensor, like.dtype().into())
}

/// Outputs, and the state behind each row and head; `start` is the state of a row and head by their number.
fn forward(
    operands: &Operands<FlexTensor>,
    rows: &DeltaRows,
    start: impl Fn(usize, usize) -> Vec<f32> + Sync,
) -> (FlexTensor, FlexTensor) {
    let all = Values::new(operands, rows);
    let size = all.state_len();
    let one = |index: usize| {
        let tokens = all.rows[index / all.heads].clone();
        head_forward(&all, tokens, index % all.heads, start(index, size))
    };
    let count = all.rows.len() * all.heads;
    let done: Vec<(Vec<f32>, Vec<f32>)> = (0..count).into_par_iter().map(one).collect();
    let mut out = vec![0.0; all.v.len()];
    let mut states = Vec::with_capacity(count * size);
    for (index, (head_out, state)) in done.into_iter().enumerate() {
        let first = all.rows[index / all.heads].start;
        scatter(&mut out, &head_out, first, index % all.heads, all.heads, all.value_dim);
        states.extend(state);
    }
    let shape = vec![all.rows.len(), all.heads, all.key_dim, all.value_dim];
    (tensor(out, &operands.v), FlexTensor::from_data(TensorData::new(states, shape)))
}

impl DeltaRulePasses for Flex {
    fn delta_rule_forward(operands: Operands<FloatTensor<Self>>, rows: &DeltaRows) -> FloatTensor<Self> {
        forward(&operands, rows, |_, size| vec![0.0; size]).0
    }

    fn delta_rule_forward_after(
        operands: Operands<FloatTensor<Self>>,
        state: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let states = f32s(&state);
        forward(&operands, &DeltaRows::default(), |index, size| states[index * size..(index + 1) * size].to_vec())
    }

    fn delta_rule_backward(
        operands: Operands<FloatTensor<Self>>,
        d_out: FloatTensor<Self>,
        rows: &DeltaRows,
    ) -> [FloatTensor<Self>; 5] {
        let all = Values::new(&operands, rows);
        let d_out = f32s(&d_out);
        let one =
            |index: usize| head_backward(&all, &d_out, all.rows[index / all.key_heads].clone(), index % all.key_heads);
        let count = all.rows.len() * all.key_heads;
        let done: Vec<HeadGradients> = (0..count).into_par_iter().map(one).collect();
        let zeros = |like: &[f32]| vec![0.0; like.len()];
        let (mut q, mut k, mut v) = (zeros(&all.q), zeros(&all.k), zeros(&all.v));
        let (mut g, mut beta) = (zeros(&all.g), zeros(&all.beta));
        for (index, grads) in done.into_iter().enumerate() {
            let (first, key_head) = (all.rows[index / all.key_heads].start, index % all.key_heads);
            scatter(&mut q, &grads.q, first, key_head, all.key_heads, all.key_dim);
            scatter(&mut k, &grads.k, first, key_head, all.key_heads, all.key_dim);
            for (own, head) in grads.heads.iter().zip(key_head * all.group()..) {
                scatter(&mut v, &own[0], first, head, all.heads, all.value_dim);
                scatter(&mut g, &own[1], first, head, all.heads, 1);
                scatter(&mut beta, &own[2], first, head, all.heads, 1);
            }
        }
        let Operands { q: q_like, k: k_like, v: v_like, g: g_like, beta: beta_like } = &operands;
        [tensor(q, q_like), tensor(k, k_like), tensor(v, v_like), tensor(g, g_like), tensor(beta, beta_like)]
    }
}

impl DeltaRuleOps for Flex {
    fn delta_rule(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        g: FloatTensor<Self>,
        beta: FloatTensor<Self>,
        rows: DeltaRows,
    ) -> FloatTensor<Self> {
        Self::delta_rule_forward(Operands { q, k, v, g, beta }, &rows)
    }

    fn delta_rule_after(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        g: FloatTensor<Self>,
        beta: FloatTensor<Self>,
        state: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        Self::delta_rule_forward_after(Operands { q, k, v, g, beta }, state)
    }
}
