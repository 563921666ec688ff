//! Values that are valid in one kind of file, or nearly: what random mutation would not come upon.

/// Parts of tokenizer.json.
pub(crate) const TOKENIZER: &[&str] = &[
    r#"{"type": "Replace", "pattern": {"String": ""}, "content": "x"}"#,
    r#"{"type": "Replace", "pattern": {"Regex": ""}, "content": "x"}"#,
    r#"{"type": "Replace", "pattern": {"Regex": "(?=a)"}, "content": "aaaaaaaa"}"#,
    r#"{"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""}"#,
    r#"{"type": "Replace", "pattern": {"String": "a"}, "content": ""}"#,
    r#"{"type": "Precompiled", "precompiled_charsmap": "AAAA"}"#,
    r#"{"type": "Precompiled", "precompiled_charsmap": ""}"#,
    r#"{"type": "Prepend", "prepend": ""}"#,
    r#"{"type": "Prepend", "prepend": "▁"}"#,
    r#"{"type": "Strip", "strip_left": true, "strip_right": true}"#,
    r#"{"type": "NFKD"}"#,
    r#"{"type": "Lowercase"}"#,
    r#"{"type": "Nmt"}"#,
    r#"{"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true, "strip_accents": null, "lowercase": true}"#,
    r#"{"type": "Sequence", "normalizers": []}"#,
    r#"{"type": "Sequence", "pretokenizers": []}"#,
    r#"{"type": "Sequence", "decoders": []}"#,
    r#"{"type": "Sequence", "processors": []}"#,
    r#"{"type": "Split", "pattern": {"Regex": "\\s*"}, "behavior": "Isolated", "invert": false}"#,
    r#"{"type": "Split", "pattern": {"String": ""}, "behavior": "MergedWithNext", "invert": true}"#,
    r#"{"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true}"#,
    r#"{"type": "Metaspace", "replacement": "", "prepend_scheme": "never", "split": false}"#,
    r#"{"type": "Digits", "individual_digits": true}"#,
    r#"{"type": "Punctuation", "behavior": "Contiguous"}"#,
    r#"{"type": "CharDelimiterSplit", "delimiter": ""}"#,
    r#"{"type": "FixedLength", "length": 0}"#,
    r#"{"type": "UnicodeScripts"}"#,
    r#"{"type": "BertPreTokenizer"}"#,
    r#"{"type": "Whitespace"}"#,
    r#"{"type": "ByteFallback"}"#,
    r#"{"type": "Fuse"}"#,
    r#"{"type": "Strip", "content": " ", "start": 99999999999, "stop": 99999999999}"#,
    r#"{"type": "Strip", "content": "a", "start": 18446744073709551615, "stop": 1}"#,
    r###"{"type": "WordPiece", "prefix": "##", "cleanup": true}"###,
    r#"{"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": true}"#,
    r#"{"type": "BPEDecoder", "suffix": ""}"#,
    r#"{"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}], "pair": [], "special_tokens": {"x": {"id": "x", "ids": [4294967295], "tokens": ["x"]}}}"#,
    r#"{"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}}"#,
    r#"{"type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["<s>", 4294967295], "trim_offsets": true, "add_prefix_space": true}"#,
    r#"{"type": "BertProcessing", "sep": ["b", 9], "cls": ["a", 8]}"#,
    r#"{"direction": "Left", "max_length": 0, "strategy": "LongestFirst", "stride": 0}"#,
    r#"{"direction": "Right", "max_length": 2, "strategy": "OnlySecond", "stride": 5}"#,
    r#"{"strategy": {"Fixed": 4294967295}, "direction": "Left", "pad_to_multiple_of": 0, "pad_id": 3, "pad_type_id": 0, "pad_token": "<|pad|>"}"#,
    r#"{"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": 1000000000, "pad_id": 3, "pad_type_id": 0, "pad_token": "<|pad|>"}"#,
    r#"{"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "b"}"#,
    r#"{"type": "WordLevel", "vocab": {}, "unk_token": ""}"#,
    r#"{"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "x", "continuing_subword_prefix": "", "max_input_chars_per_word": 0}"#,
    r#"{"type": "Unigram", "unk_id": 9, "vocab": [["a", -1.0]], "byte_fallback": true}"#,
    r#"{"type": "Unigram", "unk_id": null, "vocab": [["a", 0.0], ["", -1.0]], "byte_fallback": false}"#,
    r#"{"type": "Unigram", "unk_id": 0, "vocab": [], "byte_fallback": false}"#,
    r#"{"type": "BPE", "dropout": 1.5, "unk_token": "x", "continuing_subword_prefix": "é", "end_of_word_suffix": "x", "fuse_unk": true, "byte_fallback": true, "ignore_merges": true, "vocab": {"a": 0, "éa": 1}, "merges": ["a éa"]}"#,
    r#"{"type": "BPE", "vocab": {}, "merges": []}"#,
    r#"{"type": "BPE", "vocab": {"a": 4294967295}, "merges": []}"#,
    r#"{"id": 4294967295, "content": "x", "single_word": true, "lstrip": true, "rstrip": true, "normalized": true, "special": false}"#,
    r#"{"id": 7, "content": "", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}"#,
];

