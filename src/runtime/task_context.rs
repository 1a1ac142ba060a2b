//! Tasks on a shard's own thread, and their requests, which take no hop.
//!
//! ```text
//!   spawn_on --closure--> spawn queue --run--> task --call--> queue --round--> shard
//!   shard --reply--> task
//!   woken on the thread: into the run queue
//!   woken elsewhere:     into the mailbox's `woken_tasks`, and the thread is unparked
//! ```
//! Invariants
//! 1. Futures and their requests never leave the thread: there are no atomics but the task's own.
//! 2. A task is in a run queue at most once; a wake-up from another thread reaches a parked shard.
//! 3. When the shard ends, its tasks are dropped on their thread, and whoever waits for them gets
//!    an error.
//! 4. A task that panics ends alone; the panic resumes where the task is awaited.
//! 5. Once `request_bytes_max` bytes are in flight, no more requests with bytes are queued; at
//!    least one always is. The others are deferred, in order, together with their replies, and are
//!    dropped with these.
//! 6. No borrow of a cell here is held while a waker, a future or a closure of a caller runs.
//!
//! Both drivers use the tasks of `async-task`. An executor that parks in a ring of its own would
//! not see wake-ups from other threads while the shard waits in the shard's ring, nor could it say
//! beforehand whether a task is runnable.

mod local_reply;

use super::shared::{RuntimeShared, ShardMailbox, SpawnRequest, charged_bytes, closed};
use crate::base::ShardId;
use crate::base::error::{Error, ErrorKind, Result};
use crate::engine::{Request, Response, Token};
use crate::mesh::{Abandoned, Polled, ReplySlot};
use async_task::{Runnable, Task};
pub(crate) use local_reply::LocalReply;
use slab::Slab;
use std::any::Any;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

/// Marks the tokens of requests that stay on their thread.
pub(super) const LOCAL_TOKEN_BIT: u64 = 1 << 63;
/// The most tasks of one shard.
pub(super) const TASKS_MAX: usize = 1 << 16;
/// The most tasks that run in one round.
pub(super) const TASKS_PER_ROUND: usize = 512;

thread_local! {
    static RUNNABLE: RefCell<VecDeque<Runnable>> = const { RefCell::new(VecDeque::new()) };
    /// The mailbox of the shard that this thread drives.
    static CURRENT_SHARD: Cell<*const ShardMailbox> = const { Cell::new(std::ptr::null()) };
}

/// How a task ended.
enum TaskOutcome<T> {
    Done(T),
    Panicked(Box<dyn Any + Send>),
    ShardEnded,
    /// It did not begin: the shard already has the most tasks allowed.
    Refused,
}

/// The pending result of a task. Dropping it does not stop the task.
#[must_use = "the task runs whether this is awaited or not"]
pub(crate) struct TaskHandle<T>(Option<Arc<ReplySlot<TaskOutcome<T>>>>);

impl<T> Future for TaskHandle<T> {
    type Output = Result<T>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<T>> {
        let Some(slot) = &self.0 else { return Poll::Ready(Err(closed())) };
        let end = match slot.poll(cx.waker()) {
            Polled::Pending => return Poll::Pending,
            Polled::Free(end) => end,
        };
        self.0 = None;
        match end.map(|end| *end) {
            Some(TaskOutcome::Done(value)) => Poll::Ready(Ok(value)),
            Some(TaskOutcome::Panicked(payload)) => resume_unwind(payload),
            Some(TaskOutcome::Refused) => Poll::Ready(Err(too_many_tasks())),
            Some(TaskOutcome::ShardEnded) | None => Poll::Ready(Err(closed())),
        }
    }
}

impl<T> Drop for TaskHandle<T> {
    fn drop(&mut self) {
        if let Some(slot) = &self.0 {
            // The slot is freed with its last reference, whoever holds that.
            let (Abandoned::Left | Abandoned::Free) = slot.abandon();
        }
    }
}

/// Completes the task's handle, with `ShardEnded` if the task is dropped unfinished.
struct CompletionGuard<T>(Arc<ReplySlot<TaskOutcome<T>>>);

impl<T> Drop for CompletionGuard<T> {
    fn drop(&mut self) {
        self.0.complete(TaskOutcome::ShardEnded);
    }
}

