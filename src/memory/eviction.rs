//! The eviction policy (S3-FIFO): when memory is needed, it chooses which of the evictable frames
//! to give up.
//!
//! ```text
//! first listed --> probation (a tenth) --used again twice--> main --unused for a round--> out
//!      |                       \--not--> out, remembered       ^   \--used: another round
//!      \--remembered: asked for again soon after it went out---/
//! met, but pinned by a reader --> set aside, and looked at again a few at a time --> back
//! ```
//! Invariants
//! 1. A block is in one list at most, and nothing here allocates after [`Eviction::new`]. An owner
//!    that leaves its block leaves an entry behind, which is dropped when a search meets it or when
//!    the block is listed for its next owner.
//! 2. A search takes a block that something refers to off the lists; its owner lists it again when
//!    the last reference ends. So a search pays once for each reference, once for each use and once
//!    for each entry: an eviction costs O(1), amortised.
//! 3. Readers release pins on any thread without notice, so searches check pinned blocks again,
//!    each a bounded number of them: if there is nothing else to evict, a search ends without
//!    having seen them all, and the next one continues.
//! 4. A search passes over at most [`USED_MAX`] used entries; then the next one is evicted, used or
//!    not. So no single eviction pays for a whole round of a large memory.
//!
//! What is read once leaves before what was used again, however much is read once (a scan). The
//! policy does *not* know what is in a frame, free memory itself, or wait.

use crate::base::{Micros, NodeIdx, PageIdx};
use smallvec::SmallVec;

/// Uses are counted up to this.
const USES_MAX: u8 = 3;
/// Uses in probation that promote a block to the main list. The use that brought it into memory
/// does not count.
const PROMOTED_AT: u8 = 2;
/// The share of listed blocks on probation: one in ten.
const PROBATION_SHARE: u32 = 10;
/// The most used entries that a search passes over (invariant 4).
const USED_MAX: u32 = 64;
/// Pinned blocks that each search checks even if it finds another victim, so that those no longer
/// pinned are found in time.
const PINNED_LOOKS: u32 = 2;

/// The most map nodes that a count returns, so that it needs no allocation.
pub(crate) const NODES_COUNTED: usize = 32;

/// Entries for each hash of an evicted block.
const BUCKET: usize = 4;

const NONE: u32 = u32::MAX;

/// The content of a frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Owner {
    /// A page, by its index in the page table.
    Page(PageIdx),
    /// A map node, by its index in the map.
    Node(NodeIdx),
}

/// The state that an owner keeps for the policy.
#[derive(Clone, Copy, Default, Debug)]
pub(crate) struct Residency {
    uses: u8,
    is_listed: bool,
    in_main: bool,
}

impl Residency {
    /// Counts a use.
    #[inline]
    pub(crate) fn used(&mut self) {
        // Popular pages are at the maximum, so most uses write nothing.
        if self.uses < USES_MAX {
            self.uses += 1;
        }
    }

    /// Whether it is in a list; if not, it has to be listed when nothing refers to it any more.
    #[inline]
    pub(crate) fn is_listed(&self) -> bool {
        self.is_listed
    }

    #[cfg(test)]
    pub(crate) fn uses(&self) -> u8 {
        self.uses
    }

    /// Called when the owner has another frame, or none.
    pub(crate) fn frame_changed(&mut self) {
        self.is_listed = false;
    }
}

/// The standing of an owner whose block a search meets in a list.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Standing {
    /// The block no longer belongs to the owner.
    Gone,
    /// Something refers to it; it is listed again when the last reference ends.
    Referenced,
    /// Only readers hold it, by pins.
    Pinned,
    /// It can be evicted.
    Idle,
}

/// The owners of the listed blocks.
pub(crate) trait Residents {
    /// The standing of `owner`, provided that `block` still belongs to it.
    fn standing(&self, owner: Owner, block: u32) -> Standing;
    /// The state that `owner` keeps for the policy.
    fn residency(&mut self, owner: Owner) -> &mut Residency;
    /// Gives up the frame of `owner`, which is idle. Returns a hash of what it held.
    fn evict(&mut self, owner: Owner) -> u64;
}

#[derive(Clone, Copy)]
struct Entry {
    next: u32,
    prev: u32,
    owner: Owner,
    list: u8,
}

/// A list's ends and length.
#[derive(Clone, Copy)]
struct List {
    head: u32,
    tail: u32,
    len: u32,
}

const PROBATION: usize = 0;
const MAIN: usize = 1;
const PINNED: usize = 2;
const UNLISTED: u8 = 3;

/// The most bytes that the policy needs for each block.
#[cfg(test)]
pub(crate) const BLOCK_BYTES: usize = size_of::<Entry>() + 2 * size_of::<u32>();

