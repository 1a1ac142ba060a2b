//! The buddy allocator behind the arena keeps track of which runs of blocks are free. It is pure
//! bookkeeping.
//!
//! Invariants
//! 1. Every block belongs to exactly one run, which is free in a list, free in the quick stack, or
//!    handed out. A run of order `o` has `1 << o` blocks and begins at a multiple of that.
//! 2. `heads` has the state of a run at its first block, and [`INSIDE`] at all others.
//! 3. Two free buddies are never both in the lists: they are merged when the second one arrives.
//!    Only the quick stack keeps single blocks from merging, and it is emptied before a larger run
//!    is refused.
//!
//! It does *not* touch the memory, know about pins, or synchronise; one thread owns it.

/// The largest order: runs of 512 blocks, 2 MiB.
pub(super) const ORDER_MAX: u8 = 9;

/// Single blocks kept ready without merging: enough for a batch of page writes. They are merged as
/// soon as a larger run needs them.
const QUICK_MAX: usize = 256;

const NONE: u32 = u32::MAX;
const INSIDE: u8 = 0;
const FREE: u8 = 0x40;
const USED: u8 = 0x80;
const QUICK: u8 = 0xC0;
const STATE: u8 = 0xC0;

/// A doubly linked list node of a free run, kept apart from the memory so that free memory is never
/// touched.
#[derive(Clone, Copy)]
struct Link {
    next: u32,
    prev: u32,
}

/// Bytes that the allocator needs for each block.
#[cfg(test)]
pub(super) const BLOCK_BYTES: usize = size_of::<u8>() + size_of::<Link>();

/// Keeps track of which runs of `heads.len()` blocks are free.
pub(super) struct Buddy {
    heads: Box<[u8]>,
    links: Box<[Link]>,
    /// The first free run of each order.
    lists: [u32; ORDER_MAX as usize + 1],
    quick: Vec<u32>,
    free_blocks: u32,
}

impl Buddy {
    /// Makes an allocator with all of `blocks` free.
    pub(super) fn new(blocks: u32) -> Self {
        let mut buddy = Buddy {
            heads: vec![INSIDE; blocks as usize].into(),
            links: vec![Link { next: NONE, prev: NONE }; blocks as usize].into(),
            lists: [NONE; ORDER_MAX as usize + 1],
            quick: Vec::with_capacity(QUICK_MAX),
            free_blocks: blocks,
        };
        // Take the largest aligned run that still fits, from the front; then fill the lists, which
        // are stacks, from the back, so that low addresses are handed out first.
        let mut runs = Vec::new();
        let mut at = 0;
        while at < blocks {
            let fits = (blocks - at).ilog2() as u8;
            let order =
                fits.min(at.trailing_zeros().min(u32::from(ORDER_MAX)) as u8).min(ORDER_MAX);
            runs.push((at, order));
            at += 1 << order;
        }
        for (block, order) in runs.into_iter().rev() {
            buddy.link(block, order);
        }
        buddy
    }

    /// Free blocks, in runs of any size.
    pub(super) fn free_blocks(&self) -> u32 {
        self.free_blocks
    }

    /// Whether [`take`](Self::take) of a single block will not have to split.
    pub(super) fn has_quick(&self) -> bool {
        !self.quick.is_empty()
    }

    /// Takes a run of `1 << order` blocks, aligned to its size; `None` if there is no such run, or
    /// can never be one.
    pub(super) fn take(&mut self, order: u8) -> Option<u32> {
        if order == 0
            && let Some(block) = self.quick.pop()
        {
            self.heads[block as usize] = USED;
            self.free_blocks -= 1;
            return Some(block);
        }
        if order > ORDER_MAX {
            return None;
        }
        self.take_from_lists(order).or_else(|| {
            self.settle();
            self.take_from_lists(order)
        })
    }

    /// Gives back the run that begins at `block`, and returns its order.
    ///
    /// # Panics
    /// If no handed-out run begins there, which means that a frame was returned twice.
    pub(super) fn give(&mut self, block: u32) -> u8 {
        let head = self.heads[block as usize];
        assert_eq!(head & STATE, USED, "block {block} is given back but was not handed out");
        let order = head & !STATE;
        self.free_blocks += 1 << order;
        if order == 0 && self.quick.len() < QUICK_MAX {
            self.heads[block as usize] = QUICK;
            self.quick.push(block);
        } else {
            self.merge(block, order);
        }
        order
    }

