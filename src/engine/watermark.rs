//! The shard's side of the global order: what it holds back, what it waits for, and which shards
//! are notified.
//!
//! Invariants
//! 1. The bound is raised only when everything below it is durable here, and so is every part
//!    elsewhere of commits that this shard owns.
//! 2. A shard that waits for an LSN nudges the shards that hold it back: their window must not
//!    delay an acknowledgement.

use super::context::Context;
use super::event::{Response, Token};
use super::log::Log;
use super::message::Message;
use crate::base::error::{Error, ErrorKind};
use crate::base::{Lsn, ShardId, ShardMap};
use crate::engine::Work;
use crate::engine::order::GlobalOrder;
use std::cmp::Ordering;
use std::collections::{BTreeSet, BinaryHeap};

/// The LSNs that are waited for, here and elsewhere.
pub(super) struct WatermarkWaiters {
    /// The highest LSN for whose durability something here waits.
    wanted: Lsn,
    /// The highest of these that each shard has been notified of.
    flush_requested: Vec<Lsn>,
    /// The highest LSN for which another shard waits.
    flush_requested_upto: Lsn,
    /// The watermark as last seen.
    seen: Lsn,
    /// LSNs of commits over shards that this shard owns and of which some part is not durable.
    parts_undurable: BTreeSet<Lsn>,
    /// Replies that wait for the watermark.
    replies: BinaryHeap<Waiting>,
    replies_seq: u64,
}

impl WatermarkWaiters {
    pub fn new(order: &GlobalOrder, shard_map: ShardMap) -> Self {
        let flush_requested = vec![Lsn::ZERO; usize::from(shard_map.shards_count())];
        WatermarkWaiters {
            wanted: Lsn::ZERO,
            flush_requested,
            flush_requested_upto: Lsn::ZERO,
            seen: order.watermark(),
            parts_undurable: BTreeSet::new(),
            replies: BinaryHeap::new(),
            replies_seq: 0,
        }
    }

    /// Sends the replies that the watermark has reached. Returns whether it has advanced, by this
    /// shard or another, since the last call.
    pub fn has_advanced(&mut self, ctx: &mut Context) -> bool {
        let watermark = ctx.order.watermark();
        if watermark <= self.seen {
            return false;
        }
        self.seen = watermark;
        while self.replies.peek().is_some_and(|waiting| waiting.lsn <= watermark) {
            if let Some(waiting) = self.replies.pop() {
                ctx.reply(waiting.token, Ok(waiting.response));
            }
        }
        true
    }

    /// Replies now or when `lsn` is durable.
    pub fn reply_when_durable(
        &mut self,
        ctx: &mut Context,
        log: &mut Log,
        lsn: Lsn,
        token: Token,
        response: Response,
        outcome: Outcome,
    ) {
        if lsn <= ctx.order.watermark() {
            ctx.reply(token, Ok(response));
            return;
        }
        log.open.urgent = true;
        ctx.need(Work::Groups);
        self.want(lsn);
        self.replies_seq += 1;
        self.replies.push(Waiting { lsn, seq: self.replies_seq, token, response, outcome });
    }

    /// Ends everything that waits for durability, which will never come.
    pub fn fail_replies(&mut self, ctx: &mut Context, cause: &Error, stopped: &Error) {
        for waiting in std::mem::take(&mut self.replies) {
            let error = match waiting.outcome {
                Outcome::Unknown => outcome_unknown(waiting.lsn, cause),
                Outcome::Known => stopped.clone(),
            };
            ctx.reply(waiting.token, Err(error));
        }
    }

    /// Records that something here waits until `lsn` is durable.
    pub fn want(&mut self, lsn: Lsn) {
        self.wanted = self.wanted.max(lsn);
    }

    /// The lowest LSN that a reply waits for.
    pub fn next_reply(&self) -> Option<Lsn> {
        self.replies.peek().map(|waiting| waiting.lsn)
    }

    /// Replies that wait.
    pub fn replies_count(&self) -> usize {
        self.replies.len()
    }

