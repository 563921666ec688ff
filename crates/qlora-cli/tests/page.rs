//! The page at `/` in a real browser, where one is at hand, on a real server.
#![cfg(unix)]

mod common;

use common::browser::Browser;
use common::server::Server;
use common::{Bench, reference};

const ENTER: (&str, u32) = ("Enter", 13);
const ESCAPE: (&str, u32) = ("Escape", 27);

/// A stream of events whose answer ends without a text.
const NO_TEXT: &str = "data: {\"choices\":[{\"delta\":{\"role\":\"assistant\"}}]}\n\ndata: [DONE]\n\n";

/// The texts of a column's turns of one kind, as a JSON list.
fn turns(browser: &mut Browser, column: &str, kind: &str) -> Vec<String> {
    let all = format!("[...document.querySelectorAll('#log-{column} .turn.{kind} p')].map((p) => p.textContent)");
    let all = browser.value(&all);
    all.as_array().expect("a list").iter().map(|text| text.as_str().expect("a text").to_string()).collect()
}

#[test]
fn two_columns_answer_with_the_settings_and_say_how_fast() {
    let Some(mut browser) = Browser::start() else { return };
    let bench = Bench::new();
    let model = reference("tiny-llama").display().to_string();
    let adapter = reference("adapters/plain").display().to_string();
    let named = format!("plain={adapter}");
    let server =
        Server::with(&bench, &["--device", "cpu", "--model", &model, "--adapter", &named, "--api-key", "secret"]);
    browser.open(&format!("http://{}/", server.address));

    // Nothing is shown without the key.
    browser
        .wait("document.getElementById('status').textContent.includes('API key is missing or wrong: enter it above')");
    assert_eq!(browser.value("document.querySelectorAll('#model-a option').length"), 0);
    browser.complaints.clear();
    browser.type_into("key", "secret");
    browser.press(ENTER.0, ENTER.1);
    browser.value("document.getElementById('key').blur()");
    browser.wait("document.querySelectorAll('#model-a option').length === 2");
    let names = browser.value("[...document.querySelectorAll('#model-b option')].map((option) => option.textContent)");
    assert_eq!(names, serde_json::json!(["tiny-llama", "plain (adapter)"]));

    assert_eq!(browser.value("document.getElementById('pane-b').hidden"), true);
    browser.click("compare");
    assert_eq!(browser.value("document.getElementById('pane-b').hidden"), false);
    let chosen = browser.value("[document.getElementById('model-a').value, document.getElementById('model-b').value]");
    assert_eq!(chosen, serde_json::json!(["tiny-llama", "plain"]));

    // A setting that can't be is shown, and nothing is sent.
    browser.value("document.querySelector('details').open = true");
    browser.type_into("temperature", "7");
    browser.type_into("prompt", "Hello");
    browser.press(ENTER.0, ENTER.1);
    assert_eq!(browser.value("document.getElementById('temperature').matches(':invalid')"), true);
    assert!(turns(&mut browser, "a", "user").is_empty());

    browser.type_into("temperature", "0");
    browser.type_into("max_tokens", "8");
    browser.type_into("prompt", "Hello");
    browser.press(ENTER.0, ENTER.1);
    browser.wait("document.getElementById('status').textContent === 'Done.'");
    let ask = ["generate", "--device", "cpu", "--model", &model, "--max-new-tokens", "8", "--prompt", "Hello"];
    for (column, more) in [("a", &[][..]), ("b", &["--adapter", &adapter])] {
        let expected = bench.ok(&[&ask[..], more].concat()).stdout;
        assert_eq!(turns(&mut browser, column, "assistant"), [expected.strip_suffix('\n').expect("a line")]);
        assert_eq!(turns(&mut browser, column, "user"), ["Hello"]);
        let speed = format!("document.getElementById('speed-{column}').value");
        let told = browser.value(&format!("/^8 tokens · [0-9.]+ tokens\\/s · first token [0-9]+ ms$/.test({speed})"));
        assert_eq!(told, true, "{}", browser.value(&speed));
    }

    // The conversation goes on, and Escape ends a long answer.
    browser.type_into("max_tokens", "400");
    browser.type_into("temperature", "2");
    browser.type_into("seed", "1");
    browser.type_into("prompt", "And now?");
    browser.press(ENTER.0, ENTER.1);
    browser.wait(
        "['a', 'b'].every((name) => document.querySelectorAll(`#log-${name} .turn.assistant p`)[1]?.textContent)",
    );
    browser.press(ESCAPE.0, ESCAPE.1);
    browser.wait("['Stopped.', 'Done.'].includes(document.getElementById('status').textContent)");
    for column in ["a", "b"] {
        assert_eq!(turns(&mut browser, column, "user"), ["Hello", "And now?"]);
        assert_eq!(turns(&mut browser, column, "assistant").len(), 2);
        assert!(turns(&mut browser, column, "error").is_empty());
    }

    // The second column goes on from what the first one was asked without it, an empty answer among it.
    browser.click("compare");
    browser.type_into("max_tokens", "4");
    browser.type_into("prompt", "Alone?");
    browser.press(ENTER.0, ENTER.1);
    browser.wait("document.getElementById('status').textContent === 'Done.'");
    browser.value(&format!(
        "globalThis.realFetch = fetch; globalThis.fetch = async () => new Response({NO_TEXT:?}); null"
    ));
    browser.type_into("prompt", "Nothing?");
    browser.press(ENTER.0, ENTER.1);
    browser.wait("document.getElementById('status').textContent === 'Done.'");
    browser.value("globalThis.fetch = globalThis.realFetch; null");
    assert_eq!(turns(&mut browser, "a", "assistant").last().map(String::as_str), Some(""));
    assert_eq!(browser.value("document.querySelectorAll('#log-a .empty').length"), 1);
    assert_eq!(turns(&mut browser, "b", "user").len(), 2);
    browser.click("compare");
    assert_eq!(turns(&mut browser, "b", "user"), ["Hello", "And now?", "Alone?", "Nothing?"]);
    assert_eq!(turns(&mut browser, "b", "assistant"), turns(&mut browser, "a", "assistant"));

    // A model that has gone is an error in its column alone.
    let unload = "fetch('/v1/unload_lora_adapter', { method: 'POST', headers: { 'content-type': 'application/json', \
        authorization: 'Bearer secret' }, body: JSON.stringify({ lora_name: 'plain' }) }).then((response) => response.status)";
    assert_eq!(browser.value(unload), 200);
    browser.type_into("max_tokens", "4");
    browser.type_into("prompt", "Still there?");
    browser.press(ENTER.0, ENTER.1);
    browser.wait("document.getElementById('status').textContent === 'Done.'");
    assert!(turns(&mut browser, "a", "error").is_empty());
    let errors = turns(&mut browser, "b", "error");
    assert!(matches!(&errors[..], [error] if error.contains("plain")), "{errors:?}");
    browser.complaints.retain(|complaint| !complaint.contains("/v1/chat/completions"));

    browser.click("clear");
    assert!(turns(&mut browser, "a", "user").is_empty() && turns(&mut browser, "b", "user").is_empty());
    browser.value("document.getElementById('theme').value = 'dark'; document.getElementById('theme').dispatchEvent(new Event('change'))");
    assert_eq!(browser.value("getComputedStyle(document.documentElement).colorScheme"), "dark");
    assert!(browser.complaints.is_empty(), "{:?}", browser.complaints);
}
