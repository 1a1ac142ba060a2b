//! The directory and its files: opening, locking, and finding out what the file system can do.
//!
//! Invariants
//! 1. A descriptor is locked before anything is read from it or written to it: exclusively for writing, shared for
//!    reading only. The lock is on the open file itself, so writes of a dying process that are still in flight hold it.
//! 2. Opening neither creates nor changes a store's file; only an allocation creates one.
//! 3. A directory without the first log segment holds no store, for creation begins with that file. If it has other
//!    files with a store's names, they are somebody else's, and opening refuses.
//! 4. Direct I/O is used only where a real block was transferred with it: some file systems accept the flag on open
//!    and fail each transfer.

use super::super::FileId;
use crate::error::{Error, ErrorKind, Result};
use crate::types::{BLOCK, SegmentNo, ShardId};
use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use std::fmt;
use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock};

/// What may be done to the files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Everything.
    ReadWrite,
    /// Reading: nothing is created or changed.
    ReadOnly,
}

/// How to run the portable disk.
#[derive(Clone, Debug)]
pub struct PortableOptions {
    /// Threads, and so operations under way at the device at a time (default 8).
    pub workers_count: usize,
    /// Pass the page cache by where the file system can (default). Otherwise all transfers go through it.
    pub direct: bool,
}

impl Default for PortableOptions {
    fn default() -> Self {
        PortableOptions { workers_count: 8, direct: true }
    }
}

/// What the machine gives, as found out when the files were opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskReport {
    /// The driver.
    pub driver: &'static str,
    /// The file system's name, or its magic number.
    pub file_system: String,
    /// Whether transfers pass the page cache by.
    pub direct: bool,
    /// The call that makes writes durable.
    pub flush: &'static str,
    /// Operations at the device at a time.
    pub depth: usize,
}

impl fmt::Display for DiskReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let how = if self.direct { "direct I/O" } else { "buffered I/O (the file system refuses direct I/O)" };
        write!(f, "{} on {}, {how}, {}, depth {}", self.driver, self.file_system, self.flush, self.depth)
    }
}

/// A file of the store; it may not exist yet.
pub(super) struct StoreFile {
    id: FileId,
    file: OnceLock<File>,
    /// The error of the first failed flush. Held during a flush: the kernel tells a lost write to one caller only, so
    /// of two flushes at a time one would report success for what the other knows to be lost.
    pub(super) flush: Mutex<Option<Error>>,
    /// Held while the file is created or made longer.
    pub(super) growth: Mutex<()>,
}

impl StoreFile {
    pub(super) fn missing(id: FileId) -> Self {
        StoreFile { id, file: OnceLock::new(), flush: Mutex::new(None), growth: Mutex::new(()) }
    }

    pub(super) fn id(&self) -> FileId {
        self.id
    }

    pub(super) fn get(&self) -> Option<&File> {
        self.file.get()
    }
}

/// An open directory.
pub(super) struct Directory {
    path: PathBuf,
    handle: File,
    access: Access,
    direct: bool,
    file_system: String,
    workers_count: usize,
}

