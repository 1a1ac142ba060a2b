//! What a request holds in the table while it is in progress: its pages, and the bytes of those
//! that it needs.
//!
//! Invariants
//! 1. Each page of a pending request is held once for each time that the request names it, from
//!    [`Shard::begin`] to [`Shard::release`].
//! 2. A page that is held stays in the table; one that is held with its bytes stays in memory.

use crate::base::{Lsn, PageIdx, PageKey, RequestIdx};
use crate::engine::Work;
use crate::engine::budget::request_weight;
use crate::engine::cache::table::Needs;
use crate::engine::requests::{Pending, PendingKind};
use crate::engine::{Change, Shard, Token};
use smallvec::SmallVec;

impl Shard {
    /// The pages of a commit: those read, then those changed. Naming a page that was read does not
    /// count as a use.
    pub(in crate::engine) fn pages_of(
        &mut self,
        reads: &[(PageKey, Lsn)],
        changes: &[(PageKey, Change)],
    ) -> SmallVec<[PageIdx; 2]> {
        let mut pages: SmallVec<[PageIdx; 2]> =
            reads.iter().map(|(key, _)| self.cache.table.entry(*key)).collect();
        pages.extend(changes.iter().map(|(key, _)| self.cache.table.get(*key)));
        pages
    }

    /// Registers a request and requests its pages; `data(i)` says whether the bytes of page `i` are
    /// needed.
    pub(in crate::engine) fn begin(
        &mut self,
        token: Option<Token>,
        kind: PendingKind,
        pages: SmallVec<[PageIdx; 2]>,
        data: impl Fn(usize) -> bool,
    ) -> RequestIdx {
        let weight = request_weight(&kind, pages.len());
        self.reservations.request_bytes += weight;
        let (mut with_data, mut bits): (SmallVec<[u64; 1]>, u64) = (SmallVec::new(), 0);
        for (i, idx) in pages.iter().enumerate() {
            if i > 0 && i % 64 == 0 {
                with_data.push(std::mem::take(&mut bits));
            }
            self.cache.table.pages[*idx].holds += 1;
            if data(i) {
                bits |= 1 << (i % 64);
                self.cache.table.hold_bytes(*idx);
                self.reservations.held_pages += 1;
            }
        }
        with_data.push(bits);
        let count = pages.len();
        let waiter = self.requests.begin(token, kind, pages, with_data, weight);
        for i in 0..count {
            let idx = self.requests.pending[waiter].pages[i];
            // Counted before it is requested, since the answer may come at once.
            self.requests.need_more(waiter);
            let needs = if data(i) { Needs::Bytes } else { Needs::Version };
            if self.want(idx, needs, waiter) {
                self.requests.need_met(waiter, None, &mut self.ctx);
            }
        }
        // This was the need that stood for "not all requested yet".
        self.requests.need_met(waiter, None, &mut self.ctx);
        waiter
    }

    /// Ends a request: its pages may be evicted, and those without memory leave the table.
    pub(in crate::engine) fn release(&mut self, waiter: RequestIdx) -> Pending {
        let pending = self.requests.pending.remove(waiter);
        assert!(!pending.is_waiting(), "{waiter:?} ends, and waits for something");
        let (weight, held) = (pending.weight, self.reservations.request_bytes);
        assert!(weight <= held, "{waiter:?} gives {weight} bytes back, of {held}");
        self.reservations.request_bytes -= weight;
        if let PendingKind::Move(from, owner) = &pending.kind {
            let moves = self.reservations.moves;
            assert!(moves > 0, "a move from {from:?} of {owner:?} ends, of {moves}");
            self.reservations.moves -= 1;
            self.ctx.need(Work::Moves);
        }
        for (i, idx) in pending.pages.iter().enumerate() {
            let page = &mut self.cache.table.pages[*idx];
            assert!(page.holds > 0, "{waiter:?} lets {:?} go, which nothing held", page.key);
            page.holds -= 1;
            if pending.needs_data(i) {
                self.cache.table.let_bytes_go(*idx);
                self.reservations.held_pages -= 1;
            }
            self.unpin_if_clean(*idx);
        }
        pending
    }
}
