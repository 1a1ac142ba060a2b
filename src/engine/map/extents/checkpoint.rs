//! Extents during a checkpoint: which blocks it retires, what the new roots name, and what is free
//! when it ends.

use super::{Extent, ExtentState, Extents, FREE};
use crate::base::{BlockAddr, ExtentNo, VShard};
use crate::format::extent::TableRow;

impl Extents {
    /// Begins a checkpoint: it will retire everything that the map has given up so far.
    pub(crate) fn begin_checkpoint(&mut self) {
        assert!(self.retiring.is_empty(), "one checkpoint at a time");
        self.remote_refs.begin_checkpoint();
        self.expected = 0;
        self.retiring = std::mem::take(&mut self.pending_free_captured);
        for i in 0..self.per_vshard.len() {
            let pending_free = std::mem::take(&mut self.per_vshard[i].pending_free);
            for place in &pending_free {
                self.extents[place.extent.index()].not_in_new_root += 1;
            }
            self.retiring.extend(pending_free);
        }
    }

    /// Called when the tree of `vshard` was captured: `nodes` are the addresses of nodes that the
    /// new root names, `retired` those that it gave up.
    pub(crate) fn captured(
        &mut self,
        vshard: VShard,
        nodes: impl Iterator<Item = BlockAddr>,
        retired: Vec<BlockAddr>,
    ) {
        for place in nodes {
            self.edit(place.extent, |extent| {
                extent.unpublished -= 1;
                extent.live += 1;
            });
            self.live_blocks += 1;
        }
        self.remote_refs.captured(vshard);
        let (retired, remote_refs): (Vec<BlockAddr>, Vec<BlockAddr>) =
            retired.into_iter().partition(|p| self.is_mine(p.extent));
        remote_refs.into_iter().for_each(|place| self.remote_refs.retire(place));
        retired.iter().for_each(|place| self.becomes_garbage(*place));
        let mine = &mut self.per_vshard[vshard.index()];
        for extent in mine.named_since_capture.drain(..) {
            self.extents[extent.index()].not_in_new_root -= 1;
        }
        let pending_free = std::mem::take(&mut mine.pending_free);
        for place in pending_free.iter().chain(&retired) {
            self.extents[place.extent.index()].not_in_new_root += 1;
        }
        self.pending_free_captured.extend(pending_free);
        self.retiring.extend(retired);
    }

    /// The table's rows for the extents that this shard owns and of which the new roots name
    /// something.
    pub(crate) fn rows(&self) -> Vec<(ExtentNo, TableRow)> {
        let row = |(i, e): (usize, &Extent)| {
            assert!(e.live >= e.not_in_new_root, "extent {i} names less than nothing: {e:?}");
            let live = e.live - e.not_in_new_root;
            if live == 0 {
                return None;
            }
            assert!(e.state != ExtentState::Free, "what a root names has a summary");
            let row = TableRow {
                state: 1,
                live: (live as u16).into(),
                summary_crc: e.summary_crc.into(),
                summary_slot: e.summary_slot,
                ..TableRow::default()
            };
            Some((ExtentNo::new(i as u32), row))
        };
        self.extents.iter().enumerate().filter_map(row).collect()
    }

    /// Ends a checkpoint whose superblock is durable: what it retired is free. Returns how many
    /// blocks that are.
    pub(crate) fn end_checkpoint(&mut self) -> u64 {
        self.interval += 1;
        let retiring = std::mem::take(&mut self.retiring);
        assert!(self.garbage_blocks >= retiring.len(), "only garbage is retired");
        self.garbage_blocks -= retiring.len();
        for place in &retiring {
            self.edit(place.extent, |extent| {
                extent.live -= 1;
                extent.not_in_new_root -= 1;
                extent.garbage -= 1;
            });
            self.live_blocks -= 1;
            self.free_if_empty(place.extent);
        }
        retiring.len() as u64
    }

    pub(super) fn free_if_empty(&mut self, no: ExtentNo) {
        let extent = &mut self.extents[no.index()];
        if extent.state == ExtentState::Closed && extent.live == 0 && extent.unpublished == 0 {
            assert!(extent.not_in_new_root == 0, "a root names {no:?}, which is free: {extent:?}");
            *extent = FREE;
            assert!(self.free.insert(no.get()), "{no:?} becomes free once");
            self.unreadable.freed(no);
        }
        self.assert_state(no);
    }
}
