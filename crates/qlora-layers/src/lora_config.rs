//! Settings of adapters: which layers get one, of what kind, and how it starts.

use crate::{LayerError, TargetModules};
use adapter_io::TokenIndices;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::collections::HashSet;
use std::fmt;

/// Which layers get an adapter, and of what kind. The defaults are PEFT's, with the QLoRA paper's
/// "every linear layer" (Dettmers et al., 2023, arXiv 2305.14314, section 4).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LoraConfig {
    /// Rank of the update; PEFT's `r`.
    pub rank: usize,
    /// Numerator of the scaling.
    pub alpha: f32,
    /// Probability of zeroing an input of `lora_a` in training.
    pub dropout: f32,
    /// Names, a regular expression, or `"all-linear"`.
    pub target_modules: TargetModules,
    /// Modules left out of what `target_modules` matches: names, or a regular expression.
    pub exclude_modules: Option<TargetModules>,
    /// Scale by `alpha / sqrt(rank)` instead of `alpha / rank` (Kalajdzievski, 2023, arXiv 2312.03732).
    pub use_rslora: bool,
    /// Ranks of single modules: `(pattern, rank)`, the first pattern that matches counts.
    #[serde(with = "pattern_table")]
    pub rank_pattern: Vec<(String, usize)>,
    /// Alphas of single modules: `(pattern, alpha)`, the first pattern that matches counts.
    #[serde(with = "pattern_table")]
    pub alpha_pattern: Vec<(String, f32)>,
    /// Adapt only these layers (indices from 0).
    pub layers_to_transform: Option<Vec<usize>>,
    /// Names of the lists that `layers_to_transform` counts in, such as `layers`; all numbered lists when unset.
    pub layers_pattern: Option<Vec<String>>,
    /// Train each output feature's magnitude beside the update (DoRA: Liu et al., 2024, arXiv 2402.09353).
    pub use_dora: bool,
    /// Train a bias on `lora_b`, added with the update's scaling.
    pub lora_bias: bool,
    /// Modules that are trained in full, as f32 copies, and saved with the adapter: norms, `lm_head`, `embed_tokens`, ...
    /// An entry matches a module if the module's path, or a parent's, ends with it.
    pub modules_to_save: Vec<String>,
    /// Tokens whose rows of the embedding are trained, and of an output head that shares it; or of tables by name,
    /// `embed_tokens` and `lm_head`.
    pub trainable_token_indices: Option<TokenIndices>,
    /// How the factors start.
    pub init: Initialization,
    /// Rounds of LoftQ: quantize what the factors do not hold, decompose what quantization lost.
    pub loftq_iterations: usize,
    /// EVA: a module's rank is at most `eva_rho` times its configured one; 1 leaves ranks as they are.
    pub eva_rho: f64,
    /// EVA: micro-batches of training rows whose activations are looked at.
    pub eva_batches: usize,
}

/// How the factors of an adapter start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Initialization {
    /// `lora_a` uniform in ±1/sqrt(in_features) (Kaiming with a = sqrt(5)), `lora_b` zero.
    #[default]
    Default,
    /// `lora_a` normal with standard deviation 1/rank, `lora_b` zero.
    Gaussian,
    /// The weight's principal part, which leaves the weight (PiSSA: Meng et al., 2024, arXiv 2404.02948).
    Pissa {
        /// Subspace iterations of the fast decomposition; `None` decomposes to full precision.
        iterations: Option<usize>,
    },
    /// The first columns of the weight's QR decomposition, which leave the weight (OLoRA: Büyükakyüz, 2024,
    /// arXiv 2406.01775).
    Olora,
    /// What 4-bit quantization loses of the weight, as far as the rank goes (LoftQ: Li et al., 2023, arXiv 2310.08659).
    Loftq,
    /// The principal components of the layers' inputs, with ranks where they explain most (EVA: Paischer et al., 2024,
    /// arXiv 2410.07170).
    Eva,
}

impl Initialization {
    /// Whether the frozen weight changes with it, so that the weight alone is no longer the base model's.
    pub fn changes_base(self, loftq_iterations: usize) -> bool {
        match self {
            Self::Pissa { .. } | Self::Olora => true,
            Self::Loftq => loftq_iterations > 1,
            Self::Default | Self::Gaussian | Self::Eva => false,
        }
    }
}

impl fmt::Display for Initialization {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::Gaussian => f.write_str("gaussian"),
            Self::Pissa { iterations: None } => f.write_str("pissa"),
            Self::Pissa { iterations: Some(n) } => write!(f, "pissa_niter_{n}"),
            Self::Olora => f.write_str("olora"),
            Self::Loftq => f.write_str("loftq"),
            Self::Eva => f.write_str("eva"),
        }
    }
}

impl std::str::FromStr for Initialization {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Ok(match text {
            "default" => Self::Default,
            "gaussian" => Self::Gaussian,
            "pissa" => Self::Pissa { iterations: None },
            "olora" => Self::Olora,
            "loftq" => Self::Loftq,
            "eva" => Self::Eva,
            _ => match text.strip_prefix("pissa_niter_").map(str::parse) {
                Some(Ok(n)) => Self::Pissa { iterations: Some(n) },
                _ => {
                    return Err(format!(
                        "unknown initialisation `{text}`, expected default, gaussian, pissa, pissa_niter_16, olora, loftq or eva"
                    ));
                }
            },
        })
    }
}

