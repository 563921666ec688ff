//! Memory of a host that several of its processes see.

use std::fs::File;
use std::io;
use std::path::Path;

use memmap2::{MmapMut, MmapOptions};

/// The size of a page, or a multiple of it.
const PAGE: u64 = 1 << 16;
/// Bytes by which a process tells that it has opened the right memory.
const KEY: usize = 16;
/// What the system calls the memory.
#[cfg(target_os = "linux")]
const NAME: &str = "qlora-weights";

/// Memory that several processes of one host map. It is given out piece by piece; every process takes pieces of the same sizes in
/// the same order, and so has the same bytes in them. It goes with the last process that holds some of it.
///
/// The memory is no file in any folder, so that limits of `/dev/shm`, such as those of containers, do not count.
#[derive(Debug)]
pub struct SharedPages {
    file: File,
    key: [u8; KEY],
    end: u64,
}

impl SharedPages {
    /// Fresh memory, of which nothing is taken.
    ///
    /// # Errors
    /// The system gives none, or limits it; systems other than Linux never do.
    pub fn new() -> io::Result<Self> {
        refuse_limit(&std::fs::read_to_string("/proc/self/limits").unwrap_or_default())?;
        let mut key = [0; KEY];
        io::Read::read_exact(&mut File::open("/dev/urandom")?, &mut key)?;
        let mut pages = Self { file: anonymous()?, key, end: 0 };
        pages.next(KEY)?[..KEY].copy_from_slice(&key);
        Ok(pages)
    }

    /// What [`open`](Self::open) needs in another process of this host, as long as this process holds the memory.
    pub fn address(&self) -> Vec<u8> {
        let place = place(&self.file);
        [&self.key[..], place.as_bytes()].concat()
    }

    /// The memory of another process.
    ///
    /// # Errors
    /// The process is not on this host, is gone, or does not let this one see what it has; it never was an address; the system limits
    /// this process.
    pub fn open(address: &[u8]) -> io::Result<Self> {
        refuse_limit(&std::fs::read_to_string("/proc/self/limits").unwrap_or_default())?;
        let strange = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_string());
        let (key, place) = address.split_first_chunk::<KEY>().ok_or_else(|| strange("an address is too short"))?;
        let place = std::str::from_utf8(place).map_err(|_| strange("an address is no path"))?;
        let open = || -> io::Result<Self> {
            // In a namespace of its own, a process finds under the same number what any other has open: a pipe or a device, which it
            // had better not touch.
            if !is_ours(&std::fs::read_link(place)?) {
                return Err(strange("what is found there is something else"));
            }
            let file = File::options().read(true).write(true).open(place)?;
            if file.metadata()?.len() < PAGE {
                return Err(strange("what is found there is something else"));
            }
            let mut pages = Self { file, key: *key, end: 0 };
            match pages.next(KEY)?[..KEY] == *key {
                true => Ok(pages),
                false => Err(strange("what is found there is something else")),
            }
        };
        open().map_err(|error| io::Error::new(error.kind(), format!("{place}: {error}")))
    }

    /// The next piece, of `len` bytes or more; zeros where no process has written yet.
    ///
    /// # Errors
    /// The host has no memory for it.
    pub(crate) fn next(&mut self, len: usize) -> io::Result<MmapMut> {
        let len = (len as u64).max(1).next_multiple_of(PAGE);
        // Memory that is there already stays what it is, whichever process comes first.
        grow(&self.file, self.end, len)?;
        // SAFETY: the memory never shrinks. Processes write to a piece before others read it, which is the caller's to see to; bytes
        // hold any bits.
        let piece = unsafe { MmapOptions::new().offset(self.end).len(len as usize).map_mut(&self.file) }?;
        self.end += len;
        Ok(piece)
    }
}

/// Refuses a limit on the size of files, in the words of `/proc/self/limits`: it counts for this memory, and the system kills who
/// goes beyond.
fn refuse_limit(limits: &str) -> io::Result<()> {
    let limit = limits.lines().find_map(|line| line.strip_prefix("Max file size")?.split_whitespace().next());
    match limit {
        None | Some("unlimited") => Ok(()),
        Some(limit) => {
            Err(io::Error::other(format!("files may have {limit} bytes at most (ulimit -f unlimited lifts that)")))
        }
    }
}

