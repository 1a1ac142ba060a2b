//! Compaction: the emptiest extent is read by its summary, and what the map still names in it moves elsewhere.
//!
//! Invariants
//! 1. An item moves only if the map names this very place; everything else in the extent is dead already.
//! 2. A moved page keeps its version; its old place is given back as any place that the map left.
//! 3. A map node moves by being marked dirty: the next checkpoint writes it elsewhere.
//! 4. It stops for a checkpoint when many nodes are dirty: they can't leave memory before.
//! 5. One extent at a time, few pages at a time: commits and reads go on.

use super::requests::PendingKind;
use super::{NodeWaiter, OpKind, Shard};
use crate::disk::{Completion, DiskOp, FileId};
use crate::error::Error;
use crate::format::extent::{Item, ItemKind, decode_summary};
use crate::map::Lookup;
use crate::types::{BLOCK, ExtentNo, Place};

/// Extents with a larger share of live blocks (of 1,000) are left alone.
const SHARE_MAX: u32 = 850;
/// Pages on their way at a time.
const MOVES_MAX: usize = 64;

/// The extent being emptied.
pub(super) struct Compaction {
    extent: ExtentNo,
    items: Vec<Item>,
    next: usize,
    /// Pages that are being loaded.
    loading: usize,
    waits_for_node: bool,
}

impl Shard {
    /// Begins with the emptiest extent; false if there is none worth it.
    pub(super) fn begin_compaction(&mut self) -> bool {
        if self.compaction.is_some() || self.closing.is_some() || self.redoing.is_some() {
            return self.compaction.is_some();
        }
        let compacted = &self.compacted;
        let Some(extent) = self.extents.emptiest(SHARE_MAX, |no| compacted.contains(&no)) else { return false };
        let blocks = self.extents.summary_bytes() / BLOCK;
        if !self.ensure_frames(blocks as u32) {
            return false;
        }
        let into = (0..blocks).map(|_| self.arena.alloc(0).expect("frames were ensured")).collect();
        let place = self.extents.summary_place(extent);
        self.compacted.insert(extent);
        self.compaction = Some(Compaction { extent, items: Vec::new(), next: 0, loading: 0, waits_for_node: true });
        let offset = place.offset(self.limits.geometry.extent_bytes);
        self.submit(OpKind::SummaryRead(extent), DiskOp::Read { file: FileId::Data, offset, into });
        true
    }

    pub(super) fn summary_read(&mut self, extent: ExtentNo, completion: Completion) {
        self.again = true;
        let DiskOp::Read { into, .. } = completion.op else { unreachable!("a read completes as a read") };
        let bytes: Vec<u8> = into.iter().flat_map(|frame| frame.iter().copied()).collect();
        let crc = self.extents.summary_crc(extent);
        let items = completion.result.and_then(|()| {
            decode_summary(self.superblock.store_id, extent, crc, &bytes)
                .map_err(|what| Error::corrupt(format_args!("the summary of extent {} {what}", extent.get())))
        });
        let Some(compaction) = &mut self.compaction else { return };
        match items {
            Ok(items) => {
                compaction.items = items;
                compaction.waits_for_node = false;
            }
            Err(error) => self.give_compaction_up(&error),
        }
    }

    /// The extent can't be emptied: it stays as it is, and is not tried again before the next checkpoint.
    fn give_compaction_up(&mut self, error: &Error) {
        if let Some(compaction) = &mut self.compaction {
            tracing::warn!(extent = compaction.extent.get(), %error, "an extent can't be compacted");
            compaction.next = compaction.items.len();
            compaction.waits_for_node = false;
        }
    }

    /// Moves on through the items.
    pub(super) fn advance_compaction(&mut self) {
        if self.failed.is_some() {
            self.compaction = None;
            return;
        }
        loop {
            let Some(c) = &mut self.compaction else { return };
            if self.closing.is_some() {
                c.next = c.items.len();
            }
            if c.waits_for_node || c.loading >= MOVES_MAX {
                return;
            }
            if self.map.dirty_count() as u32 > self.limits.memory_blocks / 16 && c.next < c.items.len() {
                // Every node that moves is dirty until a checkpoint has written it.
                self.need_checkpoint();
                return;
            }
            let Some(item) = c.items.get(c.next).copied() else { break };
            let place = Place { extent: c.extent, block: item.block };
            match item.what {
                ItemKind::Page(key, lsn) => {
                    c.next += 1;
                    // Versions that the table knows to be superseded need no read.
                    let known = self.table.find(key).map(|idx| &self.table.pages[idx]);
                    if known.is_some_and(|page| page.resolved && page.mapped_lsn != lsn) {
                        continue;
                    }
                    c.loading += 1;
                    let idx = self.table.get(key);
                    self.begin(None, PendingKind::Move(place), smallvec::smallvec![idx], |_| false);
                }
                ItemKind::Node(key) => match self.map.find_node(key) {
                    Ok(Some(child)) if child.place() == place => {
                        if self.map.resident(key).is_some() {
                            c.next += 1;
                            self.map.touch(key);
                        } else {
                            c.waits_for_node = true;
                            self.want_node(key, child, NodeWaiter::Compaction);
                        }
                    }
                    Ok(_) => c.next += 1,
                    Err((above, child)) => {
                        c.waits_for_node = true;
                        self.want_node(above, child, NodeWaiter::Compaction);
                    }
                },
            }
        }
        if self.compaction.as_ref().is_some_and(|c| c.loading == 0) {
            self.compaction = None;
            self.stats.extents_compacted += 1;
            self.again = true;
        }
    }

    pub(super) fn compaction_node_read(&mut self, result: Result<(), Error>) {
        self.again = true;
        match result {
            Ok(()) => {
                if let Some(c) = &mut self.compaction {
                    c.waits_for_node = false;
                }
            }
            Err(error) => self.give_compaction_up(&error),
        }
    }

    /// A page that may have to move is resolved, or loaded.
    pub(super) fn move_ready(&mut self, waiter: usize, from: Place) {
        let idx = self.pending[waiter].pages[0];
        let page = &self.table.pages[idx];
        let named = page.resolved && page.entry.is_some_and(|e| e.place() == from) && page.lsn == page.mapped_lsn;
        let busy = page.absent || page.captures > 0 || page.dirty_from.is_some() || page.slot.is_some();
        let failed = self.pending[waiter].error.clone();
        if failed.is_none() && named && !busy && self.failed.is_none() {
            if page.frame.is_none() {
                self.need_more(waiter);
                if self.want(idx, true, waiter) {
                    self.need_met(waiter, None);
                }
                return;
            }
            if !self.pin_for_move(idx, waiter) {
                return;
            }
            self.table.pages[idx].captures += 1;
            self.moves.push(idx);
        }
        self.release(waiter);
        if let Some(c) = &mut self.compaction {
            c.loading -= 1;
        }
        if let Some(error) = failed {
            self.give_compaction_up(&error);
        }
        self.again = true;
    }

    /// Pins the map leaf of a clean page; if it has left memory meanwhile, asks for it and returns false.
    fn pin_for_move(&mut self, idx: usize, waiter: usize) -> bool {
        let key = self.table.pages[idx].key;
        if self.table.pages[idx].leaf.is_some() {
            return true;
        }
        if let Lookup::Load(node, child) = self.map.lookup(key) {
            self.need_more(waiter);
            self.want_node(node, child, NodeWaiter::Request(waiter));
            return false;
        }
        // The page is in the map, so its leaf exists: nothing is created.
        let leaf = self.map.pin(key, &mut self.arena);
        self.table.pages[idx].leaf = Some(leaf);
        true
    }
}
