//! Operations as system calls: each to its end, or an error with file, offset and length.
//!
//! Invariants
//! 1. `Ok` means every byte: short transfers are continued, `EINTR` and `EAGAIN` repeated after a pause.
//! 2. An allocation writes `from..to` and nothing else. If it fails, or is cancelled, the file has its former length
//!    again.
//!
//! It runs on threads of the disks' and may wait as long as the device does. It does *not* decide when to flush.

use super::backoff::Backoff;
use super::files::{Files, StoreFile};
use super::flush::{Leader, Round};
use super::{Cancel, DiskOp, FileId, IoSlice};
use crate::base::BLOCK;
use crate::base::error::{Error, ErrorKind, Result};
use crate::memory::Frame;
use rustix::fs::FallocateFlags;
use rustix::io::{Errno, ReadWriteFlags};
use smallvec::SmallVec;
use std::fs::File;
use std::io;
use std::sync::PoisonError;
use std::time::Duration;

/// Linux takes at most this many pieces in one call.
const IOV_MAX: usize = 1024;
/// Fruitless calls in a row after which a transfer is given up.
const STALLS_MAX: u32 = 4;
/// Zeros are written from memory of this size, which stays in the processor's cache.
const ZEROS_BYTES: usize = 1 << 20;
/// Pieces of that in one call. The kernel has all of them at the device at a time, so that a device with a long latency is
/// kept busy; a cancelled allocation waits for one call at most.
const ZEROS_PIECES: usize = 4;

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
            read_fully(open, *offset, &mut parts, files.cancel()).map_err(|e| context("read", *file, *offset, len, e))
        }
        DiskOp::Write { file, offset, from } => {
            files.may_write("write", *file)?;
            let open = existing(files, stored)?;
            let flags = write_flags(files, *file);
            write_fully(open, *offset, from, flags, files.cancel())
                .map_err(|e| context("write", *file, *offset, len, e))
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
    file.get().ok_or_else(|| files.missing(file.id()))
}

fn parts_mut(into: &mut [Frame], id: FileId) -> Result<SmallVec<[&mut [u8]; 8]>> {
    let parts = into.iter_mut().map(|frame| frame.try_mut());
    parts.collect::<Option<_>>().ok_or_else(|| {
        Error::invalid(format_args!("a read of `{id}` into a frame that is pinned: its readers would see it change"))
    })
}

