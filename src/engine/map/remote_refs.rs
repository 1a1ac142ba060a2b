//! Places in extents of other shards: what this shard's roots begin and cease to name there.
//!
//! A changed number of shards deals pages and extents out anew, so a shard's map may name places in
//! extents that are another's. New places are always a shard's own: these only become fewer, but
//! for the pages of a log that is redone.
//!
//! Invariants
//! 1. What is collected here is handed over once, with the capture of a checkpoint, before any
//!    table of that checkpoint is written. So the home's live counts are exactly what the new roots
//!    name.
//! 2. `retired` were left before the checkpoint began, so before its redo LSN was chosen; `left`
//!    since.

use crate::base::{BlockAddr, VShard};
use crate::format::extent::ItemKind;

#[derive(Default)]
struct PerVShard {
    named: Vec<(BlockAddr, ItemKind)>,
    left: Vec<BlockAddr>,
}

/// What a handover says, not yet divided by the homes of the extents.
#[derive(Default)]
pub(crate) struct ForeignChanges {
    /// Named by the new roots, and not by the old ones.
    pub named: Vec<(BlockAddr, ItemKind)>,
    /// Left before the checkpoint began.
    pub retired: Vec<BlockAddr>,
    /// Left since.
    pub left: Vec<BlockAddr>,
}

/// The collection.
pub(super) struct RemoteRefs {
    per_vshard: Vec<PerVShard>,
    changes: ForeignChanges,
}

impl RemoteRefs {
    pub(super) fn new(vshards_count: u32) -> Self {
        RemoteRefs {
            per_vshard: (0..vshards_count).map(|_| PerVShard::default()).collect(),
            changes: ForeignChanges::default(),
        }
    }

    pub(super) fn name(&mut self, vshard: VShard, place: BlockAddr, what: ItemKind) {
        self.per_vshard[vshard.index()].named.push((place, what));
    }

    pub(super) fn leave(&mut self, vshard: VShard, place: BlockAddr) {
        self.per_vshard[vshard.index()].left.push(place);
    }

    /// A map node in a foreign extent was written elsewhere: the new root does not name it.
    pub(super) fn retire(&mut self, place: BlockAddr) {
        self.changes.retired.push(place);
    }

    pub(super) fn begin_checkpoint(&mut self) {
        for vshard in &mut self.per_vshard {
            self.changes.retired.append(&mut vshard.left);
        }
    }

    pub(super) fn captured(&mut self, vshard: VShard) {
        let mine = &mut self.per_vshard[vshard.index()];
        self.changes.named.append(&mut mine.named);
        self.changes.left.append(&mut mine.left);
    }

    pub(super) fn hand_over(&mut self) -> ForeignChanges {
        std::mem::take(&mut self.changes)
    }
}