impl Directory {
    pub(super) fn open(path: &Path, access: Access, options: &PortableOptions) -> Result<(Directory, Vec<StoreFile>)> {
        if access == Access::ReadWrite {
            make_directory(path)?;
        }
        let handle = File::open(path).map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => {
                Error::io(format_args!("there is no store in {}", path.display()), e).with_kind(ErrorKind::NotFound)
            }
            _ => Error::io(format_args!("opening the directory {}", path.display()), e),
        })?;
        let ids = store_files(path)?;
        let mut directory = Directory {
            path: path.to_owned(),
            file_system: file_system(&handle),
            handle,
            access,
            direct: false,
            workers_count: options.workers_count,
        };
        directory.refuse_foreign(&ids)?;
        // Locks first: a probe in a directory that another process uses would be in its way.
        let files = directory.open_all(&ids)?;
        directory.direct = options.direct && directory.probe(files.first())?;
        if directory.direct {
            // On the descriptors that hold the locks, so that there is no moment without one.
            for (file, id) in files.iter().filter_map(|f| Some((f.get()?, f.id))) {
                set_direct(file).map_err(|e| directory.error(id, "setting direct I/O on", e.into()))?;
            }
        }
        Ok((directory, files))
    }

    fn open_all(&self, ids: &[FileId]) -> Result<Vec<StoreFile>> {
        ids.iter()
            .map(|&id| {
                let file = StoreFile::missing(id);
                self.open_file(&file, false)?;
                Ok(file)
            })
            .collect()
    }

    /// Opens and locks `file`, if it is not open yet; `create` makes it if it is missing.
    pub(super) fn open_file<'f>(&self, file: &'f StoreFile, create: bool) -> Result<&'f File> {
        if let Some(open) = file.file.get() {
            return Ok(open);
        }
        let mut flags = OFlags::CLOEXEC | OFlags::NOFOLLOW;
        flags |= if self.access == Access::ReadWrite { OFlags::RDWR } else { OFlags::RDONLY };
        if create {
            flags |= OFlags::CREATE;
        }
        if self.direct {
            flags |= OFlags::DIRECT;
        }
        let name = file.id.to_string();
        let opened = rustix::fs::openat(&self.handle, name.as_str(), flags, Mode::from_raw_mode(0o600))
            .map_err(|e| self.error(file.id, "opening", e.into()))?;
        let opened = File::from(opened);
        let kind = opened.metadata().map_err(|e| self.error(file.id, "looking at", e))?.file_type();
        if !kind.is_file() {
            let path = self.path.join(&name);
            return Err(Error::invalid(format_args!("{} is not an ordinary file: move it away", path.display())));
        }
        self.lock(&opened, file.id)?;
        Ok(file.file.get_or_init(|| opened))
    }

    fn lock(&self, file: &File, id: FileId) -> Result<()> {
        let how = match self.access {
            Access::ReadWrite => FlockOperation::NonBlockingLockExclusive,
            Access::ReadOnly => FlockOperation::NonBlockingLockShared,
        };
        match rustix::fs::flock(file, how) {
            Ok(()) => Ok(()),
            Err(Errno::WOULDBLOCK) => Err(Error::new(
                ErrorKind::InUse,
                format_args!(
                    "the store in {} is open in another process (`fuser -v {}` names it): close that one first",
                    self.path.display(),
                    self.path.join(id.to_string()).display()
                ),
            )),
            Err(e) => Err(self.error(id, "locking", e.into())),
        }
    }

    /// Invariant 3.
    fn refuse_foreign(&self, ids: &[FileId]) -> Result<()> {
        let first = FileId::Log(ShardId::new(0), SegmentNo::new(0));
        match ids.iter().find(|id| **id != first) {
            Some(foreign) if !ids.contains(&first) => Err(Error::invalid(format_args!(
                "{} has a file `{foreign}` but no `{first}`, so it is not a store, or only a part of one: use another \
                 directory, or bring the missing files back",
                self.path.display()
            ))),
            _ if ids.is_empty() && self.access == Access::ReadOnly => {
                let context = format_args!("there is no store in {}", self.path.display());
                Err(Error::new(ErrorKind::NotFound, context))
            }
            _ => Ok(()),
        }
    }

    /// Whether a block can be transferred directly: by a write and a read of a scratch file without a name, or, if
    /// nothing may be written, by a read of `sample`.
    fn probe(&self, sample: Option<&StoreFile>) -> Result<bool> {
        if self.access == Access::ReadOnly {
            let Some(file) = sample.and_then(StoreFile::get) else { return Ok(false) };
            let mut block = Box::new(Block([0; BLOCK]));
            let Ok(flags) = rustix::fs::fcntl_getfl(file) else { return Ok(false) };
            let works = rustix::fs::fcntl_setfl(file, flags | OFlags::DIRECT).is_ok()
                && matches!(rustix::io::pread(file, &mut block.0, 0), Ok(BLOCK));
            let _ = rustix::fs::fcntl_setfl(file, flags);
            return Ok(works);
        }
        try_direct(&self.handle, &self.path)
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

    /// Whether the file system says that it has `bytes` left for this user; if it does not say, they may be there.
    pub(super) fn has_room(&self, bytes: u64) -> bool {
        free_bytes(&self.handle).is_none_or(|free| free >= bytes)
    }

    /// Makes the names of files that were created durable.
    pub(super) fn sync(&self) -> std::io::Result<()> {
        self.handle.sync_all()
    }

    pub(super) fn error(&self, id: FileId, doing: impl fmt::Display, cause: std::io::Error) -> Error {
        Error::io(format_args!("{doing} {}", self.path.join(id.to_string()).display()), cause)
    }

    pub(super) fn report(&self) -> DiskReport {
        DiskReport {
            driver: "portable",
            file_system: self.file_system.clone(),
            direct: self.direct,
            flush: "fdatasync",
            depth: self.workers_count.clamp(1, 256),
        }
    }
}

