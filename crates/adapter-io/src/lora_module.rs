//! What a PEFT adapter holds for one module, and folding it into the module's weight.
//!
//! A linear module of weight W [out, in] becomes W + s B A, its bias (with `lora_bias`) b + s b_B. An
//! embedding of weight W [vocabulary, width] becomes W + s (B A)^T. DoRA (Liu et al., arXiv 2402.09353,
//! eq. 5) then scales every output feature to a learned magnitude m: m (W + s B A) / |W + s B A|, with the
//! norm over each output's weights. All of it in 32-bit floats, rounded to the weight's type once.
//!
//! Source of the formulas: `get_delta_weight`, `merge` and `variants.py` of PEFT 0.21. PEFT refuses to
//! merge a `lora_bias` into a layer that has no bias, since the architecture has no place for one; so is
//! it here.

use std::borrow::Cow;

use nf4_quant::Element;
use rayon::prelude::*;

use crate::adapter_config::AdapterConfig;
use crate::error::FormatError;
use crate::host_tensor::HostTensor;

/// What kind of module the factors adapt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ModuleKind {
    /// A linear layer, weight [out, in].
    Linear,
    /// An embedding, weight [vocabulary, width].
    Embedding,
}

/// The parts of an adapter that belong to one module.
#[derive(Debug, Clone)]
pub struct LoraModule<'a> {
    /// The module's path, e.g. `model.layers.0.self_attn.q_proj`.
    pub path: String,
    /// Linear layer or embedding.
    pub kind: ModuleKind,
    /// [r, in], or [r, vocabulary].
    pub lora_a: &'a HostTensor,
    /// [out, r], or [width, r].
    pub lora_b: &'a HostTensor,
    /// The bias of `lora_b` \[out\].
    pub bias: Option<&'a HostTensor>,
    /// DoRA's magnitudes \[out\], or \[width\].
    pub magnitude: Option<&'a HostTensor>,
    /// alpha / r, or alpha / sqrt(r).
    pub scaling: f32,
}

/// How much a weight has changed.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct WeightChange {
    /// The largest absolute change of an element, as stored.
    pub largest: f32,
    /// |new - old| / |old| in the Frobenius norm, as stored; the largest change per element would only
    /// name an element that happened to be near zero.
    pub relative: f32,
}

/// The sums a [`WeightChange`] is made of.
#[derive(Clone, Copy, Default)]
pub(crate) struct ChangeSums {
    largest: f32,
    change: f64,
    before: f64,
    broken: bool,
}

impl ChangeSums {
    pub(crate) fn add(&mut self, before: f32, after: f32) {
        let change = after - before;
        self.largest = self.largest.max(change.abs());
        self.change += f64::from(change).powi(2);
        self.before += f64::from(before).powi(2);
        self.broken |= before.is_finite() && !after.is_finite();
    }

    pub(crate) fn join(self, other: Self) -> Self {
        Self {
            largest: self.largest.max(other.largest),
            change: self.change + other.change,
            before: self.before + other.before,
            broken: self.broken || other.broken,
        }
    }

    pub(crate) fn finish(self, module: &str) -> Result<WeightChange, FormatError> {
        if self.broken {
            return Err(FormatError::Factors {
                module: module.to_string(),
                reason: "the merged weight is not finite (it overflows its type, or the adapter holds NaN); merge into a wider type or train again".into(),
            });
        }
        let relative = if self.before > 0.0 { (self.change / self.before).sqrt() as f32 } else { 0.0 };
        Ok(WeightChange { largest: self.largest, relative })
    }
}

