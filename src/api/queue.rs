//! The store for callers with an event loop of their own: operations are submitted in batches, and
//! their completions waited for, at least a given number at a time.
//!
//! ```
//! use corepage::queue::{Op, Output, Queue};
//! use corepage::{Options, PageId, Store, blocking::Wait};
//!
//! # fn main() -> corepage::Result<()> {
//! # let dir = tempfile::tempdir().expect("a directory for the example");
//! # let store = Store::open(dir.path(), Options::default()).wait()?;
//! # let disk = store.create_volume("disk", 64 << 20).wait()?;
//! let mut queue = Queue::new(128)?;
//! let writes = (0..64).map(|n| (n, Op::write(&disk, PageId::new(n), vec![n as u8; 4096])));
//! assert_eq!(queue.submit_batch(writes), 64);
//!
//! let mut done = Vec::new();
//! while queue.in_flight() > 0 {
//!     queue.wait(16, None, &mut done)?; // at least 16, or what is left
//! }
//! for completion in done {
//!     let Output::Committed(lsn) = completion.result? else { panic!("a write commits") };
//!     println!("write {} is durable at LSN {lsn}", completion.tag);
//! }
//!
//! // Any call can be queued: here one that says what is allocated.
//! let mut queue = Queue::for_calls(1)?;
//! # let last = PageId::new(u64::MAX);
//! let (volume, first) = (disk.clone(), PageId::new(0));
//! queue.submit_call(7, async move { volume.allocated(first, last, 10).await })?;
//! let mut done = Vec::new();
//! queue.wait(1, None, &mut done)?;
//! assert_eq!(done.remove(0).result?.ranges, [(first, PageId::new(63))]);
//! # store.close().wait() }
//! ```
//!
//! Invariants
//! 1. Each operation that was taken gives exactly one completion, in any order.
//! 2. At most `depth` operations are taken and not handed back; more get `Busy`, and nothing was
//!    done.
//! 3. The descriptor is readable whenever a completion may be there that was not handed out.
//!
//! Dropping a queue undoes nothing that was submitted.

use super::{Durability, Store, Volume};
use crate::base::error::{Error, ErrorKind, Result};
use crate::base::sync::{AtomicBool, Ordering};
use crate::base::{Lsn, PageId};
use crate::engine::{Change, PageRef};
use crate::runtime;
use bytes::Bytes;
use crossbeam::queue::SegQueue;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use slab::Slab;
use std::collections::VecDeque;
use std::future::Future;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

/// The most operations of one queue.
const DEPTH_MAX: usize = 1 << 16;

/// An operation that callers ask for often; [`Queue::submit_call`] takes all others.
#[derive(Clone, Debug)]
pub enum Op {
    /// Pages of a volume, in the order given.
    Read(Volume, Vec<PageId>),
    /// One atomic commit of changes of a volume's pages, in order.
    Commit(Volume, Vec<(PageId, Change)>, Durability),
    /// Makes durable what the store has acknowledged before.
    Flush(Store),
}

impl Op {
    /// Reads one page.
    pub fn read(volume: &Volume, page: PageId) -> Op {
        Op::Read(volume.clone(), vec![page])
    }

    /// Writes a whole page of 4,096 bytes, durable when it completes.
    pub fn write(volume: &Volume, page: PageId, bytes: impl Into<Bytes>) -> Op {
        Op::Commit(volume.clone(), vec![(page, Change::Put(bytes.into()))], Durability::Durable)
    }

    /// Writes a whole page of 4,096 bytes, ordered and visible when it completes, durable after a
    /// flush.
    pub fn write_back(volume: &Volume, page: PageId, bytes: impl Into<Bytes>) -> Op {
        Op::Commit(volume.clone(), vec![(page, Change::Put(bytes.into()))], Durability::Buffered)
    }

    /// Writes `bytes` at byte `offset` of a page, durable when it completes.
    pub fn patch(volume: &Volume, page: PageId, offset: u32, bytes: impl Into<Bytes>) -> Op {
        let change = Change::Patch { offset, bytes: bytes.into() };
        Op::Commit(volume.clone(), vec![(page, change)], Durability::Durable)
    }

    /// Frees a page, durable when it completes.
    pub fn free(volume: &Volume, page: PageId) -> Op {
        Op::Commit(volume.clone(), vec![(page, Change::Free)], Durability::Durable)
    }

    /// Makes durable what the store has acknowledged before.
    pub fn flush(store: &Store) -> Op {
        Op::Flush(store.same_handle())
    }

    async fn call(self) -> Result<Output> {
        match self {
            Op::Read(volume, pages) => volume.read_many(&pages).await.map(Output::Pages),
            Op::Commit(volume, changes, durability) => {
                volume.apply(changes, durability).await.map(Output::Committed)
            }
            Op::Flush(store) => store.flush().await.map(Output::Flushed),
        }
    }
}

