//! Page ids, volumes, and how page ids are distributed over virtual shards.
//!
//! Invariants
//! 1. For a given number of virtual shards, the mapping from a page to (virtual shard, key within
//!    it) is a bijection, so the page map of a virtual shard contains no page ids and is dense
//!    where the ids are dense.
//! 2. A run of [`RUN_PAGES`] consecutive ids (2 MiB of 4 KiB pages) stays in one virtual shard, so
//!    adjacent pages meet in one coalescer; consecutive runs go to different virtual shards, so a
//!    scan spreads over the cores.

use std::cmp::Ordering;
use std::fmt;

/// Pages in a run, which stays together: 512.
pub const RUN_PAGES: u64 = 1 << RUN_BITS;
const RUN_BITS: u32 = 9;

/// A page's id within its volume: any 64-bit number that the caller chooses. Ids that are close
/// together keep the page map small; an id far from all others costs several map nodes of 4 KiB.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct PageId(u64);

impl PageId {
    /// The page with this number.
    pub const fn new(raw: u64) -> Self {
        PageId(raw)
    }
    /// The number.
    pub const fn get(self) -> u64 {
        self.0
    }
}

impl fmt::Debug for PageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "p{}", self.0)
    }
}

impl From<u64> for PageId {
    fn from(raw: u64) -> Self {
        PageId(raw)
    }
}

/// A volume's number. 0 is the catalog, which names all others; those of users begin at 1.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct VolumeId(u8);

impl VolumeId {
    /// The catalog: the engine's own volume, which names the others.
    pub const CATALOG: VolumeId = VolumeId(0);

    /// The volume with this number.
    pub const fn new(raw: u8) -> Self {
        VolumeId(raw)
    }
    /// The number.
    pub const fn get(self) -> u8 {
        self.0
    }
}

impl fmt::Debug for VolumeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "v{}", self.0)
    }
}

/// Identifies a page in the whole store, by volume and id.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct PageKey {
    /// The volume.
    pub volume: VolumeId,
    /// The page within it.
    pub page: PageId,
}

impl PageKey {
    /// The page `page` of `volume`.
    pub const fn new(volume: VolumeId, page: PageId) -> Self {
        PageKey { volume, page }
    }

    /// The virtual shard, of `vshards_count` (a power of two), that owns this page, and the page's
    /// dense number within that virtual shard and volume.
    pub fn place_in(self, vshards_count: u32) -> (VShard, u64) {
        let bits = vshards_count.trailing_zeros();
        let run = self.page.0 >> RUN_BITS;
        let (high, low) = (run >> bits, run & (u64::from(vshards_count) - 1));
        let vshard =
            (low.wrapping_add(Self::turn(self.volume, high))) & (u64::from(vshards_count) - 1);
        (VShard(vshard as u16), (high << RUN_BITS) | (self.page.0 & (RUN_PAGES - 1)))
    }

    /// The inverse of [`place_in`](Self::place_in).
    pub fn from_place(
        volume: VolumeId,
        vshard: VShard,
        page_index: u64,
        vshards_count: u32,
    ) -> Self {
        let bits = vshards_count.trailing_zeros();
        let high = page_index >> RUN_BITS;
        let low = u64::from(vshard.0).wrapping_sub(Self::turn(volume, high))
            & (u64::from(vshards_count) - 1);
        let run = (high << bits) | low;
        PageKey::new(volume, PageId((run << RUN_BITS) | (page_index & (RUN_PAGES - 1))))
    }

    /// The dense number in `vshard` of its first page of `volume` with this id or a higher one;
    /// higher ids have higher numbers. `None` if it has no such page.
    pub fn first_in(
        volume: VolumeId,
        page: PageId,
        vshard: VShard,
        vshards_count: u32,
    ) -> Option<u64> {
        let bits = vshards_count.trailing_zeros();
        let run = page.0 >> RUN_BITS;
        let (high, low) = (run >> bits, run & (u64::from(vshards_count) - 1));
        let own = u64::from(vshard.0).wrapping_sub(Self::turn(volume, high))
            & (u64::from(vshards_count) - 1);
        match own.cmp(&low) {
            Ordering::Equal => Some((high << RUN_BITS) | (page.0 & (RUN_PAGES - 1))),
            Ordering::Greater => Some(high << RUN_BITS),
            Ordering::Less => {
                let next = high + 1;
                (next < 1 << (u64::BITS - RUN_BITS - bits)).then_some(next << RUN_BITS)
            }
        }
    }

