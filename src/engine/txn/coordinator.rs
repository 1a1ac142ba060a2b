//! Commits over several shards, at their owner: it asks all shards for votes, allocates the LSN,
//! sends the decision to all, and counts the durable parts.
//!
//! ```text
//! Asking --all Yes--> Decidable --LSN--> Allocated --every part durable--> gone
//!    \--a Conflict or Busy--> Waiting --time--> Asking (a commit that read gets `Conflict` for it)
//!     \--a No--> refused
//! ```
//! Invariants
//! 1. The LSN is allocated only when every vote is in and is `Yes`; after that only the device can
//!    fail.
//! 2. The owner's record is in the group whose run holds the LSN, and names the shards that have
//!    other parts: the commit counts only with all of them.
//! 3. The shard's bound stays at or below the LSN until every part is durable.
//! 4. Votes are requested again only for a bounded time: then the commit gets `Busy`. Long before
//!    that it goes in front of others (see `precedence`).

use crate::base::error::{Error, ErrorKind};
use crate::base::{Lsn, Micros, ShardId, ShardSet};
use crate::engine::Work;
use crate::engine::budget::coordinated_bytes;
use crate::engine::message::{Decision, Message, PrepareRequest, Vote};
use crate::engine::txn::precedence;
use crate::engine::watermark::Outcome;
use crate::engine::{Commit, Lack, Shard, Step, Token};
use smallvec::SmallVec;
use std::collections::{BTreeMap, VecDeque};

/// How long votes for a commit are requested again before it gets `Busy`.
const ASK_FOR_US: Micros = 10_000_000;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Asking,
    Waiting { until: Micros },
    Decidable,
    Allocated,
}

/// A commit over shards in progress.
pub(in crate::engine) struct CoordinatedCommit {
    token: Token,
    durable: bool,
    /// Its part of `Reservations::request_bytes`.
    weight: u64,
    /// The part that each shard is asked to vote on.
    prepares: SmallVec<[(ShardId, PrepareRequest); 2]>,
    state: State,
    votes_left: usize,
    yes: SmallVec<[ShardId; 4]>,
    refusal: Option<Error>,
    held: bool,
    not_now: bool,
    read_lsn: Lsn,
    lsn: Lsn,
    parts_left: usize,
    applied_left: usize,
    attempts: u32,
    /// When not all shards voted for it for the first time: it arrived at the time of the last
    /// turn, which may be long ago.
    refused_first_at: Option<Micros>,
}

impl CoordinatedCommit {
    /// Panics if votes or parts are counted wrongly: an answer would come too early, or never.
    fn assert_state(&self) {
        let asked = self.prepares.len();
        match self.state {
            State::Asking => assert!(
                (1..=asked).contains(&self.votes_left) && self.yes.len() + self.votes_left <= asked,
                "{} votes of {asked} to come, {} yes",
                self.votes_left,
                self.yes.len()
            ),
            State::Waiting { .. } => {
                assert!(self.yes.is_empty() && self.votes_left == 0, "no part waits meanwhile")
            }
            State::Decidable => {
                assert!(
                    self.yes.len() == asked && self.votes_left == 0,
                    "{} yes of {asked}",
                    self.yes.len()
                )
            }
            State::Allocated => assert!(
                self.lsn != Lsn::ZERO && self.applied_left <= self.parts_left,
                "{} parts not durable, {} not applied, at {:?}",
                self.parts_left,
                self.applied_left,
                self.lsn
            ),
        }
    }

    fn reads(&self) -> bool {
        self.prepares.iter().any(|(_, ask)| !ask.reads.is_empty())
    }

    fn changes(&self) -> bool {
        self.prepares.iter().any(|(_, ask)| !ask.changes.is_empty())
    }
}

/// Commits over shards that this shard owns.
pub(in crate::engine) struct Coordinator {
    /// The commits, by this shard's number for them.
    commits: BTreeMap<u64, CoordinatedCommit>,
    next_txn: u64,
    /// Those whose votes are requested again later.
    waiting: Vec<u64>,
    /// Those for which all votes are in.
    decidable: VecDeque<u64>,
}

impl Coordinator {
    pub fn new() -> Self {
        Coordinator {
            commits: BTreeMap::new(),
            next_txn: 1,
            waiting: Vec::new(),
            decidable: VecDeque::new(),
        }
    }

    /// Whether none is in progress.
    pub fn is_idle(&self) -> bool {
        self.commits.is_empty()
    }

