//! The submission entries that are with the kernel: what each stands for, and the memory besides
//! the frames that it points to.
//!
//! Invariants
//! 1. Each entry with the kernel has a slot of its own, named in the entry's user data. Only
//!    [`Entries::free`] frees a slot, once its completion has been reaped.
//! 2. A slot's list of memory ranges changes only while the slot is free, and is on the heap, so it
//!    does not move.
//! 3. There is at most one read of the eventfd, into memory that lives as long as the entries do,
//!    and one timer, whose time the kernel copies when it takes the entry.
//!
//! It does *not* make system calls.
#![allow(unsafe_code)]

use super::iovec::IoVec;
use super::op::{MemoryRange, Op, Span, memory_of};
use super::ring::{Counted, Ring, timespec};
use crate::base::Micros;
use crate::io::files::Files;
use crate::io::store_file::StoreFile;
use crate::io::waker::Sleep;
use io_uring::{opcode, squeue, types};
use std::os::fd::AsRawFd;

/// The user data of the read of the eventfd.
pub(super) const EVENT_READ: u64 = u64::MAX;
/// The user data of the timer.
pub(super) const TIMER: u64 = u64::MAX - 1;
/// Bytes of the eventfd's counter.
const COUNTER_BYTES: usize = 8;

/// What an entry with the kernel stands for.
#[derive(Clone, Copy)]
pub(super) enum InFlight {
    /// A part of a transfer.
    Span(Span),
    /// A sync for a flush batch that this disk leads.
    Sync(BatchIdx),
}

/// The index of a flush batch that this disk leads.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct BatchIdx(pub(super) u32);

/// The index of an entry's slot, which is its user data.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct SlotIdx(u32);

#[derive(Default)]
struct Slot {
    /// `None`: the slot is free.
    in_flight: Option<InFlight>,
    ranges: Vec<IoVec>,
}

pub(super) struct Entries {
    slots: Vec<Slot>,
    free: Vec<SlotIdx>,
    /// The buffer for the eventfd's counter. The kernel writes it; its value is not used.
    counter: Box<[u8; COUNTER_BYTES]>,
    event_read: bool,
    time: Box<types::Timespec>,
    timer: bool,
}

impl Entries {
    /// Makes `count` slots: as many as the entries that the rings have with the kernel at a time.
    pub(super) fn new(count: u32) -> Entries {
        Entries {
            slots: (0..count).map(|_| Slot::default()).collect(),
            free: (0..count).rev().map(SlotIdx).collect(),
            counter: Box::new([0; COUNTER_BYTES]),
            event_read: false,
            time: Box::default(),
            timer: false,
        }
    }

    fn take_slot(&mut self, in_flight: InFlight) -> SlotIdx {
        let Some(at) = self.free.pop() else { panic!("more entries than the rings have room for") };
        let slot = &mut self.slots[at.0 as usize];
        assert!(slot.in_flight.is_none(), "slot {at:?} is taken");
        slot.in_flight = Some(in_flight);
        at
    }

    /// Frees the slot of the reaped completion with this user data. Returns what the entry stood
    /// for.
    pub(super) fn free(&mut self, user_data: u64) -> InFlight {
        let slot = usize::try_from(user_data).ok().and_then(|at| self.slots.get_mut(at));
        let Some(in_flight) = slot.and_then(|slot| slot.in_flight.take()) else {
            panic!("a completion of an entry that was never submitted: {user_data}")
        };
        self.free.push(SlotIdx(user_data as u32));
        assert!(self.free.len() <= self.slots.len(), "a slot was freed twice");
        in_flight
    }

