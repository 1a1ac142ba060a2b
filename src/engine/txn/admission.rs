//! Admission: makes sure that everything that a commit, or a part of one, needs is there before its
//! LSN is allocated.
//!
//! Invariants
//! 1. Only the device can make an admitted commit fail: log room, buffers, frames, data space and
//!    map leaves are there.
//! 2. If something is short for now, the commit waits, and room is made; if it is short for good,
//!    the commit gets `Full`, and nothing was done.
//! 3. Commits leave alone what parts of commits over shards have reserved.

use crate::base::error::{Error, ErrorKind};
use crate::base::{BLOCK, Lsn, PageIdx, PageKey, RequestIdx};
use crate::engine::Work;
use crate::engine::map::Lookup;
use crate::engine::order::LSN_AHEAD_MAX;
use crate::engine::reservations::Reserved;
use crate::engine::reservations::{Need, dirty_nodes_fill_memory};
use crate::engine::{Change, Lack, NodeWaiter, Shard, Step};
use crate::format::extent::NodeKey;
use crate::format::group::{HEAD_BYTES, RawImage};
use crate::format::node::Child;
use smallvec::SmallVec;

/// Frames left alone by commits, for reads, map nodes and checkpoints.
const FRAMES_RESERVE: u32 = 16;

/// The part of the memory that a commit may need. Others in progress hold a quarter, and readers
/// get `Busy` before they hold the rest.
const COMMIT_SHARE: u32 = 2;
/// How often a commit gives back the leaves that it has pinned when another of its leaves has left
/// memory.
const YIELDS_MAX: u8 = 3;

/// How long space is made for a part that found none.
const SPACE_WANTED_US: crate::base::Micros = 100_000;

/// Whether a commit may proceed.
pub(in crate::engine) enum Admission {
    Yes,
    /// It waits for memory, log room or space, which will come.
    Stalled,
    /// It waits for a map node.
    Waiting,
    No(Error),
}

/// What was admitted before a commit, and is not applied yet.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(in crate::engine) enum Ahead {
    Nothing,
    Others,
}

impl Shard {
    pub(in crate::engine) fn admit(
        &mut self,
        waiter: RequestIdx,
        need: Need,
        ahead: Ahead,
    ) -> Admission {
        let body = self.log.open.body_blocks_with(need.record_bytes, need.images);
        let group_is_new = self.log.open.is_empty() && ahead == Ahead::Nothing;
        let too_long = body > self.ctx.limits.group_blocks && !group_is_new;
        let blocks = body + self.inline_blocks(self.log.open.images.len() + need.images);
        if self.lsns_are_far_ahead(Step::Commit) || self.log.open.runs_full() || too_long {
            self.ctx.press(&mut self.log.open);
            self.ctx.blocked.register(Step::Commit, Lack::LogRoom);
            return Admission::Stalled;
        }
        if !self.log_fits(blocks, body, None) {
            self.ctx.blocked.register(Step::Commit, Lack::LogRoom);
            return Admission::Stalled;
        }
        if !self.dirty_fits(need.changes, ahead) {
            self.ctx.blocked.register(Step::Commit, Lack::WriteBack);
            return Admission::Stalled;
        }
        match self.admit_space(&need) {
            Ok(true) => {}
            Ok(false) => {
                self.ctx.blocked.register(Step::Commit, Lack::Space);
                return Admission::Stalled;
            }
            Err(error) => return Admission::No(error),
        }
        self.admit_memory(waiter, need.frames, Step::Commit)
    }

    /// Whether a part of a commit over shards may be voted for: what it needs must be there
    /// whenever the decision comes, in this group or a later one.
    pub(in crate::engine) fn admit_part(&mut self, waiter: RequestIdx, need: &Need) -> Admission {
        let (body, images) = match self.log.open.is_empty() {
            true => (0, 0),
            false => (self.log.open.body_blocks_with(0, 0), self.log.open.images.len()),
        };
        let more = self.reservation(need);
        if !self.log_fits(body + self.inline_blocks(images), body, Some(more)) {
            return Admission::Stalled;
        }
        let ahead = match self.reservations.parts.count {
            0 => Ahead::Nothing,
            _ => Ahead::Others,
        };
        if !self.dirty_fits(need.changes, ahead) {
            return Admission::Stalled;
        }
        match self.admit_space(need) {
            Ok(true) => {}
            Ok(false) => {
                self.space.wanted_until = self.ctx.now + SPACE_WANTED_US;
                self.ctx.room_changed();
                return Admission::Stalled;
            }
            Err(error) => return Admission::No(error),
        }
        self.admit_memory(waiter, need.frames, Step::Vote)
    }