    /// Commits in progress.
    pub fn commits_count(&self) -> usize {
        self.commits.len()
    }

    /// The heap that they take, recounted.
    #[cfg(any(test, feature = "sim"))]
    pub fn weight(&self) -> u64 {
        self.commits.values().map(|commit| commit.weight).sum()
    }
}

impl Shard {
    /// Whether all pages of the commit are this shard's.
    pub(in crate::engine) fn is_local(&self, commit: &Commit) -> bool {
        let keys = commit
            .reads
            .iter()
            .map(|(key, _)| key)
            .chain(commit.changes.iter().map(|(key, _)| key));
        self.ctx.shard_map.shards_count() == 1
            || keys.into_iter().all(|key| self.ctx.shard_map.shard_of(*key) == self.ctx.id)
    }

    /// Begins a commit over shards.
    pub(in crate::engine) fn begin_coordinated(&mut self, token: Token, commit: Commit) {
        let mut prepares: SmallVec<[(ShardId, PrepareRequest); 2]> = SmallVec::new();
        // The owner first: it records the commit, if there is anything to record.
        let since = self.ctx.now;
        prepares.push((
            self.ctx.id,
            PrepareRequest {
                owner_logs: !commit.changes.is_empty(),
                since,
                ..PrepareRequest::default()
            },
        ));
        let mut of = |shard: ShardId| match prepares.iter().position(|(s, _)| *s == shard) {
            Some(i) => i,
            None => {
                prepares.push((shard, PrepareRequest { since, ..PrepareRequest::default() }));
                prepares.len() - 1
            }
        };
        let reads: Vec<usize> =
            commit.reads.iter().map(|(key, _)| of(self.ctx.shard_map.shard_of(*key))).collect();
        let changes: Vec<usize> =
            commit.changes.iter().map(|(key, _)| of(self.ctx.shard_map.shard_of(*key))).collect();
        let weight = coordinated_bytes(&commit, prepares.len());
        for (i, read) in reads.into_iter().zip(commit.reads) {
            prepares[i].1.reads.push(read);
        }
        for (i, change) in changes.into_iter().zip(commit.changes) {
            prepares[i].1.changes.push(change);
        }
        let txn = self.coordinator.next_txn;
        self.coordinator.next_txn += 1;
        let cross = CoordinatedCommit {
            token,
            durable: commit.durable,
            weight,
            prepares,
            state: State::Asking,
            votes_left: 0,
            yes: SmallVec::new(),
            refusal: None,
            held: false,
            not_now: false,
            read_lsn: Lsn::ZERO,
            lsn: Lsn::ZERO,
            parts_left: 0,
            applied_left: 0,
            attempts: 0,
            refused_first_at: None,
        };
        self.reservations.request_bytes += weight;
        self.coordinator.commits.insert(txn, cross);
        self.ask(txn);
    }

    fn remove_coordinated(&mut self, txn: u64) {
        if let Some(cross) = self.coordinator.commits.remove(&txn) {
            self.reservations.request_bytes -= cross.weight;
        }
    }

    fn ask(&mut self, txn: u64) {
        let Some(cross) = self.coordinator.commits.get_mut(&txn) else { return };
        assert!(
            !matches!(cross.state, State::Decidable | State::Allocated),
            "commit {txn} is asked for, and is {:?}",
            cross.state
        );
        cross.state = State::Asking;
        cross.votes_left = cross.prepares.len();
        (cross.refusal, cross.held, cross.not_now, cross.read_lsn) =
            (None, false, false, Lsn::ZERO);
        cross.attempts += 1;
        cross.assert_state();
        let prepares = cross.prepares.clone();
        for (shard, ask) in prepares {
            self.ctx.send(shard, Message::Prepare(txn, Box::new(ask)));
        }
    }

    /// Called when a vote has arrived.
    pub(in crate::engine) fn voted(&mut self, from: ShardId, txn: u64, vote: Vote) {
        // After a failure nothing waits for it.
        let Some(cross) = self.coordinator.commits.get_mut(&txn) else { return };
        assert_eq!(cross.state, State::Asking, "votes come to those who asked");
        cross.assert_state();
        match vote {
            Vote::Yes(read) => {
                cross.read_lsn = cross.read_lsn.max(read);
                cross.yes.push(from);
            }
            Vote::Conflict => cross.held = true,
            Vote::Busy => cross.not_now = true,
            Vote::No(error) => cross.refusal = Some(error),
        }
        cross.votes_left -= 1;
        if cross.votes_left > 0 {
            return;
        }
        if cross.yes.len() == cross.prepares.len() {
            cross.state = State::Decidable;
            cross.assert_state();
            self.coordinator.decidable.push_back(txn);
            self.ctx.need(Work::Decisions);
            return;
        }
        self.abort_participants(txn);
        self.refuse_or_retry(txn);
    }

