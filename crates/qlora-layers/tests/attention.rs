//! Attention and its backward against the oracle in f64, on every device of this machine.

use burn::tensor::{DType, Device, FloatDType, Tensor, TensorData};
use fused_kernels::attention::oracle::{self, Batch};
use qlora_layers::ops::{AttentionOptions, Sinks, attention};
use test_support::{devices, noise};

struct Case {
    rows: usize,
    q_len: usize,
    past: usize,
    heads: usize,
    kv_heads: usize,
    dim: usize,
    window: Option<usize>,
    softcap: Option<f32>,
    packed: Option<&'static [u32]>,
    /// The size of sinks, where there are some.
    sinks: Option<f32>,
}

const CASE: Case = Case {
    rows: 1,
    q_len: 17,
    past: 0,
    heads: 2,
    kv_heads: 2,
    dim: 8,
    window: None,
    softcap: None,
    packed: None,
    sinks: None,
};

/// Lengths on both sides of a chunk of queries (256), every option, and all of them together.
const CASES: &[Case] = &[
    Case { q_len: 1, ..CASE },
    Case { rows: 3, heads: 4, kv_heads: 2, ..CASE },
    Case { rows: 2, q_len: 300, heads: 8, kv_heads: 1, ..CASE },
    Case { q_len: 600, window: Some(100), ..CASE },
    Case { q_len: 40, window: Some(1), ..CASE },
    Case { q_len: 40, window: Some(400), heads: 4, kv_heads: 4, ..CASE },
    Case { q_len: 64, softcap: Some(2.0), dim: 16, ..CASE },
    Case { rows: 2, q_len: 5, past: 30, heads: 4, kv_heads: 1, ..CASE },
    Case { q_len: 1, past: 300, window: Some(20), ..CASE },
    Case { q_len: 20, packed: Some(&[0, 7, 7, 8, 20]), ..CASE },
    Case {
        q_len: 400,
        packed: Some(&[0, 30, 330, 400]),
        window: Some(50),
        softcap: Some(1.5),
        heads: 6,
        kv_heads: 2,
        dim: 40,
        ..CASE
    },
    Case { q_len: 40, heads: 8, kv_heads: 2, window: Some(9), sinks: Some(2.0), ..CASE },
    Case { rows: 2, q_len: 33, past: 30, heads: 4, kv_heads: 4, sinks: Some(2.0), ..CASE },
    // Sinks that leave next to nothing, and next to nothing of them; with a cap.
    Case { q_len: 300, heads: 6, kv_heads: 3, sinks: Some(100.0), ..CASE },
    Case { q_len: 20, packed: Some(&[0, 7, 7, 8, 20]), softcap: Some(2.0), heads: 2, sinks: Some(1.0), ..CASE },
];

impl Case {
    fn name(&self) -> String {
        let Self { rows, q_len, past, heads, kv_heads, dim, window, softcap, packed, sinks } = self;
        format!(
            "{rows} x {q_len} after {past}, heads {heads}/{kv_heads} x {dim}, window {window:?}, softcap {softcap:?}, \
             packed {packed:?}, sinks {sinks:?}"
        )
    }

    fn sinks(&self) -> Option<Vec<f32>> {
        self.sinks.map(|size| noise(5, self.heads).into_iter().map(|x| x * size).collect())
    }

    fn options(&self, device: &Device) -> AttentionOptions {
        let scale = AttentionOptions::causal(self.dim).scores.scale;
        let packed = self.packed.map(Into::into);
        let sinks = self.sinks().map(|values| Sinks::new(&values, device));
        AttentionOptions { packed, ..AttentionOptions::new(scale, self.window, self.softcap) }.with_sinks(sinks)
    }

    fn batch(&self) -> Batch {
        let rows = match self.packed {
            None => vec![(self.q_len, self.q_len + self.past); self.rows],
            Some(bounds) => bounds.windows(2).map(|row| (row[1] - row[0]) as usize).map(|len| (len, len)).collect(),
        };
        let sinks = self.sinks();
        Batch { rows, heads: self.heads, kv_heads: self.kv_heads, head_dim: self.dim, sinks }
    }
}

/// Values of a dtype, as f32.
fn values(tensor: Tensor<4>) -> Vec<f32> {
    tensor.into_data_as::<f32>().iter::<f32>().collect()
}

fn tensor(values: &[f32], shape: [usize; 4], dtype: FloatDType, device: &Device) -> Tensor<4> {
    let wide: Tensor<4> = Tensor::from_data(TensorData::new(values.to_vec(), shape), (device, DType::F32));
    wide.cast(dtype)
}

