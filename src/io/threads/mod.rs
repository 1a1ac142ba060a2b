//! The portable disk: threads that call `preadv`, `pwritev` and `fdatasync`.
//!
//! It serves machines on which io_uring is missing or forbidden. The owner's thread queues
//! operations to the workers and never makes a system call that waits for the device.
//!
//! ```text
//!   submit --> [overflow] --> bounded channel --> worker: system calls --> completions --> reap
//!                                                      \--> wakes the owner's thread, if it waits
//! ```
//! Invariants
//! 1. An operation sent to the workers comes back exactly once, even if it panics.
//! 2. `overflow` holds operations only while the channel is full. The workers are then busy, so a
//!    completion will arrive, and the `reap` that fetches it sends the operations that wait.
//! 3. A completion is in its channel before the owner is woken, so the owner finds it.
//! 4. Dropping the disk waits only for the operations that workers have begun; afterwards nothing
//!    is in flight and the files can be opened again.
//!
//! It does *not* order operations (concurrent writes and flushes overtake each other), schedule, or
//! cache.

mod transfer;

use super::files::{FileEntries, FileEntry, Files};
use super::flush::{Cover, FlushQueue, FlushWaiter};
use super::report::DiskReport;
use super::waker::DiskWaker;
use super::{Completion, Disk, DiskOp, FileId, OpId};
use crate::base::Micros;
use crate::base::error::{Error, Result};
use crossbeam::channel::{Receiver, Sender, TrySendError};
use crossbeam::sync::{Parker, Unparker};
use std::collections::{BTreeMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// Operations that the channel holds for each worker: enough that no worker runs out of work
/// between two turns of the owner.
const QUEUED_PER_WORKER: usize = 16;

/// How to run the portable disk.
#[derive(Clone, Debug)]
pub struct PortableOptions {
    /// Threads, and therefore operations at the device at a time (default 8).
    pub workers_count: usize,
}

impl Default for PortableOptions {
    fn default() -> Self {
        PortableOptions { workers_count: 8 }
    }
}

/// An operation with the files that it names.
struct Job {
    id: OpId,
    op: DiskOp,
    files: FileEntries,
}

/// A disk over a store's files, whose operations a pool of threads carries out.
pub struct PortableDisk {
    files: Arc<Files>,
    known: BTreeMap<FileId, Arc<FileEntry>>,
    /// `None` only in `drop`.
    jobs: Option<Sender<Job>>,
    /// The workers' end, kept so that `drop` can take back jobs that no worker has begun.
    queue: Receiver<Job>,
    overflow: VecDeque<Job>,
    completions: Receiver<Completion>,
    parker: Parker,
    workers: Vec<JoinHandle<()>>,
    /// Operations submitted so far; each is a system call of a worker.
    calls: u64,
}

impl PortableDisk {
    /// Makes a disk over these files.
    ///
    /// # Errors
    /// `Io` if no thread can be started.
    pub fn with_files(files: Arc<Files>, options: &PortableOptions) -> Result<PortableDisk> {
        let workers_count = options.workers_count.clamp(1, 256);
        let (jobs, queue) = crossbeam::channel::bounded::<Job>(workers_count * QUEUED_PER_WORKER);
        // Unbounded, but it never holds more than the operations that the owner has in flight,
        // which the owner bounds.
        let (done, completions) = crossbeam::channel::unbounded();
        let parker = Parker::new();
        let flush_queue = files.new_flush_queue();
        let mut disk = PortableDisk {
            files,
            known: BTreeMap::new(),
            jobs: Some(jobs),
            queue: queue.clone(),
            overflow: VecDeque::new(),
            completions,
            parker,
            workers: Vec::new(),
            calls: 0,
        };
        for i in 0..workers_count {
            let worker = Worker {
                files: disk.files.clone(),
                flush_queue: flush_queue.clone(),
                queue: queue.clone(),
                done: done.clone(),
                owner: disk.parker.unparker().clone(),
            };
            let thread = std::thread::Builder::new()
                .name(format!("corepage-disk-{i}"))
                .spawn(move || worker.run());
            let thread = thread.map_err(|e| Error::no_thread("a disk thread", e))?;
            disk.workers.push(thread);
        }
        Ok(disk)
    }

    /// Returns a waker, which ends this disk's current or next wait from any thread.
    pub fn waker(&self) -> DiskWaker {
        DiskWaker::of_parker(self.parker.unparker().clone())
    }

    /// Reports what was found when the disk was opened.
    pub fn report(&self) -> DiskReport {
        DiskReport { driver: "portable", depth: self.workers.len(), ..self.files.report() }
    }

    fn file(&mut self, id: FileId) -> Arc<FileEntry> {
        self.known.entry(id).or_insert_with(|| self.files.file(id)).clone()
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
            DiskOp::Read { file, .. }
            | DiskOp::Write { file, .. }
            | DiskOp::Allocate { file, .. } => {
                let file = *file;
                FileEntries::from_iter([self.file(file)])
            }
            DiskOp::Flush { files } => {
                files.clone().into_iter().map(|file| self.file(file)).collect()
            }
        };
        self.calls += 1;
        self.overflow.push_back(Job { id, op, files });
        self.feed();
    }

    fn calls(&self) -> u64 {
        self.calls
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
        self.files.len(&file)
    }

    fn files(&mut self) -> Result<Vec<FileId>> {
        Ok(self.files.existing())
    }
}

