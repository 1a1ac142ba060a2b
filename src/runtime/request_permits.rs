//! Back-pressure: permits for requests in flight, and for the bytes that they carry.
//!
//! ```text
//!   acquire --room--> in flight --answered: release--> the first waiter gets a permit and is woken
//!     |no room                                       ^
//!     v                                              |
//!   waits, in the order of arrival ------------------/
//! ```
//! Invariants
//! 1. A request has a permit, and its bytes are counted, from before it is submitted until it is
//!    answered.
//! 2. A permit is granted while fewer than `permits_max` are taken and fewer than `bytes_max` bytes
//!    are counted. So a request of any size gets one, at most one request exceeds the limit of
//!    bytes, and a large request waits no longer than a small one.
//! 3. First come, first served: no request overtakes one that waits. No request waits while none is
//!    in flight.
//! 4. At most [`WAITERS_FACTOR`] times as many callers wait as there are permits; more get `Busy`.
//! 5. Whoever releases a permit grants it to the first waiter. A waiter that gives up releases a
//!    permit that it was granted.
//!
//! Without waiters, a request costs one atomic operation to acquire, and any number that end
//! together cost one to release. It does *not* know what a request carries: that is
//! [`request_bytes`](crate::engine::request_bytes).

use crate::base::error::{Error, ErrorKind, Result};
use crate::base::sync::{AtomicU64, Mutex, MutexGuard, Ordering};
use crossbeam::utils::CachePadded;
use smallvec::SmallVec;
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::PoisonError;
use std::task::{Context, Poll, Waker};

/// Callers that may wait, as a multiple of the permits, before more get `Busy`.
const WAITERS_FACTOR: usize = 4;

/// The most bytes that one request is charged with: more than any memory, and small enough that the
/// sum of all fits into the word.
pub(super) const CHARGED_BYTES_MAX: u64 = 1 << 40;

/// Set while callers wait.
const HAS_WAITERS: u64 = 1;
/// Above this bit are 42 bits for the bytes, and above those 21 for the permits.
const BYTES_SHIFT: u32 = 1;
const PERMITS_SHIFT: u32 = 43;
const BYTES_MASK: u64 = (1 << (PERMITS_SHIFT - BYTES_SHIFT)) - 1;
const PERMITS_MAX: u64 = (1 << (u64::BITS - PERMITS_SHIFT)) - 1;
/// `requests_max` is at most 2^20, and the bytes of a shard are a sixteenth of its memory, which is
/// at most 2^42.
const _: () = assert!(PERMITS_MAX >= 1 << 20 && (1 << 38) + CHARGED_BYTES_MAX <= BYTES_MASK);

/// The state in one word: permits and bytes that are taken, and whether callers wait.
#[derive(Clone, Copy)]
struct State(u64);

impl State {
    fn permits(self) -> u64 {
        self.0 >> PERMITS_SHIFT
    }

    fn bytes(self) -> u64 {
        self.0 >> BYTES_SHIFT & BYTES_MASK
    }

    fn has_waiters(self) -> bool {
        self.0 & HAS_WAITERS != 0
    }
}

fn packed(permits: u64, bytes: u64) -> u64 {
    permits << PERMITS_SHIFT | bytes << BYTES_SHIFT
}

pub(super) struct RequestPermits {
    state: CachePadded<AtomicU64>,
    permits_max: u64,
    bytes_max: u64,
    waiting: Mutex<WaitQueue>,
}

/// Waiting callers with their bytes, in the order of arrival. A caller whose number is gone has
/// been granted its permit.
#[derive(Default)]
struct WaitQueue {
    next: u64,
    callers: BTreeMap<u64, (u64, Waker)>,
}

/// Wakers to call once the lock is released.
type Wakers = SmallVec<[Waker; 4]>;

/// The future permit of a waiting caller.
struct PermitFuture<'a> {
    permits: &'a RequestPermits,
    number: u64,
    bytes: u64,
    done: bool,
}

impl RequestPermits {
    /// Permits for `permits_max` requests with `bytes_max` bytes together.
    pub(super) fn new(permits_max: usize, bytes_max: u64) -> Self {
        assert!(
            permits_max as u64 <= PERMITS_MAX && bytes_max <= BYTES_MASK - CHARGED_BYTES_MAX,
            "{permits_max}, {bytes_max}"
        );
        RequestPermits {
            state: CachePadded::new(AtomicU64::new(0)),
            permits_max: (permits_max as u64).max(1),
            bytes_max: bytes_max.max(1),
            waiting: Mutex::new(WaitQueue::default()),
        }
    }

    /// Waits for a permit for a request with `bytes` bytes, at most [`CHARGED_BYTES_MAX`].
    pub(super) async fn acquire(&self, bytes: u64) -> Result<()> {
        if !self.try_acquire(bytes)
            && let Some(turn) = self.enqueue(bytes)?
        {
            turn.await;
        }
        Ok(())
    }

