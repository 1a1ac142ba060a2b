//! The data space: admission, growth, and the decision when to reclaim.
//!
//! Invariants
//! 1. Every dirty page and every image has a block reserved; map nodes and compaction have a
//!    reserve of their own.
//! 2. A commit gets `Full` only when nothing can give space any more: no growth, no checkpoint that
//!    would free places, nothing to compact. Until then it waits.
//! 3. The space grows only while more of it than `Options::fill_percent` is live, apart from the
//!    size of the log; otherwise it is reclaimed.
//! 4. Compaction keeps free and reclaimable extents together at a share of the space that is not
//!    live ([`TARGET_FREE_PART`]), and runs during checkpoints. A checkpoint is requested when most
//!    of these are reclaimable, or when commits wait and compaction can't continue without one. All
//!    of this scales with the store, so a checkpoint, which writes nearly every leaf of the map
//!    under random overwrites, is paid for by the same share of pages in a large store as in a
//!    small one. See decision 17.
//! 5. The leader makes the file longer for any shard that asks; if it can't, the other shards give
//!    some of their extents.

pub(in crate::engine) mod compaction;
mod growth;

use crate::base::error::{Error, ErrorKind, Result};
use crate::base::{BLOCK, BlockAddr, ExtentNo, Micros, ShardId};
use crate::engine::OpKind;
use crate::engine::Work;
use crate::engine::map::{Extents, Stream};
use crate::engine::message::Urgency;
use crate::engine::reservations::Need;
use crate::engine::space::compaction::Compaction;
use crate::engine::{Lack, Shard, Step};
use crate::format::extent::ItemKind;
use crate::io::{DiskOp, FileId, IoSlice};
pub(in crate::engine) use growth::{GROW_RETRY_US, SpaceAsked};
use std::collections::VecDeque;

/// The fewest extents that commits leave to map nodes, checkpoints and compaction.
const RESERVE_EXTENTS: u64 = 8;
/// The same, as a part of the blocks that are not live: compaction works with these while commits
/// wait. With a fixed reserve a large store that has run out of free extents does a checkpoint for
/// every few extents that compaction empties.
const RESERVE_PART: u64 = 16;
/// The same for commits that make room, by freeing pages or deleting a volume: a full store must be
/// able to become less full.
const FREES_RESERVE_EXTENTS: u64 = 3;
/// Extents beyond `data_bytes_max` that the engine may take for itself, to finish a recovery or a
/// checkpoint.
const OVERCOMMIT_EXTENTS: u32 = 64;
/// This part of the blocks that are not live is kept free or reclaimable, beyond the reserve. More
/// makes checkpoints rarer, and extents fuller when they are compacted; from a third to an eighth
/// the sum of both costs hardly changes.
const TARGET_FREE_PART: u64 = 5;
/// At least this many extents are kept, whatever is live.
const TARGET_FREE_EXTENTS_MIN: u64 = 4;
/// When free extents are down to this part of what is kept ahead, a checkpoint turns reclaimable
/// ones into free ones. Writes continue meanwhile: they take what is left.
const LOW_PART: u64 = 5;
/// What checkpoints in a row without a gain may come to, while a commit waits for space, before
/// there is none to be had: one that found nothing to compact counts [`BARREN_IDLE`] times.
const BARREN_MAX: u32 = 16;
const BARREN_IDLE: u32 = 4;
/// The shard's data space.
pub(in crate::engine) struct Space {
    pub extents: Extents,
    /// Extents whose summary is to be written.
    pub summaries: Vec<ExtentNo>,
    pub summaries_under_way: usize,
    /// Dirty pages that are freed: a block is reserved for each, as for any dirty page, but none
    /// will take it.
    pub freed_pages: u64,
    /// Whether more space has been requested.
    pub growing: bool,
    /// Whether more has been granted: then dirty pages that found no place may try again.
    pub granted: bool,
    pub asked: SpaceAsked,
    /// Requests that wait for the leader, and by how many extents each may exceed the limit.
    pub requests: VecDeque<(ShardId, u32)>,
    pub growth_under_way: bool,
    /// When a request was last refused, and how urgent it was.
    pub failed: Option<(Micros, Urgency)>,
    /// Whether the operator has been told that the file can't grow: it is tried again every second.
    pub growth_failure_logged: bool,
    /// Whether a commit waits for space.
    pub stalled: bool,
    /// Until when space is being made, since a part of a commit over shards found none.
    pub wanted_until: Micros,
    pub reclaiming: Reclaiming,
    /// Extents being emptied here, and items that are moved for other shards.
    pub compaction: Compaction,
}

