//! Which modules a model has: their paths, shapes and roles, in the order in which the decoder holds them.

use super::ModelConfig;
use super::blocks::{ExpertsConfig, LayerConfig, LinearAttentionConfig};
use crate::ModelError;
use crate::family::{Experts, Linear, Norms, Root, ShortConvNames};
use qlora_layers::target_modules::{AdaptableModule, ModuleRole, resolve_saved};
use qlora_layers::{LayerError, LoraConfig};

/// A linear layer as a configuration describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinearSpec {
    /// Its path in the model.
    pub path: String,
    /// `[out_features, in_features]`.
    pub shape: [usize; 2],
    /// Whether it has a bias.
    pub bias: bool,
    /// What it is.
    pub role: LinearRole,
}

/// What a linear layer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinearRole {
    /// A projection of attention or MLP: held in 4 bits, adapted by `"all-linear"`.
    Projection,
    /// A projection of an expert: the same.
    Expert,
    /// A projection that is left dense, as [`ModelConfig::keep_dense`] was told, and adapted by `"all-linear"`.
    Dense,
    /// A router: dense, since small rounding differences change which experts are chosen, and adapted only when named.
    Router,
    /// The output head: dense, and adapted only when named.
    Head,
}

impl LinearRole {
    /// Whether the layer is held in 4 bits where the model is.
    pub fn is_quantized(self) -> bool {
        matches!(self, Self::Projection | Self::Expert)
    }
}

/// The linear layers of a block with experts.
pub(crate) struct ExpertsSpecs {
    pub config: ExpertsConfig,
    pub names: Experts,
    pub router: LinearSpec,
    /// Gate, input and output projection of each expert.
    pub experts: Vec<[LinearSpec; 3]>,
    /// Those of the expert of all tokens, and the layer that gates it.
    pub shared: Option<([LinearSpec; 3], Option<LinearSpec>)>,
}

impl ModelConfig {
    /// A block.
    pub(crate) fn layer(&self, index: usize) -> LayerConfig {
        self.layers[index]
    }

    /// Where modules of the model lie.
    pub(crate) fn root(&self) -> Root {
        self.roots[0]
    }

    /// The path of a block.
    pub(crate) fn block_path(&self, index: usize) -> String {
        format!("{}.layers.{index}", self.root().model)
    }

    /// Queries, keys and values: one linear layer per group of output widths.
    /// Of latent attention: queries, down and up or by one, then keys and values, down and up. Of linear attention: queries, keys and values
    /// as one, then the output's gate, and the rule's strength and decay; or two layers with the first two and the last two. Of a
    /// short convolution: what gives its input, its gates and what it is gated by.
    pub(crate) fn qkv_specs(&self, index: usize) -> Vec<LinearSpec> {
        let block = self.block_path(index);
        if let Some((config, names)) = self.linear_attention(index) {
            let [_, _, values] = config.widths();
            let (channels, heads) = (config.channels(), config.value_heads);
            let outputs = match names.projections {
                [_, _] => vec![channels + values, 2 * heads],
                _ => vec![channels, values, heads, heads],
            };
            let spec = |(name, out): (&&str, usize)| self.projection(&block, name, [out, self.hidden_size], false);
            return names.projections.iter().zip(outputs).map(spec).collect();
        }
        if let Some((_, names)) = self.short_convolution(index) {
            let shape = [3 * self.hidden_size, self.hidden_size];
            return vec![self.projection(&block, names.projection, shape, false)];
        }
        if let Some((config, names)) = self.latent.zip(self.family.latent) {
            let heads = self.num_attention_heads;
            let spec = |name, shape, bias: bool| self.projection(&block, name, shape, bias && self.qkv_bias);
            let queries = heads * config.query_dim();
            let mut specs = match config.query_rank {
                Some(rank) => vec![
                    spec(names.queries[0], [rank, self.hidden_size], true),
                    spec(names.queries[1], [queries, rank], false),
                ],
                None => vec![spec(names.whole_queries, [queries, self.hidden_size], false)],
            };
            specs.push(spec(names.keys[0], [config.rank + config.rotary_dim, self.hidden_size], true));
            specs.push(spec(names.keys[1], [heads * (config.plain_dim + config.value_dim), config.rank], false));
            return specs;
        }
        let mut widths = self.qkv_widths();
        if self.family.attention_gate {
            widths[0] *= 2;
        }
        let outputs = match self.family.qkv {
            [_] => vec![widths.iter().sum()],
            _ => widths.to_vec(),
        };
        let spec = |(name, out): (&&str, usize)| self.projection(&block, name, [out, self.hidden_size], self.qkv_bias);
        self.family.qkv.iter().zip(outputs).map(spec).collect()
    }

