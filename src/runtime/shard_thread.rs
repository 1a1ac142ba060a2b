//! The life of a shard's thread from beginning to end, on any driver.
//!
//! ```text
//!   made a disk --ready--> waits for commands --bootstrap (one thread only)--> bootstrapped
//!      |                        |take: its shard
//!      |refused                 v
//!      v                  rounds, opening --open--> rounds --> ended
//!    ends                       |failed: ends, and so do all
//! ```
//! Invariants
//! 1. The coordinator is notified in any case: refused; or ready, and then open or failed. A panic
//!    is a failure.
//! 2. A thread that panics ends all threads.
//! 3. `RuntimeShared::thread_ended` is the last call of a thread, after it has closed its files.
//! 4. Such a thread never waits for another one: each may lead a flush that the other needs in
//!    order to end. Code that runs on it (tasks, wakers, destructors of callers) can check
//!    [`is_shard_thread`].

use super::bootstrap::Bootstrap;
use super::clock::Clock;
use super::event_loop::{EventLoop, EventLoopParts, PollOutcome, PollPolicy};
use super::shared::RuntimeShared;
use crate::base::ShardId;
use crate::base::error::{Error, Result};
use crate::engine::StateMachine;
use crate::engine::order::GlobalOrder;
use crate::io::{CancellableDisk, Disk, DiskReport, DiskWaker, Files};
use crate::mesh::Channels;
use crossbeam::channel::{Receiver, Sender};
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

thread_local! {
    /// Set from the thread's beginning to its very end.
    static IS_SHARD: Cell<bool> = const { Cell::new(false) };
}

/// Whether the calling thread is a shard's, of any store, even while it begins or ends.
pub(crate) fn is_shard_thread() -> bool {
    IS_SHARD.with(Cell::get)
}

/// Rounds of the event loop before the executor gets a turn.
const ROUNDS_MAX: usize = 64;

/// Begins to open the store on the disk of one of the threads, and makes the shards of all.
pub(super) type BootstrapTask<M> = Box<dyn FnOnce(&mut dyn Disk) -> Result<Bootstrap<M>> + Send>;

/// Reports of a thread to the coordinator.
pub(super) enum StartupStatus<M> {
    /// The thread has its disk.
    Ready(DiskReport),
    /// The driver can't run here, for this reason.
    Refused(Error),
    /// The result of [`StartupCommand::Bootstrap`].
    Bootstrapped(Result<Bootstrap<M>>),
    /// Its shard is open.
    Open,
    /// Its shard can't be opened.
    Failed(Error),
}

/// Commands of the coordinator to a thread.
pub(super) enum StartupCommand<M> {
    /// Begin to open the store.
    Bootstrap(BootstrapTask<M>),
    /// Drive this shard.
    TakeShard(Box<M>, Arc<GlobalOrder>),
}

/// Everything that a shard's thread is started with.
pub(super) struct ThreadContext<M: StateMachine> {
    pub(super) id: ShardId,
    pub(super) pin: Option<usize>,
    pub(super) poll_policy: PollPolicy,
    pub(super) clock: Clock,
    pub(super) requests_max: usize,
    pub(super) request_bytes_max: u64,
    pub(super) ring_entries: u32,
    pub(super) shards_count: u16,
    pub(super) shared: Arc<RuntimeShared>,
    pub(super) channels: Channels<M::Message>,
    pub(super) files: Arc<Files>,
    pub(super) status: Sender<StartupStatus<M>>,
    pub(super) commands: Receiver<StartupCommand<M>>,
}

/// A thread that drives its shard.
pub(super) struct ShardThread<M: StateMachine, D: Disk> {
    /// `None` only in `drop`.
    event_loop: Option<EventLoop<M, D>>,
    life: Life<M>,
    shared: Arc<RuntimeShared>,
}

/// The stage of a shard's thread. It only moves forward.
enum Life<M> {
    /// The coordinator waits for a report.
    Opening(Sender<StartupStatus<M>>),
    Open,
    Ended,
}

impl<M: StateMachine> ThreadContext<M> {
    /// Reports that the driver can't run here; the thread ends.
    pub(super) fn refuse(self, error: Error) {
        let _ = self.status.send(StartupStatus::Refused(error));
    }

