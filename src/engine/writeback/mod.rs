//! Writes dirty pages to new blocks, and makes the map name them once they are durable.
//!
//! ```text
//! Dirty --demand, memory, checkpoint, idleness--> PageVersion --written--> awaits the watermark
//!                                                                             --> in the map
//! ```
//! Invariants
//! 1. A [`PageVersion`] is fixed: its frame is pinned until it is written, and later changes go to
//!    a copy.
//! 2. A page has one version on its way from the queue at a time; another one may be on its way
//!    with a group.
//!
//! When pages are written is decided in `pace`; when the map names a version, in `publish`.

pub(crate) mod plan;
mod pace;
mod publish;
mod queue;

use crate::base::error::Error;
use crate::base::{BlockAddr, IndexedSlab, Lsn, Micros, PageIdx, PageVersionIdx};
use crate::engine::Work;
use crate::engine::codec::{self, Sealed};
use crate::engine::context::Context;
use crate::engine::map::Stream;
use crate::engine::{Lack, OpKind, Shard, Step};
use crate::format::extent::ItemKind;
use crate::format::node::Entry;
use crate::io::{DiskOp, FileId, IoSlice};
pub(in crate::engine) use pace::Spread;
use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

/// A version of a page on its way into the map. No entry: the page was freed.
pub(in crate::engine) struct PageVersion {
    pub page: PageIdx,
    pub lsn: Lsn,
    pub entry: Option<Entry>,
    pub moved_from: Option<BlockAddr>,
}

/// A written version that waits for the watermark: lowest LSN first.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::engine) struct AwaitingWatermark(Reverse<(Lsn, PageVersionIdx)>);

impl AwaitingWatermark {
    pub fn lsn(&self) -> Lsn {
        self.0.0.0
    }
}

/// Dirty pages, and versions of pages on their way to their places and into the map.
#[derive(Default)]
pub(in crate::engine) struct WriteBack {
    /// Dirty pages in the order in which they became so.
    dirty: VecDeque<PageIdx>,
    /// Pages in the queue that are clean: their newest version went to its place with a group.
    clean: usize,
    /// When a page last changed, a group last became durable, or dirty pages were last taken.
    quiet_since: Micros,
    /// Whether a window has passed since then.
    was_quiet: bool,
    /// Whether something waits for clean pages.
    hurried: bool,
    /// Pages that found no place: the next attempt is not before this.
    retry_at: Micros,
    /// The pages of the checkpoint under way, if it does not hurry, and how many were taken.
    spread: Option<Spread>,
    spread_taken: u64,
    versions: IndexedSlab<PageVersionIdx, PageVersion>,
    /// Written versions that wait for the watermark.
    awaiting_watermark: BinaryHeap<AwaitingWatermark>,
    /// Pages being written.
    page_writes: usize,
    /// Before something happens here, or the watermark reaches this, no dirty page can be written.
    stuck_until: Option<Lsn>,
    /// Written versions whose map leaf is being written.
    behind_nodes: Vec<PageVersionIdx>,
    /// Pages whose version at the beginning of the checkpoint under way is not in the map yet.
    checkpoint_versions: u64,
}

/// The most pages in flight to their places: enough for the queue of a fast device, few enough to
/// leave memory.
const PAGE_WRITES_MAX: usize = 1024;
/// The queue is swept when at least this many of its pages, and half of them, are clean: they keep
/// map leaves in memory for nothing.
const CLEAN_MIN: usize = 64;
/// When dirty pages that found no place try again, if nothing else happens.
const SPACE_RETRY_US: Micros = 100_000;

impl WriteBack {
    /// A page has changed, or a group is durable: the store is not idle.
    pub fn note_activity(&mut self, now: Micros) {
        (self.quiet_since, self.was_quiet) = (now, false);
    }

    /// A page has become dirty: it goes to its place in time.
    pub fn enqueue(&mut self, page: PageIdx) {
        self.dirty.push_back(page);
    }