    /// The sizes and names of a block's linear attention, if it has that in the place of attention.
    pub(crate) fn linear_attention(&self, index: usize) -> Option<(LinearAttentionConfig, Linear)> {
        let found = self.linear.zip(self.family.linear);
        found.filter(|_| self.layers[index].recurrent)
    }

    /// The taps and names of a block's short convolution, if it has that in the place of attention.
    pub(crate) fn short_convolution(&self, index: usize) -> Option<(usize, ShortConvNames)> {
        let found = self.short_conv.zip(self.family.short_conv);
        found.filter(|_| self.layers[index].recurrent)
    }

    /// Widths of queries, keys and values.
    pub fn qkv_widths(&self) -> [usize; 3] {
        let keys = self.num_key_value_heads * self.head_dim;
        [self.num_attention_heads * self.head_dim, keys, keys]
    }

    /// Width of what attention gives of a head.
    pub(crate) fn value_dim(&self) -> usize {
        self.latent.map_or(self.head_dim, |latent| latent.value_dim)
    }

    /// Width of what is rotated of a head: all of it, or of latent attention a part by itself.
    pub(crate) fn rotated_dim(&self) -> usize {
        self.latent.map_or(self.head_dim, |latent| latent.rotary_dim)
    }

    /// The tensor with a block's sinks, if it has some.
    pub(crate) fn sinks(&self, index: usize) -> Option<String> {
        let name = self.family.sinks.filter(|_| !self.layers[index].recurrent)?;
        Some(format!("{}.{name}", self.block_path(index)))
    }

    /// Whether queries and keys are normalised after they are rotated.
    pub(crate) fn normalises_rotated(&self) -> bool {
        self.family.qk_norm.is_some_and(|norm| norm.rotated)
    }

    /// The attention's output projection.
    pub(crate) fn output_spec(&self, index: usize) -> LinearSpec {
        if let Some((config, names)) = self.linear_attention(index) {
            let [_, _, values] = config.widths();
            return self.projection(&self.block_path(index), names.output, [self.hidden_size, values], false);
        }
        if let Some((_, names)) = self.short_convolution(index) {
            return self.projection(&self.block_path(index), names.output, [self.hidden_size; 2], false);
        }
        let shape = [self.hidden_size, self.num_attention_heads * self.value_dim()];
        self.projection(&self.block_path(index), self.family.attention_output, shape, self.output_bias)
    }

    /// Gate and input projection of the MLP, one linear layer or two, and its output projection.
    pub(crate) fn mlp_specs(&self, index: usize) -> (Vec<LinearSpec>, LinearSpec) {
        let (block, width) = (self.block_path(index), self.intermediate_size);
        let out = if self.family.gate_up.len() == 1 { 2 * width } else { width };
        let spec = |name: &&str| self.projection(&block, name, [out, self.hidden_size], self.mlp_bias);
        let down = self.projection(&block, self.family.mlp_output, [self.hidden_size, width], self.mlp_bias);
        (self.family.gate_up.iter().map(spec).collect(), down)
    }

    /// The linear layers of a block with experts; `None` for a block without.
    pub(crate) fn experts_specs(&self, index: usize) -> Option<ExpertsSpecs> {
        let (config, names) = (self.experts?, self.family.experts?);
        if !self.layers[index].sparse {
            return None;
        }
        let (block, width) = (self.block_path(index), config.intermediate_size);
        let router = LinearSpec {
            role: LinearRole::Router,
            ..self.projection(&block, names.router, [config.count, self.hidden_size], self.family.interleaved_experts)
        };
        let mlp = |path: &str, width: usize| {
            let shapes = [[width, self.hidden_size], [width, self.hidden_size], [self.hidden_size, width]];
            std::array::from_fn(|i| {
                self.projection(path, names.projections[i], shapes[i], self.family.interleaved_experts)
            })
        };
        let expert = |expert: usize| {
            let specs: [LinearSpec; 3] = mlp(&format!("{block}.{}.{expert}", names.list), width);
            specs.map(|spec| {
                let role = if spec.role.is_quantized() { LinearRole::Expert } else { spec.role };
                LinearSpec { role, ..spec }
            })
        };
        let shared = names.shared.filter(|_| config.shared_size > 0).map(|shared| {
            let gate = shared.gate.map(|name| self.projection(&block, name, [1, self.hidden_size], false));
            (mlp(&format!("{block}.{}", shared.path), config.shared_size), gate)
        });
        Some(ExpertsSpecs { config, names, router, experts: (0..config.count).map(expert).collect(), shared })
    }

    fn projection(&self, parent: &str, name: &str, shape: [usize; 2], bias: bool) -> LinearSpec {
        let path = format!("{parent}.{name}");
        let role = if self.is_kept_dense(&path) { LinearRole::Dense } else { LinearRole::Projection };
        LinearSpec { path, shape, bias, role }
    }

