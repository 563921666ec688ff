//! The optimizers one tensor at a time, as Burn's `ModuleOptimizer` and `burn-train` drive an optimizer.

use std::fmt;

use burn::optim::{LearningRate, Optimizer as BurnOptimizer, RecordState, StateSink, StateSource};
use burn::tensor::{DType, Device, Int, Tensor, TensorData};

use crate::device::{Operands, update_alone};
use crate::layout::{PageLayout, pages};
use crate::record::HostState;
use crate::{Moments, OptimError, OptimizerConfig, moments};

/// AdamW or Lion for one tensor at a time, through Burn's
/// [`Optimizer`](burn::optim::Optimizer) trait. Made by [`PagedAdamWConfig::build`](crate::PagedAdamWConfig::build) and
/// [`PagedLionConfig::build`](crate::PagedLionConfig::build); their `init` puts it into a
/// [`ModuleOptimizer`](burn::optim::ModuleOptimizer).
///
/// It gives the same bits as [`PagedOptimizer`](crate::PagedOptimizer) does without clipping. It needs a launch for every
/// parameter, and all state stays on the device.
///
/// # Panics
/// Burn's trait has no errors: a step panics with the message of an [`OptimError`] when parameter or gradient is not
/// f32, or when the state that was loaded is another optimizer's; and so does recording when the device fails.
#[derive(Clone, Debug)]
pub struct TensorwiseOptimizer {
    config: OptimizerConfig,
}

impl TensorwiseOptimizer {
    /// An optimizer with these hyper-parameters.
    pub fn new(config: OptimizerConfig) -> Self {
        Self { config }
    }

    fn try_step<const D: usize>(
        &self,
        learning_rate: f64,
        tensor: Tensor<D>,
        grad: Tensor<D>,
        state: Option<TensorState<D>>,
    ) -> Result<(Tensor<D>, TensorState<D>), OptimError> {
        let (shape, device) = (tensor.shape(), tensor.device());
        let len = shape.num_elements();
        let parameter = || format!("a tensor of shape {:?}", shape.to_vec());
        for (what, tensor) in [("value", &tensor), ("gradient", &grad)] {
            if tensor.dtype() != DType::F32 {
                return Err(OptimError::Dtype { parameter: parameter(), tensor: what, found: tensor.dtype() });
            }
        }
        if len == 0 {
            let nothing = TensorState { updates: 0, shape: shape.to_vec(), place: Place::Host(Moments::new()) };
            return Ok((tensor, state.unwrap_or(nothing)));
        }
        let layout = self.layout(len);
        let (updates, words) = match state {
            None => (0, Tensor::zeros([layout.words], (&device, DType::U32))),
            Some(state) => (state.updates, state.words(&self.config, &layout, len, &device, &parameter)?),
        };
        let scalars = self.config.scalars(updates + 1, learning_rate, 0.0);
        let operands = Operands { param: tensor.reshape([len]), grad: grad.reshape([len]), scalars };
        let updated = update_alone(&device, self.config.kind.rule(), &layout, words, operands);
        let (words, param) = updated.ok_or_else(|| OptimError::OtherDevice {
            parameter: parameter(),
            tensor: "gradient",
            device: format!("{device:?}"),
        })?;
        let place = Place::Device { words, layout };
        Ok((param.reshape(shape.clone()), TensorState { updates: updates + 1, shape: shape.to_vec(), place }))
    }

    /// A parameter's state as one page.
    fn layout(&self, len: usize) -> PageLayout {
        let mut pages = pages(&self.config, &[len], u64::MAX);
        // A page of unlimited size holds everything.
        pages.swap_remove(0)
    }
}

impl BurnOptimizer for TensorwiseOptimizer {
    type State<const D: usize> = TensorState<D>;

    fn step<const D: usize>(
        &self,
        lr: LearningRate,
        tensor: Tensor<D>,
        grad: Tensor<D>,
        state: Option<TensorState<D>>,
    ) -> (Tensor<D>, Option<TensorState<D>>) {
        match self.try_step(lr, tensor, grad, state) {
            Ok((tensor, state)) => (tensor, Some(state)),
            Err(error) => panic!("{error}"),
        }
    }

    fn to_device<const D: usize>(state: TensorState<D>, device: &Device) -> TensorState<D> {
        let place = match state.place {
            Place::Device { words, layout } => Place::Device { words: words.to_device(device), layout },
            // It goes to the parameter's device at the next step.
            place @ Place::Host(_) => place,
        };
        TensorState { place, ..state }
    }
}

/// The moments of one tensor of `D` dimensions, and how many updates made them.
#[derive(Clone)]
pub struct TensorState<const D: usize> {
    updates: u64,
    shape: Vec<usize>,
    place: Place,
}

#[derive(Clone)]
#[expect(clippy::large_enum_variant, reason = "one for each parameter, and they stay where they are")]
enum Place {
    /// A page, u32 words.
    Device { words: Tensor<1, Int>, layout: PageLayout },
    /// As it was loaded.
    Host(Moments),
}

impl<const D: usize> fmt::Debug for TensorState<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TensorState")
            .field("updates", &self.updates)
            .field("shape", &self.shape)
            .finish_non_exhaustive()
    }
}

impl<const D: usize> TensorState<D> {
    /// Updates so far.
    pub fn updates(&self) -> u64 {
        self.updates
    }

    /// The state as the words of a page of this layout.
    fn words(
        self,
        config: &OptimizerConfig,
        layout: &PageLayout,
        len: usize,
        device: &Device,
        parameter: &dyn Fn() -> String,
    ) -> Result<Tensor<1, Int>, OptimError> {
        match self.place {
            Place::Device { words, layout: ours } if ours == *layout => Ok(words),
            Place::Device { .. } => Err(OptimError::Kind { parameter: parameter(), kind: config.kind }),
            Place::Host(moments) => {
                let state = [moments];
                moments::check(config, &[len], &state, |_| parameter())?;
                let words = TensorData::new(moments::pack(layout, &state), [layout.words]);
                Ok(Tensor::from_data(words, (device, DType::U32)))
            }
        }
    }

    /// The state on the host.
    fn to_host(&self) -> HostState {
        let moments = match &self.place {
            Place::Host(moments) => moments.clone(),
            Place::Device { words, layout } => {
                let words: Vec<u32> = match words.clone().try_into_vec_as() {
                    Ok(words) => words,
                    Err(error) => panic!("reading the optimizer's state: {error}"),
                };
                moments::unpack_alone(layout, &words)
            }
        };
        HostState { updates: self.updates, shape: self.shape.clone(), moments }
    }
}

impl<const D: usize> RecordState for TensorState<D> {
    fn state_flatten(&self, prefix: &str, out: &mut StateSink) {
        self.to_host().flatten(prefix, out);
    }

    fn state_unflatten(prefix: &str, src: &mut StateSource, _device: &Device) -> Option<Self> {
        let HostState { updates, shape, moments } = HostState::unflatten(prefix, src)?;
        (shape.len() == D).then_some(Self { updates, shape, place: Place::Host(moments) })
    }
}
