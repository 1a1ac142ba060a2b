//! The ring disk: our own io_uring, driven by the thread that submits.
//!
//! ```text
//!   submit --> operation (spans) --> queue --push--> submission queue = kernel => completions
//!                                      ^----- the remainder of short transfers ------' \--reap-->
//!   flush ----> a flush batch, shared by all disks: the disk that leads it puts an fsync into its
//!               ring, the others get an event
//!   allocate -> the allocator thread, which sends an event; then as flush
//! ```
//! Invariants
//! 1. Each span is in `queue`, or with the kernel in one slot; its operation counts it until its
//!    last result has arrived. No operation is handed back, and no memory freed, while the kernel
//!    has one of its spans.
//! 2. Operations beyond the ring's depth wait in `queue`, which the owner bounds by the operations
//!    that it has in flight.
//! 3. One system call per turn of the owner submits everything queued since the last one; `submit`
//!    makes none, except for a file's first use.
//! 4. A thread that waits here sleeps in the ring with a read of an eventfd in it, so that other
//!    threads can wake it.
//! 5. A ring that polls takes no flush and no eventfd, since the kernel refuses them: they go into
//!    a control ring.
//! 6. A transfer that the device refuses for now (`EAGAIN`) is submitted again after a pause, timed
//!    by the ring.
//! 7. Dropping the disk waits for everything in flight. If the ring is broken, so that waiting is
//!    impossible, the memory is leaked.
//!
//! A ring belongs to the thread that made it: `UringDisk` is not `Send`. It does *not* order
//! operations or retry a flush.

mod allocator_thread;
mod buffers;
mod entries;
mod fixed_files;
mod flushes;
mod iovec;
mod op;
mod options;
mod probe;
mod ring;
mod transfers;

pub use options::UringOptions;
pub use probe::probe;
pub(crate) use probe::probe_ordinary;

use super::files::Files;
use super::flush::{FlushQueue, OpIdx, RemoteEvent, RemoteEvents};
use super::report::{DiskReport, Polling};
use super::waker::{DiskWaker, Sleep};
use super::{Completion, Disk, DiskOp, FileId, OpId};
use crate::base::Micros;
use crate::base::error::{Error, ErrorKind, Result};
use crate::memory::Mapping;
use allocator_thread::AllocatorThread;
use buffers::Buffers;
use entries::{EVENT_READ, Entries, InFlight, TIMER};
use fixed_files::FixedFiles;
use flushes::{LedBatch, QueuedSync};
use op::{Op, Span};
use ring::{Ring, RingMode};
use slab::Slab;
use std::collections::VecDeque;
use std::marker::PhantomData;
use std::sync::Arc;

/// How often a polled device is checked before the owner gets a turn.
const POLLS: u32 = 64;
/// The longest sleep while the kernel refuses to take an entry.
const REFUSED_US: Micros = 1000;
/// The entries of a ring: fewer than the minimum keep no device busy, and the kernel grants no more
/// than the maximum.
const DEPTH_MIN: u32 = 4;
const DEPTH_MAX: u32 = 4096;
/// Entries of the control ring, which only has the syncs of a few batches.
const CONTROL_DEPTH: u32 = 16;

const _: () = assert!(
    DEPTH_MIN.is_power_of_two() && DEPTH_MAX.is_power_of_two() && CONTROL_DEPTH.is_power_of_two()
);

/// Where flushes, the eventfd and the timer go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum ControlRing {
    /// Into the ring of the transfers.
    Main,
    /// Into a ring of their own.
    Own,
}

/// A disk over a store's files, through a ring that belongs to one thread.
pub struct UringDisk {
    main: Ring,
    /// Takes what a polling ring refuses: flushes, the eventfd, the timer.
    control: Option<Ring>,
    entries: Entries,
    files: Arc<Files>,
    flush_queue: Arc<FlushQueue>,
    fixed_files: FixedFiles,
    buffers: Buffers,
    ops: Slab<Op>,
    queue: VecDeque<Span>,
    /// Spans that the device refused for now. They go back into `queue` when the timer expires.
    retries: Vec<Span>,
    syncs: VecDeque<QueuedSync>,
    led_batches: Slab<LedBatch>,
    /// Events that operations of this disk still wait for.
    remote_pending: usize,
    completions: Vec<Completion>,
    /// User data and results as they were reaped; kept for its capacity.
    reaped: Vec<(u64, i32)>,
    sleep: Arc<Sleep>,
    remote_events: Arc<RemoteEvents>,
    allocator: Option<AllocatorThread>,
    disks_count: usize,
    polling: Polling,
    /// Set while the disk is being dropped: only what other disks wait for is still submitted.
    closing: bool,
    not_send: PhantomData<*const ()>,
}

