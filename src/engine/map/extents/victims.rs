//! Which extents compaction should empty next, and which it can't empty.
//!
//! Invariants
//! 1. An extent in which something could not be read is no victim: what is unreadable can't be
//!    moved, so the extent would not become free. It is passed over until all that was unreadable
//!    there has died, or, if its summary was, until it is free.
//! 2. What is remembered is bounded: [`BLOCKS_MAX`] blocks of each extent.
//!
//! It reads nothing and moves nothing: the shard does.

use super::{Extent, ExtentState, Extents};
use crate::base::{BlockAddr, ExtentNo};
use smallvec::SmallVec;
use std::collections::{BTreeMap, BinaryHeap};

/// Unreadable blocks that are remembered of an extent; with more, it is passed over until it is
/// free.
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

    /// The map does not name `place` any more.
    pub(super) fn died(&mut self, place: BlockAddr) {
        if let Some(Damage::Blocks(blocks)) = self.0.get_mut(&place.extent) {
            blocks.retain(|block| *block != place.block);
            if blocks.is_empty() {
                self.0.remove(&place.extent);
            }
        }
    }

    /// Nothing is left in the extent.
    pub(super) fn freed(&mut self, no: ExtentNo) {
        self.0.remove(&no);
    }
}

impl Extents {
    /// What the map names at `place` can't be read: the extent is no victim until it has died.
    /// Returns whether this is the first thing found there.
    pub(crate) fn pass_over(&mut self, place: BlockAddr) -> bool {
        // Overwritten or freed while it was read, and the last of its extent: nothing is left to be
        // passed over.
        self.is_named(place.extent) && self.unreadable.add(place)
    }

    /// The summary of `no` can't be read. Returns whether this is the first thing found there.
    pub(crate) fn pass_over_extent(&mut self, no: ExtentNo) -> bool {
        self.is_named(no) && self.unreadable.0.insert(no, Damage::Extent).is_none()
    }

    /// Extents that are passed over now.
    pub(crate) fn passed_over(&self) -> u64 {
        self.unreadable.0.len() as u64
    }

    fn is_named(&self, no: ExtentNo) -> bool {
        let extent = &self.extents[no.index()];
        extent.live > extent.dead
    }

    /// Blocks that compaction would have to move out of extent `no`, if it is closed, has some,
    /// their share is at most `share_max` (of 1,000), and all can be read as far as is known.
    pub(crate) fn to_move(&self, no: ExtentNo, share_max: u32) -> Option<u32> {
        let limit = self.data_blocks() * share_max / 1000;
        let e: &Extent = &self.extents[no.index()];
        let named = e.live - e.dead;
        let is_victim =
            e.state == ExtentState::Closed && e.assigned == 0 && (1..=limit).contains(&named);
        (is_victim && !self.unreadable.0.contains_key(&no)).then_some(named)
    }

    /// Up to `count` extents with the least to move, the very least last. It looks at every extent,
    /// so ask for several at a time.
    pub(crate) fn emptiest(
        &self,
        share_max: u32,
        count: usize,
        except: impl Fn(ExtentNo) -> bool,
    ) -> Vec<ExtentNo> {
        // The fullest of those found so far on top.
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
