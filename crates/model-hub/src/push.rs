//! Uploading files to a model repository of the hub, in one commit.
//!
//! hf-hub makes the repository and the branch, sends the large files to Xet, which keeps what it has already, and
//! makes the commit. Nothing is visible before the commit, so a push that breaks off leaves the repository as it was.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use hf_hub::RepoTypeModel;
use hf_hub::progress::{FileStatus, ProgressEvent, ProgressHandler, UploadEvent};
use hf_hub::repository::CommitOperation;

use crate::client::{Client, Failure};
use crate::{Direction, Hub, HubError, OnProgress, Place, Progress, RepoKind, is_hub_id, is_plain_path};

/// The largest file that may be part of the commit itself.
const MAX_INLINE: u64 = 10 << 20;

/// One file to upload.
#[derive(Debug, Clone)]
pub struct Upload {
    /// Its path in the repository.
    pub path: String,
    /// Its content.
    pub content: Content,
}

/// Where a file's content is.
#[derive(Debug, Clone)]
pub enum Content {
    /// On the disk.
    File(PathBuf),
    /// Here.
    Bytes(Vec<u8>),
}

impl Upload {
    fn size(&self) -> Result<u64, HubError> {
        match &self.content {
            Content::Bytes(bytes) => Ok(bytes.len() as u64),
            Content::File(path) => {
                let meta = std::fs::File::open(path).and_then(|file| file.metadata());
                Ok(meta.map_err(|source| HubError::Read { path: path.clone(), source })?.len())
            }
        }
    }

    fn operation(&self) -> CommitOperation {
        match &self.content {
            Content::Bytes(bytes) => CommitOperation::add_bytes(&self.path, bytes.clone()),
            Content::File(path) => CommitOperation::add_file(&self.path, path),
        }
    }
}

/// Where and how to push.
#[derive(Debug, Clone)]
pub struct PushOptions {
    /// The branch; made if it does not exist.
    pub revision: String,
    /// Whether a repository that is made now is private.
    pub private: bool,
    /// The commit's first line.
    pub summary: String,
}

/// What a push did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pushed {
    /// `user/name`.
    pub repo: String,
    /// The address of the commit, or of the repository.
    pub url: String,
    /// The commit.
    pub commit: String,
    /// Bytes of large files.
    pub large_bytes: u64,
    /// Bytes of them that were sent: not what the hub had already, of any repository, nor what repeats.
    pub sent_bytes: u64,
}

impl Hub {
    /// Uploads `files` to the model repository `repo` (`user/name`, or `name` for the token's own user), which is
    /// made if it does not exist.
    ///
    /// # Errors
    /// If there is no token or it may not write there, if the hub refuses or can't be reached, and for a file that
    /// can't be read.
    pub fn push(&self, repo: &str, files: &[Upload], options: &PushOptions) -> Result<Pushed, HubError> {
        let mut push = Push { hub: self, repo: repo.to_owned(), files, options };
        push.check()?;
        let mut largest = ("", 0);
        for file in files {
            let size = file.size()?;
            largest = if size > largest.1 { (file.path.as_str(), size) } else { largest };
        }
        let endpoint = self.endpoint.clone();
        let client = Client::new(self).map_err(|why| HubError::Client { endpoint: endpoint.clone(), why })?;
        push.create(&client)?;
        push.branch(&client)?;
        if largest.1 > MAX_INLINE && !push.has_xet(&client)? {
            return Err(HubError::NoXet { at: push.at(), file: largest.0.to_owned(), endpoint });
        }
        push.commit(&client)
    }
}

struct Push<'a> {
    hub: &'a Hub,
    repo: String,
    files: &'a [Upload],
    options: &'a PushOptions,
}

