//! The disk of a shard: the ring where it works, else plain threads.
//!
//! It does *not* choose silently: the report says which, and why.

use super::files::Files;
use super::portable::{PortableDisk, PortableOptions};
use super::report::DiskReport;
use super::uring::{UringDisk, UringOptions};
use super::waker::DiskWaker;
use super::{Completion, Disk, DiskOp, FileId, OpId};
use crate::base::Micros;
use crate::base::error::{Error, ErrorKind, Result};
use crate::memory::Mapping;
use std::sync::Arc;

/// Which driver to take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DriverChoice {
    /// The ring where it works, else the portable one.
    #[default]
    Auto,
    /// The ring; an error where it does not work.
    Ring,
    /// The portable one.
    Portable,
}

/// How to run a shard's disk.
#[derive(Clone, Debug, Default)]
pub struct DriverOptions {
    /// Which driver.
    pub choice: DriverChoice,
    /// How to run the ring.
    pub ring: UringOptions,
    /// How to run the portable driver.
    pub portable: PortableOptions,
}

/// A disk over files, by one of the two drivers. It belongs to the thread that made it.
pub enum FileDisk {
    /// On a ring.
    Ring(Box<UringDisk>),
    /// On threads; with the reason if that is not what was wanted.
    Portable(PortableDisk, Option<String>),
}

impl FileDisk {
    /// One more disk over these files, for the thread that calls this.
    ///
    /// # Errors
    /// `Unsupported` if the ring was asked for and does not work here, `Io` if threads or descriptors run out.
    pub fn with_files(files: Arc<Files>, options: &DriverOptions) -> Result<FileDisk> {
        let mut why_not = None;
        if options.choice != DriverChoice::Portable {
            match UringDisk::with_files(files.clone(), &options.ring) {
                Ok(disk) => return Ok(FileDisk::Ring(Box::new(disk))),
                Err(e) if options.choice == DriverChoice::Auto && e.kind() == ErrorKind::Unsupported => {
                    why_not = Some(e.to_string());
                }
                Err(e) if e.kind() == ErrorKind::Unsupported => {
                    return Err(Error::new(
                        ErrorKind::Unsupported,
                        format_args!("{e}: take the portable driver, or let `corepage doctor` say what mends it"),
                    ));
                }
                Err(e) => return Err(e),
            }
        }
        Ok(FileDisk::Portable(PortableDisk::with_files(files, &options.portable)?, why_not))
    }

    /// What ends this disk's present or next wait, from any thread.
    pub fn waker(&self) -> DiskWaker {
        match self {
            FileDisk::Ring(disk) => disk.waker(),
            FileDisk::Portable(disk, _) => disk.waker(),
        }
    }

    /// What the machine gives.
    pub fn report(&self) -> DiskReport {
        match self {
            FileDisk::Ring(disk) => disk.report(),
            FileDisk::Portable(disk, why_not) => DiskReport { fallback: why_not.clone(), ..disk.report() },
        }
    }

    fn disk(&mut self) -> &mut dyn Disk {
        match self {
            FileDisk::Ring(disk) => disk.as_mut(),
            FileDisk::Portable(disk, _) => disk,
        }
    }
}

impl Disk for FileDisk {
    fn submit(&mut self, id: OpId, op: DiskOp) {
        self.disk().submit(id, op);
    }

    fn push(&mut self) {
        self.disk().push();
    }

    fn register(&mut self, memory: Mapping) {
        self.disk().register(memory);
    }

    fn reap(&mut self, out: &mut Vec<Completion>) {
        self.disk().reap(out);
    }

    fn wait(&mut self, timeout_us: Option<Micros>) {
        self.disk().wait(timeout_us);
    }

    fn len(&mut self, file: FileId) -> Result<Option<u64>> {
        self.disk().len(file)
    }

    fn files(&mut self) -> Result<Vec<FileId>> {
        self.disk().files()
    }
}
