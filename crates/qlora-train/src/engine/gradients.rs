//! Forward and backward over a step's micro-batches.
//!
//! What a parameter gets in one micro-batch, in several pieces where it is a head or an embedding, is added up before it joins the sum
//! over micro-batches: so the sum is the same bits whether one process makes it or several ranks, each of which has some of the
//! micro-batches.

use std::time::Instant;

use burn::tensor::{Gradients, Tensor};
use host_copies::Reading;
use paged_optim::global_norm;
use qlora_data::Batch;
use qlora_layers::activation_checkpointing;
use qlora_layers::ops::backward_from_all;
use qlora_layers::{Pass, mix};
use qlora_models::BlockInPass;

use super::Engine;
use super::buckets::Buckets;
use super::pass::sequence;
use super::preference::Scope;
use crate::error::TrainError;
use crate::loss::{LabelledTokens, Weights, loss_and_gradient};
use crate::objective::FIGURES;
use crate::ranks::{Part, Ranks, Waited};

/// Gradients of the parameters by number, f32.
pub(crate) type ParameterGrads = Vec<Option<Tensor<2>>>;

/// What a step computes before it changes anything.
pub(super) struct Computed {
    /// Loss and global norm, on their way; behind them the seconds that the device waited for other ranks, where they came to it.
    pub numbers: Reading,
    /// Seconds that the host waited for other ranks.
    pub waited: Option<f64>,
    /// The norm for the update, which is skipped where it is not finite.
    pub norm: Tensor<1>,
    pub grads: Vec<Tensor<2>>,
}

/// What this process computes of a step by itself.
pub(super) enum Local {
    /// All of it.
    Whole(Box<Computed>),
    /// Its parts, which have to be summed with those of the other ranks.
    Parts(Ranks, Vec<Part>),
}

/// The micro-batches of a step, those of all ranks.
pub(super) struct Step<'a> {
    pub micro_batches: &'a [Batch],
    pub labelled: &'a [LabelledTokens],
    /// Unmasked tokens.
    pub label_tokens: usize,
    /// Picks the dropout masks.
    pub seed: u64,
    /// How much rows count whose answers are compared.
    pub scope: Option<Scope>,
}

impl Step<'_> {
    /// The micro-batches that have something to learn from, by their number in the step.
    fn numbers(&self) -> Vec<usize> {
        (0..self.labelled.len()).filter(|number| !self.labelled[*number].is_empty()).collect()
    }

    /// Of [`numbers`](Self::numbers) the ranks that they are dealt to.
    fn owners(&self, ranks: &Ranks) -> Vec<usize> {
        let places = |number: &usize| self.micro_batches[*number].input_ids.len();
        ranks.deal(&self.numbers().iter().map(places).collect::<Vec<_>>())
    }
}

impl Engine {
    /// Loss and gradients of a step, times the loss scale, as far as this process computes them. `buckets` are those of gradients that
    /// go from device to device; when this is done once more, they hold what is under way.
    pub(super) fn local(&self, step: &Step<'_>, buckets: Option<&mut Buckets>) -> Result<Local, TrainError> {
        let numbers = step.numbers();
        let Some(ranks) = &self.ranks else {
            let mut grads = self.no_gradients();
            let losses = numbers.into_iter().map(|number| self.micro_step(step, number, &mut grads, None));
            let losses = losses.collect::<Result<_, _>>()?;
            return Ok(Local::Whole(Box::new(self.whole(losses, grads, None)?)));
        };
        if let Some(buckets) = buckets {
            return self.over_devices(step, ranks, buckets);
        }
        self.pass_idly(step, ranks)?;
        let mut parts: Vec<Part> = Vec::new();
        let apart = ranks.keeps_apart(self.model.device());
        if !apart {
            parts.push(Part { number: ranks.rank(), losses: Vec::new(), grads: self.no_gradients() });
        }
        for (part, (number, owner)) in numbers.into_iter().zip(step.owners(ranks)).enumerate() {
            if owner != ranks.rank() {
                continue;
            }
            if apart {
                parts.push(Part { number: part, losses: Vec::new(), grads: self.no_gradients() });
            }
            if let Some(into) = parts.last_mut() {
                let loss = self.micro_step(step, number, &mut into.grads, None)?;
                into.losses.push((part, loss));
            }
        }
        let losses: Vec<_> = parts.iter().flat_map(|part| &part.losses).map(|(_, loss)| loss.clone()).collect();
        if !losses.is_empty() {
            // Starting to read tells whether memory was short, while this rank can still do it again by itself.
            Reading::start(Tensor::cat(losses, 0))?.wait()?;
        }
        Ok(Local::Parts(ranks.clone(), parts))
    }

