//! What a supervisor is told (sd_notify(3)): that the server is ready, what it does, and that it is about to end.
//!
//! 1. Without a supervisor that asks for it (`NOTIFY_SOCKET`, as `Type=notify` sets it) nothing is done.
//! 2. A supervisor that can't be told is no reason not to serve; it decides itself what to make of silence.
//!
//! It does not read anything from a supervisor.

use rustix::io::Result;
use rustix::net::{AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

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
    let Some(name) = std::env::var_os("NOTIFY_SOCKET").filter(|name| !name.is_empty()) else { return };
    if let Err(error) = send(&name, state) {
        tracing::warn!(%error, "the supervisor at NOTIFY_SOCKET can't be told");
    }
}

fn send(name: &OsStr, state: &str) -> Result<()> {
    let address = match name.as_bytes() {
        [b'@', rest @ ..] => SocketAddrUnix::new_abstract_name(rest)?,
        path => SocketAddrUnix::new(path)?,
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::DGRAM, flags, None)?;
    rustix::net::sendto(&socket, state.as_bytes(), SendFlags::NOSIGNAL, &address).map(drop)
}
