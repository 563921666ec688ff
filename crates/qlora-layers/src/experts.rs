//! The linear layers of a mixture of experts as one: weights and adapters of all experts, one behind the other.
//!
//! A layer of each expert stays what it is, with its own name in files; its frozen weight becomes a view of the [stack](ExpertStack).
//! Adapters move: [`ExpertAdapters`] owns the factors of all experts as two parameters, which an optimizer updates at once, and
//! [splits](ExpertAdapters::split) them again for whoever wants an expert's own.

use burn::backend::Dispatch;
use burn::module::{Param, ParamId};
use burn::tensor::{DType, Device, Int, Tensor};
use host_copies::persistent;

use crate::linear_4bit::format_of;
use crate::ops::experts::{ExpertBias, ExpertFactors, ExpertProjection, ExpertTerms, Stacked4bit, words_of_one};
use crate::ops::{Layout4bit, LoraDropout};
use crate::params::{constant, in_pass, track, trainable};
use crate::streamed::{BlockHome, VIEW_WORDS, Views};
use crate::{LayerError, Linear4bit, LoraAdapter, Pass};

/// The frozen weights of one projection of all experts, in one memory.
#[derive(Clone, Debug)]
pub struct ExpertStack {
    codes: Tensor<1, Int>,
    absmax: Tensor<1, Int>,
    nested_absmax: Tensor<1, Int>,
    /// The layers' own nested absmax, each with its offset behind it. One memory: thousands of small buffers would have a price of
    /// their own, since for each allocation CubeCL looks through all that it holds.
    own: Tensor<1, Int>,
    /// Of one layer.
    layout: Layout4bit,
    /// Of one layer in the stack, whose nested blocks may be smaller.
    stacked: Layout4bit,
    /// The layers that are views of it.
    layers: Vec<ParamId>,
    /// The block, where it is streamed.
    home: Option<BlockHome>,
}

impl ExpertStack {
    /// Copies the weights of layers into one memory, and makes the layers views of it.
    ///
    /// # Errors
    /// Why these layers can't lie behind one another; they are unchanged then.
    pub fn new(layers: &mut [&mut Linear4bit]) -> Result<Self, LayerError> {
        let Some(first) = layers.first() else { return Err(apart("there are no experts")) };
        let layout = *first.layout();
        if layers.iter().any(|layer| *layer.layout() != layout) {
            return Err(apart("the weights of experts differ in shape or quantization"));
        }
        let Some([_, _, nested_len]) = words_of_one(&layout) else {
            let Layout4bit { out_features, in_features, blocksize, .. } = layout;
            return Err(apart(format!("blocks of {blocksize} cross the weights of {out_features} x {in_features}")));
        };
        let tensors: Vec<[Tensor<1, Int>; 3]> = layers.iter().map(|layer| layer.tensors()).collect();
        let device = tensors[0][0].device();
        let cat = |tensors: Vec<Tensor<1, Int>>| persistent(&device, tensors, |tensors| Tensor::cat(tensors, 0));
        let joined = |part: usize| cat(tensors.iter().map(|parts| parts[part].clone()).collect());
        let (codes, absmax) = (joined(0), joined(1));
        let stacked = layout.with_whole_nested_blocks();
        let nested_absmax = match layout.nested_blocksize.zip(stacked.nested_blocksize) {
            None => tensors[0][2].clone(),
            Some((nested, smaller)) => {
                let parts = layout.num_blocks().div_ceil(smaller);
                let nested = tensors.iter().map(|tensors| {
                    let own = tensors[2].clone().narrow(0, 0, nested_len);
                    match nested / smaller {
                        1 => own,
                        times => own.reshape([nested_len, 1]).repeat_dim(1, times).reshape([-1]).narrow(0, 0, parts),
                    }
                });
                let offsets = tensors.iter().map(|parts| parts[2].clone().narrow(0, nested_len, 1));
                cat(nested.chain(offsets).collect())
            }
        };
        // A layer's own nested absmax has its offset behind it.
        let own_len = tensors[0][2].dims()[0];
        let stride = own_len.next_multiple_of(VIEW_WORDS);
        let gap = Tensor::<1, Int>::zeros([stride - own_len], (&device, DType::U32));
        let apart = tensors.iter().enumerate().flat_map(|(i, parts)| {
            let gap = (i > 0 && stride > own_len).then(|| gap.clone());
            gap.into_iter().chain(std::iter::once(parts[2].clone()))
        });
        let own = cat(apart.collect());
        let ids = layers.iter().map(|layer| layer.id()).collect();
        let stack = Self { codes, absmax, nested_absmax, own, layout, stacked, layers: ids, home: None };
        let format = layers[0].format();
        for (i, layer) in layers.iter_mut().enumerate() {
            layer.become_view(stack.views(i), format.clone());
        }
        Ok(stack)
    }

