//! The optimizers of a whole module, with the surface of Burn's `ModuleOptimizer`.
//!
//! What was not done: a module whose parameters are on several devices, and lazily loaded state. A record is read as a
//! whole.

mod traversal;

use std::collections::HashMap;
use std::fmt;

use burn::grad_clipping::GradientClipping;
use burn::lr_scheduler::module_lr_scheduler::ModuleLearningRate;
use burn::module::{Module, ParamGroup, ParamId};
use burn::optim::{GradientsParams, OptimizerRecord};
use burn::tensor::Tensor;

use self::traversal::{Found, Gather, Put, Take, Taken};
use crate::record::{self, HostState, RecordedState};
use crate::{
    Budget, Clip, Moments, OptimError, Optimizer, OptimizerConfig, Paging, Scalars, Update, global_norm, moments,
};

/// AdamW or Lion over the parameters of a module: one launch for many parameters, and a pager for their state. Made by
/// [`PagedAdamWConfig::init_paged`](crate::PagedAdamWConfig::init_paged) and
/// [`PagedLionConfig::init_paged`](crate::PagedLionConfig::init_paged).
///
/// Parameters are known by their [`ParamId`]. Those without a gradient are left alone, and so are frozen ones and
/// tensors of integers. All that are trained are f32 and on one device. As in Burn's and PyTorch's AdamW, the bias
/// correction counts a parameter's own updates.
pub struct PagedOptimizer {
    config: OptimizerConfig,
    budget: Budget,
    max_grad_norm: f32,
    grad_clipping: Option<GradientClipping>,
    groups: Vec<GroupOptions>,
    known: Vec<Known>,
    positions: HashMap<ParamId, usize>,
    state: Holder,
}

/// A parameter that has state.
struct Known {
    id: ParamId,
    path: String,
    shape: Vec<usize>,
    updates: u64,
}

impl Known {
    fn len(&self) -> usize {
        self.shape.iter().product()
    }
}

/// Who has the state of the known parameters.
enum Holder {
    /// It was loaded, or there is none yet.
    Host(Vec<Moments>),
    Device(Box<Optimizer>),
}

struct GroupOptions {
    members: ParamGroup,
    learning_rate_factor: f64,
    weight_decay: f64,
}

impl fmt::Debug for PagedOptimizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PagedOptimizer")
            .field("config", &self.config)
            .field("parameters", &self.known.len())
            .finish_non_exhaustive()
    }
}

impl PagedOptimizer {
    /// An optimizer that has not seen a module yet; state is made at the first step, on the gradients' device.
    pub fn new(config: OptimizerConfig) -> Self {
        Self {
            config,
            budget: Budget::default(),
            max_grad_norm: 0.0,
            grad_clipping: None,
            groups: Vec::new(),
            known: Vec::new(),
            positions: HashMap::new(),
            state: Holder::Host(Vec::new()),
        }
    }

    /// How much state may stay on the device; [`Budget::Auto`] without this. It has to be said before the first step.
    pub fn with_budget(mut self, budget: Budget) -> Self {
        self.budget = budget;
        self
    }

    /// Scales gradients down to this Euclidean norm of all of them together ([`Clip`]). A step whose norm is not finite
    /// changes nothing then.
    pub fn with_max_grad_norm(mut self, max_norm: f32) -> Self {
        self.max_grad_norm = max_norm;
        self
    }

    /// Clips each gradient by itself, before [`with_max_grad_norm`](Self::with_max_grad_norm) looks at all of them.
    pub fn with_grad_clipping(mut self, clipping: GradientClipping) -> Self {
        self.grad_clipping = Some(clipping);
        self
    }

    /// Gives the parameters of a group a weight decay of their own, and multiplies their learning rate by a factor. Of
    /// several groups that a parameter is in, the last that was added counts.
    pub fn with_group(mut self, members: ParamGroup, learning_rate_factor: f64, weight_decay: f64) -> Self {
        self.groups.push(GroupOptions { members, learning_rate_factor, weight_decay });
        self
    }

