//! LoRA adapters of a decoder: attach fresh ones, load and export PEFT's, merge.

use crate::ModelError;
use crate::decoder::Decoder;
use adapter_io::{Adapter, AdapterConfig, HostTensor, TargetModules as PeftModules};
use burn::tensor::{DType, FloatDType, Tensor, TensorData};
use qlora_layers::ops::matmul;
use qlora_layers::target_modules::{Target, resolve};
use qlora_layers::{FrozenLinear, LoraAdapter, LoraConfig, TargetModules};

impl Decoder {
    /// The adapters that `config` asks for on this model.
    ///
    /// # Errors
    /// A setting is out of range, or nothing matches (the message lists the candidates).
    pub fn lora_targets(&self, config: &LoraConfig) -> Result<Vec<Target>, ModelError> {
        Ok(resolve(config, &self.config.linear_modules())?)
    }

    /// Puts fresh adapters on the layers that `config` names, in place of any that are there. Their initial
    /// values depend on `seed` and their number alone. Returns how many.
    ///
    /// # Errors
    /// As [`lora_targets`](Self::lora_targets).
    pub fn attach_lora(&mut self, config: &LoraConfig, seed: u64) -> Result<usize, ModelError> {
        let targets = self.lora_targets(config)?;
        let device = self.device.clone();
        let mut index = 0;
        for (path, linear) in self.linears_mut() {
            linear.adapter = targets.iter().find(|target| target.path == path).map(|target| {
                let adapter = LoraAdapter::new(
                    linear.base.shape(),
                    target.rank,
                    target.scaling,
                    config.dropout,
                    index,
                    seed,
                    &device,
                );
                index += 1;
                adapter
            });
        }
        Ok(targets.len())
    }

    /// Puts a PEFT adapter on this model, in place of any that is there.
    ///
    /// # Errors
    /// The adapter uses a feature beyond plain LoRA, names a module that this model lacks, or a factor has
    /// the wrong shape. The model's adapters are unchanged then.
    pub fn load_adapter(&mut self, adapter: &Adapter) -> Result<(), ModelError> {
        let config = &adapter.config;
        if let Some(feature) = config.beyond_plain_lora().first() {
            return Err(ModelError::AdapterFeature { feature: (*feature).into() });
        }
        let modules = adapter.modules();
        let paths: Vec<String> = self.linears().map(|(path, _)| path).collect();
        if let Some(unknown) = modules.iter().find(|module| !paths.contains(module)) {
            return Err(ModelError::AdapterModule { module: unknown.clone() });
        }
        let mut loaded = self.clone();
        let device = loaded.device.clone();
        let mut index = 0;
        for (path, linear) in loaded.linears_mut() {
            linear.adapter = None;
            let Some((lora_a, lora_b)) = adapter.lora(&path) else { continue };
            let upload = |factor: &HostTensor, name: &str| match factor.shape.as_slice() {
                &[rows, columns] => {
                    Ok(Tensor::from_data(TensorData::new(factor.data.clone(), [rows, columns]), (&device, DType::F32)))
                }
                _ => Err(ModelError::WeightShape {
                    module: format!("{path}.{name}"),
                    expected: vec![0, 0],
                    found: factor.shape.clone(),
                }),
            };
            let scaling = config.scaling_for(&path)? as f32;
            let (lora_a, lora_b) = (upload(lora_a, "lora_A")?, upload(lora_b, "lora_B")?);
            linear.set_adapter(
                &path,
                LoraAdapter { lora_a, lora_b, scaling, dropout: config.lora_dropout as f32, index },
            )?;
            index += 1;
        }
        *self = loaded;
        Ok(())
    }

    /// The adapters with their paths, in the order of their numbers.
    pub fn adapters(&self) -> impl Iterator<Item = (String, &LoraAdapter)> {
        self.linears().filter_map(|(path, linear)| Some((path, linear.adapter.as_ref()?)))
    }

    /// The adapters with their paths, in the order of their numbers.
    pub fn adapters_mut(&mut self) -> impl Iterator<Item = (String, &mut LoraAdapter)> {
        self.linears_mut().filter_map(|(path, linear)| Some((path, linear.adapter.as_mut()?)))
    }

