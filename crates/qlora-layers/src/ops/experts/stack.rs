//! The 4-bit weights of one projection of all experts.

use burn::backend::tensor::IntTensor;
use burn::backend::{Backend, ExtensionType};
use burn::tensor::Slice;

use crate::ops::{Layout4bit, Packed4bit};

/// Weights of one shape, one behind the other, as if they were one weight of `experts * out_features` rows; but each has an
/// offset of double quantization of its own.
#[derive(Clone, Debug, ExtensionType)]
pub struct Stacked4bit<B: Backend> {
    /// u32: the codes of all weights.
    pub codes: IntTensor<B>,
    /// u32: their absmax, as [`Packed4bit`] has them.
    pub absmax: IntTensor<B>,
    /// Double-quantized, u32: the nested absmax of all weights, then the offsets of all. One unused element otherwise.
    pub nested_absmax: IntTensor<B>,
    /// What the buffers of one weight mean.
    pub layout: Layout4bit,
    /// Weights.
    pub experts: usize,
}

/// Words of one weight's codes and absmax, and its nested absmax without the offset; `None` where they don't end with a word,
/// or blocks cross weights, so that weights can't lie one behind the other.
pub(crate) fn words_of_one(layout: &Layout4bit) -> Option<[usize; 3]> {
    let (elements, blocks) = (layout.num_elements(), layout.num_blocks());
    let whole = elements.is_multiple_of(8) && elements.is_multiple_of(layout.blocksize);
    match layout.nested_blocksize {
        _ if !whole => None,
        None => Some([elements / 8, blocks, 0]),
        Some(_) if !blocks.is_multiple_of(4) => None,
        Some(nested) => Some([elements / 8, blocks / 4, blocks.div_ceil(nested)]),
    }
}

impl<B: Backend> Stacked4bit<B> {
    /// The weight of one expert.
    pub(super) fn expert(&self, expert: usize) -> Packed4bit<B> {
        let [codes, absmax, nested] = words_of_one(&self.layout)
            .unwrap_or_else(|| panic!("weights of {:?} were stacked, which can't lie behind one another", self.layout));
        let part = |words: &IntTensor<B>, start: usize, len: usize| {
            B::int_slice(words.clone(), &[Slice::from(start..start + len)])
        };
        let nested_absmax = match self.layout.nested_blocksize {
            None => self.nested_absmax.clone(),
            Some(_) => {
                let offset = part(&self.nested_absmax, self.experts * nested + expert, 1);
                B::int_cat(vec![part(&self.nested_absmax, expert * nested, nested), offset], 0)
            }
        };
        Packed4bit {
            codes: part(&self.codes, expert * codes, codes),
            absmax: part(&self.absmax, expert * absmax, absmax),
            nested_absmax,
            layout: self.layout,
        }
    }
}
