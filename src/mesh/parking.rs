//! Parking: how a thread announces that it waits, and how others wake it.
//!
//! ```text
//!   awake --park(level x)--> parked, also for level x --unpark, or a level >= x--> awake
//!                                                        (one caller, one system call)
//!     ^---- there is work after all, or the wait has ended ----'
//! ```
//! A *level* is a number that only rises, such as a watermark: a parked thread can wait for it to
//! reach a value.
//!
//! Invariants
//! 1. No wake-up is lost: `park` publishes, fences, and then looks for work; a thread that brings
//!    work makes it visible, fences, and then checks whether the thread is parked. One of the two
//!    sees the other.
//! 2. Only the caller that changes the word from parked to awake makes the system call.
//! 3. The waker keeps a wake-up that arrives between `park` and the wait.

use crate::base::sync::{AtomicU64, Ordering, fence};
use crossbeam::utils::CachePadded;
use std::sync::OnceLock;

const AWAKE: u64 = 0;
/// Parked without waiting for a level. Levels to wait for lie between the two constants.
const FOR_NO_LEVEL: u64 = u64::MAX;
const _: () = assert!(AWAKE + 1 < FOR_NO_LEVEL - 1);

/// How a thread is woken.
pub(crate) trait Wake {
    /// Ends the current or the next wait.
    fn wake(&self);
}

/// The parking word of one thread, and its waker.
pub(crate) struct Parking<W> {
    word: CachePadded<AtomicU64>,
    waker: OnceLock<W>,
}

impl<W: Wake> Parking<W> {
    pub(crate) fn new() -> Self {
        Parking { word: CachePadded::new(AtomicU64::new(AWAKE)), waker: OnceLock::new() }
    }

    /// Sets how the thread is woken: once, before any other thread can have a reason to wake it.
    pub(crate) fn set_waker(&self, waker: W) {
        assert!(self.waker.set(waker).is_ok(), "a thread has one waker");
    }

    /// Called before the thread waits, for `level` as well if one is given; `has_work` checks
    /// everything that could have arrived.
    ///
    /// Returns false if there is work, so that the thread must not wait; true if it may, and must
    /// call [`awake`](Self::awake) afterwards.
    pub(crate) fn park(&self, level: Option<u64>, has_work: impl FnOnce() -> bool) -> bool {
        assert_eq!(self.word.load(Ordering::Relaxed), AWAKE, "a thread that parks is awake");
        let parked = level.map_or(FOR_NO_LEVEL, |level| level.clamp(AWAKE + 1, FOR_NO_LEVEL - 1));
        self.word.store(parked, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        if has_work() {
            self.awake();
            return false;
        }
        true
    }

    /// Called when the thread is awake again.
    pub(crate) fn awake(&self) {
        self.word.store(AWAKE, Ordering::Release);
    }

    /// Wakes the thread if it is parked. The caller has brought something that the thread must see.
    pub(crate) fn unpark(&self) {
        fence(Ordering::SeqCst);
        if self.word.load(Ordering::Relaxed) != AWAKE {
            self.wake_parked();
        }
    }

    /// Wakes the thread if it is parked for a level up to `level`. The caller has fenced since the
    /// level rose ([`unpark_for_level`]).
    fn unpark_if_reached(&self, level: u64) {
        let word = self.word.load(Ordering::Relaxed);
        if word != AWAKE && word != FOR_NO_LEVEL && word <= level {
            self.wake_parked();
        }
    }

    /// Wakes the thread whether it is parked or not.
    pub(crate) fn force_unpark(&self) {
        fence(Ordering::SeqCst);
        self.word.store(AWAKE, Ordering::Release);
        if let Some(waker) = self.waker.get() {
            waker.wake();
        }
    }

    #[cold]
    fn wake_parked(&self) {
        if self.word.swap(AWAKE, Ordering::AcqRel) != AWAKE
            && let Some(waker) = self.waker.get()
        {
            waker.wake();
        }
    }
}

/// Wakes the threads that are parked for a level, once it has risen to `level`.
pub(crate) fn unpark_for_level<'a, W: Wake + 'a>(
    threads: impl Iterator<Item = &'a Parking<W>>,
    level: u64,
) {
    fence(Ordering::SeqCst);
    threads.for_each(|parking| parking.unpark_if_reached(level));
}

/// A waker that counts.
#[cfg(test)]
pub(crate) mod testing {
    use super::Wake;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[derive(Clone, Default)]
    pub(crate) struct CountingWaker(pub(crate) Arc<AtomicUsize>);

    impl CountingWaker {
        pub(crate) fn wakes(&self) -> usize {
            self.0.load(Ordering::SeqCst)
        }
    }

    impl Wake for CountingWaker {
        fn wake(&self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }
}

#[cfg(all(test, not(corepage_loom)))]
mod tests {
    use super::testing::CountingWaker;
    use super::*;

    fn parking() -> (Parking<CountingWaker>, CountingWaker) {
        let (parking, waker) = (Parking::new(), CountingWaker::default());
        parking.set_waker(waker.clone());
        (parking, waker)
    }

    /// A system call for each request to a shard that is awake would halve the rate of requests.
    #[test]
    fn only_a_parked_thread_is_woken_and_only_once() {
        let (parking, waker) = parking();
        parking.unpark();
        assert_eq!(waker.wakes(), 0, "it is awake");
        assert!(parking.park(None, || false));
        parking.unpark();
        parking.unpark();
        assert_eq!(waker.wakes(), 1);
        assert!(!parking.park(None, || true), "there is work");
        parking.unpark();
        assert_eq!(waker.wakes(), 1, "it did not park");
    }

