//! A stream socket of either family behind one interface.
//!
//! 1. Reads and writes go through `&Socket`, so that one thread can read while another writes.
//! 2. [`Socket::shut`] can be called from any thread and wakes threads that are blocked in a read
//!    or a write.

use super::admission::Peer;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::sockopt::socket_peercred;
use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// A connected client.
#[derive(Debug)]
pub enum Socket {
    /// Over TCP.
    Tcp(TcpStream),
    /// Over a Unix socket.
    Unix(UnixStream),
    /// No connection at all, for the fuzz targets.
    #[cfg(any(test, fuzzing))]
    Canned(Canned),
}

macro_rules! either {
    ($self:ident, $stream:ident => $call:expr) => {
        match $self {
            Socket::Tcp($stream) => $call,
            Socket::Unix($stream) => $call,
            #[cfg(any(test, fuzzing))]
            Socket::Canned($stream) => $call,
        }
    };
}

impl Socket {
    /// Who is at the other end.
    pub fn peer(&self) -> Peer {
        match self {
            Socket::Tcp(stream) => {
                stream.peer_addr().map_or(Peer::Unknown, |address| Peer::machine(address.ip()))
            }
            Socket::Unix(stream) => {
                socket_peercred(stream).map_or(Peer::Unknown, |peer| Peer::User(peer.uid.as_raw()))
            }
            #[cfg(any(test, fuzzing))]
            Socket::Canned(_) => Peer::Unknown,
        }
    }

    /// Shuts down one direction or both; a socket that is already closed is fine.
    pub fn shut(&self, how: Shutdown) {
        let _ = either!(self, s => s.shutdown(how));
    }

    /// Whether the other side has stopped sending, or is gone.
    pub fn has_hung_up(&self) -> bool {
        self.has_event(PollFlags::RDHUP)
    }

    /// Whether nothing that is sent can arrive any more. For a TCP client that has closed its side
    /// normally this is known only once something was sent to it.
    pub fn is_dead(&self) -> bool {
        self.has_event(PollFlags::empty())
    }

    /// Whether `wanted`, a hang-up or an error is reported now.
    fn has_event(&self, wanted: PollFlags) -> bool {
        let fd = match self {
            Socket::Tcp(stream) => stream.as_fd(),
            Socket::Unix(stream) => stream.as_fd(),
            #[cfg(any(test, fuzzing))]
            Socket::Canned(_) => return false,
        };
        let mut event = [PollFd::new(&fd, wanted)];
        let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        let found = poll(&mut event, Some(&now)).is_ok_and(|count| count > 0);
        found && event[0].revents().intersects(wanted | PollFlags::HUP | PollFlags::ERR)
    }

    /// Makes reads fail with `WouldBlock` or `TimedOut` after `limit`; with `None` they wait for
    /// ever.
    pub fn set_read_timeout(&self, limit: Option<Duration>) -> io::Result<()> {
        either!(self, s => s.set_read_timeout(limit))
    }

    /// Does the same for writes.
    pub fn set_write_timeout(&self, limit: Option<Duration>) -> io::Result<()> {
        either!(self, s => s.set_write_timeout(limit))
    }
}

impl Read for &Socket {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        either!(self, s => (&*s).read(buffer))
    }
}

impl Write for &Socket {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        either!(self, s => (&*s).write(buffer))
    }
    fn write_vectored(&mut self, buffers: &[IoSlice<'_>]) -> io::Result<usize> {
        either!(self, s => (&*s).write_vectored(buffers))
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(any(test, fuzzing))]
pub use canned::Canned;

/// A client whose bytes are all known beforehand.
#[cfg(any(test, fuzzing))]
mod canned {
    use std::io::{self, IoSlice, Read, Write};
    use std::net::Shutdown;
    use std::sync::{Mutex, MutexGuard, PoisonError};
    use std::time::Duration;

    /// A client that sends its bytes in pieces, hangs up after them, and takes answers up to a
    /// limit; then it is gone.
    #[derive(Debug)]
    pub struct Canned(Mutex<State>);

    #[derive(Debug)]
    struct State {
        said: Vec<u8>,
        at: usize,
        piece: usize,
        answered: Vec<u8>,
        room: usize,
        is_shut: bool,
    }

    impl Canned {
        /// Makes a client that sends `said` in pieces of at most `piece` bytes, and takes `room`
        /// bytes.
        pub fn new(said: Vec<u8>, piece: usize, room: usize) -> Self {
            Canned(Mutex::new(State {
                said,
                at: 0,
                piece,
                answered: Vec::new(),
                room,
                is_shut: false,
            }))
        }

        /// The answers that it got.
        pub fn answered(&self) -> Vec<u8> {
            self.lock().answered.clone()
        }

        fn lock(&self) -> MutexGuard<'_, State> {
            self.0.lock().unwrap_or_else(PoisonError::into_inner)
        }

        pub(super) fn shutdown(&self, _how: Shutdown) -> io::Result<()> {
            self.lock().is_shut = true;
            Ok(())
        }

        pub(super) fn set_read_timeout(&self, _limit: Option<Duration>) -> io::Result<()> {
            Ok(())
        }

        pub(super) fn set_write_timeout(&self, _limit: Option<Duration>) -> io::Result<()> {
            Ok(())
        }
    }

    impl Read for &Canned {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let mut state = self.lock();
            if state.is_shut {
                return Ok(0);
            }
            let count = buffer.len().min(state.piece).min(state.said.len() - state.at);
            buffer[..count].copy_from_slice(&state.said[state.at..state.at + count]);
            state.at += count;
            Ok(count)
        }
    }

    impl Write for &Canned {
        fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
            self.write_vectored(&[IoSlice::new(buffer)])
        }

        fn write_vectored(&mut self, buffers: &[IoSlice<'_>]) -> io::Result<usize> {
            let mut state = self.lock();
            let mut taken = 0;
            for buffer in buffers {
                let count = buffer.len().min(state.room - state.answered.len());
                state.answered.extend_from_slice(&buffer[..count]);
                taken += count;
            }
            if taken == 0 && buffers.iter().any(|buffer| !buffer.is_empty()) {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            Ok(taken)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
}

/// A socket with one deadline for all its reads and writes: with a timeout per read, a client that
/// sends a byte now and then could stay for ever.
pub struct Deadline<'a> {
    socket: &'a Socket,
    end: Instant,
    /// The limit for a single read or write.
    pause: Duration,
}

impl<'a> Deadline<'a> {
    /// Sets the deadline to `limit` from now.
    pub fn new(socket: &'a Socket, limit: Duration) -> Self {
        Deadline { socket, end: Instant::now() + limit, pause: limit }
    }

    /// Does the same, with no single read or write longer than `pause`.
    pub fn with_pause(socket: &'a Socket, limit: Duration, pause: Duration) -> Self {
        Deadline { pause, ..Deadline::new(socket, limit) }
    }

    /// Restarts the deadline from now.
    pub fn restart(&mut self, limit: Duration) {
        self.end = Instant::now() + limit;
    }

    /// Removes the limits from the socket.
    pub fn lift(self) -> io::Result<()> {
        self.socket.set_read_timeout(None)?;
        self.socket.set_write_timeout(None)
    }

    fn left(&self) -> io::Result<Option<Duration>> {
        let left = self.end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "the client took too long"));
        }
        Ok(Some(left.min(self.pause)))
    }
}

impl Read for Deadline<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.socket.set_read_timeout(self.left()?)?;
        (&mut &*self.socket).read(buffer)
    }
}

impl Write for Deadline<'_> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.socket.set_write_timeout(self.left()?)?;
        (&mut &*self.socket).write(buffer)
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
