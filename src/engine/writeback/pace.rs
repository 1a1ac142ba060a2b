//! Decides when dirty pages go to their places, and how many at a time.
//!
//! The log has every change already, so a page that is written early costs the device time, and
//! costs it again when the page changes once more. A dirty page is written for one of four reasons:
//!
//! 1. *Demand*: something waits for clean pages: a close, an opening, a checkpoint that a caller
//!    waits for or that has to make room, or a commit that found no memory. All pages go at once.
//! 2. *Memory*: more than [`HIGH_SHARE`] of it is dirty. Pages are written down to [`LOW_SHARE`].
//! 3. *Checkpoint*: the pages that one needs in the map are spread over the log that is left and
//!    over time, so that commits meet no burst. The law is that of PostgreSQL's spread checkpoints
//!    (`checkpoint_completion_target`, manual, section 28.5): progress in pages follows progress in
//!    log written or in time, whichever is further.
//! 4. *Idleness*: nothing has been committed for two coalescing windows in a row, and no group is
//!    on its way. So an idle store becomes clean. One window may have passed only because a thread
//!    was not scheduled.
//!
//! Invariants
//! 1. What is due never depends on a page that changes again: the pages that a checkpoint needs are
//!    counted when it begins.
//! 2. Each reason but demand has an end: see [`Spread::due_at`] for the checkpoint's.
//!
//! It does *not* choose pages, nor write any.

use crate::base::Micros;

/// This share of the memory (of 16) may be dirty before pages are written for its sake. Commits
/// wait at 4.
pub(super) const HIGH_SHARE: u64 = 3;
/// Then pages are written down to this share.
pub(super) const LOW_SHARE: u64 = 2;
/// A checkpoint's pages are written within this time at the latest.
const SPREAD_US: Micros = 1_000_000;
/// How many pages of a checkpoint are written together.
const SPREAD_BATCH: u64 = 64;

/// What may be taken from the queue of dirty pages now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Due {
    /// At most this many pages.
    pub pages: usize,
    /// Also pages whose newest change is above the watermark.
    pub above_watermark: bool,
    /// Only pages that the checkpoint under way needs.
    pub awaited_only: bool,
}

impl Due {
    /// For a demand that is not only for what is durable.
    pub const ALL: Due = Due { pages: usize::MAX, above_watermark: true, awaited_only: false };

    /// This many of the pages that are durable in the log.
    pub fn durable(pages: usize) -> Due {
        Due { pages, above_watermark: false, awaited_only: false }
    }
}

/// The pages of a checkpoint, spread over log and time.
#[derive(Clone, Copy, Debug)]
pub(in crate::engine) struct Spread {
    /// Pages that the checkpoint needs in the map.
    pages: u64,
    begun_at: Micros,
    /// Blocks written to the log before.
    log_before: u64,
    /// Blocks over which the pages are spread: half of what was left of the log.
    log_blocks: u64,
}

impl Spread {
    pub fn new(pages: u64, now: Micros, log_before: u64, log_left: u64) -> Self {
        Spread { pages, begun_at: now, log_before, log_blocks: (log_left / 2).max(1) }
    }

    /// Pages that are to be on their way by now, of all that the checkpoint needs; in batches.
    pub fn progress(&self, now: Micros, log_written: u64) -> u64 {
        let by_log = (log_written - self.log_before).min(self.log_blocks);
        let by_time = (now - self.begun_at).min(SPREAD_US);
        let pages = (self.pages * by_log / self.log_blocks).max(self.pages * by_time / SPREAD_US);
        if pages == self.pages { pages } else { pages - pages % SPREAD_BATCH }
    }

    /// When the next batch is due by time alone, with `written` pages on their way; `None`: all are.
    pub fn due_at(&self, written: u64) -> Option<Micros> {
        let next = (written + SPREAD_BATCH).min(self.pages);
        (written < self.pages).then(|| self.begun_at + (next * SPREAD_US).div_ceil(self.pages))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_follow_the_log_and_the_clock_whichever_is_further() {
        let spread = Spread::new(1000, 500, 10_000, 2000);
        assert_eq!(spread.progress(500, 10_000), 0);
        // A tenth of half of the log that was left: in batches.
        assert_eq!(spread.progress(500, 10_100), 64);
        assert_eq!(spread.progress(500, 10_500), 448);
        assert_eq!(spread.progress(500, 11_000), 1000, "half of the log that was left is full");
        assert_eq!(spread.progress(500, 99_000), 1000);
        // Nothing is committed: the clock alone.
        assert_eq!(spread.progress(500 + SPREAD_US / 2, 10_000), 448);
        assert_eq!(spread.progress(500 + SPREAD_US, 10_000), 1000);
    }

    #[test]
    fn a_batch_is_due_when_the_clock_says_so() {
        let spread = Spread::new(1000, 500, 0, 2000);
        let mut written = 0;
        while let Some(due) = spread.due_at(written) {
            assert!(spread.progress(due - 1, 0) <= written, "{due} is not the first moment");
            written = spread.progress(due, 0);
        }
        assert_eq!(written, 1000);
        assert_eq!(Spread::new(0, 0, 0, 0).due_at(0), None, "no pages, no deadline");
        assert_eq!(Spread::new(0, 0, 0, 0).progress(7, 0), 0);
    }
}
