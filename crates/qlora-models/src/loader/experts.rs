//! Experts, from a tensor for each projection of each expert, or from stacked ones.

use super::Loader;
use crate::ModelError;
use crate::config::{ExpertsSpecs, LinearSpec};
use crate::family::Scores;
use crate::mlp::Mlp;
use crate::moe::Moe;
use crate::named::Named;
use crate::router::SigmoidScores;
use crate::shared_expert::SharedExpert;
use burn::tensor::{DType, Tensor, TensorData};
use qlora_layers::LoraLinear;

impl Loader<'_> {
    /// Experts, from a tensor for each or from stacked ones.
    pub(super) fn experts(&mut self, index: usize, specs: ExpertsSpecs) -> Result<Moe, ModelError> {
        let ExpertsSpecs { config, names, router, experts, shared } = specs;
        let block = self.file_name(&self.config.block_path(index));
        let stacked = [names.stacked_gate_up, names.stacked_down].map(|name| format!("{block}.{name}"));
        let activation = self.config.activation;
        let (router, experts) = if self.config.family.interleaved_experts && self.source.contains(&stacked[0]) {
            (self.linear(router)?, self.interleaved(&stacked, experts)?)
        } else if self.source.contains(&stacked[0]) {
            let weight = format!("{block}.{}", names.stacked_router);
            let base = self.frozen_linear(&weight, &router)?;
            let router = Named { path: router.path, module: LoraLinear::frozen(base, None) };
            let load = |(expert, [gate, up, down]): (usize, [LinearSpec; 3])| {
                Ok(Mlp {
                    gate_up: vec![
                        self.stacked(&stacked[0], 2 * expert, [config.count, 2], gate)?,
                        self.stacked(&stacked[0], 2 * expert + 1, [config.count, 2], up)?,
                    ],
                    down: self.stacked(&stacked[1], expert, [config.count, 1], down)?,
                    activation,
                })
            };
            (router, experts.into_iter().enumerate().map(load).collect::<Result<_, ModelError>>()?)
        } else {
            let router = self.linear(router)?;
            let load = |[gate, up, down]: [LinearSpec; 3]| {
                Ok(Mlp { gate_up: vec![self.linear(gate)?, self.linear(up)?], down: self.linear(down)?, activation })
            };
            (router, experts.into_iter().map(load).collect::<Result<_, ModelError>>()?)
        };
        let shared = match shared {
            Some(([gate, up, down], own_gate)) => {
                let gate_up = vec![self.linear(gate)?, self.linear(up)?];
                let mlp = Mlp { gate_up, down: self.linear(down)?, activation };
                Some(SharedExpert { mlp, gate: own_gate.map(|gate| self.linear(gate)).transpose()? })
            }
            None => None,
        };
        let sigmoid = match (config.sigmoid, names.scores) {
            (Some(scores), Scores::Sigmoid { correction, .. }) => {
                let correction = self.values(&format!("{block}.{correction}"), &[config.count])?;
                Some(SigmoidScores::new(scores, correction, config.normalise, self.device))
            }
            _ => None,
        };
        Ok(Moe::new(router, experts, config.per_token, config.normalise, shared, sigmoid))
    }

    /// Experts of stacked tensors with inputs first: gate and input projection in columns that take turns, then the output projection,
    /// and the biases of both.
    fn interleaved(
        &mut self,
        [gate_up, down]: &[String; 2],
        specs: Vec<[LinearSpec; 3]>,
    ) -> Result<Vec<Mlp>, ModelError> {
        let (count, activation) = (specs.len(), self.config.activation);
        let Some([[width, hidden], ..]) = specs.first().map(|specs| [0, 1, 2].map(|i| specs[i].shape)) else {
            return Ok(Vec::new());
        };
        let gate_up_bias = self.values(&format!("{gate_up}_bias"), &[count, 2 * width])?;
        let down_bias = self.values(&format!("{down}_bias"), &[count, hidden])?;
        let load = |(expert, [gate, up, out]): (usize, [LinearSpec; 3])| {
            let of_expert = &gate_up_bias[expert * 2 * width..][..2 * width];
            let turns = |first: usize| of_expert.iter().skip(first).step_by(2).copied().collect::<Vec<f32>>();
            Ok(Mlp {
                gate_up: vec![
                    self.turned(gate_up, [expert, count], [0, 2], gate, turns(0))?,
                    self.turned(gate_up, [expert, count], [1, 2], up, turns(1))?,
                ],
                down: self.turned(
                    down,
                    [expert, count],
                    [0, 1],
                    out,
                    down_bias[expert * hidden..][..hidden].to_vec(),
                )?,
                activation,
            })
        };
        specs.into_iter().enumerate().map(load).collect()
    }

    /// Every `step`-th column from `first` on of an expert's matrix, as the rows of a weight, with its bias.
    fn turned(
        &mut self,
        name: &str,
        [expert, count]: [usize; 2],
        [first, step]: [usize; 2],
        spec: LinearSpec,
        bias: Vec<f32>,
    ) -> Result<Named<LoraLinear>, ModelError> {
        let [rows, columns] = spec.shape;
        let shape = [count, columns, step * rows];
        let whole = self.source.tensor(name, &shape)?;
        let wrong =
            || ModelError::WeightShape { module: name.into(), expected: shape.into(), found: whole.shape.clone() };
        let matrix = whole.part(expert, count, &shape[1..]).ok_or_else(wrong)?;
        let tensor = matrix.turned(first, step).ok_or_else(wrong)?;
        self.read.insert(name.into());
        let base = self.weight(&tensor, &spec)?;
        if expert + 1 == count && first + 1 == step {
            self.source.release(name);
        }
        let place = (self.device, DType::from(self.options.dtype));
        let bias = Tensor::from_data(TensorData::new(bias, [rows]), place);
        Ok(Named { path: spec.path, module: LoraLinear::frozen(base, Some(bias)) })
    }

    /// Part `part` of a tensor that holds the weights of all experts, one or two for each, along its first dimensions.
    fn stacked(
        &mut self,
        name: &str,
        part: usize,
        [experts, each]: [usize; 2],
        spec: LinearSpec,
    ) -> Result<Named<LoraLinear>, ModelError> {
        let [rows, columns] = spec.shape;
        let shape = [experts, each * rows, columns];
        let whole = self.source.tensor(name, &shape)?;
        let wrong =
            || ModelError::WeightShape { module: name.into(), expected: shape.into(), found: whole.shape.clone() };
        let tensor = whole.part(part, experts * each, &spec.shape).ok_or_else(wrong)?;
        self.read.insert(name.into());
        let base = self.weight(&tensor, &spec)?;
        if part + 1 == experts * each {
            self.source.release(name);
        }
        Ok(Named { path: spec.path, module: LoraLinear::frozen(base, None) })
    }
}
