//! Resolves shortages of memory: at the end of a turn in which a step found none, it makes the
//! holders of the memory give it back, or refuses the first request in the queue.
//!
//! Invariants
//! 1. No request is refused while something in progress will give memory back, unless pages pinned
//!    by readers are the cause.
//! 2. Each queue gets one refusal at a time: the next request looks again.
//! 3. If no request is answered for [`MEMORY_WAIT_MAX_US`] while a step meets the shortage again and
//!    again, the first in its queue is refused, whatever the cause: there is no livelock.
//!
//! It does *not* find frames (`cache::eviction` does), nor decide which request goes first.

use super::blocked::{
    Lack, MEMORY_RETRY_US, MEMORY_WAIT_MAX_US, PATH_NODES, REFUSED, SHORTAGE_US, Step,
};
use super::reservations::HELD_PAGES_SHARE;
use super::{OpKind, Shard};
use crate::base::Lsn;
use crate::base::error::{Error, ErrorKind};

impl Shard {
    /// Called at the end of a turn in which a step found no memory: makes the holders of the memory
    /// give it back, or refuses the first request in the queue.
    pub(super) fn relieve_memory(&mut self) {
        if !self.ctx.blocked.lacks_memory() {
            return;
        }
        let now = self.ctx.now;
        let waited = |step| self.ctx.blocked.waited(step, now);
        let longest =
            [Step::Commit, Step::Vote, Step::NodeRead, Step::PageRead, Step::Redo, Step::RedoRead]
                .into_iter()
                .filter_map(waited)
                .max();
        let Some(longest) = longest else { return };
        let at_rest = self.ctx.ops.is_empty() && self.writeback.is_idle();
        let is_long = at_rest
            || longest >= SHORTAGE_US
            || REFUSED.into_iter().any(|step| self.is_met_still(step));
        if is_long
            && self.ctx.failed.is_none()
            && self.map.dirty_count() > 0
            && !self.ctx.checkpoint.is_wanted_or_active()
        {
            // A dirty node stays in memory until a checkpoint has written it.
            self.ctx.need_checkpoint();
        }
        if REFUSED.into_iter().any(|step| self.ctx.blocked.is_to_be_judged(step, now)) {
            self.refuse_for_memory();
        }
    }

    /// Whether `step` is blocked by memory, and has been again and again for the longest time that
    /// a request may wait.
    fn is_met_still(&self, step: Step) -> bool {
        self.ctx.blocked.is_blocked(step, Lack::Memory)
            && self.ctx.blocked.is_pressed(step, self.ctx.now)
    }

    /// Refuses the first in each queue if it has waited long enough and pages pinned by readers are
    /// the cause, or if it has waited far too long.
    fn refuse_for_memory(&mut self) {
        if self.ctx.now < self.ctx.blocked.judged_at + MEMORY_RETRY_US {
            return;
        }
        self.ctx.blocked.judged_at = self.ctx.now;
        self.look_at_pinned();
        let pinned = self.pinned_by_readers();
        // Map nodes that waiting commits have pinned come back only with their answers. Where
        // readers have little of the memory, others are the cause.
        let readers_have_much =
            pinned >= self.reservations.usable_frames() / HELD_PAGES_SHARE as u32;
        let kept = if readers_have_much && !self.gives_memory_back() {
            self.map.awaited_clean_count() as u32
        } else {
            0
        };
        let others = self.cache.table.resident().held + PATH_NODES + kept;
        for step in REFUSED {
            let waited = self
                .ctx
                .blocked
                .waited(step, self.ctx.now)
                .filter(|_| self.ctx.blocked.is_to_be_judged(step, self.ctx.now));
            let Some(waited) = waited else { continue };
            let frames = self.ctx.blocked.missed_frames(step);
            // Whether it would be refused even if everything else had been given back.
            let by_pins =
                pinned > 0 && pinned + frames + others > self.reservations.usable_frames();
            // The next one has waited behind the one that was refused: it need not wait as long
            // again, if nothing is in progress.
            let is_stuck =
                self.ctx.ops.is_empty() && self.ctx.blocked.is_pressed(step, self.ctx.now);
            let patience = if is_stuck { SHORTAGE_US } else { MEMORY_WAIT_MAX_US };
            // Reads may take each other's path away, each with a success now and then, and none of
            // them ends.
            let is_livelock = self.ctx.blocked.is_pressed(step, self.ctx.now)
                && self.ctx.now >= self.ctx.replied_at + MEMORY_WAIT_MAX_US;
            let waits = waited < patience || self.gives_memory_back();
            if !by_pins && waits && !is_livelock {
                continue;
            }
            let error = match &self.ctx.failed {
                // What is dirty stays dirty: trying again would not help.
                Some(failed) if !by_pins => failed.clone(),
                _ if by_pins => self.pinned_memory(frames, pinned),
                _ => self.no_memory(frames, pinned),
            };
            match step {
                Step::NodeRead => self.refuse_node_read(&error),
                Step::PageRead => self.refuse_page_read(&error),
                Step::Redo => self.refuse_redo(error),
                _ => self.refuse_commit(error),
            }
            if by_pins {
                // The next one may be refused at once: it has waited as long.
                self.ctx.blocked.judged_at = 0;
            }
            self.ctx.need_all();
        }
    }

