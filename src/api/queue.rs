//! The store for callers with an event loop of their own: they submit operations in batches, and
//! wait for at least a given number of completions at a time.
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
//! 1. Each accepted operation gives exactly one completion, in any order.
//! 2. At most `depth` operations are accepted and not handed back; further ones get `Busy`, and
//!    nothing is done.
//! 3. The descriptor is readable whenever there may be a completion that was not handed out.
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

/// The largest depth of a queue.
const DEPTH_MAX: usize = 1 << 16;

/// A common operation; [`Queue::submit_call`] takes any other call.
#[derive(Clone, Debug)]
pub enum Op {
    /// Reads pages of a volume, in the given order.
    Read(Volume, Vec<PageId>),
    /// Commits changes of a volume's pages atomically, in order.
    Commit(Volume, Vec<(PageId, Change)>, Durability),
    /// Makes durable everything that the store has acknowledged before.
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

    /// Writes a whole page of 4,096 bytes: ordered and visible when it completes, durable after a
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

    /// Makes durable everything that the store has acknowledged before.
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
    /// The pages read, in the requested order.
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
    /// Its answer or its error; the errors of an [`Op`] are those of [`Volume::read_many`],
    /// [`Volume::apply`] and [`Store::flush`].
    pub result: Result<T>,
}

/// Operations in flight for one caller, on volumes of any stores.
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

/// The operations that can make progress, and the descriptor that signals that there are some.
struct Signal {
    ready: SegQueue<usize>,
    event: OwnedFd,
    raised: Raised,
}

/// Whether the descriptor is readable, or about to be.
#[derive(Default)]
struct Raised(AtomicBool);

impl Raised {
    /// Marks the descriptor as readable. True: the caller has to make it readable.
    fn raise(&self) -> bool {
        !self.0.swap(true, Ordering::SeqCst)
    }

    /// Whatever becomes ready from now on raises it again; what became ready before is in `ready`.
    /// The order matters: if the counter were taken last, it could belong to a raise that has just
    /// happened, and no later raise would increment it again.
    fn lower(&self, take_counter: impl FnOnce()) {
        if self.0.load(Ordering::SeqCst) {
            take_counter();
            // A swap and not a plain store: a thread that found it raised has made something ready
            // before, which must be visible from here on.
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
            // The counter can't be full: it is taken before it is raised again.
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
    /// Makes a queue for [`Op`]s with at most `depth` in flight, from 1 to 65,536.
    ///
    /// # Errors
    /// `Invalid`: the depth is out of range. `Io`: no event descriptor could be created.
    pub fn new(depth: usize) -> Result<Queue> {
        Queue::for_calls(depth)
    }

    /// Submits an operation, which is on its way when this returns. Its completion carries `tag`.
    ///
    /// # Errors
    /// `Busy`: `depth` operations are in flight; nothing was done.
    pub fn submit(&mut self, tag: u64, op: Op) -> Result<()> {
        self.submit_call(tag, op.call())
    }

    /// Submits operations as long as there is room. Returns how many were submitted.
    pub fn submit_batch(&mut self, ops: impl IntoIterator<Item = (u64, Op)>) -> usize {
        let room = self.depth - self.in_flight();
        ops.into_iter().take(room).map_while(|(tag, op)| self.submit(tag, op).ok()).count()
    }
}

impl<T> Queue<T> {
    /// Makes a queue for calls whose answer is a `T`, with at most `depth` in flight, from 1 to
    /// 65,536.
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
            .map_err(|error| Error::io("creating an event descriptor for a queue", error.into()))?;
        let signal = Arc::new(Signal { ready: SegQueue::new(), event, raised: Raised::default() });
        Ok(Queue { depth, under_way: Slab::new(), signal, done: VecDeque::new() })
    }

    /// The number of submitted operations whose completions were not handed out.
    pub fn in_flight(&self) -> usize {
        self.under_way.len() + self.done.len()
    }

    /// Submits any call of the library, or several of them in one future. It is polled at once, so
    /// a single call is on its way when this returns. Its completion carries `tag`.
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

    /// Waits until at least `min` operations, or all in flight, have completed, or `timeout` has
    /// passed. Appends all completions that have arrived to `into`, and returns how many. With
    /// `min` 0 it does not wait.
    ///
    /// # Errors
    /// `Invalid`: this thread drives a shard, and would wait for itself. `Io`: waiting failed.
    pub fn wait(
        &mut self,
        min: usize,
        timeout: Option<Duration>,
        into: &mut Vec<Completion<T>>,
    ) -> Result<usize> {
        if min > 0 && runtime::is_shard_thread() {
            return Err(Error::invalid(
                "waiting on a thread that drives a shard would wait for itself: use `min` 0",
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

    /// Polls the operations that can make progress, and collects those that have completed.
    fn advance(&mut self) {
        self.signal.lower();
        while let Some(key) = self.signal.ready.pop() {
            self.poll_one(key);
        }
    }

    fn poll_one(&mut self, key: usize) {
        // A late wake-up may belong to an operation that has ended.
        let Some(one) = self.under_way.get_mut(key) else { return };
        let waker = one.waker.clone();
        if let Poll::Ready(result) = one.future.as_mut().poll(&mut Context::from_waker(&waker)) {
            let one = self.under_way.remove(key);
            self.done.push_back(Completion { tag: one.tag, result });
        }
    }
}

impl<T> AsFd for Queue<T> {
    /// The descriptor is readable when [`wait`](Queue::wait) may have something to hand out: for
    /// the caller's own `epoll` or `poll`.
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
    /// it has not seen by then must have made the descriptor readable, or no one collects it.
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

    /// If a completed operation is never handed out, its caller waits for ever.
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
        assert!(!holds(counter_last), "the counter of a later raise is taken");
        let plain = |raised: &Raised, counter: &AtomicU32| {
            if raised.0.load(Ordering::SeqCst) {
                counter.store(0, Ordering::SeqCst);
                raised.0.store(false, Ordering::SeqCst);
            }
        };
        assert!(!holds(plain), "lowering that does not see what was ready");
    }
}
