//! The transmission phase: requests in, replies out, in any order.
//!
//! ```text
//! this thread: header ─> gate ─> payload ─> task ─┐
//!                 ^                               v
//!                 └──────── next        reply thread: export; all replies that are ready in one write
//! ```
//!
//! 1. Only the reply thread writes to the socket, so replies never mix. It writes before it waits: no reply waits for another.
//! 2. A payload is read whole before the next header, also for a request that is refused; where that is not possible
//!    the connection ends.
//! 3. When [`serve`] returns, no request of this connection is under way any more: each was answered, or its client is gone.
//!
//! Reads and failures are answered in chunks if that was agreed on; everything else by simple replies, which are shorter.
//! Does not know what is behind an [`Export`].

use super::gate::{Gate, Pass};
use super::holes::Holes;
use super::proto::{self, Agreed, Command, DATA_CHUNK_HEAD_BYTES, Errno, Fault, Request, SIMPLE_REPLY_BYTES, flag};
use super::socket::Socket;
use super::{Export, Limits};
use async_executor::Executor;
use bytes::Bytes;
use event_listener::Event;
use futures_lite::FutureExt;
use std::io::{self, BufReader, IoSlice, Read, Write};
use std::net::Shutdown;
use std::ops::Range;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Headers come in bunches; payloads larger than this go past the buffer.
const READ_BUFFER_BYTES: usize = 64 << 10;

/// Extents of one answer: 64 KiB of it, and enough for 16 MiB of a volume in which every other page is stored.
const EXTENTS_MAX: usize = 8192;

/// Replies that are written together, and bytes from which on they are not held back for more.
const TOGETHER_MAX: usize = 64;
const TOGETHER_BYTES: usize = 256 << 10;

struct Connection<'a, E> {
    socket: &'a Socket,
    export: &'a E,
    agreed: Agreed,
    gate: &'a Gate,
    stopping: &'a AtomicBool,
    /// The client is gone: what it asked before needs no work any more.
    gone: AtomicBool,
    /// A request panicked.
    failed: AtomicBool,
    /// Replies to be written, with the right to be in flight of their requests.
    ready: Mutex<Vec<(Vec<u8>, Pass<'a>)>>,
}

/// Serves `export` until the client disconnects, breaks the protocol, or the server stops.
pub fn serve<E: Export>(
    socket: &Socket,
    export: &E,
    agreed: Agreed,
    limits: &Limits,
    stopping: &AtomicBool,
) -> io::Result<()> {
    let gate = Gate::new(limits.requests_max, limits.bytes_max);
    let (gone, failed) = (AtomicBool::new(false), AtomicBool::new(false));
    let ready = Mutex::new(Vec::with_capacity(TOGETHER_MAX));
    let connection = Connection { socket, export, agreed, gate: &gate, stopping, gone, failed, ready };
    let (executor, done) = (Executor::new(), Event::new());
    let finished = done.listen();
    std::thread::scope(|scope| {
        let replies = std::thread::Builder::new().name("nbd-reply".into()).spawn_scoped(scope, || {
            let work = async {
                loop {
                    while executor.try_tick() {}
                    connection.write_ready();
                    executor.tick().await;
                }
            };
            futures_lite::future::block_on(work.or(finished));
        })?;
        let outcome = connection.requests(&executor);
        gate.wait_idle();
        done.notify(1);
        let panicked = replies.join().is_err() || connection.failed.load(Ordering::Acquire);
        if panicked { Err(io::Error::other("a request failed in an unforeseen way")) } else { outcome }
    })
}

/// Ends the connection if its request panics: that one gets no reply, so its client would wait for ever.
struct EndOnPanic<'a> {
    socket: &'a Socket,
    failed: &'a AtomicBool,
}

impl Drop for EndOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.failed.store(true, Ordering::Release);
            self.socket.shut(Shutdown::Both);
        }
    }
}

