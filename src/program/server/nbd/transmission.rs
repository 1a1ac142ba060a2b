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

use super::gate::{Gate, Pass};
use super::memory::Memory;
use super::pause::{self, Client};
use super::proto::{self, Agreed, Command, Errno, Fault, Request, flag};
use super::reads::STREAM_BYTES;
use super::socket::Socket;
use super::{Export, Limits};
use async_executor::Executor;
use bytes::Bytes;
use event_listener::Event;
use futures_lite::FutureExt;
use std::io::{self, BufReader, IoSlice, Read, Write};
use std::net::Shutdown;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tracing::debug;

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

/// The most replies that are written together, and the bytes at which they are no longer held back
/// for more.
const TOGETHER_MAX: usize = 64;
const TOGETHER_BYTES: usize = 256 << 10;

pub(super) struct Connection<'a, E> {
    pub(super) socket: &'a Socket,
    pub(super) export: &'a E,
    pub(super) agreed: Agreed,
    gate: &'a Gate,
    limits: &'a Limits,
    stopping: &'a AtomicBool,
    /// Set when the client no longer waits for answers: it has said goodbye, or is gone.
    ended: Arc<AtomicBool>,
    /// Set when the client is gone: its requests need no more work.
    gone: Arc<AtomicBool>,
    /// Set when the client has said goodbye: the protocol requires the changes that it requested
    /// before, though it may not wait for them.
    said_goodbye: Arc<AtomicBool>,
    /// Set when a request panicked.
    failed: AtomicBool,
    /// Replies to write, with the passes of their requests.
    ready: Mutex<Vec<(Vec<u8>, Pass<'a>)>>,
    /// Held while a reply is written in pieces that belong together, so that nothing else is
    /// written between them.
    pub(super) turn: async_lock::Mutex<()>,
}

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
    let connection = Connection {
        socket,
        export,
        agreed,
        gate: &gate,
        limits,
        stopping,
        ended: Arc::default(),
        gone: Arc::default(),
        said_goodbye: Arc::default(),
        failed: AtomicBool::new(false),
        ready: Mutex::default(),
        turn: async_lock::Mutex::new(()),
    };
    // The timeouts detect a client that stops in the middle of a payload, or takes no replies while
    // its writes wait for that.
    socket.set_read_timeout(Some(limits.payload_stall))?;
    socket.set_write_timeout(Some(limits.payload_stall))?;
    let (executor, done) = (Executor::new(), Event::new());
    let finished = done.listen();
    let (ended, stops) = (connection.ended.clone(), stopping.clone());
    let (gone, said_goodbye) = (connection.gone.clone(), connection.said_goodbye.clone());
    let client = move || match ended.load(Ordering::Acquire) || stops.load(Ordering::Acquire) {
        _ if gone.load(Ordering::Acquire) && !said_goodbye.load(Ordering::Acquire) => {
            Client::IsGone
        }
        true => Client::Ends,
        false => Client::Waits,
    };
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
                pause::block_on(client, work.or(finished));
            })?;
        let outcome = connection.requests(&executor);
        // Without a goodbye the client may still wait for replies on a half-closed socket, or be
        // gone.
        if !connection.said_goodbye.load(Ordering::Acquire) && socket.is_dead() {
            connection.gone.store(true, Ordering::Release);
        }
        connection.ended.store(true, Ordering::Release);
        gate.wait_idle();
        done.notify(1);
        let panicked = replies.join().is_err() || connection.failed.load(Ordering::Acquire);
        if panicked { Err(unforeseen()) } else { outcome }
    })
}

fn unforeseen() -> io::Error {
    io::Error::other("a request failed in an unforeseen way")
}