    fn abort_participants(&mut self, txn: u64) {
        let Some(cross) = self.coordinator.commits.get_mut(&txn) else { return };
        for shard in std::mem::take(&mut cross.yes) {
            self.ctx.send(shard, Message::Decide(txn, Decision::Abort));
        }
    }

    fn refuse_or_retry(&mut self, txn: u64) {
        let Some(cross) = self.coordinator.commits.get_mut(&txn) else { return };
        let refused_first_at = *cross.refused_first_at.get_or_insert(self.ctx.now);
        let refusal = match cross.refusal.take() {
            Some(error) => Some(error),
            None if cross.held && cross.reads() => Some(crate::engine::txn::participant::held(txn)),
            None if self.ctx.now > refused_first_at + ASK_FOR_US => Some(Error::new(
                ErrorKind::Busy,
                "a commit over several shards found pages held, or memory, log or space short, \
                 for 10 s; try again",
            )),
            None => None,
        };
        match refusal {
            Some(error) => {
                let token = cross.token;
                self.remove_coordinated(txn);
                self.ctx.reply(token, Err(error));
            }
            None => {
                // Commits that meet at the same pages come back at different times.
                let slots = 1 << cross.attempts.min(6);
                let turn = (u64::from(self.ctx.id.get()).wrapping_mul(7)
                    ^ txn.wrapping_mul(0x9e37_79b9))
                    % slots;
                let until = self.ctx.now
                    + (precedence::RETRY_US.0 * (1 + turn)).min(precedence::RETRY_US.1);
                cross.state = State::Waiting { until };
                cross.assert_state();
                self.coordinator.waiting.push(txn);
                self.ctx.need(Work::Retries);
                self.ctx.stats.cross_retries += 1;
            }
        }
    }

    /// Requests the votes again for commits whose time has come.
    pub(in crate::engine) fn retry_coordinated(&mut self) {
        if self.coordinator.waiting.is_empty() {
            return;
        }
        let now = self.ctx.now;
        let is_due = |cross: &CoordinatedCommit| match cross.state {
            State::Waiting { until } => until <= now,
            _ => false,
        };
        let cross = &self.coordinator.commits;
        let due: Vec<u64> = self
            .coordinator
            .waiting
            .extract_if(.., |txn| cross.get(txn).is_none_or(is_due))
            .collect();
        due.into_iter().for_each(|txn| self.ask(txn));
    }

    /// When votes for the next commit are requested again.
    pub(in crate::engine) fn next_retry(&self) -> Option<Micros> {
        let until = |txn: &u64| match self.coordinator.commits.get(txn)?.state {
            State::Waiting { until } => Some(until),
            _ => None,
        };
        self.coordinator.waiting.iter().filter_map(until).min()
    }

    /// Allocates the LSNs of commits that have all votes, and sends the decisions to all shards.
    pub(in crate::engine) fn decide(&mut self) {
        self.end_readers();
        let count = self.coordinator.decidable.len() as u64;
        if count == 0 || self.ctx.failed.is_some() {
            return;
        }
        if self.lsns_are_far_ahead(Step::Decide) || self.log.open.runs_full() {
            // Before the LSN is allocated there is time: the open group goes first.
            self.log.open.urgent = true;
            self.ctx.need(Work::Groups);
            self.ctx.blocked.register(Step::Decide, Lack::LogRoom);
            return;
        }
        let first = self.ctx.order.allocate_lsns(self.ctx.id, count);
        let watermark = self.ctx.order.watermark();
        assert!(
            first > watermark,
            "{first:?} was allocated, and all up to {watermark:?} is durable"
        );
        self.log.open.add_run(first, count, self.ctx.now);
        for (i, txn) in std::mem::take(&mut self.coordinator.decidable).into_iter().enumerate() {
            self.decide_commit(txn, first.plus(i as u64));
        }
        self.ctx.need(Work::Groups);
        self.ctx.room_changed();
    }