    /// Number of trainable values.
    pub fn num_trainable(&self) -> usize {
        self.adapters().map(|(_, adapter)| adapter.num_params()).sum()
    }

    /// The adapters as PEFT stores them; `base_model` is what `adapter_config.json` names as the base.
    ///
    /// # Errors
    /// The device fails to hand a factor over.
    pub fn export_adapter(
        &self,
        config: &LoraConfig,
        base_model: &str,
        revision: Option<&str>,
    ) -> Result<Adapter, ModelError> {
        let paths: Vec<String> = self.adapters().map(|(path, _)| path).collect();
        let mut adapter = Adapter::new(peft_config(config, &paths, base_model, revision));
        for (path, lora) in self.adapters() {
            adapter.insert_lora(&path, host_tensor(&lora.lora_a)?, host_tensor(&lora.lora_b)?)?;
        }
        Ok(adapter)
    }

    /// Adds every adapter's update to its dense weight, `W + scaling * lora_b lora_a` in f32, and removes the adapters.
    ///
    /// # Errors
    /// A base is quantized: rounding the sum to 4 bits again would change what the adapter does, so merging
    /// belongs on the full-precision base. The model is unchanged then.
    pub fn merge_adapters(&mut self) -> Result<(), ModelError> {
        let quantized = self
            .linears()
            .find(|(_, linear)| linear.adapter.is_some() && matches!(linear.base, FrozenLinear::Quantized(_)));
        if let Some((module, _)) = quantized {
            return Err(ModelError::MergeQuantized { module });
        }
        let dtype = self.dtype;
        for (_, linear) in self.linears_mut() {
            let Some(adapter) = linear.adapter.take() else { continue };
            let LoraAdapter { lora_a, lora_b, scaling, .. } = adapter;
            let update = matmul(lora_b.without_autodiff(), lora_a.without_autodiff()).mul_scalar(scaling);
            linear.base = FrozenLinear::Dense((linear.base.to_dense(FloatDType::F32) + update).cast(dtype));
        }
        Ok(())
    }
}

/// A factor on the host.
fn host_tensor(factor: &Tensor<2>) -> Result<HostTensor, ModelError> {
    let shape = factor.dims().to_vec();
    let data =
        factor.clone().without_autodiff().try_into_vec_as::<f32>().map_err(|e| ModelError::Device(e.to_string()))?;
    Ok(HostTensor { shape, data })
}

/// The configuration in PEFT's terms. `"all-linear"` becomes the names it stood for, as PEFT saves it.
fn peft_config(config: &LoraConfig, paths: &[String], base_model: &str, revision: Option<&str>) -> AdapterConfig {
    let modules = |modules: &TargetModules| match modules {
        TargetModules::Names(names) => PeftModules::List(names.clone()),
        TargetModules::Pattern(pattern) => PeftModules::Pattern(pattern.clone()),
        TargetModules::AllLinear => {
            let mut names: Vec<String> = Vec::new();
            for path in paths {
                let name = path.rsplit('.').next().unwrap_or(path);
                if !names.iter().any(|n| n == name) {
                    names.push(name.into());
                }
            }
            PeftModules::List(names)
        }
    };
    AdapterConfig {
        base_model_name_or_path: Some(base_model.into()),
        revision: revision.map(Into::into),
        task_type: Some("CAUSAL_LM".into()),
        r: config.rank,
        lora_alpha: f64::from(config.alpha),
        lora_dropout: shortest(config.dropout),
        use_rslora: config.use_rslora,
        target_modules: Some(modules(&config.target_modules)),
        exclude_modules: config.exclude_modules.as_ref().map(modules),
        rank_pattern: config.rank_pattern.iter().map(|(key, rank)| (key.clone(), *rank as f64)).collect(),
        alpha_pattern: config.alpha_pattern.iter().map(|(key, alpha)| (key.clone(), shortest(*alpha))).collect(),
        layers_to_transform: config.layers_to_transform.clone().map(Into::into),
        ..AdapterConfig::default()
    }
}

/// The f64 that prints like the given f32: 0.1 and not 0.10000000149.
fn shortest(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::from(value))
}
