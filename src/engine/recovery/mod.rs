//! Opens a store: creates it, or finds the state that the last crash left, restores all commits up
//! to the end of the log, and only then takes requests.
//!
//! ```text
//! superblock --> roots, extent table --clean-----------------------+
//!                        |not clean                                v
//!      scan all logs --> end of the log --> flush what was read --> a shard for each core
//!                                                                  |
//!               each shard redoes its part, all at once, then one checkpoint begins the new epoch
//! ```
//! One thread does the upper two lines here; the shards do the rest, wherever they are driven.
//!
//! Invariants
//! 1. Until the last step nothing that is durable and needed is overwritten: after a crash during a
//!    recovery, the next one starts over from the same bytes.
//! 2. One superblock write makes the new roots, the recovered LSN and the new epoch valid together;
//!    so the logs only ever hold records of one epoch.
//! 3. LSNs of the new epoch are above every LSN that may have been allocated before.
//! 4. Damage at or below the highest recorded watermark is an error, never the end of the log.

mod create;
mod load;
mod read;
mod scan;
mod segment;
mod superblock;

use crate::base::mix::mix;
use create::Found;
pub(crate) use create::{EXTENTS_MIN, creation_is_unfinished};
pub(crate) use load::{Loaded, load};
pub(crate) use read::{Range, read_bytes, read_pieces};
pub(crate) use scan::{Scan, neighbours_together, scan};
pub(crate) use superblock::{Copies, CopyState, FoundSuperblock, find_superblock};

use crate::base::error::{Error, Result};
use crate::base::options::{Geometry, Limits, Options};
use crate::base::{BLOCK, BlockAddr, ExtentNo, Lsn, Micros, SegmentNo, ShardId, ShardMap};
use crate::engine::log::{Chunks, Log};
use crate::engine::map::{Extents, Map};
use crate::engine::order::GlobalOrder;
use crate::engine::{LSN_AHEAD_MAX, NewEpoch, Recovering, Shard, ShardParts};
use crate::format::LSN_END;
use crate::format::extent::decode_summary;
use crate::format::fresh::SEGMENTS_FIRST;
use crate::format::superblock::{SUPERBLOCK_BYTES, Superblock};
use crate::io::{Disk, DiskOp, FileId, execute};
use crate::memory::Arena;
use read::read_ranges;
use scan::ScannedGroup;
use std::sync::Arc;

/// What the opening of a store found and did.
#[derive(Clone, Debug, Default)]
pub struct RecoveryReport {
    /// The store did not exist and was created.
    pub created: bool,
    /// The store had been closed cleanly, or was just created: nothing had to be recovered.
    pub clean: bool,
    /// Whole log groups with changes to redo.
    pub groups_scanned: u64,
    /// Torn log groups, as a crash leaves them.
    pub groups_torn: u64,
    /// The last LSN recovered: the store holds exactly the commits up to this one.
    pub recovered_lsn: Lsn,
    /// Commits redone.
    pub commits_applied: u64,
    /// Commits above that LSN that were found in the log and dropped.
    pub commits_dropped: u64,
    /// The number of the epoch that begins with this opening.
    pub epoch: u64,
    /// Superblock copies that could not be used, and extents that can't be filled further, each
    /// with the reason.
    pub warnings: Vec<String>,
}

impl std::fmt::Display for RecoveryReport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.created {
            return write!(f, "created, epoch {}", self.epoch);
        }
        if self.clean {
            return write!(
                f,
                "closed cleanly at LSN {}, epoch {} begins",
                self.recovered_lsn, self.epoch
            );
        }
        write!(
            f,
            "recovered to LSN {}: {} log groups scanned, {} torn; {} commits applied, {} dropped; \
             epoch {} begins",
            self.recovered_lsn,
            self.groups_scanned,
            self.groups_torn,
            self.commits_applied,
            self.commits_dropped,
            self.epoch
        )
    }
}

