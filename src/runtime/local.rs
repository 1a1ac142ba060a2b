//! Tasks on a shard's own thread, and their requests, which take no hop.
//!
//! ```text
//!   spawn_on --closure--> spawns --run--> task --call--> queue --lap--> shard --> slot of the reply --> task
//!   woken on the thread: run queue.   woken elsewhere: the port's `woken`, and the thread is roused
//! ```
//! Invariants
//! 1. Futures and their requests never leave the thread: no atomics but the task's own.
//! 2. A task is in a run queue at most once; a wake-up from another thread reaches a parked shard.
//! 3. When the shard ends its tasks are dropped, on their thread. Whoever waits for them is told.
//! 4. A task that panics ends alone; the panic goes on where the task is awaited.
//! 5. Of requests with bytes no more are queued once `request_bytes_max` are under way; one at least is. The others are kept with
//!    their replies, in their order, and go with them if those are dropped.
//! 6. No borrow of a cell here is held while a waker, a future or a closure of somebody else's runs.
//!
//! The tasks are `async-task`'s, on both drivers. An executor that parks in a ring of its own would not see wake-ups
//! from other threads while the shard waits in the shard's ring, nor say whether a task is runnable before it does.

use super::shared::{Port, Shared, closed, counted_bytes};
use crate::base::ShardId;
use crate::base::error::{Error, ErrorKind, Result};
use crate::engine::{Request, Response, Token};
use crate::mesh::{Dropped, Polled, Slot};
use async_task::{Runnable, Task};
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
pub(super) const LOCAL: u64 = 1 << 63;
/// Tasks of one shard.
pub(super) const TASKS_MAX: usize = 1 << 16;
/// Tasks run between two looks at everything else.
pub(super) const RUN_MAX: usize = 512;

thread_local! {
    static RUNNABLE: RefCell<VecDeque<Runnable>> = const { RefCell::new(VecDeque::new()) };
    /// The port of the shard that this thread drives.
    static HERE: Cell<*const Port> = const { Cell::new(std::ptr::null()) };
}

/// What a task's end was.
enum End<T> {
    Done(T),
    Panicked(Box<dyn Any + Send>),
    Stopped,
    /// It was not begun: the shard has as many tasks as it may.
    Refused,
}

/// A closure on its way to a shard, which makes a task of it there.
pub(super) struct Spawn(Box<dyn FnOnce(&Local) + Send>);

/// A task's result, to come. Dropping it does not stop the task.
#[must_use = "the task runs whether this is awaited or not"]
pub(crate) struct Join<T>(Option<Arc<Slot<End<T>>>>);

impl<T> Future for Join<T> {
    type Output = Result<T>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<T>> {
        let Some(slot) = &self.0 else { return Poll::Ready(Err(closed())) };
        let end = match slot.poll(cx.waker()) {
            Polled::Pending => return Poll::Pending,
            Polled::Free(end) => end,
        };
        self.0 = None;
        match end.map(|end| *end) {
            Some(End::Done(value)) => Poll::Ready(Ok(value)),
            Some(End::Panicked(payload)) => resume_unwind(payload),
            Some(End::Refused) => Poll::Ready(Err(too_many_tasks())),
            Some(End::Stopped) | None => Poll::Ready(Err(closed())),
        }
    }
}

impl<T> Drop for Join<T> {
    fn drop(&mut self) {
        if let Some(slot) = &self.0 {
            // The slot is freed with its last reference, whoever has it.
            let (Dropped::Left | Dropped::Free) = slot.abandon();
        }
    }
}

/// Tells the one who waits, also if the task is dropped unfinished.
struct Teller<T>(Arc<Slot<End<T>>>);

impl<T> Drop for Teller<T> {
    fn drop(&mut self) {
        self.0.complete(End::Stopped);
    }
}

