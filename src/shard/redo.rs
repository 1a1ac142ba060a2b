//! Redo: recovery brings the changes of the log, in LSN order; they take the same way as new ones, without the log.
//!
//! Invariants
//! 1. One batch at a time, in order; so changes of a page are applied in LSN order.
//! 2. A change at or below the page's version is skipped: the root reflects it already.
//! 3. Nothing is served meanwhile, and nothing that is durable is overwritten: a crash here only means to begin anew.

use super::Shard;
use super::requests::PendingKind;
use crate::error::Error;
use crate::format::extent::ItemKind;
use crate::format::node::Entry;
use crate::types::{Lsn, PageKey};
use bytes::Bytes;

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
    Patch {
        offset: u32,
        bytes: Bytes,
    },
    Free,
}

impl Shard {
    /// Changes that a batch may have: their pages are in memory together.
    pub(crate) fn redo_batch_max(&self) -> usize {
        (self.limits.memory_blocks / 16).clamp(8, 1024) as usize
    }

    /// Begins to redo a batch; pump the shard until [`redo_done`](Self::redo_done).
    pub(crate) fn redo(&mut self, changes: Vec<RedoChange>) {
        let pages = changes.iter().map(|c| self.table.get(c.key)).collect();
        let data: Vec<bool> = changes.iter().map(|c| matches!(c.kind, RedoKind::Patch { .. })).collect();
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
            let idx = self.table.get(change.key);
            let page = &self.table.pages[idx];
            let needs_data = matches!(change.kind, RedoKind::Patch { .. }) && page.lsn < change.lsn;
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
            RedoKind::Patch { offset, bytes } => self.set_content(idx, offset as usize, &bytes),
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
