//! Drives shards like a parked thread, which turns them only when something has arrived or a
//! deadline has come: for tests of what a shard waits for, and of what wakes it.
//!
//! Invariants
//! 1. A shard that is never woken is an error, and so is one whose deadline is due twice in a row
//!    without work.
//! 2. Every eighth round audits all counters of the shards.
//!
//! It knows no crashes, and no chance but the disk's: see `run`.

use super::disk::SimDisk;
use super::run::Outcome;
use crate::base::error::Result as StoreResult;
use crate::base::options::{Geometry, Options};
use crate::base::{BLOCK, Micros, PageId, PageKey, ShardId, ShardMap, VolumeId};
use crate::engine::order::GlobalOrder;
use crate::engine::{Change, Commit, PageRef, Request, Response, Shard, Token};
use crate::testing::local_cluster::LocalCluster;
use bytes::Bytes;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Rounds without effect count as spinning if they are closer together than this, and if there are
/// more in a row than each shard needs to see that it has nothing to do.
const SPIN_US: Micros = 1_000;
const IDLE_ROUNDS_MAX: usize = 2;
/// The longest virtual time that anything takes on a device that works.
pub(super) const PATIENCE_US: Micros = 60_000_000;
/// A store whose shards all run on one thread, parked in between.
pub(super) struct ParkedCluster {
    pub(super) disk: SimDisk,
    pub(super) all: LocalCluster,
    pub(super) order: Arc<GlobalOrder>,
    pub(super) shard_map: ShardMap,
    pub(super) now: Micros,
    token: u64,
    busy: bool,
    /// When the last round took place, if it had no effect.
    idle_at: Option<Micros>,
    idle_rounds: usize,
    pub(super) rounds: u64,
    pub(super) answers: BTreeMap<Token, StoreResult<Response>>,
}

impl ParkedCluster {
    pub(super) fn open(
        disk: SimDisk,
        options: &Options,
        shards_count: u16,
    ) -> Outcome<ParkedCluster> {
        let opening =
            crate::engine::recovery::begin(&mut disk.clone(), options, shards_count, 7, disk.now())
                .map_err(|error| format!("opening: {error}"))?;
        let all = LocalCluster::new(opening.shards);
        let (now, shard_map) = (disk.now(), all.shards[0].shard_map());
        let answers = BTreeMap::new();
        let order = opening.order;
        let mut cluster = ParkedCluster {
            disk,
            all,
            order,
            shard_map,
            now,
            token: 0,
            busy: true,
            idle_at: None,
            idle_rounds: 0,
            rounds: 0,
            answers,
        };
        let end = now + PATIENCE_US;
        while !cluster.all.shards.iter().all(Shard::is_open) {
            cluster.poll_once()?;
            if let Some(error) = cluster.all.shards.iter().find_map(Shard::failure) {
                return Err(format!("opening: {error}"));
            }
            if cluster.now > end {
                return Err(format!("opening has no end: {}", cluster.describe()));
            }
        }
        Ok(cluster)
    }

    pub(super) fn describe(&self) -> String {
        let shards = self.all.shards.iter();
        shards
            .map(|shard| format!("\n  deadline {:?}: {}", shard.deadline(), shard.dump_state()))
            .collect()
    }

    /// Advances time to the next event, and runs a round.
    pub(super) fn poll_once(&mut self) -> Outcome {
        let watermark = self.order.watermark();
        let shards = self.all.shards.iter();
        let woken =
            shards.clone().any(|shard| shard.waits_for().is_some_and(|lsn| lsn <= watermark));
        let deadline = shards.filter_map(Shard::deadline).chain(self.disk.next_due()).min();
        let at = match self.busy || woken {
            true => self.now,
            false => {
                deadline.ok_or_else(|| format!("nobody wakes a shard: {}", self.describe()))?
            }
        };
        self.now = at.max(self.now + 1);
        self.disk.advance_to(self.now);
        self.busy = self.all.poll_once(&mut self.disk, self.now);
        let before = std::mem::replace(&mut self.idle_at, (!self.busy).then_some(self.now));
        self.idle_rounds = match (before, self.idle_at) {
            (Some(before), Some(now)) if now < before + SPIN_US => self.idle_rounds + 1,
            _ => 0,
        };
        if self.idle_rounds >= IDLE_ROUNDS_MAX * self.all.shards.len() {
            return Err(format!(
                "{} rounds in a row did nothing, at {}: {}",
                self.idle_rounds,
                self.now,
                self.describe()
            ));
        }
        self.rounds += 1;
        if self.rounds.is_multiple_of(8) {
            self.all.shards.iter().try_for_each(Shard::audit)?;
        }
        self.answers.extend(self.all.replies.drain(..));
        Ok(())
    }

