//! State on the host, in the form in which it is saved: by parameter, whatever the pages.

use crate::layout::{Format, PageLayout};
use crate::{BLOCKSIZE, OptimError, OptimizerConfig};

/// One moment of a parameter.
#[derive(Clone, Debug, PartialEq)]
pub enum Moment {
    /// f32, row-major.
    Full(Vec<f32>),
    /// Codes of a dynamic map, row-major, and one absmax per [`BLOCKSIZE`] of them.
    Block8 {
        /// One code per element.
        codes: Vec<u8>,
        /// What the map's entries are multiplied by.
        absmax: Vec<f32>,
    },
}

impl Moment {
    /// Elements of the parameter.
    pub fn len(&self) -> usize {
        match self {
            Self::Full(values) => values.len(),
            Self::Block8 { codes, .. } => codes.len(),
        }
    }

    /// Whether the parameter has no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn zeros(format: Format, len: usize) -> Self {
        match format {
            Format::Full => Self::Full(vec![0.0; len]),
            Format::Block8 => Self::Block8 { codes: vec![0; len], absmax: vec![0.0; len.div_ceil(BLOCKSIZE)] },
        }
    }
}

/// The moments of one parameter, in the order of [`OptimizerKind::moments`](crate::OptimizerKind::moments).
pub type Moments = Vec<Moment>;

/// Zero state for parameters of these lengths.
pub(crate) fn zeros(config: &OptimizerConfig, lens: &[usize]) -> Vec<Moments> {
    let format = |len| if config.is_8bit(len) { Format::Block8 } else { Format::Full };
    let moments = config.kind.moments().len();
    lens.iter().map(|&len| (0..moments).map(|_| Moment::zeros(format(len), len)).collect()).collect()
}

/// Checks that a saved state is one of parameters of these lengths.
pub(crate) fn check(
    config: &OptimizerConfig,
    lens: &[usize],
    state: &[Moments],
    name: impl Fn(usize) -> String,
) -> Result<(), OptimError> {
    if state.len() != lens.len() {
        return Err(OptimError::Count { expected: lens.len(), found: state.len() });
    }
    for (index, (moments, &len)) in state.iter().zip(lens).enumerate() {
        let (kind, parameter) = (config.kind, || name(index));
        if moments.len() != kind.moments().len() {
            return Err(OptimError::Kind { parameter: parameter(), kind });
        }
        for moment in moments {
            if matches!(moment, Moment::Block8 { .. }) != config.is_8bit(len) && moment.len() == len {
                return Err(OptimError::Kind { parameter: parameter(), kind });
            }
            if moment.len() != len {
                return Err(OptimError::Length { parameter: parameter(), expected: len, found: moment.len() });
            }
            if let Moment::Block8 { absmax, .. } = moment
                && absmax.len() != len.div_ceil(BLOCKSIZE)
            {
                let (expected, found) = (len.div_ceil(BLOCKSIZE), absmax.len());
                return Err(OptimError::Length { parameter: parameter(), expected, found });
            }
        }
    }
    Ok(())
}

/// Copies a page's words to the moments that they are.
pub(crate) fn unpack(page: &PageLayout, words: &[u32], into: &mut [Moments]) {
    for segment in &page.segments {
        let range = segment.start..segment.start + segment.len;
        for (i, moment) in into[segment.parameter].iter_mut().enumerate() {
            let first = segment.word + i * segment.moment_words(page.format);
            match moment {
                Moment::Full(values) => {
                    values[range.clone()].copy_from_slice(bytemuck::cast_slice(&words[first..first + segment.len]));
                }
                Moment::Block8 { codes, absmax } => {
                    let bytes: &[u8] = bytemuck::cast_slice(&words[first..first + segment.len.div_ceil(4)]);
                    codes[range.clone()].copy_from_slice(&bytes[..segment.len]);
                    let (block, first) = (segment.start / BLOCKSIZE, segment.absmax_word(page.moments, i));
                    absmax[block..block + segment.blocks()]
                        .copy_from_slice(bytemuck::cast_slice(&words[first..first + segment.blocks()]));
                }
            }
        }
    }
}

