//! `qlora chat` with its entries from a pipe: what answers, with which conversation. On a terminal: what Ctrl-C does.

mod common;

use std::io::Write;
use std::process::Stdio;

use common::{Bench, Run, reference};

/// Runs a chat with these entries.
fn chat(bench: &Bench, args: &[&str], entries: &str) -> Run {
    let args = [&["chat", "--device", "cpu", "--max-new-tokens", "8"], args].concat();
    let mut command = bench.command(&args);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("the program starts");
    // A program that ended before it read everything is looked at below.
    drop(child.stdin.take().expect("piped").write_all(entries.as_bytes()));
    Run::new(child.wait_with_output().expect("the program ends"))
}

fn ok(bench: &Bench, args: &[&str], entries: &str) -> String {
    let run = chat(bench, args, entries);
    assert_eq!(run.code, Some(0), "{entries}: {}", run.stderr);
    run.stdout
}

/// The model, and two adapters with names.
fn models() -> [String; 3] {
    let adapter = |name: &str, kind: &str| format!("{name}={}", reference(&format!("adapters/{kind}")).display());
    [reference("tiny-llama").display().to_string(), adapter("first", "plain"), adapter("second", "rslora")]
}

#[test]
fn each_adapter_answers_as_generate_does() {
    let bench = Bench::new();
    let [model, first, second] = models();
    let generate = |adapter: &[&str], prompt: &str| {
        let ask = ["generate", "--device", "cpu", "--model", &model, "--max-new-tokens", "8", "--prompt", prompt];
        bench.ok(&[&ask[..], adapter].concat()).stdout
    };
    let [one, two] = [&first, &second].map(|adapter| generate(&["--adapter", adapter], "Hello"));
    let base = generate(&[], "Hello");
    assert!(one != two && one != base, "the adapters change nothing: {one}");
    let args = ["--model", &model, "--adapter", &first, "--adapter", &second];
    let entries = "Hello\n/reset\n/compare second first\nHello\n/adapter base\n/reset\nHello\n/quit\nnot asked\n";
    assert_eq!(ok(&bench, &args, entries), format!("{one}[second]\n{two}[first]\n{one}{base}"));
    // Several lines are one prompt.
    let lines = generate(&["--adapter", &first], "Hello\n/there");
    assert_eq!(ok(&bench, &args, "Hello\\\n/there\n/reset\n\"\"\"\nHello\n/there\n\"\"\"\n"), lines.repeat(2));
}

#[test]
fn the_whole_conversation_is_answered() {
    let bench = Bench::new();
    let [model, first, second] = models();
    // The answer of an adapter to messages.
    let answer = |adapter: &str, messages: &[(&str, &str)]| {
        let messages: Vec<_> =
            messages.iter().map(|(role, content)| serde_json::json!({ "role": role, "content": content })).collect();
        bench.write("prompts.jsonl", &format!("{}\n", serde_json::json!({ "messages": messages })));
        let ask = ["generate", "--device", "cpu", "--model", &model, "--max-new-tokens", "8", "--prompts"];
        let run = bench.ok(&[&ask[..], &["prompts.jsonl", "--adapter", adapter]].concat());
        let row: serde_json::Value = serde_json::from_str(&run.stdout).expect("JSON");
        row["answer"].as_str().expect("a text").to_string()
    };
    let [user, assistant] = ["user", "assistant"];
    let one = answer(&first, &[(user, "Hello")]);
    let asked = [(user, "Hello"), (assistant, one.as_str()), (user, "And then?")];
    let [then_first, then_second] = [&first, &second].map(|adapter| answer(adapter, &asked));
    let args = ["--model", &model, "--adapter", &first, "--adapter", &second];
    // Another voice goes on with what the first one said; what was said with it before is its own.
    let entries = "Hello\n/compare first second\nAnd then?\n/regenerate\n";
    let both = format!("[first]\n{then_first}\n[second]\n{then_second}\n");
    assert_eq!(ok(&bench, &args, entries), format!("{one}\n{both}{both}"));
    let more = [&asked[..], &[(assistant, &then_second), (user, "More")]].concat();
    let entries = "Hello\n/compare first second\nAnd then?\n/adapter second\nMore\n";
    assert_eq!(ok(&bench, &args, entries), format!("{one}\n{both}{}\n", answer(&second, &more)));

    let brief = answer(&first, &[("system", "Be brief."), (user, "Hello")]);
    assert_eq!(ok(&bench, &args, "/system Be brief.\nHello\n"), format!("{brief}\n"));
    assert_eq!(ok(&bench, &[&args[..], &["--system", "Be brief."]].concat(), "Hello\n"), format!("{brief}\n"));
}

