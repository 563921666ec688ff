//! Parameters of the layers: frozen ones, and trained ones, which are f32 matrices and leaves of the autodiff graph while
//! training. Trained vectors are rows `[1, n]`, so that an optimizer and a checkpoint know one kind of parameter.

use crate::Pass;
use burn::module::{
    Content, Module, ModuleDisplay, ModuleDisplayDefault, ModuleMapper, ModuleVisitor, Param, ParamId, Parameter,
};
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use std::ops::MulAssign;
use std::sync::{Arc, OnceLock};

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

/// The factor of an adapter's update: a constant for passes and optimizers.
///
/// Adapters' factors mean nothing without it, so Burn's visitors, mappers and records see it, as an integer parameter: the bits of
/// its f32 value, u32 `[1]`, on the CPU whatever device the layer is on.
#[derive(Clone, Copy, Debug)]
pub struct Scaling {
    value: f32,
    id: ParamId,
}

impl Scaling {
    /// The factor.
    pub fn get(self) -> f32 {
        self.value
    }

    fn parameter(self) -> Param<Tensor<1, Int>> {
        Param::initialized(self.id, Self::tensor(self.value))
    }

    /// The factor as a parameter holds it.
    pub(crate) fn tensor(value: f32) -> Tensor<1, Int> {
        Tensor::from_data(TensorData::new(vec![value.to_bits()], [1]), (&Device::flex(), DType::U32))
    }

    /// The factor that a parameter holds.
    pub(crate) fn value(tensor: Tensor<1, Int>) -> f32 {
        let bits = tensor.try_into_vec_as::<u32>().ok().and_then(|bits| bits.first().copied());
        // Nothing that Burn's traversals do loses the value; if a mapper of somebody else's does, results show it.
        bits.map_or(f32::NAN, f32::from_bits)
    }
}

impl From<f32> for Scaling {
    fn from(value: f32) -> Self {
        Self { value, id: ParamId::new() }
    }
}

impl MulAssign<f32> for Scaling {
    fn mul_assign(&mut self, factor: f32) {
        self.value *= factor;
    }
}

impl Module for Scaling {
    fn collect_devices(&self, devices: Vec<Device>) -> Vec<Device> {
        devices
    }

    fn fork(self, _: &Device) -> Self {
        self
    }

    fn to_device(self, _: &Device) -> Self {
        self
    }

    fn train(self) -> Self {
        self
    }

    fn valid(&self) -> Self {
        *self
    }

    fn materialize(self) -> Self {
        self
    }

    fn visit<V: ModuleVisitor>(&self, visitor: &mut V) {
        visitor.visit_int(&self.parameter());
    }

    fn map<M: ModuleMapper>(self, mapper: &mut M) -> Self {
        Self { value: Self::value(mapper.map_int(self.parameter()).val()), id: self.id }
    }
}

impl ModuleDisplayDefault for Scaling {
    fn content(&self, content: Content) -> Option<Content> {
        content.add_formatted(&self.value).optional()
    }
}

impl ModuleDisplay for Scaling {}

/// A value that follows from parameters, worked out when it is first asked for and kept while they stay as they are. Burn's
/// traversals that change or replace parameters (an optimizer's step, a record, another device) drop it; clones share it
/// until then.
#[derive(Clone, Debug)]
pub(crate) struct Derived<T>(Arc<OnceLock<T>>);

impl<T> Default for Derived<T> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<T: Clone> Derived<T> {
    /// A value that is known.
    pub(crate) fn of(value: T) -> Self {
        Self(Arc::new(value.into()))
    }

    /// The value, if there is one.
    pub(crate) fn get(&self) -> Option<T> {
        self.0.get().cloned()
    }

    /// The value, which is worked out where there is none.
    pub(crate) fn get_or(&self, value: impl FnOnce() -> T) -> T {
        self.0.get_or_init(value).clone()
    }
}

impl<T: Clone + Send + Sync + std::fmt::Debug> Module for Derived<T> {
    fn collect_devices(&self, devices: Vec<Device>) -> Vec<Device> {
        devices
    }

    fn fork(self, _: &Device) -> Self {
        Self::default()
    }

    fn to_device(self, _: &Device) -> Self {
        Self::default()
    }

    fn train(self) -> Self {
        Self::default()
    }

    fn valid(&self) -> Self {
        self.clone()
    }

    fn materialize(self) -> Self {
        self
    }

    fn visit<V: ModuleVisitor>(&self, _: &mut V) {}

    fn map<M: ModuleMapper>(self, _: &mut M) -> Self {
        Self::default()
    }
}

impl<T> ModuleDisplayDefault for Derived<T> {
    fn content(&self, content: Content) -> Option<Content> {
        content.optional()
    }
}

impl<T> ModuleDisplay for Derived<T> {}
