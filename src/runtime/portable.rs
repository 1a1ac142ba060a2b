//! The portable driver: one thread drives the shard, others do its I/O with plain system calls.
//!
//! Invariants
//! 1. Each lap: take requests (while the shard accepts), take completions, turn, carry out effects; wait only when
//!    nothing has happened. Waiting costs no processor time.
//! 2. Every request gets a reply, also when the shard panics: nothing hangs.
//! 3. At most `requests_max` requests are under way; callers beyond it wait, and too many of those get `Busy`.

use super::inbox::Inbox;
use super::inflight::{InFlight, Reply};
use crate::disk::portable::{Access, DiskReport, PortableDisk};
use crate::disk::{Completion, Disk};
use crate::error::{Error, ErrorKind, Result};
use crate::options::Options;
use crate::probe::Driver;
use crate::recovery::{self, RecoveryReport};
use crate::shard::{Effect, Request, Response, Shard, Token};
use crate::types::Micros;
use event_listener::Event;
use hashbrown::HashSet;
use std::panic::AssertUnwindSafe;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

/// Requests taken from the inbox in one lap.
const BATCH: usize = 256;
/// Callers that wait for a place, as a multiple of the places, before others get `Busy`.
const WAITERS_FACTOR: usize = 4;

struct Shared {
    inbox: Inbox,
    inflight: Arc<InFlight>,
    under_way: AtomicUsize,
    waiting: AtomicUsize,
    requests_max: usize,
    place_free: Event,
    /// Nobody holds the store any more: the thread is to end.
    abandoned: AtomicBool,
    ended: Event,
}

/// A running shard.
pub(crate) struct Runtime {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    /// What opening found.
    pub(crate) recovery: RecoveryReport,
    /// What the disk is like.
    pub(crate) disk: DiskReport,
    /// What one commit may count at most.
    pub(crate) txn_bytes_max: u64,
}

impl Runtime {
    /// Opens the store in `dir` on a thread of its own, and returns when it takes requests.
    pub(crate) async fn start(dir: PathBuf, options: Options) -> Result<Runtime> {
        let shared = Arc::new(Shared::new(options.requests_max.max(1)));
        // A caller that gives up while the store is being opened must not leave it open, and locked, for ever.
        let opening = Opening(Some(&shared));
        let (send, opened) = crossbeam_channel::bounded(1);
        let ready = Arc::new(Event::new());
        let (theirs, wake) = (shared.clone(), ready.clone());
        let body = move || {
            let opened = std::panic::catch_unwind(AssertUnwindSafe(|| open(&dir, &options)));
            let opened = opened.unwrap_or_else(|_| Err(Error::new(ErrorKind::Closed, "opening the store panicked")));
            let result = match opened {
                Ok((disk, shard, report)) => {
                    theirs.inbox.set_unparker(disk.unparker());
                    let on = DiskReport { fallback: Driver::auto().because, ..disk.report() };
                    let _ = send.send(Ok((report, on, shard.txn_bytes_max())));
                    wake.notify(usize::MAX);
                    run(&theirs, |accepted| laps(&theirs, disk, shard, accepted));
                    return;
                }
                Err(error) => Err(error),
            };
            let _ = send.send(result);
            wake.notify(usize::MAX);
        };
        let name = "corepage-s0".to_string();
        let thread = std::thread::Builder::new().name(name).spawn(body);
        let thread = thread.map_err(|e| Error::io("starting the shard's thread", e))?;
        let result = loop {
            let listener = ready.listen();
            match opened.try_recv() {
                Ok(result) => break result,
                Err(crossbeam_channel::TryRecvError::Empty) => listener.await,
                Err(_) => {
                    break Err(Error::new(ErrorKind::Closed, "the shard's thread ended while it opened the store"));
                }
            }
        };
        opening.done();
        match result {
            Ok((recovery, disk, txn_bytes_max)) => {
                Ok(Runtime { shared, thread: Some(thread), recovery, disk, txn_bytes_max })
            }
            Err(error) => {
                let _ = thread.join();
                Err(error)
            }
        }
    }

    /// Submits a request; once this returns, dropping the reply does not undo it.
    pub(crate) async fn submit(&self, request: Request) -> Result<Reply> {
        self.take_place().await?;
        let (token, reply) = match self.shared.inflight.register() {
            Ok(registered) => registered,
            Err(error) => {
                self.shared.leave_place();
                return Err(error);
            }
        };
        if self.shared.inbox.push(token, request).is_err() {
            self.shared.finish(token, Err(Error::new(ErrorKind::Busy, "the inbox is full; try again")));
        }
        if self.shared.inbox.is_closed() {
            self.shared.refuse_rest();
        }
        Ok(reply)
    }

