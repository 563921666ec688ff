//! What is asked of the kernels: few cases, each with its bar.
//!
//! Bars are shares of the card's ceilings, or multiples of the peer's speed, in the same run.

use fused_kernels::low_rank::FactorLayout;
use nf4_quant::matmul::Direction;

use super::matmul::Product;
use super::{codec, low_rank, matmul};
use crate::bench::Bench;
use crate::case::Case;
use crate::shapes::Shape;

const fn shape(model: &'static str, out_features: usize, in_features: usize) -> Shape {
    Shape { model, out_features, in_features }
}

const SQUARE: Shape = shape("Llama-2-7B", 4096, 4096);
const UP: Shape = shape("Llama-2-7B", 11008, 4096);
const LARGE: Shape = shape("Llama-2-70B", 28672, 8192);
const HEAD: Shape = shape("Llama-2-7B head", 32000, 4096);
const RANK: usize = 64;

pub(super) fn cases(bench: &Bench) -> Vec<Case> {
    let with = |bar: &'static str, case: Case| Case { bar: Some(bar), ..case };
    let product =
        |shape, tokens, direction, rank, four_bit| Product { shape, tokens, direction, rank, four_bit }.case(bench);
    let mut cases = vec![
        with("share 85 %", codec::dequantize(bench, LARGE, true)),
        with("2.5x", codec::dequantize(bench, SQUARE, true)),
        with("10x", codec::quantize(bench, LARGE, true)),
        codec::quantize(bench, SQUARE, true),
        with("share 70 %", product(LARGE, 1, Direction::Forward, 0, true)),
    ];
    // Generation with an adapter, with smaller layers, and for several sequences.
    cases.extend([
        product(LARGE, 1, Direction::Forward, RANK, true),
        product(SQUARE, 1, Direction::Forward, 0, true),
        product(LARGE, 8, Direction::Forward, 0, true),
        product(LARGE, 16, Direction::Forward, 0, true),
    ]);
    for direction in [Direction::Forward, Direction::InputGradient] {
        for (tokens, shape, bar) in [(2048, UP, "1.15x"), (2048, LARGE, "1.15x"), (8192, UP, "1x")] {
            cases.push(with(bar, product(shape, tokens, direction, 0, true)));
            cases.push(with("base + 6 %", product(shape, tokens, direction, RANK, true)));
        }
        cases.push(with("0.85x", product(HEAD, 8192, direction, 0, false)));
    }
    cases.push(matmul::lora_linear(bench, UP, 2048, RANK));
    if low_rank::applies(bench) {
        for operation in [low_rank::project, low_rank::gradient] {
            for layout in [FactorLayout::RankFirst, FactorLayout::FeaturesFirst] {
                cases.push(with("share 58 %", operation("Llama-2-7B", 8192, 4096, RANK, layout)));
            }
        }
    }
    cases
}
