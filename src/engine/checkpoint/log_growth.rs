//! Makes the log of a shard longer in the course of checkpoints; `engine::log::growth` says how,
//! and when a segment counts.
//!
//! Invariants
//! 1. A log grows only if it was long at the beginning of a checkpoint: the log of a store without
//!    writes does not grow.
//! 2. If a segment can't be made, that is logged once, and checkpoints stay as frequent as they
//!    are.
//! 3. Nothing is being made when the store is closed.

use crate::base::SegmentNo;
use crate::base::error::Error;
use crate::engine::{OpKind, Shard};
use crate::io::{DiskOp, FileId};

impl Shard {
    /// Called when a checkpoint begins: if the log is long, makes it longer, so that later
    /// checkpoints are less frequent.
    pub(in crate::engine) fn make_log_longer(&mut self) {
        let segment = self.log.grow(self.ctx.limits.geometry.segments_count);
        self.make_segment(segment);
    }

    fn make_segment(&mut self, segment: Option<SegmentNo>) {
        let Some(segment) = segment else { return };
        // It is made from its beginning, whatever exists: an interrupted growth may have left a
        // file.
        let (file, to) =
            (FileId::Log(self.ctx.id, segment), self.ctx.limits.geometry.segment_bytes);
        self.ctx.submit(OpKind::LogSegment, DiskOp::Allocate { file, from: 0, to });
    }

    /// Called when the file of a segment exists, or can't be made.
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
                        "the log can't get longer: the store continues with frequent checkpoints, \
                         and tries again in a later one"
                    );
                }
            }
        }
    }

    /// Called when a superblock is durable: the segments that it counts may be used.
    pub(in crate::engine) fn use_new_segments(&mut self) {
        // In the middle of a recovery it counts those of the old logs.
        if self.redo.recovering.is_some() {
            return;
        }
        let made = self.ctx.superblock.logs.get(self.ctx.id.index()).map(|log| log.segments_made);
        self.log.use_segments(made.expect("each shard has a log"));
    }
}
