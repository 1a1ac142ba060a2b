//! Notifies a supervisor (sd_notify(3)) that the server is ready, what it does, and that it is
//! about to end.
//!
//! 1. Nothing is done unless a supervisor requests it (`NOTIFY_SOCKET`, which `Type=notify` sets).
//! 2. The server still serves if the supervisor can't be notified; the supervisor decides what
//!    silence means. A message waits at most [`PATIENCE`].
//! 3. A message is never longer than a supervisor accepts: systemd ignores longer ones, and with
//!    them `READY=1`.
//!
//! It does *not* read anything from a supervisor.

use rustix::io::Result;
use rustix::net::{AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType, sockopt};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::time::Duration;

/// The longest message: systemd accepts `PIPE_BUF` bytes.
const BYTES_MAX: usize = 4000;
/// How long a supervisor may take to have room for another message.
const PATIENCE: Duration = Duration::from_secs(1);

/// Notifies it that clients can connect.
pub fn ready(serving: &str) {
    tell(&format!("READY=1\nSTATUS=serving {serving}"));
}

/// Notifies it that the store is being opened.
pub fn opening() {
    tell("STATUS=opening the store");
}

/// Notifies it that the server is ending.
pub fn stopping() {
    tell("STOPPING=1\nSTATUS=closing the store");
}

fn tell(state: &str) {
    let Some(name) = std::env::var_os("NOTIFY_SOCKET").filter(|name| !name.is_empty()) else {
        return;
    };
    if let Err(error) = send(&name, shortened(state)) {
        tracing::warn!(%error, "the supervisor at NOTIFY_SOCKET can't be notified");
    }
}

/// As much of the message as a supervisor accepts.
fn shortened(state: &str) -> &str {
    &state[..state.floor_char_boundary(BYTES_MAX)]
}

fn send(name: &OsStr, state: &str) -> Result<()> {
    let address = match name.as_bytes() {
        [b'@', rest @ ..] => SocketAddrUnix::new_abstract_name(rest)?,
        path => SocketAddrUnix::new(path)?,
    };
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, Some(PATIENCE))?;
    rustix::net::sendto(&socket, state.as_bytes(), SendFlags::NOSIGNAL, &address).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixDatagram;

    /// A supervisor once never took a unit that served many volumes for started, and ended it after
    /// a while.
    #[test]
    fn a_message_is_never_longer_than_a_supervisor_takes() {
        assert_eq!(shortened("READY=1"), "READY=1");
        let long = format!("READY=1\nSTATUS=serving {}", "ü".repeat(4000));
        assert!(shortened(&long).len() <= BYTES_MAX && long.starts_with(shortened(&long)));
    }

    /// When a machine starts, a supervisor gets many messages at a time; a service whose message is
    /// lost never becomes ready.
    #[test]
    #[allow(clippy::disallowed_methods, reason = "the sender is to come first")]
    fn a_supervisor_with_a_full_queue_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let supervisor = UnixDatagram::bind(&path).unwrap();
        let other = UnixDatagram::unbound().unwrap();
        other.set_nonblocking(true).unwrap();
        let mut waiting = 0;
        while other.send_to(b"x", &path).is_ok() {
            waiting += 1;
        }
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(100));
                (0..waiting).for_each(|_| assert_eq!(supervisor.recv(&mut [0; 8]).unwrap(), 1));
            });
            send(path.as_os_str(), "READY=1").unwrap();
        });
        let mut bytes = [0; 8];
        let count = supervisor.recv(&mut bytes).unwrap();
        assert_eq!(&bytes[..count], b"READY=1");
    }
}
