//! One shard's thread at work: the lap, the same over every disk.
//!
//! ```text
//!   lap: take requests, messages, completions --> turn --> submit once, reply, send --> wake who waits --> run tasks
//!   nothing happened: poll for a bounded time --> park --> wait in the disk
//! ```
//! Invariants
//! 1. A turn only when something arrived, the deadline has passed, or the watermark has reached what is waited for.
//! 2. The thread parks only if after saying so it finds nothing to do, no task of its own either.
//! 3. All that a lap submits goes to the device in one call.
//! 4. Polling ends, and stops while a flush is under way: a core that spins can starve the kernel's workers that flush.
//! 5. Completions are taken in parts, so that the device has work while the rest is taken.
//!
//! It does *not* know which disk, executor or thread it runs on.

use super::local::{LOCAL, Local};
use super::meter::Meter;
use super::shared::{Brought, Port, Shared};
use crate::base::{Lsn, Micros, ShardId};
use crate::engine::order::GlobalOrder;
use crate::engine::{Effect, Host, Response, StateMachine, step};
use crate::io::{Completion, Disk, DiskOp};
use crate::mesh::{Lanes, raised};
use std::collections::VecDeque;
use std::convert::Infallible;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Instant;

/// Requests taken from the inbox in one lap, and as many from tasks.
const BATCH: usize = 256;

/// Completions taken in one lap at most: this part of what is at the device, and no fewer than so many.
const COMPLETIONS_SHARE: usize = 4;
const COMPLETIONS_MIN: usize = 4;

/// Microseconds since a moment that all shards share: the drivers are where the shards' clock comes from.
#[derive(Clone, Copy)]
pub(super) struct Clock(Instant);

impl Clock {
    #[expect(clippy::disallowed_methods, reason = "the one place that reads a clock")]
    pub(super) fn start() -> Self {
        Clock(Instant::now())
    }

    #[expect(clippy::disallowed_methods, reason = "the one place that reads a clock")]
    pub(super) fn now(self) -> Micros {
        self.0.elapsed().as_micros() as Micros
    }
}

/// How long to poll after the last thing that happened.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Pace {
    For(Micros),
    WithoutEnd,
}

/// What a lap came to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Lap {
    Busy,
    Idle,
    /// The shard is closed, or all are to end.
    Ended,
}

/// What a driver is made of.
pub(super) struct Rig<M: StateMachine> {
    pub(super) id: ShardId,
    pub(super) machine: M,
    pub(super) shared: Arc<Shared>,
    pub(super) lanes: Lanes<M::Message>,
    pub(super) order: Arc<GlobalOrder>,
    pub(super) clock: Clock,
    pub(super) pace: Pace,
    pub(super) requests_max: usize,
    pub(super) request_bytes_max: u64,
}

/// Requests that were answered, those among them that carried something, and how much.
#[derive(Default)]
struct Answered {
    count: usize,
    carrying: usize,
    bytes: u64,
}

impl Answered {
    fn leave(self, shared: &Shared, port: &Port) {
        shared.places.leave(self.count, 0);
        port.carried.leave(self.carrying, self.bytes);
    }
}

/// A shard with its disk, on its thread.
pub(super) struct Driver<M: StateMachine, D: Disk> {
    machine: M,
    host: ThreadHost<M, D>,
}

/// Everything around the shard.
struct ThreadHost<M: StateMachine, D: Disk> {
    id: ShardId,
    shared: Arc<Shared>,
    lanes: Lanes<M::Message>,
    order: Arc<GlobalOrder>,
    clock: Clock,
    pace: Pace,
    disk: D,
    local: Local,
    meter: Meter,
    /// Of handles, answered in this lap: what they have taken is still to be given back.
    answered: Answered,
    reaped: Vec<Completion>,
    /// Reaped, and not taken yet.
    completions: VecDeque<Completion>,
    /// Flushes under way.
    flushes: usize,
    /// The watermark that this thread has seen.
    seen: Lsn,
    due: Option<Micros>,
    turned: bool,
    /// Whether the shard's failure was told.
    failure_told: bool,
    now: Micros,
    active_at: Micros,
}