impl Serialize for Initialization {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Initialization {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

impl Default for LoraConfig {
    fn default() -> Self {
        Self {
            rank: 64,
            alpha: 16.0,
            dropout: 0.0,
            target_modules: TargetModules::AllLinear,
            exclude_modules: None,
            use_rslora: false,
            rank_pattern: Vec::new(),
            alpha_pattern: Vec::new(),
            layers_to_transform: None,
            layers_pattern: None,
            use_dora: false,
            lora_bias: false,
            modules_to_save: Vec::new(),
            trainable_token_indices: None,
            init: Initialization::Default,
            loftq_iterations: 1,
            eva_rho: 2.0,
            eva_batches: 8,
        }
    }
}

impl LoraConfig {
    /// Checks ranges.
    ///
    /// # Errors
    /// [`LayerError::Config`] naming the setting.
    pub fn validate(&self) -> Result<(), LayerError> {
        let bad = |field, value: String, reason| Err(LayerError::Config { field, value, reason });
        check_rank(self.rank)?;
        if let Some((pattern, rank)) = self.rank_pattern.iter().find(|(_, rank)| *rank == 0) {
            return bad("rank_pattern", format!("{pattern} = {rank}"), "every rank must be at least 1");
        }
        check_alpha(self.alpha)?;
        if let Some((pattern, alpha)) =
            self.alpha_pattern.iter().find(|(_, alpha)| !(alpha.is_finite() && *alpha > 0.0))
        {
            return bad("alpha_pattern", format!("{pattern} = {alpha}"), "every alpha must be a positive number");
        }
        check_dropout(self.dropout)?;
        if self.layers_to_transform.is_some() && matches!(self.target_modules, TargetModules::Pattern(_)) {
            // PEFT would refuse to load the adapter.
            return bad(
                "layers_to_transform",
                format!("{:?}", self.layers_to_transform.as_deref().unwrap_or_default()),
                "cannot be used when target_modules is a regular expression: name the layers in the expression",
            );
        }
        if self.layers_pattern.as_ref().is_some_and(|names| !names.is_empty()) && self.layers_to_transform.is_none() {
            return bad(
                "layers_pattern",
                format!("{:?}", self.layers_pattern.as_deref().unwrap_or_default()),
                "does nothing without layers_to_transform",
            );
        }
        if self.lora_bias && self.use_dora {
            return bad("lora_bias", "true".into(), "cannot be combined with use_dora");
        }
        if self.lora_bias && self.init != Initialization::Default {
            return bad("lora_bias", "true".into(), "needs init = \"default\"");
        }
        if self.modules_to_save.iter().any(String::is_empty) {
            return bad(
                "modules_to_save",
                format!("{:?}", self.modules_to_save),
                "an empty name would mean every module",
            );
        }
        let lists: Vec<&[u32]> = match &self.trainable_token_indices {
            None => Vec::new(),
            Some(TokenIndices::Embedding(tokens)) => vec![tokens],
            Some(TokenIndices::ByModule(modules)) => modules.values().map(Vec::as_slice).collect(),
        };
        for tokens in lists {
            let mut seen = HashSet::new();
            if let Some(twice) = tokens.iter().find(|token| !seen.insert(**token)) {
                return bad("trainable_token_indices", twice.to_string(), "a token can be named once only");
            }
        }
        if self.loftq_iterations == 0 {
            return bad("loftq_iterations", "0".into(), "must be at least 1");
        }
        if !(self.eva_rho.is_finite() && self.eva_rho >= 1.0) {
            return bad("eva_rho", self.eva_rho.to_string(), "must be at least 1");
        }
        if self.eva_batches == 0 {
            return bad("eva_batches", "0".into(), "must be at least 1");
        }
        Ok(())
    }

    /// `alpha / rank`, or `alpha / sqrt(rank)` for rsLoRA.
    pub fn scaling(&self, rank: usize, alpha: f32) -> f32 {
        crate::lora_linear_config::scaling(alpha, rank, self.use_rslora)
    }
}

fn check(holds: bool, field: &'static str, value: impl fmt::Display, reason: &'static str) -> Result<(), LayerError> {
    if holds { Ok(()) } else { Err(LayerError::Config { field, value: value.to_string(), reason }) }
}

pub(crate) fn check_rank(rank: usize) -> Result<(), LayerError> {
    // Wider than any layer.
    const LARGEST: usize = 1 << 16;
    check((1..=LARGEST).contains(&rank), "rank", rank, "must be from 1 to 65536; common ranks are 8 to 128")
}

pub(crate) fn check_alpha(alpha: f32) -> Result<(), LayerError> {
    check(alpha.is_finite() && alpha > 0.0, "alpha", alpha, "must be a positive number")
}

pub(crate) fn check_dropout(dropout: f32) -> Result<(), LayerError> {
    check((0.0..1.0).contains(&dropout), "dropout", dropout, "must be at least 0 and below 1")
}

/// `rank_pattern` and `alpha_pattern` are tables in a file and keep their order here.
mod pattern_table {
    use serde::de::{Deserializer, MapAccess, Visitor};
    use serde::ser::{SerializeMap, Serializer};
    use serde::{Deserialize, Serialize};
    use std::marker::PhantomData;

    pub fn serialize<S: Serializer, T: Serialize>(entries: &[(String, T)], serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(entries.len()))?;
        for (pattern, value) in entries {
            map.serialize_entry(pattern, value)?;
        }
        map.end()
    }

    pub fn deserialize<'de, D: Deserializer<'de>, T: Deserialize<'de>>(
        deserializer: D,
    ) -> Result<Vec<(String, T)>, D::Error> {
        struct Entries<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Entries<T> {
            type Value = Vec<(String, T)>;

            fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
                f.write_str("a table from module patterns to numbers")
            }

            fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Self::Value, M::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(entries)
            }
        }
        deserializer.deserialize_map(Entries(PhantomData))
    }
}
