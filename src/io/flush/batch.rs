//! Flush batches: flushes that are requested while one is in progress share the next one.
//!
//! ```text
//!   join --no batch in progress--> the caller leads one: syncs the batch's files, then calls `end`
//!     \--a batch in progress-----> waits for the *next* batch, which begins when this one ends
//! ```
//! Invariants
//! 1. A batch covers the writes that had completed before it was joined: a flush that is requested
//!    while a batch is in progress goes into the next one, which is submitted later.
//! 2. A queue has at most one batch in progress. The kernel reports a lost write to one caller
//!    only, so with two flushes at a time one would report success for a write that the other knows
//!    is lost.
//! 3. A failed batch is never repeated and called good: every flush in it, every flush that waits
//!    and every later one gets its error; where one flush stands for all files, in all queues of
//!    the store.
//! 4. Each waiter is notified exactly once, even when the leader panics.
//!
//! Where one flush stands for all files, batches over all shards were measured and rejected: the
//! kernel merges concurrent flushes by itself, so they gained nothing on idle cores, and on busy
//! ones each shard waited until another shard's thread was scheduled (0.4-0.9 k/s instead of 6-8
//! k/s with two and three shards).
//!
//! It does *not* make system calls: the leader does, in its ring or on its thread.

use crate::base::error::{Error, Result};
use crate::io::store_file::StoreFile;
use crate::io::waker::DiskWaker;
use smallvec::SmallVec;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

/// Identifies an operation of a ring disk; other threads only hand it back.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::io) struct OpIdx(pub(in crate::io) u32);

/// An event that another thread sends to a ring disk.
pub(in crate::io) enum RemoteEvent {
    /// A part of this operation has ended.
    PartEnded(OpIdx, Result<()>),
    /// This disk has to lead a batch.
    Lead(FlushBatch),
}

/// The events that other threads have left for a disk, and the waker of its thread.
pub(in crate::io) struct RemoteEvents {
    events: Mutex<Vec<RemoteEvent>>,
    any: AtomicBool,
    waker: DiskWaker,
}

impl RemoteEvents {
    pub(in crate::io) fn new(waker: DiskWaker) -> Arc<RemoteEvents> {
        Arc::new(RemoteEvents {
            events: Mutex::new(Vec::new()),
            any: AtomicBool::new(false),
            waker,
        })
    }

    pub(in crate::io) fn push(&self, event: RemoteEvent) {
        lock(&self.events).push(event);
        self.any.store(true, Ordering::Release);
        self.waker.wake();
    }

    /// Whether there may be events: one load, no lock.
    pub(in crate::io) fn has_any(&self) -> bool {
        self.any.load(Ordering::Acquire)
    }

    pub(in crate::io) fn take(&self) -> Vec<RemoteEvent> {
        let mut events = lock(&self.events);
        self.any.store(false, Ordering::Relaxed);
        std::mem::take(&mut events)
    }
}

/// The receiver of a batch's result.
pub(in crate::io) enum FlushWaiter {
    /// An operation of a ring disk, which can also lead batches.
    Ring(Arc<RemoteEvents>, OpIdx),
    /// Any other waiter; called on the leader's thread.
    Call(Box<dyn FnOnce(Result<()>) + Send>),
}

impl FlushWaiter {
    fn tell(self, result: Result<()>) {
        match self {
            FlushWaiter::Ring(events, op) => events.push(RemoteEvent::PartEnded(op, result)),
            FlushWaiter::Call(call) => call(result),
        }
    }
}

/// Which file a flush has to sync.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::io) enum Cover {
    /// A sync of any file of the queue is enough.
    AnyFile,
    /// This very file has to be synced.
    ThisFile,
}

/// The files that a batch syncs.
type BatchFiles = SmallVec<[Arc<StoreFile>; 1]>;

#[derive(Default)]
struct State {
    in_progress: bool,
    /// Notified when the batch in progress ends.
    waiting: Vec<FlushWaiter>,
    /// Notified when the next batch ends.
    next: Vec<FlushWaiter>,
    next_files: BatchFiles,
}

impl State {
    /// Checked on entry and exit of each transition: next to a flush it costs nothing.
    fn assert_state(&self) {
        assert!(
            self.in_progress != self.waiting.is_empty(),
            "a batch is in progress if and only if waiters wait for it"
        );
        assert!(
            self.in_progress || self.next.is_empty(),
            "a next batch without one in progress would never begin"
        );
        assert!(
            self.next.is_empty() == self.next_files.is_empty(),
            "a next batch has waiters and files, or neither"
        );
    }
}

/// The first failure, shared by all queues in which one flush stands for all files.
pub(in crate::io) type FirstFailure = Arc<OnceLock<Error>>;

