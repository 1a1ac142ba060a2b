//! The open files of a store, over any medium: which exist, which operations they allow, and how
//! their writes become durable.
//!
//! One [`Files`] serves all disks of a store: each shard has a disk of its own, on a thread of its
//! own, over the same descriptors. A file that one of them creates exists for all.
//!
//! Invariants
//! 1. Only [`Files::grow`] creates or lengthens a file, one caller at a time for each file.
//! 2. The medium, and with it every lock, is dropped with the last disk and not before, so nothing
//!    is in flight without the lock.
//! 3. A flush of one file stands for others only where the flush method says so, and never for a
//!    file that was not flushed itself since the store was opened.
//!
//! It does *not* transfer or flush: the disks do.

use super::FileId;
use super::cancel::Cancel;
use super::flush::{
    self, Cover, FirstFailure, FlushBatch, FlushChoice, FlushMethod, FlushQueue, FlushWaiter,
};
use super::media::directory::Directory;
use super::media::{
    self, Access, Creation, DeviceTraits, Location, Media, MediaOptions, PageCache, Room,
};
use super::report::{DiskReport, Polling};
use super::store_file::StoreFile;
use crate::base::BLOCK;
use crate::base::error::{Error, ErrorKind, Result};
use rustix::io::ReadWriteFlags;
use smallvec::SmallVec;
use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// How to open the files.
#[derive(Clone, Debug, Default)]
pub struct FileOptions {
    /// Whether transfers bypass the page cache (default: where the file system can).
    pub page_cache: PageCache,
    /// How writes become durable (default: the method that suits file system and device).
    pub flush: FlushChoice,
    /// Cancels opening, and later work on the files.
    pub cancel: Cancel,
    /// Whether a store may be made (default: yes).
    pub creation: Creation,
}

/// A file, with the state that the disks share about it: its flushes and its growth.
pub(super) struct FileEntry {
    pub(super) file: Arc<StoreFile>,
    /// The flushes of this file; not used where one flush stands for all files.
    flush_queue: Arc<FlushQueue>,
    /// Held while the file is created or lengthened.
    growth: Mutex<()>,
}

impl FileEntry {
    fn new(file: StoreFile) -> Arc<FileEntry> {
        Arc::new(FileEntry {
            file: Arc::new(file),
            flush_queue: Arc::default(),
            growth: Mutex::default(),
        })
    }

    pub(super) fn id(&self) -> FileId {
        self.file.id()
    }
}

/// The files of one operation: usually one.
pub(super) type FileEntries = SmallVec<[Arc<FileEntry>; 1]>;

/// The open files of a store, locked.
pub struct Files {
    media: Box<dyn Media>,
    access: Access,
    method: FlushMethod,
    cancel: Cancel,
    /// The first failed flush, where one stands for all files.
    failed: FirstFailure,
    entries: Mutex<BTreeMap<FileId, Arc<FileEntry>>>,
}

impl Files {
    /// Opens the directory `path` and locks all files of a store that are in it. With
    /// [`Access::ReadWrite`] a missing directory is made; with [`Access::ReadOnly`] nothing is
    /// created or changed, ever.
    ///
    /// # Errors
    /// `InUse` if another process has the store open, `NotFound` if there is nothing to read,
    /// `Invalid` if the directory holds files that are no store's but have the names of its files,
    /// or if the flush method asked for would lose data there, `Unsupported` on a kernel that is
    /// too old, `Io` for the rest.
    pub fn open(path: &Path, access: Access, options: &FileOptions) -> Result<Arc<Files>> {
        super::kernel::check()?;
        let media = Directory::open(path, &options.for_media(access))?;
        Files::over(Box::new(media), access, options)
    }

