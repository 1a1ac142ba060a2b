//! Operations as system calls: each to its end, or an error with file, offset and length.
//!
//! Invariants
//! 1. `Ok` means every byte: short transfers are continued, `EINTR` and `EAGAIN` repeated.
//! 2. An allocation writes `from..to` and nothing else. If it fails, the file has its former length again.
//!
//! It runs on threads of the disks' and may wait as long as the device does. It does *not* decide when to flush.

use super::files::{Files, StoreFile};
use super::flush::{Leader, Round};
use super::{DiskOp, FileId, IoSlice};
use crate::error::{Error, ErrorKind, Result};
use crate::pool::Frame;
use crate::types::BLOCK;
use rustix::fs::FallocateFlags;
use rustix::io::{Errno, ReadWriteFlags};
use smallvec::SmallVec;
use std::fs::File;
use std::io;
use std::sync::PoisonError;

/// Linux takes at most this many pieces in one call.
const IOV_MAX: usize = 1024;
/// Fruitless calls in a row after which a transfer is given up.
const STALLS_MAX: u32 = 4;
/// Zeros are written in pieces of this size: large enough for the device, small enough for the processor's cache.
const ZEROS_BYTES: usize = 1 << 20;

/// Zeros at an address that direct I/O takes.
#[repr(C, align(4096))]
struct Zeros([u8; ZEROS_BYTES]);
static ZEROS: Zeros = Zeros([0; ZEROS_BYTES]);

/// Carries out `op`, all of an allocation but its flush; `stored` is the file that it names.
///
/// # Panics
/// On a flush: that is what rounds are for.
pub(super) fn carry_out(files: &Files, stored: &StoreFile, op: &mut DiskOp) -> Result<()> {
    let context = |what: &str, id, offset: u64, len: u64, e: io::Error| {
        files.error(id, format_args!("{what} of {len} bytes at {offset} of"), e)
    };
    let len = op.bytes();
    match op {
        DiskOp::Read { file, offset, into } => {
            let open = existing(files, stored)?;
            let mut parts = parts_mut(into, *file)?;
            read_fully(open, *offset, &mut parts).map_err(|e| context("read", *file, *offset, len, e))
        }
        DiskOp::Write { file, offset, from } => {
            files.may_write("write", *file)?;
            let open = existing(files, stored)?;
            let flags = write_flags(files, *file);
            write_fully(open, *offset, from, flags).map_err(|e| context("write", *file, *offset, len, e))
        }
        DiskOp::Flush { .. } => unreachable!("flushes go in rounds"),
        DiskOp::Allocate { file, from, to } => {
            files.may_write("allocation", *file)?;
            allocate(files, stored, *from, *to)
        }
    }
}

/// Leads rounds on this thread, until there is none or another disk does.
pub(super) fn lead(files: &Files, round: Round) {
    let mut leading = Some(round);
    while let Some(round) = leading {
        let result = round.files().iter().try_for_each(|file| {
            let open = existing(files, file)?;
            rustix::fs::fdatasync(open).map_err(|e| files.error(file.id(), "flushing", e.into()))
        });
        leading = round.end(result, Leader::Leaves(None));
    }
}

/// The flags of writes to this file.
pub(super) fn write_flags(files: &Files, id: FileId) -> ReadWriteFlags {
    if files.writes_durably(id) { ReadWriteFlags::DSYNC } else { ReadWriteFlags::empty() }
}

/// The descriptor of a file that must exist.
pub(super) fn existing<'f>(files: &Files, file: &'f StoreFile) -> Result<&'f File> {
    file.get().ok_or_else(|| files.error(file.id(), "using", io::ErrorKind::NotFound.into()))
}

fn parts_mut(into: &mut [Frame], id: FileId) -> Result<SmallVec<[&mut [u8]; 8]>> {
    let parts = into.iter_mut().map(|frame| frame.try_mut());
    parts.collect::<Option<_>>().ok_or_else(|| {
        Error::invalid(format_args!("a read of `{id}` into a frame that is pinned: its readers would see it change"))
    })
}