impl Spawn {
    /// The closure, and what will become of its task.
    pub(super) fn new<T, F, G>(make: G) -> (Spawn, Join<T>)
    where
        T: Send + 'static,
        F: Future<Output = T> + 'static,
        G: FnOnce(Local) -> F + Send + 'static,
    {
        let slot = Arc::new(Slot::default());
        let teller = Teller(slot.clone());
        let spawn = move |local: &Local| {
            let own = local.clone();
            local.start(teller, async move { make(own).await });
        };
        (Spawn(Box::new(spawn)), Join(Some(slot)))
    }
}

/// One request that stays on its thread.
enum Place {
    /// Too many bytes are under way: the request, and its number among those kept back.
    Kept(u64, Request, Option<Waker>),
    /// Under way, with its bytes.
    Waiting(u64, Option<Waker>),
    Answered(Result<Response>),
    /// Under way, and nobody wants the reply.
    Abandoned(u64),
}

/// The tasks of one shard, and their requests.
pub(super) struct Locals {
    shard: ShardId,
    shared: Arc<Shared>,
    requests_max: usize,
    request_bytes_max: u64,
    queue: RefCell<VecDeque<(Token, Request)>>,
    replies: RefCell<Slab<Place>>,
    /// Of the requests under way, those in the queue included.
    bytes: Cell<u64>,
    /// Requests kept back: where they are, by when they came.
    kept: RefCell<BTreeMap<u64, usize>>,
    kept_next: Cell<u64>,
    tasks: RefCell<Slab<Task<()>>>,
    closed: Cell<bool>,
}

/// A shard, for a task that runs on its thread.
#[derive(Clone)]
pub(crate) struct Local(Rc<Locals>);

impl Local {
    /// The tasks of `shard`, driven by this thread.
    pub(super) fn new(shard: ShardId, shared: Arc<Shared>, requests_max: usize, request_bytes_max: u64) -> Local {
        let local = Local(Rc::new(Locals {
            shard,
            shared,
            requests_max,
            request_bytes_max,
            queue: RefCell::default(),
            replies: RefCell::default(),
            bytes: Cell::new(0),
            kept: RefCell::default(),
            kept_next: Cell::new(0),
            tasks: RefCell::default(),
            closed: Cell::new(false),
        }));
        HERE.set(local.port());
        local
    }

    fn port(&self) -> &Port {
        &self.0.shared.ports[usize::from(self.0.shard.get())]
    }

    /// The shard.
    pub(crate) fn shard(&self) -> ShardId {
        self.0.shard
    }

    /// Asks the shard, without a hop. The request must be one that belongs there. Dropping the reply undoes nothing, but for a
    /// request that was kept back until then: it was not begun. `Busy` at once if as many requests as `requests_max` are under way
    /// from this shard's tasks.
    pub(crate) fn call(&self, request: Request) -> LocalReply {
        let mut replies = self.0.replies.borrow_mut();
        if self.0.is_closed() || replies.len() >= self.0.requests_max {
            return LocalReply { local: self.clone(), key: None };
        }
        let bytes = counted_bytes(&request);
        let key = if bytes == 0 || self.0.has_room_for_bytes() && self.0.kept.borrow().is_empty() {
            self.0.bytes.set(self.0.bytes.get() + bytes);
            let key = replies.insert(Place::Waiting(bytes, None));
            self.0.queue.borrow_mut().push_back((token(key), request));
            key
        } else {
            let number = self.0.kept_next.replace(self.0.kept_next.get() + 1);
            let key = replies.insert(Place::Kept(number, request, None));
            self.0.kept.borrow_mut().insert(number, key);
            key
        };
        LocalReply { local: self.clone(), key: Some(key) }
    }

