//! What rows say together, and how sure it is.

/// A mean over rows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Estimate {
    /// The mean; NaN where nothing was counted.
    pub value: f64,
    /// Its standard error; `None` where fewer than two rows were counted.
    pub standard_error: Option<f64>,
    /// What was counted: tokens or rows.
    pub count: usize,
}

impl Estimate {
    /// The mean of what rows sum up to, over all that they count: pairs of a sum and a count.
    ///
    /// Tokens of a row depend on each other, so the standard error is that of a ratio of sums over rows, not over
    /// tokens: `sqrt(R / (R - 1) sum_i (s_i - mean n_i)^2) / sum_i n_i` (Cochran, Sampling Techniques, 1977,
    /// chapter 6; for evaluations, Miller, 2024, arXiv 2411.00640). Where every row counts once it is that of a plain mean.
    pub fn of_rows(rows: &[(f64, usize)]) -> Self {
        let count: usize = rows.iter().map(|(_, count)| count).sum();
        let sum: f64 = rows.iter().map(|(sum, _)| sum).sum();
        let value = sum / count as f64;
        let clusters = rows.iter().filter(|(_, count)| *count > 0).count();
        let standard_error = (clusters > 1).then(|| {
            let squares: f64 = rows.iter().map(|(sum, count)| (sum - value * *count as f64).powi(2)).sum();
            (squares * clusters as f64 / (clusters - 1) as f64).sqrt() / count as f64
        });
        Self { value, standard_error, count }
    }

    /// The part of rows for which something is so.
    pub fn of_part(rows: impl IntoIterator<Item = bool>) -> Self {
        let rows: Vec<(f64, usize)> = rows.into_iter().map(|is_so| (f64::from(u8::from(is_so)), 1)).collect();
        Self::of_rows(&rows)
    }

    /// The exponential of the mean: the perplexity, where the mean is a loss. Its standard error is to first order.
    pub fn exp(self) -> Self {
        let value = self.value.exp();
        Self { value, standard_error: self.standard_error.map(|error| value * error), ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_has_the_error_of_a_mean() {
        let part = Estimate::of_part([true, true, false, true]);
        assert_eq!((part.value, part.count), (0.75, 4));
        // sqrt(p (1 - p) / (n - 1)); the bar is that of rounding.
        let expected = (0.75f64 * 0.25 / 3.0).sqrt();
        assert!(part.standard_error.is_some_and(|error| (error - expected).abs() < 1e-15), "{part:?}");
    }

    #[test]
    fn rows_count_as_a_whole() {
        // Ten tokens in two rows that are as unlike as can be: by tokens the error would be a third of this.
        let mean = Estimate::of_rows(&[(5.0, 5), (0.0, 5), (0.0, 0)]);
        assert_eq!((mean.value, mean.count, mean.standard_error), (0.5, 10, Some(0.5)));
        let perplexity = mean.exp();
        assert_eq!(perplexity.value, 0.5f64.exp());
        assert_eq!(perplexity.standard_error, Some(0.5 * 0.5f64.exp()));
    }

    #[test]
    fn one_row_has_no_error_and_none_no_mean() {
        assert_eq!(Estimate::of_rows(&[(3.0, 2)]), Estimate { value: 1.5, standard_error: None, count: 2 });
        assert!(Estimate::of_part([]).value.is_nan());
    }
}
