//! Data space: admission, growth, and when to reclaim.
//!
//! Invariants
//! 1. Every dirty page and every slot has a block reserved; map nodes and compaction have a reserve of their own.
//! 2. `Full` only when nothing can give space any more: no growth, no checkpoint that would free places, nothing to
//!    compact. Until then a commit waits.
//! 3. The space grows only while more than [`FILL_PERCENT`] of it is live; else it is reclaimed.

use super::commits::Need;
use super::{OpKind, Shard};
use crate::disk::{DiskOp, FileId, IoSlice};
use crate::error::{Error, ErrorKind, Result};
use crate::format::extent::{ItemKind, TABLE_ROWS, table_offset};
use crate::map::Stream;
use crate::types::{BLOCK, Micros, Place};

/// Above this share of live blocks the space grows, below it it is compacted.
const FILL_PERCENT: u64 = 70;
/// Extents that commits leave to map nodes, checkpoints and compaction; frees may use half of them.
const RESERVE_EXTENTS: u64 = 6;
/// Extents by which recovery and checkpoints may pass `data_bytes_max`: each crash leaves the extents that were being
/// filled half empty, and only compaction, which comes after recovery, gives them back. Without it a full store
/// could not be opened again.
const OVERDRAFT_EXTENTS: u32 = 24;
/// After a failed growth the next is tried this much later.
pub(super) const GROW_RETRY_US: Micros = 1_000_000;

/// A growth under way: first the table, then the data.
#[derive(Clone, Copy)]
pub(super) struct Growth {
    to: u32,
    table_done: bool,
}

impl Shard {
    /// A block for `what`; the extent that this fills gets its summary written.
    pub(super) fn alloc_block(&mut self, stream: Stream, what: ItemKind) -> Option<Place> {
        #[cfg(any(test, feature = "sim"))]
        if matches!(what, ItemKind::Page(..))
            && let Some(place) = self.reused_early.pop()
            && self.extents.hand_out_again(place)
        {
            return Some(place);
        }
        let (place, full) = self.extents.alloc(stream, what)?;
        self.summaries.extend(full);
        Some(place)
    }

    fn free_blocks(&self) -> u64 {
        let space = self.extents.space();
        u64::from(space.free) * u64::from(space.data_blocks)
    }

    /// Blocks that what is dirty now will take.
    fn owed_blocks(&self) -> u64 {
        self.reserved_blocks + self.map.dirty_count() as u64
    }

    /// Whether a commit's pages and map nodes will find space. `Ok(false)`: not yet.
    pub(super) fn admit_space(&mut self, need: &Need) -> Result<bool> {
        // Each change may take a block as a slot and another later, and dirty a leaf and its parents.
        let blocks = if need.frees_only { 2 * need.changes } else { 4 * need.changes };
        let reserve = RESERVE_EXTENTS * u64::from(self.extents.data_blocks());
        let reserve = if need.frees_only { reserve / 2 } else { reserve };
        if self.free_blocks() >= self.owed_blocks() + blocks + reserve {
            self.compactions_in_vain = 0;
            return Ok(true);
        }
        self.stalled_for_space = true;
        let wanted = self.owed_blocks() + blocks + reserve;
        if self.reclaim(wanted) {
            return Ok(false);
        }
        let space = self.extents.space();
        Err(Error::new(
            ErrorKind::Full,
            format_args!(
                "no space is left for {} changed pages: {} of {} data extents are free, {} blocks are in use; \
                 free pages, raise data_bytes_max, or make room in the file system",
                need.changes, space.free, space.total, space.live_blocks
            ),
        ))
    }

    /// Room for the nodes of one virtual shard; if not, space is made.
    pub(super) fn space_for_nodes(&mut self, nodes: u32) -> bool {
        if self.free_blocks() > u64::from(nodes) {
            return true;
        }
        self.stalled_for_space = true;
        if !self.growing && !self.grow_up_to(self.limits.data_extents_max.saturating_add(OVERDRAFT_EXTENTS)) {
            let context = "no space is left for the page map, and the data space can't grow";
            self.fail(Error::new(ErrorKind::Full, context));
        }
        false
    }

    /// Blocks that would be free if nothing dead were left anywhere: compaction can't make more.
    fn spare_blocks(&self) -> u64 {
        let space = self.extents.space();
        let live = space.live_blocks.saturating_sub(self.extents.left_count() as u64);
        (u64::from(space.total) * u64::from(space.data_blocks)).saturating_sub(live)
    }

