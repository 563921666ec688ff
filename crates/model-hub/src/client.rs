//! hf-hub's clients, set up alike, and what their errors mean here.

use std::error::Error as _;
use std::io;
use std::ops::Range;
use std::time::Duration;

use futures_util::StreamExt as _;
use hf_hub::progress::Progress;
use hf_hub::{
    HFClient, HFClientBuilder, HFClientSync, HFError, HFRepository, HFRepositorySync, RepoType, RepoTypeAny,
    RepoTypeDataset, RepoTypeModel, split_id,
};

use crate::{Hub, RepoKind};

/// How long the hub may take to accept a connection.
const CONNECT: Duration = Duration::from_secs(30);
/// How long a connection may be silent: a commit of many files takes the hub a while.
const SILENCE: Duration = Duration::from_secs(120);
/// Tries beyond the first, when the network fails or the hub is busy.
pub(crate) const RETRIES: u32 = 5;
/// A token that no header can hold. hf-hub then sends none; without any it would look for one itself.
const NO_TOKEN: &str = "\0";
const USER_AGENT: &str = concat!("burn-qlora/", env!("CARGO_PKG_VERSION"));

/// Why there is no answer to use.
#[derive(Debug)]
pub(crate) enum Failure {
    /// No answer: the network, or a hub that is busy or broken. Another try may help.
    NoAnswer(String),
    /// An answer, and it is no.
    Status {
        status: u16,
        /// The hub's `X-Error-Code`.
        code: String,
        /// What it says.
        message: String,
    },
    /// An answer that makes no sense.
    Nonsense(String),
    /// A file of this machine.
    Disk(io::Error),
}

impl From<HFError> for Failure {
    fn from(error: HFError) -> Self {
        let context = match error {
            HFError::Http { context }
            | HFError::AuthRequired { context }
            | HFError::Forbidden { context }
            | HFError::Conflict { context }
            | HFError::RateLimited { context, .. } => context,
            HFError::RepoNotFound { context: Some(context), .. }
            | HFError::RevisionNotFound { context: Some(context), .. }
            | HFError::EntryNotFound { context: Some(context), .. } => context,
            HFError::RepoNotFound { .. } | HFError::RevisionNotFound { .. } | HFError::EntryNotFound { .. } => {
                return Self::Status { status: 404, code: String::new(), message: String::new() };
            }
            HFError::Io(error) => return Self::Disk(error),
            // Addresses of storage are signed, and stay out of messages.
            HFError::Request { source, .. } => return Self::of_request(&source.without_url()),
            HFError::Xet { operation, source } => return Self::NoAnswer(format!("Xet {operation}: {source}")),
            HFError::Json(error) => return Self::Nonsense(format!("gave an answer that can't be read: {error}")),
            other => return Self::Nonsense(format!("gave an answer that can't be used: {other}")),
        };
        let status = context.status.as_u16();
        if status >= 500 || status == 429 || status == 408 {
            return Self::NoAnswer(format!("it answered with HTTP status {status}"));
        }
        Self::Status {
            status,
            code: context.error_code.unwrap_or_default(),
            message: context.server_message.unwrap_or_default(),
        }
    }
}

impl Failure {
    fn of_request(error: &reqwest::Error) -> Self {
        let mut text = error.to_string();
        let mut cause = error.source();
        while let Some(inner) = cause {
            if inner.is::<serde_json::Error>() {
                return Self::Nonsense(format!("gave an answer that can't be read: {inner}"));
            }
            text = format!("{text}: {inner}");
            cause = inner.source();
        }
        Self::NoAnswer(text)
    }
}

/// What the hub says about a repository.
pub(crate) struct Info {
    /// The commit that the revision points to.
    pub commit: Option<String>,
    /// Paths of its files.
    pub files: Vec<String>,
    /// What stands above its README, of a data set.
    pub card: serde_json::Value,
}

/// Loads a file of a repository into `sink`. The repository's kind is a type: hf-hub 1.0 asks for files of `RepoTypeAny` as for a model's.
async fn stream<T: RepoType>(
    repository: HFRepository<T>,
    revision: &str,
    file: &str,
    range: Option<Range<u64>>,
    sink: &mut dyn Sink,
) -> Result<(), Failure> {
    let stream = repository.download_file_stream().filename(file).revision(revision).maybe_range(range);
    let (length, mut bytes) = stream.send().await?;
    sink.begin(length)?;
    while let Some(chunk) = bytes.next().await {
        sink.take(&chunk?)?;
    }
    Ok(())
}

fn any(kind: RepoKind) -> RepoTypeAny {
    match kind {
        RepoKind::Model => RepoTypeAny::Model,
        RepoKind::DataSet => RepoTypeAny::Dataset,
    }
}

/// Where a download goes.
pub(crate) trait Sink: Send {
    /// An answer begins; `length` is how much it holds, where that is known.
    fn begin(&mut self, length: Option<u64>) -> Result<(), Failure>;
    /// The next bytes of it.
    fn take(&mut self, bytes: &[u8]) -> Result<(), Failure>;
}

/// A connection to one hub.
pub(crate) struct Client<'a> {
    hub: &'a Hub,
    /// Tries again while there is no answer.
    pub patient: HFClientSync,
    /// Asks once.
    once: HFClientSync,
}

