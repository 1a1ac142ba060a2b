//! A directory as the medium: each file of the store is an ordinary file in it.
//!
//! Invariants
//! 1. A descriptor is locked before anything is read from it or written to it: exclusively for
//!    writing, shared for reading only. The lock is on the open file itself, so writes of a dying
//!    process that are still in flight hold it.
//! 2. Direct I/O is used only where a real block was transferred with it.
//! 3. Descriptors are unlocked when the medium is dropped: explicitly, since a forked child may
//!    keep copies of them for a long time; and never by such a child, whose copies share the lock.
//!
//! Names, locks, creation and growth are in files of their own. It does *not* transfer anything
//! except for a probe.

mod creation;
mod growth;
mod lock;
mod names;
mod path;

use super::device::{DeviceTraits, free_bytes};
use super::probe_direct_io::{
    DirectIo, not_made, scratch, set_direct, try_direct, try_direct_read,
};
use super::{Access, Creation, Location, Media, MediaOptions, PageCache, Room};
use crate::base::error::{Error, ErrorKind, Result};
use crate::base::{SegmentNo, ShardId};
use crate::io::FileId;
use crate::io::backoff::retry_transient;
use crate::io::cancel::Cancel;
use crate::io::opener::Opener;
use lock::OpenHere;
use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The file with which a creation begins.
const FIRST: FileId = FileId::Log(ShardId::LEADER, SegmentNo::new(0));

/// The files by role, each locked.
type OpenFiles = BTreeMap<FileId, Arc<File>>;

/// The open directory of a store.
pub(in crate::io) struct Directory {
    path: PathBuf,
    handle: File,
    access: Access,
    direct: bool,
    traits: DeviceTraits,
    cancel: Cancel,
    opener: Opener,
    /// Records that this process has the directory open.
    _open_here: OpenHere,
    files: Mutex<OpenFiles>,
    /// The files that were made since the directory was opened, in this order.
    made: Mutex<Vec<FileId>>,
}

/// Whether a file is expected to exist or is made.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Opening {
    /// The file exists.
    Existing,
    /// The file is made, and must not exist: one that has appeared since the directory was opened
    /// belongs to another process, whose store must not be overwritten.
    New,
}

