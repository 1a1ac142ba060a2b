//! What a supervisor is told (sd_notify(3)): that the server is ready, what it does, and that it is
//! about to end.
//!
//! 1. Without a supervisor that asks for it (`NOTIFY_SOCKET`, as `Type=notify` sets it) nothing is
//!    done.
//! 2. A supervisor that can't be told is no reason not to serve; it decides itself what to make of
//!    silence. It is waited for no longer than [`PATIENCE`].
//! 3. A message is never longer than what a supervisor takes: systemd ignores one that is, and with
//!    it `READY=1`.
//!
//! It does not read anything from a supervisor.

use rustix::io::Result;
use rustix::net::{AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType, sockopt};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::time::Duration;

/// The longest message: systemd takes `PIPE_BUF` bytes.
const BYTES_MAX: usize = 4000;
/// How long a supervisor may take to have room for one more message.
const PATIENCE: Duration = Duration::from_secs(1);

/// Clients can connect.
pub fn ready(serving: &str) {
    tell(&format!("READY=1\nSTATUS=serving {serving}"));
}

/// What goes on before that.
pub fn opening() {
    tell("STATUS=opening the store");
}

/// The end has begun.
pub fn stopping() {
    tell("STOPPING=1\nSTATUS=closing the store");
}

fn tell(state: &str) {
    let Some(name) = std::env::var_os("NOTIFY_SOCKET").filter(|name| !name.is_empty()) else {
        return;
    };
    if let Err(error) = send(&name, shortened(state)) {
        tracing::warn!(%error, "the supervisor at NOTIFY_SOCKET can't be told");
    }
}

/// As much of it as a supervisor takes.
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

    /// A store with many volumes was served by a unit that its supervisor never took for started,
    /// and ended after a while.
    #[test]
    fn a_message_is_never_longer_than_a_supervisor_takes() {
        assert_eq!(shortened("READY=1"), "READY=1");
        let long = format!("READY=1\nSTATUS=serving {}", "ü".repeat(4000));
        assert!(shortened(&long).len() <= BYTES_MAX && long.starts_with(shortened(&long)));
    }

    /// When a machine starts, a supervisor hears from many at a time; one whose message is lost
    /// never gets ready.
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
