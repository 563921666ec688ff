//! Rows in a file: written while they are made, mapped when they are complete.
//!
//! The file: [`MAGIC`]; the words of all rows; for each row the word that it ends before, as u64; a JSON header; the trailer: words, rows
//! and the header's bytes as u64, and a CRC-32 of all that is before it. Little-endian.

use std::fs::{self, File};
use std::io::{self, BufRead as _, BufReader, Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use flate2::Crc;
use memmap2::Mmap;

use super::{End, OF_LINE, Word};

/// What a file begins with; its last byte is the version of its form.
const MAGIC: &[u8; 8] = b"qlrows\0\x02";

/// Three numbers and the checksum.
const TRAILER: u64 = 3 * 8 + 4;

/// What names of files begin with that are being written.
pub(crate) const UNFINISHED: &str = "unfinished-";

/// A file's rows.
#[derive(Debug)]
pub(crate) struct Mapped {
    map: Mmap,
    /// Bytes of words.
    words: Range<usize>,
    /// Bytes of ends.
    ends: Range<usize>,
}

impl Mapped {
    /// Checks a file and maps it; with it comes its header.
    pub fn open(file: File) -> io::Result<(Self, Vec<u8>)> {
        let length = file.metadata()?.len();
        let mut reader = BufReader::with_capacity(1 << 20, file);
        let mut magic = [0; MAGIC.len()];
        reader.read_exact(&mut magic)?;
        let before_trailer = length.checked_sub(TRAILER).ok_or_else(damaged)?;
        if magic != *MAGIC {
            return Err(damaged());
        }
        reader.seek(SeekFrom::Start(before_trailer))?;
        let mut trailer = [0; TRAILER as usize];
        reader.read_exact(&mut trailer)?;
        let number = |at: usize| u64::from_le_bytes(std::array::from_fn(|byte| trailer[8 * at + byte]));
        let [words, rows, header] = [0, 1, 2].map(number);
        let whole = MAGIC.len() as u128 + 4 * u128::from(words) + 8 * u128::from(rows) + u128::from(header);
        if whole != u128::from(before_trailer) {
            return Err(damaged());
        }
        // The file is read for its checksum, not mapped: what was mapped would stay with this process.
        let (mut crc, mut left) = (Crc::new(), before_trailer + TRAILER - 4);
        reader.seek(SeekFrom::Start(0))?;
        while left > 0 {
            let piece = reader.fill_buf()?;
            let read = piece.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            if read == 0 {
                return Err(damaged());
            }
            crc.update(&piece[..read]);
            reader.consume(read);
            left -= read as u64;
        }
        if crc.sum().to_le_bytes() != trailer[TRAILER as usize - 4..] {
            return Err(damaged());
        }
        let mapped = Self::map(&reader.into_inner(), words, rows)?;
        let header = mapped.map[mapped.ends.end..mapped.ends.end + header as usize].to_vec();
        mapped.check()?;
        Ok((mapped, header))
    }

    /// Maps a file that has these many words and rows.
    fn map(file: &File, words: u64, rows: u64) -> io::Result<Self> {
        // SAFETY: the map is read-only. The usual caveat of mapping stays: another process that shrinks the file while it is mapped
        // takes this one down with SIGBUS. Files of the cache are written under another name, renamed and removed, never changed.
        let map = unsafe { Mmap::map(file) }?;
        let bytes = |from: usize, count: u64, size: usize| {
            let to = usize::try_from(count).ok()?.checked_mul(size)?.checked_add(from)?;
            (to <= map.len()).then_some(from..to)
        };
        let words = bytes(MAGIC.len(), words, 4).ok_or_else(damaged)?;
        let ends = bytes(words.end, rows, 8).ok_or_else(damaged)?;
        Ok(Self { map, words, ends })
    }

    /// Whether each row has a line and ends within the file.
    fn check(&self) -> io::Result<()> {
        let (words, ends) = self.parts();
        let mut last = 0;
        for end in ends {
            let end = u64::from_le_bytes(*end);
            if end < last + OF_LINE as u64 {
                return Err(damaged());
            }
            last = end;
        }
        if last == words.len() as u64 { Ok(()) } else { Err(damaged()) }
    }

    pub fn parts(&self) -> (&[Word], &[End]) {
        (self.map[self.words.clone()].as_chunks().0, self.map[self.ends.clone()].as_chunks().0)
    }

    /// Lets go of the pages of words that have been read: they stay in the page cache, but no longer count as this process's memory.
    pub fn release(&self) {
        #[cfg(unix)]
        {
            // SAFETY: the map is of a file and read-only: pages that are let go come back with the same bytes.
            // Failing to let go costs memory, nothing else.
            let _ = unsafe {
                self.map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, self.words.start, self.words.len())
            };
        }
    }
}

