//! Wakes a thread that waits in its disk, from any thread.
//!
//! ```text
//!   awake --prepare--> asleep --wake: writes the eventfd--> notified --awake--> awake
//!     \--wake--> notified --prepare: says no--> awake
//! ```
//! Invariants
//! 1. A wake-up is kept until a wait has seen it: a `wake` before the wait ends that wait at once.
//! 2. Writes before `wake` are visible to the thread after the wait that it ended.
//! 3. Waking a thread that does not sleep makes no system call.
//!
//! It does *not* say why the thread was woken.

use crate::base::sync::{AtomicU32, Ordering};
use crossbeam::sync::Unparker;
use rustix::event::EventfdFlags;
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

const AWAKE: u32 = 0;
const NOTIFIED: u32 = 1;
const ASLEEP: u32 = 2;

/// Ends the current or the next [`Disk::wait`](super::Disk::wait) of the disk that it comes from.
#[derive(Clone)]
pub struct DiskWaker(How);

#[derive(Clone)]
enum How {
    Park(Unparker),
    Event(Arc<Sleep>),
}

impl DiskWaker {
    /// Wakes the disk's thread, which then sees everything that was written before.
    pub fn wake(&self) {
        match &self.0 {
            How::Park(unparker) => {
                unparker.unpark();
            }
            How::Event(sleep) => sleep.wake(),
        }
    }

    pub(super) fn of_parker(unparker: Unparker) -> Self {
        DiskWaker(How::Park(unparker))
    }

    pub(super) fn of_sleep(sleep: Arc<Sleep>) -> Self {
        DiskWaker(How::Event(sleep))
    }
}

impl fmt::Debug for DiskWaker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DiskWaker")
    }
}

/// A thread that sleeps in a ring with a read of this eventfd in it.
pub(super) struct Sleep {
    state: State,
    event: OwnedFd,
}

/// Whether the thread is awake, asleep or notified.
struct State(AtomicU32);

impl State {
    /// Marks the thread as asleep. False: it was woken before, and must not sleep.
    fn prepare(&self) -> bool {
        if self.0.compare_exchange(AWAKE, ASLEEP, Ordering::SeqCst, Ordering::SeqCst).is_ok() {
            return true;
        }
        self.awake();
        false
    }

    fn awake(&self) {
        self.0.swap(AWAKE, Ordering::SeqCst);
    }

    /// Notifies the thread. True: it sleeps, and this is the first wake-up.
    fn wake(&self) -> bool {
        self.0.swap(NOTIFIED, Ordering::SeqCst) == ASLEEP
    }
}

impl Sleep {
    pub(super) fn new() -> std::io::Result<Sleep> {
        let event = rustix::event::eventfd(0, EventfdFlags::CLOEXEC)?;
        Ok(Sleep { state: State(AtomicU32::new(AWAKE)), event })
    }

    pub(super) fn event(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    /// Called before the thread sleeps. False: it was woken already, and must not sleep.
    pub(super) fn prepare(&self) -> bool {
        self.state.prepare()
    }

    /// Called when the thread is awake again; it has seen all wake-ups until now.
    pub(super) fn awake(&self) {
        self.state.awake();
    }

    fn wake(&self) {
        if self.state.wake() {
            self.ring();
        }
    }

    /// Completes the read of the eventfd. A failed write does no harm: a full counter is readable,
    /// too.
    pub(super) fn ring(&self) {
        let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
    }
}

#[cfg(all(test, corepage_loom))]
mod loom {
    use super::*;
    use crate::base::sync::model::{self, Verdict};
    use ::loom::sync::Arc;
    use ::loom::thread;

    /// The state, the counter of the eventfd, and the news of two other threads.
    struct Shared {
        state: State,
        event: AtomicU32,
        news: [AtomicU32; 2],
    }

    /// Two threads leave news and wake the third, which looks for news and sleeps if some is
    /// missing. It must see both before it sleeps for good, which is to sleep while no thread is
    /// going to ring.
    fn run(verdict: &Verdict, prepare: fn(&State) -> bool, wake: fn(&State) -> bool) {
        let shared = Arc::new(Shared {
            state: State(AtomicU32::new(AWAKE)),
            event: AtomicU32::new(0),
            news: [AtomicU32::new(0), AtomicU32::new(0)],
        });
        let wakers: Vec<_> = (0..2)
            .map(|i| {
                let shared = shared.clone();
                thread::spawn(move || {
                    shared.news[i].store(1, Ordering::Relaxed);
                    if wake(&shared.state) {
                        shared.event.fetch_add(1, Ordering::SeqCst);
                    }
                })
            })
            .collect();
        let seen = || shared.news.iter().map(|news| news.load(Ordering::Relaxed)).sum::<u32>();
        // It looks, and perhaps begins to sleep.
        let before = seen();
        let sleeps = before < 2 && prepare(&shared.state);
        wakers.into_iter().for_each(|waker| waker.join().unwrap());
        let rings = shared.event.load(Ordering::SeqCst);
        if sleeps {
            // It sleeps with news that it has not seen, so it must have been rung, exactly once.
            verdict.expect(rings == 1);
        } else {
            verdict.expect(rings == 0);
            // It does not sleep: the news that kept it awake is visible at the next look, or kept
            // for the next sleep.
            verdict.expect(before == 2 || seen() == 2 || !prepare(&shared.state));
        }
    }

    fn holds(prepare: fn(&State) -> bool, wake: fn(&State) -> bool) -> bool {
        model::holds(None, move |verdict| run(verdict, prepare, wake))
    }

    /// If a wake-up is lost, a request waits until the next one, which may never come.
    #[test]
    fn loom_no_wake_up_is_lost_and_none_is_rung_twice() {
        assert!(holds(State::prepare, State::wake));
    }

    #[test]
    fn loom_mutants_of_the_sleep_are_caught() {
        let deaf = |state: &State| {
            state.0.store(ASLEEP, Ordering::SeqCst);
            true
        };
        assert!(!holds(deaf, State::wake), "a sleeper that does not check whether it was woken");
        let lazy = |state: &State| {
            let asleep = state.0.load(Ordering::SeqCst) == ASLEEP;
            state.0.store(NOTIFIED, Ordering::SeqCst);
            asleep
        };
        assert!(!holds(State::prepare, lazy), "a load and then a store");
    }
}
