//! The portable disk: plain files in a directory, and threads that call `preadv`, `pwritev` and `fdatasync`.
//!
//! For machines on which io_uring is missing or forbidden. The owner's thread queues operations to the workers and
//! never makes a system call that waits for the device.
//!
//! ```text
//!   submit --> [overflow] --> bounded channel --> worker: system calls --> channel of completions --> reap
//!                                                      \--> wakes the owner's thread, if it waits
//! ```
//! Invariants
//! 1. An operation sent to the workers comes back exactly once, also if carrying it out panicked.
//! 2. `overflow` holds operations only while the channel is full. Then workers are busy, so a completion is to come,
//!    and the `reap` that fetches it sends what waits.
//! 3. A completion is in its channel before the owner is woken, so a woken owner finds it.
//! 4. Every descriptor is locked (`flock`) from before its first transfer until it is closed. Dropping the disk waits
//!    for the workers, so afterwards nothing is in flight and the files can be opened again.
//!
//! It does *not*: order operations (writes and flushes under way at a time overtake each other), schedule, or cache.

mod files;
mod kernel;
mod transfer;

pub use files::{Access, DiskReport, PortableOptions};
pub(crate) use files::{file_system, free_bytes, try_direct};
pub(crate) use kernel::check as check_kernel;

use super::{Completion, Disk, DiskOp, FileId, OpId};
use crate::error::{Error, Result};
use crate::types::Micros;
use crossbeam_channel::{Receiver, Sender, TrySendError};
use files::{Directory, StoreFile};
use parking::{Parker, Unparker};
use smallvec::SmallVec;
use std::collections::{BTreeMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

/// Operations that may stand in the channel for each worker. Enough that none runs dry between two laps of the owner.
const QUEUED_PER_WORKER: usize = 16;

/// An operation with the files that it names.
struct Job {
    id: OpId,
    op: DiskOp,
    files: SmallVec<[Arc<StoreFile>; 1]>,
}

/// A directory of ordinary files as the store's disk.
pub struct PortableDisk {
    directory: Arc<Directory>,
    files: BTreeMap<FileId, Arc<StoreFile>>,
    /// Taken only in `drop`.
    jobs: Option<Sender<Job>>,
    overflow: VecDeque<Job>,
    completions: Receiver<Completion>,
    parker: Parker,
    workers: Vec<JoinHandle<()>>,
}

impl PortableDisk {
    /// Opens the directory `dir` and locks all files of a store that are in it. With [`Access::ReadWrite`] a missing
    /// directory is made; with [`Access::ReadOnly`] nothing is created or changed, ever.
    ///
    /// # Errors
    /// `InUse` if another process has the store open, `NotFound` if there is nothing to read, `Invalid` if the
    /// directory holds files that are no store's but have the names of its files, `Io` for the rest.
    pub fn open(dir: &Path, access: Access) -> Result<PortableDisk> {
        Self::open_with(dir, access, &PortableOptions::default())
    }

    /// The same with other than the default options.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_with(dir: &Path, access: Access, options: &PortableOptions) -> Result<PortableDisk> {
        kernel::check()?;
        let (directory, files) = Directory::open(dir, access, options)?;
        let directory = Arc::new(directory);
        let workers_count = options.workers_count.clamp(1, 256);
        let (jobs, queue) = crossbeam_channel::bounded::<Job>(workers_count * QUEUED_PER_WORKER);
        // Never holds more than the owner has under way, which is the owner's to bound.
        let (done, completions) = crossbeam_channel::unbounded();
        let parker = Parker::new();
        let mut disk = PortableDisk {
            directory,
            files: files.into_iter().map(|file| (file.id(), Arc::new(file))).collect(),
            jobs: Some(jobs),
            overflow: VecDeque::new(),
            completions,
            parker,
            workers: Vec::new(),
        };
        for i in 0..workers_count {
            let worker = Worker {
                directory: disk.directory.clone(),
                queue: queue.clone(),
                done: done.clone(),
                owner: disk.parker.unparker(),
            };
            let thread = std::thread::Builder::new().name(format!("corepage-disk-{i}")).spawn(move || worker.run());
            let thread =
                thread.map_err(|e| Error::io("starting a disk thread (is the limit of threads reached?)", e))?;
            disk.workers.push(thread);
        }
        Ok(disk)
    }

    /// What wakes the thread that is in [`Disk::wait`], from any thread.
    pub fn unparker(&self) -> Unparker {
        self.parker.unparker()
    }

    /// What the machine gives.
    pub fn report(&self) -> DiskReport {
        self.directory.report()
    }

    fn file(&mut self, id: FileId) -> Arc<StoreFile> {
        self.files.entry(id).or_insert_with(|| Arc::new(StoreFile::missing(id))).clone()
    }

    fn feed(&mut self) {
        let Some(jobs) = &self.jobs else { return };
        while let Some(job) = self.overflow.pop_front() {
            match jobs.try_send(job) {
                Ok(()) => {}
                Err(TrySendError::Full(job) | TrySendError::Disconnected(job)) => {
                    self.overflow.push_front(job);
                    return;
                }
            }
        }
    }
}

impl Disk for PortableDisk {
    fn submit(&mut self, id: OpId, op: DiskOp) {
        let files = match &op {
            DiskOp::Read { file, .. } | DiskOp::Write { file, .. } | DiskOp::Allocate { file, .. } => {
                let file = *file;
                SmallVec::from_iter([self.file(file)])
            }
            DiskOp::Flush { files } => files.clone().into_iter().map(|file| self.file(file)).collect(),
        };
        self.overflow.push_back(Job { id, op, files });
        self.feed();
    }

    fn reap(&mut self, out: &mut Vec<Completion>) {
        out.extend(self.completions.try_iter());
        self.feed();
    }

    fn wait(&mut self, timeout_us: Option<Micros>) {
        if !self.completions.is_empty() {
            return;
        }
        match timeout_us {
            Some(0) => {}
            Some(us) => {
                self.parker.park_timeout(Duration::from_micros(us));
            }
            None => self.parker.park(),
        }
    }

    fn len(&mut self, file: FileId) -> Result<Option<u64>> {
        let file = self.file(file);
        self.directory.len(&file)
    }
}

impl Drop for PortableDisk {
    fn drop(&mut self) {
        // The workers finish what is in the channel, and end.
        self.jobs = None;
        for worker in self.workers.drain(..) {
            let _ = worker.join();
        }
    }
}

struct Worker {
    directory: Arc<Directory>,
    queue: Receiver<Job>,
    done: Sender<Completion>,
    owner: Unparker,
}

impl Worker {
    fn run(self) {
        while let Ok(Job { id, mut op, files }) = self.queue.recv() {
            let outcome = catch_unwind(AssertUnwindSafe(|| transfer::carry_out(&self.directory, &files, &mut op)));
            let result = outcome.unwrap_or_else(|_| {
                let cause = std::io::Error::other("the disk thread panicked");
                Err(Error::io(format_args!("{op:?}"), cause))
            });
            // Before the completion: whoever gets it may be the last to hold the files, and expect them closed.
            drop(files);
            if self.done.send(Completion { id, op, result }).is_err() {
                return;
            }
            self.owner.unpark();
        }
    }
}

#[cfg(test)]
mod tests;
