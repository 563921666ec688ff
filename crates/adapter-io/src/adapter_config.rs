//! PEFT's `adapter_config.json`: every key of version 0.21 with its default, unknown keys kept.
//!
//! Source: `LoraConfig` and `PeftConfig` of PEFT 0.21. Keys are written sorted, indented by two, and
//! all of them, as `save_pretrained` does; a file that was only loaded and saved is unchanged, but for a flag that is
//! null, which is off and is written as `false`.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::atomic;
use crate::config_field::{Field, whole};
pub use crate::config_field::{InitLoraWeights, OneOrMany, TargetModules, TokenIndices};
use crate::error::FormatError;
use crate::json;
use crate::paths::resolve_inside;
pub use crate::pattern::Pattern;

/// The file's name.
pub(crate) const CONFIG_FILE: &str = "adapter_config.json";

/// Defines the struct, its reader and its writer from one table, so that no key can be forgotten.
macro_rules! adapter_config {
    ($( $(#[$doc:meta])* $field:ident : $type:ty = $default:expr ),* $(,)?) => {
        /// The content of `adapter_config.json`; [`Default`] gives PEFT's defaults.
        #[derive(Debug, Clone, PartialEq)]
        pub struct AdapterConfig {
            $( $(#[$doc])* pub $field: $type, )*
            /// Keys that are not in this table, kept as they were.
            pub extra: Map<String, Value>,
        }

        impl Default for AdapterConfig {
            fn default() -> Self {
                Self { $( $field: $default, )* extra: Map::new() }
            }
        }

        impl AdapterConfig {
            fn from_map(mut map: Map<String, Value>, path: &Path) -> Result<Self, FormatError> {
                let mut config = Self::default();
                $( if let Some(value) = map.shift_remove(stringify!($field)) {
                    config.$field = Field::read(value).map_err(|reason| field_error(path, stringify!($field), reason))?;
                } )*
                config.extra = map;
                Ok(config)
            }

            fn to_map(&self) -> Map<String, Value> {
                let mut map = self.extra.clone();
                $( map.insert(stringify!($field).into(), Field::write(&self.$field)); )*
                map
            }
        }
    };
}

adapter_config! {
    /// Tokens that switch an activated LoRA (aLoRA) on.
    alora_invocation_tokens: Option<Value> = None,
    /// `lora_alpha` for modules that match a key.
    alpha_pattern: Pattern = Pattern::default(),
    /// Arrow routing.
    arrow_config: Option<Value> = None,
    /// Classes to load a custom model with.
    auto_mapping: Option<Value> = None,
    /// The base model: a hub id or a folder.
    base_model_name_or_path: Option<String> = None,
    /// Which biases are trained: `none`, `all` or `lora_only`.
    bias: String = "none".into(),
    /// CorDA initialisation.
    corda_config: Option<Value> = None,
    /// Whether tied embeddings stay tied when adapted.
    ensure_weight_tying: bool = false,
    /// EVA initialisation.
    eva_config: Option<Value> = None,
    /// Modules left out although `target_modules` names them.
    exclude_modules: Option<TargetModules> = None,
    /// Whether the base stores its weights transposed, [in, out].
    fan_in_fan_out: bool = false,
    /// Whether the adapter is loaded frozen; `save_pretrained` always writes `true`.
    inference_mode: bool = true,
    /// How the factors were initialised.
    init_lora_weights: InitLoraWeights = InitLoraWeights::Default(true),
    /// KaSA.
    kasa_config: Option<Value> = None,
    /// Ranges of layers that are stacked anew.
    layer_replication: Option<Value> = None,
    /// The name of the module list that `layers_to_transform` indexes.
    layers_pattern: Option<OneOrMany<String>> = None,
    /// The layers that are adapted; all when absent.
    layers_to_transform: Option<OneOrMany<usize>> = None,
    /// LoftQ initialisation.
    loftq_config: Value = Value::Object(Map::new()),
    /// The numerator of the scaling.
    lora_alpha: f64 = 8.0,
    /// Whether `lora_b` has a bias.
    lora_bias: bool = false,
    /// Dropout on the adapter's input, in training.
    lora_dropout: f64 = 0.0,
    /// LoRA-GA initialisation.
    lora_ga_config: Option<Value> = None,
    /// Megatron's parallel layers.
    megatron_config: Option<Value> = None,
    /// Megatron's module.
    megatron_core: Option<String> = Some("megatron.core".into()),
    /// Modules that were trained in full and are saved with the adapter.
    modules_to_save: Option<Vec<String>> = None,
    /// MonteCLoRA.
    monteclora_config: Option<Value> = None,
    /// The kind of adapter; only `LORA` is read.
    peft_type: String = "LORA".into(),
    /// The version of PEFT whose format this is.
    peft_version: Option<String> = Some("0.21.0".into()),
    /// QALoRA's group size.
    qalora_group_size: Option<usize> = Some(16),
    /// The rank.
    r: usize = 8,
    /// `r` for modules that match a key.
    rank_pattern: Pattern = Pattern::default(),
    /// The revision of the base model.
    revision: Option<String> = None,
    /// The adapted modules; PEFT's default for decoders of the Llama kind is `q_proj` and `v_proj`.
    target_modules: Option<TargetModules> = None,
    /// Parameters, rather than modules, that are adapted.
    target_parameters: Option<Value> = None,
    /// What the model is for; `CAUSAL_LM` here.
    task_type: Option<String> = None,
    /// Tokens whose rows of the embedding, or of the output head, were trained.
    trainable_token_indices: Option<TokenIndices> = None,
    /// Block-diagonal LoRA.
    use_bdlora: Option<Value> = None,
    /// Weight-decomposed LoRA (DoRA).
    use_dora: bool = false,
    /// QALoRA.
    use_qalora: bool = false,
    /// Rank-stabilised scaling: alpha / sqrt(r) instead of alpha / r.
    use_rslora: bool = false,
    /// VeLoRA.
    velora_config: Option<Value> = None,
}

/// What an [`AdapterConfig`] says of a module.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ModuleScaling {
    /// The rank.
    pub rank: usize,
    /// The numerator of the scaling.
    pub alpha: f64,
    /// alpha / rank, or alpha / sqrt(rank) with `use_rslora` (Kalajdzievski, arXiv 2312.03732).
    pub scaling: f64,
}

impl AdapterConfig {
    /// Reads `adapter_config.json` from an adapter's folder.
    ///
    /// # Errors
    /// [`FormatError::NotAnAdapter`] when there is none, [`FormatError::Json`] when it is not JSON, and
    /// [`FormatError::Field`] for a value that cannot be: another `peft_type`, a rank of 0.
    pub fn load(dir: &Path) -> Result<Self, FormatError> {
        let path = resolve_inside(dir, CONFIG_FILE, dir)?.ok_or_else(|| FormatError::NotAnAdapter {
            dir: dir.to_path_buf(),
            reason: if dir.is_dir() { format!("it has no {CONFIG_FILE}") } else { "there is no such folder".into() },
        })?;
        let map: Map<String, Value> = json::read(&path)?;
        let config = Self::from_map(map, &path)?;
        config.validate(&path)?;
        Ok(config)
    }

    /// Writes `adapter_config.json` into an adapter's folder, replacing one that is there as a whole.
    ///
    /// # Errors
    /// [`FormatError::Field`] for values that PEFT would not accept, [`FormatError::Write`].
    pub fn save(&self, dir: &Path) -> Result<(), FormatError> {
        let path = dir.join(CONFIG_FILE);
        self.validate(&path)?;
        atomic::write_bytes(&path, self.to_json().as_bytes())
    }

    /// The file's text, as PEFT writes it.
    pub fn to_json(&self) -> String {
        let mut map = self.to_map();
        // PEFT declares it an integer, and its readers may insist.
        map.insert("lora_alpha".into(), whole(self.lora_alpha));
        json::to_python(&Value::Object(map))
    }

    /// Parses the file's text; `path` is named in errors.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn from_json(text: &str, path: &Path) -> Result<Self, FormatError> {
        let map = serde_json::from_str(text)
            .map_err(|e| FormatError::Json { path: path.to_path_buf(), reason: e.to_string() })?;
        let config = Self::from_map(map, path)?;
        config.validate(path)?;
        Ok(config)
    }

    /// The modules that are adapted, PEFT's default for decoders of the Llama kind where none are named.
    pub fn target_modules_or_default(&self) -> TargetModules {
        let default = || TargetModules::List(vec!["q_proj".into(), "v_proj".into()]);
        self.target_modules.clone().unwrap_or_else(default)
    }

    /// Rank and alpha of modules, in their order: those of `rank_pattern` and `alpha_pattern` where they match, else
    /// `r` and `lora_alpha`. Asking for many modules at once takes the time of reading the patterns once.
    ///
    /// # Errors
    /// [`FormatError::Field`] for a pattern that is no regular expression.
    pub fn scalings<S: AsRef<str>>(&self, modules: &[S]) -> Result<Vec<ModuleScaling>, FormatError> {
        let lookup = |field: &str, pattern: &Pattern| {
            pattern.lookup(modules).map_err(|reason| field_error(Path::new(CONFIG_FILE), field, reason))
        };
        let ranks = lookup("rank_pattern", &self.rank_pattern)?;
        let alphas = lookup("alpha_pattern", &self.alpha_pattern)?;
        let of_module = |(rank, alpha): (Option<f64>, Option<f64>)| {
            let rank = rank.map_or(self.r, |rank| rank as usize);
            let alpha = alpha.unwrap_or(self.lora_alpha);
            let divisor = if self.use_rslora { (rank as f64).sqrt() } else { rank as f64 };
            ModuleScaling { rank, alpha, scaling: alpha / divisor }
        };
        Ok(ranks.into_iter().zip(alphas).map(of_module).collect())
    }

    /// The rank of one module; [`Self::scalings`] has that of many.
    ///
    /// # Errors
    /// As [`Self::scalings`].
    pub fn rank_for(&self, module: &str) -> Result<usize, FormatError> {
        Ok(self.of_one(module)?.rank)
    }

    /// The scaling of one module; [`Self::scalings`] has that of many.
    ///
    /// # Errors
    /// As [`Self::scalings`].
    pub fn scaling_for(&self, module: &str) -> Result<f64, FormatError> {
        Ok(self.of_one(module)?.scaling)
    }

    pub(crate) fn of_one(&self, module: &str) -> Result<ModuleScaling, FormatError> {
        Ok(self.scalings(&[module])?[0])
    }

    /// The keys that are set to something other than plain LoRA: a loader that does not implement one
    /// of them must refuse the adapter, since ignoring it would change the output.
    pub fn beyond_plain_lora(&self) -> Vec<&'static str> {
        // Empty is off, as null is.
        let some = |v: &Option<Value>| match v {
            None | Some(Value::Null | Value::Bool(false)) => false,
            Some(Value::Array(list)) => !list.is_empty(),
            Some(Value::Object(map)) => !map.is_empty(),
            Some(_) => true,
        };
        [
            ("alora_invocation_tokens", some(&self.alora_invocation_tokens)),
            ("arrow_config", some(&self.arrow_config)),
            ("bias", self.bias != "none"),
            ("fan_in_fan_out", self.fan_in_fan_out),
            ("kasa_config", some(&self.kasa_config)),
            ("layer_replication", some(&self.layer_replication)),
            ("lora_bias", self.lora_bias),
            ("megatron_config", some(&self.megatron_config)),
            ("modules_to_save", self.modules_to_save.as_ref().is_some_and(|m| !m.is_empty())),
            ("monteclora_config", some(&self.monteclora_config)),
            ("target_parameters", some(&self.target_parameters)),
            ("trainable_token_indices", self.trainable_token_indices.as_ref().is_some_and(|tokens| !tokens.is_empty())),
            ("use_bdlora", some(&self.use_bdlora)),
            ("use_dora", self.use_dora),
            ("use_qalora", self.use_qalora),
            ("velora_config", some(&self.velora_config)),
        ]
        .into_iter()
        .filter_map(|(key, set)| set.then_some(key))
        .collect()
    }

    /// The initialisation, if it is one after which the adapter belongs to other weights than the base's: PEFT makes
    /// the change again whenever it loads such an adapter.
    pub fn changed_base(&self) -> Option<&str> {
        let InitLoraWeights::Method(method) = &self.init_lora_weights else { return None };
        let name = method.to_lowercase();
        let changes = name.starts_with("pissa")
            || name.starts_with("corda")
            || ["olora", "loftq", "lora_ga"].contains(&name.as_str());
        changes.then_some(method)
    }

    /// Refuses an adapter of [other weights](Self::changed_base), for what would put it on the base as it is.
    pub(crate) fn refuse_changed_base(&self) -> Result<(), FormatError> {
        let Some(method) = self.changed_base() else { return Ok(()) };
        let reason = format!(
            "\"{method}\" took the adapter's start out of the base's weights, and the adapter belongs to what was left; have PEFT convert it when it saves (path_initial_model_for_weight_conversion), and use that"
        );
        Err(field_error(Path::new(CONFIG_FILE), "init_lora_weights", reason))
    }

    fn validate(&self, path: &Path) -> Result<(), FormatError> {
        let fail = |field: &str, reason: String| Err(field_error(path, field, reason));
        if self.peft_type != "LORA" {
            return fail("peft_type", format!("`{}` adapters are not supported, only LORA", self.peft_type));
        }
        if self.r == 0 {
            return fail("r", "a rank of 0 adapts nothing; it must be at least 1".into());
        }
        if !(0.0..1.0).contains(&self.lora_dropout) {
            return fail("lora_dropout", format!("{} is not a probability in [0, 1)", self.lora_dropout));
        }
        if !["none", "all", "lora_only"].contains(&self.bias.as_str()) {
            return fail("bias", format!("`{}` is none of none, all, lora_only", self.bias));
        }
        if let Some((key, rank)) = self.rank_pattern.0.iter().find(|(_, r)| *r < 1.0 || r.fract() != 0.0) {
            return fail("rank_pattern", format!("`{key}` has rank {rank}; it must be a whole number of at least 1"));
        }
        for (field, pattern) in [("rank_pattern", &self.rank_pattern), ("alpha_pattern", &self.alpha_pattern)] {
            if let Err(reason) = pattern.check() {
                return fail(field, reason);
            }
        }
        Ok(())
    }
}

pub(crate) fn field_error(path: &Path, field: &str, reason: String) -> FormatError {
    FormatError::Field { path: PathBuf::from(path), field: field.to_string(), reason }
}