    /// A page of the queue is clean now.
    pub fn note_clean(&mut self, ctx: &mut Context) {
        self.clean += 1;
        if self.is_sweep_due() {
            ctx.need(Work::WriteBack);
        }
    }

    /// A clean page of the queue is dirty again.
    pub fn note_dirty(&mut self) {
        assert!(self.clean > 0, "a page of the queue is dirty again, and none was clean");
        self.clean -= 1;
    }

    /// Whether enough pages of the queue are clean to look through all of it.
    fn is_sweep_due(&self) -> bool {
        self.clean >= CLEAN_MIN && 2 * self.clean >= self.dirty.len()
    }

    /// Dirty pages are written as soon as they may be.
    pub fn hurry(&mut self, ctx: &mut Context) {
        self.hurried = true;
        ctx.need(Work::WriteBack);
    }

    /// Called when something has happened that dirty pages may have waited for.
    pub fn unblock(&mut self, ctx: &mut Context) {
        if self.stuck_until.take().is_some() {
            ctx.need(Work::WriteBack);
        }
    }

    /// The LSN that dirty pages wait for, if nothing else would let them be written.
    pub fn stuck_until(&self) -> Option<Lsn> {
        self.stuck_until
    }

    /// The lowest LSN that written versions wait for.
    pub fn awaited_lsn(&self) -> Option<Lsn> {
        self.awaiting_watermark.peek().map(|waiting| waiting.lsn())
    }

    /// Whether no page is dirty or on its way into the map.
    pub fn is_idle(&self) -> bool {
        self.dirty.is_empty() && self.versions.is_empty()
    }

    /// Pages that are dirty or on their way into the map, some more than once.
    pub fn pages_behind(&self) -> impl Iterator<Item = PageIdx> {
        self.dirty.iter().copied().chain(self.versions.iter().map(|(_, version)| version.page))
    }

    /// Records that a checkpoint waits until the map has the present version of this many `pages`.
    pub fn await_versions(&mut self, pages: u64) {
        let before = self.checkpoint_versions;
        assert!(before == 0, "a checkpoint waits for {pages} pages, the one before for {before}");
        self.checkpoint_versions = pages;
        self.spread = None;
    }

    /// The pages that the checkpoint waits for need not be written at once.
    pub fn spread(&mut self, spread: Spread) {
        self.spread = Some(spread);
        self.spread_taken = 0;
    }

    /// Pages that the checkpoint in progress waits for.
    pub fn awaited_versions(&self) -> u64 {
        self.checkpoint_versions
    }

    /// Versions on their way into the map.
    #[cfg(any(test, feature = "sim"))]
    pub fn versions(&self) -> impl Iterator<Item = &PageVersion> {
        self.versions.iter().map(|(_, version)| version)
    }

    /// How much is in progress: for audits and messages.
    pub fn counts(&self) -> WriteBackCounts {
        WriteBackCounts {
            dirty: self.dirty.len(),
            clean: self.clean,
            versions: self.versions.len(),
            page_writes: self.page_writes,
            behind_nodes: self.behind_nodes.len(),
        }
    }
}

/// How much of the write-back is in progress.
#[derive(Clone, Copy, Debug)]
#[cfg_attr(
    not(any(test, feature = "sim")),
    allow(dead_code, reason = "only audits and messages of tests read all of it")
)]
pub(in crate::engine) struct WriteBackCounts {
    /// Pages in the queue.
    pub dirty: usize,
    /// Those of them that are clean.
    pub clean: usize,
    /// Versions on their way into the map.
    pub versions: usize,
    /// Pages being written.
    pub page_writes: usize,
    /// Written versions whose leaf is being written.
    pub behind_nodes: usize,
}