impl<M: StateMachine, D: Disk> Driver<M, D> {
    pub(super) fn new(rig: Rig<M>, mut disk: D) -> Self {
        let Rig { id, machine, shared, lanes, order, clock, pace, requests_max, request_bytes_max } = rig;
        if let Some(memory) = machine.mapping() {
            disk.register(memory);
        }
        let now = clock.now();
        let host = ThreadHost {
            local: Local::new(id, shared.clone(), requests_max, request_bytes_max),
            meter: Meter::new(clock),
            id,
            shared,
            lanes,
            order,
            clock,
            pace,
            disk,
            answered: Answered::default(),
            reaped: Vec::new(),
            completions: VecDeque::new(),
            flushes: 0,
            seen: Lsn::ZERO,
            due: None,
            turned: false,
            failure_told: false,
            now,
            active_at: now,
        };
        Driver { machine, host }
    }

    pub(super) fn machine(&self) -> &M {
        &self.machine
    }

    /// One lap. After an idle one the caller lets it [`rest`](Self::rest_if).
    pub(super) fn lap(&mut self) -> Lap {
        let Driver { machine, host } = self;
        if host.shared.is_abandoned() {
            return Lap::Ended;
        }
        let ControlFlow::Continue(step) = step(machine, host);
        let mut busy = step.is_busy();
        if step.turned {
            std::mem::take(&mut host.answered).leave(&host.shared, host.port());
            host.due = machine.deadline();
            host.announce();
            host.disk.push();
        }
        host.hand_over();
        host.meter.lap();
        busy |= host.local.run();
        if machine.is_closed() && machine.ops_under_way() == 0 && host.lanes.is_handed_over() {
            return Lap::Ended;
        }
        if busy {
            host.active_at = host.now;
            return Lap::Busy;
        }
        Lap::Idle
    }

    /// If nothing happened: polls on, or waits.
    pub(super) fn rest_if(&mut self, lap: Lap) {
        if lap == Lap::Idle {
            self.host.rest(&self.machine);
        }
    }

    /// Ends: first what is in flight, then the tasks, then those who wait. The files have been let go on return.
    pub(super) fn end(self) {
        let Driver { machine, host } = self;
        let ThreadHost { id, shared, lanes, disk, local, meter, answered, .. } = host;
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            drop(disk);
            drop(machine);
            drop(lanes);
            local.end();
        }));
        if panicked.is_err() {
            tracing::error!(shard = id.get(), "ending the shard panicked");
        }
        let port = &shared.ports[id.index()];
        // Not given back if a waker panicked.
        answered.leave(&shared, port);
        shared.close_port(port, meter.open());
    }
}

impl<M: StateMachine, D: Disk> Host<M> for ThreadHost<M, D> {
    type Stop = Infallible;

    fn deliver(&mut self, machine: &mut M) -> bool {
        let mut any = self.take_requests(machine);
        any |= self.take_messages(machine);
        any | self.take_completions(machine)
    }

    fn turn_at(&mut self, machine: &M, delivered: bool) -> Option<Micros> {
        self.now = self.clock.now();
        let is_due = delivered || !self.turned || self.due.is_some_and(|at| at <= self.now);
        (is_due || self.is_durable(machine)).then_some(self.now)
    }

    /// Tells whoever waits for the end of the store that it takes no writes any more.
    fn turned(&mut self, machine: &mut M) {
        self.turned = true;
        if !self.failure_told
            && let Some(error) = machine.failure()
        {
            self.failure_told = true;
            self.shared.fail(error);
        }
    }

