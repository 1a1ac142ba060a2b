//! Counts what has happened in a run.

use super::{RunStats, SimRun};
use crate::base::BLOCK;
use crate::testing::sim::cluster::Opened;
use crate::testing::sim::strain::MEMORY_LEAST;

impl SimRun {
    pub(super) fn count_life(&mut self) {
        let shards = u64::from(self.cluster().shard_map().shards_count());
        let frames = self.cluster().frames();
        let pages = self.oracle.model.pages_present() as u64;
        let rare = &mut self.run_stats.rare;
        rare.lives_of_ten_memories += u64::from(pages >= 10 * frames);
        rare.lives_of_hundred_memories += u64::from(pages >= 100 * frames);
        rare.lives_of_thousand_memories += u64::from(pages >= 1_000 * frames);
        rare.lives_in_least_memory += u64::from(frames * BLOCK as u64 == MEMORY_LEAST * shards);
    }

    pub(super) fn count_recovery(&mut self, opened: Opened) {
        let is_small = self.options.memory_bytes == MEMORY_LEAST;
        let counts = self.is_large() && is_small && !opened.clean && !opened.created;
        self.run_stats.rare.recoveries_in_least_memory += u64::from(counts);
    }

    pub(super) fn sum_up(mut self) -> RunStats {
        self.end_life();
        self.replace_disk(self.disk.clone());
        self.run_stats.oracle = self.oracle.counters();
        self.run_stats.virtual_us = self.disk.now();
        self.run_stats
    }
}
