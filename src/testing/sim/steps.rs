//! The steps of a run: it sends requests, advances time, and passes answers to the oracle.
//!
//! Invariants
//! 1. After a turn the oracle gets the allocated LSNs first, then the watermark, and only then the
//!    answers.
//! 2. A request goes to one shard, as the handles of the store route it: reads are split, and all
//!    shards are asked for counters.
//! 3. Time moves only to the next event, or over a pause without requests.

use super::cluster::Cluster;
use super::host::Turn;
use super::run::{Outcome, SimRun};
use super::workload::PrepareRequest;
use crate::base::error::{ErrorKind, Result as StoreResult};
use crate::base::metrics::ShardStats;
use crate::base::mix::mix;
use crate::base::{Micros, PageId, PageKey, ShardId, ShardMap, VolumeId};
use crate::engine::{Commit, PageRange, PageRef, Request, Response, Token};
use smallvec::SmallVec;
use std::collections::BTreeMap;

/// With fewer pinned pages than one in `HELD_MANY` frames of a shard, no request may be refused
/// because of them.
const HELD_MANY: u64 = 20;
/// The longest time that a request may take without errors of the device, if no shard is slow.
const PATIENCE_US: Micros = 60_000_000;

/// Groups pages by shard, in the order given.
fn by_shard(shard_map: ShardMap, keys: &[PageKey]) -> BTreeMap<ShardId, Vec<PageKey>> {
    let mut shares: BTreeMap<ShardId, Vec<PageKey>> = BTreeMap::new();
    for &key in keys {
        shares.entry(shard_map.shard_of(key)).or_default().push(key);
    }
    shares
}

impl SimRun {
    /// Sends a request, or lets time pass.
    pub(super) fn step(&mut self) -> Outcome {
        if self.oracle.outstanding() < self.workload.profile.in_flight && self.rng.chance(60) {
            if self.strain() {
                return Ok(());
            }
            let ask = self.workload.next_ask();
            if ask == PrepareRequest::Idle {
                return self.idle();
            }
            let request = self.workload.request(ask, &self.oracle);
            self.ask(request);
            // Several requests may be in progress before any shard turns.
            if self.rng.one_in(3) && self.oracle.outstanding() < self.workload.profile.in_flight {
                return Ok(());
            }
        }
        self.pass()
    }

    pub(super) fn cluster(&mut self) -> &mut Cluster {
        self.cluster.as_mut().expect("the store is open")
    }

    /// Sends a request to the shard, or the shards, that it concerns; returns the token of the last
    /// part.
    pub(super) fn ask(&mut self, request: Request) -> Token {
        let shard_map = self.cluster().shard_map();
        match request {
            Request::Read(keys) => {
                let mut token = Token(0);
                for (shard, keys) in by_shard(shard_map, &keys) {
                    token = self.ask_shard(shard, Request::Read(keys.into()));
                }
                token
            }
            Request::Stats => {
                let mut token = Token(0);
                for shard in shard_map.shards() {
                    token = self.ask_shard(shard, Request::Stats);
                }
                token
            }
            other => {
                let shard = self.route(&other);
                self.ask_shard(shard, other)
            }
        }
    }

    /// The shard for a request that is not split.
    fn route(&mut self, request: &Request) -> ShardId {
        let shard_map = self.cluster().shard_map();
        let (stray, idle) = (self.cluster().timing.stray_percent, self.cluster().timing.idle);
        let home = match request {
            Request::Checkpoint | Request::Close => return ShardId::new(0),
            Request::Commit(Commit { reads, changes, .. }) => {
                let first = changes
                    .iter()
                    .map(|&(key, _)| key)
                    .chain(reads.iter().map(|&(key, _)| key))
                    .next();
                first.map(|key| shard_map.shard_of(key)).filter(|_| !self.rng.chance(stray))
            }
            _ => None,
        };
        home.unwrap_or_else(|| {
            let any = ShardId::new(self.rng.below(u64::from(shard_map.shards_count())) as u16);
            if Some(any) == idle { ShardId::new(0) } else { any }
        })
    }

    /// Hands a request to a shard.
    pub(super) fn ask_shard(&mut self, shard: ShardId, request: Request) -> Token {
        self.next_token += 1;
        let token = Token(self.next_token);
        self.run_stats.requests += 1;
        self.oracle.on_request(token, &request, shard, self.disk.now());
        self.cluster().request(shard, token, request);
        token
    }