    /// The reservation of a part until it is decided.
    pub(in crate::engine) fn reservation(&self, need: &Need) -> Reserved {
        let body = (HEAD_BYTES + need.record_bytes + need.images * size_of::<RawImage>())
            .div_ceil(BLOCK) as u32;
        Reserved {
            count: 1,
            log_blocks: body + self.inline_blocks(need.images),
            frames: need.frames,
            changes: need.changes,
            space_blocks: need.blocks(),
        }
    }

    /// The most blocks of inline pages in a group with `images` images. They are no more than its
    /// pages: `inline_pages_max` alone may be more than a small segment holds.
    fn inline_blocks(&self, images: usize) -> u32 {
        self.ctx.limits.inline_pages_max.min(images) as u32
    }

    /// Whether so much is allocated above the watermark that `step` has to wait for it.
    pub(in crate::engine) fn lsns_are_far_ahead(&mut self, step: Step) -> bool {
        let lowest = Lsn::new(self.ctx.order.next().get().saturating_sub(LSN_AHEAD_MAX / 2));
        if self.ctx.order.watermark() >= lowest {
            return false;
        }
        // Nudges the shards that hold it back.
        self.watermark.want(lowest);
        self.ctx.blocked.wait_for_watermark(step, lowest);
        true
    }

    /// Whether the log has room and buffers for an open group of `blocks` (of which `body` are not
    /// inline pages) and everything that is reserved, including `more`; if not, room is made. If
    /// the sum fits into the rest of the segment, or into a free one, there is room however it is
    /// divided into groups.
    fn log_fits(&mut self, blocks: u32, body: u32, more: Option<Reserved>) -> bool {
        let reserved = self.reservations.parts.plus(more.unwrap_or_default());
        // Each group that closes may leave the end of a buffer unused.
        let closes = reserved.count.min(self.ctx.limits.log_writes_max);
        if self.log.has_room(blocks + reserved.log_blocks)
            && self.log.open.stock_suffices(body + reserved.log_blocks, closes)
        {
            return true;
        }
        self.ctx.press(&mut self.log.open);
        if self.log.free_segments() == 0 {
            self.ctx.need_checkpoint();
        }
        false
    }

    /// Whether memory can hold everything that would then be dirty: pages in a quarter of it,
    /// including freed ones on their way into the map, and map nodes in their part of it. A commit
    /// may go alone if it must. If memory can't, what is dirty is written.
    fn dirty_fits(&mut self, changes: u64, ahead: Ahead) -> bool {
        let memory = u64::from(self.ctx.limits.memory_blocks);
        let dirty = self.dirty_pages();
        let alone = ahead == Ahead::Nothing && dirty == 0;
        let pages_fit = alone || dirty + self.reservations.parts.changes + changes <= memory / 4;
        let nodes_fit = !dirty_nodes_fill_memory(&self.map, &self.ctx.limits);
        if !pages_fit || !nodes_fit {
            self.start_reclaim();
        }
        pages_fit && nodes_fit
    }

    /// Makes room in memory: dirty pages are written to their places, and dirty nodes too if there
    /// are many.
    fn start_reclaim(&mut self) {
        self.ctx.press(&mut self.log.open);
        self.writeback.hurry(&mut self.ctx);
        if self.map.dirty_count() as u32 > self.ctx.limits.memory_blocks / 32 {
            self.ctx.need_checkpoint();
        }
    }