impl Shard {
    /// Writes the dirty pages that are due.
    pub(in crate::engine) fn write_back(&mut self) {
        if self.ctx.failed.is_some() {
            return;
        }
        self.write_moves();
        if std::mem::take(&mut self.space.granted) {
            (self.writeback.hurried, self.writeback.retry_at) = (true, 0);
        }
        self.sweep_queue();
        self.note_quiet();
        let Some(due) = self.pages_due() else { return };
        let stuck = self.writeback.stuck_until.is_some() && !due.above_watermark;
        let room = PAGE_WRITES_MAX.saturating_sub(self.writeback.page_writes).min(due.pages);
        if self.writeback.dirty.is_empty() || stuck || room == 0 {
            return;
        }
        self.writeback.hurried = false;
        self.writeback.quiet_since = self.ctx.now;
        let take = self.take_dirty(due, room);
        self.capture_pages(take);
    }

    fn capture_pages(&mut self, mut take: Vec<PageIdx>) {
        take.sort_by_key(|idx| self.cache.table.pages[*idx].key);
        let mut blocks = Vec::with_capacity(take.len());
        let mut found_none = false;
        for idx in take {
            let page = &self.cache.table.pages[idx];
            let (key, lsn) = (page.key, page.lsn);
            if page.absent {
                self.begin_flush(idx);
                let version =
                    self.add_version(PageVersion { page: idx, lsn, entry: None, moved_from: None });
                self.reservations.frees_unpublished += 1;
                self.version_written(version);
                continue;
            }
            let sealed = self.seal_page(idx);
            let Some(place) =
                self.alloc_place(Stream::Data, ItemKind::Page(key, lsn), sealed.blocks())
            else {
                let page = &mut self.cache.table.pages[idx];
                page.queued = true;
                self.writeback.dirty.push_back(idx);
                found_none = true;
                continue;
            };
            self.begin_flush(idx);
            let (version, slice) = self.flush_page(idx, sealed, place, None);
            blocks.push((place, (version, slice)));
        }
        self.write_versions(blocks);
        if found_none {
            self.ctx.blocked.register(Step::WriteBack, Lack::Space);
            self.writeback.retry_at = self.ctx.now + SPACE_RETRY_US;
        }
        // Commits have reserved a block for each page; a redo reserves none, and the checkpoint
        // that ends it waits for its pages.
        if found_none && self.life.opening && self.ctx.checkpoint.wants_pages {
            self.must_grow("the pages of the recovery");
        }
    }

    /// Records that the page's newest version is on its way from the queue.
    fn begin_flush(&mut self, idx: PageIdx) {
        let page = &mut self.cache.table.pages[idx];
        assert!(
            page.versions == 0 && page.image.is_none(),
            "{:?} is captured while {} versions and {:?} are on their way",
            page.key,
            page.versions,
            page.image
        );
        page.versions += 1;
        self.leave_dirty(idx);
    }

    /// Records that the page's newest version is on its way: it is no longer dirty, and the block
    /// that was reserved for it is taken.
    pub(in crate::engine) fn leave_dirty(&mut self, idx: PageIdx) {
        let page = &mut self.cache.table.pages[idx];
        let reserved = self.reservations.dirty_blocks;
        assert!(
            page.dirty_from.is_some() && reserved > 0,
            "{:?} is captured, dirty since {:?}, with {reserved} blocks reserved",
            page.key,
            page.dirty_from
        );
        page.dirty_from = None;
        if page.queued {
            self.writeback.note_clean(&mut self.ctx);
        }
        self.reservations.dirty_blocks -= 1;
        self.ctx.room_changed();
        if page.absent {
            let freed = self.space.freed_pages;
            assert!(freed > 0, "{:?} is freed, and one of {freed} dirty pages", page.key);
            self.space.freed_pages -= 1;
        }
        page.assert_state();
    }

    /// The stored form of a page that is in memory.
    fn seal_page(&mut self, idx: PageIdx) -> Sealed {
        let frame = &self.cache.table.pages[idx].frame;
        self.ctx.stats.checksums += 1;
        codec::seal(
            frame.as_ref().expect("a dirty page that is not absent has its bytes in memory").pin(),
        )
    }

