//! Tests the drivers with shards of a simple kind: every request is answered and no wake-up is
//! lost, whatever ends and however.
//!
//! If these fail, callers hang, or a store can't be opened again after a failure.
#![allow(clippy::disallowed_methods, reason = "tests let real shards park")]

mod bodies;
mod closing;

use super::bootstrap::Bootstrap;
use super::handle::Runtime;
use super::ring;
use super::start::{BootstrapFn, start_with};
use super::task_context::TASKS_MAX;
use crate::base::error::{Error, ErrorKind, Result};
use crate::base::options::{Driver, Options};
use crate::base::{Lsn, Micros, ShardId, ShardMap};
use crate::engine::order::GlobalOrder;
use crate::engine::recovery::RecoveryReport;
use crate::engine::{Commit, Effect, Request, Response, StateMachine, Token};
use crate::io::{Completion, Disk};
use crate::memory::Mapping;
use futures_lite::future::{block_on, poll_once};
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

/// How long a commit of a [`Toy`] takes.
const COMMIT_US: Micros = 300;

/// The messages between toys.
enum Note {
    /// A question, which is sent back.
    There(Token, u64),
    Back(Token, u64),
    Close,
}

/// A shard that holds no pages. `WaitDurable(n)` goes to shard `n` and back; `Commit` allocates an
/// LSN, is "written" some time later, and waits for the watermark; `Flush` waits until a
/// `Checkpoint` comes; `Stats` panics.
struct Toy {
    id: ShardId,
    shards_count: u16,
    order: Arc<GlobalOrder>,
    effects: VecDeque<Effect<Note>>,
    now: Micros,
    written_at: VecDeque<(Micros, Lsn)>,
    waiting: VecDeque<(Lsn, Token)>,
    held: Vec<Token>,
    /// How long it takes to close.
    close_us: Micros,
    /// When it will be closed, and the request that waits for that.
    closing: Option<(Micros, Token)>,
    closed: bool,
    failure: Option<Error>,
}

/// Requests that reached a shard while it was closing.
static TAKEN_WHILE_CLOSING: AtomicUsize = AtomicUsize::new(0);

impl StateMachine for Toy {
    type Message = Note;

    fn request(&mut self, token: Token, request: Request) {
        if self.closing.is_some() {
            TAKEN_WHILE_CLOSING.fetch_add(1, Ordering::SeqCst);
            let closed = Err(Error::new(ErrorKind::Closed, "planted by a test"));
            return self.effects.push_back(Effect::Reply(token, closed));
        }
        match request {
            Request::WaitDurable(lsn) => {
                let to = ShardId::new((lsn.get() % u64::from(self.shards_count)) as u16);
                match to == self.id {
                    true => {
                        self.effects.push_back(Effect::Reply(token, Ok(Response::Flushed(lsn))))
                    }
                    false => {
                        self.effects.push_back(Effect::Send(to, Note::There(token, lsn.get())))
                    }
                }
            }
            Request::Commit(_) => {
                let lsn = self.order.allocate_lsns(self.id, 1);
                self.written_at.push_back((self.now + COMMIT_US, lsn));
                self.waiting.push_back((lsn, token));
            }
            Request::Flush => self.held.push(token),
            Request::Checkpoint => {
                for token in self.held.drain(..).chain([token]) {
                    self.effects
                        .push_back(Effect::Reply(token, Ok(Response::Checkpointed(Lsn::ZERO))));
                }
            }
            Request::Close if self.close_us > 0 => {
                self.closing = Some((self.now + self.close_us, token))
            }
            Request::Close => {
                let others =
                    (0..self.shards_count).map(ShardId::new).filter(|shard| *shard != self.id);
                self.effects.extend(others.map(|shard| Effect::Send(shard, Note::Close)));
                self.effects.push_back(Effect::Reply(token, Ok(Response::Closed)));
                self.closed = true;
            }
            Request::Stats => panic!("planted by a test"),
            Request::Read(_) | Request::Allocated(_) => unreachable!("toys have no pages"),
        }
    }

