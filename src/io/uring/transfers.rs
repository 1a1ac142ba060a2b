//! Reads and writes of the ring disk: turns an operation into queued spans, and handles each span's
//! result.

use super::UringDisk;
use super::fixed_files::RingFile;
use super::op::{self, MemoryRanges, Op, Span, SpanResult};
use crate::base::error::{Error, Result};
use crate::io::flush::OpIdx;
use crate::io::{DiskOp, FileId, OpId};
use std::rc::Rc;

impl UringDisk {
    pub(super) fn begin_transfer(&mut self, id: OpId, mut op: DiskOp) {
        let prepared = self.prepare(&mut op);
        let (file, address, memory) = match prepared {
            Ok(prepared) => prepared,
            Err(error) => return self.complete(id, op, Err(error)),
        };
        let Ok(bytes) = u32::try_from(op.bytes()) else {
            let error = Error::invalid(format_args!("{op:?}: more than 4 GiB in one operation"));
            return self.complete(id, op, Err(error));
        };
        if bytes == 0 {
            return self.complete(id, op, Ok(()));
        }
        let key = self.ops.insert(Op {
            id,
            op,
            file: Some(file),
            address,
            memory,
            pending: 0,
            error: None,
        });
        for span in op::spans(OpIdx(key as u32), bytes) {
            self.ops[key].pending += 1;
            self.queue.push_back(span);
        }
    }

    /// The file of a transfer, the address on its descriptor, and the memory.
    fn prepare(&mut self, op: &mut DiskOp) -> Result<(Rc<RingFile>, u64, MemoryRanges)> {
        let (file, offset) = match op {
            DiskOp::Write { file, offset, .. } => {
                self.files.may_write("write", *file)?;
                (*file, *offset)
            }
            DiskOp::Read { file, offset, .. } => (*file, *offset),
            DiskOp::Flush { .. } | DiskOp::Allocate { .. } => {
                unreachable!("only reads and writes are transfers")
            }
        };
        let ring_file = self.fixed_files.get(self.main.get(), &self.files, file)?;
        let address = ring_file.location.address(offset, op.bytes());
        let address = address.map_err(|e| self.transfer_error(op, offset, file, e))?;
        let memory = op::memory_ranges(op, &self.buffers)?;
        Ok((ring_file, address, memory))
    }

    fn transfer_error(
        &self,
        op: &DiskOp,
        offset: u64,
        file: FileId,
        cause: std::io::Error,
    ) -> Error {
        let doing = format_args!("{} of {} bytes at {offset} of", op.name(), op.bytes());
        self.files.error(file, doing, cause)
    }

    pub(super) fn span_completed(&mut self, span: Span, result: i32) {
        let op = &self.ops[span.op.0 as usize];
        match op::classify(span, result, op.early_end()) {
            SpanResult::Done => self.part_ended(span.op, None),
            SpanResult::Remainder(_) | SpanResult::Retry(_) if self.closing => {
                self.part_ended(span.op, None)
            }
            SpanResult::Remainder(rest) => self.queue.push_back(rest),
            SpanResult::Retry(span) => self.retries.push(span),
            SpanResult::Failed(e) => {
                let file = op.file.as_ref().map_or(FileId::Meta, |file| file.id());
                let error = self.transfer_error(&op.op, op.offset(), file, e);
                self.part_ended(span.op, Some(error));
            }
        }
    }
}
