//! Creates a store.
//!
//! ```text
//! log-000-0000 (zeros) -> meta (zeros) -> mark in meta, flushed -> logs, data, extents, roots
//!                                                               -> superblock, over the mark
//! ```
//! Invariants
//! 1. The superblock comes last: until it is durable there is no store, and an interrupted creation
//!    starts over.
//! 2. An interrupted creation has its mark in the meta file, or no files but the first two, both
//!    empty. Anything else without a superblock is the remains of a store, and is never
//!    overwritten.
//! 3. The mark lies where the last copy of the first superblock is written: no finished store has
//!    it.

use super::read::{Range, read_bytes, read_ranges};
use super::superblock::Copies;
use crate::base::error::{Error, Result};
use crate::base::mix::mix;
use crate::base::options::{Geometry, Limits};
use crate::base::{BLOCK, Lsn, SegmentNo, ShardId, VShard};
use crate::format::extent::{TABLE_ROWS, encode_table, table_crc, table_offset};
use crate::format::fresh::{self, SEGMENTS_FIRST};
use crate::format::node::Child;
use crate::format::root::{self, RootHead, VOLUMES_MAX};
use crate::format::superblock::{
    CREATION_MARK, LogState, RootVersion, SUPERBLOCK_BYTES, Superblock, VShardState,
};
use crate::io::{Disk, DiskOp, FileId, IoSlice, execute};
use crate::memory::Arena;

/// With fewer for each shard, the reserves alone would leave no room for a page.
pub(crate) const EXTENTS_MIN: u32 = 12;

/// The file that a creation makes first.
const FIRST_LOG: FileId = FileId::Log(ShardId::LEADER, SegmentNo::new(0));

/// What a directory holds when a store is looked for in it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Found {
    /// No file, or the files of a creation that was interrupted before it made its mark.
    Nothing,
    /// The files of an interrupted creation, with its mark.
    Unfinished,
    /// A store, or the remains of one; reading its superblock shows whether it can be used.
    Store,
}

/// The superblock copy in whose place a creation keeps its mark until it writes that copy, as its
/// last step.
fn marked_copy() -> u64 {
    Superblock::copies_of(1)[1]
}

/// Finds out whether there is a store. Changes nothing.
pub(super) fn look(disk: &mut dyn Disk, arena: &mut Arena) -> Result<Found> {
    let files = disk.files()?;
    let copies = Copies::read(disk, arena)?;
    if copies.has_superblock() {
        return Ok(Found::Store);
    }
    // A copy that can't be read may be a store's.
    if let Some(error) = copies.read_error() {
        return Err(error.clone());
    }
    // The first group of a log is written to the first block of its first segment.
    for file in files.iter().filter(|file| matches!(file, FileId::Log(..))) {
        if !is_zeros(&read_up_to(disk, arena, *file, 0, BLOCK)?) {
            return Ok(Found::Store);
        }
    }
    let mark_at = Superblock::offset(marked_copy());
    if read_up_to(disk, arena, FileId::Meta, mark_at, BLOCK)?.starts_with(CREATION_MARK) {
        return Ok(Found::Unfinished);
    }
    if files.iter().any(|file| *file != FIRST_LOG && *file != FileId::Meta) {
        return Ok(Found::Store);
    }
    // The block of the mark may be torn.
    let mark_end = mark_at + BLOCK as u64;
    for (file, from, to) in
        [(FIRST_LOG, 0, u64::MAX), (FileId::Meta, 0, mark_at), (FileId::Meta, mark_end, u64::MAX)]
    {
        let to = to.min(disk.len(file)?.unwrap_or(0)) / BLOCK as u64 * BLOCK as u64;
        let range = Range { file, offset: from, blocks: to.saturating_sub(from) / BLOCK as u64 };
        let mut zeros = true;
        read_ranges(disk, arena, [range], |_, bytes| {
            zeros &= is_zeros(bytes);
            Ok(())
        })?;
        if !zeros {
            return Ok(Found::Store);
        }
    }
    Ok(Found::Nothing)
}

