//! References into extents of other shards: which blocks there this shard's roots begin and cease
//! to name.
//!
//! When the number of shards changes, pages and extents get new owners, so a shard's map may name
//! blocks in extents that another shard owns. A shard hands out blocks of its own extents only:
//! such references only become fewer, except for the pages of a log that is redone.
//!
//! Invariants
//! 1. What is collected here is handed over once, with the capture of a checkpoint, before any
//!    table of that checkpoint is written. So the owner's live counts are exactly what the new
//!    roots name.
//! 2. What is in `retired` was given up before the checkpoint began, so before its redo LSN was
//!    chosen; what is in `pending_free`, since.

use crate::base::{BlockAddr, VShard};
use crate::format::extent::ItemKind;

#[derive(Default)]
struct PerVShard {
    named: Vec<(BlockAddr, ItemKind)>,
    pending_free: Vec<BlockAddr>,
}

/// The content of a handover, not yet divided by the owners of the extents.
#[derive(Default)]
pub(crate) struct RemoteChanges {
    /// Named by the new roots, and not by the old ones.
    pub named: Vec<(BlockAddr, ItemKind)>,
    /// Given up before the checkpoint began.
    pub retired: Vec<BlockAddr>,
    /// Given up since.
    pub pending_free: Vec<BlockAddr>,
}

/// The collection.
pub(super) struct RemoteRefs {
    per_vshard: Vec<PerVShard>,
    changes: RemoteChanges,
}

impl RemoteRefs {
    pub(super) fn new(vshards_count: u32) -> Self {
        RemoteRefs {
            per_vshard: (0..vshards_count).map(|_| PerVShard::default()).collect(),
            changes: RemoteChanges::default(),
        }
    }

    pub(super) fn name(&mut self, vshard: VShard, place: BlockAddr, what: ItemKind) {
        self.per_vshard[vshard.index()].named.push((place, what));
    }

    pub(super) fn leave(&mut self, vshard: VShard, place: BlockAddr) {
        self.per_vshard[vshard.index()].pending_free.push(place);
    }

    /// A map node in another shard's extent was written elsewhere: the new root does not name it.
    pub(super) fn retire(&mut self, place: BlockAddr) {
        self.changes.retired.push(place);
    }

    pub(super) fn begin_checkpoint(&mut self) {
        for vshard in &mut self.per_vshard {
            self.changes.retired.append(&mut vshard.pending_free);
        }
    }

    pub(super) fn captured(&mut self, vshard: VShard) {
        let mine = &mut self.per_vshard[vshard.index()];
        self.changes.named.append(&mut mine.named);
        self.changes.pending_free.append(&mut mine.pending_free);
    }

    pub(super) fn hand_over(&mut self) -> RemoteChanges {
        std::mem::take(&mut self.changes)
    }
}
