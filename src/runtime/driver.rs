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
use super::machine::{Deed, Machine};
use super::meter::Meter;
use super::shared::{Brought, Port, Shared};
use crate::base::{Lsn, Micros, ShardId};
use crate::engine::Response;
use crate::engine::order::GlobalOrder;
use crate::io::{Completion, Disk, DiskOp};
use crate::mesh::{Lanes, raised};
use std::collections::VecDeque;
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
pub(super) struct Rig<M: Machine> {
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
pub(super) struct Driver<M: Machine, D: Disk> {
    rig: Rig<M>,
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

impl<M: Machine, D: Disk> Driver<M, D> {
    pub(super) fn new(rig: Rig<M>, mut disk: D) -> Self {
        if let Some(memory) = rig.machine.mapping() {
            disk.register(memory);
        }
        let (now, seen, meter) = (rig.clock.now(), Lsn::ZERO, Meter::new(rig.clock));
        Driver {
            local: Local::new(rig.id, rig.shared.clone(), rig.requests_max, rig.request_bytes_max),
            rig,
            disk,
            meter,
            answered: Answered::default(),
            reaped: Vec::new(),
            completions: VecDeque::new(),
            flushes: 0,
            seen,
            due: None,
            turned: false,
            failure_told: false,
            now,
            active_at: now,
        }
    }

    pub(super) fn machine(&self) -> &M {
        &self.rig.machine
    }

    /// One lap. After an idle one the caller lets it [`rest`](Self::rest_if).
    pub(super) fn lap(&mut self) -> Lap {
        if self.rig.shared.is_abandoned() {
            return Lap::Ended;
        }
        let mut busy = self.take_requests();
        busy |= self.take_messages();
        busy |= self.take_completions();
        self.now = self.rig.clock.now();
        if busy || self.is_due() {
            self.rig.machine.turn(self.now);
            self.turned = true;
            self.tell_failure();
            busy |= self.carry_out();
            self.due = self.rig.machine.deadline();
            self.announce();
            self.disk.push();
        }
        self.hand_over();
        self.meter.lap();
        busy |= self.local.run();
        let machine = &self.rig.machine;
        if machine.is_closed() && machine.ops_under_way() == 0 && self.rig.lanes.is_handed_over() {
            return Lap::Ended;
        }
        if busy {
            self.active_at = self.now;
            return Lap::Busy;
        }
        Lap::Idle
    }

    /// Tells whoever waits for the end of the store that it takes no writes any more.
    fn tell_failure(&mut self) {
        if !self.failure_told
            && let Some(error) = self.rig.machine.failure()
        {
            self.failure_told = true;
            self.rig.shared.fail(error);
        }
    }

    fn port(&self) -> &Port {
        &self.rig.shared.ports[usize::from(self.rig.id.get())]
    }

    fn take_requests(&mut self) -> bool {
        let mut any = false;
        let machine = &mut self.rig.machine;
        let port = &self.rig.shared.ports[usize::from(self.rig.id.get())];
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

    fn take_messages(&mut self) -> bool {
        let Rig { machine, lanes, shared, .. } = &mut self.rig;
        lanes.take(
            |from, message| machine.message(from, message),
            |from| shared.ports[usize::from(from.get())].parking.rouse(),
        )
    }

    /// Takes a part of what has completed: what it leads to goes to the device while the rest is taken. All at once, and
    /// device and core would wait for each other in turns.
    fn take_completions(&mut self) -> bool {
        self.disk.reap(&mut self.reaped);
        self.completions.extend(self.reaped.drain(..));
        let some =
            COMPLETIONS_MIN.max(self.rig.machine.ops_under_way() / COMPLETIONS_SHARE).min(self.completions.len());
        for completion in self.completions.drain(..some) {
            self.flushes -= usize::from(matches!(completion.op, DiskOp::Flush { .. }));
            self.rig.machine.complete(completion);
        }
        some > 0
    }

    fn is_due(&self) -> bool {
        !self.turned || self.due.is_some_and(|at| at <= self.now) || self.is_durable()
    }

    /// Whether the watermark has reached what the shard waits for.
    fn is_durable(&self) -> bool {
        self.rig.machine.waits_for().is_some_and(|lsn| lsn <= self.rig.order.watermark())
    }

    fn carry_out(&mut self) -> bool {
        let mut any = false;
        while let Some(deed) = self.rig.machine.next_deed() {
            any = true;
            match deed {
                Deed::Submit(id, op) => {
                    self.flushes += usize::from(matches!(op, DiskOp::Flush { .. }));
                    self.meter.submitted(&op);
                    self.disk.submit(id, op);
                }
                Deed::Send(to, message) => self.rig.lanes.send(to, message),
                Deed::Reply(token, mut result) => {
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
                        self.rig.shared.inflight.complete(token, result);
                    }
                }
            }
        }
        std::mem::take(&mut self.answered).leave(&self.rig.shared, self.port());
        any
    }

    /// Wakes the shards that wait for what has become durable.
    fn announce(&mut self) {
        let watermark = self.rig.order.watermark();
        if watermark > self.seen {
            self.seen = watermark;
            let own = usize::from(self.rig.id.get());
            let others = self.rig.shared.ports.iter().enumerate().filter(|(shard, _)| *shard != own);
            raised(others.map(|(_, port)| &port.parking), watermark);
        }
    }

    fn hand_over(&mut self) {
        let ports = &self.rig.shared.ports;
        self.rig.lanes.hand_over(|to| ports[usize::from(to.get())].parking.rouse());
    }

    /// If nothing happened: polls on, or waits.
    pub(super) fn rest_if(&mut self, lap: Lap) {
        if lap == Lap::Idle {
            self.rest();
        }
    }

    fn rest(&mut self) {
        match self.rig.pace {
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
        let accepting = self.rig.machine.accepting();
        let has_work = || {
            (accepting && !self.port().inbox.is_empty())
                || self.rig.lanes.has_work()
                || self.local.has_work(accepting)
                || self.is_durable()
                || self.rig.shared.is_abandoned()
        };
        if self.port().parking.park(self.rig.machine.waits_for(), has_work) {
            self.disk.wait(timeout);
            self.port().parking.awake();
        }
    }

    /// Ends: first what is in flight, then the tasks, then those who wait. The files have been let go on return.
    pub(super) fn end(self) {
        let Driver { rig, disk, local, meter, answered, .. } = self;
        let Rig { id, machine, shared, lanes, .. } = rig;
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            drop(disk);
            drop(machine);
            drop(lanes);
            local.end();
        }));
        if panicked.is_err() {
            tracing::error!(shard = id.get(), "ending the shard panicked");
        }
        let port = &shared.ports[usize::from(id.get())];
        // Not given back if a waker panicked.
        answered.leave(&shared, port);
        shared.close_port(port, meter.open());
    }
}