    pub(super) fn ask(&mut self, request: Request) -> Token {
        self.token += 1;
        let shard = match &request {
            Request::Read(keys) => self.shard_map.shard_of(keys[0]),
            Request::Commit(commit) => self.shard_map.shard_of(commit.changes[0].0),
            _ => ShardId::LEADER,
        };
        self.all.request(shard, Token(self.token), request);
        self.busy = true;
        Token(self.token)
    }

    pub(super) fn answer(&mut self, token: Token) -> Outcome<StoreResult<Response>> {
        let end = self.now + PATIENCE_US;
        loop {
            if let Some(answer) = self.answers.remove(&token) {
                return Ok(answer);
            }
            if self.now > end {
                return Err(format!("no answer to {token:?}: {}", self.describe()));
            }
            self.poll_once()?;
        }
    }

    pub(super) fn call(&mut self, request: Request) -> Outcome<StoreResult<Response>> {
        let token = self.ask(request);
        self.answer(token)
    }

    /// Runs for some time.
    pub(super) fn pass(&mut self, us: Micros) -> Outcome {
        let end = self.now + us;
        while self.now < end
            && (self.busy || self.disk.in_flight() > 0 || self.next_deadline().is_some())
        {
            self.poll_once()?;
        }
        Ok(())
    }

    fn next_deadline(&self) -> Option<Micros> {
        self.all.shards.iter().filter_map(Shard::deadline).min()
    }

    pub(super) fn commit(&mut self, changes: Vec<(PageKey, Change)>, durable: bool) -> Outcome {
        match self.call(Request::Commit(Commit { reads: Vec::new(), changes, durable }))? {
            Ok(_) => Ok(()),
            Err(error) => Err(format!("a commit is refused: {error}: {}", self.describe())),
        }
    }

    /// Writes the first `pages` pages, `each` in a commit; each page is full of its number.
    pub(super) fn fill(&mut self, pages: u64, each: usize) -> Outcome {
        let first =
            |at: u64| (at..(at + each as u64).min(pages)).map(|n| (key(n), put(n))).collect();
        (0..pages).step_by(each).try_for_each(|at| self.commit(first(at), true))
    }

    pub(super) fn read(&mut self, key: PageKey) -> Outcome<StoreResult<PageRef>> {
        Ok(self.call(Request::Read(smallvec::smallvec![key]))?.map(|response| match response {
            Response::Pages(pages) => pages[0].clone(),
            other => panic!("{other:?}"),
        }))
    }

    pub(super) fn checkpoint(&mut self) -> Outcome {
        match self.call(Request::Checkpoint)? {
            Ok(_) => Ok(()),
            Err(error) => Err(format!("a checkpoint fails: {error}: {}", self.describe())),
        }
    }
}

pub(super) fn key(page: u64) -> PageKey {
    PageKey::new(VolumeId::new(1), PageId::new(page))
}

pub(super) fn put(byte: u64) -> Change {
    Change::Put(Bytes::from(vec![byte as u8; BLOCK]))
}

pub(super) fn patch(byte: u64) -> Change {
    Change::Patch { offset: 0, bytes: Bytes::from(vec![byte as u8; 64]) }
}

pub(super) fn options() -> Options {
    let geometry = Geometry {
        extent_bytes: 256 << 10,
        segment_bytes: 2 << 20,
        segments_count: 8,
        vshards_count: 8,
    };
    Options { geometry, memory_bytes: 32 << 20, shards: Some(1), ..Options::default() }
}

/// Options with the least legal memory, and one virtual shard: one tree for each volume.
pub(super) fn tiny() -> Options {
    let geometry = Geometry { vshards_count: 1, ..options().geometry };
    Options { geometry, memory_bytes: super::strain::MEMORY_LEAST, ..options() }
}

pub(super) fn must(outcome: Outcome) {
    outcome.unwrap_or_else(|why| panic!("{why}"));
}