impl Space {
    pub fn new(extents: Extents, compaction: Compaction) -> Self {
        Space {
            extents,
            summaries: Vec::new(),
            summaries_under_way: 0,
            freed_pages: 0,
            growing: false,
            granted: false,
            asked: SpaceAsked::default(),
            requests: VecDeque::new(),
            growth_under_way: false,
            failed: None,
            growth_failure_logged: false,
            stalled: false,
            wanted_until: 0,
            reclaiming: Reclaiming::default(),
            compaction,
        }
    }
}

/// Whether reclaiming still helps.
#[derive(Clone, Copy, Default)]
pub(in crate::engine) struct Reclaiming {
    /// The most free blocks since a commit had to wait.
    best: u64,
    /// Checkpoints since `best` was reached, weighted.
    barren_checkpoints: u32,
    /// Live blocks when reclaiming was given up: it is tried again when something has been freed.
    given_up_at: Option<u64>,
}

impl Shard {
    /// Takes a place of this many blocks for `what`; the summary of an extent that this fills is
    /// written.
    pub(in crate::engine) fn alloc_place(
        &mut self,
        stream: Stream,
        what: ItemKind,
        blocks: u32,
    ) -> Option<BlockAddr> {
        assert_eq!(blocks, 1, "in format 3 a place is one block");
        let (place, full) = self.space.extents.alloc(stream, what)?;
        self.ctx.room_changed();
        if let Some(full) = full {
            self.space.summaries.push(full);
            self.ctx.need(Work::Summaries);
        }
        Some(place)
    }

    pub(in crate::engine) fn free_blocks(&self) -> u64 {
        let space = self.space.extents.space();
        u64::from(space.free) * u64::from(space.data_blocks)
    }

    /// Blocks that everything now dirty will take, including the map nodes that dirty pages will
    /// change: a checkpoint must find room for them, however many pages have been waiting to be
    /// written.
    pub(in crate::engine) fn owed_blocks(&self) -> u64 {
        self.owed_now() + self.awaited_nodes()
    }

    fn awaited_nodes(&self) -> u64 {
        match self.ctx.checkpoint.active {
            true => self.map.awaited_count(),
            false => self.map.awaited_clean_count(),
        }
    }

    /// The same without nodes that are not dirty yet: the file does not grow for them, since they
    /// come and go.
    fn owed_now(&self) -> u64 {
        let pages = self.reservations.dirty_blocks - self.space.freed_pages;
        pages + self.reservations.parts.space_blocks + self.map.dirty_count() as u64
    }

    /// Checks whether a commit's pages and map nodes will find space. `Ok(false)`: not yet.
    pub(in crate::engine) fn admit_space(&mut self, need: &Need) -> Result<bool> {
        let reserve = match need.makes_room {
            true => FREES_RESERVE_EXTENTS * u64::from(self.space.extents.data_blocks()),
            false => self.reserve_blocks(),
        };
        let wanted = self.owed_blocks() + need.blocks() + reserve;
        if self.free_blocks() >= wanted {
            self.space.reclaiming = Reclaiming::default();
            return Ok(true);
        }
        self.space.stalled = true;
        if self.reclaim(wanted) {
            return Ok(false);
        }
        Err(self.full(need))
    }

    /// The error that there is no space for a commit: what for, and what would help.
    fn full(&self, need: &Need) -> Error {
        let what = match need.makes_room {
            true => "what freeing pages changes in the page map".to_owned(),
            false => format!("{} pages that are written", need.frames),
        };
        let is_limited = self.space.extents.count() >= self.ctx.limits.data_extents_max;
        let more = match is_limited {
            true => format!(
                "raise data_bytes_max (it allows {} extents)",
                self.ctx.limits.data_extents_max
            ),
            false => "make room in the file system".to_owned(),
        };
        let (space, extent_bytes) =
            (self.space.extents.space(), self.ctx.limits.geometry.extent_bytes);
        Error::new(
            ErrorKind::Full,
            format_args!(
                "no space is left for {what}: shard {} has {} of its {} data extents of \
                 {extent_bytes} bytes free, which it needs for its page map and to reclaim space; \
                 delete or discard data, or {more}",
                self.ctx.id.get(),
                space.free,
                space.total
            ),
        )
    }