impl Directory {
    /// Opens the directory `path` and locks all files of a store that are in it. With
    /// [`Access::ReadWrite`] and [`Creation::Allowed`] a missing directory is made; with
    /// [`Access::ReadOnly`] nothing is created or changed, ever.
    ///
    /// # Errors
    /// `InUse` if another process has the store open, `NotFound` if there is nothing to open,
    /// `Invalid` if the directory has files with the names of a store's that are not a store, `Io`
    /// for the rest.
    pub(in crate::io) fn open(path: &Path, options: &MediaOptions) -> Result<Directory> {
        let creation =
            if options.access == Access::ReadOnly { Creation::Refused } else { options.creation };
        if creation == Creation::Allowed {
            path::make_directory(path)?;
        }
        if path.exists() && !path.is_dir() {
            let context =
                format_args!("{} is not a directory, so no store is in it", path.display());
            return Err(Error::new(ErrorKind::NotFound, context));
        }
        let handle = File::open(path).map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => {
                Error::io(format_args!("there is no store in {}", path.display()), e)
                    .with_kind(ErrorKind::NotFound)
            }
            _ => Error::io(format_args!("opening the directory {}", path.display()), e),
        })?;
        let mut directory = Directory {
            path: path.to_owned(),
            traits: DeviceTraits::look(&handle),
            handle,
            access: options.access,
            direct: false,
            cancel: options.cancel.clone(),
            opener: Opener::default(),
            _open_here: OpenHere::default(),
            files: Mutex::default(),
            made: Mutex::default(),
        };
        // The locks are taken first: a probe would disturb another process that uses the directory.
        directory.open_all(creation)?;
        directory.cancel.check()?;
        if directory.files().is_empty() {
            path::sync_names_of(path);
        }
        let direct = match options.page_cache {
            PageCache::Bypass => directory.probe()?,
            PageCache::Use => DirectIo::Refused,
        };
        directory.direct = direct != DirectIo::Refused;
        if directory.direct {
            // Set on the descriptors that hold the locks, so that there is no moment without a
            // lock.
            for (id, file) in directory.files().iter() {
                set_direct(file)
                    .map_err(|e| directory.error(*id, "setting direct I/O on", e.into()))?;
            }
        }
        directory.cancel.check()?;
        directory.traits.surely_direct = direct == DirectIo::Vouched;
        directory.traits.one_device = directory.is_on_one_device();
        directory._open_here = OpenHere::note(&directory.handle);
        Ok(directory)
    }

    fn files(&self) -> MutexGuard<'_, OpenFiles> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether no file is mounted into the directory from elsewhere.
    fn is_on_one_device(&self) -> bool {
        let device = |file: &File| file.metadata().ok().map(|meta| meta.dev());
        let own = device(&self.handle);
        own.is_some() && self.files().values().all(|file| device(file) == own)
    }

    /// Opens and locks the files that exist, until a listing finds no more of them: while this
    /// waited for a lock, its holder may have made some.
    fn open_all(&self, creation: Creation) -> Result<()> {
        loop {
            let mut ids = names::store_files(&self.path)?;
            names::refuse_foreign(&self.path, &ids, creation)?;
            ids.retain(|id| !self.files().contains_key(id));
            if ids.is_empty() {
                return Ok(());
            }
            for id in ids {
                self.cancel.check()?;
                self.open_file(id, Opening::Existing)?;
            }
        }
    }

    /// Opens and locks a file that is not open yet.
    fn open_file(&self, id: FileId, opening: Opening) -> Result<Arc<File>> {
        self.lock_file(id, self.open_unlocked(id, opening)?, opening)
    }

    /// Opens or makes a file without locking it; another process may still lock it first.
    fn open_unlocked(&self, id: FileId, opening: Opening) -> Result<File> {
        let mut flags = OFlags::CLOEXEC | OFlags::NOFOLLOW;
        flags |= if self.access == Access::ReadWrite { OFlags::RDWR } else { OFlags::RDONLY };
        if self.direct {
            flags |= OFlags::DIRECT;
        }
        if opening == Opening::New {
            flags |= OFlags::CREATE | OFlags::EXCL;
        }
        let name = id.to_string();
        let opened = retry_transient(|| {
            rustix::fs::openat(&self.handle, name.as_str(), flags, Mode::from_raw_mode(0o600))
        });
        if opening == Opening::New && matches!(opened, Err(Errno::EXIST)) {
            return Err(lock::made_meanwhile(&self.path));
        }
        let opened = opened.map_err(|e| {
            not_made(format_args!("opening {}", self.path.join(&name).display()), "", e.into())
        })?;
        let opened = File::from(opened);
        let kind =
            opened.metadata().map_err(|e| self.error(id, "reading attributes of", e))?.file_type();
        if !kind.is_file() {
            let path = self.path.join(&name);
            return Err(Error::invalid(format_args!(
                "{} is not an ordinary file: move it away",
                path.display()
            )));
        }
        Ok(opened)
    }

    /// Locks a file that has just been opened, and keeps it.
    fn lock_file(&self, id: FileId, opened: File, opening: Opening) -> Result<Arc<File>> {
        self.lock(&opened, id)?;
        if opening == Opening::New {
            // It counts as ours only now that it is locked, and only if no other process locked it
            // earlier and put a store there: a creator gives the file its length before anything
            // else.
            let bytes =
                opened.metadata().map_err(|e| self.error(id, "reading attributes of", e))?.len();
            if bytes > 0 {
                return Err(lock::made_meanwhile(&self.path));
            }
            self.made.lock().unwrap_or_else(PoisonError::into_inner).push(id);
            self.give_to_owner_of_the_others(&opened);
        }
        let opened = Arc::new(opened);
        self.files().insert(id, opened.clone());
        Ok(opened)
    }

    /// Finds out whether direct I/O works, by a write and a read of a scratch file without a name
    /// or, if nothing may be written or there is no room, by a read of a file of the store.
    fn probe(&self) -> Result<DirectIo> {
        let sample = self.files().values().next().cloned();
        if self.access == Access::ReadOnly {
            // A reader does not flush, so this does not claim what only flushes would rely on.
            let direct = sample.map_or(DirectIo::Refused, |file| try_direct_read(&file));
            return Ok(if direct == DirectIo::Vouched { DirectIo::Works } else { direct });
        }
        match (try_direct(&self.handle, &self.path), sample) {
            // A full disk has no room for a scratch file, but the store in it can still be opened.
            (Err(error), Some(file)) if error.kind() == ErrorKind::Full => {
                Ok(try_direct_read(&file))
            }
            (tried, _) => tried,
        }
    }

    fn error(&self, id: FileId, doing: impl fmt::Display, cause: std::io::Error) -> Error {
        Error::io(format_args!("{doing} {}", self.describe(id)), cause)
    }
}

impl Media for Directory {
    fn existing(&self) -> Vec<(FileId, Location)> {
        self.files().iter().map(|(id, file)| (*id, Location::whole(file.clone()))).collect()
    }

    fn create(&self, id: FileId) -> Result<Location> {
        Ok(Location::whole(self.open_file(id, Opening::New)?))
    }

    fn len(&self, id: FileId, location: &Location) -> Result<u64> {
        let meta = location
            .descriptor
            .metadata()
            .map_err(|e| self.error(id, "reading attributes of", e))?;
        Ok(meta.len())
    }

    fn grow(&self, id: FileId, location: &Location, bytes: Range<u64>) -> Result<()> {
        self.grow_file(id, &location.descriptor, bytes)
    }

    fn scratch(&self) -> Result<Location> {
        let file = scratch(&self.handle, &self.path)?;
        if self.direct {
            let doing =
                format_args!("setting direct I/O on a scratch file in {}", self.path.display());
            set_direct(&file).map_err(|e| Error::io(doing, e.into()))?;
        }
        Ok(Location::whole(Arc::new(file)))
    }

    fn traits(&self) -> &DeviceTraits {
        &self.traits
    }

    fn is_direct(&self) -> bool {
        self.direct
    }

    fn path(&self) -> &Path {
        &self.path
    }

    fn describe(&self, id: FileId) -> String {
        self.path.join(id.to_string()).display().to_string()
    }

    fn room(&self) -> Room {
        let used = self.files().values().filter_map(|file| Some(file.metadata().ok()?.len())).sum();
        Room { used, free: free_bytes(&self.handle) }
    }

    fn remove_creation(&self) {
        self.remove_what_was_made();
    }
}

impl Drop for Directory {
    /// Invariant 3.
    fn drop(&mut self) {
        if !self.opener.is_here() {
            return;
        }
        for file in self.files().values() {
            let _ = rustix::fs::flock(file, FlockOperation::Unlock);
        }
    }
}