    /// The tensors of one layer.
    fn views(&self, layer: usize) -> [Tensor<1, Int>; 3] {
        let count = self.layers.len();
        let view = |all: &Tensor<1, Int>, stride: usize, len| all.clone().narrow(0, layer * stride, len);
        let each = |all: &Tensor<1, Int>| {
            let len = all.dims()[0] / count;
            view(all, len, len)
        };
        // Only between two layers is there a gap.
        let own_len = match self.layout.nested_blocksize {
            None => 1,
            Some(nested) => self.layout.num_blocks().div_ceil(nested) + 1,
        };
        [each(&self.codes), each(&self.absmax), view(&self.own, own_len.next_multiple_of(VIEW_WORDS), own_len)]
    }

    /// The words of a [streamed](crate::streamed) block that are this projection's, in their order.
    pub fn tensors(&self) -> [Tensor<1, Int>; 4] {
        self.ensure();
        [&self.codes, &self.absmax, &self.nested_absmax, &self.own].map(Tensor::clone)
    }

    /// Whether the weights can be streamed: those of each layer are views of the device's memory, never copies.
    pub fn can_stream(&self) -> bool {
        let count = self.layers.len();
        let whole = |all: &Tensor<1, Int>| (all.dims()[0] / count).is_multiple_of(VIEW_WORDS);
        self.codes.device() == Device::flex() || (whole(&self.codes) && whole(&self.absmax))
    }

    /// Lets the weights go, those of its layers too, until they [settle](Self::settle) in a streamed block.
    pub fn leave<'a>(&mut self, layers: impl Iterator<Item = &'a mut Linear4bit>) {
        let nothing = || Tensor::<1, Int>::empty([0], (&Device::flex(), DType::U32));
        (self.codes, self.absmax, self.nested_absmax, self.own) = (nothing(), nothing(), nothing(), nothing());
        layers.for_each(Linear4bit::leave);
    }

    /// Takes the next tensors of a streamed block, for its layers too.
    ///
    /// # Errors
    /// [`LayerError::Weight`]: there are no more.
    pub fn settle<'a>(
        &mut self,
        layers: impl Iterator<Item = &'a mut Linear4bit>,
        views: &mut Views,
    ) -> Result<(), LayerError> {
        let (tensors, block, _) = views.next::<4>()?;
        [self.codes, self.absmax, self.nested_absmax, self.own] = tensors;
        let format = format_of(&self.layout, &self.codes.device()).into_value();
        for (i, layer) in layers.enumerate() {
            layer.settle_within(self.views(i), format.clone(), &block);
        }
        self.home = Some(block);
        Ok(())
    }

    fn ensure(&self) {
        if let Some(home) = &self.home {
            home.ensure();
        }
    }

    /// Whether these layers, in this order, are its views.
    pub fn holds<'a>(&self, layers: impl Iterator<Item = Option<&'a Linear4bit>>) -> bool {
        let ids = layers.map(|layer| layer.map(Linear4bit::id));
        ids.eq(self.layers.iter().map(|id| Some(*id)))
    }

    /// Number of experts.
    pub fn experts(&self) -> usize {
        self.layers.len()
    }

    /// The projection as the operations take it, in a pass.
    pub fn projection(&self, adapters: Option<&ExpertAdapters>, pass: Pass) -> ExpertProjection<Dispatch> {
        self.ensure();
        let tensor = |tensor: &Tensor<1, Int>| tensor.clone().into_dispatch();
        let weight = Stacked4bit {
            codes: tensor(&self.codes),
            absmax: tensor(&self.absmax),
            nested_absmax: tensor(&self.nested_absmax),
            layout: self.stacked,
            experts: self.experts(),
        };
        let factors = adapters.map_or(ExpertFactors::Missing, |adapters| ExpertFactors::LowRank {
            lora_a: in_pass(&adapters.lora_a, pass).into_dispatch(),
            lora_b: in_pass(&adapters.lora_b, pass).into_dispatch(),
            terms: adapters.terms(pass),
        });
        ExpertProjection { weight, factors, bias: ExpertBias::Missing }
    }
}

/// The low-rank adapters of one projection of all experts, as two parameters.
#[derive(Clone, Debug)]
pub struct ExpertAdapters {
    /// f32 `[experts * rank, in_features]`.
    pub lora_a: Param<Tensor<2>>,
    /// f32 `[experts * out_features, rank]`.
    pub lora_b: Param<Tensor<2>>,
    /// The experts' adapters but for their factors.
    adapters: Vec<LoraAdapter>,
}

