//! What handles and the threads of all shards share.
//!
//! Invariants
//! 1. A request is in an inbox, in a shard or answered. When a thread ends it answers what it had accepted, closes its
//!    inbox, and refuses the rest.
//! 2. `abandoned` ends all threads: no handle is left, or a shard has stopped without a clean close. Each waits for what it
//!    has at the device, and for nothing else; what consists of many steps is cut short.

use super::request_permits::{CHARGED_BYTES_MAX, RequestPermits};
use super::task_context::SpawnRequest;
use crate::base::error::{Error, ErrorKind, Result};
use crate::engine::{Request, Response, Token, request_bytes};
use crate::io::{Cancel, DiskWaker, Opener};
use crate::mesh::{InFlight, Inbox, Parking, Wake};
use async_task::Runnable;
use crossbeam::queue::SegQueue;
use event_listener::Event;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

/// Requests that an inbox holds whatever `requests_max` is; beyond it, a share of that.
const INBOX_MAX: usize = 16_384;
/// Closures on their way to a shard.
const SPAWNS_MAX: usize = 1024;

/// A request on its way to a shard.
pub(super) struct QueuedRequest {
    pub(super) token: Token,
    pub(super) request: Request,
    /// What it is counted with in [`ShardMailbox::byte_permits`], until it is answered.
    pub(super) bytes: u64,
}

/// What a request is counted with, where its bytes are.
pub(super) fn charged_bytes(request: &Request) -> u64 {
    request_bytes(request).min(CHARGED_BYTES_MAX)
}

impl Wake for DiskWaker {
    fn wake(&self) {
        DiskWaker::wake(self);
    }
}

/// The way into one shard.
pub(super) struct ShardMailbox {
    pub(super) inbox: Inbox<QueuedRequest>,
    pub(super) spawn_queue: Inbox<SpawnRequest>,
    /// Tasks of the shard that other threads have woken: each at most once, so bounded by the tasks.
    pub(super) woken_tasks: SegQueue<Runnable>,
    pub(super) parking: Parking<DiskWaker>,
    /// For requests that carry something: a shard that is slow holds up no commits of others.
    pub(super) byte_permits: RequestPermits,
}

/// What a request on its way has taken of [`ShardMailbox::byte_permits`]; given back unless it is [kept](BytesPermit::into_charged).
pub(super) struct BytesPermit<'a> {
    mailbox: &'a ShardMailbox,
    bytes: u64,
}

impl<'a> BytesPermit<'a> {
    /// Waits until so many bytes may be under way to the shard; none always may.
    pub(super) async fn acquire(mailbox: &'a ShardMailbox, bytes: u64) -> Result<BytesPermit<'a>> {
        if bytes > 0 {
            mailbox.byte_permits.acquire(bytes).await?;
        }
        Ok(BytesPermit { mailbox, bytes })
    }

    /// The request is on its way: its bytes are given back when it is answered.
    pub(super) fn into_charged(mut self) -> u64 {
        std::mem::take(&mut self.bytes)
    }
}

impl Drop for BytesPermit<'_> {
    fn drop(&mut self) {
        self.mailbox.byte_permits.release(usize::from(self.bytes > 0), self.bytes);
    }
}

pub(super) struct RuntimeShared {
    pub(super) mailboxes: Box<[ShardMailbox]>,
    pub(super) in_flight: Arc<InFlight<Result<Response>>>,
    /// For all requests of handles.
    pub(super) request_permits: RequestPermits,
    abandoned: AtomicBool,
    opener: Opener,
    /// A clean close was asked for: nothing more is brought to the shards.
    closing: AtomicBool,
    /// Of the files: ends what takes many steps.
    cancel: Cancel,
    running: AtomicUsize,
    ended: Event,
    /// Why the store takes no writes any more, once that is so.
    failure: OnceLock<Error>,
    has_failed: Event,
}

