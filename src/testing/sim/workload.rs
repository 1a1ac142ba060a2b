//! The requests of a run's clients: swarm-style, with another mix for every seed.
//!
//! Invariants
//! 1. A seed draws its universe, its weights and its options once; many seeds leave out whole kinds
//!    of requests, because some bugs show only where the others don't interfere (Groce et al.,
//!    "Swarm Testing", 2012).
//! 2. Every request follows from the model and the seed alone, so that a run can be repeated.
//!
//! It does *not* submit anything or know time.

use super::model::{page_bytes, patch_bytes};
use super::oracle::Oracle;
use crate::base::options::{Geometry, Options, SHARD_MEMORY_MIN, TABLE_BYTES_PER_FRAME};
use crate::base::{BLOCK, Lsn, PageId, PageKey, ShardId, ShardMap, VolumeId};
use crate::engine::{Change, Commit, Request};
use crate::testing::random::Rng;
use bytes::Bytes;
use std::collections::BTreeMap;

/// The kinds of requests, in the order of `Profile::weights`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PrepareRequest {
    /// Writes one whole page.
    Put,
    /// Writes several whole pages, often more than go into the log.
    PutMany,
    /// Patches some bytes of one page.
    Patch,
    /// Patches some bytes of several pages, or of one several times.
    PatchMany,
    /// Frees one to three pages.
    Free,
    /// A transaction that reads and changes.
    Transact,
    /// A transaction whose reads are stale on purpose.
    TransactStale,
    /// A transaction that only reads.
    Observe,
    /// Reads one page.
    Read,
    /// Reads several pages.
    ReadMany,
    /// A flush.
    Flush,
    /// Waits for an LSN that was acknowledged.
    WaitDurable,
    /// A checkpoint.
    Checkpoint,
    /// Counters.
    Stats,
    /// An invalid request.
    Wrong,
    /// A commit that is too large.
    TooLarge,
    /// No request for a while.
    Idle,
}

pub(super) const ASKS: [(PrepareRequest, u32); 17] = [
    (PrepareRequest::Put, 20),
    (PrepareRequest::PutMany, 10),
    (PrepareRequest::Patch, 20),
    (PrepareRequest::PatchMany, 8),
    (PrepareRequest::Free, 6),
    (PrepareRequest::Transact, 12),
    (PrepareRequest::TransactStale, 3),
    (PrepareRequest::Observe, 4),
    (PrepareRequest::Read, 12),
    (PrepareRequest::ReadMany, 5),
    (PrepareRequest::Flush, 3),
    (PrepareRequest::WaitDurable, 2),
    (PrepareRequest::Checkpoint, 1),
    (PrepareRequest::Stats, 1),
    (PrepareRequest::Wrong, 1),
    (PrepareRequest::TooLarge, 1),
    (PrepareRequest::Idle, 2),
];

/// One seed's way of using the store.
#[derive(Clone, Debug)]
pub struct Profile {
    /// The pages that are used.
    pub universe: Vec<PageKey>,
    /// The weight of every kind of request.
    pub weights: Vec<u32>,
    /// The most requests in progress.
    pub in_flight: usize,
    /// The percentage of commits that are durable.
    pub durable_percent: u64,
    /// The percentage of changes that go to the first few pages.
    pub hot_percent: u64,
    /// The percentage of commits that change pages of one shard only.
    pub local_percent: u64,
    /// The most pages of one commit.
    pub pages_max: u64,
}

impl Profile {
    /// The profile of a seed.
    pub fn random(rng: &mut Rng) -> Self {
        let mut weights: Vec<u32> = ASKS.iter().map(|&(_, weight)| weight).collect();
        for weight in &mut weights {
            match rng.below(10) {
                0 | 1 => *weight = 0,
                2 => *weight *= 8,
                _ => {}
            }
        }
        // Something must be written and something be read, or there is nothing to judge.
        let write = rng.below(4) as usize;
        weights[write] = weights[write].max(10);
        weights[8] = weights[8].max(5);
        Profile {
            universe: universe(rng),
            weights,
            in_flight: *rng.pick(&[1, 2, 4, 8, 16, 32]),
            durable_percent: *rng.pick(&[0, 10, 50, 90, 100]),
            hot_percent: *rng.pick(&[0, 0, 50, 90]),
            local_percent: *rng.pick(&[0, 20, 90]),
            pages_max: rng.within(2, 20),
        }
    }
}

