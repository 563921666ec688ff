//! What model families differ in, as a table. The decoder itself is shared.
//!
//! An entry says what modules are called, which of them exist, what is computed between them, and which
//! keys of `config.json` carry the rest, with the values that transformers takes when a key is absent.
//! Entries are written as differences from `BASE`, the plainest of them.

mod dense;
mod experts;
mod hybrid;
mod latent;
mod short_conv;
mod sinks;
mod vision_text;
mod wrappers;

use crate::rope::Pairs;
pub(crate) use experts::{Experts, Scores, SharedWidth};
pub(crate) use hybrid::Linear;
pub(crate) use latent::Latent;
use qlora_layers::ops::fused::Activation;
pub(crate) use short_conv::{MlpWidth, ShortConvNames};
pub(crate) use wrappers::{SECTION, Wrapper};

/// One `model_type` of `config.json`.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Family {
    /// The value of `model_type`.
    pub model_type: &'static str,
    /// Where the language model lies in a checkpoint. The first is what modules are called; the others occur
    /// in files.
    pub roots: &'static [Root],
    /// Queries, keys and values: three projections, or one whose output holds all three in this order.
    pub qkv: &'static [&'static str],
    /// Whether those have biases.
    pub qkv_bias: Switch,
    /// Whether the attention's output projection has a bias.
    pub output_bias: Switch,
    /// The norms of queries and keys.
    pub qk_norm: Option<QkNorm>,
    /// Whether what attention gives is multiplied by the sigmoid of a gate, which the query projection gives behind the
    /// queries of each head.
    pub attention_gate: bool,
    /// Linear attention in the place of attention in most blocks.
    pub linear: Option<Linear>,
    /// The MLP's gate and its input projection: two, or one whose output holds both in this order.
    pub gate_up: &'static [&'static str],
    /// Whether the MLP's projections have biases.
    pub mlp_bias: Switch,
    /// Mixture of experts, in all blocks or some.
    pub experts: Option<Experts>,
    /// The norms around attention and MLP.
    pub norms: Norms,
    /// Added to every norm's weight.
    pub norm_offset: f64,
    /// What embeddings are multiplied by.
    pub embedding_scale: EmbeddingScale,
    /// The key with what the output of attention and MLP is multiplied by before it is added; 1 when absent.
    pub residual_scale: Option<&'static str>,
    /// The key with the activation, and what it is when absent.
    pub activation: (&'static str, Activation),
    /// The factor of attention scores.
    pub score_scale: ScoreScale,
    /// The key with the soft cap of scores, and what it is when absent.
    pub score_softcap: Option<(&'static str, Option<f64>)>,
    /// The key with the soft cap of logits, and what it is when absent.
    pub logit_softcap: Option<(&'static str, Option<f64>)>,
    /// The key with what logits are divided by; 1 when absent.
    pub logit_divisor: Option<&'static str>,
    /// Which blocks look back no further than a window.
    pub window: Window,
    /// Rotary position embeddings.
    pub rotary: Rotary,
    /// Sizes that may be absent.
    pub sizes: Sizes,
    /// `tie_word_embeddings` when absent.
    pub tied: bool,
    /// `rms_norm_eps` when absent.
    pub rms_norm_eps: f64,
    /// Keys that would change the arithmetic, with the values that leave it as this entry says.
    pub fixed: &'static [(&'static str, Only)],
    /// Keys that mean nothing for this family.
    pub harmless: &'static [&'static str],
    /// Whether there are the norms of queries and keys.
    pub qk_normed: Switch,
    /// Multi-head latent attention in the place of attention.
    pub latent: Option<Latent>,
    /// The logits of query heads that join their softmax and have no value.
    pub sinks: Option<&'static str>,
    /// Whether experts and their router have biases, and files hold experts stacked with inputs first: gate and input projection as
    /// `[experts, hidden, 2 * intermediate]`, whose columns take turns, and the output projection as `[experts, intermediate, hidden]`.
    /// Biases are behind the names of these with `_bias`.
    pub interleaved_experts: bool,
    /// Short convolutions in the place of attention in some blocks.
    pub short_conv: Option<ShortConvNames>,
    /// The attention's output projection.
    pub attention_output: &'static str,
    /// The MLP's output projection.
    pub mlp_output: &'static str,
    /// The norm before the output head.
    pub last_norm: &'static str,
    /// The key with the epsilon of norms.
    pub norm_eps_key: &'static str,
    /// Where the MLP is not as wide as `intermediate_size` says.
    pub mlp_width: Option<MlpWidth>,
    /// A key that counts in the place of `tie_word_embeddings` where it is there.
    pub tie_key: Option<&'static str>,
}

