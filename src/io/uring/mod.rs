//! The ring disk: our own io_uring, driven by the thread that submits.
//!
//! ```text
//!   submit --> operation (cut into spans) --> queue --push--> submission queue == kernel ==> completions --reap--> out
//!                                               ^---------- the rest of short transfers ---------'
//!   flush ---> flush_queue of a file, shared by all disks: one that leads puts an fsync into its ring, the others get mail
//!   allocate -> allocator thread, which sends mail; then as flush
//! ```
//! Invariants
//! 1. Each span is in `queue`, or with the kernel in one slot; its operation counts it until its last result is there.
//!    No operation is handed back, and no memory freed, while the kernel has one of its spans.
//! 2. Operations beyond the ring's depth wait in `queue`, which the owner bounds by what it has under way.
//! 3. One system call per lap takes everything submitted since; `submit` makes none, but for a file's first use.
//! 4. Whoever waits here sleeps in the ring with a read of an eventfd in it, so other threads can end that.
//! 5. A ring that polls takes no flush and no eventfd (the kernel refuses them): they have a second ring then.
//! 6. A transfer that the device refuses for now (`EAGAIN`) goes again after a pause, by a timer in the ring.
//! 7. Dropping waits for everything in flight. If the kernel can't be asked any more, the memory is leaked instead.
//!
//! A ring belongs to the thread that made it: `UringDisk` is not `Send`. It does *not* order operations or retry a flush.

mod allocator_thread;
mod buffers;
mod entries;
mod fixed_files;
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
use super::flush::{Cover, FlushBatch, FlushQueue, FlushWaiter, NextLeader, RemoteEvent, RemoteEvents};
use super::report::{DiskReport, Polling};
use super::store_file::StoreFile;
use super::waker::{DiskWaker, Sleep};
use super::{Completion, Disk, DiskOp, FileId, OpId};
use crate::base::Micros;
use crate::base::error::{Error, ErrorKind, Result};
use crate::memory::Mapping;
use allocator_thread::AllocatorThread;
use buffers::Buffers;
use entries::{EVENT, Entries, TIMER};
use fixed_files::FixedFiles;
use op::{Op, Span};
use ring::Ring;
use slab::Slab;
use std::collections::VecDeque;
use std::marker::PhantomData;
use std::sync::Arc;

/// Calls in a row by which a polling ring is asked before the owner gets a turn.
const POLLS: u32 = 64;
/// How long to sleep at most while the kernel has refused to take something.
const REFUSED_US: Micros = 1000;

/// A batch that this disk leads.
struct LedBatch {
    batch: FlushBatch,
    /// Syncs whose end is awaited.
    left: u32,
    result: Result<()>,
}

/// A sync to be submitted: the batch, and which of its files.
type Sync = (u32, u32);

/// Files as the store's disk, through a ring of this thread's own.
pub struct UringDisk {
    main: Ring,
    /// For what a polling ring refuses.
    second: Option<Ring>,
    entries: Entries,
    files: Arc<Files>,
    flush_queue: Arc<FlushQueue>,
    fixed_files: FixedFiles,
    buffers: Buffers,
    ops: Slab<Op>,
    queue: VecDeque<Span>,
    /// What the device would not take: put back into `queue` when the timer has run out.
    refused: Vec<Span>,
    syncs: VecDeque<Sync>,
    led_batches: Slab<LedBatch>,
    /// Operations that wait for mail, each as often as it waits.
    remote_pending: usize,
    done: Vec<Completion>,
    taken: Vec<(u64, i32)>,
    sleep: Arc<Sleep>,
    remote_events: Arc<RemoteEvents>,
    allocator: Option<AllocatorThread>,
    disks_count: usize,
    polling: Polling,
    /// Nothing more is given to the kernel but what others wait for.
    closing: bool,
    not_send: PhantomData<*const ()>,
}

impl UringDisk {
    /// One more disk over these files, for the thread that calls this.
    ///
    /// # Errors
    /// `Unsupported` if io_uring can't be used here, with the reason; take the portable disk then.
    pub fn with_files(files: Arc<Files>, options: &UringOptions) -> Result<UringDisk> {
        probe().map_err(|why| Error::new(ErrorKind::Unsupported, why))?;
        let polling = match options.polling {
            true => probe::polling(&files),
            false => Polling::Off("not asked for".into()),
        };
        let polled = polling == Polling::On;
        Self::with_rings(files, options, polling, polled)
    }

