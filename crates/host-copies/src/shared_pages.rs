//! Memory of a host that several of its processes see.

use std::fs::File;
use std::io;

use memmap2::{MmapMut, MmapOptions};

/// The size of a page, or a multiple of it.
const PAGE: u64 = 1 << 16;
/// Bytes by which a process tells that it has opened the right memory.
const KEY: usize = 16;

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
    /// The system gives none; systems other than Linux never do.
    pub fn new() -> io::Result<Self> {
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
    /// The process is not on this host, is gone, or does not let this one see what it has; it never was an address.
    pub fn open(address: &[u8]) -> io::Result<Self> {
        let strange = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_string());
        let (key, place) = address.split_first_chunk::<KEY>().ok_or_else(|| strange("an address is too short"))?;
        let place = std::str::from_utf8(place).map_err(|_| strange("an address is no path"))?;
        let file = File::options().read(true).write(true).open(place)?;
        if file.metadata()?.len() < PAGE {
            return Err(strange("what is found there is something else"));
        }
        let mut pages = Self { file, key: *key, end: 0 };
        match pages.next(KEY)?[..KEY] == *key {
            true => Ok(pages),
            false => Err(strange("what is found there is something else")),
        }
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

#[cfg(target_os = "linux")]
fn anonymous() -> io::Result<File> {
    use rustix::fs::{MemfdFlags, memfd_create};
    Ok(File::from(memfd_create("qlora-weights", MemfdFlags::CLOEXEC)?))
}

#[cfg(target_os = "linux")]
fn grow(file: &File, start: u64, len: u64) -> io::Result<()> {
    use rustix::fs::{FallocateFlags, fallocate};
    Ok(fallocate(file, FallocateFlags::empty(), start, len)?)
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
    fn memory_of_another_key_or_none_is_refused() {
        let pages = SharedPages::new().unwrap();
        let mut address = pages.address();
        address[0] ^= 1;
        let error = SharedPages::open(&address).unwrap_err().to_string();
        assert!(error.contains("something else"), "{error}");
        let mut null = pages.address()[..KEY].to_vec();
        null.extend(b"/dev/null");
        assert!(SharedPages::open(&null).unwrap_err().to_string().contains("something else"));
        assert!(SharedPages::open(b"short").is_err());
        let gone = pages.address();
        drop(pages);
        assert!(SharedPages::open(&gone).is_err());
    }
}
