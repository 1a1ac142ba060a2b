//! The simulated disk: the seam's third driver, on one thread, with a virtual clock and a seed.
//!
//! Invariants
//! 1. The same seed and the same calls give the same completions at the same times, in the same
//!    order.
//! 2. A write becomes visible when it completes and durable only by a flush that was *submitted*
//!    after that. At a power loss each sector of what is not durable is kept or dropped
//!    ([`crash`]).
//! 3. What is written is copied at submission and compared at completion: a buffer that changed in
//!    between is a violation of the seam, as is a transfer outside of what was allocated.
//!    Violations end the run.
//! 4. After the power is cut nothing changes any more and every operation fails, so that a crash
//!    can be injected into code that holds the disk as `&mut dyn Disk`, recovery above all.
//! 5. After a flush of a file has failed every later one of that file fails, whoever asks: what one
//!    shard's flush has lost may be another shard's, for whom a flush that succeeds would prove
//!    nothing.
//!
//! It does *not* know what the bytes mean, and is not told which of them matter.

mod crash;
mod damage;
mod device;
mod fault;
mod file;
#[cfg(test)]
mod tests;

pub use crash::Loss;
pub use damage::{Damage, DamageCounters};
pub use fault::{Area, DiskCounters, EIO, ENOSPC, ERRNOS, Fault, OpKind, SHORT, is_of_the_device};
pub use file::{SECTOR, SECTORS};

use crate::base::error::Result;
use crate::base::{BLOCK, Micros};
use crate::io::{Completion, Disk, DiskOp, FileId, OpId};
use crate::testing::random::Rng;
use device::{State, power_is_off};
use file::{Block, SimFile};
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

/// A simulated disk; clones are handles to the same disk.
#[derive(Clone)]
pub struct SimDisk(Rc<RefCell<State>>);

/// How long operations take, in microseconds: uniformly distributed between two values.
#[derive(Clone, Copy, Debug)]
pub struct Latency {
    /// Reads.
    pub read: (Micros, Micros),
    /// Writes.
    pub write: (Micros, Micros),
    /// Flushes.
    pub flush: (Micros, Micros),
    /// Additional time for each block of a write.
    pub block: Micros,
    /// One in this many operations takes up to a hundred times as long.
    pub stall_one_in: u64,
    /// One in `.0` reads takes up to `.1` times as long; 0 for none.
    pub slow_reads: (u64, u64),
}

impl Default for Latency {
    fn default() -> Self {
        Latency {
            read: (5, 150),
            write: (10, 300),
            flush: (30, 1500),
            block: 0,
            stall_one_in: 500,
            slow_reads: (0, 1),
        }
    }
}

impl SimDisk {
    /// An empty disk.
    pub fn new(seed: u64) -> Self {
        SimDisk::with(Rng::new(seed), BTreeMap::new(), 0, Rc::new([0; BLOCK]))
    }

    fn with(rng: Rng, files: BTreeMap<FileId, SimFile>, now: Micros, zero: Block) -> Self {
        SimDisk(Rc::new(RefCell::new(State {
            now,
            rng,
            latency: Latency::default(),
            files,
            flying: Vec::new(),
            landing: Vec::new(),
            number: 0,
            done: 0,
            events: 0,
            power_off_at: None,
            is_off: false,
            faults: Vec::new(),
            unflushable: BTreeMap::new(),
            counters: DiskCounters::default(),
            violation: None,
            trace: 0,
            zero,
            read: None,
        })))
    }

    /// The virtual time.
    pub fn now(&self) -> Micros {
        self.0.borrow().now
    }

    /// Moves the clock; it never goes back.
    pub fn advance_to(&self, now: Micros) {
        let mut state = self.0.borrow_mut();
        state.now = state.now.max(now);
    }

    /// When the next operation completes.
    pub fn next_due(&self) -> Option<Micros> {
        self.0.borrow().flying.iter().map(|flying| flying.due).min()
    }

