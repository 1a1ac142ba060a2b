//! The transmission phase: requests in, replies out, in any order.
//!
//! ```text
//! this thread: header ─> gate ─> payload ─> task ─┐
//!                 ^                               v
//!                 └──────── next        reply thread: export, then header and data in one write
//! ```
//!
//! 1. Only the reply thread writes to the socket, so replies never mix.
//! 2. A payload is read whole before the next header, also for a request that is refused; where that is not possible
//!    the connection ends.
//! 3. When [`serve`] returns, no request of this connection is under way any more: each was answered, or its client is gone.
//!
//! Does not know what is behind an [`Export`].

use super::gate::{Gate, Pass};
use super::proto::{self, Agreed, Command, Errno, Request, SIMPLE_REPLY_BYTES, flag};
use super::socket::Socket;
use super::structured::{self, DATA_HEADER_BYTES};
use super::{Export, Holes, Limits};
use async_executor::Executor;
use bytes::Bytes;
use event_listener::Event;
use std::io::{self, BufReader, Read, Write};
use std::net::Shutdown;
use std::sync::atomic::{AtomicBool, Ordering};

/// Headers come in bunches; payloads larger than this go past the buffer.
const READ_BUFFER_BYTES: usize = 64 << 10;

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
    let connection = Connection { socket, export, agreed, gate: &gate, stopping, gone, failed };
    let (executor, done) = (Executor::new(), Event::new());
    let finished = done.listen();
    std::thread::scope(|scope| {
        let replies = std::thread::Builder::new().name("nbd-reply".into()).spawn_scoped(scope, || {
            futures_lite::future::block_on(executor.run(finished));
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

impl<E: Export> Connection<'_, E> {
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
            let outcome = if stopping { Err(Errno::Shutdown) } else { request.check(self.export.bytes(), self.agreed) };
            if request.payload_bytes() > proto::PAYLOAD_BYTES_MAX {
                return Err(proto::broken("a write larger than the 32 MiB announced"));
            }
            let bytes = if request.command == Command::Read && outcome.is_err() { 0 } else { request.length };
            let bytes = if matches!(request.command, Command::Read | Command::Write) { bytes } else { 0 };
            let pass = self.gate.enter(bytes as usize);
            // calloc'ed: memory is taken only as the payload arrives.
            let mut payload = vec![0; request.payload_bytes() as usize];
            reader.read_exact(&mut payload)?;
            executor.spawn(self.answer(request, outcome, payload.into(), pass)).detach();
            if stopping || self.gone.load(Ordering::Acquire) {
                return Ok(());
            }
        }
    }

    /// Does what a request asks, and writes its reply.
    async fn answer(&self, request: Request, outcome: Result<(), Errno>, payload: Bytes, _pass: Pass<'_>) {
        let _guard = EndOnPanic { socket: self.socket, failed: &self.failed };
        let result = match (outcome, request.command) {
            (Ok(()), Command::Read) => return self.read(request).await,
            (Ok(()), Command::BlockStatus) => return self.block_status(request).await,
            (Ok(()), command) => self.perform(command, &request, payload).await,
            (Err(errno), _) => Err(errno),
        };
        match result {
            Err(errno) => self.refuse(request.cookie, errno),
            Ok(()) => self.send(&proto::simple_reply(request.cookie, Ok(()))),
        }
    }

    async fn perform(&self, command: Command, request: &Request, payload: Bytes) -> Result<(), Errno> {
        let (offset, length, fua) = (request.offset, u64::from(request.length), request.fua());
        if length == 0 && command != Command::Flush {
            return Ok(());
        }
        match command {
            Command::Write => self.export.write(offset, payload, fua).await,
            Command::Flush => self.export.flush().await,
            Command::Trim => self.export.zero(offset, length, true, fua).await,
            Command::WriteZeroes => {
                let hole = request.flags & flag::NO_HOLE == 0;
                if !hole && request.flags & flag::FAST_ZERO != 0 {
                    // Without a hole each page is written, which is as slow as a write.
                    return Err(Errno::NotSupported);
                }
                self.export.zero(offset, length, hole, fua).await
            }
            Command::Cache => self.export.cache(offset, length).await,
            Command::Read | Command::BlockStatus | Command::Disconnect | Command::Unknown => Err(Errno::Invalid),
        }
    }

    async fn read(&self, request: Request) {
        let Request { cookie, offset, length, .. } = request;
        let header_bytes = if self.agreed.structured { DATA_HEADER_BYTES } else { SIMPLE_REPLY_BYTES };
        let mut out = vec![0; header_bytes + length as usize];
        let (header, data) = out.split_at_mut(header_bytes);
        let read = if data.is_empty() { Ok(Holes::new()) } else { self.export.read(offset, data).await };
        match read {
            Err(errno) => return self.refuse(cookie, errno),
            Ok(_) if !self.agreed.structured => header.copy_from_slice(&proto::simple_reply(cookie, Ok(()))),
            Ok(holes) if !holes.is_empty() && request.flags & flag::DF == 0 => {
                return self.send(&structured::data_and_holes(cookie, offset, data, &holes));
            }
            Ok(_) => header.copy_from_slice(&structured::whole_data(cookie, offset, data.len())),
        }
        self.send(&out);
    }

    async fn block_status(&self, request: Request) {
        match self.export.allocation(request.offset, request.length).await {
            Err(errno) => self.refuse(request.cookie, errno),
            Ok(mut stretches) => {
                if request.flags & flag::REQ_ONE != 0 {
                    stretches.truncate(1);
                }
                self.send(&structured::block_status(request.cookie, &stretches));
            }
        }
    }

    fn refuse(&self, cookie: u64, errno: Errno) {
        match self.agreed.structured {
            true => self.send(&structured::error(cookie, errno)),
            false => self.send(&proto::simple_reply(cookie, Err(errno))),
        }
    }

    /// Blocks the reply thread while the client does not read, which is this connection's trouble only.
    fn send(&self, bytes: &[u8]) {
        let mut socket = self.socket;
        if socket.write_all(bytes).is_err() {
            // The client is gone or the stream is out of step: wake the reader, too.
            self.gone.store(true, Ordering::Release);
            self.socket.shut(Shutdown::Both);
        }
    }
}
