//! The queue of dirty pages: which of them are due, and which can be taken.
//!
//! Invariants
//! 1. Every dirty page stands in the queue, once, and says so. A clean one may: its newest version
//!    went to its place with a group.
//! 2. Pages leave in the order in which they became dirty, those that can't be written yet aside.
//!
//! It does *not* say how many are due (`pace` does), nor write any.

use super::PAGE_WRITES_MAX;
use super::pace::{self, Due};
use crate::base::{Lsn, Micros, PageIdx};
use crate::engine::Shard;

impl Shard {
    /// Which dirty pages are due: see [`pace`].
    pub(super) fn pages_due(&self) -> Option<Due> {
        let (now, writeback) = (self.ctx.now, &self.writeback);
        let wants_pages = self.ctx.checkpoint.wants_pages;
        if self.life.closing.is_some() || (wants_pages && self.ctx.checkpoint.is_urgent) {
            return Some(Due::ALL);
        }
        if now < writeback.retry_at {
            return None;
        }
        if writeback.hurried {
            return Some(Due::durable(usize::MAX));
        }
        if wants_pages && let Some(spread) = writeback.spread {
            let progress = spread.progress(now, self.log.blocks_written());
            let pages = progress.saturating_sub(writeback.spread_taken) as usize;
            if pages > 0 {
                return Some(Due { pages, above_watermark: true, awaited_only: true });
            }
        }
        let (dirty, memory) = (self.dirty_pages(), u64::from(self.ctx.limits.memory_blocks));
        if dirty >= memory * pace::HIGH_SHARE / 16 {
            return Some(Due::durable((dirty - memory * pace::LOW_SHARE / 16) as usize));
        }
        (writeback.was_quiet && self.is_quiet()).then_some(Due::durable(usize::MAX))
    }

    /// Whether nothing has been committed for a window.
    fn is_quiet(&self) -> bool {
        let window = self.ctx.limits.coalesce_window_us;
        self.log.is_idle() && self.ctx.now >= self.writeback.quiet_since + window
    }

    /// Notes that a window has passed without a commit, and begins the next.
    pub(super) fn note_quiet(&mut self) {
        if !self.writeback.was_quiet && self.is_quiet() {
            (self.writeback.quiet_since, self.writeback.was_quiet) = (self.ctx.now, true);
        }
    }

    /// Pages that take memory until they are written, freed ones on their way into the map among
    /// them.
    pub(in crate::engine) fn dirty_pages(&self) -> u64 {
        self.reservations.dirty_blocks + self.reservations.frees_unpublished
    }

    /// Whether so many pages are dirty that some are written for the sake of memory.
    pub(in crate::engine) fn dirty_pages_are_many(&self) -> bool {
        self.dirty_pages() >= u64::from(self.ctx.limits.memory_blocks) * pace::HIGH_SHARE / 16
    }

    /// Takes the clean pages out of the queue, once there are many.
    pub(super) fn sweep_queue(&mut self) {
        if !self.writeback.is_sweep_due() {
            return;
        }
        let mut queue = std::mem::take(&mut self.writeback.dirty);
        queue.retain(|idx| {
            let is_dirty = self.cache.table.pages[*idx].dirty_from.is_some();
            if !is_dirty {
                self.leave_queue(*idx);
            }
            is_dirty
        });
        self.writeback.dirty = queue;
    }

    /// A page that was taken out of the queue is clean: its newest version went to its place with a
    /// group.
    fn leave_queue(&mut self, idx: PageIdx) {
        let clean = self.writeback.clean;
        let page = &mut self.cache.table.pages[idx];
        assert!(clean > 0, "{:?} is one of {clean} clean pages in the queue", page.key);
        self.writeback.clean -= 1;
        page.queued = false;
        self.ctx.stats.absorbed_writes += 1;
        self.unpin_if_clean(idx);
    }

    /// Takes up to `room` pages out of the queue. Those that can't be written yet keep their places.
    pub(super) fn take_dirty(&mut self, due: Due, room: usize) -> Vec<PageIdx> {
        let (mut take, mut later) = (Vec::new(), Vec::new());
        let mut stuck_at = Lsn::MAX;
        let watermark = self.ctx.order.watermark();
        while take.len() < room
            && let Some(idx) = self.writeback.dirty.pop_front()
        {
            let page = &mut self.cache.table.pages[idx];
            assert!(page.queued, "{:?} stands in the queue, and does not say so", page.key);
            let is_awaited = page.checkpoint_target != Lsn::ZERO;
            if page.dirty_from.is_none() {
                self.leave_queue(idx);
            } else if due.awaited_only && !is_awaited {
                // Those behind it became dirty later.
                self.writeback.dirty.push_front(idx);
                if later.is_empty() && take.is_empty() {
                    self.writeback.spread = None;
                }
                break;
            } else if page.image.is_some()
                || page.versions > 0
                || (page.lsn > watermark && !due.above_watermark)
            {
                if page.lsn > watermark {
                    stuck_at = stuck_at.min(page.lsn);
                }
                later.push(idx);
            } else {
                page.queued = false;
                self.writeback.spread_taken += u64::from(is_awaited);
                take.push(idx);
            }
        }
        self.writeback.stuck_until = (take.is_empty() && !later.is_empty()).then_some(stuck_at);
        for idx in later.into_iter().rev() {
            self.writeback.dirty.push_front(idx);
        }
        take
    }

    /// Whether dirty pages can go to their places when they are due: a deadline while they can't
    /// would be due again and again, for nothing. What they wait for then, a completion or the
    /// watermark, brings a turn.
    fn may_write_back(&self) -> bool {
        let has_room = self.writeback.page_writes < PAGE_WRITES_MAX || planted!(DeadlineInThePast);
        !self.writeback.dirty.is_empty() && self.writeback.stuck_until.is_none() && has_room
    }

    /// When dirty pages are due, if nothing else happens.
    pub(in crate::engine) fn write_back_due(&self) -> Option<Micros> {
        let (now, writeback) = (self.ctx.now, &self.writeback);
        if !self.may_write_back() {
            return None;
        }
        if let Some(spread) = writeback.spread
            && self.ctx.checkpoint.wants_pages
        {
            return spread.due_at(writeback.spread_taken);
        }
        let window = self.ctx.limits.coalesce_window_us;
        // A group on its way ends with a completion.
        let quiet_at = if self.log.is_idle() { writeback.quiet_since } else { now } + window;
        Some(quiet_at.max(writeback.retry_at))
    }
}
