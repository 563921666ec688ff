//! A file of the cache that is not whole yet, locked against other processes.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use sha1::{Digest, Sha1};
use sha2::Sha256;

/// `blobs/<etag>.incomplete`, locked.
pub(crate) struct Part {
    blob: PathBuf,
    path: PathBuf,
    file: File,
}

impl Part {
    /// Opens the part of `blob`, and waits for other processes that load it. There may be a whole blob then.
    pub(crate) fn open(blob: &Path) -> io::Result<Self> {
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
                return Ok(Self { blob: blob.to_owned(), path, file });
            }
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn len(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    pub(crate) fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)
    }

    pub(crate) fn restart(&self) -> io::Result<()> {
        self.file.set_len(0)
    }

    /// Puts the file at `path` in its place.
    pub(crate) fn replace_by(&mut self, path: &Path) -> io::Result<()> {
        fs::rename(path, &self.path)?;
        *self = Self::open(&self.blob.clone())?;
        Ok(())
    }

    /// Gives it the blob's name.
    pub(crate) fn finish(&self, blob: &Path) -> io::Result<()> {
        self.file.sync_all()?;
        fs::rename(&self.path, blob)
    }

    /// The content's hash of the kind that the etag is; `None` for an etag that is no hash.
    pub(crate) fn hash(&mut self, etag: &str) -> io::Result<Option<String>> {
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

/// A name in `blobs`: the etag, or the hash of one that is no plain name.
pub(crate) fn blob_name(etag: &str) -> String {
    let plain = etag.len() <= 128 && etag.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
    if plain {
        return etag.to_owned();
    }
    hex(&Sha256::digest(etag.as_bytes()))
}

/// Feeds all of a file to a hash; its hexadecimal digits.
fn digest<D: Digest>(mut hasher: D, file: &mut impl Read) -> io::Result<String> {
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hex(&hasher.finalize())),
            n => hasher.update(&buffer[..n]),
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
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
