//! An operation in flight, and how it is cut into entries of the ring.
//!
//! ```text
//!   operation: ranges of memory that follow each other in the file
//!       |  cut at 512 KiB
//!   span (what one entry transfers) --> entry: one range, or a list of them --> result --> done
//!       ^------------------------ a remainder, or the whole again -----------------'
//! ```
//! Invariants
//! 1. The spans of an operation cover each of its bytes once; `pending` counts those whose last
//!    result has not arrived yet.
//! 2. A span continues only at block boundaries: direct I/O accepts no others, and transferring a
//!    part of a block again does no harm.
//! 3. A range lies within one registered buffer or counts as unregistered.
//!
//! It does *not* touch the bytes or make system calls.

use super::buffers::Buffers;
use super::fixed_files::RingFile;
use super::iovec::IoVec;
use crate::base::BLOCK;
use crate::base::error::{Error, Result};
use crate::io::backoff::Backoff;
use crate::io::flush::OpIdx;
use crate::io::{DiskOp, OpId};
use smallvec::SmallVec;
use std::io;
use std::rc::Rc;

/// Bytes of one entry. The kernel hands larger ones to a worker, which costs more than the device
/// does.
pub(super) const SPAN_BYTES: u32 = 512 << 10;
/// A transfer fails after this many results in a row that complete no whole block.
const STALLS_MAX: u8 = 4;

/// A contiguous range of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct MemoryRange {
    pub(super) at: *mut u8,
    pub(super) len: u32,
    /// The registered buffer that holds it, if any.
    pub(super) buffer: Option<u16>,
}

/// The memory of a transfer: usually one range or a few.
pub(super) type MemoryRanges = SmallVec<[MemoryRange; 4]>;

/// The part of an operation that one entry transfers: bytes `from..from + len` of the operation
/// `op`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) op: OpIdx,
    pub(super) from: u32,
    pub(super) len: u32,
    pub(super) stalls: u8,
    pub(super) backoff: Backoff,
}

/// An operation in flight.
pub(super) struct Op {
    pub(super) id: OpId,
    pub(super) op: DiskOp,
    /// The file of a transfer; `None` for other operations.
    pub(super) file: Option<Rc<RingFile>>,
    /// For a transfer, the address of its first byte on the file's descriptor.
    pub(super) address: u64,
    pub(super) memory: MemoryRanges,
    /// Spans, flushes or jobs that have not ended yet.
    pub(super) pending: u32,
    /// The first failure.
    pub(super) error: Option<Error>,
}

impl Op {
    /// An operation that transfers no bytes in this ring: a flush or an allocation, which ends when
    /// `pending` parts of it have ended.
    pub(super) fn untransferred(id: OpId, op: DiskOp, pending: u32) -> Op {
        Op { id, op, file: None, address: 0, memory: MemoryRanges::new(), pending, error: None }
    }

    /// Checked whenever a part of the operation ends: it costs a comparison.
    pub(super) fn assert_state(&self) {
        assert!(self.pending > 0, "a part ended, but the operation waits for none: {:?}", self.op);
        debug_assert!(
            self.file.is_some() != self.memory.is_empty(),
            "a transfer has a file and memory, or neither"
        );
    }

    pub(super) fn is_write(&self) -> bool {
        matches!(self.op, DiskOp::Write { .. })
    }

    /// The failure of a transfer that ends early.
    pub(super) fn early_end(&self) -> io::ErrorKind {
        match self.is_write() {
            true => io::ErrorKind::WriteZero,
            false => io::ErrorKind::UnexpectedEof,
        }
    }

    pub(super) fn offset(&self) -> u64 {
        match &self.op {
            DiskOp::Read { offset, .. } | DiskOp::Write { offset, .. } => *offset,
            DiskOp::Flush { .. } | DiskOp::Allocate { .. } => 0,
        }
    }
}

