//! Mixture of experts (Shazeer et al., 2017, arXiv 1701.06538): a router sends each token to a few MLPs.
//!
//! Tokens are grouped by expert: an expert gathers its tokens, runs once, and its rows are put back and added
//! with the router's weights. An expert without tokens does not run. What is saved for the backward pass is the
//! rows that experts read, `per_token` times the tokens, and not one copy of everything for each expert.
//!
//! Gradients flow through the chosen weights into the router and its input, as in transformers; the choice itself has none.
//!
//! # As one, or one by one
//!
//! Experts run [as one](qlora_layers::ops::experts), a few operations whatever their number, as long as they differ in the
//! values of weights, biases and factors alone. Their frozen weights lie in one memory, of which each expert's own layer is a view,
//! from loading on. Adapters belong to the experts' own layers, with names of their own, until [`Moe::join`] makes them one
//! parameter for each projection and factor; [`Moe::part`] gives them back.
//!
//! Otherwise experts run one by one. The groups' sizes decide the shapes of the products then, so the choice of experts is
//! read back to the host, once per block and pass.

use crate::mlp::Mlp;
use crate::named::Named;
use crate::router::SigmoidScores;
use crate::shared_expert::SharedExpert;
use burn::module::{Param, ParamId};
use burn::tensor::activation::softmax;
use burn::tensor::{DType, Device, FloatDType, Int, Tensor, TensorData};
use qlora_layers::ops::experts::{expert_mlp, expert_weights, route};
use qlora_layers::streamed::Views;
use qlora_layers::{ExpertAdapters, ExpertStack, FrozenLinear, LayerError, Linear4bit, LoraLinear, Pass, frozen};

/// The projections of an expert, as paths name them.
const PROJECTIONS: usize = 3;

/// Experts in the place of a block's MLP.
#[derive(Clone, Debug)]
pub(crate) struct Moe {
    pub router: Named<LoraLinear>,
    pub experts: Vec<Mlp>,
    pub per_token: usize,
    /// Whether the weights of a token's experts are divided by their sum.
    pub normalise: bool,
    /// The expert of all tokens.
    pub shared: Option<SharedExpert>,
    /// Where scores are sigmoids, and not their softmax.
    pub sigmoid: Option<SigmoidScores>,
    /// The frozen weights of all experts' gate, up and down projections, where they can lie in one memory.
    stacks: Option<Box<[ExpertStack; PROJECTIONS]>>,
    /// The biases of these, where they have some.
    biases: Option<Box<[StackedBias; PROJECTIONS]>>,
    /// Adapters that were taken off the experts' layers.
    joined: Box<[Option<Named<ExpertAdapters>>; PROJECTIONS]>,
}

/// The biases of one projection of all experts, of which each expert's own is a view.
#[derive(Clone, Debug)]
struct StackedBias {
    /// `[experts, out_features]`.
    all: Tensor<2>,
    views: Vec<ParamId>,
}

impl Moe {
    /// Experts whose weights are brought into one memory if they can be.
    pub fn new(
        router: Named<LoraLinear>,
        experts: Vec<Mlp>,
        per_token: usize,
        normalise: bool,
        shared: Option<SharedExpert>,
        sigmoid: Option<SigmoidScores>,
    ) -> Self {
        let (stacks, biases, joined) = Default::default();
        let mut moe = Self { router, experts, per_token, normalise, shared, sigmoid, stacks, biases, joined };
        // Where they can't, experts run one by one; whoever trains is told by `join`.
        moe.stacks = moe.stack().ok();
        moe.biases = moe.stack_biases();
        moe
    }

    /// With `gradients_only` the result may be uninitialised; see [`LoraLinear::record`].
    ///
    /// # Shapes
    /// `[tokens, hidden]` in and out.
    pub fn forward(&self, x: Tensor<2>, pass: Pass, gradients_only: bool) -> Tensor<2> {
        match &self.shared {
            Some(shared) => self.routed(x.clone(), pass, gradients_only) + shared.forward(x, pass, gradients_only),
            None => self.routed(x, pass, gradients_only),
        }
    }

