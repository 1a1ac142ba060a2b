//! Flushes of the ring disk: how it joins batches, leads them, and submits the syncs of those that
//! it leads.

use super::UringDisk;
use super::entries::BatchIdx;
use super::op::Op;
use crate::base::error::Result;
use crate::io::flush::{Cover, FlushBatch, FlushWaiter, NextLeader, OpIdx};
use crate::io::{DiskOp, OpId};

/// A batch that this disk leads.
pub(super) struct LedBatch {
    pub(super) batch: FlushBatch,
    /// Syncs that have not completed yet.
    pending: u32,
    result: Result<()>,
}

/// A sync to submit: its batch, and the index of the file in it.
pub(super) struct QueuedSync {
    pub(super) batch: BatchIdx,
    pub(super) file: usize,
}

impl UringDisk {
    pub(super) fn begin_flush(&mut self, id: OpId, op: DiskOp) {
        let DiskOp::Flush { files } = &op else { unreachable!("only flushes are flushed") };
        let named: Vec<_> = files.iter().map(|&file| self.files.file(file)).collect();
        let wanted = match self.files.to_flush(&named) {
            Ok(wanted) if !wanted.is_empty() => wanted,
            other => return self.complete(id, op, other.map(drop)),
        };
        // All flushes are counted before the first joins, since it may fail at once.
        let op = OpIdx(self.ops.insert(Op::untransferred(id, op, wanted.len() as u32)) as u32);
        self.remote_pending += wanted.len();
        for file in wanted {
            let waiter = FlushWaiter::Ring(self.remote_events.clone(), op);
            if let Some(batch) = self.files.join(&self.flush_queue, &file, Cover::AnyFile, waiter) {
                self.lead(batch);
            }
        }
    }

    pub(super) fn lead(&mut self, batch: FlushBatch) {
        let files_count = batch.files().len();
        assert!(files_count > 0, "a batch without files would never end");
        let led = LedBatch { batch, pending: files_count as u32, result: Ok(()) };
        let batch = BatchIdx(self.led_batches.insert(led) as u32);
        self.syncs.extend((0..files_count).map(|file| QueuedSync { batch, file }));
    }

    pub(super) fn sync_completed(&mut self, batch: BatchIdx, result: i32) {
        let led = &mut self.led_batches[batch.0 as usize];
        assert!(led.pending > 0, "a sync of a batch that has ended completed");
        led.pending -= 1;
        if result < 0 && led.result.is_ok() {
            // An interrupted sync counts as failed, too: it may have lost writes already.
            let cause = std::io::Error::from_raw_os_error(-result);
            led.result = Err(self.files.error(led.batch.files()[0].id(), "flushing", cause));
        }
        if led.pending > 0 {
            return;
        }
        let LedBatch { batch, result, .. } = self.led_batches.remove(batch.0 as usize);
        let leader = match self.closing {
            true => NextLeader::AnotherIfAny(Some(&self.remote_events)),
            false => NextLeader::Same,
        };
        if let Some(next) = batch.end(result, leader) {
            self.lead(next);
        }
    }
}