/// The memory of a transfer; adjacent frames become one range.
///
/// # Errors
/// `Invalid` if a frame to be read into is pinned.
pub(super) fn memory_ranges(op: &mut DiskOp, buffers: &Buffers) -> Result<MemoryRanges> {
    let mut memory = MemoryRanges::new();
    match op {
        DiskOp::Read { file, into, .. } => {
            for frame in into {
                let Some(bytes) = frame.try_mut() else {
                    return Err(Error::invalid(format_args!(
                        "a read of `{file}` into a frame that is pinned: its readers would see it \
                         change"
                    )));
                };
                add(&mut memory, bytes.as_mut_ptr(), bytes.len() as u32);
            }
        }
        DiskOp::Write { from, .. } => {
            for slice in from {
                let bytes = slice.bytes();
                add(&mut memory, bytes.as_ptr().cast_mut(), bytes.len() as u32);
            }
        }
        DiskOp::Flush { .. } | DiskOp::Allocate { .. } => {}
    }
    for range in &mut memory {
        range.buffer = buffers.find(range.at, range.len as usize);
    }
    Ok(memory)
}

fn add(memory: &mut MemoryRanges, at: *mut u8, len: u32) {
    match memory.last_mut() {
        Some(last) if last.at.wrapping_add(last.len as usize) == at => last.len += len,
        _ if len == 0 => {}
        _ => memory.push(MemoryRange { at, len, buffer: None }),
    }
}

/// Cuts `bytes` bytes into spans.
pub(super) fn spans(op: OpIdx, bytes: u32) -> impl Iterator<Item = Span> {
    let cuts = (0..bytes).step_by(SPAN_BYTES as usize);
    cuts.map(move |from| Span {
        op,
        from,
        len: SPAN_BYTES.min(bytes - from),
        stalls: 0,
        backoff: Backoff::default(),
    })
}

/// The memory of a span: one range, or several, which are listed in `out`.
pub(super) fn memory_of(
    memory: &[MemoryRange],
    span: &Span,
    out: &mut Vec<IoVec>,
) -> Option<MemoryRange> {
    out.clear();
    let (mut skip, mut want) = (span.from, span.len);
    for range in memory {
        if want == 0 {
            break;
        }
        if skip >= range.len {
            skip -= range.len;
            continue;
        }
        let at = range.at.wrapping_add(skip as usize);
        let len = want.min(range.len - skip);
        if len == span.len {
            return Some(MemoryRange { at, len, buffer: range.buffer });
        }
        out.push(IoVec { at, len: len as usize });
        want -= len;
        skip = 0;
    }
    None
}

/// What a completion means for a span.
#[derive(Debug)]
pub(super) enum SpanResult {
    /// All of it was transferred.
    Done,
    /// This remainder was not transferred yet.
    Remainder(Span),
    /// The kernel refused it for now: submit it again after a pause.
    Retry(Span),
    /// It can't be transferred.
    Failed(io::Error),
}

/// Classifies the kernel's result for a span. One that ends early fails with `ended`.
pub(super) fn classify(span: Span, result: i32, ended: io::ErrorKind) -> SpanResult {
    use rustix::io::Errno;
    if result < 0 {
        let again = [Errno::INTR, Errno::AGAIN].iter().any(|errno| errno.raw_os_error() == -result);
        let mut backoff = span.backoff;
        return match again && backoff.refused().is_some() {
            true => SpanResult::Retry(Span { backoff, ..span }),
            false => SpanResult::Failed(io::Error::from_raw_os_error(-result)),
        };
    }
    let reached = (result as u32).min(span.len);
    if reached == span.len {
        return SpanResult::Done;
    }
    let blocks = reached - reached % BLOCK as u32;
    let stalls = if blocks > 0 { 0 } else { span.stalls + 1 };
    if reached == 0 || stalls >= STALLS_MAX {
        let bytes = span.from + reached;
        return SpanResult::Failed(io::Error::new(
            ended,
            format!("only {bytes} bytes could be transferred"),
        ));
    }
    let (from, len) = (span.from + blocks, span.len - blocks);
    SpanResult::Remainder(Span { from, len, stalls, backoff: Backoff::default(), ..span })
}

#[cfg(test)]
mod tests {
    use super::*;

    const READ: io::ErrorKind = io::ErrorKind::UnexpectedEof;
    const WRITE: io::ErrorKind = io::ErrorKind::WriteZero;
    const MEMORY: *mut u8 = std::ptr::without_provenance_mut(1 << 30);

    fn range(start: usize, len: u32) -> MemoryRange {
        MemoryRange { at: MEMORY.wrapping_add(start), len, buffer: None }
    }