    fn with_rings(files: Arc<Files>, options: &UringOptions, polling: Polling, two: bool) -> Result<UringDisk> {
        let depth = options.ring_entries.clamp(4, 4096).next_power_of_two();
        let making = |e| Error::new(ErrorKind::Unsupported, probe::refused("making a ring", &e));
        let main = Ring::new(depth, polling == Polling::On).map_err(making)?;
        let second = if two { Some(Ring::new(depth.min(16), false).map_err(making)?) } else { None };
        let sleep =
            Sleep::new().map_err(|e| Error::io("making an eventfd (is the limit of open files reached?)", e))?;
        let sleep = Arc::new(sleep);
        let remote_events = RemoteEvents::new(DiskWaker::of_sleep(sleep.clone()));
        Ok(UringDisk {
            fixed_files: FixedFiles::new(main.get()),
            entries: Entries::new((depth + second.as_ref().map_or(0, |_| 16)) as usize),
            main,
            second,
            flush_queue: files.new_flush_queue(),
            files,
            buffers: Buffers::default(),
            ops: Slab::new(),
            queue: VecDeque::new(),
            refused: Vec::new(),
            syncs: VecDeque::new(),
            led_batches: Slab::new(),
            remote_pending: 0,
            done: Vec::new(),
            taken: Vec::new(),
            sleep,
            remote_events,
            allocator: None,
            disks_count: options.disks_count,
            polling,
            closing: false,
            not_send: PhantomData,
        })
    }

    /// What ends this disk's present or next wait, from any thread.
    pub fn waker(&self) -> DiskWaker {
        DiskWaker::of_sleep(self.sleep.clone())
    }

    /// What the machine gives.
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

    fn finish(&mut self, id: OpId, op: DiskOp, result: Result<()>) {
        self.done.push(Completion { id, op, result });
    }

    fn begin_flush(&mut self, id: OpId, op: DiskOp) {
        let DiskOp::Flush { files } = &op else { unreachable!("only flushes are flushed") };
        let named: Vec<_> = files.iter().map(|&file| self.files.file(file)).collect();
        match self.files.to_flush(&named) {
            Ok(wanted) if !wanted.is_empty() => {
                let op = Op::untransferred(id, op, 0);
                let key = self.ops.insert(op) as u32;
                // All counted before the first joins: it may fail at once.
                self.ops[key as usize].left = wanted.len() as u32;
                self.remote_pending += wanted.len();
                for file in wanted {
                    let waiter = FlushWaiter::Ring(self.remote_events.clone(), key);
                    if let Some(batch) = self.files.join(&self.flush_queue, &file, Cover::AnyFile, waiter) {
                        self.lead(batch);
                    }
                }
            }
            other => self.finish(id, op, other.map(drop)),
        }
    }

    fn lead(&mut self, batch: FlushBatch) {
        let files_count = batch.files().len() as u32;
        let key = self.led_batches.insert(LedBatch { batch, left: files_count, result: Ok(()) }) as u32;
        self.syncs.extend((0..files_count).map(|file| (key, file)));
    }

    fn begin_allocation(&mut self, id: OpId, op: DiskOp) {
        let DiskOp::Allocate { file, from, to } = op else { unreachable!("only allocations are allocated") };
        if let Err(error) = self.files.may_write("allocation", file) {
            return self.finish(id, op, Err(error));
        }
        let allocator = match &mut self.allocator {
            Some(allocator) => allocator,
            none => {
                match AllocatorThread::start(self.files.clone(), self.flush_queue.clone(), self.remote_events.clone()) {
                    Ok(allocator) => none.insert(allocator),
                    Err(error) => return self.finish(id, op, Err(error)),
                }
            }
        };
        let op = Op::untransferred(id, op, 1);
        let key = self.ops.insert(op) as u32;
        self.remote_pending += 1;
        allocator.send(key, self.files.file(file), from..to);
    }

    /// Moves what waits into the submission queues, as far as they have room.
    fn fill(&mut self) {
        let control = self.second.as_mut().unwrap_or(&mut self.main);
        while control.has_room() {
            let Some((key, file)) = self.syncs.pop_front() else { break };
            let file: &StoreFile = &self.led_batches[key as usize].batch.files()[file as usize];
            self.entries.sync(control, key, file);
        }
        if let Some(us) = self.refused.iter().map(|span| span.backoff.pause_us()).max() {
            self.entries.start_timer(control, us);
        }
        while self.main.has_room() {
            let Some(span) = self.queue.pop_front() else { break };
            let op = &self.ops[span.op as usize];
            self.entries.transfer(&mut self.main, &self.files, op, span);
        }
    }

    /// Takes the completions that are there, and the mail.
    fn collect(&mut self) {
        let mut taken = std::mem::take(&mut self.taken);
        self.main.take(&mut taken);
        if let Some(second) = &mut self.second {
            second.take(&mut taken);
        }
        for (name, result) in taken.drain(..) {
            self.landed(name, result);
        }
        self.taken = taken;
        if self.remote_events.has_any() {
            for mail in self.remote_events.take() {
                match mail {
                    RemoteEvent::PartEnded(key, result) => {
                        self.remote_pending -= 1;
                        self.part_done(key, result.err());
                    }
                    RemoteEvent::Lead(batch) => self.lead(batch),
                }
            }
        }
    }

    fn landed(&mut self, name: u64, result: i32) {
        match name {
            EVENT => return self.entries.event_read(),
            TIMER => {
                self.entries.timer_ended();
                return self.queue.extend(self.refused.drain(..));
            }
            _ => {}
        }
        match self.entries.free(name) {
            entries::Slot::Span(span) => {
                self.main.completed();
                self.span_landed(span, result);
            }
            entries::Slot::Sync(key) => {
                self.second.as_mut().unwrap_or(&mut self.main).completed();
                self.sync_landed(key, result);
            }
        }
    }

