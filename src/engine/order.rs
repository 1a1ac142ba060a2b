//! The shard's side of the global order: what it holds back, what it waits for, and who is told.
//!
//! Invariants
//! 1. The bound is raised only when everything below it is durable here, and every part elsewhere of commits that this
//!    shard owns.
//! 2. Whoever waits for an LSN nudges the shards that hold it back: their window must not delay an acknowledgement.

use super::Shard;
use super::message::Message;
use crate::base::{Deal, Lsn, ShardId};
use crate::engine::commit::GlobalOrder;

/// What is waited for, here and elsewhere.
pub(super) struct Waits {
    /// The highest LSN for whose durability somebody here waits.
    pub wanted: Lsn,
    /// What each shard has been told of it.
    nudged: Vec<Lsn>,
    /// The highest LSN for which another shard waits.
    pub nudged_upto: Lsn,
    /// The watermark as last seen.
    seen: Lsn,
    /// No dirty page can be written before something happens here, or the watermark reaches this.
    pub dirty_stuck: Option<Lsn>,
}

impl Waits {
    pub fn new(order: &GlobalOrder, deal: Deal) -> Self {
        let nudged = vec![Lsn::ZERO; usize::from(deal.shards_count())];
        Waits { wanted: Lsn::ZERO, nudged, nudged_upto: Lsn::ZERO, seen: order.watermark(), dirty_stuck: None }
    }
}

impl Shard {
    /// The watermark may have advanced, by this shard or another.
    pub(super) fn note_watermark(&mut self) {
        let watermark = self.order.watermark();
        if watermark > self.waits.seen {
            self.waits.seen = watermark;
            self.waits.dirty_stuck = None;
            self.acknowledge();
            self.settle_durable();
            self.again = true;
        }
    }

    /// Publishes what this shard still holds back.
    pub(super) fn publish_bound(&mut self) {
        let parts = self.cross_undurable.first().filter(|_| !planted!(PartsHoldNothingBack));
        let mut bound = self.log.bound().min(parts.copied().unwrap_or(Lsn::MAX));
        if bound == Lsn::MAX && planted!(IdleHoldsBack) {
            bound = self.order.next();
        }
        self.order.publish(self.id, bound);
        self.order.refresh();
        self.note_watermark();
    }

    /// Shards that hold back what somebody here waits for are told: their window must not delay it.
    pub(super) fn nudge_others(&mut self) {
        let wanted = self.waits.wanted;
        if wanted <= self.order.watermark() || self.failed.is_some() {
            return;
        }
        for shard in self.deal.shards() {
            if shard != self.id && self.order.bound(shard) <= wanted {
                self.nudge(shard, wanted);
            }
        }
        self.pass_nudge_on(wanted);
    }

    fn nudge(&mut self, shard: ShardId, upto: Lsn) {
        if self.waits.nudged[shard.index()] < upto {
            self.waits.nudged[shard.index()] = upto;
            self.send(shard, Message::Nudge(upto));
        }
    }

    /// Parts elsewhere of commits that this shard owns hold it back, too.
    fn pass_nudge_on(&mut self, upto: Lsn) {
        if self.cross_undurable.first().is_some_and(|lsn| *lsn <= upto) {
            self.deal.others(self.id).for_each(|shard| self.nudge(shard, upto));
        }
    }

    pub(super) fn nudged(&mut self, upto: Lsn) {
        self.waits.nudged_upto = self.waits.nudged_upto.max(upto);
        let holds_back = self.log.open.first_lsn().is_some_and(|lsn| lsn <= upto) || !self.log.open.parts.is_empty();
        self.log.open.urgent |= holds_back;
        self.pass_nudge_on(upto);
    }

    /// The memory that its operations read into and write from.
    pub(crate) fn mapping(&self) -> crate::memory::Mapping {
        self.arena.mapping()
    }
}
