//! Chat templates that Axolotl has by name (docs.axolotl.ai/docs/config-reference.html, `chat_template`).

use super::foreign::Work;

/// What a name begins with whose template stands in for one that the tokenizer does not have.
const FALLBACK: &str = "tokenizer_default_fallback_";

/// What a name stands for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Named {
    /// The tokenizer's template, which is used here, too.
    Tokenizer,
    /// A form of turns that is short enough to be written out.
    Text(&'static str),
    /// The template that these models' tokenizers have.
    OfModels(&'static str),
}

/// Forms of turns, as Jinja.
const TEXTS: [(&str, &str); 6] = [
    (
        "chatml",
        "{% for message in messages %}{{ '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>\\n' }}{% endfor %}\
         {% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    ),
    (
        "llama3",
        "{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}\
         {{ '<|start_header_id|>' ~ message.role ~ '<|end_header_id|>\\n\\n' ~ message.content | trim ~ '<|eot_id|>' }}{% endfor %}\
         {% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
    ),
    (
        "gemma",
        "{{ bos_token }}{% for message in messages %}{% if message.role not in ['user', 'assistant'] %}\
         {{ raise_exception('there are no turns of the role ' ~ message.role) }}{% endif %}\
         {{ '<start_of_turn>' ~ ('model' if message.role == 'assistant' else 'user') ~ '\\n' ~ message.content | trim ~ '<end_of_turn>\\n' }}\
         {% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}",
    ),
    (
        "phi_3",
        "{{ bos_token }}{% for message in messages %}{{ '<|' ~ message.role ~ '|>\\n' ~ message.content ~ '<|end|>\\n' }}{% endfor %}\
         {% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}",
    ),
    (
        "phi_35",
        "{% for message in messages %}{{ '<|' ~ message.role ~ '|>\\n' ~ message.content ~ '<|end|>\\n' }}{% endfor %}\
         {% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}",
    ),
    (
        "alpaca",
        "{{ bos_token }}{% for message in messages %}{% if not loop.first %}{{ '\\n\\n' }}{% endif %}\
         {% if message.role == 'system' %}{{ message.content }}\
         {% elif message.role == 'user' %}{{ '### Instruction:\\n' ~ message.content }}\
         {% else %}{{ '### Response:\\n' ~ message.content ~ eos_token }}{% endif %}{% endfor %}\
         {% if add_generation_prompt %}{{ '\\n\\n### Response:\\n' }}{% endif %}",
    ),
];

/// Templates that came with models, and what their names begin with.
const OF_MODELS: [(&str, &str); 20] = [
    ("qwen2_vl", "Qwen 2 VL"),
    ("qwen_25", "Qwen 2.5"),
    ("qwen3_5", "Qwen 3.5"),
    ("qwen3", "Qwen 3"),
    ("llama3_2_vision", "Llama 3.2 Vision"),
    ("llama4", "Llama 4"),
    ("gemma3", "Gemma 3"),
    ("gemma4", "Gemma 4"),
    ("phi_4", "Phi 4"),
    ("mistral", "Mistral"),
    ("pixtral", "Pixtral"),
    ("deepseek", "DeepSeek"),
    ("cohere", "Cohere"),
    ("command_a", "Command A"),
    ("aya", "Aya"),
    ("jamba", "Jamba"),
    ("falcon_h1", "Falcon H1"),
    ("nemotron_h", "Nemotron H"),
    ("exaone", "EXAONE"),
    ("llava", "LLaVA"),
];

impl Named {
    /// What a name stands for; `None` where it is not known.
    pub fn of(name: &str) -> Option<Self> {
        if name == "tokenizer_default" || name.starts_with(FALLBACK) {
            return Some(Self::Tokenizer);
        }
        let text = TEXTS.iter().find(|(known, _)| *known == name).map(|(_, text)| Self::Text(text));
        text.or_else(|| {
            let (_, models) = OF_MODELS.iter().find(|(begin, _)| name.starts_with(begin))?;
            Some(Self::OfModels(models))
        })
    }
}

impl Work {
    /// Says a template: a name, or Jinja or its file.
    pub(super) fn chat_template(&mut self, said: &str) {
        if said.contains("{{") || said.contains("{%") || said.contains('.') {
            return self.set("chat_template_jinja", "data.chat_template", toml::Value::from(said).to_string());
        }
        match Named::of(said) {
            Some(Named::Tokenizer) => {
                if let Some(other) = said.strip_prefix(FALLBACK) {
                    self.notes.push(format!(
                        "`chat_template: {said}`: the tokenizer's template is used; where it has none, data.chat_template gives one, and `{other}` has to be \
                         written there"
                    ));
                }
            }
            Some(Named::Text(text)) => self.set("chat_template", "data.chat_template", toml::Value::from(text).to_string()),
            Some(Named::OfModels(models)) => self.notes.push(format!(
                "`chat_template: {said}` is the template of {models}'s own tokenizers, and the tokenizer's is used; for a model without it, name \
                 its file in data.chat_template"
            )),
            None => self.notes.push(format!(
                "`chat_template: {said}` is not known: the tokenizer's template is used, or the one that data.chat_template names"
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn_qlora::chat_text::{ChatTemplate, Message, SpecialTokens};

    /// What the forms of turns are, word by word; transformers writes the same with Axolotl's own templates.
    #[test]
    fn turns_are_written_as_their_names_say() {
        let turns = [("user", "a "), ("assistant", " b"), ("user", "c")];
        let turns = turns.map(|(role, content)| {
            Message::try_from(serde_json::json!({"role": role, "content": content})).expect("a message")
        });
        let mut special = SpecialTokens::default();
        special.insert_if_missing("bos_token", "<s>".into());
        special.insert_if_missing("eos_token", "</s>".into());
        for (name, expected) in [
            (
                "chatml",
                "<|im_start|>user\na <|im_end|>\n<|im_start|>assistant\n b<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n",
            ),
            (
                "llama3",
                "<s><|start_header_id|>user<|end_header_id|>\n\na<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nb<|eot_id|>\
                 <|start_header_id|>user<|end_header_id|>\n\nc<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
            ),
            (
                "gemma",
                "<s><start_of_turn>user\na<end_of_turn>\n<start_of_turn>model\nb<end_of_turn>\n<start_of_turn>user\nc<end_of_turn>\n\
                 <start_of_turn>model\n",
            ),
            ("phi_3", "<s><|user|>\na <|end|>\n<|assistant|>\n b<|end|>\n<|user|>\nc<|end|>\n<|assistant|>\n"),
            ("phi_35", "<|user|>\na <|end|>\n<|assistant|>\n b<|end|>\n<|user|>\nc<|end|>\n<|assistant|>\n"),
            ("alpaca", "<s>### Instruction:\na \n\n### Response:\n b</s>\n\n### Instruction:\nc\n\n### Response:\n"),
        ] {
            let Some(Named::Text(text)) = Named::of(name) else { panic!("{name} is written out") };
            let template = ChatTemplate::from_setting(text).expect("a template");
            assert_eq!(template.render(&turns, true, &special).expect("turns"), expected, "{name}");
        }
    }

    #[test]
    fn every_name_of_axolotls_is_known() {
        for name in [
            "alpaca",
            "chatml",
            "mistral_v1",
            "mistral_v2v3",
            "mistral_v3_tekken",
            "mistral_v7_tekken",
            "gemma",
            "cohere",
            "llama3",
            "llama3_2_vision",
            "llama4",
            "phi_3",
            "phi_35",
            "deepseek_v2",
            "deepseek_v3",
            "jamba",
            "qwen_25",
            "qwen3",
            "qwen3_5",
            "falcon_h1",
            "nemotron_h",
            "tokenizer_default",
            "exaone",
            "exaone4",
            "pixtral",
            "llava",
            "qwen2_vl",
            "gemma3",
            "gemma3n",
            "gemma4",
            "gemma4_unified",
            "command_a",
            "command_a_tool_use",
            "command_a_rag",
            "aya",
            "tokenizer_default_fallback_chatml",
        ] {
            assert!(Named::of(name).is_some(), "{name}");
        }
        assert_eq!((Named::of("qwen3_5"), Named::of("metharme")), (Some(Named::OfModels("Qwen 3.5")), None));
    }
}
