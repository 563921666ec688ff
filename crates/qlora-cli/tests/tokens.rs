//! A tokenizer with more tokens than its model: trained, inspected, asked, merged and converted.

mod common;

use common::Bench;

#[test]
fn added_tokens_are_trained_and_come_along() {
    let bench = Bench::new();
    bench.copy("tiny-llama", "base");
    let text = String::from_utf8(bench.read("base/tokenizer.json")).expect("text");
    let mut tokenizer: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    tokenizer["added_tokens"].as_array_mut().expect("tokens").push(serde_json::json!({
        "id": 4096, "content": "<|ask|>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
        "special": true
    }));
    bench.write("base/tokenizer.json", &tokenizer.to_string());
    let rows = String::from_utf8(bench.read("rows.jsonl")).expect("text").replace("How", "<|ask|>How");
    bench.write("rows.jsonl", &rows);
    let train = ["train", "qlora.toml", "--model", "base"];

    let refused = bench.run(&train);
    assert!(refused.stderr.contains("\"<|ask|>\" has the id 4096"), "{}", refused.stderr);
    assert!(refused.stderr.contains("set model.resize_embeddings = true"), "{}", refused.stderr);

    let resize = ["--set", "model.resize_embeddings=true"];
    for more in [&["--dry-run"][..], &[]] {
        let run = bench.ok(&[&train[..], &resize, more].concat());
        let note = "note: model.resize_embeddings: added 1 rows to the embedding, 4097 instead of 4096";
        assert!(run.stderr.contains(note) && run.stderr.contains("\"<|ask|>\" (4096)"), "{}", run.stderr);
    }
    let shown = bench.ok(&["inspect", "run/adapter"]).stdout;
    assert!(shown.contains("rows of embed_tokens     1 tokens: 4096"), "{shown}");

    let ask = ["generate", "--device", "cpu", "--quant-type", "none", "--max-new-tokens", "3", "--prompt", "<|ask|>"];
    let refused = bench.run(&[&ask[..], &["--model", "base"]].concat());
    assert!(refused.stderr.contains("token 4096 of the prompt is beyond"), "{}", refused.stderr);
    bench.ok(&[&ask[..], &["--adapter", "run/adapter"]].concat());

    let merged = bench.ok(&["merge", "--adapter", "run/adapter", "--output", "merged"]).stdout;
    assert!(merged.contains("The vocabulary grew to 4097 tokens"), "{merged}");
    bench.ok(&[&ask[..], &["--model", "merged"]].concat());
    bench.ok(&["convert", "--adapter", "run/adapter", "--output", "merged.gguf"]);
    let refused = bench.run(&["convert", "--adapter", "run/adapter", "--adapter-only", "--output", "adapter.gguf"]);
    assert!(refused.stderr.contains("trainable_token_indices") && refused.stderr.contains("merge the adapter"));
}
