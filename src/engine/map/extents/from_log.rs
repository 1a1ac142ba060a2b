//! Changes to extents that this shard did not hand blocks out for: blocks that log records name,
//! and blocks that the maps of other shards begin or cease to name here.
//!
//! Invariants
//! 1. An extent that log records name is kept apart (`NamedByLog`) from before recovery writes
//!    anything until every shard has captured what it has redone: none of its blocks is handed out,
//!    and it does not become free.
//! 2. A summary lists everything registered from the log before a table row counts it.

use super::{ExtentState, Extents};
use crate::base::{BlockAddr, ExtentNo, VShard};
use crate::engine::map::remote_refs::RemoteChanges;
use crate::format::extent::{Item, ItemKind};

impl Extents {
    /// Reserves an extent that log records name, before recovery writes anything. If it was in use,
    /// returns the address and the checksum of its summary: the caller reads it and
    /// [restores](Self::restore_items) the items.
    pub(crate) fn reserve_named(&mut self, no: ExtentNo) -> Option<(BlockAddr, u32)> {
        let at = self.summary_place(no);
        let extent = &mut self.extents[no.index()];
        let was = extent.state;
        if matches!(was, ExtentState::NamedByLog | ExtentState::OfAnotherShard) {
            return None;
        }
        assert!(matches!(was, ExtentState::Free | ExtentState::Closed), "{no:?} is {was:?}");
        let summary = (was == ExtentState::Closed).then_some((at, extent.summary_crc));
        extent.state = ExtentState::NamedByLog;
        self.free.remove(&no.get());
        self.assert_state(no);
        summary
    }

    /// Sets the items that the summary of a [reserved](Self::reserve_named) extent lists.
    pub(crate) fn restore_items(&mut self, no: ExtentNo, items: Vec<Item>) {
        let extent = &mut self.extents[no.index()];
        assert_eq!(extent.state, ExtentState::NamedByLog, "{no:?} was reserved");
        assert!(extent.items.is_empty(), "the items of {no:?} are restored before the redo");
        extent.summarized = items.len();
        extent.items = items;
        self.assert_state(no);
    }

    /// Ends the redo: no more items come from the log.
    pub(crate) fn end_redo(&mut self) {
        for i in 0..self.extents.len() {
            let (no, extent) = (ExtentNo::new(i as u32), &mut self.extents[i]);
            if extent.state != ExtentState::NamedByLog {
                continue;
            }
            // A summary that lists everything can be the last one.
            let listed = extent.items.len() == extent.summarized;
            if listed {
                extent.items = Vec::new();
                self.edit(no, |extent| extent.state = ExtentState::Closed);
                self.free_if_empty(no);
            } else {
                extent.state = ExtentState::Closing;
            }
            self.assert_state(no);
        }
    }

    /// Records, during recovery, that the map of `vshard` names from now on a block that a log
    /// record names.
    pub(crate) fn register_from_log(&mut self, vshard: VShard, place: BlockAddr, what: ItemKind) {
        if !self.is_mine(place.extent) {
            self.remote_refs.name(vshard, place, what);
            return;
        }
        self.list(place, what);
        self.extents[place.extent.index()].unpublished += 1;
        self.name_page(vshard, place);
    }

    fn list(&mut self, place: BlockAddr, what: ItemKind) {
        let extent = &mut self.extents[place.extent.index()];
        assert_eq!(extent.state, ExtentState::NamedByLog, "named extents were reserved");
        if !extent.items.iter().any(|item| item.block == place.block) {
            extent.items.push(Item { block: place.block, what });
        }
    }

    /// Applies the consequences of another shard's capture for the extents that this shard owns.
    pub(crate) fn take_over(
        &mut self,
        named: Vec<(BlockAddr, ItemKind)>,
        retired: Vec<BlockAddr>,
        pending_free: Vec<BlockAddr>,
    ) {
        for (place, what) in named {
            self.list(place, what);
            self.edit(place.extent, |extent| extent.live += 1);
            self.live_blocks += 1;
        }
        for place in retired.iter().chain(&pending_free) {
            self.extents[place.extent.index()].not_in_new_root += 1;
            self.becomes_garbage(*place);
        }
        self.retiring.extend(retired);
        self.pending_free_captured.extend(pending_free);
    }

    /// Takes the consequences of this shard's capture for extents of other owners; called when
    /// everything is captured.
    pub(crate) fn hand_over(&mut self) -> RemoteChanges {
        self.remote_refs.hand_over()
    }

    /// Records that another shard is about to give up a block here.
    pub(crate) fn expect_pending_free(&mut self) {
        self.expected += 1;
    }
}