    /// The hyper-parameters.
    pub fn config(&self) -> &OptimizerConfig {
        &self.config
    }

    /// Where the state is and what was moved.
    pub fn paging(&self) -> Paging {
        match &self.state {
            Holder::Device(optimizer) => optimizer.paging(),
            Holder::Host(_) => Paging::default(),
        }
    }

    /// Moves all state to the host; see [`Optimizer::make_room`].
    ///
    /// # Errors
    /// The device fails.
    pub fn make_room(&mut self) -> Result<u64, OptimError> {
        match &mut self.state {
            Holder::Device(optimizer) => optimizer.make_room(),
            Holder::Host(_) => Ok(0),
        }
    }

    /// [`try_step`](Self::try_step) with the signature of Burn's
    /// [`ModuleOptimizer::step`](burn::optim::ModuleOptimizer::step).
    ///
    /// # Panics
    /// With the error's message, where `try_step` has an error.
    pub fn step<M: Module>(
        &mut self,
        learning_rate: impl Into<ModuleLearningRate>,
        module: M,
        grads: GradientsParams,
    ) -> M {
        match self.try_step(learning_rate, module, grads) {
            Ok(module) => module,
            Err(error) => panic!("{error}"),
        }
    }

    /// Updates the parameters of `module` that have a gradient. Those that nothing else holds are updated in place, so a
    /// clone of the module costs a copy of each.
    ///
    /// # Errors
    /// A parameter or its gradient is not f32, has another shape than before or is on another device, or state that was
    /// loaded is another optimizer's: no parameter has been changed then. [`OptimError::Device`] when state that was
    /// moved to the host did not arrive.
    pub fn try_step<M: Module>(
        &mut self,
        learning_rate: impl Into<ModuleLearningRate>,
        module: M,
        grads: GradientsParams,
    ) -> Result<M, OptimError> {
        let learning_rate = learning_rate.into();
        let found = Gather::from(&module, grads);
        for found in &found {
            found.grad.as_ref().map_or(Ok(()), |grad| found.check(grad))?;
        }
        self.register(&found)?;
        let Holder::Device(optimizer) = &mut self.state else { return Ok(module) };

        let mut numbers = Vec::new();
        let mut grads = HashMap::new();
        for Found { id, path, grad, .. } in found {
            let (Some(grad), Some(&index)) = (grad, self.positions.get(&id)) else { continue };
            let grad = match &self.grad_clipping {
                Some(clipping) => clipping.clip_gradient(grad),
                None => grad,
            };
            let lr = learning_rate.lr_from_param(id, Some(&path));
            let group = self.groups.iter().rfind(|group| group.members.matches(&id, Some(&path)));
            let (lr, weight_decay) = match group {
                Some(group) => (lr * group.learning_rate_factor, group.weight_decay),
                None => (lr, self.config.weight_decay),
            };
            let config = OptimizerConfig { weight_decay, ..self.config };
            numbers.push((id, index, config.scalars(self.known[index].updates + 1, lr, 0.0)));
            grads.insert(id, grad);
        }
        if numbers.is_empty() {
            return Ok(module);
        }
        let clip = match self.max_grad_norm > 0.0 {
            true => {
                let grads = numbers.iter().filter_map(|(id, ..)| grads.get(id));
                Some(Clip::new(global_norm(grads)?, self.max_grad_norm))
            }
            false => None,
        };
        let mut take = Take { grads, taken: HashMap::new() };
        let module = module.map(&mut take);
        let Take { mut taken, .. } = take;
        let mut updates: Vec<(Update, Scalars)> = Vec::with_capacity(numbers.len());
        let mut contexts = Vec::with_capacity(numbers.len());
        for (id, index, scalars) in numbers {
            let Some(Taken { param, grad, context }) = taken.remove(&id) else { continue };
            updates.push((Update { index, param, grad }, scalars));
            contexts.push((id, index, context));
        }
        let updated = optimizer.step_each(updates, clip)?;
        let mut put = Put { updated: HashMap::with_capacity(updated.len()) };
        for ((id, index, context), updated) in contexts.into_iter().zip(updated) {
            self.known[index].updates += 1;
            put.updated.insert(id, (updated, context));
        }
        Ok(module.map(&mut put))
    }