impl Drop for PortableDisk {
    fn drop(&mut self) {
        // The workers finish what they have begun, then end; the queue is abandoned, since on a
        // slow device it may be a minute's work.
        self.jobs = None;
        self.queue.try_iter().for_each(drop);
        for worker in self.workers.drain(..) {
            let _ = worker.join();
        }
    }
}

struct Worker {
    files: Arc<Files>,
    flush_queue: Arc<FlushQueue>,
    queue: Receiver<Job>,
    done: Sender<Completion>,
    owner: Unparker,
}

impl Worker {
    fn run(self) {
        while let Ok(Job { id, mut op, files }) = self.queue.recv() {
            let flush = matches!(op, DiskOp::Flush { .. });
            let mut result = Ok(());
            if !flush && let Some(file) = files.first() {
                let outcome = catch_unwind(AssertUnwindSafe(|| {
                    transfer::carry_out(&self.files, file, &mut op)
                }));
                result = outcome.unwrap_or_else(|_| {
                    let cause = std::io::Error::other("the disk thread panicked");
                    Err(Error::io(format_args!("{op:?}"), cause))
                });
            }
            match op {
                DiskOp::Flush { .. } | DiskOp::Allocate { .. } if result.is_ok() => {
                    self.flush(id, op, files)
                }
                op => {
                    // Dropped first: the receiver of the completion may be the last to hold the
                    // files, and expect them to be closed.
                    drop(files);
                    self.complete(Completion { id, op, result });
                }
            }
        }
    }

    fn complete(&self, completion: Completion) {
        // This fails only when the disk is gone, and with it every receiver.
        let _ = self.done.send(completion);
        self.owner.unpark();
    }

    /// Flushes the files, then completes the operation. An allocation needs a flush of its own
    /// file.
    fn flush(&self, id: OpId, op: DiskOp, files: FileEntries) {
        let (cover, wanted) = match op {
            DiskOp::Allocate { .. } => (Cover::ThisFile, Ok(files.clone())),
            _ => (Cover::AnyFile, self.files.to_flush(&files)),
        };
        drop(files);
        let wanted = match wanted {
            Ok(wanted) if !wanted.is_empty() => wanted,
            other => return self.complete(Completion { id, op, result: other.map(drop) }),
        };
        let pending =
            Pending { left: wanted.len(), completion: Some(Completion { id, op, result: Ok(()) }) };
        let pending = Arc::new(Mutex::new(pending));
        for file in wanted {
            let (pending, done, owner) = (pending.clone(), self.done.clone(), self.owner.clone());
            let call = move |result| {
                if let Some(completion) =
                    pending.lock().unwrap_or_else(PoisonError::into_inner).take_in(result)
                {
                    let _ = done.send(completion);
                    owner.unpark();
                }
            };
            let batch =
                self.files.join(&self.flush_queue, &file, cover, FlushWaiter::Call(Box::new(call)));
            drop(file);
            if let Some(batch) = batch {
                transfer::lead(&self.files, batch);
            }
        }
    }
}

/// An operation whose flushes, of one or several files, are under way.
struct Pending {
    left: usize,
    completion: Option<Completion>,
}

impl Pending {
    /// Records that one flush has ended. Returns the completion if it was the last.
    fn take_in(&mut self, result: Result<()>) -> Option<Completion> {
        self.left -= 1;
        if let (Err(_), Some(Completion { result: whole @ Ok(()), .. })) =
            (&result, &mut self.completion)
        {
            *whole = result;
        }
        if self.left == 0 { self.completion.take() } else { None }
    }
}

#[cfg(test)]
mod tests;