    /// The files on an open medium.
    ///
    /// # Errors
    /// `Invalid` if the flush method asked for would lose data there.
    pub(super) fn over(
        media: Box<dyn Media>,
        access: Access,
        options: &FileOptions,
    ) -> Result<Arc<Files>> {
        let existing = media.existing().into_iter();
        let entries = existing
            .map(|(id, location)| (id, FileEntry::new(StoreFile::at(id, location))))
            .collect();
        Ok(Arc::new(Files {
            method: flush::choose(media.traits(), options.flush)?,
            media,
            access,
            cancel: options.cancel.clone(),
            failed: FirstFailure::default(),
            entries: Mutex::new(entries),
        }))
    }

    fn entries(&self) -> MutexGuard<'_, BTreeMap<FileId, Arc<FileEntry>>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The entry of a file, which may not exist yet. All disks share the entry.
    pub(super) fn file(&self, id: FileId) -> Arc<FileEntry> {
        self.entries().entry(id).or_insert_with(|| FileEntry::new(StoreFile::missing(id))).clone()
    }

    /// The location of a file that has to exist.
    ///
    /// # Errors
    /// `NotFound` if it does not.
    pub(super) fn location<'f>(&self, file: &'f StoreFile) -> Result<&'f Location> {
        file.location().ok_or_else(|| {
            let described = self.media.describe(file.id());
            let context =
                format_args!("the file {described} is missing: restore the store from a backup");
            Error::new(ErrorKind::NotFound, context)
        })
    }

    /// A queue for one disk, which is used where one flush stands for all files.
    pub(super) fn new_flush_queue(&self) -> Arc<FlushQueue> {
        FlushQueue::with(self.failed.clone())
    }

    /// The queue in which a flush of `entry` waits, for a disk whose queue is `own`.
    fn flush_queue<'a>(
        &self,
        own: &'a Arc<FlushQueue>,
        entry: &'a FileEntry,
    ) -> &'a Arc<FlushQueue> {
        match self.method {
            FlushMethod::Shared => own,
            FlushMethod::PerFile | FlushMethod::Dsync => &entry.flush_queue,
        }
    }

    /// Whether writes to this file are durable on completion.
    fn writes_durably(&self, id: FileId) -> bool {
        self.method == FlushMethod::Dsync && matches!(id, FileId::Log(..))
    }

    /// The flags for writes to this file.
    pub(super) fn write_flags(&self, id: FileId) -> ReadWriteFlags {
        if self.writes_durably(id) { ReadWriteFlags::DSYNC } else { ReadWriteFlags::empty() }
    }

    /// The files among `entries` that need a flush. Files whose writes are durable on completion
    /// need none; where one flush stands for all, one file is enough. A file that has not been
    /// flushed since it was opened always needs its own: a process that died may have left its
    /// metadata or its pages only in the page cache.
    ///
    /// # Errors
    /// `Invalid` if the store is open for reading only, `NotFound` if one of them does not exist.
    pub(super) fn to_flush(&self, entries: &[Arc<FileEntry>]) -> Result<FileEntries> {
        let mut found = FileEntries::new();
        for entry in entries {
            self.may_write("flush", entry.id())?;
            self.location(&entry.file)?;
            let covered = entry.file.is_synced()
                && (self.writes_durably(entry.id())
                    || (self.method == FlushMethod::Shared && !found.is_empty()));
            if !covered && !found.iter().any(|other| Arc::ptr_eq(other, entry)) {
                found.push(entry.clone());
            }
        }
        Ok(found)
    }

    /// Requests a flush of a file, for a disk whose queue is `own`. `Some`: the caller has to lead
    /// the batch.
    pub(super) fn join(
        &self,
        own: &Arc<FlushQueue>,
        entry: &FileEntry,
        cover: Cover,
        waiter: FlushWaiter,
    ) -> Option<FlushBatch> {
        let cover = if entry.file.is_synced() { cover } else { Cover::ThisFile };
        self.flush_queue(own, entry).join(&entry.file, cover, waiter)
    }

    /// What the file system and the device can do.
    pub fn traits(&self) -> &DeviceTraits {
        self.media.traits()
    }

    /// How writes become durable.
    #[cfg(test)]
    pub fn flush_method(&self) -> FlushMethod {
        self.method
    }

    /// Makes these bytes of a file exist as zeros, and creates the file if it is missing. The
    /// caller flushes it.
    ///
    /// # Errors
    /// `Invalid` if they are not whole blocks or the store is open for reading only, else as
    /// [`Media::grow`] and [`Media::create`].
    pub(super) fn grow(&self, entry: &FileEntry, bytes: Range<u64>) -> Result<()> {
        let id = entry.id();
        self.may_write("allocation", id)?;
        let Range { start, end } = bytes;
        if start > end || !start.is_multiple_of(BLOCK as u64) || !end.is_multiple_of(BLOCK as u64) {
            return Err(Error::invalid(format_args!(
                "an allocation of {start}..{end} in `{id}`: not whole blocks"
            )));
        }
        let _growth = entry.growth.lock().unwrap_or_else(PoisonError::into_inner);
        let location = match entry.file.location() {
            Some(location) => location,
            None => entry.file.set_location(self.media.create(id)?),
        };
        self.media.grow(id, location, bytes)
    }

    /// A block that a probe may write. It disappears when it is dropped.
    pub(super) fn scratch(&self) -> Result<Location> {
        self.media.scratch()
    }

    pub(super) fn may_write(&self, what: &str, id: FileId) -> Result<()> {
        match self.access {
            Access::ReadWrite => Ok(()),
            Access::ReadOnly => Err(Error::invalid(format_args!(
                "{what} of `{id}`: the store in {} is open for reading only",
                self.path().display()
            ))),
        }
    }

    pub(super) fn len(&self, entry: &FileEntry) -> Result<Option<u64>> {
        entry.file.location().map(|location| self.media.len(entry.id(), location)).transpose()
    }

    /// The files that exist, sorted.
    pub(super) fn existing(&self) -> Vec<FileId> {
        let exists = |entry: &Arc<FileEntry>| entry.file.location().is_some();
        self.entries().iter().filter(|(_, entry)| exists(entry)).map(|(id, _)| *id).collect()
    }

    pub(super) fn error(
        &self,
        id: FileId,
        doing: impl fmt::Display,
        cause: std::io::Error,
    ) -> Error {
        Error::io(format_args!("{doing} {}", self.media.describe(id)), cause)
    }

    /// The part of a disk's report that the files know.
    pub(super) fn report(&self) -> DiskReport {
        DiskReport {
            file_system: self.traits().file_system.clone(),
            direct: self.media.is_direct(),
            flush: self.method,
            polling: Polling::Off("the driver waits for interrupts".into()),
            ..DiskReport::none()
        }
    }

    /// The token that cancels the work on these files.
    pub(crate) fn cancel(&self) -> &Cancel {
        &self.cancel
    }

    pub(super) fn access(&self) -> Access {
        self.access
    }

    pub(super) fn is_direct(&self) -> bool {
        self.media.is_direct()
    }

    /// The error for a missing store that had to exist.
    pub(crate) fn no_store(&self) -> Error {
        media::no_store(self.path())
    }

    /// Removes the files of a failed creation, if all of them were made since these were opened. No
    /// operation may be in flight.
    pub(crate) fn remove_creation(&self) {
        self.media.remove_creation();
    }

    /// How much space the store uses, and how much is free.
    pub(crate) fn room(&self) -> Room {
        self.media.room()
    }

    /// The path under which the store was opened.
    pub(crate) fn path(&self) -> &Path {
        self.media.path()
    }
}

impl FileOptions {
    pub(super) fn for_media(&self, access: Access) -> MediaOptions {
        MediaOptions {
            access,
            creation: self.creation,
            page_cache: self.page_cache,
            cancel: self.cancel.clone(),
        }
    }
}

impl fmt::Debug for Files {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the files in {}", self.path().display())
    }
}