#[cfg(target_os = "linux")]
fn anonymous() -> io::Result<File> {
    use rustix::fs::{MemfdFlags, memfd_create};
    Ok(File::from(memfd_create(NAME, MemfdFlags::CLOEXEC)?))
}

/// Whether a link of `/proc` leads to memory of this kind.
#[cfg(target_os = "linux")]
fn is_ours(link: &Path) -> bool {
    link.to_str().and_then(|link| link.strip_prefix("/memfd:")).is_some_and(|name| name.starts_with(NAME))
}

#[cfg(target_os = "linux")]
fn grow(file: &File, start: u64, len: u64) -> io::Result<()> {
    use rustix::fs::{FallocateFlags, fallocate};
    // A signal, such as the one that has a stopped process go on, breaks it off.
    Ok(rustix::io::retry_on_intr(|| fallocate(file, FallocateFlags::empty(), start, len))?)
}

#[cfg(target_os = "linux")]
fn place(file: &File) -> String {
    use std::os::fd::AsRawFd;
    format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd())
}

#[cfg(not(target_os = "linux"))]
fn anonymous() -> io::Result<File> {
    Err(io::Error::new(io::ErrorKind::Unsupported, "memory is shared between processes on Linux alone"))
}

#[cfg(not(target_os = "linux"))]
fn is_ours(_: &Path) -> bool {
    false
}

#[cfg(not(target_os = "linux"))]
fn grow(_: &File, _: u64, _: u64) -> io::Result<()> {
    Err(io::Error::new(io::ErrorKind::Unsupported, "memory is shared between processes on Linux alone"))
}

#[cfg(not(target_os = "linux"))]
fn place(_: &File) -> String {
    String::new()
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failing unwrap is a failing test")]

    use super::*;

    #[test]
    fn pieces_of_the_same_order_are_the_same_bytes() {
        let mut first = SharedPages::new().unwrap();
        let mut early = first.next(100).unwrap();
        early[99] = 7;
        let mut second = SharedPages::open(&first.address()).unwrap();
        assert_eq!(second.next(100).unwrap()[99], 7);
        // Whoever is ahead makes room for all.
        let mut ahead = second.next(200_000).unwrap();
        ahead[199_999] = 9;
        assert_eq!(first.next(200_000).unwrap()[199_999], 9);
        assert_eq!(early[99], 7);
    }

    #[test]
    fn a_limit_that_would_kill_is_refused() {
        let of = |soft: &str| {
            format!(
                "Limit   Soft Limit   Hard Limit   Units\nMax file size             {soft}   unlimited   bytes\nMax data size   1   1   bytes\n"
            )
        };
        assert!(refuse_limit(&of("unlimited")).is_ok());
        assert!(refuse_limit("").is_ok());
        assert!(refuse_limit(&of("1126400")).unwrap_err().to_string().contains("1126400 bytes at most (ulimit -f"));
    }

    #[test]
    fn memory_of_another_key_or_none_is_refused() {
        let pages = SharedPages::new().unwrap();
        let mut address = pages.address();
        address[0] ^= 1;
        let error = SharedPages::open(&address).unwrap_err().to_string();
        assert!(error.contains("something else"), "{error}");
        let at = |place: &str| [&pages.address()[..KEY], place.as_bytes()].concat();
        let refused = |place: &str| SharedPages::open(&at(place)).unwrap_err().to_string();
        assert!(refused("/dev/null").contains("/dev/null: "), "{}", refused("/dev/null"));
        // A file that another process has open under the number, which is left alone.
        let file = File::open(std::env::current_exe().unwrap()).unwrap();
        assert!(file.metadata().unwrap().len() > PAGE);
        assert!(
            refused(&place(&file)).ends_with("what is found there is something else"),
            "{}",
            refused(&place(&file))
        );
        let other = File::from(rustix::fs::memfd_create("other", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        grow(&other, 0, 2 * PAGE).unwrap();
        assert!(refused(&place(&other)).ends_with("something else"));
        assert!(SharedPages::open(b"short").is_err());
        let gone = pages.address();
        drop(pages);
        assert!(SharedPages::open(&gone).is_err());
    }
}