impl Profile {
    /// The same profile with less of everything, but with something left that writes.
    pub fn smaller(mut self, smaller: &Smaller) -> Self {
        if smaller.pages > 0 {
            self.universe.truncate(smaller.pages);
        }
        if smaller.in_flight > 0 {
            self.in_flight = self.in_flight.min(smaller.in_flight);
        }
        for kind in (0..self.weights.len()).filter(|kind| smaller.without & 1 << kind != 0) {
            // Some kind of request must be left.
            if self.weights.iter().filter(|weight| **weight > 0).count() > 1 {
                self.weights[kind] = 0;
            }
        }
        self
    }
}

/// Two volumes with clustered and lone page ids; the clusters are in several virtual shards.
fn universe(rng: &mut Rng) -> Vec<PageKey> {
    let mut pages = std::collections::BTreeSet::new();
    for volume in 1..=2 {
        let count = rng.within(20, 100);
        let clusters = rng.within(1, 6);
        let start = *rng.pick(&[0, 1, 500, 1 << 20, u64::MAX - 4_000]);
        let lone_percent = *rng.pick(&[0, 5, 20]);
        for n in 0..count {
            let any = rng.draw();
            let id = match rng.chance(lone_percent) {
                true => *rng.pick(&[any, n << 9, n << 18, 1 << (n % 64), u64::MAX - n]),
                false => start.wrapping_add((n % clusters) * 600 + n / clusters),
            };
            pages.insert(PageKey::new(VolumeId::new(volume), PageId::new(id)));
        }
    }
    let mut pages: Vec<PageKey> = pages.into_iter().collect();
    for n in (1..pages.len()).rev() {
        pages.swap(n, rng.below(n as u64 + 1) as usize);
    }
    pages
}

/// The memory of a shard that has this many MiB of frames; the valid minimum counts frames alone.
pub fn memory_for(frames_mib: u64) -> u64 {
    match frames_mib << 20 {
        least @ SHARD_MEMORY_MIN => least,
        frames => frames / BLOCK as u64 * (BLOCK as u64 + TABLE_BYTES_PER_FRAME),
    }
}

/// Small and odd options: bounds are reached quickly.
pub fn options(rng: &mut Rng) -> Options {
    Options {
        geometry: Geometry {
            extent_bytes: *rng.pick(&[64, 64, 128]) * 1024,
            segment_bytes: *rng.pick(&[64, 64, 64, 128, 256]) * 1024,
            segments_count: rng.within(4, 6) as u32,
            vshards_count: *rng.pick(&[1, 2, 4, 8, 8, 16]),
        },
        memory_bytes: memory_for(rng.within(2, 4)),
        coalesce_window_us: rng.within(1_000, 10_000),
        coalesce_batch_pages: rng.within(1, 64) as usize,
        vectored_pages_max: rng.within(8, 64) as usize,
        log_writes_max: rng.within(1, 8) as usize,
        inline_pages_max: *rng.pick(&[0, 1, 4, 4, 16]),
        txn_bytes_max: *rng.pick(&[128 << 10, 256 << 10, 4 << 20]),
        data_bytes_max: 0,
        fill_percent: *rng.pick(&[40, 70, 70, 85]),
        requests_max: rng.within(32, 64) as usize,
        ..Options::default()
    }
}

/// The parts of a profile that are left out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Smaller {
    /// The most pages that are used; 0: all.
    pub pages: usize,
    /// The most requests in progress; 0: as the profile says.
    pub in_flight: usize,
    /// Kinds of requests that are left out, a bit for each, in the order of the workload.
    pub without: u32,
}

/// Makes requests.
pub struct Workload {
    /// The profile that it follows.
    pub profile: Profile,
    /// The options in force.
    pub options: Options,
    rng: Rng,
    tag: u64,
    shard_map: ShardMap,
    /// A shard whose pages no request touches in this life.
    idle: Option<ShardId>,
    txn_bytes_max: u64,
    /// The newest LSN that a reader got for each page; it may be stale by now.
    told: BTreeMap<PageKey, Lsn>,
}