    /// Takes a permit if there is one and no caller waits.
    fn try_acquire(&self, bytes: u64) -> bool {
        assert!(
            bytes <= CHARGED_BYTES_MAX,
            "{bytes} bytes are more than a request is charged with"
        );
        let fits = |state: State| !state.has_waiters() && self.has_room(state);
        let take = |state: u64| fits(State(state)).then(|| state + packed(1, bytes));
        self.state.fetch_update(Ordering::AcqRel, Ordering::Acquire, take).is_ok()
    }

    fn has_room(&self, state: State) -> bool {
        state.permits() < self.permits_max && state.bytes() < self.bytes_max
    }

    /// Checks that permits and bytes are within their limits; one request may exceed the limit of
    /// bytes.
    fn assert_state(&self, state: State) {
        let (permits, bytes) = (state.permits(), state.bytes());
        assert!(
            permits <= self.permits_max,
            "{permits} permits are taken, of {}",
            self.permits_max
        );
        assert!(
            bytes < self.bytes_max + CHARGED_BYTES_MAX,
            "{bytes} bytes are taken, of {}",
            self.bytes_max
        );
    }

    /// Queues a caller. `None`: it has been granted its permit in the meantime.
    fn enqueue(&self, bytes: u64) -> Result<Option<PermitFuture<'_>>> {
        let mut waiting = self.lock();
        if waiting.callers.len() as u64 >= self.permits_max.saturating_mul(WAITERS_FACTOR as u64) {
            let state = State(self.state.load(Ordering::Relaxed));
            return Err(Error::new(
                ErrorKind::Busy,
                format_args!(
                    "{} requests with {} bytes are in flight, and no more callers may wait; wait \
                     for replies, or raise requests_max, or memory_bytes for large commits",
                    state.permits(),
                    state.bytes()
                ),
            ));
        }
        let number = waiting.next;
        waiting.next += 1;
        waiting.callers.insert(number, (bytes, Waker::noop().clone()));
        // A later release sees the flag and takes the lock; `grant` sees what an earlier one
        // released.
        self.state.fetch_or(HAS_WAITERS, Ordering::AcqRel);
        let wakers = self.grant(&mut waiting);
        let granted = !waiting.callers.contains_key(&number);
        drop(waiting);
        wakers.into_iter().for_each(Waker::wake);
        // Made only now, since dropping it releases its permit.
        Ok((!granted).then(|| PermitFuture { permits: self, number, bytes, done: false }))
    }

    /// Grants permits to waiting callers, in order, as far as there is room.
    fn grant(&self, waiting: &mut WaitQueue) -> Wakers {
        let mut wakers = Wakers::new();
        while let Some((_, (bytes, _))) = waiting.callers.first_key_value() {
            let state = State(self.state.load(Ordering::Acquire));
            if !self.has_room(state) {
                break;
            }
            self.assert_state(state);
            let is_last = waiting.callers.len() == 1;
            let next =
                (state.0 + packed(1, *bytes)) & if is_last { !HAS_WAITERS } else { u64::MAX };
            if self
                .state
                .compare_exchange(state.0, next, Ordering::AcqRel, Ordering::Relaxed)
                .is_ok()
            {
                wakers.extend(waiting.callers.pop_first().map(|(_, (_, waker))| waker));
            }
        }
        wakers
    }

    /// Releases `count` permits of requests with `bytes` bytes in all.
    pub(super) fn release(&self, count: usize, bytes: u64) {
        if count == 0 {
            return;
        }
        let before = State(self.state.fetch_sub(packed(count as u64, bytes), Ordering::AcqRel));
        assert!(
            before.permits() >= count as u64 && before.bytes() >= bytes,
            "{count} permits and {bytes} bytes are released, {} and {} were taken",
            before.permits(),
            before.bytes()
        );
        self.assert_state(before);
        if before.has_waiters() {
            let wakers = self.grant(&mut self.lock());
            wakers.into_iter().for_each(Waker::wake);
        }
    }

    fn lock(&self) -> MutexGuard<'_, WaitQueue> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Permits and bytes taken.
    #[cfg(test)]
    pub(super) fn in_use(&self) -> (u64, u64) {
        let state = State(self.state.load(Ordering::SeqCst));
        (state.permits(), state.bytes())
    }
}

impl Future for PermitFuture<'_> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        // A waker runs the caller's code: it is cloned before the lock is taken and dropped after
        // it is released.
        let own = cx.waker().clone();
        let mut waiting = self.permits.lock();
        let former =
            waiting.callers.get_mut(&self.number).map(|(_, waker)| std::mem::replace(waker, own));
        drop(waiting);
        self.done = former.is_none();
        if self.done { Poll::Ready(()) } else { Poll::Pending }
    }
}

