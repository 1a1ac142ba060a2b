//! Tests how a store ends, and how opening is cancelled, wherever the last handle is dropped.
//!
//! If these fail, a program hangs for ever in a destructor, or a store can't be opened again after
//! it.
#![allow(clippy::disallowed_methods, reason = "tests let real shards wait")]

use super::bootstrap::Bootstrap;
use super::handle::Runtime;
use super::ring;
use super::start::{BootstrapFn, start_with};
use super::task_context::TASKS_PER_ROUND;
use crate::base::error::{Error, ErrorKind, Result};
use crate::base::options::{Driver, Options};
use crate::base::{Lsn, Micros, SegmentNo, ShardId, ShardMap};
use crate::engine::order::GlobalOrder;
use crate::engine::recovery::RecoveryReport;
use crate::engine::{Effect, Request, Response, StateMachine, Token};
use crate::io::{Completion, Disk, DiskOp, FileId, OpId, execute};
use crate::memory::Mapping;
use crossbeam::channel::{Receiver, Sender, bounded};
use futures_lite::future::{block_on, poll_once, yield_now};
use std::collections::VecDeque;
use std::path::Path;
use std::sync::{Arc, Barrier};
use std::time::Duration;

/// Longer than any step takes on the slowest machine: what has not happened by then never will.
const FOR_EVER: Duration = Duration::from_secs(60);
const FILE: FileId = FileId::Log(ShardId::new(0), SegmentNo::new(0));

/// A shard that only flushes one file, which all shards share. `open`: whether it counts as open.
struct Flusher {
    effects: VecDeque<Effect<()>>,
    flushing: Vec<Token>,
    closed: bool,
    open: bool,
}

impl StateMachine for Flusher {
    type Message = ();

    fn request(&mut self, token: Token, request: Request) {
        match request {
            Request::Flush => {
                let id = OpId(self.flushing.len() as u64);
                self.flushing.push(token);
                self.effects.push_back(Effect::Submit(
                    id,
                    DiskOp::Flush { files: [FILE].into_iter().collect() },
                ));
            }
            Request::Close => {
                self.effects.push_back(Effect::Reply(token, Ok(Response::Closed)));
                self.closed = true;
            }
            _ => unreachable!("it can only flush"),
        }
    }

    fn message(&mut self, _: ShardId, (): ()) {}

    fn complete(&mut self, done: Completion) {
        let token = self.flushing[done.id.0 as usize];
        self.effects
            .push_back(Effect::Reply(token, done.result.map(|()| Response::Flushed(Lsn::ZERO))));
    }

    fn turn(&mut self, _: Micros) {}

    fn next_effect(&mut self) -> Option<Effect<()>> {
        self.effects.pop_front()
    }

    fn deadline(&self) -> Option<Micros> {
        None
    }

    fn accepting(&self) -> bool {
        true
    }

    fn is_open(&self) -> bool {
        self.open
    }

    fn is_closed(&self) -> bool {
        self.closed && self.effects.is_empty()
    }

    fn ops_under_way(&self) -> usize {
        0
    }

    fn waits_for(&self) -> Option<Lsn> {
        None
    }

    fn failure(&self) -> Option<Error> {
        None
    }

    fn mapping(&self) -> Option<Mapping> {
        None
    }
}

fn bootstrap(shards_count: u16, open: bool) -> Bootstrap<Flusher> {
    let order = Arc::new(GlobalOrder::new(Lsn::new(1), usize::from(shards_count)));
    let machine =
        |_| Flusher { effects: VecDeque::new(), flushing: Vec::new(), closed: false, open };
    let shards = (0..shards_count).map(machine).collect();
    let recovery = RecoveryReport::default();
    Bootstrap {
        shards,
        recovery,
        order,
        txn_bytes_max: 0,
        shard_map: ShardMap::new(256, shards_count),
    }
}

fn flushers(
    disk: &mut dyn Disk,
    _: &Options,
    shards_count: u16,
    _: Micros,
) -> Result<Bootstrap<Flusher>> {
    if disk.len(FILE)?.is_none() {
        execute(disk, DiskOp::Allocate { file: FILE, from: 0, to: 4096 })?;
    }
    Ok(bootstrap(shards_count, true))
}