    /// Whether another shard waits for `lsn`.
    pub fn is_requested(&self, lsn: Lsn) -> bool {
        lsn <= self.flush_requested_upto
    }

    /// Records that a commit over shards that this shard owns holds back the watermark until
    /// [`parts_durable`](Self::parts_durable).
    pub fn hold_back(&mut self, lsn: Lsn) {
        self.parts_undurable.insert(lsn);
    }

    /// Records that every part of the commit is durable in its shard.
    pub fn parts_durable(&mut self, lsn: Lsn) {
        assert!(self.parts_undurable.remove(&lsn), "{lsn} was not held back");
    }

    /// Publishes what this shard still holds back; its log holds back `log_bound`.
    pub fn publish(&self, ctx: &mut Context, log_bound: Lsn) {
        let parts = self.parts_undurable.first().filter(|_| !planted!(PartsHoldNothingBack));
        let mut bound = log_bound.min(parts.copied().unwrap_or(Lsn::MAX));
        if bound == Lsn::MAX && planted!(IdleHoldsBack) {
            bound = ctx.order.next();
        }
        ctx.order.publish(ctx.id, bound);
        ctx.order.refresh();
    }

    /// Notifies shards that hold back what something here waits for: their window must not delay
    /// it.
    pub fn request_flushes(&mut self, ctx: &mut Context) {
        let wanted = self.wanted;
        if wanted <= ctx.order.watermark() || ctx.failed.is_some() {
            return;
        }
        for shard in ctx.shard_map.shards() {
            if shard != ctx.id && ctx.order.bound(shard) <= wanted {
                self.request_flush(ctx, shard, wanted);
            }
        }
        self.pass_flush_request_on(ctx, wanted);
    }

    fn request_flush(&mut self, ctx: &mut Context, shard: ShardId, upto: Lsn) {
        if self.flush_requested[shard.index()] < upto {
            self.flush_requested[shard.index()] = upto;
            ctx.send(shard, Message::RequestFlush(upto));
        }
    }

    /// Parts elsewhere of commits that this shard owns hold it back too.
    fn pass_flush_request_on(&mut self, ctx: &mut Context, upto: Lsn) {
        if self.parts_undurable.first().is_some_and(|lsn| *lsn <= upto) {
            for shard in ctx.shard_map.others(ctx.id) {
                self.request_flush(ctx, shard, upto);
            }
        }
    }

    /// Records that another shard waits for everything up to `upto`.
    pub fn flush_requested(&mut self, ctx: &mut Context, log: &mut Log, upto: Lsn) {
        self.flush_requested_upto = self.flush_requested_upto.max(upto);
        let holds_back =
            log.open.first_lsn().is_some_and(|lsn| lsn <= upto) || !log.open.parts.is_empty();
        if holds_back {
            log.open.urgent = true;
            ctx.need(Work::Groups);
        }
        self.pass_flush_request_on(ctx, upto);
    }
}

/// What a caller may conclude if the store stops before it is answered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Outcome {
    /// Nothing depends on the answer: the request read, or waited.
    Known,
    /// A commit that has its LSN: whether recovery will find it is unknown.
    Unknown,
}

/// A reply that waits until everything up to `lsn` is durable.
struct Waiting {
    lsn: Lsn,
    seq: u64,
    token: Token,
    response: Response,
    outcome: Outcome,
}

impl PartialEq for Waiting {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}
impl Eq for Waiting {}
impl PartialOrd for Waiting {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Waiting {
    /// The lowest LSN is the greatest: the heap gives it first.
    fn cmp(&self, other: &Self) -> Ordering {
        (other.lsn, other.seq).cmp(&(self.lsn, self.seq))
    }
}

/// The error for a commit that was on its way when the store stopped.
pub(super) fn outcome_unknown(lsn: Lsn, cause: &Error) -> Error {
    let context = format_args!(
        "whether commit {lsn} will be found is not known: {cause}; reopen the store and look"
    );
    Error::new(ErrorKind::OutcomeUnknown, context)
}
