//! Redo: recovery brings the changes of the log, in LSN order; they take the same way as new ones, without the log.
//!
//! Invariants
//! 1. One batch at a time, in order; so changes of a page are applied in LSN order. All that a commit did to a page is
//!    one change: a second one with the same LSN would be skipped by rule 2.
//! 2. A change at or below the page's version is skipped: the root reflects it already.
//! 3. If memory or space run short meanwhile, a checkpoint may come in between: it belongs to the old epoch, and its
//!    redo LSN is that of the last batch that is done, so that a recovery after a crash goes on from there.
//! 4. Nothing is served meanwhile, and nothing that is durable is overwritten: a crash here only means to begin anew.

use super::Shard;
use super::requests::PendingKind;
use crate::error::Error;
use crate::format::extent::ItemKind;
use crate::format::node::Entry;
use crate::types::{Lsn, PageKey};
use bytes::Bytes;
use smallvec::SmallVec;

/// One change to be redone.
pub(crate) struct RedoChange {
    pub lsn: Lsn,
    pub key: PageKey,
    pub kind: RedoKind,
}

/// What the log says of the page.
pub(crate) enum RedoKind {
    /// These bytes.
    Image(Bytes),
    /// It has been written to its place already.
    Placed(Entry),
    Patches {
        /// The page was freed first: the patches go over zeros.
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

    /// What this and then `next`, of the same commit, do to a page. `None`: no commit logs that.
    pub(crate) fn then(self, next: RedoKind) -> Option<RedoKind> {
        match (self, next) {
            (RedoKind::Patches { over_zeros, mut patches }, RedoKind::Patches { over_zeros: false, patches: more }) => {
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

/// How far redo has come.
#[derive(Clone, Copy)]
pub(super) struct Redoing {
    /// Every record up to here is redone.
    pub done: Lsn,
    /// The state to be restored; everything up to here is durable.
    pub cut: Lsn,
    /// Some changes of a batch are applied, others not: no moment for a checkpoint.
    pub mid_batch: bool,
    /// The last commit of the batch under way.
    batch: Lsn,
}

impl Shard {
    /// The roots reflect everything up to `redo`; the log is to be redone up to `cut`.
    pub(crate) fn begin_redo(&mut self, redo: Lsn, cut: Lsn) {
        self.redoing = Some(Redoing { done: redo, cut, mid_batch: false, batch: redo });
    }

    /// All of the log is redone: what recovery kept apart is an extent like any other.
    pub(crate) fn end_redo(&mut self) {
        self.redoing = None;
        self.extents.end_adoption();
    }

    /// Changes that a batch may have: their pages are in memory together.
    pub(crate) fn redo_batch_max(&self) -> usize {
        (self.limits.memory_blocks / 32).clamp(4, 1024) as usize
    }

    /// Begins to redo a batch of whole commits, the last of them `lsn`; pump the shard until [`redo_done`](Self::redo_done).
    pub(crate) fn redo(&mut self, lsn: Lsn, changes: Vec<RedoChange>) {
        if let Some(redoing) = &mut self.redoing {
            redoing.batch = lsn;
        }
        let pages = changes.iter().map(|c| self.table.get(c.key)).collect();
        let data: Vec<bool> = changes.iter().map(|c| c.kind.needs_data()).collect();
        let mut changes = changes;
        changes.reverse();
        self.begin(None, PendingKind::Redo(changes), pages, |i| data[i]);
    }

    /// Whether the last batch is done; an error if it can't be.
    pub(crate) fn redo_done(&mut self) -> Result<bool, Error> {
        if let Some(error) = self.redo_error.take().or_else(|| self.failed.clone()) {
            return Err(error);
        }
        Ok(self.pending.is_empty())
    }

    /// Goes on with the batch at the front of the queue. False: it has to wait there.
    pub(super) fn run_redo(&mut self, waiter: usize) -> bool {
        if let Some(error) = self.pending[waiter].error.take() {
            self.redo_error = Some(error);
            self.ready.pop_front();
            self.release(waiter);
            return true;
        }
        let PendingKind::Redo(changes) = &self.pending[waiter].kind else { unreachable!("only redo") };
        let frames = changes.len() as u32;
        if !self.admit_redo(waiter, frames) {
            return self.ready.front() != Some(&waiter);
        }
        loop {
            let PendingKind::Redo(changes) = &mut self.pending[waiter].kind else { unreachable!("only redo") };
            let Some(change) = changes.pop() else { break };
            if let Some(redoing) = &mut self.redoing {
                redoing.mid_batch = true;
            }
            let idx = self.table.get(change.key);
            let page = &self.table.pages[idx];
            let needs_data = change.kind.needs_data() && page.lsn < change.lsn;
            if needs_data && !page.absent && page.frame.is_none() {
                changes.push(change);
                self.ready.pop_front();
                self.need_more(waiter);
                if self.want(idx, true, waiter) {
                    self.need_met(waiter, None);
                }
                return true;
            }
            self.redo_change(idx, change);
        }
        if let Some(redoing) = &mut self.redoing {
            redoing.mid_batch = false;
            redoing.done = redoing.batch;
        }
        self.ready.pop_front();
        self.release(waiter);
        self.again = true;
        true
    }

    fn redo_change(&mut self, idx: usize, change: RedoChange) {
        let page = &mut self.table.pages[idx];
        if page.lsn >= change.lsn {
            return;
        }
        match change.kind {
            RedoKind::Image(bytes) => self.set_content(idx, 0, &bytes),
            RedoKind::Patches { over_zeros, patches } => {
                if over_zeros {
                    page.frame = None;
                    page.absent = true;
                }
                for (offset, bytes) in patches {
                    self.set_content(idx, offset as usize, &bytes);
                }
            }
            RedoKind::Free if page.absent => return,
            RedoKind::Free => {
                page.frame = None;
                page.absent = true;
            }
            RedoKind::Placed(entry) => return self.redo_placed(idx, change.lsn, entry),
        }
        self.changed(idx, change.lsn);
    }

    fn redo_placed(&mut self, idx: usize, lsn: Lsn, entry: Entry) {
        let page = &mut self.table.pages[idx];
        let (key, place) = (page.key, entry.place());
        page.frame = None;
        page.absent = false;
        page.lsn = lsn;
        page.mapped_lsn = lsn;
        page.entry = Some(entry);
        if page.dirty_from.take().is_some() {
            self.reserved_blocks -= 1;
        }
        let leaf = page.leaf.expect("admission pinned the leaf");
        let (vshard, _) = self.map.position(key);
        self.extents.adopt(place, ItemKind::Page(key, lsn));
        self.extents.name_page(vshard, place);
        if let Some(old) = self.map.set(leaf, key, Some(entry)) {
            self.extents.leave_page(vshard, old.place());
        }
        self.wake_waiters(idx);
    }
}