    /// Makes sure of frames for the new versions, and that the map leaves are in memory and pinned.
    fn admit_memory(&mut self, waiter: RequestIdx, frames: u32, step: Step) -> Admission {
        let changed = self.pages_to_pin(waiter);
        let pinned = self.pin_leaves_in_memory(&changed);
        // This comes before the search for frames, which might take the nodes above a leaf that is
        // still to be read.
        let keeps = self.keeps_leaves(waiter, step);
        for idx in changed.iter().copied() {
            if self.cache.table.pages[idx].leaf.is_some() {
                continue;
            }
            match self.map.lookup(self.cache.table.pages[idx].key) {
                Lookup::Load(key, child) => {
                    return self.wait_for_leaf(waiter, &changed, step, (key, child));
                }
                Lookup::Found(_) if keeps && !self.keep_leaf(idx, step) => {
                    self.start_reclaim();
                    return Admission::Stalled;
                }
                Lookup::Found(_) => {}
            }
        }
        let missing = |idx: &PageIdx| self.map.missing_nodes(self.cache.table.pages[*idx].key);
        let nodes: u32 = changed.iter().map(missing).sum();
        if !self.ensure_frames(frames + nodes + FRAMES_RESERVE, step) {
            let (all, missing) =
                self.map.nodes_for(changed.iter().map(|idx| self.cache.table.pages[*idx].key));
            if let Some(error) = self.too_large(waiter, all) {
                return Admission::No(error);
            }
            // Pages may share nodes.
            if missing == nodes || !self.ensure_frames(frames + missing + FRAMES_RESERVE, step) {
                // A commit that has lost its leaves often keeps them until it has memory, or is
                // refused.
                if step != Step::Commit || self.requests.pending[waiter].yields < YIELDS_MAX {
                    self.unpin_leaves(&pinned);
                }
                self.start_reclaim();
                return Admission::Stalled;
            }
        }
        for idx in changed.iter().copied() {
            let page = &self.cache.table.pages[idx];
            if page.leaf.is_some() {
                continue;
            }
            let key = page.key;
            match self.map.lookup(key) {
                Lookup::Found(_) => {
                    if !self.nodes_are_counted(key, frames) {
                        self.unpin_leaves(&changed);
                        self.ctx.need(Work::Commits);
                        self.ctx.need(Work::Parts);
                        return Admission::Stalled;
                    }
                    let leaf = self.map.pin(key, &mut self.ctx.arena);
                    self.ctx.room_changed();
                    self.cache.table.pages[idx].leaf = Some(leaf);
                }
                Lookup::Load(node, child) => {
                    return self.wait_for_leaf(waiter, &changed, step, (node, child));
                }
            }
        }
        Admission::Yes
    }

    /// Whether there are frames for the nodes that `key` lacks, and for `frames` pages. The search
    /// for frames may have taken nodes that an earlier commit made in vain: no device has them, and
    /// they were counted as present. The next try counts them as missing.
    fn nodes_are_counted(&mut self, key: PageKey, frames: u32) -> bool {
        let kept = self.reservations.parts.frames + self.reservations.checkpoint_frames;
        self.ctx.arena.free_blocks() >= frames + self.map.missing_nodes(key) + kept
    }

    /// Whether this commit keeps the leaves that it has while it waits for others, because it has
    /// lost them often enough.
    fn keeps_leaves(&self, waiter: RequestIdx, step: Step) -> bool {
        step == Step::Redo
            || (step == Step::Commit && self.requests.pending[waiter].yields >= YIELDS_MAX)
    }

    /// Makes and pins the leaf of a page that has none yet; returns false if there are no frames
    /// for it. Otherwise a commit that reads the paths of several pages would lose one, of which
    /// nothing can be pinned, for the next, and so on without end.
    fn keep_leaf(&mut self, idx: PageIdx, step: Step) -> bool {
        let key = self.cache.table.pages[idx].key;
        // Another page of the commit may have made it.
        if let Some(leaf) = self.map.pin_if_resident(key) {
            self.cache.table.pages[idx].leaf = Some(leaf);
            return true;
        }
        let deepest = self.map.pin_deepest(key);
        let found = self.ensure_frames(self.map.missing_nodes(key) + FRAMES_RESERVE, step);
        if found {
            let leaf = self.map.pin(key, &mut self.ctx.arena);
            self.ctx.room_changed();
            self.cache.table.pages[idx].leaf = Some(leaf);
        }
        deepest.into_iter().for_each(|node| self.map.unpin(node));
        found
    }

