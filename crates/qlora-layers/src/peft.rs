//! Adapters of Burn modules as PEFT's files.
//!
//! A layer is known by its module path, which becomes PEFT's key: `base_model.model.layers.0.query.lora_A.weight` is the `lora_a` of
//! `layers.0.query`, whether that is a [`LoraLinear`] or a burn-nn layer that
//! [`apply_lora`](crate::apply_lora) adapted. Modules trained in full go by their path too, in PyTorch's layout: burn-nn's linear
//! weights are transposed, and the `gamma` and `beta` of norms are called `weight` and `bias`.

use crate::module_lora::attach;
use crate::module_paths::{Found, SCALING, adaptable, part, plain_name};
use crate::target_modules::{AdaptableModule, ModuleRole, Target, resolve, resolve_saved};
use crate::token_rows::refuse;
use crate::{FrozenLinear, Initialization, LayerError, LoraAdapter, LoraConfig, LoraLinear, Scaling, TargetModules};
use adapter_io::adapter::KEY_PREFIX;
use adapter_io::{
    Adapter, AdapterConfig, HostTensor, InitLoraWeights, LoraModule, ModuleKind, OneOrMany, Pattern,
    TargetModules as PeftModules,
};
use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{DType, Device, FloatDType, Int, Shape, Tensor, TensorData};
use nf4_quant::QuantConfig;
use serde_json::json;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;

/// The keys of `adapter_config.json` beyond plain LoRA that are implemented here.
const IMPLEMENTED: [&str; 3] = ["lora_bias", "modules_to_save", "use_dora"];

/// Reads the adapters of a module into PEFT's form. An adapted embedding must be among `target_modules` by its name:
/// `"all-linear"` does not stand for one. `config` is the one that [`apply_lora`](crate::apply_lora) took, or for layers
/// made one by one, one that says the same; `base_model` is what PEFT loads as the base.
///
/// # Errors
/// [`LayerError::OtherAdapters`] when `config` does not describe the adapters that are there; a setting is out of range; a tensor
/// can't be read from its device.
pub fn export_adapter<M: Module>(module: &M, config: &LoraConfig, base_model: &str) -> Result<Adapter, LayerError> {
    refuse(config)?;
    let found = Found::of(module);
    let saved = resolve_saved(&config.modules_to_save, &found.modules)?;
    let mut parts = Parts { saved: saved.into_iter().collect(), ..Parts::default() };
    module.visit(&mut parts);
    if let Some(error) = parts.failure {
        return Err(error);
    }
    let ranks_by = |suffix: &'static str| {
        let tensors = parts.tensors.iter();
        tensors.filter_map(move |(name, tensor)| Some((name.strip_suffix(suffix)?, tensor.shape[0])))
    };
    let linears: BTreeMap<&str, usize> = ranks_by(".lora_A.weight").collect();
    let embeddings: BTreeMap<&str, usize> = ranks_by(".lora_embedding_A").collect();
    let all: Vec<String> = found.linears.iter().cloned().chain(linears.keys().map(ToString::to_string)).collect();
    let mut modules = adaptable(&all);
    modules
        .extend(embeddings.keys().map(|path| AdaptableModule { path: path.to_string(), role: ModuleRole::Embedding }));
    let ranks: BTreeMap<&str, usize> = linears.into_iter().chain(embeddings).collect();
    let targets = resolve(config, &modules)?;
    let wanted: BTreeMap<&str, usize> = targets.iter().map(|target| (target.path.as_str(), target.rank)).collect();
    if let Some(path) = wanted.keys().chain(ranks.keys()).find(|path| wanted.get(**path) != ranks.get(**path)) {
        let rank = |ranks: &BTreeMap<&str, usize>| ranks.get(*path).copied().unwrap_or(0);
        return Err(LayerError::OtherAdapters { path: path.to_string(), expected: rank(&wanted), found: rank(&ranks) });
    }
    // A quotient that was read from a file is rounded in another place.
    let same = |a: f32, b: f32| (a - b).abs() <= 1e-6 * b.abs();
    for Target { path, scaling: expected, .. } in &targets {
        if let Some(found) = parts.scalings.get(path).filter(|found| !same(**found, *expected)) {
            return Err(LayerError::OtherScaling { path: path.clone(), expected: *expected, found: *found });
        }
    }
    let mut peft = peft_config(config, &targets);
    peft.base_model_name_or_path = Some(base_model.into());
    // PEFT would look for methods that only a causal language model of transformers has.
    peft.task_type = None;
    let mut adapter = Adapter::new(peft);
    for (name, tensor) in parts.tensors {
        adapter.tensors.insert(format!("{KEY_PREFIX}{name}"), tensor);
    }
    Ok(adapter)
}

