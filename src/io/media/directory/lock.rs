//! The lock on a store's files, and which process holds it if it can't be taken.
//!
//! Invariants
//! 1. A lock that a dying process still holds is waited for, for [`DYING_MAX`] at most; then
//!    opening is refused.
//! 2. The directories that this process has open are recorded, so that a second opening is not told
//!    to look for another process.
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

/// How long the lock of a dying process is waited for. A killed process that drove a ring can be
/// waited for by its parent before the kernel has taken the ring, and with it the locked
/// descriptors, down.
const DYING_MAX: Duration = Duration::from_secs(2);
const DYING_STEP: Duration = Duration::from_millis(5);

/// A directory, by device and inode.
type DirectoryInode = (u64, u64);

/// How often each directory is open in which process: a forked child has none open.
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
    /// Locks a file that was opened just now.
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
            // Its store was removed while the lock was waited for: what is written to it would be
            // nowhere.
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

/// The error for a store in `path`, whose directory is `handle`, that is open already.
fn in_use(handle: &File, path: &Path, id: FileId) -> Error {
    let open = directory(handle).and_then(|directory| open_here().get(&directory).copied());
    let path = path.display();
    match open.is_some_and(|(opener, _)| opener.is_here()) {
        true => Error::new(
            ErrorKind::InUse,
            format_args!(
                "the store in {path} is open in this process already: use a clone of that handle, \
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

/// The error for files that another process has made in `path` where there were none when it was
/// opened.
pub(super) fn made_meanwhile(path: &Path) -> Error {
    Error::new(
        ErrorKind::InUse,
        format_args!(
            "another process has made a store in {} meanwhile: open that one",
            path.display()
        ),
    )
}

/// Takes a lock. `WOULDBLOCK` if another process has held it for all of [`DYING_MAX`].
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
