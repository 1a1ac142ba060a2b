//! Where a shard's thread says that it waits, and how it is woken.
//!
//! ```text
//!   awake --park(x)--> parked, also for LSN x --rouse, or raised(w >= x): one caller, one system call--> awake
//!     ^---- something is there after all, or the wait has ended ----'
//! ```
//! Invariants
//! 1. No wake-up is lost: `park` publishes, fences, and then looks for work; who brings work makes it visible, fences,
//!    and then looks whether the thread is parked. One of the two sees the other.
//! 2. Only the one who takes the slot from parked to awake makes the system call.
//! 3. The disk's waker keeps a wake-up that comes between `park` and the wait.

use crate::base::Lsn;
use crate::base::sync::{AtomicU64, Ordering, fence};
use crate::io::DiskWaker;
use crossbeam_utils::CachePadded;
use std::sync::OnceLock;

const AWAKE: u64 = 0;
/// Parked, and no LSN is waited for. Real LSNs lie between.
const FOR_NO_LSN: u64 = u64::MAX;

/// How a thread is woken.
pub(crate) trait Wake {
    /// Ends the present or the next wait.
    fn wake(&self);
}

impl Wake for DiskWaker {
    fn wake(&self) {
        DiskWaker::wake(self);
    }
}

/// The parking slot of one shard.
pub(crate) struct Parking<W = DiskWaker> {
    slot: CachePadded<AtomicU64>,
    waker: OnceLock<W>,
}

impl<W: Wake> Parking<W> {
    pub(crate) fn new() -> Self {
        Parking { slot: CachePadded::new(AtomicU64::new(AWAKE)), waker: OnceLock::new() }
    }

    /// How the thread is woken; once, before anybody can have a reason to.
    pub(crate) fn set_waker(&self, waker: W) {
        assert!(self.waker.set(waker).is_ok(), "a thread has one waker");
    }

    /// The thread is about to wait, for `lsn` to become durable too; `has_work` looks for everything that could have
    /// come. False: there is work, it must not wait. True: it may, and says [`awake`](Self::awake) afterwards.
    pub(crate) fn park(&self, lsn: Option<Lsn>, has_work: impl FnOnce() -> bool) -> bool {
        let state = lsn.map_or(FOR_NO_LSN, |lsn| lsn.get().clamp(AWAKE + 1, FOR_NO_LSN - 1));
        self.slot.store(state, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        if has_work() {
            self.awake();
            return false;
        }
        true
    }

    /// The thread is awake.
    pub(crate) fn awake(&self) {
        self.slot.store(AWAKE, Ordering::Release);
    }

    /// Something was brought to the thread: it must see it.
    pub(crate) fn rouse(&self) {
        fence(Ordering::SeqCst);
        if self.slot.load(Ordering::Relaxed) != AWAKE {
            self.wake_parked();
        }
    }

    /// Everything up to `watermark` is durable: the thread must see it if it waits for that. The caller has fenced
    /// since the watermark rose ([`raised`]).
    fn watermark_rose(&self, watermark: Lsn) {
        let state = self.slot.load(Ordering::Relaxed);
        if state != AWAKE && state != FOR_NO_LSN && state <= watermark.get() {
            self.wake_parked();
        }
    }

    /// Wakes the thread whether it is parked or not.
    pub(crate) fn alarm(&self) {
        fence(Ordering::SeqCst);
        self.slot.store(AWAKE, Ordering::Release);
        if let Some(waker) = self.waker.get() {
            waker.wake();
        }
    }

    #[cold]
    fn wake_parked(&self) {
        if self.slot.swap(AWAKE, Ordering::AcqRel) != AWAKE
            && let Some(waker) = self.waker.get()
        {
            waker.wake();
        }
    }
}

/// The watermark has risen to `watermark`: wakes those that are parked and wait for it.
pub(crate) fn raised<'a, W: Wake + 'a>(slots: impl Iterator<Item = &'a Parking<W>>, watermark: Lsn) {
    fence(Ordering::SeqCst);
    slots.for_each(|slot| slot.watermark_rose(watermark));
}

/// A waker that remembers.
#[cfg(test)]
pub(super) mod testing {
    use super::Wake;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[derive(Clone, Default)]
    pub(in crate::mesh) struct Bell(pub(in crate::mesh) Arc<AtomicUsize>);

    impl Bell {
        pub(in crate::mesh) fn rings(&self) -> usize {
            self.0.load(Ordering::SeqCst)
        }
    }

    impl Wake for Bell {
        fn wake(&self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }
}

#[cfg(all(test, not(corepage_loom)))]
mod tests {
    use super::testing::Bell;
    use super::*;

    fn slot() -> (Parking<Bell>, Bell) {
        let (slot, bell) = (Parking::new(), Bell::default());
        slot.set_waker(bell.clone());
        (slot, bell)
    }

    /// A system call for each request to a shard that is awake anyway would halve the rate of requests.
    #[test]
    fn only_a_parked_thread_is_woken_and_only_once() {
        let (slot, bell) = slot();
        slot.rouse();
        assert_eq!(bell.rings(), 0, "it is awake");
        assert!(slot.park(None, || false));
        slot.rouse();
        slot.rouse();
        assert_eq!(bell.rings(), 1);
        assert!(!slot.park(None, || true), "there is work");
        slot.rouse();
        assert_eq!(bell.rings(), 1, "it did not park");
    }

