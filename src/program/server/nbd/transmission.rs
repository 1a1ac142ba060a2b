//! The transmission phase: takes requests and sends replies, in any order.
//!
//! ```text
//! this thread: header ─> gate ─> memory ─> payload ─> task ─┐
//!                 ^                                         v
//!                 └──────── next                  reply thread: export; ready replies in one write
//! ```
//!
//! 1. Only the reply thread writes to the socket, so replies never mix. It writes before it waits:
//!    no reply waits for another.
//! 2. A payload is read completely before the next header, even if the request is refused; if that
//!    is not possible, the connection ends.
//! 3. When [`serve`] returns, no request of this connection is in progress: each was answered, or
//!    its client is gone. Once a client is known to be gone, none of its requests begins: the
//!    device works for those that are still there, and no late write overwrites what the client has
//!    written through a new connection.
//! 4. A request gets its memory before it begins (see [`Memory`]); until then the server does not
//!    read from the socket, which slows the client down. A request that is larger than the
//!    available memory is served in parts: a read as `reads` describes; a write by commits in order
//!    of offset, each as large as a commit can be, of which only the last requires durability.
//!
//! Reads and failures are answered in chunks if that was agreed on; everything else by simple
//! replies, which are shorter. It does *not* know what is behind an [`Export`].

use super::connection::Connection;
use super::gate::{Gate, Pass};
use super::memory::{Memory, Patience};
use super::pause;
use super::proto::{self, Agreed, Command, Errno, ExtentKind, Fault, Request, flag};
use super::reads::STREAM_BYTES;
use super::socket::Socket;
use super::{Export, Limits};
use async_executor::Executor;
use bytes::Bytes;
use corepage::Durability;
use event_listener::Event;
use futures_lite::FutureExt;
use std::io::{self, BufReader, Read};
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

/// The most extents of one answer: 64 KiB, which is enough for 16 MiB of a volume in which every
/// other page is stored.
const EXTENTS_MAX: usize = 8192;
/// The memory of one extent: as it is found, and in the answer.
const EXTENT_BYTES: usize = 16;

/// The memory of a request that frees, zeroes or caches: lists of the pages of one commit or, for a
/// large hole that takes many commits, of all in flight.
pub const WORK_BYTES: usize = 128 << 10;
const LARGE_WORK_BYTES: usize = 1 << 20;
const LARGE_WORK_FROM: u32 = 2 << 20;

/// The interval between two checks whether the client of a long write in parts is still there.
const LOOK_PAUSE: Duration = Duration::from_secs(1);

/// Serves `export` until the client disconnects, breaks the protocol, or the server stops.
pub fn serve<E: Export>(
    socket: &Socket,
    export: &E,
    agreed: Agreed,
    limits: &Limits,
    memory: &Arc<Memory>,
    stopping: &Arc<AtomicBool>,
) -> io::Result<()> {
    let gate = Gate::new(limits.requests_max, memory.clone());
    let connection = Connection::new(socket, export, agreed, &gate, limits, stopping.clone());
    // The timeouts detect a client that stops in the middle of a payload, or takes no replies while
    // its writes wait for that.
    socket.set_read_timeout(Some(limits.payload_stall))?;
    socket.set_write_timeout(Some(limits.payload_stall))?;
    let (executor, done) = (Executor::new(), Event::new());
    let finished = done.listen();
    let peer = connection.peer();
    std::thread::scope(|scope| {
        let replies =
            std::thread::Builder::new().name("nbd-reply".into()).spawn_scoped(scope, || {
                let work = async {
                    loop {
                        while executor.try_tick() {}
                        connection.write_ready();
                        executor.tick().await;
                    }
                };
                pause::block_on(move || peer.client(), work.or(finished));
            })?;
        let outcome = connection.requests(&executor);
        connection.note_end();
        gate.wait_idle();
        done.notify(1);
        let panicked = replies.join().is_err() || connection.has_failed();
        if panicked { Err(unforeseen()) } else { outcome }
    })
}

