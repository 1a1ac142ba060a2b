//! The client's end of a server's control socket.
//!
//! 1. No wait is silent: if a server is still opening its store, or is slow, stderr says so; if it
//!    is stopped, or takes no connections, that is an error that names its process.
//! 2. A missing server is distinguished from everything that can keep a command from reaching one.
//!
//! It does *not* know what the requests mean.

// Waiting for a server takes real time.
#![allow(clippy::disallowed_methods)]

use super::{Failure, output, size, system};
use crate::program::server::control::{Opening, Reachable, Request};
use rustix::net::sockopt;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use serde_json::Value;
use std::fmt;
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long a server may take to have room for another connection: longer than a busy one ever
/// takes.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// How long an answer may take: longer than a server itself retries on a busy store.
const ANSWER_LIMIT: Duration = Duration::from_secs(75);
/// The interval between two checks that the server is still at work.
const LOOK: Duration = Duration::from_secs(1);
/// How long a wait for an answer stays silent.
const SILENCE: Duration = Duration::from_secs(3);
/// The interval between two checks of a store that is being opened.
const OPENING_LOOK: Duration = Duration::from_millis(250);
const OPENING_WORD: Duration = Duration::from_secs(5);

/// A connection to a running server.
pub struct Connection {
    stream: UnixStream,
    socket: PathBuf,
    /// The server's process, if it is visible from here.
    process: Option<i32>,
    /// Bytes that were read beyond the last line.
    rest: Vec<u8>,
}

