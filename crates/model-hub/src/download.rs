//! One file of a repository, from the hub into the cache: resumed, checked, linked into its snapshot.
//!
//! A file lies in the cache as `blobs/<etag>`, where the etag is the SHA-256 of its content (large files) or the
//! SHA-1 that Git gives it. While it is loading it is `blobs/<etag>.incomplete` (`part.rs`), the name that Python's
//! `huggingface_hub` uses, so each goes on where the other broke off. A whole file is hashed, and one whose hash is
//! not its name never gets that name.
//!
//! A new file that is stored in Xet comes by Xet. hf-hub gives a blob its name before anyone has hashed it; it works
//! in a cache of its own, `xet/<name>` beside `blobs`, and what it leaves there, whole or not, becomes the part.
//! Whatever is missing then comes over HTTP by ranges, which the hub serves for every file.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use hf_hub::progress::{DownloadEvent, ProgressEvent, ProgressHandler};
use hf_hub::repository::RepoTreeEntry;

use crate::client::{Client, Failure, RETRIES, Sink};
use crate::part::{Part, blob_name};
use crate::{Direction, HubError, OnProgress, Place, Progress, Request, is_plain_path};

/// Where files come from and go to.
pub(crate) struct Remote<'a> {
    pub request: &'a Request<'a>,
    pub client: &'a Client<'a>,
    pub commit: &'a str,
}

/// What the hub says about a file.
struct FileInfo {
    etag: String,
    size: Option<u64>,
    xet: bool,
}