impl ExpertAdapters {
    /// Joins the adapters of all experts.
    ///
    /// # Errors
    /// Why they can't be run as one, and what to do.
    pub fn new(adapters: &[&LoraAdapter]) -> Result<Self, LayerError> {
        let Some(first) = adapters.first() else { return Err(apart("there are no experts")) };
        if adapters.iter().any(|adapter| adapter.dora.is_some()) {
            return Err(apart("DoRA scales each expert's output by its own magnitudes: turn lora.use_dora off"));
        }
        if adapters.iter().any(|adapter| adapter.bias.is_some()) {
            return Err(apart("adapters have biases: turn lora.lora_bias off"));
        }
        let settings =
            |adapter: &LoraAdapter| (adapter.rank(), adapter.scaling.get().to_bits(), adapter.dropout.to_bits());
        if adapters.iter().any(|adapter| settings(adapter) != settings(first)) {
            return Err(apart("experts differ in rank or scaling: have patterns match all experts of a block or none"));
        }
        let joined = |factor: fn(&LoraAdapter) -> &Param<Tensor<2>>| {
            trainable(Tensor::cat(adapters.iter().map(|adapter| constant(factor(adapter))).collect(), 0))
        };
        let (lora_a, lora_b) = (joined(|adapter| &adapter.lora_a), joined(|adapter| &adapter.lora_b));
        let place = trainable(Tensor::zeros([1, 1], (&lora_a.device(), DType::F32)));
        let bare = |adapter: &&LoraAdapter| LoraAdapter::clone(adapter).with_factors(place.clone(), place.clone());
        Ok(Self { lora_a, lora_b, adapters: adapters.iter().map(bare).collect() })
    }

    /// The experts' own adapters, with the present factors.
    pub fn split(&self) -> Vec<LoraAdapter> {
        let experts = self.adapters.len();
        let factor = |all: &Param<Tensor<2>>, expert: usize| {
            let rows = all.dims()[0] / experts;
            trainable(constant(all).narrow(0, expert * rows, rows))
        };
        let whole = |(expert, adapter): (usize, &LoraAdapter)| {
            adapter.clone().with_factors(factor(&self.lora_a, expert), factor(&self.lora_b, expert))
        };
        self.adapters.iter().enumerate().map(whole).collect()
    }

    /// Everything that is trained, by name, in a fixed order.
    pub fn parameters(&self) -> [(&'static str, &Tensor<2>); 2] {
        [("lora_a", &self.lora_a), ("lora_b", &self.lora_b)]
    }

    /// As [`parameters`](Self::parameters). After changing one, call [`track`](Self::track).
    pub fn parameters_mut(&mut self) -> [(&'static str, &mut Param<Tensor<2>>); 2] {
        [("lora_a", &mut self.lora_a), ("lora_b", &mut self.lora_b)]
    }

    /// Starts recording: both become leaves of the autodiff graph.
    pub fn track(&mut self) {
        self.parameters_mut().into_iter().for_each(|(_, parameter)| track(parameter));
    }

    fn terms(&self, pass: Pass) -> ExpertTerms {
        // There is a first expert, whose settings are those of all.
        let LoraAdapter { scaling, dropout: p, index, .. } = &self.adapters[0];
        let seed = pass.seed_for(*index).filter(|_| *p > 0.0);
        ExpertTerms { scaling: scaling.get(), dropout: seed.map(|seed| LoraDropout { seed, p: *p }) }
    }
}

fn apart(reason: impl Into<String>) -> LayerError {
    LayerError::Experts { reason: reason.into() }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failing unwrap is a failing test")]

    use super::*;
    use crate::Linear4bitConfig;
    use host_copies::cube_of_int;
    use test_support::devices;

    #[test]
    fn a_layer_s_weight_is_a_place_in_the_stack_and_no_copy() {
        for (name, device) in devices() {
            let layer = |_| Linear4bitConfig::new(256, 128).init(&device).unwrap();
            let mut layers: Vec<Linear4bit> = (0..5).map(layer).collect();
            ExpertStack::new(&mut layers.iter_mut().collect::<Vec<_>>()).unwrap();
            for (expert, layer) in layers.iter().enumerate() {
                for (part, tensor) in ["codes", "absmax", "nested absmax"].into_iter().zip(layer.tensors()) {
                    let Some(tensor) = cube_of_int(tensor) else { continue };
                    let begins = tensor.handle.offset_start.unwrap_or(0);
                    assert_eq!(begins > 0, expert > 0, "{name}: {part} of expert {expert} begin at byte {begins}");
                }
            }
        }
    }
}
