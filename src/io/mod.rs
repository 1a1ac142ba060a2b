//! The disk seam: the engine touches a device only through the trait [`Disk`].
//!
//! An operation owns the memory that it reads into or writes from, from `submit` until its
//! completion hands it back: until then a buffer belongs to the kernel, even after a cancellation.
//!
//! Every implementation guarantees
//! 1. An operation completes exactly once, with `Ok` only if every byte was transferred: short
//!    transfers are continued, `EINTR` and `EAGAIN` are retried after pauses for at most half a
//!    minute, and any other failure is an error, whatever its number.
//! 2. `Flush` covers the writes that had *completed* before it was submitted, and no others. A
//!    failed flush is never repeated and called good.
//! 3. Completions come in any order.
//! 4. Files are named by their role, so that one device with regions can stand for all of them.
//!
//! It does *not*: checksum, retry at another place, or know what the bytes mean.

mod backoff;
mod cancel;
mod cancellable;
mod directory_probe;
mod driver;
mod files;
mod flush;
mod kernel;
mod media;
mod opener;
mod report;
mod store_file;
mod threads;
pub mod uring;
mod uring_unavailable;
mod waker;

pub use cancel::Cancel;
pub(crate) use cancellable::CancellableDisk;
pub(crate) use directory_probe::DirectoryProbe;
pub(crate) use driver::disk_over;
pub use files::{FileOptions, Files};
#[cfg(test)]
pub use flush::FlushChoice;
pub use flush::FlushMethod;
pub(crate) use kernel::check as check_kernel;
pub(crate) use media::DirectIo;
#[cfg(test)]
pub use media::PageCache;
pub use media::{Access, BlockDevice, Creation};
pub(crate) use opener::Opener;
pub use report::{DiskReport, Polling};
pub use threads::{PortableDisk, PortableOptions};
pub(crate) use uring_unavailable::ProcessLimits;
pub use uring_unavailable::{UnavailableReason, UringUnavailable};
pub use waker::DiskWaker;

use crate::base::error::{Error, Result};
use crate::base::{Micros, SegmentNo, ShardId};
use crate::memory::{Frame, FrameRef, Mapping};
use smallvec::SmallVec;
use std::fmt;

/// A file or region of the store, by its role.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum FileId {
    /// Superblock copies and root slots.
    Meta,
    /// The extent table.
    Table,
    /// Extents: all pages and map nodes.
    Data,
    /// A segment of a shard's log.
    Log(ShardId, SegmentNo),
}

impl fmt::Display for FileId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            FileId::Meta => write!(f, "meta"),
            FileId::Table => write!(f, "extents"),
            FileId::Data => write!(f, "data"),
            FileId::Log(shard, segment) => write!(f, "log-{:03}-{:04}", shard.get(), segment.get()),
        }
    }
}

/// Bytes to write: `len` bytes from `start` of a pinned frame. Both are multiples of 4 KiB.
#[derive(Clone)]
pub struct IoSlice {
    /// The frame; it is pinned, so it does not change.
    pub frame: FrameRef,
    /// First byte within the frame.
    pub start: u32,
    /// Bytes.
    pub len: u32,
}

impl IoSlice {
    /// The whole frame.
    pub fn whole(frame: FrameRef) -> Self {
        let len = frame.len() as u32;
        IoSlice { frame, start: 0, len }
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.frame[self.start as usize..(self.start + self.len) as usize]
    }
}

/// One operation. Offsets and lengths are multiples of 4 KiB; lists have 1 to 256 entries.
pub enum DiskOp {
    /// Fills the frames, in order, from consecutive bytes beginning at `offset`.
    Read {
        /// The file.
        file: FileId,
        /// First byte.
        offset: u64,
        /// The frames to fill.
        into: SmallVec<[Frame; 4]>,
    },
    /// Writes the slices, in order, to consecutive bytes beginning at `offset`, in one vectored
    /// write. The range must have been allocated. Nothing is durable until a later flush.
    Write {
        /// The file.
        file: FileId,
        /// First byte.
        offset: u64,
        /// The bytes to write.
        from: SmallVec<[IoSlice; 4]>,
    },
    /// Makes all completed writes to these files durable.
    Flush {
        /// The files.
        files: SmallVec<[FileId; 4]>,
    },
    /// Creates the file if it is missing and makes the bytes `from..to` exist, as zeros. On
    /// completion they are durable, the directory entry too, and overwriting them changes no
    /// metadata.
    Allocate {
        /// The file.
        file: FileId,
        /// First byte.
        from: u64,
        /// The byte after the last.
        to: u64,
    },
}