/// A store being opened.
pub(crate) struct Opening {
    /// One shard for each core. They need turns, completions and messages until all of them are
    /// open. If one fails before that, the opening has failed.
    pub shards: Vec<Shard>,
    /// A report of what was found and done so far.
    pub report: RecoveryReport,
    /// The sequencer and the watermark, which the shards share.
    pub order: Arc<GlobalOrder>,
}

/// The sizes that were fixed when the store on `disk` was made; `None` if there is none yet. No
/// other operation may be in flight.
pub(crate) fn stored_geometry(disk: &mut dyn Disk) -> Result<Option<Geometry>> {
    let mut arena = Arena::new(READ_BLOCKS)?;
    if create::look(disk, &mut arena)? != Found::Store {
        return Ok(None);
    }
    Ok(Some(find_superblock(disk, &mut arena)?.superblock.geometry))
}

/// Finds the store on `disk`, or creates one there, and makes `shards_count` shards. No other
/// operation may be in flight on `disk`; on return none is. All randomness comes from `seed`.
pub(crate) fn begin(
    disk: &mut dyn Disk,
    options: &Options,
    shards_count: u16,
    seed: u64,
    now: Micros,
) -> Result<Opening> {
    let mut report = RecoveryReport::default();
    let mut arena = Arena::new(READ_BLOCKS)?;
    let found = create::look(disk, &mut arena)?;
    if found != Found::Store {
        let limits = options.limits(&options.geometry, shards_count)?;
        // A file system that copies on write has no room for a write when it is full.
        create::create(disk, &mut arena, &limits, shards_count, seed, found)
            .map_err(Error::full_if_no_space)?;
        report.created = true;
    }
    let FoundSuperblock { superblock, unreadable, behind, warnings } =
        find_superblock(disk, &mut arena)?;
    report.warnings = warnings;
    let limits = options.limits(&superblock.geometry, shards_count)?;
    let shard_map = ShardMap::new(superblock.geometry.vshards_count, shards_count);
    let loaded = load(disk, &mut arena, &superblock)?;
    report.clean = superblock.clean;
    let scan = match superblock.clean {
        true => Scan::nothing(&superblock),
        false => scan(disk, &mut arena, &superblock, shard_map)?,
    };
    report.groups_scanned = scan.groups.len() as u64;
    report.groups_torn = scan.torn;
    report.recovered_lsn = scan.state(&superblock);
    report.commits_applied = scan.applied;
    report.commits_dropped = scan.dropped;
    // The steps below overwrite what the generation before needs, so this generation must have more
    // than one copy by then.
    create::rewrite_copies(disk, &mut arena, &superblock, &[unreadable, behind].concat())?;
    make_logs(disk, &superblock, shard_map)?;
    if !superblock.clean {
        // The bytes just read may be writes of a dead process that no flush has covered.
        rewrite_doubtful(disk, &mut arena, &superblock, &scan)?;
        if !planted!(ReadNotFlushed) {
            flush_all(disk, &superblock)?;
        }
    }
    let new_epoch = NewEpoch {
        epoch: superblock.epoch + 1,
        salt: mix(seed ^ superblock.epoch),
        first_lsn: match superblock.clean {
            // After an epoch without a commit the next LSN is below its first one.
            true => superblock.next_lsn.max(superblock.epoch_first_lsn),
            false => scan.highest.plus(if planted!(LsnsReused) { 1 } else { LSN_AHEAD_MAX }),
        },
    };
    check_counters(&superblock, &new_epoch)?;
    assert!(
        new_epoch.first_lsn > scan.highest,
        "epoch {} would begin at {}, and {} was used before",
        new_epoch.epoch,
        new_epoch.first_lsn,
        scan.highest
    );
    report.epoch = new_epoch.epoch;
    let order = Arc::new(GlobalOrder::new(new_epoch.first_lsn, usize::from(shards_count)));
    let whole = Whole {
        shard_map,
        limits,
        superblock,
        loaded,
        scan,
        new_epoch,
        order: order.clone(),
        seed,
        now,
    };
    whole.check_length(disk)?;
    let mut shard = |id| whole.shard(disk, &mut arena, id, &mut report);
    let shards = shard_map.shards().map(&mut shard).collect::<Result<_>>()?;
    Ok(Opening { shards, report, order })
}

