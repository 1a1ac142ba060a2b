//! The eviction policy (S3-FIFO): it chooses the frame that is given up when memory is needed,
//! among all frames that can go.
//!
//! ```text
//! first listed --> probation (a tenth) --used again twice--> main --unused for a round--> out
//!      |                       \--not--> out, remembered       ^   \--used: another round
//!      \--remembered: asked for again soon after it went out---/
//! met, but pinned by a reader --> set aside, and looked at again a few at a time --> back
//! ```
//! Invariants
//! 1. A block stands in one list at most, and nothing here allocates after [`Eviction::new`]. What
//!    left its block leaves an entry behind, which is dropped when it is met or when the block is
//!    listed for its next owner.
//! 2. What is met and can't go because something refers to it is taken off the lists; its owner
//!    lists it again when the last reference ends. So a search pays for each reference once, for
//!    each use once and for each entry once: an eviction costs O(1), amortised.
//! 3. Readers give pins back on any thread and say nothing. What they pin is looked at again, but a
//!    bounded number of them a search: without anything else to evict a search ends without having
//!    seen them all, and the next one goes on.
//! 4. A search passes over [`USED_MAX`] used entries at most; then the next one goes, used or not.
//!    So no single eviction pays for a whole round of a large memory.
//!
//! Something read once leaves before something that was used again, however much is read once (a
//! scan). It does *not* know what is in a frame, free memory itself, or wait.

use crate::base::{Micros, NodeIdx, PageIdx};
use smallvec::SmallVec;

/// Uses are counted up to this.
const USES_MAX: u8 = 3;
/// Uses in probation that promote a block to the main list. The use that brought it into memory
/// does not count.
const PROMOTED_AT: u8 = 2;
/// The share of listed blocks on probation: one in ten.
const PROBATION_SHARE: u32 = 10;
/// See invariant 4.
const USED_MAX: u32 = 64;
/// Pinned blocks that each search looks at if it finds another victim, so that unpinned ones are
/// found again in time.
const PINNED_LOOKS: u32 = 2;

/// Map nodes counted by a search, without an allocation.
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
    /// Counts one more use.
    #[inline]
    pub(crate) fn used(&mut self) {
        // Pages in use are at the most: they are not written to each time.
        if self.uses < USES_MAX {
            self.uses += 1;
        }
    }

    /// Whether it stands in a list: else it has to be listed when nothing refers to it any more.
    #[inline]
    pub(crate) fn is_listed(&self) -> bool {
        self.is_listed
    }

    #[cfg(test)]
    pub(crate) fn uses(&self) -> u8 {
        self.uses
    }

    /// Its frame is another one, or gone.
    pub(crate) fn frame_changed(&mut self) {
        self.is_listed = false;
    }
}

/// How something that was met in a list stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Standing {
    /// The block is not its any more.
    Gone,
    /// Something refers to it; it is listed again when that ends.
    Referenced,
    /// Only readers hold it.
    Pinned,
    /// It can go.
    Idle,
}

/// The owners of the listed blocks.
pub(crate) trait Residents {
    /// How `owner` stands, if `block` is still its.
    fn standing(&self, owner: Owner, block: u32) -> Standing;
    /// The state that `owner` keeps for the policy.
    fn residency(&mut self, owner: Owner) -> &mut Residency;
    /// Gives up the frame of `owner`, which is idle; returns a hash of what it held.
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

/// Bytes that the policy needs for each block, at most.
#[cfg(test)]
pub(crate) const BLOCK_BYTES: usize = size_of::<Entry>() + 2 * size_of::<u32>();

/// The lists, oldest first, by block of the arena.
pub(crate) struct Eviction {
    entries: Box<[Entry]>,
    lists: [List; 3],
    /// Hashes of blocks that were evicted from probation; newer ones overwrite older ones.
    remembered: Box<[u32]>,
    /// When the pinned blocks were last searched without success.
    looked_at: Option<Micros>,
    /// Blocks met one after the other that were pinned, since one was met that no reader held any
    /// more.
    pinned_in_a_row: u32,
    counts: EvictionCounts,
}

/// The cost of evictions.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
pub(crate) struct EvictionCounts {
    /// Frames given up.
    pub evicted: u64,
    /// Entries looked at on the way.
    pub looks: u64,
}

impl Eviction {
    /// For an arena of `blocks` blocks.
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

    /// Lists a block that nothing refers to any more, at the end of where it stood or, the first
    /// time, where what it holds belongs; `hash` is of that.
    pub(crate) fn list(&mut self, block: u32, owner: Owner, residency: &mut Residency, hash: u64) {
        self.unlink(block);
        if !residency.in_main {
            residency.in_main = self.recall(hash);
        }
        residency.is_listed = true;
        self.push(if residency.in_main { MAIN } else { PROBATION }, block, owner);
    }

    /// Blocks that are listed, those included that readers had pinned.
    #[cfg(test)]
    pub(crate) fn listed(&self) -> u32 {
        self.lists.iter().map(|list| list.len).sum()
    }

    /// Blocks that were pinned by readers when they were met last.
    pub(crate) fn pinned(&self) -> u32 {
        self.lists[PINNED].len
    }

    /// Whether every one of them was looked at since the last one was found that a reader had let
    /// go of.
    pub(crate) fn saw_all_pinned(&self) -> bool {
        self.pinned_in_a_row >= self.pinned()
    }

    /// The cost of evictions so far.
    pub(crate) fn counts(&self) -> EvictionCounts {
        self.counts
    }

    /// The owner that is listed with `block`.
    #[cfg(any(test, feature = "sim"))]
    pub(crate) fn owner_of(&self, block: u32) -> Option<Owner> {
        let entry = &self.entries[block as usize];
        (entry.list != UNLISTED).then_some(entry.owner)
    }

    /// Gives up one frame, if there is one that can go. If only what readers pin is left, at most
    /// `pinned_looks` of it are looked at, once for each `now`, however many ask at that moment.
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

    /// Looks at no more than `looks` of what readers have pinned, once for each `now`; whether they
    /// had let go of any.
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

    /// Looks at up to `looks` pinned blocks and lists those again that are no longer pinned.
    /// Returns whether there were any.
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

    /// How many frames can go, counted up to `wanted`; the map nodes among them are put into
    /// `nodes`. Nothing goes, but what is met and can't go leaves the lists: so counting in vain
    /// again looks at idle entries only, fewer than `wanted`.
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

    /// Whether `owner`, whose `block` is in no list, can go. If not, it is set aside or its owner
    /// lists it again later.
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

    /// Where something would be remembered, and as what; zero is for nothing.
    fn bucket_of(&self, hash: u64) -> (usize, u32) {
        ((hash >> 32) as usize & (self.remembered.len() - 1) & !(BUCKET - 1), hash as u32 | 1)
    }

    fn remember(&mut self, hash: u64) {
        let (at, mark) = self.bucket_of(hash);
        // Which of the bucket it overwrites must differ from time to time: of things that are read
        // in turn, each would overwrite the next one needed, for ever.
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
