//! Data sets of the hub: what files one has, and those of them that are asked for.
//!
//! They go into the same cache, under `datasets--ORG--NAME`. A snapshot holds what was asked for and no more, so what a data set has is
//! kept beside it, as `listing/<commit>.json`: offline, what is missing is an error then and no smaller data set.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::client::{Client, Failure};
use crate::download::Remote;
use crate::{Hub, HubError, RepoKind, Request, is_commit, is_hub_id, is_plain_path};

/// A data set of the hub at one commit.
#[derive(Debug)]
pub struct DataSet<'a> {
    hub: &'a Hub,
    repo: &'a str,
    revision: &'a str,
    commit: String,
    /// Whether the hub answered; else the cache did.
    is_remote: bool,
    listing: Listing,
}

/// What a data set has.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Listing {
    files: Vec<String>,
    /// What stands above its README.
    card: serde_json::Value,
}

impl Hub {
    /// Looks a data set up: at the hub, or in the cache where the hub can't be reached or the revision is a commit. Files are
    /// downloaded by [`DataSet::fetch`].
    ///
    /// # Errors
    /// The hub does not have it, does not give it out, or can't be reached while the cache lacks it.
    pub fn data_set<'a>(&'a self, repo: &'a str, revision: Option<&'a str>) -> Result<DataSet<'a>, HubError> {
        if !is_hub_id(repo) {
            let problem = "no such file or folder (and a hub id looks like `org/name`)";
            return Err(HubError::Path { model: repo.to_owned(), problem });
        }
        let request = Request::new(self, (RepoKind::DataSet, repo), revision)?;
        let of_cache = || {
            let commit = request.cached_commit()?;
            let listing = std::fs::read(listing_path(&request, &commit)).ok()?;
            let listing = serde_json::from_slice(&listing).ok()?;
            Some(DataSet { hub: self, repo, revision: request.revision, commit, is_remote: false, listing })
        };
        let cached = of_cache();
        if self.offline {
            return cached.ok_or_else(|| HubError::Offline {
                at: request.place(),
                cache: self.cache_dir.clone(),
                missing: None,
            });
        }
        if is_commit(request.revision)
            && let Some(cached) = cached
        {
            return Ok(cached);
        }
        match (Client::new(self), of_cache()) {
            (Ok(client), cached) => match (client.info(request.repo, request.revision), cached) {
                (Ok(info), _) => {
                    let commit = request.commit(&info)?;
                    // Names from the network become paths.
                    let files = info.files.into_iter().filter(|file| is_plain_path(file)).collect();
                    let listing = Listing { files, card: info.card };
                    Ok(DataSet { hub: self, repo, revision: request.revision, commit, is_remote: true, listing })
                }
                (Err(Failure::NoAnswer(why)), Some(cached)) => {
                    tracing::warn!("{} can't be reached ({why}): using the cache's {repo}", self.endpoint);
                    Ok(cached)
                }
                (Err(Failure::NoAnswer(why)), None) => Err(HubError::Unreachable {
                    at: request.place(),
                    cache: self.cache_dir.clone(),
                    endpoint: self.endpoint.clone(),
                    why,
                }),
                (Err(failure), _) => Err(request.refused(request.place(), failure)),
            },
            (Err(why), Some(cached)) => {
                tracing::warn!("the hub's client does not start ({why}): using the cache's {repo}");
                Ok(cached)
            }
            (Err(why), None) => Err(HubError::Client { endpoint: self.endpoint.clone(), why }),
        }
    }
}

fn listing_path(request: &Request<'_>, commit: &str) -> PathBuf {
    debug_assert!(is_commit(commit));
    request.folder().join("listing").join(format!("{commit}.json"))
}

impl DataSet<'_> {
    /// Paths of its files, in the hub's order.
    pub fn files(&self) -> &[String] {
        &self.listing.files
    }

    /// What stands above its README (`configs`, `dataset_info`); null if there is nothing.
    pub fn card(&self) -> &serde_json::Value {
        &self.listing.card
    }

    /// The commit.
    pub fn commit(&self) -> &str {
        &self.commit
    }

    /// Downloads files that are not in the cache, and gives the folder that all of them are in.
    ///
    /// # Errors
    /// A file can't be had, or the cache can't be written.
    pub fn fetch(&self, files: &[&str]) -> Result<PathBuf, HubError> {
        let request = Request::new(self.hub, (RepoKind::DataSet, self.repo), Some(self.revision))?;
        let snapshot = request.snapshot(&self.commit);
        let missing =
            |folder: &Path| files.iter().find(|file| !folder.join(file).exists()).map(|file| (*file).to_owned());
        let Some(lacking) = missing(&snapshot) else { return self.done(&request, snapshot) };
        if self.hub.offline {
            let missing = Some(lacking);
            return Err(HubError::Offline { at: request.place(), cache: self.hub.cache_dir.clone(), missing });
        }
        let endpoint = self.hub.endpoint.clone();
        let client = Client::new(self.hub).map_err(|why| HubError::Client { endpoint, why })?;
        Remote { request: &request, client: &client, commit: &self.commit }.fetch(files)?;
        self.done(&request, snapshot)
    }

    /// Notes what was found, for when the hub is away.
    fn done(&self, request: &Request<'_>, snapshot: PathBuf) -> Result<PathBuf, HubError> {
        if self.is_remote {
            let path = listing_path(request, &self.commit);
            let json = serde_json::to_vec(&self.listing);
            let json = json.map_err(|source| HubError::Json { path: path.clone(), source })?;
            request.write_beside(&path, &json)?;
            request.write_ref(&self.commit)?;
        }
        Ok(snapshot)
    }
}
