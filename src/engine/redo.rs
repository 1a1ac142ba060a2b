//! Redo: while the store is opened, each shard reads the groups of the old logs that concern its
//! pages, and does their changes again. They take the same path as new changes, except for the log.
//!
//! ```text
//! next group --read--> whole commits --a batch at a time: pages loaded, admitted, changed--> next
//!                                                                           ... --> Redone
//! ```
//! Invariants
//! 1. All records of a page stand in one log, in LSN order: an epoch has one deal. So the logs need
//!    no merging here; the recovered LSN, which needed all of them, is already known. All that a
//!    commit did to a page is one change: a second one with the same LSN would be skipped by rule
//!    2.
//! 2. A change at or below the page's version is skipped: the root reflects it already.
//! 3. If memory or space runs short meanwhile, a checkpoint may come in between. It belongs to the
//!    old epoch and keeps the old redo LSN: a recovery after a crash starts over, and skips what is
//!    there by rule 2.
//! 4. What is loaded and pinned at a time is a part of the memory, whatever the store that wrote
//!    the log had: a commit of any size is redone in parts, which rule 2 allows. On the heap are
//!    one group as it was written (1 MiB, or one commit of the largest size: 66 MiB with
//!    `txn_bytes_max` at its most) and what is decoded of it.
//! 5. No request is served meanwhile, and nothing durable is overwritten: after a crash here the
//!    recovery just starts over.

use super::cache::table::Needs;
use super::log::StoredGroup;
use super::message::Message;
use super::requests::PendingKind;
use super::{Lack, OpKind, Shard, Step};
use crate::base::error::Error;
use crate::base::{BLOCK, Lsn, PageIdx, PageKey, ShardId};
use crate::format::extent::ItemKind;
use crate::format::group::{GroupHead, ImageState, LoggedChange};
use crate::format::node::Entry;
use crate::io::{Completion, DiskOp, FileId};
use bytes::Bytes;
use hashbrown::HashMap;
use smallvec::SmallVec;
use std::collections::VecDeque;

/// The most reads of a group in flight, and the part of the memory that each may take.
const LOADS_MAX: u32 = 4;
const LOAD_MEMORY_SHARE: usize = 32;

/// One change to redo.
pub(super) struct RedoChange {
    pub lsn: Lsn,
    pub key: PageKey,
    pub kind: RedoKind,
}

/// What the log says about the page.
pub(super) enum RedoKind {
    /// The page has these bytes.
    Image(Bytes),
    /// The page has already been written to its place.
    Placed(Entry),
    Patches {
        /// Whether the page was freed first: then the patches apply to zeros.
        over_zeros: bool,
        /// Offset and bytes, in order.
        patches: SmallVec<[(u32, Bytes); 1]>,
    },
    Free,
}

impl RedoKind {
    /// Whether the page's older content must be in memory.
    fn needs_data(&self) -> bool {
        matches!(self, RedoKind::Patches { over_zeros: false, .. })
    }

    /// What this change and then `next`, of the same commit, do to a page. `None`: no commit logs
    /// that.
    fn then(self, next: RedoKind) -> Option<RedoKind> {
        match (self, next) {
            (
                RedoKind::Patches { over_zeros, mut patches },
                RedoKind::Patches { over_zeros: false, patches: more },
            ) => {
                patches.extend(more);
                Some(RedoKind::Patches { over_zeros, patches })
            }
            (RedoKind::Free, RedoKind::Patches { patches, .. }) => {
                Some(RedoKind::Patches { over_zeros: true, patches })
            }
            (_, RedoKind::Patches { .. }) => None,
            (_, whole) => Some(whole),
        }
    }
}

/// The redo of the log after a crash.
pub(super) struct Redo {
    /// The state of the redo, until the log is redone.
    pub recovering: Option<Recovering>,
    pub redone: bool,
    /// The changes of the batch in progress, last first: their request is pending.
    batch: Vec<RedoChange>,
    /// The commit up to which the store was recovered.
    pub recovered_lsn: Lsn,
}

impl Redo {
    pub(super) fn new(recovering: Option<Recovering>, recovered_lsn: Lsn) -> Self {
        Redo { recovering, redone: false, batch: Vec::new(), recovered_lsn }
    }
}

