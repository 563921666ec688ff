//! Updates of different adapters in one batch, on every device of this machine.

use burn::tensor::{DType, Device, FloatDType, Tensor, TensorData};
use half::bf16;
use qlora_layers::ops::{AdapterGroup, GroupMember, grouped_low_rank};
use test_support::{assert_close, devices, noise};

/// Rank and scaling.
const ADAPTERS: [(usize, f32); 3] = [(8, 2.0), (3, -0.5), (40, 0.25)];

fn matrix(values: Vec<f32>, shape: [usize; 2], device: &Device) -> Tensor<2> {
    Tensor::from_data(TensorData::new(values, shape), (device, DType::F32))
}

fn floats(tensor: Tensor<2>) -> Vec<f32> {
    tensor.into_data_as::<f32>().iter::<f32>().collect()
}

fn factors(columns: usize, rows: usize, device: &Device) -> Vec<(Tensor<2>, Tensor<2>)> {
    let one = |(i, (rank, _)): (usize, &(usize, f32))| {
        let (a, b) = (noise(10 + i as u64, rank * columns), noise(20 + i as u64, rows * rank));
        (matrix(a, [*rank, columns], device), matrix(b, [rows, *rank], device))
    };
    ADAPTERS.iter().enumerate().map(one).collect()
}

fn group(factors: &[(Tensor<2>, Tensor<2>)], dtype: FloatDType) -> AdapterGroup {
    let members: Vec<GroupMember<'_>> = factors
        .iter()
        .zip(ADAPTERS)
        .map(|((lora_a, lora_b), (_, scaling))| GroupMember { lora_a, lora_b, scaling })
        .collect();
    AdapterGroup::new(&members, dtype)
}

#[test]
fn every_token_gets_its_adapters_update() {
    for (name, device) in devices() {
        let dtypes: &[FloatDType] =
            if name == "wgpu" { &[FloatDType::F32] } else { &[FloatDType::F32, FloatDType::BF16] };
        for &dtype in dtypes {
            for (columns, rows) in [(64, 48), (50, 31)] {
                let factors = factors(columns, rows, &device);
                let group = group(&factors, dtype);
                let of_tokens = [Some(1), None, Some(0), Some(2), Some(0), None, Some(1)];
                let n = of_tokens.len();
                let (x, y) = (noise(1, n * columns), noise(2, n * rows));
                let batch = matrix(x.clone(), [n, columns], &device).cast(dtype);
                let sum = matrix(y.clone(), [n, rows], &device);
                let found = floats(grouped_low_rank(sum.clone(), batch, &group, &group.tokens(&of_tokens)));
                assert_eq!(floats(sum), y, "{name}: the operand is left alone");

                let round = |v: f32| if dtype == FloatDType::BF16 { bf16::from_f32(v).to_f32() } else { v };
                let mut expected: Vec<f64> = y.iter().map(|y| f64::from(*y)).collect();
                for (token, adapter) in of_tokens.iter().enumerate() {
                    let Some(adapter) = *adapter else { continue };
                    let ((a, b), (rank, scaling)) = (&factors[adapter], ADAPTERS[adapter]);
                    let (a, b) = (floats(a.clone()), floats(b.clone()));
                    for k in 0..rank {
                        let u: f64 = (0..columns)
                            .map(|i| f64::from(round(x[token * columns + i])) * f64::from(round(a[k * columns + i])))
                            .sum();
                        for row in 0..rows {
                            expected[token * rows + row] +=
                                f64::from(scaling) * u * f64::from(round(b[row * rank + k]));
                        }
                    }
                }
                // In bf16 the projections, up to 2 sqrt(64) times a scaling of 2, are rounded: half an ulp of 2^-8, of
                // some of either sign. In f32, sums of up to 64 terms.
                let bar = if dtype == FloatDType::BF16 { 0.25 } else { 2e-5 };
                assert_close(format!("{name}, {dtype:?}"), &found, &expected, |_, _| bar);
                for (token, adapter) in of_tokens.iter().enumerate() {
                    if adapter.is_none() {
                        assert_eq!(found[token * rows..][..rows], y[token * rows..][..rows], "{name}: no adapter");
                    }
                }
            }
        }
    }
}

#[test]
fn a_token_does_not_depend_on_the_others() {
    for (name, device) in devices() {
        let (columns, rows) = (96, 40);
        let group = group(&factors(columns, rows, &device), FloatDType::F32);
        let of_tokens = [Some(2), Some(0), None, Some(2), Some(1), Some(2)];
        let (x, y) = (noise(3, 6 * columns), noise(4, 6 * rows));
        let run = |tokens: std::ops::Range<usize>| {
            let x = matrix(x[tokens.start * columns..tokens.end * columns].to_vec(), [tokens.len(), columns], &device);
            let y = matrix(y[tokens.start * rows..tokens.end * rows].to_vec(), [tokens.len(), rows], &device);
            let out = grouped_low_rank(y, x, &group, &group.tokens(&of_tokens[tokens]));
            floats(out).into_iter().map(f32::to_bits).collect::<Vec<_>>()
        };
        let alone: Vec<u32> = (0..6).flat_map(|token| run(token..token + 1)).collect();
        assert!(run(0..6) == alone, "{name}");
        assert!(run(1..5) == alone[rows..5 * rows], "{name}");
    }
}

#[test]
#[should_panic(expected = "a token has adapter 3, of 3")]
fn an_adapter_that_is_not_there_is_refused() {
    group(&factors(4, 4, &Device::flex()), FloatDType::F32).tokens(&[Some(3)]);
}

#[test]
#[should_panic(expected = "the tokens are those of another group of adapters")]
fn tokens_of_another_group_are_refused() {
    let device = Device::flex();
    let factors = factors(4, 4, &device);
    let (all, some) = (group(&factors, FloatDType::F32), group(&factors[..2], FloatDType::F32));
    let zeros = || Tensor::<2>::zeros([1, 4], &device);
    grouped_low_rank(zeros(), zeros(), &all, &some.tokens(&[Some(1)]));
}