/// Checks that the numbers of the next life can be allocated, and that the roots are possible: a
/// superblock whose checksum holds may still be another program's.
fn check_counters(superblock: &Superblock, next: &NewEpoch) -> Result<()> {
    let raised = [superblock.generation, superblock.checkpoint, superblock.epoch].map(|n| n + 1);
    let is_at_end = |n: u64| n >= LSN_END - 1;
    if superblock.next_lsn == Lsn::ZERO
        || next.first_lsn == Lsn::ZERO
        || raised.into_iter().chain([next.first_lsn.get()]).any(is_at_end)
    {
        return Err(Error::corrupt(format_args!(
            "the superblock counts to where no store gets: generation {}, checkpoint {}, epoch {}, \
             next LSN {}; restore the store from a backup",
            superblock.generation, superblock.checkpoint, superblock.epoch, next.first_lsn
        )));
    }
    // All roots that a superblock names reflect the log up to the same LSN.
    let redo = superblock.redo_lsn();
    let newest = superblock.vshards.iter().map(|vshard| vshard.redo_lsn).fold(redo, Lsn::max);
    if newest > redo || newest >= next.first_lsn {
        return Err(Error::corrupt(format_args!(
            "the superblock names roots that reflect the log up to LSN {newest}, but all do up to \
             {redo}, and no commit from LSN {} on exists; restore the store from a backup",
            next.first_lsn
        )));
    }
    Ok(())
}

/// Makes the logs of all shards as long as the superblock says, and makes those of new shards,
/// which it will count next, durable: an opening that was killed may have left these complete but
/// not flushed.
fn make_logs(disk: &mut dyn Disk, superblock: &Superblock, shard_map: ShardMap) -> Result<()> {
    let mut new_logs = Vec::new();
    for shard in shard_map.shards() {
        let segments = segments_of(superblock, shard);
        create::make_log(disk, &superblock.geometry, shard, segments, create::OldLog::Completed)?;
        if superblock.logs.len() <= shard.index() {
            let files = (0..segments).map(|no| FileId::Log(shard, SegmentNo::new(no)));
            new_logs.extend(files);
        }
    }
    match new_logs.is_empty() {
        true => Ok(()),
        false => create::flush(disk, &new_logs),
    }
}

/// Segments of the log of `shard`. A shard that the store did not have before begins like one of a
/// new store.
fn segments_of(superblock: &Superblock, shard: ShardId) -> u32 {
    superblock.logs.get(shard.index()).map_or(SEGMENTS_FIRST, |log| log.segments_made)
}

/// Memory for the reads before there are shards: 4 MiB, enough for those in flight (see `read`).
const READ_BLOCKS: u32 = 1024;

/// Everything that all shards are built from.
struct Whole {
    shard_map: ShardMap,
    limits: Limits,
    superblock: Superblock,
    loaded: Loaded,
    scan: Scan,
    new_epoch: NewEpoch,
    order: Arc<GlobalOrder>,
    seed: u64,
    now: Micros,
}

impl Whole {
    fn extents_count(&self) -> u32 {
        self.superblock.extents_count.max(self.scan.extents_named)
    }

    fn check_length(&self, disk: &mut dyn Disk) -> Result<()> {
        let (count, bytes) = (self.extents_count(), self.limits.geometry.extent_bytes);
        let data_bytes = disk.len(FileId::Data)?.unwrap_or(0);
        if data_bytes >= u64::from(count) * bytes {
            return Ok(());
        }
        Err(Error::corrupt(format_args!(
            "the data file has {data_bytes} bytes, but {count} extents of {bytes} bytes are in \
             use: it was truncated"
        )))
    }

