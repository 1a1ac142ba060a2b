//! What a disk may hold after its power was cut: its log of writes and flushes, in the format of
//! dm-log-writes (Linux, `drivers/md/dm-log-writes.c`; QEMU's `blklogwrites` writes the same),
//! rebuilt up to a point into an image.
//!
//! 1. All before the last flush is in the image, and each write with FUA.
//! 2. Of the rest there is any subset, in some images with writes that are there in part.
//! 3. An image costs little: it is a reflinked copy of one that only ever goes forward.

use super::Rng;
use super::surroundings::Mounted;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

const MAGIC: u64 = 0x006a_7366_7773_6872;
const FLUSH: u64 = 1;
const FUA: u64 = 2;
const DISCARD: u64 = 4;
/// In all these logs.
pub const SECTOR: u64 = 512;

/// One operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Where on the disk, in bytes.
    pub at: u64,
    pub bytes: u64,
    pub flags: u64,
    /// Where its data is in the log.
    data_at: u64,
    /// Where the log went on.
    pub end: u64,
}

impl Entry {
    pub fn flushes(&self) -> bool {
        self.flags & FLUSH != 0
    }
}

/// What happened at the disk, in the order in which it was told.
pub struct Log {
    file: File,
    pub entries: Vec<Entry>,
}

fn number(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

impl Log {
    /// # Errors
    /// If it is none, or of another sector size. An end that was not written, as when the writer
    /// was killed, is none.
    pub fn open(path: &Path) -> io::Result<Log> {
        let file = File::open(path)?;
        let length = file.metadata()?.len();
        let mut head = [0; SECTOR as usize];
        file.read_exact_at(&mut head, 0)?;
        let sector = u64::from(u32::from_le_bytes(head[24..28].try_into().expect("four bytes")));
        if (number(&head, 0), number(&head, 8), sector) != (MAGIC, 1, SECTOR) {
            return Err(io::Error::other("no log of version 1 with sectors of 512 bytes"));
        }
        let (mut entries, mut at) = (Vec::new(), SECTOR);
        while (entries.len() as u64) < number(&head, 16) && at + SECTOR <= length {
            let mut entry = [0; 32];
            file.read_exact_at(&mut entry, at)?;
            let (bytes, flags) = (number(&entry, 8) * SECTOR, number(&entry, 16));
            let data_at = at + SECTOR;
            let end = data_at + if flags & DISCARD == 0 { bytes } else { 0 };
            if end > length || bytes == 0 && flags == 0 {
                break;
            }
            entries.push(Entry { at: number(&entry, 0) * SECTOR, bytes, flags, data_at, end });
            at = end;
        }
        Ok(Log { file, entries })
    }

    /// Of the entries below `end`, how many the last flush among them covers, itself included.
    pub fn flushed(&self, end: usize) -> usize {
        self.entries[..end].iter().rposition(Entry::flushes).map_or(0, |last| last + 1)
    }

    /// Does what an entry says to an image; of its pieces of `piece` bytes those that `keep` wants.
    pub fn apply(
        &self,
        entry: &Entry,
        image: &File,
        piece: u64,
        mut keep: impl FnMut() -> bool,
    ) -> io::Result<()> {
        let mut data = vec![0; entry.bytes as usize];
        // What a device gives back after a discard is its affair: zeros here.
        if entry.flags & DISCARD == 0 {
            self.file.read_exact_at(&mut data, entry.data_at)?;
        }
        for (n, chunk) in data.chunks(piece as usize).enumerate() {
            if keep() {
                image.write_all_at(chunk, entry.at + n as u64 * piece)?;
            }
        }
        Ok(())
    }
}

/// How much of what was not flushed is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subset {
    Nothing,
    All,
    /// Each write by rng.
    Some,
    /// Each piece of this many bytes of each write, at random.
    Torn(u64),
}

impl Subset {
    /// `piece`: the smallest that the file system bears to be torn.
    pub fn by(rng: &mut Rng, piece: u64) -> Subset {
        [
            Subset::Nothing,
            Subset::All,
            Subset::Some,
            Subset::Some,
            Subset::Torn(4096),
            Subset::Torn(piece),
        ][rng.below(6) as usize]
    }
}

/// A disk that is rebuilt at one point after the other.
pub struct Rebuilt {
    pub log: Log,
    base: PathBuf,
    image: File,
    applied: usize,
    // A file system that can copy a file without its bytes; in memory, since a state is synced many
    // times.
    place: Mounted,
    _memory: Mounted,
}

impl Rebuilt {
    /// `before`: the disk when the log began. `None`, loudly, where it can't be.
    pub fn new(log: Log, before: &Path) -> Option<Rebuilt> {
        let memory = Mounted::memory()?;
        let place = Mounted::image_in("xfs", memory.path())?;
        let base = place.path().join("base");
        super::run(Command::new("cp").arg("--sparse=always").args([before, &base]));
        let image = File::options().write(true).open(&base).expect("an image");
        Some(Rebuilt { log, base, image, applied: 0, place, _memory: memory })
    }

    /// The disk as it may be if the power goes when the log had `end` entries; `end` never goes
    /// back. How many writes were not flushed.
    pub fn at(&mut self, end: usize, subset: Subset, rng: &mut Rng) -> (PathBuf, usize) {
        let flushed = self.log.flushed(end);
        assert!(flushed >= self.applied, "back in time");
        for entry in &self.log.entries[self.applied..flushed] {
            self.log
                .apply(entry, &self.image, u64::MAX >> 1, || true)
                .expect("the image can be written");
        }
        self.applied = flushed;
        let (path, image) = self.copy();
        for entry in &self.log.entries[flushed..end] {
            let (piece, all) = match subset {
                _ if entry.flags & FUA != 0 => (u64::MAX >> 1, Some(true)),
                Subset::Nothing => continue,
                Subset::All => (u64::MAX >> 1, Some(true)),
                Subset::Some => (u64::MAX >> 1, None),
                Subset::Torn(piece) => (piece, None),
            };
            let keep = || all.unwrap_or_else(|| rng.below(2) == 0);
            self.log.apply(entry, &image, piece, keep).expect("the image can be written");
        }
        (path, end - flushed)
    }

    /// A disk that lies about its flushes: as it was at the last point, and of all after it up to
    /// `end` a half.
    pub fn of_a_liar(&mut self, end: usize, rng: &mut Rng) -> PathBuf {
        let (path, image) = self.copy();
        for entry in &self.log.entries[self.applied..end] {
            if rng.below(2) == 0 {
                self.log
                    .apply(entry, &image, u64::MAX >> 1, || true)
                    .expect("the image can be written");
            }
        }
        path
    }

    fn copy(&self) -> (PathBuf, File) {
        let path = self.place.path().join("state");
        super::run(Command::new("cp").arg("--reflink=always").args([&self.base, &path]));
        let image = File::options().write(true).open(&path).expect("an image");
        (path, image)
    }
}