/// Output and the gradients of `q`, `k` and `v`.
fn run(case: &Case, operands: &[Vec<f32>; 4], dtype: FloatDType, device: &Device) -> [Vec<f32>; 4] {
    let &Case { rows, q_len, past, heads, kv_heads, dim, .. } = case;
    let (of_queries, of_keys) = ([rows, q_len, heads, dim], [rows, q_len + past, kv_heads, dim]);
    let [q, k, v, d_out] = operands;
    let [q, k, v] = [(q, of_queries), (k, of_keys), (v, of_keys)]
        .map(|(values, shape)| tensor(values, shape, dtype, device).autodiff().require_grad());
    let o = attention(q.clone(), k.clone(), v.clone(), &case.options(device));
    let untracked = attention(q.clone().inner(), k.clone().inner(), v.clone().inner(), &case.options(device));
    let bits = |x: Tensor<4>| values(x).into_iter().map(f32::to_bits).collect::<Vec<_>>();
    assert!(bits(o.clone().inner()) == bits(untracked), "{}: tracking changes the output", case.name());
    let d_out = tensor(d_out, of_queries, dtype, device).autodiff();
    let mut grads = (o.clone() * d_out).sum().backward();
    let gradients = [q, k, v].map(|x| {
        let gradient = x.grad_remove(&mut grads).expect("every operand is tracked");
        assert_eq!(gradient.dims(), x.dims(), "{}", case.name());
        values(gradient)
    });
    let [dq, dk, dv] = gradients;
    [values(o.inner()), dq, dk, dv]
}

fn check(case: &Case, dtype: FloatDType, name: &str, device: &Device, tolerance: f64) {
    let &Case { rows, q_len, past, heads, kv_heads, dim, .. } = case;
    let (queries, keys) = (rows * q_len * heads * dim, rows * (q_len + past) * kv_heads * dim);
    let of_dtype = |seed, len| {
        let x = Tensor::<1>::from_data(TensorData::new(noise(seed, len), [len]), (&Device::flex(), DType::F32));
        x.cast(dtype).into_data_as::<f32>().iter::<f32>().collect::<Vec<f32>>()
    };
    let operands = [of_dtype(1, queries), of_dtype(2, keys), of_dtype(3, keys), of_dtype(4, queries)];
    let found = run(case, &operands, dtype, device);
    let options = case.options(device).scores;
    let [q, k, v, d_out] = &operands;
    let o = oracle::forward(q, k, v, &case.batch(), options, None).o;
    let gradients = oracle::backward(q, k, v, d_out, &case.batch(), options, None);
    let expected = [o, gradients.q, gradients.k, gradients.v];
    for ((what, found), expected) in ["o", "dq", "dk", "dv"].iter().zip(&found).zip(&expected) {
        assert_eq!(found.len(), expected.len());
        let largest = expected.iter().fold(1.0_f64, |most, x| most.max(x.abs()));
        for (i, (a, b)) in found.iter().zip(expected).enumerate() {
            let error = (f64::from(*a) - b).abs();
            assert!(error <= tolerance * largest, "{name} {dtype:?} {}: {what} {i} is {a}, should be {b}", case.name());
        }
    }
}

/// f32 throughout: sums of up to 600 terms, exponentials and tanh that GPUs approximate to some 2^-20.
const F32: f64 = 3e-5;
/// bf16: each of P, dS, O and the results is rounded to 2^-9 of itself, and hundreds of such errors add like their
/// root; twice that in the gradients, where O's enters as well.
const BF16: f64 = 1.5e-2;

#[test]
fn output_and_gradients_are_the_oracles() {
    for (name, device) in devices() {
        for case in CASES {
            check(case, FloatDType::F32, name, &device, F32);
        }
    }
}

#[test]
fn narrow_tensors_are_rounded_where_they_are_stored() {
    for (name, device) in devices().into_iter().filter(|(name, _)| *name != "wgpu") {
        for case in CASES {
            check(case, FloatDType::BF16, name, &device, BF16);
        }
    }
}

#[test]
fn views_are_read_in_place() {
    for (name, device) in devices() {
        let case = &Case { rows: 2, heads: 4, kv_heads: 2, ..CASE };
        let (q, k, v) = (noise(1, 2 * 17 * 32), noise(2, 2 * 17 * 16), noise(3, 2 * 17 * 16));
        let heads_first = |x: &[f32], heads| {
            let x = tensor(x, [2, 17, heads, 8], FloatDType::F32, &device);
            // The same values, heads before tokens in memory.
            let data = x.swap_dims(1, 2).into_data();
            Tensor::<4>::from_data(data, (&device, DType::F32)).swap_dims(1, 2)
        };
        let plain = |x: &[f32], heads| tensor(x, [2, 17, heads, 8], FloatDType::F32, &device);
        let a = values(attention(plain(&q, 4), plain(&k, 2), plain(&v, 2), &case.options(&device)));
        let b = values(attention(heads_first(&q, 4), heads_first(&k, 2), heads_first(&v, 2), &case.options(&device)));
        assert_eq!(a, b, "{name}");
    }
}

#[test]
#[should_panic(expected = "row bounds")]
fn bounds_cover_the_batch() {
    let x = Tensor::<4>::zeros([1, 8, 1, 8], &Device::flex());
    let options = AttentionOptions { packed: Some([0, 7].into()), ..AttentionOptions::causal(8) };
    attention(x.clone(), x.clone(), x, &options);
}
