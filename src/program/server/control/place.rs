//! The place of the control socket: next to the store, however long that path is.
//!
//! 1. A socket's address has room for about a hundred bytes. Servers and clients reach a longer
//!    path through an open directory (`/proc/self/fd/N`).
//! 2. Two servers that start at the same moment don't replace each other's socket: a server holds
//!    the directory's lock while it binds.
//!
//! It does *not* know the protocol of the socket.

// Waiting for another server that is starting takes real time.
#![allow(clippy::disallowed_methods)]

use super::super::nbd::{Address, Listener, Plan};
use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::net::SocketAddrUnix;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The socket's name in the directory of the store.
pub const SOCKET_NAME: &str = "control.sock";
/// What a listener appends to the name while it makes the socket: a dot and the process number.
const SUFFIX: &str = ".4194304";
/// How often, and after which pause, to retry while another server makes its socket.
const LOCK_WAITS: u32 = 200;
const LOCK_STEP: Duration = Duration::from_millis(5);

/// A path that fits into a socket's address, valid while this is kept.
pub struct Reachable {
    path: PathBuf,
    _directory: Option<OwnedFd>,
}

impl Reachable {
    /// Finds such a path for `socket`.
    pub fn new(socket: &Path) -> io::Result<Reachable> {
        let mut longest = socket.as_os_str().to_owned();
        longest.push(SUFFIX);
        if SocketAddrUnix::new(&longest).is_ok() {
            return Ok(Reachable { path: socket.to_owned(), _directory: None });
        }
        let name = socket.file_name().ok_or(io::ErrorKind::InvalidInput)?;
        let parent = socket
            .parent()
            .filter(|parent| !parent.as_os_str().is_empty())
            .unwrap_or(Path::new("."));
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(parent, flags, Mode::empty())?;
        let through = PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd()));
        if !through.exists() {
            let text = format!(
                "the path {} is too long for a socket, and there is no /proc to shorten it",
                socket.display()
            );
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        Ok(Reachable { path: through.join(name), _directory: Some(directory) })
    }

    /// The path.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// A bound control socket; the file is removed when it is dropped.
pub struct Place {
    // Dropped before the directory that its path may lead through.
    pub listener: Listener,
    _reachable: Reachable,
}

impl Place {
    /// Binds the control socket of the store in `dir`, which exists.
    pub fn bind(dir: &Path) -> io::Result<Place> {
        let reachable = Reachable::new(&dir.join(SOCKET_NAME))?;
        let _lock = lock(dir)?;
        let listener = Address::Unix(reachable.path.clone()).plan(dir).and_then(Plan::bind)?;
        Ok(Place { listener, _reachable: reachable })
    }
}

/// Locks a directory until the descriptor is closed. Returns `None` on a file system without locks.
fn lock(dir: &Path) -> io::Result<Option<OwnedFd>> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = rustix::fs::open(dir, flags, Mode::empty())?;
    for _ in 0..LOCK_WAITS {
        match rustix::fs::flock(&directory, FlockOperation::NonBlockingLockExclusive) {
            Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::INTR) => {
                std::thread::sleep(LOCK_STEP)
            }
            Ok(()) => return Ok(Some(directory)),
            Err(_) => return Ok(None),
        }
    }
    Err(io::Error::new(
        io::ErrorKind::WouldBlock,
        format!("the directory {} is locked by another process", dir.display()),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    /// In a deep directory there used to be no control socket, and commands told their user to
    /// close another process.
    #[test]
    fn a_socket_is_made_and_reached_in_a_directory_with_a_long_path() {
        let dir = tempfile::tempdir().unwrap();
        for length in [1, 60, 200] {
            let deep = dir.path().join("d".repeat(length));
            std::fs::create_dir(&deep).unwrap();
            let place = Place::bind(&deep).unwrap();
            let client = Reachable::new(&deep.join(SOCKET_NAME)).unwrap();
            assert!(UnixStream::connect(client.path()).is_ok(), "{length}");
            assert!(Place::bind(&deep).is_err(), "a second server takes the place of a living one");
            drop(place);
            assert_eq!(std::fs::read_dir(&deep).unwrap().count(), 0, "something is left");
        }
    }
}