/// [`export_adapter`] into a folder that PEFT loads: `adapter_config.json` and `adapter_model.safetensors`.
///
/// # Errors
/// As [`export_adapter`]; the folder can't be written.
pub fn save_adapter<M: Module>(
    module: &M,
    config: &LoraConfig,
    base_model: &str,
    dir: impl AsRef<Path>,
) -> Result<(), LayerError> {
    Ok(export_adapter(module, config, base_model)?.save(dir.as_ref())?)
}

/// Puts a PEFT adapter on a module. Layers that have adapters already take the file's values and scaling, and keep their own dropout;
/// burn-nn linear layers get the adapter attached, over weights that are quantized or, with `None`, stay dense.
///
/// # Errors
/// The folder can't be read or holds what is not implemented here ([`LayerError::AdapterFeature`]); it names a module that is not there
/// ([`LayerError::NoSuchModule`]) or of another shape ([`LayerError::Shape`]); the module's own adapters and the file's do not have the same
/// parts ([`LayerError::NotInModule`], [`LayerError::NotInFile`]); a weight can't be quantized.
pub fn load_adapter<M: Module>(
    module: M,
    dir: impl AsRef<Path>,
    base: impl Into<Option<QuantConfig>>,
) -> Result<M, LayerError> {
    let adapter = Adapter::load(dir.as_ref())?;
    if let Some(feature) = adapter.config.beyond_plain_lora().into_iter().find(|key| !IMPLEMENTED.contains(key)) {
        return Err(LayerError::AdapterFeature { feature: feature.into() });
    }
    if let Some(method) = adapter.config.changed_base() {
        return Err(LayerError::AdapterFeature { feature: format!("init_lora_weights = {method:?}") });
    }
    let (found, base) = (Found::of(&module), base.into());
    let modules = adapter.lora_modules()?;
    let saved: BTreeMap<String, &HostTensor> = adapter.saved_tensors().collect();
    let saved_modules: Vec<String> =
        saved.keys().filter_map(|name| name.rsplit_once('.')).map(|(module, _)| module.to_string()).collect();
    let linears: HashSet<&str> = found.linears.iter().map(String::as_str).collect();
    if let Some(module) = modules.iter().find(|module| {
        let attachable = module.kind == ModuleKind::Linear && linears.contains(module.path.as_str());
        !attachable && !found.adapted.contains(&module.path)
    }) {
        let known: Vec<String> = found.linears.iter().chain(&found.adapted).cloned().collect();
        return Err(LayerError::NoSuchModule { path: module.path.clone(), known: known.join(", ") });
    }
    let dropout = adapter.config.lora_dropout as f32;
    let by_path: HashMap<&str, (&LoraModule<'_>, u32)> =
        modules.iter().zip(0..).map(|(module, index)| (module.path.as_str(), (module, index))).collect();
    let module = attach(module, &found, &saved_modules, |path, weight| {
        let Some((part, index)) = by_path.get(path) else { return Ok(None) };
        let device = weight.device();
        let base = FrozenLinear::from_weight(weight, base.as_ref())?;
        let (lora_a, lora_b) = (matrix(part.lora_a, &device), matrix(part.lora_b, &device));
        let mut lora = LoraAdapter::from_factors(lora_a, lora_b, part.scaling, dropout, *index);
        lora.bias = part.bias.map(|bias| crate::params::trainable(matrix(bias, &device)));
        if let Some(magnitude) = part.magnitude {
            lora = lora.with_dora(&base, Some(matrix(magnitude, &device)));
        }
        let mut layer = LoraLinear::frozen(base, None);
        layer.set_adapter(path, lora)?;
        Ok(Some(layer))
    })?;
    let mut fill = Fill {
        path: Vec::new(),
        adapter: &adapter,
        adapted: &found.adapted,
        scalings: modules.iter().map(|module| (module.path.as_str(), module.scaling)).collect(),
        saved,
        placed: HashSet::new(),
        failure: None,
    };
    let module = module.map(&mut fill);
    if let Some(error) = fill.failure {
        return Err(error);
    }
    let optional = modules.iter().filter(|module| found.adapted.contains(&module.path)).flat_map(|module| {
        let bias = module.bias.map(|_| format!("{}.lora_B.bias", module.path));
        bias.into_iter().chain(module.magnitude.map(|_| format!("{}.lora_magnitude_vector", module.path)))
    });
    if let Some(name) = optional.into_iter().find(|name| !fill.placed.contains(name)) {
        return Err(LayerError::NotInModule { name });
    }
    match fill.saved.keys().find(|name| !fill.placed.contains(*name)) {
        Some(name) => Err(LayerError::NoSuchModule { path: name.clone(), known: found.modules.join(", ") }),
        None => Ok(module),
    }
}

/// Collects what an adapter's file holds.
#[derive(Default)]
struct Parts {
    path: Vec<(String, String)>,
    saved: HashSet<String>,
    /// The factors of updates, by module.
    scalings: HashMap<String, f32>,
    tensors: BTreeMap<String, HostTensor>,
    failure: Option<LayerError>,
}

impl ModuleVisitor for Parts {
    fn enter_module(&mut self, name: &str, container_type: &str) {
        self.path.push((name.into(), container_type.into()));
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let read = |tensor: Tensor<D>, name: &str| {
            let shape = tensor.shape().to_vec();
            let values = tensor.without_autodiff().cast(FloatDType::F32).try_into_vec_as::<f32>();
            let data = values.map_err(|e| LayerError::Read { what: name.into(), source: e.into() })?;
            Ok(HostTensor { shape, data })
        };
        let part = match part(&self.path) {
            Some((module, suffix)) => {
                // Rows [1, n] are vectors there.
                let vector = suffix == ".lora_B.bias" || suffix == ".lora_magnitude_vector";
                let name = format!("{module}{suffix}");
                read(param.val(), &name).map(|tensor| match vector {
                    true => (name, HostTensor { shape: vec![tensor.data.len()], data: tensor.data }),
                    false => (name, tensor),
                })
            }
            None => {
                let Some((name, transposed)) = plain_name(&self.path) else { return };
                if !name.rsplit_once('.').is_some_and(|(module, _)| self.saved.contains(module)) {
                    return;
                }
                let value = param.val();
                read(if transposed { value.swap_dims(0, D - 1) } else { value }, &name).map(|tensor| (name, tensor))
            }
        };
        match part {
            Ok((name, tensor)) => {
                self.tensors.insert(name, tensor);
            }
            Err(error) => drop(self.failure.get_or_insert(error)),
        }
    }

    fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<D, Int>>) {
        if let Some((module, SCALING)) = part(&self.path) {
            self.scalings.insert(module, Scaling::value(param.val().reshape([1])));
        }
    }
}

