//! What comes to extents from elsewhere: places that log records name, and what the maps of other
//! shards begin and cease to name here.
//!
//! Invariants
//! 1. An extent that log records name is kept apart (`Adopting`) from before recovery writes
//!    anything until every shard has captured what it has redone: nothing is put into it, and it is
//!    not given out again.
//! 2. Whatever is adopted is listed by a summary before a table row counts it.

use super::{ExtentState, Extents};
use crate::base::{BlockAddr, ExtentNo, VShard};
use crate::engine::map::remote_refs::ForeignChanges;
use crate::format::extent::{Item, ItemKind};

impl Extents {
    /// An extent that log records name, before recovery writes anything: nothing is put into it any
    /// more. If it was in use, returns where its summary is (and its checksum): the caller reads it
    /// and brings the items.
    pub(crate) fn reserve_named(&mut self, no: ExtentNo) -> Option<(BlockAddr, u32)> {
        let at = self.summary_place(no);
        let extent = &mut self.extents[no.index()];
        let was = extent.state;
        if matches!(was, ExtentState::Adopting | ExtentState::OfAnotherShard) {
            return None;
        }
        self.free.remove(&no.get());
        extent.state = ExtentState::Adopting;
        (was == ExtentState::Closed).then_some((at, extent.summary_crc))
    }

    /// The items that the summary of a [reserved](Self::reserve_named) extent lists.
    pub(crate) fn restore_items(&mut self, no: ExtentNo, items: Vec<Item>) {
        let extent = &mut self.extents[no.index()];
        extent.summarized = items.len();
        extent.items = items;
    }

    /// Redo is over: no more items come from the log.
    pub(crate) fn end_adoption(&mut self) {
        for i in 0..self.extents.len() {
            let (no, extent) = (ExtentNo::new(i as u32), &mut self.extents[i]);
            if extent.state != ExtentState::Adopting {
                continue;
            }
            // A summary that lists everything is as good as a last one.
            let listed = extent.items.len() == extent.summarized;
            if listed {
                extent.items = Vec::new();
                self.edit(no, |extent| extent.state = ExtentState::Closed);
                self.free_if_empty(no);
            } else {
                extent.state = ExtentState::Closing;
            }
        }
    }

    /// During recovery: the map of `vshard` names from now on a place that a log record names.
    pub(crate) fn adopt(&mut self, vshard: VShard, place: BlockAddr, what: ItemKind) {
        if !self.is_mine(place.extent) {
            self.remote_refs.name(vshard, place, what);
            return;
        }
        self.list(place, what);
        self.extents[place.extent.index()].assigned += 1;
        self.name_page(vshard, place);
    }

    fn list(&mut self, place: BlockAddr, what: ItemKind) {
        let extent = &mut self.extents[place.extent.index()];
        assert_eq!(extent.state, ExtentState::Adopting, "named extents were reserved");
        if !extent.items.iter().any(|item| item.block == place.block) {
            extent.items.push(Item { block: place.block, what });
        }
    }

    /// What the capture of another shard means for the extents at home here.
    pub(crate) fn take_over(
        &mut self,
        named: Vec<(BlockAddr, ItemKind)>,
        retired: Vec<BlockAddr>,
        left: Vec<BlockAddr>,
    ) {
        for (place, what) in named {
            self.list(place, what);
            self.edit(place.extent, |extent| extent.live += 1);
            self.live_blocks += 1;
        }
        for place in retired.iter().chain(&left) {
            self.extents[place.extent.index()].excluded += 1;
            self.dies(*place);
        }
        self.retiring.extend(retired);
        self.left_captured.extend(left);
    }

    /// What the capture of this shard means for the extents of others; called when all is captured.
    pub(crate) fn hand_over(&mut self) -> ForeignChanges {
        self.remote_refs.hand_over()
    }

    /// Another shard is about to leave a place here.
    pub(crate) fn expect_left(&mut self) {
        self.expected += 1;
    }
}