/// Values of config.json.
pub(crate) const CONFIG: &[&str] = &[
    "\"silu\"",
    "\"gelu_pytorch_tanh\"",
    "\"llama\"",
    "\"qwen3_moe\"",
    "\"gemma3_text\"",
    "\"mixtral\"",
    "\"phi3\"",
    "[\"MixtralForCausalLM\"]",
    "{\"rope_type\": \"yarn\", \"factor\": 0, \"original_max_position_embeddings\": 0}",
    "{\"rope_type\": \"llama3\", \"factor\": 8.0, \"low_freq_factor\": 4.0, \"high_freq_factor\": 4.0, \"original_max_position_embeddings\": 1}",
    "{\"rope_type\": \"dynamic\", \"factor\": -2.0}",
    "{\"rope_type\": \"longrope\", \"long_factor\": [], \"short_factor\": [0]}",
    "{\"rope_type\": \"linear\", \"factor\": 1e308}",
    "{\"rope_theta\": 0}",
    "{\"rope_theta\": -1.0}",
    "{\"quant_method\": \"bitsandbytes\", \"load_in_4bit\": true}",
    "{\"quant_method\": \"gptq\", \"bits\": 4, \"group_size\": 0}",
    "{\"quant_method\": \"x\"}",
    "[\"sliding_attention\", \"full_attention\"]",
    "[\"x\"]",
    "[0, 1, 99999999999]",
    "\"bfloat16\"",
    "\"float64\"",
    "1048576",
    "[2, 4294967295]",
];

/// Values of adapter_config.json.
pub(crate) const ADAPTER: &[&str] = &[
    "[\"q_proj\"]",
    "\"all-linear\"",
    "\".*\"",
    "\"(a+)+$\"",
    "\"(\"",
    "{\"q_proj\": 0}",
    "{\"q_proj\": 9223372036854775807}",
    "{\"(\": 8}",
    "{\".*\": 2}",
    "{\"q_proj\": -1.5}",
    "\"none\"",
    "\"all\"",
    "\"lora_only\"",
    "\"LORA\"",
    "\"IA3\"",
    "\"pissa\"",
    "[0]",
    "[99999999999]",
    "[\"norm\"]",
    "[\"lm_head\"]",
    "[0, 5]",
    "{\"embed_tokens\": [0, 299, 4294967295]}",
    "\"layers\"",
    "[[0, 1], [0, 1]]",
];

/// Values of tokenizer_config.json.
pub(crate) const SETTINGS: &[&str] = &[
    "{\"content\": \"<s>\"}",
    "{\"__type\": \"AddedToken\", \"content\": null}",
    "[{\"name\": \"default\", \"template\": \"{{ messages }}\"}]",
    "\"{{ messages[0].content }}\"",
    "\"{{\"",
    "[{\"name\": 1}]",
    "\"LlamaTokenizer\"",
    "true",
    "\"<|im_end|>\"",
    "\"not a token\"",
    "1000000000000000019884624838656",
    "{\"0\": {\"content\": \"x\", \"special\": true}}",
];

/// Values of an index.
pub(crate) const INDEX: &[&str] = &[
    "\"model-00001-of-00003.safetensors\"",
    "\"model-00009-of-00003.safetensors\"",
    "\"config.json\"",
    "\"/dev/null\"",
    "\".\"",
    "\"\"",
];

#[cfg(test)]
mod tests {
    use super::super::json::Node;
    use super::*;

    #[test]
    fn what_is_grafted_is_json() {
        for graft in [TOKENIZER, CONFIG, ADAPTER, SETTINGS, INDEX].concat() {
            assert!(Node::parse(graft.as_bytes()).is_some(), "{graft}");
        }
    }
}
