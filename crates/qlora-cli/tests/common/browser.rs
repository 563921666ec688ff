//! A headless Chromium, driven by the DevTools protocol: JSON over two pipes, each message ended by a zero byte.
//! <https://chromedevtools.github.io/devtools-protocol/>
#![allow(clippy::print_stderr, reason = "a test that can't run says so")]

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

use super::server::PATIENCE;

/// What the program is called.
const NAMES: [&str; 4] = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable"];

/// The shell gives the program its own standard input and output as the files 3 and 4, which are the protocol's.
const START: &str = "exec \"$0\" \"$@\" 3<&0 4>&1 </dev/null >/dev/null 2>/dev/null";

/// A browser with one page.
pub struct Browser {
    child: Child,
    to: ChildStdin,
    from: Receiver<Value>,
    calls: u64,
    session: String,
    /// What the page complained of: exceptions that nobody caught, and errors of its console.
    pub complaints: Vec<String>,
    _profile: TempDir,
}

impl Browser {
    /// Starts one. `None`, with a line about it, where there is none: the one that `QLORA_TEST_BROWSER` names, which
    /// must be there, or else one on the path.
    pub fn start() -> Option<Self> {
        let named = std::env::var("QLORA_TEST_BROWSER").ok();
        let names = named.as_deref().map_or(NAMES.to_vec(), |name| vec![name]);
        let is_there = |name: &&str| {
            let mut command = Command::new(name);
            command.arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|s| s.success())
        };
        let Some(name) = names.iter().find(|name| is_there(name)) else {
            assert!(named.is_none(), "QLORA_TEST_BROWSER names {named:?}, which does not start");
            eprintln!(
                "skipped: the page: no browser on the path ({}), and QLORA_TEST_BROWSER names none",
                NAMES.join(", ")
            );
            return None;
        };
        let profile = tempfile::tempdir().expect("a temporary folder");
        // The sandbox needs rights that test machines do not give; the page is our own.
        let flags =
            ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe"];
        let mut command = Command::new("sh");
        command.args(["-c", START, name]).args(flags).arg(format!("--user-data-dir={}", profile.path().display()));
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("the shell starts");
        let (to, messages) = (child.stdin.take().expect("piped"), child.stdout.take().expect("piped"));
        let (send, from) = channel();
        std::thread::spawn(move || {
            for message in BufReader::new(messages).split(0).map_while(Result::ok) {
                let message = serde_json::from_slice(&message).expect("a message is JSON");
                if send.send(message).is_err() {
                    return;
                }
            }
        });
        let (session, complaints) = (String::new(), Vec::new());
        let mut browser = Self { child, to, from, calls: 0, session, complaints, _profile: profile };
        let target = browser.call("Target.createTarget", json!({ "url": "about:blank" }))["targetId"].clone();
        let attached = browser.call("Target.attachToTarget", json!({ "targetId": target, "flatten": true }));
        browser.session = attached["sessionId"].as_str().expect("a session").to_string();
        browser.call("Runtime.enable", json!({}));
        browser.call("Log.enable", json!({}));
        Some(browser)
    }

    /// Calls a method and returns its result.
    fn call(&mut self, method: &str, params: Value) -> Value {
        self.calls += 1;
        let mut message = json!({ "id": self.calls, "method": method, "params": params });
        if !self.session.is_empty() {
            message["sessionId"] = self.session.as_str().into();
        }
        self.to.write_all(format!("{message}\0").as_bytes()).expect("the browser reads");
        loop {
            let message = self.from.recv_timeout(PATIENCE).unwrap_or_else(|e| panic!("{method}: {e}"));
            if message["id"] == self.calls {
                assert!(message["error"].is_null(), "{method}: {}", message["error"]);
                return message["result"].clone();
            }
            let params = &message["params"];
            match message["method"].as_str() {
                Some("Runtime.exceptionThrown") => self.complaints.push(params["exceptionDetails"].to_string()),
                Some("Log.entryAdded") if params["entry"]["level"] == "error" => {
                    self.complaints.push(params["entry"].to_string());
                }
                _ => {}
            }
        }
    }

    /// Goes to a page.
    pub fn open(&mut self, url: &str) {
        let went = self.call("Page.navigate", json!({ "url": url }));
        assert!(went["errorText"].is_null(), "{url}: {went}");
        self.wait("document.readyState === 'complete'");
    }

    /// The value of an expression in the page.
    pub fn value(&mut self, expression: &str) -> Value {
        let params =
            json!({ "expression": expression, "returnByValue": true, "awaitPromise": true, "userGesture": true });
        let result = self.call("Runtime.evaluate", params);
        assert!(result["exceptionDetails"].is_null(), "{expression}: {}", result["exceptionDetails"]);
        result["result"]["value"].clone()
    }

    /// Waits until an expression in the page is true.
    pub fn wait(&mut self, condition: &str) {
        let start = Instant::now();
        while self.value(condition) != true {
            if start.elapsed() > PATIENCE {
                let page = self.value("document.body.innerText");
                panic!("{condition} does not come true: {page}; {:?}", self.complaints);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Types a text into a field, in place of what stands there.
    pub fn type_into(&mut self, id: &str, text: &str) {
        self.value(&format!("document.getElementById({id:?}).focus(); document.getElementById({id:?}).select()"));
        self.call("Input.insertText", json!({ "text": text }));
    }

    /// Presses a key that is no letter.
    pub fn press(&mut self, key: &str, code: u32) {
        for kind in ["rawKeyDown", "keyUp"] {
            let params = json!({ "type": kind, "key": key, "code": key, "windowsVirtualKeyCode": code });
            self.call("Input.dispatchKeyEvent", params);
        }
    }

    /// Clicks in the middle of an element.
    pub fn click(&mut self, id: &str) {
        let middle = format!(
            "(() => {{ const e = document.getElementById({id:?}); e.scrollIntoView(); const r = e.getBoundingClientRect(); \
             return [r.x + r.width / 2, r.y + r.height / 2]; }})()"
        );
        let middle = self.value(&middle);
        for kind in ["mousePressed", "mouseReleased"] {
            let params = json!({ "type": kind, "x": middle[0], "y": middle[1], "button": "left", "clickCount": 1 });
            self.call("Input.dispatchMouseEvent", params);
        }
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // It ends its own processes when the pipe is closed; this is for one that hangs.
        drop(self.to.write_all(b"{\"id\": 0, \"method\": \"Browser.close\"}\0"));
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(10) {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        drop(self.child.kill());
    }
}
