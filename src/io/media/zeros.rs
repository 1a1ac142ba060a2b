//! Zeros that are really written: what a file grows by, so that overwriting it changes no metadata
//! any more.
//!
//! Invariants
//! 1. Nothing outside of the range is written.
//! 2. Only whole blocks count as written: a short write continues after the last one.
//!
//! It does *not* flush.

use crate::base::BLOCK;
use crate::io::backoff::Backoff;
use crate::io::cancel::Cancel;
use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use smallvec::SmallVec;
use std::fs::File;
use std::io;
use std::ops::Range;

/// Calls in a row without a whole block after which writing is given up.
const STALLS_MAX: u32 = 4;
/// Zeros are written from memory of this size, which stays in the processor's cache.
const ZEROS_BYTES: usize = 1 << 20;
/// Pieces of that in one call. The kernel has all of them at the device at a time, so that a device
/// with a long latency is kept busy; a cancelled allocation waits for one call at most.
const ZEROS_PIECES: usize = 4;

/// Zeros at an address that direct I/O takes.
#[repr(C, align(4096))]
struct Zeros([u8; ZEROS_BYTES]);
static ZEROS: Zeros = Zeros([0; ZEROS_BYTES]);

/// Writes zeros to these bytes of `file`. `CANCELED` if it was cancelled meanwhile.
pub(super) fn write_zeros(
    file: &File,
    bytes: Range<u64>,
    cancel: &Cancel,
) -> rustix::io::Result<()> {
    if bytes.is_empty() {
        return Ok(());
    }
    let (mut at, to) = (bytes.start, bytes.end);
    // Asking for the space at once keeps it in one piece. Some file systems can't; then the writes
    // below get it.
    if let Err(e @ (Errno::NOSPC | Errno::DQUOT)) =
        rustix::fs::fallocate(file, FallocateFlags::KEEP_SIZE, at, to - at)
    {
        return Err(e);
    }
    let (mut backoff, mut stalls) = (Backoff::default(), 0);
    while at < to {
        if cancel.is_cancelled() {
            return Err(Errno::CANCELED);
        }
        let pieces = zeros(to - at);
        match rustix::io::pwritev(file, &pieces, at) {
            // A short write continues at the last whole block; a part of a block is written again.
            Ok(n) => {
                stalls = if n >= BLOCK { 0 } else { stalls + 1 };
                if n == 0 || stalls >= STALLS_MAX {
                    return Err(Errno::IO);
                }
                at += (n - n % BLOCK) as u64;
                backoff = Backoff::default();
            }
            Err(e) => backoff.pause(e, cancel)?,
        }
    }
    Ok(())
}

/// The pieces that one call writes if `bytes` zeros remain.
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

    /// A hole in what should be zeros that were written is metadata in front of a commit.
    #[test]
    fn zeros_cover_what_is_left_and_no_more() {
        for bytes in
            [4096, ZEROS_BYTES as u64, ZEROS_BYTES as u64 + 4096, 3 << 20, 8 << 20, 100 << 20]
        {
            let pieces = zeros(bytes);
            let total: usize = pieces.iter().map(|piece| piece.len()).sum();
            assert_eq!(total as u64, bytes.min((ZEROS_BYTES * ZEROS_PIECES) as u64));
        }
    }
}
