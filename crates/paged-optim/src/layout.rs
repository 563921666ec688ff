//! How the state of parameters is cut into pages.
//!
//! Parameters of one format are put end to end, in order, and cut where a page is full, at a multiple of
//! [`BLOCKSIZE`] elements of the parameter: a block of 8-bit state is never cut, so the cuts don't show in the
//! results. A page is one buffer of 32-bit words; within it each segment's moments stand one after the other:
//!
//! | format | words of a segment of n elements |
//! |---|---|
//! | full | m, n rounded up to a multiple of 4; v likewise |
//! | 8-bit | m's codes, four to a word, ⌈n/4⌉ rounded up to a multiple of 4; v's codes; m's absmax, ⌈n/256⌉; v's absmax |
//!
//! and the next segment starts at a multiple of 4 words, for loads of 16 bytes.

use crate::{BLOCKSIZE, OptimizerConfig};

/// How a moment is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Format {
    /// f32.
    Full,
    /// 8-bit codes and an absmax per block.
    Block8,
}

/// A run of elements of one parameter, and where its state is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    /// Position of the parameter.
    pub(crate) parameter: usize,
    /// First element, a multiple of [`BLOCKSIZE`].
    pub(crate) start: usize,
    /// Number of elements.
    pub(crate) len: usize,
    /// First word of its state in the page.
    pub(crate) word: usize,
}

/// One buffer of state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PageLayout {
    pub(crate) format: Format,
    /// Moments of each parameter.
    pub(crate) moments: usize,
    pub(crate) words: usize,
    pub(crate) segments: Vec<Segment>,
}

impl Segment {
    /// Words that one moment takes, or its codes.
    pub(crate) fn moment_words(&self, format: Format) -> usize {
        match format {
            Format::Full => self.len.next_multiple_of(4),
            Format::Block8 => self.len.div_ceil(4).next_multiple_of(4),
        }
    }

    /// Blocks of 8-bit state.
    pub(crate) fn blocks(&self) -> usize {
        self.len.div_ceil(BLOCKSIZE)
    }

    /// First word of the absmax of moment `i` of `moments`.
    pub(crate) fn absmax_word(&self, moments: usize, i: usize) -> usize {
        self.word + moments * self.moment_words(Format::Block8) + i * self.blocks()
    }

    fn words(&self, format: Format, moments: usize) -> usize {
        let words = moments * self.moment_words(format);
        match format {
            Format::Full => words,
            Format::Block8 => (words + moments * self.blocks()).next_multiple_of(4),
        }
    }
}

/// Cuts the state of parameters of these lengths into pages of about `page_bytes`; a page holds one block at least.
pub(crate) fn pages(config: &OptimizerConfig, lens: &[usize], page_bytes: u64) -> Vec<PageLayout> {
    let moments = config.kind.moments().len();
    let capacity = usize::try_from(page_bytes / 4).unwrap_or(usize::MAX);
    [Format::Full, Format::Block8]
        .into_iter()
        .flat_map(|format| {
            let members = lens
                .iter()
                .copied()
                .enumerate()
                .filter(move |(_, len)| *len > 0 && config.is_8bit(*len) == (format == Format::Block8));
            cut(format, moments, members, capacity)
        })
        .collect()
}

fn cut(
    format: Format,
    moments: usize,
    members: impl Iterator<Item = (usize, usize)>,
    capacity: usize,
) -> Vec<PageLayout> {
    // Words of a block's state, absmax included.
    let block = moments * if format == Format::Full { BLOCKSIZE } else { BLOCKSIZE / 4 + 1 };
    let mut pages: Vec<PageLayout> = Vec::new();
    for (parameter, len) in members {
        let mut start = 0;
        while start < len {
            // The rest of the page, less what rounding up to 4 may take.
            let room = pages.last().map_or(0, |page| capacity.saturating_sub(page.words + 4) / block);
            if room == 0 {
                pages.push(PageLayout { format, moments, words: 0, segments: Vec::new() });
            }
            let room = if room == 0 { (capacity.saturating_sub(4) / block).max(1) } else { room };
            let Some(page) = pages.last_mut() else { continue };
            let taken = (len - start).min(room.saturating_mul(BLOCKSIZE));
            let segment = Segment { parameter, start, len: taken, word: page.words };
            page.words += segment.words(format, moments);
            page.segments.push(segment);
            start += taken;
        }
    }
    pages
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::OptimizerKind;

    /// Every element of every parameter is in one segment, segments don't overlap and pages keep their size.
    #[test]
    fn every_element_has_its_place() {
        let lens = [1, 0, 255, 256, 5000, 70_001, 4096, 3, 123_456];
        for kind in OptimizerKind::ALL {
            let config = OptimizerConfig { kind, ..Default::default() };
            for page_bytes in [0, 5_000, 65_536, u64::MAX] {
                let pages = pages(&config, &lens, page_bytes);
                let mut seen = lens.map(|_| 0);
                for page in &pages {
                    let mut word = 0;
                    for segment in &page.segments {
                        assert_eq!(segment.word, word);
                        assert_eq!(segment.start, seen[segment.parameter], "in order and without gaps");
                        assert!(segment.start.is_multiple_of(BLOCKSIZE) && segment.len > 0);
                        seen[segment.parameter] += segment.len;
                        word += segment.words(page.format, page.moments);
                        assert!(word.is_multiple_of(4));
                    }
                    assert_eq!(word, page.words);
                    let one_block = page.segments.len() == 1 && page.segments[0].len <= BLOCKSIZE;
                    assert!(4 * page.words as u64 <= page_bytes || one_block, "{page:?}");
                }
                assert_eq!(seen, lens);
            }
        }
    }

    #[test]
    fn formats_do_not_mix() {
        let config = OptimizerConfig { kind: OptimizerKind::AdamW8bit, ..Default::default() };
        let pages = pages(&config, &[64, 8192, 64], u64::MAX);
        assert_eq!(pages.len(), 2);
        let parameters = |format| {
            pages.iter().filter(move |p| p.format == format).flat_map(|p| p.segments.iter().map(|s| s.parameter))
        };
        assert_eq!(parameters(Format::Full).collect::<Vec<_>>(), [0, 2]);
        assert_eq!(parameters(Format::Block8).collect::<Vec<_>>(), [1]);
    }
}
