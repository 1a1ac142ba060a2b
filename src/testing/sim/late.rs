//! Makes reads slow: keeps back their completions while the store continues, and counts what they
//! have outlasted.
//!
//! Invariants
//! 1. The disk carries out a read that is kept back when it is due; only its completion comes late,
//!    as from a device that was busy elsewhere. So the bytes are old by then.
//! 2. It is delivered after a random number of turns, or as soon as nothing else will happen, or
//!    after [`HELD_US_MAX`], and even sooner while the store can do nothing else: a request that
//!    waits only for this read waits for a bounded time.
//! 3. Chance comes from a stream of its own: a run without held reads is the same as if this file
//!    did not exist.
//!
//! It does *not* check answers.

use super::rare::Rare;
use crate::base::{BLOCK, Micros};
use crate::engine::Shard;
use crate::engine::observe::NodeLoad;
use crate::io::{Completion, DiskOp, OpId};
use crate::testing::random::Rng;
use std::collections::BTreeMap;

/// The longest time for which a read is kept back: some dozens in a row must not use up the
/// patience of a run.
const HELD_US_MAX: Micros = 1_000_000;

/// The same while the store can do nothing but wait: where memory is short, reads come one after
/// another, and what they would outlast does not happen.
const HELD_AT_REST_US_MAX: Micros = 20_000;

/// Decides which reads are kept back, and for how long.
#[derive(Clone, Copy, Debug, Default)]
pub struct Holding {
    /// The percentage of page reads.
    pub pages_percent: u64,
    /// The percentage of map node reads.
    pub nodes_percent: u64,
    /// The percentage of reads of the tops of trees.
    pub tops_percent: u64,
    /// The most turns of all shards that a read is kept back.
    pub turns_max: u64,
}

/// The reads in flight, and those whose completions are kept back.
pub struct Late {
    holding: Holding,
    rng: Rng,
    under_way: BTreeMap<(usize, u64), Begun>,
    kept: Vec<Kept>,
    /// Blocks that each shard has read.
    blocks_read: Vec<u64>,
    /// The rare events that were seen.
    pub rare: Rare,
}

/// A read, as submitted.
struct Begun {
    load: Option<NodeLoad>,
    checkpoints: u64,
    blocks_read: u64,
    /// The turn until which it is kept back.
    until: Option<u64>,
    at: Micros,
}

/// The end of a read.
struct Kept {
    shard: usize,
    until: u64,
    at: Micros,
    completion: Completion,
}

impl Late {
    /// Nothing is in flight.
    pub fn new(holding: Holding, shards: usize, rng: Rng) -> Self {
        let blocks_read = vec![0; shards];
        Late {
            holding,
            rng,
            under_way: BTreeMap::new(),
            kept: Vec::new(),
            blocks_read,
            rare: Rare::default(),
        }
    }

    /// Records that a shard has submitted an operation, in turn number `turn`.
    pub fn submitted(
        &mut self,
        shard: &Shard,
        index: usize,
        id: OpId,
        op: &DiskOp,
        turn: u64,
        now: Micros,
    ) {
        let load = shard.node_load(id);
        if load.is_none() && !shard.is_page_read(id) {
            return;
        }
        let Holding { pages_percent, nodes_percent, tops_percent, turns_max } = self.holding;
        let percent = load
            .map_or(pages_percent, |load| if load.is_top { tops_percent } else { nodes_percent });
        let is_held = percent > 0 && self.rng.chance(percent);
        // Often for a short time: most of what can happen meanwhile is soon done. What a top must
        // outlast takes a checkpoint and more.
        let shifts = if load.is_some_and(|load| load.is_top) { 2 } else { 4 };
        let until =
            is_held.then(|| turn + (self.rng.within(1, turns_max) >> self.rng.below(shifts)));
        let begun = Begun {
            load,
            checkpoints: shard.checkpoints_ended(),
            blocks_read: self.blocks_read[index],
            until,
            at: now,
        };
        self.blocks_read[index] += op.bytes() / BLOCK as u64;
        self.under_way.insert((index, id.0), begun);
    }

    /// Keeps back the end of an operation, or passes it on.
    pub fn keep(&mut self, shard: usize, completion: Completion, turn: u64) -> Option<Completion> {
        let Some(begun) = self.under_way.get(&(shard, completion.id.0)) else {
            return Some(completion);
        };
        match begun.until {
            Some(until) if until > turn => {
                self.kept.push(Kept { shard, until, at: begun.at, completion });
                None
            }
            _ => Some(completion),
        }
    }

    /// The ends that are due, or, if nothing else will happen, the one that was kept first.
    pub fn take_due(
        &mut self,
        turn: u64,
        now: Micros,
        nothing_else: bool,
        at_rest: bool,
    ) -> Vec<(usize, Completion)> {
        let mut due = Vec::new();
        let held_max = if at_rest { HELD_AT_REST_US_MAX } else { HELD_US_MAX };
        let is_due = |kept: &Kept| kept.until <= turn || kept.at + held_max <= now;
        while let Some(at) = self.kept.iter().position(is_due) {
            let Kept { shard, completion, .. } = self.kept.remove(at);
            due.push((shard, completion));
        }
        if due.is_empty() && nothing_else && !self.kept.is_empty() {
            let Kept { shard, completion, .. } = self.kept.remove(0);
            due.push((shard, completion));
        }
        due
    }

    /// Whether ends are kept back.
    pub fn is_keeping(&self) -> bool {
        !self.kept.is_empty()
    }

    /// The latest time at which one of them is delivered.
    pub fn next_due(&self, at_rest: bool) -> Option<Micros> {
        let held_max = if at_rest { HELD_AT_REST_US_MAX } else { HELD_US_MAX };
        self.kept.iter().map(|kept| kept.at + held_max).min()
    }

    /// Called when an operation's end is about to be delivered: counts what it has outlasted.
    pub fn arrives(&mut self, shard: &Shard, index: usize, id: OpId) {
        let Some(begun) = self.under_way.remove(&(index, id.0)) else { return };
        let after_checkpoint = shard.checkpoints_ended() > begun.checkpoints;
        let rare = &mut self.rare;
        rare.reads_outlasted_checkpoint += u64::from(after_checkpoint);
        rare.reads_outlasted_memory +=
            u64::from(self.blocks_read[index] - begun.blocks_read > shard.frames());
        let (Some(then), Some(now)) = (begun.load, shard.node_load(id)) else { return };
        let is_lost = !now.has_parent || !now.is_current;
        rare.reads_outlasted_growth += u64::from(now.levels > then.levels && then.levels > 0);
        rare.reads_orphaned += u64::from(!now.has_parent);
        rare.reads_stale += u64::from(!now.is_current);
        rare.reads_orphaned_by_checkpoint += u64::from(is_lost && after_checkpoint);
    }
}