/// The groups to redo, and how far the redo has come.
pub(crate) struct Recovering {
    /// The LSN up to which the roots reflect everything.
    pub redo: Lsn,
    /// The LSN of the state to restore; everything up to it is durable.
    pub recovered_lsn: Lsn,
    /// Groups that concern the shard, each log in its order.
    pub groups: VecDeque<GroupHead>,
    load: Option<Load>,
    commits: VecDeque<Redone>,
}

impl Recovering {
    pub(crate) fn new(redo: Lsn, recovered_lsn: Lsn, groups: VecDeque<GroupHead>) -> Self {
        Recovering { redo, recovered_lsn, groups, load: None, commits: VecDeque::new() }
    }
}

/// A group that is being read.
struct Load {
    head: GroupHead,
    bytes: Vec<u8>,
    asked: usize,
    under_way: u32,
}

/// The changes of one commit that concern the shard.
type Redone = Vec<RedoChange>;

impl Shard {
    /// Takes the next step, if nothing is in progress for the last one.
    pub(super) fn advance_redo(&mut self) {
        if self.redo.redone || self.ctx.failed.is_some() || !self.requests.pending.is_empty() {
            return;
        }
        let Some(recovering) = &mut self.redo.recovering else { return self.all_redone() };
        if !recovering.commits.is_empty() {
            self.redo_batch();
        } else if recovering.load.is_some() {
            self.load_group();
        } else if let Some(head) = recovering.groups.pop_front() {
            let bytes = vec![0; head.blocks as usize * BLOCK];
            recovering.load = Some(Load { head, bytes, asked: 0, under_way: 0 });
            self.load_group();
        } else {
            self.all_redone();
        }
    }

    fn all_redone(&mut self) {
        self.redo.redone = true;
        self.ctx.send(ShardId::LEADER, Message::Redone);
    }

    /// Submits the reads that are still missing, as memory allows.
    fn load_group(&mut self) {
        let memory = self.ctx.limits.memory_blocks as usize;
        let blocks_max = self.ctx.limits.vectored_pages_max.min(memory / LOAD_MEMORY_SHARE);
        while let Some(load) = self.redo.recovering.as_mut().and_then(|r| r.load.as_mut()) {
            let blocks = (load.head.blocks as usize - load.asked).min(blocks_max);
            if blocks == 0 || load.under_way >= LOADS_MAX {
                return;
            }
            let (at, first) = (load.asked, load.head.block as usize);
            let file = FileId::Log(load.head.shard, load.head.segment);
            if !self.ensure_frames(blocks as u32, Step::RedoRead) {
                return;
            }
            if let Some(load) = self.redo.recovering.as_mut().and_then(|r| r.load.as_mut()) {
                load.asked += blocks;
                load.under_way += 1;
            }
            let into = (0..blocks)
                .map(|_| self.ctx.arena.alloc(0).expect("frames were ensured"))
                .collect();
            self.ctx.submit(
                OpKind::RedoRead(at),
                DiskOp::Read { file, offset: ((first + at) * BLOCK) as u64, into },
            );
        }
    }

    /// Takes blocks of a group that have arrived, from block `at` of the group on.
    pub(super) fn redo_read(&mut self, at: usize, completion: Completion) {
        self.ctx.need_all();
        let DiskOp::Read { into, .. } = completion.op else {
            unreachable!("a read completes as a read")
        };
        if let Err(error) = completion.result {
            return self.ctx.fail(error);
        }
        let Some(load) = self.redo.recovering.as_mut().and_then(|r| r.load.as_mut()) else {
            return;
        };
        let end = (at + into.len()) * BLOCK;
        assert!(
            load.under_way > 0 && end <= load.bytes.len(),
            "blocks up to byte {end} of a group of {}, by {} reads",
            load.bytes.len(),
            load.under_way
        );
        for (block, frame) in load.bytes[at * BLOCK..].chunks_mut(BLOCK).zip(&into) {
            block.copy_from_slice(frame);
        }
        load.under_way -= 1;
        if load.under_way == 0 && load.asked == load.head.blocks as usize {
            self.group_loaded();
        }
    }