fn set_direct(file: &File) -> rustix::io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(file)?;
    rustix::fs::fcntl_setfl(file, flags | OFlags::DIRECT)
}

/// Whether a block can be written and read directly in `directory`, which is `path`; leaves nothing behind.
///
/// # Errors
/// `Io`: the directory can't be written.
pub(crate) fn try_direct(directory: &File, path: &Path) -> Result<bool> {
    let scratch = scratch(directory, path)?;
    let mut block = Box::new(Block([0x5a; BLOCK]));
    Ok(set_direct(&scratch).is_ok() && matches!(rustix::io::pwrite(&scratch, &block.0, 0), Ok(BLOCK)) && {
        block.0.fill(0);
        matches!(rustix::io::pread(&scratch, &mut block.0, 0), Ok(BLOCK)) && block.0 == [0x5a; BLOCK]
    })
}

/// A file that is gone when it is closed. That it can be made shows that the directory can be written.
fn scratch(directory: &File, path: &Path) -> Result<File> {
    let mode = Mode::from_raw_mode(0o600);
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    if let Ok(file) = rustix::fs::openat(directory, ".", flags | OFlags::TMPFILE, mode) {
        return Ok(file.into());
    }
    let name = format!(".corepage-probe-{}", std::process::id());
    let made = rustix::fs::openat(directory, name.as_str(), flags | OFlags::CREATE | OFlags::EXCL, mode);
    let made = made.map_err(|e| {
        let context = format_args!(
            "the directory {} can't be written: give this user the right to, or use another",
            path.display()
        );
        Error::io(context, e.into())
    })?;
    let _ = rustix::fs::unlinkat(directory, name.as_str(), rustix::fs::AtFlags::empty());
    Ok(made.into())
}

/// A block at an address that direct I/O takes.
#[repr(C, align(4096))]
struct Block([u8; BLOCK]);

fn make_directory(path: &Path) -> Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    std::fs::create_dir_all(path).map_err(|e| {
        Error::io(format_args!("making the directory {} (use one that this user may write)", path.display()), e)
    })?;
    // Its own name must outlive a crash, too. Where the parent can't be opened that is the administrator's to see to.
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if let Ok(parent) = File::open(parent) {
        let _ = parent.sync_all();
    }
    Ok(())
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

/// Bytes that this user may still fill, if the file system says; those in memory say nothing: no blocks, none free.
pub(crate) fn free_bytes(handle: impl AsFd) -> Option<u64> {
    let stat = rustix::fs::fstatvfs(handle).ok().filter(|stat| stat.f_blocks > 0)?;
    Some(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// The name of the file system, from the magic numbers of statfs(2).
pub(crate) fn file_system(handle: impl AsFd) -> String {
    let Ok(stat) = rustix::fs::fstatfs(handle) else { return "an unknown file system".into() };
    let name = match stat.f_type as u32 {
        0xef53 => "ext4",
        0x5846_5342 => "xfs",
        0x9123_683e => "btrfs",
        0x0102_1994 => "tmpfs",
        0x8584_58f6 => "ramfs",
        0x794c_7630 => "overlayfs",
        0x2fc1_2fc1 => "zfs",
        0xf2f5_2010 => "f2fs",
        0x6573_5546 => "fuse",
        0x6969 => "nfs",
        0x0102_1997 => "9p",
        other => return format!("file system {other:#x}"),
    };
    name.into()
}