/// Gives parameters the values of an adapter's file.
struct Fill<'a> {
    path: Vec<(String, String)>,
    adapter: &'a Adapter,
    /// Layers that had an adapter before: those attached since were made with the file's values.
    adapted: &'a HashSet<String>,
    /// The factors of updates, by module.
    scalings: HashMap<&'a str, f32>,
    saved: BTreeMap<String, &'a HostTensor>,
    placed: HashSet<String>,
    failure: Option<LayerError>,
}

impl ModuleMapper for Fill<'_> {
    fn enter_module(&mut self, name: &str, container_type: &str) {
        self.path.push((name.into(), container_type.into()));
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let (name, tensor, transposed) = match part(&self.path) {
            Some((module, _)) if !self.adapted.contains(&module) => return param,
            Some((module, suffix)) => match self.adapter.module_tensor(&module, suffix) {
                Some(tensor) => (format!("{module}{suffix}"), tensor, false),
                None => {
                    self.failure.get_or_insert(LayerError::NotInFile { name: format!("{module}{suffix}") });
                    return param;
                }
            },
            None => match plain_name(&self.path) {
                Some((name, transposed)) => match self.saved.get(&name) {
                    Some(tensor) => (name, *tensor, transposed),
                    None => return param,
                },
                None => return param,
            },
        };
        let mut expected = param.lazy_shape().to_vec();
        if transposed {
            expected.reverse();
        }
        // Vectors are rows [1, n] here.
        let fits = tensor.shape == expected || expected.len() == 2 && expected[0] == 1 && tensor.shape == expected[1..];
        if !fits {
            self.failure.get_or_insert(LayerError::Shape { what: name, expected, found: tensor.shape.clone() });
            return param;
        }
        self.placed.insert(name);
        let data = TensorData::new(tensor.data.clone(), Shape::from(expected));
        param.map(|old| {
            let require_grad = old.is_require_grad();
            let new = Tensor::<D>::from_data(data, (&old.device(), DType::F32)).cast(old.dtype());
            let new = if transposed { new.swap_dims(0, D - 1) } else { new };
            new.set_require_grad(require_grad)
        })
    }

    fn map_int<const D: usize>(&mut self, param: Param<Tensor<D, Int>>) -> Param<Tensor<D, Int>> {
        let scaling = match part(&self.path) {
            Some((module, SCALING)) => self.scalings.get(module.as_str()),
            _ => None,
        };
        match scaling {
            Some(scaling) => param.map(|old| Scaling::tensor(*scaling).reshape(old.shape())),
            None => param,
        }
    }
}