impl<'a, E: Export> Connection<'a, E> {
    /// Reads requests and starts their tasks until the connection ends.
    fn requests<'e>(&'e self, executor: &Executor<'e>) -> io::Result<()> {
        let mut reader =
            BufReader::with_capacity(self.gate.memory().division().input_bytes, self.socket);
        loop {
            let mut header = [0; proto::REQUEST_BYTES];
            match self.fill(&mut reader, &mut header, || true) {
                Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
                other => other?,
            }
            let mut request = Request::parse(&header)?;
            if request.command == Command::Disconnect {
                self.note_goodbye();
                return Ok(());
            }
            let stopping = self.is_stopping();
            let outcome = if stopping { Err(stopped()) } else { self.check(&request) };
            let mut pass = self.gate.enter_looking(LOOK_PAUSE, || self.look());
            let outcome = match request.command {
                Command::Write => {
                    self.payload(&mut reader, &mut request, outcome, &mut pass, executor)?
                }
                _ => outcome.map(|()| {
                    self.take_memory(&request, &mut pass);
                    Bytes::new()
                }),
            };
            // A panic ends the connection, but the reply thread continues: the other requests must
            // finish.
            let answer = AssertUnwindSafe(self.answer(request, outcome, pass)).catch_unwind();
            executor.spawn(answer).detach();
            if stopping || self.is_gone() {
                return Ok(());
            }
        }
    }

    /// Takes memory for anything but a write.
    fn take_memory(&self, request: &Request, pass: &mut Pass<'_>) {
        let length = request.length as usize;
        match request.command {
            Command::Read if self.is_in_one(request) => pass.take_reply(length),
            Command::Read => pass.take_reply(length.min(STREAM_BYTES)),
            Command::BlockStatus => pass.take_reply(EXTENTS_MAX * EXTENT_BYTES),
            Command::Trim | Command::WriteZeroes if request.length > LARGE_WORK_FROM => {
                pass.take_work(LARGE_WORK_BYTES)
            }
            Command::Trim | Command::WriteZeroes | Command::Cache => pass.take_work(WORK_BYTES),
            Command::Write | Command::Flush | Command::Disconnect | Command::Unknown => {}
        }
    }

    /// Reads the payload of a write. If it is larger than a commit, all but its last part is
    /// written here, and the request is shortened to that. If `check` has refused the write, or a
    /// part fails, the payload is read and discarded.
    fn payload<'e>(
        &'e self,
        reader: &mut impl Read,
        request: &mut Request,
        check: Result<(), Fault>,
        pass: &mut Pass<'_>,
        executor: &Executor<'e>,
    ) -> io::Result<Result<Bytes, Fault>> {
        let (mut left, mut patience) = (request.payload_bytes() as usize, Patience::Left);
        let mut outcome = check;
        let most = self.export.write_bytes_max().min(self.gate.memory().payload_bytes_max());
        while outcome.is_ok() {
            // Parts end at the end of a page, and the first one is no larger if it begins within a
            // page.
            let begins =
                (request.offset % most.min(proto::BLOCK_PREFERRED_BYTES as usize) as u64) as usize;
            let wanted = left.min(most - begins);
            let given = pass.take_payload(wanted, patience);
            if given < wanted {
                patience = Patience::Spent;
            }
            let length = if given < wanted { given - begins } else { wanted };
            let is_last = length == left;
            // The vector is calloc'ed, so memory is taken only as the payload arrives.
            let mut part = vec![0; length];
            let begun = Instant::now();
            let goes_on = || {
                begun.elapsed() < self.limits.payload_stall || !self.gate.memory().is_waited_for()
            };
            self.fill(reader, &mut part, goes_on)?;
            if is_last {
                return Ok(Ok(part.into()));
            }
            outcome = self.write_part(request.offset, part.into(), executor)?;
            request.offset += length as u64;
            request.length -= length as u32;
            left -= length;
        }
        pass.give_back();
        let mut forgotten = [0; proto::BLOCK_PREFERRED_BYTES as usize];
        while left > 0 {
            let length = left.min(forgotten.len());
            self.fill(reader, &mut forgotten[..length], || true)?;
            left -= length;
        }
        Ok(outcome.map(|()| Bytes::new()))
    }

    /// Writes a part of a payload on the reply thread, and waits for it.
    fn write_part<'e>(
        &'e self,
        offset: u64,
        part: Bytes,
        executor: &Executor<'e>,
    ) -> io::Result<Result<(), Fault>> {
        let (sender, written) = sync_channel(1);
        let write = async move {
            let write = AssertUnwindSafe(self.export.write(offset, part, Durability::Buffered))
                .catch_unwind()
                .await;
            let _ = sender.send(write);
        };
        executor.spawn(write).detach();
        loop {
            match written.recv_timeout(LOOK_PAUSE) {
                Ok(Ok(result)) => return Ok(result),
                Ok(Err(_)) | Err(RecvTimeoutError::Disconnected) => {
                    self.note_failure();
                    return Err(unforeseen());
                }
                Err(RecvTimeoutError::Timeout) => {
                    self.look();
                }
            }
        }
    }

    fn check(&self, request: &Request) -> Result<(), Fault> {
        if self.export.is_deleted() {
            return Err(Fault::new(Errno::Shutdown, "the volume was deleted"));
        }
        request.check(self.export.bytes().min(self.export.bytes_now()), self.agreed)
    }

    /// Carries out a request with its payload, and queues its reply to be written.
    async fn answer(&self, request: Request, outcome: Result<Bytes, Fault>, mut pass: Pass<'a>) {
        let _guard = self.end_on_panic();
        let is_wanted = request.command.is_change() && self.has_said_goodbye();
        if self.is_gone() && !is_wanted {
            return;
        }
        let result = match (outcome, request.command) {
            (Err(fault), _) => Err(fault),
            (Ok(_), Command::Read) if request.length as usize > pass.room() => {
                match self.stream(&request, &pass).await {
                    Ok(()) => return,
                    Err(fault) => Err(fault),
                }
            }
            (Ok(_), Command::Read) => self.read(&request).await,
            (Ok(_), Command::BlockStatus) => self.status(&request, pass.room()).await,
            (Ok(payload), command) => {
                let done = self.perform(command, &request, payload).await;
                // Give the memory back, so that a client that does not take its replies holds
                // nothing that a write waits for.
                pass.give_back();
                done.map(|()| proto::simple_reply(request.cookie, Ok(())).to_vec())
            }
        };
        let reply = result.unwrap_or_else(|fault| match self.agreed.structured {
            true => proto::error_chunk(request.cookie, &fault),
            false => proto::simple_reply(request.cookie, Err(fault.errno)).to_vec(),
        });
        self.reply(reply, pass);
    }

    async fn perform(
        &self,
        command: Command,
        request: &Request,
        payload: Bytes,
    ) -> Result<(), Fault> {
        let (offset, length, durability) =
            (request.offset, u64::from(request.length), request.durability());
        if length == 0 && command != Command::Flush {
            return Ok(());
        }
        match command {
            Command::Write => self.export.write(offset, payload, durability).await,
            Command::Flush => self.export.flush().await,
            Command::Trim => self.export.zero(offset, length, ExtentKind::Hole, durability).await,
            Command::Cache => self.export.cache(offset, length).await,
            Command::WriteZeroes => {
                let kind = match request.flags & flag::NO_HOLE {
                    0 => ExtentKind::Hole,
                    _ => ExtentKind::Stored,
                };
                if kind == ExtentKind::Stored && request.flags & flag::FAST_ZERO != 0 {
                    return Err(Fault::new(
                        Errno::NotSupported,
                        "without a hole each page is written: not fast",
                    ));
                }
                self.export.zero(offset, length, kind, durability).await
            }
            Command::Read | Command::BlockStatus | Command::Disconnect | Command::Unknown => {
                Err(Fault::new(Errno::Invalid, "unknown command"))
            }
        }
    }

    async fn status(&self, request: &Request, room: usize) -> Result<Vec<u8>, Fault> {
        if request.length == 0 {
            return Ok(proto::empty_chunk(request.cookie));
        }
        let most = EXTENTS_MAX.min(room / EXTENT_BYTES).max(1);
        let extents_max = if request.flags & flag::REQ_ONE != 0 { 1 } else { most };
        let extents = self.export.allocation(request.offset, request.length, extents_max).await?;
        Ok(proto::status_chunk(request.cookie, &extents))
    }
}

fn unforeseen() -> io::Error {
    io::Error::other("a request failed in an unforeseen way")
}

fn stopped() -> Fault {
    Fault::new(Errno::Shutdown, "the server is stopping")
}
