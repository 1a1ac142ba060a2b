//! The global order: the sequencer, each shard's bound, and the watermark.
//!
//! Invariants
//! 1. An LSN is allocated once; LSNs are allocated in order by one read-modify-write.
//! 2. A shard's bound is at most every LSN that it has allocated, or is about to allocate, and that
//!    is not durable. It is lowered *before* the allocation of its LSN and raised only after the
//!    flush; idle is [`Lsn::MAX`].
//! 3. The watermark never falls. All commits at or below it are durable.
//! 4. A shard that raises its bound refreshes the watermark afterwards. So of two shards that raise
//!    theirs at the same time the later one sees both, and no commit waits for an event that has
//!    already happened.
//!
//! This is the only state that shards share. It does not know pages, logs or waiters.

use crate::base::sync::{AtomicU64, Ordering};
use crate::base::{Lsn, ShardId};
use crossbeam::utils::CachePadded;

/// The most LSNs above the watermark. A new epoch begins this far above everything found, so that
/// an LSN that was allocated, and perhaps returned to a caller, but never reached a device is not
/// allocated again.
pub(crate) const LSN_AHEAD_MAX: u64 = 1 << 24;

/// Sequencer, bounds and watermark of one open store.
#[derive(Debug)]
pub struct GlobalOrder {
    next: CachePadded<AtomicU64>,
    watermark: CachePadded<AtomicU64>,
    bounds: Box<[CachePadded<AtomicU64>]>,
}

impl GlobalOrder {
    /// The order of a store whose next commit gets `next`; all before it is durable.
    pub fn new(next: Lsn, shards_count: usize) -> Self {
        let atomic = |v: Lsn| CachePadded::new(AtomicU64::new(v.get()));
        GlobalOrder {
            next: atomic(next),
            watermark: atomic(next.before()),
            bounds: (0..shards_count).map(|_| atomic(Lsn::MAX)).collect(),
        }
    }

    /// The next LSN to allocate.
    pub fn next(&self) -> Lsn {
        Lsn::new(self.next.load(Ordering::Acquire))
    }

    /// Allocates `count` consecutive LSNs for `shard` and returns the first. The watermark may rise
    /// meanwhile: the caller wakes what waits for it, as after a [`refresh`](Self::refresh).
    pub fn allocate_lsns(&self, shard: ShardId, count: u64) -> Lsn {
        let bound = &self.bounds[usize::from(shard.get())];
        let floor = self.next.load(Ordering::Acquire);
        let lowers = floor < bound.load(Ordering::Relaxed);
        if lowers {
            bound.store(floor, Ordering::SeqCst);
        }
        let first = self.next.fetch_add(count, Ordering::SeqCst);
        if lowers && first > floor {
            // Others allocated in between: their LSNs must not wait for these.
            bound.store(first, Ordering::SeqCst);
            // And one of them may have become durable meanwhile: the shard that flushed it computed
            // the watermark from the lower bound, and does not look again.
            self.refresh();
        }
        Lsn::new(first)
    }

    /// Publishes that everything of `shard` below `bound` is durable. A [`refresh`](Self::refresh)
    /// must follow: invariant 4.
    pub fn publish(&self, shard: ShardId, bound: Lsn) {
        self.bounds[usize::from(shard.get())].store(bound.get(), Ordering::SeqCst);
    }

    /// The bound that `shard` has published.
    pub fn bound(&self, shard: ShardId) -> Lsn {
        Lsn::new(self.bounds[usize::from(shard.get())].load(Ordering::SeqCst))
    }

