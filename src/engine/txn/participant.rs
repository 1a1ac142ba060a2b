//! A part of a commit over shards, at the shard whose pages it concerns (the owner's own part too).
//!
//! ```text
//! Prepare --pages loaded--> judged --No, Conflict, Busy--> gone
//!                             \--Yes: pages held, room reserved--> Decide
//! Decide --Abort--> gone
//!    \--Commit(LSN)--> applied, logged --flushed--> Durable
//! ```
//! Invariants
//! 1. A vote waits for the device (a page must be read) but never for a hold, room or memory; so
//!    two commits can't wait for each other.
//! 2. After a `Yes` only the device can fail: log room, buffers, frames, space and the map leaves
//!    are reserved.
//! 3. The record of a part, like an owner's, is alone in its atomic span: a recovered log can end
//!    right before and right after it.

use crate::base::error::{Error, ErrorKind};
use crate::base::{Lsn, RequestIdx, ShardId, ShardSet};
use crate::engine::Work;
use crate::engine::log::PartRef;
use crate::engine::message::{Decision, Message, PrepareRequest, Vote};
use crate::engine::requests::{Part, PendingKind};
use crate::engine::reservations::Need;
use crate::engine::txn::admission::Admission;
use crate::engine::txn::precedence::{self, Behind};
use crate::engine::{Commit, Shard};
use crate::format::group::Role;
use hashbrown::HashMap;

/// The parts that this shard has, by commit: their indices in the table of requests.
pub(in crate::engine) type Parts = HashMap<PartRef, RequestIdx, foldhash::fast::FixedState>;

/// Parts of commits over shards, voted for and not decided yet.
pub(in crate::engine) struct Participant {
    pub(super) parts: Parts,
    /// The part of a commit over shards that goes first (see `precedence`).
    pub(super) in_front: Option<precedence::InFront>,
}

impl Participant {
    pub fn new(hasher: foldhash::fast::FixedState) -> Self {
        Participant { parts: HashMap::with_hasher(hasher), in_front: None }
    }

    /// Whether no part is voted for and not decided.
    pub fn is_idle(&self) -> bool {
        self.parts.is_empty()
    }

    /// Called when the store has stopped: no part is voted for any more, and no commit waits behind
    /// one.
    pub fn clear_front(&mut self) {
        self.in_front = None;
    }
}

impl Shard {
    /// Called when the owner asks for a vote.
    pub(in crate::engine) fn prepare(&mut self, owner: ShardId, txn: u64, ask: PrepareRequest) {
        let of = PartRef { owner, txn };
        if let Some(error) = self.ctx.failed.clone() {
            self.ctx.send(owner, Message::Vote(txn, Vote::No(error)));
            return;
        }
        let age = precedence::age(of, ask.since);
        let is_behind = self.is_behind(age);
        if is_behind || !self.reservations.holds_little_for_parts() {
            // Waiting here could mean waiting for a hold that this very commit has elsewhere.
            let behind = if is_behind { Behind::Commits } else { Behind::Callers };
            self.note_vote(age, &Vote::Busy, behind);
            self.ctx.send(owner, Message::Vote(txn, Vote::Busy));
            return;
        }
        let PrepareRequest { reads, changes, owner_logs, since } = ask;
        let pages = self.pages_of(&reads, &changes);
        let (reads_count, patched) = (reads.len(), crate::engine::requests::patched(&changes));
        let part = Part {
            of,
            commit: Commit { reads, changes, durable: true },
            owner_logs,
            since,
            reserved: None,
        };
        self.begin(None, PendingKind::Part(Box::new(part)), pages, |i| {
            i >= reads_count && patched[i - reads_count]
        });
    }

    /// Votes on the parts whose pages are there.
    pub(in crate::engine) fn run_parts(&mut self) {
        while let Some(waiter) = self.requests.next_ready_part() {
            let Some(vote) = self.judge_part(waiter) else { continue };
            let PendingKind::Part(part) = &self.requests.pending[waiter].kind else {
                unreachable!("only parts")
            };
            let of = part.of;
            self.note_vote(self.age_of(waiter), &vote, Behind::Commits);
            match vote {
                Vote::Yes(_) => {
                    self.hold_pages(waiter);
                    let before = self.participant.parts.insert(of, waiter);
                    assert!(before.is_none(), "{of:?} is voted for twice: {before:?}");
                }
                Vote::Conflict => self.ctx.stats.holds_met += 1,
                Vote::Busy | Vote::No(_) => {}
            }
            if !matches!(vote, Vote::Yes(_)) {
                self.release(waiter);
            }
            self.ctx.send(of.owner, Message::Vote(of.txn, vote));
        }
    }

