//! Parameters of the layers: frozen ones, and trained ones, which are f32 matrices and leaves of the autodiff graph while
//! training. Trained vectors are rows `[1, n]`, so that an optimizer and a checkpoint know one kind of parameter.

use crate::Pass;
use burn::module::{
    Content, Module, ModuleDisplay, ModuleDisplayDefault, ModuleMapper, ModuleVisitor, Param, ParamId, Parameter,
};
use burn::tensor::{Device, Tensor};

/// A parameter that asks for no gradient.
pub fn frozen<T: Parameter>(tensor: T) -> Param<T> {
    Param::initialized(ParamId::new(), tensor).set_require_grad(false)
}

/// A parameter that is to be trained: a leaf of the autodiff graph on an autodiff device, or after
/// [`Module::train`] or [`track`].
pub fn trainable(tensor: Tensor<2>) -> Param<Tensor<2>> {
    Param::from_tensor(tensor)
}

/// A parameter that is to be trained beside another one: recorded where the other one is recorded.
pub(crate) fn trainable_beside(tensor: Tensor<2>, other: &Param<Tensor<2>>) -> Param<Tensor<2>> {
    let device = other.lazy_device();
    match device.is_autodiff() && !tensor.is_autodiff() {
        // Burn has no other way to give a tensor the settings of an autodiff device.
        true => trainable(Tensor::zeros(tensor.shape(), (&device, tensor.dtype())) + tensor),
        false => trainable(tensor),
    }
}

/// Makes a parameter a leaf of the autodiff graph with the same values, on whatever device it is.
pub fn track(parameter: &mut Param<Tensor<2>>) {
    *parameter = parameter.clone().map(|tensor| tensor.without_autodiff().autodiff().require_grad());
}

/// A parameter as a pass takes it: recorded, or as a constant.
pub(crate) fn in_pass(parameter: &Param<Tensor<2>>, pass: Pass) -> Tensor<2> {
    match pass.tracked {
        true => parameter.val(),
        false => constant(parameter),
    }
}

/// A parameter's values without autodiff.
pub(crate) fn constant(parameter: &Param<Tensor<2>>) -> Tensor<2> {
    parameter.val().without_autodiff()
}

/// Runs a map of matrices `[tokens, features]` on a tensor of any rank, whose leading dimensions are the tokens.
pub(crate) fn flattened<const D: usize>(x: Tensor<D>, map: impl FnOnce(Tensor<2>) -> Tensor<2>) -> Tensor<D> {
    let mut shape = x.shape();
    let features = shape[D - 1];
    let tokens = shape.num_elements() / features.max(1);
    let y = map(x.reshape([tokens, features]));
    shape[D - 1] = y.dims()[1];
    y.reshape(shape)
}

/// A value that follows from parameters and is kept while they stay as they are. Burn's traversals that change or
/// replace parameters (an optimizer's step, a record, another device) drop the value.
#[derive(Clone, Debug, Default)]
pub(crate) struct Derived<T>(pub(crate) Option<T>);

impl<T: Clone + Send + std::fmt::Debug> Module for Derived<T> {
    fn collect_devices(&self, devices: Vec<Device>) -> Vec<Device> {
        devices
    }

    fn fork(self, _: &Device) -> Self {
        Self(None)
    }

    fn to_device(self, _: &Device) -> Self {
        Self(None)
    }

    fn train(self) -> Self {
        Self(None)
    }

    fn valid(&self) -> Self {
        self.clone()
    }

    fn materialize(self) -> Self {
        self
    }

    fn visit<V: ModuleVisitor>(&self, _: &mut V) {}

    fn map<M: ModuleMapper>(self, _: &mut M) -> Self {
        Self(None)
    }
}

impl<T> ModuleDisplayDefault for Derived<T> {
    fn content(&self, content: Content) -> Option<Content> {
        content.optional()
    }
}

impl<T> ModuleDisplay for Derived<T> {}
