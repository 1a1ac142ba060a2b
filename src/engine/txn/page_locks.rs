//! Holds: what keeps the pages of a commit over shards as they are between the vote and the
//! decision.
//!
//! Invariants
//! 1. A page is held either by any number of commits that read it, or by one that changes it.
//! 2. A part of a commit over shards never waits for a hold: it votes
//!    [`Vote::Conflict`](crate::engine::message::Vote), so there is no deadlock. Commits of this
//!    shard alone do wait, in order of arrival.
//! 3. While a page is held, only the holder's LSN is allocated for it. That happens after the vote,
//!    so it is above every version of the page.

use crate::base::{PageIdx, RequestIdx};
use crate::engine::Shard;
use crate::engine::cache::page_lock::Access;
use smallvec::SmallVec;

impl Shard {
    /// The index in the table of a page whose holders keep the commit from proceeding.
    pub(in crate::engine) fn locked_page(&self, waiter: RequestIdx) -> Option<PageIdx> {
        if self.participant.parts.is_empty() {
            // Only parts hold pages: in a store of one shard no page is held.
            return None;
        }
        let pending = &self.requests.pending[waiter];
        let reads = pending.reads_count();
        let held = |(i, idx): (usize, &PageIdx)| {
            !self.cache.table.pages[*idx].hold.allows(Access::of(i, reads))
        };
        pending.pages.iter().enumerate().find(|(i, idx)| held((*i, idx))).map(|(_, idx)| *idx)
    }

    /// Makes a commit of this shard wait until the page is no longer held.
    pub(in crate::engine) fn wait_for_page_lock(&mut self, waiter: RequestIdx, idx: PageIdx) {
        self.requests.need_more(waiter);
        self.cache.table.pages[idx].hold.wait(waiter);
        self.ctx.stats.held_back += 1;
    }

    /// The pages of a part, each once, and what the part does with each.
    fn lock_set(&self, waiter: RequestIdx) -> SmallVec<[(PageIdx, Access); 4]> {
        let pending = &self.requests.pending[waiter];
        let reads = pending.reads_count();
        let mut set: SmallVec<[(PageIdx, Access); 4]> =
            pending.pages.iter().enumerate().map(|(i, idx)| (*idx, Access::of(i, reads))).collect();
        // The change comes first, and counts, where a page is read and changed.
        set.sort();
        set.dedup_by_key(|(idx, _)| *idx);
        if set.iter().any(|(_, access)| *access == Access::Read) && planted!(ReadsNotHeld) {
            set.retain(|(_, access)| *access == Access::Change);
        }
        set
    }

    /// Holds the pages of a part.
    pub(in crate::engine) fn hold_pages(&mut self, waiter: RequestIdx) {
        for (idx, access) in self.lock_set(waiter) {
            let hold = &mut self.cache.table.pages[idx].hold;
            hold.take(access);
        }
    }

    /// Releases the pages of a part; commits that waited for them proceed.
    pub(in crate::engine) fn let_pages_go(&mut self, waiter: RequestIdx) {
        for (idx, access) in self.lock_set(waiter) {
            let hold = &mut self.cache.table.pages[idx].hold;
            for waiter in hold.give_back(access) {
                self.requests.need_met(waiter, None, &mut self.ctx);
            }
        }
    }
}
