//! A backward pass from a given gradient.
//!
//! Burn starts backward passes from ones. The usual way around it, `(output * grad).sum().backward()`, writes the
//! product, sums it, spreads ones and multiplies again: four passes over the activations for a number that is never
//! used. Here one operation stands at the root, whose backward hands the gradient on.

use burn::backend::autodiff::{
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients as Collected,
    ops::{Backward, Ops, OpsKind},
};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch, TensorMetadata, backend_extension};
use burn::tensor::{FloatDType, Gradients, Shape, Tensor};

/// The operation at the root.
#[backend_extension(Cube, Flex, Autodiff)]
pub trait SeedOps: Backend {
    /// A one-element tensor whose value is unspecified; calling backward on it gives `output` the gradient `grad`.
    fn root(output: FloatTensor<Self>, _grad: FloatTensor<Self>) -> FloatTensor<Self> {
        Self::float_empty(Shape::new([1]), &output.device(), FloatDType::F32)
    }
}

impl SeedOps for burn_cubecl::CubeBackend {}

impl SeedOps for burn::backend::Flex {}

#[derive(Debug)]
struct SeedBackward;

impl<B: SeedOps> Backward<B, 1> for SeedBackward {
    type State = FloatTensor<B>;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Collected, _: &mut Checkpointer) {
        // What comes from above is the one that Burn starts with.
        grads.consume::<B>(&ops.node);
        let [parent] = ops.parents;
        if let Some(parent) = parent {
            grads.register::<B>(parent.id, ops.state);
        }
    }
}

impl<B: SeedOps, C: CheckpointStrategy> SeedOps for Autodiff<B, C> {
    fn root(output: FloatTensor<Self>, grad: FloatTensor<Self>) -> FloatTensor<Self> {
        let node = output.node();
        let ((output, _output_guard), (grad, _grad_guard)) = (output.into_parts(), grad.into_parts());
        match SeedBackward.prepare::<C>([node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish(grad.clone(), B::root(output, grad)),
            OpsKind::UnTracked(prep) => prep.finish(B::root(output, grad)),
        }
    }
}

/// The backward pass of `output` from its gradient `grad`.
///
/// # Shapes
/// Both `[tokens, features]` in one dtype; `grad` without autodiff.
///
/// # Panics
/// When shapes or dtypes differ, or `output` is not tracked.
pub fn backward_from(output: Tensor<2>, grad: Tensor<2>) -> Gradients {
    root(output, grad).backward()
}

/// The backward pass of several outputs of one graph, from the gradient of each.
///
/// # Shapes
/// # Panics
/// As [`backward_from`], for each.
pub fn backward_from_all(
    (output, grad): (Tensor<2>, Tensor<2>),
    more: impl IntoIterator<Item = (Tensor<2>, Tensor<2>)>,
) -> Gradients {
    more.into_iter().fold(root(output, grad), |sum, (output, grad)| sum + root(output, grad)).backward()
}

/// One element, from which a backward pass gives `output` its gradient.
fn root(output: Tensor<2>, grad: Tensor<2>) -> Tensor<1> {
    assert_eq!(
        (output.dims(), output.dtype()),
        (grad.dims(), grad.dtype()),
        "backward_from: a gradient of another shape"
    );
    assert!(output.is_tracked(), "backward_from: the output is a constant");
    Tensor::<1>::from_dispatch(<Dispatch as SeedOps>::root(output.into_dispatch(), grad.into_dispatch()))
}