    fn message(&mut self, from: ShardId, message: Note) {
        match message {
            Note::There(token, n) => {
                self.effects.push_back(Effect::Send(from, Note::Back(token, n)))
            }
            Note::Back(token, n) => {
                self.effects.push_back(Effect::Reply(token, Ok(Response::Flushed(Lsn::new(n)))))
            }
            Note::Close => self.closed = true,
        }
    }

    fn complete(&mut self, _: Completion) {
        unreachable!("toys have no operations");
    }

    fn turn(&mut self, now: Micros) {
        self.now = now;
        while self.written_at.front().is_some_and(|(at, _)| *at <= now) {
            self.written_at.pop_front();
            self.order.publish(self.id, self.written_at.front().map_or(Lsn::MAX, |(_, lsn)| *lsn));
        }
        if let Some((_, token)) = self.closing.take_if(|(at, _)| *at <= now) {
            self.effects.push_back(Effect::Reply(token, Ok(Response::Closed)));
            self.closed = true;
        }
        let durable = self.order.refresh();
        while self.waiting.front().is_some_and(|(lsn, _)| *lsn <= durable) {
            let Some((lsn, token)) = self.waiting.pop_front() else { break };
            self.effects.push_back(Effect::Reply(token, Ok(Response::Committed(lsn))));
        }
    }

    fn next_effect(&mut self) -> Option<Effect<Note>> {
        self.effects.pop_front()
    }

    fn deadline(&self) -> Option<Micros> {
        let closed_at = self.closing.as_ref().map(|(at, _)| *at);
        self.written_at.front().map(|(at, _)| *at).into_iter().chain(closed_at).min()
    }

    fn accepting(&self) -> bool {
        true
    }

    fn is_open(&self) -> bool {
        true
    }

    fn is_closed(&self) -> bool {
        self.closed && self.effects.is_empty()
    }

    fn ops_under_way(&self) -> usize {
        0
    }

    fn waits_for(&self) -> Option<Lsn> {
        self.waiting.front().map(|(lsn, _)| *lsn)
    }

    fn failure(&self) -> Option<Error> {
        self.failure.clone()
    }

    fn mapping(&self) -> Option<Mapping> {
        None
    }
}

fn toys(_: &mut dyn Disk, _: &Options, shards_count: u16, _: Micros) -> Result<Bootstrap<Toy>> {
    let order = Arc::new(GlobalOrder::new(Lsn::new(1), usize::from(shards_count)));
    let toy = |shard| Toy {
        id: ShardId::new(shard),
        shards_count,
        order: order.clone(),
        effects: VecDeque::new(),
        now: 0,
        written_at: VecDeque::new(),
        waiting: VecDeque::new(),
        held: Vec::new(),
        close_us: 0,
        closing: None,
        closed: false,
        failure: None,
    };
    let shards = (0..shards_count).map(toy).collect();
    let recovery = RecoveryReport::default();
    Ok(Bootstrap {
        shards,
        recovery,
        order: order.clone(),
        txn_bytes_max: 0,
        shard_map: ShardMap::new(256, shards_count),
    })
}

fn toys_of_which_one_fails(
    disk: &mut dyn Disk,
    options: &Options,
    count: u16,
    now: Micros,
) -> Result<Bootstrap<Toy>> {
    let mut bootstrap = toys(disk, options, count, now)?;
    bootstrap.shards.last_mut().expect("there is one").failure =
        Some(Error::corrupt("planted by a test"));
    Ok(bootstrap)
}

/// The drivers that work on this machine.
fn drivers() -> Vec<Driver> {
    let ring = ring::probe().is_ok().then_some(Driver::Ring);
    ring.into_iter().chain([Driver::Portable]).collect()
}

fn start(dir: &tempfile::TempDir, options: Options, begin: BootstrapFn<Toy>) -> Result<Runtime> {
    block_on(start_with(dir.path().to_path_buf(), options, begin))
}

fn with_toys(shards: u16, requests_max: usize, test: impl Fn(Runtime)) {
    for driver in drivers() {
        let dir = tempfile::tempdir().expect("a directory");
        let options = Options { shards: Some(shards), driver, requests_max, ..Options::default() };
        test(start(&dir, options.clone(), toys).expect("toys open"));
        // Whatever happened, the files can be opened again.
        drop(start(&dir, options, toys).expect("toys open again"));
    }
}