    /// Advances time to the next event, and lets a shard turn if one is due.
    pub(super) fn pass(&mut self) -> Outcome {
        let turn = self.cluster().step().map_err(|why| format!("{why}\n{}", self.waiting()))?;
        self.check_disk()?;
        let Some(turn) = turn else {
            return match self.oracle.outstanding() {
                0 => Ok(()),
                _ => {
                    Err(format!("nothing is in flight and no deadline is set: {}", self.waiting()))
                }
            };
        };
        let patience = PATIENCE_US * self.cluster().timing.patience();
        if self.oracle.oldest_at().is_some_and(|since| self.disk.now() > since + patience) {
            return Err(format!("no answer for {} s: {}", patience / 1_000_000, self.waiting()));
        }
        self.judge(turn)
    }

    /// Passes the results of a turn to the oracle.
    fn judge(&mut self, turn: Turn) -> Outcome {
        for &(token, lsn) in &turn.allocated {
            self.oracle.on_allocated(token, lsn)?;
        }
        let watermark = self.cluster().watermark();
        let newest = self.cluster().newest();
        self.oracle.on_watermark(watermark, newest)?;
        for (token, reply) in turn.replies {
            if self.oracle.is_spread(token) {
                let mark = self.cluster().mark(turn.shard);
                self.lingering.push((token, mark));
            }
            self.answer(turn.shard, token, reply)?;
        }
        let cluster = self.cluster.as_ref().expect("the store is open");
        let oracle = &mut self.oracle;
        self.lingering.retain(|(token, mark)| {
            let over = cluster.reached(mark);
            if over {
                oracle.on_let_go(*token);
            }
            !over
        });
        Ok(())
    }

    fn waiting(&self) -> String {
        let oldest = self.oracle.oldest().unwrap_or_else(|| "nobody".into());
        let shards = self.cluster.as_ref().map(Cluster::describe).unwrap_or_default();
        format!("{} wait, the first of them {oldest}; {shards}", self.oracle.outstanding())
    }

    fn answer(&mut self, shard: ShardId, token: Token, reply: StoreResult<Response>) -> Outcome {
        let asked_for = self.oracle.keys_of(token);
        self.oracle.on_reply(token, &reply)?;
        let kind = reply.as_ref().err().map_or(0, |error| error.kind() as u64 + 1);
        self.run_stats.trace =
            mix(self.run_stats.trace ^ token.0 ^ (kind << 32) ^ (self.disk.now() << 40));
        if let Ok(Response::Stats(stats)) = &reply {
            self.stats.insert(shard, stats.as_ref().clone());
        }
        if let Some(answer) = self.watched.get_mut(&token) {
            *answer = Some(reply);
            return Ok(());
        }
        if self.strain.drop_percent > 0 && self.chance.chance(self.strain.drop_percent) {
            self.run_stats.rare.answers_dropped += 1;
            return Ok(());
        }
        if reply.as_ref().is_err_and(|error| error.kind() == ErrorKind::Busy) {
            let rare = &mut self.run_stats.rare;
            let cluster = self.cluster.as_ref().expect("the store is open");
            let frames = cluster.frames() / u64::from(cluster.shard_map().shards_count());
            let few = self.held.len() as u64 * HELD_MANY < frames;
            *if few { &mut rare.busy_without_pins } else { &mut rare.busy_by_pins } += 1;
        }
        if let Ok(Response::Pages(pages)) = reply {
            for (key, page) in asked_for.into_iter().zip(pages) {
                self.workload.on_read(key, page.version());
                if self.rng.one_in(8) && self.held.len() < 16 {
                    self.hold(page);
                } else {
                    self.hold_on(page);
                }
            }
        }
        if self.rng.one_in(8) {
            self.let_go(1)?;
        }
        self.give_some_back()
    }

    /// A pause without requests.
    pub(super) fn idle(&mut self) -> Outcome {
        let until = self.disk.now() + self.rng.within(100, 200_000);
        while !self.disk.is_off() {
            match self.cluster().next_at() {
                Some(at) if at <= until => self.pass()?,
                _ => break,
            }
        }
        self.disk.advance_to(until);
        Ok(())
    }

    /// Runs until every request is answered.
    pub(super) fn publish_to_map(&mut self) -> Outcome {
        while self.oracle.outstanding() > 0 && !self.disk.is_off() {
            self.pass()?;
        }
        Ok(())
    }

    /// Sends a request that is not split and waits for the answer, which the oracle checks like all
    /// others.
    pub(super) fn call(&mut self, request: Request) -> Outcome<StoreResult<Response>> {
        let token = self.ask(request);
        self.watch(token);
        self.wait_for(token)
    }

    /// Keeps the answer, when it comes, for [`wait_for`](Self::wait_for).
    pub(super) fn watch(&mut self, token: Token) {
        self.watched.insert(token, None);
    }

    /// Waits for an answer that is [watched](Self::watch) for.
    pub(super) fn wait_for(&mut self, token: Token) -> Outcome<StoreResult<Response>> {
        loop {
            if let Some(answer) = self.watched.get_mut(&token).and_then(Option::take) {
                self.watched.remove(&token);
                return Ok(answer);
            }
            if self.disk.is_off() {
                return Err("the power failed while an answer was waited for".into());
            }
            self.pass()?;
        }
    }

