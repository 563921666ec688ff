//! The three walks over a module that make a step.
//!
//! [`Gather`] finds gradients and checks them. [`Take`] takes the parameters out; their gradients take their place
//! meanwhile, so that the optimizer has the only handle of a parameter and may update the parameter in place. [`Put`] puts
//! the updated ones in.

use std::collections::{HashMap, HashSet};

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::optim::GradientsParams;
use burn::tensor::{DType, GradientCheckpointingStrategy, Tensor};

use crate::OptimError;

/// A parameter of the module that is trained.
pub(super) struct Found {
    pub(super) id: ParamId,
    pub(super) path: String,
    pub(super) shape: Vec<usize>,
    dtype: DType,
    /// Flat.
    pub(super) grad: Option<Tensor<1>>,
}

impl Found {
    /// Checks value and gradient.
    pub(super) fn check(&self, grad: &Tensor<1>) -> Result<(), OptimError> {
        let (expected, [found]) = (self.shape.iter().product(), grad.dims());
        let parameter = || self.path.clone();
        if found != expected {
            return Err(OptimError::Elements { parameter: parameter(), tensor: "gradient", expected, found });
        }
        for (tensor, found) in [("value", self.dtype), ("gradient", grad.dtype())] {
            if found != DType::F32 {
                return Err(OptimError::Dtype { parameter: parameter(), tensor, found });
            }
        }
        Ok(())
    }
}

/// Gathers what is trained.
pub(super) struct Gather {
    path: Vec<String>,
    grads: GradientsParams,
    found: Vec<Found>,
    seen: HashSet<ParamId>,
}

impl Gather {
    /// What of a module is trained, in the order in which the module lists it.
    pub(super) fn from<M: Module>(module: &M, grads: GradientsParams) -> Vec<Found> {
        let mut gather = Self { path: Vec::new(), grads, found: Vec::new(), seen: HashSet::new() };
        module.visit(&mut gather);
        gather.found
    }
}

impl ModuleVisitor for Gather {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let grad = self.grads.remove::<D>(param.id).map(|grad| {
            let len = grad.shape().num_elements();
            grad.without_autodiff().reshape([len])
        });
        // A parameter without a gradient in this step may have one in the next.
        let trained = grad.is_some() || param.is_require_grad();
        // One that two places share has its gradient at the first.
        if trained && self.seen.insert(param.id) {
            let (shape, dtype) = (param.shape().to_vec(), param.dtype());
            self.found.push(Found { id: param.id, path: self.path.join("."), shape, dtype, grad });
        }
    }
}

/// Takes parameters with a gradient out of the module.
pub(super) struct Take {
    pub(super) grads: HashMap<ParamId, Tensor<1>>,
    pub(super) taken: HashMap<ParamId, Taken>,
}

pub(super) struct Taken {
    pub(super) param: Tensor<1>,
    pub(super) grad: Tensor<1>,
    pub(super) context: Autodiff,
}

impl ModuleMapper for Take {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let Some(grad) = self.grads.remove(&param.id) else { return param };
        let shape = param.shape();
        let (id, tensor, mapper) = param.consume();
        let context = Autodiff::of(&tensor);
        let value = tensor.without_autodiff().reshape([shape.num_elements()]);
        self.taken.insert(id, Taken { param: value, grad: grad.clone(), context });
        Param::from_mapped_value(id, grad.reshape(shape), mapper)
    }
}

/// Puts updated parameters in.
pub(super) struct Put {
    pub(super) updated: HashMap<ParamId, (Tensor<1>, Autodiff)>,
}

impl ModuleMapper for Put {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let Some((updated, context)) = self.updated.remove(&param.id) else { return param };
        let shape = param.shape();
        let (id, _, mapper) = param.consume();
        Param::from_mapped_value(id, context.restore(updated.reshape(shape), id), mapper)
    }
}

/// How a parameter takes part in autodiff, which an update must not change.
pub(super) struct Autodiff {
    enabled: bool,
    require_grad: bool,
    distributed: bool,
    checkpointing: Option<GradientCheckpointingStrategy>,
}

impl Autodiff {
    fn of<const D: usize>(tensor: &Tensor<D>) -> Self {
        Self {
            enabled: tensor.is_autodiff(),
            require_grad: tensor.is_require_grad(),
            distributed: tensor.is_distributed(),
            checkpointing: tensor.gradient_checkpointing_strategy(),
        }
    }

    fn restore<const D: usize>(self, mut tensor: Tensor<D>, id: ParamId) -> Tensor<D> {
        if !self.enabled {
            return tensor;
        }
        tensor = tensor.autodiff();
        if let Some(strategy) = self.checkpointing {
            tensor = tensor.with_gradient_checkpointing_strategy(strategy);
        }
        if self.require_grad {
            tensor = tensor.require_grad();
        }
        if self.distributed {
            tensor = tensor.set_distributed(id);
        }
        tensor
    }
}
