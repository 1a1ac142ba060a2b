//! Back-pressure: places for requests under way, and the bytes that they carry.
//!
//! ```text
//!   take --room--> under way --answered: leave--> who waits in front is let in, and woken
//!     |no room                                       ^
//!     v                                              |
//!   waits, in the order of coming -------------------/
//! ```
//! Invariants
//! 1. A request has a place, and its bytes are counted, from before it is submitted until it is answered.
//! 2. One is let in while fewer than `permits_max` have one, and fewer than `bytes_max` bytes are counted. So one of any size goes, the
//!    limit of bytes is passed by one request at most, and a large request waits no longer than a small one.
//! 3. First come, first served: none overtakes one that waits. Nobody waits while nothing is under way.
//! 4. At most [`WAITERS_FACTOR`] times as many callers wait as there are permits; others get `Busy`.
//! 5. A place is given to a waiter by the one who leaves it. A waiter that gives up leaves the place that it was given.
//!
//! Without waiters a request costs one atomic step when it comes, and one when it goes, for any number that go together.
//! It does *not* know what a request carries: that is [`request_bytes`](crate::engine::request_bytes).

use crate::base::error::{Error, ErrorKind, Result};
use crate::base::sync::{AtomicU64, Mutex, MutexGuard, Ordering};
use crossbeam::utils::CachePadded;
use smallvec::SmallVec;
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::PoisonError;
use std::task::{Context, Poll, Waker};

/// Callers that wait for a place, as a multiple of the permits, before others get `Busy`.
const WAITERS_FACTOR: usize = 4;

/// The most bytes that one request is counted with: more than any memory, and little enough for the count of all.
pub(super) const CHARGED_BYTES_MAX: u64 = 1 << 40;

/// Somebody waits.
const HAS_WAITERS: u64 = 1;
/// Above this bit 42 for the bytes, and above them 21 for the permits.
const BYTES_SHIFT: u32 = 1;
const PERMITS_SHIFT: u32 = 43;
const BYTES_MASK: u64 = (1 << (PERMITS_SHIFT - BYTES_SHIFT)) - 1;
const PERMITS_MAX: u64 = (1 << (u64::BITS - PERMITS_SHIFT)) - 1;
/// `requests_max` is 2^20 at most, and the bytes of a shard a sixteenth of its memory, 2^42 at most.
const _: () = assert!(PERMITS_MAX >= 1 << 20 && (1 << 38) + CHARGED_BYTES_MAX <= BYTES_MASK);

/// Everything in one word: places and bytes that are taken, and whether somebody waits.
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

/// Who waits, with how many bytes, by when they came. One whose number is not here any more has been let in.
#[derive(Default)]
struct WaitQueue {
    next: u64,
    callers: BTreeMap<u64, (u64, Waker)>,
}

/// Those to be woken, once the lock is let go.
type Wakers = SmallVec<[Waker; 4]>;