    /// Operations in flight.
    pub fn in_flight(&self) -> usize {
        self.0.borrow().flying.len()
    }

    /// Sets how long operations take.
    pub fn set_latency(&self, latency: Latency) {
        self.0.borrow_mut().latency = latency;
    }

    /// Plans an error.
    pub fn inject(&self, fault: Fault) {
        self.0.borrow_mut().faults.push(fault);
    }

    /// Submits an operation that takes `factor` times as long as usual.
    pub fn submit_slowly(&self, id: OpId, op: DiskOp, factor: u64) {
        self.0.borrow_mut().submit(id, op, factor);
    }

    /// Forgets the planned errors.
    pub fn clear_faults(&self) {
        self.0.borrow_mut().faults.clear();
    }

    /// Cuts the power after `events` more submissions and completions.
    pub fn cut_power_after(&self, events: u64) {
        let mut state = self.0.borrow_mut();
        state.power_off_at = Some(state.events + events);
        state.cut_power_if_due();
    }

    /// Submissions and completions so far.
    pub fn events(&self) -> u64 {
        self.0.borrow().events
    }

    /// Cancels a planned power cut.
    pub fn keep_power(&self) {
        self.0.borrow_mut().power_off_at = None;
    }

    /// Whether the power is cut.
    pub fn is_off(&self) -> bool {
        self.0.borrow().is_off
    }

    /// What happened so far on this disk.
    pub fn counters(&self) -> DiskCounters {
        self.0.borrow().counters
    }

    /// The first breach of the seam's rules, if there was one.
    pub fn violation(&self) -> Option<String> {
        self.0.borrow().violation.clone()
    }

    /// A hash of everything that was submitted and completed, with times and contents.
    pub fn trace(&self) -> u64 {
        self.0.borrow().trace
    }

    /// The contents of a block of a file, as a read would return them.
    ///
    /// # Panics
    /// If there is no such block.
    pub fn block(&self, file: FileId, number: u64) -> Vec<u8> {
        self.0.borrow().files[&file].block(number).expect("the block exists").visible().to_vec()
    }

    /// Begins to record which blocks are read.
    pub fn note_reads(&self) {
        self.0.borrow_mut().read = Some(BTreeSet::new());
    }

    /// The blocks that were read since recording began.
    pub fn take_reads(&self) -> BTreeSet<(FileId, u64)> {
        self.0.borrow_mut().read.take().unwrap_or_default()
    }

    /// The files and their lengths.
    pub fn files(&self) -> Vec<(FileId, u64)> {
        self.0.borrow().files.iter().map(|(&file, content)| (file, content.len())).collect()
    }
}

impl Disk for SimDisk {
    fn submit(&mut self, id: OpId, op: DiskOp) {
        self.submit_slowly(id, op, 1);
    }

    fn reap(&mut self, out: &mut Vec<Completion>) {
        self.0.borrow_mut().reap(out);
    }

    fn wait(&mut self, timeout_us: Option<Micros>) {
        let mut state = self.0.borrow_mut();
        let due = state.flying.iter().map(|flying| flying.due).min();
        let until = match (due, timeout_us) {
            (Some(due), Some(timeout)) => due.min(state.now + timeout),
            (Some(due), None) => due,
            (None, Some(timeout)) => state.now + timeout,
            (None, None) if state.is_off => return,
            (None, None) => {
                panic!("a wait without end: no operation is in flight and no time is given")
            }
        };
        state.now = state.now.max(until);
    }

    fn len(&mut self, file: FileId) -> Result<Option<u64>> {
        let state = self.0.borrow();
        if state.is_off {
            return Err(power_is_off(&format_args!("length of {file}")));
        }
        Ok(state.files.get(&file).map(SimFile::len))
    }

    fn files(&mut self) -> Result<Vec<FileId>> {
        let state = self.0.borrow();
        if state.is_off {
            return Err(power_is_off(&"the files"));
        }
        Ok(state.files.keys().copied().collect())
    }
}