    fn sync_landed(&mut self, key: u32, result: i32) {
        let led_batches = &mut self.led_batches[key as usize];
        led_batches.left -= 1;
        if result < 0 && led_batches.result.is_ok() {
            // Interrupted, too: whether anything was lost by then is not known.
            let cause = std::io::Error::from_raw_os_error(-result);
            led_batches.result = Err(self.files.error(led_batches.batch.files()[0].id(), "flushing", cause));
        }
        if led_batches.left == 0 {
            let LedBatch { batch, result, .. } = self.led_batches.remove(key as usize);
            let leader =
                if self.closing { NextLeader::AnotherIfAny(Some(&self.remote_events)) } else { NextLeader::Same };
            if let Some(next) = batch.end(result, leader) {
                self.lead(next);
            }
        }
    }

    /// One of the things that an operation waits for has ended.
    fn part_done(&mut self, key: u32, error: Option<Error>) {
        let op = &mut self.ops[key as usize];
        op.left -= 1;
        if op.error.is_none() {
            op.error = error;
        }
        if op.left == 0 {
            let Op { id, op, error, .. } = self.ops.remove(key as usize);
            self.finish(id, op, error.map_or(Ok(()), Err));
        }
    }

    fn hand_over(&mut self) {
        loop {
            self.fill();
            self.main.submit();
            if let Some(second) = &mut self.second {
                second.submit();
            }
            // The queue may have been longer than the ring; what the kernel refuses waits for the next lap.
            if self.queue.is_empty() || !self.main.has_room() || self.main.has_unsubmitted() {
                return;
            }
        }
    }

    fn has_news(&mut self) -> bool {
        !self.done.is_empty()
            || self.remote_events.has_any()
            || self.main.has_completion()
            || self.second.as_mut().is_some_and(Ring::has_completion)
    }

    fn sleep_in_ring(&mut self, timeout_us: Option<Micros>) {
        if self.second.is_some() && self.main.in_flight() > 0 {
            // The device tells nobody: it has to be asked. One call may return with nothing.
            for _ in 0..POLLS {
                if !self.main.wait(None) || self.has_news() || self.main.broken().is_some() {
                    return;
                }
            }
            return;
        }
        let control = self.second.as_mut().unwrap_or(&mut self.main);
        self.entries.read_event(control, &self.sleep);
        let refused = control.has_unsubmitted() && self.entries.is_event_read_submitted();
        control.wait(if refused { Some(timeout_us.unwrap_or(REFUSED_US).min(REFUSED_US)) } else { timeout_us });
    }

    fn broken(&self) -> Option<&std::io::Error> {
        self.main.broken().or_else(|| self.second.as_ref().and_then(Ring::broken))
    }

    fn assert_whole(&self) {
        if let Some(e) = self.broken() {
            panic!("io_uring_enter failed, so that nothing can be said of what is in flight: {e}");
        }
    }

    fn kernel_has_something(&self) -> bool {
        let second = self.second.as_ref().map_or(0, Ring::in_flight);
        self.main.in_flight() + second > 0 || self.remote_pending > 0 || !self.led_batches.is_empty()
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
        self.hand_over();
        self.assert_whole();
    }

    fn register(&mut self, memory: Mapping) {
        assert!(self.buffers.offered() == 0, "memory is registered once");
        self.buffers = Buffers::register(self.main.get(), memory, self.disks_count);
    }

    fn reap(&mut self, out: &mut Vec<Completion>) {
        self.collect();
        // The next batch of flushes, the rest of a short transfer: the caller pushes only when an operation has ended.
        let untimed = !self.refused.is_empty() && !self.entries.is_timer_set();
        if self.done.is_empty() && (untimed || !self.queue.is_empty() || !self.syncs.is_empty()) {
            self.hand_over();
        }
        self.assert_whole();
        out.append(&mut self.done);
    }

    fn wait(&mut self, timeout_us: Option<Micros>) {
        // In this order: what completes may leave more to hand over, and that must not sleep with us.
        self.collect();
        self.hand_over();
        if !self.has_news() && timeout_us != Some(0) && self.sleep.prepare() {
            self.sleep_in_ring(timeout_us);
            self.sleep.awake();
            self.collect();
        }
        self.assert_whole();
    }

    fn calls(&self) -> u64 {
        self.main.calls + self.second.as_ref().map_or(0, |second| second.calls)
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
        for span in std::mem::take(&mut self.queue).into_iter().chain(std::mem::take(&mut self.refused)) {
            self.part_done(span.op, None);
        }
        while self.kernel_has_something() && self.broken().is_none() {
            self.hand_over();
            if !self.has_news() && self.sleep.prepare() {
                self.sleep_in_ring(None);
                self.sleep.awake();
            }
            self.collect();
        }
        while self.entries.is_event_read_submitted() && self.broken().is_none() {
            self.sleep.ring();
            self.second.as_mut().unwrap_or(&mut self.main).wait(Some(REFUSED_US));
            self.collect();
        }
        if self.broken().is_some() {
            // With them the lock stays: what is in flight may still be written.
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