    /// Recomputes the watermark and returns it.
    pub fn refresh(&self) -> Lsn {
        // The sequencer is read before the bounds: what is allocated after this read is above
        // `next` anyway.
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

#[cfg(all(test, not(corepage_loom)))]
mod tests {
    use super::*;

    /// An acknowledgement of an LSN that is not durable would be a lie after a crash.
    #[test]
    fn the_watermark_stays_below_what_is_not_durable() {
        let order = GlobalOrder::new(Lsn::new(5), 2);
        let (a, b) = (ShardId::new(0), ShardId::new(1));
        assert_eq!(order.refresh(), Lsn::new(4));
        assert_eq!(order.allocate_lsns(a, 3), Lsn::new(5));
        assert_eq!(order.allocate_lsns(b, 1), Lsn::new(8));
        assert_eq!(order.refresh(), Lsn::new(4));
        order.publish(b, Lsn::MAX);
        assert_eq!(order.refresh(), Lsn::new(4), "shard a still holds 5 back");
        order.publish(a, Lsn::new(7));
        assert_eq!(order.refresh(), Lsn::new(6));
        order.publish(a, Lsn::MAX);
        assert_eq!(order.refresh(), Lsn::new(8));
    }
}

#[cfg(all(test, corepage_loom))]
mod loom {
    use super::*;
    use crate::base::sync::model::{self, Verdict};
    use ::loom::sync::Arc;
    use ::loom::thread;

    type Allocate = fn(&GlobalOrder, ShardId) -> Lsn;
    type Refresh = fn(&GlobalOrder) -> Lsn;

    /// Shards allocate, wait for their device (here: nothing), and publish; one that refreshes at
    /// any moment must not be told that an LSN is durable which was allocated and is not.
    /// `flushed[lsn]` is set before its bound is raised. The first shard allocates `allocations`
    /// times before any of it is durable, the others once.
    fn run(verdict: &Verdict, shards: u16, allocations: u16, allocate: Allocate, refresh: Refresh) {
        let order = Arc::new(GlobalOrder::new(Lsn::new(1), usize::from(shards)));
        let flushed: Arc<Vec<AtomicU64>> = Arc::new((0..8).map(|_| AtomicU64::new(0)).collect());
        let writers: Vec<_> = (1..shards)
            .map(|shard| {
                let (order, flushed, verdict) = (order.clone(), flushed.clone(), verdict.clone());
                thread::spawn(move || {
                    let lsn = allocate(&order, ShardId::new(shard));
                    flushed[lsn.get() as usize].store(1, Ordering::Release);
                    order.publish(ShardId::new(shard), Lsn::MAX);
                    check(&verdict, &flushed, refresh(&order));
                })
            })
            .collect();
        check(verdict, &flushed, refresh(&order));
        let allocated: Vec<Lsn> =
            (0..allocations).map(|_| allocate(&order, ShardId::new(0))).collect();
        check(verdict, &flushed, refresh(&order));
        for (no, lsn) in allocated.iter().enumerate() {
            flushed[lsn.get() as usize].store(1, Ordering::Release);
            order.publish(ShardId::new(0), allocated.get(no + 1).copied().unwrap_or(Lsn::MAX));
        }
        writers.into_iter().for_each(|writer| writer.join().unwrap());
        // An idle store holds nothing back.
        verdict.expect(refresh(&order) == Lsn::new(u64::from(shards - 1 + allocations)));
    }

    fn check(verdict: &Verdict, flushed: &[AtomicU64], watermark: Lsn) {
        (1..=watermark.get() as usize)
            .for_each(|lsn| verdict.expect(flushed[lsn].load(Ordering::Acquire) == 1));
    }

    /// One shard allocates and makes its commit durable while another allocates and does not. Each
    /// looks at the watermark once, afterwards; then nothing more happens.
    fn allocate_beside_a_flush(allocate: Allocate) -> bool {
        model::holds(None, move |verdict| {
            let order = Arc::new(GlobalOrder::new(Lsn::new(1), 2));
            let theirs = order.clone();
            let flusher = thread::spawn(move || {
                let lsn = allocate(&theirs, ShardId::new(0));
                theirs.publish(ShardId::new(0), Lsn::MAX);
                theirs.refresh();
                lsn
            });
            let not_durable = allocate(&order, ShardId::new(1));
            let durable = flusher.join().unwrap();
            // The only LSN that may hold it back is one before it.
            verdict.expect(durable > not_durable || order.watermark() >= durable);
        })
    }

    /// A durable commit whose acknowledgement waits until another shard happens to flush something
    /// of its own.
    #[test]
    fn loom_an_allocation_holds_no_earlier_durable_commit_back() {
        assert!(allocate_beside_a_flush(allocate_one));
        let does_not_refresh = |order: &GlobalOrder, shard: ShardId| {
            let bound = &order.bounds[usize::from(shard.get())];
            let floor = order.next.load(Ordering::Acquire);
            bound.store(floor, Ordering::SeqCst);
            let first = order.next.fetch_add(1, Ordering::SeqCst);
            bound.store(first, Ordering::SeqCst);
            Lsn::new(first)
        };
        assert!(!allocate_beside_a_flush(does_not_refresh), "a bound that rises without a refresh");
    }

    fn holds(
        shards: u16,
        preemptions: Option<usize>,
        allocate: Allocate,
        refresh: Refresh,
    ) -> bool {
        model::holds(preemptions, move |verdict| run(verdict, shards, 1, allocate, refresh))
    }

    /// As `holds`, of two shards, the first of which allocates twice.
    fn holds_twice(preemptions: Option<usize>, allocate: Allocate) -> bool {
        model::holds(preemptions, move |verdict| run(verdict, 2, 2, allocate, GlobalOrder::refresh))
    }

    fn allocate_one(order: &GlobalOrder, shard: ShardId) -> Lsn {
        order.allocate_lsns(shard, 1)
    }

    /// An acknowledgement of an LSN that is not durable is a commit that a crash takes back.
    #[test]
    fn loom_the_watermark_stays_below_what_is_allocated_and_not_durable() {
        assert!(holds(2, None, allocate_one, GlobalOrder::refresh), "two shards");
        assert!(holds(3, Some(3), allocate_one, GlobalOrder::refresh), "three shards");
        assert!(holds_twice(Some(3), allocate_one), "one allocates again");
    }

    /// The rules of the design, broken one at a time.
    #[test]
    fn loom_mutants_of_the_global_order_are_caught() {
        let publishes_late = |order: &GlobalOrder, shard: ShardId| {
            let lsn = order.next.fetch_add(1, Ordering::SeqCst);
            order.bounds[usize::from(shard.get())].store(lsn, Ordering::SeqCst);
            Lsn::new(lsn)
        };
        assert!(
            !holds(2, None, publishes_late, GlobalOrder::refresh),
            "bound published after the allocation"
        );
        let reads_late = |order: &GlobalOrder| {
            let low =
                order.bounds.iter().map(|b| b.load(Ordering::SeqCst)).fold(u64::MAX, u64::min);
            let found = low.min(order.next.load(Ordering::SeqCst)).saturating_sub(1);
            Lsn::new(order.watermark.fetch_max(found, Ordering::AcqRel).max(found))
        };
        assert!(!holds(2, None, allocate_one, reads_late), "sequencer read after the bounds");
        let forgets =
            |order: &GlobalOrder, _: ShardId| Lsn::new(order.next.fetch_add(1, Ordering::SeqCst));
        assert!(!holds(2, None, forgets, GlobalOrder::refresh), "no bound at all");
        let allocates_relaxed = |order: &GlobalOrder, shard: ShardId| {
            let floor = order.next.load(Ordering::Relaxed);
            order.bounds[usize::from(shard.get())].store(floor, Ordering::Relaxed);
            Lsn::new(order.next.fetch_add(1, Ordering::Relaxed))
        };
        assert!(
            !holds(2, None, allocates_relaxed, GlobalOrder::refresh),
            "an allocation that releases nothing"
        );
        let raises = |order: &GlobalOrder, shard: ShardId| {
            let bound = &order.bounds[usize::from(shard.get())];
            let floor = order.next.load(Ordering::Acquire);
            let lowers = floor < bound.load(Ordering::Relaxed);
            if lowers {
                bound.store(floor, Ordering::SeqCst);
            }
            let first = order.next.fetch_add(1, Ordering::SeqCst);
            if lowers || first > floor {
                bound.store(first, Ordering::SeqCst);
            }
            Lsn::new(first)
        };
        assert!(
            !holds_twice(Some(3), raises),
            "an allocation that raises the bound over an earlier one"
        );
    }
}