/// Where the parts of a language model lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Root {
    /// Embeddings, blocks and the last norm.
    pub model: &'static str,
    /// The output head.
    pub head: &'static str,
}

impl Root {
    /// The name of something in the model: `rest` begins with a dot.
    pub(crate) fn below(&self, rest: &str) -> String {
        // The bare model was saved without a path of its own.
        if self.model.is_empty() { rest.trim_start_matches('.').into() } else { format!("{}{rest}", self.model) }
    }

    /// Whether a tensor belongs to the model or its head.
    pub(crate) fn has(&self, tensor: &str) -> bool {
        let inside =
            |module: &str| module.is_empty() || tensor.strip_prefix(module).is_some_and(|rest| rest.starts_with('.'));
        inside(self.model) || inside(self.head)
    }
}

/// Something that a model has or has not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Switch {
    /// Always.
    On,
    /// Never.
    Off,
    /// When this key is true.
    Key(&'static str),
    /// Unless this key is false.
    Unless(&'static str),
}

/// What embeddings are multiplied by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum EmbeddingScale {
    /// Nothing.
    One,
    /// The square root of their width, in the dtype of the weights.
    SqrtWidth,
    /// The value of this key; 1 when absent.
    Key(&'static str),
}

/// The factor of attention scores.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum ScoreScale {
    /// One over the square root of the width of a head.
    HeadDim,
    /// One over the square root of this key's value, and what that is when absent.
    Scalar(&'static str, f64),
    /// This key's value; 1 when absent.
    Factor(&'static str),
}

/// Norms of queries and keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct QkNorm {
    /// Of queries and of keys.
    pub names: [&'static str; 2],
    /// Over all heads at once, and not over each by itself.
    pub whole: bool,
    /// After the rotation, and not before it.
    pub rotated: bool,
}

/// The only value of a key that is covered.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Only {
    /// A flag.
    Flag(bool),
    /// A number.
    Number(f64),
    /// A word.
    Text(&'static str),
    /// Nothing: the key has to be absent or null.
    Null,
}

/// Names of the norms of a block: what attention and MLP read may be normalised, and what they give before it is added.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Norms {
    /// Of the attention's input.
    pub attention_input: Option<&'static str>,
    /// Of the attention's output.
    pub attention_output: Option<&'static str>,
    /// Of the MLP's input.
    pub mlp_input: Option<&'static str>,
    /// Of the MLP's output.
    pub mlp_output: Option<&'static str>,
}

/// Which blocks look back no further than `sliding_window` tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Window {
    /// The blocks.
    pub blocks: Windowed,
    /// `sliding_window` when absent.
    pub width: Option<usize>,
    /// The key that has to be true for there to be a window.
    pub switch: Option<&'static str>,
}

/// The blocks with a window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Windowed {
    /// None; the keys are unknown.
    None,
    /// All.
    All,
    /// What `layer_types` says; when absent, those from this key's value on.
    From(&'static str, usize),
    /// What `layer_types` says; when absent, all but every n-th, with n from this key if there is one.
    AllButEvery(Option<&'static str>, usize),
    /// What `layer_types` says; when absent, those without rotary embeddings.
    Unrotated,
}

/// Rotary position embeddings.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Rotary {
    /// `rope_theta` when absent.
    pub theta: f64,
    /// Where blocks with a window have rotary embeddings of their own, without scaling.
    pub local: Option<Local>,
    /// `partial_rotary_factor` when absent, where the key is known.
    pub partial: Option<f64>,
    /// Which elements of a head are a pair.
    pub pairs: Pairs,
    /// The keys with the list of blocks that are rotated (1) or not (0) and with n where that is absent and every n-th is not,
    /// and what n is when absent.
    pub unrotated: Option<(&'static str, &'static str, usize)>,
    /// Whether "dynamic" with a key `alpha` means a theta that is larger by a power of it, at every length.
    pub alpha: bool,
    /// Whether queries grow with their position, by `llama_4_scaling_beta` beside the scaling.
    pub query_growth: bool,
    /// Keys beside the scaling that mean nothing for text.
    pub harmless: &'static [&'static str],
    /// Whether "yarn" and "su" are earlier names of "longrope".
    pub long_aliases: bool,
    /// `original_max_position_embeddings` when absent, where it is a key beside the scaling and not in it.
    pub original_context: Option<usize>,
    /// Whether the scaling has to be there.
    pub needs_scaling: bool,
}