/// The flushes of one file, or of one disk.
#[derive(Default)]
pub(in crate::io) struct FlushQueue {
    state: Mutex<State>,
    failed: FirstFailure,
}

impl FlushQueue {
    pub(in crate::io) fn with(failed: FirstFailure) -> Arc<FlushQueue> {
        Arc::new(FlushQueue { state: Mutex::default(), failed })
    }

    /// Requests a flush. `Some`: no batch is in progress, and the caller has to lead this one now.
    pub(in crate::io) fn join(
        self: &Arc<Self>,
        file: &Arc<StoreFile>,
        cover: Cover,
        waiter: FlushWaiter,
    ) -> Option<FlushBatch> {
        if let Some(error) = self.failed.get() {
            waiter.tell(Err(error.clone()));
            return None;
        }
        let mut state = lock(&self.state);
        state.assert_state();
        if state.in_progress {
            state.next.push(waiter);
            let known = state.next_files.iter().any(|other| Arc::ptr_eq(other, file));
            if state.next_files.is_empty() || (cover == Cover::ThisFile && !known) {
                state.next_files.push(file.clone());
            }
            state.assert_state();
            return None;
        }
        state.in_progress = true;
        state.waiting.push(waiter);
        state.assert_state();
        Some(FlushBatch { queue: Some(self.clone()), files: SmallVec::from_iter([file.clone()]) })
    }
}

/// Obliges its holder, the leader, to sync these files now and then to report the result.
#[must_use]
pub(in crate::io) struct FlushBatch {
    /// `None` once the batch has ended.
    queue: Option<Arc<FlushQueue>>,
    files: BatchFiles,
}

/// Whether the leader of a batch also leads the next one.
pub(in crate::io) enum NextLeader<'a> {
    /// It leads the next one in the ring that it runs on.
    Same,
    /// It leads the next one only if no other ring disk waits for it. The events are the leader's
    /// own, if it has a ring.
    AnotherIfAny(Option<&'a Arc<RemoteEvents>>),
}

impl FlushBatch {
    /// The files to sync.
    pub(in crate::io) fn files(&self) -> &[Arc<StoreFile>] {
        &self.files
    }

    /// Ends the batch. `Some`: others already wait, and the caller has to lead the next one.
    #[must_use]
    pub(in crate::io) fn end(
        mut self,
        result: Result<()>,
        leader: NextLeader<'_>,
    ) -> Option<FlushBatch> {
        self.finish(result, leader)
    }

    fn finish(&mut self, result: Result<()>, leader: NextLeader<'_>) -> Option<FlushBatch> {
        let queue = self.queue.take()?;
        // The files go before any waiter is notified: a waiter may be the last to hold them, and
        // expect them to be closed.
        for file in self.files.drain(..) {
            if result.is_ok() {
                file.set_synced();
            }
        }
        let result = match (result, queue.failed.get()) {
            (Ok(()), Some(error)) => Err(error.clone()),
            (Err(error), None) => Err(queue.failed.get_or_init(|| error).clone()),
            (result, _) => result,
        };
        let mut state = lock(&queue.state);
        state.assert_state();
        let mut told = std::mem::take(&mut state.waiting);
        let mut next = None;
        if result.is_err() {
            state.in_progress = false;
            told.append(&mut state.next);
            state.next_files.clear();
        } else if state.next.is_empty() {
            state.in_progress = false;
        } else {
            state.waiting = std::mem::take(&mut state.next);
            let files = std::mem::take(&mut state.next_files);
            next = Some(FlushBatch { queue: Some(queue.clone()), files });
        }
        state.assert_state();
        if let NextLeader::AnotherIfAny(own) = leader
            && let Some(batch) = next.take()
        {
            next = pass_on(batch, &state.waiting, own);
        }
        drop(state);
        for waiter in told {
            waiter.tell(result.clone());
        }
        next
    }
}

/// Gives a batch to a ring disk that waits for it. `Some`: no other ring disk does.
fn pass_on(
    batch: FlushBatch,
    waiting: &[FlushWaiter],
    own: Option<&Arc<RemoteEvents>>,
) -> Option<FlushBatch> {
    let other = waiting.iter().find_map(|waiter| match waiter {
        FlushWaiter::Ring(events, _) if !own.is_some_and(|own| Arc::ptr_eq(own, events)) => {
            Some(events.clone())
        }
        _ => None,
    });
    let Some(events) = other else { return Some(batch) };
    events.push(RemoteEvent::Lead(batch));
    None
}

impl Drop for FlushBatch {
    fn drop(&mut self) {
        if self.queue.is_some() {
            let cause = std::io::Error::other("the thread that flushed them panicked");
            let next =
                self.finish(Err(Error::io("flushing files of the store", cause)), NextLeader::Same);
            debug_assert!(next.is_none(), "nothing follows a failed batch");
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
