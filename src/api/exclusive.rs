//! A lock that is held across awaits, and passes from one holder to the next in the order of
//! arrival.
//!
//! Invariants
//! 1. There is at most one guard at a time.
//! 2. A caller that releases the lock and takes it again at once queues behind those that wait: a
//!    thread that frees the pages of a volume step by step can't keep out a caller that wants to
//!    resize one.
//! 3. A caller that gives up waiting blocks no other.

use event_listener::Event;
use std::sync::{Mutex, MutexGuard, PoisonError};

#[derive(Default)]
struct State {
    is_held: bool,
    waiting: usize,
    /// The last holder has left the lock to the callers that wait: it stays held until one of them
    /// takes it.
    is_handed_over: bool,
}

/// The lock.
#[derive(Default)]
pub(super) struct Exclusive {
    state: Mutex<State>,
    handed_over: Event,
}

/// Holds the lock until it is dropped.
pub(super) struct Guard<'a>(&'a Exclusive);

/// A caller that waits.
struct Waiting<'a>(&'a Exclusive);

impl Exclusive {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until the lock is free, and takes it.
    pub(super) async fn lock(&self) -> Guard<'_> {
        let (_waiting, mut turn) = {
            let mut state = self.state();
            if !state.is_held {
                state.is_held = true;
                return Guard(self);
            }
            state.waiting += 1;
            (Waiting(self), self.handed_over.listen())
        };
        loop {
            turn.await;
            let mut state = self.state();
            if std::mem::take(&mut state.is_handed_over) {
                return Guard(self);
            }
            // A caller that gave up passed its wake-up on after another one had taken the lock.
            turn = self.handed_over.listen();
        }
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.waiting -= 1;
        if state.waiting == 0 && std::mem::take(&mut state.is_handed_over) {
            state.is_held = false;
        }
    }
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state();
        debug_assert!(state.is_held && !state.is_handed_over);
        if state.waiting == 0 {
            state.is_held = false;
            return;
        }
        state.is_handed_over = true;
        drop(state);
        self.0.handed_over.notify(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_lite::future::{block_on, poll_once};
    use std::pin::pin;

    fn lock_of(exclusive: &Exclusive) -> Guard<'_> {
        block_on(exclusive.lock())
    }

    /// If this fails, resizing a volume waits until the last page of a deleted one is freed, which
    /// takes hours.
    #[test]
    fn whoever_waits_gets_the_lock_before_the_last_holder_again() {
        let exclusive = Exclusive::default();
        let guard = lock_of(&exclusive);
        let mut other = pin!(exclusive.lock());
        assert!(block_on(poll_once(&mut other)).is_none());
        drop(guard);
        let mut again = pin!(exclusive.lock());
        assert!(block_on(poll_once(&mut again)).is_none(), "it is another's turn");
        let guard = block_on(poll_once(&mut other)).expect("it was handed over");
        assert!(block_on(poll_once(&mut again)).is_none());
        drop(guard);
        drop(block_on(poll_once(&mut again)).expect("nobody else waits"));
        drop(lock_of(&exclusive));
    }

    /// If this fails, a call that a client abandons leaves the store unable to change a volume
    /// until it is reopened.
    #[test]
    fn who_gives_up_waiting_keeps_nobody_out() {
        for handed_over in [false, true] {
            for others_wait in [false, true] {
                let exclusive = Exclusive::default();
                let guard = lock_of(&exclusive);
                let mut gives_up = Box::pin(exclusive.lock());
                assert!(block_on(poll_once(&mut gives_up)).is_none());
                let mut other = pin!(exclusive.lock());
                if others_wait {
                    assert!(block_on(poll_once(&mut other)).is_none());
                }
                if handed_over {
                    drop(guard);
                    drop(gives_up);
                } else {
                    drop(gives_up);
                    drop(guard);
                }
                assert!(block_on(poll_once(&mut other)).is_some(), "{handed_over} {others_wait}");
            }
        }
    }

    /// With two holders, pages of a volume would be freed that it has just grown over.
    #[test]
    fn threads_hold_it_one_at_a_time() {
        let (exclusive, inside) = (Exclusive::default(), std::sync::atomic::AtomicU32::new(0));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..2000 {
                        let _guard = lock_of(&exclusive);
                        assert_eq!(inside.fetch_add(1, std::sync::atomic::Ordering::SeqCst), 0);
                        inside.fetch_sub(1, std::sync::atomic::Ordering::SeqCst);
                    }
                });
            }
        });
        assert!(!exclusive.state().is_held);
    }
}
