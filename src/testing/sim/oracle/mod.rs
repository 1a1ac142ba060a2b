//! The judge: it checks everything that a shard does and answers against the contract.
//!
//! Invariants
//! 1. A commit counts from the moment at which its LSN is allocated; what was read by it must be
//!    current then.
//! 2. `durable` is the highest LSN that any answer said is durable. No crash may take it away. The
//!    watermark is such an answer to all that read it.
//! 3. LSNs allocated only ever rise, over all lives of the store.
//! 4. What a commit over several shards changed may be read as before until it is acknowledged, but
//!    not at its owner; what it holds excuses conflicts (`visibility`). Transactions are exact:
//!    what they read is current at the allocation of its LSN.
//!
//! A judge that can't condemn is worth nothing: `oracle_tests` tells it every lie that it must
//! find, and the canaries show that it finds them in whole runs.
//!
//! It does *not* drive anything.

mod counters;
mod overtaken;
mod pending_requests;
mod visibility;

pub use counters::OracleCounters;

mod verdicts;
use super::model::{Model, Version};
use crate::base::error::Result as StoreResult;
use crate::base::{BLOCK, Lsn, Micros, PageKey, ShardId, ShardMap};
use crate::engine::{Change, Request, Response, Token};
use pending_requests::{Kind, PendingRequest};
use std::collections::BTreeMap;
use visibility::Visibility;

/// A check that passed, or what was wrong.
pub type Verdict = std::result::Result<(), String>;

/// The errors that are no fault of the store in this run.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tolerance {
    /// Whether device errors of any kind were injected: then the store may stop.
    pub io: bool,
    /// Whether space is short.
    pub full: bool,
    /// The most bytes of one commit.
    pub commit_bytes_max: u64,
    /// The most map nodes and new pages that a commit may need in memory at once; 0: any.
    pub commit_frames_max: u64,
    /// The most pages of one read.
    pub read_pages_max: usize,
}

/// The judge.
pub struct Oracle {
    /// The state that it judges by.
    pub model: Model,
    tolerance: Tolerance,
    shard_map: ShardMap,
    /// The LSN with which this life began.
    began: Lsn,
    last: Lsn,
    /// The newest LSN that was allocated, including void ones.
    newest: Lsn,
    /// All commits of this life, in order, for messages and for cuts that are not reported.
    allocated: Vec<(Lsn, Vec<(PageKey, Change)>)>,
    ever: Lsn,
    durable: Lsn,
    /// The answer that said so.
    promise: &'static str,
    ordered: Lsn,
    closing: bool,
    closed: bool,
    watermark: Lsn,
    pending: BTreeMap<Token, PendingRequest>,
    visibility: Visibility,
    /// Requests and answers so far.
    moment: u64,
    counters: OracleCounters,
}

impl Oracle {
    /// A judge of an empty store.
    pub fn new(tolerance: Tolerance) -> Self {
        Oracle {
            model: Model::default(),
            tolerance,
            shard_map: ShardMap::new(1, 1),
            began: Lsn::ZERO,
            last: Lsn::ZERO,
            newest: Lsn::ZERO,
            allocated: Vec::new(),
            ever: Lsn::ZERO,
            durable: Lsn::ZERO,
            promise: "nobody",
            ordered: Lsn::ZERO,
            closing: false,
            closed: false,
            watermark: Lsn::ZERO,
            pending: BTreeMap::new(),
            visibility: Visibility::default(),
            moment: 0,
            counters: OracleCounters::default(),
        }
    }

    /// The newest LSN allocated in this life.
    pub fn last(&self) -> Lsn {
        self.last
    }

    /// The highest LSN that the store may no longer lose.
    pub fn durable(&self) -> Lsn {
        self.durable
    }

    /// The highest LSN acknowledged, as durable or not.
    pub fn ordered(&self) -> Lsn {
        self.ordered
    }

    /// The counts so far.
    pub fn counters(&self) -> OracleCounters {
        self.counters
    }

