//! Reads what only the C interface of the kernel provides: whether a signal is ignored, and which
//! process is at the other end of a socket.
//!
//! Invariants
//! 1. Nothing is changed.
//!
//! It does *not* decide what follows.
#![allow(unsafe_code)]

use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;

/// Whether `signal` is ignored now.
pub fn is_ignored(signal: i32) -> bool {
    let mut action = MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: without a new action the call only writes the current one, completely, to memory that
    // is large enough for it.
    unsafe {
        libc::sigaction(signal, std::ptr::null(), action.as_mut_ptr()) == 0
            && action.assume_init().sa_sigaction == libc::SIG_IGN
    }
}

/// The process that listens at the other end of a Unix socket, if it is visible from here.
pub fn peer_process(socket: &impl AsRawFd) -> Option<i32> {
    let mut peer = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut bytes = size_of::<libc::ucred>() as libc::socklen_t;
    let to = std::ptr::from_mut(&mut peer).cast();
    let (socket, level, name) = (socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_PEERCRED);
    // SAFETY: the kernel writes at most `bytes` bytes to `peer`, which has that many, and any bit
    // pattern of it is valid.
    let result = unsafe { libc::getsockopt(socket, level, name, to, &raw mut bytes) };
    // A process of another container has the number 0 here.
    (result == 0 && peer.pid > 0).then_some(peer.pid)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixListener, UnixStream};

    /// If a message names the wrong process, its reader stops that one.
    #[test]
    fn the_process_at_the_other_end_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let _listener = UnixListener::bind(dir.path().join("s")).unwrap();
        let client = UnixStream::connect(dir.path().join("s")).unwrap();
        assert_eq!(super::peer_process(&client), Some(std::process::id() as i32));
        assert_eq!(super::peer_process(&std::fs::File::open("/dev/null").unwrap()), None);
    }
}