/// Whether there is no store, and at most the files of an interrupted creation.
pub(crate) fn creation_is_unfinished(disk: &mut dyn Disk, arena: &mut Arena) -> Result<bool> {
    Ok(look(disk, arena)? != Found::Store)
}

fn is_zeros(bytes: &[u8]) -> bool {
    bytes.iter().all(|byte| *byte == 0)
}

/// Reads `bytes` bytes at `offset`; returns none if the file ends before.
fn read_up_to(
    disk: &mut dyn Disk,
    arena: &mut Arena,
    file: FileId,
    offset: u64,
    bytes: usize,
) -> Result<Vec<u8>> {
    match disk.len(file)?.unwrap_or(0) < offset + bytes as u64 {
        true => Ok(Vec::new()),
        false => read_bytes(disk, arena, file, offset, bytes),
    }
}

/// Creates all files and the first superblock.
pub(super) fn create(
    disk: &mut dyn Disk,
    arena: &mut Arena,
    limits: &Limits,
    shards_count: u16,
    seed: u64,
    found: Found,
) -> Result<()> {
    let geometry = &limits.geometry;
    let extents_count = fresh::extents_count(shards_count, limits.data_extents_max);
    let extents_min = EXTENTS_MIN * u32::from(shards_count);
    if extents_count < extents_min {
        return Err(Error::invalid(format_args!(
            "data_bytes_max is too small: at least {extents_min} extents of {} bytes are needed \
             for {shards_count} shards",
            geometry.extent_bytes
        )));
    }
    allocate(disk, FIRST_LOG, geometry.segment_bytes)?;
    make_mark(disk, arena, root::meta_bytes(geometry.vshards_count), found)?;
    for shard in (0..shards_count).map(ShardId::new) {
        make_log(disk, geometry, shard, SEGMENTS_FIRST, OldLog::Replaced)?;
    }
    allocate(
        disk,
        FileId::Data,
        fresh::data_bytes(geometry, shards_count, limits.data_extents_max),
    )?;
    let table_blocks = extents_count.div_ceil(TABLE_ROWS);
    allocate(disk, FileId::Table, table_offset(table_blocks, 0))?;
    let mut store_id = [0; 16];
    store_id[..8].copy_from_slice(&mix(seed ^ 1).to_le_bytes());
    store_id[8..].copy_from_slice(&mix(seed ^ 2).to_le_bytes());
    let mut block = vec![0; BLOCK];
    let mut vshards = Vec::new();
    for i in 0..geometry.vshards_count as u16 {
        let vshard = VShard::new(i);
        let head = RootHead { vshard, store_id, generation: 0, redo_lsn: Lsn::ZERO, checkpoint: 0 };
        let crc = root::encode(&head, &[Child::default(); VOLUMES_MAX], &mut block);
        vshards.push(VShardState {
            root: RootVersion { generation: 0, crc },
            ..VShardState::default()
        });
        write_bytes(
            disk,
            arena,
            FileId::Meta,
            root::offset(vshard, 0, geometry.vshards_count),
            &block,
        )?;
    }
    let mut sums = Vec::new();
    for index in 0..table_blocks {
        sums.push(encode_table(store_id, index, 0, &[], &mut block));
        write_bytes(disk, arena, FileId::Table, table_offset(index, 0), &block)?;
    }
    flush(disk, &[FileId::Meta, FileId::Table])?;
    let superblock = Superblock {
        clean: true,
        store_id,
        generation: 1,
        epoch: 0,
        epoch_first_lsn: Lsn::new(1),
        salt: mix(seed ^ 3),
        checkpoint: 0,
        watermark: Lsn::ZERO,
        next_lsn: Lsn::new(1),
        geometry: geometry.clone(),
        extents_count,
        table_crc: table_crc(sums),
        logs: vec![LogState::without_end(SEGMENTS_FIRST); usize::from(shards_count)],
        vshards,
    };
    rewrite_copies(disk, arena, &superblock, &Superblock::copies_of(superblock.generation))
}

