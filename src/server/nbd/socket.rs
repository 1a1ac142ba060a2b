//! A stream socket of either family behind one face.
//!
//! 1. Reads and writes go through `&Socket`, so that one thread can read while another writes.
//! 2. [`Socket::shut`] can be called from any thread and wakes whoever is blocked in a read or a write.

use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// A connected client.
#[derive(Debug)]
pub enum Socket {
    /// Over TCP.
    Tcp(TcpStream),
    /// Over a Unix socket.
    Unix(UnixStream),
}

macro_rules! either {
    ($self:ident, $stream:ident => $call:expr) => {
        match $self {
            Socket::Tcp($stream) => $call,
            Socket::Unix($stream) => $call,
        }
    };
}

impl Socket {
    /// Ends one direction or both; a socket that is gone already is fine.
    pub fn shut(&self, how: Shutdown) {
        let _ = either!(self, s => s.shutdown(how));
    }

    /// Reads fail with `WouldBlock` or `TimedOut` after `limit`; `None`: they wait for ever.
    pub fn set_read_timeout(&self, limit: Option<Duration>) -> io::Result<()> {
        either!(self, s => s.set_read_timeout(limit))
    }

    /// The same of writes.
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

/// A socket whose reads and writes all together end at one time: a timeout per read would let a client that sends
/// a byte now and then stay for ever.
pub struct Deadline<'a> {
    socket: &'a Socket,
    end: Instant,
}

impl<'a> Deadline<'a> {
    /// From now on, `limit` long.
    pub fn new(socket: &'a Socket, limit: Duration) -> Self {
        Deadline { socket, end: Instant::now() + limit }
    }

    /// The same once more, from now on.
    pub fn restart(&mut self, limit: Duration) {
        self.end = Instant::now() + limit;
    }

    /// Takes the limits off the socket again.
    pub fn lift(self) -> io::Result<()> {
        self.socket.set_read_timeout(None)?;
        self.socket.set_write_timeout(None)
    }

    fn left(&self) -> io::Result<Option<Duration>> {
        let left = self.end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "the client took too long"));
        }
        Ok(Some(left))
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
