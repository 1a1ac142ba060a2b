//! One file of an open store, as all its disks share it.
//!
//! Invariants
//! 1. Its location is set once, when the file exists and is locked, and stays.
//! 2. It counts as synced only after a flush of this very file has succeeded since the store was
//!    opened: only then is durable what a process that died has left in the device's cache.

use super::FileId;
use super::media::Location;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

/// A file of the store; it may not exist yet.
pub(super) struct StoreFile {
    id: FileId,
    location: OnceLock<Location>,
    synced: AtomicBool,
}

impl StoreFile {
    pub(super) fn missing(id: FileId) -> Self {
        StoreFile { id, location: OnceLock::new(), synced: AtomicBool::new(false) }
    }

    pub(super) fn at(id: FileId, location: Location) -> Self {
        StoreFile { id, location: location.into(), synced: AtomicBool::new(false) }
    }

    pub(super) fn id(&self) -> FileId {
        self.id
    }

    /// Where the file lies; `None` while it does not exist.
    pub(super) fn location(&self) -> Option<&Location> {
        self.location.get()
    }

    /// Records that the file exists, and where.
    pub(super) fn set_location(&self, location: Location) -> &Location {
        self.location.get_or_init(|| location)
    }

    pub(super) fn is_synced(&self) -> bool {
        self.synced.load(Ordering::Acquire)
    }

    pub(super) fn set_synced(&self) {
        self.synced.store(true, Ordering::Release);
    }
}
