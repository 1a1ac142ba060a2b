//! The seam between a shard and whatever drives it: events in, a turn, effects out. One loop for
//! all drivers.
//!
//! ```text
//!   Host::deliver --> request, message, complete --\
//!                                                   StateMachine --next_effect--> Host::carry_out
//!   Host::turn_at --> turn ------------------------/
//! ```
//! The hosts: a shard's thread (`runtime`), the simulator (`testing::sim::cluster`), and
//! `testing::local_cluster`, which serves unit tests, fuzz targets and counts of instructions.
//!
//! Invariants
//! 1. A state machine changes only inside these calls; between two of them nothing happens.
//! 2. After each turn all its effects are carried out, in order, before anything else is delivered.
//! 3. Whether a turn is due is the host's decision: it alone knows the clock and the watermark.
//!
//! It does *not* wait, read a clock or perform an operation.

use super::Shard;
use super::event::{Request, Response, Token};
use super::message::Message;
use crate::base::error::{Error, Result};
use crate::base::{Lsn, Micros, ShardId};
use crate::io::{Completion, DiskOp, OpId};
use crate::memory::Mapping;
use std::ops::ControlFlow;

/// An action that a state machine asks its host to perform.
#[derive(Debug)]
pub enum Effect<M = Message> {
    /// Start this operation and bring back its completion.
    Submit(OpId, DiskOp),
    /// Answer this request.
    Reply(Token, Result<Response>),
    /// Bring this to another shard, after everything that was sent to it before.
    Send(ShardId, M),
}

/// A shard, as its host sees it. Tests of hosts put simpler machines behind it.
pub(crate) trait StateMachine: Send + 'static {
    /// The messages that shards of this kind send each other.
    type Message: Send + 'static;

    /// Hands over a request; its reply is an effect of this or a later turn.
    fn request(&mut self, token: Token, request: Request);
    /// Hands over a message of another shard.
    fn message(&mut self, from: ShardId, message: Self::Message);
    /// Hands over the end of an operation.
    fn complete(&mut self, completion: Completion);
    /// Advances everything as far as it goes without a completion.
    fn turn(&mut self, now: Micros);
    /// The next effect to carry out, if any.
    fn next_effect(&mut self) -> Option<Effect<Self::Message>>;
    /// When `turn` should be called at the latest if nothing arrives.
    fn deadline(&self) -> Option<Micros>;
    /// Whether requests may be handed over.
    fn accepting(&self) -> bool;
    /// Whether opening is over.
    fn is_open(&self) -> bool;
    /// Whether `Close` has been carried out.
    fn is_closed(&self) -> bool;
    /// Operations submitted and not completed.
    fn ops_under_way(&self) -> usize;
    /// The lowest LSN for whose durability something waits: a turn is due when the watermark
    /// reaches it.
    fn waits_for(&self) -> Option<Lsn>;
    /// Why the machine stopped, if it did.
    fn failure(&self) -> Option<Error>;
    /// The memory that its operations use.
    fn mapping(&self) -> Option<Mapping>;
}

/// The driver's side: delivers what has arrived for one machine, and carries out what it asks for.
pub(crate) trait Host<S: StateMachine> {
    /// Why no more effects are carried out, such as a power failure in the simulator.
    type Stop;

    /// Hands over the requests, messages and completions that have arrived; returns whether there
    /// were any.
    fn deliver(&mut self, shard: &mut S) -> bool;
    /// The time of the turn that is due now, after [`deliver`](Self::deliver); `None`: none is.
    fn turn_at(&mut self, shard: &S) -> Option<Micros>;
    /// Called after a turn, before its effects are carried out.
    fn turned(&mut self, _shard: &mut S) {}
    /// Carries out one effect.
    fn carry_out(&mut self, shard: &S, effect: Effect<S::Message>) -> ControlFlow<Self::Stop>;
}

/// A record of what one [`step`] did.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Activity {
    /// Whether something was handed over.
    pub(crate) delivered: bool,
    /// Whether there was a turn.
    pub(crate) turned: bool,
    /// Whether the turn had effects.
    pub(crate) emitted: bool,
}

impl Activity {
    /// Whether anything happened at all, apart from a turn without effects.
    pub(crate) fn is_busy(self) -> bool {
        self.delivered || self.emitted
    }
}

/// Delivers what has arrived, turns the machine if that is due, and carries out the effects.
pub(crate) fn step<S: StateMachine, H: Host<S>>(
    shard: &mut S,
    host: &mut H,
) -> ControlFlow<H::Stop, Activity> {
    let delivered = host.deliver(shard);
    let Some(now) = host.turn_at(shard) else {
        return ControlFlow::Continue(Activity { delivered, ..Activity::default() });
    };
    shard.turn(now);
    host.turned(shard);
    let mut emitted = false;
    while let Some(effect) = shard.next_effect() {
        emitted = true;
        host.carry_out(shard, effect)?;
    }
    ControlFlow::Continue(Activity { delivered, turned: true, emitted })
}

impl StateMachine for Shard {
    type Message = Message;

    fn request(&mut self, token: Token, request: Request) {
        Shard::request(self, token, request);
    }

    fn message(&mut self, from: ShardId, message: Message) {
        Shard::message(self, from, message);
    }

    fn complete(&mut self, completion: Completion) {
        Shard::complete(self, completion);
    }

    fn turn(&mut self, now: Micros) {
        Shard::turn(self, now);
    }

    fn next_effect(&mut self) -> Option<Effect> {
        Shard::next_effect(self)
    }

    fn deadline(&self) -> Option<Micros> {
        Shard::deadline(self)
    }

    fn accepting(&self) -> bool {
        Shard::accepting(self)
    }

    fn is_open(&self) -> bool {
        Shard::is_open(self)
    }

    fn is_closed(&self) -> bool {
        Shard::is_closed(self)
    }

    fn ops_under_way(&self) -> usize {
        Shard::ops_under_way(self)
    }

    fn waits_for(&self) -> Option<Lsn> {
        Shard::waits_for(self)
    }

    fn failure(&self) -> Option<Error> {
        Shard::failure(self)
    }

    fn mapping(&self) -> Option<Mapping> {
        Some(Shard::mapping(self))
    }
}
