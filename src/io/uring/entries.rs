//! The entries that the kernel has: what each stands for, and the memory that it points to besides the frames.
//!
//! Invariants
//! 1. Each entry with the kernel has a slot of its own, named in the entry, and a slot is free again only by
//!    [`Entries::free`], when its completion was taken.
//! 2. A slot's list of pieces changes only while the slot is free, and is on the heap, so it stays where it is.
//! 3. There is at most one read of the eventfd, into memory that lives as long as the entries do; and one timer, whose
//!    time the kernel has copied when it took the entry.
//!
//! It does *not* make system calls.
#![allow(unsafe_code)]

use super::iovec::IoVec;
use super::op::{Op, Span, memory_of};
use super::ring::Ring;
use crate::base::Micros;
use crate::io::files::Files;
use crate::io::store_file::StoreFile;
use crate::io::waker::Sleep;
use io_uring::{opcode, squeue, types};
use std::os::fd::AsRawFd;

/// The name of the read of the eventfd.
pub(super) const EVENT: u64 = u64::MAX;
/// The name of the timer.
pub(super) const TIMER: u64 = u64::MAX - 1;

/// What an entry stands for.
#[derive(Clone, Copy)]
pub(super) enum Slot {
    /// A part of a transfer.
    Span(Span),
    /// A sync for the batch with this key.
    Sync(u32),
}

#[derive(Default)]
struct Place {
    /// `None`: free.
    slot: Option<Slot>,
    list: Vec<IoVec>,
}

pub(super) struct Entries {
    places: Vec<Place>,
    free: Vec<u32>,
    /// Where the eventfd's counter goes. Written by the kernel, read by nobody.
    counter: Box<[u8; 8]>,
    event_read: bool,
    time: Box<types::Timespec>,
    timer: bool,
}

impl Entries {
    /// Slots for as many entries as the rings have under way at a time.
    pub(super) fn new(count: usize) -> Entries {
        let places = (0..count).map(|_| Place::default()).collect();
        Entries {
            places,
            free: (0..count as u32).rev().collect(),
            counter: Box::new([0; 8]),
            event_read: false,
            time: Box::default(),
            timer: false,
        }
    }

    fn take_slot(&mut self, slot: Slot) -> usize {
        let Some(at) = self.free.pop() else { panic!("more entries than the rings have room for") };
        let place = &mut self.places[at as usize];
        assert!(place.slot.is_none(), "slot {at} is taken");
        place.slot = Some(slot);
        at as usize
    }

    /// The completion named `name` was taken: what it stood for.
    pub(super) fn free(&mut self, name: u64) -> Slot {
        let slot = self.places.get_mut(name as usize).and_then(|place| place.slot.take());
        let Some(slot) = slot else { panic!("a completion of an entry that was never submitted: {name}") };
        self.free.push(name as u32);
        slot
    }

    /// Puts an entry for `span` of `op` into the ring, which must have room.
    pub(super) fn transfer(&mut self, ring: &mut Ring, files: &Files, op: &Op, span: Span) {
        let Some(target) = &op.target else { panic!("a transfer without a file") };
        let at = self.take_slot(Slot::Span(span));
        let list = &mut self.places[at].list;
        let whole = memory_of(&op.parts, &span, list);
        let offset = op.address + u64::from(span.from);
        let flags = if op.is_write() { files.write_flags(target.id()).bits() as i32 } else { 0 };
        let fd = types::Fd(target.name.number);
        let (pieces, count) = (list.as_ptr().cast(), list.len() as u32);
        let entry: squeue::Entry = match (whole, op.is_write()) {
            (Some(part), true) => match part.buffer {
                Some(buffer) => {
                    opcode::WriteFixed::new(fd, part.at, part.len, buffer).offset(offset).rw_flags(flags).build()
                }
                None => opcode::Write::new(fd, part.at, part.len).offset(offset).rw_flags(flags).build(),
            },
            (Some(part), false) => match part.buffer {
                Some(buffer) => opcode::ReadFixed::new(fd, part.at, part.len, buffer).offset(offset).build(),
                None => opcode::Read::new(fd, part.at, part.len).offset(offset).build(),
            },
            (None, true) => opcode::Writev::new(fd, pieces, count).offset(offset).rw_flags(flags).build(),
            (None, false) => opcode::Readv::new(fd, pieces, count).offset(offset).build(),
        };
        let flags = if target.name.is_slot { squeue::Flags::FIXED_FILE } else { squeue::Flags::empty() };
        let entry = entry.flags(flags).user_data(at as u64);
        // SAFETY: the frames belong to the operation, which is kept until all its spans are back; the list stays as it
        // is until the slot is free (invariant 2); the file is held by the target, and that by the operation. Whoever
        // takes the completion calls `free`, and `completed`.
        unsafe { ring.put(&entry, true) }
    }

    /// Puts an fdatasync into the ring, which must have room.
    pub(super) fn sync(&mut self, ring: &mut Ring, batch: u32, file: &StoreFile) {
        let at = self.take_slot(Slot::Sync(batch));
        // A file that does not exist can't be in a batch; if it were, the kernel would say that -1 is no descriptor.
        let fd = types::Fd(file.location().map_or(-1, |location| location.descriptor.as_raw_fd()));
        let entry = opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build();
        // SAFETY: it points to nothing; the batch holds the file. `free` and `completed` as above.
        unsafe { ring.put(&entry.user_data(at as u64), true) }
    }

    /// Has the ring read the eventfd, if it does not already.
    pub(super) fn read_event(&mut self, ring: &mut Ring, sleep: &Sleep) {
        if self.event_read || !ring.has_slot() {
            return;
        }
        let fd = types::Fd(sleep.event().as_raw_fd());
        let entry = opcode::Read::new(fd, self.counter.as_mut_ptr(), 8).build();
        self.event_read = true;
        // SAFETY: the counter is on the heap and lives until the disk is gone, which waits for this read. It is not
        // counted.
        unsafe { ring.put(&entry.user_data(EVENT), false) }
    }

    /// Has the ring say when `us` have passed, if it is not to say so already.
    pub(super) fn start_timer(&mut self, ring: &mut Ring, us: Micros) {
        if self.timer || !ring.has_slot() {
            return;
        }
        *self.time = types::Timespec::new().sec(us / 1_000_000).nsec((us % 1_000_000) as u32 * 1000);
        let entry = opcode::Timeout::new(&raw const *self.time).build();
        self.timer = true;
        // SAFETY: the time is on the heap, stays as it is while the timer is set, and lives as long as this; a ring that
        // goes with the entry in its queue takes it no more. It is not counted.
        unsafe { ring.put(&entry.user_data(TIMER), false) }
    }

    /// The timer has run out.
    pub(super) fn timer_ended(&mut self) {
        self.timer = false;
    }

    pub(super) fn is_timer_set(&self) -> bool {
        self.timer
    }

    /// The read of the eventfd is back.
    pub(super) fn event_read(&mut self) {
        self.event_read = false;
    }

    pub(super) fn is_event_read_submitted(&self) -> bool {
        self.event_read
    }

    /// Never frees what the kernel may still write to.
    pub(super) fn leak(&mut self) {
        std::mem::forget(std::mem::take(&mut self.places));
        std::mem::forget(std::mem::take(&mut self.counter));
        std::mem::forget(std::mem::take(&mut self.time));
    }
}