    fn flush_page(
        &mut self,
        idx: PageIdx,
        sealed: Sealed,
        place: BlockAddr,
        moved_from: Option<BlockAddr>,
    ) -> (PageVersionIdx, IoSlice) {
        let page = &self.cache.table.pages[idx];
        let entry = sealed.entry(place, page.lsn);
        let version = self.add_version(PageVersion {
            page: idx,
            lsn: page.lsn,
            entry: Some(entry),
            moved_from,
        });
        (version, IoSlice::whole(sealed.into_bytes()))
    }

    /// Records that a version of a page is on its way into the map.
    pub(in crate::engine) fn add_version(&mut self, version: PageVersion) -> PageVersionIdx {
        self.reservations.unpublished += 1;
        self.writeback.versions.insert(version)
    }

    fn write_versions(&mut self, blocks: Vec<(BlockAddr, (PageVersionIdx, IoSlice))>) {
        self.writeback.page_writes += blocks.len();
        self.ctx.stats.pages_written += blocks.len() as u64;
        for run in plan::writes(blocks, self.ctx.limits.vectored_pages_max) {
            let offset = run.place.offset(self.ctx.limits.geometry.extent_bytes);
            let last = run.place.block as usize + run.items.len();
            assert!(
                last <= self.space.extents.data_blocks() as usize,
                "pages are written to {:?} and up to block {last}: into the summary",
                run.place
            );
            self.ctx.stats.page_write_ops += 1;
            self.ctx.stats.coalesced_writes += run.items.len() as u64 - 1;
            let (versions, slices): (Vec<_>, Vec<_>) = run.items.into_iter().unzip();
            let op = DiskOp::Write { file: FileId::Data, offset, from: slices.into() };
            self.ctx.submit(OpKind::PageWrite(versions), op);
        }
    }

    /// Writes the pages that compaction moves: clean, in memory, their leaf pinned.
    fn write_moves(&mut self) {
        let mut blocks = Vec::new();
        for idx in std::mem::take(&mut self.space.compaction.moves) {
            let page = &self.cache.table.pages[idx];
            let (key, lsn) = (page.key, page.lsn);
            assert!(
                page.versions > 0 && page.leaf.is_some(),
                "{key:?} is moved, of {} versions, and its leaf is pinned: {}",
                page.versions,
                page.leaf.is_some()
            );
            // Changed since: its new version leaves the old place anyway. Without space it stays.
            let moves = !page.absent && lsn == page.mapped_lsn && self.may_move(0);
            let from = page.entry.filter(|_| moves).map(|e| e.place());
            let to = from.and_then(|from| {
                let sealed = self.seal_page(idx);
                let place =
                    self.alloc_place(Stream::Moved, ItemKind::Page(key, lsn), sealed.blocks())?;
                Some((from, sealed, place))
            });
            let Some((from, sealed, place)) = to else {
                self.cache.table.pages[idx].versions -= 1;
                self.unpin_if_clean(idx);
                continue;
            };
            let (version, slice) = self.flush_page(idx, sealed, place, Some(from));
            blocks.push((place, (version, slice)));
            self.ctx.stats.pages_moved += 1;
        }
        self.write_versions(blocks);
    }

    /// Called when a write of pages has ended.
    pub(in crate::engine) fn pages_written(
        &mut self,
        versions: Vec<PageVersionIdx>,
        result: Result<(), Error>,
    ) {
        let (written, writes) = (versions.len(), self.writeback.page_writes);
        assert!(written <= writes, "writes of {written} pages end, of {writes} under way");
        self.writeback.page_writes -= written;
        self.ctx.need(Work::WriteBack);
        match result {
            Ok(()) => self.versions_written(versions),
            Err(error) => self.ctx.fail(error),
        }
    }
}
