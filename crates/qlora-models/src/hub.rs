//! Where a model comes from: a folder, or a model id of the Hugging Face hub.
//!
//! Downloads go into the cache that the Python libraries share, so a model is
//! fetched once whoever fetched it: `models--ORG--NAME/{refs,blobs,snapshots}` under `HF_HUB_CACHE`
//! or `HF_HOME/hub`. Only what this crate reads is downloaded: configuration, tokenizer, and
//! safetensors weights. All files come from one commit, the one the revision pointed to at first. They are
//! resumed and checked (`hub/download.rs`); [`push`] is the way back.

mod client;
mod download;
pub mod push;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use crate::error::ModelError;
use client::{Client, Failure, escaped, read_text};
use download::{FetchError, Remote};

const ENDPOINT: &str = "https://huggingface.co";
const CONFIG: &str = "config.json";
const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const ADAPTER_CONFIG: &str = "adapter_config.json";
const ADAPTER_WEIGHTS: &str = "adapter_model.safetensors";

/// Files beside the weights that this crate reads.
const SETTINGS: [&str; 9] = [
    CONFIG,
    ADAPTER_CONFIG,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
];

/// The pause before a request is tried again; it doubles from try to try.
const RETRY_DELAY: Duration = Duration::from_secs(1);

/// Finds the folder of a model or adapter: `model` is a folder, or a hub id, which is downloaded
/// unless the cache has it. See [`Hub::from_env`] for the environment variables.
///
/// # Errors
/// As [`Hub::resolve`].
pub fn resolve(model: &str, revision: Option<&str>) -> Result<PathBuf, ModelError> {
    Hub::from_env().resolve(model, revision)
}

/// A hub and the local cache of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hub {
    /// Folder that holds `models--ORG--NAME` folders.
    pub cache_dir: PathBuf,
    /// Address of the hub, without a slash at the end.
    pub endpoint: String,
    /// Access token for private and gated models.
    pub token: Option<String>,
    /// Whether only the cache may be used.
    pub offline: bool,
    /// Whether downloads show a progress bar on the terminal.
    pub progress: bool,
    /// The pause before a request is tried again; it doubles from try to try.
    pub retry_delay: Duration,
}

impl Hub {
    /// The hub as the environment describes it, by the rules of Python's `huggingface_hub`:
    ///
    /// | variable | meaning |
    /// |---|---|
    /// | `HF_HUB_CACHE` | the cache; else `HF_HOME/hub`, else `~/.cache/huggingface/hub` |
    /// | `HF_TOKEN` | access token; else the file `HF_TOKEN_PATH`, else `HF_HOME/token` |
    /// | `HF_ENDPOINT` | another hub, e.g. a mirror |
    /// | `HF_HUB_OFFLINE` | `1`: use the cache only |
    pub fn from_env() -> Self {
        Self::from_vars(|name| std::env::var(name).ok())
    }

    /// As [`Hub::from_env`], with the variables from `get`.
    pub fn from_vars(get: impl Fn(&str) -> Option<String>) -> Self {
        let get = |name: &str| get(name).filter(|value| !value.trim().is_empty());
        let path = |name: &str| get(name).map(PathBuf::from);
        let home = path("HF_HOME").unwrap_or_else(|| {
            let cache = path("XDG_CACHE_HOME");
            let cache = cache.or_else(|| std::env::home_dir().map(|home| home.join(".cache")));
            cache.unwrap_or_default().join("huggingface")
        });
        let token_path = path("HF_TOKEN_PATH").unwrap_or_else(|| home.join("token"));
        let token = get("HF_TOKEN")
            .or_else(|| std::fs::read_to_string(token_path).ok())
            .map(|token| token.trim().to_owned())
            .filter(|token| !token.is_empty());
        let is_on = |name: &str| {
            get(name).is_some_and(|value| ["1", "on", "yes", "true"].contains(&value.to_ascii_lowercase().as_str()))
        };
        Self {
            cache_dir: path("HF_HUB_CACHE").unwrap_or_else(|| home.join("hub")),
            endpoint: (get("HF_ENDPOINT").as_deref().unwrap_or(ENDPOINT)).trim_end_matches('/').to_owned(),
            token,
            offline: is_on("HF_HUB_OFFLINE") || is_on("TRANSFORMERS_OFFLINE"),
            progress: true,
            retry_delay: RETRY_DELAY,
        }
    }