/// A request to run `make` as a task on a shard's own thread, and the handle of that task.
pub(super) fn spawn_request<T, F, G>(make: G) -> (SpawnRequest, TaskHandle<T>)
where
    T: Send + 'static,
    F: Future<Output = T> + 'static,
    G: FnOnce(TaskContext) -> F + Send + 'static,
{
    let slot = Arc::new(ReplySlot::default());
    let guard = CompletionGuard(slot.clone());
    let spawn = move |tasks: &dyn Any| {
        let tasks: &TaskContext =
            tasks.downcast_ref().expect("a shard's thread passes its task context");
        let own = tasks.clone();
        tasks.start(guard, async move { make(own).await });
    };
    (Box::new(spawn), TaskHandle(Some(slot)))
}

/// A request of a task, which stays on its thread.
enum PendingRequest {
    /// Deferred, because too many bytes are in flight: its number among the deferred ones, and the
    /// request.
    Deferred(u64, Request, Option<Waker>),
    /// In flight, charged with these bytes.
    InFlight(u64, Option<Waker>),
    Answered(Result<Response>),
    /// In flight, charged with these bytes; its reply was dropped.
    Abandoned(u64),
}

/// The tasks of one shard, and their requests.
pub(super) struct ShardTasks {
    shard: ShardId,
    shared: Arc<RuntimeShared>,
    requests_max: usize,
    request_bytes_max: u64,
    queue: RefCell<VecDeque<(Token, Request)>>,
    replies: RefCell<Slab<PendingRequest>>,
    /// Bytes of the requests in flight, including those in the queue.
    bytes: Cell<u64>,
    /// Keys of the deferred requests, in the order of arrival.
    deferred: RefCell<BTreeMap<u64, usize>>,
    deferred_next: Cell<u64>,
    tasks: RefCell<Slab<Task<()>>>,
    closed: Cell<bool>,
}

/// A shard, as a task that runs on its thread sees it.
#[derive(Clone)]
pub(crate) struct TaskContext(Rc<ShardTasks>);

impl TaskContext {
    /// Makes the context for the tasks of `shard`, which the calling thread drives.
    pub(super) fn new(
        shard: ShardId,
        shared: Arc<RuntimeShared>,
        requests_max: usize,
        request_bytes_max: u64,
    ) -> TaskContext {
        let local = TaskContext(Rc::new(ShardTasks {
            shard,
            shared,
            requests_max,
            request_bytes_max,
            queue: RefCell::default(),
            replies: RefCell::default(),
            bytes: Cell::new(0),
            deferred: RefCell::default(),
            deferred_next: Cell::new(0),
            tasks: RefCell::default(),
            closed: Cell::new(false),
        }));
        CURRENT_SHARD.set(local.mailbox());
        local
    }

    fn mailbox(&self) -> &ShardMailbox {
        &self.0.shared.mailboxes[usize::from(self.0.shard.get())]
    }

    /// Which shard this is.
    pub(crate) fn shard(&self) -> ShardId {
        self.0.shard
    }

    /// Submits a request to the shard, without a hop. The request must belong to this shard.
    /// Dropping the reply undoes nothing, except that a request that is still deferred never
    /// begins. `Busy` at once if this shard's tasks already have `requests_max` requests in flight.
    pub(crate) fn call(&self, request: Request) -> LocalReply {
        let mut replies = self.0.replies.borrow_mut();
        if self.0.is_closed() || replies.len() >= self.0.requests_max {
            return LocalReply { local: self.clone(), key: None };
        }
        self.0.assert_state(&replies);
        let bytes = charged_bytes(&request);
        let key =
            if bytes == 0 || self.0.has_room_for_bytes() && self.0.deferred.borrow().is_empty() {
                self.0.bytes.set(self.0.bytes.get() + bytes);
                let key = replies.insert(PendingRequest::InFlight(bytes, None));
                self.0.queue.borrow_mut().push_back((token(key), request));
                key
            } else {
                let number = self.0.deferred_next.replace(self.0.deferred_next.get() + 1);
                let key = replies.insert(PendingRequest::Deferred(number, request, None));
                self.0.deferred.borrow_mut().insert(number, key);
                key
            };
        self.0.assert_state(&replies);
        LocalReply { local: self.clone(), key: Some(key) }
    }