    /// Requests without an answer.
    pub fn outstanding(&self) -> usize {
        self.pending.len()
    }

    /// Sets the errors that are tolerated from now on.
    pub fn tolerate(&mut self, tolerance: Tolerance) {
        self.tolerance = tolerance;
    }

    /// The errors that are tolerated now.
    pub fn tolerance(&self) -> Tolerance {
        self.tolerance
    }

    /// Sets which shard has which page from now on.
    pub fn shard_map(&mut self, shard_map: ShardMap) {
        self.shard_map = shard_map;
    }

    /// Called when a request is about to be handed to `shard`.
    pub fn on_request(&mut self, token: Token, request: &Request, shard: ShardId, now: Micros) {
        self.moment += 1;
        let what = Kind::of(request, |key| self.oldest_visible(key).lsn);
        self.closing |= matches!(what, Kind::Close);
        let mut pending = PendingRequest {
            what,
            at: now,
            shard,
            seen: self.last,
            ordered: self.ordered,
            moment: self.moment,
            allocated: None,
            spread: false,
            overtaken: 0,
        };
        if let Kind::Commit(commit) = &pending.what
            && visibility::is_spread(self.shard_map, shard, commit)
        {
            pending.spread = true;
            self.counters.spread_overlaps += u64::from(self.visibility.on_request(token, commit));
        }
        self.pending.insert(token, pending);
    }

    /// The oldest version that a read which is sent now may return.
    fn oldest_visible(&self, key: PageKey) -> &Version {
        let versions = self.model.since(key, Lsn::ZERO);
        let shard = self.shard_map.shard_of(key);
        let unseen = versions[1..]
            .iter()
            .rev()
            .take_while(|v| self.visibility.may_be_unseen(v.lsn, key, shard));
        &versions[versions.len() - 1 - unseen.count()]
    }

    /// Called when the shards say that everything up to `watermark` is durable. The newest LSN
    /// allocated is `newest`; it may be void.
    pub fn on_watermark(&mut self, watermark: Lsn, newest: Lsn) -> Verdict {
        self.newest = newest;
        if watermark < self.watermark {
            return Err(format!("the watermark fell from {:?} to {watermark:?}", self.watermark));
        }
        self.watermark = watermark;
        self.promise(watermark, "the watermark");
        Ok(())
    }

    /// Called when nothing can be held any more for this commit over several shards, which is
    /// answered.
    pub fn on_let_go(&mut self, token: Token) {
        self.moment += 1;
        let oldest =
            self.pending.values().map(|pending| pending.moment).min().unwrap_or(self.moment);
        self.visibility.let_go(token, self.moment, oldest);
    }

    /// Whether this request is a commit over several shards.
    pub fn is_spread(&self, token: Token) -> bool {
        self.pending.get(&token).is_some_and(|pending| pending.spread)
    }

    /// Called when a request has got its LSN.
    pub fn on_allocated(&mut self, token: Token, lsn: Lsn) -> Verdict {
        if lsn <= self.ever {
            return Err(format!(
                "{token:?} allocated {lsn:?}, and {:?} had been used before",
                self.ever
            ));
        }
        let last = std::mem::replace(&mut self.last, lsn);
        self.ever = lsn;
        let Some(pending) = self.pending.get_mut(&token) else {
            return Err(format!("{token:?} allocated {lsn:?} without being under way"));
        };
        if pending.what.must_fail(&self.tolerance) {
            return Err(format!(
                "{token:?} allocated {lsn:?}, and had to be refused: {}",
                pending.what.describe()
            ));
        }
        if let Some(before) = pending.allocated.replace(lsn) {
            return Err(format!("{token:?} allocated {before:?} and then {lsn:?}"));
        }
        let Kind::Commit(commit) = &pending.what else {
            return Err(format!("{token:?}, no commit, allocated {lsn:?}"));
        };
        for &(key, read) in &commit.reads {
            let version = self.model.at(key, last);
            let now = version.told();
            if now != read {
                return Err(format!(
                    "{token:?} committed as {lsn:?}; it read {key:?} at {read:?}, at {now:?} by \
                     then"
                ));
            }
            self.visibility.gave(key, version.lsn);
        }
        if pending.spread {
            self.visibility.allocated(lsn, pending.shard);
            self.counters.spread_drawn += 1;
        }
        self.model.apply(lsn, &commit.changes);
        self.allocated.push((lsn, commit.changes.clone()));
        self.counters.commits_drawn += 1;
        Ok(())
    }

