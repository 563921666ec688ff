//! Gradients that go from device to device, in buckets, while the backward pass goes on or behind it.
//!
//! A bucket is what a block's parameters get; the blocks come in the order of the backward pass, the last one first. What lies below and above
//! the blocks comes last, because its gradients are added up to the end, and with it the losses, which all ranks want to know.
//!
//! A step that is done once more, because memory was short, computes gradients again that are under way already: these are the same, and
//! are dropped. So every rank queues every bucket once, whatever happens on it.

use std::sync::Arc;

use burn::tensor::{DType, Device, Tensor};

use super::Engine;
use super::gradients::ParameterGrads;
use crate::error::TrainError;
use crate::ranks::{Ranks, SumBuckets, Waited};

/// The buckets of a step.
pub(super) struct Buckets {
    ranks: Ranks,
    way: Arc<dyn SumBuckets>,
    device: Device,
    shapes: Arc<[[usize; 2]]>,
    /// The parameters of each block, the last block first.
    blocks: Vec<Vec<usize>>,
    /// Those below and above.
    ends: Vec<usize>,
    /// Blocks whose gradients are queued, from the last one on, those without any among them.
    queued: usize,
    /// The buckets that were queued: how many blocks were done before each.
    order: Vec<usize>,
    /// Sums of gradients by parameter, as far as they are queued.
    sums: ParameterGrads,
    /// What all micro-batches send, `[1, n]`: losses, and figures behind each where there are some.
    losses: Option<Tensor<2>>,
    /// Whether the device waits for all of them.
    waited: bool,
}

impl Engine {
    /// The buckets of a step, where gradients go from device to device.
    pub(super) fn buckets(&self) -> Option<Buckets> {
        let ranks = self.ranks.clone()?;
        let way = Arc::clone(ranks.devices()?);
        let shapes: Arc<[[usize; 2]]> = self.model.parameters().iter().map(|(_, p)| p.dims()).collect();
        let first = &self.first_of_block;
        let blocks: Vec<Vec<usize>> = first.windows(2).rev().map(|pair| (pair[0]..pair[1]).collect()).collect();
        let (below, above) = (first[0], first[first.len() - 1]);
        Some(Buckets {
            ranks,
            way,
            device: self.model.device().clone(),
            blocks,
            ends: (0..below).chain(above..shapes.len()).collect(),
            queued: 0,
            order: Vec::new(),
            sums: vec![None; shapes.len()],
            shapes,
            losses: None,
            waited: false,
        })
    }
}

impl Buckets {
    /// Goes back to what is queued indeed: of a step that failed, the buckets from the one at fault on are not.
    pub(super) fn resume(&mut self) {
        if self.waited {
            return;
        }
        let queued = self.way.queued();
        let Some(first) = self.order.get(queued).copied() else { return };
        self.order.truncate(queued);
        self.queued = first;
        self.losses = None;
        let lost = self.blocks[first..].iter().flatten().chain(&self.ends);
        lost.for_each(|number| self.sums[*number] = None);
    }

    /// Whether buckets are queued while the backward pass goes on.
    pub(super) fn go_beside(&self) -> bool {
        self.way.beside()
    }

    /// Whether all are queued.
    pub(super) fn are_queued(&self) -> bool {
        self.losses.is_some()
    }

    /// Queues the gradients of the blocks above one, which are complete.
    pub(super) fn queue_blocks_above(&mut self, block: usize, grads: &mut ParameterGrads) -> Result<(), TrainError> {
        let above = (self.blocks.len() - 1).saturating_sub(block);
        self.queue_blocks(above, grads)
    }

    /// Queues what is left, with what this rank's micro-batches send, each with its number among `count`: `width` numbers.
    pub(super) fn queue_rest(
        &mut self,
        grads: &mut ParameterGrads,
        losses: Vec<(usize, Tensor<1>)>,
        [count, width]: [usize; 2],
    ) -> Result<(), TrainError> {
        self.queue_blocks(self.blocks.len(), grads)?;
        let mut all: Vec<Tensor<1>> = vec![Tensor::zeros([width], (&self.device, DType::F32)); count];
        losses.into_iter().for_each(|(number, loss)| all[number] = loss);
        let ends = self.ends.clone();
        let mut bucket = self.taken(&ends, grads);
        bucket.push(Tensor::cat(all, 0).reshape([1, count * width]));
        self.order.push(self.blocks.len());
        let mut summed = self.queue(bucket)?;
        self.losses = summed.pop();
        ends.iter().zip(summed).for_each(|(number, sum)| self.sums[*number] = Some(sum));
        Ok(())
    }

    fn queue_blocks(&mut self, until: usize, grads: &mut ParameterGrads) -> Result<(), TrainError> {
        for bucket in self.queued..until {
            let numbers = self.blocks[bucket].clone();
            if !numbers.is_empty() {
                self.order.push(bucket);
                let summed = self.queue(self.taken(&numbers, grads))?;
                numbers.iter().zip(summed).for_each(|(number, sum)| self.sums[*number] = Some(sum));
            }
            self.queued = bucket + 1;
        }
        Ok(())
    }

    /// The gradients of parameters, zeros where none reached them on this rank.
    fn taken(&self, numbers: &[usize], grads: &mut ParameterGrads) -> Vec<Tensor<2>> {
        let zeros = |number: usize| Tensor::zeros(self.shapes[number], (&self.device, DType::F32));
        numbers.iter().map(|number| grads[*number].take().unwrap_or_else(|| zeros(*number))).collect()
    }

    fn queue(&self, bucket: Vec<Tensor<2>>) -> Result<Vec<Tensor<2>>, TrainError> {
        self.way.queue(self.ranks.group(), bucket)
    }

    /// Has the device wait for all sums.
    pub(super) fn wait(&mut self) -> Result<Waited, TrainError> {
        let waited = self.way.wait(self.ranks.group())?;
        self.waited = true;
        Ok(waited)
    }

    /// What all `count` micro-batches sent, `width` numbers each, and the sums, of which the next attempt finds the same.
    pub(super) fn sums(&self, [count, width]: [usize; 2]) -> (Vec<Tensor<1>>, ParameterGrads) {
        let losses = self.losses.clone().map(|losses| losses.reshape([count * width]));
        (losses.into_iter().collect(), self.sums.clone())
    }
}

#[cfg(test)]
mod tests;