fn ask(runtime: &Runtime, shard: u16, request: Request) -> Result<Response> {
    block_on(async { runtime.handle().submit_to(ShardId::new(shard), request).await?.await })
}

/// Answers all held flushes, through tasks on the shards, which need no permit.
fn answer_held(runtime: &Runtime) {
    for shard in runtime.handle().shard_map().shards() {
        let task = runtime
            .handle()
            .spawn_on(shard, |local| async move { local.call(Request::Checkpoint).await.is_ok() });
        assert!(block_on(task.expect("it starts")).expect("it ends"));
    }
}

fn close(runtime: &Runtime) {
    assert!(matches!(ask(runtime, 0, Request::Close), Ok(Response::Closed)));
    block_on(runtime.handle().ended());
}

/// Lost wake-ups show as rare hangs, hence many threads, few permits, messages both ways, and
/// pauses in which shards park.
#[test]
fn every_request_of_many_threads_to_many_shards_is_answered() {
    for shards in [1, 2, 4] {
        with_toys(shards, 8, |runtime| {
            std::thread::scope(|scope| {
                for thread in 0..6u64 {
                    let runtime = &runtime;
                    scope.spawn(move || {
                        for i in 0..400 {
                            let at = (thread + i) % u64::from(shards);
                            let wanted = Lsn::new(1 + (thread * 1000 + i) % 97);
                            let reply = ask(runtime, at as u16, Request::WaitDurable(wanted));
                            assert!(matches!(reply, Ok(Response::Flushed(lsn)) if lsn == wanted));
                            if i % 50 == 49 {
                                std::thread::sleep(Duration::from_millis(1));
                            }
                        }
                    });
                }
            });
            close(&runtime);
            assert_eq!(runtime.handle().shared_for_tests().request_permits.in_use(), (0, 0));
        });
    }
}

/// A shard whose commit waits for another shard's must be woken by that one's flush, not by luck.
#[test]
fn commits_are_answered_when_the_watermark_rises_elsewhere() {
    for shards in [2, 4] {
        with_toys(shards, 64, |runtime| {
            std::thread::scope(|scope| {
                for thread in 0..4 {
                    let runtime = &runtime;
                    scope.spawn(move || {
                        for i in 0..150 {
                            let reply = ask(
                                runtime,
                                (thread + i) % shards,
                                Request::Commit(Commit::default()),
                            );
                            assert!(matches!(reply, Ok(Response::Committed(_))));
                        }
                    });
                }
            });
            close(&runtime);
        });
    }
}

/// Without a bound, a slow device would fill the memory; without waiting, every burst would fail.
#[test]
fn callers_beyond_the_places_wait_and_then_get_busy() {
    with_toys(2, 4, |runtime| {
        let flush = |shard| runtime.handle().submit_to(ShardId::new(shard), Request::Flush);
        let taken: Vec<_> =
            (0..4).map(|i| block_on(flush(i % 2)).expect("there is a place")).collect();
        let mut waiting: Vec<_> = (0..16).map(|i| Box::pin(flush(i % 2))).collect();
        assert!(
            waiting.iter_mut().all(|caller| block_on(poll_once(caller)).is_none()),
            "there is no place"
        );
        let refused = block_on(flush(0)).map(drop).expect_err("nobody else may wait");
        assert_eq!(refused.kind(), ErrorKind::Busy);
        // Half of them give up, and take no permit from the others; dropping a reply frees no
        // permit before the request is answered.
        waiting.truncate(8);
        drop(taken);
        let since = std::time::Instant::now();
        while !waiting.is_empty() {
            answer_held(&runtime);
            waiting.retain_mut(|caller| block_on(poll_once(caller)).is_none_or(|got| got.is_err()));
            assert!(
                since.elapsed() < Duration::from_secs(20),
                "places that were left reach nobody"
            );
        }
    });
}

