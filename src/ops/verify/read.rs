//! The reads of a verification: many in flight, and a read that fails does not end the others.
//!
//! Invariants
//! 1. Each range is delivered once, in the order in which it was asked for, as bytes or as the
//!    reason why there are none.
//! 2. Memory is bounded by [`IN_FLIGHT_MAX`] reads, and by what a caller asks for at a time.
//! 3. Each file's length is asked for once: verification has the store locked against writers.
//!
//! It does *not* compare checksums.

use super::{Verifier, VerifyProgress};
use crate::base::BLOCK;
use crate::engine::recovery::{Range, neighbours_together, read_pieces};
use crate::io::FileId;

/// Reads at the device at a time. Single blocks of a store that was written at random need this
/// many to reach the speed of most devices.
pub(super) const IN_FLIGHT_MAX: usize = 64;
/// Blocks of memory for reading: room for all of them in their largest size.
pub(super) const ARENA_BLOCKS: u32 = 64 * IN_FLIGHT_MAX as u32;

/// Bytes of a file, or why there are none.
pub(super) type Bytes = Result<Vec<u8>, String>;

impl Verifier<'_> {
    /// The length of a file, or why it can't be used.
    pub(super) fn len(&mut self, file: FileId) -> Result<u64, String> {
        if let Some(known) = self.lengths.get(&file) {
            return known.clone();
        }
        let len = match self.disk.len(file) {
            Ok(Some(len)) => Ok(len),
            Ok(None) => Err(format!("is missing: the store has no file {file}")),
            Err(error) => Err(error.to_string()),
        };
        self.lengths.insert(file, len.clone());
        len
    }

    /// Checks that the file has these bytes; otherwise says why not.
    fn holds(&mut self, file: FileId, offset: u64, len: u64) -> Result<(), String> {
        let end = self.len(file)?;
        match offset.checked_add(len).is_some_and(|to| to <= end) {
            true => Ok(()),
            false => Err(format!("lies beyond the end of the file, which has {end} bytes")),
        }
    }

    pub(super) fn read(&mut self, file: FileId, offset: u64, len: usize) -> Bytes {
        self.read_many(file, &[(offset, len)]).pop().unwrap_or_else(|| Err("was not read".into()))
    }

    /// Reads ranges of whole blocks, by offset and length: the bytes of each, or why it can't be
    /// read.
    pub(super) fn read_many(&mut self, file: FileId, wanted: &[(u64, usize)]) -> Vec<Bytes> {
        let mut all: Vec<Bytes> = Vec::with_capacity(wanted.len());
        let mut ranges: Vec<(usize, Range)> = Vec::new();
        for (n, (offset, len)) in wanted.iter().copied().enumerate() {
            let held = self.holds(file, offset, len as u64);
            if held.is_ok() {
                ranges.push((n, Range { file, offset, blocks: (len / BLOCK) as u64 }));
            }
            all.push(held.map(|()| Vec::with_capacity(len)));
        }
        let (sources, meter) = (ranges.iter().map(|(_, range)| *range), &mut self.meter);
        let outcome =
            read_pieces(self.disk, &mut self.arena, IN_FLIGHT_MAX, sources, |index, of, piece| {
                let whole = &mut all[ranges[index].0];
                match (piece, whole.as_mut()) {
                    (Ok(bytes), Ok(whole)) => whole.extend_from_slice(bytes),
                    (Err(error), Ok(_)) => *whole = Err(format!("can't be read: {error}")),
                    (_, Err(_)) => {}
                }
                meter.advance(of.blocks);
                Ok(())
            });
        if let Err(error) = outcome {
            ranges.iter().for_each(|(n, _)| all[*n] = Err(error.to_string()));
        }
        all
    }

    /// Calls `each` for the blocks at these offsets of the data file, which ascend, with the index
    /// of a block and its bytes, or why there are none. Neighbours are read together; where that
    /// fails, one by one, to find out which of them can't be read.
    pub(super) fn blocks(
        &mut self,
        offsets: &[u64],
        mut each: impl FnMut(usize, Result<&[u8], String>),
    ) {
        let held = offsets
            .partition_point(|offset| self.holds(FileId::Data, *offset, BLOCK as u64).is_ok());
        let range = |(offset, blocks)| Range { file: FileId::Data, offset, blocks };
        let ranges = neighbours_together(offsets[..held].iter().copied()).into_iter().map(range);
        let (mut next, mut alone, meter) = (0, Vec::new(), &mut self.meter);
        let outcome =
            read_pieces(self.disk, &mut self.arena, IN_FLIGHT_MAX, ranges, |_, of, piece| {
                let here = next..next + of.blocks as usize;
                next = here.end;
                match piece {
                    Ok(bytes) => {
                        here.zip(bytes.chunks(BLOCK)).for_each(|(n, block)| each(n, Ok(block)))
                    }
                    Err(_) => alone.extend(here),
                }
                meter.advance(of.blocks);
                Ok(())
            });
        let singles = alone.iter().map(|n| range((offsets[*n], 1)));
        let outcome = outcome.and_then(|()| {
            read_pieces(self.disk, &mut self.arena, IN_FLIGHT_MAX, singles, |index, _, piece| {
                each(alone[index], piece.map_err(|error| format!("can't be read: {error}")));
                Ok(())
            })
        });
        // No failed read ends the others; if something else does, no block counts as read.
        let missing = if outcome.is_ok() { held..offsets.len() } else { 0..offsets.len() };
        for n in missing {
            let why = self.holds(FileId::Data, offsets[n], BLOCK as u64).err();
            let failed = || outcome.as_ref().err().map_or_else(String::new, ToString::to_string);
            each(n, Err(why.unwrap_or_else(failed)));
        }
    }
}

/// Counts the bytes that were read, and reports progress.
pub(super) struct Meter<'a> {
    pub(super) progress: VerifyProgress,
    pub(super) tell: &'a mut dyn FnMut(VerifyProgress),
}

impl Meter<'_> {
    pub(super) fn advance(&mut self, blocks: u64) {
        self.progress.bytes_done += blocks * BLOCK as u64;
        (self.tell)(self.progress);
    }

    /// `bytes` more will be read.
    pub(super) fn expect(&mut self, bytes: u64) {
        self.progress.bytes_total = self.progress.bytes_done + bytes;
        (self.tell)(self.progress);
    }
}