/// Makes shards that never become open.
fn endless(
    _: &mut dyn Disk,
    _: &Options,
    shards_count: u16,
    _: Micros,
) -> Result<Bootstrap<Flusher>> {
    Ok(bootstrap(shards_count, false))
}

fn start(dir: &Path, driver: Driver, begin: BootstrapFn<Flusher>) -> Result<Runtime> {
    let options = Options { shards: Some(2), driver, ..Options::default() };
    block_on(start_with(dir.to_path_buf(), options, begin))
}

/// Runs `test` with each driver that works here, in a directory in memory: there no flush stands
/// for all files, so shards share flush batches, as on XFS.
fn each_driver(test: impl Fn(&dyn Fn() -> Runtime)) {
    let drivers =
        ring::probe().is_ok().then_some(Driver::Ring).into_iter().chain([Driver::Portable]);
    for driver in drivers {
        let memory = Path::new("/dev/shm");
        let dir = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
        let dir = dir.expect("a directory");
        test(&|| start(dir.path(), driver, flushers).expect("it opens"));
        // Wherever the last handle was dropped, the files are released, and opening waits for that.
        drop(start(dir.path(), driver, flushers).expect("it opens again"));
    }
}

fn ends<T>(receiver: &Receiver<T>, what: &str) -> T {
    receiver.recv_timeout(FOR_EVER).unwrap_or_else(|_| panic!("{what} hangs"))
}

/// Returns once what the task has requested is submitted and before any completion is taken from
/// the disk: a lap submits what tasks requested in the lap before, and then runs tasks, at most
/// this many times.
async fn next_lap() {
    for _ in 0..TASKS_PER_ROUND {
        yield_now().await;
    }
}

/// The last handle is dropped by a task of a shard that leads a flush for which the other shard
/// waits; that flush can't end while the task occupies the shard's thread.
#[test]
fn the_last_handle_may_go_on_a_shard_that_flushes_for_others() {
    each_driver(|start| {
        let runtime = Arc::new(start());
        let ((leads, led), (joins, joined), (ends_it, ended)) =
            (bounded(1), bounded(1), bounded(1));
        let other = runtime.handle().spawn_on(ShardId::new(1), move |local| async move {
            led.recv().expect("the other task lives");
            let flush = local.call(Request::Flush);
            next_lap().await;
            joins.send(()).expect("the other task waits");
            drop(flush);
        });
        let last = runtime.clone();
        let task = runtime.handle().spawn_on(ShardId::new(0), move |local| async move {
            let mut flush = Box::pin(local.call(Request::Flush));
            assert!(poll_once(&mut flush).await.is_none());
            next_lap().await;
            leads.send(()).expect("the other task waits");
            joined.recv().expect("the other shard takes part in the flush, or waits for it");
            // Wait until the test has dropped its own handle.
            while Arc::strong_count(&last) > 1 {
                std::thread::yield_now();
            }
            drop(last);
            ends_it.send(()).expect("the test waits");
        });
        drop((other, task, runtime));
        ends(&ended, "dropping the last handle");
    });
}

/// A program has two stores, and each one's last handle is in a task of the other.
#[test]
fn shards_of_two_stores_may_drop_each_others_last_handles_at_a_time() {
    each_driver(|start| {
        let dir = tempfile::tempdir().expect("a directory");
        let one = Arc::new(start());
        let other =
            Arc::new(self::start(dir.path(), Driver::Portable, flushers).expect("it opens"));
        let both = Arc::new(Barrier::new(2));
        let (done, ended) = bounded(2);
        let drops = |on: &Arc<Runtime>, last: &Arc<Runtime>| {
            let (last, both, done): (_, _, Sender<()>) = (last.clone(), both.clone(), done.clone());
            let task = on.handle().spawn_on(ShardId::new(0), move |_| async move {
                while Arc::strong_count(&last) > 1 {
                    yield_now().await;
                }
                both.wait();
                drop(last);
                done.send(()).expect("the test waits");
            });
            drop(task.expect("it starts"));
        };
        drops(&one, &other);
        drops(&other, &one);
        drop((one, other));
        ends(&ended, "one of them");
        ends(&ended, "the other");
    });
}