    /// [`forward`](Self::forward) without the expert of all tokens.
    pub fn routed(&self, x: Tensor<2>, pass: Pass, gradients_only: bool) -> Tensor<2> {
        let logits = match &self.sigmoid {
            // Their sums are kept in f32, as in transformers.
            Some(_) => self.router.module.forward_wide(x.clone(), pass),
            None => self.router.module.forward_in(x.clone(), pass).cast(FloatDType::F32),
        };
        match self.stacks.as_ref().filter(|stacks| self.is_one(stacks)) {
            Some(stacks) => self.run_as_one(stacks, x, logits, pass, gradients_only),
            None if self.is_joined() => self.clone().parted().run_one_by_one(x, logits, pass),
            None => self.run_one_by_one(x, logits, pass),
        }
    }

    fn run_as_one(
        &self,
        stacks: &[ExpertStack; PROJECTIONS],
        x: Tensor<2>,
        logits: Tensor<2>,
        pass: Pass,
        gradients_only: bool,
    ) -> Tensor<2> {
        let (routing, weights) = match &self.sigmoid {
            Some(scores) => {
                let routing = route(scores.for_choice(logits.clone()), self.per_token);
                let weights = scores.weights(logits, routing.chosen());
                (routing, weights)
            }
            None => {
                let routing = route(logits.clone(), self.per_token);
                let weights = expert_weights(logits, &routing, self.normalise);
                (routing, weights)
            }
        };
        let bias = |i: usize| self.biases.as_ref().map(|biases| biases[i].all.clone());
        let projections = [0, 1, 2].map(|i| {
            let adapters = self.joined[i].as_ref().map(|joined| &joined.module);
            stacks[i].projection(adapters, pass).with_bias(bias(i))
        });
        expert_mlp(x, weights, &routing, projections, self.experts[0].activation, gradients_only)
    }

    fn run_one_by_one(&self, x: Tensor<2>, logits: Tensor<2>, pass: Pass) -> Tensor<2> {
        let [tokens, hidden] = x.dims();
        let (dtype, device) = (x.dtype(), x.device());
        // A device that fails here fails the pass: what follows it is not a number, which every reader reports.
        let scores = match &self.sigmoid {
            Some(scores) => scores.for_choice(logits.clone()),
            None => logits.clone(),
        };
        let Ok(scores) = scores.without_autodiff().try_into_vec_as::<f32>() else {
            return x.mul_scalar(f32::NAN);
        };
        let routes = Routes::choose(&scores, self.experts.len(), self.per_token);
        let chosen = int_tensor(routes.chosen, [tokens, self.per_token], &device);
        let weights = match &self.sigmoid {
            Some(scores) => scores.weights(logits, chosen),
            None => {
                let chosen = softmax(logits, 1).gather(1, chosen);
                if self.normalise { chosen.clone() / chosen.sum_dim(1) } else { chosen }
            }
        };
        let outputs = self.experts.iter().zip(routes.groups).filter(|(_, group)| !group.is_empty());
        let outputs = outputs.map(|(expert, group)| {
            let len = group.len();
            expert.forward(x.clone().select(0, int_tensor(group, [len], &device)), pass, false)
        });
        let outputs = Tensor::cat(outputs.collect(), 0);
        let rows = outputs.select(0, int_tensor(routes.rows, [tokens * self.per_token], &device));
        let rows = rows.cast(FloatDType::F32).reshape([tokens, self.per_token, hidden]);
        (rows * weights.unsqueeze_dim::<3>(2)).sum_dim(1).reshape([tokens, hidden]).cast(dtype)
    }

    /// Every expert's layer of one projection.
    fn layers(&self, projection: usize) -> impl Iterator<Item = &Named<LoraLinear>> {
        self.experts.iter().filter_map(move |expert| expert.linears().nth(projection))
    }

    fn layers_mut(&mut self, projection: usize) -> impl Iterator<Item = &mut Named<LoraLinear>> {
        self.experts.iter_mut().filter_map(move |expert| expert.linears_mut().nth(projection))
    }

