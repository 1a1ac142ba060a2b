//! What only the C interface of the kernel tells: whether a signal is ignored, and which process is
//! at the other end.
//!
//! Invariants
//! 1. Nothing is changed.
//!
//! It does not know what follows from it.
#![allow(unsafe_code)]

use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;

/// Whether `signal` is ignored now.
pub fn is_ignored(signal: i32) -> bool {
    let mut action = MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: without a new action the call only writes the present one, whole, to a place that is
    // large enough for it.
    unsafe {
        libc::sigaction(signal, std::ptr::null(), action.as_mut_ptr()) == 0
            && action.assume_init().sa_sigaction == libc::SIG_IGN
    }
}

/// The process that listens at the other end of a Unix socket, if it can be seen from here.
pub fn peer_process(socket: &impl AsRawFd) -> Option<i32> {
    let mut peer = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut bytes = size_of::<libc::ucred>() as libc::socklen_t;
    let to = std::ptr::from_mut(&mut peer).cast();
    let (socket, level, name) = (socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_PEERCRED);
    // SAFETY: the kernel writes at most `bytes` bytes to `peer`, which has as many, and any of its
    // bit patterns is a value.
    let result = unsafe { libc::getsockopt(socket, level, name, to, &raw mut bytes) };
    // A process of another container has the number 0 here.
    (result == 0 && peer.pid > 0).then_some(peer.pid)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixListener, UnixStream};

    /// A message that names the wrong process has its reader stop that one.
    #[test]
    fn the_process_at_the_other_end_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let _listener = UnixListener::bind(dir.path().join("s")).unwrap();
        let client = UnixStream::connect(dir.path().join("s")).unwrap();
        assert_eq!(super::peer_process(&client), Some(std::process::id() as i32));
        assert_eq!(super::peer_process(&std::fs::File::open("/dev/null").unwrap()), None);
    }
}