impl<'a, E: Export> Connection<'a, E> {
    /// Reads requests and starts their tasks until the connection ends.
    fn requests<'e>(&'e self, executor: &Executor<'e>) -> io::Result<()> {
        let mut reader = BufReader::with_capacity(READ_BUFFER_BYTES, self.socket);
        loop {
            let mut header = [0; proto::REQUEST_BYTES];
            match reader.read_exact(&mut header) {
                Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
                other => other?,
            }
            let request = Request::parse(&header)?;
            if request.command == Command::Disconnect {
                return Ok(());
            }
            let stopping = self.stopping.load(Ordering::Acquire);
            let outcome = if stopping { Err(stopped()) } else { self.check(&request) };
            if request.payload_bytes() > proto::PAYLOAD_BYTES_MAX {
                return Err(proto::broken("a write larger than the 32 MiB announced"));
            }
            let bytes = if request.command == Command::Read && outcome.is_err() { 0 } else { request.length };
            let bytes = if matches!(request.command, Command::Read | Command::Write) { bytes } else { 0 };
            let pass = self.gate.enter(bytes as usize);
            // calloc'ed: memory is taken only as the payload arrives.
            let mut payload = vec![0; request.payload_bytes() as usize];
            reader.read_exact(&mut payload)?;
            // A panic ends the connection, but the reply thread goes on: others under way must come to their end.
            let answer = AssertUnwindSafe(self.answer(request, outcome, payload.into(), pass)).catch_unwind();
            executor.spawn(answer).detach();
            if stopping || self.gone.load(Ordering::Acquire) {
                return Ok(());
            }
        }
    }

    fn check(&self, request: &Request) -> Result<(), Fault> {
        request.check(self.export.bytes().min(self.export.bytes_now()), self.agreed)
    }

    /// Does what a request asks, and hands its reply to be written.
    async fn answer(&self, request: Request, outcome: Result<(), Fault>, payload: Bytes, pass: Pass<'a>) {
        let _guard = EndOnPanic { socket: self.socket, failed: &self.failed };
        let result = match (outcome, request.command) {
            (Err(fault), _) => Err(fault),
            (Ok(()), Command::Read) => self.read(&request).await,
            (Ok(()), Command::BlockStatus) => self.status(&request).await,
            (Ok(()), command) => {
                let done = self.perform(command, &request, payload).await;
                done.map(|()| proto::simple_reply(request.cookie, Ok(())).to_vec())
            }
        };
        let reply = result.unwrap_or_else(|fault| match self.agreed.structured {
            true => proto::error_chunk(request.cookie, &fault),
            false => proto::simple_reply(request.cookie, Err(fault.errno)).to_vec(),
        });
        let mut ready = self.ready();
        ready.push((reply, pass));
        let bytes: usize = ready.iter().map(|(reply, _)| reply.len()).sum();
        let full = ready.len() >= TOGETHER_MAX || bytes >= TOGETHER_BYTES;
        drop(ready);
        if full {
            self.write_ready();
        }
    }

    fn ready(&self) -> MutexGuard<'_, Vec<(Vec<u8>, Pass<'a>)>> {
        self.ready.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn perform(&self, command: Command, request: &Request, payload: Bytes) -> Result<(), Fault> {
        let (offset, length, fua) = (request.offset, u64::from(request.length), request.fua());
        if length == 0 && command != Command::Flush {
            return Ok(());
        }
        match command {
            Command::Write => self.export.write(offset, payload, fua).await,
            Command::Flush => self.export.flush().await,
            Command::Trim => self.export.zero(offset, length, true, fua).await,
            Command::Cache => self.export.cache(offset, length).await,
            Command::WriteZeroes => {
                let hole = request.flags & flag::NO_HOLE == 0;
                if !hole && request.flags & flag::FAST_ZERO != 0 {
                    return Err(Fault::new(Errno::NotSupported, "without a hole each page is written: not fast"));
                }
                self.export.zero(offset, length, hole, fua).await
            }
            Command::Read | Command::BlockStatus | Command::Disconnect | Command::Unknown => {
                Err(Fault::new(Errno::Invalid, "unknown command"))
            }
        }
    }

    async fn read(&self, request: &Request) -> Result<Vec<u8>, Fault> {
        let (cookie, offset, length) = (request.cookie, request.offset, request.length as usize);
        let head_bytes = if self.agreed.structured { DATA_CHUNK_HEAD_BYTES } else { SIMPLE_REPLY_BYTES };
        let mut out = vec![0; head_bytes + length];
        let (head, data) = out.split_at_mut(head_bytes);
        let mut holes = Holes::default();
        if length > 0 {
            self.export.read(offset, data, &mut holes).await?;
        }
        let pieces = holes.pieces(length);
        let in_one = request.flags & flag::DF != 0 || pieces.iter().all(|(_, is_hole)| !is_hole);
        match (self.agreed.structured, in_one) {
            (false, _) => head.copy_from_slice(&proto::simple_reply(cookie, Ok(()))),
            (true, _) if length == 0 => return Ok(proto::empty_chunk(cookie)),
            (true, true) => head.copy_from_slice(&proto::data_chunk_head(cookie, true, offset, length)),
            (true, false) => return Ok(in_pieces(request, data, &pieces)),
        }
        Ok(out)
    }

    async fn status(&self, request: &Request) -> Result<Vec<u8>, Fault> {
        let extents_max = if request.flags & flag::REQ_ONE != 0 { 1 } else { EXTENTS_MAX };
        let extents = self.export.allocation(request.offset, request.length, extents_max).await?;
        Ok(proto::status_chunk(request.cookie, &extents))
    }

    /// Writes all replies that are ready. Blocks the reply thread while the client does not read, which is this connection's
    /// trouble only.
    fn write_ready(&self) {
        let ready = std::mem::take(&mut *self.ready());
        let mut slices: Vec<IoSlice<'_>> = ready.iter().map(|(reply, _)| IoSlice::new(reply)).collect();
        let (mut bytes, mut socket) = (&mut slices[..], self.socket);
        while !bytes.is_empty() && !self.gone.load(Ordering::Acquire) {
            let written = match socket.write_vectored(bytes) {
                Ok(0) => Err(io::ErrorKind::WriteZero.into()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => Ok(0),
                other => other,
            };
            match written {
                Ok(count) => IoSlice::advance_slices(&mut bytes, count),
                Err(_) => {
                    // The client is gone or the stream is out of step: wake the reader, too.
                    self.gone.store(true, Ordering::Release);
                    self.socket.shut(Shutdown::Both);
                }
            }
        }
    }
}

/// What was read in chunks, holes as numbers.
fn in_pieces(request: &Request, data: &[u8], pieces: &[(Range<usize>, bool)]) -> Vec<u8> {
    let mut out = Vec::with_capacity(data.len());
    for (piece, is_hole) in pieces {
        let (done, offset) = (piece.end == data.len(), request.offset + piece.start as u64);
        if *is_hole {
            out.extend(proto::hole_chunk(request.cookie, done, offset, piece.len()));
        } else {
            out.extend(proto::data_chunk_head(request.cookie, done, offset, piece.len()));
            out.extend_from_slice(&data[piece.clone()]);
        }
    }
    out
}

fn stopped() -> Fault {
    Fault::new(Errno::Shutdown, "the server is stopping")
}
