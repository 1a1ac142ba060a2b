//! What has died in extents, and what a checkpoint would make of it.
//!
//! Invariants
//! 1. A place is dead from when the map in memory leaves it until a checkpoint retires it: counted
//!    once, at its home.
//!
//! It decides nothing: the shard does.

use super::Extents;
#[cfg(any(test, feature = "sim"))]
use super::{Extent, ExtentState};
use crate::base::BlockAddr;

impl Extents {
    /// The map names `place` no more; it is retired later.
    pub(super) fn dies(&mut self, place: BlockAddr) {
        self.edit(place.extent, |extent| extent.dead += 1);
        self.unreadable.died(place);
        self.dead_blocks += 1;
        self.died += 1;
    }

    /// Blocks left by the map that no checkpoint has retired yet.
    pub(crate) fn pending_free_count(&self) -> usize {
        self.expected + self.dead_blocks
    }

    /// Blocks that died since the store was opened: a clock of what compaction could find.
    pub(crate) fn died(&self) -> u64 {
        self.died
    }

    /// The counts, counted anew: for tests.
    ///
    /// # Errors
    /// The one that has drifted.
    #[cfg(any(test, feature = "sim"))]
    pub(crate) fn audit(&self) -> Result<(), String> {
        let sum = |count: fn(&Extent) -> u32| {
            self.extents.iter().map(|extent| u64::from(count(extent))).sum::<u64>()
        };
        let in_state =
            |wanted| self.extents.iter().filter(|extent| extent.state == wanted).count() as u64;
        for (what, kept, counted) in [
            ("live blocks", self.live_blocks, sum(|extent| extent.live)),
            ("dead blocks", self.dead_blocks as u64, sum(|extent| extent.dead)),
            ("spent extents", self.spent.into(), sum(|extent| extent.is_spent().into())),
            ("free extents", self.free.len() as u64, in_state(ExtentState::Free)),
            (
                "extents at home here",
                self.mine_count.into(),
                self.extents.len() as u64 - in_state(ExtentState::OfAnotherShard),
            ),
        ] {
            if kept != counted {
                return Err(format!("{what}: {kept} by what is kept, {counted} counted"));
            }
        }
        match self.extents.iter().position(|extent| extent.live < extent.dead) {
            None => Ok(()),
            Some(no) => Err(format!("extent {no}: more dead than live: {:?}", self.extents[no])),
        }
    }

    /// Blocks that a checkpoint gives back, as far as is known here.
    pub(crate) fn coming(&self) -> u64 {
        u64::from(self.spent) * u64::from(self.data_blocks()) + self.expected as u64
    }
}