    fn is_kept_dense(&self, path: &str) -> bool {
        let inside = |name: &String| format!(".{path}.").contains(&format!(".{name}."));
        self.dense.iter().any(inside)
    }

    /// Leaves linear layers dense that would be held in 4 bits: those with one of `names` in their paths, whole parts of it, as
    /// in `in_proj_a`, `layers.0.mlp` or `model.layers.3.self_attn.q_proj`.
    ///
    /// # Errors
    /// A name that is in no path.
    pub fn keep_dense(&mut self, names: &[String]) -> Result<(), ModelError> {
        for name in names {
            let named = Self { dense: vec![name.clone()], ..self.clone() };
            if !named.linear_specs().iter().any(|spec| spec.role == LinearRole::Dense) {
                return Err(ModelError::SkippedModule { name: name.clone() });
            }
        }
        self.dense.extend_from_slice(names);
        Ok(())
    }

    /// [`keep_dense`](Self::keep_dense) of small projections that much hangs on: those of strength and decay of linear attention.
    pub fn keep_sensitive_dense(&mut self) {
        let names = self.family.linear.iter().flat_map(|linear| &linear.projections[linear.projections.len() / 2..]);
        self.dense.extend(names.map(|name| (*name).to_string()));
    }

    /// Every linear layer, in the order of [`Decoder::linears`](crate::Decoder::linears).
    pub fn linear_specs(&self) -> Vec<LinearSpec> {
        let mut specs = Vec::new();
        for index in 0..self.num_hidden_layers {
            specs.extend(self.qkv_specs(index));
            specs.push(self.output_spec(index));
            match self.experts_specs(index) {
                Some(found) => {
                    specs.push(found.router);
                    specs.extend(found.experts.into_iter().flatten());
                    specs.extend(found.shared.into_iter().flat_map(|(mlp, gate)| mlp.into_iter().chain(gate)));
                }
                None => {
                    let (gate_up, down) = self.mlp_specs(index);
                    specs.extend(gate_up);
                    specs.push(down);
                }
            }
        }
        if !self.tie_word_embeddings {
            specs.push(LinearSpec {
                path: self.root().head.into(),
                shape: [self.vocab_size, self.hidden_size],
                bias: false,
                role: LinearRole::Head,
            });
        }
        specs
    }

    /// Every linear layer's path and shape `[out_features, in_features]`, in the order of
    /// [`Decoder::linears`](crate::Decoder::linears).
    pub fn linears(&self) -> Vec<(String, [usize; 2])> {
        self.linear_specs().into_iter().map(|spec| (spec.path, spec.shape)).collect()
    }

    /// Every module that can have an adapter, as target matching sees it: the linear layers, the head, also where it is
    /// the embedding table, and the embedding. `"all-linear"` leaves out the last two and routers.
    pub fn adaptable_modules(&self) -> Vec<AdaptableModule> {
        let mut modules: Vec<AdaptableModule> = self
            .linear_specs()
            .into_iter()
            .filter(|spec| spec.role != LinearRole::Head)
            .map(|LinearSpec { path, role, .. }| AdaptableModule {
                path,
                role: if role == LinearRole::Router { ModuleRole::Router } else { ModuleRole::Linear },
            })
            .collect();
        modules.push(AdaptableModule { path: self.root().head.into(), role: ModuleRole::OutputHead });
        modules.push(AdaptableModule { path: self.embed_path(), role: ModuleRole::Embedding });
        modules
    }

    /// The modules that `config` trains in full, with the number of their values.
    ///
    /// # Errors
    /// An entry of `modules_to_save` names no module.
    pub fn saved_modules(&self, config: &LoraConfig) -> Result<Vec<(String, usize)>, LayerError> {
        let table = self.vocab_size * self.hidden_size;
        let size = |spec: &LinearSpec| spec.shape[0] * (spec.shape[1] + usize::from(spec.bias));
        let linears = self.linear_specs().into_iter().map(|spec| (size(&spec), spec.path)).map(|(n, path)| (path, n));
        let mut all: Vec<(String, usize)> = linears.chain(self.norms()).chain([(self.embed_path(), table)]).collect();
        if self.tie_word_embeddings {
            all.push((self.root().head.into(), table));
        }
        let paths: Vec<String> = all.iter().map(|(path, _)| path.clone()).collect();
        let saved = resolve_saved(&config.modules_to_save, &paths)?;
        all.retain(|(path, _)| saved.contains(path));
        Ok(all)
    }

    /// The path of the embedding table.
    pub(crate) fn embed_path(&self) -> String {
        format!("{}.embed_tokens", self.root().model)
    }

