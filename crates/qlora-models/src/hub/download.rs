//! One file of a model, from the hub into the cache: resumed, checked, linked into its snapshot.
//!
//! A file lies in the cache as `blobs/<etag>`, where the etag is the SHA-256 of its content (large files, in
//! Git LFS) or the SHA-1 that Git gives it. While it is loading it is `blobs/<etag>.incomplete`, the name that
//! Python's `huggingface_hub` uses, so each goes on where the other broke off. A whole file
//! is hashed, and one whose hash is not its name never gets that name.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use indicatif::{ProgressBar, ProgressStyle};
use sha1::{Digest, Sha1};
use sha2::Sha256;
use ureq::http::{HeaderMap, header};

use super::Hub;
use super::client::{Client, Failure, RETRIES, escaped, escaped_path};

/// Where a file comes from and goes to.
pub(super) struct Remote<'a> {
    pub hub: &'a Hub,
    pub model: &'a str,
    pub commit: &'a str,
    /// `models--ORG--NAME` in the cache.
    pub folder: &'a Path,
}

/// Why a file did not come.
pub(super) enum FetchError {
    /// The hub says no.
    Refused { status: u16, code: String },
    /// Anything else, with what to do.
    Problem(String),
}

/// What the hub says about a file.
struct FileInfo {
    etag: String,
    size: Option<u64>,
}

impl Remote<'_> {
    /// Puts `file` into the snapshot, unless it is there.
    pub(super) fn fetch(&self, client: &Client<'_>, file: &str) -> Result<(), FetchError> {
        let pointer = self.folder.join("snapshots").join(self.commit).join(file);
        if pointer.exists() {
            return Ok(());
        }
        let url = client.url(&format!("/{}/resolve/{}/{}", self.model, escaped(self.commit), escaped_path(file)));
        let problem = |text: String| FetchError::Problem(format!("{file}: {text}"));
        let disk = |path: &Path, e: io::Error| problem(format!("can't write {}: {e}", path.display()));
        let info = client.retry(|| file_info(client, &url)).map_err(|failure| match failure {
            Failure::Status { status, code, .. } => FetchError::Refused { status, code },
            Failure::Unreachable(why) => problem(format!("{why}; what was downloaded is kept, run again to continue")),
        })?;
        let blobs = self.folder.join("blobs");
        fs::create_dir_all(&blobs).map_err(|e| disk(&blobs, e))?;
        let blob = blobs.join(blob_name(&info.etag));
        if !blob.exists() {
            let mut part = Part::open(&blob).map_err(|e| disk(&blob, e))?;
            // Another process may have finished it while this one waited for the lock.
            if !blob.exists() {
                let bar = self.hub.progress.then(|| bar(file, info.size));
                self.load(client, &url, &info, &mut part, bar.as_ref()).map_err(|error| match error {
                    FetchError::Problem(text) => problem(text),
                    refused => refused,
                })?;
                if let Some(bar) = bar {
                    bar.finish_and_clear();
                }
                part.file.sync_all().and_then(|()| fs::rename(&part.path, &blob)).map_err(|e| disk(&blob, e))?;
            }
        }
        link(&blob, &pointer).map_err(|e| disk(&pointer, e))
    }

    /// Loads what is missing of a part and checks the whole.
    fn load(
        &self,
        client: &Client<'_>,
        url: &str,
        info: &FileInfo,
        part: &mut Part,
        bar: Option<&ProgressBar>,
    ) -> Result<(), FetchError> {
        let problem = |text: String| FetchError::Problem(text);
        let disk = |path: &Path, e: io::Error| problem(format!("can't write {}: {e}", path.display()));
        let resumed = part.len().map_err(|e| disk(&part.path, e))? > 0;
        let mut tries = 0;
        loop {
            let before = part.len().map_err(|e| disk(&part.path, e))?;
            if info.size.is_some_and(|size| before > size) {
                part.restart().map_err(|e| disk(&part.path, e))?;
                continue;
            }
            if info.size == Some(before) {
                break;
            }
            let outcome = load_once(client, url, before, part, bar);
            let after = part.len().map_err(|e| disk(&part.path, e))?;
            match outcome {
                Ok(()) if info.size.is_none_or(|size| after == size) => break,
                Ok(()) if info.size.is_some_and(|size| after > size) => {
                    return Err(problem(format!("{after} bytes came, the hub announced {:?}", info.size)));
                }
                Err(LoadError::Disk(e)) => return Err(disk(&part.path, e)),
                Err(LoadError::Hub(Failure::Status { status, code, .. })) => {
                    return Err(FetchError::Refused { status, code });
                }
                Ok(()) | Err(LoadError::Hub(Failure::Unreachable(_))) => {
                    // A connection that brought something is worth going on with.
                    tries = if after > before { 0 } else { tries + 1 };
                    if tries > RETRIES {
                        let why = match outcome {
                            Err(LoadError::Hub(Failure::Unreachable(why))) => why,
                            _ => "the connection ended early".into(),
                        };
                        return Err(problem(format!("{why}; what was downloaded is kept, run again to continue")));
                    }
                    client.pause(tries);
                }
            }
        }
        let found = part.hash(&info.etag).map_err(|e| disk(&part.path, e))?;
        if found.is_none_or(|found| found == info.etag) {
            return Ok(());
        }
        part.restart().map_err(|e| disk(&part.path, e))?;
        if resumed {
            // The part from before may have been another file's, or damaged: once more from the start.
            tracing::warn!("{url}: the resumed download has another checksum; starting over");
            return self.load(client, url, info, part, bar);
        }
        drop(fs::remove_file(&part.path));
        Err(problem(format!(
            "its content has another checksum than the hub announced ({}); it was damaged on the way or at a mirror: try again",
            info.etag
        )))
    }
}