    async fn take_place(&self) -> Result<()> {
        let shared = &self.shared;
        if shared.try_place() {
            return Ok(());
        }
        if shared.waiting.fetch_add(1, Ordering::AcqRel) >= shared.requests_max.saturating_mul(WAITERS_FACTOR) {
            shared.waiting.fetch_sub(1, Ordering::AcqRel);
            return Err(Error::new(
                ErrorKind::Busy,
                format_args!(
                    "{} requests are under way and as many as may wait do; wait for replies, or raise requests_max",
                    shared.requests_max
                ),
            ));
        }
        let _waiting = Waiting(shared);
        loop {
            let listener = shared.place_free.listen();
            if shared.try_place() {
                return Ok(());
            }
            listener.await;
        }
    }

    /// Waits until the shard has let go of its files; it does after `Close`.
    pub(crate) async fn ended(&self) {
        loop {
            let listener = self.shared.ended.listen();
            if self.shared.inbox.is_closed() {
                return;
            }
            listener.await;
        }
    }
}

impl Drop for Runtime {
    /// Ends the thread without a clean close, as a crash would, but waits for what the device has under way: the
    /// store can be opened again at once.
    fn drop(&mut self) {
        self.shared.abandon();
        // The last handle may go on the shard's own thread, with a task that a reply has woken.
        if let Some(thread) = self.thread.take().filter(|t| t.thread().id() != std::thread::current().id()) {
            let _ = thread.join();
        }
    }
}

/// A store that is being opened.
struct Opening<'a>(Option<&'a Shared>);

impl Opening<'_> {
    fn done(mut self) {
        self.0 = None;
    }
}

impl Drop for Opening<'_> {
    fn drop(&mut self) {
        if let Some(shared) = self.0 {
            shared.abandon();
        }
    }
}

/// Counts a caller that waits for a place, also if its future is dropped.
struct Waiting<'a>(&'a Shared);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::AcqRel);
        // A wake-up that this caller got and did not use goes to the next.
        self.0.place_free.notify(1);
    }
}

impl Shared {
    fn new(requests_max: usize) -> Self {
        Shared {
            inbox: Inbox::new(requests_max),
            inflight: Arc::new(InFlight::default()),
            under_way: AtomicUsize::new(0),
            waiting: AtomicUsize::new(0),
            requests_max,
            place_free: Event::new(),
            abandoned: AtomicBool::new(false),
            ended: Event::new(),
        }
    }

    fn abandon(&self) {
        self.abandoned.store(true, Ordering::SeqCst);
        self.inbox.wake();
    }

    fn try_place(&self) -> bool {
        let place = |n: usize| (n < self.requests_max).then_some(n + 1);
        self.under_way.fetch_update(Ordering::AcqRel, Ordering::Acquire, place).is_ok()
    }

    fn leave_place(&self) {
        self.under_way.fetch_sub(1, Ordering::AcqRel);
        self.place_free.notify(1);
    }

    fn finish(&self, token: Token, result: Result<Response>) {
        self.inflight.complete(token, result);
        self.leave_place();
    }

    /// The shard is gone: what is still in the inbox is refused.
    fn refuse_rest(&self) {
        while let Some((token, _)) = self.inbox.pop() {
            self.finish(token, Err(Error::new(ErrorKind::Closed, "the store is closed; open it again")));
        }
    }
}

fn open(dir: &std::path::Path, options: &Options) -> Result<(PortableDisk, Shard, RecoveryReport)> {
    let mut disk = PortableDisk::open(dir, Access::ReadWrite)?;
    let mut random = [0; 8];
    rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())
        .map_err(|e| Error::io("asking the kernel for random bytes", e.into()))?;
    let opening = recovery::begin(&mut disk, options, 1, u64::from_le_bytes(random), 0)?;
    let report = opening.report;
    let mut together = crate::shard::Together::new(opening.shards);
    together.open(&mut disk, 0)?;
    let shard = together.shards.remove(0);
    for warning in &report.warnings {
        tracing::warn!("{warning}");
    }
    tracing::info!(
        created = report.created,
        clean = report.clean,
        groups = report.groups_scanned,
        torn = report.groups_torn,
        cut = report.cut.get(),
        applied = report.commits_applied,
        dropped = report.commits_dropped,
        epoch = report.epoch,
        "store opened"
    );
    Ok((disk, shard, report))
}