/// The answer to an [`Op`].
#[derive(Clone, Debug)]
pub enum Output {
    /// The pages read, in the order asked.
    Pages(Vec<PageRef>),
    /// The commit's LSN.
    Committed(Lsn),
    /// The LSN up to which everything is durable.
    Flushed(Lsn),
}

/// An operation that has ended.
#[derive(Clone, Debug)]
pub struct Completion<T = Output> {
    /// The caller's name for the operation.
    pub tag: u64,
    /// Its answer, or its error: for an [`Op`] as of [`Volume::read_many`], [`Volume::apply`] and
    /// [`Store::flush`].
    pub result: Result<T>,
}

/// Operations under way for one caller, on volumes of any stores.
pub struct Queue<T = Output> {
    depth: usize,
    under_way: Slab<UnderWay<T>>,
    signal: Arc<Signal>,
    done: VecDeque<Completion<T>>,
}

struct UnderWay<T> {
    tag: u64,
    future: Pin<Box<dyn Future<Output = Result<T>> + Send>>,
    waker: Waker,
}

/// Which operations may go on, and the descriptor that says that there are some.
struct Signal {
    ready: SegQueue<usize>,
    event: OwnedFd,
    raised: Raised,
}

/// Whether the descriptor is readable, or about to be.
#[derive(Default)]
struct Raised(AtomicBool);

impl Raised {
    /// True: the caller has to make the descriptor readable.
    fn raise(&self) -> bool {
        !self.0.swap(true, Ordering::SeqCst)
    }

    /// What comes from now on raises it again; what came before is in `ready`. In this order: were
    /// the counter taken last, it could be one that belongs to a raise just now, and no later one
    /// would count it up again.
    fn lower(&self, take_counter: impl FnOnce()) {
        if self.0.load(Ordering::SeqCst) {
            take_counter();
            // Not a plain store: who found it raised has made something ready before, and that must
            // be visible from here on.
            self.0.swap(false, Ordering::SeqCst);
        }
    }
}

struct Ready {
    signal: Arc<Signal>,
    key: usize,
}

impl Signal {
    fn raise(&self) {
        if self.raised.raise() {
            // It can't be full: the counter is taken before it is raised again.
            let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
        }
    }

    fn lower(&self) {
        self.raised.lower(|| {
            let _ = rustix::io::read(&self.event, &mut [0; 8]);
        });
    }
}

impl Wake for Ready {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.signal.ready.push(self.key);
        self.signal.raise();
    }
}

impl Queue {
    /// A queue for [`Op`]s, of which at most `depth`, from 1 to 65,536, are in flight.
    ///
    /// # Errors
    /// `Invalid`: the depth. `Io`: no event descriptor could be made.
    pub fn new(depth: usize) -> Result<Queue> {
        Queue::for_calls(depth)
    }

    /// Takes an operation; it is on its way when this returns. `tag` comes back with its
    /// completion.
    ///
    /// # Errors
    /// `Busy`: `depth` operations are in flight; nothing was done.
    pub fn submit(&mut self, tag: u64, op: Op) -> Result<()> {
        self.submit_call(tag, op.call())
    }

    /// Takes operations as long as there is room; returns how many were taken.
    pub fn submit_batch(&mut self, ops: impl IntoIterator<Item = (u64, Op)>) -> usize {
        let room = self.depth - self.in_flight();
        ops.into_iter().take(room).map_while(|(tag, op)| self.submit(tag, op).ok()).count()
    }
}