    /// Finds the folder of a model or adapter.
    ///
    /// A folder of that name wins over a hub id. Of a hub id the newest state of the revision
    /// (default `main`) is taken; when the hub can't be reached, the newest state in the cache. A
    /// full commit hash that is in the cache needs no network.
    ///
    /// # Errors
    /// [`ModelError::ModelPath`] if `model` can be neither, [`ModelError::Hub`] if the hub does not
    /// have it, does not give it out, or can't be reached while the cache lacks it.
    pub fn resolve(&self, model: &str, revision: Option<&str>) -> Result<PathBuf, ModelError> {
        let path_error =
            |problem: &str| Err(ModelError::ModelPath { model: model.to_owned(), problem: problem.to_owned() });
        let path = Path::new(model);
        match (path.is_dir(), revision) {
            (true, None) => return Ok(path.to_owned()),
            (true, Some(_)) => {
                return path_error("a local folder has no revisions; leave the revision out");
            }
            _ if path.exists() => {
                return path_error("this is a file; give the folder that holds the checkpoint");
            }
            _ if model.is_empty() => return path_error("no model given: a folder or a hub id"),
            _ if !is_hub_id(model) => {
                return path_error("no such folder (and a hub id looks like `org/name`)");
            }
            _ => {}
        }
        let request = Request { hub: self, model, revision: revision.unwrap_or("main") };
        if !is_plain_path(request.revision) {
            return Err(request.error("this can't be the name of a branch or tag, or a commit".into()));
        }
        request.resolve()
    }
}

/// `name` or `org/name`, of letters, digits, `-`, `_` and `.`.
pub fn is_hub_id(model: &str) -> bool {
    let is_part = |part: &str| {
        !part.is_empty()
            && !part.starts_with(['.', '-'])
            && !part.ends_with(['.', '-'])
            && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    model.len() <= 200
        && model.split('/').count() <= 2
        && model.split('/').all(is_part)
        && !model.contains("--")
        && !model.contains("..")
}

/// What the hub says about a model, of which more is known than is needed.
#[derive(Debug, Deserialize)]
struct ModelInfo {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Debug, Deserialize)]
struct Sibling {
    rfilename: String,
}

/// `model.safetensors.index.json`: tensor name to file.
#[derive(Debug, Deserialize)]
struct WeightIndex {
    weight_map: std::collections::BTreeMap<String, String>,
}

/// Why the hub did not describe a model.
enum InfoError {
    /// No answer; the cache may do.
    Unreachable(String),
    /// An answer, and it is no.
    Refused(ModelError),
}

struct Request<'a> {
    hub: &'a Hub,
    model: &'a str,
    revision: &'a str,
}

