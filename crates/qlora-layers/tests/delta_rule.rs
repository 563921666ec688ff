//! The gated delta rule on every device: outputs, states and gradients against the recurrence in f64.
#![allow(clippy::unwrap_used, reason = "a failing unwrap is a failing test")]

use burn::tensor::{DType, Device, FloatDType, Tensor, TensorData};
use fused_kernels::delta_rule::oracle::{self, Batch, Inputs};
use qlora_layers::ops::{DeltaRows, delta_rule, delta_rule_after};
use test_support::{devices, dtypes, noise};

/// What a case reads, as f32 tensors and in f64.
struct Case {
    batch: Batch,
    values: [Vec<f32>; 5],
    d_out: Vec<f32>,
}

impl Case {
    /// Keys and queries of length 1, as models have them; with `repeats`, tokens in runs of equal keys, and little decay.
    fn new(batch: Batch, repeats: bool) -> Self {
        let tokens: usize = batch.rows.iter().sum();
        let Batch { key_heads, value_heads, key_dim, value_dim, .. } = batch;
        let unit = |seed, run: usize| -> Vec<f32> {
            let values = noise(seed, tokens * key_heads * key_dim);
            let rows = values.chunks(key_dim).enumerate();
            let rows = rows.map(|(i, _)| {
                let (token, head) = (i / key_heads / run * run, i % key_heads);
                &values[(token * key_heads + head) * key_dim..][..key_dim]
            });
            rows.flat_map(|row| {
                let length = row.iter().map(|x| x * x).sum::<f32>().sqrt();
                row.iter().map(move |x| x / length)
            })
            .collect()
        };
        let rate = if repeats { 0.01 } else { 1.5 };
        let values = [
            unit(1, 1),
            unit(2, if repeats { 40 } else { 1 }),
            noise(3, tokens * value_heads * value_dim),
            noise(4, tokens * value_heads).iter().map(|g| -rate * g.abs()).collect(),
            noise(5, tokens * value_heads).iter().map(|b| if repeats { 1.0 } else { b.abs() }).collect(),
        ];
        let d_out = noise(6, tokens * value_heads * value_dim);
        Self { batch, values, d_out }
    }

    /// Rows and tokens of the tensors, and where packed rows begin.
    fn layout(&self) -> ([usize; 2], DeltaRows) {
        let rows = &self.batch.rows;
        match rows.iter().all(|len| *len == rows[0]) {
            true => ([rows.len(), rows[0]], DeltaRows::default()),
            false => {
                let bounds: Vec<u32> = std::iter::once(0)
                    .chain(rows.iter().scan(0, |sum, len| {
                        *sum += *len as u32;
                        Some(*sum)
                    }))
                    .collect();
                ([1, rows.iter().sum()], DeltaRows { packed: Some(bounds.into()) })
            }
        }
    }

    fn tensors(&self, device: &Device) -> ([Tensor<4>; 3], [Tensor<3>; 2]) {
        let ([rows, len], _) = self.layout();
        let Batch { key_heads, value_heads, key_dim, value_dim, .. } = self.batch;
        let [q, k, v, g, beta] = &self.values;
        let four = |values: &[f32], heads, width| tensor(values, [rows, len, heads, width], device);
        let three = |values: &[f32]| tensor(values, [rows, len, value_heads], device);
        (
            [four(q, key_heads, key_dim), four(k, key_heads, key_dim), four(v, value_heads, value_dim)],
            [three(g), three(beta)],
        )
    }
}

fn tensor<const D: usize>(values: &[f32], shape: [usize; D], device: &Device) -> Tensor<D> {
    Tensor::from_data(TensorData::new(values.to_vec(), shape), (device, DType::F32))
}

fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f64> {
    tensor.into_data_as::<f32>().iter::<f32>().map(f64::from).collect()
}

fn cases() -> Vec<Case> {
    let batch = |rows: &[usize], heads: [usize; 2], dims: [usize; 2]| Batch {
        rows: rows.into(),
        key_heads: heads[0],
        value_heads: heads[1],
        key_dim: dims[0],
        value_dim: dims[1],
    };
    vec![
        Case::new(batch(&[1], [1, 1], [4, 4]), false),
        Case::new(batch(&[5, 5], [1, 2], [8, 6]), false),
        Case::new(batch(&[150, 150], [2, 4], [16, 24]), false),
        Case::new(batch(&[3, 70, 1, 64], [1, 2], [12, 8]), false),
        Case::new(batch(&[130], [2, 2], [16, 16]), true),
    ]
}

/// Some hundred tokens' f32 sums of terms near 1, whose errors a state carries on; keys that repeat without decay carry
/// them furthest.
fn assert_close(what: &str, found: &[f64], expected: &[f64]) {
    let scale = expected.iter().fold(1.0_f64, |most, value| most.max(value.abs()));
    test_support::assert_close(what, found, expected, |_, _| 2e-5 * scale);
}

