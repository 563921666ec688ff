//! LoRA's update for a batch whose tokens use different adapters.
//!
//! `y += scaling · x lora_aᵀ lora_bᵀ`, each token with the adapter that it has, if any: [`grouped_low_rank`]. The factors of
//! a layer's adapters are packed once, [`AdapterGroup`]; which token has which, [`AdapterGroup::tokens`], once a pass
//! and layer.
//!
//! CubeCL devices run [`fused_kernels::grouped_low_rank`], two launches whatever the number of adapters. The CPU multiplies
//! the tokens of one adapter at a time. A token's result depends on no other token, bit for bit (on the CPU as long as
//! an adapter has at most [`FEW_TOKENS`](crate::ops::FEW_TOKENS)). There is no gradient.

mod autodiff;
mod cube;
mod flex;

use super::QloraOps;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, Dispatch, ExtensionType, backend_extension};
use burn::tensor::{DType, FloatDType, Int, Tensor, TensorData};
use fused_kernels::grouped_low_rank::Adapters;
use std::sync::Arc;

/// One adapter of a layer.
#[derive(Clone, Copy, Debug)]
pub struct GroupMember<'a> {
    /// `[rank, in_features]`.
    pub lora_a: &'a Tensor<2>,
    /// `[out_features, rank]`.
    pub lora_b: &'a Tensor<2>,
    /// Factor of the update.
    pub scaling: f32,
}

/// The adapters of one layer, packed.
#[derive(Clone, Debug)]
pub struct AdapterGroup {
    /// Of all adapters, one after the other.
    lora_a: Tensor<1>,
    lora_b: Tensor<1>,
    ranks: Vec<(usize, f32)>,
    in_features: usize,
    out_features: usize,
}

impl AdapterGroup {
    /// Packs adapters of a layer in the dtype that its inputs will have.
    ///
    /// # Panics
    /// When there is none, or their shapes don't fit one another.
    pub fn new(members: &[GroupMember<'_>], dtype: FloatDType) -> Self {
        let [_, in_features] = members[0].lora_a.dims();
        let [out_features, _] = members[0].lora_b.dims();
        let flat = |x: &Tensor<2>| {
            let len = x.shape().num_elements();
            x.clone().without_autodiff().cast(dtype).reshape([len])
        };
        let (mut lora_a, mut lora_b, mut ranks) = (Vec::new(), Vec::new(), Vec::new());
        for GroupMember { lora_a: a, lora_b: b, scaling } in members {
            let rank = a.dims()[0];
            assert!(
                a.dims()[1] == in_features && b.dims() == [out_features, rank],
                "adapter group: factors {:?} and {:?} in a layer of {in_features} to {out_features}",
                a.dims(),
                b.dims()
            );
            lora_a.push(flat(a));
            lora_b.push(flat(b));
            ranks.push((rank, *scaling));
        }
        Self { lora_a: Tensor::cat(lora_a, 0), lora_b: Tensor::cat(lora_b, 0), ranks, in_features, out_features }
    }

    /// A batch whose tokens have these adapters, by their number, or none.
    ///
    /// # Panics
    /// When a token names an adapter that is not there.
    pub fn tokens(&self, of_tokens: &[Option<usize>]) -> GroupedTokens {
        let host = Adapters::new(self.in_features, self.out_features, &self.ranks, of_tokens)
            .unwrap_or_else(|e| panic!("adapter group: {e}"));
        let words: Vec<i32> = host.words().into_iter().map(|word| word as i32).collect();
        let len = words.len();
        let words = Tensor::from_data(TensorData::new(words, [len]), (&self.lora_a.device(), DType::I32));
        GroupedTokens { host: Arc::new(host), words }
    }
}

/// Which adapter of a group each token of a batch has. Layers whose groups have the same features, ranks and scalings in
/// the same order may share one.
#[derive(Clone, Debug)]
pub struct GroupedTokens {
    host: Arc<Adapters>,
    words: Tensor<1, Int>,
}

/// An [`AdapterGroup`] and [`GroupedTokens`] on a backend.
#[derive(Clone, Debug, ExtensionType)]
pub struct GroupedOperand<B: Backend> {
    /// `[rank, in_features]` of all adapters, one after the other, in the dtype of `x`.
    pub lora_a: FloatTensor<B>,
    /// `[out_features, rank]` of all adapters, one after the other, in the dtype of `x`.
    pub lora_b: FloatTensor<B>,
    /// i32: [`Adapters::words`].
    pub words: IntTensor<B>,
    /// What they say.
    pub host: Arc<Adapters>,
}

/// The tensor-level part.
#[backend_extension(Cube, Flex, Autodiff)]
pub trait GroupedOps: Backend {
    /// See [`grouped_low_rank`].
    fn grouped_low_rank(
        y: FloatTensor<Self>,
        x: FloatTensor<Self>,
        #[extension_type] adapters: GroupedOperand<Self>,
    ) -> FloatTensor<Self>;
}

/// `y + scaling · x lora_aᵀ lora_bᵀ`, each token with its adapter's factors, and `y` as it is for one without.
///
/// As in the training product, `scaling · x lora_aᵀ` is rounded to the dtype of `x`; the rest is f32.
///
/// # Shapes
/// - `y`: `[tokens, out_features]`, f32
/// - `x`: `[tokens, in_features]`, in the dtype of the group
/// - output: as `y`
///
/// # Panics
/// When shapes or dtypes don't fit one another, `tokens` are those of another group, or a tensor is tracked by autodiff.
pub fn grouped_low_rank(y: Tensor<2>, x: Tensor<2>, group: &AdapterGroup, tokens: &GroupedTokens) -> Tensor<2> {
    let host = &tokens.host;
    let features = [host.in_features(), host.out_features()];
    let same = (0..host.count()).map(|i| (host.ranks(i).len(), host.scaling(i))).eq(group.ranks.iter().copied());
    assert!(
        features == [group.in_features, group.out_features] && same,
        "grouped_low_rank: the tokens are those of another group of adapters"
    );
    assert_eq!(y.dims(), [host.tokens(), features[1]], "grouped_low_rank: y of {} tokens", host.tokens());
    assert_eq!(x.dims(), [host.tokens(), features[0]], "grouped_low_rank: x of {} tokens", host.tokens());
    assert_eq!(y.dtype(), DType::F32, "grouped_low_rank: y is f32");
    assert_eq!(x.dtype(), group.lora_a.dtype(), "grouped_low_rank: x and the factors must have one dtype");
    if host.max_rank() == 0 {
        return y;
    }
    let operand = GroupedOperand {
        lora_a: group.lora_a.clone().into_dispatch(),
        lora_b: group.lora_b.clone().into_dispatch(),
        words: tokens.words.clone().into_dispatch(),
        host: host.clone(),
    };
    Tensor::from_dispatch(<Dispatch as GroupedOps>::grouped_low_rank(y.into_dispatch(), x.into_dispatch(), operand))
}

/// Backends that autodiff may stand above.
trait GroupedBackend: GroupedOps + QloraOps {}

impl<B: GroupedOps + QloraOps> GroupedBackend for B {}
