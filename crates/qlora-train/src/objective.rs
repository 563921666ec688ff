//! Objectives that compare answers, as functions of the log-probabilities of whole answers.
//!
//! Of a prompt x and an answer y of |y| tokens let p = log P(y | x) of the model and r the same of its reference, both sums over the answer's tokens,
//! and l = p - r. The preferred answer of a pair has the index c, the other one j. With s = log sigmoid, beta b and smoothing e:
//!
//! | `train.objective` | loss of a pair | source |
//! |---|---|---|
//! | `dpo` | -(1 - e) s(b (l_c - l_j)) - e s(-b (l_c - l_j)) | Rafailov et al. 2023, arXiv 2305.18290, eq. 7; with e > 0 "conservative": Mitchell 2023 |
//! | `robust` | (-(1 - e) s(b (l_c - l_j)) + e s(-b (l_c - l_j))) / (1 - 2 e) | Chowdhury et al. 2024, arXiv 2403.00409, eq. 10 |
//! | `hinge` | max(0, 1 - b (l_c - l_j)) | Zhao et al. 2023, arXiv 2305.10425, as normalised by Liu et al. 2023, arXiv 2309.06657 |
//! | `ipo` | (l_c / \|y_c\| - l_j / \|y_j\| - 1 / (2 b))^2 | Azar et al. 2023, arXiv 2310.12036, eq. 17, over averages, as its authors' code and TRL have it |
//! | `apo_zero` | 1 - sigmoid(b l_c) + sigmoid(b l_j) | D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 7 |
//! | `apo_down` | sigmoid(b l_c) + 1 - sigmoid(b (l_c - l_j)) | the same, eq. 8 |
//! | `orpo` | -p'(c) - b s(o), o = log odds(a_c) - log odds(a_j), a = p / \|y\| | Hong et al. 2024, arXiv 2403.07691, eq. 6; b is its lambda |
//! | `simpo` | -(1 - e) s(b (a_c - a_j) - g) - e s(-b (a_c - a_j) + g) | Meng et al. 2024, arXiv 2405.14734, eq. 6; g is `simpo_gamma` |
//! | `cpo` | -(1 - e) s(b (p_c - p_j)) - e s(-b (p_c - p_j)), and `cpo_alpha` times `sft` | Xu et al. 2024, arXiv 2401.08417, eq. 5 |
//!
//! `kto` (Ethayarajh et al. 2024, arXiv 2402.01306, eq. 8) takes answers one by one: w (1 - sigmoid(b (l - z))) of one that is wanted and
//! w (1 - sigmoid(b (z - l))) of one that is not, where z is the mean of l over prompts with answers of other rows, at least 0.
//!
//! `sft` is the cross entropy of the preferred answer's tokens. p'(c) in `orpo` is the same over the preferred row's prompt and answer, as in
//! its authors' code.
//!
//! Losses of pairs (in `kto` of rows) are averaged over the step, and cross entropies over the step's tokens: k micro-batches give what one of k times
//! the size gives. TRL averages each micro-batch by itself and then those; with one micro-batch a step both are the same.
//!
//! Where gradients go is left to autodiff, over a handful of numbers: the derivative of the loss by each answer's log-probability becomes
//! the weight of the answer's tokens in the cross entropy of the head (`loss.rs`).

mod figures;
mod sums;
#[cfg(test)]
mod tests;

use std::fmt;

use burn::tensor::activation::{log_sigmoid, relu, sigmoid};
use burn::tensor::{Bool, DType, Tensor, TensorData};
use qlora_data::{Batch, Side};

use crate::config::{Objective, PreferenceConfig, Reference, Term};

pub use figures::PreferenceFigures;
pub(crate) use figures::{Counts, FIGURES};
pub(crate) use sums::{AnswerTokens, RowSums, numbers};

/// What is learned, with its settings.
#[derive(Clone, Debug, PartialEq)]
pub struct Preferences {
    /// The terms with their weights.
    pub objective: Objective,
    /// Their settings.
    pub settings: PreferenceConfig,
}

/// Log-probabilities of a micro-batch's answers.
pub(crate) struct LogProbs {
    /// By the model, `[rows]`.
    pub policy: RowSums,
    /// By the reference, `[rows]`, where the objective has one.
    pub reference: Option<Tensor<1>>,
}

/// What of a step's rows decides on how much one of them counts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Divisors {
    /// Pairs, or rows that are judged one by one.
    pub items: f64,
    /// Tokens of preferred answers.
    pub answer_tokens: f64,
    /// Those and their prompts'.
    pub tokens: f64,
}

/// Answers of one side.
struct Answers {
    /// p, `[n]`.
    policy: Tensor<1>,
    /// r, `[n]`, or zeros.
    reference: Tensor<1>,
    /// |y|, `[n]`.
    lengths: Tensor<1>,
}

impl Answers {
    /// l.
    fn ratio(&self) -> Tensor<1> {
        self.policy.clone() - self.reference.clone()
    }