impl Remote<'_> {
    /// Puts `files` into the snapshot, those that are not there.
    pub(crate) fn fetch(&self, files: &[&str]) -> Result<(), HubError> {
        let snapshot = self.request.snapshot(self.commit);
        let files: Vec<&str> = files.iter().copied().filter(|file| !snapshot.join(file).exists()).collect();
        if files.is_empty() {
            return Ok(());
        }
        let mut infos = self.infos(&files)?;
        for file in files {
            let info = match infos.remove(file) {
                Some(info) => info,
                None => self.ask_for(file)?,
            };
            self.fetch_one(file, &info)?;
        }
        Ok(())
    }

    /// Checksums and sizes, in one question. A mirror may not know it: then each file is asked for, and says it
    /// where the hub refuses.
    fn infos(&self, files: &[&str]) -> Result<BTreeMap<String, FileInfo>, HubError> {
        let paths = files.iter().map(|file| (*file).to_owned()).collect();
        let repository = self.client.repository(self.request.repo);
        let entries = match repository.get_paths_info().paths(paths).revision(self.commit).send().map_err(Failure::from)
        {
            Ok(entries) => entries,
            Err(Failure::Status { .. } | Failure::Nonsense(_)) => return Ok(BTreeMap::new()),
            Err(failure) => return Err(self.failed(files[0], failure)),
        };
        let info = |entry| match entry {
            RepoTreeEntry::File { oid, size, path, lfs, xet_hash, .. } => {
                let etag = lfs.and_then(|lfs| lfs.sha256).unwrap_or(oid);
                Some((path, FileInfo { etag: plain_etag(&etag), size: Some(size), xet: xet_hash.is_some() }))
            }
            RepoTreeEntry::Directory { .. } => None,
        };
        Ok(entries.into_iter().filter_map(info).collect())
    }

    fn ask_for(&self, file: &str) -> Result<FileInfo, HubError> {
        let repository = self.client.repository(self.request.repo);
        let answer = repository.get_file_metadata().filepath(file).revision(self.commit).send();
        let found = answer.map_err(|error| self.failed(file, error.into()))?;
        // 0 stands for "not known", too.
        let size = Some(found.file_size).filter(|size| *size > 0);
        Ok(FileInfo { etag: plain_etag(&found.etag), size, xet: found.xet_hash.is_some() })
    }

    fn at(&self, file: &str) -> Box<Place> {
        let mut at = self.request.place();
        at.file = Some(file.to_owned());
        at
    }

    fn failed(&self, file: &str, failure: Failure) -> HubError {
        match failure {
            Failure::NoAnswer(why) => HubError::Interrupted { at: self.at(file), why },
            other => self.request.refused(self.at(file), other),
        }
    }

    fn fetch_one(&self, file: &str, info: &FileInfo) -> Result<(), HubError> {
        debug_assert!(is_plain_path(file));
        let disk = |path: &Path, source: io::Error| HubError::Write { path: path.to_owned(), source };
        let blobs = self.request.folder().join("blobs");
        fs::create_dir_all(&blobs).map_err(|e| disk(&blobs, e))?;
        let blob = blobs.join(blob_name(&info.etag));
        if !blob.exists() {
            let mut part = Part::open(&blob).map_err(|e| disk(&blob, e))?;
            // Another process may have finished it while this one waited for the lock.
            if !blob.exists() {
                self.by_xet(file, info, &mut part)?;
                self.load(file, info, &mut part)?;
                part.finish(&blob).map_err(|e| disk(&blob, e))?;
            }
        }
        let pointer = self.request.snapshot(self.commit).join(file);
        link(&blob, &pointer, file).map_err(|e| disk(&pointer, e))
    }

    /// Gets a new file by Xet, or a beginning of it. When that fails, HTTP does the rest.
    fn by_xet(&self, file: &str, info: &FileInfo, part: &mut Part) -> Result<(), HubError> {
        let disk = |path: &Path, source: io::Error| HubError::Write { path: path.to_owned(), source };
        let folder = self.request.folder().join("xet");
        let cache = folder.join(blob_name(&info.etag));
        let left = |part: &mut Part| match staged(&cache) {
            Some(path) => part.replace_by(&path).map_err(|e| disk(&path, e)),
            None => Ok(()),
        };
        if part.len().map_err(|e| disk(part.path(), e))? == 0 {
            // What a killed process left.
            left(part)?;
        }
        if info.xet && self.request.hub.xet && part.len().map_err(|e| disk(part.path(), e))? == 0 {
            let relay = Relay { file: file.to_owned(), total: info.size, to: self.request.hub.progress.clone() };
            let done = self.client.by_xet(self.request.repo, self.commit, file, &cache, Arc::new(relay).into());
            if let Err(failure) = done {
                tracing::warn!("{}: {failure:?}; going on over HTTP", self.at(file));
            }
            left(part)?;
        }
        drop(fs::remove_dir_all(&cache));
        // Stays where another file is on its way.
        drop(fs::remove_dir(&folder));
        Ok(())
    }

    /// Loads what is missing of a part and checks the whole.
    fn load(&self, file: &str, info: &FileInfo, part: &mut Part) -> Result<(), HubError> {
        let path = part.path().to_owned();
        let disk = |source: io::Error| HubError::Write { path: path.clone(), source };
        let mut resumed = part.len().map_err(disk)? > 0;
        loop {
            self.complete(file, info, part)?;
            let found = part.hash(&info.etag).map_err(disk)?;
            if found.is_none_or(|found| found == info.etag) {
                return Ok(());
            }
            part.restart().map_err(disk)?;
            if !resumed {
                drop(fs::remove_file(part.path()));
                return Err(HubError::Damaged { at: self.at(file), etag: info.etag.clone() });
            }
            // The part from before may have been another file's, or damaged: once more from the start.
            tracing::warn!("{}: the resumed download has another checksum; starting over", self.at(file));
            resumed = false;
        }
    }

    /// Asks for what is missing until nothing is.
    fn complete(&self, file: &str, info: &FileInfo, part: &mut Part) -> Result<(), HubError> {
        let path = part.path().to_owned();
        let disk = |source: io::Error| HubError::Write { path: path.clone(), source };
        let mut tries = 0;
        loop {
            let before = part.len().map_err(disk)?;
            if info.size == Some(before) && before > 0 {
                return Ok(());
            }
            // Without a size no range can be asked for, and what is too long is of another file.
            let range = info.size.filter(|size| before > 0 && before < *size).map(|size| before..size);
            if range.is_none() {
                part.restart().map_err(disk)?;
            }
            let mut incoming = Incoming { part, info, file, range: range.clone(), done: 0, to: self.report() };
            let outcome = self.client.stream(self.request.repo, self.commit, file, range, &mut incoming);
            let after = part.len().map_err(disk)?;
            let why = match outcome {
                Ok(()) if info.size.is_none_or(|size| after == size) => return Ok(()),
                Ok(()) => format!("{after} bytes came of {}", info.size.unwrap_or_default()),
                Err(Failure::Disk(source)) => return Err(disk(source)),
                // There is no such range: the part is not of this file.
                Err(Failure::Status { status: 416, .. }) => {
                    part.restart().map_err(disk)?;
                    "it has no such part of the file".into()
                }
                Err(Failure::NoAnswer(why)) => why,
                Err(failure) => return Err(self.failed(file, failure)),
            };
            // A connection that brought something is worth going on with.
            tries = if after > before { 0 } else { tries + 1 };
            if tries > RETRIES {
                return Err(HubError::Interrupted { at: self.at(file), why });
            }
            tracing::warn!("{}: {why}; trying again", self.at(file));
            std::thread::sleep(self.request.hub.retry_delay * 2u32.pow(tries.min(6)));
        }
    }

    fn report(&self) -> Option<OnProgress> {
        self.request.hub.progress.clone()
    }
}

