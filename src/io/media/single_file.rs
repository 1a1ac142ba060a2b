//! A second medium, for tests: one ordinary file that holds every file of the store at an offset,
//! as a raw device would.
//!
//! ```text
//!   block 0: table (role, length) | block 1: scratch | region 0 | region 1 | ...
//!                                                      one for each role, never moved
//! ```
//! The drivers and a whole store work on it, which shows that the seam has all that a raw device
//! needs: locations with a base and an end of their own, growth within a fixed region, and one
//! flush that covers everything.
//!
//! Invariants
//! 1. The table names a length only after the zeros up to there were written: after a crash,
//!    opening finds the old length or the new one.
//! 2. The one descriptor is locked for as long as the medium is open, and unlocked explicitly when
//!    it is dropped: a forked child may still hold a duplicate.
//!
//! It does *not* wait for the lock of a dying process.

use super::device::{DeviceTraits, free_bytes};
use super::probe_direct_io::{Block, DirectIo, set_direct, try_direct};
use super::zeros::write_zeros;
use super::{Access, Creation, Location, Media, MediaOptions, PageCache, Room, no_store};
use crate::base::error::{Error, ErrorKind, Result};
use crate::base::{BLOCK, SegmentNo, ShardId};
use crate::io::FileId;
use crate::io::cancel::Cancel;
use crate::io::opener::Opener;
use rustix::fs::FlockOperation;
use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// The name of the one file.
const NAME: &str = "store.img";
/// Bytes of an entry of the table: kind, shard, segment and length, each in eight bytes.
const ENTRY_BYTES: usize = 32;
/// Entries that fit into the table.
const ENTRIES: usize = BLOCK / ENTRY_BYTES;
/// Bytes before the first region: the table and the scratch block.
const REGIONS_AT: u64 = 2 * BLOCK as u64;
/// Bytes of a region: more than any test fills. The file is sparse, so unused bytes take no space.
const REGION_BYTES: u64 = 1 << 33;

/// The regions in use: the number and the length of each, by role.
type Regions = BTreeMap<FileId, (usize, Arc<AtomicU64>)>;

pub(in crate::io) struct SingleFile {
    path: PathBuf,
    file: Arc<File>,
    traits: DeviceTraits,
    direct: bool,
    cancel: Cancel,
    regions: Mutex<Regions>,
    /// Whether the file was made when the medium was opened.
    is_new: bool,
    opener: Opener,
}

impl SingleFile {
    pub(in crate::io) fn open(dir: &Path, options: &MediaOptions) -> Result<SingleFile> {
        let (path, writes) = (dir.join(NAME), options.access == Access::ReadWrite);
        let is_new = !path.exists();
        if is_new && (options.creation == Creation::Refused || !writes) {
            return Err(no_store(&path));
        }
        let failed = |e: std::io::Error| Error::io(format_args!("opening {}", path.display()), e);
        let file = File::options()
            .read(true)
            .write(writes)
            .create(writes)
            .truncate(false)
            .open(&path)
            .map_err(failed)?;
        let how = if writes {
            FlockOperation::NonBlockingLockExclusive
        } else {
            FlockOperation::NonBlockingLockShared
        };
        rustix::fs::flock(&file, how).map_err(|e| {
            Error::io(format_args!("locking {}", path.display()), e.into())
                .with_kind(ErrorKind::InUse)
        })?;
        if is_new {
            write_zeros(&file, 0..REGIONS_AT, &options.cancel).map_err(|e| failed(e.into()))?;
        }
        let handle = File::open(dir).map_err(failed)?;
        let direct = match options.page_cache {
            PageCache::Bypass if writes => try_direct(&handle, dir)?,
            _ => DirectIo::Refused,
        };
        if direct != DirectIo::Refused {
            set_direct(&file).map_err(|e| failed(e.into()))?;
        }
        let surely_direct = direct == DirectIo::Vouched;
        let traits = DeviceTraits {
            surely_direct,
            one_device: true,
            one_descriptor: true,
            ..DeviceTraits::look(&handle)
        };
        let regions = Mutex::new(read_table(&file).map_err(failed)?);
        let (cancel, file) = (options.cancel.clone(), Arc::new(file));
        Ok(SingleFile {
            path,
            file,
            traits,
            direct: direct != DirectIo::Refused,
            cancel,
            regions,
            is_new,
            opener: Opener::default(),
        })
    }

    fn location(&self, region: usize, end: &Arc<AtomicU64>) -> Location {
        let base = REGIONS_AT + region as u64 * REGION_BYTES;
        Location { descriptor: self.file.clone(), base, end: Some(end.clone()) }
    }

