//! A disk that refuses further operations once the work on the store is cancelled.
//!
//! It does *not* end an operation that is at the device.

use super::cancel::Cancel;
use super::{Completion, Disk, DiskOp, FileId, OpId};
use crate::base::Micros;
use crate::base::error::Result;
use crate::memory::Mapping;

/// A disk for callers that run one operation after another, such as recovery: after cancellation
/// each further one fails at once.
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