impl Request<'_> {
    fn resolve(&self) -> Result<PathBuf, ModelError> {
        let cached = self.cached();
        if self.hub.offline {
            return match cached {
                Ok(Some(dir)) => Ok(dir),
                Ok(None) => Err(self.error(format!(
                    "there is no folder of that name, it is not in the cache {}, and offline mode is \
                     on; unset HF_HUB_OFFLINE to download it",
                    self.hub.cache_dir.display()
                ))),
                Err(missing) => Err(self.error(format!(
                    "the cache {} lacks its {missing}, and offline mode is on; unset HF_HUB_OFFLINE \
                     to download it",
                    self.hub.cache_dir.display()
                ))),
            };
        }
        if let (true, Ok(Some(dir))) = (is_commit(self.revision), &cached) {
            return Ok(dir.clone());
        }
        let client = Client::new(self.hub);
        match self.info(&client) {
            Ok(info) => self.download(&client, &info),
            Err(InfoError::Refused(error)) => Err(error),
            Err(InfoError::Unreachable(why)) => match cached {
                Ok(Some(dir)) => {
                    tracing::warn!("{} can't be reached ({why}): using {}", self.hub.endpoint, dir.display());
                    Ok(dir)
                }
                _ => Err(self.error(format!(
                    "there is no folder of that name, it is not complete in the cache {}, and {} can't \
                     be reached: {why}",
                    self.hub.cache_dir.display(),
                    self.hub.endpoint
                ))),
            },
        }
    }

    fn error(&self, problem: String) -> ModelError {
        ModelError::Hub { model: self.model.to_owned(), revision: self.revision.to_owned(), problem }
    }

    /// The model's folder in the cache.
    fn folder(&self) -> PathBuf {
        self.hub.cache_dir.join(format!("models--{}", self.model.replace('/', "--")))
    }

    fn snapshot(&self, commit: &str) -> PathBuf {
        self.folder().join("snapshots").join(commit)
    }

    /// The cached snapshot of the revision; an error names the file that an incomplete one lacks.
    fn cached(&self) -> Result<Option<PathBuf>, String> {
        let commit = match std::fs::read_to_string(self.folder().join("refs").join(self.revision)) {
            // What stands there becomes a path.
            Ok(commit) if is_commit(commit.trim()) => commit.trim().to_owned(),
            Ok(_) => return Ok(None),
            Err(_) if is_commit(self.revision) => self.revision.to_owned(),
            Err(_) => return Ok(None),
        };
        let dir = self.snapshot(&commit);
        if !dir.is_dir() {
            return Ok(None);
        }
        missing_file(&dir).map_or(Ok(Some(dir)), Err)
    }

    fn info(&self, client: &Client<'_>) -> Result<ModelInfo, InfoError> {
        let url = client.url(&format!("/api/models/{}/revision/{}", self.model, escaped(self.revision)));
        // Tried once: the cache may do instead.
        let response = client.get("GET", &url, &[], false).and_then(|mut response| read_text(&mut response));
        let body = response.map_err(|failure| match failure {
            Failure::Unreachable(why) => InfoError::Unreachable(why),
            Failure::Status { status, code, .. } => {
                InfoError::Refused(self.error(refusal(self.hub, self.model, status, &code)))
            }
        })?;
        serde_json::from_str(&body).map_err(|e| {
            let problem = format!("{} sent a description that can't be read: {e}", self.hub.endpoint);
            InfoError::Refused(self.error(problem))
        })
    }

    fn download(&self, client: &Client<'_>, info: &ModelInfo) -> Result<PathBuf, ModelError> {
        // Names from the network become paths: nothing may climb out of the snapshot.
        if !is_commit(&info.sha) {
            return Err(self.error(format!("{} sent the commit {:?}", self.hub.endpoint, info.sha)));
        }
        let folder = self.folder();
        let dir = self.snapshot(&info.sha);
        let remote = Remote { hub: self.hub, model: self.model, commit: &info.sha, folder: &folder };
        let files: BTreeSet<&str> = info.siblings.iter().map(|file| file.rfilename.as_str()).collect();
        let weights = self.weights(&files)?;
        for file in SETTINGS.into_iter().filter(|file| files.contains(file)).chain([weights]) {
            self.fetch(client, &remote, file)?;
        }
        if weights == INDEX {
            for shard in shards(&dir.join(INDEX))? {
                if !files.contains(shard.as_str()) {
                    return Err(self.error(format!("{INDEX} names {shard}, which the hub does not have")));
                }
                self.fetch(client, &remote, &shard)?;
            }
        }
        let refs = folder.join("refs").join(self.revision);
        let written = std::fs::create_dir_all(refs.parent().unwrap_or(&folder))
            .map_err(|source| adapter_io::FormatError::Write { path: refs.clone(), source });
        written.and_then(|()| adapter_io::atomic::write_bytes(&refs, info.sha.as_bytes()))?;
        Ok(dir)
    }

    /// The file to start from: whole weights, the index of sharded ones, or an adapter's.
    fn weights(&self, files: &BTreeSet<&str>) -> Result<&'static str, ModelError> {
        let pairs = [(CONFIG, WEIGHTS), (CONFIG, INDEX), (ADAPTER_CONFIG, ADAPTER_WEIGHTS)];
        let found = pairs.into_iter().find(|(config, weights)| files.contains(config) && files.contains(weights));
        if let Some((_, weights)) = found {
            return Ok(weights);
        }
        let is_weights = |file: &&&str| [".bin", ".pth", ".gguf", ".safetensors"].iter().any(|end| file.ends_with(end));
        let others: Vec<&str> = files.iter().filter(is_weights).take(4).copied().collect();
        let others = if others.is_empty() { "no weights at all".into() } else { others.join(", ") };
        Err(self.error(format!(
            "the hub has neither {CONFIG} with {WEIGHTS} or {INDEX}, nor {ADAPTER_CONFIG} with \
             {ADAPTER_WEIGHTS}, but {others}; choose a model in the safetensors format"
        )))
    }

    fn fetch(&self, client: &Client<'_>, remote: &Remote<'_>, file: &str) -> Result<(), ModelError> {
        remote.fetch(client, file).map_err(|error| {
            self.error(match error {
                FetchError::Problem(text) => text,
                FetchError::Refused { status, code } => {
                    format!("{file}: {}", refusal(self.hub, self.model, status, &code))
                }
            })
        })
    }
}

