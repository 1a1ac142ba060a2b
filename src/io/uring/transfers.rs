//! Reads and writes of the ring disk: from an operation to spans in the queue, and what becomes of each span's result.

use super::UringDisk;
use super::fixed_files::RingFile;
use super::op::{self, Op, Parts, Span, SpanResult};
use crate::base::error::{Error, Result};
use crate::io::{DiskOp, FileId, OpId};
use std::rc::Rc;

impl UringDisk {
    pub(super) fn begin_transfer(&mut self, id: OpId, mut op: DiskOp) {
        let prepared = self.prepare(&mut op);
        let (target, address, parts) = match prepared {
            Ok(prepared) => prepared,
            Err(error) => return self.finish(id, op, Err(error)),
        };
        let Ok(bytes) = u32::try_from(op.bytes()) else {
            let error = Error::invalid(format_args!("{op:?}: more than 4 GiB in one operation"));
            return self.finish(id, op, Err(error));
        };
        if bytes == 0 {
            return self.finish(id, op, Ok(()));
        }
        let key = self.ops.insert(Op { id, op, target: Some(target), address, parts, left: 0, error: None });
        for span in op::spans(key as u32, bytes) {
            self.ops[key].left += 1;
            self.queue.push_back(span);
        }
    }

    /// The file of a transfer, the address on its descriptor, and the memory.
    fn prepare(&mut self, op: &mut DiskOp) -> Result<(Rc<RingFile>, u64, Parts)> {
        let (file, offset) = match op {
            DiskOp::Write { file, offset, .. } => {
                self.files.may_write("write", *file)?;
                (*file, *offset)
            }
            DiskOp::Read { file, offset, .. } => (*file, *offset),
            DiskOp::Flush { .. } | DiskOp::Allocate { .. } => unreachable!("only reads and writes are transfers"),
        };
        let target = self.fixed_files.get(self.main.get(), &self.files, file)?;
        let address = target.location.address(offset, op.bytes());
        let address = address.map_err(|e| self.transfer_error(op, offset, file, e))?;
        let parts = op::parts_of(op, &self.buffers)?;
        Ok((target, address, parts))
    }

    fn transfer_error(&self, op: &DiskOp, offset: u64, file: FileId, cause: std::io::Error) -> Error {
        let doing = format_args!("{} of {} bytes at {offset} of", op.name(), op.bytes());
        self.files.error(file, doing, cause)
    }

    pub(super) fn span_landed(&mut self, span: Span, result: i32) {
        let op = &self.ops[span.op as usize];
        match op::classify(span, result, op.is_write()) {
            SpanResult::Done => self.part_done(span.op, None),
            SpanResult::Remainder(_) | SpanResult::Retry(_) if self.closing => self.part_done(span.op, None),
            SpanResult::Remainder(rest) => self.queue.push_back(rest),
            SpanResult::Retry(span) => self.refused.push(span),
            SpanResult::Failed(e) => {
                let file = op.target.as_ref().map_or(FileId::Meta, |target| target.id());
                let error = self.transfer_error(&op.op, op.offset(), file, e);
                self.part_done(span.op, Some(error));
            }
        }
    }
}