    /// Puts an entry for `span` of `op` into the ring, which must have room.
    pub(super) fn transfer(&mut self, ring: &mut Ring, files: &Files, op: &Op, span: Span) {
        let Some(file) = &op.file else { panic!("a transfer without a file") };
        let at = self.take_slot(InFlight::Span(span));
        let list = &mut self.slots[at.0 as usize].ranges;
        let whole = memory_of(&op.memory, &span, list);
        let address = op.address + u64::from(span.from);
        let rw_flags = if op.is_write() { files.write_flags(file.id()).bits() as i32 } else { 0 };
        let (fd, flags) = file.sqe_file.encode();
        let (list, count) = (list.as_ptr().cast(), list.len() as u32);
        let entry: squeue::Entry = match (whole, op.is_write()) {
            (Some(MemoryRange { at, len, buffer: Some(buffer) }), true) => {
                opcode::WriteFixed::new(fd, at, len, buffer)
                    .offset(address)
                    .rw_flags(rw_flags)
                    .build()
            }
            (Some(MemoryRange { at, len, buffer: None }), true) => {
                opcode::Write::new(fd, at, len).offset(address).rw_flags(rw_flags).build()
            }
            (Some(MemoryRange { at, len, buffer: Some(buffer) }), false) => {
                opcode::ReadFixed::new(fd, at, len, buffer).offset(address).build()
            }
            (Some(MemoryRange { at, len, buffer: None }), false) => {
                opcode::Read::new(fd, at, len).offset(address).build()
            }
            (None, true) => {
                opcode::Writev::new(fd, list, count).offset(address).rw_flags(rw_flags).build()
            }
            (None, false) => opcode::Readv::new(fd, list, count).offset(address).build(),
        };
        let entry = entry.flags(flags).user_data(at.0.into());
        // SAFETY: the frames belong to the operation, which is kept until all its spans have
        // completed; the list does not change until the slot is free (invariant 2); the operation
        // holds the file, and the file its descriptor. Whoever reaps the completion calls `free`
        // and `completed`.
        unsafe { ring.push(&entry, Counted::Yes) }
    }

    /// Puts an fdatasync into the ring, which must have room.
    pub(super) fn sync(&mut self, ring: &mut Ring, batch: BatchIdx, file: &StoreFile) {
        let at = self.take_slot(InFlight::Sync(batch));
        // A file that does not exist can't be in a batch; if it were, the kernel would say that -1
        // is no descriptor.
        let fd = types::Fd(file.location().map_or(-1, |location| location.descriptor.as_raw_fd()));
        let entry = opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build();
        // SAFETY: the entry points to no memory; the batch holds the file. `free` and `completed`
        // are called as above.
        unsafe { ring.push(&entry.user_data(at.0.into()), Counted::Yes) }
    }

    /// Puts a read of the eventfd into the ring, unless there is one already.
    pub(super) fn read_event(&mut self, ring: &mut Ring, sleep: &Sleep) {
        if self.event_read || !ring.has_slot() {
            return;
        }
        let fd = types::Fd(sleep.event().as_raw_fd());
        let entry = opcode::Read::new(fd, self.counter.as_mut_ptr(), COUNTER_BYTES as u32).build();
        self.event_read = true;
        // SAFETY: the counter is on the heap and lives until the disk is dropped, which waits for
        // this read. The entry is not counted.
        unsafe { ring.push(&entry.user_data(EVENT_READ), Counted::No) }
    }

    /// Puts a timer into the ring that expires after `us`, unless one is set already.
    pub(super) fn start_timer(&mut self, ring: &mut Ring, us: Micros) {
        if self.timer || !ring.has_slot() {
            return;
        }
        *self.time = timespec(us);
        let entry = opcode::Timeout::new(&raw const *self.time).build();
        self.timer = true;
        // SAFETY: the time is on the heap, does not change while the timer is set, and lives as
        // long as `self`; a ring that is closed with the entry in its queue never reads it. The
        // entry is not counted.
        unsafe { ring.push(&entry.user_data(TIMER), Counted::No) }
    }

    /// Records that the timer has expired.
    pub(super) fn timer_ended(&mut self) {
        self.timer = false;
    }

    pub(super) fn is_timer_set(&self) -> bool {
        self.timer
    }

    /// Records that the read of the eventfd has completed.
    pub(super) fn event_read(&mut self) {
        self.event_read = false;
    }

    pub(super) fn is_event_read_submitted(&self) -> bool {
        self.event_read
    }

    /// Leaks the memory that the kernel may still write to.
    pub(super) fn leak(&mut self) {
        std::mem::forget(std::mem::take(&mut self.slots));
        std::mem::forget(std::mem::take(&mut self.counter));
        std::mem::forget(std::mem::take(&mut self.time));
    }
}