    /// The norms of a block with their widths, as [`Block::norms`](crate::Block::norms) orders them.
    pub(crate) fn block_norms(&self, index: usize) -> BlockNorms<(String, usize)> {
        let block = self.block_path(index);
        let norm = |name: &str, width| (format!("{block}.{name}"), width);
        let Norms { attention_input, attention_output, mlp_input, mlp_output } = self.family.norms;
        let of_stream = |name: Option<&str>| name.map(|name| norm(name, self.hidden_size));
        let [q, k, _] = self.qkv_widths();
        let linear = self.linear_attention(index);
        let latent = self.latent.zip(self.family.latent);
        let qk = self.family.qk_norm.filter(|_| !self.layers[index].recurrent && self.qk_normed).map(|qk| {
            let widths = if qk.whole { [q, k] } else { [self.head_dim; 2] };
            std::array::from_fn(|i| norm(qk.names[i], widths[i]))
        });
        BlockNorms {
            attention_input: of_stream(attention_input),
            qk,
            linear: linear.map(|(config, names)| norm(names.norm, config.value_dim)),
            latent_queries: latent.and_then(|(config, names)| Some(norm(names.norms[0], config.query_rank?))),
            latent_keys: latent.map(|(config, names)| norm(names.norms[1], config.rank)),
            attention_output: of_stream(attention_output),
            mlp_input: of_stream(mlp_input),
            mlp_output: of_stream(mlp_output),
        }
    }

    /// The last norm with its width.
    pub(crate) fn last_norm(&self) -> (String, usize) {
        (format!("{}.{}", self.root().model, self.family.last_norm), self.hidden_size)
    }

    /// Every norm with its width, in the order of [`Decoder::norms`](crate::Decoder::norms).
    pub fn norms(&self) -> Vec<(String, usize)> {
        let mut norms: Vec<_> =
            (0..self.num_hidden_layers).flat_map(|index| self.block_norms(index).into_iter()).collect();
        norms.push(self.last_norm());
        norms
    }
}

/// The norms of a block, or something for each.
#[derive(Clone, Debug)]
pub(crate) struct BlockNorms<T> {
    pub attention_input: Option<T>,
    pub qk: Option<[T; 2]>,
    /// Of the heads that linear attention gives.
    pub linear: Option<T>,
    /// Of what lies between the projections of latent attention.
    pub latent_queries: Option<T>,
    pub latent_keys: Option<T>,
    pub attention_output: Option<T>,
    pub mlp_input: Option<T>,
    pub mlp_output: Option<T>,
}

impl<T> BlockNorms<T> {
    pub fn try_map<U, E>(self, mut f: impl FnMut(T) -> Result<U, E>) -> Result<BlockNorms<U>, E> {
        Ok(BlockNorms {
            attention_input: self.attention_input.map(&mut f).transpose()?,
            qk: match self.qk {
                Some([q, k]) => Some([f(q)?, f(k)?]),
                None => None,
            },
            linear: self.linear.map(&mut f).transpose()?,
            latent_queries: self.latent_queries.map(&mut f).transpose()?,
            latent_keys: self.latent_keys.map(&mut f).transpose()?,
            attention_output: self.attention_output.map(&mut f).transpose()?,
            mlp_input: self.mlp_input.map(&mut f).transpose()?,
            mlp_output: self.mlp_output.map(&mut f).transpose()?,
        })
    }

    pub fn into_iter(self) -> impl Iterator<Item = T> {
        self.attention_input
            .into_iter()
            .chain(self.qk.into_iter().flatten())
            .chain(self.linear)
            .chain(self.latent_queries)
            .chain(self.latent_keys)
            .chain(self.attention_output)
            .chain(self.mlp_input)
            .chain(self.mlp_output)
    }

    pub fn as_ref(&self) -> BlockNorms<&T> {
        BlockNorms {
            attention_input: self.attention_input.as_ref(),
            qk: self.qk.as_ref().map(|[q, k]| [q, k]),
            linear: self.linear.as_ref(),
            latent_queries: self.latent_queries.as_ref(),
            latent_keys: self.latent_keys.as_ref(),
            attention_output: self.attention_output.as_ref(),
            mlp_input: self.mlp_input.as_ref(),
            mlp_output: self.mlp_output.as_ref(),
        }
    }

    pub fn as_mut(&mut self) -> BlockNorms<&mut T> {
        BlockNorms {
            attention_input: self.attention_input.as_mut(),
            qk: self.qk.as_mut().map(|[q, k]| [q, k]),
            linear: self.linear.as_mut(),
            latent_queries: self.latent_queries.as_mut(),
            latent_keys: self.latent_keys.as_mut(),
            attention_output: self.attention_output.as_mut(),
            mlp_input: self.mlp_input.as_mut(),
            mlp_output: self.mlp_output.as_mut(),
        }
    }
}