/// Ends the connection if its request panics: that gets no reply, so its client would wait for
/// ever.
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
                self.said_goodbye.store(true, Ordering::Release);
                return Ok(());
            }
            let stopping = self.stopping.load(Ordering::Acquire);
            let mut outcome = if stopping { Err(stopped()) } else { self.check(&request) };
            let mut pass = self.gate.enter_looking(LOOK_PAUSE, || self.look());
            let mut payload = Bytes::new();
            if request.command == Command::Write {
                match self.payload(
                    &mut reader,
                    &mut request,
                    outcome.is_ok(),
                    &mut pass,
                    executor,
                )? {
                    Ok(last) => payload = last,
                    Err(fault) => outcome = outcome.and(Err(fault)),
                }
            } else if outcome.is_ok() {
                self.take_memory(&request, &mut pass);
            }
            // A panic ends the connection, but the reply thread continues: the other requests must
            // finish.
            let answer =
                AssertUnwindSafe(self.answer(request, outcome, payload, pass)).catch_unwind();
            executor.spawn(answer).detach();
            if stopping || self.gone.load(Ordering::Acquire) {
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

    /// Reads all of `bytes`; between two parts, and after a pause of the client, `goes_on` decides
    /// whether to wait for it.
    fn fill(
        &self,
        reader: &mut impl Read,
        bytes: &mut [u8],
        goes_on: impl Fn() -> bool,
    ) -> io::Result<()> {
        let mut at = 0;
        while at < bytes.len() {
            match reader.read(&mut bytes[at..]) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => at += count,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e)
                    if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {}
                Err(e) => return Err(e),
            }
            if at < bytes.len() && !goes_on() {
                let text = format!(
                    "a client has not sent a payload within {:?}, and others wait for its memory",
                    self.limits.payload_stall
                );
                return Err(io::Error::new(io::ErrorKind::TimedOut, text));
            }
        }
        Ok(())
    }

    /// Reads the payload of a write. If it is larger than a commit, all but its last part is
    /// written here, and the request is shortened to that. If the write is refused, or a part
    /// fails, the payload is read and discarded.
    fn payload<'e>(
        &'e self,
        reader: &mut impl Read,
        request: &mut Request,
        is_wanted: bool,
        pass: &mut Pass<'_>,
        executor: &Executor<'e>,
    ) -> io::Result<Result<Bytes, Fault>> {
        let (mut left, mut fault, mut has_waited) = (request.payload_bytes() as usize, None, false);
        let most = self.export.write_bytes_max().min(self.gate.memory().payload_bytes_max());
        while is_wanted && fault.is_none() {
            // Parts end at the end of a page, and the first one is no larger if it begins within a
            // page.
            let begins =
                (request.offset % most.min(proto::BLOCK_PREFERRED_BYTES as usize) as u64) as usize;
            let wanted = left.min(most - begins);
            let given = pass.take_payload(wanted, has_waited);
            has_waited |= given < wanted;
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
            fault = self.write_part(request.offset, part.into(), executor)?.err();
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
        Ok(fault.map_or(Ok(Bytes::new()), Err))
    }

    /// Checks whether the client is still there while nothing is read from it.
    fn look(&self) {
        if self.socket.has_hung_up() {
            self.ended.store(true, Ordering::Release);
        }
        if self.socket.is_dead() {
            self.gone.store(true, Ordering::Release);
        }
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
            let write =
                AssertUnwindSafe(self.export.write(offset, part, false)).catch_unwind().await;
            let _ = sender.send(write);
        };
        executor.spawn(write).detach();
        loop {
            match written.recv_timeout(LOOK_PAUSE) {
                Ok(Ok(result)) => return Ok(result),
                Ok(Err(_)) | Err(RecvTimeoutError::Disconnected) => {
                    self.failed.store(true, Ordering::Release);
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

    /// Carries out a request, and queues its reply to be written.
    async fn answer(
        &self,
        request: Request,
        outcome: Result<(), Fault>,
        payload: Bytes,
        mut pass: Pass<'a>,
    ) {
        let _guard = EndOnPanic { socket: self.socket, failed: &self.failed };
        let is_wanted = request.command.is_change() && self.said_goodbye.load(Ordering::Acquire);
        if self.is_gone() && !is_wanted {
            return;
        }
        let result = match (outcome, request.command) {
            (Err(fault), _) => Err(fault),
            (Ok(()), Command::Read) if request.length as usize > pass.room() => {
                match self.stream(&request, &pass).await {
                    Ok(()) => return,
                    Err(fault) => Err(fault),
                }
            }
            (Ok(()), Command::Read) => self.read(&request).await,
            (Ok(()), Command::BlockStatus) => self.status(&request, pass.room()).await,
            (Ok(()), command) => {
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

    async fn perform(
        &self,
        command: Command,
        request: &Request,
        payload: Bytes,
    ) -> Result<(), Fault> {
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
                    return Err(Fault::new(
                        Errno::NotSupported,
                        "without a hole each page is written: not fast",
                    ));
                }
                self.export.zero(offset, length, hole, fua).await
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

    /// Writes all replies that are ready, unless one is being written in pieces. Blocks the reply
    /// thread while the client does not read, which affects only this connection.
    pub(super) fn write_ready(&self) {
        let Some(_turn) = self.turn.try_lock() else { return };
        let ready = std::mem::take(&mut *self.ready());
        let mut slices: Vec<IoSlice<'_>> =
            ready.iter().map(|(reply, _)| IoSlice::new(reply)).collect();
        self.write(&mut slices);
    }

    /// Writes all bytes, unless the client is gone.
    pub(super) fn write(&self, mut bytes: &mut [IoSlice<'_>]) {
        let mut socket = self.socket;
        while !bytes.is_empty() && !self.is_gone() {
            let written = match socket.write_vectored(bytes) {
                Ok(0) => Err(io::ErrorKind::WriteZero.into()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => Ok(0),
                Err(e)
                    if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
                        && !self.gate.keeps_others_waiting() =>
                {
                    Ok(0)
                }
                other => other,
            };
            match written {
                Ok(count) => IoSlice::advance_slices(&mut bytes, count),
                Err(error) => {
                    let why =
                        "the client is gone, or takes no replies and keeps memory that others need";
                    debug!(%error, "{why}");
                    self.hang_up();
                }
            }
        }
    }

    pub(super) fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }

    /// Ends the connection, because the client is gone or the stream is out of step. Wakes the
    /// reader, too.
    pub(super) fn hang_up(&self) {
        self.gone.store(true, Ordering::Release);
        self.socket.shut(Shutdown::Both);
    }
}

fn stopped() -> Fault {
    Fault::new(Errno::Shutdown, "the server is stopping")
}