impl Workload {
    /// The workload of a profile.
    pub fn new(profile: Profile, options: Options, rng: Rng) -> Self {
        let (shard_map, txn_bytes_max) = (ShardMap::new(1, 1), BLOCK as u64);
        Workload {
            profile,
            options,
            rng,
            tag: 0,
            shard_map,
            idle: None,
            txn_bytes_max,
            told: BTreeMap::new(),
        }
    }

    /// Called when the store is open, dealt out in this way; no request may touch the pages of
    /// `idle`.
    pub fn begin_life(&mut self, shard_map: ShardMap, idle: Option<ShardId>, txn_bytes_max: u64) {
        let touched = |key: &PageKey| Some(shard_map.shard_of(*key)) != idle;
        self.idle = idle.filter(|_| self.profile.universe.iter().any(touched));
        (self.shard_map, self.txn_bytes_max) = (shard_map, txn_bytes_max);
    }

    /// Remembers the version that a reader got.
    pub fn on_read(&mut self, key: PageKey, lsn: Lsn) {
        self.told.insert(key, lsn);
    }

    /// Called when the store was opened again: what was read before is void.
    pub fn on_restart(&mut self) {
        self.told.clear();
    }

    /// Draws what to do next.
    pub fn next_ask(&mut self) -> PrepareRequest {
        ASKS[self.rng.weighted(&self.profile.weights)].0
    }

    /// Makes the request for it.
    pub fn request(&mut self, ask: PrepareRequest, oracle: &Oracle) -> Request {
        let many = self.rng.within(2, self.profile.pages_max.min(self.commit_pages_max()).max(2));
        match ask {
            PrepareRequest::Put => self.commit(1, |w| w.put()),
            PrepareRequest::PutMany => self.commit(many, |w| w.put()),
            PrepareRequest::Patch => self.commit(1, |w| w.patch()),
            PrepareRequest::PatchMany => self.commit(many, |w| w.patch()),
            PrepareRequest::Free => {
                let count = self.rng.within(1, 3);
                self.commit(count, |_| Change::Free)
            }
            PrepareRequest::Transact => self.transact(oracle, false),
            PrepareRequest::TransactStale => self.transact(oracle, true),
            PrepareRequest::Observe => {
                let reads = self.reads(oracle, many);
                Request::Commit(Commit { reads, changes: Vec::new(), durable: true })
            }
            PrepareRequest::Read => Request::Read([self.key()].into_iter().collect()),
            PrepareRequest::ReadMany => {
                let most = many.min(self.options.vectored_pages_max as u64);
                Request::Read((0..most).map(|_| self.key()).collect())
            }
            PrepareRequest::Flush => Request::Flush,
            PrepareRequest::WaitDurable => Request::WaitDurable(oracle.ordered()),
            PrepareRequest::Checkpoint => Request::Checkpoint,
            PrepareRequest::Stats | PrepareRequest::Idle => Request::Stats,
            PrepareRequest::Wrong => self.wrong(),
            PrepareRequest::TooLarge => {
                let count = self.commit_pages_max() + 1;
                self.commit(count, |w| w.put())
            }
        }
    }

    /// The most pages that one commit may change.
    pub(super) fn commit_pages_max(&self) -> u64 {
        self.txn_bytes_max / BLOCK as u64
    }

    fn key(&mut self) -> PageKey {
        let hot = self.rng.chance(self.profile.hot_percent);
        let among =
            if hot { 6.min(self.profile.universe.len()) } else { self.profile.universe.len() };
        let start = self.rng.below(among as u64) as usize;
        // The next one, if it belongs to the idle shard.
        let universe = &self.profile.universe;
        let all = universe[start..].iter().chain(&universe[..start]);
        *all.into_iter()
            .find(|key| self.is_touched(key))
            .expect("not all pages belong to the idle shard")
    }