    /// Ends commits without changes, which need no LSN: all that they read was current while all of
    /// it was held.
    fn end_readers(&mut self) {
        for txn in std::mem::take(&mut self.coordinator.decidable) {
            match self.coordinator.commits.get(&txn) {
                Some(cross) if !cross.changes() => {
                    let (token, read) = (cross.token, cross.read_lsn);
                    self.abort_participants(txn);
                    self.remove_coordinated(txn);
                    self.reply_committed(token, read, read, Outcome::Known);
                }
                _ => self.coordinator.decidable.push_back(txn),
            }
        }
    }

    fn decide_commit(&mut self, txn: u64, lsn: Lsn) {
        let cross =
            self.coordinator.commits.get_mut(&txn).expect("a decidable commit is under way");
        assert_eq!(cross.state, State::Decidable, "all votes are in");
        assert!(
            cross.read_lsn < lsn,
            "commit {txn} got {lsn:?}, and has read {:?}",
            cross.read_lsn
        );
        cross.state = State::Allocated;
        cross.lsn = lsn;
        let writers: SmallVec<[ShardId; 4]> = cross
            .prepares
            .iter()
            .skip(1)
            .filter(|(_, ask)| !ask.changes.is_empty())
            .map(|(shard, _)| *shard)
            .collect();
        let others: ShardSet = writers.iter().copied().collect();
        cross.parts_left = 1 + writers.len();
        cross.applied_left = writers.len();
        let (token, durable, yes, read) =
            (cross.token, cross.durable, std::mem::take(&mut cross.yes), cross.read_lsn);
        // The requests to the parts are no longer needed: the parts have them.
        cross.prepares.clear();
        self.watermark.hold_back(lsn);
        self.ctx.stats.commits_cross += 1;
        #[cfg(any(test, feature = "sim"))]
        self.ctx.allocated.push((token, lsn));
        self.apply_own_part(txn, lsn, others);
        self.log.open.urgent |= durable;
        let me = self.ctx.id;
        for shard in yes.into_iter().filter(|shard| *shard != me) {
            let decision = match writers.contains(&shard) {
                true => Decision::Commit { lsn, urgent: durable },
                false => Decision::Abort,
            };
            self.ctx.send(shard, Message::Decide(txn, decision));
        }
        if durable {
            self.reply_committed(token, lsn, lsn, Outcome::Unknown);
        } else if writers.is_empty() {
            self.reply_committed(token, lsn, read, Outcome::Unknown);
        }
    }

    /// Called when another shard's part is visible there.
    pub(in crate::engine) fn part_applied(&mut self, txn: u64) {
        let Some(cross) = self.coordinator.commits.get_mut(&txn) else { return };
        assert!(
            cross.state == State::Allocated && cross.applied_left > 0,
            "a part of commit {txn} is applied, {} are left, and it is {:?}",
            cross.applied_left,
            cross.state
        );
        cross.applied_left -= 1;
        cross.assert_state();
        if cross.applied_left == 0 && !cross.durable {
            let (token, lsn, read) = (cross.token, cross.lsn, cross.read_lsn);
            self.reply_committed(token, lsn, read, Outcome::Unknown);
        }
    }

    /// Called when a part is durable in the log of its shard.
    pub(in crate::engine) fn part_durable(&mut self, txn: u64) {
        let Some(cross) = self.coordinator.commits.get_mut(&txn) else { return };
        assert!(
            cross.state == State::Allocated && cross.parts_left > 0,
            "a part of commit {txn} is durable, {} are left, and it is {:?}",
            cross.parts_left,
            cross.state
        );
        cross.parts_left -= 1;
        cross.assert_state();
        if cross.parts_left == 0 {
            let lsn = cross.lsn;
            self.remove_coordinated(txn);
            self.watermark.parts_durable(lsn);
            self.watermark.publish(&mut self.ctx, self.log.bound());
        }
    }

    /// Called when the store has stopped: no shard sends anything more.
    pub(in crate::engine) fn fail_coordinated(&mut self, cause: &Error, stopped: &Error) {
        self.coordinator.decidable.clear();
        self.coordinator.waiting.clear();
        for (_, cross) in std::mem::take(&mut self.coordinator.commits) {
            self.reservations.request_bytes -= cross.weight;
            match cross.state {
                // A durable commit waits with all others for the watermark, and is answered there.
                State::Allocated if !cross.durable && cross.applied_left > 0 => {
                    let error = crate::engine::watermark::outcome_unknown(cross.lsn, cause);
                    self.ctx.reply(cross.token, Err(error));
                }
                State::Allocated => {}
                _ => self.ctx.reply(cross.token, Err(stopped.clone())),
            }
        }
    }
}
