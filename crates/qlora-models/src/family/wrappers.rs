//! Models that read more than text. Their `config.json` describes the language model in a section `text_config`, whose
//! `model_type` names a family; images, sound and what joins them to the text are left aside.
//!
//! The rule holds for every such type: transformers 5 calls the language model `model.language_model` in nearly all of them.
//! Listed is what differs from that.

use super::{Only, Root};

/// What a type with a `text_config` differs in.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Wrapper {
    /// The value of `model_type`; empty for the rule.
    pub model_type: &'static str,
    /// The family when `text_config` does not name one.
    pub text: Option<&'static str>,
    /// Where the language model lies. The first is what modules are called; the others occur in files.
    pub roots: &'static [Root],
    /// Whether it leaves out the soft cap of logits that the family has by itself.
    pub uncapped: bool,
    /// Keys of the section that would change the arithmetic, with the values that leave it as the family says.
    pub fixed: &'static [(&'static str, Only)],
    /// Why its language model is not the family's.
    pub refused: Option<&'static str>,
    /// Whether there are files without the section, with its keys beside the others.
    pub flat: bool,
}

/// The name of the section.
pub(crate) const SECTION: &str = "text_config";

const RULE: Wrapper = Wrapper {
    model_type: "",
    text: None,
    roots: &[
        Root { model: "model.language_model", head: "lm_head" },
        Root { model: "language_model.model", head: "language_model.lm_head" },
        Root { model: "language_model", head: "lm_head" },
        Root { model: "model", head: "lm_head" },
    ],
    uncapped: false,
    fixed: &[],
    refused: None,
    flat: false,
};

const fn of(model_type: &'static str, text: &'static str) -> Wrapper {
    Wrapper { model_type, text: Some(text), ..RULE }
}

/// The other name of the language model.
const TEXT_MODEL: &[Root] = &[Root { model: "model.text_model", head: "lm_head" }];

static WRAPPERS: &[Wrapper] = &[
    Wrapper { uncapped: true, fixed: &[("final_logit_softcapping", Only::Null)], ..of("gemma3", "gemma3_text") },
    of("mistral3", "mistral"),
    of("llava", "llama"),
    of("llava_next", "llama"),
    of("llava_onevision", "qwen2"),
    of("video_llava", "llama"),
    of("vipllava", "llama"),
    of("internvl", "qwen2"),
    of("got_ocr2", "qwen2"),
    of("lighton_ocr", "qwen3"),
    of("qwen3_5", "qwen3_5_text"),
    of("qwen3_5_moe", "qwen3_5_moe_text"),
    Wrapper { flat: true, ..of("qwen2_vl", "qwen2_vl_text") },
    Wrapper { flat: true, ..of("qwen2_5_vl", "qwen2_5_vl_text") },
    of("qwen3_vl", "qwen3_vl_text"),
    of("qwen2_audio", "qwen2"),
    of("voxtral", "llama"),
    Wrapper { roots: TEXT_MODEL, ..of("idefics3", "llama") },
    Wrapper { roots: TEXT_MODEL, ..of("smolvlm", "llama") },
    Wrapper {
        refused: Some("the tokens of its prompts see those behind them, and here a token sees only what is before it"),
        ..of("paligemma", "gemma2")
    },
    Wrapper {
        refused: Some("its checkpoint holds an adapter that is switched with every input"),
        ..of("granite_speech", "granite")
    },
];

impl Wrapper {
    /// What is known of a type with a section.
    pub fn find(model_type: &str) -> Self {
        *WRAPPERS.iter().find(|wrapper| wrapper.model_type == model_type).unwrap_or(&RULE)
    }
}