    /// The passes that other ranks do and this one has no micro-batch for, where they share the base.
    fn pass_idly(&self, step: &Step<'_>, ranks: &Ranks) -> Result<(), TrainError> {
        if self.shared_base {
            let owners = step.owners(ranks);
            let mine = owners.iter().filter(|owner| **owner == ranks.rank()).count();
            for _ in mine..owners.len().div_ceil(ranks.count()) {
                if self.passes_reference() {
                    self.model.pass_idly(false)?;
                }
                self.model.pass_idly(true)?;
            }
        }
        Ok(())
    }

    /// The step of a rank whose gradients go from device to device: of its last micro-batch those of a block are on their way while
    /// the next block's are computed.
    fn over_devices(&self, step: &Step<'_>, ranks: &Ranks, buckets: &mut Buckets) -> Result<Local, TrainError> {
        let numbers = step.numbers();
        buckets.resume();
        if !buckets.are_queued() {
            let owned = numbers.iter().zip(step.owners(ranks)).enumerate();
            let mine: Vec<(usize, usize)> = owned
                .filter(|(_, (_, owner))| *owner == ranks.rank())
                .map(|(part, (number, _))| (part, *number))
                .collect();
            self.pass_idly(step, ranks)?;
            let (mut grads, mut losses) = (self.no_gradients(), Vec::new());
            for (at, (part, number)) in mine.iter().enumerate() {
                let last = (at + 1 == mine.len() && buckets.go_beside()).then_some(&mut *buckets);
                losses.push((*part, self.micro_step(step, *number, &mut grads, last)?));
            }
            buckets.queue_rest(&mut grads, losses, [numbers.len(), self.sent()])?;
        }
        let waited = buckets.wait()?;
        let (losses, sums) = buckets.sums([numbers.len(), self.sent()]);
        Ok(Local::Whole(Box::new(self.whole(losses, sums, Some(waited))?)))
    }

    /// The step as a whole, once each part is there.
    pub(super) fn joined(&self, step: &Step<'_>, local: Local) -> Result<Computed, TrainError> {
        match local {
            Local::Parts(ranks, parts) => {
                let shapes: Vec<[usize; 2]> = self.model.parameters().iter().map(|(_, p)| p.dims()).collect();
                let _span = tracing::trace_span!("sum_over_ranks").entered();
                let start = Instant::now();
                let sent = [step.numbers().len(), self.sent()];
                let summed = ranks.sum(parts, &shapes, sent, self.model.device())?;
                let waited = start.elapsed().as_secs_f64();
                Ok(Computed { waited: Some(waited), ..self.whole(summed.losses, summed.grads, None)? })
            }
            Local::Whole(computed) => Ok(*computed),
        }
    }

    pub(super) fn no_gradients(&self) -> ParameterGrads {
        vec![None; self.model.parameters().len()]
    }

    /// Adds the gradients of the micro-batch of a number to `grads` and returns its part of the loss. Where it is the last one,
    /// `buckets` take the gradients of each block when they are there.
    fn micro_step(
        &self,
        step: &Step<'_>,
        number: usize,
        grads: &mut ParameterGrads,
        buckets: Option<&mut Buckets>,
    ) -> Result<Tensor<1>, TrainError> {
        let _span = tracing::trace_span!("micro_step", index = number).entered();
        let pass = Pass::training(mix(step.seed ^ mix(number as u64)));
        let batch = (&step.micro_batches[number], &step.labelled[number]);
        self.forward_backward(batch, step, pass, grads, buckets)
    }

    /// Loss, norm and gradients of all parameters, from the losses of the micro-batches in their order and the sums of gradients.
    /// `waited` is how the wait for sums of other devices ended: where they were broken off, the norm is not a number.
    fn whole(
        &self,
        losses: Vec<Tensor<1>>,
        grads: ParameterGrads,
        waited: Option<Waited>,
    ) -> Result<Computed, TrainError> {
        if grads.iter().all(Option::is_none) {
            return Err(TrainError::NothingToTrain);
        }
        // An expert to which no token came has a gradient, and it is zero: its moments decay like all others.
        let parameters = self.model.parameters().into_iter();
        let grads: Vec<Tensor<2>> = grads
            .into_iter()
            .zip(parameters)
            .map(|(grad, (_, parameter))| grad.unwrap_or_else(|| parameter.clone().without_autodiff().zeros_like()))
            .collect();
        let mut norm = global_norm(&grads)?;
        let (loss, figures) = self.summed(losses);
        let mut seconds = None;
        if let Some(waited) = waited {
            norm = norm + waited.broken;
            seconds = Some(waited.seconds);
        }
        // Starting to read tells whether memory was short.
        let numbers = [loss.clone(), norm.clone()].into_iter().chain(figures).chain(seconds).collect();
        let numbers = Reading::start(Tensor::cat(numbers, 0))?;
        // The norm, unless the loss is not finite: then neither is this.
        let norm = norm + loss.mul_scalar(0.0);
        Ok(Computed { numbers, waited: None, norm, grads })
    }

