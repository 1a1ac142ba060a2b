//! Finds the pages of a volume that exist, by a walk through the map that skips what was never
//! written.
//!
//! ```text
//! virtual shards of this shard --next leaf of each--> heap by page id --first--> its pages:
//!                                                       the page table, else the map entry
//! ```
//! Invariants
//! 1. A page counts as the next reader would find it: changes on their way to the map count.
//! 2. Nothing is held between two steps: nodes may leave memory while others are read, and pages
//!    change. Each page is reported as it was at one moment during the request.
//! 3. A request visits at most [`LEAVES_MAX`] leaves, so that others get their turn; the answer
//!    says where it stopped.
//!
//! It reads map nodes, but *never* pages.

use crate::base::{Lsn, PageId, PageKey, RequestIdx, VShard};
use crate::engine::map::{LEAF_PAGES, NextLeaf};
use crate::engine::requests::PendingKind;
use crate::engine::{NodeWaiter, PageRange, Response, Shard, Token};
use smallvec::SmallVec;
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// The most leaves that one request visits: 8,192 pages, each of which is looked up, possibly
/// within one turn.
const LEAVES_MAX: u32 = 128;

/// The state of a request's walk.
pub(in crate::engine) struct Walk {
    asked: PageRange,
    found: Vec<(PageId, PageId)>,
    /// The next leaf of each virtual shard that has one, by its first requested page.
    leaves: BinaryHeap<Reverse<(PageId, VShard)>>,
    /// Virtual shards whose next leaf is not known, with the dense number from which to search.
    seeks: Vec<(VShard, u64)>,
    leaves_left: u32,
    /// The newest change of a visited page that may not be durable.
    lsn: Lsn,
}

/// A walk's next step.
enum Step {
    On,
    /// A node is being read.
    Waits,
    /// Everything before this page was reported; `None`: everything that was requested.
    Done(Option<PageId>),
}

impl Shard {
    /// Begins a walk for a request.
    pub(in crate::engine) fn begin_walk(&mut self, token: Token, asked: PageRange) {
        let first = |v| {
            PageKey::first_in(asked.volume, asked.first, v, self.ctx.limits.geometry.vshards_count)
        };
        let seeks = self
            .ctx
            .shard_map
            .owned_by(self.ctx.id)
            .filter_map(|vshard| Some((vshard, first(vshard)?)))
            .collect();
        let walk = Box::new(Walk {
            asked,
            found: Vec::new(),
            leaves: BinaryHeap::new(),
            seeks,
            leaves_left: LEAVES_MAX,
            lsn: Lsn::ZERO,
        });
        let waiter = self.begin(Some(token), PendingKind::Walk, SmallVec::new(), |_| false);
        let before = self.cache.walks.insert(waiter, walk);
        assert!(before.is_none(), "{waiter:?} walks from {:?} while it walks already", asked.first);
    }

    /// Continues the walk of a pending request until it ends or a node must be read.
    pub(in crate::engine) fn walk(&mut self, waiter: RequestIdx) {
        // Taken out, since a step borrows the shard.
        let mut walk = self.cache.walks.remove(&waiter).expect("a walk has its place");
        let result = loop {
            if let Some(error) = self.requests.pending[waiter].error.take() {
                break Err(error);
            }
            match self.walk_step(&mut walk, waiter) {
                Step::On => {}
                Step::Done(next) => break Ok(next),
                Step::Waits => {
                    self.cache.walks.insert(waiter, walk);
                    return;
                }
            }
        };
        let token = self.release(waiter).token.expect("a walk has a token");
        self.ctx.reply(
            token,
            result.map(|next| Response::Allocated { ranges: walk.found, next, lsn: walk.lsn }),
        );
    }

    fn walk_step(&mut self, walk: &mut Walk, waiter: RequestIdx) -> Step {
        let PageRange { volume, last, ranges_max, .. } = walk.asked;
        if let Some((vshard, from)) = walk.seeks.last().copied() {
            return self.seek_leaf(walk, vshard, from, waiter);
        }
        let Some(Reverse((page, vshard))) = walk.leaves.pop() else { return Step::Done(None) };
        if walk.found.len() >= ranges_max || walk.leaves_left == 0 {
            return Step::Done(Some(page));
        }
        assert!(
            (walk.asked.first..=last).contains(&page),
            "a walk from {:?} to {last:?} visits a leaf at {page:?}",
            walk.asked.first
        );
        let page_index =
            PageKey::new(volume, page).place_in(self.ctx.limits.geometry.vshards_count).1;
        let Some(mapped) = self.map.leaf_bits(vshard, volume, page_index) else {
            // It has left memory since.
            walk.seeks.push((vshard, page_index));
            return Step::On;
        };
        walk.leaves_left -= 1;
        let watermark = self.ctx.order.watermark();
        // The pages of a leaf are consecutive, and no run of pages ends within it.
        for (slot, page) in (page_index % LEAF_PAGES..LEAF_PAGES).zip(page.get()..=last.get()) {
            let key = PageKey::new(volume, PageId::new(page));
            let known = self
                .cache
                .table
                .find(key)
                .map(|idx| &self.cache.table.pages[idx])
                .filter(|page| page.resolved);
            // A change that is not durable is in the table, on its way to the map.
            walk.lsn = walk
                .lsn
                .max(known.map(|page| page.lsn).filter(|lsn| *lsn > watermark).unwrap_or_default());
            if known.map_or(mapped >> slot & 1 == 1, |page| !page.absent) {
                tell(&mut walk.found, key.page);
            }
        }
        walk.seeks
            .extend((page_index | (LEAF_PAGES - 1)).checked_add(1).map(|behind| (vshard, behind)));
        Step::On
    }

    /// Finds the next leaf of a virtual shard with a requested page.
    fn seek_leaf(
        &mut self,
        walk: &mut Walk,
        vshard: VShard,
        from: u64,
        waiter: RequestIdx,
    ) -> Step {
        let (volume, vshards_count) = (walk.asked.volume, self.ctx.limits.geometry.vshards_count);
        let behind = walk.asked.last.get().checked_add(1).map(PageId::new);
        let end =
            behind.and_then(|behind| PageKey::first_in(volume, behind, vshard, vshards_count));
        let next = match end.map_or(Some(u64::MAX), |end| end.checked_sub(1)) {
            Some(last) => self.map.next_leaf(vshard, volume, from, last),
            None => NextLeaf::None,
        };
        match next {
            NextLeaf::Load(node, child) => {
                self.requests.need_more(waiter);
                self.want_node(node, child, NodeWaiter::Request(waiter));
                return Step::Waits;
            }
            NextLeaf::Leaf(page_index) => {
                let page = PageKey::from_place(volume, vshard, page_index, vshards_count).page;
                walk.leaves.push(Reverse((page, vshard)));
            }
            NextLeaf::None => {}
        }
        walk.seeks.pop();
        Step::On
    }
}

/// Adds a page after all that were found.
fn tell(found: &mut Vec<(PageId, PageId)>, page: PageId) {
    match found.last_mut() {
        Some((_, last)) if last.get() + 1 == page.get() => *last = page,
        last => {
            let before = last.map(|(_, last)| *last);
            assert!(before < Some(page), "a walk tells {page:?} behind {before:?}");
            found.push((page, page));
        }
    }
}
