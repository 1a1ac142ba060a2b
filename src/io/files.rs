//! The directory and its files: opening, locking, and finding out what the file system can do.
//!
//! One [`Files`] serves all disks of a store: each shard has a disk of its own, on a thread of its own, over the same
//! descriptors. A file that one of them creates is there for all.
//!
//! Invariants
//! 1. A descriptor is locked before anything is read from it or written to it: exclusively for writing, shared for
//!    reading only. The lock is on the open file itself, so writes of a dying process that are still in flight hold it.
//! 2. Opening neither creates nor changes a store's file; only an allocation creates one.
//! 3. A directory without the first log segment holds no store, for creation begins with that file. If it has other
//!    files with a store's names, they are somebody else's, and opening refuses.
//! 4. Direct I/O is used only where a real block was transferred with it: some file systems accept the flag on open
//!    and fail each transfer.
//! 5. A descriptor is unlocked and closed when the last disk is gone, not before: so nothing is in flight without the lock. It is
//!    unlocked, since a forked child may have a copy of it for long; and never by such a child, whose copies are of the same lock.
//!
//! It does *not* transfer anything but what a probe takes.

mod creation;

use super::FileId;
use super::backoff::patiently;
use super::cancel::Cancel;
use super::device::{self, DeviceTraits, FlushChoice, FlushMethod};
use super::flush::{Failure, Round, RoundFiles, Rounds, Waiter};
use super::lock::{self, OpenHere};
use super::opener::Opener;
use super::report::{DiskReport, Polling};
use super::trial::{make_directory, not_made, reads_directly, scratch, set_direct, sync_names_of, try_direct};
use crate::base::error::{Error, ErrorKind, Result};
use crate::base::{SegmentNo, ShardId};
use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// The file with which a creation begins.
const FIRST: FileId = FileId::Log(ShardId::LEADER, SegmentNo::new(0));

/// What may be done to the files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Everything.
    ReadWrite,
    /// Reading: nothing is created or changed.
    ReadOnly,
}

/// How to open the files.
#[derive(Clone, Debug)]
pub struct FileOptions {
    /// Pass the page cache by where the file system can (default). Otherwise all transfers go through it.
    pub direct: bool,
    /// How writes become durable (default: what suits file system and device).
    pub flush: FlushChoice,
    /// Ends opening, and what is done with the files afterwards.
    pub cancel: Cancel,
    /// Only what is there: no directory is made, and one without a store is an error (default: false).
    pub existing: bool,
}

impl Default for FileOptions {
    fn default() -> Self {
        FileOptions { direct: true, flush: FlushChoice::Auto, cancel: Cancel::default(), existing: false }
    }
}

/// A file of the store; it may not exist yet.
pub(super) struct StoreFile {
    id: FileId,
    file: OnceLock<File>,
    /// Its own flushes, if none stands for all files.
    rounds: Arc<Rounds>,
    /// It was flushed since it was opened: what an earlier process may have left in the device's cache is durable.
    settled: AtomicBool,
    /// Held while the file is created or made longer.
    pub(super) growth: Mutex<()>,
}

impl StoreFile {
    fn missing(id: FileId) -> Self {
        StoreFile {
            id,
            file: OnceLock::new(),
            rounds: Arc::default(),
            settled: AtomicBool::new(false),
            growth: Mutex::new(()),
        }
    }

    pub(super) fn id(&self) -> FileId {
        self.id
    }

    pub(super) fn get(&self) -> Option<&File> {
        self.file.get()
    }

    fn is_settled(&self) -> bool {
        self.settled.load(Ordering::Acquire)
    }

    pub(super) fn set_settled(&self) {
        self.settled.store(true, Ordering::Release);
    }
}

/// The open files of a store, locked.
pub struct Files {
    path: PathBuf,
    handle: File,
    access: Access,
    direct: bool,
    traits: DeviceTraits,
    method: FlushMethod,
    cancel: Cancel,
    opener: Opener,
    open_here: OpenHere,
    /// Made since it was opened, in this order.
    made: Mutex<Vec<FileId>>,
    /// The first failed flush, where one stands for all files.
    failed: Failure,
    files: Mutex<BTreeMap<FileId, Arc<StoreFile>>>,
}

