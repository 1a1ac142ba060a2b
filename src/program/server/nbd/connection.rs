//! The state of a connection in its transmission phase, and its socket.
//!
//! | What is known of the client | Learned from | What it asked for |
//! |---|---|---|
//! | said goodbye | its last request | changes are done, even if it is gone by then |
//! | ended | the end of its requests, or the server stops | is tried for a moment longer |
//! | gone | a failed write, a dead socket | is not begun any more |
//!
//! 1. Whoever writes to the socket holds `turn`, so replies never mix. Those that are ready go out
//!    in one write; nothing comes between the pieces of a reply that is written in several.
//! 2. A client that is gone stays gone: the flags only go up.
//! 3. A request that panics gets no reply, so the connection ends, or its client would wait for
//!    ever.
//!
//! Does not know commands: `transmission` takes requests and answers them, `reads` answers reads.

use super::gate::{Gate, Pass};
use super::pause::Client;
use super::proto::Agreed;
use super::socket::Socket;
use super::{Export, Limits};
use std::io::{self, IoSlice, Read, Write};
use std::net::Shutdown;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tracing::debug;

/// The most replies that are written together, and the bytes at which they are no longer held back
/// for more.
const TOGETHER_MAX: usize = 64;
const TOGETHER_BYTES: usize = 256 << 10;

/// What is known of the client; shared with the pauses of the reply thread.
pub(super) struct Peer {
    stopping: Arc<AtomicBool>,
    /// Set when the client no longer waits for answers: it has said goodbye, or is gone.
    ended: AtomicBool,
    /// Set when the client is gone: its requests need no more work.
    gone: AtomicBool,
    /// Set when the client has said goodbye: the protocol requires the changes that it requested
    /// before, though it may not wait for them.
    said_goodbye: AtomicBool,
}

impl Peer {
    pub(super) fn client(&self) -> Client {
        if self.gone.load(Ordering::Acquire) && !self.said_goodbye.load(Ordering::Acquire) {
            return Client::IsGone;
        }
        match self.ended.load(Ordering::Acquire) || self.stopping.load(Ordering::Acquire) {
            true => Client::Ends,
            false => Client::Waits,
        }
    }
}

pub(super) struct Connection<'a, E> {
    pub(super) socket: &'a Socket,
    pub(super) export: &'a E,
    pub(super) agreed: Agreed,
    pub(super) gate: &'a Gate,
    pub(super) limits: &'a Limits,
    peer: Arc<Peer>,
    /// Set when a request panicked.
    failed: AtomicBool,
    /// Replies to write, with the passes of their requests.
    ready: Mutex<Vec<(Vec<u8>, Pass<'a>)>>,
    /// Held while a reply is written in pieces that belong together, so that nothing else is
    /// written between them.
    pub(super) turn: async_lock::Mutex<()>,
}

/// Ends the connection if the request that holds this panics.
pub(super) struct EndOnPanic<'a> {
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

// --- the client ---

impl<'a, E: Export> Connection<'a, E> {
    pub(super) fn new(
        socket: &'a Socket,
        export: &'a E,
        agreed: Agreed,
        gate: &'a Gate,
        limits: &'a Limits,
        stopping: Arc<AtomicBool>,
    ) -> Self {
        let peer = Peer {
            stopping,
            ended: AtomicBool::new(false),
            gone: AtomicBool::new(false),
            said_goodbye: AtomicBool::new(false),
        };
        Connection {
            socket,
            export,
            agreed,
            gate,
            limits,
            peer: Arc::new(peer),
            failed: AtomicBool::new(false),
            ready: Mutex::default(),
            turn: async_lock::Mutex::new(()),
        }
    }

    pub(super) fn peer(&self) -> Arc<Peer> {
        self.peer.clone()
    }

    /// Whether the whole server stops.
    pub(super) fn is_stopping(&self) -> bool {
        self.peer.stopping.load(Ordering::Acquire)
    }

    pub(super) fn is_gone(&self) -> bool {
        self.peer.gone.load(Ordering::Acquire)
    }

    pub(super) fn has_said_goodbye(&self) -> bool {
        self.peer.said_goodbye.load(Ordering::Acquire)
    }

    pub(super) fn note_goodbye(&self) {
        self.peer.said_goodbye.store(true, Ordering::Release);
    }

    /// Checks whether the client is still there while nothing is read from it.
    pub(super) fn look(&self) {
        if self.socket.has_hung_up() {
            self.peer.ended.store(true, Ordering::Release);
        }
        if self.socket.is_dead() {
            self.peer.gone.store(true, Ordering::Release);
        }
    }

    /// No more requests are read. Without a goodbye the client may still wait for replies (a
    /// half-closed socket), or be gone.
    pub(super) fn note_end(&self) {
        if !self.has_said_goodbye() && self.socket.is_dead() {
            self.peer.gone.store(true, Ordering::Release);
        }
        self.peer.ended.store(true, Ordering::Release);
    }

    /// Ends the connection, because the client is gone or the stream is out of step. Wakes the
    /// reader, too.
    pub(super) fn hang_up(&self) {
        self.peer.gone.store(true, Ordering::Release);
        self.socket.shut(Shutdown::Both);
    }

    pub(super) fn end_on_panic(&self) -> EndOnPanic<'_> {
        EndOnPanic { socket: self.socket, failed: &self.failed }
    }

    pub(super) fn note_failure(&self) {
        self.failed.store(true, Ordering::Release);
    }

    pub(super) fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }
}

// --- its socket ---

impl<'a, E: Export> Connection<'a, E> {
    /// Reads all of `bytes`; between two parts, and after a pause of the client, `goes_on` decides
    /// whether to wait for it.
    pub(super) fn fill(
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

    /// Queues a reply to be written. Its request stays in flight until then.
    pub(super) fn reply(&self, reply: Vec<u8>, pass: Pass<'a>) {
        let mut ready = self.ready();
        ready.push((reply, pass));
        let bytes: usize = ready.iter().map(|(reply, _)| reply.len()).sum();
        let is_full = ready.len() >= TOGETHER_MAX || bytes >= TOGETHER_BYTES;
        drop(ready);
        if is_full {
            self.write_ready();
        }
    }

    fn ready(&self) -> MutexGuard<'_, Vec<(Vec<u8>, Pass<'a>)>> {
        self.ready.lock().unwrap_or_else(PoisonError::into_inner)
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
}