    /// Reports that the thread has its disk, and waits for its shard. `None`: it gets no shard, and
    /// ends.
    pub(super) fn attach_disk<D: Disk>(
        self,
        mut disk: D,
        waker: DiskWaker,
        report: DiskReport,
    ) -> Option<ShardThread<M, D>> {
        let ThreadContext {
            id,
            poll_policy,
            clock,
            requests_max,
            request_bytes_max,
            shared,
            channels,
            files,
            status,
            commands,
            ..
        } = self;
        let cancel = files.cancel().clone();
        // The disk has a reference of its own; the last reference holds the store's lock.
        drop(files);
        shared.mailboxes[usize::from(id.get())].parking.set_waker(waker);
        let _ = status.send(StartupStatus::Ready(report));
        while let Ok(next) = commands.recv() {
            match next {
                StartupCommand::Bootstrap(task) => {
                    let bootstrap = catch_unwind(AssertUnwindSafe(|| {
                        task(&mut CancellableDisk::new(&mut disk, cancel.clone()))
                    }));
                    let bootstrap = bootstrap.unwrap_or_else(|_| Err(panicked()));
                    let _ = status.send(StartupStatus::Bootstrapped(bootstrap));
                }
                StartupCommand::TakeShard(shard, order) => {
                    let parts = EventLoopParts {
                        id,
                        shard: *shard,
                        shared: shared.clone(),
                        channels,
                        order,
                        clock,
                        poll_policy,
                        requests_max,
                        request_bytes_max,
                    };
                    let event_loop = Some(EventLoop::new(parts, disk));
                    return Some(ShardThread { event_loop, life: Life::Opening(status), shared });
                }
            }
        }
        None
    }
}

/// The main function of a shard's thread: runs `body`, and reports the thread's end even if that
/// panics.
pub(super) fn thread_main<M: StateMachine>(
    context: ThreadContext<M>,
    body: impl FnOnce(ThreadContext<M>),
) {
    IS_SHARD.set(true);
    let (shared, status) = (context.shared.clone(), context.status.clone());
    if catch_unwind(AssertUnwindSafe(|| body(context))).is_err() {
        tracing::error!("a shard's thread panicked; the store is closed as after a crash");
        shared.fail(stopped_by_a_bug());
        let _ = status.send(StartupStatus::Failed(panicked()));
        shared.abandon();
    }
    drop(status);
    shared.thread_ended();
}

fn stopped_by_a_bug() -> Error {
    Error::internal("the thread of a shard panicked; reopen the store to recover")
}

fn panicked() -> Error {
    Error::internal("opening the store panicked")
}

impl<M: StateMachine, D: Disk> ShardThread<M, D> {
    /// Runs some rounds of the event loop. False: the shard has ended, and nothing remains to be
    /// done.
    pub(super) fn run(&mut self) -> bool {
        assert!(!matches!(self.life, Life::Ended), "a shard that has ended runs no more rounds");
        let goes_on = catch_unwind(AssertUnwindSafe(|| self.run_rounds())).unwrap_or_else(|_| {
            tracing::error!("a shard panicked; the store is closed as after a crash");
            self.shared.fail(stopped_by_a_bug());
            self.end(StartupStatus::Failed(panicked()));
            self.shared.abandon();
            false
        });
        self.assert_state();
        assert!(
            goes_on != matches!(self.life, Life::Ended),
            "whether a shard has ended: {}",
            !goes_on
        );
        goes_on
    }

    /// Checks that a shard is reported as open in the round in which it opens, and stays open.
    fn assert_state(&self) {
        let is_open =
            self.event_loop.as_ref().is_some_and(|event_loop| event_loop.shard().is_open());
        match self.life {
            Life::Opening(_) => assert!(!is_open, "an open shard was not reported"),
            Life::Open => assert!(is_open, "a shard that was reported as open opens again"),
            Life::Ended => {}
        }
    }

    /// Ends the shard. If the coordinator waits for a report, it gets `status`.
    fn end(&mut self, status: StartupStatus<M>) -> bool {
        if let Life::Opening(report) = std::mem::replace(&mut self.life, Life::Ended) {
            // Nothing receives it if opening was given up.
            let _ = report.send(status);
        }
        false
    }

    fn run_rounds(&mut self) -> bool {
        for _ in 0..ROUNDS_MAX {
            let Some(event_loop) = &mut self.event_loop else { return false };
            let outcome = event_loop.poll_once();
            if let Life::Opening(status) = &self.life {
                let shard = event_loop.shard();
                match shard.failure() {
                    Some(error) => return self.end(StartupStatus::Failed(error)),
                    None if shard.is_open() => {
                        // Nothing receives it if opening was given up.
                        let _ = status.send(StartupStatus::Open);
                        self.life = Life::Open;
                    }
                    None if outcome == PollOutcome::Ended => {
                        return self.end(StartupStatus::Failed(super::shared::closed()));
                    }
                    None => {}
                }
            }
            if outcome == PollOutcome::Ended {
                self.life = Life::Ended;
                return false;
            }
            event_loop.park_or_spin_if_idle(outcome);
        }
        true
    }
}

impl<M: StateMachine, D: Disk> Drop for ShardThread<M, D> {
    fn drop(&mut self) {
        if let Some(event_loop) = self.event_loop.take() {
            event_loop.end();
        }
    }
}