impl<T> Queue<T> {
    /// A queue for calls whose answer is a `T`, of which at most `depth`, from 1 to 65,536, are in
    /// flight.
    ///
    /// # Errors
    /// As [`Queue::new`].
    pub fn for_calls(depth: usize) -> Result<Queue<T>> {
        if !(1..=DEPTH_MAX).contains(&depth) {
            return Err(Error::invalid(format_args!(
                "a queue of depth {depth}: it must be from 1 to {DEPTH_MAX}"
            )));
        }
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|error| Error::io("making an event descriptor for a queue", error.into()))?;
        let signal = Arc::new(Signal { ready: SegQueue::new(), event, raised: Raised::default() });
        Ok(Queue { depth, under_way: Slab::new(), signal, done: VecDeque::new() })
    }

    /// Operations taken whose completions were not handed out.
    pub fn in_flight(&self) -> usize {
        self.under_way.len() + self.done.len()
    }

    /// Takes any call of the library, or several of them in one future; it is polled at once, so a
    /// single call is on its way when this returns. `tag` comes back with its completion.
    ///
    /// # Errors
    /// `Busy`: `depth` operations are in flight; nothing was done.
    pub fn submit_call(
        &mut self,
        tag: u64,
        call: impl Future<Output = Result<T>> + Send + 'static,
    ) -> Result<()> {
        if self.in_flight() >= self.depth {
            return Err(Error::new(
                ErrorKind::Busy,
                format_args!(
                    "{} operations are in flight, the depth of the queue: wait for some",
                    self.depth
                ),
            ));
        }
        let entry = self.under_way.vacant_entry();
        let key = entry.key();
        let waker = Waker::from(Arc::new(Ready { signal: self.signal.clone(), key }));
        entry.insert(UnderWay { tag, future: Box::pin(call), waker });
        self.poll_one(key);
        if !self.done.is_empty() {
            self.signal.raise();
        }
        Ok(())
    }

    /// Waits until at least `min` completions are there, or all that are in flight, or `timeout` is
    /// over. Appends all that are there to `into`, and returns how many. With `min` 0 it does not
    /// wait.
    ///
    /// # Errors
    /// `Invalid`: it would wait on a thread that drives a shard. `Io`: waiting failed.
    pub fn wait(
        &mut self,
        min: usize,
        timeout: Option<Duration>,
        into: &mut Vec<Completion<T>>,
    ) -> Result<usize> {
        if min > 0 && runtime::is_shard_thread() {
            return Err(Error::invalid(
                "waiting on a thread that drives a shard would wait for itself: ask with `min` 0",
            ));
        }
        #[expect(clippy::disallowed_methods, reason = "how long a caller of the library waits")]
        let begun = Instant::now();
        loop {
            self.advance();
            let min = min.min(self.in_flight());
            #[expect(clippy::disallowed_methods, reason = "how long a caller of the library waits")]
            let left = timeout.map(|timeout| timeout.saturating_sub(begun.elapsed()));
            if self.done.len() >= min || left == Some(Duration::ZERO) {
                let count = self.done.len();
                into.extend(self.done.drain(..));
                return Ok(count);
            }
            let left = left.and_then(|left| Timespec::try_from(left).ok());
            let mut event = [PollFd::new(&self.signal.event, PollFlags::IN)];
            match poll(&mut event, left.as_ref()) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(Error::io("waiting for completions", error.into())),
            }
        }
    }

    /// Takes what has come.
    fn advance(&mut self) {
        self.signal.lower();
        while let Some(key) = self.signal.ready.pop() {
            self.poll_one(key);
        }
    }

    fn poll_one(&mut self, key: usize) {
        // A late wake-up may be of an operation that has ended.
        let Some(one) = self.under_way.get_mut(key) else { return };
        let waker = one.waker.clone();
        if let Poll::Ready(result) = one.future.as_mut().poll(&mut Context::from_waker(&waker)) {
            let one = self.under_way.remove(key);
            self.done.push_back(Completion { tag: one.tag, result });
        }
    }
}

impl<T> AsFd for Queue<T> {
    /// Readable when [`wait`](Queue::wait) may hand something out: for the caller's own `epoll` or
    /// `poll`.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.signal.event.as_fd()
    }
}

#[cfg(all(test, corepage_loom))]
mod loom {
    use super::*;
    use crate::base::sync::AtomicU32;
    use crate::base::sync::model;
    use ::loom::sync::Arc;
    use ::loom::thread;

    struct Shared {
        raised: Raised,
        counter: AtomicU32,
        ready: [AtomicU32; 2],
    }

    /// Two threads make something ready and raise; the owner lowers and takes what is ready. What
    /// it has not seen then must have made the descriptor readable, or nobody comes for it.
    fn holds(lower: fn(&Raised, &AtomicU32)) -> bool {
        model::holds(None, move |verdict| {
            let (zero, counter) = (|| AtomicU32::new(0), AtomicU32::new(0));
            let shared = Arc::new(Shared {
                raised: Raised(AtomicBool::new(false)),
                counter,
                ready: [zero(), zero()],
            });
            let wakers: Vec<_> = (0..2)
                .map(|i| {
                    let shared = shared.clone();
                    thread::spawn(move || {
                        shared.ready[i].store(1, Ordering::Relaxed);
                        if shared.raised.raise() {
                            shared.counter.fetch_add(1, Ordering::SeqCst);
                        }
                    })
                })
                .collect();
            lower(&shared.raised, &shared.counter);
            let seen = shared.ready.iter().map(|ready| ready.load(Ordering::Relaxed)).sum::<u32>();
            wakers.into_iter().for_each(|waker| waker.join().unwrap());
            verdict.expect(seen == 2 || shared.counter.load(Ordering::SeqCst) > 0);
        })
    }

    /// An operation that is done and never handed out holds its caller up for ever.
    #[test]
    fn loom_what_is_ready_is_seen_or_makes_the_descriptor_readable() {
        assert!(holds(|raised, counter| raised.lower(|| counter.store(0, Ordering::SeqCst))));
    }

    #[test]
    fn loom_mutants_of_the_signal_are_caught() {
        let counter_last = |raised: &Raised, counter: &AtomicU32| {
            if raised.0.swap(false, Ordering::SeqCst) {
                counter.store(0, Ordering::SeqCst);
            }
        };
        assert!(!holds(counter_last), "the counter of a raise just now is taken");
        let plain = |raised: &Raised, counter: &AtomicU32| {
            if raised.0.load(Ordering::SeqCst) {
                counter.store(0, Ordering::SeqCst);
                raised.0.store(false, Ordering::SeqCst);
            }
        };
        assert!(!holds(plain), "lowering that does not see what was ready");
    }
}
