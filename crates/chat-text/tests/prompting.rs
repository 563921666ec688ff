//! An adapter is prompted by what lies beside it.
#![allow(clippy::unwrap_used, reason = "a failing unwrap is a failing test")]

use chat_text::{CHAT_TEMPLATE_FILE, ChatError, PROMPT_SETTINGS_FILE, Prompting, Tokenizer};

#[test]
fn what_lies_beside_an_adapter_decides() {
    let reference = concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata/reference/tiny-llama");
    let tokenizer = Tokenizer::from_dir(reference).unwrap();
    let dir = tempfile::tempdir().unwrap();
    assert!(Prompting::of_adapter(dir.path()).unwrap().is_none());
    let text = |system: Option<&str>| {
        let prompting = Prompting::of_adapter(dir.path()).unwrap().unwrap();
        tokenizer.decode(&prompting.prompt(&tokenizer, system, "Hi").unwrap(), false).unwrap()
    };
    let settings = |json: &str| std::fs::write(dir.path().join(PROMPT_SETTINGS_FILE), json).unwrap();

    settings(r#"{"layout": "plain"}"#);
    assert_eq!(text(None), "Hi");
    settings(r#"{"layout": "alpaca", "system_prompt": "Answer."}"#);
    assert_eq!(text(None), "Answer.\n\n### Instruction:\nHi\n\n### Response:\n");
    settings(r#"{"layout": "chat"}"#);
    assert!(text(None).contains("Hi<|im_end|>"), "the tokenizer's own template");

    let template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[{{ name }}]";
    std::fs::write(dir.path().join(CHAT_TEMPLATE_FILE), template).unwrap();
    settings(r#"{"layout": "chat", "system_prompt": "Be brief.", "template_kwargs": {"name": "assistant"}}"#);
    assert_eq!(text(None), "[system] Be brief.\n[user] Hi\n[assistant]");
    assert_eq!(text(Some("Be long.")), "[system] Be long.\n[user] Hi\n[assistant]");

    settings(r#"{"layout": "sideways"}"#);
    let damaged = Prompting::of_adapter(dir.path());
    assert!(matches!(damaged, Err(ChatError::Json { path, .. }) if path.ends_with(PROMPT_SETTINGS_FILE)));
}

/// What would be waited for without an end is refused: pipes, devices, sockets.
#[cfg(unix)]
#[test]
fn only_regular_files_are_read() {
    use std::error::Error;
    for file in [CHAT_TEMPLATE_FILE, PROMPT_SETTINGS_FILE] {
        let dir = tempfile::tempdir().unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(dir.path().join(file)).unwrap();
        let error = Prompting::of_adapter(dir.path()).unwrap_err();
        assert_eq!(error.source().unwrap().to_string(), "it is not a regular file");
    }
}