impl Connection {
    /// Connects. `None` if there is no server.
    ///
    /// # Errors
    /// There may be a server, but it can't be reached.
    pub fn open(socket: &Path) -> Result<Option<Connection>, Failure> {
        let refused = |error: io::Error| {
            Failure::new(format_args!("the control socket {}: {error}", socket.display()))
        };
        let connected = match Reachable::new(socket) {
            Ok(reachable) => connect(reachable.path()),
            Err(error) => Err(error),
        };
        let stream = match connected {
            Ok(stream) => stream,
            Err(error)
                if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) =>
            {
                return Ok(None);
            }
            // The directory is not a directory: opening the store there reports that better.
            Err(error) if error.kind() == ErrorKind::NotADirectory => return Ok(None),
            Err(error) if error.kind() == ErrorKind::PermissionDenied => {
                let text = format!(
                    "{error}; only the user that runs the server may ask it: use sudo -u USER, or \
                     be root"
                );
                return Err(refused(io::Error::new(error.kind(), text)));
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                let text = "the server takes no connections: it is stopped, or too many commands \
                            already wait for it";
                return Err(refused(io::Error::new(error.kind(), text)));
            }
            Err(error) => return Err(refused(error)),
        };
        let process = system::peer_process(&stream);
        Ok(Some(Connection { stream, socket: socket.to_owned(), process, rest: Vec::new() }))
    }

    /// The name of the server in messages.
    pub fn server(&self) -> impl fmt::Display {
        match self.process {
            Some(number) => format!("the server (process {number}) at {}", self.socket.display()),
            None => format!("the server at {}", self.socket.display()),
        }
    }

    /// Sends a request, and returns the server's answer once its store is open.
    pub fn ask(&mut self, request: &Request) -> Result<Value, Failure> {
        let line = serde_json::to_string(request).map_err(Failure::new)? + "\n";
        let mut said: Option<Instant> = None;
        loop {
            let answer = self.exchange(&line)?;
            if let Some(error) = answer.get("error") {
                return Err(Failure::new(error.as_str().unwrap_or("an error without a text")));
            }
            let Ok(opening) = serde_json::from_value::<Opening>(answer["opening"].clone()) else {
                return Ok(answer["ok"].clone());
            };
            if said.is_none_or(|said| said.elapsed() >= OPENING_WORD) {
                said = Some(Instant::now());
                output::STDERR.say(&format!(
                    "{} is still opening the store ({}); waiting\n",
                    self.server(),
                    describe(&opening)
                ));
            }
            std::thread::sleep(OPENING_LOOK);
        }
    }

    /// Sends one line and receives one.
    fn exchange(&mut self, line: &str) -> Result<Value, Failure> {
        let gone = |error: io::Error| Failure::new(format_args!("the server is gone: {error}"));
        self.stream.set_write_timeout(Some(CONNECT_LIMIT)).map_err(gone)?;
        match self.stream.write_all(line.as_bytes()) {
            // It has closed the connection, perhaps after a line that says why.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => {}
            written => written.map_err(gone)?,
        }
        let answer = self.line()?;
        serde_json::from_slice(&answer).map_err(|_| {
            Failure::new(format_args!("{} closed the connection: it has ended", self.server()))
        })
    }

    /// The next line from the server, which is incomplete if the server has closed the connection.
    fn line(&mut self) -> Result<Vec<u8>, Failure> {
        let (begun, mut has_spoken) = (Instant::now(), false);
        let mut buffer = [0; 4096];
        loop {
            if let Some(end) = self.rest.iter().position(|byte| *byte == b'\n') {
                let rest = self.rest.split_off(end + 1);
                return Ok(std::mem::replace(&mut self.rest, rest));
            }
            self.stream.set_read_timeout(Some(LOOK)).map_err(Failure::new)?;
            match self.stream.read(&mut buffer) {
                Ok(0) => return Ok(std::mem::take(&mut self.rest)),
                Ok(count) => self.rest.extend_from_slice(&buffer[..count]),
                Err(error)
                    if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) =>
                {
                    let waited = begun.elapsed();
                    self.check_waiting(waited)?;
                    if waited >= SILENCE && !std::mem::replace(&mut has_spoken, true) {
                        output::STDERR.say(&format!("waiting for {}\n", self.server()));
                    }
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => {
                    return Err(Failure::new(format_args!("the server is gone: {error}")));
                }
            }
        }
    }

    /// Checks that an answer can still be expected.
    fn check_waiting(&self, waited: Duration) -> Result<(), Failure> {
        let unknown = "it is not known whether it was done: see `corepage volume list`";
        if self.process.is_some_and(is_stopped) {
            let text =
                format_args!("{} is stopped; `kill -CONT` resumes it; {unknown}", self.server());
            return Err(Failure::new(text));
        }
        if waited >= ANSWER_LIMIT {
            let seconds = waited.as_secs();
            return Err(Failure::new(format_args!(
                "{} has not answered for {seconds} s; {unknown}",
                self.server()
            )));
        }
        Ok(())
    }
}

/// Connects to a socket, and waits at most [`CONNECT_LIMIT`] for room in its queue.
fn connect(path: &Path) -> io::Result<UnixStream> {
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, Some(CONNECT_LIMIT))?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket.into())
}

/// Whether a process is stopped by SIGSTOP or a debugger; one in a frozen control group shows as
/// running.
fn is_stopped(process: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    // The program's name may contain spaces and parentheses.
    let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
    matches!(state, Some('T' | 't'))
}

fn describe(opening: &Opening) -> String {
    let seconds = opening.seconds;
    match (opening.read_bytes, opening.written_bytes) {
        (Some(read), Some(written)) => {
            format!("{seconds:.0} s, {} read, {} written", size::show(read), size::show(written))
        }
        _ => format!("{seconds:.0} s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    /// A server that has too many clients says so and closes the connection, even before it gets a
    /// request: "broken pipe" would help no user.
    #[test]
    fn why_a_server_has_closed_the_connection_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s");
        let listener = UnixListener::bind(&socket).unwrap();
        let mut connection = Connection::open(&socket).unwrap().expect("a server");
        let (mut server, _) = listener.accept().unwrap();
        server.write_all(b"{\"error\":\"too many\"}\n").unwrap();
        drop(server);
        let refused = connection.ask(&Request::Volumes).expect_err("it is refused");
        assert_eq!(refused.text, "too many");
    }
}
