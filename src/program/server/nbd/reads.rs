//! Answers reads: as a whole if there is memory for that, else piece by piece.
//!
//! 1. A read that has memory for its data is answered as a whole, in the order in which reads end.
//! 2. A larger one is answered in pieces as large as its memory, each of which is read when the one
//!    before it is written. Between chunks (structured replies), other replies may be sent. A reply
//!    that must be in one piece has the socket to itself: a failure after its header can't be
//!    reported, so the connection ends, as the protocol requires.
//!
//! It does *not* know what is behind an [`Export`].

use super::Export;
use super::connection::Connection;
use super::gate::Pass;
use super::holes::Holes;
use super::proto::{
    self, DATA_CHUNK_HEAD_BYTES, Fault, Position, Request, SIMPLE_REPLY_BYTES, flag,
};
use std::io::IoSlice;
use std::ops::Range;
use tracing::warn;

/// The largest chunk of a reply in chunks: larger ones make it no faster.
pub const STREAM_BYTES: usize = 1 << 20;
const PAGE: usize = 4096;
/// Shorter holes next to data are sent as data: with the headers around them they would be longer.
const HOLE_BYTES_MIN: usize = 64;
/// A hole that is shorter has no room for its chunk, even on its own.
const LONE_HOLE_BYTES_MIN: usize = 4;

impl<E: Export> Connection<'_, E> {
    /// Whether the answer to a read must be in one piece.
    pub(super) fn is_in_one(&self, request: &Request) -> bool {
        !self.agreed.structured || request.flags & flag::DF != 0
    }

    /// The header in front of all the data of a reply in one piece.
    fn head(&self, request: &Request) -> Vec<u8> {
        match self.agreed.structured {
            false => proto::simple_reply(request.cookie, Ok(())).to_vec(),
            true => proto::data_chunk_head(
                request.cookie,
                Position::Last,
                request.offset,
                request.length as usize,
            )
            .to_vec(),
        }
    }

    /// Returns the whole reply to a read.
    pub(super) async fn read(&self, request: &Request) -> Result<Vec<u8>, Fault> {
        let length = request.length as usize;
        if length == 0 && self.agreed.structured {
            return Ok(proto::empty_chunk(request.cookie));
        }
        let head_bytes =
            if self.agreed.structured { DATA_CHUNK_HEAD_BYTES } else { SIMPLE_REPLY_BYTES };
        let mut out = vec![0; head_bytes + length];
        let mut holes = Holes::default();
        if length > 0 {
            self.export.read(request.offset, &mut out[head_bytes..], &mut holes).await?;
        }
        if self.is_in_one(request) {
            out[..head_bytes].copy_from_slice(&self.head(request));
        } else {
            let length =
                in_chunks(&mut out, request.cookie, request.offset, Position::Last, &holes);
            out.truncate(length);
        }
        Ok(out)
    }

    /// Answers a read in pieces. An error can be sent to the client: nothing was written yet, or
    /// only whole chunks.
    pub(super) async fn stream(&self, request: &Request, pass: &Pass<'_>) -> Result<(), Fault> {
        let is_in_one = self.is_in_one(request);
        let mut turn = if is_in_one { Some(self.turn.lock().await) } else { None };
        let mut out = vec![0; DATA_CHUNK_HEAD_BYTES + pass.room().min(request.length as usize)];
        let (mut offset, end) = (request.offset, request.offset + u64::from(request.length));
        while offset < end && !self.is_gone() {
            let length = piece(offset, end, out.len() - DATA_CHUNK_HEAD_BYTES);
            let data = &mut out[DATA_CHUNK_HEAD_BYTES..][..length];
            data.fill(0);
            let mut holes = Holes::default();
            let result = self.export.read(offset, data, &mut holes).await;
            let is_first = offset == request.offset;
            match result {
                Err(fault) if is_in_one && !is_first => {
                    let fault = &fault.message;
                    let what = "a read failed after the header of its reply: the connection ends";
                    warn!(%fault, "{what}");
                    self.hang_up();
                    return Ok(());
                }
                Err(fault) => return Err(fault),
                Ok(()) if is_in_one => {
                    let head = if is_first { self.head(request) } else { Vec::new() };
                    self.write(&mut [IoSlice::new(&head), IoSlice::new(data)]);
                }
                Ok(()) => {
                    let chunk = &mut out[..DATA_CHUNK_HEAD_BYTES + length];
                    let last = match offset + length as u64 == end {
                        true => Position::Last,
                        false => Position::Inner,
                    };
                    let chunk_length = in_chunks(chunk, request.cookie, offset, last, &holes);
                    turn = Some(self.turn.lock().await);
                    self.write(&mut [IoSlice::new(&out[..chunk_length])]);
                }
            }
            offset += length as u64;
            if !is_in_one {
                turn = None;
                // Replies that have become ready meanwhile don't wait for the rest.
                self.write_ready();
            }
            futures_lite::future::yield_now().await;
        }
        drop(turn);
        Ok(())
    }
}

