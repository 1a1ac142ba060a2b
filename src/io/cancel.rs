//! Giving up what a store's threads are doing: opening it, or driving it after its last handle is gone.
//!
//! Invariants
//! 1. A token that was cancelled stays so.
//! 2. After that no operation is begun: at most those that are at the device already are waited for. What consists of many
//!    steps, such as an allocation, ends after the present one, with an error.
//!
//! It does *not* wake anybody: whoever cancels wakes the threads that wait.

use super::{Completion, Disk, DiskOp, FileId, OpId};
use crate::base::Micros;
use crate::base::error::{Error, ErrorKind, Result};
use crate::memory::Mapping;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Whether to go on. Clones are the same token.
#[derive(Clone, Debug, Default)]
pub struct Cancel(Arc<AtomicBool>);

impl Cancel {
    /// From now on no operation is begun.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::SeqCst);
    }

    /// Whether it was cancelled.
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }

    /// # Errors
    /// `Closed` once it was cancelled.
    pub fn check(&self) -> Result<()> {
        match self.is_cancelled() {
            true => Err(Error::new(
                ErrorKind::Closed,
                "opening the store was given up; it is as after a crash: open it again",
            )),
            false => Ok(()),
        }
    }
}

/// A disk for those who do one operation after another, such as recovery: once cancelled, each further one fails at once.
pub(crate) struct CancellableDisk<'d> {
    disk: &'d mut dyn Disk,
    cancel: Cancel,
    refused: Vec<Completion>,
}

impl<'d> CancellableDisk<'d> {
    pub(crate) fn new(disk: &'d mut dyn Disk, cancel: Cancel) -> Self {
        CancellableDisk { disk, cancel, refused: Vec::new() }
    }
}

impl Disk for CancellableDisk<'_> {
    fn submit(&mut self, id: OpId, op: DiskOp) {
        match self.cancel.check() {
            Ok(()) => self.disk.submit(id, op),
            Err(error) => self.refused.push(Completion { id, op, result: Err(error) }),
        }
    }

    fn push(&mut self) {
        self.disk.push();
    }

    fn register(&mut self, memory: Mapping) {
        self.disk.register(memory);
    }

    fn reap(&mut self, out: &mut Vec<Completion>) {
        out.append(&mut self.refused);
        self.disk.reap(out);
    }

    fn wait(&mut self, timeout_us: Option<Micros>) {
        if self.refused.is_empty() {
            self.disk.wait(timeout_us);
        }
    }

    fn calls(&self) -> u64 {
        self.disk.calls()
    }

    fn len(&mut self, file: FileId) -> Result<Option<u64>> {
        self.cancel.check()?;
        self.disk.len(file)
    }

    fn files(&mut self) -> Result<Vec<FileId>> {
        self.cancel.check()?;
        self.disk.files()
    }
}