impl RuntimeShared {
    pub(super) fn new(shards_count: u16, requests_max: usize, request_bytes_max: u64, cancel: Cancel) -> Self {
        let capacity = requests_max.clamp(1, INBOX_MAX.max(requests_max / usize::from(shards_count)));
        let mailbox = |_| ShardMailbox {
            inbox: Inbox::new(capacity),
            spawn_queue: Inbox::new(SPAWNS_MAX),
            woken_tasks: SegQueue::new(),
            parking: Parking::new(),
            byte_permits: RequestPermits::new(requests_max, request_bytes_max),
        };
        RuntimeShared {
            mailboxes: (0..shards_count).map(mailbox).collect(),
            in_flight: Arc::new(InFlight::new()),
            request_permits: RequestPermits::new(requests_max, 1),
            abandoned: AtomicBool::new(false),
            opener: Opener::default(),
            closing: AtomicBool::new(false),
            cancel,
            running: AtomicUsize::new(usize::from(shards_count)),
            ended: Event::new(),
            failure: OnceLock::new(),
            has_failed: Event::new(),
        }
    }

    /// All threads are to end, without a clean close, and the files are of no use any more.
    pub(super) fn abandon(&self) {
        self.cancel.cancel();
        self.end_threads();
    }

    /// A shard has failed: no shard takes writes any more. The first failure is the one that is told.
    pub(super) fn fail(&self, error: Error) {
        if self.failure.set(error).is_ok() {
            self.has_failed.notify(usize::MAX);
        }
    }

    /// Waits until a shard has failed.
    pub(super) async fn failed(&self) -> Error {
        loop {
            let listener = self.has_failed.listen();
            if let Some(error) = self.failure.get() {
                return error.clone();
            }
            listener.await;
        }
    }

    /// All threads are to end; others may use the files.
    pub(super) fn end_threads(&self) {
        self.abandoned.store(true, Ordering::SeqCst);
        self.mailboxes.iter().for_each(|mailbox| mailbox.parking.force_unpark());
    }

    /// From now on, or no more: requests are refused before they reach a shard, so that callers who try again and again take no time
    /// from the shards' last work.
    pub(super) fn set_closing(&self, closing: bool) {
        self.closing.store(closing, Ordering::Release);
    }

    pub(super) fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Acquire)
    }

    /// Whether this is a forked child: it has none of the threads.
    pub(super) fn is_forked(&self) -> bool {
        !self.opener.is_here()
    }

    /// # Errors
    /// Why no request can reach a shard: the store is closing, or a forked child asks.
    pub(super) fn check_open(&self) -> Result<()> {
        match () {
            () if self.is_forked() => Err(self.opener.refusal()),
            () if self.is_closing() => Err(closed()),
            () => Ok(()),
        }
    }

    pub(super) fn is_abandoned(&self) -> bool {
        self.abandoned.load(Ordering::Relaxed)
    }

    /// Answers a request to a shard and frees its place, and its bytes.
    pub(super) fn finish(&self, mailbox: &ShardMailbox, token: Token, bytes: u64, result: Result<Response>) {
        self.in_flight.complete(token.0, result);
        self.request_permits.release(1, 0);
        mailbox.byte_permits.release(usize::from(bytes > 0), bytes);
    }

    /// The shard's thread takes nothing any more: what was accepted has an unknown outcome, the rest was not begun.
    pub(super) fn close_mailbox(&self, mailbox: &ShardMailbox, accepted: impl Iterator<Item = (Token, u64)>) {
        mailbox.inbox.close();
        mailbox.spawn_queue.close();
        for (token, bytes) in accepted {
            let context = "the shard stopped; whether this was done is not known: reopen the store and look";
            self.finish(mailbox, token, bytes, Err(Error::new(ErrorKind::OutcomeUnknown, context)));
        }
        self.refuse_rest(mailbox);
        mailbox.refuse_spawned();
    }

    /// Refuses what is left in a closed inbox.
    pub(super) fn refuse_rest(&self, mailbox: &ShardMailbox) {
        while let Some(QueuedRequest { token, bytes, request }) = mailbox.inbox.pop() {
            drop(request);
            self.finish(mailbox, token, bytes, Err(closed()));
        }
    }

    /// The thread has let go of its files.
    pub(super) fn thread_ended(&self) {
        if self.running.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.ended.notify(usize::MAX);
        }
    }

    /// Waits until all threads have let go of their files.
    pub(super) async fn ended(&self) {
        loop {
            let listener = self.ended.listen();
            if self.running.load(Ordering::SeqCst) == 0 {
                return;
            }
            listener.await;
        }
    }
}

impl ShardMailbox {
    /// Drops closures that no shard will run; whoever waits for them is told.
    pub(super) fn refuse_spawned(&self) {
        while self.spawn_queue.pop().is_some() {}
    }
}

pub(super) fn closed() -> Error {
    Error::new(ErrorKind::Closed, "the store is closed; open it again")
}