impl Push<'_> {
    fn at(&self) -> Box<Place> {
        Box::new(Place {
            kind: RepoKind::Model,
            repo: self.repo.clone(),
            revision: self.options.revision.clone(),
            file: None,
        })
    }

    /// Where the files on the disk come from.
    fn folder(&self) -> PathBuf {
        let mut paths = self.files.iter().filter_map(|file| match &file.content {
            Content::File(path) => path.parent(),
            Content::Bytes(_) => None,
        });
        paths.next().unwrap_or(Path::new("")).to_owned()
    }

    fn check(&self) -> Result<(), HubError> {
        let wrong = |problem: String| Err(HubError::Name { at: self.at(), problem });
        if !is_hub_id(&self.repo) {
            return wrong("a repository's name looks like `user/name`".into());
        }
        if !is_plain_path(&self.options.revision) {
            return wrong("this can't be the name of a branch".into());
        }
        if let Some(file) = self.files.iter().find(|file| !is_plain_path(&file.path)) {
            return wrong(format!("{:?} can't be a file's path in a repository", file.path));
        }
        if self.hub.offline {
            return Err(HubError::OfflineUpload { at: self.at() });
        }
        if self.hub.token.is_none() {
            return Err(HubError::NoToken { at: self.at(), endpoint: self.hub.endpoint.clone() });
        }
        Ok(())
    }

    /// A failure in words; `what` was being done.
    fn failed(&self, what: &'static str, failure: Failure) -> HubError {
        let (at, endpoint) = (self.at(), self.hub.endpoint.clone());
        match failure {
            Failure::NoAnswer(why) => HubError::UploadInterrupted { at, what, endpoint, why },
            Failure::Status { status: 401, .. } => HubError::InvalidToken { at, what, endpoint },
            Failure::Status { status: 403, message, .. } => HubError::NoWriteAccess { at, what, endpoint, message },
            Failure::Status { status, message, .. } => HubError::UploadRefused { at, what, status, message },
            Failure::Nonsense(problem) => HubError::Answer { at, endpoint, problem },
            // hf-hub does not say which file, but all of them are of this folder.
            Failure::Disk(source) => HubError::Read { path: self.folder(), source },
        }
    }

    fn create(&mut self, client: &Client<'_>) -> Result<(), HubError> {
        if !self.repo.contains('/') {
            let who = client.patient.whoami().send();
            let who = who.map_err(|error| self.failed("asking whose token it is", error.into()))?;
            self.repo = format!("{}/{}", who.username, self.repo);
        }
        let created = client.patient.create_repository().repo_id(&self.repo).repo_type(RepoTypeModel);
        match created.private(self.options.private).exist_ok(true).send().map_err(Failure::from) {
            Ok(_) => Ok(()),
            // A token for this repository alone may not make any.
            Err(Failure::Status { status: 403, .. }) if self.exists(client) => Ok(()),
            Err(failure) => Err(self.failed("making the repository", failure)),
        }
    }

    fn exists(&self, client: &Client<'_>) -> bool {
        client.model(&self.repo).exists().send().unwrap_or(false)
    }

    fn branch(&self, client: &Client<'_>) -> Result<(), HubError> {
        let revision = &self.options.revision;
        if revision == "main" {
            return Ok(());
        }
        match client.model(&self.repo).create_branch().branch(revision).send().map_err(Failure::from) {
            Ok(()) | Err(Failure::Status { status: 409, .. }) => Ok(()),
            Err(failure) => Err(self.failed("making the branch", failure)),
        }
    }

    fn has_xet(&self, client: &Client<'_>) -> Result<bool, HubError> {
        let asked = client.has_xet(&self.repo, &self.options.revision);
        asked.map_err(|failure| self.failed("asking where large files go", failure))
    }

    fn commit(&self, client: &Client<'_>) -> Result<Pushed, HubError> {
        let relay = Arc::new(Relay { to: self.hub.progress.clone(), state: Mutex::default() });
        let model = client.model(&self.repo);
        let commit = model
            .create_commit()
            .operations(self.files.iter().map(Upload::operation).collect())
            .commit_message(&self.options.summary)
            .revision(&self.options.revision)
            .progress(Arc::clone(&relay));
        let done = commit.send().map_err(|error| self.failed(relay.doing(), error.into()))?;
        let state = relay.state.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(Pushed {
            url: done.commit_url.unwrap_or_else(|| format!("{}/{}", self.hub.endpoint, self.repo)),
            commit: done.commit_oid.unwrap_or_default(),
            repo: self.repo.clone(),
            large_bytes: state.large_bytes,
            sent_bytes: state.sent_bytes,
        })
    }
}

/// Passes on what hf-hub says of an upload, and keeps its last word.
struct Relay {
    to: Option<OnProgress>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    large_bytes: u64,
    sent_bytes: u64,
    committing: bool,
}

impl Relay {
    fn doing(&self) -> &'static str {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.committing { "committing" } else { "uploading the files" }
    }
}

impl ProgressHandler for Relay {
    fn on_progress(&self, event: &ProgressEvent) {
        let ProgressEvent::Upload(event) = event else { return };
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match event {
            UploadEvent::Progress { bytes_completed, total_bytes, transfer_bytes_completed, files, .. } => {
                (state.large_bytes, state.sent_bytes) = (*total_bytes, *transfer_bytes_completed);
                drop(state);
                let moving = files.iter().find(|file| file.status != FileStatus::Complete).or(files.last());
                if let (Some(report), Some(file)) = (&self.to, moving) {
                    report(&Progress {
                        direction: Direction::Upload,
                        file: &file.filename,
                        done_bytes: *bytes_completed,
                        total_bytes: Some(*total_bytes),
                    });
                }
            }
            UploadEvent::Committing => state.committing = true,
            UploadEvent::Start { .. } | UploadEvent::Complete => {}
        }
    }
}
