//! Burn's own dense product: a candidate for the card's peak where we have no kernel.

use anyhow::Context;
use burn::tensor::{Distribution, Tensor};

use crate::bench::Bench;
use crate::case::{Case, Run, Work};

pub(crate) fn peak(bench: &Bench) -> Vec<Case> {
    // A software device would take minutes for the sizes that fill a card.
    let sizes = if cuda_source::device(&bench.client).is_some() { &[4096, 8192][..] } else { &[512] };
    sizes.iter().map(|size| square(bench, *size)).collect()
}

fn square(bench: &Bench, n: usize) -> Case {
    Case {
        kernel: "Burn's matmul",
        shape: format!("{n} x {n} x {n} {}", bench.format),
        model: "",
        work: Work { bytes: 3 * n * n * bench.format.size(), flops: 2 * n * n * n },
        bar: None,
        peer: None,
        prepare: Box::new(move |bench| {
            let dtype = burn_qlora::qlora_models::default_compute_dtype(&bench.device);
            let random = || {
                let tensor: Tensor<2> = Tensor::random([n, n], Distribution::Normal(0.0, 1.0), &bench.device);
                tensor.cast(dtype)
            };
            let (x, w) = (random(), random());
            let product = x.clone().matmul(w.clone().transpose());
            product.slice([0..1, 0..1]).try_into_data().context("Burn's product does not run")?;
            let call = Box::new(move |_| {
                let _ = x.clone().matmul(w.clone().transpose());
                Ok(())
            });
            Ok(Run { call, outputs: Vec::new() })
        }),
    }
}