/// Bytes on their way into a part.
struct Incoming<'a> {
    part: &'a mut Part,
    info: &'a FileInfo,
    file: &'a str,
    range: Option<std::ops::Range<u64>>,
    done: u64,
    to: Option<OnProgress>,
}

impl Sink for Incoming<'_> {
    fn begin(&mut self, length: Option<u64>) -> Result<(), Failure> {
        let wanted = self.range.as_ref().map(|range| range.end - range.start);
        match (wanted, length) {
            // The whole file comes instead.
            (Some(wanted), Some(length)) if length != wanted && Some(length) == self.info.size => {
                self.part.restart().map_err(Failure::Disk)?;
            }
            (Some(wanted), Some(length)) if length != wanted => {
                return Err(Failure::NoAnswer("it sent another part than was asked for".into()));
            }
            _ => {}
        }
        self.done = self.part.len().map_err(Failure::Disk)?;
        Ok(())
    }

    fn take(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        self.part.append(bytes).map_err(Failure::Disk)?;
        self.done += bytes.len() as u64;
        if self.info.size.is_some_and(|size| self.done > size) {
            // A server that knows no ranges and does not say so.
            self.part.restart().map_err(Failure::Disk)?;
            return Err(Failure::NoAnswer("it sent more than the hub announced".into()));
        }
        if let Some(report) = &self.to {
            let Self { file, done, info, .. } = self;
            report(&Progress { direction: Direction::Download, file, done_bytes: *done, total_bytes: info.size });
        }
        Ok(())
    }
}

/// Passes on what hf-hub says of a download by Xet.
struct Relay {
    file: String,
    total: Option<u64>,
    to: Option<OnProgress>,
}

impl ProgressHandler for Relay {
    fn on_progress(&self, event: &ProgressEvent) {
        let (Some(report), ProgressEvent::Download(DownloadEvent::Progress { files })) = (&self.to, event) else {
            return;
        };
        for file in files {
            let (direction, done_bytes) = (Direction::Download, file.bytes_completed);
            report(&Progress { direction, file: &self.file, done_bytes, total_bytes: self.total });
        }
    }
}

/// The blob in a cache that hf-hub filled with one file, whole or not.
fn staged(cache: &Path) -> Option<PathBuf> {
    let model = fs::read_dir(cache).ok()?.flatten().find(|entry| entry.file_name() != ".locks")?;
    Some(fs::read_dir(model.path().join("blobs")).ok()?.flatten().next()?.path())
}

fn plain_etag(etag: &str) -> String {
    etag.trim_start_matches("W/").trim_matches('"').to_ascii_lowercase()
}

/// Lets the snapshot's name for `file` stand for the blob.
fn link(blob: &Path, pointer: &Path, file: &str) -> io::Result<()> {
    let folder = pointer.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder)?;
    if pointer.symlink_metadata().is_ok() && !pointer.exists() {
        fs::remove_file(pointer)?;
    }
    #[cfg(unix)]
    {
        // Out of the file's own folders, the commit's and `snapshots`.
        let up = "../".repeat(file.split('/').count() + 1);
        let target = Path::new(&up).join("blobs").join(blob.file_name().unwrap_or_default());
        match std::os::unix::fs::symlink(target, pointer) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => return Ok(()),
            Ok(()) => return Ok(()),
            // A file system without links.
            Err(_) => {}
        }
    }
    fs::copy(blob, pointer).map(drop)
}