/// Fills `parts` from `offset` on.
fn read_fully(file: &File, offset: u64, parts: &mut [&mut [u8]]) -> io::Result<()> {
    let total: usize = parts.iter().map(|p| p.len()).sum();
    let mut progress = Progress::new(total);
    while let Some(done) = progress.rest() {
        let mut skip = done;
        let mut vectors: SmallVec<[io::IoSliceMut<'_>; 64]> = SmallVec::new();
        for part in parts.iter_mut() {
            let skipped = skip.min(part.len());
            skip -= skipped;
            if skipped < part.len() && vectors.len() < IOV_MAX {
                vectors.push(io::IoSliceMut::new(&mut part[skipped..]));
            }
        }
        let outcome = rustix::io::preadv(file, &mut vectors, offset + done as u64);
        progress.advance(outcome, io::ErrorKind::UnexpectedEof)?;
    }
    Ok(())
}

/// Writes `slices` from `offset` on.
fn write_fully(file: &File, offset: u64, slices: &[IoSlice], flags: ReadWriteFlags) -> io::Result<()> {
    let total: usize = slices.iter().map(|s| s.len as usize).sum();
    let mut progress = Progress::new(total);
    while let Some(done) = progress.rest() {
        let mut skip = done;
        let mut vectors: SmallVec<[io::IoSlice<'_>; 64]> = SmallVec::new();
        for slice in slices {
            let bytes = slice.bytes();
            let skipped = skip.min(bytes.len());
            skip -= skipped;
            if skipped < bytes.len() && vectors.len() < IOV_MAX {
                vectors.push(io::IoSlice::new(&bytes[skipped..]));
            }
        }
        let outcome = match flags.is_empty() {
            true => rustix::io::pwritev(file, &vectors, offset + done as u64),
            false => rustix::io::pwritev2(file, &vectors, offset + done as u64, flags),
        };
        progress.advance(outcome, io::ErrorKind::WriteZero)?;
    }
    Ok(())
}

/// How far a transfer has come. It goes on at block boundaries only: direct I/O takes no others, and to transfer a
/// part of a block once more does no harm.
struct Progress {
    done: usize,
    total: usize,
    stalls: u32,
}

impl Progress {
    fn new(total: usize) -> Self {
        Progress { done: 0, total, stalls: 0 }
    }

    /// Bytes already transferred, `None` if that is all.
    fn rest(&self) -> Option<usize> {
        (self.done < self.total).then_some(self.done)
    }

    /// Takes in what a call said; `dry` is the error if it makes no headway.
    fn advance(&mut self, outcome: rustix::io::Result<usize>, dry: io::ErrorKind) -> io::Result<()> {
        match outcome {
            Ok(n) => {
                let reached = (self.done + n).min(self.total);
                let block = if reached == self.total { reached } else { reached - reached % BLOCK };
                self.stalls = if block > self.done { 0 } else { self.stalls + 1 };
                self.done = block.max(self.done);
                if n == 0 || self.stalls >= STALLS_MAX {
                    return Err(io::Error::new(dry, format!("only {reached} bytes could be transferred")));
                }
                Ok(())
            }
            Err(Errno::INTR) => Ok(()),
            Err(Errno::AGAIN) => {
                std::thread::yield_now();
                Ok(())
            }
            Err(e) => Err(e.into()),
        }
    }
}

fn allocate(files: &Files, file: &StoreFile, from: u64, to: u64) -> Result<()> {
    let id = file.id();
    if from > to || !from.is_multiple_of(BLOCK as u64) || !to.is_multiple_of(BLOCK as u64) {
        return Err(Error::invalid(format_args!("an allocation of {from}..{to} in `{id}`: not whole blocks")));
    }
    let _growth = file.growth.lock().unwrap_or_else(PoisonError::into_inner);
    let open = files.open_file(file, true)?;
    let former = files.len(file)?.unwrap_or(0);
    // Asked first: to find out by trying would fill the disk to the brim, and all others on it would feel that.
    let fits = files.has_room(to.saturating_sub(former.max(from)));
    let zeroed = if fits { write_zeros(open, from, to) } else { Err(Errno::NOSPC) };
    if let Err(e) = zeroed {
        // Space that was taken on the way goes back, or a full disk would stay full.
        let _ = rustix::fs::ftruncate(open, former);
        let doing = format_args!("allocating {} bytes at {from} of", to - from);
        let full = matches!(e, Errno::NOSPC | Errno::DQUOT);
        let error = files.error(id, doing, e.into());
        return Err(if full { error.with_kind(ErrorKind::Full) } else { error });
    }
    files.sync().map_err(|e| files.error(id, "making durable the name of", e))
}

/// Makes `from..to` exist as zeros that were really written: overwriting them changes no metadata any more.
fn write_zeros(file: &File, from: u64, to: u64) -> rustix::io::Result<()> {
    if from == to {
        return Ok(());
    }
    // Asking for the space at once keeps it in one piece. Some file systems can't; then the writes below get it.
    if let Err(e @ (Errno::NOSPC | Errno::DQUOT)) =
        rustix::fs::fallocate(file, FallocateFlags::KEEP_SIZE, from, to - from)
    {
        return Err(e);
    }
    let mut at = from;
    while at < to {
        let len = (to - at).min(ZEROS_BYTES as u64) as usize;
        match rustix::io::pwrite(file, &ZEROS.0[..len], at) {
            Ok(0) => return Err(Errno::IO),
            // A short write goes on at the last whole block; less than a block is written again.
            Ok(n) => at += (n - n % BLOCK) as u64,
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => std::thread::yield_now(),
            Err(e) => return Err(e),
        }
    }
    Ok(())
}
