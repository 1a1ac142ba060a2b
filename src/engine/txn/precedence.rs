//! Decides which commit goes first when a part of a commit over shards has met others for too long:
//! the one that was requested first.
//!
//! A vote can't wait, so a part has no place in a queue: it gets what the commits of the shard have
//! left, and is asked again. A stream of them could leave too little for ever. So the oldest part
//! that gets a vote of `Busy` or `Conflict` long after it was first requested is put *in front*:
//! until it is voted for, commits of the shard are not admitted, and younger parts get `Busy`. If
//! it lacks memory that requests in progress keep, those must end: commits continue, but no request
//! is accepted from callers.
//!
//! Invariants
//! 1. A part in front holds nothing for it: no page, no room. It only keeps others from taking what
//!    becomes free.
//! 2. All shards compare parts by the same order: time of the first request, then owner, then
//!    number. An older part takes the place of a younger one at once. So no other commit keeps back
//!    the oldest of all commits over shards anywhere, and two shards can't each put the other's
//!    part last for ever.
//! 3. It ends with a `Yes` or a `No`, or when the owner has not asked again for [`IN_FRONT_US`]:
//!    everything that waits for it has a deadline, and an owner that has given up or has failed
//!    keeps nothing back.
//!
//! It does *not* order commits of one shard: they stay first in, first out.

use crate::base::{Micros, RequestIdx, ShardId};
use crate::engine::Work;
use crate::engine::log::PartRef;
use crate::engine::message::Vote;
use crate::engine::requests::PendingKind;
use crate::engine::{Lack, Shard, Step};

/// The wait before votes for a refused commit are requested again: the first, and the longest.
pub(in crate::engine) const RETRY_US: (Micros, Micros) = (100, 5_000);
/// The age at which a commit goes in front. Shorter waits are common when a device is busy, and end
/// by themselves; stopping the others for each of them would cost throughput.
const PATIENCE_US: Micros = 100_000;
/// How long a part stays in front without another request for its vote: an owner asks again sooner,
/// even when its turns are slow.
const IN_FRONT_US: Micros = 8 * RETRY_US.1;

/// When a commit was first requested, at its owner, and which it is: this orders commits over
/// shards.
pub(in crate::engine) type Age = (Micros, ShardId, u64);

/// Who waits behind the part in front.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::engine) enum Behind {
    /// Commits of the shard: they leave too little room.
    Commits,
    /// Requests of callers: the part lacks what requests under way keep in memory, which must end
    /// and not be followed by others.
    Callers,
}

/// The part in front.
#[derive(Debug)]
pub(in crate::engine) struct InFront {
    age: Age,
    until: Micros,
    behind: Behind,
}

pub(in crate::engine) fn age(of: PartRef, since: Micros) -> Age {
    (since, of.owner, of.txn)
}

impl Shard {
    /// Whether an older part than this is in front.
    pub(in crate::engine) fn is_behind(&self, age: Age) -> bool {
        self.front().is_some_and(|front| front.age < age)
    }

    fn front(&self) -> Option<&InFront> {
        self.participant
            .in_front
            .as_ref()
            .filter(|front| self.ctx.now < front.until && !planted!(VotesNeverFirst))
    }

    /// Whether commits of this shard wait for a part in front.
    pub(in crate::engine) fn commits_are_behind(&self) -> bool {
        self.front().is_some_and(|front| front.behind == Behind::Commits)
    }

    /// Whether no request is accepted from callers, so that those in progress give back what they
    /// keep in memory.
    pub(in crate::engine) fn callers_are_behind(&self) -> bool {
        self.front().is_some_and(|front| front.behind == Behind::Callers)
    }

    /// Records that a part got this vote: it may go in front of those `behind`, or leave its place
    /// there.
    pub(in crate::engine) fn note_vote(&mut self, age: Age, vote: &Vote, behind: Behind) {
        match vote {
            Vote::Busy | Vote::Conflict => {
                let old_enough = self.ctx.now >= age.0 + PATIENCE_US;
                if old_enough && self.front().is_none_or(|front| age <= front.age) {
                    self.participant.in_front =
                        Some(InFront { age, until: self.ctx.now + IN_FRONT_US, behind });
                }
            }
            // Others may proceed, in the next lap.
            Vote::Yes(_) | Vote::No(_)
                if self.participant.in_front.as_ref().is_some_and(|front| front.age == age) =>
            {
                self.participant.in_front = None;
                self.ctx.need(Work::Commits);
            }
            Vote::Yes(_) | Vote::No(_) => {}
        }
    }

    /// The latest time until which commits or callers wait for the part in front.
    pub(in crate::engine) fn front_ends(&self) -> Option<Micros> {
        let waits = self.ctx.blocked.is_blocked(Step::Commit, Lack::Turn);
        self.front()
            .filter(|front| waits || front.behind == Behind::Callers)
            .map(|front| front.until)
    }

    /// The age of the part of a request.
    pub(in crate::engine) fn age_of(&self, waiter: RequestIdx) -> Age {
        match &self.requests.pending[waiter].kind {
            PendingKind::Part(part) => age(part.of, part.since),
            _ => unreachable!("only parts"),
        }
    }
}