    /// Builds one shard, with memory of its own.
    fn shard(
        &self,
        disk: &mut dyn Disk,
        read_arena: &mut Arena,
        id: ShardId,
        report: &mut RecoveryReport,
    ) -> Result<Shard> {
        let geometry = &self.limits.geometry;
        let shards_count = u32::from(self.shard_map.shards_count());
        let mut arena = Arena::new(self.limits.memory_blocks)?;
        let mut extents = Extents::new(
            self.superblock.store_id,
            geometry.extent_blocks(),
            geometry.vshards_count,
            &self.loaded.table,
            self.extents_count(),
            |no| no.get() % shards_count == u32::from(id.get()),
        );
        reserve_named(disk, read_arena, &self.superblock, &self.scan, &mut extents)?;
        report.warnings.extend(refill(disk, read_arena, &self.superblock, &mut extents));
        let chunks = log_chunks(&mut arena, &self.limits)?;
        let superblock_frames: Option<Vec<_>> =
            (0..SUPERBLOCK_BYTES / BLOCK).map(|_| arena.alloc(0)).collect();
        let superblock_frames =
            superblock_frames.ok_or_else(|| Error::invalid("memory_bytes is too small"))?;
        let segment_blocks = (geometry.segment_bytes / BLOCK as u64) as u32;
        let seed = mix(self.seed ^ u64::from(id.get()) << 32);
        let groups = self.scan.groups.iter().filter(|group| group.concerns.contains(id));
        let recovering = (!self.superblock.clean).then(|| {
            Recovering::new(
                self.scan.redo,
                self.scan.recovered_lsn,
                groups.map(|group| group.head.clone()).collect(),
            )
        });
        Ok(Shard::new(ShardParts {
            id,
            shard_map: self.shard_map,
            limits: self.limits.clone(),
            order: self.order.clone(),
            arena,
            map: Map::new(self.loaded.roots.clone(), seed),
            extents,
            log: Log::new(segments_of(&self.superblock, id), segment_blocks, chunks),
            superblock: self.superblock.clone(),
            superblock_frames,
            recovering,
            recovered_lsn: report.recovered_lsn,
            new_epoch: (id == ShardId::LEADER).then_some(self.new_epoch),
            seed,
            now: self.now,
        }))
    }
}

/// Reserves the extents that log records name, with the items that their summaries list.
fn reserve_named(
    disk: &mut dyn Disk,
    arena: &mut Arena,
    superblock: &Superblock,
    scan: &Scan,
    extents: &mut Extents,
) -> Result<()> {
    for place in scan.groups.iter().flat_map(|group| &group.places) {
        let Some((at, crc)) = extents.reserve_named(place.extent) else { continue };
        let offset = at.offset(superblock.geometry.extent_bytes);
        let bytes = read_bytes(disk, arena, FileId::Data, offset, extents.summary_bytes())?;
        let items =
            decode_summary(superblock.store_id, place.extent, crc, &bytes).map_err(|what| {
                Error::corrupt(format_args!(
                    "the summary of extent {} (byte {offset} of file data) {what}",
                    place.extent.get()
                ))
            })?;
        extents.restore_items(place.extent, items);
    }
    Ok(())
}

/// Summaries that each shard reads to find extents which are not full: a few more than it has
/// streams.
const REFILL_LOOKS: usize = 8;

/// Finds the extents that were being filled when the store was last in use, to fill them further.
/// Leaves an extent whose summary can't be read as it is, and returns the warning.
fn refill(
    disk: &mut dyn Disk,
    arena: &mut Arena,
    superblock: &Superblock,
    extents: &mut Extents,
) -> Option<String> {
    let looks = extents.maybe_unfilled(REFILL_LOOKS);
    let offset = |place: BlockAddr| place.offset(superblock.geometry.extent_bytes);
    let blocks = (extents.summary_bytes() / BLOCK) as u64;
    let range = |(_, place, _): &(ExtentNo, BlockAddr, u32)| Range {
        file: FileId::Data,
        offset: offset(*place),
        blocks,
    };
    let mut summaries = vec![Vec::new(); looks.len()];
    let read = read_ranges(disk, arena, looks.iter().map(range), |index, bytes| {
        summaries[index].extend_from_slice(bytes);
        Ok(())
    });
    if let Err(error) = read {
        return Some(format!("no extent is filled on, since a summary can't be read: {error}"));
    }
    let mut warning = None;
    for ((no, place, crc), bytes) in looks.into_iter().zip(&summaries) {
        match decode_summary(superblock.store_id, no, crc, bytes) {
            Ok(items) => extents.refill(no, items),
            Err(what) => {
                let (no, offset) = (no.get(), offset(place));
                warning = Some(format!(
                    "extent {no} is not filled on: its summary (byte {offset} of file data) {what}"
                ));
            }
        }
    }
    warning
}

