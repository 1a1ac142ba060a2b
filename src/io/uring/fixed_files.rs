//! The files of one ring: registered with it where it takes them, so that an operation touches no count that other
//! cores touch, too.
//!
//! Invariants
//! 1. A slot of the ring's table names the file that its [`RingFile`] holds, for as long as the ring lives.
//! 2. A file that did not exist when it was asked for first is asked for again.
//!
//! It does *not* open files.

use crate::base::error::Result;
use crate::io::FileId;
use crate::io::files::{FileEntry, Files};
use crate::io::media::Location;
use foldhash::fast::FixedState;
use hashbrown::HashMap;
use io_uring::IoUring;
use std::os::fd::AsRawFd;
use std::rc::Rc;
use std::sync::Arc;

/// Files that a ring's table takes; the rest is used by descriptor.
const SLOTS: u32 = 64;

/// How an entry names a file: by descriptor, or by a slot of the ring's table.
#[derive(Clone, Copy)]
pub(super) struct Name {
    pub(super) number: i32,
    pub(super) is_slot: bool,
}

pub(super) struct RingFile {
    entry: Arc<FileEntry>,
    pub(super) name: Name,
    pub(super) location: Location,
}

impl RingFile {
    pub(super) fn id(&self) -> FileId {
        self.entry.id()
    }
}

#[derive(Default)]
pub(super) struct FixedFiles {
    known: HashMap<FileId, Rc<RingFile>, FixedState>,
    slots_used: u32,
    slots: u32,
}

impl FixedFiles {
    /// A table in the ring, if it takes one.
    pub(super) fn new(ring: &IoUring) -> FixedFiles {
        let slots = if ring.submitter().register_files_sparse(SLOTS).is_ok() { SLOTS } else { 0 };
        FixedFiles { slots, ..FixedFiles::default() }
    }

    /// The file, which must exist.
    pub(super) fn get(&mut self, ring: &IoUring, files: &Files, id: FileId) -> Result<Rc<RingFile>> {
        if let Some(target) = self.known.get(&id) {
            return Ok(target.clone());
        }
        let entry = files.file(id);
        let location = files.location(&entry.file)?.clone();
        let descriptor = location.descriptor.as_raw_fd();
        let mut name = Name { number: descriptor, is_slot: false };
        if self.slots_used < self.slots
            && ring.submitter().register_files_update(self.slots_used, &[descriptor]).is_ok_and(|n| n == 1)
        {
            name = Name { number: self.slots_used as i32, is_slot: true };
            self.slots_used += 1;
        }
        let target = Rc::new(RingFile { entry, name, location });
        self.known.insert(id, target.clone());
        Ok(target)
    }

    /// Takes them back from the ring: at once, so that the files are closed, and unlocked, when their last holder goes.
    pub(super) fn unregister(&mut self, ring: &IoUring) {
        self.known.clear();
        if std::mem::take(&mut self.slots) > 0 {
            let _ = ring.submitter().unregister_files();
        }
    }
}