fn damaged() -> io::Error {
    io::ErrorKind::InvalidData.into()
}

/// A file that rows are written to. It goes away unless it is finished.
#[derive(Debug)]
pub(crate) struct Unfinished {
    file: File,
    crc: Crc,
    /// Bytes that were written whole.
    written: u64,
    path: PathBuf,
    /// Its name when it is finished.
    entry: PathBuf,
    #[cfg(test)]
    breaks_after: Option<usize>,
}

impl Unfinished {
    /// Begins a file that will have the name `entry`.
    pub fn create(entry: &Path) -> io::Result<Self> {
        static BEGUN: AtomicU64 = AtomicU64::new(0);
        let count = BEGUN.fetch_add(1, Ordering::Relaxed);
        let path = entry.with_file_name(format!("{UNFINISHED}{}-{count}.rows", std::process::id()));
        let file = File::options().read(true).write(true).create(true).truncate(true).open(&path)?;
        let mut unfinished = Self {
            file,
            crc: Crc::new(),
            written: 0,
            path,
            entry: entry.to_owned(),
            #[cfg(test)]
            breaks_after: None,
        };
        unfinished.append(MAGIC)?;
        Ok(unfinished)
    }

    /// The name that it will have.
    pub fn entry(&self) -> &Path {
        &self.entry
    }

    /// Fails from the append of this number on, as if the disk were full.
    #[cfg(test)]
    pub fn break_after(&mut self, appends: usize) {
        self.breaks_after = Some(appends);
    }

    pub fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        #[cfg(test)]
        if let Some(left) = &mut self.breaks_after {
            *left = left.checked_sub(1).ok_or(io::ErrorKind::StorageFull)?;
        }
        self.crc.update(bytes);
        self.file.write_all(bytes)?;
        self.written += bytes.len() as u64;
        Ok(())
    }

    /// The words that were written whole, when no more can be.
    pub fn words(&mut self) -> io::Result<Vec<Word>> {
        let begin = MAGIC.len() as u64;
        self.file.seek(SeekFrom::Start(begin))?;
        let mut words = vec![Word::default(); (self.written.saturating_sub(begin) / 4) as usize];
        self.file.read_exact(words.as_flattened_mut())?;
        Ok(words)
    }

    /// Ends the file behind its words, gives it its name and maps it.
    pub fn finish(&mut self, words: u64, ends: &[End], header: &[u8]) -> io::Result<Mapped> {
        self.append(ends.as_flattened())?;
        self.append(header)?;
        let numbers = [words, ends.len() as u64, header.len() as u64].map(u64::to_le_bytes);
        self.append(numbers.as_flattened())?;
        let sum = self.crc.sum();
        self.append(&sum.to_le_bytes())?;
        self.file.sync_all()?;
        let mapped = Mapped::map(&self.file, words, ends.len() as u64)?;
        fs::rename(&self.path, &self.entry)?;
        Ok(mapped)
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        // Of a finished file nothing has this name.
        drop(fs::remove_file(&self.path));
    }
}
