//! Operations as system calls: each is carried out completely, or fails with file, offset and
//! length.
//!
//! Invariants
//! 1. `Ok` means that every byte was transferred: short transfers are continued, `EINTR` and
//!    `EAGAIN` are retried after a pause.
//!
//! It runs on the workers and may wait as long as the device does. It does *not* decide when to
//! flush.

use crate::base::BLOCK;
use crate::base::error::{Error, Result};
use crate::io::backoff::Backoff;
use crate::io::cancel::Cancel;
use crate::io::files::{FileEntry, Files};
use crate::io::flush::{FlushBatch, NextLeader};
use crate::io::{DiskOp, FileId, IoSlice};
use crate::memory::Frame;
use rustix::io::ReadWriteFlags;
use smallvec::SmallVec;
use std::fs::File;
use std::io;

/// Linux takes at most this many pieces in one call.
const IOV_MAX: usize = 1024;
/// A transfer fails after this many calls in a row that complete no whole block.
const STALLS_MAX: u32 = 4;

/// Carries out `op` on `entry`, the file that it names; the flush of an allocation is left to the
/// caller.
///
/// # Panics
/// On a flush, which goes through a batch.
pub(super) fn carry_out(files: &Files, entry: &FileEntry, op: &mut DiskOp) -> Result<()> {
    let len = op.bytes();
    let (what, id) = (op.name(), entry.id());
    let context = |offset: u64, e: io::Error| {
        files.error(id, format_args!("{what} of {len} bytes at {offset} of"), e)
    };
    match op {
        DiskOp::Read { offset, into, .. } => {
            let location = files.location(&entry.file)?;
            let mut parts = parts_mut(into, id)?;
            let address = location.address(*offset, len);
            address
                .and_then(|address| {
                    read_fully(&location.descriptor, address, &mut parts, files.cancel())
                })
                .map_err(|e| context(*offset, e))
        }
        DiskOp::Write { offset, from, .. } => {
            files.may_write(what, id)?;
            let location = files.location(&entry.file)?;
            let flags = files.write_flags(id);
            let address = location.address(*offset, len);
            address
                .and_then(|address| {
                    write_fully(&location.descriptor, address, from, flags, files.cancel())
                })
                .map_err(|e| context(*offset, e))
        }
        DiskOp::Flush { .. } => unreachable!("a flush goes through a batch"),
        DiskOp::Allocate { from, to, .. } => files.grow(entry, *from..*to),
    }
}

/// Leads batches on this thread, until there are none left or another disk leads.
pub(super) fn lead(files: &Files, batch: FlushBatch) {
    let mut led_batches = Some(batch);
    while let Some(batch) = led_batches {
        let result = batch.files().iter().try_for_each(|file| {
            let location = files.location(file)?;
            rustix::fs::fdatasync(&location.descriptor)
                .map_err(|e| files.error(file.id(), "flushing", e.into()))
        });
        led_batches = batch.end(result, NextLeader::AnotherIfAny(None));
    }
}

fn parts_mut(into: &mut [Frame], id: FileId) -> Result<SmallVec<[&mut [u8]; 8]>> {
    let parts = into.iter_mut().map(|frame| frame.try_mut());
    parts.collect::<Option<_>>().ok_or_else(|| {
        Error::invalid(format_args!(
            "a read of `{id}` into a frame that is pinned: its readers would see it change"
        ))
    })
}

/// Fills `parts` from `offset` on.
fn read_fully(
    file: &File,
    offset: u64,
    parts: &mut [&mut [u8]],
    cancel: &Cancel,
) -> io::Result<()> {
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
fn write_fully(
    file: &File,
    offset: u64,
    slices: &[IoSlice],
    flags: ReadWriteFlags,
    cancel: &Cancel,
) -> io::Result<()> {
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

/// The progress of a transfer. It continues only at block boundaries: direct I/O accepts no others,
/// and transferring a part of a block again does no harm.
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

    /// The bytes already transferred; `None` if the transfer is complete.
    fn rest(&self) -> Option<usize> {
        (self.done < self.total).then_some(self.done)
    }

    /// Accounts for the result of a call; `dry` is the error if it transferred nothing.
    fn advance(
        &mut self,
        outcome: rustix::io::Result<usize>,
        dry: io::ErrorKind,
    ) -> io::Result<()> {
        match outcome {
            Ok(n) => {
                self.backoff = Backoff::default();
                let reached = (self.done + n).min(self.total);
                let block = if reached == self.total { reached } else { reached - reached % BLOCK };
                self.stalls = if block > self.done { 0 } else { self.stalls + 1 };
                self.done = block.max(self.done);
                if n == 0 || self.stalls >= STALLS_MAX {
                    return Err(io::Error::new(
                        dry,
                        format!("only {reached} bytes could be transferred"),
                    ));
                }
                Ok(())
            }
            Err(e) => self.backoff.pause(e, self.cancel).map_err(Into::into),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::io::Errno;
    use std::time::{Duration, Instant};

    /// A thread that keeps retrying on a busy device takes a core from the work that would make it
    /// less busy.
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
            // The pauses are 0.1, 0.2, 0.4, 0.8, 1.6 and 3.2 ms.
            assert!(since.elapsed() >= Duration::from_micros(6_300), "{:?}", since.elapsed());
            progress.advance(Ok(2 * BLOCK), io::ErrorKind::WriteZero).unwrap();
            assert_eq!((progress.rest(), progress.backoff), (None, Backoff::default()));
            cancel.cancel();
            let error = progress
                .advance(Err(refusal), io::ErrorKind::WriteZero)
                .expect_err("nobody wants it");
            assert_eq!(error.raw_os_error(), Some(refusal.raw_os_error()));
        }
    }
}
