//! Writes zeros to the device: a file grows by these, so that overwriting it later changes no
//! metadata.
//!
//! Invariants
//! 1. Nothing outside the range is written.
//! 2. Only whole blocks count as written: a short write continues after the last whole one.
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

/// Writing fails after this many calls in a row that complete no whole block.
const STALLS_MAX: u32 = 4;
/// Zeros are written from memory of this size, which stays in the processor's cache.
const ZEROS_BYTES: usize = 1 << 20;
/// Pieces of that size in one call. The kernel sends all of them to the device at once, which keeps
/// a device with a long latency busy; a cancelled allocation waits for one call at most.
const ZEROS_PIECES: usize = 4;

/// Zeros at an address that direct I/O accepts.
#[repr(C, align(4096))]
struct Zeros([u8; ZEROS_BYTES]);
static ZEROS: Zeros = Zeros([0; ZEROS_BYTES]);

/// Writes zeros to these bytes of `file`. `CANCELED` if it is cancelled on the way.
pub(super) fn write_zeros(
    file: &File,
    bytes: Range<u64>,
    cancel: &Cancel,
) -> rustix::io::Result<()> {
    if bytes.is_empty() {
        return Ok(());
    }
    let (mut at, to) = (bytes.start, bytes.end);
    // Allocating all of the space at once keeps it contiguous. Some file systems can't; then the
    // writes below allocate it.
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

    /// A hole where zeros should have been written makes a later commit wait for a change of
    /// metadata.
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