    fn group_loaded(&mut self) {
        let Some(recovering) = &mut self.redo.recovering else { return };
        let Some(Load { head, bytes, .. }) = recovering.load.take() else { return };
        let (redo, recovered_lsn, shard_map, id) =
            (recovering.redo, recovering.recovered_lsn, self.ctx.shard_map, self.ctx.id);
        let commits = decode(
            &head,
            &Bytes::from(bytes),
            |lsn| lsn > redo && (lsn <= recovered_lsn || planted!(CutIgnored)),
            |key| shard_map.shard_of(key) == id,
        );
        match commits {
            Some(commits) => recovering.commits.extend(commits),
            None => {
                let file = FileId::Log(head.shard, head.segment);
                let context = format_args!(
                    "{file}: the group at block {} changed while it was read",
                    head.block
                );
                self.ctx.fail(Error::corrupt(context));
            }
        }
    }

    /// Begins to redo as many changes as fit into memory: only a part of a large commit.
    fn redo_batch(&mut self) {
        let most = (self.ctx.limits.memory_blocks / 32).clamp(4, 1024) as usize;
        let Some(recovering) = &mut self.redo.recovering else { return };
        let mut changes: Vec<RedoChange> = Vec::new();
        while let Some(next) = recovering.commits.front_mut()
            && changes.len() < most
        {
            let whole = planted!(RedoneAllAtOnce) && changes.is_empty();
            let some = if whole { next.len() } else { next.len().min(most - changes.len()) };
            changes.extend(next.drain(..some));
            if next.is_empty() {
                recovering.commits.pop_front();
            }
        }
        assert!(!changes.is_empty(), "a commit is redone in which nothing is left to be done");
        let pages = changes.iter().map(|c| self.cache.table.entry(c.key)).collect();
        let data: Vec<bool> = changes.iter().map(|c| c.kind.needs_data()).collect();
        changes.reverse();
        assert!(self.redo.batch.is_empty(), "one batch is redone at a time");
        self.redo.batch = changes;
        self.begin(None, PendingKind::Redo, pages, |i| data[i]);
    }

    /// Continues the batch, as far as there is room and what it needs is in memory.
    pub(super) fn run_redo(&mut self) {
        let Some(waiter) = self.requests.ready_redo() else { return };
        if let Some(error) =
            self.requests.pending[waiter].error.take().or_else(|| self.ctx.failed.clone())
        {
            self.requests.take_ready_redo();
            self.release(waiter);
            self.ctx.fail(error);
            return;
        }
        let frames = self.redo.batch.len() as u32;
        if !self.admit_redo(waiter, frames) {
            return;
        }
        loop {
            let Some(change) = self.redo.batch.pop() else { break };
            let idx = self.cache.table.entry(change.key);
            let page = &self.cache.table.pages[idx];
            let needs_data = change.kind.needs_data() && page.lsn < change.lsn;
            let is_placed = matches!(change.kind, RedoKind::Placed(_)) && page.lsn < change.lsn;
            if is_placed && page.leaf.is_some_and(|leaf| self.map.is_being_written(leaf)) {
                // A checkpoint writes the leaf: its completion brings a turn.
                self.redo.batch.push(change);
                self.ctx.blocked.register(Step::Redo, Lack::WriteBack);
                return;
            }
            if needs_data && !page.absent && page.frame.is_none() {
                self.redo.batch.push(change);
                self.requests.take_ready_redo();
                self.requests.need_more(waiter);
                if self.want(idx, Needs::Bytes, waiter) {
                    self.requests.need_met(waiter, None, &mut self.ctx);
                }
                return;
            }
            self.redo_change(idx, change);
        }
        self.requests.take_ready_redo();
        self.release(waiter);
        self.ctx.need_all();
    }

    fn redo_change(&mut self, idx: PageIdx, change: RedoChange) {
        let page = &mut self.cache.table.pages[idx];
        assert!(
            page.resolved && page.key == change.key,
            "a change of {:?} is redone at {:?}, resolved: {}",
            change.key,
            page.key,
            page.resolved
        );
        if page.lsn >= change.lsn {
            return;
        }
        match change.kind {
            RedoKind::Image(bytes) => self.set_content(idx, 0, &bytes),
            RedoKind::Patches { over_zeros, patches } => {
                if over_zeros {
                    self.set_absent(idx, true);
                    self.cache.table.set_frame(idx, None);
                }
                for (offset, bytes) in patches {
                    self.set_content(idx, offset as usize, &bytes);
                }
            }
            RedoKind::Free if page.absent || planted!(FreeNotRedone) => return,
            RedoKind::Free => {
                self.set_absent(idx, true);
                self.cache.table.set_frame(idx, None);
            }
            RedoKind::Placed(entry) => return self.redo_placed(idx, change.lsn, entry),
        }
        self.changed(idx, change.lsn);
    }

