//! Extents in the course of a checkpoint: what is retired, what the new roots name, and what is
//! free at its end.

use super::{Extent, ExtentState, Extents, FREE};
use crate::base::{BlockAddr, ExtentNo, VShard};
use crate::format::extent::TableRow;

impl Extents {
    /// A checkpoint begins: everything left so far will be retired by it.
    pub(crate) fn begin_checkpoint(&mut self) {
        assert!(self.retiring.is_empty(), "one checkpoint at a time");
        self.remote_refs.begin_checkpoint();
        self.expected = 0;
        self.retiring = std::mem::take(&mut self.left_captured);
        for i in 0..self.per_vshard.len() {
            let left = std::mem::take(&mut self.per_vshard[i].left);
            for place in &left {
                self.extents[place.extent.index()].excluded += 1;
            }
            self.retiring.extend(left);
        }
    }

    /// The tree of `vshard` was captured: `nodes` are the places of nodes that the new root names,
    /// `retired` those that it left.
    pub(crate) fn captured(
        &mut self,
        vshard: VShard,
        nodes: impl Iterator<Item = BlockAddr>,
        retired: Vec<BlockAddr>,
    ) {
        for place in nodes {
            self.edit(place.extent, |extent| {
                extent.assigned -= 1;
                extent.live += 1;
            });
            self.live_blocks += 1;
        }
        self.remote_refs.captured(vshard);
        let (retired, remote_refs): (Vec<BlockAddr>, Vec<BlockAddr>) =
            retired.into_iter().partition(|p| self.is_mine(p.extent));
        remote_refs.into_iter().for_each(|place| self.remote_refs.retire(place));
        retired.iter().for_each(|place| self.dies(*place));
        let mine = &mut self.per_vshard[vshard.index()];
        for extent in mine.fresh.drain(..) {
            self.extents[extent.index()].excluded -= 1;
        }
        let left = std::mem::take(&mut mine.left);
        for place in left.iter().chain(&retired) {
            self.extents[place.extent.index()].excluded += 1;
        }
        self.left_captured.extend(left);
        self.retiring.extend(retired);
    }

    /// What the table says of the extents at home here: those with something that the new roots
    /// name.
    pub(crate) fn rows(&self) -> Vec<(ExtentNo, TableRow)> {
        let row = |(i, e): (usize, &Extent)| {
            let live = e.live - e.excluded;
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

    /// The checkpoint's superblock is durable: what it retired is free. Returns the number of
    /// blocks.
    pub(crate) fn end_checkpoint(&mut self) -> u64 {
        self.interval += 1;
        let retiring = std::mem::take(&mut self.retiring);
        self.dead_blocks -= retiring.len();
        for place in &retiring {
            self.edit(place.extent, |extent| {
                extent.live -= 1;
                extent.excluded -= 1;
                extent.dead -= 1;
            });
            self.live_blocks -= 1;
            self.free_if_empty(place.extent);
        }
        retiring.len() as u64
    }

    pub(super) fn free_if_empty(&mut self, no: ExtentNo) {
        let extent = &mut self.extents[no.index()];
        if extent.state == ExtentState::Closed && extent.live == 0 && extent.assigned == 0 {
            *extent = FREE;
            self.free.insert(no.get());
            self.unreadable.freed(no);
        }
    }
}