    /// A shard that is woken for every step of the watermark does no work of its own.
    #[test]
    fn a_parked_thread_is_woken_for_the_lsn_that_it_waits_for() {
        let (slot, bell) = slot();
        assert!(slot.park(Some(Lsn::new(7)), || false));
        raised([&slot].into_iter(), Lsn::new(6));
        assert_eq!(bell.rings(), 0);
        raised([&slot].into_iter(), Lsn::new(7));
        assert_eq!(bell.rings(), 1);
        assert!(slot.park(None, || false));
        raised([&slot].into_iter(), Lsn::new(100));
        assert_eq!(bell.rings(), 1, "it waits for no LSN");
    }
}

#[cfg(all(test, corepage_loom))]
mod loom {
    use super::testing::Bell;
    use super::*;
    use crate::base::ShardId;
    use crate::base::sync::AtomicBool;
    use crate::base::sync::model::holds;
    use crate::engine::order::GlobalOrder;
    use ::loom::sync::Arc;
    use ::loom::thread;

    fn slot() -> (Arc<Parking<Bell>>, Bell) {
        let (slot, bell) = (Parking::new(), Bell::default());
        slot.set_waker(bell.clone());
        (Arc::new(slot), bell)
    }

    fn bring(rouse: fn(&Parking<Bell>), park: fn(&Parking<Bell>, &AtomicBool) -> bool) -> bool {
        holds(None, move |verdict| {
            let (slot, bell) = slot();
            let brought = Arc::new(AtomicBool::new(false));
            let (theirs, bringing) = (slot.clone(), brought.clone());
            let bringer = thread::spawn(move || {
                bringing.store(true, Ordering::Release);
                rouse(&theirs);
            });
            let waits = park(&slot, &brought);
            bringer.join().unwrap();
            // Otherwise it waits for ever.
            verdict.expect(!waits || bell.rings() == 1);
        })
    }

    /// A lost wake-up is a request that nobody answers until something else happens to arrive.
    #[test]
    fn loom_what_is_brought_to_a_parking_thread_is_seen() {
        let park = |slot: &Parking<Bell>, brought: &AtomicBool| slot.park(None, || brought.load(Ordering::Acquire));
        assert!(bring(Parking::rouse, park));
    }

    #[test]
    fn loom_mutants_of_parking_are_caught() {
        let park = |slot: &Parking<Bell>, brought: &AtomicBool| slot.park(None, || brought.load(Ordering::Acquire));
        let no_fence = |slot: &Parking<Bell>| {
            if slot.slot.load(Ordering::Relaxed) != AWAKE {
                slot.wake_parked();
            }
        };
        assert!(!bring(no_fence, park), "a sender that does not fence");
        assert!(!bring(Parking::rouse, |slot, _| slot.park(None, || false)), "a receiver that does not look again");
        let parks_late = |slot: &Parking<Bell>, brought: &AtomicBool| {
            let has_work = brought.load(Ordering::Acquire);
            !has_work && slot.park(None, || false)
        };
        assert!(!bring(Parking::rouse, parks_late), "a receiver that looks before it says that it parks");
        let parks_unfenced = |slot: &Parking<Bell>, brought: &AtomicBool| {
            slot.slot.store(FOR_NO_LSN, Ordering::Release);
            !brought.load(Ordering::Acquire)
        };
        assert!(!bring(Parking::rouse, parks_unfenced), "a receiver that does not fence");
    }

    fn raise(announce: fn(&Parking<Bell>, Lsn), recheck: bool) -> bool {
        holds(None, move |verdict| {
            let (slot, bell) = slot();
            let order = Arc::new(GlobalOrder::new(Lsn::new(1), 2));
            let (shard, lsn) = (ShardId::new(0), order.draw(ShardId::new(0), 1));
            let (theirs, raising) = (slot.clone(), order.clone());
            let raiser = thread::spawn(move || {
                raising.publish(shard, Lsn::MAX);
                announce(&theirs, raising.refresh());
            });
            let waits = slot.park(Some(lsn), || recheck && order.watermark() >= lsn);
            raiser.join().unwrap();
            // Otherwise it waits for ever.
            verdict.expect(!waits || bell.rings() == 1);
        })
    }

    /// A commit over two shards whose second half is durable last would be acknowledged only by chance.
    #[test]
    fn loom_a_risen_watermark_is_seen_by_a_parking_thread() {
        assert!(raise(|slot, watermark| raised([slot].into_iter(), watermark), true));
    }

    /// As the drivers do it: one shard parks until its commit is durable, after a look at the watermark that was held
    /// back by another shard's draw; that one announces what its draw made of the watermark.
    #[test]
    fn loom_a_commit_that_a_draw_held_back_wakes_its_shard() {
        assert!(holds(None, |verdict| {
            let (slot, bell) = slot();
            let order = Arc::new(GlobalOrder::new(Lsn::new(1), 2));
            let (theirs, drawing) = (slot.clone(), order.clone());
            let drawer = thread::spawn(move || {
                let seen = drawing.watermark();
                let lsn = drawing.draw(ShardId::new(1), 1);
                let watermark = drawing.watermark();
                if watermark > seen {
                    raised([&*theirs].into_iter(), watermark);
                }
                lsn
            });
            let lsn = order.draw(ShardId::new(0), 1);
            order.publish(ShardId::new(0), Lsn::MAX);
            let durable = order.refresh() >= lsn;
            let waits = !durable && slot.park(Some(lsn), || order.watermark() >= lsn);
            let not_durable = drawer.join().unwrap();
            verdict.expect(!waits || not_durable < lsn || bell.rings() == 1);
        }));
    }

    #[test]
    fn loom_mutants_of_the_watermark_wake_up_are_caught() {
        assert!(!raise(|slot, watermark| raised([slot].into_iter(), watermark), false), "does not look again");
        assert!(!raise(|slot, watermark| slot.watermark_rose(watermark), true), "does not fence");
    }
}