impl Drop for PermitFuture<'_> {
    fn drop(&mut self) {
        if self.done {
            return;
        }
        let mut waiting = self.permits.lock();
        let given_up = waiting.callers.remove(&self.number);
        if given_up.is_some() && waiting.callers.is_empty() {
            self.permits.state.fetch_and(!HAS_WAITERS, Ordering::AcqRel);
        }
        drop(waiting);
        if given_up.is_none() {
            self.permits.release(1, self.bytes);
        }
    }
}

#[cfg(all(test, not(corepage_loom)))]
mod tests {
    use super::*;

    /// Releasing a permit twice would wrap the count: no request would be refused any more, or none
    /// accepted.
    #[test]
    #[should_panic(expected = "1 permits and 5 bytes are released, 0 and 0 were taken")]
    fn a_permit_is_released_once() {
        let permits = RequestPermits::new(2, 100);
        assert!(permits.try_acquire(5));
        permits.release(1, 5);
        permits.release(1, 5);
    }
}

#[cfg(all(test, corepage_loom))]
mod loom {
    use super::*;
    use crate::base::sync::model::{self, Verdict};
    use ::loom::sync::Arc;
    use ::loom::thread;
    use std::sync::atomic::AtomicUsize;
    use std::task::Wake;

    #[derive(Default)]
    struct Bell(AtomicUsize);

    impl Wake for Bell {
        fn wake(self: std::sync::Arc<Self>) {
            self.0.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        }
    }

    type Queue = for<'a> fn(&'a RequestPermits, u64) -> Option<PermitFuture<'a>>;
    type Leave = fn(&RequestPermits, usize, u64);

    fn look(turn: &mut PermitFuture<'_>, bell: &std::sync::Arc<Bell>) -> bool {
        Pin::new(turn).poll(&mut Context::from_waker(&Waker::from(bell.clone()))).is_ready()
    }

    /// The only permit is released while two callers ask for it in turn. The first gives up, before
    /// or after it has polled; the second must get the permit, and must be woken.
    fn exchange(verdict: &Verdict, queue: Queue, leave: Leave, looks: bool) {
        let permits = Arc::new(RequestPermits::new(1, 1));
        assert!(permits.try_acquire(1));
        let theirs = permits.clone();
        let leaver = thread::spawn(move || leave(&theirs, 1, 1));
        let (first, bell) = (queue(&permits, 1), std::sync::Arc::new(Bell::default()));
        let given_up = first.map(|mut turn| looks && look(&mut turn, &std::sync::Arc::default()));
        if given_up != Some(false) {
            // It got its permit, at once or later.
            permits.release(1, 1);
        }
        let mut second = queue(&permits, 0);
        let had = second.as_mut().is_none_or(|turn| look(turn, &bell));
        leaver.join().unwrap();
        if let Some(turn) = second.as_mut().filter(|_| !had) {
            verdict.expect(bell.0.load(std::sync::atomic::Ordering::SeqCst) == 1);
            verdict.expect(look(turn, &bell));
        }
        drop(second);
        verdict.expect(permits.in_use() == (1, 0));
    }

    fn holds(queue: Queue, leave: Leave) -> bool {
        [false, true]
            .iter()
            .all(|looks| model::holds(None, move |verdict| exchange(verdict, queue, leave, *looks)))
    }

    fn queue(permits: &RequestPermits, bytes: u64) -> Option<PermitFuture<'_>> {
        permits.enqueue(bytes).unwrap()
    }

    /// A waiter that is never granted its permit waits for ever; a permit that no request holds is
    /// lost for ever.
    #[test]
    fn loom_a_released_permit_reaches_the_waiter() {
        assert!(holds(queue, RequestPermits::release));
    }

    #[test]
    fn loom_mutants_of_the_permits_are_caught() {
        // This one looks for room before it sets the flag.
        let late: Queue = |permits, bytes| {
            let mut waiting = permits.lock();
            let number = waiting.next;
            waiting.next += 1;
            waiting.callers.insert(number, (bytes, Waker::noop().clone()));
            drop(permits.grant(&mut waiting));
            let granted = !waiting.callers.contains_key(&number);
            if !granted {
                permits.state.fetch_or(HAS_WAITERS, Ordering::AcqRel);
            }
            (!granted).then(|| PermitFuture { permits, number, bytes, done: false })
        };
        assert!(
            !holds(late, RequestPermits::release),
            "a waiter that looks before it announces that it waits"
        );
        let hasty: Leave = |permits, count, bytes| {
            let waits = State(permits.state.load(Ordering::Acquire)).has_waiters();
            permits.state.fetch_sub(packed(count as u64, bytes), Ordering::AcqRel);
            if waits {
                let wakers = permits.grant(&mut permits.lock());
                wakers.into_iter().for_each(Waker::wake);
            }
        };
        assert!(!holds(queue, hasty), "a caller that leaves looks for waiters first");
    }
}