/// The thread's life: laps until closed, then everything still waiting is told.
fn run(shared: &Shared, laps: impl FnOnce(&mut HashSet<Token>)) {
    let mut accepted: HashSet<Token> = HashSet::new();
    let outcome = std::panic::catch_unwind(AssertUnwindSafe(|| laps(&mut accepted)));
    shared.inbox.close();
    if outcome.is_err() {
        tracing::error!("the shard panicked; the store is closed as after a crash");
    }
    for token in accepted {
        let context = "the shard stopped; whether this was done is not known: reopen the store and look";
        shared.finish(token, Err(Error::new(ErrorKind::OutcomeUnknown, context)));
    }
    shared.refuse_rest();
    shared.ended.notify(usize::MAX);
}

/// Microseconds since now: the driver is where the shard's clock comes from.
#[expect(clippy::disallowed_methods, reason = "the one place that reads a clock")]
fn clock() -> impl Fn() -> Micros {
    let start = Instant::now();
    move || start.elapsed().as_micros() as Micros
}

fn laps(shared: &Shared, mut disk: PortableDisk, mut shard: Shard, accepted: &mut HashSet<Token>) {
    let now = clock();
    let mut completions: Vec<Completion> = Vec::new();
    loop {
        if shared.abandoned.load(Ordering::SeqCst) {
            return;
        }
        let mut busy = false;
        for _ in 0..BATCH {
            if !shard.accepting() {
                break;
            }
            let Some((token, request)) = shared.inbox.pop() else { break };
            accepted.insert(token);
            shard.request(token, request);
            busy = true;
        }
        disk.reap(&mut completions);
        for completion in completions.drain(..) {
            shard.complete(completion);
            busy = true;
        }
        shard.turn(now());
        while let Some(effect) = shard.next_effect() {
            busy = true;
            match effect {
                Effect::Submit(id, op) => disk.submit(id, op),
                Effect::Send(..) => unreachable!("there is one shard"),
                Effect::Reply(token, result) => {
                    accepted.remove(&token);
                    shared.finish(token, result);
                }
            }
        }
        if shard.is_closed() && shard.ops_under_way() == 0 {
            return;
        }
        if busy {
            continue;
        }
        let timeout = shard.deadline().map(|at| at.saturating_sub(now()));
        if timeout == Some(0) {
            continue;
        }
        // While the shard accepts nothing, requests in the inbox are no reason to stay awake.
        if !shard.accepting() || shared.inbox.park() {
            disk.wait(timeout);
            shared.inbox.awake();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_lite::future::block_on;

    /// A bug in the shard must not become a caller that waits for ever, nor a promise that nobody can keep.
    #[test]
    fn a_panic_of_the_shard_answers_everybody() {
        let shared = Arc::new(Shared::new(2));
        let thread = std::thread::spawn(|| {});
        let (recovery, disk) = (RecoveryReport::default(), no_disk());
        let runtime = Runtime { shared: shared.clone(), thread: Some(thread), recovery, disk, txn_bytes_max: 0 };
        let taken = block_on(runtime.submit(Request::Flush)).expect("there is a place");
        let queued = block_on(runtime.submit(Request::Flush)).expect("there is a place");
        // No place is left: this one waits, and is answered all the same.
        let waiter = std::thread::spawn(move || {
            let kind = |result: Result<Response>| result.expect_err("the shard is gone").kind();
            let waited = block_on(async { runtime.submit(Request::Flush).await?.await });
            let late = block_on(async { runtime.submit(Request::Flush).await?.await });
            (kind(waited), kind(late))
        });
        run(&shared, |accepted| {
            let (token, _) = shared.inbox.pop().expect("a request was submitted");
            accepted.insert(token);
            panic!("planted by a test");
        });
        assert_eq!(block_on(taken).expect_err("it was under way").kind(), ErrorKind::OutcomeUnknown);
        assert_eq!(block_on(queued).expect_err("it was not begun").kind(), ErrorKind::Closed);
        assert_eq!(waiter.join().expect("no hang"), (ErrorKind::Closed, ErrorKind::Closed));
        assert_eq!(shared.under_way.load(Ordering::SeqCst), 0, "every place is free again");
    }

    fn no_disk() -> DiskReport {
        DiskReport::none()
    }
}