#[test]
fn settings_change_answers_and_another_seed_answers_anew() {
    let bench = Bench::new();
    let [model, ..] = models();
    let args = ["--model", &model];
    let hot = ["--model", &model, "--temperature", "1.5", "--seed", "3"];
    let expected = ok(&bench, &hot, "Hello\n");
    assert_eq!(ok(&bench, &args, "/set temperature 1.5\n/set seed 3\nHello\n"), expected);
    let next = ok(&bench, &[&hot[..4], &["--seed", "4"]].concat(), "Hello\n");
    assert_ne!(next, expected);
    assert_eq!(ok(&bench, &hot, "Hello\n/regenerate\n"), format!("{expected}{next}"));
    // Without chance, the same answer comes again, and is told to.
    let same = chat(&bench, &args, "Hello\n/regenerate\n");
    let (one, two) = same.stdout.split_at(same.stdout.len() / 2);
    assert!(one == two && same.stderr.contains("/set temperature"), "{}{}", same.stdout, same.stderr);
    assert!(!chat(&bench, &hot, "Hello\n/regenerate\n").stderr.contains("/set temperature"));
    let short = ok(&bench, &args, "/set max_new_tokens 1\nHello\n");
    assert!(ok(&bench, &args, "Hello\n").starts_with(short.trim_end()));
    let run = chat(&bench, &args, "/set\n/help\n");
    assert!(run.stderr.contains("max_new_tokens 8") && run.stderr.contains("/compare A B"), "{}", run.stderr);
    assert_eq!(run.stdout, "");
}

#[test]
fn a_mistake_ends_a_script_and_names_its_line() {
    let bench = Bench::new();
    let [model, first, _] = models();
    let args = ["--model", &model, "--adapter", &first];
    let fails = |args: &[&str], entries: &str, code: i32, words: &[&str]| {
        let run = chat(&bench, args, entries);
        assert_eq!(run.code, Some(code), "{entries}: {}", run.stderr);
        for word in words {
            assert!(run.stderr.contains(word), "{entries}: `{word}` is not in: {}", run.stderr);
        }
    };
    fails(&args, "Hello\n/adapter nobody\nHello\n", 2, &["line 2", "nobody", "base, first"]);
    fails(&args, "/set warmth 3\n", 2, &["line 1", "warmth"]);
    fails(&args, "/set top_p 0\n", 2, &["line 1", "/set top_p 0: must be above 0"]);
    fails(&args, "\"\"\"Hello\nthere\n", 2, &["the standard input ends between two of \"\"\""]);
    fails(&args, "Hello\\\n", 2, &["the standard input ends behind a line that ends with a backslash"]);
    fails(&args, "/fly\n", 2, &["line 1", "/help"]);
    fails(&args, "/regenerate\n", 2, &["no answer yet"]);
    fails(&[&args[..], &["--max-tokens", "16"]].concat(), &"Hello there. ".repeat(9), 2, &["line 1", "/reset", "16"]);
    fails(&["--model", &model, "--adapter", "absent"], "", 3, &["absent"]);
    let twice = [&args[..], &["--adapter", &first]].concat();
    fails(&twice, "", 2, &["\"first\" names two adapters"]);
    let base = first.replace("first=", "base=");
    fails(&["--model", &model, "--adapter", &base], "", 2, &["\"base\" is the base's name"]);
    fails(&["--model", &model, "--template-kwarg", "x"], "", 2, &["NAME=VALUE"]);
    bench.copy("tiny-llama", "no-template");
    std::fs::remove_file(bench.path("no-template/chat_template.jinja")).expect("removed");
    fails(&["--model", "no-template"], "", 3, &["no chat template", "--chat-template"]);
}

