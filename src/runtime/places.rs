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
//! 2. One is let in while fewer than `most` have a place, and fewer than `bytes_max` bytes are counted. So one of any size goes, the
//!    limit of bytes is passed by one request at most, and a large request waits no longer than a small one.
//! 3. First come, first served: none overtakes one that waits. Nobody waits while nothing is under way.
//! 4. At most [`WAITERS_FACTOR`] times as many callers wait as there are places; others get `Busy`.
//! 5. A place is given to a waiter by the one who leaves it. A waiter that gives up leaves the place that it was given.
//!
//! Without waiters a request costs one atomic step when it comes, and one when it goes, for any number that go together.
//! It does *not* know what a request carries: that is [`request_bytes`](crate::engine::request_bytes).

use crate::base::error::{Error, ErrorKind, Result};
use crate::base::sync::{AtomicU64, Mutex, MutexGuard, Ordering};
use crossbeam_utils::CachePadded;
use smallvec::SmallVec;
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::PoisonError;
use std::task::{Context, Poll, Waker};

/// Callers that wait for a place, as a multiple of the places, before others get `Busy`.
const WAITERS_FACTOR: usize = 4;

/// The most bytes that one request is counted with: more than any memory, and little enough for the count of all.
pub(super) const COUNTED_MAX: u64 = 1 << 40;

/// Somebody waits.
const WAITS: u64 = 1;
/// Above this bit 42 for the bytes, and above them 21 for the places.
const BYTES_SHIFT: u32 = 1;
const PLACES_SHIFT: u32 = 43;
const BYTES_MASK: u64 = (1 << (PLACES_SHIFT - BYTES_SHIFT)) - 1;
const PLACES_MAX: u64 = (1 << (u64::BITS - PLACES_SHIFT)) - 1;
/// `requests_max` is 2^20 at most, and the bytes of a shard a sixteenth of its memory, 2^42 at most.
const _: () = assert!(PLACES_MAX >= 1 << 20 && (1 << 38) + COUNTED_MAX <= BYTES_MASK);

/// Everything in one word: places and bytes that are taken, and whether somebody waits.
#[derive(Clone, Copy)]
struct State(u64);

impl State {
    fn places(self) -> u64 {
        self.0 >> PLACES_SHIFT
    }

    fn bytes(self) -> u64 {
        self.0 >> BYTES_SHIFT & BYTES_MASK
    }

    fn is_waited_for(self) -> bool {
        self.0 & WAITS != 0
    }
}

fn packed(places: u64, bytes: u64) -> u64 {
    places << PLACES_SHIFT | bytes << BYTES_SHIFT
}

pub(super) struct Places {
    state: CachePadded<AtomicU64>,
    most: u64,
    bytes_max: u64,
    waiting: Mutex<Waiting>,
}

/// Who waits, with how many bytes, by when they came. One whose number is not here any more has been let in.
#[derive(Default)]
struct Waiting {
    next: u64,
    callers: BTreeMap<u64, (u64, Waker)>,
}

/// Those to be woken, once the lock is let go.
type Wakers = SmallVec<[Waker; 4]>;

/// One caller's turn, to come.
struct Turn<'a> {
    places: &'a Places,
    number: u64,
    bytes: u64,
    done: bool,
}

impl Places {
    /// Places for `most` requests with `bytes_max` bytes together.
    pub(super) fn new(most: usize, bytes_max: u64) -> Self {
        assert!(most as u64 <= PLACES_MAX && bytes_max <= BYTES_MASK - COUNTED_MAX, "{most}, {bytes_max}");
        Places {
            state: CachePadded::new(AtomicU64::new(0)),
            most: (most as u64).max(1),
            bytes_max: bytes_max.max(1),
            waiting: Mutex::new(Waiting::default()),
        }
    }

    /// Waits for a place for a request with so many bytes, [`COUNTED_MAX`] at most.
    pub(super) async fn take(&self, bytes: u64) -> Result<()> {
        if !self.try_take(bytes)
            && let Some(turn) = self.queue(bytes)?
        {
            turn.await;
        }
        Ok(())
    }

    /// Takes a place if there is one and nobody waits for it.
    fn try_take(&self, bytes: u64) -> bool {
        debug_assert!(bytes <= COUNTED_MAX);
        let fits = |state: State| !state.is_waited_for() && self.has_room(state);
        let take = |state: u64| fits(State(state)).then(|| state + packed(1, bytes));
        self.state.fetch_update(Ordering::AcqRel, Ordering::Acquire, take).is_ok()
    }

    fn has_room(&self, state: State) -> bool {
        state.places() < self.most && state.bytes() < self.bytes_max
    }

