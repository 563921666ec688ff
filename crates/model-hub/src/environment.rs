//! The environment's variables, by the rules of Python's `huggingface_hub`.

use std::path::PathBuf;
use std::time::Duration;

use crate::Hub;

const ENDPOINT: &str = "https://huggingface.co";
/// The pause before a request is tried again, about; it doubles from try to try.
const RETRY_DELAY: Duration = Duration::from_secs(1);

impl Hub {
    /// The hub as the environment describes it, by the rules of Python's `huggingface_hub`:
    ///
    /// | variable | meaning |
    /// |---|---|
    /// | `HF_HUB_CACHE`, formerly `HUGGINGFACE_HUB_CACHE` | the cache; else `HF_HOME/hub`, else `~/.cache/huggingface/hub` |
    /// | `HF_TOKEN`, formerly `HUGGING_FACE_HUB_TOKEN` | access token; else the file `HF_TOKEN_PATH`, else `HF_HOME/token` |
    /// | `HF_HUB_DISABLE_IMPLICIT_TOKEN` | `1`: no token |
    /// | `HF_ENDPOINT` | another hub, e.g. a mirror |
    /// | `HF_HUB_OFFLINE` | `1`: use the cache only |
    /// | `HF_HUB_DISABLE_XET` | `1`: download over HTTP alone |
    ///
    /// A `~` at the start of a path is the home folder, and `$NAME` and `${NAME}` are variables. Proxies come from
    /// `HTTP_PROXY`, `HTTPS_PROXY`, `ALL_PROXY` and `NO_PROXY`.
    pub fn from_env() -> Self {
        Self::from_vars(|name| std::env::var(name).ok())
    }

    /// As [`Hub::from_env`], with the variables from `get`.
    pub fn from_vars(get: impl Fn(&str) -> Option<String>) -> Self {
        let get = |name: &str| get(name).filter(|value| !value.trim().is_empty());
        let path = |name: &str| get(name).map(|value| PathBuf::from(expanded(&value, &get)));
        let is_on = |name: &str| {
            get(name).is_some_and(|value| ["1", "on", "yes", "true"].contains(&value.to_ascii_lowercase().as_str()))
        };
        let home = path("HF_HOME").unwrap_or_else(|| {
            let cache = path("XDG_CACHE_HOME").or_else(|| home_dir(&get).map(|home| home.join(".cache")));
            cache.unwrap_or_default().join("huggingface")
        });
        let token_path = path("HF_TOKEN_PATH").unwrap_or_else(|| home.join("token"));
        let token = get("HF_TOKEN")
            .or_else(|| get("HUGGING_FACE_HUB_TOKEN"))
            .or_else(|| std::fs::read_to_string(token_path).ok())
            .map(|token| token.trim().to_owned())
            .filter(|token| !token.is_empty() && !is_on("HF_HUB_DISABLE_IMPLICIT_TOKEN"));
        let cache_dir = path("HF_HUB_CACHE").or_else(|| path("HUGGINGFACE_HUB_CACHE"));
        Self {
            cache_dir: cache_dir.unwrap_or_else(|| home.join("hub")),
            endpoint: (get("HF_ENDPOINT").as_deref().unwrap_or(ENDPOINT)).trim_end_matches('/').to_owned(),
            token,
            offline: is_on("HF_HUB_OFFLINE") || is_on("TRANSFORMERS_OFFLINE"),
            xet: !is_on("HF_HUB_DISABLE_XET"),
            retry_delay: RETRY_DELAY,
            progress: None,
        }
    }
}

fn home_dir(get: &impl Fn(&str) -> Option<String>) -> Option<PathBuf> {
    get("HOME").map(PathBuf::from).or_else(std::env::home_dir)
}

/// Puts in the home folder for a leading `~`, and variables; one that is not set stays as it is written, as in
/// Python's `expandvars`.
fn expanded(text: &str, get: &impl Fn(&str) -> Option<String>) -> String {
    let home = home_dir(get).map(|home| home.display().to_string());
    let text = match (text.strip_prefix('~'), home) {
        (Some(rest), Some(home)) if rest.is_empty() || rest.starts_with(['/', '\\']) => format!("{home}{rest}"),
        _ => text.to_owned(),
    };
    let mut out = String::new();
    let mut rest = text.as_str();
    while let Some(at) = rest.find('$') {
        out += &rest[..at];
        rest = &rest[at..];
        let (whole, name) = variable(rest);
        match get(name).filter(|_| !name.is_empty()) {
            Some(value) => out += &value,
            None => out += &rest[..whole],
        }
        rest = &rest[whole..];
    }
    out + rest
}

/// The variable that `text` begins with: how long it is written, and its name.
fn variable(text: &str) -> (usize, &str) {
    if let Some(end) = text.strip_prefix("${").and_then(|rest| rest.find('}')) {
        return (end + 3, &text[2..end + 2]);
    }
    let name = &text[1..];
    let end = name.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(name.len());
    (end + 1, &name[..end])
}
