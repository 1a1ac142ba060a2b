//! The event loop of one shard's thread; it is the same over every disk.
//!
//! ```text
//!   round: take requests, messages, completions --> turn --> submit once, reply, send
//!          --> unpark waiters --> run tasks
//!   nothing happened: spin for a bounded time --> park --> wait in the disk
//! ```
//! Invariants
//! 1. The shard turns only when something has arrived, its deadline has passed, or the watermark
//!    has reached the LSN it waits for.
//! 2. The thread announces that it parks before it looks for work one last time, in its own tasks
//!    as well; it waits only if there is none.
//! 3. All operations of a round are submitted in one call.
//! 4. Spinning ends after a bounded time, and at once while a flush is under way: a spinning core
//!    can starve the kernel's workers that flush.
//! 5. Completions are taken in portions, so that the device has work while the rest waits.
//!
//! It does *not* know which disk or executor it runs on.

use super::clock::Clock;
use super::latency_recorder::LatencyRecorder;
use super::shared::{QueuedRequest, RuntimeShared, ShardMailbox};
use super::task_context::{LOCAL_TOKEN_BIT, TaskContext};
use crate::base::{Lsn, Micros, ShardId};
use crate::engine::order::GlobalOrder;
use crate::engine::{Effect, Host, Response, StateMachine, step};
use crate::io::{Completion, Disk, DiskOp};
use crate::mesh::{Channels, unpark_for_level};
use std::collections::VecDeque;
use std::convert::Infallible;
use std::ops::ControlFlow;
use std::sync::Arc;

/// The most requests that one round takes from the inbox; it takes up to the same number from
/// tasks.
const REQUESTS_PER_ROUND: usize = 256;

/// A round takes completions for at most one in `COMPLETIONS_SHARE` of the operations at the
/// device, but always up to `COMPLETIONS_MIN`.
const COMPLETIONS_SHARE: usize = 4;
const COMPLETIONS_MIN: usize = 4;
const _: () = assert!(
    COMPLETIONS_SHARE > 0 && COMPLETIONS_MIN > 0 && REQUESTS_PER_ROUND > 0,
    "each round makes progress"
);

/// How long a thread spins after its last event, before it parks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum PollPolicy {
    SpinFor(Micros),
    SpinForever,
}

/// The outcome of one round.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum PollOutcome {
    Busy,
    Idle,
    /// The shard is closed, or all threads must end.
    Ended,
}

/// Everything that an event loop is built from, besides its disk.
pub(super) struct EventLoopParts<M: StateMachine> {
    pub(super) id: ShardId,
    pub(super) shard: M,
    pub(super) shared: Arc<RuntimeShared>,
    pub(super) channels: Channels<M::Message>,
    pub(super) order: Arc<GlobalOrder>,
    pub(super) clock: Clock,
    pub(super) poll_policy: PollPolicy,
    pub(super) requests_max: usize,
    pub(super) request_bytes_max: u64,
}

/// Permits of answered requests: how many requests, how many of those carried bytes, and how many
/// bytes.
#[derive(Default)]
struct ReleasedPermits {
    count: usize,
    carrying: usize,
    bytes: u64,
}

impl ReleasedPermits {
    fn is_empty(&self) -> bool {
        self.count == 0 && self.carrying == 0 && self.bytes == 0
    }

    fn release_to(self, shared: &RuntimeShared, mailbox: &ShardMailbox) {
        shared.request_permits.release(self.count, 0);
        mailbox.byte_permits.release(self.carrying, self.bytes);
    }
}

/// A shard's event loop.
pub(super) struct EventLoop<M: StateMachine, D: Disk> {
    shard: M,
    host: ThreadHost<M, D>,
}

/// Everything that the event loop owns besides the shard.
struct ThreadHost<M: StateMachine, D: Disk> {
    id: ShardId,
    shared: Arc<RuntimeShared>,
    channels: Channels<M::Message>,
    order: Arc<GlobalOrder>,
    clock: Clock,
    poll_policy: PollPolicy,
    disk: D,
    tasks: TaskContext,
    recorder: LatencyRecorder,
    /// Permits of handles' requests that were answered in this round; returned at its end, in one
    /// step.
    released: ReleasedPermits,
    reaped: Vec<Completion>,
    /// Completions that were reaped from the disk and not handed to the shard yet.
    completions: VecDeque<Completion>,
    /// Operations at the disk, or completed and not handed to the shard yet; and how many of them
    /// are flushes.
    operations: usize,
    flushes: usize,
    /// The watermark when it was last checked; other shards are unparked when it has risen.
    watermark_seen: Lsn,
    due: Option<Micros>,
    /// The shard has had a turn since something was delivered to it last.
    turned: bool,
    /// Whether the shard's failure was reported.
    failure_reported: bool,
    now: Micros,
    active_at: Micros,
}

