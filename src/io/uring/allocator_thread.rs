//! The thread that allocates for a ring disk: it writes zeros by plain system calls, which may wait
//! as long as the device does.
//!
//! Invariants
//! 1. Each job is answered by a remote event exactly once, even if it panics.
//! 2. An allocation is answered only after a flush of its file. The disk leads that flush, not this
//!    thread.
//!
//! The first allocation starts the thread; it sleeps while it has no job.

use crate::base::error::{Error, Result};
use crate::io::files::{FileEntry, Files};
use crate::io::flush::{Cover, FlushQueue, FlushWaiter, OpIdx, RemoteEvent, RemoteEvents};
use crossbeam::channel::{Receiver, Sender};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::JoinHandle;

struct Job {
    op: OpIdx,
    file: Arc<FileEntry>,
    bytes: Range<u64>,
}

/// The handle of the thread; dropping it ends the thread.
pub(super) struct AllocatorThread {
    /// `None` only in `drop`.
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl AllocatorThread {
    pub(super) fn start(
        files: Arc<Files>,
        flush_queue: Arc<FlushQueue>,
        remote_events: Arc<RemoteEvents>,
    ) -> Result<AllocatorThread> {
        // Unbounded, but it never holds more than the operations that the disk's owner has in
        // flight, which the owner bounds.
        let (jobs, queue) = crossbeam::channel::unbounded();
        let body = move || run(&files, &flush_queue, &remote_events, &queue);
        let thread = std::thread::Builder::new().name("corepage-alloc".into()).spawn(body);
        let thread = thread.map_err(|e| Error::no_thread("the thread that allocates", e))?;
        Ok(AllocatorThread { jobs: Some(jobs), thread: Some(thread) })
    }

    /// Allocates these bytes of `file` for the operation `op`.
    pub(super) fn send(&self, op: OpIdx, file: Arc<FileEntry>, bytes: Range<u64>) {
        let sent = self.jobs.as_ref().map(|jobs| jobs.send(Job { op, file, bytes }));
        assert!(matches!(sent, Some(Ok(()))), "the thread ends only when the disk does");
    }
}

impl Drop for AllocatorThread {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn run(
    files: &Files,
    flush_queue: &Arc<FlushQueue>,
    remote_events: &Arc<RemoteEvents>,
    queue: &Receiver<Job>,
) {
    while let Ok(Job { op, file, bytes }) = queue.recv() {
        let outcome = catch_unwind(AssertUnwindSafe(|| files.grow(&file, bytes.clone())));
        let result = outcome.unwrap_or_else(|_| {
            let cause = std::io::Error::other("the thread that allocates panicked");
            Err(Error::io(
                format_args!("allocate {} {}..{}", file.id(), bytes.start, bytes.end),
                cause,
            ))
        });
        if result.is_err() {
            remote_events.push(RemoteEvent::PartEnded(op, result));
            continue;
        }
        let waiter = FlushWaiter::Ring(remote_events.clone(), op);
        if let Some(batch) = files.join(flush_queue, &file, Cover::ThisFile, waiter) {
            remote_events.push(RemoteEvent::Lead(batch));
        }
    }
}