    fn regions(&self) -> std::sync::MutexGuard<'_, Regions> {
        self.regions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn error(&self, id: FileId, doing: &str, cause: std::io::Error) -> Error {
        Error::io(format_args!("{doing} {}", self.describe(id)), cause)
    }
}

impl Media for SingleFile {
    fn existing(&self) -> Vec<(FileId, Location)> {
        self.regions()
            .iter()
            .map(|(id, (region, end))| (*id, self.location(*region, end)))
            .collect()
    }

    fn create(&self, id: FileId) -> Result<Location> {
        let mut regions = self.regions();
        let region = regions.len();
        assert!(region < ENTRIES, "the table is full");
        let (_, end) = regions.entry(id).or_insert_with(|| (region, Arc::default()));
        Ok(self.location(region, end))
    }

    fn len(&self, _id: FileId, location: &Location) -> Result<u64> {
        Ok(location.end.as_ref().expect("every region has an end").load(Ordering::Acquire))
    }

    fn grow(&self, id: FileId, location: &Location, bytes: Range<u64>) -> Result<()> {
        let former = self.len(id, location)?;
        let needed = bytes.end.saturating_sub(former.max(bytes.start));
        let fits =
            bytes.end <= REGION_BYTES && free_bytes(&self.file).is_none_or(|free| free >= needed);
        if !fits {
            let cause = std::io::Error::from(rustix::io::Errno::NOSPC);
            return Err(self.error(id, "growing", cause).with_kind(ErrorKind::Full));
        }
        let on_descriptor = location.base + bytes.start..location.base + bytes.end;
        if let Err(e) = write_zeros(&self.file, on_descriptor, &self.cancel) {
            self.cancel.check()?;
            return Err(self.error(id, "growing", e.into()));
        }
        rustix::fs::fdatasync(&self.file).map_err(|e| self.error(id, "flushing", e.into()))?;
        let regions = self.regions();
        let end = location.end.as_ref().expect("every region has an end");
        end.store(former.max(bytes.end), Ordering::Release);
        write_table(&self.file, &regions).map_err(|e| self.error(id, "noting the length of", e))
    }

    fn scratch(&self) -> Result<Location> {
        Ok(Location { descriptor: self.file.clone(), base: BLOCK as u64, end: None })
    }

    fn traits(&self) -> &DeviceTraits {
        &self.traits
    }

    fn is_direct(&self) -> bool {
        self.direct
    }

    fn path(&self) -> &Path {
        &self.path
    }

    fn describe(&self, id: FileId) -> String {
        format!("{} ({id})", self.path.display())
    }

    fn room(&self) -> Room {
        let used = self.regions().values().map(|(_, end)| end.load(Ordering::Acquire)).sum();
        Room { used, free: free_bytes(&self.file) }
    }

    fn remove_creation(&self) {
        if self.is_new {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

impl Drop for SingleFile {
    /// Invariant 2.
    fn drop(&mut self) {
        if self.opener.is_here() {
            let _ = rustix::fs::flock(&*self.file, FlockOperation::Unlock);
        }
    }
}

fn read_table(file: &File) -> std::io::Result<Regions> {
    let mut block = Box::new(Block([0; BLOCK]));
    rustix::io::pread(file, &mut block.0, 0)?;
    let mut regions = Regions::new();
    for (region, entry) in block.0.chunks(ENTRY_BYTES).enumerate() {
        let word =
            |i: usize| u64::from_le_bytes(entry[i * 8..][..8].try_into().expect("eight bytes"));
        let id = match word(0) {
            0 => break,
            1 => FileId::Meta,
            2 => FileId::Table,
            3 => FileId::Data,
            _ => FileId::Log(ShardId::new(word(1) as u16), SegmentNo::new(word(2) as u32)),
        };
        regions.insert(id, (region, Arc::new(word(3).into())));
    }
    Ok(regions)
}

fn write_table(file: &File, regions: &Regions) -> std::io::Result<()> {
    let mut block = Box::new(Block([0; BLOCK]));
    for (id, (region, end)) in regions {
        let (kind, shard, segment) = match id {
            FileId::Meta => (1, 0, 0),
            FileId::Table => (2, 0, 0),
            FileId::Data => (3, 0, 0),
            FileId::Log(shard, segment) => (4, u64::from(shard.get()), u64::from(segment.get())),
        };
        let words = [kind, shard, segment, end.load(Ordering::Acquire)];
        for (bytes, word) in block.0[region * ENTRY_BYTES..][..ENTRY_BYTES].chunks_mut(8).zip(words)
        {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
    }
    let written = rustix::io::pwrite(file, &block.0, 0)?;
    assert_eq!(written, BLOCK, "a block is written whole");
    rustix::fs::fdatasync(file)?;
    Ok(())
}
