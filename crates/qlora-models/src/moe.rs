//! Mixture of experts (Shazeer et al., 2017, arXiv 1701.06538): a router sends each token to a few MLPs.
//!
//! Tokens are grouped by expert: an expert gathers its tokens, runs once, and its rows are put back and added
//! with the router's weights. An expert without tokens does not run. What is saved for the backward pass is the
//! rows that experts read, `per_token` times the tokens, and not one copy of everything for each expert.
//!
//! The groups' sizes decide the shapes of the products, so the choice of experts is read back to the host, once
//! per block and pass. Gradients flow through the chosen weights into the router and its input, as in
//! transformers; the choice itself has none.

use crate::mlp::Mlp;
use crate::named::Named;
use burn::tensor::activation::softmax;
use burn::tensor::{DType, Device, FloatDType, Int, Tensor, TensorData};
use qlora_layers::{LoraLinear, Pass};

/// Experts in the place of a block's MLP.
#[derive(Clone, Debug)]
pub(crate) struct Moe {
    pub router: Named<LoraLinear>,
    pub experts: Vec<Mlp>,
    pub per_token: usize,
    /// Whether the weights of a token's experts are divided by their sum.
    pub normalise: bool,
}

impl Moe {
    /// # Shapes
    /// `[tokens, hidden]` in and out.
    pub fn forward(&self, x: Tensor<2>, pass: Pass) -> Tensor<2> {
        let [tokens, hidden] = x.dims();
        let (dtype, device) = (x.dtype(), x.device());
        let logits = self.router.module.forward_in(x.clone(), pass).cast(FloatDType::F32);
        // A device that fails here fails the pass: what follows it is not a number, which every reader reports.
        let Ok(scores) = logits.clone().without_autodiff().try_into_vec_as::<f32>() else {
            return x.mul_scalar(f32::NAN);
        };
        let routes = Routes::choose(&scores, self.experts.len(), self.per_token);
        let chosen = softmax(logits, 1).gather(1, int_tensor(routes.chosen, [tokens, self.per_token], &device));
        let weights = match self.normalise {
            true => chosen.clone() / chosen.sum_dim(1),
            false => chosen,
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

    pub fn linears(&self) -> impl Iterator<Item = &Named<LoraLinear>> {
        std::iter::once(&self.router).chain(self.experts.iter().flat_map(Mlp::linears))
    }

    pub fn linears_mut(&mut self) -> impl Iterator<Item = &mut Named<LoraLinear>> {
        std::iter::once(&mut self.router).chain(self.experts.iter_mut().flat_map(Mlp::linears_mut))
    }
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