/// A bug in one shard must not make a caller wait for ever, nor make a promise that no one can
/// keep.
#[test]
fn a_panic_of_one_shard_answers_everybody_on_all_shards() {
    with_toys(3, 6, |runtime| {
        let held: Vec<_> = (0..3)
            .map(|shard| {
                block_on(runtime.handle().submit_to(ShardId::new(shard), Request::Flush))
                    .expect("a place")
            })
            .collect();
        let panicked = ask(&runtime, 1, Request::Stats).expect_err("the shard has panicked");
        assert_eq!(panicked.kind(), ErrorKind::OutcomeUnknown);
        for reply in held {
            // The request was taken and not carried out, or never taken.
            let kind = block_on(reply).expect_err("the store is closed").kind();
            assert!(matches!(kind, ErrorKind::OutcomeUnknown | ErrorKind::Closed), "{kind:?}");
        }
        // A server that holds the store learns of the failure and can end: one that looks healthy
        // and answers nothing is useless.
        let why = block_on(runtime.handle().failed());
        assert_eq!(why.kind(), ErrorKind::Internal, "{why}");
        assert!(why.to_string().contains("panicked"), "{why}");
        block_on(runtime.handle().ended());
        for shard in 0..3 {
            assert_eq!(
                ask(&runtime, shard, Request::Flush).expect_err("it is closed").kind(),
                ErrorKind::Closed
            );
        }
        assert_eq!(
            runtime.handle().shared_for_tests().request_permits.in_use(),
            (0, 0),
            "every place is free again"
        );
    });
}

/// Callers give up all the time; each must cost nothing afterwards.
#[test]
fn dropped_replies_leak_nothing() {
    with_toys(2, 16, |runtime| {
        for i in 0..500u64 {
            let request = Request::WaitDurable(Lsn::new(i));
            let reply = block_on(runtime.handle().submit_to(ShardId::new((i % 2) as u16), request))
                .expect("a place");
            if i % 3 == 0 {
                std::thread::yield_now();
            }
            drop(reply);
        }
        close(&runtime);
        assert_eq!(runtime.handle().shared_for_tests().request_permits.in_use(), (0, 0));
    });
}

/// A store with one damaged shard, if it opened on the others, would serve half of its pages.
#[test]
fn if_one_shard_cannot_be_opened_all_end_and_the_error_says_why() {
    for driver in drivers() {
        let dir = tempfile::tempdir().expect("a directory");
        let options = Options { shards: Some(3), driver, ..Options::default() };
        let error =
            start(&dir, options.clone(), toys_of_which_one_fails).map(drop).expect_err("one fails");
        assert_eq!(
            (error.kind(), error.to_string().as_str()),
            (ErrorKind::Corrupt, "planted by a test")
        );
        drop(start(&dir, options, toys).expect("nothing is left that holds the files"));
    }
}

/// Tasks on a shard call it without a hop, and notice every wake-up, wherever it comes from.
#[test]
fn tasks_run_on_their_shard_and_are_woken_from_anywhere() {
    with_toys(2, 64, |runtime| {
        let (send, receive) = async_channel();
        let task = runtime.handle().spawn_on(ShardId::new(1), move |local| async move {
            assert_eq!(local.shard(), ShardId::new(1));
            let name = std::thread::current().name().map(str::to_owned);
            assert_eq!(name.as_deref(), Some("corepage-s1"));
            let mut sum = 0;
            for n in 0..1000 {
                let Ok(Response::Flushed(lsn)) =
                    local.call(Request::WaitDurable(Lsn::new(n))).await
                else {
                    panic!("a local call failed")
                };
                sum += lsn.get();
            }
            let side = local.spawn(receive);
            (sum, side.await.expect("it ends"))
        });
        // The shard parks in the meantime.
        std::thread::sleep(Duration::from_millis(20));
        send.set(7);
        let (sum, sent) = block_on(task.expect("it starts")).expect("it ends");
        assert_eq!((sum, sent), (499_500, 7));
        close(&runtime);
    });
}

/// A bug in a caller's task must harm the caller only.
#[test]
fn a_task_that_panics_ends_alone() {
    with_toys(1, 64, |runtime| {
        let task =
            runtime.handle().spawn_on(ShardId::new(0), |_| async { panic!("planted by a test") });
        let task = task.expect("it starts");
        let joined = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| block_on(task)));
        assert!(joined.is_err(), "the panic goes on where the task is awaited");
        assert!(matches!(
            ask(&runtime, 0, Request::WaitDurable(Lsn::new(3))),
            Ok(Response::Flushed(_))
        ));
        close(&runtime);
    });
}

