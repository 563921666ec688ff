//! The optimizer: hyper-parameters, pages of state, and the device that they are on.

use std::fmt;

use burn::backend::DispatchDevice;
use burn::tensor::{DType, Device, Tensor};

use crate::budget::source_of;
use crate::config::OptimizerConfig;
use crate::device::{Backend, CubeDevice, FlexDevice};
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
        Self { config, lens: lens.to_vec(), device: device.clone(), updates: 0, pages, state }
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

    /// One step: the updated parameters, in the order of `updates`. Parameters without one stay as they are, their
    /// state too. Nothing waits for the device, unless state is moved to the host.
    ///
    /// # Errors
    /// [`OptimError::Device`] when state that was moved to the host did not arrive.
    ///
    /// # Panics
    /// When a tensor is not f32 or of another length than was given to [`new`](Self::new), or an index is not
    /// below their number or comes twice.
    pub fn step(
        &mut self,
        updates: Vec<Update>,
        learning_rate: f64,
        clip: Option<Clip>,
    ) -> Result<Vec<Tensor<1>>, OptimError> {
        self.updates += 1;
        let mut work: Vec<Option<(Tensor<1>, Tensor<1>)>> = self.lens.iter().map(|_| None).collect();
        let mut order = Vec::with_capacity(updates.len());
        for Update { index, param, grad } in updates {
            for tensor in [&param, &grad] {
                assert_eq!(tensor.dims(), [self.lens[index]], "parameter {index}: length");
                assert_eq!(tensor.dtype(), DType::F32, "parameter {index}: parameters and gradients are f32");
            }
            let before = work[index].replace((param, grad));
            assert!(before.is_none(), "parameter {index} comes twice");
            order.push(index);
        }
        let (norm, max_norm) = match clip {
            Some(Clip { norm, max_norm }) => (norm, max_norm),
            None => (Tensor::zeros([1], (&self.device, DType::F32)), 0.0),
        };
        let scalars = self.config.scalars(self.updates, learning_rate, max_norm);
        self.state.step(&self.config, &self.pages, &mut work, norm, &scalars)?;
        Ok(order.into_iter().filter_map(|index| work[index].take()).map(|(param, _)| param).collect())
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
        moments::check(&self.config, &self.lens, state)?;
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

/// Pages on some device.
trait State: Send {
    fn step(
        &mut self,
        config: &OptimizerConfig,
        pages: &[PageLayout],
        work: &mut [Option<(Tensor<1>, Tensor<1>)>],
        norm: Tensor<1>,
        scalars: &Scalars,
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
        config: &OptimizerConfig,
        pages: &[PageLayout],
        work: &mut [Option<(Tensor<1>, Tensor<1>)>],
        norm: Tensor<1>,
        scalars: &Scalars,
    ) -> Result<(), OptimError> {
        let norm = B::open(norm);
        let mut tensors: Vec<Option<(B::Tensor, B::Tensor)>> =
            work.iter_mut().map(|pair| pair.take().map(|(param, grad)| (B::open_mut(param), B::open(grad)))).collect();
        let touched = |page: &&PageLayout| page.segments.iter().any(|s| tensors[s.parameter].is_some());
        let order: Vec<usize> =
            pages.iter().enumerate().filter(|(_, page)| touched(page)).map(|(index, _)| index).collect();
        let rule = config.kind.rule();
        self.visit(&order, |device, index, page| {
            device.update(rule, &pages[index], page, &mut tensors, &norm, scalars);
        })?;
        for (pair, tensors) in work.iter_mut().zip(tensors) {
            *pair = tensors.map(|(param, grad)| (B::close(param), B::close(grad)));
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
