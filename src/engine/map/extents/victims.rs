//! Chooses the extents that compaction empties next, and remembers those that it can't empty.
//!
//! Invariants
//! 1. An extent in which something could not be read is no victim: an unreadable block can't be
//!    moved, so the extent would not become free. It is passed over until every unreadable block in
//!    it has become garbage, or, if its summary is unreadable, until it is free.
//! 2. The memory for this is bounded: [`BLOCKS_MAX`] blocks of each extent.
//!
//! It reads nothing and moves nothing: the shard does.

use super::{Extent, ExtentState, Extents};
use crate::base::{BlockAddr, ExtentNo};
use smallvec::SmallVec;
use std::collections::{BTreeMap, BinaryHeap};

/// The most unreadable blocks that are remembered for an extent; with more, it is passed over until
/// it is free.
const BLOCKS_MAX: usize = 8;

/// What could not be read in an extent.
enum Damage {
    /// These blocks.
    Blocks(SmallVec<[u32; 2]>),
    /// Its summary, or more blocks than are remembered.
    Extent,
}

/// Extents in which something could not be read since the store was opened.
#[derive(Default)]
pub(super) struct Unreadable(BTreeMap<ExtentNo, Damage>);

impl Unreadable {
    fn add(&mut self, place: BlockAddr) -> bool {
        let is_new = !self.0.contains_key(&place.extent);
        let damage = self.0.entry(place.extent).or_insert_with(|| Damage::Blocks(SmallVec::new()));
        match damage {
            Damage::Blocks(blocks) if blocks.contains(&place.block) => {}
            Damage::Blocks(blocks) if blocks.len() < BLOCKS_MAX => blocks.push(place.block),
            _ => *damage = Damage::Extent,
        }
        is_new
    }

    /// Records that the map no longer names `place`.
    pub(super) fn died(&mut self, place: BlockAddr) {
        if let Some(Damage::Blocks(blocks)) = self.0.get_mut(&place.extent) {
            blocks.retain(|block| *block != place.block);
            if blocks.is_empty() {
                self.0.remove(&place.extent);
            }
        }
    }

    /// Records that the extent is free.
    pub(super) fn freed(&mut self, no: ExtentNo) {
        self.0.remove(&no);
    }
}

impl Extents {
    /// Records that the block at `place`, which the map names, can't be read: the extent is no
    /// victim until that block has become garbage. Returns whether it is the first unreadable block
    /// found in the extent.
    pub(crate) fn pass_over(&mut self, place: BlockAddr) -> bool {
        // It may have been overwritten or freed while it was read, as the last block of its extent:
        // then there is nothing to pass over.
        self.is_named(place.extent) && self.unreadable.add(place)
    }

    /// Records that the summary of `no` can't be read. Returns whether it is the first unreadable
    /// block found in the extent.
    pub(crate) fn pass_over_extent(&mut self, no: ExtentNo) -> bool {
        self.is_named(no) && self.unreadable.0.insert(no, Damage::Extent).is_none()
    }

    /// Extents that are passed over now.
    pub(crate) fn passed_over(&self) -> u64 {
        self.unreadable.0.len() as u64
    }

    fn is_named(&self, no: ExtentNo) -> bool {
        let extent = &self.extents[no.index()];
        extent.live > extent.garbage
    }

    /// Blocks that compaction would have to move out of extent `no`; `None` if it is not closed,
    /// has none, has a larger share of them than `share_max` (of 1,000), or holds unreadable ones.
    pub(crate) fn to_move(&self, no: ExtentNo, share_max: u32) -> Option<u32> {
        let limit = self.data_blocks() * share_max / 1000;
        let e: &Extent = &self.extents[no.index()];
        let named = e.live - e.garbage;
        let is_victim =
            e.state == ExtentState::Closed && e.unpublished == 0 && (1..=limit).contains(&named);
        (is_victim && !self.unreadable.0.contains_key(&no)).then_some(named)
    }

    /// Up to `count` extents with the fewest blocks to move, the emptiest last. It looks at every
    /// extent, so ask for several at a time.
    pub(crate) fn emptiest(
        &self,
        share_max: u32,
        count: usize,
        except: impl Fn(ExtentNo) -> bool,
    ) -> Vec<ExtentNo> {
        // The fullest of those found so far is on top.
        let mut found: BinaryHeap<(u32, ExtentNo)> = BinaryHeap::with_capacity(count + 1);
        for no in (0..self.extents.len() as u32).map(ExtentNo::new) {
            let Some(named) = self.to_move(no, share_max) else { continue };
            let is_better =
                found.len() < count || found.peek().is_some_and(|fullest| (named, no) < *fullest);
            if is_better && !except(no) {
                found.push((named, no));
                if found.len() > count {
                    found.pop();
                }
            }
        }
        found.into_sorted_vec().into_iter().rev().map(|(_, no)| no).collect()
    }
}