/// A chat on a terminal.
#[cfg(unix)]
struct OnTerminal {
    child: std::process::Child,
    typed: std::fs::File,
    shown: std::sync::mpsc::Receiver<Vec<u8>>,
    text: String,
}

#[cfg(unix)]
impl OnTerminal {
    fn start(bench: &Bench, args: &[&str]) -> Self {
        use std::io::Read;
        let nix::pty::OpenptyResult { master, slave } = nix::pty::openpty(None, None).expect("a terminal");
        let side = || Stdio::from(slave.try_clone().expect("a terminal"));
        let mut command = bench.command(&[&["chat", "--device", "cpu"], args].concat());
        command.env("TERM", "xterm").stdin(side()).stdout(side()).stderr(side());
        let child = command.spawn().expect("the program starts");
        let typed = std::fs::File::from(master);
        let mut screen = typed.try_clone().expect("a terminal");
        let (sender, shown) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = screen.read(&mut bytes) {
                if sender.send(bytes[..count].to_vec()).is_err() {
                    return;
                }
            }
        });
        Self { child, typed, shown, text: String::new() }
    }

    fn write(&mut self, text: &str) {
        self.typed.write_all(text.as_bytes()).expect("a terminal");
    }

    /// Waits until the text that is new since the last wait is what is looked for; returns it.
    fn wait(&mut self, is_there: impl Fn(&str) -> bool) -> String {
        while !is_there(&self.text) {
            // Longer than anything takes here on a machine with much else to do.
            let more = self.shown.recv_timeout(std::time::Duration::from_secs(120));
            let more = more.unwrap_or_else(|e| panic!("{e}: {:?}", self.text));
            self.text += &String::from_utf8_lossy(&more);
        }
        std::mem::take(&mut self.text)
    }

    fn signal(&self, name: &str) {
        let status = std::process::Command::new("kill").args([name, &self.child.id().to_string()]).status();
        assert!(status.is_ok_and(|status| status.success()));
    }

    fn code(&mut self) -> Option<i32> {
        self.child.wait().expect("the program ends").code()
    }
}

#[cfg(unix)]
impl Drop for OnTerminal {
    fn drop(&mut self) {
        // Of a test that failed; one that ended is gone already.
        drop(self.child.kill());
    }
}

#[cfg(unix)]
#[test]
fn ctrl_c_stops_an_answer_and_at_the_prompt_the_program() {
    let bench = Bench::new();
    let [model, first, _] = models();
    let (prompt, begun) = ("\u{1b}[?2004h", "\u{1b}[?2004l");
    let is_prompt = |text: &str| text.contains(prompt);
    let args = ["--model", &model, "--adapter", &first, "--max-new-tokens", "900", "--temperature", "1.5"];
    let mut chat = OnTerminal::start(&bench, &args);
    assert!(chat.wait(is_prompt).contains("first answers"));
    chat.write("Hello\r");
    chat.wait(|text| text.split_once(begun).is_some_and(|(_, answer)| answer.trim().len() > 8));
    chat.signal("-INT");
    let rest = chat.wait(is_prompt);
    assert!(!rest.contains("max_new_tokens"), "the answer came to its end: {rest}");
    // A mistake is told, and the conversation goes on; an entry of several lines is dropped by itself.
    chat.write("/adapter nobody\r");
    assert!(chat.wait(|text| text.contains("nobody\"") && is_prompt(text)).contains("base, first"));
    chat.write("\"\"\"\r");
    chat.wait(|text| text.contains("…"));
    chat.write("\u{3}");
    chat.wait(|text| text.contains("> "));
    chat.write("/set max_new_tokens 1\r");
    chat.wait(is_prompt);
    chat.write("Go on\r");
    assert!(chat.wait(|text| text.contains(begun) && is_prompt(text)).contains("stopped at max_new_tokens"));
    chat.write("\u{3}");
    assert_eq!(chat.code(), Some(0));

    let mut chat = OnTerminal::start(&bench, &args);
    chat.wait(is_prompt);
    chat.signal("-TERM");
    chat.wait(|text| text.contains(begun));
    assert_eq!(chat.code(), Some(130));
}