    /// Whether the page is not the idle shard's.
    pub(super) fn is_touched(&self, key: &PageKey) -> bool {
        self.idle.is_none_or(|idle| self.shard_map.shard_of(*key) != idle)
    }

    /// A page of the same shard as `near`, if one is found soon.
    fn key_near(&mut self, near: PageKey) -> PageKey {
        let shard = self.shard_map.shard_of(near);
        let shard_map = self.shard_map;
        (0..8).map(|_| self.key()).find(|key| shard_map.shard_of(*key) == shard).unwrap_or(near)
    }

    fn commit(&mut self, count: u64, mut change: impl FnMut(&mut Self) -> Change) -> Request {
        let first = self.key();
        let local = self.rng.chance(self.profile.local_percent);
        let mut changes = Vec::with_capacity(count as usize);
        for n in 0..count {
            let key = match (n, local) {
                (0, _) => first,
                (_, true) => self.key_near(first),
                (_, false) => self.key(),
            };
            let change = match change(self) {
                Change::Put(_) => self.put_to(key),
                other => other,
            };
            changes.push((key, change));
        }
        let durable = self.rng.chance(self.profile.durable_percent);
        Request::Commit(Commit { reads: Vec::new(), changes, durable })
    }

    /// A whole page, which is filled in once it is known which.
    fn put(&mut self) -> Change {
        Change::Put(Bytes::new())
    }

    /// A whole page, unlike any other.
    pub(super) fn put_to(&mut self, key: PageKey) -> Change {
        self.tag += 1;
        Change::Put(page_bytes(key, self.tag))
    }

    fn patch(&mut self) -> Change {
        self.tag += 1;
        let most = *self.rng.pick(&[1, 16, 200, 200, 1000, BLOCK as u64]);
        let len = self.rng.within(1, most);
        let offset = self.rng.below(BLOCK as u64 - len + 1) as u32;
        Change::Patch { offset, bytes: patch_bytes(self.tag, len as usize) }
    }

    fn transact(&mut self, oracle: &Oracle, stale: bool) -> Request {
        let count = self.rng.within(1, self.commit_pages_max().min(6));
        let Request::Commit(mut commit) = self.commit(count, |w| match w.rng.below(8) {
            0 => Change::Free,
            1..=3 => w.put(),
            _ => w.patch(),
        }) else {
            unreachable!("a commit was made");
        };
        let count = self.rng.within(1, 5);
        commit.reads = self.reads(oracle, count);
        if self.rng.one_in(2) {
            let written = commit.changes[0].0;
            commit.reads.push((written, oracle.model.at(written, oracle.last()).told()));
        }
        if stale {
            let read = &mut commit.reads[0].1;
            *read = match self.rng.below(3) {
                0 => Lsn::ZERO,
                1 => read.before(),
                _ => Lsn::new(self.rng.within(1, oracle.last().get() + 1)),
            };
        }
        Request::Commit(commit)
    }

    /// Reads as a client has them: mostly current, some of earlier versions.
    fn reads(&mut self, oracle: &Oracle, count: u64) -> Vec<(PageKey, Lsn)> {
        let mut reads: BTreeMap<PageKey, Lsn> = BTreeMap::new();
        for _ in 0..count {
            let key = self.key();
            let now = oracle.model.at(key, oracle.last()).told();
            let told = self.told.get(&key).copied().filter(|_| self.rng.one_in(2));
            reads.insert(key, told.unwrap_or(now));
        }
        reads.into_iter().collect()
    }

    fn wrong(&mut self) -> Request {
        let key = self.key();
        let change = match self.rng.below(4) {
            0 => {
                let count = self.options.vectored_pages_max + 1;
                // The same page each time, since otherwise the read would be split.
                return Request::Read((0..count).map(|_| key).collect());
            }
            1 => Change::Put(patch_bytes(1, BLOCK - 1)),
            2 => Change::Patch { offset: 0, bytes: Bytes::new() },
            _ => Change::Patch { offset: BLOCK as u32 - 3, bytes: patch_bytes(2, 4) },
        };
        let good = (key, self.put_to(key));
        Request::Commit(Commit {
            reads: Vec::new(),
            changes: vec![good, (key, change)],
            durable: true,
        })
    }
}
