//! Commits over several shards, as the oracle sees them: which versions readers need not see yet,
//! and which pages may be locked.
//!
//! Invariants
//! 1. Between the allocation of its LSN and its answer such a commit may be unseen at every shard
//!    but its owner; once a reader has been given a version, none is given an older one.
//! 2. It may hold its pages from the moment at which it is requested until everything is delivered
//!    that its owner had sent when it answered. Only in that time, and only for others that touch a
//!    page that it writes, or write one that it reads, does a hold excuse a conflict.
//!
//! It does *not* know which pages are really locked: this is an upper bound.

use crate::base::{Lsn, PageKey, ShardId, ShardMap};
use crate::engine::{Commit, Token};
use std::collections::{BTreeMap, BTreeSet};

/// Ended holds that are kept before those that no commit can have met are forgotten.
const ENDED_MAX: usize = 64;

/// Commits over several shards.
#[derive(Default)]
pub(super) struct Visibility {
    /// Allocated and not answered, with their owners.
    unseen: BTreeMap<Lsn, ShardId>,
    /// The version of each page that some reader has been given.
    given: BTreeMap<PageKey, Lsn>,
    holding: BTreeMap<Token, Hold>,
    ended: Vec<Hold>,
}

struct Hold {
    reads: BTreeSet<PageKey>,
    writes: BTreeSet<PageKey>,
    /// The event at which it ended.
    until: u64,
}

impl Hold {
    fn of(commit: &Commit) -> Self {
        Hold {
            reads: commit.reads.iter().map(|&(key, _)| key).collect(),
            writes: commit.changes.iter().map(|&(key, _)| key).collect(),
            until: u64::MAX,
        }
    }

    fn excludes(&self, commit: &Commit) -> bool {
        let read = commit.reads.iter().any(|(key, _)| self.writes.contains(key));
        read || commit
            .changes
            .iter()
            .any(|(key, _)| self.writes.contains(key) || self.reads.contains(key))
    }
}

/// Whether a commit that goes to `owner` concerns another shard.
pub(super) fn is_spread(shard_map: ShardMap, owner: ShardId, commit: &Commit) -> bool {
    let reads = commit.reads.iter().map(|&(key, _)| key);
    reads
        .chain(commit.changes.iter().map(|&(key, _)| key))
        .any(|key| shard_map.shard_of(key) != owner)
}

impl Visibility {
    /// Called when a commit over several shards is requested; returns whether it overlaps with
    /// another one.
    pub fn on_request(&mut self, token: Token, commit: &Commit) -> bool {
        let overlaps = self.holding.values().any(|hold| hold.excludes(commit));
        self.holding.insert(token, Hold::of(commit));
        overlaps
    }

    /// Called when its LSN is allocated.
    pub fn allocated(&mut self, lsn: Lsn, owner: ShardId) {
        self.unseen.insert(lsn, owner);
    }

    /// Called when it is acknowledged: from then on every reader sees it.
    pub fn acknowledged(&mut self, lsn: Lsn) {
        self.unseen.remove(&lsn);
    }

    /// Called when nothing can be held for it any more; `oldest` is the event at which the oldest
    /// request in progress was made.
    pub fn let_go(&mut self, token: Token, now: u64, oldest: u64) {
        if let Some(hold) = self.holding.remove(&token) {
            self.ended.push(Hold { until: now, ..hold });
        }
        if self.ended.len() > ENDED_MAX {
            self.ended.retain(|hold| hold.until >= oldest);
        }
    }

    /// Whether a commit requested at event `since` may have met a page held for another one, which
    /// excludes it.
    pub fn may_have_met(&self, token: Token, commit: &Commit, since: u64) -> bool {
        let holding =
            self.holding.iter().filter(|&(&other, _)| other != token).map(|(_, hold)| hold);
        holding
            .chain(self.ended.iter().filter(|hold| hold.until >= since))
            .any(|hold| hold.excludes(commit))
    }

    /// Whether the version that `lsn` made of `key`, at `shard`, need not be seen yet.
    pub fn may_be_unseen(&self, lsn: Lsn, key: PageKey, shard: ShardId) -> bool {
        let elsewhere = self.unseen.get(&lsn).is_some_and(|&owner| owner != shard);
        elsewhere && self.given.get(&key).is_none_or(|&given| given < lsn)
    }

    /// Records that a reader was given the version of `lsn`.
    pub fn gave(&mut self, key: PageKey, lsn: Lsn) {
        let given = self.given.entry(key).or_default();
        *given = lsn.max(*given);
    }
}
