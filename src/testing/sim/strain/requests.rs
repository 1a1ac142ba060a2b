//! The requests of a strained run besides those of the workload, and the pages that it checks.

use super::Layout;
use crate::base::PageKey;
use crate::base::error::ErrorKind;
use crate::engine::{Change, Commit, Request};
use crate::testing::random::Rng;
use crate::testing::sim::model::page_bytes;
use crate::testing::sim::run::{Outcome, SimRun};
use crate::testing::sim::workload::Workload;
use std::collections::BTreeSet;

/// Unchanged pages of a large store that are checked after a crash.
const SAMPLE: usize = 80;
/// The first tag of the pages with which a store is filled: those of the workload stay below.
const FILL_TAG: u64 = 1 << 48;
/// How often such a commit is tried while it gets `Busy`.
const FILL_TRIES: u32 = 6;

impl SimRun {
    /// Whether this is a large store.
    pub(in crate::testing::sim) fn is_large(&self) -> bool {
        self.strain.large.is_some()
    }

    /// On a slow device a checkpoint may take longer than a commit over shards waits for log room:
    /// then the commit is tried again, as its error says.
    fn fill_with(&mut self, keys: &[PageKey]) -> Outcome {
        for _ in 0..FILL_TRIES {
            let changes =
                keys.iter().map(|key| (*key, Change::Put(page_bytes(*key, FILL_TAG)))).collect();
            match self.call(Request::Commit(Commit {
                reads: Vec::new(),
                changes,
                durable: false,
            }))? {
                Err(error) if error.kind() == ErrorKind::Busy => {}
                answer => {
                    return answer.map(drop).map_err(|error| format!("filling the store: {error}"));
                }
            }
        }
        Err(format!("filling the store: busy {FILL_TRIES} times, with {} pages", keys.len()))
    }

    /// Fills a large store: most of its pages, and the lowest page of each small tree.
    pub(in crate::testing::sim) fn fill(&mut self) -> Outcome {
        if !self.is_large() {
            return Ok(());
        }
        let in_trees: BTreeSet<PageKey> = self.trees.iter().flatten().copied().collect();
        let universe = self.workload.profile.universe.clone();
        let lone = universe.iter().filter(|key| !in_trees.contains(key));
        let lone: Vec<PageKey> = lone.copied().filter(|_| !self.chance.one_in(5)).collect();
        let lows = self.trees.iter().map(|tree| tree[0]);
        let mut keys: Vec<PageKey> = lone.into_iter().chain(lows).collect();
        let shard_map = self.cluster().shard_map();
        keys.sort_by_key(|key| shard_map.shard_of(*key));
        let most = self.workload.commit_pages_max().max(1) as usize;
        for shard in keys.chunk_by(|a, b| shard_map.shard_of(*a) == shard_map.shard_of(*b)) {
            for keys in shard.chunks(most) {
                self.fill_with(keys)?;
            }
        }
        self.call(Request::Checkpoint)?.map_err(|error| format!("filling the store: {error}"))?;
        Ok(())
    }

    /// Makes a request that only large stores get; returns whether it did.
    pub(in crate::testing::sim) fn strain(&mut self) -> bool {
        if !self.is_large() || !self.chance.chance(40) {
            return false;
        }
        if self.sweeps_left > 0 && self.chance.chance(80) {
            self.sweeps_left -= 1;
            self.sweep();
            return true;
        }
        let is_full_of_pins = self.held.len() as u64 * 10 >= self.cluster().frames() * 8;
        if is_full_of_pins && self.chance.one_in(4) {
            // The memory that is left must suffice to write what is dirty.
            self.ask(Request::Checkpoint);
            return true;
        }
        match self.chance.below(100) {
            0..50 if !self.trees.is_empty() => self.climb(),
            0..80 => self.sweep(),
            80..84 => _ = self.ask(Request::Checkpoint),
            84..88 => self.free_many(),
            _ if matches!(self.strain.large, Some((Layout::Roomy, _))) => self.flood(),
            _ => self.sweep(),
        }
        true
    }