/// A task that never ends must neither keep its store open nor block those who wait for it.
#[test]
fn the_end_of_a_shard_ends_its_tasks_on_their_thread() {
    struct DroppedAt(crossbeam::channel::Sender<Option<String>>);
    impl Drop for DroppedAt {
        fn drop(&mut self) {
            let _ = self.0.send(std::thread::current().name().map(str::to_owned));
        }
    }
    with_toys(2, 64, |runtime| {
        let (send, dropped) = crossbeam::channel::unbounded();
        let (tell, started) = crossbeam::channel::bounded(1);
        let endless = runtime.handle().spawn_on(ShardId::new(1), move |local| async move {
            let _held = DroppedAt(send);
            tell.send(()).expect("it is waited for");
            let held = local.call(Request::Flush);
            let side = local.spawn(std::future::pending::<()>());
            side.await.expect_err("it never ends");
            drop(held);
            std::future::pending::<()>().await;
        });
        let endless = endless.expect("it starts");
        started.recv().expect("it has started");
        drop(runtime);
        assert_eq!(block_on(endless).expect_err("it was stopped").kind(), ErrorKind::Closed);
        assert_eq!(dropped.recv().expect("it was dropped").as_deref(), Some("corepage-s1"));
    });
}

/// Calls of tasks beyond the limit are refused, and dropped ones free their place.
#[test]
fn local_calls_are_bounded() {
    with_toys(1, 8, |runtime| {
        let task = runtime.handle().spawn_on(ShardId::new(0), |local| async move {
            let mut held: Vec<_> = (0..8).map(|_| local.call(Request::Flush)).collect();
            assert_eq!(
                local.call(Request::Flush).await.expect_err("it is one too many").kind(),
                ErrorKind::Busy
            );
            held.truncate(4);
            // Dropped calls are still in flight.
            assert_eq!(
                local.call(Request::Flush).await.expect_err("it is one too many").kind(),
                ErrorKind::Busy
            );
            held.len()
        });
        assert_eq!(block_on(task.expect("it starts")).expect("it ends"), 4);
        assert!(matches!(ask(&runtime, 0, Request::Checkpoint), Ok(Response::Checkpointed(_))));
        let task = runtime.handle().spawn_on(ShardId::new(0), |local| async move {
            local.call(Request::WaitDurable(Lsn::new(1))).await.is_ok()
        });
        assert!(block_on(task.expect("it starts")).expect("it ends"), "there is room again");
        close(&runtime);
    });
}

/// If this fails, a program that starts too many tasks at once is told that its store is closed,
/// and may abandon it.
#[test]
fn tasks_beyond_the_bound_are_refused_as_busy() {
    with_toys(1, 8, |runtime| {
        let task = runtime.handle().spawn_on(ShardId::new(0), |local| async move {
            let held: Vec<_> =
                (1..TASKS_MAX).map(|_| local.spawn(std::future::pending::<()>())).collect();
            let refused = local.spawn(async {}).await.expect_err("it is one too many").kind();
            (held.len(), refused)
        });
        let (held, refused) = block_on(task.expect("it starts")).expect("it ends");
        assert_eq!((held, refused), (TASKS_MAX - 1, ErrorKind::Busy));
    });
}

/// A value that one thread sets and a future waits for.
fn async_channel() -> (Setter, impl std::future::Future<Output = u32> + Send) {
    let shared = Arc::new((
        crossbeam::atomic::AtomicCell::new(None::<u32>),
        atomic_waker::AtomicWaker::new(),
    ));
    let theirs = shared.clone();
    let future = std::future::poll_fn(move |cx| {
        theirs.1.register(cx.waker());
        theirs.0.load().map_or(std::task::Poll::Pending, std::task::Poll::Ready)
    });
    (Setter(shared), future)
}

struct Setter(Arc<(crossbeam::atomic::AtomicCell<Option<u32>>, atomic_waker::AtomicWaker)>);

impl Setter {
    fn set(&self, value: u32) {
        self.0.0.store(Some(value));
        self.0.1.wake();
    }
}
