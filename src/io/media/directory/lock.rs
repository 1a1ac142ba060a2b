//! Takes the lock on a store's files, and tells which process holds it if it can't.
//!
//! Invariants
//! 1. Opening waits at most [`DYING_MAX`] for a lock that a dying process still holds; then it is
//!    refused.
//! 2. The directories that this process has open are recorded, so that the error of a second
//!    opening does not send its reader looking for another process.
//!
//! It does *not* unlock: the directory does, when it is dropped.

use super::Directory;
use crate::base::error::{Error, ErrorKind, Result};
use crate::io::FileId;
use crate::io::cancel::Cancel;
use crate::io::media::Access;
use crate::io::opener::Opener;
use rustix::fs::FlockOperation;
use rustix::io::Errno;
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How long to wait for the lock of a dying process. When a process that drove a ring is killed,
/// its parent can see its end before the kernel has torn down the ring and with it the locked
/// descriptors.
const DYING_MAX: Duration = Duration::from_secs(2);
const DYING_STEP: Duration = Duration::from_millis(5);

/// A directory, by device and inode.
type DirectoryInode = (u64, u64);

/// How many times each directory is open, and in which process: a forked child has none open.
static OPEN: Mutex<BTreeMap<DirectoryInode, (Opener, usize)>> = Mutex::new(BTreeMap::new());

fn open_here() -> MutexGuard<'static, BTreeMap<DirectoryInode, (Opener, usize)>> {
    OPEN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn directory(handle: &File) -> Option<DirectoryInode> {
    handle.metadata().ok().map(|meta| (meta.dev(), meta.ino()))
}

/// Records, for as long as it is kept, that this process has a directory open.
#[derive(Default)]
pub(super) struct OpenHere(Option<DirectoryInode>);

impl OpenHere {
    pub(super) fn note(handle: &File) -> OpenHere {
        let directory = directory(handle);
        if let Some(directory) = directory {
            let mut open = open_here();
            let entry = open.entry(directory).or_insert((Opener::default(), 0));
            if !entry.0.is_here() {
                *entry = (Opener::default(), 0);
            }
            entry.1 += 1;
        }
        OpenHere(directory)
    }
}

impl Drop for OpenHere {
    fn drop(&mut self) {
        let Some(directory) = self.0 else { return };
        let mut open = open_here();
        if let Some((_, count)) = open.get_mut(&directory) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                open.remove(&directory);
            }
        }
    }
}

impl Directory {
    /// Locks a file that has just been opened.
    pub(super) fn lock(&self, file: &File, id: FileId) -> Result<()> {
        let how = match self.access {
            Access::ReadWrite => FlockOperation::NonBlockingLockExclusive,
            Access::ReadOnly => FlockOperation::NonBlockingLockShared,
        };
        match wait_for_lock(file, how, &self.cancel) {
            Ok(()) => Ok(()),
            Err(Errno::WOULDBLOCK) if self.cancel.is_cancelled() => self.cancel.check(),
            Err(Errno::WOULDBLOCK) => Err(in_use(&self.handle, &self.path, id)),
            Err(e) => Err(self.error(id, "locking", e.into())),
        }?;
        match file.metadata() {
            // The store was removed while this waited for the lock: writes to the file would be
            // lost.
            Ok(meta) if meta.nlink() == 0 => Err(Error::new(
                ErrorKind::InUse,
                format_args!(
                    "the files in {} were removed while they were being opened: try again",
                    self.path.display()
                ),
            )),
            _ => Ok(()),
        }
    }
}

/// The error for a store in `path`, whose directory is `handle`, that is already open.
fn in_use(handle: &File, path: &Path, id: FileId) -> Error {
    let open = directory(handle).and_then(|directory| open_here().get(&directory).copied());
    let path = path.display();
    match open.is_some_and(|(opener, _)| opener.is_here()) {
        true => Error::new(
            ErrorKind::InUse,
            format_args!(
                "the store in {path} is already open in this process: use a clone of that handle, \
                 or close it first"
            ),
        ),
        false => Error::new(
            ErrorKind::InUse,
            format_args!(
                "the store in {path} is open in another process (`fuser -v {path}/{id}` names \
                 it): close that one first"
            ),
        ),
    }
}

/// The error for files that another process has made in `path` since it was opened.
pub(super) fn made_meanwhile(path: &Path) -> Error {
    Error::new(
        ErrorKind::InUse,
        format_args!(
            "another process has made a store in {} in the meantime: open that one",
            path.display()
        ),
    )
}

/// Takes a lock. `WOULDBLOCK` if another process holds it for all of [`DYING_MAX`].
#[allow(clippy::disallowed_methods, reason = "the end of another process is waited for")]
fn wait_for_lock(file: &File, how: FlockOperation, cancel: &Cancel) -> rustix::io::Result<()> {
    let mut waited = Duration::ZERO;
    loop {
        match rustix::fs::flock(file, how) {
            Err(Errno::INTR) => {}
            Err(Errno::WOULDBLOCK) if waited < DYING_MAX && !cancel.is_cancelled() => {
                std::thread::sleep(DYING_STEP)
            }
            other => return other,
        }
        waited += DYING_STEP;
    }
}