/// The policy's lists of the arena's blocks, oldest first.
pub(crate) struct Eviction {
    entries: Box<[Entry]>,
    lists: [List; 3],
    /// Hashes of blocks that were evicted from probation; newer ones overwrite older ones.
    remembered: Box<[u32]>,
    /// When the pinned blocks were last searched without success.
    looked_at: Option<Micros>,
    /// How many pinned blocks were checked in a row since one was found that readers had released.
    pinned_in_a_row: u32,
    counts: EvictionCounts,
}

/// What evictions cost so far.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
pub(crate) struct EvictionCounts {
    /// Frames that were given up.
    pub evicted: u64,
    /// Entries that searches checked.
    pub looks: u64,
}

impl Eviction {
    /// Makes a policy for an arena of `blocks` blocks.
    pub(crate) fn new(blocks: u32) -> Self {
        let entry =
            Entry { next: NONE, prev: NONE, owner: Owner::Page(PageIdx::new(0)), list: UNLISTED };
        Eviction {
            entries: vec![entry; blocks as usize].into(),
            lists: [List { head: NONE, tail: NONE, len: 0 }; 3],
            remembered: vec![0; (blocks as usize).next_power_of_two().max(BUCKET)].into(),
            looked_at: None,
            pinned_in_a_row: 0,
            counts: EvictionCounts::default(),
        }
    }

    /// Lists a block that nothing refers to any more: at the end of the list that it was in or, the
    /// first time, of the list where its content belongs; `hash` identifies the content.
    pub(crate) fn list(&mut self, block: u32, owner: Owner, residency: &mut Residency, hash: u64) {
        self.unlink(block);
        if !residency.in_main {
            residency.in_main = self.recall(hash);
        }
        residency.is_listed = true;
        self.push(if residency.in_main { MAIN } else { PROBATION }, block, owner);
    }

    /// Listed blocks, including those set aside because readers pinned them.
    #[cfg(test)]
    pub(crate) fn listed(&self) -> u32 {
        self.lists.iter().map(|list| list.len).sum()
    }

    /// Blocks that readers had pinned when they were last checked.
    pub(crate) fn pinned(&self) -> u32 {
        self.lists[PINNED].len
    }

    /// Whether all pinned blocks have been checked since the last one was found that readers had
    /// released.
    pub(crate) fn saw_all_pinned(&self) -> bool {
        self.pinned_in_a_row >= self.pinned()
    }

    /// Returns what evictions cost so far.
    pub(crate) fn counts(&self) -> EvictionCounts {
        self.counts
    }

    /// The owner that is listed with `block`.
    #[cfg(any(test, feature = "sim"))]
    pub(crate) fn owner_of(&self, block: u32) -> Option<Owner> {
        let entry = &self.entries[block as usize];
        (entry.list != UNLISTED).then_some(entry.owner)
    }

    /// Gives up one frame, if one can be evicted. If only pinned blocks are left, it checks at most
    /// `pinned_looks` of them, once for each `now`, however many callers need a frame at that
    /// moment.
    pub(crate) fn evict_one(
        &mut self,
        residents: &mut impl Residents,
        now: Micros,
        pinned_looks: u32,
    ) -> bool {
        self.unpinned(residents, PINNED_LOOKS);
        if self.search(residents) {
            return true;
        }
        self.look_at_pinned(residents, now, pinned_looks) && self.search(residents)
    }

    /// Checks at most `looks` pinned blocks, once for each `now`. Returns whether readers had
    /// released any.
    pub(crate) fn look_at_pinned(
        &mut self,
        residents: &mut impl Residents,
        now: Micros,
        looks: u32,
    ) -> bool {
        if self.looked_at == Some(now) {
            return false;
        }
        let found = self.unpinned(residents, looks);
        if !found {
            self.looked_at = Some(now);
        }
        found
    }

    fn search(&mut self, residents: &mut impl Residents) -> bool {
        let mut used = 0;
        loop {
            let [probation, main, _] = self.lists.map(|list| list.len);
            let from = match main == 0 || probation > (probation + main) / PROBATION_SHARE {
                true if probation > 0 => PROBATION,
                _ => MAIN,
            };
            let Some((block, owner)) = self.pop(from) else { return false };
            if !self.is_idle(residents, block, owner) {
                continue;
            }
            let residency = residents.residency(owner);
            if from == PROBATION && residency.uses >= PROMOTED_AT {
                *residency = Residency { uses: 0, is_listed: true, in_main: true };
                self.push(MAIN, block, owner);
            } else if from == MAIN && residency.uses > 0 && used < USED_MAX {
                used += 1;
                residency.uses -= 1;
                self.push(MAIN, block, owner);
            } else {
                self.counts.evicted += 1;
                let hash = residents.evict(owner);
                if from == PROBATION {
                    self.remember(hash);
                }
                return true;
            }
        }
    }

