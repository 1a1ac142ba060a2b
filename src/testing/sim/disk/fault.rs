//! Planned errors: which operation fails, how, and how often; and counters of everything that
//! happened.
//!
//! Invariants
//! 1. A fault that never fires counts zero: a test that injects one asserts that it fired.
//!
//! It does *not* decide what a failed operation leaves behind; the disk does, at random.

use crate::base::error::{Error as StoreError, ErrorKind as StoreErrorKind};
use crate::io::{DiskOp, FileId};
use std::io::ErrorKind;

/// Checks that an opening that met an error of the device failed for that reason, and not for
/// another one.
pub fn is_of_the_device(error: &StoreError) -> Result<(), String> {
    match error.kind() {
        StoreErrorKind::Io | StoreErrorKind::Full | StoreErrorKind::Closed => Ok(()),
        kind => {
            Err(format!("opening met an error of the device and failed with {kind:?}: {error}"))
        }
    }
}

/// The kinds of operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpKind {
    /// Reads.
    Read,
    /// Writes.
    Write,
    /// Flushes.
    Flush,
    /// Allocations.
    Allocate,
}

/// Which files a fault is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Area {
    /// Any file.
    Any,
    /// Any log segment.
    Log,
    /// This file.
    File(FileId),
}

/// An error to be injected.
#[derive(Clone, Debug)]
pub struct Fault {
    /// The kind of operation that fails; `None`: any.
    pub kind: Option<OpKind>,
    /// The files.
    pub area: Area,
    /// How many such operations succeed before.
    pub after: u64,
    /// Whether all later ones fail too.
    pub forever: bool,
    /// The system's error number.
    pub errno: i32,
}

/// `EIO`
pub const EIO: i32 = 5;
/// `ENOSPC`
pub const ENOSPC: i32 = 28;
/// Not a system error number: the transfer ended too early, and no more can be transferred.
pub const SHORT: i32 = 0;
/// How operations can fail: `EIO`, `ENODATA` (a medium error of NVMe), `ENOSPC`, `EAGAIN`,
/// `ECANCELED`, `EOPNOTSUPP`, and too short a transfer.
pub const ERRNOS: [i32; 7] = [EIO, 61, ENOSPC, 11, 125, 95, SHORT];

/// The error that the driver makes of an error number.
pub(super) fn error_of(op: &DiskOp, errno: i32) -> StoreError {
    let kind = OpKind::of(op);
    let source = match (errno, kind) {
        (SHORT, OpKind::Read) => ErrorKind::UnexpectedEof.into(),
        (SHORT, _) => ErrorKind::WriteZero.into(),
        _ => std::io::Error::from_raw_os_error(errno),
    };
    let error = StoreError::io(format_args!("{op:?}"), source);
    if (errno, kind) == (ENOSPC, OpKind::Allocate) {
        error.with_kind(crate::ErrorKind::Full)
    } else {
        error
    }
}

/// What the disk did, and what the crashes did to it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiskCounters {
    /// Operations completed without error.
    pub reads: u64,
    /// The same for writes.
    pub writes: u64,
    /// The same for flushes.
    pub flushes: u64,
    /// The same for allocations.
    pub allocations: u64,
    /// Reads that failed as planned.
    pub faults_read: u64,
    /// The same for writes.
    pub faults_write: u64,
    /// The same for flushes.
    pub faults_flush: u64,
    /// The same for allocations.
    pub faults_allocate: u64,
    /// Images made of the disk after a power loss or the death of the process.
    pub crashes: u64,
    /// Volatile sectors that were there after a power loss.
    pub sectors_kept: u64,
    /// Volatile sectors that were not.
    pub sectors_dropped: u64,
    /// Writes of which some sectors were there after a power loss and some were not.
    pub writes_torn: u64,
    /// Writes in flight at a crash.
    pub writes_in_flight: u64,
    /// Allocations in flight at a crash.
    pub allocations_in_flight: u64,
    /// Pairs of a read or write with a write of the same block, both in flight.
    pub overlaps: u64,
    /// Reads of a place that was reused meanwhile: what a slow read should have found was
    /// overwritten.
    pub reads_overwritten: u64,
}

impl DiskCounters {
    /// Adds another disk's.
    pub fn add(&mut self, other: &DiskCounters) {
        let DiskCounters { reads, writes, flushes, allocations, .. } = other;
        self.reads += reads;
        self.writes += writes;
        self.flushes += flushes;
        self.allocations += allocations;
        self.faults_read += other.faults_read;
        self.faults_write += other.faults_write;
        self.faults_flush += other.faults_flush;
        self.faults_allocate += other.faults_allocate;
        self.crashes += other.crashes;
        self.sectors_kept += other.sectors_kept;
        self.sectors_dropped += other.sectors_dropped;
        self.writes_torn += other.writes_torn;
        self.writes_in_flight += other.writes_in_flight;
        self.allocations_in_flight += other.allocations_in_flight;
        self.overlaps += other.overlaps;
        self.reads_overwritten += other.reads_overwritten;
    }

    /// All planned errors that fired.
    pub fn faults(&self) -> u64 {
        self.faults_read + self.faults_write + self.faults_flush + self.faults_allocate
    }

    pub(super) fn count_done(&mut self, kind: OpKind) {
        *match kind {
            OpKind::Read => &mut self.reads,
            OpKind::Write => &mut self.writes,
            OpKind::Flush => &mut self.flushes,
            OpKind::Allocate => &mut self.allocations,
        } += 1;
    }

    pub(super) fn count_fault(&mut self, kind: OpKind) {
        *match kind {
            OpKind::Read => &mut self.faults_read,
            OpKind::Write => &mut self.faults_write,
            OpKind::Flush => &mut self.faults_flush,
            OpKind::Allocate => &mut self.faults_allocate,
        } += 1;
    }
}

impl OpKind {
    /// The kind of an operation.
    pub fn of(op: &DiskOp) -> Self {
        match op {
            DiskOp::Read { .. } => OpKind::Read,
            DiskOp::Write { .. } => OpKind::Write,
            DiskOp::Flush { .. } => OpKind::Flush,
            DiskOp::Allocate { .. } => OpKind::Allocate,
        }
    }
}

impl Area {
    fn holds(self, op: &DiskOp) -> bool {
        let one = |file: FileId| match self {
            Area::Any => true,
            Area::Log => matches!(file, FileId::Log(..)),
            Area::File(wanted) => file == wanted,
        };
        match op {
            DiskOp::Read { file, .. }
            | DiskOp::Write { file, .. }
            | DiskOp::Allocate { file, .. } => one(*file),
            DiskOp::Flush { files } => files.iter().any(|&file| one(file)),
        }
    }
}

impl Fault {
    /// The first such operation after `after` of them fails, once, with `EIO`.
    pub fn once(kind: OpKind, area: Area, after: u64) -> Self {
        Fault { kind: Some(kind), area, after, forever: false, errno: EIO }
    }
}

/// Decides whether an operation that is about to complete fails, and with which error number.
pub(super) fn strike(faults: &mut Vec<Fault>, op: &DiskOp) -> Option<i32> {
    let kind = OpKind::of(op);
    for index in 0..faults.len() {
        let fault = &mut faults[index];
        if fault.kind.is_some_and(|wanted| wanted != kind) || !fault.area.holds(op) {
            continue;
        }
        if fault.after > 0 {
            fault.after -= 1;
            continue;
        }
        let errno = fault.errno;
        if !fault.forever {
            faults.remove(index);
        }
        return Some(errno);
    }
    None
}
