//! The optimizer: hyper-parameters, pages of state, and the device that they are on.

use std::fmt;

use burn::backend::DispatchDevice;
use burn::tensor::{DType, Device, Tensor};

use crate::budget::source_of;
use crate::config::{OptimizerConfig, Rule};
use crate::device::{Backend, CubeDevice, FlexDevice, Operands};
use crate::layout::{self, PageLayout};
use crate::moments::{self, Moments};
use crate::pager::Pager;
use crate::{Budget, Clip, MemorySource, OptimError, Paging, Scalars};

/// What one step does to one parameter.
#[derive(Debug)]
pub struct Update {
    /// Position of the parameter.
    pub index: usize,
    /// The parameter, flat, f32, without autodiff. Where nothing else holds its buffer it is updated in place.
    pub param: Tensor<1>,
    /// Its gradient, alike.
    pub grad: Tensor<1>,
}

impl Update {
    /// An update of a parameter of any shape; [`Tensor::reshape`] gives the result its shape back.
    pub fn new<const D: usize>(index: usize, param: Tensor<D>, grad: Tensor<D>) -> Self {
        let flat = |tensor: Tensor<D>| {
            let len = tensor.shape().num_elements();
            tensor.reshape([len])
        };
        Self { index, param: flat(param), grad: flat(grad) }
    }
}

/// An optimizer and its state. Parameters are known by their position.
pub struct Optimizer {
    config: OptimizerConfig,
    lens: Vec<usize>,
    names: Vec<String>,
    device: Device,
    updates: u64,
    pages: Vec<PageLayout>,
    state: Box<dyn State>,
}

impl fmt::Debug for Optimizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Optimizer")
            .field("config", &self.config)
            .field("updates", &self.updates)
            .finish_non_exhaustive()
    }
}

impl Optimizer {
    /// Zero state for parameters of these lengths.
    pub fn new(config: OptimizerConfig, lens: &[usize], device: &Device, budget: Budget) -> Self {
        Self::with_source(config, lens, device, budget, source_of(device))
    }

    /// [`new`](Self::new) with another source of what the device has left, for [`Budget::Auto`].
    pub fn with_source(
        config: OptimizerConfig,
        lens: &[usize],
        device: &Device,
        budget: Budget,
        source: Box<dyn MemorySource>,
    ) -> Self {
        let state = lens.iter().map(|&len| config.state_bytes(len)).sum();
        let pages = layout::pages(&config, lens, budget.page_bytes(state));
        let words: Vec<usize> = pages.iter().map(|page| page.words).collect();
        let state: Box<dyn State> = match device.as_dispatch() {
            DispatchDevice::Cube(cube) => Box::new(Pager::new(CubeDevice::new(cube.clone()), &words, budget, source)),
            _ => Box::new(Pager::new(FlexDevice, &words, budget, source)),
        };
        let (lens, device) = (lens.to_vec(), device.clone());
        Self { config, lens, names: Vec::new(), device, updates: 0, pages, state }
    }

    /// Names the parameters, by position, for error messages. Without this they are named by their positions.
    pub fn with_names(mut self, names: Vec<String>) -> Self {
        self.names = names;
        self
    }

    /// The hyper-parameters.
    pub fn config(&self) -> &OptimizerConfig {
        &self.config
    }

    /// Updates so far.
    pub fn updates(&self) -> u64 {
        self.updates
    }

    /// Bytes of state, on the device or not.
    pub fn state_bytes(&self) -> u64 {
        self.pages.iter().map(|page| 4 * page.words as u64).sum()
    }

    /// Where the pages are and what was moved.
    pub fn paging(&self) -> Paging {
        self.state.paging()
    }

    /// One step: the updated parameters, in the order of `updates`. Parameters without an update stay as they are, and
    /// so does their state. Nothing waits for the device, unless state is moved to the host.
    ///
    /// # Errors
    /// A tensor is not f32, of another length than was given to [`new`](Self::new) or on another device; an index is not
    /// below the number of parameters or comes twice: nothing is changed then. [`OptimError::Device`] when state
    /// that was moved to the host did not arrive.
    pub fn step(
        &mut self,
        updates: Vec<Update>,
        learning_rate: f64,
        clip: Option<Clip>,
    ) -> Result<Vec<Tensor<1>>, OptimError> {
        let scalars = self.config.scalars(self.updates + 1, learning_rate, 0.0);
        self.step_each(updates.into_iter().map(|update| (update, scalars)).collect(), clip)
    }

    /// Takes the last step out of the count of updates: to be called when its norm turns out not to have been finite, so
    /// that it changed nothing.
    pub fn discount_void_step(&mut self) {
        self.updates = self.updates.saturating_sub(1);
    }

    /// [`step`](Self::step) with scalars for each parameter; their `max_norm` and `unscale` are the clip's.
    pub fn step_each(
        &mut self,
        updates: Vec<(Update, Scalars)>,
        clip: Option<Clip>,
    ) -> Result<Vec<Tensor<1>>, OptimError> {
        let Clip { norm, max_norm, loss_scale } =
            clip.unwrap_or_else(|| Clip::new(Tensor::zeros([1], (&self.device, DType::F32)), 0.0));
        let mut work: Vec<Option<Operands<Tensor<1>>>> = self.lens.iter().map(|_| None).collect();
        let mut order = Vec::with_capacity(updates.len());
        for (Update { index, param, grad }, scalars) in updates {
            self.check(index, &param, &grad)?;
            let scalars = Scalars { max_norm, unscale: 1.0 / loss_scale, ..scalars };
            if work[index].replace(Operands { param, grad, scalars }).is_some() {
                return Err(OptimError::Twice { parameter: self.name(index) });
            }
            order.push(index);
        }
        let (lens, names, device) = (&self.lens, &self.names, &self.device);
        let other_device = |index: usize, tensor| OptimError::OtherDevice {
            // The norm comes behind the parameters.
            parameter: if index < lens.len() { name(names, index) } else { "all gradients".into() },
            tensor,
            device: format!("{device:?}"),
        };
        self.state.step(self.config.kind.rule(), &self.pages, &mut work, norm, &other_device)?;
        self.updates += 1;
        Ok(order.into_iter().filter_map(|index| work[index].take()).map(|operands| operands.param).collect())
    }

