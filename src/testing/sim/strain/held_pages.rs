//! Pages that clients hold, and give back late.

use super::HeldPage;
use crate::engine::PageRef;
use crate::testing::sim::run::{Outcome, SimRun};

impl SimRun {
    /// A client keeps a page that it has read, for a while.
    pub(in crate::testing::sim) fn hold(&mut self, page: PageRef) {
        let checkpoints = self.cluster().checkpoints_ended();
        self.held.push(HeldPage { bytes: page.to_vec().into(), page, checkpoints });
    }

    /// Clients under strain hold what they read until they have as much as they may; then they give
    /// it back, bit by bit.
    pub(in crate::testing::sim) fn hold_on(&mut self, page: PageRef) {
        let most = self.cluster().frames() * self.strain.pins_percent / 100;
        if !self.giving_back && (self.held.len() as u64) < most && !page.is_absent() {
            self.hold(page);
        }
        if self.held.len() as u64 >= most && self.chance.one_in(50) {
            self.giving_back = true;
        }
    }

    /// Called after an answer: gives back some of the pages that clients have begun to give back.
    pub(in crate::testing::sim) fn give_some_back(&mut self) -> Outcome {
        if self.strain.pins_percent == 0 {
            return Ok(());
        }
        self.giving_back |= self.chance.one_in(400);
        if self.giving_back {
            let count = self.chance.within(1, 16) as usize;
            self.let_go(count)?;
            self.giving_back = !self.held.is_empty();
        }
        Ok(())
    }

    /// Gives back pages that were held, which must be as they were.
    pub(in crate::testing::sim) fn let_go(&mut self, count: usize) -> Outcome {
        let checkpoints = self.cluster.as_ref().map_or(0, |cluster| cluster.checkpoints_ended());
        for held in self.held.drain(..count.min(self.held.len())) {
            held.check()?;
            self.run_stats.rare.pins_outlasted_checkpoint +=
                u64::from(checkpoints > held.checkpoints);
        }
        Ok(())
    }

    /// Called when the store ends: clients may still hold pages of it.
    pub(in crate::testing::sim) fn let_go_at_end(&mut self) -> Outcome {
        if self.chance.chance(self.strain.keep_percent) {
            self.outlived.append(&mut self.held);
        }
        self.giving_back = false;
        self.let_go(usize::MAX)
    }

    /// Called when another store is open: gives back pages of the one before.
    pub(in crate::testing::sim) fn let_go_outlived(&mut self) -> Outcome {
        for held in std::mem::take(&mut self.outlived) {
            held.check()?;
            self.run_stats.rare.pins_outlasted_store += 1;
        }
        Ok(())
    }
}