    /// Runs `future` as a task of its own on this thread.
    pub(crate) fn spawn<T: Send + 'static>(&self, future: impl Future<Output = T> + 'static) -> Join<T> {
        let slot = Arc::new(Slot::default());
        self.start(Teller(slot.clone()), future);
        Join(Some(slot))
    }

    fn start<T: Send + 'static>(&self, teller: Teller<T>, future: impl Future<Output = T> + 'static) {
        let mut tasks = self.0.tasks.borrow_mut();
        if self.0.closed.get() || tasks.len() >= TASKS_MAX {
            drop(tasks);
            if !self.0.closed.get() {
                teller.0.complete(End::Refused);
            }
            return;
        }
        let entry = tasks.vacant_entry();
        let (key, local) = (entry.key(), Rc::downgrade(&self.0));
        let body = async move {
            let end = match Guarded(Box::pin(future)).await {
                Ok(value) => End::Done(value),
                Err(payload) => End::Panicked(payload),
            };
            teller.0.complete(end);
            let own = local.upgrade().and_then(|local| local.tasks.borrow_mut().try_remove(key));
            if let Some(task) = own {
                task.detach();
            }
        };
        let (shared, shard) = (self.0.shared.clone(), usize::from(self.0.shard.get()));
        let schedule = move |runnable| schedule(&shared.ports[shard], runnable);
        let (runnable, task) = async_task::spawn_local(body, schedule);
        entry.insert(task);
        drop(tasks);
        runnable.schedule();
    }

    /// The requests that tasks have made, in order.
    pub(super) fn next_request(&self) -> Option<(Token, Request)> {
        self.0.queue.borrow_mut().pop_front()
    }

    /// The reply to one of them.
    pub(super) fn reply(&self, token: Token, result: Result<Response>) {
        let key = (token.0 & !LOCAL) as usize;
        let mut replies = self.0.replies.borrow_mut();
        let Some(place) = replies.get_mut(key) else { return };
        let (bytes, waker) = match place {
            Place::Abandoned(bytes) => (*bytes, None),
            Place::Answered(_) => return,
            Place::Waiting(bytes, waker) => (*bytes, waker.take()),
            Place::Kept(..) => unreachable!("a request that is kept back is not under way"),
        };
        let unwanted = match place {
            Place::Abandoned(_) => replies.try_remove(key),
            _ => Some(std::mem::replace(place, Place::Answered(result))),
        };
        self.0.give_back(bytes, &mut replies);
        drop(replies);
        drop(unwanted);
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Whether a task could run, or a request be taken.
    pub(super) fn has_work(&self, accepting: bool) -> bool {
        let port = self.port();
        RUNNABLE.with_borrow(|tasks| !tasks.is_empty())
            || !port.woken.is_empty()
            || !port.spawns.is_empty()
            || accepting && !self.0.queue.borrow().is_empty()
    }

    /// Starts what others have sent here and runs tasks, bounded; whether any ran.
    pub(super) fn run(&self) -> bool {
        let port = self.port();
        while let Some(Spawn(start)) = port.spawns.pop() {
            start(self);
        }
        let mut ran = 0;
        while ran < RUN_MAX {
            let next = RUNNABLE.with_borrow_mut(VecDeque::pop_front).or_else(|| match port.woken.is_empty() {
                true => None,
                false => port.woken.pop(),
            });
            let Some(runnable) = next else { break };
            runnable.run();
            ran += 1;
        }
        ran > 0
    }

    /// The shard has ended, and these were not begun.
    fn refuse_kept(&self) {
        for key in self.0.kept.take().into_values() {
            let refused = Place::Answered(Err(closed()));
            let former = self.0.replies.borrow_mut().get_mut(key).map(|place| std::mem::replace(place, refused));
            if let Some(Place::Kept(_, request, waker)) = former {
                drop(request);
                waker.into_iter().for_each(Waker::wake);
            }
        }
    }

    /// The shard has ended: its tasks are told, and then dropped, on this thread.
    pub(super) fn end(&self) {
        self.0.closed.set(true);
        self.refuse_kept();
        let waiting: Vec<usize> = self.0.replies.borrow().iter().map(|(key, _)| key).collect();
        let context = "the shard stopped; whether this was done is not known: reopen the store and look";
        for key in waiting {
            self.reply(token(key), Err(Error::new(ErrorKind::OutcomeUnknown, context)));
        }
        drop(self.0.queue.take());
        self.run();
        let tasks: Vec<Task<()>> = self.0.tasks.borrow_mut().drain().collect();
        // Each is scheduled once more, to drop its future here.
        drop(tasks);
        while self.run() {}
        HERE.set(std::ptr::null());
    }
}