    fn redo_placed(&mut self, idx: PageIdx, lsn: Lsn, entry: Entry) {
        self.cache.table.set_frame(idx, None);
        self.set_absent(idx, false);
        let page = &mut self.cache.table.pages[idx];
        let (key, place) = (page.key, entry.place());
        assert!(entry.lsn() == lsn, "{key:?} was placed at {:?}, by {lsn:?}", entry.lsn());
        page.lsn = lsn;
        page.mapped_lsn = lsn;
        page.entry = Some(entry);
        if page.dirty_from.take().is_some() {
            self.reservations.dirty_blocks -= 1;
            self.writeback.note_clean(&mut self.ctx);
        }
        let leaf = page.leaf.expect("admission pinned the leaf");
        let (vshard, _) = self.map.position(key);
        self.space.extents.register_from_log(vshard, place, ItemKind::Page(key, lsn));
        if let Some(old) = self.map.set(leaf, key, Some(entry)) {
            self.space.extents.free_later(vshard, old.place());
        }
        // A checkpoint in the middle of the redo may wait for an older version, which will not be
        // written now.
        if self.cache.table.pages[idx].checkpoint_target == Lsn::ZERO || !planted!(RedoneUnsettled)
        {
            self.page_published(idx);
        }
        self.wake_waiters(idx);
    }
}

/// The commits of a group to redo, with those of their changes that concern the shard.
fn decode(
    head: &GroupHead,
    bytes: &Bytes,
    wanted: impl Fn(Lsn) -> bool,
    mine: impl Fn(PageKey) -> bool,
) -> Option<Vec<Redone>> {
    let group = StoredGroup::open(head, bytes).ok()?;
    group.placed().ok()?;
    let mut commits = Vec::new();
    for record in group.records.into_iter().filter(|record| wanted(record.lsn)) {
        let mut changes = Changes::default();
        for change in record.changes {
            let (key, lsn, kind) = match change {
                LoggedChange::Patch(key, offset, patch) => {
                    let patches = smallvec::smallvec![(offset, bytes.slice_ref(patch))];
                    (key, record.lsn, RedoKind::Patches { over_zeros: false, patches })
                }
                LoggedChange::Free(key) => (key, record.lsn, RedoKind::Free),
                LoggedChange::Image(_, image) => {
                    let image = group.images.get(image as usize)?;
                    let kind = match image.state {
                        // Freed again within the same span: the Free follows.
                        ImageState::NotWritten => continue,
                        ImageState::Placed => RedoKind::Placed(image.entry),
                        ImageState::Inline(block) => {
                            let at = block as usize * BLOCK;
                            RedoKind::Image(bytes.slice(at..at + BLOCK))
                        }
                    };
                    (image.key, image.entry.lsn(), kind)
                }
            };
            if mine(key) {
                changes.add(RedoChange { lsn, key, kind })?;
            }
        }
        let changes: Redone = changes.changes.into_iter().flatten().collect();
        if !changes.is_empty() {
            commits.push(changes);
        }
    }
    Some(commits)
}

/// What a commit did to its pages: each page gets one version from each commit.
#[derive(Default)]
struct Changes {
    /// In the order of each page's last change; `None`: merged into a later one.
    changes: Vec<Option<RedoChange>>,
    last: HashMap<PageKey, usize, foldhash::fast::FixedState>,
}

impl Changes {
    /// Adds a change to what the commit did to the same page before, if anything.
    fn add(&mut self, change: RedoChange) -> Option<()> {
        let earlier =
            self.last.insert(change.key, self.changes.len()).and_then(|at| self.changes[at].take());
        let kind = match earlier {
            Some(earlier) => earlier.kind.then(change.kind)?,
            None => change.kind,
        };
        self.changes.push(Some(RedoChange { kind, ..change }));
        Some(())
    }
}