impl Files {
    /// Opens the directory `path` and locks all files of a store that are in it. With [`Access::ReadWrite`] a missing
    /// directory is made; with [`Access::ReadOnly`] nothing is created or changed, ever.
    ///
    /// # Errors
    /// `InUse` if another process has the store open, `NotFound` if there is nothing to read, `Invalid` if the
    /// directory holds files that are no store's but have the names of its files, or if the flush method asked for
    /// would lose data there, `Unsupported` on a kernel that is too old, `Io` for the rest.
    pub fn open(path: &Path, access: Access, options: &FileOptions) -> Result<Arc<Files>> {
        super::kernel::check()?;
        if access == Access::ReadWrite && !options.existing {
            make_directory(path)?;
        }
        let handle = File::open(path).map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => {
                Error::io(format_args!("there is no store in {}", path.display()), e).with_kind(ErrorKind::NotFound)
            }
            _ => Error::io(format_args!("opening the directory {}", path.display()), e),
        })?;
        let mut files = Files {
            path: path.to_owned(),
            traits: device::look(&handle, false, true),
            handle,
            access,
            direct: false,
            method: FlushMethod::PerFile,
            cancel: options.cancel.clone(),
            opener: Opener::default(),
            open_here: OpenHere::default(),
            made: Mutex::default(),
            failed: Failure::default(),
            files: Mutex::default(),
        };
        // Locks first: a probe in a directory that another process uses would be in its way.
        let opened = files.open_all(access == Access::ReadWrite && !options.existing)?;
        files.cancel.check()?;
        if opened.is_empty() {
            sync_names_of(path);
        }
        let (works, surely) = if options.direct { files.probe(opened.first())? } else { (false, false) };
        files.direct = works;
        if files.direct {
            // On the descriptors that hold the locks, so that there is no moment without one.
            for (file, id) in opened.iter().filter_map(|f| Some((f.get()?, f.id))) {
                files.set_direct(file).map_err(|e| files.error(id, "setting direct I/O on", e.into()))?;
            }
        }
        files.cancel.check()?;
        files.traits = device::look(&files.handle, surely, files.on_one_device(&opened));
        files.method = device::choose(&files.traits, options.flush)?;
        files.open_here = OpenHere::note(&files.handle);
        let by_id = opened.into_iter().map(|file| (file.id, Arc::new(file))).collect();
        files.files = Mutex::new(by_id);
        Ok(Arc::new(files))
    }

    /// Whether no file is mounted into the directory from elsewhere.
    fn on_one_device(&self, files: &[StoreFile]) -> bool {
        let device = |file: &File| file.metadata().ok().map(|meta| meta.dev());
        let own = device(&self.handle);
        own.is_some() && files.iter().filter_map(StoreFile::get).all(|file| device(file) == own)
    }

    /// The file, which may not exist yet. The same object for all disks; each keeps what it got.
    pub(super) fn file(&self, id: FileId) -> Arc<StoreFile> {
        let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        files.entry(id).or_insert_with(|| Arc::new(StoreFile::missing(id))).clone()
    }

    /// What a disk needs for itself: its rounds, where one flush stands for all files.
    pub(super) fn new_rounds(&self) -> Arc<Rounds> {
        Rounds::with(self.failed.clone())
    }

    /// The rounds in which a flush of `file` takes part, for a disk that has `own`.
    fn rounds<'a>(&self, own: &'a Arc<Rounds>, file: &'a StoreFile) -> &'a Arc<Rounds> {
        match self.method {
            FlushMethod::Shared => own,
            FlushMethod::PerFile | FlushMethod::Dsync => &file.rounds,
        }
    }

    /// Whether writes to this file are durable on completion.
    pub(super) fn writes_durably(&self, id: FileId) -> bool {
        self.method == FlushMethod::Dsync && matches!(id, FileId::Log(..))
    }

    /// Those of `files` whose flush has to be asked for: no file whose writes are all durable already, and one for all
    /// where that is enough. It is not for a file that was never flushed since it was opened: a process that died may
    /// have left it longer than its metadata on the device says, or in the page cache.
    ///
    /// # Errors
    /// `Invalid` if the store is open for reading only, `Io` if one of them does not exist.
    pub(super) fn to_flush(&self, files: &[Arc<StoreFile>]) -> Result<RoundFiles> {
        let mut found = RoundFiles::new();
        for file in files {
            self.may_write("flush", file.id)?;
            if file.get().is_none() {
                return Err(self.missing(file.id));
            }
            let covered = file.is_settled()
                && (self.writes_durably(file.id) || (self.method == FlushMethod::Shared && !found.is_empty()));
            if !covered && !found.iter().any(|other| Arc::ptr_eq(other, file)) {
                found.push(file.clone());
            }
        }
        Ok(found)
    }

    /// Asks for a flush of `file`, for a disk that has `own`; `exactly` (after an allocation): of no other in its stead.
    /// `Some`: the caller is to lead the round.
    pub(super) fn join(
        &self,
        own: &Arc<Rounds>,
        file: &Arc<StoreFile>,
        exactly: bool,
        waiter: Waiter,
    ) -> Option<Round> {
        self.rounds(own, file).join(file, exactly || !file.is_settled(), waiter)
    }

    /// What file system and device are like.
    pub fn traits(&self) -> &DeviceTraits {
        &self.traits
    }

    /// How writes become durable.
    pub fn flush_method(&self) -> FlushMethod {
        self.method
    }

    /// Opens and locks the files that are there, until a listing finds no more of them: the process whose lock was waited for may have
    /// made some meanwhile.
    fn open_all(&self, may_create: bool) -> Result<Vec<StoreFile>> {
        let mut opened: Vec<StoreFile> = Vec::new();
        loop {
            let mut ids = store_files(&self.path)?;
            self.refuse_foreign(&ids, may_create)?;
            ids.retain(|id| opened.iter().all(|file| file.id != *id));
            if ids.is_empty() {
                return Ok(opened);
            }
            for id in ids {
                self.cancel.check()?;
                let file = StoreFile::missing(id);
                self.open_file(&file, false)?;
                opened.push(file);
            }
        }
    }

    pub(super) fn set_direct(&self, file: &File) -> rustix::io::Result<()> {
        set_direct(file)
    }

    /// Opens and locks `file`, if it is not open yet; `create` makes it. What was there at the opening is open: a file that has come
    /// since then is another process's, whose store must not be written over.
    pub(super) fn open_file<'f>(&self, file: &'f StoreFile, create: bool) -> Result<&'f File> {
        if let Some(open) = file.file.get() {
            return Ok(open);
        }
        let mut flags = OFlags::CLOEXEC | OFlags::NOFOLLOW;
        flags |= if self.access == Access::ReadWrite { OFlags::RDWR } else { OFlags::RDONLY };
        if self.direct {
            flags |= OFlags::DIRECT;
        }
        let name = file.id.to_string();
        if create {
            flags |= OFlags::CREATE | OFlags::EXCL;
        }
        let opened = patiently(|| rustix::fs::openat(&self.handle, name.as_str(), flags, Mode::from_raw_mode(0o600)));
        if create && matches!(opened, Err(Errno::EXIST)) {
            return Err(lock::made_meanwhile(&self.path));
        }
        let opened =
            opened.map_err(|e| not_made(format_args!("opening {}", self.path.join(&name).display()), "", e.into()))?;
        let opened = File::from(opened);
        let kind = opened.metadata().map_err(|e| self.error(file.id, "looking at", e))?.file_type();
        if !kind.is_file() {
            let path = self.path.join(&name);
            return Err(Error::invalid(format_args!("{} is not an ordinary file: move it away", path.display())));
        }
        self.lock(&opened, file.id)?;
        if create {
            // Not before it is locked: another process may have been faster, and have a store in it.
            self.made.lock().unwrap_or_else(PoisonError::into_inner).push(file.id);
            self.like_the_others(&opened);
        }
        Ok(file.file.get_or_init(|| opened))
    }

    fn lock(&self, file: &File, id: FileId) -> Result<()> {
        let how = match self.access {
            Access::ReadWrite => FlockOperation::NonBlockingLockExclusive,
            Access::ReadOnly => FlockOperation::NonBlockingLockShared,
        };
        match lock::patiently(file, how, &self.cancel) {
            Ok(()) => Ok(()),
            Err(Errno::WOULDBLOCK) if self.cancel.is_cancelled() => self.cancel.check(),
            Err(Errno::WOULDBLOCK) => Err(lock::in_use(&self.handle, &self.path, id)),
            Err(e) => Err(self.error(id, "locking", e.into())),
        }?;
        match file.metadata() {
            // Its store was removed while the lock was waited for: what is written to it would be nowhere.
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

    /// Invariant 3.
    fn refuse_foreign(&self, ids: &[FileId], may_create: bool) -> Result<()> {
        match ids.iter().find(|id| **id != FIRST) {
            Some(foreign) if !ids.contains(&FIRST) => Err(Error::invalid(format_args!(
                "{} has a file `{foreign}` but no `{FIRST}`, so it is not a store, or only a part of one: use another \
                 directory, or bring the missing files back",
                self.path.display()
            ))),
            _ if ids.is_empty() && !may_create => Err(self.no_store()),
            _ => Ok(()),
        }
    }

    /// Whether a block can be transferred directly: by a write and a read of a scratch file without a name, or, if
    /// nothing may be written or there is no room, by a read of `sample`. And whether the kernel vouches for it.
    fn probe(&self, sample: Option<&StoreFile>) -> Result<(bool, bool)> {
        let sample = sample.and_then(StoreFile::get);
        if self.access == Access::ReadOnly {
            return Ok((sample.is_some_and(reads_directly), false));
        }
        match (try_direct(&self.handle, &self.path), sample) {
            // A full disk has no room for a scratch file; the store that is there needs none.
            (Err(error), Some(file)) if error.kind() == ErrorKind::Full => {
                let (works, says) = (reads_directly(file), device::says_direct(file));
                Ok((works && says != Some(false), works && says == Some(true)))
            }
            (tried, _) => tried,
        }
    }

    /// A file that is gone when it is closed.
    pub(super) fn scratch(&self) -> Result<File> {
        scratch(&self.handle, &self.path)
    }

    pub(super) fn may_write(&self, what: &str, id: FileId) -> Result<()> {
        match self.access {
            Access::ReadWrite => Ok(()),
            Access::ReadOnly => Err(Error::invalid(format_args!(
                "{what} of `{id}`: the store in {} is open for reading only",
                self.path.display()
            ))),
        }
    }

    pub(super) fn len(&self, file: &StoreFile) -> Result<Option<u64>> {
        let Some(open) = file.get() else { return Ok(None) };
        let meta = open.metadata().map_err(|e| self.error(file.id, "looking at", e))?;
        Ok(Some(meta.len()))
    }

    /// The files that exist, sorted.
    pub(super) fn existing(&self) -> Vec<FileId> {
        let files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        files.iter().filter(|(_, file)| file.get().is_some()).map(|(id, _)| *id).collect()
    }

    /// Whether the file system says that it has `bytes` left for this user; if it does not say, they may be there.
    pub(super) fn has_room(&self, bytes: u64) -> bool {
        device::free_bytes(&self.handle).is_none_or(|free| free >= bytes)
    }

    /// Makes the names of files that were created durable.
    pub(super) fn sync(&self) -> std::io::Result<()> {
        self.handle.sync_all()
    }

    pub(super) fn error(&self, id: FileId, doing: impl fmt::Display, cause: std::io::Error) -> Error {
        Error::io(format_args!("{doing} {}", self.path.join(id.to_string()).display()), cause)
    }

    /// What a disk over these files can say of them; the rest is its own.
    pub(super) fn report(&self) -> DiskReport {
        DiskReport {
            file_system: self.traits.file_system.clone(),
            direct: self.direct,
            flush: self.method,
            polling: Polling::Off("the driver waits for interrupts".into()),
            ..DiskReport::none()
        }
    }

    /// What ends the work on these files.
    pub(crate) fn cancel(&self) -> &Cancel {
        &self.cancel
    }

    pub(super) fn access(&self) -> Access {
        self.access
    }

    pub(super) fn is_direct(&self) -> bool {
        self.direct
    }
}

impl Drop for Files {
    /// Invariant 5.
    fn drop(&mut self) {
        if !self.opener.is_here() {
            return;
        }
        let files = self.files.get_mut().unwrap_or_else(PoisonError::into_inner);
        for file in files.values().filter_map(|file| file.get()) {
            let _ = rustix::fs::flock(file, FlockOperation::Unlock);
        }
    }
}

impl fmt::Debug for Files {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the files in {}", self.path.display())
    }
}

/// The files in a directory that have names of a store's, in a fixed order.
fn store_files(path: &Path) -> Result<Vec<FileId>> {
    let context = |e| Error::io(format_args!("listing the directory {}", path.display()), e);
    let mut ids = Vec::new();
    for entry in std::fs::read_dir(path).map_err(context)? {
        let name = entry.map_err(context)?.file_name();
        ids.extend(name.to_str().and_then(parse_name));
    }
    ids.sort();
    Ok(ids)
}

/// The inverse of [`FileId`]'s `Display`.
pub(super) fn parse_name(name: &str) -> Option<FileId> {
    let id = match name {
        "meta" => FileId::Meta,
        "extents" => FileId::Table,
        "data" => FileId::Data,
        _ => {
            let (shard, segment) = name.strip_prefix("log-")?.split_once('-')?;
            FileId::Log(ShardId::new(shard.parse().ok()?), SegmentNo::new(segment.parse().ok()?))
        }
    };
    // "log-0-0" is not a name that we give.
    (id.to_string() == name).then_some(id)
}