    /// How far the virtual shards are rotated for one block of runs, so that strided ids do not all
    /// meet in one (multiplicative mixing after Steele and Vigna, "Computationally easy, spectrally
    /// good multipliers", 2021).
    fn turn(volume: VolumeId, high: u64) -> u64 {
        let mixed = (high ^ (u64::from(volume.0) << 56)).wrapping_mul(0xf135_7aea_2e62_a9c5);
        mixed >> 40
    }
}

impl fmt::Debug for PageKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}/{:?}", self.volume, self.page)
    }
}

/// One core's share of the store.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct ShardId(u16);

impl ShardId {
    /// The shard that acts for all shards in what the store does as a whole.
    pub const LEADER: ShardId = ShardId(0);

    /// The shard with this number.
    pub const fn new(raw: u16) -> Self {
        ShardId(raw)
    }
    /// The number.
    pub const fn get(self) -> u16 {
        self.0
    }
    /// The number, as an index.
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Debug for ShardId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "s{}", self.0)
    }
}

/// The unit in which pages are distributed over shards; a page's virtual shard never changes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct VShard(u16);

impl VShard {
    /// The virtual shard with this number.
    pub const fn new(raw: u16) -> Self {
        VShard(raw)
    }
    /// The number.
    pub const fn get(self) -> u16 {
        self.0
    }
    /// The number, as an index.
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Debug for VShard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "vs{}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// If two pages had the same place in the map, one would be served for the other.
        #[test]
        fn a_page_and_its_place_in_a_virtual_shard_are_one_to_one(
            raw in any::<u64>(), volume in 0u8..248, bits in 0u32..10,
        ) {
            let key = PageKey::new(VolumeId::new(volume), PageId::new(raw));
            let (vshard, page_index) = key.place_in(1 << bits);
            prop_assert!(u32::from(vshard.get()) < 1 << bits);
            prop_assert_eq!(PageKey::from_place(key.volume, vshard, page_index, 1 << bits), key);
        }

        #[test]
        fn the_first_page_of_a_virtual_shard_from_an_id_on_is_the_next_one(
            raw in any::<u64>(), volume in 0u8..248, bits in 0u32..10, other in any::<u16>(),
        ) {
            let (page, volume, count) = (PageId::new(raw), VolumeId::new(volume), 1u32 << bits);
            let vshard = VShard::new(other % count as u16);
            let found = PageKey::first_in(volume, page, vshard, count);
            let id = |page_index| PageKey::from_place(volume, vshard, page_index, count).page;
            if let Some(page_index) = found {
                prop_assert!(id(page_index) >= page);
                let key = PageKey::new(volume, id(page_index));
                prop_assert_eq!(key.place_in(count), (vshard, page_index));
            }
            let before = found.unwrap_or((u64::MAX >> bits) | (RUN_PAGES - 1));
            let before = if found.is_some() { before.checked_sub(1) } else { Some(before) };
            if let Some(before) = before {
                prop_assert!(id(before) < page, "{:?} comes before", id(before));
            }
        }
    }

    /// Adjacent pages must meet in one coalescer, and a scan must spread over the cores.
    #[test]
    fn runs_stay_together_and_spread() {
        let shard = |id: u64| PageKey::new(VolumeId::new(1), PageId::new(id)).place_in(256).0;
        assert!((0..512).all(|id| shard(id) == shard(0)));
        let seen: std::collections::HashSet<_> = (0..256).map(|run| shard(run * 512)).collect();
        assert_eq!(seen.len(), 256);
        let strided: std::collections::HashSet<_> = (0..256).map(|i| shard(i << 17)).collect();
        assert!(strided.len() > 100, "strided ids meet in {} virtual shards only", strided.len());
    }
}
