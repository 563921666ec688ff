//! What blocks have beside attention and MLP: inputs of their own, experts, norms without weights, factors.

use super::Loader;
use crate::ModelError;
use crate::beside::Beside;
use crate::config::{ExpertsSpecs, LayerInputsSpec};
use crate::family::BesideNames;
use crate::layer_inputs::{LayerInput, LayerInputs, rounded};
use crate::mlp::Mlp;
use crate::norm::RmsNorm;
use burn::tensor::{DType, Tensor, TensorData};
use qlora_layers::frozen;

impl Loader<'_> {
    /// What makes the blocks' own inputs, if they have any.
    pub(super) fn layer_inputs(&mut self) -> Result<Option<LayerInputs>, ModelError> {
        let Some(LayerInputsSpec { table: (table, shape), projection, norm }) = self.config.layer_inputs_spec() else {
            return Ok(None);
        };
        let table = frozen(self.matrix(&table, shape)?);
        // transformers holds the first factor in the weight's dtype.
        let scale = rounded((norm.1 as f64).sqrt(), self.options.dtype);
        let projected_scale = 1.0 / (self.config.hidden_size as f64).sqrt();
        let (projection, norm) = (self.linear(projection)?, self.norm(norm)?);
        Ok(Some(LayerInputs { table, scale, projection, projected_scale, norm }))
    }

    /// What a block makes of its own input.
    pub(super) fn layer_input(&mut self, index: usize) -> Result<Option<LayerInput>, ModelError> {
        let Some([gate, projection]) = self.config.layer_input_specs(index) else { return Ok(None) };
        let (gate, projection) = (self.linear(gate)?, self.linear(projection)?);
        Ok(Some(LayerInput { gate, projection, activation: self.config.activation }))
    }

    /// A block's MLP.
    pub(super) fn mlp(&mut self, index: usize) -> Result<Mlp, ModelError> {
        let (gate_up, down) = self.config.mlp_specs(index);
        let (gate_up, down) = (self.linears(gate_up)?, self.linear(down)?);
        Ok(Mlp { gate_up, down, activation: self.config.activation })
    }

    /// Experts beside an MLP.
    pub(super) fn beside(
        &mut self,
        index: usize,
        specs: ExpertsSpecs,
        names: &BesideNames,
    ) -> Result<Beside, ModelError> {
        let block = self.file_name(&self.config.block_path(index));
        let [of_router, of_experts] = names.scales.map(|name| format!("{block}.{name}"));
        let (width, count) = (self.config.hidden_size, specs.config.count);
        let root = (width as f64).sqrt();
        let scale = self.values(&of_router, &[width])?.into_iter().map(|factor| (f64::from(factor) / root) as f32);
        let scale = scale.collect::<Vec<f32>>();
        let of_experts = self.values(&of_experts, &[count])?;
        let on_device = |values: Vec<f32>| {
            let len = values.len();
            Tensor::from_data(TensorData::new(values, [len]), (self.device, DType::F32))
        };
        let router_norm =
            RmsNorm { weight: on_device(scale), trained: None, eps: self.config.rms_norm_eps, offset: 0.0 };
        let of_experts = on_device(of_experts);
        let mut moe = self.experts(index, specs)?;
        moe.expert_scale = Some(of_experts);
        Ok(Beside { moe, router_norm })
    }

    /// The norm of a block's values, which has no weight in the checkpoint.
    pub(super) fn value_norm(&self, index: usize) -> Option<RmsNorm> {
        let wanted = self.config.family.value_norm && self.config.layer(index).keys_from.is_none();
        wanted.then(|| RmsNorm {
            weight: Tensor::ones([self.config.attention(index).head_dim], (self.device, DType::F32)),
            trained: None,
            eps: self.config.rms_norm_eps,
            offset: 0.0,
        })
    }

    /// What a block's output is multiplied by, where that is not 1.
    pub(super) fn block_factor(&mut self, index: usize) -> Result<Option<f64>, ModelError> {
        let Some(name) = self.config.family.block_factor else { return Ok(None) };
        let name = format!("{}.{name}", self.file_name(&self.config.block_path(index)));
        Ok(self.values(&name, &[1])?.first().map(|factor| f64::from(*factor)).filter(|factor| *factor != 1.0))
    }

    /// Projections and norms of keys and values that some files have of blocks that take those of an earlier one: nothing reads them.
    pub(super) fn unread_keys(&self) -> Vec<String> {
        let shared = (0..self.config.num_hidden_layers).filter(|index| self.config.layer(*index).keys_from.is_some());
        let of_block = |index| {
            let block = self.file_name(&self.config.block_path(index));
            ["k_proj", "v_proj", "k_norm", "v_norm"].map(|name| format!("{block}.self_attn.{name}."))
        };
        shared.flat_map(of_block).collect()
    }
}
