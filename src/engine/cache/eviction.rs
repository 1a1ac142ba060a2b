//! Frees memory for requests; the policy chooses which pages and map nodes leave it (see
//! `memory::eviction`).
//!
//! Invariants
//! 1. A page that has memory and no reference is listed with the policy; one that has neither is
//!    not in the page table at all. [`Shard::reference_ended`] is called wherever a reference to a
//!    page ends.
//! 2. A search for more frames than can be freed frees nothing, and costs little when it is
//!    repeated.

use crate::base::PageIdx;
use crate::engine::cache::table::Table;
use crate::engine::map::Map;
use crate::engine::{Shard, Step};
use crate::memory::{Owner, Residency, Residents, Standing};
use smallvec::SmallVec;

/// The most pinned blocks that are checked again when there is nothing else: about half a
/// millisecond's work. A step that waits for memory checks again a little later, and continues
/// where this ended.
const PINNED_LOOKS_MAX: u32 = 4096;

/// Everything that has memory.
struct InMemory<'a> {
    table: &'a mut Table,
    map: &'a mut Map,
}

impl Residents for InMemory<'_> {
    fn standing(&self, owner: Owner, block: u32) -> Standing {
        match owner {
            Owner::Page(idx) => self.table.standing(idx, block),
            Owner::Node(no) => self.map.standing(no, block),
        }
    }

    fn residency(&mut self, owner: Owner) -> &mut Residency {
        match owner {
            Owner::Page(idx) => &mut self.table.pages[idx].residency,
            Owner::Node(no) => self.map.residency(no),
        }
    }

    fn evict(&mut self, owner: Owner) -> u64 {
        match owner {
            Owner::Page(idx) => self.table.evict(idx),
            Owner::Node(no) => self.map.evict(no),
        }
    }
}

impl Shard {
    /// Frees memory until `frames` single frames are available, besides those that parts of commits
    /// have reserved and, unless `step` is a checkpoint's, those that a checkpoint needs. If it
    /// can't, registers `step` as blocked.
    pub(in crate::engine) fn ensure_frames(&mut self, frames: u32, step: Step) -> bool {
        let kept = if step.is_of_checkpoint() { 0 } else { self.reservations.checkpoint_frames };
        let frames = frames + self.reservations.parts.frames + kept;
        let found = self.find_frames(frames);
        match found {
            true => self.ctx.blocked.grant_frames(step),
            false => self.ctx.blocked.refuse_frames(step, frames, self.ctx.now),
        }
        found
    }

    /// Frees memory until `frames` frames are free, or frees nothing if it can't.
    pub(in crate::engine) fn find_frames(&mut self, frames: u32) -> bool {
        let missing = frames.saturating_sub(self.ctx.arena.free_blocks());
        if missing > 0 && !self.can_free(missing) {
            return false;
        }
        while self.ctx.arena.free_blocks() < frames {
            let evicted = self.evict_one();
            assert!(
                evicted,
                "of {missing} frames that could be freed, one can't be: {frames} are needed, {}",
                self.memory()
            );
        }
        let free = self.ctx.arena.free_blocks();
        assert!(free >= frames, "{free} frames are free, of {frames} that were found");
        true
    }

    /// Whether `missing` frames can be freed. If a failing search evicted, it would take what
    /// another request has just read, which would read it again and do the same: two of these would
    /// never end.
    fn can_free(&mut self, missing: u32) -> bool {
        self.count_idle(missing) || (self.look_at_pinned() && self.count_idle(missing))
    }

    fn count_idle(&mut self, missing: u32) -> bool {
        self.map.list_idle(&mut self.cache.eviction);
        let mut nodes = SmallVec::new();
        let mut in_memory = InMemory { table: &mut self.cache.table, map: &mut self.map };
        let idle = self.cache.eviction.count_idle(&mut in_memory, missing, &mut nodes);
        idle >= missing || idle + self.map.idle_above(&nodes) >= missing
    }

    fn evict_one(&mut self) -> bool {
        self.map.list_idle(&mut self.cache.eviction);
        let mut in_memory = InMemory { table: &mut self.cache.table, map: &mut self.map };
        self.cache.eviction.evict_one(&mut in_memory, self.ctx.now, PINNED_LOOKS_MAX)
    }

    /// Checks some of the pinned blocks again. Returns whether readers had released any.
    pub(in crate::engine) fn look_at_pinned(&mut self) -> bool {
        let mut in_memory = InMemory { table: &mut self.cache.table, map: &mut self.map };
        self.cache.eviction.look_at_pinned(&mut in_memory, self.ctx.now, PINNED_LOOKS_MAX)
    }

    /// Called when a reference to page `idx` has ended, or the request that it was loaded for is
    /// gone. Without memory and references it needs no entry, since the map says the same about it:
    /// otherwise a store whose clients read absent pages would grow without limit. With memory it
    /// may be evicted from now on. The index may belong to another page afterwards.
    pub(in crate::engine) fn reference_ended(&mut self, idx: PageIdx) {
        let page = &mut self.cache.table.pages[idx];
        let Some(frame) = &page.frame else {
            if page.is_unreferenced() && !planted!(AbsentKept) {
                let (newest, mapped) = (page.lsn, page.mapped_lsn);
                assert!(
                    newest == mapped,
                    "{:?} is to be forgotten at {newest:?}, but the map has {mapped:?}",
                    page.key
                );
                self.cache.table.remove(idx);
            }
            return;
        };
        if page.residency.is_listed() || !page.is_unreferenced() {
            return;
        }
        let (newest, mapped) = (page.lsn, page.mapped_lsn);
        assert!(
            newest == mapped,
            "{:?} may leave memory at {newest:?}, but the map has {mapped:?}",
            page.key
        );
        let (block, key) = (frame.block(), page.key);
        let hash = self.cache.table.hash(key);
        self.cache.eviction.list(
            block,
            Owner::Page(idx),
            &mut self.cache.table.pages[idx].residency,
            hash,
        );
    }
}

impl Shard {
    /// Called when one reference less exists to the page. With nothing on its way it no longer
    /// needs its map leaf, and without memory no entry in the table: the index may belong to
    /// another page afterwards.
    pub(in crate::engine) fn unpin_if_clean(&mut self, idx: PageIdx) {
        let page = &mut self.cache.table.pages[idx];
        let clean = page.holds == 0
            && page.versions == 0
            && page.dirty_from.is_none()
            && page.image.is_none();
        if clean && let Some(leaf) = page.leaf.take() {
            self.map.unpin(leaf);
            self.ctx.room_changed();
        }
        self.reference_ended(idx);
    }

    /// Describes what is in memory.
    pub(in crate::engine) fn memory(&self) -> String {
        let (resident, pages) = (self.cache.table.resident(), self.cache.table.pages.len());
        let (in_readers_hands, counts) =
            (self.cache.eviction.pinned(), self.cache.eviction.counts());
        let (nodes, dirty) = (self.map.nodes_count(), self.map.dirty_count());
        format!(
            "{} of {pages} pages with their bytes, {} of them needed by requests, \
             {in_readers_hands} pinned by readers when last seen, {nodes} nodes, {dirty} of them \
             dirty, {counts:?}",
            resident.pages, resident.held
        )
    }
}
