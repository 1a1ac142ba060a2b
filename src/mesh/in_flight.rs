//! The table of requests from other threads that wait for their replies.
//!
//! Invariants
//! 1. A slot lives from `register` until both sides are done with it: the reply has arrived, and
//!    the future has taken it or was dropped. Dropping a future never undoes its request, and leaks
//!    nothing.
//! 2. Keys carry a generation (`sharded-slab`): a late reply can't reach a later request in the
//!    same slot.
//! 3. The first completion counts; later ones are ignored.
//! 4. The highest bit of a key is never set: it is free to mark other keys that are used next to
//!    these.
//!
//! Nothing here waits: table and slots are lock-free. [`reply_slot`](super::reply_slot) implements
//! the slots.

use super::reply_slot::{Abandoned, Completed, Polled, ReplySlot};
use sharded_slab::{Config, Slab};
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

/// A configuration whose keys never use the highest bit.
struct Keys;

/// The most threads that may call at a time: as many as Linux allows a machine by default. The
/// table panics at one more, and has a pointer for each: 256 KiB.
const THREADS_MAX: usize = 1 << 15;

impl Config for Keys {
    const RESERVED_BITS: usize = 1;
    const MAX_THREADS: usize = THREADS_MAX;
}

/// The table, for replies of type `T`.
pub(crate) struct InFlight<T: 'static> {
    slots: Slab<ReplySlot<T>, Keys>,
}

impl<T: Send + 'static> InFlight<T> {
    pub(crate) fn new() -> Self {
        InFlight { slots: Slab::new_with_config() }
    }

    /// Registers a new request. Returns its key and the future of its reply, or `None` if the table
    /// is full.
    pub(crate) fn register(self: &Arc<Self>) -> Option<(u64, Reply<T>)> {
        let key = self.slots.insert(ReplySlot::default())?;
        Some((key as u64, Reply { table: self.clone(), key, done: false }))
    }

    /// Completes the request with this key.
    pub(crate) fn complete(&self, key: u64, result: T) {
        let key = key as usize;
        let Some(slot) = self.slots.get(key) else { return };
        if slot.complete(result) == Completed::Free {
            drop(slot);
            self.slots.remove(key);
        }
    }

    #[cfg(test)]
    pub(crate) fn contains(&self, key: u64) -> bool {
        self.slots.contains(key as usize)
    }
}

/// The future of one reply. Its output is `None` if the reply was already taken.
#[must_use = "the request is under way whether this is awaited or not"]
pub(crate) struct Reply<T: 'static> {
    table: Arc<InFlight<T>>,
    key: usize,
    done: bool,
}

impl<T: Send + 'static> Future for Reply<T> {
    type Output = Option<T>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        if self.done {
            return Poll::Ready(None);
        }
        let result = {
            let Some(slot) = self.table.slots.get(self.key) else { return Poll::Ready(None) };
            match slot.poll(cx.waker()) {
                Polled::Pending => return Poll::Pending,
                Polled::Free(result) => result,
            }
        };
        self.done = true;
        self.table.slots.remove(self.key);
        Poll::Ready(result.map(|result| *result))
    }
}

impl<T: 'static> Drop for Reply<T> {
    fn drop(&mut self) {
        if self.done {
            return;
        }
        let left =
            self.table.slots.get(self.key).is_none_or(|slot| slot.abandon() == Abandoned::Left);
        if !left {
            self.table.slots.remove(self.key);
        }
    }
}

#[cfg(all(test, not(corepage_loom)))]
mod tests {
    use super::*;
    use futures_lite::future::{block_on, poll_once};

    /// A reply that went to the wrong caller would report a commit that is not its own.
    #[test]
    fn each_request_gets_its_own_reply() {
        let table = Arc::new(InFlight::new());
        let (a, mut reply_a) = table.register().expect("there is room");
        let (b, reply_b) = table.register().expect("there is room");
        assert!(block_on(poll_once(&mut reply_a)).is_none());
        table.complete(b, 2);
        table.complete(a, 1);
        table.complete(a, 9);
        assert_eq!(block_on(reply_b), Some(2));
        assert_eq!(block_on(&mut reply_a), Some(1));
        assert_eq!(block_on(reply_a), None, "it was taken");
    }

    /// Callers give up all the time; none may cost anything afterwards.
    #[test]
    fn a_dropped_future_leaks_nothing() {
        let table = Arc::new(InFlight::new());
        for early in [true, false] {
            let (key, reply) = table.register().expect("there is room");
            if early {
                drop(reply);
                table.complete(key, 1);
            } else {
                table.complete(key, 1);
                drop(reply);
            }
            assert!(!table.contains(key));
        }
    }

    /// If this fails, a server with a thread for each client panics when the 4,097th calls the
    /// store.
    #[test]
    fn thousands_of_threads_may_call_at_a_time() {
        let (table, begun) = (Arc::new(InFlight::new()), std::sync::atomic::AtomicUsize::new(0));
        let all_called = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            let call = || {
                let (key, reply) = table.register().expect("there is room");
                table.complete(key, 1);
                assert!(block_on(reply).is_some());
                begun.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                // A thread that ends would leave its place to another, so all stay until all have
                // called.
                while !all_called.load(std::sync::atomic::Ordering::SeqCst) {
                    std::thread::park();
                }
            };
            let spawn =
                |_| std::thread::Builder::new().stack_size(128 << 10).spawn_scoped(scope, call);
            // A machine that does not allow that many threads tests with as many as it does.
            let threads: Vec<_> = (0..4200).map_while(|n| spawn(n).ok()).collect();
            let mut panicked = 0;
            while begun.load(std::sync::atomic::Ordering::SeqCst) + panicked < threads.len() {
                panicked = threads.iter().filter(|thread| thread.is_finished()).count();
                std::thread::yield_now();
            }
            all_called.store(true, std::sync::atomic::Ordering::SeqCst);
            threads.iter().for_each(|thread| thread.thread().unpark());
            assert_eq!(panicked, 0, "of {} threads", threads.len());
        });
    }

    /// The mark of requests that stay on their thread must never be part of a key.
    #[test]
    fn keys_leave_the_highest_bit_alone() {
        let table = Arc::new(InFlight::new());
        for _ in 0..10_000 {
            let (key, reply) = table.register().expect("there is room");
            assert_eq!(key >> 63, 0);
            table.complete(key, 1);
            assert!(block_on(reply).is_some());
        }
    }
}