impl DiskOp {
    /// Whether it covers whole blocks, and at least one: direct I/O accepts nothing else.
    pub fn is_aligned(&self) -> bool {
        let whole = |bytes: u64| bytes.is_multiple_of(crate::base::BLOCK as u64);
        match self {
            DiskOp::Read { offset, into, .. } => whole(*offset) && !into.is_empty(),
            DiskOp::Write { offset, from, .. } => {
                let bytes: u64 = from.iter().map(|slice| u64::from(slice.len)).sum();
                whole(*offset) && whole(bytes) && bytes > 0
            }
            DiskOp::Flush { files } => !files.is_empty(),
            DiskOp::Allocate { from, to, .. } => whole(*from) && whole(*to) && from < to,
        }
    }

    /// `read`, `write`, `flush` or `allocate`, for messages.
    pub fn name(&self) -> &'static str {
        match self {
            DiskOp::Read { .. } => "read",
            DiskOp::Write { .. } => "write",
            DiskOp::Flush { .. } => "flush",
            DiskOp::Allocate { .. } => "allocate",
        }
    }

    /// Bytes that it transfers.
    pub fn bytes(&self) -> u64 {
        match self {
            DiskOp::Read { into, .. } => into.iter().map(|f| f.len() as u64).sum(),
            DiskOp::Write { from, .. } => from.iter().map(|s| u64::from(s.len)).sum(),
            DiskOp::Flush { .. } => 0,
            DiskOp::Allocate { from, to, .. } => to - from,
        }
    }
}

impl fmt::Debug for DiskOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DiskOp::Read { file, offset, .. } | DiskOp::Write { file, offset, .. } => {
                write!(f, "{} {file} {offset}+{}", self.name(), self.bytes())
            }
            DiskOp::Flush { files } => write!(f, "flush {files:?}"),
            DiskOp::Allocate { file, from, to } => write!(f, "allocate {file} {from}..{to}"),
        }
    }
}

/// An operation's identifier, chosen by the submitter.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct OpId(pub u64);

/// A completed operation: its id, the operation itself with its buffers, and its result.
pub struct Completion {
    /// As submitted.
    pub id: OpId,
    /// The operation, handed back.
    pub op: DiskOp,
    /// `Ok` only if the whole operation was carried out.
    pub result: Result<(), Error>,
}

/// A device, or several, with the store's files on it.
pub trait Disk {
    /// Starts an operation. Never blocks for long; the implementation queues what the device can't
    /// take yet. It may hold operations back until the next [`push`](Self::push) or
    /// [`wait`](Self::wait), so that one system call submits many.
    fn submit(&mut self, id: OpId, op: DiskOp);

    /// Submits the queued operations to the device. Called once per turn, after the operations.
    fn push(&mut self) {}

    /// Registers the memory of all operations with the kernel, where that helps. Called once,
    /// before the first operation.
    fn register(&mut self, memory: Mapping) {
        drop(memory);
    }

    /// Appends the completions that have arrived since, without waiting.
    fn reap(&mut self, out: &mut Vec<Completion>);

    /// Waits until a completion may have arrived, a waker has woken this disk's thread, or
    /// `timeout_us` has passed.
    fn wait(&mut self, timeout_us: Option<Micros>);

    /// Counts the system calls that have submitted operations or waited for them.
    fn calls(&self) -> u64 {
        0
    }

    /// The length of a file in bytes, `None` if it does not exist.
    fn len(&mut self, file: FileId) -> Result<Option<u64>>;

    /// The files that exist, sorted by role.
    fn files(&mut self) -> Result<Vec<FileId>>;
}

/// Runs one operation to completion: for opening, recovery and verification, which do one thing
/// after another. No other operation may be in flight.
///
/// # Errors
/// The operation's own.
pub fn execute(disk: &mut dyn Disk, op: DiskOp) -> Result<DiskOp> {
    disk.submit(OpId(u64::MAX), op);
    let mut done = Vec::new();
    loop {
        disk.reap(&mut done);
        if let Some(completion) = done.pop() {
            assert!(
                done.is_empty() && completion.id == OpId(u64::MAX),
                "an operation was in flight"
            );
            return completion.result.map(|()| completion.op);
        }
        disk.wait(None);
    }
}

#[cfg(test)]
mod bench_tests;
#[cfg(test)]
mod store_tests;
#[cfg(test)]
mod tests;
