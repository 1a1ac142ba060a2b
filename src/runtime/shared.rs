//! State that handles and the threads of all shards share: mailboxes, permits, and how all threads
//! end.
//!
//! Invariants
//! 1. A request is in an inbox, in a shard or answered. When a thread ends it answers what it had
//!    accepted, closes its inbox, and refuses the rest.
//! 2. `abandoned` ends all threads: no handle is left, or a shard has stopped without a clean
//!    close. Each waits for its operations at the device, and for nothing else; work in many steps
//!    ends after the current step.

use super::request_permits::{CHARGED_BYTES_MAX, RequestPermits};
use crate::base::error::{Error, ErrorKind, Result};
use crate::engine::{Request, Response, Token, request_bytes};
use crate::io::{Cancel, DiskWaker, Opener};
use crate::mesh::{InFlight, Inbox, Parking, Wake};
use async_task::Runnable;
use crossbeam::queue::SegQueue;
use event_listener::Event;
use std::any::Any;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

/// Requests that an inbox holds whatever `requests_max` is; if that is larger, the inbox holds a
/// share of it.
const INBOX_MAX: usize = 16_384;
/// The most closures on their way to a shard.
const SPAWNS_MAX: usize = 1024;

/// A request on its way to a shard.
pub(super) struct QueuedRequest {
    pub(super) token: Token,
    pub(super) request: Request,
    /// Bytes of [`ShardMailbox::byte_permits`] that the request holds until it is answered.
    pub(super) bytes: u64,
}

/// Bytes that a request is charged with.
pub(super) fn charged_bytes(request: &Request) -> u64 {
    request_bytes(request).min(CHARGED_BYTES_MAX)
}

impl Wake for DiskWaker {
    fn wake(&self) {
        DiskWaker::wake(self);
    }
}

/// A closure that starts a task on the shard's own thread; it is given the thread's `TaskContext`.
pub(super) type SpawnRequest = Box<dyn FnOnce(&dyn Any) + Send>;

/// Everything through which other threads reach one shard.
pub(super) struct ShardMailbox {
    pub(super) inbox: Inbox<QueuedRequest>,
    pub(super) spawn_queue: Inbox<SpawnRequest>,
    /// Tasks of the shard that other threads have woken. Each is in the queue at most once, so the
    /// number of tasks bounds it.
    pub(super) woken_tasks: SegQueue<Runnable>,
    pub(super) parking: Parking<DiskWaker>,
    /// Permits for requests that carry bytes. Each shard has its own, so that a slow one does not
    /// delay commits to others.
    pub(super) byte_permits: RequestPermits,
}

/// A permit of [`ShardMailbox::byte_permits`], returned on drop unless it is [charged to a
/// request](BytesPermit::into_charged).
pub(super) struct BytesPermit<'a> {
    mailbox: &'a ShardMailbox,
    bytes: u64,
}

impl<'a> BytesPermit<'a> {
    /// Waits for a permit to have `bytes` in flight to the shard. Zero bytes need none.
    pub(super) async fn acquire(mailbox: &'a ShardMailbox, bytes: u64) -> Result<BytesPermit<'a>> {
        if bytes > 0 {
            mailbox.byte_permits.acquire(bytes).await?;
        }
        Ok(BytesPermit { mailbox, bytes })
    }

    /// Charges the bytes to a request that is on its way: they are released when it is answered.
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
    /// Permits for all requests of handles.
    pub(super) request_permits: RequestPermits,
    abandoned: AtomicBool,
    opener: Opener,
    /// Set when a clean close was requested: nothing more is handed to the shards.
    closing: AtomicBool,
    /// The files' token, which ends work in many steps.
    cancel: Cancel,
    running: AtomicUsize,
    ended: Event,
    /// Why the store no longer takes writes, once a shard has failed.
    failure: OnceLock<Error>,
    has_failed: Event,
}

impl RuntimeShared {
    pub(super) fn new(
        shards_count: u16,
        requests_max: usize,
        request_bytes_max: u64,
        cancel: Cancel,
    ) -> Self {
        let capacity =
            requests_max.clamp(1, INBOX_MAX.max(requests_max / usize::from(shards_count)));
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

    /// Ends all threads without a clean close, and cancels further work on the files.
    pub(super) fn abandon(&self) {
        self.cancel.cancel();
        self.end_threads();
    }

    /// Records that a shard has failed, so that no shard takes writes any more. Only the first
    /// failure is reported.
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

    /// Ends all threads; the files stay usable.
    pub(super) fn end_threads(&self) {
        self.abandoned.store(true, Ordering::SeqCst);
        self.mailboxes.iter().for_each(|mailbox| mailbox.parking.force_unpark());
    }

    /// Refuses requests before they reach a shard, so that callers that retry take no time from the
    /// shards' last work.
    pub(super) fn begin_closing(&self) {
        self.closing.store(true, Ordering::Release);
    }

    /// Accepts requests again: the shards were too busy to close.
    pub(super) fn cancel_closing(&self) {
        self.closing.store(false, Ordering::Release);
    }

    pub(super) fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Acquire)
    }

    /// Whether this is a forked child, which has none of the threads.
    pub(super) fn is_forked(&self) -> bool {
        !self.opener.is_here()
    }

    /// # Errors
    /// The reason why no request can reach a shard: the store is closing, or the caller is a forked
    /// child.
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

    /// Answers a request to a shard, and returns its permits.
    pub(super) fn finish(
        &self,
        mailbox: &ShardMailbox,
        token: Token,
        bytes: u64,
        result: Result<Response>,
    ) {
        self.in_flight.complete(token.0, result);
        self.request_permits.release(1, 0);
        mailbox.byte_permits.release(usize::from(bytes > 0), bytes);
    }

    /// Closes a mailbox when its shard's thread ends: accepted requests have an unknown outcome,
    /// the rest have not begun.
    pub(super) fn close_mailbox(
        &self,
        mailbox: &ShardMailbox,
        accepted: impl Iterator<Item = (Token, u64)>,
    ) {
        mailbox.inbox.close();
        mailbox.spawn_queue.close();
        for (token, bytes) in accepted {
            let context =
                "the shard stopped; whether this was done is not known: reopen the store and look";
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

    /// Called by each thread when it has closed its files.
    pub(super) fn thread_ended(&self) {
        let running = self.running.fetch_sub(1, Ordering::SeqCst);
        assert!(running > 0, "more threads ended than were started");
        if running == 1 {
            self.ended.notify(usize::MAX);
        }
    }

    /// Waits until all threads have closed their files.
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
    /// Drops closures that no shard will run; their handles get `Closed`.
    pub(super) fn refuse_spawned(&self) {
        while self.spawn_queue.pop().is_some() {}
    }
}

pub(super) fn closed() -> Error {
    Error::new(ErrorKind::Closed, "the store is closed; open it again")
}
