//! The global order: the sequencer, each shard's bound, and the watermark.
//!
//! Invariants
//! 1. An LSN is drawn once; LSNs are drawn in order by one read-modify-write.
//! 2. A shard's bound is at most every LSN that it has drawn, or is about to draw, and that is not durable. It is
//!    lowered *before* the draw and raised only after the flush; idle is [`Lsn::MAX`].
//! 3. The watermark never falls. All commits at or below it are durable.
//!
//! This is the only state that shards share. It does not know pages, logs or waiters.

use crate::types::{Lsn, ShardId};
use crossbeam_utils::CachePadded;
use std::sync::atomic::{AtomicU64, Ordering};

/// Sequencer, bounds and watermark of one open store.
#[derive(Debug)]
pub struct GlobalOrder {
    next: CachePadded<AtomicU64>,
    watermark: CachePadded<AtomicU64>,
    bounds: Box<[CachePadded<AtomicU64>]>,
}

impl GlobalOrder {
    /// The order of a store whose next commit gets `next`, all before being durable.
    pub fn new(next: Lsn, shards_count: usize) -> Self {
        let atomic = |v: Lsn| CachePadded::new(AtomicU64::new(v.get()));
        GlobalOrder {
            next: atomic(next),
            watermark: atomic(next.before()),
            bounds: (0..shards_count).map(|_| atomic(Lsn::MAX)).collect(),
        }
    }

    /// The next LSN to be drawn.
    pub fn next(&self) -> Lsn {
        Lsn::new(self.next.load(Ordering::Acquire))
    }

    /// Draws `count` consecutive LSNs for `shard` and returns the first.
    pub fn draw(&self, shard: ShardId, count: u64) -> Lsn {
        let bound = &self.bounds[usize::from(shard.get())];
        let floor = self.next.load(Ordering::Acquire);
        if floor < bound.load(Ordering::Relaxed) {
            bound.store(floor, Ordering::SeqCst);
        }
        Lsn::new(self.next.fetch_add(count, Ordering::SeqCst))
    }

    /// Publishes that `shard` has nothing below `bound` that is not durable.
    pub fn publish(&self, shard: ShardId, bound: Lsn) {
        self.bounds[usize::from(shard.get())].store(bound.get(), Ordering::SeqCst);
    }

    /// What `shard` has published.
    pub fn bound(&self, shard: ShardId) -> Lsn {
        Lsn::new(self.bounds[usize::from(shard.get())].load(Ordering::SeqCst))
    }

    /// Recomputes the watermark and returns it.
    pub fn refresh(&self) -> Lsn {
        // The sequencer is read before the bounds: what is drawn after this read is above `next` anyway.
        let next = self.next.load(Ordering::SeqCst);
        let low = self.bounds.iter().map(|b| b.load(Ordering::SeqCst)).fold(next, u64::min);
        let found = low.saturating_sub(1);
        Lsn::new(self.watermark.fetch_max(found, Ordering::AcqRel).max(found))
    }

    /// All commits up to here are durable.
    pub fn watermark(&self) -> Lsn {
        Lsn::new(self.watermark.load(Ordering::Acquire))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An acknowledgement of an LSN that is not durable would be a lie after a crash.
    #[test]
    fn the_watermark_stays_below_what_is_not_durable() {
        let order = GlobalOrder::new(Lsn::new(5), 2);
        let (a, b) = (ShardId::new(0), ShardId::new(1));
        assert_eq!(order.refresh(), Lsn::new(4));
        assert_eq!(order.draw(a, 3), Lsn::new(5));
        assert_eq!(order.draw(b, 1), Lsn::new(8));
        assert_eq!(order.refresh(), Lsn::new(4));
        order.publish(b, Lsn::MAX);
        assert_eq!(order.refresh(), Lsn::new(4), "shard a still holds 5 back");
        order.publish(a, Lsn::new(7));
        assert_eq!(order.refresh(), Lsn::new(6));
        order.publish(a, Lsn::MAX);
        assert_eq!(order.refresh(), Lsn::new(8));
    }
}
