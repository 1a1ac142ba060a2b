//! Makes a log longer, while commits go on in the segments that it has.
//!
//! ```text
//! counted --long when a checkpoint begins--> making, file by file --all, or one failed--> made
//!    ^                                                                                      |
//!    +------------------ a durable superblock counts them: they may be used ----------------+
//! ```
//! Invariants
//! 1. The superblock counts a segment only when its file exists, as durable zeros.
//! 2. A segment is used only when a durable superblock counts it: recovery takes no group of any
//!    other.
//! 3. If a file can't be made, this growth ends and nothing else. A later checkpoint tries again.
//! 4. A checkpoint does not wait for a growth: the next superblock counts the segments that are
//!    made too late for this one.
//!
//! A file left over from a growth before a crash is made again, whatever it holds.

use super::{Log, Segment};
use crate::base::SegmentNo;

/// The segments that are being made, or made and not in use yet.
#[derive(Debug)]
pub(super) struct Growth {
    /// The number of segments whose files exist.
    made: u32,
    /// The number of segments after the growth in progress; `made` if there is none.
    goal: u32,
    /// Whether the last try failed.
    has_failed: bool,
}

impl Growth {
    pub(super) fn new(made: u32) -> Self {
        Growth { made, goal: made, has_failed: false }
    }

    pub(super) fn made(&self) -> u32 {
        self.made
    }
}

impl Log {
    /// Begins to make the log twice as long, or as long as `most` allows, when it is long and no
    /// growth is in progress. Returns the segment to make first.
    pub(crate) fn grow(&mut self, most: u32) -> Option<SegmentNo> {
        let counted = self.segments.len() as u32;
        if self.growth.made > counted || self.is_growing() || !self.is_long() {
            return None;
        }
        self.growth.goal = counted.saturating_mul(2).min(most).max(counted);
        self.next_to_make()
    }

    /// Whether a segment is being made.
    pub(crate) fn is_growing(&self) -> bool {
        self.growth.goal > self.growth.made
    }

    fn next_to_make(&self) -> Option<SegmentNo> {
        self.is_growing().then(|| SegmentNo::new(self.growth.made))
    }

    /// Called when the segment that was being made exists. Returns the next one to make.
    pub(crate) fn segment_made(&mut self) -> Option<SegmentNo> {
        assert!(self.is_growing(), "a segment was being made");
        self.growth.made += 1;
        self.growth.has_failed = false;
        if planted!(SegmentUsedUncounted) {
            self.use_segments(self.growth.made);
        }
        self.next_to_make()
    }

    /// Ends the growth with the segments that there are.
    pub(crate) fn end_growth(&mut self) {
        self.growth.goal = self.growth.made;
    }

    /// Called when the segment can't be made. Returns whether the attempt before had succeeded, so
    /// that this failure is new.
    pub(crate) fn segment_not_made(&mut self) -> bool {
        assert!(self.is_growing(), "a segment was being made");
        if planted!(SegmentCountedUnmade) {
            self.growth.made += 1;
        }
        self.growth.goal = self.growth.made;
        !std::mem::replace(&mut self.growth.has_failed, true)
    }

    /// Called when a durable superblock counts `counted` segments: they may be used.
    pub(crate) fn use_segments(&mut self, counted: u32) {
        assert!(
            counted <= self.growth.made,
            "the superblock counts what is made: {counted}, {:?}",
            self.growth
        );
        let counted = self.segments.len().max(counted as usize);
        self.segments.resize(counted, Segment::Free);
    }
}