    /// p by token.
    fn average(&self) -> Tensor<1> {
        self.policy.clone() / self.lengths.clone()
    }
}

impl fmt::Display for Preferences {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let terms = self.objective.terms().into_iter().map(|(term, _)| term);
        let beta = terms.filter(|term| *term != Term::Sft).map(|term| self.settings.beta_of(term)).next();
        write!(f, "{}", self.objective)?;
        if let Some(beta) = beta {
            write!(f, ", beta {beta}")?;
        }
        let ahead = if self.settings.precompute_reference { ", computed ahead" } else { "" };
        match &self.settings.reference {
            _ if !self.has_reference() => Ok(()),
            Reference::Start => write!(f, "; compared with the model as it begins{ahead}"),
            Reference::Base => write!(f, "; compared with the base{ahead}"),
            Reference::Adapter(dir) => write!(f, "; compared with the adapter in {}{ahead}", dir.display()),
        }
    }
}

impl Preferences {
    /// Whether the model is compared with a reference.
    pub fn has_reference(&self) -> bool {
        self.objective.has_reference()
    }

    /// Whether prompts are needed with answers of other rows.
    pub fn has_mismatches(&self) -> bool {
        self.objective.has(Term::Kto)
    }

    /// Whether the tokens of preferred rows' prompts are learned, too.
    pub(crate) fn learns_prompts(&self) -> bool {
        self.objective.has(Term::Orpo)
    }

    /// The loss of a micro-batch, `[1]`, as its part of a step with these divisors, and its [figures](FIGURES) behind it: `[1 + FIGURES]`.
    /// `apart` is z, of `kto`.
    pub(crate) fn loss(
        &self,
        batch: &Batch,
        log_probs: &LogProbs,
        divisors: Divisors,
        apart: f64,
    ) -> (Tensor<1>, Tensor<1>) {
        let Some(judged) = &batch.judged else { return nothing(log_probs) };
        let chosen: Vec<usize> = rows_of(&judged.sides, Side::Chosen);
        let rejected: Vec<usize> = rows_of(&judged.sides, Side::Rejected);
        let answers = |rows: &[usize]| log_probs.answers(rows);
        let (good, bad) = (answers(&chosen), answers(&rejected));
        let mut parts = Vec::new();
        for (term, weight) in self.objective.terms() {
            let items = match (term, &good, &bad) {
                (Term::Sft, ..) => None,
                (Term::Kto, ..) => {
                    let of = |answers: &Option<Answers>, wanted| {
                        answers.as_ref().map(|answers| self.judged_losses(answers, wanted, apart).sum())
                    };
                    sum([of(&good, true), of(&bad, false)])
                }
                (_, Some(good), Some(bad)) if judged.paired => Some(self.pair_losses(term, good, bad).sum()),
                _ => None,
            };
            parts.push(items.map(|items| items.mul_scalar(weight / divisors.items)));
            let alpha = if term == Term::Sft { 1.0 } else { self.settings.alpha_of(term) };
            if alpha > 0.0 {
                let written = good.as_ref().map(|good| good.policy.clone().sum());
                parts.push(written.map(|written| written.mul_scalar(-weight * alpha / divisors.answer_tokens)));
            }
            if term == Term::Orpo {
                let written = log_probs.policy.whole(&chosen).map(Tensor::sum);
                parts.push(written.map(|written| written.mul_scalar(-weight / divisors.tokens)));
            }
        }
        let Some(loss) = sum(parts) else { return nothing(log_probs) };
        let zero = log_probs.policy.zero();
        let figures = self.figures(good.as_ref(), bad.as_ref(), judged.paired, zero);
        (loss, figures)
    }

    /// The losses of pairs, `[pairs]`.
    fn pair_losses(&self, term: Term, good: &Answers, bad: &Answers) -> Tensor<1> {
        let (beta, smoothing) = (self.settings.beta_of(term), self.settings.label_smoothing);
        let smoothed = |x: Tensor<1>| {
            let likely = log_sigmoid(x.clone()).mul_scalar(smoothing - 1.0);
            if smoothing == 0.0 { likely } else { likely - log_sigmoid(x.neg()).mul_scalar(smoothing) }
        };
        let apart = || (good.ratio() - bad.ratio()).mul_scalar(beta);
        match term {
            Term::Dpo => smoothed(apart()),
            Term::Robust => {
                let wrong = log_sigmoid(apart().neg()).mul_scalar(smoothing);
                (log_sigmoid(apart()).mul_scalar(smoothing - 1.0) + wrong).div_scalar(1.0 - 2.0 * smoothing)
            }
            Term::Hinge => relu(apart().neg().add_scalar(1.0)),
            Term::Ipo => {
                let by_token = |side: &Answers| side.ratio() / side.lengths.clone();
                (by_token(good) - by_token(bad)).sub_scalar(0.5 / beta).powi_scalar(2)
            }
            Term::ApoZero => {
                let of = |side: &Answers| sigmoid(side.ratio().mul_scalar(beta));
                of(bad) - of(good) + 1.0
            }
            Term::ApoDown => sigmoid(good.ratio().mul_scalar(beta)) - sigmoid(apart()) + 1.0,
            Term::Orpo => {
                // log(P / (1 - P)) of the average: a - log(1 - exp(a)).
                let odds = |side: &Answers| side.average() - log_of_rest(side.average());
                log_sigmoid(odds(good) - odds(bad)).mul_scalar(-beta)
            }
            Term::Simpo => {
                let gamma = self.settings.simpo_gamma;
                smoothed((good.average() - bad.average()).mul_scalar(beta).sub_scalar(gamma))
            }
            Term::Cpo => smoothed((good.policy.clone() - bad.policy.clone()).mul_scalar(beta)),
            Term::Sft | Term::Kto => good.policy.clone().mul_scalar(0.0),
        }
    }