    /// A byte that no span covers would leave a hole in a page.
    #[test]
    fn spans_cover_every_byte_once() {
        for bytes in [4096, SPAN_BYTES - 4096, SPAN_BYTES, SPAN_BYTES + 4096, 5 * SPAN_BYTES - 4096]
        {
            let mut at = 0;
            for span in spans(OpIdx(7), bytes) {
                assert_eq!((span.from, span.op), (at, OpIdx(7)));
                assert!(span.len > 0 && span.len <= SPAN_BYTES);
                at += span.len;
            }
            assert_eq!(at, bytes);
        }
    }

    /// Adjacent memory is transferred as one range, other memory as a list that continues at the
    /// right place.
    #[test]
    fn the_memory_of_a_span_is_that_of_its_bytes() {
        let mut memory = SmallVec::new();
        for (at, len) in [(0, 4096), (4096, 8192), (65536, 4096), (32768, 4096)] {
            add(&mut memory, MEMORY.wrapping_add(at), len);
        }
        assert_eq!(memory.as_slice(), [range(0, 12288), range(65536, 4096), range(32768, 4096)]);
        let mut list = Vec::new();
        let span =
            |from, len| Span { op: OpIdx(0), from, len, stalls: 0, backoff: Backoff::default() };
        assert_eq!(memory_of(&memory, &span(4096, 8192), &mut list), Some(range(4096, 8192)));
        assert_eq!(memory_of(&memory, &span(12288, 4096), &mut list), Some(range(65536, 4096)));
        assert_eq!(memory_of(&memory, &span(8192, 12288), &mut list), None);
        let expected = [(8192, 4096), (65536, 4096), (32768, 4096)];
        let vector = |(at, len)| IoVec { at: MEMORY.wrapping_add(at), len };
        assert_eq!(list, expected.map(vector));
    }

    /// A short transfer that is taken for a whole one leaves old bytes in a page.
    #[test]
    fn short_results_go_on_at_a_block_and_give_up_in_the_end() {
        let span =
            Span { op: OpIdx(0), from: 8192, len: 16384, stalls: 0, backoff: Backoff::default() };
        assert!(matches!(classify(span, 16384, READ), SpanResult::Done));
        let SpanResult::Remainder(rest) = classify(span, 5000, READ) else {
            panic!("it continues")
        };
        assert_eq!((rest.from, rest.len, rest.stalls), (8192 + 4096, 16384 - 4096, 0));
        let SpanResult::Remainder(mut stalled) = classify(span, 100, WRITE) else {
            panic!("it continues")
        };
        assert_eq!((stalled.from, stalled.len, stalled.stalls), (8192, 16384, 1));
        let failed = loop {
            match classify(stalled, 100, WRITE) {
                SpanResult::Remainder(rest) => stalled = rest,
                SpanResult::Failed(e) => break e,
                SpanResult::Done | SpanResult::Retry(_) => panic!("100 bytes are not all"),
            }
        };
        assert_eq!(failed.kind(), io::ErrorKind::WriteZero);
        assert!(matches!(
            classify(span, 0, READ),
            SpanResult::Failed(e) if e.kind() == io::ErrorKind::UnexpectedEof
        ));
        for again in [rustix::io::Errno::INTR, rustix::io::Errno::AGAIN] {
            let mut refused = span;
            let mut times = 0;
            let failed = loop {
                match classify(refused, -again.raw_os_error(), READ) {
                    SpanResult::Retry(same) => refused = same,
                    SpanResult::Failed(e) => break e,
                    other => panic!("it was refused: {other:?}"),
                }
                assert_eq!(
                    Span { backoff: span.backoff, ..refused },
                    span,
                    "all of it is still to be transferred"
                );
                times += 1;
            };
            assert!(times >= 100, "a busy device is no failed one");
            assert_eq!(failed.raw_os_error(), Some(again.raw_os_error()));
            let SpanResult::Remainder(rest) = classify(refused, 4096, READ) else {
                panic!("it continues")
            };
            assert_eq!(
                rest.backoff,
                Backoff::default(),
                "a device that takes something again is well"
            );
        }
        for errno in [5, 61, 125] {
            let SpanResult::Failed(e) = classify(span, -errno, READ) else {
                panic!("{errno} is a failure")
            };
            assert_eq!(e.raw_os_error(), Some(errno));
        }
    }
}