/// Fills `parts` from `offset` on.
fn read_fully(file: &File, offset: u64, parts: &mut [&mut [u8]], cancel: &Cancel) -> io::Result<()> {
    let total: usize = parts.iter().map(|p| p.len()).sum();
    let mut progress = Progress::new(total, cancel);
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
fn write_fully(file: &File, offset: u64, slices: &[IoSlice], flags: ReadWriteFlags, cancel: &Cancel) -> io::Result<()> {
    let total: usize = slices.iter().map(|s| s.len as usize).sum();
    let mut progress = Progress::new(total, cancel);
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
struct Progress<'c> {
    done: usize,
    total: usize,
    stalls: u32,
    backoff: Backoff,
    cancel: &'c Cancel,
}

impl<'c> Progress<'c> {
    fn new(total: usize, cancel: &'c Cancel) -> Self {
        Progress { done: 0, total, stalls: 0, backoff: Backoff::default(), cancel }
    }

    /// Bytes already transferred, `None` if that is all.
    fn rest(&self) -> Option<usize> {
        (self.done < self.total).then_some(self.done)
    }

    /// Takes in what a call said; `dry` is the error if it makes no headway.
    fn advance(&mut self, outcome: rustix::io::Result<usize>, dry: io::ErrorKind) -> io::Result<()> {
        match outcome {
            Ok(n) => {
                self.backoff = Backoff::default();
                let reached = (self.done + n).min(self.total);
                let block = if reached == self.total { reached } else { reached - reached % BLOCK };
                self.stalls = if block > self.done { 0 } else { self.stalls + 1 };
                self.done = block.max(self.done);
                if n == 0 || self.stalls >= STALLS_MAX {
                    return Err(io::Error::new(dry, format!("only {reached} bytes could be transferred")));
                }
                Ok(())
            }
            Err(e) => pause(&mut self.backoff, e, self.cancel).map_err(Into::into),
        }
    }
}

/// Pauses if `e` says that it may work later. Otherwise it is the error, as it is if it has not worked for long, or if
/// nobody wants it any more.
#[allow(clippy::disallowed_methods, reason = "the kernel tells nobody when it would take it")]
fn pause(backoff: &mut Backoff, e: Errno, cancel: &Cancel) -> rustix::io::Result<()> {
    if !matches!(e, Errno::INTR | Errno::AGAIN) || cancel.is_cancelled() {
        return Err(e);
    }
    let us = backoff.refused().ok_or(e)?;
    std::thread::sleep(Duration::from_micros(us));
    Ok(())
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
    let zeroed = if fits { write_zeros(open, from, to, files.cancel()) } else { Err(Errno::NOSPC) };
    if let Err(e) = zeroed {
        // Space that was taken on the way goes back, or a full disk would stay full.
        let _ = rustix::fs::ftruncate(open, former);
        if e == Errno::CANCELED {
            files.cancel().check()?;
        }
        let doing = format_args!("allocating {} bytes at {from} of", to - from);
        // A limit of file sizes (`ulimit -f`) is room that is not there, too.
        let full = matches!(e, Errno::NOSPC | Errno::DQUOT | Errno::FBIG);
        let error = files.error(id, doing, e.into());
        return Err(if full { error.with_kind(ErrorKind::Full) } else { error });
    }
    files.sync().map_err(|e| files.error(id, "making durable the name of", e))
}

/// Makes `from..to` exist as zeros that were really written: overwriting them changes no metadata any more. `CANCELED` if
/// it was cancelled meanwhile.
fn write_zeros(file: &File, from: u64, to: u64, cancel: &Cancel) -> rustix::io::Result<()> {
    if from == to {
        return Ok(());
    }
    // Asking for the space at once keeps it in one piece. Some file systems can't; then the writes below get it.
    if let Err(e @ (Errno::NOSPC | Errno::DQUOT)) =
        rustix::fs::fallocate(file, FallocateFlags::KEEP_SIZE, from, to - from)
    {
        return Err(e);
    }
    let (mut at, mut backoff, mut stalls) = (from, Backoff::default(), 0);
    while at < to {
        if cancel.is_cancelled() {
            return Err(Errno::CANCELED);
        }
        let pieces = zeros(to - at);
        match rustix::io::pwritev(file, &pieces, at) {
            // A short write goes on at the last whole block; less than a block is written again.
            Ok(n) => {
                stalls = if n >= BLOCK { 0 } else { stalls + 1 };
                if n == 0 || stalls >= STALLS_MAX {
                    return Err(Errno::IO);
                }
                at += (n - n % BLOCK) as u64;
                backoff = Backoff::default();
            }
            Err(e) => pause(&mut backoff, e, cancel)?,
        }
    }
    Ok(())
}

/// What one call writes of `bytes` zeros that are left.
fn zeros(bytes: u64) -> SmallVec<[io::IoSlice<'static>; ZEROS_PIECES]> {
    let piece = |i: usize| match bytes.saturating_sub((i * ZEROS_BYTES) as u64) {
        0 => None,
        left => Some(io::IoSlice::new(&ZEROS.0[..left.min(ZEROS_BYTES as u64) as usize])),
    };
    (0..ZEROS_PIECES).map_while(piece).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    /// A thread that asks a busy device again and again takes a core from those who could make it less busy.
    #[test]
    #[allow(clippy::disallowed_methods, reason = "that time passes is what is tested")]
    fn a_refused_transfer_pauses_and_is_not_counted_as_done() {
        for refusal in [Errno::AGAIN, Errno::INTR] {
            let cancel = Cancel::default();
            let (mut progress, since) = (Progress::new(3 * BLOCK, &cancel), Instant::now());
            progress.advance(Ok(BLOCK), io::ErrorKind::WriteZero).unwrap();
            for _ in 0..6 {
                progress.advance(Err(refusal), io::ErrorKind::WriteZero).unwrap();
                assert_eq!(progress.rest(), Some(BLOCK), "nothing was transferred");
            }
            // 0.1, 0.2, 0.4, 0.8, 1.6 and 3.2 ms.
            assert!(since.elapsed() >= Duration::from_micros(6_300), "{:?}", since.elapsed());
            progress.advance(Ok(2 * BLOCK), io::ErrorKind::WriteZero).unwrap();
            assert_eq!((progress.rest(), progress.backoff), (None, Backoff::default()));
            cancel.cancel();
            let error = progress.advance(Err(refusal), io::ErrorKind::WriteZero).expect_err("nobody wants it");
            assert_eq!(error.raw_os_error(), Some(refusal.raw_os_error()));
        }
    }

    /// A hole in what should be zeros that were written is metadata in front of a commit.
    #[test]
    fn zeros_cover_what_is_left_and_no_more() {
        for bytes in [4096, ZEROS_BYTES as u64, ZEROS_BYTES as u64 + 4096, 3 << 20, 8 << 20, 100 << 20] {
            let pieces = zeros(bytes);
            let total: usize = pieces.iter().map(|piece| piece.len()).sum();
            assert_eq!(total as u64, bytes.min((ZEROS_BYTES * ZEROS_PIECES) as u64));
        }
    }

    /// Nobody may have to wait until gigabytes are zeroed that nobody wants any more; and what was taken goes back.
    #[test]
    fn a_cancelled_allocation_ends_and_leaves_the_file_as_it_was() {
        use crate::base::{SegmentNo, ShardId};
        use crate::io::{Access, FileOptions};
        let dir = tempfile::tempdir().unwrap();
        let options = FileOptions::default();
        let files = Files::open(dir.path(), Access::ReadWrite, &options).unwrap();
        let file = files.file(FileId::Log(ShardId::new(0), SegmentNo::new(0)));
        allocate(&files, &file, 0, 8192).unwrap();
        options.cancel.cancel();
        let error = allocate(&files, &file, 8192, 32 << 20).expect_err("it was cancelled");
        assert_eq!(error.kind(), ErrorKind::Closed, "{error}");
        assert_eq!(files.len(&file).unwrap(), Some(8192));
    }
}
