//! Byte layouts of replies: simple ones, and chunks of structured ones.

use super::{
    ALLOCATION_ID, CHUNK_MAGIC, Errno, Extent, ExtentKind, Fault, SIMPLE_REPLY_MAGIC, STATUS_HOLE,
    STRING_BYTES_MAX, chunk,
};

/// Bytes of a simple reply's header.
pub const SIMPLE_REPLY_BYTES: usize = 16;
/// Bytes of a chunk's header.
const CHUNK_HEAD_BYTES: usize = 20;
/// Bytes in front of the data of a chunk.
pub const DATA_CHUNK_HEAD_BYTES: usize = CHUNK_HEAD_BYTES + 8;

/// The header of a simple reply; data follows it only after a successful READ.
pub fn simple_reply(cookie: u64, outcome: Result<(), Errno>) -> [u8; SIMPLE_REPLY_BYTES] {
    let error = outcome.err().map_or(0, |e| e as u32);
    let mut out = [0; SIMPLE_REPLY_BYTES];
    out[..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
    out[4..8].copy_from_slice(&error.to_be_bytes());
    out[8..].copy_from_slice(&cookie.to_be_bytes());
    out
}

/// Where a chunk stands in its reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Position {
    /// Other chunks follow.
    Inner,
    /// It ends the reply.
    Last,
}

fn chunk_head(cookie: u64, position: Position, kind: u16, length: usize) -> [u8; CHUNK_HEAD_BYTES] {
    let flags = match position {
        Position::Inner => 0,
        Position::Last => chunk::DONE,
    };
    let mut out = [0; CHUNK_HEAD_BYTES];
    out[..4].copy_from_slice(&CHUNK_MAGIC.to_be_bytes());
    out[4..6].copy_from_slice(&flags.to_be_bytes());
    out[6..8].copy_from_slice(&kind.to_be_bytes());
    out[8..16].copy_from_slice(&cookie.to_be_bytes());
    out[16..].copy_from_slice(&(length as u32).to_be_bytes());
    out
}

/// The header for `length` bytes that were read at `offset`.
pub fn data_chunk_head(
    cookie: u64,
    position: Position,
    offset: u64,
    length: usize,
) -> [u8; DATA_CHUNK_HEAD_BYTES] {
    let mut out = [0; DATA_CHUNK_HEAD_BYTES];
    out[..CHUNK_HEAD_BYTES].copy_from_slice(&chunk_head(cookie, position, chunk::DATA, 8 + length));
    out[CHUNK_HEAD_BYTES..].copy_from_slice(&offset.to_be_bytes());
    out
}

/// A chunk for `length` zeros that were read at `offset`.
pub fn hole_chunk(cookie: u64, position: Position, offset: u64, length: usize) -> Vec<u8> {
    let head = chunk_head(cookie, position, chunk::HOLE, 12);
    [&head[..], &offset.to_be_bytes(), &(length as u32).to_be_bytes()].concat()
}

/// A reply without data.
pub fn empty_chunk(cookie: u64) -> Vec<u8> {
    chunk_head(cookie, Position::Last, chunk::NONE, 0).to_vec()
}

/// The answer to BLOCK_STATUS.
pub fn status_chunk(cookie: u64, extents: &[Extent]) -> Vec<u8> {
    let length = 4 + 8 * extents.len();
    let mut out = Vec::with_capacity(CHUNK_HEAD_BYTES + length);
    out.extend_from_slice(&chunk_head(cookie, Position::Last, chunk::BLOCK_STATUS, length));
    out.extend_from_slice(&ALLOCATION_ID.to_be_bytes());
    for extent in extents {
        out.extend_from_slice(&extent.bytes.to_be_bytes());
        let status = match extent.kind {
            ExtentKind::Stored => 0,
            ExtentKind::Hole => STATUS_HOLE,
        };
        out.extend_from_slice(&status.to_be_bytes());
    }
    out
}

/// A chunk that says why a request failed.
pub fn error_chunk(cookie: u64, fault: &Fault) -> Vec<u8> {
    let bytes_max = fault.message.len().min(STRING_BYTES_MAX);
    let end = (0..=bytes_max).rev().find(|end| fault.message.is_char_boundary(*end)).unwrap_or(0);
    let message = &fault.message[..end];
    let head = chunk_head(cookie, Position::Last, chunk::ERROR, 6 + message.len());
    let errno = (fault.errno as u32).to_be_bytes();
    [&head[..], &errno, &(message.len() as u16).to_be_bytes(), message.as_bytes()].concat()
}