    /// A checkpoint has ended: what was retired is free.
    pub(in crate::engine) fn note_reclaimed(&mut self) {
        let compacts = self.space.compaction.compactor.look_again();
        let free = self.free_blocks();
        let r = &mut self.space.reclaiming;
        if free > r.best {
            *r = Reclaiming { best: free, ..Reclaiming::default() };
        } else if self.space.stalled || self.ctx.now < self.space.wanted_until {
            r.barren_checkpoints += if compacts { 1 } else { BARREN_IDLE };
        }
    }

    fn named_blocks(&self) -> u64 {
        self.space
            .extents
            .space()
            .live_blocks
            .saturating_sub(self.space.extents.pending_free_count() as u64)
    }

    /// Whether there is room for the nodes of one virtual shard; if not, space is made.
    pub(in crate::engine) fn space_for_nodes(&mut self, nodes: u32) -> bool {
        if self.free_blocks() > u64::from(nodes) {
            return true;
        }
        self.ctx.blocked.register(Step::Capture, Lack::Space);
        self.must_grow("the page map");
        false
    }

    /// Called when nothing continues without a place for `what`: requests more space, and if there
    /// is none the store stops.
    pub(in crate::engine) fn must_grow(&mut self, what: &str) {
        self.space.stalled = true;
        let waits = self.space.growing
            || self.ask_for_space(OVERCOMMIT_EXTENTS, Urgency::Stuck)
            || (self.life.opening && planted!(OpeningWaitsForSpace));
        if !waits {
            let context = format_args!(
                "no space is left for {what}, and the data space can't grow: make room in the \
                 file system, then open the store again"
            );
            self.ctx.fail(Error::new(ErrorKind::Full, context));
        }
    }

    /// Blocks that would be free without any garbage: reclaiming can't make more.
    fn spare_blocks(&self) -> u64 {
        let space = self.space.extents.space();
        (u64::from(space.total) * u64::from(space.data_blocks)).saturating_sub(self.named_blocks())
    }

    /// Blocks that commits leave to map nodes, checkpoints and compaction. The fuller the store,
    /// the less: a full one can use all but the least of it.
    pub(in crate::engine) fn reserve_blocks(&self) -> u64 {
        let least = RESERVE_EXTENTS * u64::from(self.space.extents.data_blocks());
        (self.spare_blocks() / RESERVE_PART).max(least)
    }

    /// Whether space is being made, or can be, for `wanted` free blocks in all; does what is next
    /// for it.
    fn reclaim(&mut self, wanted: u64) -> bool {
        if self.space.growing || (self.wants_growth() && self.grow(0)) {
            return true;
        }
        let named = self.named_blocks();
        if self.space.reclaiming.given_up_at.is_some_and(|at| named >= at) {
            return self.grow(0);
        }
        if self.space.reclaiming.barren_checkpoints >= BARREN_MAX {
            self.space.reclaiming =
                Reclaiming { given_up_at: Some(named), ..Reclaiming::default() };
            return self.grow(0);
        }
        // What is on its way may yet leave places: pages that were freed, above all.
        let awaiting_watermark = self.reservations.dirty_blocks + self.reservations.unpublished;
        if self.spare_blocks() + awaiting_watermark + self.owed_blocks() < wanted {
            return self.grow(0);
        }
        let moving = self.begin_compaction() || !self.space.compaction.moves.is_empty();
        if self.ctx.checkpoint.is_wanted_or_active() {
            return true;
        }
        if moving && self.space.extents.coming() < self.reserve_blocks() / 2 {
            // Compaction will have made more of it: a checkpoint costs the same, however little it
            // frees.
            return true;
        }
        let is_awaited = self.awaited_nodes() > 0 || self.map.dirty_count() > 0;
        let is_dirty =
            self.reservations.dirty_blocks > 0 || self.reservations.unpublished > 0 || is_awaited;
        if self.space.extents.coming() > 0
            || (!moving && (self.space.extents.pending_free_count() > 0 || is_dirty))
        {
            // What is dirty leaves places when it is written.
            self.ctx.need_checkpoint();
            return true;
        }
        moving || self.grow(0)
    }

