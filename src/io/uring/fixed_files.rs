//! The files of one ring: registered with it where possible, so that a transfer touches no
//! reference count that other cores also touch.
//!
//! Invariants
//! 1. A slot of the ring's table refers to the file that its [`RingFile`] holds, for as long as the
//!    ring lives.
//! 2. A missing file is not remembered: each use looks it up again until it exists.
//!
//! It does *not* open files.

use crate::base::error::Result;
use crate::io::FileId;
use crate::io::files::{FileEntry, Files};
use crate::io::media::Location;
use foldhash::fast::FixedState;
use hashbrown::HashMap;
use io_uring::{IoUring, squeue, types};
use std::os::fd::{AsRawFd, RawFd};
use std::rc::Rc;
use std::sync::Arc;

/// Slots of a ring's table; files beyond these are used by descriptor.
const SLOTS: u32 = 64;

/// How a submission entry refers to a file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum SqeFile {
    /// By its descriptor.
    Descriptor(RawFd),
    /// By a slot of the ring's table.
    Fixed(u32),
}

impl SqeFile {
    /// The value of the entry's field for the file, and the flags that tell how to interpret it.
    pub(super) fn encode(self) -> (types::Fd, squeue::Flags) {
        match self {
            SqeFile::Descriptor(descriptor) => (types::Fd(descriptor), squeue::Flags::empty()),
            SqeFile::Fixed(slot) => (types::Fd(slot as RawFd), squeue::Flags::FIXED_FILE),
        }
    }
}

/// A file as this ring uses it.
pub(super) struct RingFile {
    entry: Arc<FileEntry>,
    pub(super) sqe_file: SqeFile,
    pub(super) location: Location,
}

impl RingFile {
    pub(super) fn id(&self) -> FileId {
        self.entry.id()
    }
}

/// The files that this ring has used, and its table.
#[derive(Default)]
pub(super) struct FixedFiles {
    known: HashMap<FileId, Rc<RingFile>, FixedState>,
    slots_used: u32,
    slots: u32,
}

impl FixedFiles {
    /// Registers a table with the ring, if the kernel supports that.
    pub(super) fn new(ring: &IoUring) -> FixedFiles {
        let slots = if ring.submitter().register_files_sparse(SLOTS).is_ok() { SLOTS } else { 0 };
        FixedFiles { slots, ..FixedFiles::default() }
    }

    /// The file, for transfers.
    ///
    /// # Errors
    /// `NotFound` if it does not exist.
    pub(super) fn get(
        &mut self,
        ring: &IoUring,
        files: &Files,
        id: FileId,
    ) -> Result<Rc<RingFile>> {
        if let Some(file) = self.known.get(&id) {
            return Ok(file.clone());
        }
        let entry = files.file(id);
        let location = files.location(&entry.file)?.clone();
        let descriptor = location.descriptor.as_raw_fd();
        let mut sqe_file = SqeFile::Descriptor(descriptor);
        if self.slots_used < self.slots
            && ring
                .submitter()
                .register_files_update(self.slots_used, &[descriptor])
                .is_ok_and(|n| n == 1)
        {
            sqe_file = SqeFile::Fixed(self.slots_used);
            self.slots_used += 1;
        }
        let file = Rc::new(RingFile { entry, sqe_file, location });
        self.known.insert(id, file.clone());
        Ok(file)
    }

    /// Unregisters the table, so that the files are closed, and unlocked, as soon as their last
    /// holder is dropped.
    pub(super) fn unregister(&mut self, ring: &IoUring) {
        self.known.clear();
        if std::mem::take(&mut self.slots) > 0 {
            let _ = ring.submitter().unregister_files();
        }
    }
}
