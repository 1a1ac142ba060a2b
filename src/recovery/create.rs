//! Making a store from nothing.
//!
//! Invariants
//! 1. The superblock comes last: until it is durable there is no store, and a creation that was cut short begins
//!    anew.
//! 2. A directory that ever held a commit is never taken for an unfinished creation: the first block of the first
//!    segment of each log tells (the first group of a log always goes there).

use super::mix;
use super::read::read_bytes;
use crate::disk::{Disk, DiskOp, FileId, IoSlice, execute};
use crate::error::{Error, Result};
use crate::format::extent::{TABLE_ROWS, encode_table, table_crc, table_offset};
use crate::format::node::Child;
use crate::format::root::{self, RootHead, VOLUMES_MAX};
use crate::format::superblock::{
    LogEnd, Refusal, RootVersion, SHARDS_MAX, SUPERBLOCK_BYTES, SUPERBLOCK_COPIES, Superblock, VShardState,
};
use crate::options::{Geometry, Limits};
use crate::pool::Arena;
use crate::types::{BLOCK, Lsn, SegmentNo, ShardId, VShard};

/// Extents of a new store for each shard: the reserves of all purposes and a little more; it grows from there.
const EXTENTS_FIRST: u32 = 16;

/// With fewer for each shard, the reserves alone would leave no room for a page.
pub(crate) const EXTENTS_MIN: u32 = 12;

/// Whether the files are those of a creation that did not finish: no superblock, and never a commit.
pub(super) fn is_unfinished(disk: &mut dyn Disk, arena: &mut Arena) -> Result<bool> {
    for copy in 0..SUPERBLOCK_COPIES {
        let offset = Superblock::offset(copy);
        if disk.len(FileId::Meta)?.unwrap_or(0) < offset + SUPERBLOCK_BYTES as u64 {
            continue;
        }
        let bytes = read_bytes(disk, arena, FileId::Meta, offset, SUPERBLOCK_BYTES)?;
        match Superblock::decode(copy, &bytes) {
            Ok(_) | Err(Refusal::Version(_)) => return Ok(false),
            Err(_) => {}
        }
    }
    for shard in 0..SHARDS_MAX as u16 {
        let first = FileId::Log(ShardId::new(shard), SegmentNo::new(0));
        if disk.len(first)?.unwrap_or(0) < BLOCK as u64 {
            continue;
        }
        if read_bytes(disk, arena, first, 0, BLOCK)?.iter().any(|b| *b != 0) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Creates all files and the first superblock.
pub(super) fn create(
    disk: &mut dyn Disk,
    arena: &mut Arena,
    limits: &Limits,
    shards_count: u16,
    seed: u64,
) -> Result<()> {
    let geometry = &limits.geometry;
    let extents_count = (EXTENTS_FIRST * u32::from(shards_count)).min(limits.data_extents_max);
    let extents_min = EXTENTS_MIN * u32::from(shards_count);
    if extents_count < extents_min {
        return Err(Error::invalid(format_args!(
            "data_bytes_max is too small: at least {extents_min} extents of {} bytes are needed for {shards_count} shards",
            geometry.extent_bytes
        )));
    }
    make_logs(disk, geometry, shards_count, true)?;
    allocate(disk, FileId::Data, u64::from(extents_count) * geometry.extent_bytes)?;
    let table_blocks = extents_count.div_ceil(TABLE_ROWS);
    allocate(disk, FileId::Table, table_offset(table_blocks, 0))?;
    allocate(disk, FileId::Meta, root::meta_bytes(geometry.vshards_count))?;
    let mut store_id = [0; 16];
    store_id[..8].copy_from_slice(&mix(seed ^ 1).to_le_bytes());
    store_id[8..].copy_from_slice(&mix(seed ^ 2).to_le_bytes());
    let mut block = vec![0; BLOCK];
    let mut vshards = Vec::new();
    for i in 0..geometry.vshards_count as u16 {
        let vshard = VShard::new(i);
        let head = RootHead { vshard, store_id, generation: 0, redo_lsn: Lsn::ZERO, checkpoint: 0 };
        let crc = root::encode(&head, &[Child::default(); VOLUMES_MAX], &mut block);
        vshards.push(VShardState { root: RootVersion { generation: 0, crc }, ..VShardState::default() });
        write_bytes(disk, arena, FileId::Meta, root::offset(vshard, 0, geometry.vshards_count), &block)?;
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
        logs: vec![LogEnd::default(); usize::from(shards_count)],
        vshards,
    };
    rewrite_copies(disk, arena, &superblock, &Superblock::copies_of(superblock.generation))
}

/// Writes the superblock into these copies, a flush after each. An open does so with the copies that a crash has
/// spoiled: else a second crash could spoil the other copy of the same pair, and no generation could be trusted.
pub(super) fn rewrite_copies(
    disk: &mut dyn Disk,
    arena: &mut Arena,
    superblock: &Superblock,
    copies: &[u64],
) -> Result<()> {
    if copies.is_empty() {
        return Ok(());
    }
    // What was read may be what a dead process has written and nobody flushed: it must not be lost together with a copy that is torn.
    flush(disk, &[FileId::Meta])?;
    let mut bytes = vec![0; SUPERBLOCK_BYTES];
    for copy in copies {
        superblock.encode(*copy, &mut bytes);
        write_bytes(disk, arena, FileId::Meta, Superblock::offset(*copy), &bytes)?;
        flush(disk, &[FileId::Meta])?;
    }
    Ok(())
}

/// Makes the log segments of all shards that are not there yet; with `anew` all of them.
pub(super) fn make_logs(disk: &mut dyn Disk, geometry: &Geometry, shards_count: u16, anew: bool) -> Result<()> {
    for shard in (0..shards_count).map(ShardId::new) {
        for segment in (0..geometry.segments_count).map(SegmentNo::new) {
            let file = FileId::Log(shard, segment);
            let len = if anew { 0 } else { disk.len(file)?.unwrap_or(0) };
            if len < geometry.segment_bytes {
                execute(disk, DiskOp::Allocate { file, from: len, to: geometry.segment_bytes })?;
            }
        }
    }
    Ok(())
}

fn allocate(disk: &mut dyn Disk, file: FileId, to: u64) -> Result<()> {
    execute(disk, DiskOp::Allocate { file, from: 0, to }).map(drop)
}

fn flush(disk: &mut dyn Disk, files: &[FileId]) -> Result<()> {
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
        let mut frame = arena.alloc(0).ok_or_else(|| Error::invalid("memory_bytes is too small to open a store"))?;
        frame.try_mut().expect("a new frame has no pins").copy_from_slice(block);
        frames.push(frame);
    }
    let from = frames.iter().map(|frame| IoSlice::whole(frame.pin())).collect();
    execute(disk, DiskOp::Write { file, offset, from }).map(drop)
}