    /// Brings the frozen weights into one memory.
    fn stack(&mut self) -> Result<Box<[ExpertStack; PROJECTIONS]>, LayerError> {
        let apart = |reason: &str| LayerError::Experts { reason: reason.into() };
        if self.experts.iter().any(|expert| expert.linears().count() != PROJECTIONS) {
            return Err(apart("gate and input projection are one layer"));
        }
        let stack = |i: usize, moe: &mut Self| {
            let bases = moe.layers_mut(i).map(|layer| match &mut layer.module.base {
                FrozenLinear::Quantized(base) => Ok(base),
                FrozenLinear::Dense(_) => Err(apart("weights are not in 4 bits: turn quantization on")),
            });
            ExpertStack::new(&mut bases.collect::<Result<Vec<_>, LayerError>>()?)
        };
        Ok(Box::new([stack(0, self)?, stack(1, self)?, stack(2, self)?]))
    }

    /// Brings the biases into one memory; `None` where a layer has none.
    fn stack_biases(&mut self) -> Option<Box<[StackedBias; PROJECTIONS]>> {
        let stack = |i: usize, moe: &mut Self| {
            let biases = moe.layers(i).map(|layer| Some(layer.module.bias.as_ref()?.val().unsqueeze::<2>()));
            let all = Tensor::cat(biases.collect::<Option<Vec<_>>>()?, 0);
            let width = all.dims()[1];
            let view = |(expert, layer): (usize, &mut Named<LoraLinear>)| {
                let bias = frozen(all.clone().narrow(0, expert, 1).reshape([width]));
                let id = bias.id;
                layer.module.bias = Some(bias);
                id
            };
            Some(StackedBias { views: moe.layers_mut(i).enumerate().map(view).collect(), all })
        };
        Some(Box::new([stack(0, self)?, stack(1, self)?, stack(2, self)?]))
    }

    /// Whether the biases of a projection's layers, if there are any, are views of the stack.
    fn has_stacked_biases(&self, projection: usize) -> bool {
        let own = self.layers(projection).map(|layer| layer.module.bias.as_ref().map(|bias| bias.id));
        match &self.biases {
            Some(biases) => own.eq(biases[projection].views.iter().map(|id| Some(*id))),
            None => own.into_iter().all(|id| id.is_none()),
        }
    }

    /// Whether all experts' frozen weights lie in stacks that can be streamed.
    pub fn can_stream(&self) -> bool {
        self.stacks.as_ref().is_some_and(|stacks| stacks.iter().all(ExpertStack::can_stream))
    }

    /// The words of the experts' frozen weights.
    pub fn words(&self) -> Vec<Tensor<1, Int>> {
        self.stacks.iter().flat_map(|stacks| stacks.iter()).flat_map(ExpertStack::tensors).collect()
    }

    /// Lets the experts' frozen weights go.
    pub fn leave(&mut self) {
        let Some(mut stacks) = self.stacks.take() else { return };
        (0..).zip(stacks.iter_mut()).for_each(|(i, stack)| stack.leave(self.layers_mut(i).filter_map(quantized_mut)));
        self.stacks = Some(stacks);
    }

    /// Takes the words of a streamed block in their place.
    pub fn settle(&mut self, views: &mut Views) -> Result<(), LayerError> {
        let Some(mut stacks) = self.stacks.take() else { return Ok(()) };
        let settled = (0..)
            .zip(stacks.iter_mut())
            .try_for_each(|(i, stack)| stack.settle(self.layers_mut(i).filter_map(quantized_mut), views));
        self.stacks = Some(stacks);
        settled
    }

    /// Whether the experts' layers are views of the stacks and nothing more.
    fn is_one(&self, stacks: &[ExpertStack; PROJECTIONS]) -> bool {
        (0..).zip(stacks).all(|(i, stack)| {
            stack.holds(self.layers(i).map(|layer| bare(&layer.module))) && self.has_stacked_biases(i)
        })
    }

    /// Whether adapters were taken off the experts' layers.
    pub fn is_joined(&self) -> bool {
        self.joined.iter().any(Option::is_some)
    }