    /// Makes state for the parameters that are trained and have none yet, and brings state that was loaded to the
    /// device.
    fn register(&mut self, found: &[Found]) -> Result<(), OptimError> {
        let Some(device) = found.iter().find_map(|found| found.grad.as_ref()).map(Tensor::device) else {
            return Ok(());
        };
        for Found { id, path, shape, .. } in found {
            let Some(&index) = self.positions.get(id) else { continue };
            let known = &mut self.known[index];
            if known.shape != *shape {
                let (expected, found) = (known.len(), shape.iter().product());
                return Err(OptimError::Elements { parameter: path.clone(), tensor: "value", expected, found });
            }
            known.path.clone_from(path);
        }
        let new: Vec<&Found> = found.iter().filter(|found| !self.positions.contains_key(&found.id)).collect();
        if new.is_empty() && matches!(self.state, Holder::Device(_)) {
            return Ok(());
        }
        // A module whose set of trained parameters grew: state goes to the host once, and comes back in new pages.
        let mut state = match &mut self.state {
            Holder::Device(optimizer) => optimizer.state()?,
            Holder::Host(state) => state.clone(),
        };
        let mut lens: Vec<usize> = self.known.iter().map(Known::len).collect();
        let new_lens: Vec<usize> = new.iter().map(|found| found.shape.iter().product()).collect();
        let fresh = state.is_empty();
        lens.extend(&new_lens);
        let names = self.known.iter().map(|known| known.path.clone()).chain(new.iter().map(|found| found.path.clone()));
        let mut optimizer = Optimizer::new(self.config, &lens, &device, self.budget).with_names(names.collect());
        if !fresh {
            state.extend(moments::zeros(&self.config, &new_lens));
            optimizer.restore(0, &state)?;
        }
        for Found { id, path, shape, .. } in new {
            self.positions.insert(*id, self.known.len());
            self.known.push(Known { id: *id, path: path.clone(), shape: shape.clone(), updates: 0 });
        }
        self.state = Holder::Device(Box::new(optimizer));
        Ok(())
    }

    /// The state of every parameter that was updated, in Burn's form. Pages that are on their way to the host are waited
    /// for, hence `&mut`.
    ///
    /// # Errors
    /// The device fails.
    pub fn to_record(&mut self) -> Result<OptimizerRecord, OptimError> {
        let state = match &mut self.state {
            Holder::Device(optimizer) => optimizer.state()?,
            Holder::Host(state) => state.clone(),
        };
        let updated = self.known.iter().zip(state).filter(|(known, _)| known.updates > 0);
        record::write(updated.map(|(known, moments)| RecordedState {
            id: known.id.val(),
            path: Some(known.path.clone()),
            state: HostState { updates: known.updates, shape: known.shape.clone(), moments },
        }))
    }

    /// Takes the state from a record of this optimizer or of the same one in its
    /// [form for one tensor at a time](crate::TensorwiseOptimizer), in place of what state there is.
    ///
    /// # Errors
    /// The record can't be read, or is another optimizer's.
    pub fn load_record(mut self, record: OptimizerRecord) -> Result<Self, OptimError> {
        self.known.clear();
        self.positions.clear();
        let mut loaded = Vec::new();
        for RecordedState { id, path, state } in record::read(record, self.config.kind)? {
            let HostState { updates, shape, moments } = state;
            let (id, path) = (ParamId::from(id), path.unwrap_or_else(|| id.to_string()));
            self.positions.insert(id, self.known.len());
            self.known.push(Known { id, path, shape, updates });
            loaded.push(moments);
        }
        let lens: Vec<usize> = self.known.iter().map(Known::len).collect();
        moments::check(&self.config, &lens, &loaded, |index| self.known[index].path.clone())?;
        self.state = Holder::Host(loaded);
        Ok(self)
    }
}