    /// Runs `future` as a task of its own on this thread.
    pub(crate) fn spawn<T: Send + 'static>(
        &self,
        future: impl Future<Output = T> + 'static,
    ) -> TaskHandle<T> {
        let slot = Arc::new(ReplySlot::default());
        self.start(CompletionGuard(slot.clone()), future);
        TaskHandle(Some(slot))
    }

    fn start<T: Send + 'static>(
        &self,
        guard: CompletionGuard<T>,
        future: impl Future<Output = T> + 'static,
    ) {
        let mut tasks = self.0.tasks.borrow_mut();
        if self.0.closed.get() || tasks.len() >= TASKS_MAX {
            drop(tasks);
            if !self.0.closed.get() {
                guard.0.complete(TaskOutcome::Refused);
            }
            return;
        }
        let entry = tasks.vacant_entry();
        let (key, local) = (entry.key(), Rc::downgrade(&self.0));
        let body = async move {
            let end = match Guarded(Box::pin(future)).await {
                Ok(value) => TaskOutcome::Done(value),
                Err(payload) => TaskOutcome::Panicked(payload),
            };
            guard.0.complete(end);
            let own = local.upgrade().and_then(|local| local.tasks.borrow_mut().try_remove(key));
            if let Some(task) = own {
                task.detach();
            }
        };
        let (shared, shard) = (self.0.shared.clone(), usize::from(self.0.shard.get()));
        let schedule = move |runnable| schedule(&shared.mailboxes[shard], runnable);
        let (runnable, task) = async_task::spawn_local(body, schedule);
        entry.insert(task);
        drop(tasks);
        runnable.schedule();
    }

    /// Takes the next request that a task has made, in order.
    pub(super) fn next_request(&self) -> Option<(Token, Request)> {
        self.0.queue.borrow_mut().pop_front()
    }

    /// Completes the reply to one of these requests.
    pub(super) fn reply(&self, token: Token, result: Result<Response>) {
        let key = (token.0 & !LOCAL_TOKEN_BIT) as usize;
        let mut replies = self.0.replies.borrow_mut();
        let Some(pending) = replies.get_mut(key) else { return };
        let (bytes, waker) = match pending {
            PendingRequest::Abandoned(bytes) => (*bytes, None),
            PendingRequest::Answered(_) => return,
            PendingRequest::InFlight(bytes, waker) => (*bytes, waker.take()),
            PendingRequest::Deferred(..) => {
                unreachable!("a deferred request is not in flight")
            }
        };
        let unwanted = match pending {
            PendingRequest::Abandoned(_) => replies.try_remove(key),
            _ => Some(std::mem::replace(pending, PendingRequest::Answered(result))),
        };
        self.0.release_bytes(bytes, &mut replies);
        self.0.assert_state(&replies);
        drop(replies);
        drop(unwanted);
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Whether a request waits to be taken.
    pub(super) fn has_requests(&self) -> bool {
        !self.0.queue.borrow().is_empty()
    }

    /// Whether a task could run.
    pub(super) fn has_tasks(&self) -> bool {
        let mailbox = self.mailbox();
        RUNNABLE.with_borrow(|tasks| !tasks.is_empty())
            || !mailbox.woken_tasks.is_empty()
            || !mailbox.spawn_queue.is_empty()
    }

    /// Starts tasks that other threads have sent, and runs up to [`TASKS_PER_ROUND`] tasks. Returns
    /// whether any ran.
    pub(super) fn run(&self) -> bool {
        let mailbox = self.mailbox();
        while let Some(start) = mailbox.spawn_queue.pop() {
            start(self);
        }
        let mut ran = 0;
        while ran < TASKS_PER_ROUND {
            let next = RUNNABLE.with_borrow_mut(VecDeque::pop_front).or_else(|| {
                match mailbox.woken_tasks.is_empty() {
                    true => None,
                    false => mailbox.woken_tasks.pop(),
                }
            });
            let Some(runnable) = next else { break };
            runnable.run();
            ran += 1;
        }
        ran > 0
    }

    /// Answers the deferred requests when the shard ends: they never began.
    fn refuse_deferred(&self) {
        for key in self.0.deferred.take().into_values() {
            let refused = PendingRequest::Answered(Err(closed()));
            let former = self
                .0
                .replies
                .borrow_mut()
                .get_mut(key)
                .map(|pending| std::mem::replace(pending, refused));
            if let Some(PendingRequest::Deferred(_, request, waker)) = former {
                drop(request);
                waker.into_iter().for_each(Waker::wake);
            }
        }
    }

    /// Called when the shard has ended: answers its tasks' requests, and then drops the tasks, on
    /// this thread.
    pub(super) fn end(&self) {
        self.0.closed.set(true);
        self.refuse_deferred();
        // These never began, but are answered like the rest below.
        let queued = self.0.queue.take();
        let waiting: Vec<usize> = self.0.replies.borrow().iter().map(|(key, _)| key).collect();
        let context =
            "the shard stopped; whether this was done is not known: reopen the store and look";
        for key in waiting {
            self.reply(token(key), Err(Error::new(ErrorKind::OutcomeUnknown, context)));
        }
        drop(queued);
        self.run();
        let tasks: Vec<Task<()>> = self.0.tasks.borrow_mut().drain().collect();
        // Each task is scheduled again, so that its future is dropped here.
        drop(tasks);
        while self.run() {}
        CURRENT_SHARD.set(std::ptr::null());
    }
}

