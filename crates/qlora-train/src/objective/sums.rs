//! Log-probabilities of tokens to those of answers, and back.

use burn::tensor::{DType, Device, Gradients, Int, Tensor, TensorData};
use qlora_data::{Batch, MASKED_LABEL, Side};

/// Which of a batch's labelled tokens belong to which row.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct AnswerTokens {
    /// Of each row the tokens of its answer, by their numbers among the labelled ones.
    answers: Vec<Vec<i32>>,
    /// Of each row all its tokens, where prompts are labelled; else empty.
    whole: Vec<Vec<i32>>,
    /// Labelled tokens of all rows.
    count: usize,
}

/// Sums over the tokens of rows, f32.
#[derive(Clone, Debug)]
pub(crate) struct RowSums {
    /// Log-probabilities of answers, `[rows]`.
    answers: Tensor<1>,
    /// Log-probabilities of prompts and answers, `[rows]`, where they are asked for.
    whole: Option<Tensor<1>>,
    /// Tokens of answers, `[rows]`.
    lengths: Tensor<1>,
}

impl AnswerTokens {
    /// The tokens of a batch that count: where they stand, what follows them, and which row's they are. A token is counted where
    /// it is predicted, one place before its own. With `prompts` those of preferred rows' prompts are among them.
    pub fn of(batch: &Batch, prompts: bool) -> (Vec<i32>, Vec<i32>, Self) {
        let (mut positions, mut targets) = (Vec::new(), Vec::new());
        let mut tokens = Self::default();
        let side = |row: usize| batch.judged.as_ref().and_then(|judged| judged.sides.get(row)).copied();
        for (row, (span, length)) in batch.spans().zip(batch.lengths.iter().copied()).enumerate() {
            let (mut answer, mut whole) = (Vec::new(), Vec::new());
            let with_prompt = prompts && side(row) == Some(Side::Chosen);
            for at in span.clone().take(length).skip(1) {
                let learned = batch.labels[at] != MASKED_LABEL;
                if !learned && !with_prompt {
                    continue;
                }
                let number = positions.len() as i32;
                positions.push((at - 1) as i32);
                targets.push(batch.input_ids[at] as i32);
                if learned {
                    answer.push(number);
                }
                whole.push(number);
            }
            tokens.answers.push(answer);
            if prompts {
                tokens.whole.push(whole);
            }
        }
        tokens.count = positions.len();
        (positions, targets, tokens)
    }

    /// Tokens of the answers of rows of one side.
    pub fn of_side(&self, batch: &Batch, side: Side) -> usize {
        let sides = batch.judged.iter().flat_map(|judged| &judged.sides);
        self.answers.iter().zip(sides).filter(|(_, of_row)| **of_row == side).map(|(tokens, _)| tokens.len()).sum()
    }

    /// Tokens of preferred rows, prompts among them; 0 unless prompts are labelled.
    pub fn whole_of_chosen(&self, batch: &Batch) -> usize {
        let sides = batch.judged.iter().flat_map(|judged| &judged.sides);
        self.whole
            .iter()
            .zip(sides)
            .filter(|(_, of_row)| **of_row == Side::Chosen)
            .map(|(tokens, _)| tokens.len())
            .sum()
    }

    /// The sums over log-probabilities of the labelled tokens, `[tokens]`.
    pub fn sums(&self, log_probs: &Tensor<1>) -> RowSums {
        let device = log_probs.device();
        let lengths = self.answers.iter().map(|tokens| tokens.len() as f32).collect();
        RowSums {
            answers: summed(log_probs, &self.answers),
            whole: (!self.whole.is_empty()).then(|| summed(log_probs, &self.whole)),
            lengths: numbers(lengths, &device),
        }
    }

    /// What each labelled token's log-probability counts, `[tokens]`, by the derivatives of the loss by rows' sums.
    pub fn weights(&self, sums: &RowSums, from: &Gradients) -> Tensor<1> {
        let device = sums.lengths.device();
        let of = |sum: &Tensor<1>, lists: &[Vec<i32>]| {
            let by_row = sum.grad(from)?;
            // Tokens that are in no list select the zero behind the rows.
            let mut row_of = vec![lists.len() as i32; self.count];
            for (row, list) in lists.iter().enumerate() {
                list.iter().for_each(|token| row_of[*token as usize] = row as i32);
            }
            let zero = by_row.clone().narrow(0, 0, 1).zeros_like();
            Some(Tensor::cat(vec![by_row, zero], 0).select(0, indices(&row_of, &device)))
        };
        let answers = of(&sums.answers, &self.answers);
        let whole = sums.whole.as_ref().and_then(|whole| of(whole, &self.whole));
        let weights = [answers, whole].into_iter().flatten().reduce(|sum, more| sum + more);
        weights.unwrap_or_else(|| Tensor::zeros([self.count], (&device, DType::F32)))
    }
}

impl RowSums {
    /// The same sums as the leaves of a graph.
    pub fn tracked(self) -> Self {
        Self {
            answers: self.answers.autodiff().require_grad(),
            whole: self.whole.map(|whole| whole.autodiff().require_grad()),
            lengths: self.lengths.autodiff(),
        }
    }

    /// Log-probabilities of the answers of all rows, `[rows]`.
    pub fn into_answers(self) -> Tensor<1> {
        self.answers
    }

    /// Those of some rows; `None` where there are none.
    pub fn answers(&self, rows: &[usize]) -> Option<Tensor<1>> {
        (!rows.is_empty()).then(|| chosen(&self.answers, rows))
    }

    /// Tokens of the answers of some rows.
    pub fn lengths(&self, rows: &[usize]) -> Tensor<1> {
        chosen(&self.lengths, rows)
    }

    /// Log-probabilities of prompts and answers of some rows.
    pub fn whole(&self, rows: &[usize]) -> Option<Tensor<1>> {
        self.whole.as_ref().filter(|_| !rows.is_empty()).map(|whole| chosen(whole, rows))
    }

    /// `[1]`, on no graph.
    pub fn zero(&self) -> Tensor<1> {
        Tensor::zeros([1], (&self.lengths.device(), DType::F32))
    }
}

/// Some elements of a vector.
pub(super) fn chosen(values: &Tensor<1>, rows: &[usize]) -> Tensor<1> {
    let rows: Vec<i32> = rows.iter().map(|row| *row as i32).collect();
    values.clone().select(0, indices(&rows, &values.device()))
}

/// For each list the sum of its elements of `values`; in an order that depends on the list alone.
fn summed(values: &Tensor<1>, lists: &[Vec<i32>]) -> Tensor<1> {
    let [count] = values.dims();
    let longest = lists.iter().map(Vec::len).max().unwrap_or(0).max(1);
    let mut padded = vec![count as i32; lists.len() * longest];
    for (row, list) in padded.chunks_mut(longest).zip(lists) {
        row[..list.len()].copy_from_slice(list);
    }
    let device = values.device();
    let zero = Tensor::<1>::zeros([1], (&device, DType::F32));
    let all = Tensor::cat(vec![values.clone(), zero], 0);
    all.select(0, indices(&padded, &device)).reshape([lists.len(), longest]).sum_dim(1).reshape([lists.len()])
}

pub(crate) fn numbers(values: Vec<f32>, device: &Device) -> Tensor<1> {
    let len = values.len();
    Tensor::from_data(TensorData::new(values, [len]), (device, DType::F32))
}

fn indices(values: &[i32], device: &Device) -> Tensor<1, Int> {
    Tensor::from_data(TensorData::new(values.to_vec(), [values.len()]), (device, DType::I32))
}