impl UringDisk {
    /// Makes a disk over these files, for the calling thread.
    ///
    /// # Errors
    /// `Unsupported` if io_uring can't be used here, with the reason; use the portable disk then.
    pub fn with_files(files: Arc<Files>, options: &UringOptions) -> Result<UringDisk> {
        probe().map_err(|why| Error::new(ErrorKind::Unsupported, why))?;
        let polling = match options.polling {
            true => probe::polling(&files),
            false => Polling::Off("not asked for".into()),
        };
        let control = if polling == Polling::On { ControlRing::Own } else { ControlRing::Main };
        Self::with_rings(files, options, polling, control)
    }

    fn with_rings(
        files: Arc<Files>,
        options: &UringOptions,
        polling: Polling,
        control: ControlRing,
    ) -> Result<UringDisk> {
        let depth = options.ring_entries.clamp(DEPTH_MIN, DEPTH_MAX).next_power_of_two();
        let mode = if polling == Polling::On { RingMode::Polled } else { RingMode::Interrupts };
        let making = |e| Error::new(ErrorKind::Unsupported, probe::refused("creating a ring", &e));
        let main = Ring::new(depth, mode).map_err(making)?;
        let control_depth = depth.min(CONTROL_DEPTH);
        let control = match control {
            ControlRing::Own => {
                Some(Ring::new(control_depth, RingMode::Interrupts).map_err(making)?)
            }
            ControlRing::Main => None,
        };
        let sleep = Sleep::new().map_err(|e| {
            Error::io("creating an eventfd (is the limit of open files reached?)", e)
        })?;
        let sleep = Arc::new(sleep);
        let remote_events = RemoteEvents::new(DiskWaker::of_sleep(sleep.clone()));
        Ok(UringDisk {
            fixed_files: FixedFiles::new(main.get()),
            entries: Entries::new(depth + control.as_ref().map_or(0, |_| control_depth)),
            main,
            control,
            flush_queue: files.new_flush_queue(),
            files,
            buffers: Buffers::default(),
            ops: Slab::new(),
            queue: VecDeque::new(),
            retries: Vec::new(),
            syncs: VecDeque::new(),
            led_batches: Slab::new(),
            remote_pending: 0,
            completions: Vec::new(),
            reaped: Vec::new(),
            sleep,
            remote_events,
            allocator: None,
            disks_count: options.disks_count,
            polling,
            closing: false,
            not_send: PhantomData,
        })
    }

    /// Returns a waker, which ends this disk's current or next wait from any thread.
    pub fn waker(&self) -> DiskWaker {
        DiskWaker::of_sleep(self.sleep.clone())
    }

    /// Reports what was found when the disk was opened.
    pub fn report(&self) -> DiskReport {
        DiskReport {
            driver: "io_uring",
            depth: self.main.entries() as usize,
            ring_entries: self.main.entries(),
            fixed_bytes: self.buffers.registered(),
            offered_bytes: self.buffers.offered(),
            polling: self.polling.clone(),
            ..self.files.report()
        }
    }

    fn complete(&mut self, id: OpId, op: DiskOp, result: Result<()>) {
        self.completions.push(Completion { id, op, result });
    }