    /// Takes the adapters off the experts' layers, to be trained and run as one.
    ///
    /// # Errors
    /// Why the experts run one by one as they are; nothing has changed then.
    pub fn join(&mut self) -> Result<(), LayerError> {
        let apart = |reason: &str| Err(LayerError::Experts { reason: reason.into() });
        if self.is_joined() {
            return Ok(());
        }
        let layers = || self.experts.iter().flat_map(Mlp::linears).map(|layer| &layer.module);
        if layers().any(|layer| layer.whole.is_some()) {
            return apart("some are trained in full: leave experts out of lora.modules_to_save");
        }
        if layers().any(|layer| layer.observer.is_some()) {
            return apart("their inputs are being looked at");
        }
        let mut joined = Box::<[Option<Named<ExpertAdapters>>; PROJECTIONS]>::default();
        for (i, joined) in joined.iter_mut().enumerate() {
            let adapters: Vec<_> = self.layers(i).filter_map(|layer| layer.module.adapter.as_ref()).collect();
            if adapters.is_empty() {
                continue;
            }
            if adapters.len() != self.experts.len() {
                return apart(
                    "some have adapters and some have none: have lora's patterns match all experts of a block or none",
                );
            }
            let path = self.layers(i).next().map_or(String::new(), |layer| without_expert(&layer.path));
            *joined = Some(Named { path, module: ExpertAdapters::new(&adapters)? });
        }
        // An initialisation may have changed the weights.
        let held = |i: usize, stack: &ExpertStack| stack.holds(self.layers(i).map(|layer| quantized(&layer.module)));
        if !self.stacks.as_ref().is_some_and(|stacks| (0..).zip(stacks.iter()).all(|(i, stack)| held(i, stack))) {
            self.stacks = Some(self.stack()?);
        }
        if !(0..PROJECTIONS).all(|i| self.has_stacked_biases(i)) {
            self.biases = self.stack_biases();
            if self.biases.is_none() {
                return apart("some of their layers have biases and some have none");
            }
        }
        self.experts.iter_mut().flat_map(Mlp::linears_mut).for_each(|layer| layer.module.adapter = None);
        self.joined = joined;
        Ok(())
    }

    /// Puts the adapters back on the experts' layers.
    pub fn part(&mut self) {
        for i in 0..PROJECTIONS {
            let Some(joined) = self.joined[i].take() else { continue };
            for (layer, adapter) in self.layers_mut(i).zip(joined.module.split()) {
                layer.module.adapter = Some(adapter);
            }
        }
    }

    /// The same with the adapters on the experts' layers.
    fn parted(mut self) -> Self {
        self.part();
        self
    }

    /// What is trained of adapters that were taken off the experts' layers, by name.
    pub fn joined_parameters(&self) -> impl Iterator<Item = (String, &Tensor<2>)> {
        let joined = self.joined.iter().flatten();
        joined.flat_map(|Named { path, module }| {
            module.parameters().map(|(part, tensor)| (format!("{path}.{part}"), tensor))
        })
    }

    /// All linear layers, and as [`joined_parameters`](Self::joined_parameters).
    pub fn parts_mut(
        &mut self,
    ) -> (impl Iterator<Item = &mut Named<LoraLinear>>, impl Iterator<Item = (String, &mut Param<Tensor<2>>)>) {
        let Self { router, experts, joined, shared, .. } = self;
        let experts = experts.iter_mut().flat_map(Mlp::linears_mut);
        let shared = shared.iter_mut().flat_map(SharedExpert::linears_mut);
        let linears = std::iter::once(router).chain(experts).chain(shared);
        let joined = joined.iter_mut().flatten().flat_map(|Named { path, module }| {
            let path = &*path;
            module.parameters_mut().map(move |(part, tensor)| (format!("{path}.{part}"), tensor))
        });
        (linears, joined)
    }

    /// Starts recording what was taken off the experts' layers.
    pub fn track_joined(&mut self) {
        self.joined.iter_mut().flatten().for_each(|joined| joined.module.track());
    }

    pub fn linears(&self) -> impl Iterator<Item = &Named<LoraLinear>> {
        let shared = self.shared.iter().flat_map(SharedExpert::linears);
        std::iter::once(&self.router).chain(self.experts.iter().flat_map(Mlp::linears)).chain(shared)
    }

