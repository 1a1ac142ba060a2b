//! Finds out what a store is by reading a few of its blocks.
//!
//! ```text
//! superblock -> roots -> tree of the catalog: the records of volumes, as of the last checkpoint
//! ```
//! Invariants
//! 1. No file is made or opened for writing: a command that only looks does no harm to the store of
//!    another user.
//! 2. Each block is compared with its checksum before it is interpreted.
//!
//! It does *not* read the logs: for a store that was not closed cleanly the result says that it is
//! as of the last checkpoint.

use super::require_store;
use crate::base::checksum::crc32c;
use crate::base::error::{Error, Result};
use crate::base::{BLOCK, BlockAddr, PageId, PageKey, VolumeId};
use crate::engine::codec;
use crate::engine::recovery::{find_superblock, load, read_bytes};
use crate::format::catalog;
use crate::format::node::{self, Child, Entry};
use crate::format::root::VOLUMES_MAX;
use crate::format::superblock::Superblock;
use crate::io::{Access, Disk, FileId, FileOptions, Files, PortableDisk, PortableOptions};
use crate::memory::Arena;
use std::path::Path;

/// Blocks of memory for reads: 1 MiB.
const ARENA_BLOCKS: u32 = 256;
/// Bits of a page's index that a leaf decodes, and each level above it.
const LEAF_BITS: u32 = 6;
const NODE_BITS: u32 = 8;

/// What a closed store holds.
#[derive(Clone, Debug)]
pub struct StoreSummary {
    /// The store was closed cleanly. Otherwise `volumes` are those of the last checkpoint, and the
    /// logs may add to them.
    pub clean: bool,
    /// The number of shards with which it was last opened.
    pub shards: u16,
    /// Its volumes.
    pub volumes: Vec<VolumeSummary>,
}

/// A volume, as its record describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeSummary {
    /// Its number.
    pub number: u8,
    /// Its name.
    pub name: String,
    /// Its size.
    pub bytes: u64,
}

/// Reads the superblock and the catalog of the closed store in `dir`, and changes nothing. Several
/// processes may do so at a time; none can open the store meanwhile.
///
/// # Errors
/// `NotFound`: there is no store. `InUse`: a process has it open. `Corrupt`, `Unsupported`, `Io`:
/// it can't be read.
pub fn inspect(dir: &Path) -> Result<StoreSummary> {
    let files = Files::open(dir, Access::ReadOnly, &FileOptions::default())?;
    inspect_disk(&mut PortableDisk::with_files(files, &PortableOptions { workers_count: 1 })?)
}

pub(super) fn inspect_disk(disk: &mut dyn Disk) -> Result<StoreSummary> {
    let mut arena = Arena::new(ARENA_BLOCKS)?;
    require_store(disk, &mut arena)?;
    let superblock = find_superblock(disk, &mut arena)?.superblock;
    let roots = load(disk, &mut arena, &superblock)?.roots;
    let mut volumes = Vec::new();
    for number in 1..VOLUMES_MAX as u8 {
        let key = PageKey::new(VolumeId::CATALOG, PageId::new(number.into()));
        let (vshard, page_index) = key.place_in(superblock.geometry.vshards_count);
        let top = roots[vshard.index()].0[usize::from(VolumeId::CATALOG.get())];
        let Some(entry) = entry(disk, &mut arena, &superblock, top, page_index)? else { continue };
        let offset = entry.place().offset(superblock.geometry.extent_bytes);
        let page = read_bytes(disk, &mut arena, FileId::Data, offset, BLOCK)?;
        let record = codec::open(&entry, &page).map_err(|refusal| refusal.to_string());
        let volume = record.and_then(|record| catalog::decode(record).map_err(str::to_string));
        let volume = volume.map_err(|what| {
            Error::corrupt(format_args!(
                "the record of volume {number} in the catalog (byte {offset} of file data) {what}"
            ))
        })?;
        if !volume.name.is_empty() {
            volumes.push(VolumeSummary { number, name: volume.name, bytes: volume.bytes });
        }
    }
    Ok(StoreSummary { clean: superblock.clean, shards: superblock.logs.len() as u16, volumes })
}

/// The entry of the page with this index in the tree below `top`; `None` if it is absent.
fn entry(
    disk: &mut dyn Disk,
    arena: &mut Arena,
    superblock: &Superblock,
    top: Child,
    page_index: u64,
) -> Result<Option<Entry>> {
    let covered = |level: u8| LEAF_BITS + NODE_BITS * u32::from(level);
    if !top.is_present() || page_index.checked_shr(covered(top.level)).unwrap_or(0) != 0 {
        return Ok(None);
    }
    let mut at = top;
    for level in (0..=top.level).rev() {
        if !at.is_present() {
            return Ok(None);
        }
        if at.level != level {
            return Err(Error::corrupt(format_args!(
                "a map node of level {level} is said to have level {}",
                at.level
            )));
        }
        let bytes = block(disk, arena, superblock, at.place(), at.crc.get())?;
        if level == 0 {
            let entry = node::entry(&bytes, page_index as usize & ((1 << LEAF_BITS) - 1));
            return Ok(entry.is_present().then_some(entry));
        }
        let slot = page_index.checked_shr(covered(level - 1)).unwrap_or(0) as usize
            & ((1 << NODE_BITS) - 1);
        at = node::child(&bytes, slot);
    }
    Ok(None)
}

/// Reads a map node that must have this checksum.
fn block(
    disk: &mut dyn Disk,
    arena: &mut Arena,
    superblock: &Superblock,
    place: BlockAddr,
    crc: u32,
) -> Result<Vec<u8>> {
    let offset = place.offset(superblock.geometry.extent_bytes);
    let bytes = read_bytes(disk, arena, FileId::Data, offset, BLOCK)?;
    if crc32c(&bytes) != crc {
        return Err(Error::corrupt(format_args!(
            "the map node at byte {offset} of file data has a wrong checksum"
        )));
    }
    Ok(bytes)
}