    /// What a micro-batch sends: its loss, and figures behind it where answers are compared.
    pub(super) fn sent(&self) -> usize {
        if self.comparison.is_some() { 1 + FIGURES } else { 1 }
    }

    /// The sum of what micro-batches sent: the loss, `[1]`, and figures, `[FIGURES]`, where there are some.
    fn summed(&self, sent: Vec<Tensor<1>>) -> (Tensor<1>, Option<Tensor<1>>) {
        let (all, width) = (Tensor::cat(sent, 0), self.sent());
        if width == 1 {
            return (all.sum(), None);
        }
        let count = all.dims()[0] / width;
        let sums = all.reshape([count, width]).sum_dim(0).reshape([width]);
        (sums.clone().narrow(0, 0, 1), Some(sums.narrow(0, 1, width - 1)))
    }

    /// Adds a micro-batch's gradients to `grads` and returns its part of the step's loss, `[1]` on the device, and figures behind it where
    /// answers are compared.
    fn forward_backward(
        &self,
        (batch, labelled): (&Batch, &LabelledTokens),
        step: &Step<'_>,
        pass: Pass,
        grads: &mut ParameterGrads,
        mut buckets: Option<&mut Buckets>,
    ) -> Result<Tensor<1>, TrainError> {
        let model = &self.model;
        let sequence = sequence(model, batch);
        let blocks = model.blocks_in(&sequence);
        // Below and above the blocks gradients come in pieces: rows of single tokens of a table that is the head too, chunks of logits.
        let mut pieces = self.no_gradients();
        let embedded = self.noise.on(model.begin(&sequence, &batch.input_ids, pass), batch, pass);
        let below = self.first_of_block[0] > 0;
        let (x, kept) = activation_checkpointing::forward(&blocks, embedded.clone(), pass, &self.policies.0, below)?;
        let head = self.first_of_block[blocks.len()];
        let of_head = |from: &mut Gradients| {
            collect(&mut pieces[head..], model.head_parameters(), from);
            collect(&mut pieces, model.embedding_parameters(), from);
        };
        let (loss, grad) = match (&self.comparison, step.scope) {
            (Some(comparison), Some(scope)) => {
                self.compared(comparison, (batch, labelled), x.clone(), scope, pass, of_head)?
            }
            _ => {
                let scale = self.loss_scaler.scale() / step.label_tokens as f32;
                loss_and_gradient(model, x.clone(), labelled, &Weights::All(scale), pass, of_head)
            }
        };
        drop(x);
        let mut queued = Ok(());
        let each = |i: usize, block: &BlockInPass<'_>, from: &mut Gradients| {
            // Those of later blocks are complete.
            if let Some(buckets) = buckets.as_deref_mut().filter(|_| queued.is_ok()) {
                queued = buckets.queue_blocks_above(i, grads);
            }
            collect(&mut grads[self.first_of_block[i]..], block.block.parameters(), from);
        };
        let grad = activation_checkpointing::backward(&blocks, kept, grad, pass, below, each)?;
        queued?;
        let through = grad.filter(|_| embedded.is_tracked()).map(|grad| (embedded, grad));
        let mut roots = through.into_iter().chain(sequence.inputs_and_gradient());
        if let Some(root) = roots.next() {
            collect(&mut pieces, model.embedding_parameters(), &mut backward_from_all(root, roots));
        }
        grads.iter_mut().zip(pieces).for_each(|(sum, piece)| add(sum, piece));
        Ok(loss)
    }
}

/// Takes the parameters' gradients out of a container and adds them to `grads`.
fn collect(grads: &mut [Option<Tensor<2>>], parameters: Vec<(String, &Tensor<2>)>, from: &mut Gradients) {
    for (slot, (_, parameter)) in grads.iter_mut().zip(parameters) {
        add(slot, parameter.grad_remove(from));
    }
}

fn add(sum: &mut Option<Tensor<2>>, grad: Option<Tensor<2>>) {
    if let Some(grad) = grad {
        *sum = Some(match sum.take() {
            Some(sum) => sum + grad,
            None => grad,
        });
    }
}