/// A matrix, or a vector as a row, on a device.
fn matrix(tensor: &HostTensor, device: &Device) -> Tensor<2> {
    let columns = tensor.shape.last().copied().unwrap_or(1).max(1);
    let shape = [tensor.data.len() / columns, columns];
    Tensor::from_data(TensorData::new(tensor.data.clone(), shape), (device, DType::F32))
}

/// The configuration in PEFT's terms. `"all-linear"` becomes the names it stood for, as PEFT saves it, and with EVA
/// each module its own rank.
pub fn peft_config(config: &LoraConfig, targets: &[Target]) -> AdapterConfig {
    let modules = |modules: &TargetModules| match modules {
        TargetModules::Names(names) => PeftModules::List(names.clone()),
        TargetModules::Pattern(pattern) => PeftModules::Pattern(pattern.clone()),
        TargetModules::AllLinear => {
            let mut names: Vec<String> = Vec::new();
            for Target { path, .. } in targets {
                let name = path.rsplit('.').next().unwrap_or(path);
                if !names.iter().any(|n| n == name) {
                    names.push(name.into());
                }
            }
            PeftModules::List(names)
        }
    };
    let eva = config.init == Initialization::Eva;
    let init = match config.init {
        Initialization::Gaussian | Initialization::Eva => InitLoraWeights::Method(config.init.to_string()),
        // What is written is an adapter of the original base, or, for LoftQ's first round, of the quantized one:
        // any other value would have PEFT change the base when it loads the adapter.
        _ => InitLoraWeights::Default(true),
    };
    let mut peft = AdapterConfig {
        task_type: Some("CAUSAL_LM".into()),
        r: config.rank,
        lora_alpha: shortest(config.alpha),
        lora_dropout: shortest(config.dropout),
        use_rslora: config.use_rslora,
        use_dora: config.use_dora,
        lora_bias: config.lora_bias,
        init_lora_weights: init,
        target_modules: Some(modules(&config.target_modules)),
        exclude_modules: config.exclude_modules.as_ref().map(modules),
        modules_to_save: (!config.modules_to_save.is_empty()).then(|| config.modules_to_save.clone()),
        trainable_token_indices: config.trainable_token_indices.clone().filter(|tokens| !tokens.is_empty()),
        rank_pattern: config.rank_pattern.iter().map(|(key, rank)| (key.clone(), *rank as f64)).collect(),
        alpha_pattern: config.alpha_pattern.iter().map(|(key, alpha)| (key.clone(), shortest(*alpha))).collect(),
        layers_to_transform: config.layers_to_transform.clone().map(Into::into),
        layers_pattern: config.layers_pattern.clone().map(OneOrMany::Many),
        ..AdapterConfig::default()
    };
    if eva {
        let differing = |wanted: &dyn Fn(&Target) -> Option<f64>| -> Pattern {
            targets.iter().filter_map(|target| Some((target.path.clone(), wanted(target)?))).collect()
        };
        peft.target_modules = Some(PeftModules::List(targets.iter().map(|target| target.path.clone()).collect()));
        peft.rank_pattern = differing(&|t| (t.rank != config.rank).then_some(t.rank as f64));
        peft.alpha_pattern = differing(&|t| (t.alpha != config.alpha).then(|| shortest(t.alpha)));
        // The whole paths say it already, and PEFT would apply them to suffixes only.
        (peft.layers_to_transform, peft.layers_pattern, peft.exclude_modules) = (None, None, None);
        peft.eva_config = Some(json!({
            "adjust_scaling_factors": true, "label_mask_value": -100, "rho": config.eva_rho, "tau": 0.99,
            "use_label_mask": true, "whiten": false
        }));
    }
    peft
}

/// The f64 that prints like the given f32: 0.1 and not 0.10000000149.
fn shortest(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::from(value))
}