    fn carry_out(&mut self, _: &M, effect: Effect<M::Message>) -> ControlFlow<Infallible> {
        match effect {
            Effect::Submit(id, op) => {
                self.flushes += usize::from(matches!(op, DiskOp::Flush { .. }));
                self.meter.submitted(&op);
                self.disk.submit(id, op);
            }
            Effect::Send(to, message) => self.lanes.send(to, message),
            Effect::Reply(token, mut result) => {
                let bytes = self.meter.answered(token);
                if let Ok(Response::Stats(stats)) = &mut result {
                    self.meter.tell(stats, self.disk.calls());
                }
                if token.0 & LOCAL != 0 {
                    self.local.reply(token, result);
                } else {
                    self.answered.count += 1;
                    self.answered.carrying += usize::from(bytes > 0);
                    self.answered.bytes += bytes;
                    self.shared.inflight.complete(token, result);
                }
            }
        }
        ControlFlow::Continue(())
    }
}

impl<M: StateMachine, D: Disk> ThreadHost<M, D> {
    fn port(&self) -> &Port {
        &self.shared.ports[self.id.index()]
    }

    fn take_requests(&mut self, machine: &mut M) -> bool {
        let mut any = false;
        let port = &self.shared.ports[self.id.index()];
        for _ in 0..BATCH {
            if !machine.accepting() {
                break;
            }
            let Some((token, request)) = self.local.next_request() else { break };
            self.meter.taken(token, &request, 0);
            machine.request(token, request);
            any = true;
        }
        if port.inbox.is_empty() {
            return any;
        }
        for _ in 0..BATCH {
            if !machine.accepting() {
                break;
            }
            let Some(Brought { token, request, bytes }) = port.inbox.pop() else { break };
            self.meter.taken(token, &request, bytes);
            machine.request(token, request);
            any = true;
        }
        any
    }

    fn take_messages(&mut self, machine: &mut M) -> bool {
        let ports = &self.shared.ports;
        self.lanes.take(|from, message| machine.message(from, message), |from| ports[from.index()].parking.rouse())
    }

    /// Takes a part of what has completed: what it leads to goes to the device while the rest is taken. All at once, and
    /// device and core would wait for each other in turns.
    fn take_completions(&mut self, machine: &mut M) -> bool {
        self.disk.reap(&mut self.reaped);
        self.completions.extend(self.reaped.drain(..));
        let some = COMPLETIONS_MIN.max(machine.ops_under_way() / COMPLETIONS_SHARE).min(self.completions.len());
        for completion in self.completions.drain(..some) {
            self.flushes -= usize::from(matches!(completion.op, DiskOp::Flush { .. }));
            machine.complete(completion);
        }
        some > 0
    }

    /// Whether the watermark has reached what the shard waits for.
    fn is_durable(&self, machine: &M) -> bool {
        machine.waits_for().is_some_and(|lsn| lsn <= self.order.watermark())
    }

    /// Wakes the shards that wait for what has become durable.
    fn announce(&mut self) {
        let watermark = self.order.watermark();
        if watermark > self.seen {
            self.seen = watermark;
            let own = self.id.index();
            let others = self.shared.ports.iter().enumerate().filter(|(shard, _)| *shard != own);
            raised(others.map(|(_, port)| &port.parking), watermark);
        }
    }

    fn hand_over(&mut self) {
        let ports = &self.shared.ports;
        self.lanes.hand_over(|to| ports[to.index()].parking.rouse());
    }

    fn rest(&mut self, machine: &M) {
        match self.pace {
            // A worker of the kernel flushes, maybe on this very core.
            Pace::For(_) if self.flushes > 0 => {}
            Pace::For(us) if self.now.saturating_sub(self.active_at) >= us => {}
            _ => return std::hint::spin_loop(),
        }
        let timeout = self.due.map(|at| at.saturating_sub(self.now));
        if timeout == Some(0) {
            return;
        }
        // While the shard accepts nothing, requests in the inbox are no reason to stay awake.
        let accepting = machine.accepting();
        let has_work = || {
            (accepting && !self.port().inbox.is_empty())
                || self.lanes.has_work()
                || self.local.has_work(accepting)
                || self.is_durable(machine)
                || self.shared.is_abandoned()
        };
        if self.port().parking.park(machine.waits_for(), has_work) {
            self.disk.wait(timeout);
            self.port().parking.awake();
        }
    }
}
