//! Shards driven as by a parked thread, which turns them only when something has arrived or a deadline has come: for tests of who
//! waits for what, and who wakes it.
//!
//! Invariants
//! 1. A shard that nobody wakes is an error, and so is one whose deadline is due for nothing twice in a row.
//! 2. Each few laps all that the shards count is counted anew.
//!
//! It knows no crashes, and no chance but the disk's: see `world`.

use super::disk::SimDisk;
use super::world::Outcome;
use crate::base::error::Result as StoreResult;
use crate::base::options::{Geometry, Options};
use crate::base::{BLOCK, Deal, Micros, PageId, PageKey, ShardId, VolumeId};
use crate::engine::order::GlobalOrder;
use crate::engine::{Change, Commit, PageRef, Request, Response, Shard, Token};
use crate::testing::local_cluster::LocalCluster;
use bytes::Bytes;
use std::collections::BTreeMap;
use std::sync::Arc;

/// More laps in a row without any effect than each shard's last look around, closer than this, are a spin.
const SPIN_US: Micros = 1_000;
const IDLE_LAPS_MAX: usize = 2;
/// Nothing takes longer, in virtual time, on a device that works.
pub(super) const PATIENCE_US: Micros = 60_000_000;
/// A store whose shards all run on one thread, parked in between.
pub(super) struct Rig {
    pub(super) disk: SimDisk,
    pub(super) all: LocalCluster,
    pub(super) order: Arc<GlobalOrder>,
    pub(super) deal: Deal,
    pub(super) now: Micros,
    token: u64,
    busy: bool,
    /// When a lap without effect was, if the last was one.
    idle_at: Option<Micros>,
    idle_laps: usize,
    pub(super) laps: u64,
    pub(super) answers: BTreeMap<Token, StoreResult<Response>>,
}

impl Rig {
    pub(super) fn open(disk: SimDisk, options: &Options, shards_count: u16) -> Outcome<Rig> {
        let opening = crate::engine::recovery::begin(&mut disk.clone(), options, shards_count, 7, disk.now())
            .map_err(|error| format!("opening: {error}"))?;
        let all = LocalCluster::new(opening.shards);
        let (now, deal) = (disk.now(), all.shards[0].deal());
        let answers = BTreeMap::new();
        let order = opening.order;
        let mut rig =
            Rig { disk, all, order, deal, now, token: 0, busy: true, idle_at: None, idle_laps: 0, laps: 0, answers };
        let end = now + PATIENCE_US;
        while !rig.all.shards.iter().all(Shard::is_open) {
            rig.lap()?;
            if let Some(error) = rig.all.shards.iter().find_map(Shard::failure) {
                return Err(format!("opening: {error}"));
            }
            if rig.now > end {
                return Err(format!("opening has no end: {}", rig.describe()));
            }
        }
        Ok(rig)
    }

    pub(super) fn describe(&self) -> String {
        let shards = self.all.shards.iter();
        shards.map(|shard| format!("\n  deadline {:?}: {}", shard.deadline(), shard.whereabouts())).collect()
    }

    /// The time of the next event, and a lap.
    pub(super) fn lap(&mut self) -> Outcome {
        let watermark = self.order.watermark();
        let shards = self.all.shards.iter();
        let woken = shards.clone().any(|shard| shard.waits_for().is_some_and(|lsn| lsn <= watermark));
        let deadline = shards.filter_map(Shard::deadline).chain(self.disk.next_due()).min();
        let at = match self.busy || woken {
            true => self.now,
            false => deadline.ok_or_else(|| format!("nobody wakes a shard: {}", self.describe()))?,
        };
        self.now = at.max(self.now + 1);
        self.disk.advance_to(self.now);
        self.busy = self.all.poll_once(&mut self.disk, self.now);
        let before = std::mem::replace(&mut self.idle_at, (!self.busy).then_some(self.now));
        self.idle_laps = match (before, self.idle_at) {
            (Some(before), Some(now)) if now < before + SPIN_US => self.idle_laps + 1,
            _ => 0,
        };
        if self.idle_laps >= IDLE_LAPS_MAX * self.all.shards.len() {
            return Err(format!("{} laps in a row did nothing, at {}: {}", self.idle_laps, self.now, self.describe()));
        }
        self.laps += 1;
        if self.laps.is_multiple_of(8) {
            self.all.shards.iter().try_for_each(Shard::audit)?;
        }
        self.answers.extend(self.all.replies.drain(..));
        Ok(())
    }

    pub(super) fn ask(&mut self, request: Request) -> Token {
        self.token += 1;
        let shard = match &request {
            Request::Read(keys) => self.deal.shard_of(keys[0]),
            Request::Commit(commit) => self.deal.shard_of(commit.changes[0].0),
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
            self.lap()?;
        }
    }

    pub(super) fn call(&mut self, request: Request) -> Outcome<StoreResult<Response>> {
        let token = self.ask(request);
        self.answer(token)
    }

    /// Goes on for some time.
    pub(super) fn pass(&mut self, us: Micros) -> Outcome {
        let end = self.now + us;
        while self.now < end && (self.busy || self.disk.in_flight() > 0 || self.next_deadline().is_some()) {
            self.lap()?;
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
        let first = |at: u64| (at..(at + each as u64).min(pages)).map(|n| (key(n), put(n))).collect();
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
    let geometry = Geometry { extent_bytes: 256 << 10, segment_bytes: 2 << 20, segments_count: 8, vshards_count: 8 };
    Options { geometry, memory_bytes: 32 << 20, shards: Some(1), ..Options::default() }
}

/// The same with the least memory that is legal, and one virtual shard: one tree for each volume.
pub(super) fn tiny() -> Options {
    let geometry = Geometry { vshards_count: 1, ..options().geometry };
    Options { geometry, memory_bytes: super::strain::MEMORY_LEAST, ..options() }
}

pub(super) fn must(outcome: Outcome) {
    outcome.unwrap_or_else(|why| panic!("{why}"));
}