/// One caller's turn, to come.
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

    /// Waits for a place for a request with so many bytes, [`CHARGED_BYTES_MAX`] at most.
    pub(super) async fn acquire(&self, bytes: u64) -> Result<()> {
        if !self.try_acquire(bytes)
            && let Some(turn) = self.enqueue(bytes)?
        {
            turn.await;
        }
        Ok(())
    }

    /// Takes a place if there is one and nobody waits for it.
    fn try_acquire(&self, bytes: u64) -> bool {
        debug_assert!(bytes <= CHARGED_BYTES_MAX);
        let fits = |state: State| !state.has_waiters() && self.has_room(state);
        let take = |state: u64| fits(State(state)).then(|| state + packed(1, bytes));
        self.state.fetch_update(Ordering::AcqRel, Ordering::Acquire, take).is_ok()
    }

    fn has_room(&self, state: State) -> bool {
        state.permits() < self.permits_max && state.bytes() < self.bytes_max
    }

    /// Queues a caller; `None`: it has been let in meanwhile.
    fn enqueue(&self, bytes: u64) -> Result<Option<PermitFuture<'_>>> {
        let mut waiting = self.lock();
        if waiting.callers.len() as u64 >= self.permits_max.saturating_mul(WAITERS_FACTOR as u64) {
            let state = State(self.state.load(Ordering::Relaxed));
            return Err(Error::new(
                ErrorKind::Busy,
                format_args!(
                    "{} requests with {} bytes are under way, and as many as may wait do; wait for replies, or raise \
                     requests_max, or memory_bytes for what commits carry",
                    state.permits(),
                    state.bytes()
                ),
            ));
        }
        let number = waiting.next;
        waiting.next += 1;
        waiting.callers.insert(number, (bytes, Waker::noop().clone()));
        // Who leaves from here on sees it, and comes for the lock; who left before is seen by `grant`.
        self.state.fetch_or(HAS_WAITERS, Ordering::AcqRel);
        let wakers = self.grant(&mut waiting);
        let granted = !waiting.callers.contains_key(&number);
        drop(waiting);
        wakers.into_iter().for_each(Waker::wake);
        // Made only now: one that is dropped gives its place back.
        Ok((!granted).then(|| PermitFuture { permits: self, number, bytes, done: false }))
    }

    /// Lets in whoever can go, in their order.
    fn grant(&self, waiting: &mut WaitQueue) -> Wakers {
        let mut wakers = Wakers::new();
        while let Some((_, (bytes, _))) = waiting.callers.first_key_value() {
            let state = State(self.state.load(Ordering::Acquire));
            if !self.has_room(state) {
                break;
            }
            let is_last = waiting.callers.len() == 1;
            let next = (state.0 + packed(1, *bytes)) & if is_last { !HAS_WAITERS } else { u64::MAX };
            if self.state.compare_exchange(state.0, next, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                wakers.extend(waiting.callers.pop_first().map(|(_, (_, waker))| waker));
            }
        }
        wakers
    }

    /// Gives back `count` permits, of requests with so many bytes together.
    pub(super) fn release(&self, count: usize, bytes: u64) {
        if count == 0 {
            return;
        }
        let before = State(self.state.fetch_sub(packed(count as u64, bytes), Ordering::AcqRel));
        assert!(
            before.permits() >= count as u64 && before.bytes() >= bytes,
            "{count} places and {bytes} bytes are given back, {} and {} were taken",
            before.permits(),
            before.bytes()
        );
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
        // A waker is the caller's code: made before, and dropped after the lock is held.
        let own = cx.waker().clone();
        let mut waiting = self.permits.lock();
        let former = waiting.callers.get_mut(&self.number).map(|(_, waker)| std::mem::replace(waker, own));
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

    /// The only place is left while one caller after the other asks for it. One gives up, before or after it has looked; the other must
    /// get the place, and know of it.
    fn exchange(verdict: &Verdict, queue: Queue, leave: Leave, looks: bool) {
        let permits = Arc::new(RequestPermits::new(1, 1));
        assert!(permits.try_acquire(1));
        let theirs = permits.clone();
        let leaver = thread::spawn(move || leave(&theirs, 1, 1));
        let (first, bell) = (queue(&permits, 1), std::sync::Arc::new(Bell::default()));
        let given_up = first.map(|mut turn| looks && look(&mut turn, &std::sync::Arc::default()));
        if given_up != Some(false) {
            // It had its place, at once or later.
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
        [false, true].iter().all(|looks| model::holds(None, move |verdict| exchange(verdict, queue, leave, *looks)))
    }

    fn queue(permits: &RequestPermits, bytes: u64) -> Option<PermitFuture<'_>> {
        permits.enqueue(bytes).unwrap()
    }

    /// A waiter that nobody lets in waits for ever; a place that nobody has is lost for ever.
    #[test]
    fn loom_a_place_that_is_left_reaches_the_one_who_waits() {
        assert!(holds(queue, RequestPermits::release));
    }

    #[test]
    fn loom_mutants_of_the_places_are_caught() {
        // It looks before it says that it waits.
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
        assert!(!holds(late, RequestPermits::release), "a waiter that looks before it says that it waits");
        let hasty: Leave = |permits, count, bytes| {
            let waits = State(permits.state.load(Ordering::Acquire)).has_waiters();
            permits.state.fetch_sub(packed(count as u64, bytes), Ordering::AcqRel);
            if waits {
                let wakers = permits.grant(&mut permits.lock());
                wakers.into_iter().for_each(Waker::wake);
            }
        };
        assert!(!holds(queue, hasty), "one who leaves looks for waiters before");
    }
}