/// The buffers of log groups: enough for all groups that can be in flight, and one commit of the
/// largest size.
fn log_chunks(arena: &mut Arena, limits: &Limits) -> Result<Chunks> {
    let order = limits.group_blocks.min(16).ilog2() as u8;
    let chunk_blocks = 1u64 << order;
    let largest = limits.txn_bytes_max / BLOCK as u64 * 103 / 100 + 2;
    // Each part of a commit over shards may begin a buffer.
    let parts =
        chunk_blocks * if limits.shards_count > 1 { limits.log_writes_max as u64 } else { 0 };
    let blocks = u64::from(limits.group_blocks) * limits.log_writes_max as u64
        + 2 * largest
        + chunk_blocks
        + parts;
    let stock: Option<Vec<_>> =
        (0..blocks.div_ceil(chunk_blocks)).map(|_| arena.alloc(order)).collect();
    let stock = stock.filter(|_| arena.free_blocks() > arena.blocks() / 4).ok_or_else(|| {
        Error::invalid(format_args!(
            "memory_bytes is {}: the log buffers alone need {}; raise memory_bytes or lower \
             txn_bytes_max",
            u64::from(limits.memory_blocks) * BLOCK as u64,
            blocks * BLOCK as u64
        ))
    })?;
    Ok(Chunks::new(stock, chunk_blocks as usize * BLOCK))
}

/// Writes doubtful groups again, and the pages that they have put into extents. If a flush of the
/// dead process has failed, the kernel may show bytes that it will never write (it marks such pages
/// clean), and our own flush would succeed all the same. The redo writes the content of the groups
/// again, but a checkpoint in the middle of it records the recovered LSN, so the groups must be
/// durable by then.
fn rewrite_doubtful(
    disk: &mut dyn Disk,
    arena: &mut Arena,
    superblock: &Superblock,
    scan: &Scan,
) -> Result<()> {
    let doubtful = || scan.groups.iter().filter(|group| group.is_doubtful);
    let places = doubtful().flat_map(|group| &group.places);
    let offsets = places.map(|place| place.offset(superblock.geometry.extent_bytes));
    let pages = neighbours_together(offsets).into_iter();
    let pages = pages.map(|(offset, blocks)| Range { file: FileId::Data, offset, blocks });
    let groups = doubtful().map(|ScannedGroup { head, .. }| Range {
        file: FileId::Log(head.shard, head.segment),
        offset: u64::from(head.block) * BLOCK as u64,
        blocks: head.blocks.into(),
    });
    for Range { file, offset, blocks } in pages.chain(groups) {
        for first in (0..blocks).step_by(REWRITE_BLOCKS) {
            let offset = offset + first * BLOCK as u64;
            let len = (blocks - first).min(REWRITE_BLOCKS as u64) as usize * BLOCK;
            let bytes = read_bytes(disk, arena, file, offset, len)?;
            create::write_bytes(disk, arena, file, offset, &bytes)?;
        }
    }
    Ok(())
}

/// Blocks of each of these writes.
const REWRITE_BLOCKS: usize = 64;

fn flush_all(disk: &mut dyn Disk, superblock: &Superblock) -> Result<()> {
    let logs = superblock.segments().map(|(shard, no)| FileId::Log(shard, no));
    let files = logs.chain([FileId::Data, FileId::Meta, FileId::Table]).collect();
    execute(disk, DiskOp::Flush { files }).map(drop)
}

#[cfg(test)]
pub(crate) mod tests;
