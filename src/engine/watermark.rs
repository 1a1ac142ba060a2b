//! The shard's side of the global order: what it holds back, what it waits for, and who is told.
//!
//! Invariants
//! 1. The bound is raised only when everything below it is durable here, and every part elsewhere
//!    of commits that this shard owns.
//! 2. Whoever waits for an LSN nudges the shards that hold it back: their window must not delay an
//!    acknowledgement.

use super::Shard;
use super::message::Message;
use super::requests::Waiting;
use crate::base::{Lsn, ShardId, ShardMap};
use crate::engine::order::GlobalOrder;
use std::collections::BinaryHeap;

/// What is waited for, here and elsewhere.
pub(super) struct WatermarkWaiters {
    /// The highest LSN for whose durability somebody here waits.
    pub wanted: Lsn,
    /// What each shard has been told of it.
    flush_requested: Vec<Lsn>,
    /// The highest LSN for which another shard waits.
    pub flush_requested_upto: Lsn,
    /// The watermark as last seen.
    seen: Lsn,
    /// No dirty page can be written before something happens here, or the watermark reaches this.
    pub dirty_stuck: Option<Lsn>,
    /// Replies that wait for the watermark.
    pub replies: BinaryHeap<Waiting>,
    pub replies_seq: u64,
}

impl WatermarkWaiters {
    pub fn new(order: &GlobalOrder, shard_map: ShardMap) -> Self {
        let flush_requested = vec![Lsn::ZERO; usize::from(shard_map.shards_count())];
        WatermarkWaiters {
            wanted: Lsn::ZERO,
            flush_requested,
            flush_requested_upto: Lsn::ZERO,
            seen: order.watermark(),
            dirty_stuck: None,
            replies: BinaryHeap::new(),
            replies_seq: 0,
        }
    }
}

impl Shard {
    /// The watermark may have advanced, by this shard or another.
    pub(super) fn note_watermark(&mut self) {
        let watermark = self.ctx.order.watermark();
        if watermark > self.watermark.seen {
            self.watermark.seen = watermark;
            self.watermark.dirty_stuck = None;
            self.acknowledge();
            self.publish_durable();
            self.ctx.work_pending = true;
        }
    }

    /// Publishes what this shard still holds back.
    pub(super) fn publish_low_water(&mut self) {
        let parts = self.coordinator.undurable.first().filter(|_| !planted!(PartsHoldNothingBack));
        let mut bound = self.log.bound().min(parts.copied().unwrap_or(Lsn::MAX));
        if bound == Lsn::MAX && planted!(IdleHoldsBack) {
            bound = self.ctx.order.next();
        }
        self.ctx.order.publish(self.ctx.id, bound);
        self.ctx.order.refresh();
        self.note_watermark();
    }

    /// Shards that hold back what somebody here waits for are told: their window must not delay it.
    pub(super) fn request_flush_of_others(&mut self) {
        let wanted = self.watermark.wanted;
        if wanted <= self.ctx.order.watermark() || self.ctx.failed.is_some() {
            return;
        }
        for shard in self.ctx.shard_map.shards() {
            if shard != self.ctx.id && self.ctx.order.bound(shard) <= wanted {
                self.request_flush(shard, wanted);
            }
        }
        self.pass_flush_request_on(wanted);
    }

    fn request_flush(&mut self, shard: ShardId, upto: Lsn) {
        if self.watermark.flush_requested[shard.index()] < upto {
            self.watermark.flush_requested[shard.index()] = upto;
            self.ctx.send(shard, Message::RequestFlush(upto));
        }
    }

    /// Parts elsewhere of commits that this shard owns hold it back, too.
    fn pass_flush_request_on(&mut self, upto: Lsn) {
        if self.coordinator.undurable.first().is_some_and(|lsn| *lsn <= upto) {
            self.ctx
                .shard_map
                .others(self.ctx.id)
                .for_each(|shard| self.request_flush(shard, upto));
        }
    }

    pub(super) fn flush_requested(&mut self, upto: Lsn) {
        self.watermark.flush_requested_upto = self.watermark.flush_requested_upto.max(upto);
        let holds_back = self.log.open.first_lsn().is_some_and(|lsn| lsn <= upto)
            || !self.log.open.parts.is_empty();
        self.log.open.urgent |= holds_back;
        self.pass_flush_request_on(upto);
    }

    /// The memory that its operations read into and write from.
    pub(crate) fn mapping(&self) -> crate::memory::Mapping {
        self.ctx.arena.mapping()
    }
}
