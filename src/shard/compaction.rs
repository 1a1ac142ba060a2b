//! Compaction: the emptiest extent is read by its summary, and what the maps still name in it moves elsewhere.
//!
//! ```text
//! home of the extent: summary read --> each item to the shard whose map would name it --Move--> ... --Moved--> next
//! that shard: named here? no: Moved at once; else page: loaded, captured for a new place; node: marked dirty
//! ```
//! Invariants
//! 1. An item moves only if the map names this very place; everything else in the extent is dead already.
//! 2. A moved page keeps its version; its old place is given back as any place that the map left.
//! 3. A map node moves by being marked dirty: the next checkpoint writes it elsewhere.
//! 4. It stops for a checkpoint when many nodes are dirty: they can't leave memory before.
//! 5. One extent at a time at each home, few pages at a time: commits and reads go on.

use super::message::Message;
use super::requests::PendingKind;
use super::{NodeWaiter, OpKind, Shard};
use crate::disk::{Completion, DiskOp, FileId};
use crate::error::Error;
use crate::format::extent::{Item, ItemKind, NodeKey, decode_summary};
use crate::map::Lookup;
use crate::types::{BLOCK, ExtentNo, Place, ShardId};
use std::collections::VecDeque;

/// Extents with a larger share of live blocks (of 1,000) are left alone.
const SHARE_MAX: u32 = 850;
/// Pages on their way at a time.
const MOVES_MAX: usize = 64;

/// The extent being emptied.
pub(super) struct Compaction {
    extent: ExtentNo,
    /// `None` until the summary is read.
    items: Option<Vec<Item>>,
    next: usize,
    /// Items that have not been answered.
    asked: usize,
}

/// What homes have asked this shard to move.
#[derive(Default)]
pub(super) struct Moves {
    asked: VecDeque<(ShardId, ItemKind, Place)>,
    /// A node is being read for the first of them.
    reads_node: bool,
}

impl Shard {
    /// Begins with the emptiest extent; false if there is none worth it.
    pub(super) fn begin_compaction(&mut self) -> bool {
        if self.compaction.is_some() || self.closing.is_some() || self.opening {
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
        self.compaction = Some(Compaction { extent, items: None, next: 0, asked: 0 });
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
        match (items, &mut self.compaction) {
            (Ok(items), Some(compaction)) => compaction.items = Some(items),
            (Err(error), Some(_)) => self.give_compaction_up(&error),
            (_, None) => {}
        }
    }

    /// The extent can't be emptied: it stays as it is, and is not tried again before the next checkpoint.
    fn give_compaction_up(&mut self, error: &Error) {
        if let Some(compaction) = &mut self.compaction {
            tracing::warn!(extent = compaction.extent.get(), %error, "an extent can't be compacted");
            compaction.items = Some(Vec::new());
            compaction.next = 0;
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
            let Some(items) = &mut c.items else { return };
            if self.closing.is_some() {
                items.truncate(c.next);
            }
            if c.asked >= MOVES_MAX {
                return;
            }
            let Some(item) = items.get(c.next).copied() else { break };
            c.next += 1;
            c.asked += 1;
            let place = Place { extent: c.extent, block: item.block };
            let shard = match item.what {
                ItemKind::Page(key, _) => self.deal.shard_of(key),
                ItemKind::Node(key) => self.deal.owner(key.vshard),
            };
            self.send(shard, Message::Move(item.what, place));
        }
        if self.compaction.as_ref().is_some_and(|c| c.asked == 0) {
            self.compaction = None;
            self.stats.extents_compacted += 1;
            self.again = true;
        }
    }

    /// An item has been dealt with.
    pub(super) fn moved(&mut self, from: ShardId, error: Option<Error>) {
        if let Some(c) = &mut self.compaction {
            c.asked -= 1;
        }
        match error {
            Some(error) => self.give_compaction_up(&error),
            None if from != self.id => self.extents.expect_left(),
            None => {}
        }
    }

    /// The home of an extent asks for something to be moved out of it.
    pub(super) fn move_asked(&mut self, home: ShardId, what: ItemKind, place: Place) {
        self.moves_asked.asked.push_back((home, what, place));
    }

    /// Moves what was asked for.
    pub(super) fn advance_moves(&mut self) {
        while !self.moves_asked.reads_node
            && self.failed.is_none()
            && let Some((home, what, place)) = self.moves_asked.asked.front().copied()
        {
            if self.dirty_nodes_are_many() {
                // Every node that moves is dirty until a checkpoint has written it.
                self.need_checkpoint();
                return;
            }
            match what {
                ItemKind::Page(key, lsn) => {
                    // Versions that the table knows to be superseded need no read.
                    let known = self.table.find(key).map(|idx| &self.table.pages[idx]);
                    if known.is_some_and(|page| page.resolved && page.mapped_lsn != lsn) {
                        self.send(home, Message::Moved(None));
                    } else {
                        let idx = self.table.get(key);
                        self.begin(None, PendingKind::Move(place, home), smallvec::smallvec![idx], |_| false);
                    }
                }
                ItemKind::Node(key) if self.reads_for_node(key, place) => return,
                ItemKind::Node(_) => self.send(home, Message::Moved(None)),
            }
            self.moves_asked.asked.pop_front();
        }
    }

    /// Marks a node dirty if the map names it at `place`; true: a node must be read first.
    fn reads_for_node(&mut self, key: NodeKey, place: Place) -> bool {
        let (wanted, child) = match self.map.find_node(key) {
            Ok(Some(child)) if child.place() == place && self.map.resident(key).is_none() => (key, child),
            Ok(Some(child)) if child.place() == place => {
                self.map.touch(key);
                return false;
            }
            Ok(_) => return false,
            Err(above) => above,
        };
        self.moves_asked.reads_node = true;
        self.want_node(wanted, child, NodeWaiter::Move);
        true
    }

    /// A node that was wanted for a move is there, or will not come.
    pub(super) fn node_move_read(&mut self, error: Option<Error>) {
        self.again = true;
        self.moves_asked.reads_node = false;
        if error.is_some()
            && let Some((home, ..)) = self.moves_asked.asked.pop_front()
        {
            self.send(home, Message::Moved(error));
        }
    }

    /// A page that may have to move is resolved, or loaded.
    pub(super) fn move_ready(&mut self, waiter: usize, from: Place, home: ShardId) {
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
        self.send(home, Message::Moved(failed));
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
