//! Reads ranges of files while a store is opened, with many reads in flight.
//!
//! Invariants
//! 1. Bytes are delivered in the order of the ranges, and in each range from front to back,
//!    whatever the order in which the reads complete.
//! 2. At most [`IN_FLIGHT_MAX`] pieces (or as many as the caller allows) of at most
//!    [`PIECE_BLOCKS`] blocks are being read or wait to be delivered: memory does not grow with the
//!    ranges.
//! 3. When a function here returns, also with an error, no operation is in flight: the memory of
//!    the reads is the arena's again.
//!
//! It does *not* check what was read.

use crate::base::BLOCK;
use crate::base::error::{Error, Result};
use crate::io::{Completion, Disk, DiskOp, FileId, OpId};
use crate::memory::{Arena, Frame};
use std::collections::VecDeque;

/// Reads in flight, and pieces that wait to be delivered: enough to keep a fast device busy with
/// pieces of this size.
pub(super) const IN_FLIGHT_MAX: usize = 16;

/// Blocks of the largest piece, a power of two. 256 KiB is near the best throughput of most
/// devices, and below the 512 KiB above which the kernel hands an operation to its worker threads.
const PIECE_BLOCKS: u64 = 64;

/// A range of whole blocks of a file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Range {
    pub file: FileId,
    /// First byte.
    pub offset: u64,
    /// The number of blocks.
    pub blocks: u64,
}

/// A piece of a range, from the submission of its read until it is delivered.
struct Piece {
    /// Index of the range.
    range: usize,
    /// The blocks that it covers.
    of: Range,
    /// The bytes, or the error of the read, once it has completed.
    outcome: Option<Result<Frame>>,
}

/// Divides ranges into pieces.
struct Pieces<I> {
    ranges: I,
    index: usize,
    rest: Option<Range>,
}

impl<I: Iterator<Item = Range>> Pieces<I> {
    /// The next piece, by the index of its range; its number of blocks is a power of two, so that
    /// one frame takes it.
    fn next(&mut self) -> Option<(usize, Range)> {
        while self.rest.is_none_or(|rest| rest.blocks == 0) {
            self.rest = Some(self.ranges.next()?);
            self.index += 1;
        }
        let rest = self.rest.as_mut()?;
        let blocks = 1 << rest.blocks.min(PIECE_BLOCKS).ilog2();
        let piece = Range { blocks, ..*rest };
        rest.offset += blocks * BLOCK as u64;
        rest.blocks -= blocks;
        Some((self.index - 1, piece))
    }
}

/// Reads `ranges` and calls `each` with their bytes: the index of a range, and some whole blocks of
/// it.
///
/// # Errors
/// The first error of a read, or of `each`; `Invalid` if `arena` has no memory for a single piece.
pub(crate) fn read_ranges(
    disk: &mut dyn Disk,
    arena: &mut Arena,
    ranges: impl IntoIterator<Item = Range>,
    mut each: impl FnMut(usize, &[u8]) -> Result<()>,
) -> Result<()> {
    read_pieces(disk, arena, IN_FLIGHT_MAX, ranges, |index, _, piece| each(index, piece?))
}

/// Like [`read_ranges`], with at most `in_flight_max` pieces at a time. `each` also gets the range
/// of the piece, and the error of a piece that can't be read: if it returns `Ok` then, reading
/// continues after that piece.
///
/// # Errors
/// The first error of `each`; `Invalid` if `arena` has no memory for a single piece.
pub(crate) fn read_pieces(
    disk: &mut dyn Disk,
    arena: &mut Arena,
    in_flight_max: usize,
    ranges: impl IntoIterator<Item = Range>,
    mut each: impl FnMut(usize, Range, Result<&[u8]>) -> Result<()>,
) -> Result<()> {
    let mut pieces = Pieces { ranges: ranges.into_iter(), index: 0, rest: None };
    let mut next = pieces.next();
    let mut in_order: VecDeque<Piece> = VecDeque::with_capacity(in_flight_max);
    // The operation of the piece at the front.
    let mut first = 0;
    let mut in_flight = 0;
    let mut failed: Option<Error> = None;
    let mut completions = Vec::new();
    loop {
        while failed.is_none()
            && in_order.len() < in_flight_max
            && let Some((range, of)) = next
        {
            let Some(frame) = arena.alloc(of.blocks.ilog2() as u8) else { break };
            let id = OpId(first + in_order.len() as u64);
            disk.submit(
                id,
                DiskOp::Read { file: of.file, offset: of.offset, into: smallvec::smallvec![frame] },
            );
            in_order.push_back(Piece { range, of, outcome: None });
            in_flight += 1;
            next = pieces.next();
        }
        if in_flight == 0 {
            match failed {
                Some(error) => return Err(error),
                None if next.is_none() => return Ok(()),
                None => return Err(Error::invalid("memory_bytes is too small to open a store")),
            }
        }
        disk.push();
        disk.reap(&mut completions);
        if completions.is_empty() {
            disk.wait(None);
        }
        for Completion { id, op, result } in completions.drain(..) {
            in_flight -= 1;
            let DiskOp::Read { into, .. } = op else { unreachable!("a read completes as a read") };
            let frame = into.into_iter().next().expect("a read has one frame");
            in_order[(id.0 - first) as usize].outcome = Some(result.map(|()| frame));
        }
        while failed.is_none()
            && let Some(Piece { range, of, outcome: Some(outcome) }) = in_order.front()
        {
            let outcome = outcome.as_ref().map(|frame| &frame[..]).map_err(Error::clone);
            if let Err(error) = each(*range, *of, outcome) {
                failed = Some(error);
            }
            in_order.pop_front();
            first += 1;
        }
    }
}

/// Reads `len` bytes (whole blocks) at `offset`.
///
/// # Errors
/// As [`read_ranges`].
pub(crate) fn read_bytes(
    disk: &mut dyn Disk,
    arena: &mut Arena,
    file: FileId,
    offset: u64,
    len: usize,
) -> Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(len);
    let range = Range { file, offset, blocks: (len / BLOCK) as u64 };
    read_ranges(disk, arena, [range], |_, piece| {
        bytes.extend_from_slice(piece);
        Ok(())
    })?;
    Ok(bytes)
}