    /// Checks an update's tensors.
    fn check(&self, index: usize, param: &Tensor<1>, grad: &Tensor<1>) -> Result<(), OptimError> {
        let &expected = self.lens.get(index).ok_or(OptimError::NoSuchParameter { index, count: self.lens.len() })?;
        for (what, tensor) in [("value", param), ("gradient", grad)] {
            let ([found], dtype) = (tensor.dims(), tensor.dtype());
            if found != expected {
                return Err(OptimError::Elements { parameter: self.name(index), tensor: what, expected, found });
            }
            if dtype != DType::F32 {
                return Err(OptimError::Dtype { parameter: self.name(index), tensor: what, found: dtype });
            }
        }
        Ok(())
    }

    fn name(&self, index: usize) -> String {
        name(&self.names, index)
    }

    /// The state, read back from wherever it is.
    ///
    /// # Errors
    /// [`OptimError::Device`] when the device fails.
    pub fn state(&mut self) -> Result<Vec<Moments>, OptimError> {
        let mut state = moments::zeros(&self.config, &self.lens);
        self.state.read(&mut |index, words| moments::unpack(&self.pages[index], words, &mut state))?;
        Ok(state)
    }

    /// Puts back what [`state`](Self::state) gave after `updates` updates, whatever the budget was then.
    ///
    /// # Errors
    /// The state does not fit the parameters, or is another optimizer's; nothing is changed then.
    pub fn restore(&mut self, updates: u64, state: &[Moments]) -> Result<(), OptimError> {
        moments::check(&self.config, &self.lens, state, |index| self.name(index))?;
        for (index, page) in self.pages.iter().enumerate() {
            self.state.write(index, moments::pack(page, state));
        }
        self.updates = updates;
        Ok(())
    }

    /// Moves all state to the host and gives its memory back, for a device that has just run short; returns how many
    /// bytes that were. With [`Budget::Auto`] they are left free from now on; with [`Budget::Unlimited`] nothing is
    /// moved.
    ///
    /// # Errors
    /// [`OptimError::Device`] when the device fails.
    pub fn make_room(&mut self) -> Result<u64, OptimError> {
        self.state.make_room()
    }
}

fn name(names: &[String], index: usize) -> String {
    names.get(index).cloned().unwrap_or_else(|| index.to_string())
}

/// Pages on some device.
trait State: Send {
    /// Updates the parameters of `work`. `other_device` is the error for a tensor, of the parameter at a position, that
    /// is on another device than the pages.
    fn step(
        &mut self,
        rule: Rule,
        pages: &[PageLayout],
        work: &mut [Option<Operands<Tensor<1>>>],
        norm: Tensor<1>,
        other_device: &dyn Fn(usize, &'static str) -> OptimError,
    ) -> Result<(), OptimError>;
    fn read(&mut self, read: &mut dyn FnMut(usize, &[u32])) -> Result<(), OptimError>;
    fn write(&mut self, index: usize, words: Vec<u32>);
    fn make_room(&mut self) -> Result<u64, OptimError>;
    fn paging(&self) -> Paging;
}

impl<B: Backend + Send> State for Pager<B>
where
    Pager<B>: Send,
{
    fn step(
        &mut self,
        rule: Rule,
        pages: &[PageLayout],
        work: &mut [Option<Operands<Tensor<1>>>],
        norm: Tensor<1>,
        other_device: &dyn Fn(usize, &'static str) -> OptimError,
    ) -> Result<(), OptimError> {
        let norm = self.memory.open(norm).ok_or_else(|| other_device(work.len(), "norm"))?;
        let mut opened: Vec<Option<Operands<B::Tensor>>> = Vec::with_capacity(work.len());
        for (index, operands) in work.iter_mut().enumerate() {
            opened.push(match operands.take() {
                None => None,
                Some(Operands { param, grad, scalars }) => Some(Operands {
                    param: self.memory.open_mut(param).ok_or_else(|| other_device(index, "value"))?,
                    grad: self.memory.open(grad).ok_or_else(|| other_device(index, "gradient"))?,
                    scalars,
                }),
            });
        }
        let touched = |page: &&PageLayout| page.segments.iter().any(|s| opened[s.parameter].is_some());
        let order: Vec<usize> =
            pages.iter().enumerate().filter(|(_, page)| touched(page)).map(|(index, _)| index).collect();
        self.visit(&order, |device, index, page| {
            device.update(rule, &pages[index], page, &mut opened, &norm);
        })?;
        for (operands, opened) in work.iter_mut().zip(opened) {
            *operands = opened.map(|Operands { param, grad, scalars }| Operands {
                param: B::close(param),
                grad: B::close(grad),
                scalars,
            });
        }
        Ok(())
    }

    fn read(&mut self, read: &mut dyn FnMut(usize, &[u32])) -> Result<(), OptimError> {
        Pager::read(self, read)
    }

    fn write(&mut self, index: usize, words: Vec<u32>) {
        Pager::write(self, index, words);
    }

    fn make_room(&mut self) -> Result<u64, OptimError> {
        Pager::make_room(self)
    }

    fn paging(&self) -> Paging {
        Pager::paging(self)
    }
}