    pub fn linears_mut(&mut self) -> impl Iterator<Item = &mut Named<LoraLinear>> {
        let shared = self.shared.iter_mut().flat_map(SharedExpert::linears_mut);
        std::iter::once(&mut self.router).chain(self.experts.iter_mut().flat_map(Mlp::linears_mut)).chain(shared)
    }
}

/// The weight of a layer that is nothing more but for a frozen bias.
fn bare(layer: &LoraLinear) -> Option<&Linear4bit> {
    let LoraLinear { adapter: None, whole: None, observer: None, .. } = layer else { return None };
    quantized(layer)
}

fn quantized(layer: &LoraLinear) -> Option<&Linear4bit> {
    match &layer.base {
        FrozenLinear::Quantized(base) => Some(base),
        FrozenLinear::Dense(_) => None,
    }
}

fn quantized_mut(layer: &mut Named<LoraLinear>) -> Option<&mut Linear4bit> {
    match &mut layer.module.base {
        FrozenLinear::Quantized(base) => Some(base),
        FrozenLinear::Dense(_) => None,
    }
}

/// The path of a projection of all experts: that of one without the expert's number.
fn without_expert(path: &str) -> String {
    let parts: Vec<&str> = path.split('.').collect();
    let number = parts.iter().rposition(|part| part.parse::<usize>().is_ok());
    let kept = parts.iter().enumerate().filter(|(i, _)| Some(*i) != number).map(|(_, part)| *part);
    kept.collect::<Vec<_>>().join(".")
}

/// Which tokens go where.
#[derive(Debug, PartialEq, Eq)]
struct Routes {
    /// The experts of each token, the likeliest first: `[tokens, per_token]`.
    chosen: Vec<i32>,
    /// The tokens of each expert.
    groups: Vec<Vec<i32>>,
    /// Where each entry of `chosen` lies when the groups' outputs are put one after the other.
    rows: Vec<i32>,
}

impl Routes {
    /// Sends each token to the experts of its highest scores; of equal ones, to the first.
    ///
    /// # Shapes
    /// `scores` is `[tokens, experts]`.
    fn choose(scores: &[f32], experts: usize, per_token: usize) -> Self {
        let tokens = scores.len() / experts;
        let mut chosen = Vec::with_capacity(tokens * per_token);
        let mut groups = vec![Vec::new(); experts];
        let mut places = Vec::with_capacity(tokens * per_token);
        let mut order: Vec<usize> = Vec::with_capacity(experts);
        for (token, scores) in scores.chunks_exact(experts).enumerate() {
            order.clear();
            order.extend(0..experts);
            order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
            for &expert in &order[..per_token] {
                chosen.push(expert as i32);
                places.push((expert, groups[expert].len()));
                groups[expert].push(token as i32);
            }
        }
        let starts: Vec<usize> = groups
            .iter()
            .scan(0, |end, group: &Vec<i32>| {
                let start = *end;
                *end += group.len();
                Some(start)
            })
            .collect();
        let rows = places.into_iter().map(|(expert, place)| (starts[expert] + place) as i32).collect();
        Self { chosen, groups, rows }
    }
}

fn int_tensor<const D: usize>(values: Vec<i32>, shape: [usize; D], device: &Device) -> Tensor<D, Int> {
    Tensor::from_data(TensorData::new(values, shape), (device, DType::I32))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_token_reaches_its_best_experts_and_comes_back() {
        // Three tokens, four experts, two each; expert 0 gets none; the last token has equal scores.
        let scores = [0.0, 3.0, 2.0, 1.0, -1.0, 0.0, 1.0, 2.0, 0.0, 5.0, 5.0, 5.0];
        let routes = Routes::choose(&scores, 4, 2);
        assert_eq!(routes.chosen, [1, 2, 3, 2, 1, 2]);
        assert_eq!(routes.groups, [vec![], vec![0, 2], vec![0, 1, 2], vec![1]]);
        assert_eq!(routes.rows, [0, 2, 5, 3, 1, 4]);
    }

    #[test]
    fn scores_that_are_no_numbers_choose_something() {
        assert_eq!(Routes::choose(&[f32::NAN; 3], 3, 3).chosen.len(), 3);
    }
}
