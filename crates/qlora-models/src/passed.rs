//! What a block reads beside the output of the block before it: keys and values of an earlier block, and inputs of its own.
//!
//! A pass over all blocks that is recorded as a whole has one graph, in which gradients of both find their way. With activation
//! checkpointing each half of a block has a graph of its own: what it reads is a leaf there, and the leaf's gradient waits here for
//! the graph of who made it.

use burn::tensor::{Gradients, Tensor};
use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Keys and values of a block, `[tokens, kv_heads * head_dim]` each.
pub(crate) type KeysAndValues = [Tensor<2>; 2];

/// What passes between the blocks of one pass.
#[derive(Debug, Default)]
pub(crate) struct Passed(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// By the block that made them.
    keys: BTreeMap<usize, Keys>,
    inputs: Option<Inputs>,
}

#[derive(Debug)]
struct Keys {
    /// As blocks read them.
    values: KeysAndValues,
    /// As their block gave them when it was last recorded.
    made: KeysAndValues,
    /// The leaves of blocks whose gradients are yet to come.
    leaves: Vec<KeysAndValues>,
    gradients: Option<KeysAndValues>,
}

/// The inputs of all blocks side by side, `[tokens, blocks * width]`.
#[derive(Debug)]
struct Inputs {
    all: Tensor<2>,
    width: usize,
    /// Leaves with the block and the first token.
    leaves: Vec<(usize, usize, Tensor<2>)>,
    /// Gradients by block and first token.
    gradients: BTreeMap<(usize, usize), Tensor<2>>,
}

/// How a block's evaluation is recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Graph {
    /// With those of the other blocks, or not at all.
    Whole,
    /// By itself; in a pass that does not record there is none.
    Apart { tracked: bool },
}

impl Graph {
    /// A tensor as a block reads it: its own in one graph, a leaf of another.
    fn read(self, tensor: &Tensor<2>) -> Tensor<2> {
        let alone = || tensor.clone().without_autodiff().autodiff();
        match self {
            Self::Whole => tensor.clone(),
            Self::Apart { tracked: true } => alone().require_grad(),
            Self::Apart { tracked: false } => alone(),
        }
    }
}

impl Passed {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps what block number `block` made for later blocks.
    pub fn hand_on(&self, block: usize, made: &KeysAndValues, graph: Graph) {
        let mut state = self.state();
        let values = match graph {
            Graph::Whole => made.clone(),
            Graph::Apart { .. } => made.clone().map(Tensor::without_autodiff),
        };
        match state.keys.get_mut(&block) {
            // What is evaluated again gives what it gave before: readers have leaves of that.
            Some(keys) if graph != Graph::Whole => keys.made = made.clone(),
            _ => {
                let keys = Keys { values, made: made.clone(), leaves: Vec::new(), gradients: None };
                state.keys.insert(block, keys);
            }
        }
    }

    /// What block number `block` made.
    ///
    /// # Panics
    /// When it has not run in this pass.
    pub fn keys_of(&self, block: usize, graph: Graph) -> KeysAndValues {
        let mut state = self.state();
        let keys = state.keys.get_mut(&block);
        let keys = keys.unwrap_or_else(|| panic!("block {block} has not run, and a later one takes its keys"));
        let read = [0, 1].map(|i| graph.read(&keys.values[i]));
        if graph == (Graph::Apart { tracked: true }) {
            keys.leaves.push(read.clone());
        }
        read
    }

    /// What block number `block` made when it was last recorded, with the gradients in it.
    pub fn handed_on(&self, block: usize) -> Vec<(Tensor<2>, Tensor<2>)> {
        let mut state = self.state();
        let Some(keys) = state.keys.get_mut(&block) else { return Vec::new() };
        let gradients = keys.gradients.take().into_iter().flatten();
        keys.made.clone().into_iter().zip(gradients).filter(|(made, _)| made.is_tracked()).collect()
    }

    /// Keeps the inputs of all blocks, `width` columns for each.
    pub fn give_inputs(&self, all: Tensor<2>, width: usize) {
        let (leaves, gradients) = Default::default();
        self.state().inputs = Some(Inputs { all, width, leaves, gradients });
    }

    /// Block number `block`'s input of tokens `start..start + len`.
    ///
    /// # Panics
    /// When there are none: the pass was not begun with its tokens.
    pub fn input_of(&self, block: usize, start: usize, len: usize, graph: Graph) -> Tensor<2> {
        let mut state = self.state();
        let inputs = state.inputs.as_mut();
        let inputs = inputs.unwrap_or_else(|| panic!("a pass over this model begins with Decoder::begin"));
        let part = |all: Tensor<2>| all.narrow(0, start, len).narrow(1, block * inputs.width, inputs.width);
        if graph == Graph::Whole {
            return part(inputs.all.clone());
        }
        // A leaf is the part that is read, and not all that it is a part of.
        let leaf = graph.read(&part(inputs.all.clone().without_autodiff()));
        if graph == (Graph::Apart { tracked: true }) && inputs.all.is_tracked() {
            inputs.leaves.push((block, start, leaf.clone()));
        }
        leaf
    }

    /// Takes the gradients of leaves out of a backward pass.
    pub fn collect(&self, grads: &mut Gradients) {
        let mut state = self.state();
        let State { keys, inputs } = &mut *state;
        for keys in keys.values_mut() {
            let gradients = &mut keys.gradients;
            keys.leaves.retain(|leaves| {
                let [Some(k), Some(v)] = leaves.each_ref().map(|leaf| leaf.grad_remove(grads)) else { return true };
                *gradients = Some(match gradients.take() {
                    Some([of_k, of_v]) => [of_k + k, of_v + v],
                    None => [k, v],
                });
                false
            });
        }
        if let Some(Inputs { leaves, gradients, .. }) = inputs {
            leaves.retain(|(block, start, leaf)| match leaf.grad_remove(grads) {
                Some(grad) => {
                    gradients.insert((*block, *start), grad);
                    false
                }
                None => true,
            });
        }
    }

    /// The inputs of all blocks with their gradient, once every block has given its part of it.
    pub fn inputs_and_gradient(&self) -> Option<(Tensor<2>, Tensor<2>)> {
        let Inputs { all, width, gradients, .. } = self.state().inputs.take()?;
        let blocks = all.dims()[1] / width;
        let of_block = |block: usize| -> Option<Tensor<2>> {
            let parts: Vec<_> = gradients.range((block, 0)..(block + 1, 0)).map(|(_, grad)| grad.clone()).collect();
            (!parts.is_empty()).then(|| Tensor::cat(parts, 0))
        };
        let grads = (0..blocks).map(of_block).collect::<Option<Vec<_>>>()?;
        all.is_tracked().then(|| (all, Tensor::cat(grads, 1)))
    }
}