    /// Whether most of the space is live, so that reclaiming would give little. As many blocks of
    /// garbage as the log may have are let be: a store that is small beside its log would else be
    /// compacted without end.
    fn wants_growth(&self) -> bool {
        let (space, geometry) = (self.space.extents.space(), &self.ctx.limits.geometry);
        let reserve = RESERVE_EXTENTS * u64::from(space.data_blocks);
        let live = self.named_blocks() + self.owed_now() + reserve;
        let let_be = geometry.segment_bytes * u64::from(geometry.segments_count) / BLOCK as u64;
        let filled = (u64::from(space.total) * u64::from(space.data_blocks)).saturating_sub(let_be);
        live * 100 > filled * u64::from(self.ctx.limits.fill_percent)
    }

    /// Keeps some extents free ahead of need.
    pub(in crate::engine) fn advance_space(&mut self) {
        if self.ctx.failed.is_some() || self.life.closing.is_some() || self.space.growing {
            return;
        }
        if self.life.opening {
            return self.space_for_opening();
        }
        // Beyond what commits may not use.
        let extent = u64::from(self.space.extents.data_blocks());
        let target_free_blocks =
            (self.spare_blocks() / TARGET_FREE_PART).max(TARGET_FREE_EXTENTS_MIN * extent);
        let free = self.free_blocks().saturating_sub(self.owed_now() + self.reserve_blocks());
        if free >= target_free_blocks {
            return;
        }
        if self.wants_growth() && self.grow(0) {
            return;
        }
        let coming = self.space.extents.coming();
        while free + coming + self.space.compaction.compactor.count() as u64 * extent
            < target_free_blocks
            && self.begin_one_more()
        {}
        let moving = self.space.compaction.compactor.count() > 0;
        if self.ctx.checkpoint.is_wanted_or_active() {
            return;
        }
        let stalled = self.space.stalled || self.ctx.now < self.space.wanted_until;
        let low = target_free_blocks / LOW_PART;
        // Dirty nodes leave their places with the next checkpoint.
        let pending = self.space.extents.pending_free_count() + self.map.dirty_count();
        if (free < low && coming >= low) || (stalled && !moving && pending > 0) {
            self.ctx.need_checkpoint();
        }
    }

    /// While the store is opened there is to be as much space as its redo needs, and no more: a
    /// store that is killed again and again would else grow with each life. Opening has an end: if
    /// the space can't grow, blocks that redo has given up are retired, and nothing is moved.
    fn space_for_opening(&mut self) {
        let reserve = FREES_RESERVE_EXTENTS * u64::from(self.space.extents.data_blocks());
        if !self.life.redoing || self.free_blocks() >= self.owed_now() + reserve {
            return;
        }
        if !self.grow(OVERCOMMIT_EXTENTS) && self.space.extents.pending_free_count() > 0 {
            self.ctx.need_checkpoint();
        }
    }

    /// Writes the summaries of extents that are full, and those that a checkpoint asks for.
    pub(in crate::engine) fn write_summaries(&mut self) {
        if self.ctx.failed.is_some() {
            return;
        }
        while let Some(no) = self.space.summaries.last().copied() {
            let bytes = self.space.extents.summary_bytes();
            if !self.ensure_frames((bytes / BLOCK) as u32, Step::Summary) {
                return;
            }
            self.space.summaries.pop();
            if !self.space.extents.is_unsummarized(no) {
                continue;
            }
            let mut summary = vec![0; bytes];
            let place = self.space.extents.encode_summary(no, &mut summary);
            let mut from = smallvec::SmallVec::new();
            for block in summary.chunks(BLOCK) {
                let mut frame = self.ctx.arena.alloc(0).expect("frames were ensured");
                frame.try_mut().expect("a new frame has no pins").copy_from_slice(block);
                from.push(IoSlice::whole(frame.pin()));
            }
            self.space.summaries_under_way += 1;
            self.ctx.stats.checksums += 1;
            let offset = place.offset(self.ctx.limits.geometry.extent_bytes);
            self.ctx.submit(
                OpKind::SummaryWrite(no),
                DiskOp::Write { file: FileId::Data, offset, from },
            );
        }
    }
}