    /// Pins the leaves that are already there, and returns their pages. Otherwise the search for
    /// frames would take the very leaf that has just been read for this commit, which would wait
    /// for it again, and so on without end.
    fn pin_leaves_in_memory(&mut self, changed: &[PageIdx]) -> SmallVec<[PageIdx; 4]> {
        let mut pinned = SmallVec::new();
        for idx in changed.iter().copied() {
            let page = &mut self.cache.table.pages[idx];
            if page.leaf.is_none() {
                page.leaf = self.map.pin_if_resident(page.key);
                pinned.extend(page.leaf.is_some().then_some(idx));
            }
        }
        pinned
    }

    fn unpin_leaves(&mut self, pages: &[PageIdx]) {
        for idx in pages {
            if let Some(leaf) = self.cache.table.pages[*idx].leaf.take() {
                self.map.unpin(leaf);
                self.ctx.room_changed();
            }
        }
    }

    /// Changed pages whose leaf must be pinned. Freeing an absent page changes nothing, unless an
    /// earlier commit of the turn writes it: then its leaf is pinned.
    fn pages_to_pin(&self, waiter: RequestIdx) -> SmallVec<[PageIdx; 4]> {
        let mut changed = self.changed_pages(waiter);
        if let Some(commit) = self.requests.pending[waiter].commit() {
            let mut changes = commit.changes.iter();
            changed.retain(|idx| {
                let frees = matches!(changes.next(), Some((_, Change::Free)));
                !(frees && self.cache.table.pages[*idx].absent)
            });
        }
        changed.retain(|idx| self.cache.table.pages[*idx].leaf.is_none());
        changed
    }

    /// Called when a node above the leaf of one of `changed` has left memory. Gives back the leaves
    /// that are there and pinned, unless this commit has lost others so often that it now goes
    /// first.
    fn wait_for_leaf(
        &mut self,
        waiter: RequestIdx,
        changed: &[PageIdx],
        step: Step,
        (node, child): (NodeKey, Child),
    ) -> Admission {
        let (all, _) =
            self.map.nodes_for(changed.iter().map(|idx| self.cache.table.pages[*idx].key));
        if let Some(error) = self.too_large(waiter, all) {
            return Admission::No(error);
        }
        let stays = self.keeps_leaves(waiter, step);
        if !stays {
            self.unpin_leaves(changed);
            if step == Step::Vote && self.requests.pending[waiter].yields >= YIELDS_MAX {
                return Admission::Stalled;
            }
        }
        let pending = &mut self.requests.pending[waiter];
        pending.yields = pending.yields.saturating_add(1);
        pending.stays = stays && step == Step::Commit;
        self.requests.need_more(waiter);
        self.want_node(node, child, NodeWaiter::Request(waiter));
        Admission::Waiting
    }

    /// The error for a commit with this many map nodes, if it can never be carried out: its pages
    /// and nodes must be in memory at once, whatever else is in progress.
    fn too_large(&self, waiter: RequestIdx, nodes: u32) -> Option<Error> {
        let commit = self.requests.pending[waiter].commit()?;
        let pages =
            commit.changes.iter().filter(|(_, change)| !matches!(change, Change::Free)).count()
                as u32;
        let most = (self.reservations.usable_frames() - self.reservations.checkpoint_frames)
            / COMMIT_SHARE;
        if pages + nodes <= most || planted!(TooLargeAdmitted) {
            return None;
        }
        Some(Error::new(
            ErrorKind::TooLarge,
            format_args!(
                "a commit of {} changes needs {nodes} map nodes and {pages} new pages of shard {} \
                 in memory at once, together at most {most}: split it, or open with more \
                 memory_bytes",
                commit.changes.len(),
                self.ctx.id.get()
            ),
        ))
    }

    /// Makes room in memory for a redo of `frames` pages, as for a commit.
    pub(in crate::engine) fn admit_redo(&mut self, waiter: RequestIdx, frames: u32) -> bool {
        if !self.dirty_fits(u64::from(frames), Ahead::Others) {
            self.ctx.blocked.register(Step::Redo, Lack::WriteBack);
            return false;
        }
        match self.admit_memory(waiter, frames, Step::Redo) {
            Admission::Yes => true,
            Admission::Waiting => {
                self.requests.take_ready_redo();
                false
            }
            _ => false,
        }
    }
}