/// Rotary embeddings of blocks with a window.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Local {
    /// The key with their theta, and what it is when absent.
    Theta(&'static str, f64),
    /// The theta of the other blocks.
    SameTheta,
}

/// Sizes that may be absent, the first five from a section only; `None` where they have to be there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sizes {
    /// `vocab_size`.
    pub vocab_size: Option<usize>,
    /// `hidden_size`.
    pub hidden_size: Option<usize>,
    /// `intermediate_size`.
    pub intermediate_size: Option<usize>,
    /// `num_hidden_layers`.
    pub num_hidden_layers: Option<usize>,
    /// `num_attention_heads`.
    pub num_attention_heads: Option<usize>,
    /// `num_key_value_heads`; `None` where it is the number of attention heads.
    pub num_key_value_heads: Option<usize>,
    /// `head_dim`; `None` where it is the hidden size divided by the number of heads.
    pub head_dim: Option<usize>,
    /// `max_position_embeddings`.
    pub max_position_embeddings: usize,
}

impl Sizes {
    /// What may be absent from a file that describes nothing but a language model.
    pub(crate) fn of_a_file(self) -> Self {
        let (vocab_size, hidden_size, intermediate_size) = (None, None, None);
        Self { vocab_size, hidden_size, intermediate_size, num_hidden_layers: None, num_attention_heads: None, ..self }
    }
}

/// The norms of queries and keys, of each head by itself.
const PER_HEAD: QkNorm = QkNorm { names: ["self_attn.q_norm", "self_attn.k_norm"], whole: false, rotated: false };

const SEPARATE_QKV: &[&str] = &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"];
const SEPARATE_GATE_UP: &[&str] = &["mlp.gate_proj", "mlp.up_proj"];
const PLAIN_ROOT: Root = Root { model: "model", head: "lm_head" };
/// As transformers saves a model without its head.
const BARE_ROOT: Root = Root { model: "", head: "lm_head" };
const NO_BIAS: &[(&str, Only)] = &[("attention_bias", Only::Flag(false)), ("mlp_bias", Only::Flag(false))];

/// The plainest entry: pre-normalisation, grouped queries, SwiGLU, nothing else.
const BASE: Family = Family {
    model_type: "",
    roots: &[PLAIN_ROOT, BARE_ROOT],
    qkv: SEPARATE_QKV,
    qkv_bias: Switch::Off,
    output_bias: Switch::Off,
    qk_norm: None,
    attention_gate: false,
    linear: None,
    gate_up: SEPARATE_GATE_UP,
    mlp_bias: Switch::Off,
    experts: None,
    norms: Norms {
        attention_input: Some("input_layernorm"),
        attention_output: None,
        mlp_input: Some("post_attention_layernorm"),
        mlp_output: None,
    },
    norm_offset: 0.0,
    embedding_scale: EmbeddingScale::One,
    residual_scale: None,
    activation: ("hidden_act", Activation::Silu),
    score_scale: ScoreScale::HeadDim,
    score_softcap: None,
    logit_softcap: None,
    logit_divisor: None,
    window: Window { blocks: Windowed::None, width: None, switch: None },
    rotary: Rotary {
        theta: 10_000.0,
        local: None,
        partial: None,
        pairs: Pairs::Halves,
        unrotated: None,
        alpha: false,
        query_growth: false,
        harmless: &[],
        long_aliases: false,
        original_context: None,
        needs_scaling: false,
    },
    sizes: Sizes {
        vocab_size: None,
        hidden_size: None,
        intermediate_size: None,
        num_hidden_layers: None,
        num_attention_heads: None,
        num_key_value_heads: None,
        head_dim: None,
        max_position_embeddings: 2048,
    },
    tied: false,
    rms_norm_eps: 1e-6,
    fixed: &[],
    harmless: &[],
    qk_normed: Switch::On,
    latent: None,
    sinks: None,
    interleaved_experts: false,
    short_conv: None,
    attention_output: "self_attn.o_proj",
    mlp_output: "mlp.down_proj",
    last_norm: "norm",
    norm_eps_key: "rms_norm_eps",
    mlp_width: None,
    tie_key: None,
};

