//! Fills extents further that an earlier life of the store has filled in part. Otherwise each life
//! would begin new ones and leave them nearly empty, and a store that is killed again and again
//! would grow.
//!
//! Invariants
//! 1. Nothing durable names a block after those that the summary lists: roots name what a summary
//!    lists, and an extent that a log record to be redone names is `NamedByLog`, not `Closed`. So
//!    these blocks are free.
//! 2. At most one extent of each stream is filled further; it is `Open` like one that this life has
//!    begun.

use super::{ExtentState, Extents, Stream};
use crate::base::{BlockAddr, ExtentNo};
use crate::format::extent::{Item, ItemKind};

impl Extents {
    /// Up to `count` extents that may have been open when the store was last in use: those with the
    /// fewest live blocks, since a table does not say how far an extent is filled. Each comes with
    /// the address and the checksum of its summary.
    pub(crate) fn maybe_unfilled(&self, count: usize) -> Vec<(ExtentNo, BlockAddr, u32)> {
        let mut least: Vec<(u32, u32)> = Vec::with_capacity(count + 1);
        for (no, extent) in
            (0..).zip(&self.extents).filter(|(_, extent)| extent.state == ExtentState::Closed)
        {
            if least.len() < count || least.last().is_some_and(|(live, _)| extent.live < *live) {
                let at = least.partition_point(|(live, _)| *live <= extent.live);
                least.insert(at, (extent.live, no));
                least.truncate(count);
            }
        }
        let summary = |(_, no)| {
            let no = ExtentNo::new(no);
            (no, self.summary_place(no), self.summary_crc(no))
        };
        least.into_iter().map(summary).collect()
    }

    /// Fills `no` further, whose summary lists `items`, if there is room after them and no other
    /// extent is open for such items.
    pub(crate) fn refill(&mut self, no: ExtentNo, items: Vec<Item>) {
        let Some(last) = items.iter().max_by_key(|item| item.block) else { return };
        let stream = match last.what {
            ItemKind::Page(..) => Stream::Data,
            ItemKind::Node(_) => Stream::Map,
        };
        let next_block = last.block + 1;
        let is_full = next_block >= self.data_blocks();
        // A summary lists all that its extent's row counts, each block once, or something is wrong
        // with one of them:
        // such an extent is left to `verify`.
        let is_listed = self.extents[no.index()].live as usize <= items.len()
            && items.len() <= next_block as usize;
        if is_full || !is_listed || self.open[stream as usize].is_some() {
            return;
        }
        assert_eq!(
            self.extents[no.index()].state,
            ExtentState::Closed,
            "{no:?} is named by the log, or open"
        );
        self.open[stream as usize] = Some(no);
        self.edit(no, |extent| {
            extent.state = ExtentState::Open;
            extent.next_block = next_block;
            extent.summarized = items.len();
            extent.items = items;
        });
    }
}