    /// The losses of answers that are wanted, or of those that are not, `[n]`.
    fn judged_losses(&self, answers: &Answers, wanted: bool, apart: f64) -> Tensor<1> {
        let beta = self.settings.beta_of(Term::Kto);
        let (sign, weight) =
            if wanted { (1.0, self.settings.desirable_weight) } else { (-1.0, self.settings.undesirable_weight) };
        let gain = answers.ratio().sub_scalar(apart).mul_scalar(sign * beta);
        sigmoid(gain).neg().add_scalar(1.0).mul_scalar(weight)
    }

    /// What the model thinks of answers, `[n]`: b l where there is a reference, else b p, by token where the objective goes by tokens.
    fn rewards(&self, answers: &Answers) -> Tensor<1> {
        let terms = self.objective.terms();
        let of_reference = terms.iter().map(|(term, _)| *term).find(|term| term.has_reference());
        let without = terms.iter().map(|(term, _)| *term).find(|term| *term != Term::Sft);
        match (of_reference, without) {
            (Some(term), _) => answers.ratio().mul_scalar(self.settings.beta_of(term)),
            (None, Some(term @ (Term::Orpo | Term::Simpo))) => {
                answers.average().mul_scalar(self.settings.beta_of(term))
            }
            (None, Some(term)) => answers.policy.clone().mul_scalar(self.settings.beta_of(term)),
            (None, None) => answers.policy.clone(),
        }
    }

    /// Sums over a micro-batch's answers, `[FIGURES]`, without a graph.
    fn figures(&self, good: Option<&Answers>, bad: Option<&Answers>, paired: bool, zero: Tensor<1>) -> Tensor<1> {
        let of = |answers: Option<&Answers>| {
            answers.map(|answers| (self.rewards(answers).without_autodiff(), answers.policy.clone().without_autodiff()))
        };
        let (good, bad) = (of(good), of(bad));
        let right = match (&good, &bad) {
            (Some((good, _)), Some((bad, _))) if paired => {
                // Two that are equal count half: before the first step all are.
                let of = |ordered: Tensor<1, Bool>| ordered.float().cast(good.dtype());
                (of(good.clone().greater(bad.clone())) + of(good.clone().greater_equal(bad.clone())))
                    .sum()
                    .mul_scalar(0.5)
            }
            _ => zero.clone(),
        };
        let total = |side: &Option<(Tensor<1>, Tensor<1>)>, which: usize| match side {
            Some((rewards, policy)) => [rewards, policy][which].clone().sum(),
            None => zero.clone(),
        };
        Tensor::cat(vec![total(&good, 0), total(&bad, 0), right, total(&good, 1), total(&bad, 1)], 0)
    }
}

impl LogProbs {
    /// The answers of some rows; `None` where there are none.
    fn answers(&self, rows: &[usize]) -> Option<Answers> {
        let policy = self.policy.answers(rows)?;
        let reference = match &self.reference {
            Some(reference) => sums::chosen(reference, rows),
            None => policy.zeros_like(),
        };
        let lengths = self.policy.lengths(rows);
        Some(Answers { policy, reference, lengths })
    }
}

/// log(1 - exp(x)) of x below 0.
fn log_of_rest(x: Tensor<1>) -> Tensor<1> {
    // An answer of probability 1 has no odds: as far as f32 goes below that.
    x.clamp_max(-1e-7).exp().neg().log1p()
}

fn sum(parts: impl IntoIterator<Item = Option<Tensor<1>>>) -> Option<Tensor<1>> {
    parts.into_iter().flatten().reduce(|sum, part| sum + part)
}

fn nothing(log_probs: &LogProbs) -> (Tensor<1>, Tensor<1>) {
    let zero = log_probs.policy.zero();
    let figures = Tensor::from_data(TensorData::new(vec![0.0_f32; FIGURES], [FIGURES]), (&zero.device(), DType::F32));
    (zero, figures)
}

fn rows_of(sides: &[Side], wanted: Side) -> Vec<usize> {
    sides.iter().enumerate().filter(|(_, side)| **side == wanted).map(|(row, _)| row).collect()
}