    fn begin_allocation(&mut self, id: OpId, op: DiskOp) {
        let DiskOp::Allocate { file, from, to } = op else {
            unreachable!("only allocations are allocated")
        };
        if let Err(error) = self.files.may_write("allocation", file) {
            return self.complete(id, op, Err(error));
        }
        let allocator = match &mut self.allocator {
            Some(allocator) => allocator,
            none => {
                match AllocatorThread::start(
                    self.files.clone(),
                    self.flush_queue.clone(),
                    self.remote_events.clone(),
                ) {
                    Ok(allocator) => none.insert(allocator),
                    Err(error) => return self.complete(id, op, Err(error)),
                }
            }
        };
        let op = Op::untransferred(id, op, 1);
        let op = OpIdx(self.ops.insert(op) as u32);
        self.remote_pending += 1;
        allocator.send(op, self.files.file(file), from..to);
    }

    /// Moves queued spans and syncs into the submission queues, as far as they have room.
    fn fill_submission_queues(&mut self) {
        let control = self.control.as_mut().unwrap_or(&mut self.main);
        while control.has_room() {
            let Some(QueuedSync { batch, file }) = self.syncs.pop_front() else { break };
            let file = &self.led_batches[batch.0 as usize].batch.files()[file];
            self.entries.sync(control, batch, file);
        }
        if let Some(us) = self.retries.iter().map(|span| span.backoff.pause_us()).max() {
            self.entries.start_timer(control, us);
        }
        while self.main.has_room() {
            let Some(span) = self.queue.pop_front() else { break };
            let op = &self.ops[span.op.0 as usize];
            self.entries.transfer(&mut self.main, &self.files, op, span);
        }
    }

    /// Handles the completions and the remote events that have arrived.
    fn handle_events(&mut self) {
        let mut reaped = std::mem::take(&mut self.reaped);
        self.main.reap(&mut reaped);
        if let Some(control) = &mut self.control {
            control.reap(&mut reaped);
        }
        for (user_data, result) in reaped.drain(..) {
            self.entry_completed(user_data, result);
        }
        self.reaped = reaped;
        if self.remote_events.has_any() {
            for event in self.remote_events.take() {
                match event {
                    RemoteEvent::PartEnded(op, result) => {
                        assert!(self.remote_pending > 0, "an event that no operation waits for");
                        self.remote_pending -= 1;
                        self.part_ended(op, result.err());
                    }
                    RemoteEvent::Lead(batch) => self.lead(batch),
                }
            }
        }
    }

    fn entry_completed(&mut self, user_data: u64, result: i32) {
        match user_data {
            EVENT_READ => return self.entries.event_read(),
            TIMER => {
                self.entries.timer_ended();
                return self.queue.extend(self.retries.drain(..));
            }
            _ => {}
        }
        match self.entries.free(user_data) {
            InFlight::Span(span) => {
                self.main.completed();
                self.span_completed(span, result);
            }
            InFlight::Sync(batch) => {
                self.control.as_mut().unwrap_or(&mut self.main).completed();
                self.sync_completed(batch, result);
            }
        }
    }

    /// Records that a span, a flush or an allocation that an operation waits for has ended.
    fn part_ended(&mut self, at: OpIdx, error: Option<Error>) {
        let op = &mut self.ops[at.0 as usize];
        op.assert_state();
        op.pending -= 1;
        if op.error.is_none() {
            op.error = error;
        }
        if op.pending == 0 {
            let Op { id, op, error, .. } = self.ops.remove(at.0 as usize);
            self.complete(id, op, error.map_or(Ok(()), Err));
        }
    }

    fn submit_queued(&mut self) {
        loop {
            self.fill_submission_queues();
            self.main.submit();
            if let Some(control) = &mut self.control {
                control.submit();
            }
            // The queue may have been longer than the ring, so go round again. What the kernel
            // refuses waits for the next turn.
            if self.queue.is_empty() || !self.main.has_room() || self.main.has_unsubmitted() {
                return;
            }
        }
    }

    fn has_events(&mut self) -> bool {
        !self.completions.is_empty()
            || self.remote_events.has_any()
            || self.main.has_completion()
            || self.control.as_mut().is_some_and(Ring::has_completion)
    }

