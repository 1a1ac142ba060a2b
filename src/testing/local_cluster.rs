//! Runs all shards of a store on one thread and one disk, without a clock: for unit tests, fuzz
//! targets and instruction counts.
//!
//! Invariants
//! 1. One round delivers what had arrived before it, turns every shard once, and carries out the
//!    effects, whose results arrive in a later round.
//! 2. An operation's id at the disk carries its shard, so operations of different shards don't mix.
//!
//! It does *not* choose a random order or park shards: see `testing::sim::cluster`.

use crate::base::error::Result;
use crate::base::{Micros, ShardId};
use crate::engine::{Effect, Host, Request, Response, Shard, StateMachine, Token, step};
use crate::io::{Completion, Disk, OpId};
use std::convert::Infallible;
use std::ops::ControlFlow;

/// Bits of an operation's id at the disk that are the shard's own id for it; the shard's number is
/// above them.
const OP_ID_BITS: u32 = 48;
/// Virtual time of one round of [`LocalCluster::run_until`].
const ROUND_US: Micros = 100;

/// The shards.
pub(crate) struct LocalCluster<S: StateMachine = Shard> {
    pub(crate) shards: Vec<S>,
    inboxes: Vec<Inbox<S::Message>>,
    /// The answers so far.
    pub(crate) replies: Vec<(Token, Result<Response>)>,
}

/// What has arrived for one shard.
struct Inbox<M> {
    completions: Vec<Completion>,
    messages: Vec<(ShardId, M)>,
}

impl<M> Default for Inbox<M> {
    fn default() -> Self {
        Inbox { completions: Vec::new(), messages: Vec::new() }
    }
}

/// What one shard sees of the cluster during its step.
struct ShardHost<'a, M> {
    shard: ShardId,
    now: Micros,
    arrived: Inbox<M>,
    disk: &'a mut dyn Disk,
    inboxes: &'a mut [Inbox<M>],
    replies: &'a mut Vec<(Token, Result<Response>)>,
}

impl<S: StateMachine> Host<S> for ShardHost<'_, S::Message> {
    type Stop = Infallible;

    fn deliver(&mut self, shard: &mut S) -> bool {
        let Inbox { completions, messages } = std::mem::take(&mut self.arrived);
        let delivered = !completions.is_empty() || !messages.is_empty();
        completions.into_iter().for_each(|completion| shard.complete(completion));
        messages.into_iter().for_each(|(from, message)| shard.message(from, message));
        delivered
    }

    fn turn_at(&mut self, _: &S) -> Option<Micros> {
        Some(self.now)
    }

    fn carry_out(&mut self, _: &S, effect: Effect<S::Message>) -> ControlFlow<Infallible> {
        match effect {
            Effect::Submit(id, op) => {
                self.disk.submit(OpId((self.shard.index() as u64) << OP_ID_BITS | id.0), op)
            }
            Effect::Reply(token, result) => self.replies.push((token, result)),
            Effect::Send(to, message) => {
                self.inboxes[to.index()].messages.push((self.shard, message))
            }
        }
        ControlFlow::Continue(())
    }
}

impl<S: StateMachine> LocalCluster<S> {
    pub(crate) fn new(shards: Vec<S>) -> Self {
        let inboxes = shards.iter().map(|_| Inbox::default()).collect();
        LocalCluster { shards, inboxes, replies: Vec::new() }
    }

    /// Hands a request to a shard.
    pub(crate) fn request(&mut self, shard: ShardId, token: Token, request: Request) {
        self.shards[shard.index()].request(token, request);
    }

    /// Runs one round. Returns whether anything happened.
    pub(crate) fn poll_once(&mut self, disk: &mut dyn Disk, now: Micros) -> bool {
        let mut completions = Vec::new();
        disk.reap(&mut completions);
        for Completion { id, op, result } in completions {
            let (shard, id) = ((id.0 >> OP_ID_BITS) as usize, OpId(id.0 & ((1 << OP_ID_BITS) - 1)));
            self.inboxes[shard].completions.push(Completion { id, op, result });
        }
        let arrived: Vec<_> = self.inboxes.iter_mut().map(std::mem::take).collect();
        let mut is_busy = false;
        for (i, (shard, arrived)) in self.shards.iter_mut().zip(arrived).enumerate() {
            let (inboxes, replies) = (&mut self.inboxes[..], &mut self.replies);
            let mut host = ShardHost {
                shard: ShardId::new(i as u16),
                now,
                arrived,
                disk: &mut *disk,
                inboxes,
                replies,
            };
            let ControlFlow::Continue(step) = step(shard, &mut host);
            is_busy |= step.is_busy();
        }
        is_busy
    }

    /// Runs until `is_done`, or until a shard has failed and no operation is in flight: then
    /// returns its error.
    pub(crate) fn run_until(
        &mut self,
        disk: &mut dyn Disk,
        mut now: Micros,
        mut is_done: impl FnMut(&mut Self) -> bool,
    ) -> Result<()> {
        loop {
            now += ROUND_US;
            let is_busy = self.poll_once(disk, now);
            let under_way: usize = self.shards.iter().map(S::ops_under_way).sum();
            if let Some(error) = self.shards.iter().find_map(S::failure) {
                if under_way == 0 {
                    return Err(error);
                }
            } else if is_done(self) && under_way == 0 {
                return Ok(());
            }
            if !is_busy && under_way > 0 {
                disk.wait(None);
            }
        }
    }

    /// Runs until the store is open.
    pub(crate) fn run_until_open(&mut self, disk: &mut dyn Disk, now: Micros) -> Result<()> {
        self.run_until(disk, now, |cluster| cluster.shards.iter().all(S::is_open))
    }
}