    /// A small tree grows, often while its lowest page is being read; a high one is freed again.
    fn climb(&mut self) {
        // The tree that was left alone the longest: it has mostly left memory, and its top must be
        // read.
        self.trees.rotate_left(1);
        let tree = self.trees[0].clone();
        let last = self.oracle.last();
        let there =
            tree.iter().take_while(|key| self.oracle.model.at(**key, last).page.is_some()).count();
        let touched = tree.iter().all(|key| self.workload.is_touched(key));
        if !touched {
            return;
        }
        let put = |sim: &mut SimRun, key: PageKey| (key, sim.workload.put_to(key));
        if there == tree.len() || (there > 1 && self.chance.one_in(3)) {
            let changes = tree.iter().map(|key| (*key, Change::Free)).collect();
            return self.commit(changes);
        }
        if there > 0 && self.chance.chance(80) {
            self.ask(Request::Read([tree[0]].into_iter().collect()));
        }
        if there > 0 && self.chance.chance(30) {
            // What is read late is changed too: a node that has lost its path to the root loses
            // more.
            let change = put(self, tree[0]);
            self.commit(vec![change]);
        }
        if self.chance.chance(80) {
            let change = put(self, tree[there]);
            self.commit(vec![change]);
            if self.chance.chance(60) {
                // The new top is written, and leaves memory, while the old one is still being read.
                self.ask(Request::Checkpoint);
                self.sweeps_left = self.chance.within(4, 30);
            }
        }
    }

    /// Reads many pages, most of which are not in memory, and some of which are absent.
    fn sweep(&mut self) {
        let most = self.options.vectored_pages_max as u64;
        for _ in 0..self.chance.within(1, 3) {
            let keys: BTreeSet<PageKey> =
                (0..most).filter_map(|_| touched(&self.workload, &mut self.chance)).collect();
            let last = self.oracle.last();
            let absent =
                keys.iter().filter(|key| self.oracle.model.at(**key, last).page.is_none()).count();
            self.run_stats.rare.absent_reads += absent as u64;
            if !keys.is_empty() {
                self.ask(Request::Read(keys.into_iter().collect()));
            }
        }
    }

    /// Frees as many pages as one commit may free, or some of them.
    fn free_many(&mut self) {
        let most = self.workload.commit_pages_max() * 8;
        let count = self.chance.within(1, most);
        let keys: BTreeSet<PageKey> =
            (0..count).filter_map(|_| touched(&self.workload, &mut self.chance)).collect();
        if !keys.is_empty() {
            self.commit(keys.into_iter().map(|key| (key, Change::Free)).collect());
        }
    }

    /// Writes many whole pages at a time, none durably.
    fn flood(&mut self) {
        let most = self.workload.commit_pages_max();
        for _ in 0..self.chance.within(8, 40) {
            let keys: BTreeSet<PageKey> =
                (0..most).filter_map(|_| touched(&self.workload, &mut self.chance)).collect();
            let changes: Vec<_> =
                keys.into_iter().map(|key| (key, self.workload.put_to(key))).collect();
            if !changes.is_empty() {
                self.ask(Request::Commit(Commit { reads: Vec::new(), changes, durable: false }));
            }
        }
    }

    fn commit(&mut self, changes: Vec<(PageKey, Change)>) {
        let durable = self.chance.one_in(2);
        self.ask(Request::Commit(Commit { reads: Vec::new(), changes, durable }));
    }

    /// The pages to check after a crash, and whether they are all.
    pub(in crate::testing::sim) fn pick_checked(&mut self) -> (Vec<PageKey>, bool) {
        let universe = &self.workload.profile.universe;
        // The number of pages checked in total does not depend on the size of the store.
        let rarely = 12.max(universe.len() as u64 / 500);
        if !self.is_large() || self.chance.one_in(rarely) {
            return (universe.clone(), true);
        }
        let mut keys = self.oracle.changed();
        keys.extend((0..SAMPLE).map(|_| *self.chance.pick(universe)));
        keys.extend(self.trees.iter().filter(|_| self.chance.one_in(4)).flatten());
        (keys.into_iter().collect(), false)
    }
}

/// A page that is not of the idle shard, if one is found soon.
fn touched(workload: &Workload, chance: &mut Rng) -> Option<PageKey> {
    (0..8).map(|_| *chance.pick(&workload.profile.universe)).find(|key| workload.is_touched(key))
}
