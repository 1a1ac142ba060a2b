//! What handles and the threads of all shards share.
//!
//! Invariants
//! 1. A request is in an inbox, in a shard or answered. When a thread ends it answers what it had accepted, closes its
//!    inbox, and refuses the rest.
//! 2. `abandoned` ends all threads: no handle is left, or a shard has stopped without a clean close. Each waits for what it
//!    has at the device, and for nothing else; what consists of many steps is cut short.

use super::local::Spawn;
use super::places::{COUNTED_MAX, Places};
use crate::base::error::{Error, ErrorKind, Result};
use crate::engine::{Request, Response, Token, request_bytes};
use crate::io::{Cancel, Opener};
use crate::mesh::{InFlight, Inbox, Parking};
use async_task::Runnable;
use crossbeam_queue::SegQueue;
use event_listener::Event;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

/// Requests that an inbox holds whatever `requests_max` is; beyond it, a share of that.
const INBOX_MAX: usize = 16_384;
/// Closures on their way to a shard.
const SPAWNS_MAX: usize = 1024;

/// A request on its way to a shard.
pub(super) struct Brought {
    pub(super) token: Token,
    pub(super) request: Request,
    /// What it is counted with in [`Port::carried`], until it is answered.
    pub(super) bytes: u64,
}

/// What a request is counted with, where its bytes are.
pub(super) fn counted_bytes(request: &Request) -> u64 {
    request_bytes(request).min(COUNTED_MAX)
}

/// The way into one shard.
pub(super) struct Port {
    pub(super) inbox: Inbox<Brought>,
    pub(super) spawns: Inbox<Spawn>,
    /// Tasks of the shard that other threads have woken: each at most once, so bounded by the tasks.
    pub(super) woken: SegQueue<Runnable>,
    pub(super) parking: Parking,
    /// For requests that carry something: a shard that is slow holds up no commits of others.
    pub(super) carried: Places,
}

/// What a request on its way has taken of [`Port::carried`]; given back unless it is [kept](Carried::keep).
pub(super) struct Carried<'a> {
    port: &'a Port,
    bytes: u64,
}

impl<'a> Carried<'a> {
    /// Waits until so many bytes may be under way to the shard; none always may.
    pub(super) async fn take(port: &'a Port, bytes: u64) -> Result<Carried<'a>> {
        if bytes > 0 {
            port.carried.take(bytes).await?;
        }
        Ok(Carried { port, bytes })
    }

    /// The request is on its way: its bytes are given back when it is answered.
    pub(super) fn keep(mut self) -> u64 {
        std::mem::take(&mut self.bytes)
    }
}

impl Drop for Carried<'_> {
    fn drop(&mut self) {
        self.port.carried.leave(usize::from(self.bytes > 0), self.bytes);
    }
}

pub(super) struct Shared {
    pub(super) ports: Box<[Port]>,
    pub(super) inflight: Arc<InFlight>,
    /// For all requests of handles.
    pub(super) places: Places,
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

impl Shared {
    pub(super) fn new(shards_count: u16, requests_max: usize, request_bytes_max: u64, cancel: Cancel) -> Self {
        let capacity = requests_max.clamp(1, INBOX_MAX.max(requests_max / usize::from(shards_count)));
        let port = |_| Port {
            inbox: Inbox::new(capacity),
            spawns: Inbox::new(SPAWNS_MAX),
            woken: SegQueue::new(),
            parking: Parking::new(),
            carried: Places::new(requests_max, request_bytes_max),
        };
        Shared {
            ports: (0..shards_count).map(port).collect(),
            inflight: Arc::new(InFlight::new()),
            places: Places::new(requests_max, 1),
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
        self.ports.iter().for_each(|port| port.parking.alarm());
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
    pub(super) fn finish(&self, port: &Port, token: Token, bytes: u64, result: Result<Response>) {
        self.inflight.complete(token, result);
        self.places.leave(1, 0);
        port.carried.leave(usize::from(bytes > 0), bytes);
    }

    /// The shard's thread takes nothing any more: what was accepted has an unknown outcome, the rest was not begun.
    pub(super) fn close_port(&self, port: &Port, accepted: impl Iterator<Item = (Token, u64)>) {
        port.inbox.close();
        port.spawns.close();
        for (token, bytes) in accepted {
            let context = "the shard stopped; whether this was done is not known: reopen the store and look";
            self.finish(port, token, bytes, Err(Error::new(ErrorKind::OutcomeUnknown, context)));
        }
        self.refuse_rest(port);
        port.refuse_spawns();
    }

    /// Refuses what is left in a closed inbox.
    pub(super) fn refuse_rest(&self, port: &Port) {
        while let Some(Brought { token, bytes, request }) = port.inbox.pop() {
            drop(request);
            self.finish(port, token, bytes, Err(closed()));
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

impl Port {
    /// Drops closures that no shard will run; whoever waits for them is told.
    pub(super) fn refuse_spawns(&self) {
        while self.spawns.pop().is_some() {}
    }
}

pub(super) fn closed() -> Error {
    Error::new(ErrorKind::Closed, "the store is closed; open it again")
}