impl<M: StateMachine, D: Disk> EventLoop<M, D> {
    pub(super) fn new(parts: EventLoopParts<M>, mut disk: D) -> Self {
        let EventLoopParts {
            id,
            shard,
            shared,
            channels,
            order,
            clock,
            poll_policy,
            requests_max,
            request_bytes_max,
        } = parts;
        if let Some(memory) = shard.mapping() {
            disk.register(memory);
        }
        let now = clock.now();
        let host = ThreadHost {
            tasks: TaskContext::new(id, shared.clone(), requests_max, request_bytes_max),
            recorder: LatencyRecorder::new(clock),
            id,
            shared,
            channels,
            order,
            clock,
            poll_policy,
            disk,
            released: ReleasedPermits::default(),
            reaped: Vec::new(),
            completions: VecDeque::new(),
            operations: 0,
            flushes: 0,
            watermark_seen: Lsn::ZERO,
            due: None,
            turned: false,
            failure_reported: false,
            now,
            active_at: now,
        };
        EventLoop { shard, host }
    }

    pub(super) fn shard(&self) -> &M {
        &self.shard
    }

    /// Checked between two rounds, when nothing may be half done.
    fn assert_state(&self) {
        let host = &self.host;
        let under_way = host.operations;
        assert!(host.released.is_empty(), "permits of a round are returned in it");
        assert!(host.flushes <= under_way, "{} flushes of {under_way} operations", host.flushes);
        assert!(
            host.completions.len() <= under_way,
            "{} completions of {under_way} operations",
            host.completions.len()
        );
    }

    /// Runs one round. Afterwards the caller calls
    /// [`park_or_spin_if_idle`](Self::park_or_spin_if_idle).
    pub(super) fn poll_once(&mut self) -> PollOutcome {
        self.assert_state();
        let EventLoop { shard, host } = self;
        if host.shared.is_abandoned() {
            return PollOutcome::Ended;
        }
        let ControlFlow::Continue(step) = step(shard, host);
        let mut busy = step.is_busy();
        if step.turned {
            std::mem::take(&mut host.released).release_to(&host.shared, host.mailbox());
            host.due = shard.deadline();
            host.unpark_watermark_waiters();
            host.disk.push();
        }
        host.flush_channels();
        host.recorder.end_round();
        busy |= host.tasks.run();
        if shard.is_closed() && shard.ops_under_way() == 0 && host.channels.is_flushed() {
            return PollOutcome::Ended;
        }
        if busy {
            host.active_at = host.now;
            return PollOutcome::Busy;
        }
        PollOutcome::Idle
    }

    /// Spins or waits, if nothing happened.
    pub(super) fn park_or_spin_if_idle(&mut self, outcome: PollOutcome) {
        if outcome == PollOutcome::Idle {
            self.host.park_or_spin(&self.shard);
        }
    }

    /// Ends the shard: first its operations, then its tasks, then the replies that callers wait
    /// for. Its files are closed on return.
    pub(super) fn end(self) {
        let EventLoop { shard, host } = self;
        let ThreadHost { id, shared, channels, disk, tasks, recorder, released, .. } = host;
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            drop(disk);
            drop(shard);
            drop(channels);
            tasks.end();
        }));
        if panicked.is_err() {
            tracing::error!(shard = id.get(), "ending the shard panicked");
        }
        let mailbox = &shared.mailboxes[id.index()];
        // These are the permits of the last round, if a waker panicked in it.
        released.release_to(&shared, mailbox);
        shared.close_mailbox(mailbox, recorder.into_unanswered());
    }
}

impl<M: StateMachine, D: Disk> Host<M> for ThreadHost<M, D> {
    type Stop = Infallible;

    fn deliver(&mut self, shard: &mut M) -> bool {
        let mut any = self.take_requests(shard);
        any |= self.take_messages(shard);
        any |= self.take_completions(shard);
        self.turned &= !any;
        any
    }

    fn turn_at(&mut self, shard: &M) -> Option<Micros> {
        self.now = self.clock.now();
        let is_due = !self.turned || self.due.is_some_and(|at| at <= self.now);
        (is_due || self.is_durable(shard)).then_some(self.now)
    }

    /// Reports the shard's failure, once: from then on the store takes no writes.
    fn turned(&mut self, shard: &mut M) {
        self.turned = true;
        if !self.failure_reported
            && let Some(error) = shard.failure()
        {
            self.failure_reported = true;
            self.shared.fail(error);
        }
    }