/// What a status means. The hub answers 401 for private and for missing models alike.
fn refusal(hub: &Hub, model: &str, status: u16, code: &str) -> String {
    let Hub { endpoint, token, .. } = hub;
    match (status, code) {
        (_, "RevisionNotFound") => format!("{endpoint} has the model, but not this revision"),
        (403, _) | (_, "GatedRepo") => format!(
            "access is restricted: accept the licence at {endpoint}/{model}, then set HF_TOKEN to a token of that account"
        ),
        (401 | 404, _) => {
            let token = match token {
                Some(_) => "the token in use has no access to it",
                None => "it is private: then set HF_TOKEN",
            };
            format!(
                "there is no folder of that name, and {endpoint} has no such model; check the spelling, unless {token}"
            )
        }
        _ => format!("{endpoint} answered with HTTP status {status}"),
    }
}

/// A relative path that stays below where it starts.
fn is_plain_path(path: &str) -> bool {
    let is_part = |part: &str| !part.is_empty() && part != "." && part != ".." && !part.contains(['\\', ':', '\0']);
    path.split('/').all(is_part)
}

/// A full commit hash.
fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|b| b.is_ascii_hexdigit())
}

/// The file a snapshot lacks to be a model or an adapter.
fn missing_file(dir: &Path) -> Option<String> {
    let lacks = |file: &str| !dir.join(file).exists();
    if !lacks(ADAPTER_CONFIG) && lacks(CONFIG) {
        return lacks(ADAPTER_WEIGHTS).then(|| ADAPTER_WEIGHTS.to_owned());
    }
    if lacks(CONFIG) {
        return Some(CONFIG.to_owned());
    }
    if !lacks(WEIGHTS) {
        return None;
    }
    if lacks(INDEX) {
        return Some(WEIGHTS.to_owned());
    }
    match shards(&dir.join(INDEX)) {
        Ok(shards) => shards.into_iter().find(|shard| lacks(shard)),
        Err(_) => Some(INDEX.to_owned()),
    }
}

/// The files an index names.
fn shards(index: &Path) -> Result<BTreeSet<String>, ModelError> {
    let bytes = std::fs::read(index).map_err(|source| ModelError::Read { path: index.to_owned(), source })?;
    let json = |source| ModelError::Json { path: index.to_owned(), source };
    let parsed: WeightIndex = serde_json::from_slice(&bytes).map_err(json)?;
    let files: BTreeSet<String> = parsed.weight_map.into_values().collect();
    match files.iter().find(|file| file.contains(['/', '\\']) || file.starts_with('.')) {
        None => Ok(files),
        Some(file) => Err(ModelError::Field {
            path: index.to_owned(),
            field: "weight_map".into(),
            problem: format!("names {file:?}, which is not a file beside it"),
        }),
    }
}