    /// Checks up to `looks` pinned blocks and lists again those that are no longer pinned. Returns
    /// whether there were any.
    fn unpinned(&mut self, residents: &mut impl Residents, looks: u32) -> bool {
        let mut some = false;
        for _ in 0..looks.min(self.lists[PINNED].len) {
            let Some((block, owner)) = self.pop(PINNED) else { break };
            if self.is_idle(residents, block, owner) {
                some = true;
                self.pinned_in_a_row = 0;
                let list = if residents.residency(owner).in_main { MAIN } else { PROBATION };
                self.push(list, block, owner);
            }
        }
        some
    }

    /// Counts how many frames can be evicted, up to `wanted`, and puts the map nodes among them
    /// into `nodes`. It evicts nothing, but takes blocks that can't be evicted off the lists, so
    /// that the next count that falls short checks only idle entries, fewer than `wanted`.
    pub(crate) fn count_idle(
        &mut self,
        residents: &mut impl Residents,
        wanted: u32,
        nodes: &mut SmallVec<[NodeIdx; NODES_COUNTED]>,
    ) -> u32 {
        let mut idle = 0;
        for list in [PROBATION, MAIN] {
            let mut block = self.lists[list].head;
            while block != NONE && idle < wanted {
                let Entry { next, owner, .. } = self.entries[block as usize];
                if residents.standing(owner, block) == Standing::Idle {
                    self.counts.looks += 1;
                    idle += 1;
                    if let Owner::Node(no) = owner {
                        nodes.push(no);
                    }
                } else {
                    self.unlink(block);
                    self.is_idle(residents, block, owner);
                }
                block = next;
            }
        }
        idle
    }

    /// Whether `owner`, whose `block` is in no list, can be evicted. If not, the block is set
    /// aside, or its owner lists it again later.
    fn is_idle(&mut self, residents: &mut impl Residents, block: u32, owner: Owner) -> bool {
        self.counts.looks += 1;
        match residents.standing(owner, block) {
            Standing::Gone => {}
            Standing::Referenced => residents.residency(owner).is_listed = false,
            Standing::Pinned => {
                self.push(PINNED, block, owner);
                self.pinned_in_a_row = self.pinned_in_a_row.saturating_add(1);
            }
            Standing::Idle => return true,
        }
        false
    }

    /// Where `hash` would be remembered, and as which value; zero stands for nothing.
    fn bucket_of(&self, hash: u64) -> (usize, u32) {
        ((hash >> 32) as usize & (self.remembered.len() - 1) & !(BUCKET - 1), hash as u32 | 1)
    }

    fn remember(&mut self, hash: u64) {
        let (at, mark) = self.bucket_of(hash);
        // The entry of the bucket that is overwritten must vary: of contents that are read in turn,
        // each would otherwise overwrite the next one needed, for ever.
        let way = self.counts.evicted.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        self.remembered[at + (way as usize & (BUCKET - 1))] = mark;
    }

    fn recall(&mut self, hash: u64) -> bool {
        let (at, mark) = self.bucket_of(hash);
        let found = self.remembered[at..at + BUCKET].iter_mut().find(|m| **m == mark);
        found.is_some_and(|m| std::mem::take(m) == mark)
    }

    fn push(&mut self, list: usize, block: u32, owner: Owner) {
        let List { tail, .. } = self.lists[list];
        self.entries[block as usize] = Entry { next: NONE, prev: tail, owner, list: list as u8 };
        match tail {
            NONE => self.lists[list].head = block,
            _ => self.entries[tail as usize].next = block,
        }
        self.lists[list].tail = block;
        self.lists[list].len += 1;
    }

    fn pop(&mut self, list: usize) -> Option<(u32, Owner)> {
        let block = self.lists[list].head;
        (block != NONE).then(|| {
            let owner = self.entries[block as usize].owner;
            self.unlink(block);
            (block, owner)
        })
    }

    fn unlink(&mut self, block: u32) {
        let Entry { next, prev, list, .. } = self.entries[block as usize];
        let Some(ends) = self.lists.get_mut(usize::from(list)) else { return };
        ends.len -= 1;
        match next {
            NONE => ends.tail = prev,
            _ => self.entries[next as usize].prev = prev,
        }
        match prev {
            NONE => ends.head = next,
            _ => self.entries[prev as usize].next = next,
        }
        self.entries[block as usize].list = UNLISTED;
    }
}

#[cfg(test)]
#[path = "eviction_tests.rs"]
mod tests;