    /// A thread that parked twice would overwrite the level that it waits for, and sleep through
    /// it.
    #[test]
    #[should_panic(expected = "a thread that parks is awake")]
    fn a_thread_parks_once_before_it_is_awake() {
        let (parking, _) = parking();
        assert!(parking.park(None, || false));
        parking.park(Some(7), || false);
    }

    /// A shard that is woken for every step of the watermark gets no work done.
    #[test]
    fn a_parked_thread_is_woken_for_the_level_that_it_waits_for() {
        let (parking, waker) = parking();
        assert!(parking.park(Some(7), || false));
        unpark_for_level([&parking].into_iter(), 6);
        assert_eq!(waker.wakes(), 0);
        unpark_for_level([&parking].into_iter(), 7);
        assert_eq!(waker.wakes(), 1);
        assert!(parking.park(None, || false));
        unpark_for_level([&parking].into_iter(), 100);
        assert_eq!(waker.wakes(), 1, "it waits for no level");
    }
}

#[cfg(all(test, corepage_loom))]
mod loom {
    use super::testing::CountingWaker;
    use super::*;
    use crate::base::sync::AtomicBool;
    use crate::base::sync::model::holds;
    use ::loom::sync::Arc;
    use ::loom::thread;

    fn parking() -> (Arc<Parking<CountingWaker>>, CountingWaker) {
        let (parking, waker) = (Parking::new(), CountingWaker::default());
        parking.set_waker(waker.clone());
        (Arc::new(parking), waker)
    }

    fn bring(
        unpark: fn(&Parking<CountingWaker>),
        park: fn(&Parking<CountingWaker>, &AtomicBool) -> bool,
    ) -> bool {
        holds(None, move |verdict| {
            let (parking, waker) = parking();
            let brought = Arc::new(AtomicBool::new(false));
            let (theirs, bringing) = (parking.clone(), brought.clone());
            let bringer = thread::spawn(move || {
                bringing.store(true, Ordering::Release);
                unpark(&theirs);
            });
            let waits = park(&parking, &brought);
            bringer.join().unwrap();
            // Otherwise it waits for ever.
            verdict.expect(!waits || waker.wakes() == 1);
        })
    }

    /// If a wake-up is lost, a request is not answered until something else happens to arrive.
    #[test]
    fn loom_what_is_brought_to_a_parking_thread_is_seen() {
        let park = |parking: &Parking<CountingWaker>, brought: &AtomicBool| {
            parking.park(None, || brought.load(Ordering::Acquire))
        };
        assert!(bring(Parking::unpark, park));
    }

    #[test]
    fn loom_mutants_of_parking_are_caught() {
        let park = |parking: &Parking<CountingWaker>, brought: &AtomicBool| {
            parking.park(None, || brought.load(Ordering::Acquire))
        };
        let no_fence = |parking: &Parking<CountingWaker>| {
            if parking.word.load(Ordering::Relaxed) != AWAKE {
                parking.wake_parked();
            }
        };
        assert!(!bring(no_fence, park), "a sender that does not fence");
        assert!(
            !bring(Parking::unpark, |parking, _| parking.park(None, || false)),
            "a receiver that does not check again"
        );
        let parks_late = |parking: &Parking<CountingWaker>, brought: &AtomicBool| {
            let has_work = brought.load(Ordering::Acquire);
            !has_work && parking.park(None, || false)
        };
        assert!(
            !bring(Parking::unpark, parks_late),
            "a receiver that checks before it announces that it parks"
        );
        let parks_unfenced = |parking: &Parking<CountingWaker>, brought: &AtomicBool| {
            parking.word.store(FOR_NO_LEVEL, Ordering::Release);
            !brought.load(Ordering::Acquire)
        };
        assert!(!bring(Parking::unpark, parks_unfenced), "a receiver that does not fence");
    }

    fn raise(announce: fn(&Parking<CountingWaker>, u64), recheck: bool) -> bool {
        const LEVEL: u64 = 7;
        holds(None, move |verdict| {
            let (parking, waker) = parking();
            let level = Arc::new(AtomicU64::new(0));
            let (theirs, raising) = (parking.clone(), level.clone());
            let raiser = thread::spawn(move || {
                raising.store(LEVEL, Ordering::Release);
                announce(&theirs, LEVEL);
            });
            let waits =
                parking.park(Some(LEVEL), || recheck && level.load(Ordering::Acquire) >= LEVEL);
            raiser.join().unwrap();
            // Otherwise it waits for ever.
            verdict.expect(!waits || waker.wakes() == 1);
        })
    }

    /// If this fails, a commit over two shards whose second part becomes durable last is
    /// acknowledged only by chance.
    #[test]
    fn loom_a_risen_level_is_seen_by_a_parking_thread() {
        assert!(raise(|parking, level| unpark_for_level([parking].into_iter(), level), true));
    }

    #[test]
    fn loom_mutants_of_the_level_wake_up_are_caught() {
        assert!(
            !raise(|parking, level| unpark_for_level([parking].into_iter(), level), false),
            "does not check again"
        );
        assert!(!raise(|parking, level| parking.unpark_if_reached(level), true), "does not fence");
    }
}