    /// Whether something in progress will end with more memory than there was: a write makes what
    /// it writes clean. Reads only take memory, and where it is short one is always in flight:
    /// waiting until there is none would never end.
    fn gives_memory_back(&self) -> bool {
        let is_read = |op: &OpKind| matches!(op, OpKind::PageRead(_) | OpKind::NodeRead(_));
        let writes = self.ctx.failed.is_none() && self.ctx.checkpoint.is_wanted_or_active();
        writes || !self.ctx.ops.iter().all(|(_, op)| is_read(op))
    }

    fn pinned_memory(&self, frames: u32, pinned: u32) -> Error {
        let usable = self.reservations.usable_frames();
        Error::new(
            ErrorKind::Busy,
            format_args!(
                "no memory is left in shard {}: readers have pinned {pinned} of its {usable} \
                 pages, and {frames} must be free; drop PageRefs, or open with more memory_bytes",
                self.ctx.id.get()
            ),
        )
    }

    fn no_memory(&self, frames: u32, pinned: u32) -> Error {
        let usable = self.reservations.usable_frames();
        Error::new(
            ErrorKind::Busy,
            format_args!(
                "no memory for {} s in shard {}: {frames} of {usable} pages must be free, readers \
                 have pinned {pinned} ({}); try again, with fewer requests at a time, or open \
                 with more memory_bytes",
                MEMORY_WAIT_MAX_US / 1_000_000,
                self.ctx.id.get(),
                self.memory()
            ),
        )
    }

    /// Frames that only readers can give back: pages that the search for memory has found pinned,
    /// and still pinned when it looked again, and frames that are no longer anywhere in the shard.
    /// Frames being written from or read into are left out as far as they are known. It looks at no
    /// page: a starved shard with much memory would do nothing else.
    fn pinned_by_readers(&mut self) -> u32 {
        let pinned =
            if self.cache.eviction.saw_all_pinned() { self.cache.eviction.pinned() } else { 0 };
        let accounted = self.reservations.fixed_frames
            + self.cache.table.resident().pages
            + self.map.nodes_count()
            + self.frames_in_ops();
        pinned + (self.ctx.arena.blocks() - self.ctx.arena.free_blocks()).saturating_sub(accounted)
    }

    /// Frames of operations in flight that are neither in the table nor in the map.
    fn frames_in_ops(&self) -> u32 {
        let summary = self.space.extents.summary_blocks();
        let of = |op: &OpKind| match op {
            OpKind::PageRead(reads) => reads.len() as u32,
            OpKind::NodeRead(_) => 1,
            OpKind::SummaryWrite(_) | OpKind::SummaryRead(_) => summary,
            OpKind::Checkpoint | OpKind::RedoRead(_) => self.ctx.limits.vectored_pages_max as u32,
            // At most the images of versions that have been replaced since.
            OpKind::GroupLog(_) => self.ctx.limits.inline_pages_max as u32,
            OpKind::GroupData(_, versions) | OpKind::PageWrite(versions) => versions.len() as u32,
            OpKind::GroupFlush(_) | OpKind::Grow(_) | OpKind::LogSegment => 0,
        };
        self.ctx.ops.iter().map(|(_, op)| of(op)).sum()
    }

    /// Refuses the commit that is first in the queue.
    fn refuse_commit(&mut self, error: Error) {
        // A commit that waits for a node fails with that node.
        let first = self.requests.first_ready();
        let Some(waiter) = first.filter(|first| !self.requests.pending[*first].is_waiting()) else {
            return;
        };
        self.requests.take_ready();
        self.finish_commit(waiter, Err(error), Lsn::ZERO);
    }

    /// Gives up the recovery.
    fn refuse_redo(&mut self, error: Error) {
        let Some(waiter) = self.requests.take_ready_redo() else { return };
        self.release(waiter);
        self.ctx.fail(error);
    }
}