#[test]
fn outputs_and_gradients_are_those_of_the_recurrence() {
    for (name, device) in devices() {
        for case in cases() {
            let what = format!("{name}, {:?}", case.batch);
            let (_, rows) = case.layout();
            let ([q, k, v], factors) = case.tensors(&device);
            let leaves = [q, k, v].map(|x| x.autodiff().require_grad());
            let factors = factors.map(|x| x.autodiff().require_grad());
            let [q, k, v] = leaves.clone();
            let out = delta_rule(q, k, v, factors.clone(), &rows);
            let d_out = tensor(&case.d_out, out.dims(), &device);
            let mut grads = (out.clone() * d_out).sum().backward();

            let wide = case.values.each_ref().map(|v| v.iter().copied().map(f64::from).collect::<Vec<_>>());
            let d_out: Vec<f64> = case.d_out.iter().copied().map(f64::from).collect();
            let [q, k, v, g, beta] = &wide;
            let inputs = Inputs { q, k, v, g, beta };
            assert_close(&format!("output, {what}"), &values(out.inner()), &oracle::forward(inputs, &case.batch).0);
            let expected = oracle::backward(inputs, &d_out, &case.batch);
            let found = leaves.map(|leaf| values(leaf.grad_remove(&mut grads).unwrap()));
            for ((which, found), expected) in
                ["q", "k", "v"].iter().zip(&found).zip([&expected.q, &expected.k, &expected.v])
            {
                assert_close(&format!("gradient of {which}, {what}"), found, expected);
            }
            let found = factors.map(|leaf| values(leaf.grad_remove(&mut grads).unwrap()));
            for ((which, found), expected) in ["g", "beta"].iter().zip(&found).zip([&expected.g, &expected.beta]) {
                assert_close(&format!("gradient of {which}, {what}"), found, expected);
            }
        }
    }
}

#[test]
fn a_row_goes_on_from_its_state() {
    for (name, device) in devices() {
        let batch = Batch { rows: vec![90, 90], key_heads: 1, value_heads: 2, key_dim: 8, value_dim: 12 };
        let case = Case::new(batch, false);
        let ([q, k, v], [g, beta]) = case.tensors(&device);
        let whole = delta_rule(q.clone(), k.clone(), v.clone(), [g.clone(), beta.clone()], &DeltaRows::default());
        let mut state = Tensor::zeros([2, 2, 8, 12], (&device, DType::F32));
        let mut parts = Vec::new();
        for (start, len) in [(0, 1), (1, 70), (71, 3), (74, 16)] {
            let part = |x: &Tensor<4>| x.clone().narrow(1, start, len);
            let factors = [&g, &beta].map(|x| x.clone().narrow(1, start, len));
            let (out, behind) = delta_rule_after(part(&q), part(&k), part(&v), factors, state);
            state = behind;
            parts.push(out);
        }
        assert_close(&format!("{name}, outputs"), &values(Tensor::cat(parts, 1)), &values(whole));
        let wide = case.values.each_ref().map(|v| v.iter().copied().map(f64::from).collect::<Vec<_>>());
        let [q, k, v, g, beta] = &wide;
        let (_, states) = oracle::forward(Inputs { q, k, v, g, beta }, &case.batch);
        assert_close(&format!("{name}, states"), &values(state), &states);
    }
}

/// On CUDA these are the fused kernels, over values that lie apart, as parts of a wider tensor.
#[test]
fn narrow_operands_give_what_wide_ones_give() {
    for (name, device) in devices() {
        let on_host = (name == "flex").then_some(FloatDType::BF16);
        for dtype in dtypes(name).into_iter().chain(on_host).filter(|dtype| *dtype != FloatDType::F32) {
            let batch = Batch { rows: vec![70, 70], key_heads: 1, value_heads: 2, key_dim: 128, value_dim: 128 };
            let case = Case::new(batch, false);
            let ([q, k, v], factors) = case.tensors(&device);
            let run = |dtype: FloatDType| {
                let wide = Tensor::cat(vec![v.clone(), v.clone()], 2).cast(dtype);
                let leaves = [&q, &k].map(|x| x.clone().cast(dtype).autodiff().require_grad());
                let values_leaf = wide.autodiff().require_grad();
                let factors = factors.clone().map(|x| x.autodiff().require_grad());
                let ([q, k], v) = (leaves.clone(), values_leaf.clone().narrow(2, 1, 2));
                let out = delta_rule(q, k, v, factors.clone(), &DeltaRows::default());
                let d_out = tensor(&case.d_out, out.dims(), &device).cast(dtype);
                let mut grads = (out.clone() * d_out).sum().backward();
                let mut found = vec![values(out.inner())];
                found.extend(leaves.map(|leaf| values(leaf.grad_remove(&mut grads).unwrap())));
                found.push(values(values_leaf.grad_remove(&mut grads).unwrap()));
                found.extend(factors.map(|leaf| values(leaf.grad_remove(&mut grads).unwrap())));
                found
            };
            let (narrow, wide) = (run(dtype), run(FloatDType::F32));
            for (which, (found, expected)) in ["out", "q", "k", "v", "g", "beta"].iter().zip(narrow.iter().zip(&wide)) {
                let largest = expected.iter().fold(0.0_f64, |most, value| most.max(value.abs()));
                // Inputs and operands of products are rounded: some half-ulps of bf16 of the largest terms.
                let bar = 6.0 * 3.9e-3 * largest;
                test_support::assert_close(format!("{which}, {name}, {dtype:?}"), found, expected, |_, _| bar);
            }
        }
    }
}