    /// Determines the vote; `None` if a map node must be read first.
    fn judge_part(&mut self, waiter: RequestIdx) -> Option<Vote> {
        let pending = &self.requests.pending[waiter];
        if let Some(error) = pending.error.clone().or_else(|| self.ctx.failed.clone()) {
            return Some(Vote::No(error));
        }
        if let Err(error) = self.validate(waiter)
            && !planted!(PartNotValidated)
        {
            return Some(Vote::No(error));
        }
        if self.locked_page(waiter).is_some() {
            return Some(Vote::Conflict);
        }
        let read = self.read_lsn(waiter);
        let PendingKind::Part(part) = &pending.kind else { unreachable!("only parts") };
        if part.commit.changes.is_empty() && !part.owner_logs {
            return Some(Vote::Yes(read));
        }
        let need = Need::of(&part.commit, &self.map);
        if self.is_behind(self.age_of(waiter)) {
            return Some(Vote::Busy);
        }
        match self.admit_part(waiter, &need) {
            Admission::Yes => {}
            Admission::Waiting => return None,
            Admission::Stalled => return Some(Vote::Busy),
            Admission::No(error) => return Some(Vote::No(error)),
        }
        let reserved = self.reservation(&need);
        self.reservations.parts = self.reservations.parts.plus(reserved);
        self.ctx.room_changed();
        if let PendingKind::Part(part) = &mut self.requests.pending[waiter].kind {
            part.reserved = Some(reserved);
        }
        Some(Vote::Yes(read))
    }

    /// Called when the owner has decided.
    pub(in crate::engine) fn decided(&mut self, owner: ShardId, txn: u64, decision: Decision) {
        let of = PartRef { owner, txn };
        // After a failure all parts are gone.
        let Some(waiter) = self.participant.parts.remove(&of) else { return };
        match decision {
            Decision::Abort => self.end_part(waiter),
            Decision::Commit { lsn, urgent } => {
                let is_reader = match &self.requests.pending[waiter].kind {
                    PendingKind::Part(part) => part.commit.changes.is_empty(),
                    _ => unreachable!("only parts"),
                };
                if !is_reader {
                    self.apply_part(waiter, of, lsn, Role::Part(ShardSet::of(owner)));
                    self.log.open.urgent |= urgent;
                    self.ctx.send(owner, Message::Applied(txn));
                    if planted!(PartDurableEarly) {
                        self.ctx.send(owner, Message::Durable(txn));
                    }
                }
                self.end_part(waiter);
            }
        }
    }

    /// Applies the owner's own part, and logs the record that names the others, in the group whose
    /// run holds the LSN.
    pub(in crate::engine) fn apply_own_part(&mut self, txn: u64, lsn: Lsn, others: ShardSet) {
        let of = PartRef { owner: self.ctx.id, txn };
        let waiter =
            self.participant.parts.remove(&of).expect("the owner has voted for its own part");
        self.apply_part(waiter, of, lsn, Role::Owner(others));
        self.end_part(waiter);
    }

    fn apply_part(&mut self, waiter: RequestIdx, of: PartRef, lsn: Lsn, role: Role) {
        let read = self.read_lsn(waiter);
        assert!(read < lsn, "{of:?} got {lsn:?}, and has read {read:?}");
        self.unreserve(waiter);
        self.log.open.end_span();
        self.apply(waiter, lsn, role);
        self.log.open.end_span();
        self.log.open.parts.push(of);
        self.log.open.urgent |= self.watermark.is_requested(lsn);
        self.ctx.need(Work::Groups);
        self.ctx.room_changed();
    }

    fn unreserve(&mut self, waiter: RequestIdx) {
        if let PendingKind::Part(part) = &mut self.requests.pending[waiter].kind
            && let Some(reserved) = part.reserved.take()
        {
            self.reservations.parts = self.reservations.parts.minus(reserved);
            self.ctx.room_changed();
        }
    }

    fn end_part(&mut self, waiter: RequestIdx) {
        self.unreserve(waiter);
        self.let_pages_go(waiter);
        self.release(waiter);
    }

    /// Called when the store has stopped: nothing that was voted for will be decided here.
    pub(in crate::engine) fn drop_parts(&mut self) {
        let mut all: Vec<(PartRef, RequestIdx)> = self.participant.parts.drain().collect();
        all.sort();
        for (_, waiter) in all {
            self.end_part(waiter);
        }
    }

    /// Called when parts of this shard's groups are durable.
    pub(in crate::engine) fn parts_durable(&mut self, parts: Vec<PartRef>) {
        for of in parts {
            match of.owner == self.ctx.id {
                true => self.part_durable(of.txn),
                false => self.ctx.send(of.owner, Message::Durable(of.txn)),
            }
        }
    }
}

/// Whether a refusal only says that a page is held.
pub(in crate::engine) fn held(of: u64) -> Error {
    Error::new(
        ErrorKind::Conflict,
        format_args!(
            "a page of transaction {of} is held by another commit on its way: retry the \
             transaction"
        ),
    )
}