/// Asks for etag and size, which the hub gives in place of the redirect to where the content is.
fn file_info(client: &Client<'_>, url: &str) -> Result<FileInfo, Failure> {
    let response = client.get("HEAD", url, &[], true)?;
    let headers = response.headers();
    let etag = text(headers, "x-linked-etag").or_else(|| text(headers, "etag")).unwrap_or_default();
    let etag = etag.trim_start_matches("W/").trim_matches('"').to_ascii_lowercase();
    if etag.is_empty() {
        return Err(Failure::Unreachable(format!("{url} has no ETag; is it a hub?")));
    }
    let redirected = response.status().is_redirection();
    let size = text(headers, "x-linked-size").or_else(|| text(headers, "content-length").filter(|_| !redirected));
    Ok(FileInfo { etag, size: size.and_then(|size| size.parse().ok()) })
}

fn text(headers: &HeaderMap, name: &str) -> Option<String> {
    Some(headers.get(name)?.to_str().ok()?.trim().to_owned())
}

enum LoadError {
    Disk(io::Error),
    Hub(Failure),
}

/// One request for what is missing; what comes is appended.
fn load_once(
    client: &Client<'_>,
    url: &str,
    have: u64,
    part: &mut Part,
    bar: Option<&ProgressBar>,
) -> Result<(), LoadError> {
    let range: Vec<_> = (have > 0).then(|| ("range", format!("bytes={have}-"))).into_iter().collect();
    let mut response = match client.get("GET", url, &range, false) {
        // There is no such range: the part is not of this file.
        Err(Failure::Status { status: 416, .. }) => {
            part.restart().map_err(LoadError::Disk)?;
            return Err(LoadError::Hub(Failure::Unreachable("it has no such part of the file".into())));
        }
        other => other.map_err(LoadError::Hub)?,
    };
    let start = match response.status().as_u16() {
        206 => text(response.headers(), header::CONTENT_RANGE.as_str())
            .and_then(|range| range.strip_prefix("bytes ")?.split('-').next()?.parse::<u64>().ok()),
        _ => Some(0),
    };
    match start {
        Some(start) if start == have => {}
        // The whole file comes instead.
        Some(0) => part.restart().map_err(LoadError::Disk)?,
        _ => return Err(LoadError::Hub(Failure::Unreachable("it sent another part than was asked for".into()))),
    }
    let mut body = response.body_mut().as_reader();
    let mut buffer = vec![0; 1 << 18];
    let mut done = part.len().map_err(LoadError::Disk)?;
    loop {
        let n = match body.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(LoadError::Hub(Failure::Unreachable(e.to_string()))),
        };
        part.file.write_all(&buffer[..n]).map_err(LoadError::Disk)?;
        done += n as u64;
        if let Some(bar) = bar {
            bar.set_position(done);
        }
    }
}

