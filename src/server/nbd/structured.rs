//! Structured replies and metadata contexts, as bytes.
//!
//! Source: `doc/proto.md` of the repository NetworkBlockDevice/nbd. All numbers on the wire are big endian.
//!
//! 1. Every chunk's length field is that of its payload; the last chunk of a reply, and only that, is marked as the last.
//! 2. Parsing never panics: what does not fit is `None`.
//!
//! Does no I/O.

use super::proto::{Errno, Fields, STRING_BYTES_MAX, parse_name};
use std::ops::Range;

/// The one metadata context that there is.
pub const BASE_ALLOCATION: &str = "base:allocation";
/// Its number in a connection.
pub const BASE_ALLOCATION_ID: u32 = 1;

const MAGIC: u32 = 0x668e_33ef;
const LAST: u16 = 1;
/// Bytes of a chunk's header.
const HEADER_BYTES: usize = 20;
/// Bytes in front of the data of a reply that is one chunk of data.
pub const DATA_HEADER_BYTES: usize = HEADER_BYTES + 8;

/// Types of chunks; errors have the highest bit set.
mod chunk {
    pub const DATA: u16 = 1;
    pub const HOLE: u16 = 2;
    pub const BLOCK_STATUS: u16 = 5;
    pub const ERROR: u16 = 1 << 15 | 1;
}

/// What a range of an export is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stretch {
    /// Bytes.
    pub length: u32,
    /// Nothing is stored there: it reads as zeros.
    pub is_hole: bool,
}

fn header(flags: u16, kind: u16, cookie: u64, length: usize) -> [u8; HEADER_BYTES] {
    let mut out = [0; HEADER_BYTES];
    out[..4].copy_from_slice(&MAGIC.to_be_bytes());
    out[4..6].copy_from_slice(&flags.to_be_bytes());
    out[6..8].copy_from_slice(&kind.to_be_bytes());
    out[8..16].copy_from_slice(&cookie.to_be_bytes());
    out[16..].copy_from_slice(&(length as u32).to_be_bytes());
    out
}

/// What stands before `length` bytes of data from `offset` on, all of the reply.
pub fn whole_data(cookie: u64, offset: u64, length: usize) -> [u8; DATA_HEADER_BYTES] {
    data_header(LAST, cookie, offset, length)
}

fn data_header(flags: u16, cookie: u64, offset: u64, length: usize) -> [u8; DATA_HEADER_BYTES] {
    let mut out = [0; DATA_HEADER_BYTES];
    out[..HEADER_BYTES].copy_from_slice(&header(flags, chunk::DATA, cookie, 8 + length));
    out[HEADER_BYTES..].copy_from_slice(&offset.to_be_bytes());
    out
}

/// The reply to a read of `data` from `offset` on, of which `holes` (in order, within `data`) are not stored.
pub fn data_and_holes(cookie: u64, offset: u64, data: &[u8], holes: &[Range<usize>]) -> Vec<u8> {
    let stored: usize = data.len() - holes.iter().map(Range::len).sum::<usize>();
    let mut out = Vec::with_capacity(stored + (2 * holes.len() + 1) * (DATA_HEADER_BYTES + 4));
    let end = data.len()..data.len();
    let mut at = 0;
    for hole in holes.iter().chain([&end]) {
        if hole.start > at {
            let flags = if hole.start == data.len() { LAST } else { 0 };
            out.extend_from_slice(&data_header(flags, cookie, offset + at as u64, hole.start - at));
            out.extend_from_slice(&data[at..hole.start]);
        }
        if !hole.is_empty() {
            let flags = if hole.end == data.len() { LAST } else { 0 };
            out.extend_from_slice(&header(flags, chunk::HOLE, cookie, 12));
            out.extend_from_slice(&(offset + hole.start as u64).to_be_bytes());
            out.extend_from_slice(&(hole.len() as u32).to_be_bytes());
        }
        at = hole.end;
    }
    out
}

/// The reply to a block status request.
pub fn block_status(cookie: u64, stretches: &[Stretch]) -> Vec<u8> {
    let mut out = header(LAST, chunk::BLOCK_STATUS, cookie, 4 + 8 * stretches.len()).to_vec();
    out.extend_from_slice(&BASE_ALLOCATION_ID.to_be_bytes());
    for stretch in stretches {
        // A hole, and zeros; or neither.
        let flags: u32 = if stretch.is_hole { 1 | 1 << 1 } else { 0 };
        out.extend_from_slice(&stretch.length.to_be_bytes());
        out.extend_from_slice(&flags.to_be_bytes());
    }
    out
}

/// The reply to a request that failed.
pub fn error(cookie: u64, errno: Errno) -> Vec<u8> {
    let message = errno.message();
    let mut out = header(LAST, chunk::ERROR, cookie, 6 + message.len()).to_vec();
    out.extend_from_slice(&(errno as u32).to_be_bytes());
    out.extend_from_slice(&(message.len() as u16).to_be_bytes());
    out.extend_from_slice(message.as_bytes());
    out
}

/// The data of LIST_META_CONTEXT and SET_META_CONTEXT.
#[derive(Debug, PartialEq, Eq)]
pub struct MetaRequest {
    /// The export's name; empty stands for the default one.
    pub export: String,
    /// Whether a query asks for `base:allocation` by its name.
    pub names_allocation: bool,
    /// Whether a query asks for all of `base:`, or there is none, which in a list stands for everything.
    pub wants_all: bool,
}

impl MetaRequest {
    /// Parses the data; `None` if lengths don't add up, or a string is too long.
    pub fn parse(data: &[u8]) -> Option<MetaRequest> {
        let mut from = Fields(data);
        let string = |from: &mut Fields<'_>| {
            let bytes = from.u32()? as usize;
            (bytes <= STRING_BYTES_MAX).then(|| from.take(bytes).map(<[u8]>::to_vec))?
        };
        let export = parse_name(&string(&mut from)?)?;
        let count = from.u32()?;
        let (mut names_allocation, mut wants_all) = (false, count == 0);
        for _ in 0..count {
            let query = string(&mut from)?;
            names_allocation |= query == BASE_ALLOCATION.as_bytes();
            wants_all |= query == b"base:";
        }
        from.0.is_empty().then_some(MetaRequest { export, names_allocation, wants_all })
    }
}

/// One context of the answer; in a list its number means nothing.
pub fn meta_context(id: u32) -> Vec<u8> {
    [&id.to_be_bytes()[..], BASE_ALLOCATION.as_bytes()].concat()
}