/// The moments of the one parameter that a page holds.
pub(crate) fn unpack_alone(page: &PageLayout, words: &[u32]) -> Moments {
    let len = page.segments.iter().map(|segment| segment.len).sum();
    let mut moments = vec![(0..page.moments).map(|_| Moment::zeros(page.format, len)).collect()];
    unpack(page, words, &mut moments);
    moments.swap_remove(0)
}

/// The words of a page that holds these moments, which [`check`] found to fit.
pub(crate) fn pack(page: &PageLayout, from: &[Moments]) -> Vec<u32> {
    let mut words = vec![0; page.words];
    for segment in &page.segments {
        let range = segment.start..segment.start + segment.len;
        for (i, moment) in from[segment.parameter].iter().enumerate() {
            let first = segment.word + i * segment.moment_words(page.format);
            match moment {
                Moment::Full(values) => {
                    words[first..first + segment.len].copy_from_slice(bytemuck::cast_slice(&values[range.clone()]));
                }
                Moment::Block8 { codes, absmax } => {
                    let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut words[first..]);
                    bytes[..segment.len].copy_from_slice(&codes[range.clone()]);
                    let (block, first) = (segment.start / BLOCKSIZE, segment.absmax_word(page.moments, i));
                    words[first..first + segment.blocks()]
                        .copy_from_slice(bytemuck::cast_slice(&absmax[block..block + segment.blocks()]));
                }
            }
        }
    }
    words
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::OptimizerKind;
    use crate::layout::pages;

    const LENS: [usize; 4] = [5000, 7, 4096, 100_003];

    fn numbered(config: &OptimizerConfig) -> Vec<Moments> {
        let mut state = zeros(config, &LENS);
        let mut next = 0_u32;
        let mut count = || {
            next += 1;
            next
        };
        for moment in state.iter_mut().flatten() {
            match moment {
                Moment::Full(values) => values.iter_mut().for_each(|v| *v = count() as f32),
                Moment::Block8 { codes, absmax } => {
                    codes.iter_mut().for_each(|c| *c = (count() * 31 % 251) as u8);
                    absmax.iter_mut().for_each(|a| *a = count() as f32);
                }
            }
        }
        state
    }

    #[test]
    fn pages_give_back_what_was_packed() {
        for kind in OptimizerKind::ALL {
            let config = OptimizerConfig { kind, ..Default::default() };
            let state = numbered(&config);
            check(&config, &LENS, &state, |i| i.to_string()).unwrap();
            for page_bytes in [3000, 1 << 16, u64::MAX] {
                let mut found = zeros(&config, &LENS);
                for page in pages(&config, &LENS, page_bytes) {
                    unpack(&page, &pack(&page, &state), &mut found);
                }
                assert!(found == state, "{kind} in pages of {page_bytes} bytes");
            }
        }
    }

    #[test]
    fn state_of_another_run_is_refused() {
        let config = OptimizerConfig { kind: OptimizerKind::AdamW8bit, ..Default::default() };
        let state = zeros(&config, &LENS);
        let refused = |config: &OptimizerConfig, lens: &[usize], state: &[Moments]| {
            check(config, lens, state, |i| format!("p{i}")).unwrap_err().to_string()
        };
        for kind in [OptimizerKind::AdamW32bit, OptimizerKind::Lion8bit] {
            let message = refused(&OptimizerConfig { kind, ..config }, &LENS, &state);
            assert!(message.contains("parameter p0") && message.contains(kind.name()), "{message}");
        }
        assert!(refused(&config, &LENS[1..], &state).contains("holds 4 parameters, the model trains 3"));
        let message = refused(&config, &[5000, 8, 4096, 100_003], &state);
        assert!(message.contains("parameter p1: expected 8 values, found 7"), "{message}");
        let mut cut = state.clone();
        let Moment::Block8 { absmax, .. } = &mut cut[2][1] else { panic!("4096 elements are 8-bit") };
        absmax.pop();
        let message = refused(&config, &LENS, &cut);
        assert!(message.contains("parameter p2: expected 16 values, found 15"), "{message}");
    }
}
