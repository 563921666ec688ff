//! Rows of single tokens against a table that holds them, on every device of this machine.
#![allow(clippy::unwrap_used, reason = "a failing unwrap is a failing test")]

use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use qlora_layers::ops::matmul;
use qlora_layers::{Pass, TokenRows, trainable, with_mean_rows};
use test_support::assert_close;

fn index(ids: &[u32], device: &Device) -> Tensor<1, Int> {
    let ids: Vec<i32> = ids.iter().map(|id| *id as i32).collect();
    Tensor::from_data(TensorData::new(ids.clone(), [ids.len()]), (device, DType::I32))
}

/// The same sums of a few products in f32; a tile of another shape may add them in another order.
fn bound(_: usize, expected: f64) -> f64 {
    1e-5 * (1.0 + expected.abs())
}

fn matrix(rows: usize, width: usize, seed: u64, device: &Device) -> Tensor<2> {
    let values: Vec<f32> = test_support::noise(seed, rows * width);
    Tensor::from_data(TensorData::new(values, [rows, width]), (device, DType::F32))
}

fn values(tensor: Tensor<2>) -> Vec<f32> {
    tensor.without_autodiff().try_into_vec_as::<f32>().unwrap()
}

/// Output and gradients are those of a table that holds the rows, looked up and multiplied whole.
#[test]
fn the_rows_are_those_of_the_table() {
    for (name, device) in test_support::devices() {
        let (table, tokens) = (matrix(11, 6, 1, &device), vec![9, 2, 10]);
        let mut rows = TokenRows::of_table(&table, tokens.clone());
        assert_eq!(values(rows.merged(table.clone())), values(table.clone()), "they start as the table's");
        rows.rows = trainable(matrix(3, 6, 2, &device));
        rows.track();
        let ids = [2, 4, 9, 2, 0];
        let positions = index(&ids, &device);
        let (x, mixed) = (matrix(5, 6, 3, &device), matrix(5, 11, 4, &device));
        let pass = Pass::training(0);

        let whole = rows.merged(table.clone()).autodiff().require_grad();
        let looked_up = whole.clone().select(0, positions.clone());
        let logits = matmul(looked_up.clone() * x.clone(), whole.clone().transpose());
        let ours = rows.in_embeddings(table.clone().select(0, positions), &ids, pass);
        let of_x = ours.clone() * x;
        let found = rows.in_logits(matmul(of_x.clone(), table.clone().transpose()), of_x, pass);
        assert_eq!(values(ours), values(looked_up), "{name}");
        assert_close(format!("{name}: logits"), &values(found.clone()), &values(logits.clone()), bound);

        let expected = whole.grad_remove(&mut (logits * mixed.clone()).sum().backward()).unwrap();
        let expected = expected.select(0, index(&tokens, &device));
        let gradient = rows.rows.val().grad_remove(&mut (found * mixed).sum().backward()).unwrap();
        assert_close(format!("{name}: gradient"), &values(gradient), &values(expected), bound);
    }
}

#[test]
fn added_rows_are_the_mean_of_the_old_ones() {
    for (name, device) in test_support::devices() {
        // More than are summed at a time.
        let old = 8192 + 3;
        let table = matrix(old, 4, 5, &device);
        let host = values(table.clone());
        let grown = values(with_mean_rows(table.clone(), old + 2));
        assert_eq!(grown[..old * 4], host[..], "{name}");
        for column in 0..4 {
            let mean = host.iter().skip(column).step_by(4).map(|x| f64::from(*x)).sum::<f64>() / old as f64;
            for row in [old, old + 1] {
                // A sum of 8,195 numbers below 1 in f32.
                assert!((f64::from(grown[row * 4 + column]) - mean).abs() < 1e-6, "{name}");
            }
        }
        assert_eq!(with_mean_rows(table, old).dims(), [old, 4]);
    }
}