    /// Whether space is being made, or can be, for `wanted` free blocks in all; does what is next for it.
    ///
    /// It ends: what was left and what is dirty is written once, and compactions that don't help are counted.
    fn reclaim(&mut self, wanted: u64) -> bool {
        if self.growing || self.checkpoint_under_way() || self.compaction.is_some() || !self.moves.is_empty() {
            return true;
        }
        let hopeless = self.spare_blocks() < wanted || self.compactions_in_vain > 2 * self.extents.space().total;
        if (self.wants_growth() || hopeless) && self.grow() {
            return true;
        }
        if self.extents.left_count() > 0 {
            self.need_checkpoint();
            return true;
        }
        if self.reserved_blocks > 0 || self.page_writes > 0 || self.map.dirty_count() > 0 {
            // What is dirty leaves places when it is written.
            self.need_checkpoint();
            return true;
        }
        if !hopeless && self.begin_compaction() {
            self.compactions_in_vain += 1;
            return true;
        }
        self.grow()
    }

    /// Whether most of the space is live, so that reclaiming would give little.
    fn wants_growth(&self) -> bool {
        let space = self.extents.space();
        let live = space.live_blocks.saturating_sub(self.extents.left_count() as u64) + self.owed_blocks();
        live * 100 > u64::from(space.total) * u64::from(space.data_blocks) * FILL_PERCENT
    }

    /// Keeps some extents free ahead of need.
    pub(super) fn advance_space(&mut self) {
        if self.failed.is_some() || self.closing.is_some() || self.growing {
            return;
        }
        let space = self.extents.space();
        let low = u64::from(space.total / 8).max(RESERVE_EXTENTS + 2) * u64::from(space.data_blocks);
        if self.free_blocks() >= low + self.owed_blocks() {
            return;
        }
        let hopeless = self.spare_blocks() < low + self.owed_blocks();
        if (self.wants_growth() || hopeless || self.redoing.is_some()) && self.grow() {
            return;
        }
        if self.checkpoint_under_way() || self.compaction.is_some() {
            return;
        }
        let left = self.extents.left_count() as u64;
        if left >= low / 4 {
            self.need_checkpoint();
        } else if !self.begin_compaction() && left > 0 && self.stalled_for_space {
            self.need_checkpoint();
        }
    }

    /// Begins to grow the data space; false if it can't.
    fn grow(&mut self) -> bool {
        let overdraft = if self.redoing.is_some() { OVERDRAFT_EXTENTS } else { 0 };
        self.grow_up_to(self.limits.data_extents_max.saturating_add(overdraft))
    }

    fn grow_up_to(&mut self, extents_max: u32) -> bool {
        let space = self.extents.space();
        let waits = self.grow_failed_at.is_some_and(|at| self.now < at + GROW_RETRY_US);
        if self.growing || waits || space.total >= extents_max {
            return self.growing;
        }
        let chunk = (space.total / 8).clamp(4, 64);
        let to = space.total.saturating_add(chunk).min(extents_max);
        self.growing = true;
        let table = |extents: u32| table_offset(extents.div_ceil(TABLE_ROWS), 0);
        let growth = Growth { to, table_done: false };
        if table(to) > table(space.total) {
            let op = DiskOp::Allocate { file: FileId::Table, from: table(space.total), to: table(to) };
            self.submit(OpKind::Grow(growth), op);
        } else {
            self.grow_data(growth);
        }
        true
    }

    fn grow_data(&mut self, growth: Growth) {
        let bytes = |extents: u32| u64::from(extents) * self.limits.geometry.extent_bytes;
        let (from, to) = (bytes(self.extents.space().total), bytes(growth.to));
        let growth = Growth { table_done: true, ..growth };
        self.submit(OpKind::Grow(growth), DiskOp::Allocate { file: FileId::Data, from, to });
    }

    /// A step of the growth has ended.
    pub(super) fn grown(&mut self, growth: Growth, result: Result<()>) {
        self.again = true;
        match result {
            Ok(()) if !growth.table_done => self.grow_data(growth),
            Ok(()) => {
                self.growing = false;
                self.extents.grow(growth.to);
            }
            Err(error) => {
                tracing::warn!(%error, "the data space can't grow");
                self.growing = false;
                self.grow_failed_at = Some(self.now);
            }
        }
    }

    /// Writes the summaries of extents that are full, and those that a checkpoint asks for.
    pub(super) fn write_summaries(&mut self) {
        if self.failed.is_some() {
            return;
        }
        while let Some(no) = self.summaries.last().copied() {
            let bytes = self.extents.summary_bytes();
            if !self.ensure_frames((bytes / BLOCK) as u32) {
                return;
            }
            self.summaries.pop();
            if !self.extents.is_unsummarized(no) {
                continue;
            }
            let mut summary = vec![0; bytes];
            let place = self.extents.encode_summary(no, &mut summary);
            let mut from = smallvec::SmallVec::new();
            for block in summary.chunks(BLOCK) {
                let mut frame = self.arena.alloc(0).expect("frames were ensured");
                frame.try_mut().expect("a new frame has no pins").copy_from_slice(block);
                from.push(IoSlice::whole(frame.pin()));
            }
            self.summaries_under_way += 1;
            self.stats.checksums += 1;
            let offset = place.offset(self.limits.geometry.extent_bytes);
            self.submit(OpKind::SummaryWrite(no), DiskOp::Write { file: FileId::Data, offset, from });
        }
    }
}