    /// The counters of all shards together, as of now.
    pub(super) fn stats_now(&mut self) -> Outcome<ShardStats> {
        for shard in self.cluster().shard_map().shards() {
            let token = self.ask_shard(shard, Request::Stats);
            self.watch(token);
            match self.wait_for(token)?.map_err(|error| error.to_string())? {
                Response::Stats(stats) => self.stats.insert(shard, *stats),
                other => return Err(format!("counters asked for, {other:?} given")),
            };
        }
        Ok(self.stats_told())
    }

    /// The sum of the newest counters that each shard has given.
    pub(super) fn stats_told(&self) -> ShardStats {
        self.stats.values().fold(ShardStats::default(), |sum, one| ShardStats {
            checkpoints: sum.checkpoints + one.checkpoints,
            extents_compacted: sum.extents_compacted + one.extents_compacted,
            pages_moved: sum.pages_moved + one.pages_moved,
            nodes_overtaken: sum.nodes_overtaken + one.nodes_overtaken,
            extents_total: sum.extents_total + one.extents_total,
            extents_free: sum.extents_free + one.extents_free,
            blocks_live: sum.blocks_live + one.blocks_live,
            ..sum
        })
    }

    /// Reads pages without the oracle, in the order given, while nothing else is in progress.
    pub(super) fn read_now(&mut self, keys: &[PageKey]) -> Outcome<Vec<(PageKey, PageRef)>> {
        let mut all = BTreeMap::new();
        for (_, keys) in by_shard(self.cluster().shard_map(), keys) {
            for keys in keys.chunks(self.options.vectored_pages_max) {
                let pages = self.try_read_now(keys)?;
                let pages = pages
                    .map_err(|error| format!("reading {keys:?}: {:?}: {error}", error.kind()))?;
                all.extend(keys.iter().copied().zip(pages));
            }
        }
        Ok(keys.iter().map(|key| (*key, all[key].clone())).collect())
    }

    /// Reads pages of one shard in the same way; an error of the store counts as an answer.
    pub(super) fn try_read_now(
        &mut self,
        keys: &[PageKey],
    ) -> Outcome<StoreResult<SmallVec<[PageRef; 1]>>> {
        let shard = self.cluster().shard_map().shard_of(keys[0]);
        let request = Request::Read(keys.iter().copied().collect());
        match self.ask_now(shard, request).map_err(|why| format!("reading {keys:?}: {why}"))? {
            Ok(Response::Pages(pages)) => Ok(Ok(pages)),
            Ok(other) => Err(format!("reading {keys:?}: {other:?}")),
            Err(error) => Ok(Err(error)),
        }
    }

    /// The pages of a volume that exist, from all shards, in order; scanned in parts of about
    /// `ranges_max` ranges.
    pub(super) fn allocated_now(
        &mut self,
        volume: VolumeId,
        ranges_max: usize,
    ) -> Outcome<Vec<PageId>> {
        let mut all = Vec::new();
        for shard in self.cluster().shard_map().shards() {
            let mut next = Some(PageId::new(0));
            while let Some(first) = next {
                let asked = PageRange { volume, first, last: PageId::new(u64::MAX), ranges_max };
                let request = Request::Allocated(asked);
                match self
                    .ask_now(shard, request)
                    .map_err(|why| format!("asking for what is allocated: {why}"))?
                {
                    Ok(Response::Allocated { ranges, next: then, .. }) => {
                        all.extend(
                            ranges.iter().flat_map(|(a, b)| a.get()..=b.get()).map(PageId::new),
                        );
                        next = then;
                    }
                    other => return Err(format!("asking for what is allocated: {other:?}")),
                }
            }
        }
        all.sort_unstable();
        Ok(all)
    }

    /// Sends a request to a shard without the oracle, while nothing else is in progress.
    fn ask_now(&mut self, shard: ShardId, request: Request) -> Outcome<StoreResult<Response>> {
        self.next_token += 1;
        let token = Token(self.next_token);
        let cluster = self.cluster.as_mut().expect("the store is open");
        cluster.request(shard, token, request);
        for _ in 0..100_000 {
            let turn =
                cluster.step()?.ok_or_else(|| format!("it hangs: {}", cluster.describe()))?;
            if let Some(violation) = cluster.violation() {
                return Err(violation);
            }
            match turn.replies.into_iter().next() {
                None => {}
                Some((of, answer)) if of == token => return Ok(answer),
                Some((of, answer)) => return Err(format!("answered instead: {of:?} {answer:?}")),
            }
        }
        Err(format!("it never ends: {}", cluster.describe()))
    }
}