    /// Empties the quick stack and merges its blocks.
    fn settle(&mut self) {
        while let Some(block) = self.quick.pop() {
            self.merge(block, 0);
        }
    }

    fn take_from_lists(&mut self, order: u8) -> Option<u32> {
        let found = (order..=ORDER_MAX).find(|&o| self.lists[o as usize] != NONE)?;
        let block = self.lists[found as usize];
        self.unlink(block, found);
        // The upper half of every split stays free.
        for half in (order..found).rev() {
            self.link(block + (1 << half), half);
        }
        self.heads[block as usize] = USED | order;
        self.free_blocks -= 1 << order;
        Some(block)
    }

    fn merge(&mut self, mut block: u32, mut order: u8) {
        self.heads[block as usize] = INSIDE;
        while order < ORDER_MAX {
            let other = block ^ (1 << order);
            if self.heads.get(other as usize) != Some(&(FREE | order)) {
                break;
            }
            self.unlink(other, order);
            block = block.min(other);
            order += 1;
        }
        self.link(block, order);
    }

    fn link(&mut self, block: u32, order: u8) {
        let next = self.lists[order as usize];
        self.links[block as usize] = Link { next, prev: NONE };
        if next != NONE {
            self.links[next as usize].prev = block;
        }
        self.lists[order as usize] = block;
        self.heads[block as usize] = FREE | order;
    }

    fn unlink(&mut self, block: u32, order: u8) {
        let Link { next, prev } = self.links[block as usize];
        if prev == NONE {
            self.lists[order as usize] = next;
        } else {
            self.links[prev as usize].next = next;
        }
        if next != NONE {
            self.links[next as usize].prev = prev;
        }
        self.heads[block as usize] = INSIDE;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    /// Takes all memory in single blocks and gives it back: afterwards each run that fits must be
    /// whole again.
    fn assert_whole(buddy: &mut Buddy, blocks: u32) {
        assert_eq!(buddy.free_blocks(), blocks);
        let large = blocks >> ORDER_MAX;
        let runs: Vec<u32> =
            (0..large).map(|_| buddy.take(ORDER_MAX).expect("a merged run")).collect();
        assert_eq!(buddy.take(ORDER_MAX), None);
        assert_eq!(buddy.free_blocks(), blocks - (large << ORDER_MAX));
        for run in runs {
            buddy.give(run);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig {
            cases: if cfg!(miri) { 4 } else { 256 },
            ..ProptestConfig::default()
        })]

        /// Two owners of one block would overwrite each other's pages; a lost run is memory lost
        /// for good.
        #[test]
        fn runs_never_overlap_and_merge_back_fully(
            blocks in 1u32..3000,
            steps in proptest::collection::vec((0u8..12, any::<u16>()), 0..600),
        ) {
            let mut buddy = Buddy::new(blocks);
            let mut owned = vec![false; blocks as usize];
            let mut out: BTreeMap<u32, u8> = BTreeMap::new();
            for (order, pick) in steps {
                if pick % 3 == 0 && !out.is_empty() {
                    let block = *out.keys().nth(pick as usize % out.len()).unwrap();
                    let order = out.remove(&block).unwrap();
                    prop_assert_eq!(buddy.give(block), order);
                    owned[block as usize..(block + (1 << order)) as usize].fill(false);
                } else if let Some(block) = buddy.take(order) {
                    prop_assert_eq!(block % (1 << order), 0);
                    let run = &mut owned[block as usize..(block + (1 << order)) as usize];
                    prop_assert!(run.iter().all(|&o| !o));
                    run.fill(true);
                    out.insert(block, order);
                } else if order <= ORDER_MAX {
                    let free = owned.chunks_exact(1 << order).any(|run| run.iter().all(|&o| !o));
                    prop_assert!(!free, "order {order} refused although a free run exists");
                }
                let free = owned.iter().filter(|&&o| !o).count();
                prop_assert_eq!(buddy.free_blocks() as usize, free);
            }
            for (block, _) in out {
                buddy.give(block);
            }
            assert_whole(&mut buddy, blocks);
        }
    }

    /// A second return of the same run must be caught before it has two owners.
    #[test]
    #[should_panic(expected = "not handed out")]
    fn a_run_is_given_back_once() {
        let mut buddy = Buddy::new(4);
        let block = buddy.take(1).unwrap();
        buddy.give(block);
        buddy.give(block);
    }
}