    fn sleep_in_ring(&mut self, timeout_us: Option<Micros>) {
        if self.control.is_some() && self.main.in_flight() > 0 {
            // A polled device raises no interrupts: it has to be checked, and one call may find
            // nothing.
            for _ in 0..POLLS {
                if !self.main.wait(None) || self.has_events() || self.main.broken().is_some() {
                    return;
                }
            }
            return;
        }
        let control = self.control.as_mut().unwrap_or(&mut self.main);
        self.entries.read_event(control, &self.sleep);
        let refused = control.has_unsubmitted() && self.entries.is_event_read_submitted();
        control.wait(if refused {
            Some(timeout_us.unwrap_or(REFUSED_US).min(REFUSED_US))
        } else {
            timeout_us
        });
    }

    fn broken(&self) -> Option<&std::io::Error> {
        self.main.broken().or_else(|| self.control.as_ref().and_then(Ring::broken))
    }

    fn assert_not_broken(&self) {
        if let Some(e) = self.broken() {
            panic!("io_uring_enter failed, so that the state of what is in flight is unknown: {e}");
        }
    }

    fn kernel_has_something(&self) -> bool {
        let control = self.control.as_ref().map_or(0, Ring::in_flight);
        self.main.in_flight() + control > 0
            || self.remote_pending > 0
            || !self.led_batches.is_empty()
    }
}

impl Disk for UringDisk {
    fn submit(&mut self, id: OpId, op: DiskOp) {
        match op {
            DiskOp::Read { .. } | DiskOp::Write { .. } => self.begin_transfer(id, op),
            DiskOp::Flush { .. } => self.begin_flush(id, op),
            DiskOp::Allocate { .. } => self.begin_allocation(id, op),
        }
    }

    fn push(&mut self) {
        self.submit_queued();
        self.assert_not_broken();
    }

    fn register(&mut self, memory: Mapping) {
        assert!(self.buffers.offered() == 0, "memory is registered once");
        self.buffers = Buffers::register(self.main.get(), memory, self.disks_count);
    }

    fn reap(&mut self, out: &mut Vec<Completion>) {
        self.handle_events();
        // Submit the next flush batch or the remainder of a short transfer now: the caller pushes
        // only once an operation has ended.
        let untimed = !self.retries.is_empty() && !self.entries.is_timer_set();
        if self.completions.is_empty()
            && (untimed || !self.queue.is_empty() || !self.syncs.is_empty())
        {
            self.submit_queued();
        }
        self.assert_not_broken();
        out.append(&mut self.completions);
    }

    fn wait(&mut self, timeout_us: Option<Micros>) {
        // The order matters: a completion may queue more to submit, which must not wait while this
        // sleeps.
        self.handle_events();
        self.submit_queued();
        if !self.has_events() && timeout_us != Some(0) && self.sleep.prepare() {
            self.sleep_in_ring(timeout_us);
            self.sleep.awake();
            self.handle_events();
        }
        self.assert_not_broken();
    }

    fn calls(&self) -> u64 {
        self.main.calls + self.control.as_ref().map_or(0, |control| control.calls)
    }

    fn len(&mut self, file: FileId) -> Result<Option<u64>> {
        self.files.len(&self.files.file(file))
    }

    fn files(&mut self) -> Result<Vec<FileId>> {
        Ok(self.files.existing())
    }
}

impl Drop for UringDisk {
    fn drop(&mut self) {
        self.closing = true;
        for span in
            std::mem::take(&mut self.queue).into_iter().chain(std::mem::take(&mut self.retries))
        {
            self.part_ended(span.op, None);
        }
        while self.kernel_has_something() && self.broken().is_none() {
            self.submit_queued();
            if !self.has_events() && self.sleep.prepare() {
                self.sleep_in_ring(None);
                self.sleep.awake();
            }
            self.handle_events();
        }
        while self.entries.is_event_read_submitted() && self.broken().is_none() {
            self.sleep.ring();
            self.control.as_mut().unwrap_or(&mut self.main).wait(Some(REFUSED_US));
            self.handle_events();
        }
        if self.broken().is_some() {
            // Leaking the files keeps the lock as well: what is in flight may still be written.
            std::mem::forget((std::mem::take(&mut self.ops), self.files.clone()));
            self.entries.leak();
            return;
        }
        self.buffers.unregister(self.main.get());
        self.fixed_files.unregister(self.main.get());
    }
}

#[cfg(test)]
mod tests;