impl ShardTasks {
    /// Whether the shard takes no more requests from its tasks.
    fn is_closed(&self) -> bool {
        self.closed.get() || self.shared.is_closing()
    }

    /// Checks that requests are deferred only while too many bytes are in flight, and that each has
    /// its place among the replies.
    fn assert_state(&self, replies: &Slab<PendingRequest>) {
        let (deferred, replies) = (self.deferred.borrow().len(), replies.len());
        assert!(
            deferred == 0 || !self.has_room_for_bytes(),
            "{deferred} requests are deferred although there is room"
        );
        assert!(
            deferred + self.queue.borrow().len() <= replies,
            "a request has no place for its reply"
        );
        assert!(
            replies <= self.requests_max,
            "{replies} requests are in flight, of {}",
            self.requests_max
        );
    }

    fn has_room_for_bytes(&self) -> bool {
        self.bytes.get() < self.request_bytes_max
    }

    /// Releases the bytes of an answered request, and starts deferred requests as long as there is
    /// room.
    fn release_bytes(&self, bytes: u64, replies: &mut Slab<PendingRequest>) {
        assert!(
            bytes <= self.bytes.get(),
            "{bytes} bytes are released, {} were taken",
            self.bytes.get()
        );
        self.bytes.set(self.bytes.get() - bytes);
        while self.has_room_for_bytes() {
            let Some((_, key)) = self.deferred.borrow_mut().pop_first() else { return };
            let Some(pending @ PendingRequest::Deferred(..)) = replies.get_mut(key) else {
                unreachable!("it is deferred")
            };
            let PendingRequest::Deferred(_, request, waker) =
                std::mem::replace(pending, PendingRequest::Abandoned(0))
            else {
                return;
            };
            let bytes = charged_bytes(&request);
            *pending = PendingRequest::InFlight(bytes, waker);
            self.bytes.set(self.bytes.get() + bytes);
            self.queue.borrow_mut().push_back((token(key), request));
        }
    }
}

fn too_many_tasks() -> Error {
    Error::new(
        ErrorKind::Busy,
        format_args!("the shard has {TASKS_MAX} tasks: wait for some to end, and try again"),
    )
}

fn token(key: usize) -> Token {
    Token(key as u64 | LOCAL_TOKEN_BIT)
}

fn schedule(mailbox: &ShardMailbox, runnable: Runnable) {
    if CURRENT_SHARD.try_with(Cell::get).is_ok_and(|here| std::ptr::eq(here, mailbox)) {
        RUNNABLE.with_borrow_mut(|tasks| tasks.push_back(runnable));
    } else {
        mailbox.woken_tasks.push(runnable);
        mailbox.parking.unpark();
    }
}

/// A future whose panic is its output.
struct Guarded<F: ?Sized>(Pin<Box<F>>);

impl<F: Future + ?Sized> Future for Guarded<F> {
    type Output = std::result::Result<F::Output, Box<dyn Any + Send>>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match catch_unwind(AssertUnwindSafe(|| self.0.as_mut().poll(cx))) {
            Ok(Poll::Pending) => Poll::Pending,
            Ok(Poll::Ready(value)) => Poll::Ready(Ok(value)),
            Err(payload) => Poll::Ready(Err(payload)),
        }
    }
}
