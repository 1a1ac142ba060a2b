//! Back-pressure: places for requests under way, over all handles.
//!
//! Invariants
//! 1. A request has a place from before it is submitted until it is answered.
//! 2. At most [`WAITERS_FACTOR`] times as many callers wait as there are places; others get `Busy`.
//! 3. A freed place wakes a waiter; one that gives up passes that on.

use crate::error::{Error, ErrorKind, Result};
use crossbeam_utils::CachePadded;
use event_listener::Event;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Callers that wait for a place, as a multiple of the places, before others get `Busy`.
const WAITERS_FACTOR: usize = 4;

pub(super) struct Places {
    under_way: CachePadded<AtomicUsize>,
    waiting: AtomicUsize,
    most: usize,
    free: Event,
}

/// Counts a caller that waits for a place, also if its future is dropped.
struct Waiting<'a>(&'a Places);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::AcqRel);
        // A wake-up that this caller got and did not use goes to the next.
        self.0.free.notify(1);
    }
}

impl Places {
    pub(super) fn new(most: usize) -> Self {
        Places {
            under_way: CachePadded::new(AtomicUsize::new(0)),
            waiting: AtomicUsize::new(0),
            most: most.max(1),
            free: Event::new(),
        }
    }

    fn try_take(&self) -> bool {
        let place = |n: usize| (n < self.most).then_some(n + 1);
        self.under_way.fetch_update(Ordering::AcqRel, Ordering::Acquire, place).is_ok()
    }

    /// Waits for a place.
    pub(super) async fn take(&self) -> Result<()> {
        if self.try_take() {
            return Ok(());
        }
        if self.waiting.fetch_add(1, Ordering::AcqRel) >= self.most.saturating_mul(WAITERS_FACTOR) {
            self.waiting.fetch_sub(1, Ordering::AcqRel);
            return Err(Error::new(
                ErrorKind::Busy,
                format_args!(
                    "{} requests are under way and as many as may wait do; wait for replies, or raise requests_max",
                    self.most
                ),
            ));
        }
        let _waiting = Waiting(self);
        loop {
            let listener = self.free.listen();
            if self.try_take() {
                return Ok(());
            }
            listener.await;
        }
    }

    /// Gives back `count` places.
    pub(super) fn leave(&self, count: usize) {
        if count > 0 {
            self.under_way.fetch_sub(count, Ordering::AcqRel);
            self.free.notify_additional(count);
        }
    }

    #[cfg(test)]
    pub(super) fn under_way(&self) -> usize {
        self.under_way.load(Ordering::SeqCst)
    }
}
