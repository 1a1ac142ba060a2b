//! One shard's driver in the simulator: it hands over arrivals, all or a part, in an order that the
//! seed determines, and carries out the effects.
//!
//! Invariants
//! 1. Arrivals of one kind are handed over in their order; the seed determines which kinds and
//!    senders come first.
//! 2. Once the power is off, nothing more is carried out.
//!
//! It does *not* choose which shard turns, or when: see `cluster`.

use super::disk::SimDisk;
use super::late::Late;
use super::net::Net;
use super::timing::Timing;
use crate::base::error::Result;
use crate::base::{Lsn, Micros, ShardId};
use crate::engine::{Effect, Host, Message, Request, Response, Shard, Token};
use crate::io::{Completion, OpId};
use crate::testing::random::Rng;
use std::ops::ControlFlow;

/// The bits of an operation's number at the disk that hold its shard.
pub(super) const SHARD_SHIFT: u32 = 48;

/// The reason why effects of a turn are not carried out.
pub(super) enum Stop {
    /// The power is off, or the shard has broken a rule of the disk seam.
    DiskEnded,
    /// The rule that the shard has broken.
    Wrong(String),
}

/// Arrivals for one shard, now or later, and observations after its last turn.
pub(super) struct Node {
    pub(super) requests: Vec<(Micros, Token, Request)>,
    pub(super) completions: Vec<(Micros, Completion)>,
    /// When its last turn ends.
    pub(super) free_at: Micros,
    /// When the shard turns even if nothing arrives: at the beginning, and when the watermark has
    /// reached what it waits for.
    pub(super) woken_at: Option<Micros>,
    /// Whether a commit waited for memory after its last turn.
    pub(super) was_short: bool,
    /// Segments of its log after its last turn.
    pub(super) log_segments: u64,
    /// While its checkpoint waits for memory, the number of checkpoints that had ended before.
    pub(super) starved_after: Option<u64>,
}

/// The results of one step.
#[derive(Debug, Default)]
pub struct Turn {
    /// The shard that turned.
    pub shard: ShardId,
    /// Requests and the LSNs they allocated, in the order of the LSNs.
    pub allocated: Vec<(Token, Lsn)>,
    /// Answers, in order.
    pub replies: Vec<(Token, Result<Response>)>,
}

/// Everything around a shard during one step of it.
pub(super) struct NodeHost<'a> {
    pub(super) index: usize,
    pub(super) shards_count: usize,
    pub(super) now: Micros,
    /// Turns of all shards before this one.
    pub(super) turns: u64,
    pub(super) node: &'a mut Node,
    pub(super) net: &'a mut Net<Message>,
    pub(super) late: &'a mut Late,
    pub(super) timing: &'a Timing,
    pub(super) rng: &'a mut Rng,
    pub(super) disk: &'a SimDisk,
    /// Results of the step.
    pub(super) turn: Turn,
    /// Messages sent in it.
    pub(super) messages: u64,
}

impl Host<Shard> for NodeHost<'_> {
    type Stop = Stop;

    /// Hands arrivals to the shard, or a part of them; returns whether there were any.
    fn deliver(&mut self, shard: &mut Shard) -> bool {
        let mut any = false;
        let mut kinds = [0, 1, 2];
        for n in (1..kinds.len()).rev() {
            kinds.swap(n, self.rng.below(n as u64 + 1) as usize);
        }
        for kind in kinds {
            any |= match kind {
                0 => self.deliver_messages(shard),
                1 => self.deliver_completions(shard),
                _ => self.deliver_requests(shard),
            };
        }
        any
    }

    fn turn_at(&mut self, _: &Shard) -> Option<Micros> {
        Some(self.now)
    }

    fn turned(&mut self, shard: &mut Shard) {
        self.turn.allocated = shard.take_allocated();
        self.turn.allocated.sort_by_key(|&(_, lsn)| lsn);
    }

    fn carry_out(&mut self, shard: &Shard, effect: Effect) -> ControlFlow<Stop> {
        let own = self.turn.shard;
        match effect {
            Effect::Submit(id, op) => {
                self.late.submitted(shard, self.index, id, &op, self.turns, self.now);
                let id = OpId(id.0 | (self.index as u64) << SHARD_SHIFT);
                self.disk.submit_slowly(id, op, self.timing.device_factor(self.index));
                if self.disk.is_off() || self.disk.violation().is_some() {
                    return ControlFlow::Break(Stop::DiskEnded);
                }
            }
            Effect::Reply(token, reply) => self.turn.replies.push((token, reply)),
            Effect::Send(to, _) if to == own || to.index() >= self.shards_count => {
                return ControlFlow::Break(Stop::Wrong(format!(
                    "{own:?} sends a message to {to:?}"
                )));
            }
            Effect::Send(to, message) => {
                let at = self.now + self.timing.message_us(self.rng, self.index, to.index());
                self.net.send(self.index, to.index(), at, message);
                self.messages += 1;
            }
        }
        ControlFlow::Continue(())
    }
}

impl NodeHost<'_> {
    fn deliver_messages(&mut self, shard: &mut Shard) -> bool {
        let first = self.rng.below(self.shards_count as u64) as usize;
        let mut any = false;
        for from in (0..self.shards_count).map(|n| (first + n) % self.shards_count) {
            let arrived = self.net.arrived(from, self.index, self.now);
            for _ in 0..self.timing.take(self.rng, arrived) {
                let message = self.net.take(from, self.index);
                shard.message(ShardId::new(from as u16), message);
                any = true;
            }
        }
        any
    }

    fn deliver_completions(&mut self, shard: &mut Shard) -> bool {
        // In the order in which they become visible, which is not that in which they ended.
        self.node.completions.sort_by_key(|&(at, _)| at);
        let arrived = self.node.completions.partition_point(|&(at, _)| at <= self.now);
        let count = self.timing.take(self.rng, arrived);
        for (_, completion) in self.node.completions.drain(..count) {
            self.late.arrives(shard, self.index, completion.id);
            shard.complete(completion);
        }
        count > 0
    }

    fn deliver_requests(&mut self, shard: &mut Shard) -> bool {
        self.node.requests.sort_by_key(|&(at, token, _)| (at, token));
        let arrived = self.node.requests.partition_point(|&(at, ..)| at <= self.now);
        let mut count = 0;
        while count < arrived && shard.accepting() {
            let (_, token, request) = self.node.requests.remove(0);
            shard.request(token, request);
            count += 1;
        }
        count > 0
    }
}