const LLAMA: Family = Family {
    model_type: "llama",
    qkv_bias: Switch::Key("attention_bias"),
    output_bias: Switch::Key("attention_bias"),
    mlp_bias: Switch::Key("mlp_bias"),
    sizes: Sizes {
        vocab_size: Some(32_000),
        hidden_size: Some(4096),
        intermediate_size: Some(11_008),
        num_hidden_layers: Some(32),
        num_attention_heads: Some(32),
        ..BASE.sizes
    },
    fixed: &[("rope_interleaved", Only::Flag(false))],
    // `pretraining_tp` splits products over several devices: the same sums. The others are in files of models
    // that were converted to this type.
    harmless: &["pretraining_tp", "max_sequence_length", "is_llama_config", "transformers.js_config"],
    ..BASE
};

const MISTRAL: Family = Family {
    model_type: "mistral",
    window: Window { blocks: Windowed::All, width: Some(4096), switch: None },
    sizes: Sizes {
        intermediate_size: Some(14_336),
        num_key_value_heads: Some(8),
        max_position_embeddings: 131_072,
        ..LLAMA.sizes
    },
    fixed: NO_BIAS,
    ..BASE
};

const MIXTRAL: Family = Family {
    model_type: "mixtral",
    experts: Some(Experts {
        router: "block_sparse_moe.gate",
        list: "block_sparse_moe.experts",
        projections: ["w1", "w3", "w2"],
        width: ("intermediate_size", None),
        normalise: Switch::On,
        ..experts::ROUTED
    }),
    window: Window { blocks: Windowed::All, width: None, switch: None },
    rotary: Rotary { theta: 1_000_000.0, ..BASE.rotary },
    sizes: Sizes { num_key_value_heads: Some(8), max_position_embeddings: 131_072, ..BASE.sizes },
    rms_norm_eps: 1e-5,
    fixed: &[
        ("attention_bias", Only::Flag(false)),
        ("mlp_bias", Only::Flag(false)),
        ("router_jitter_noise", Only::Number(0.0)),
    ],
    harmless: ROUTER_LOSS,
    ..BASE
};

/// The load-balancing loss trains routers, which stay as they are here.
const ROUTER_LOSS: &[&str] = &["output_router_logits", "router_aux_loss_coef"];

const QWEN2: Family = Family {
    model_type: "qwen2",
    qkv_bias: Switch::On,
    window: Window {
        blocks: Windowed::From("max_window_layers", 28),
        width: Some(4096),
        switch: Some("use_sliding_window"),
    },
    sizes: Sizes {
        vocab_size: Some(151_936),
        intermediate_size: Some(22_016),
        num_key_value_heads: Some(32),
        max_position_embeddings: 32_768,
        ..LLAMA.sizes
    },
    fixed: &[("attention_bias", Only::Flag(true)), ("mlp_bias", Only::Flag(false)), ("use_mrope", Only::Flag(false))],
    ..BASE
};

const QWEN3: Family = Family {
    model_type: "qwen3",
    qkv_bias: Switch::Key("attention_bias"),
    output_bias: Switch::Key("attention_bias"),
    qk_norm: Some(PER_HEAD),
    sizes: Sizes { head_dim: Some(128), ..QWEN2.sizes },
    fixed: &[("mlp_bias", Only::Flag(false))],
    ..QWEN2
};

const QWEN3_MOE: Family = Family {
    model_type: "qwen3_moe",
    experts: Some(Experts {
        count: (&["num_local_experts", "num_experts"], 128),
        per_token: ("num_experts_per_tok", 8),
        width: ("moe_intermediate_size", Some(768)),
        normalise: Switch::Key("norm_topk_prob"),
        dense_blocks: Some("mlp_only_layers"),
        every: Some("decoder_sparse_step"),
        ..experts::ROUTED
    }),
    window: Window { blocks: Windowed::All, ..QWEN2.window },
    sizes: Sizes { num_key_value_heads: Some(4), head_dim: None, ..QWEN3.sizes },
    fixed: &[
        ("mlp_bias", Only::Flag(false)),
        ("qkv_bias", Only::Flag(false)),
        ("use_qk_norm", Only::Flag(true)),
        ("shared_expert_intermediate_size", Only::Number(0.0)),
    ],
    harmless: &["output_router_logits", "router_aux_loss_coef", "max_window_layers"],
    ..QWEN3
};