impl LoraModule<'_> {
    /// The shape of the weight that the factors adapt.
    pub fn weight_shape(&self) -> [usize; 2] {
        let (rows, columns) = (dim(self.lora_b, 0), dim(self.lora_a, 1));
        match self.kind {
            ModuleKind::Linear => [rows, columns],
            ModuleKind::Embedding => [columns, rows],
        }
    }

    /// Whether the two factors are matrices of one rank.
    pub(crate) fn fits(&self) -> bool {
        let full = |t: &HostTensor| t.shape.len() == 2 && t.data.len() == t.shape[0] * t.shape[1];
        full(self.lora_a) && full(self.lora_b) && dim(self.lora_a, 0) == dim(self.lora_b, 1)
    }

    /// The factors so that the update is `scaling * b @ a` in the weight's own layout.
    ///
    /// # Shapes
    /// a [r, columns], b [rows, r].
    fn factors(&self) -> (Cow<'_, [f32]>, Cow<'_, [f32]>) {
        match self.kind {
            ModuleKind::Linear => (Cow::Borrowed(&self.lora_a.data[..]), Cow::Borrowed(&self.lora_b.data[..])),
            ModuleKind::Embedding => (transposed(self.lora_b).into(), transposed(self.lora_a).into()),
        }
    }

    /// The update without DoRA's rescaling: `scaling * B A`, transposed for an embedding.
    ///
    /// # Shapes
    /// That of the weight, [`Self::weight_shape`].
    ///
    /// # Errors
    /// [`FormatError::Factors`] when the factors do not fit each other.
    pub fn delta(&self) -> Result<HostTensor, FormatError> {
        if !self.fits() {
            return Err(self.fail(format!(
                "lora_A {:?} and lora_B {:?} are not two matrices of one rank",
                self.lora_a.shape, self.lora_b.shape
            )));
        }
        let [rows, columns] = self.weight_shape();
        let mut data = vec![0.0f32; rows * columns];
        let (a, b) = self.factors();
        let rank = dim(self.lora_a, 0);
        if columns > 0 {
            data.par_chunks_mut(columns).enumerate().for_each(|(row, out)| {
                accumulate_row(&a, &b[row * rank..][..rank], self.scaling, out);
            });
        }
        Ok(HostTensor { shape: vec![rows, columns], data })
    }

    /// Folds the adapter into the module's weight.
    ///
    /// # Shapes
    /// `weight` is row-major of `shape`, which must be [`Self::weight_shape`].
    ///
    /// # Errors
    /// [`FormatError::Factors`] when the factors do not fit the weight, or the result is not finite.
    pub fn merge_into<E: Element>(&self, weight: &mut [E], shape: &[usize]) -> Result<WeightChange, FormatError> {
        let [rows, columns] = self.weight_shape();
        if shape != [rows, columns] || weight.len() != rows * columns || !self.fits() {
            return Err(self.misfit("weight", shape));
        }
        if weight.is_empty() {
            return Ok(WeightChange::default());
        }
        let (a, b) = self.factors();
        let rank = dim(self.lora_a, 0);
        let update = |row: usize, old: &[E], new: &mut Vec<f32>| {
            new.clear();
            new.resize(columns, 0.0);
            accumulate_row(&a, &b[row * rank..][..rank], self.scaling, new);
            new.iter_mut().zip(old).for_each(|(x, w)| *x += w.to_f32());
        };
        let per_column = match (self.kind, self.magnitude) {
            (ModuleKind::Embedding, Some(magnitude)) => {
                let squares = weight.par_chunks(columns).enumerate().fold(
                    || (Vec::new(), vec![0.0f64; columns]),
                    |(mut new, mut sums), (row, old)| {
                        update(row, old, &mut new);
                        sums.iter_mut().zip(&new).for_each(|(s, x)| *s += f64::from(*x).powi(2));
                        (new, sums)
                    },
                );
                let squares = squares.map(|(_, sums)| sums).reduce(
                    || vec![0.0; columns],
                    |mut a, b| {
                        a.iter_mut().zip(b).for_each(|(x, y)| *x += y);
                        a
                    },
                );
                Some(squares.iter().zip(&magnitude.data).map(|(s, m)| m / (s.sqrt() as f32)).collect::<Vec<f32>>())
            }
            _ => None,
        };
        let sums = weight.par_chunks_mut(columns).enumerate().map_init(Vec::new, |new, (row, old)| {
            update(row, old, new);
            if let Some(factors) = &per_column {
                new.iter_mut().zip(factors).for_each(|(x, f)| *x *= f);
            } else if let Some(magnitude) = self.magnitude {
                let norm = new.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt() as f32;
                let factor = magnitude.data[row] / norm;
                new.iter_mut().for_each(|x| *x *= factor);
            }
            let mut sums = ChangeSums::default();
            for (w, x) in old.iter_mut().zip(new.iter()) {
                let before = w.to_f32();
                *w = E::from_f32(*x);
                sums.add(before, w.to_f32());
            }
            sums
        });
        sums.reduce(ChangeSums::default, ChangeSums::join).finish(&self.path)
    }

    /// Folds the bias of `lora_b` into the module's bias: b + scaling * b_B.
    ///
    /// # Errors
    /// [`FormatError::Factors`] when the lengths differ, or the result is not finite.
    pub fn merge_bias<E: Element>(&self, bias: &mut [E], shape: &[usize]) -> Result<WeightChange, FormatError> {
        let Some(lora) = self.bias else { return Ok(WeightChange::default()) };
        if bias.len() != lora.data.len() {
            return Err(self.misfit("bias", shape));
        }
        let mut sums = ChangeSums::default();
        for (b, l) in bias.iter_mut().zip(&lora.data) {
            let before = b.to_f32();
            *b = E::from_f32(before + l * self.scaling);
            sums.add(before, b.to_f32());
        }
        sums.finish(&self.path)
    }

    pub(crate) fn misfit(&self, what: &str, shape: &[usize]) -> FormatError {
        self.fail(format!(
            "lora_A {:?} and lora_B {:?} do not fit the {what} {shape:?}; the adapter belongs to another base model",
            self.lora_a.shape, self.lora_b.shape
        ))
    }

    pub(crate) fn fail(&self, reason: String) -> FormatError {
        FormatError::Factors { module: self.path.clone(), reason }
    }

    /// Whether the parts fit each other and the configuration, which gives the module this rank.
    pub(crate) fn check(&self, config: &AdapterConfig, rank: usize) -> Result<(), FormatError> {
        self.check_ranks(config, rank)?;
        let out = dim(self.lora_b, 0);
        for (part, tensor, wanted, flag) in [
            ("lora_magnitude_vector", self.magnitude, config.use_dora, "use_dora"),
            ("lora_B.bias", self.bias, config.lora_bias && self.kind == ModuleKind::Linear, "lora_bias"),
        ] {
            match tensor {
                Some(tensor) if tensor.shape != [out] => {
                    return Err(
                        self.fail(format!("{part} {:?} does not fit lora_B {:?}", tensor.shape, self.lora_b.shape))
                    );
                }
                Some(_) if !wanted => {
                    return Err(self.fail(format!(
                        "it has {part}, but `{flag}` of adapter_config.json is false; PEFT would ignore it"
                    )));
                }
                None if wanted => {
                    return Err(self.fail(format!(
                        "it has no {part}, though `{flag}` of adapter_config.json is true; the file is incomplete"
                    )));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Whether the factors fit each other and the configured rank.
    fn check_ranks(&self, config: &AdapterConfig, configured: usize) -> Result<(), FormatError> {
        let (a, b) = (&self.lora_a.shape, &self.lora_b.shape);
        let (&[rank, _], &[_, b_rank]) = (a.as_slice(), b.as_slice()) else {
            return Err(self.fail(format!("lora_A {a:?} and lora_B {b:?} must be matrices")));
        };
        if rank != b_rank {
            return Err(self.fail(format!("lora_A {a:?} has rank {rank} but lora_B {b:?} has rank {b_rank}")));
        }
        // Factors of stacked experts hold the ranks of all of them: see `crate::experts`.
        if config.parameters().is_empty() && rank != configured {
            return Err(self.fail(format!(
                "its tensors have rank {rank}, adapter_config.json gives it rank {configured} (r and rank_pattern)"
            )));
        }
        Ok(())
    }
}

/// `out = scaling * (b_row @ a)`: one row of the product, as rank times a scaled row of `a`, which reads and
/// writes memory forward. Scaled at the end, as PEFT does: the same rounding.
pub(crate) fn accumulate_row(a: &[f32], b_row: &[f32], scaling: f32, out: &mut [f32]) {
    for (b, a) in b_row.iter().zip(a.chunks_exact(out.len())) {
        out.iter_mut().zip(a).for_each(|(o, a)| *o += b * a);
    }
    out.iter_mut().for_each(|o| *o *= scaling);
}

fn dim(tensor: &HostTensor, axis: usize) -> usize {
    tensor.shape.get(axis).copied().unwrap_or(0)
}

/// A matrix's transpose.
pub(crate) fn transposed(matrix: &HostTensor) -> Vec<f32> {
    let (rows, columns) = (dim(matrix, 0), dim(matrix, 1));
    let mut out = Vec::with_capacity(rows * columns);
    for column in 0..columns {
        out.extend((0..rows).map(|row| matrix.data[row * columns + column]));
    }
    out
}