/// Makes the meta file with the mark of a creation in it, durably. A file that has the mark keeps
/// it meanwhile.
fn make_mark(disk: &mut dyn Disk, arena: &mut Arena, meta_bytes: u64, found: Found) -> Result<()> {
    let file = FileId::Meta;
    let from = if found == Found::Unfinished { disk.len(file)?.unwrap_or(0) } else { 0 };
    if from < meta_bytes {
        execute(disk, DiskOp::Allocate { file, from, to: meta_bytes })?;
    }
    let mut block = vec![0; BLOCK];
    block[..CREATION_MARK.len()].copy_from_slice(CREATION_MARK);
    write_bytes(disk, arena, file, Superblock::offset(marked_copy()), &block)?;
    flush(disk, &[file])
}

/// Writes the superblock into these copies, with a flush after each. An opening repairs the copies
/// that a crash has spoiled in this way: otherwise a second crash could spoil the other copy of the
/// same pair, and no generation could be trusted.
pub(super) fn rewrite_copies(
    disk: &mut dyn Disk,
    arena: &mut Arena,
    superblock: &Superblock,
    copies: &[u64],
) -> Result<()> {
    if copies.is_empty() {
        return Ok(());
    }
    // A dead process may have written the copy that was read and never flushed it: it must not be
    // lost together with a copy that is torn now.
    flush(disk, &[FileId::Meta])?;
    assert!(superblock.is_consistent(), "this superblock can't be read again: {superblock:?}");
    let mut bytes = vec![0; SUPERBLOCK_BYTES];
    for copy in copies {
        superblock.encode(*copy, &mut bytes);
        write_bytes(disk, arena, FileId::Meta, Superblock::offset(*copy), &bytes)?;
        flush(disk, &[FileId::Meta])?;
    }
    Ok(())
}

/// What becomes of log files that are there.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum OldLog {
    /// What is missing of them is added.
    Completed,
    /// They are made again, except the first file of a creation, which is made before.
    Replaced,
}

/// Makes the first `segments` segments of a log.
pub(super) fn make_log(
    disk: &mut dyn Disk,
    geometry: &Geometry,
    shard: ShardId,
    segments: u32,
    old: OldLog,
) -> Result<()> {
    for segment in (0..segments).map(SegmentNo::new) {
        let file = FileId::Log(shard, segment);
        let len = match old {
            OldLog::Replaced if file == FIRST_LOG => continue,
            OldLog::Replaced => 0,
            OldLog::Completed => disk.len(file)?.unwrap_or(0),
        };
        if len < geometry.segment_bytes {
            execute(disk, DiskOp::Allocate { file, from: len, to: geometry.segment_bytes })?;
        }
    }
    Ok(())
}

fn allocate(disk: &mut dyn Disk, file: FileId, to: u64) -> Result<()> {
    execute(disk, DiskOp::Allocate { file, from: 0, to }).map(drop)
}

pub(super) fn flush(disk: &mut dyn Disk, files: &[FileId]) -> Result<()> {
    execute(disk, DiskOp::Flush { files: files.into() }).map(drop)
}

pub(super) fn write_bytes(
    disk: &mut dyn Disk,
    arena: &mut Arena,
    file: FileId,
    offset: u64,
    bytes: &[u8],
) -> Result<()> {
    let mut frames = Vec::new();
    for block in bytes.chunks(BLOCK) {
        let mut frame = arena
            .alloc(0)
            .ok_or_else(|| Error::invalid("memory_bytes is too small to open a store"))?;
        frame.try_mut().expect("a new frame has no pins").copy_from_slice(block);
        frames.push(frame);
    }
    let from = frames.iter().map(|frame| IoSlice::whole(frame.pin())).collect();
    execute(disk, DiskOp::Write { file, offset, from }).map(drop)
}