const GEMMA2: Family = Family {
    model_type: "gemma2",
    qkv_bias: Switch::Key("attention_bias"),
    output_bias: Switch::Key("attention_bias"),
    norms: Norms {
        attention_input: Some("input_layernorm"),
        attention_output: Some("post_attention_layernorm"),
        mlp_input: Some("pre_feedforward_layernorm"),
        mlp_output: Some("post_feedforward_layernorm"),
    },
    norm_offset: 1.0,
    embedding_scale: EmbeddingScale::SqrtWidth,
    activation: ("hidden_activation", Activation::GeluTanh),
    score_scale: ScoreScale::Scalar("query_pre_attn_scalar", 256.0),
    score_softcap: Some(("attn_logit_softcapping", Some(50.0))),
    logit_softcap: Some(("final_logit_softcapping", Some(30.0))),
    window: Window { blocks: Windowed::AllButEvery(None, 2), width: Some(4096), switch: None },
    sizes: Sizes { num_key_value_heads: Some(4), head_dim: Some(256), max_position_embeddings: 8192, ..BASE.sizes },
    tied: true,
    fixed: &[("use_bidirectional_attention", Only::Flag(false)), ("mlp_bias", Only::Flag(false))],
    // `hidden_activation` and `sliding_window` decide; early files have both of each.
    harmless: &["hidden_act", "sliding_window_size"],
    ..BASE
};

const GEMMA3_TEXT: Family = Family {
    model_type: "gemma3_text",
    qk_norm: Some(PER_HEAD),
    // transformers has the key and does not use it.
    score_softcap: None,
    logit_softcap: Some(("final_logit_softcapping", None)),
    window: Window { blocks: Windowed::AllButEvery(Some("sliding_window_pattern"), 6), ..GEMMA2.window },
    rotary: Rotary { theta: 1_000_000.0, local: Some(Local::Theta("rope_local_base_freq", 10_000.0)), ..BASE.rotary },
    // Sections of larger files leave out what equals these.
    sizes: Sizes {
        vocab_size: Some(262_208),
        hidden_size: Some(2304),
        intermediate_size: Some(9216),
        num_hidden_layers: Some(26),
        num_attention_heads: Some(8),
        max_position_embeddings: 131_072,
        ..GEMMA2.sizes
    },
    fixed: &[
        ("use_bidirectional_attention", Only::Flag(false)),
        ("mlp_bias", Only::Flag(false)),
        ("attn_logit_softcapping", Only::Null),
    ],
    harmless: &["hidden_act", "_sliding_window_pattern"],
    ..GEMMA2
};

/// Every family that loads.
pub(crate) static FAMILIES: &[Family] = &[
    LLAMA,
    MISTRAL,
    MIXTRAL,
    QWEN2,
    QWEN3,
    QWEN3_MOE,
    hybrid::QWEN3_5_TEXT,
    hybrid::QWEN3_5_MOE_TEXT,
    hybrid::QWEN3_NEXT,
    GEMMA2,
    GEMMA3_TEXT,
    dense::PHI3,
    dense::MINISTRAL3,
    dense::SMOLLM3,
    dense::GRANITE,
    dense::SEED_OSS,
    dense::HUNYUAN,
    dense::OLMO2,
    dense::OLMO3,
    dense::GLM4,
    dense::ERNIE,
    experts::GLM4_MOE,
    latent::DEEPSEEK_V3,
    latent::KIMI_K2,
    latent::GLM4_MOE_LITE,
    sinks::GPT_OSS,
    vision_text::QWEN2_VL_TEXT,
    vision_text::QWEN2_5_VL_TEXT,
    vision_text::QWEN3_VL_TEXT,
    short_conv::LFM2,
];

impl Family {
    /// The family of a `model_type`.
    pub fn find(model_type: &str) -> Option<&'static Self> {
        FAMILIES.iter().find(|family| family.model_type == model_type)
    }

    /// The supported model types, for messages.
    pub fn supported() -> String {
        let types: Vec<&str> = FAMILIES.iter().map(|family| family.model_type).collect();
        format!("{}, and what has one of them as its text_config", types.join(", "))
    }
}