    fn carry_out(&mut self, _: &M, effect: Effect<M::Message>) -> ControlFlow<Infallible> {
        match effect {
            Effect::Submit(id, op) => {
                self.operations += 1;
                self.flushes += usize::from(matches!(op, DiskOp::Flush { .. }));
                self.recorder.operation_submitted(&op);
                self.disk.submit(id, op);
            }
            Effect::Send(to, message) => self.channels.send(to.index(), message),
            Effect::Reply(token, mut result) => {
                let bytes = self.recorder.request_answered(token);
                if let Ok(Response::Stats(stats)) = &mut result {
                    self.recorder.add_to(stats, self.disk.calls());
                }
                if token.0 & LOCAL_TOKEN_BIT != 0 {
                    self.tasks.reply(token, result);
                } else {
                    self.released.count += 1;
                    self.released.carrying += usize::from(bytes > 0);
                    self.released.bytes += bytes;
                    self.shared.in_flight.complete(token.0, result);
                }
            }
        }
        ControlFlow::Continue(())
    }
}

impl<M: StateMachine, D: Disk> ThreadHost<M, D> {
    fn mailbox(&self) -> &ShardMailbox {
        &self.shared.mailboxes[self.id.index()]
    }

    fn take_requests(&mut self, shard: &mut M) -> bool {
        let mut any = false;
        let mailbox = &self.shared.mailboxes[self.id.index()];
        for _ in 0..REQUESTS_PER_ROUND {
            if !shard.accepting() {
                break;
            }
            let Some((token, request)) = self.tasks.next_request() else { break };
            self.recorder.request_started(token, &request, 0);
            shard.request(token, request);
            any = true;
        }
        if mailbox.inbox.is_empty() {
            return any;
        }
        for _ in 0..REQUESTS_PER_ROUND {
            if !shard.accepting() {
                break;
            }
            let Some(QueuedRequest { token, request, bytes }) = mailbox.inbox.pop() else { break };
            self.recorder.request_started(token, &request, bytes);
            shard.request(token, request);
            any = true;
        }
        any
    }

    fn take_messages(&mut self, shard: &mut M) -> bool {
        let mailboxes = &self.shared.mailboxes;
        self.channels.receive(
            |from, message| shard.message(ShardId::new(from as u16), message),
            |from| mailboxes[from].parking.unpark(),
        )
    }

    /// Hands over a portion of the completions, so that the operations that result reach the device
    /// before the rest is handed over. If all were taken at once, device and core would take turns
    /// waiting for each other.
    fn take_completions(&mut self, shard: &mut M) -> bool {
        self.disk.reap(&mut self.reaped);
        self.completions.extend(self.reaped.drain(..));
        let some = COMPLETIONS_MIN
            .max(shard.ops_under_way() / COMPLETIONS_SHARE)
            .min(self.completions.len());
        for completion in self.completions.drain(..some) {
            self.operations =
                self.operations.checked_sub(1).expect("an operation completes that was submitted");
            let flushes = usize::from(matches!(completion.op, DiskOp::Flush { .. }));
            self.flushes =
                self.flushes.checked_sub(flushes).expect("a flush completes that was submitted");
            shard.complete(completion);
        }
        some > 0
    }

    /// Whether the watermark has reached the LSN that the shard waits for.
    fn is_durable(&self, shard: &M) -> bool {
        shard.waits_for().is_some_and(|lsn| lsn <= self.order.watermark())
    }

    /// Unparks the other shards that wait for the current watermark.
    fn unpark_watermark_waiters(&mut self) {
        let watermark = self.order.watermark();
        if watermark > self.watermark_seen {
            self.watermark_seen = watermark;
            let own = self.id.index();
            let others =
                self.shared.mailboxes.iter().enumerate().filter(|(shard, _)| *shard != own);
            unpark_for_level(others.map(|(_, mailbox)| &mailbox.parking), watermark.get());
        }
    }

    fn flush_channels(&mut self) {
        let mailboxes = &self.shared.mailboxes;
        self.channels.flush(|to| mailboxes[to].parking.unpark());
    }

    fn park_or_spin(&mut self, shard: &M) {
        match self.poll_policy {
            // A kernel worker flushes, possibly on this core.
            PollPolicy::SpinFor(_) if self.flushes > 0 => {}
            PollPolicy::SpinFor(us) if self.now.saturating_sub(self.active_at) >= us => {}
            _ => return std::hint::spin_loop(),
        }
        let timeout = self.due.map(|at| at.saturating_sub(self.now));
        if timeout == Some(0) {
            return;
        }
        // While the shard accepts no requests, those in the inbox are no reason to stay awake.
        let accepting = shard.accepting();
        let has_work = || {
            (accepting && !self.mailbox().inbox.is_empty())
                || self.channels.has_work()
                || self.tasks.has_tasks()
                || (accepting && self.tasks.has_requests())
                || self.is_durable(shard)
                || self.shared.is_abandoned()
        };
        if self.mailbox().parking.park(shard.waits_for().map(Lsn::get), has_work) {
            self.disk.wait(timeout);
            self.mailbox().parking.awake();
        }
    }
}