/// A file that is not whole yet, locked against other processes.
struct Part {
    path: PathBuf,
    file: File,
}

impl Part {
    fn open(blob: &Path) -> io::Result<Self> {
        let mut name = blob.as_os_str().to_owned();
        name.push(".incomplete");
        let path = PathBuf::from(name);
        loop {
            let file = OpenOptions::new().read(true).append(true).create(true).open(&path)?;
            match file.lock() {
                Err(e) if e.kind() == io::ErrorKind::Unsupported => {}
                done => done?,
            }
            // Whoever had the lock has renamed it; what is locked now must be what lies there.
            if blob.exists() || same_file(&file, &path) {
                return Ok(Self { path, file });
            }
        }
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    fn restart(&self) -> io::Result<()> {
        self.file.set_len(0)
    }

    /// The content's hash of the kind that the etag is; `None` for an etag that is no hash.
    fn hash(&mut self, etag: &str) -> io::Result<Option<String>> {
        let is_hash = |digits: usize| etag.len() == digits && etag.bytes().all(|b| b.is_ascii_hexdigit());
        self.file.seek(SeekFrom::Start(0))?;
        if is_hash(64) {
            return digest(Sha256::new(), &mut self.file).map(Some);
        }
        if is_hash(40) {
            let mut hasher = Sha1::new();
            hasher.update(format!("blob {}\0", self.len()?));
            return digest(hasher, &mut self.file).map(Some);
        }
        Ok(None)
    }
}

/// Feeds all of a file to a hash; its hexadecimal digits.
pub(super) fn digest<D: Digest>(mut hasher: D, file: &mut impl Read) -> io::Result<String> {
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hasher.finalize().iter().map(|b| format!("{b:02x}")).collect()),
            n => hasher.update(&buffer[..n]),
        }
    }
}

#[cfg(unix)]
fn same_file(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let id = |meta: fs::Metadata| (meta.dev(), meta.ino());
    matches!((file.metadata().map(id), path.metadata().map(id)), (Ok(one), Ok(other)) if one == other)
}

#[cfg(not(unix))]
fn same_file(_: &File, path: &Path) -> bool {
    // An open file cannot be renamed away here.
    path.exists()
}

/// A name in `blobs`: the etag, or the hash of one that is no plain name.
fn blob_name(etag: &str) -> String {
    let plain = etag.len() <= 128 && etag.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
    if plain {
        return etag.to_owned();
    }
    let hash = Sha256::digest(etag.as_bytes());
    hash.iter().map(|b| format!("{b:02x}")).collect()
}

/// Lets the snapshot's name stand for the blob.
fn link(blob: &Path, pointer: &Path) -> io::Result<()> {
    let folder = pointer.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder)?;
    if pointer.symlink_metadata().is_ok() && !pointer.exists() {
        fs::remove_file(pointer)?;
    }
    #[cfg(unix)]
    {
        let target = Path::new("../../blobs").join(blob.file_name().unwrap_or_default());
        match std::os::unix::fs::symlink(target, pointer) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => return Ok(()),
            Ok(()) => return Ok(()),
            // A file system without links.
            Err(_) => {}
        }
    }
    fs::copy(blob, pointer).map(drop)
}

fn bar(file: &str, size: Option<u64>) -> ProgressBar {
    let bar = ProgressBar::new(size.unwrap_or(0));
    let style = ProgressStyle::with_template(
        "{msg} {bar:16.cyan/black} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta}",
    );
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.set_message(file.to_owned());
    bar
}
