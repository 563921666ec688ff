//! NEFTune: noise on the embeddings of training rows (Jain et al. 2023, arXiv 2310.05914).
//!
//! Each element of a row of L tokens of width d gets a uniform number between -m and m, where `m = alpha / sqrt(L d)`. L is the row's own
//! length, as in the authors' code, so that padding does not change the noise of a row; transformers takes the padded length. The noise is
//! a function of the step's seed and the micro-batch: a run that resumes draws the same.

use std::ops::Range;

use burn::tensor::{DType, FloatDType, Tensor, TensorData};
use qlora_data::Batch;
use qlora_layers::ops::seeded_noise;
use qlora_layers::{Pass, mix};

/// Sets the seed apart from those of dropout.
const STREAM: u64 = 0x4E_4546_5475_6E65;

/// Noise on embeddings.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct EmbeddingNoise {
    /// NEFTune's alpha; 0: no noise.
    pub alpha: f32,
}

impl EmbeddingNoise {
    /// The embeddings `[tokens, width]` of a batch, those of padding among them, with noise; without it in a pass that trains nothing.
    pub fn on(self, embedded: Tensor<2>, batch: &Batch, pass: Pass) -> Tensor<2> {
        let (true, Some(seed)) = (self.alpha > 0.0, pass.dropout_seed) else { return embedded };
        let [_, width] = embedded.dims();
        let magnitudes = self.magnitudes(batch, width);
        let (device, dtype) = (embedded.device(), FloatDType::from(embedded.dtype()));
        let magnitudes = TensorData::new(magnitudes, [batch.input_ids.len()]);
        let magnitudes = Tensor::<1>::from_data(magnitudes, (&device, DType::F32));
        embedded + seeded_noise(magnitudes, width, mix(seed ^ STREAM), dtype)
    }

    /// Of each place of a batch; 0 where there is padding.
    fn magnitudes(self, batch: &Batch, width: usize) -> Vec<f32> {
        let row = |(places, length): (Range<usize>, usize)| {
            let magnitude = self.alpha / ((length * width) as f32).sqrt();
            (0..places.len()).map(move |at| if at < length { magnitude } else { 0.0 })
        };
        batch.spans().zip(batch.lengths.iter().copied()).flat_map(row).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;
    use qlora_data::Example;

    fn rows() -> [Example; 2] {
        [4, 16].map(|length| Example { input_ids: vec![1; length], labels: vec![1; length], line: 1 })
    }

    #[test]
    fn rows_have_noise_by_their_own_length_and_padding_has_none() {
        let (width, noise) = (64, EmbeddingNoise { alpha: 5.0 });
        let device = Device::flex();
        let zeros = || Tensor::<2>::zeros([32, width], (&device, DType::F32));
        let of = |pass: Pass| {
            noise.on(zeros(), &Batch::new(rows(), 0), pass).into_data_as::<f32>().iter::<f32>().collect::<Vec<_>>()
        };
        let values = of(Pass::training(7));
        let largest = |from: usize, tokens: usize| {
            values[from * width..(from + tokens) * width].iter().fold(0.0f32, |most, value| most.max(value.abs()))
        };
        // 5 / sqrt(4 x 64) and 5 / sqrt(16 x 64): of 256 draws and more the largest comes within a few percent.
        assert!((0.29..0.3125).contains(&largest(0, 4)), "{}", largest(0, 4));
        assert!((0.15..0.15625).contains(&largest(16, 16)), "{}", largest(16, 16));
        assert_eq!(largest(4, 12), 0.0);
        assert_eq!(of(Pass::training(7)), values);
        assert_ne!(of(Pass::training(8)), values);
        // Rows end to end have the noise of their own lengths, too.
        assert_eq!(
            noise.magnitudes(&Batch::end_to_end(rows()), width),
            [[0.3125; 4].as_slice(), &[0.15625; 16]].concat()
        );
        assert!(of(Pass::INFERENCE).iter().all(|value| *value == 0.0));
    }
}