/// The last handle may be held by the waker of a reply, by a task that ends with its shard, or by a
/// task that never started.
#[test]
fn the_last_handle_may_go_wherever_callers_code_runs_on_a_shard() {
    struct Holds(#[allow(dead_code, reason = "held")] Arc<Runtime>, Sender<()>);
    impl Drop for Holds {
        fn drop(&mut self) {
            let _ = self.1.send(());
        }
    }
    impl std::task::Wake for Holds {
        fn wake(self: Arc<Self>) {}
    }
    each_driver(|start| {
        let (sender, ended) = bounded(4);
        let runtime = Arc::new(start());
        let reply = block_on(runtime.handle().submit_to(ShardId::new(1), Request::Flush))
            .expect("there is a place");
        let waker = Arc::new(Holds(runtime.clone(), sender.clone())).into();
        let mut reply = Box::pin(reply);
        let done = reply.as_mut().poll(&mut std::task::Context::from_waker(&waker)).is_ready();
        drop(waker);
        // The reply is kept, and the waker with it, unless it arrived at once.
        drop(runtime);
        ends(&ended, "a waker");
        drop((reply, done));

        let runtime = Arc::new(start());
        let holds = Holds(runtime.clone(), sender.clone());
        let task = runtime.handle().spawn_on(ShardId::new(1), |_| async move {
            std::future::pending::<()>().await;
            drop(holds);
        });
        // All shards end when one does, and their tasks with them.
        let closed = block_on(async {
            runtime.handle().submit_to(ShardId::new(0), Request::Close).await?.await
        });
        assert!(matches!(closed, Ok(Response::Closed)), "{closed:?}");
        runtime.handle().shared_for_tests().abandon();
        drop((task, runtime));
        ends(&ended, "a task that ends with its shard");
    });
}

/// A caller must be able to cancel the opening of a store that takes hours to recover, or that
/// never opens.
#[test]
fn opening_is_given_up_when_its_future_is_dropped() {
    for driver in
        ring::probe().is_ok().then_some(Driver::Ring).into_iter().chain([Driver::Portable])
    {
        let dir = tempfile::tempdir().expect("a directory");
        let options = Options { shards: Some(2), driver, ..Options::default() };
        for pause_ms in [0, 1, 5, 50] {
            let (send, ended) = bounded(1);
            let (path, options) = (dir.path().to_path_buf(), options.clone());
            let thread = std::thread::spawn(move || {
                let mut opening = Box::pin(start_with(path, options, endless));
                assert!(block_on(poll_once(&mut opening)).is_none(), "it never opens");
                // Cancel at an arbitrary moment of its work.
                std::thread::sleep(Duration::from_millis(pause_ms));
                drop(opening);
                send.send(()).expect("the test waits");
            });
            ends(&ended, "giving up");
            thread.join().expect("nothing failed");
        }
        drop(start(dir.path(), driver, flushers).expect("nothing is left that holds the files"));
    }
}

/// Recovery reads the log with one read after another: each that begins after opening was cancelled
/// is one too many.
#[test]
fn no_operation_begins_after_opening_was_given_up() {
    fn reads_for_ever(
        disk: &mut dyn Disk,
        _: &Options,
        _: u16,
        _: Micros,
    ) -> Result<Bootstrap<Flusher>> {
        execute(disk, DiskOp::Allocate { file: FILE, from: 0, to: 4096 })?;
        loop {
            if let Err(error) = execute(disk, DiskOp::Flush { files: [FILE].into_iter().collect() })
            {
                assert_eq!(error.kind(), ErrorKind::Closed, "{error}");
                return Err(error);
            }
        }
    }
    each_driver(|_| {
        let dir = tempfile::tempdir().expect("a directory");
        let options = Options { shards: Some(2), ..Options::default() };
        let (send, ended) = bounded(1);
        let path = dir.path().to_path_buf();
        let thread = std::thread::spawn(move || {
            let mut opening = Box::pin(start_with(path, options, reads_for_ever));
            assert!(block_on(poll_once(&mut opening)).is_none(), "it never ends");
            std::thread::sleep(Duration::from_millis(20));
            drop(opening);
            send.send(()).expect("the test waits");
        });
        ends(&ended, "giving up");
        thread.join().expect("nothing failed");
    });
}