    /// The pages of a read in progress.
    pub fn keys_of(&self, token: Token) -> Vec<PageKey> {
        match self.pending.get(&token) {
            Some(PendingRequest { what: Kind::Read(keys), .. }) => {
                keys.iter().map(|&(key, _)| key).collect()
            }
            _ => Vec::new(),
        }
    }

    /// Called when a request is answered.
    pub fn on_reply(&mut self, token: Token, reply: &StoreResult<Response>) -> Verdict {
        let Some(pending) = self.pending.remove(&token) else {
            return Err(format!(
                "a second answer, or one that nobody waits for: {token:?} {reply:?}"
            ));
        };
        self.moment += 1;
        self.count_overtaken(&pending);
        let verdict = match reply {
            Ok(response) => self.judge(&pending, response),
            Err(error) => self.judge_error(token, &pending, error),
        };
        verdict.map_err(|why| format!("{token:?} {}: {why}", pending.what.describe()))
    }

    /// Called when the power is lost, the process is dead, or a closed store is about to be opened
    /// again.
    pub fn on_crash(&mut self) {
        for pending in
            self.pending.values().filter(|a| a.allocated.is_some_and(|lsn| lsn > self.durable))
        {
            self.counters.in_doubt += 1;
            self.counters.spread_in_doubt += u64::from(pending.spread);
        }
    }

    /// Called when the store continues from the state at `recovered_lsn`; recovery reported
    /// `reported`, which is the same or higher.
    pub fn restart_at(&mut self, recovered_lsn: Lsn, reported: Lsn) {
        for pending in self
            .pending
            .values()
            .filter(|a| a.allocated.is_some_and(|lsn| lsn > self.durable && lsn <= recovered_lsn))
        {
            self.counters.in_doubt_kept += 1;
            self.counters.spread_kept += u64::from(pending.spread);
        }
        self.pending.clear();
        self.visibility = Visibility::default();
        self.watermark = Lsn::ZERO;
        self.model.restart_at(recovered_lsn);
        self.allocated.clear();
        (self.began, self.last, self.newest, self.durable, self.ordered) =
            (recovered_lsn, recovered_lsn, recovered_lsn, recovered_lsn, recovered_lsn);
        self.ever = self.ever.max(reported);
        (self.closing, self.closed) = (false, false);
    }
}

/// Describes where two pages differ, for messages.
fn difference(page: &[u8], expected: Option<&[u8]>) -> String {
    let Some(expected) = expected else { return "which is absent".into() };
    let differs: Vec<usize> = (0..BLOCK).filter(|&i| page[i] != expected[i]).collect();
    match (differs.first(), differs.last()) {
        (Some(first), Some(last)) => {
            format!("{} bytes differ, from {first} to {last}", differs.len())
        }
        _ => "all bytes are the same".into(),
    }
}

impl Model {
    fn justifies_conflict(&self, pending: &PendingRequest) -> bool {
        let Kind::Commit(commit) = &pending.what else { return false };
        commit.reads.iter().any(|&(key, read)| {
            self.since(key, pending.seen).iter().any(|v| v.told() != read)
                || self.since(key, read).len() > 1
        })
    }
}

impl Visibility {
    /// A commit that only writes waits for held pages, and conflicts with nothing.
    fn justifies_conflict(&self, token: Token, pending: &PendingRequest) -> bool {
        let Kind::Commit(commit) = &pending.what else { return false };
        !commit.reads.is_empty() && self.may_have_met(token, commit, pending.moment)
    }
}