/// The length of the next piece: it ends at the end of a page, or of the read.
fn piece(offset: u64, end: u64, room: usize) -> usize {
    let most = (end - offset).min(room as u64);
    let behind = (offset + most) / PAGE as u64 * PAGE as u64;
    if offset + most < end && behind > offset { (behind - offset) as usize } else { most as usize }
}

/// Turns what was read at `offset` into chunks, in place: `out` has room for one header, and the
/// data; `last` is the position of the last chunk. Returns how many bytes they are.
fn in_chunks(out: &mut [u8], cookie: u64, offset: u64, last: Position, holes: &Holes) -> usize {
    let data_bytes = out.len() - DATA_CHUNK_HEAD_BYTES;
    let (mut to, mut pieces) = (0, holes.pieces(data_bytes, LONE_HOLE_BYTES_MIN));
    if pieces.len() > 1 {
        pieces = holes.pieces(data_bytes, HOLE_BYTES_MIN);
    }
    for (Range { start, end }, is_hole) in pieces {
        let position = if end == data_bytes { last } else { Position::Inner };
        let offset = offset + start as u64;
        if is_hole {
            let chunk = proto::hole_chunk(cookie, position, offset, end - start);
            out[to..to + chunk.len()].copy_from_slice(&chunk);
            to += chunk.len();
        } else {
            // This never overwrites data that has yet to be moved: a hole in front of it has left
            // room for its own chunk and this header.
            assert!(to <= start, "a chunk over data that was not told yet");
            let head = proto::data_chunk_head(cookie, position, offset, end - start);
            out.copy_within(
                DATA_CHUNK_HEAD_BYTES + start..DATA_CHUNK_HEAD_BYTES + end,
                to + head.len(),
            );
            out[to..to + head.len()].copy_from_slice(&head);
            to += head.len() + end - start;
        }
    }
    to
}

#[cfg(test)]
mod tests {
    use super::*;
    use corepage::testing::random::Rng;

    /// If a piece never ends, or has no bytes, a client waits for ever.
    #[test]
    fn pieces_of_a_read_cover_it_and_end_with_pages() {
        for (offset, length, room) in [
            (0, 100_000, 6144),
            (5, 50_000, 6144),
            (4095, 8194, 4096),
            (7, 10, 4096),
            (4090, 4096, 9),
        ] {
            let (mut at, end) = (offset, offset + length);
            while at < end {
                let piece = piece(at, end, room);
                assert!(0 < piece && piece <= room);
                at += piece as u64;
                assert!(
                    at == end || at.is_multiple_of(PAGE as u64) || room < PAGE,
                    "a piece ends at {at}"
                );
            }
            assert_eq!(at, end);
        }
    }

    /// Chunks are made in place: one byte that is moved too early is wrong data at a client.
    #[test]
    fn chunks_made_in_place_hold_what_was_read() {
        let mut rng = Rng::new(1);
        let mut below = |bound: usize| rng.below(bound as u64) as usize;
        for _ in 0..500 {
            let length = 1 + below(600);
            let (mut data, mut holes, mut at) =
                (vec![0; length], Holes::default(), below(3) * below(100));
            data.iter_mut().for_each(|byte| *byte = 1 + below(255) as u8);
            while at < length {
                let end = (at + 1 + below(200)).min(length);
                data[at..end].fill(0);
                holes.add(at..end);
                at = end + below(150);
            }
            let mut out = [&[0; DATA_CHUNK_HEAD_BYTES][..], &data].concat();
            let bytes = in_chunks(&mut out, 7, 1000, Position::Last, &holes);
            let (mut told, mut rest) = (Vec::new(), &out[..bytes]);
            while !rest.is_empty() {
                let kind = u16::from_be_bytes([rest[6], rest[7]]);
                let size = u32::from_be_bytes(rest[16..20].try_into().unwrap()) as usize;
                let offset = u64::from_be_bytes(rest[20..28].try_into().unwrap());
                assert_eq!(offset, 1000 + told.len() as u64);
                match kind {
                    1 => told.extend_from_slice(&rest[28..20 + size]),
                    _ => told.resize(
                        told.len() + u32::from_be_bytes(rest[28..32].try_into().unwrap()) as usize,
                        0,
                    ),
                }
                assert_eq!(rest[5] == 1, told.len() == length, "the end is told at the end");
                rest = &rest[20 + size..];
            }
            assert!(told == data, "{length} bytes");
        }
    }
}
