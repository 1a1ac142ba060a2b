//! The log of a shard gets longer in the course of checkpoints; see `engine::log::growth` for how,
//! and when a segment counts.
//!
//! Invariants
//! 1. A log grows only when it was long at the beginning of a checkpoint: that of a store to which
//!    nobody writes stays as it is.
//! 2. What can't be made costs a line in the log, once, and checkpoints stay as frequent as they
//!    are.
//! 3. Nothing is being made when the store is closed.

use crate::base::SegmentNo;
use crate::base::error::Error;
use crate::engine::{OpKind, Shard};
use crate::io::{DiskOp, FileId};

impl Shard {
    /// A checkpoint begins: if the log is long, the next ones are to come less often.
    pub(in crate::engine) fn make_log_longer(&mut self) {
        let segment = self.log.grow(self.ctx.limits.geometry.segments_count);
        self.make_segment(segment);
    }

    fn make_segment(&mut self, segment: Option<SegmentNo>) {
        let Some(segment) = segment else { return };
        // From its beginning, whatever is there: a growth that was cut short may have left a file.
        let (file, to) =
            (FileId::Log(self.ctx.id, segment), self.ctx.limits.geometry.segment_bytes);
        self.ctx.submit(OpKind::LogSegment, DiskOp::Allocate { file, from: 0, to });
    }

    /// The file of a segment is there, or can't be made.
    pub(in crate::engine) fn segment_made(&mut self, result: Result<(), Error>) {
        self.ctx.need_all();
        match result {
            Ok(()) => {
                let next = self.log.segment_made();
                match self.ctx.failed.is_none() && self.life.closing.is_none() {
                    true => self.make_segment(next),
                    false => self.log.end_growth(),
                }
            }
            Err(error) => {
                let is_news = self.log.segment_not_made();
                if is_news && self.ctx.failed.is_none() {
                    let (shard, segments) = (self.ctx.id.get(), self.log.segments_count());
                    tracing::warn!(
                        shard, segments, %error,
                        "the log can't get longer: the store goes on with frequent checkpoints, and tries again in a later one"
                    );
                }
            }
        }
    }

    /// A superblock is durable: the segments that it counts may be used.
    pub(in crate::engine) fn use_new_segments(&mut self) {
        // In the middle of a recovery it counts those of the logs before.
        if self.redo.recovering.is_some() {
            return;
        }
        let made = self.ctx.superblock.logs.get(self.ctx.id.index()).map(|log| log.segments_made);
        self.log.use_segments(made.expect("each shard has a log"));
    }
}
