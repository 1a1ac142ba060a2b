//! The seam below the drivers: where the bytes of the store's files lie, and how files are locked,
//! made and grown.
//!
//! ```text
//!   Disk (ring, threads) --every transfer--> descriptor and offset, as a Location says
//!      \--first use, growth, errors--> Files --> Media: directory (a file for each role)
//!                                          later perhaps a raw device or NVMe passthrough
//! ```
//! Invariants
//! 1. A medium is called when a store is opened, when a file is used for the first time, when one
//!    grows and when an error is described. A transfer uses only the [`Location`], which is plain
//!    data: no I/O calls through the trait.
//! 2. Whatever a medium hands out is locked, exclusively or shared, from before the first transfer
//!    until the medium is dropped; [`Files`](super::Files) drops it only after everything in flight
//!    has completed.
//! 3. A location never moves, and opening a medium neither creates nor changes a file: only
//!    `create` and `grow` do.
//!
//! It does *not* transfer pages, and it does *not* flush: the drivers flush the descriptor of a
//! location.

mod block;
mod device;
pub(in crate::io) mod directory;
mod probe_direct_io;
#[cfg(test)]
pub(in crate::io) mod single_file;
mod zeros;

pub use block::BlockDevice;
pub use device::DeviceTraits;
pub(super) use device::{file_system, free_bytes};
pub(crate) use probe_direct_io::DirectIo;
pub(super) use probe_direct_io::{Block, PATTERN, try_direct};

use super::FileId;
use super::cancel::Cancel;
use crate::base::error::{Error, ErrorKind, Result};
use std::fs::File;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// How the files may be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reading, writing, creating and growing.
    ReadWrite,
    /// Reading only: nothing is created or changed.
    ReadOnly,
}

/// Whether opening may make a store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Creation {
    /// A directory without a store is opened, and made if it is missing, so that a store can be
    /// created there.
    #[default]
    Allowed,
    /// Only a store that exists is opened; if there is none, that is an error.
    Refused,
}

/// Whether transfers bypass the page cache.
#[cfg_attr(
    not(test),
    allow(dead_code, reason = "callers of the library take what suits the device")
)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PageCache {
    /// They bypass it wherever the file system really supports that.
    #[default]
    Bypass,
    /// All transfers go through it.
    Use,
}

/// How to open a medium.
#[derive(Clone, Debug)]
pub(super) struct MediaOptions {
    pub(super) access: Access,
    pub(super) creation: Creation,
    pub(super) page_cache: PageCache,
    /// Cancels opening and growing.
    pub(super) cancel: Cancel,
}

/// Where one file of the store lies: bytes `base..` of a descriptor.
#[derive(Clone, Debug)]
pub(super) struct Location {
    /// Shared by all files of the store where a single descriptor holds them all.
    pub(super) descriptor: Arc<File>,
    /// The first byte of this file on the descriptor.
    pub(super) base: u64,
    /// The file's length, where several files share a descriptor and the kernel therefore does not
    /// know where this one ends. `None`: the file ends where its descriptor does.
    pub(super) end: Option<Arc<AtomicU64>>,
}

impl Location {
    /// A file that has a descriptor of its own.
    pub(super) fn whole(descriptor: Arc<File>) -> Location {
        Location { descriptor, base: 0, end: None }
    }

    /// The offset on the descriptor of byte `offset` of the file, from which `bytes` bytes are
    /// transferred.
    ///
    /// # Errors
    /// `UnexpectedEof` if they are not all within the file, provided that this location knows its
    /// end.
    #[inline]
    pub(super) fn address(&self, offset: u64, bytes: u64) -> std::io::Result<u64> {
        match &self.end {
            None => Ok(self.base + offset),
            Some(end) => self.address_within(end.load(Ordering::Acquire), offset, bytes),
        }
    }

    fn address_within(&self, end: u64, offset: u64, bytes: u64) -> std::io::Result<u64> {
        if offset.checked_add(bytes).is_some_and(|last| last <= end) {
            return Ok(self.base + offset);
        }
        let there = end.saturating_sub(offset).min(bytes);
        let text = format!("only {there} bytes could be transferred");
        Err(std::io::Error::new(std::io::ErrorKind::UnexpectedEof, text))
    }
}

/// Space on a medium, in bytes.
pub(crate) struct Room {
    /// Bytes that the store's files take.
    pub(crate) used: u64,
    /// Bytes that this user may still fill, if the medium reports them.
    pub(crate) free: Option<u64>,
}

/// The place that holds the files of one store. One medium serves all disks of the store, on all
/// threads.
pub(super) trait Media: Send + Sync {
    /// The files that existed when the medium was opened, sorted by role.
    fn existing(&self) -> Vec<(FileId, Location)>;

    /// Makes a file that did not exist when the medium was opened. It is locked and empty.
    ///
    /// # Errors
    /// `InUse` if another process has made it in the meantime, `Full` if there is no room, `Io` for
    /// the rest.
    fn create(&self, id: FileId) -> Result<Location>;

    /// The length of a file in bytes.
    fn len(&self, id: FileId, location: &Location) -> Result<u64>;

    /// Makes these bytes of a file exist as zeros that were really written, so that overwriting
    /// them changes no metadata, and makes the file's name durable. The caller makes the bytes
    /// themselves durable, by a flush of the location. If it fails or is cancelled, the file has
    /// its former length.
    ///
    /// # Errors
    /// `Full` if there is no room, `Closed` if it was cancelled, `Io` for the rest.
    fn grow(&self, id: FileId, location: &Location, bytes: Range<u64>) -> Result<()>;

    /// A block that a probe may write. It disappears when it is dropped.
    fn scratch(&self) -> Result<Location>;

    /// What the medium and the device below it can do.
    fn traits(&self) -> &DeviceTraits;

    /// Whether transfers bypass the page cache.
    fn is_direct(&self) -> bool;

    /// The path under which the store was opened.
    fn path(&self) -> &Path;

    /// The name of a file in messages.
    fn describe(&self, id: FileId) -> String;

    /// How much space the store uses, and how much is free.
    fn room(&self) -> Room;

    /// Removes the files of a failed creation, if all of them were made since the medium was
    /// opened. No operation may be in flight.
    fn remove_creation(&self);
}

/// The error for a missing store that had to exist.
pub(super) fn no_store(path: &Path) -> Error {
    let context =
        format_args!("there is no store in {}: is its file system mounted?", path.display());
    Error::new(ErrorKind::NotFound, context)
}