impl Locals {
    /// The shard takes nothing more from its tasks.
    fn is_closed(&self) -> bool {
        self.closed.get() || self.shared.is_closing()
    }

    fn has_room_for_bytes(&self) -> bool {
        self.bytes.get() < self.request_bytes_max
    }

    /// A request with so many bytes is under way no more: those that were kept back go, as long as there is room.
    fn give_back(&self, bytes: u64, replies: &mut Slab<Place>) {
        assert!(bytes <= self.bytes.get(), "{bytes} bytes are given back, {} were taken", self.bytes.get());
        self.bytes.set(self.bytes.get() - bytes);
        while self.has_room_for_bytes() {
            let Some((_, key)) = self.kept.borrow_mut().pop_first() else { return };
            let Some(place @ Place::Kept(..)) = replies.get_mut(key) else { unreachable!("it is kept back") };
            let Place::Kept(_, request, waker) = std::mem::replace(place, Place::Abandoned(0)) else { return };
            let bytes = counted_bytes(&request);
            *place = Place::Waiting(bytes, waker);
            self.bytes.set(self.bytes.get() + bytes);
            self.queue.borrow_mut().push_back((token(key), request));
        }
    }
}

fn too_many_tasks() -> Error {
    Error::new(ErrorKind::Busy, format_args!("the shard has {TASKS_MAX} tasks: wait for some to end, and try again"))
}

fn token(key: usize) -> Token {
    Token(key as u64 | LOCAL)
}

fn schedule(port: &Port, runnable: Runnable) {
    if HERE.try_with(Cell::get).is_ok_and(|here| std::ptr::eq(here, port)) {
        RUNNABLE.with_borrow_mut(|tasks| tasks.push_back(runnable));
    } else {
        port.woken.push(runnable);
        port.parking.rouse();
    }
}

/// The reply to a request that stays on its thread, to come.
#[must_use = "the request is under way whether this is awaited or not"]
pub(crate) struct LocalReply {
    local: Local,
    /// `None`: it was refused, or the reply was taken.
    key: Option<usize>,
}

impl Future for LocalReply {
    type Output = Result<Response>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<Response>> {
        let Some(key) = self.key else { return Poll::Ready(Err(self.refusal())) };
        let mut replies = self.local.0.replies.borrow_mut();
        if let Place::Waiting(_, waker) | Place::Kept(.., waker) = &mut replies[key] {
            match waker {
                Some(known) => known.clone_from(cx.waker()),
                none => *none = Some(cx.waker().clone()),
            }
            return Poll::Pending;
        }
        let Place::Answered(result) = replies.remove(key) else { unreachable!("only a drop abandons a reply") };
        drop(replies);
        self.key = None;
        Poll::Ready(result)
    }
}

impl LocalReply {
    fn refusal(&self) -> Error {
        if self.local.0.is_closed() {
            return closed();
        }
        let most = self.local.0.requests_max;
        Error::new(ErrorKind::Busy, format_args!("{most} requests of this shard's tasks are under way; await some"))
    }
}

impl Drop for LocalReply {
    fn drop(&mut self) {
        let Some(key) = self.key else { return };
        let mut replies = self.local.0.replies.borrow_mut();
        let unwanted = match replies[key] {
            Place::Answered(_) => replies.try_remove(key),
            Place::Kept(number, ..) => {
                self.local.0.kept.borrow_mut().remove(&number);
                replies.try_remove(key)
            }
            Place::Waiting(bytes, _) | Place::Abandoned(bytes) => {
                Some(std::mem::replace(&mut replies[key], Place::Abandoned(bytes)))
            }
        };
        drop(replies);
        drop(unwanted);
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