    /// Queues a caller; `None`: it has been let in meanwhile.
    fn queue(&self, bytes: u64) -> Result<Option<Turn<'_>>> {
        let mut waiting = self.lock();
        if waiting.callers.len() as u64 >= self.most.saturating_mul(WAITERS_FACTOR as u64) {
            let state = State(self.state.load(Ordering::Relaxed));
            return Err(Error::new(
                ErrorKind::Busy,
                format_args!(
                    "{} requests with {} bytes are under way, and as many as may wait do; wait for replies, or raise \
                     requests_max, or memory_bytes for what commits carry",
                    state.places(),
                    state.bytes()
                ),
            ));
        }
        let number = waiting.next;
        waiting.next += 1;
        waiting.callers.insert(number, (bytes, Waker::noop().clone()));
        // Who leaves from here on sees it, and comes for the lock; who left before is seen by `admit`.
        self.state.fetch_or(WAITS, Ordering::AcqRel);
        let wakers = self.admit(&mut waiting);
        let let_in = !waiting.callers.contains_key(&number);
        drop(waiting);
        wakers.into_iter().for_each(Waker::wake);
        // Made only now: one that is dropped gives its place back.
        Ok((!let_in).then(|| Turn { places: self, number, bytes, done: false }))
    }

    /// Lets in whoever can go, in their order.
    fn admit(&self, waiting: &mut Waiting) -> Wakers {
        let mut wakers = Wakers::new();
        while let Some((_, (bytes, _))) = waiting.callers.first_key_value() {
            let state = State(self.state.load(Ordering::Acquire));
            if !self.has_room(state) {
                break;
            }
            let is_last = waiting.callers.len() == 1;
            let next = (state.0 + packed(1, *bytes)) & if is_last { !WAITS } else { u64::MAX };
            if self.state.compare_exchange(state.0, next, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                wakers.extend(waiting.callers.pop_first().map(|(_, (_, waker))| waker));
            }
        }
        wakers
    }

    /// Gives back `count` places, of requests with so many bytes together.
    pub(super) fn leave(&self, count: usize, bytes: u64) {
        if count == 0 {
            return;
        }
        let before = State(self.state.fetch_sub(packed(count as u64, bytes), Ordering::AcqRel));
        assert!(
            before.places() >= count as u64 && before.bytes() >= bytes,
            "{count} places and {bytes} bytes are given back, {} and {} were taken",
            before.places(),
            before.bytes()
        );
        if before.is_waited_for() {
            let wakers = self.admit(&mut self.lock());
            wakers.into_iter().for_each(Waker::wake);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Places and bytes taken.
    #[cfg(test)]
    pub(super) fn under_way(&self) -> (u64, u64) {
        let state = State(self.state.load(Ordering::SeqCst));
        (state.places(), state.bytes())
    }
}

impl Future for Turn<'_> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        // A waker is the caller's code: made before, and dropped after the lock is held.
        let own = cx.waker().clone();
        let mut waiting = self.places.lock();
        let former = waiting.callers.get_mut(&self.number).map(|(_, waker)| std::mem::replace(waker, own));
        drop(waiting);
        self.done = former.is_none();
        if self.done { Poll::Ready(()) } else { Poll::Pending }
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        if self.done {
            return;
        }
        let mut waiting = self.places.lock();
        let given_up = waiting.callers.remove(&self.number);
        if given_up.is_some() && waiting.callers.is_empty() {
            self.places.state.fetch_and(!WAITS, Ordering::AcqRel);
        }
        drop(waiting);
        if given_up.is_none() {
            self.places.leave(1, self.bytes);
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

    type Queue = for<'a> fn(&'a Places, u64) -> Option<Turn<'a>>;
    type Leave = fn(&Places, usize, u64);

    fn look(turn: &mut Turn<'_>, bell: &std::sync::Arc<Bell>) -> bool {
        Pin::new(turn).poll(&mut Context::from_waker(&Waker::from(bell.clone()))).is_ready()
    }

    /// The only place is left while one caller after the other asks for it. One gives up, before or after it has looked; the other must
    /// get the place, and know of it.
    fn exchange(verdict: &Verdict, queue: Queue, leave: Leave, looks: bool) {
        let places = Arc::new(Places::new(1, 1));
        assert!(places.try_take(1));
        let theirs = places.clone();
        let leaver = thread::spawn(move || leave(&theirs, 1, 1));
        let (first, bell) = (queue(&places, 1), std::sync::Arc::new(Bell::default()));
        let given_up = first.map(|mut turn| looks && look(&mut turn, &std::sync::Arc::default()));
        if given_up != Some(false) {
            // It had its place, at once or later.
            places.leave(1, 1);
        }
        let mut second = queue(&places, 0);
        let had = second.as_mut().is_none_or(|turn| look(turn, &bell));
        leaver.join().unwrap();
        if let Some(turn) = second.as_mut().filter(|_| !had) {
            verdict.expect(bell.0.load(std::sync::atomic::Ordering::SeqCst) == 1);
            verdict.expect(look(turn, &bell));
        }
        drop(second);
        verdict.expect(places.under_way() == (1, 0));
    }

    fn holds(queue: Queue, leave: Leave) -> bool {
        [false, true].iter().all(|looks| model::holds(None, move |verdict| exchange(verdict, queue, leave, *looks)))
    }

    fn queue(places: &Places, bytes: u64) -> Option<Turn<'_>> {
        places.queue(bytes).unwrap()
    }

    /// A waiter that nobody lets in waits for ever; a place that nobody has is lost for ever.
    #[test]
    fn loom_a_place_that_is_left_reaches_the_one_who_waits() {
        assert!(holds(queue, Places::leave));
    }

    #[test]
    fn loom_mutants_of_the_places_are_caught() {
        // It looks before it says that it waits.
        let late: Queue = |places, bytes| {
            let mut waiting = places.lock();
            let number = waiting.next;
            waiting.next += 1;
            waiting.callers.insert(number, (bytes, Waker::noop().clone()));
            drop(places.admit(&mut waiting));
            let let_in = !waiting.callers.contains_key(&number);
            if !let_in {
                places.state.fetch_or(WAITS, Ordering::AcqRel);
            }
            (!let_in).then(|| Turn { places, number, bytes, done: false })
        };
        assert!(!holds(late, Places::leave), "a waiter that looks before it says that it waits");
        let hasty: Leave = |places, count, bytes| {
            let waits = State(places.state.load(Ordering::Acquire)).is_waited_for();
            places.state.fetch_sub(packed(count as u64, bytes), Ordering::AcqRel);
            if waits {
                let wakers = places.admit(&mut places.lock());
                wakers.into_iter().for_each(Waker::wake);
            }
        };
        assert!(!holds(queue, hasty), "one who leaves looks for waiters before");
    }
}
