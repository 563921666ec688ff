//! Which blocks' frozen weights stay on the device, and which come when they are needed ([`qlora_layers::streamed`]).

use crate::block::{Block, FeedForward};
use crate::decoder::Decoder;
use crate::shared_expert::SharedExpert;
use burn::tensor::{Int, Tensor};
use host_copies::DeviceError;
use qlora_layers::streamed::{BlockHome, BlockStore, Order, Streaming};
use qlora_layers::{FrozenLinear, LayerError, Linear4bit, Pass};
use std::fmt;

/// The blocks whose frozen weights are streamed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Placement(Vec<bool>);

impl Placement {
    /// Of so many blocks all stay on the device but `streamed`, which are spread evenly: between two of them others compute
    /// while the next one comes.
    pub fn evenly(blocks: usize, streamed: usize) -> Self {
        let streamed = streamed.min(blocks);
        let mut all = vec![false; blocks];
        (0..streamed).for_each(|i| all[(2 * i + 1) * blocks / (2 * streamed)] = true);
        Self(all)
    }

    /// Whether a block is streamed.
    pub fn is_streamed(&self, block: usize) -> bool {
        self.0.get(block).copied().unwrap_or(false)
    }

    /// The streamed blocks, in their order.
    pub fn blocks(&self) -> impl Iterator<Item = usize> + '_ {
        self.0.iter().enumerate().filter(|(_, streamed)| **streamed).map(|(block, _)| block)
    }

    /// How many blocks there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is no block.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How many blocks are streamed.
    pub fn streamed(&self) -> usize {
        self.0.iter().filter(|streamed| **streamed).count()
    }
}

/// The blocks that a model streams from its loading on, and who takes them.
pub struct Streams {
    /// Which ones.
    pub placement: Placement,
    /// Where they go.
    pub store: Box<dyn BlockStore>,
}

impl fmt::Debug for Streams {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Streams").field("placement", &self.placement).finish_non_exhaustive()
    }
}

impl Block {
    /// Whether its frozen weights can be streamed.
    pub(crate) fn can_stream(&self) -> bool {
        match &self.feed_forward {
            FeedForward::Dense(_) => true,
            FeedForward::Experts(moe) => moe.can_stream(),
        }
    }

    /// Its 4-bit weights beside those of experts that tokens are sent to.
    fn weights(&self) -> impl Iterator<Item = &Linear4bit> {
        let (mlp, shared) = match &self.feed_forward {
            FeedForward::Dense(mlp) => (Some(mlp.linears()), None),
            FeedForward::Experts(moe) => (None, moe.shared.as_ref().map(SharedExpert::linears)),
        };
        let feed_forward = mlp.into_iter().flatten().chain(shared.into_iter().flatten());
        let linears = self.qkv.iter().chain([&self.output]).chain(feed_forward);
        linears.filter_map(|linear| match &linear.module.base {
            FrozenLinear::Quantized(base) => Some(base),
            FrozenLinear::Dense(_) => None,
        })
    }

    fn weights_mut(&mut self) -> impl Iterator<Item = &mut Linear4bit> {
        let (mlp, shared) = match &mut self.feed_forward {
            FeedForward::Dense(mlp) => (Some(mlp.linears_mut()), None),
            FeedForward::Experts(moe) => (None, moe.shared.as_mut().map(SharedExpert::linears_mut)),
        };
        let feed_forward = mlp.into_iter().flatten().chain(shared.into_iter().flatten());
        let linears = self.qkv.iter_mut().chain([&mut self.output]).chain(feed_forward);
        linears.filter_map(|linear| match &mut linear.module.base {
            FrozenLinear::Quantized(base) => Some(base),
            FrozenLinear::Dense(_) => None,
        })
    }

    /// The words of its frozen weights.
    fn words(&self) -> Vec<Tensor<1, Int>> {
        let mut words: Vec<_> = self.weights().flat_map(Linear4bit::tensors).collect();
        if let FeedForward::Experts(moe) = &self.feed_forward {
            words.extend(moe.words());
        }
        words
    }

    /// Brings its frozen weights to a store.
    pub(crate) fn move_to(&mut self, store: &mut dyn BlockStore) -> Result<(), LayerError> {
        store.push(self.words())?;
        self.weights_mut().for_each(Linear4bit::leave);
        if let FeedForward::Experts(moe) = &mut self.feed_forward {
            moe.leave();
        }
        Ok(())
    }

    /// Takes its weights from their home.
    pub(crate) fn settle(&mut self, home: BlockHome) -> Result<(), LayerError> {
        let mut views = home.views();
        self.weights_mut().try_for_each(|weight| weight.settle(&mut views))?;
        if let FeedForward::Experts(moe) = &mut self.feed_forward {
            moe.settle(&mut views)?;
        }
        self.home = Some(home);
        Ok(())
    }

    /// Has the frozen weights on the device for what is queued from here on, in a pass that goes on to the next blocks. Where
    /// they can't be had, what comes out is no number, which every reader reports; so it is where the pass is recorded, since its
    /// backward pass would find the weights of other blocks. [`qlora_layers::activation_checkpointing`] is the way to record.
    pub(crate) fn enter(&self, x: Tensor<2>, pass: Pass) -> Tensor<2> {
        let Some(home) = &self.home else { return x };
        match home.enter(Order::Forward) {
            Ok(()) if !pass.tracked => return x,
            Ok(()) => {
                tracing::error!(block = self.index, "a streamed block can't be recorded in a pass over all blocks")
            }
            // Whoever works with that process learns of it, and says so once.
            Err(DeviceError::Peer(error)) => tracing::debug!(block = self.index, error, "another process failed"),
            Err(error) => tracing::error!(block = self.index, %error, "the weights of a block did not come"),
        }
        x.mul_scalar(f32::NAN)
    }
}

impl Decoder {
    /// What is streamed, and what that has moved; nothing where all weights stay on the device.
    pub fn streaming(&self) -> Streaming {
        let home = self.blocks.iter().find_map(|block| block.home.as_ref());
        home.map_or(Streaming::default(), BlockHome::streaming)
    }

    /// Has the streamed blocks' weights come and go as a pass over all blocks does, forward, and backward too where it is `training`, without
    /// computing anything: for ranks that hold parts of the weights each, and do as many passes as each other.
    ///
    /// # Errors
    /// The weights did not come.
    pub fn pass_idly(&self, training: bool) -> Result<(), DeviceError> {
        let homes = || self.blocks.iter().filter_map(|block| block.home.as_ref());
        if !training {
            return homes().try_for_each(|home| home.enter(Order::Forward));
        }
        homes().try_for_each(|home| home.enter(Order::ThenBackward))?;
        homes().rev().try_for_each(|home| home.enter(Order::Backward))
    }

    /// Whether some of its blocks are streamed. One pass at a time may run over such a model and its clones.
    pub fn is_streamed(&self) -> bool {
        self.blocks.iter().any(|block| block.home.is_some())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streamed_blocks_are_spread_evenly() {
        let of = |blocks, streamed| {
            let placement = Placement::evenly(blocks, streamed);
            assert_eq!(placement.streamed(), streamed.min(blocks));
            (0..blocks).filter(|block| placement.is_streamed(*block)).collect::<Vec<_>>()
        };
        assert_eq!(of(8, 4), [1, 3, 5, 7]);
        assert_eq!(of(8, 2), [2, 6]);
        assert_eq!(of(5, 3), [0, 2, 4]);
        assert_eq!(of(4, 9), [0, 1, 2, 3]);
        assert!(of(4, 0).is_empty());
        assert!(!Placement::default().is_streamed(3));
    }
}
