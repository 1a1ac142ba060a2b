//! Counts the garbage in extents, and how much of it the next checkpoint would free.
//!
//! Invariants
//! 1. A block is garbage from when the map in memory gives it up until a checkpoint retires it. Its
//!    extent's owner counts it, once.
//!
//! It decides nothing: the shard does.

use super::Extents;
#[cfg(any(test, feature = "sim"))]
use super::{Extent, ExtentState};
use crate::base::BlockAddr;

impl Extents {
    /// Counts a block that the map no longer names; a checkpoint retires it later.
    pub(super) fn becomes_garbage(&mut self, place: BlockAddr) {
        self.edit(place.extent, |extent| extent.garbage += 1);
        self.unreadable.died(place);
        self.garbage_blocks += 1;
        self.died += 1;
    }

    /// Blocks that the map has given up and no checkpoint has retired yet.
    pub(crate) fn pending_free_count(&self) -> usize {
        self.expected + self.garbage_blocks
    }

    /// Blocks that have become garbage since the store was opened: while the number stands still,
    /// compaction can find nothing new.
    pub(crate) fn died(&self) -> u64 {
        self.died
    }

    /// Recounts everything and compares: for tests.
    ///
    /// # Errors
    /// The count that has drifted.
    #[cfg(any(test, feature = "sim"))]
    pub(crate) fn audit(&self) -> Result<(), String> {
        let sum = |count: fn(&Extent) -> u32| {
            self.extents.iter().map(|extent| u64::from(count(extent))).sum::<u64>()
        };
        let in_state =
            |wanted| self.extents.iter().filter(|extent| extent.state == wanted).count() as u64;
        for (what, kept, counted) in [
            ("live blocks", self.live_blocks, sum(|extent| extent.live)),
            ("blocks of garbage", self.garbage_blocks as u64, sum(|extent| extent.garbage)),
            (
                "reclaimable extents",
                self.reclaimable.into(),
                sum(|extent| extent.is_reclaimable().into()),
            ),
            ("free extents", self.free.len() as u64, in_state(ExtentState::Free)),
            (
                "extents that this shard owns",
                self.owned_count.into(),
                self.extents.len() as u64 - in_state(ExtentState::OfAnotherShard),
            ),
        ] {
            if kept != counted {
                return Err(format!("{what}: {kept} by what is kept, {counted} counted"));
            }
        }
        match self.extents.iter().position(|extent| extent.live < extent.garbage) {
            None => Ok(()),
            Some(no) => Err(format!("extent {no}: more garbage than live: {:?}", self.extents[no])),
        }
    }

    /// Blocks that the next checkpoint frees, as far as is known here.
    pub(crate) fn coming(&self) -> u64 {
        u64::from(self.reclaimable) * u64::from(self.data_blocks()) + self.expected as u64
    }
}