impl<'a> Client<'a> {
    /// # Errors
    /// If the hub's address is none, or the system's certificates can't be read.
    pub(crate) fn new(hub: &'a Hub) -> Result<Self, String> {
        let sync = |retries| builder(hub, retries)?.build_sync().map_err(|e| e.to_string());
        Ok(Self { hub, patient: sync(RETRIES)?, once: sync(0)? })
    }

    /// A model repository.
    pub(crate) fn model(&self, repo: &str) -> HFRepositorySync<RepoTypeModel> {
        let (owner, name) = split_id(repo);
        self.patient.model(owner, name)
    }

    /// A repository.
    pub(crate) fn repository(&self, (kind, repo): (RepoKind, &str)) -> HFRepositorySync<RepoTypeAny> {
        let (owner, name) = split_id(repo);
        self.patient.repository(any(kind), owner, name)
    }

    /// What the hub says about a repository; asked once, because the cache may do instead.
    pub(crate) fn info(&self, (kind, repo): (RepoKind, &str), revision: &str) -> Result<Info, Failure> {
        let (owner, name) = split_id(repo);
        let (sha, siblings, card) = match kind {
            RepoKind::Model => {
                let info = self.once.repository(RepoTypeModel, owner, name).info().revision(revision).send()?;
                (info.sha, info.siblings, None)
            }
            RepoKind::DataSet => {
                let info = self.once.repository(RepoTypeDataset, owner, name).info().revision(revision).send()?;
                (info.sha, info.siblings, info.card_data)
            }
        };
        let files = siblings.unwrap_or_default().into_iter().map(|file| file.rfilename).collect();
        Ok(Info { commit: sha, files, card: card.unwrap_or_default() })
    }

    /// Loads a file, or a part of it, into `sink`.
    pub(crate) fn stream(
        &self,
        (kind, repo): (RepoKind, &str),
        revision: &str,
        file: &str,
        range: Option<Range<u64>>,
        sink: &mut dyn Sink,
    ) -> Result<(), Failure> {
        // The caller counts the tries of a download, because one that brought something is no failed try.
        let client = self.asynchronous(0)?;
        let (owner, name) = split_id(repo);
        on_a_runtime(async move {
            match kind {
                RepoKind::Model => stream(client.model(owner, name), revision, file, range, sink).await,
                RepoKind::DataSet => stream(client.dataset(owner, name), revision, file, range, sink).await,
            }
        })
    }

    /// Has hf-hub load a file by Xet into a cache of its own at `cache_dir`.
    pub(crate) fn by_xet(
        &self,
        (kind, repo): (RepoKind, &str),
        commit: &str,
        file: &str,
        cache_dir: &std::path::Path,
        progress: Progress,
    ) -> Result<(), Failure> {
        let client = builder(self.hub, RETRIES).map_err(Failure::NoAnswer)?.cache_dir(cache_dir).build_sync()?;
        let (owner, name) = split_id(repo);
        let done = match kind {
            RepoKind::Model => {
                let repository = client.model(owner, name);
                repository.download_file().filename(file).revision(commit).progress(progress).send()
            }
            RepoKind::DataSet => {
                let repository = client.dataset(owner, name);
                repository.download_file().filename(file).revision(commit).progress(progress).send()
            }
        };
        done.map(drop).map_err(Failure::from)
    }

    /// Whether the hub stores large files of a repository in Xet.
    pub(crate) fn has_xet(&self, repo: &str, revision: &str) -> Result<bool, Failure> {
        let wrong = |why: String| Failure::Nonsense(format!("is no address: {why}"));
        let mut url = reqwest::Url::parse(&self.hub.endpoint).map_err(|e| wrong(e.to_string()))?;
        let mut path = url.path_segments_mut().map_err(|()| wrong("it has no path".into()))?;
        path.extend(["api", "models"]).extend(repo.split('/')).push("xet-write-token").push(revision);
        drop(path);
        let token = self.hub.token.as_deref().unwrap_or_default();
        let request = http().map_err(|e| Failure::of_request(&e))?.get(url).bearer_auth(token);
        on_a_runtime(async move {
            let answer = request.send().await.map_err(|e| Failure::of_request(&e.without_url()))?;
            Ok(answer.status().as_u16() != 404)
        })
    }

    fn asynchronous(&self, retries: u32) -> Result<HFClient, Failure> {
        Ok(builder(self.hub, retries).map_err(Failure::NoAnswer)?.build()?)
    }
}

/// The HTTP client that hf-hub is given: its own has no timeouts.
fn http() -> reqwest::Result<reqwest::Client> {
    reqwest::Client::builder().user_agent(USER_AGENT).connect_timeout(CONNECT).read_timeout(SILENCE).build()
}

fn builder(hub: &Hub, retries: u32) -> Result<HFClientBuilder, String> {
    let http = http().map_err(|e| match e.source() {
        Some(source) => format!("{e}: {source}"),
        None => e.to_string(),
    })?;
    Ok(HFClient::builder()
        .client(http)
        .user_agent(USER_AGENT)
        .endpoint(&hub.endpoint)
        .cache_dir(&hub.cache_dir)
        .token(hub.token.as_deref().unwrap_or(NO_TOKEN))
        .retry_max_attempts(retries as usize)
        .retry_base_delay(hub.retry_delay))
}

/// Runs a future to its end. It gets a thread, because the caller may be on a runtime of its own, where one must
/// not be blocked on.
fn on_a_runtime<T: Send>(future: impl Future<Output = Result<T, Failure>> + Send) -> Result<T, Failure> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Failure::Disk)?;
            runtime.block_on(future)
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}
