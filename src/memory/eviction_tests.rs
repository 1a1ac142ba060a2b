//! Tests the policy on a mock memory: what is evicted, what stays, and what a search costs.

use super::*;
use crate::testing::random::Rng;
use proptest::prelude::*;
use smallvec::SmallVec;
use std::collections::BTreeMap;
use std::hash::BuildHasher;

/// A cache of numbers, with one in each block.
struct Cache {
    policy: Eviction,
    slots: Slots,
    free: Vec<u32>,
    hits: u64,
    misses: u64,
    now: Micros,
}

/// The content of each block; the owner of a block is its number.
#[derive(Default)]
struct Slots {
    held: BTreeMap<u32, Item>,
    at: BTreeMap<u64, u32>,
}

struct Item {
    what: u64,
    residency: Residency,
    referenced: bool,
    pinned: bool,
}

fn hash(what: u64) -> u64 {
    foldhash::fast::FixedState::with_seed(1).hash_one(what)
}

fn number(owner: Owner) -> u32 {
    match owner {
        Owner::Page(idx) => idx.index() as u32,
        Owner::Node(idx) => idx.index() as u32,
    }
}

impl Residents for Slots {
    fn standing(&self, owner: Owner, block: u32) -> Standing {
        assert_eq!(number(owner), block);
        match self.held.get(&block) {
            None => Standing::Gone,
            Some(item) if item.referenced => Standing::Referenced,
            Some(item) if item.pinned => Standing::Pinned,
            Some(_) => Standing::Idle,
        }
    }

    fn residency(&mut self, owner: Owner) -> &mut Residency {
        &mut self.held.get_mut(&number(owner)).expect("it is there").residency
    }

    fn evict(&mut self, owner: Owner) -> u64 {
        let item = self.held.remove(&number(owner)).expect("it is there");
        assert!(!item.referenced && !item.pinned, "what is in use went out");
        self.at.remove(&item.what);
        hash(item.what)
    }
}

impl Cache {
    fn new(blocks: u32) -> Cache {
        let (policy, slots) = (Eviction::new(blocks), Slots::default());
        Cache { policy, slots, free: (0..blocks).collect(), hits: 0, misses: 0, now: 0 }
    }

    /// Reads a number. Returns whether it was in the cache.
    fn read(&mut self, what: u64) -> bool {
        if let Some(block) = self.slots.at.get(&what) {
            self.slots.held.get_mut(block).expect("it is there").residency.used();
            self.hits += 1;
            return true;
        }
        self.misses += 1;
        let Some(block) = self.take() else { return false };
        let mut item =
            Item { what, residency: Residency::default(), referenced: false, pinned: false };
        self.policy.list(
            block,
            Owner::Page(PageIdx::new(block as usize)),
            &mut item.residency,
            hash(what),
        );
        self.slots.at.insert(what, block);
        self.slots.held.insert(block, item);
        false
    }

    fn evict_one(&mut self) -> bool {
        self.now += 1;
        self.policy.evict_one(&mut self.slots, self.now, 16)
    }

    fn take(&mut self) -> Option<u32> {
        if self.free.is_empty() {
            let before: Vec<u32> = self.slots.held.keys().copied().collect();
            if !self.evict_one() {
                return None;
            }
            self.free
                .extend(before.into_iter().filter(|block| !self.slots.held.contains_key(block)));
        }
        self.free.pop()
    }
}

/// A caller that reads a large volume once must not evict what others use all the time.
#[test]
fn a_scan_leaves_what_is_used_in_memory() {
    let mut cache = Cache::new(1000);
    let hot = |cache: &mut Cache| (0..500).filter(|what| cache.read(*what)).count();
    for _ in 0..5 {
        hot(&mut cache);
    }
    for what in 1_000..20_000 {
        cache.read(what);
    }
    assert_eq!(hot(&mut cache), 500, "of 500 pages in use, after a scan of 19 times the memory");
}

/// What is no longer used must make room for what is used now, even if that recurs only after more
/// reads than probation is long.
#[test]
fn a_new_working_set_takes_over() {
    let mut cache = Cache::new(1000);
    for _ in 0..10 {
        (0..900).for_each(|what| _ = cache.read(what));
    }
    let mut hits = 0;
    for round in 0..12 {
        hits = (5_000..5_600).filter(|what| cache.read(*what)).count();
        println!("round {round}: {hits} of 600");
    }
    assert!(hits >= 570, "{hits} hits of 600 in a working set of 60 % of the memory");
}

/// A search that sweeps all of a large memory makes every read slow: 112,000 pages a second became
/// 141.
#[test]
fn an_eviction_costs_a_bounded_number_of_looks() {
    let blocks = 4096;
    let mut cache = Cache::new(blocks);
    let mut rng = Rng::new(1);
    let mut random = |below: u64| rng.below(below);
    for step in 0..60_000u64 {
        // Everything is used again and again, so all of it has uses to lose; some of it is
        // referenced for a while.
        cache.read(random(if step % 4 == 0 { 100_000 } else { 5_000 }));
        let block = random(blocks.into()) as u32;
        if let Some(item) = cache.slots.held.get_mut(&block) {
            item.referenced = step % 8 == 0;
            item.pinned = step % 16 == 1;
            if !item.referenced && !item.residency.is_listed() {
                let (hash, mut residency) = (hash(item.what), item.residency);
                cache.policy.list(
                    block,
                    Owner::Page(PageIdx::new(block as usize)),
                    &mut residency,
                    hash,
                );
                cache.slots.held.get_mut(&block).expect("it is there").residency = residency;
            }
        }
    }
    let EvictionCounts { evicted, looks } = cache.policy.counts();
    println!(
        "{looks} looks for {evicted} evictions, {} hits of {}",
        cache.hits,
        cache.hits + cache.misses
    );
    assert!(
        evicted > 10_000 && looks <= 8 * evicted + u64::from(blocks),
        "{looks} looks for {evicted} evictions"
    );
}

/// While readers hold all of the memory a search must end at once, and what they release must be
/// found again.
#[test]
fn pinned_memory_ends_a_search_and_is_found_when_let_go_of() {
    let mut cache = Cache::new(10_000);
    (0..10_000).for_each(|what| _ = cache.read(what));
    cache.slots.held.values_mut().for_each(|item| item.pinned = true);
    assert!(!cache.evict_one(), "everything is pinned");
    let before = cache.policy.counts().looks;
    for _ in 0..100 {
        assert!(!cache.evict_one(), "everything is pinned");
    }
    assert!(cache.policy.counts().looks - before <= 100 * 20, "each search looks at a few of them");
    let before = cache.policy.counts().looks;
    for _ in 0..100 {
        assert!(!cache.policy.evict_one(&mut cache.slots, cache.now, 16), "everything is pinned");
    }
    assert!(cache.policy.counts().looks - before <= 100 * 2, "and of those at one moment, one");
    assert_eq!((cache.policy.pinned(), cache.policy.listed()), (10_000, 10_000));
    cache.slots.held.get_mut(&7_777).expect("it is there").pinned = false;
    let searches = (0..1_000).position(|_| cache.evict_one());
    assert!(searches.is_some(), "the one that was let go of was not found");
}

/// If this fails, readers are blamed for holding the memory after they have released it, and a
/// request that only had to wait gets `Busy`.
#[test]
fn readers_are_said_to_hold_all_only_while_they_do() {
    let mut cache = Cache::new(100);
    (0..100).for_each(|what| _ = cache.read(what));
    cache.slots.held.values_mut().for_each(|item| item.pinned = true);
    assert!(!cache.evict_one());
    assert_eq!((cache.policy.pinned(), cache.policy.saw_all_pinned()), (100, true));
    cache
        .slots
        .held
        .values_mut()
        .filter(|item| item.what != 3)
        .for_each(|item| item.pinned = false);
    cache.policy.look_at_pinned(&mut cache.slots, 1_000_000, 16);
    assert!(!cache.policy.saw_all_pinned(), "the rest has not been checked since");
    (1..100).for_each(|n| _ = cache.policy.look_at_pinned(&mut cache.slots, 1_000_000 + n, 16));
    assert_eq!(
        (cache.policy.pinned(), cache.policy.saw_all_pinned()),
        (1, true),
        "one is pinned, and was checked"
    );
}

/// A search that can't succeed must evict nothing, and one that has counted enough must get it.
#[test]
fn what_can_go_is_counted_before_anything_goes() {
    let mut cache = Cache::new(100);
    (0..100).for_each(|what| _ = cache.read(what));
    cache
        .slots
        .held
        .values_mut()
        .for_each(|item| (item.pinned, item.referenced) = (item.what % 4 == 0, item.what % 4 == 1));
    let count = |cache: &mut Cache, wanted| {
        cache.policy.count_idle(&mut cache.slots, wanted, &mut SmallVec::new())
    };
    assert_eq!(
        (count(&mut cache, 51), cache.policy.listed()),
        (50, 75),
        "half of it can go, a quarter is pinned"
    );
    let looks = cache.policy.counts().looks;
    assert_eq!(
        (count(&mut cache, 51), cache.policy.counts().looks - looks),
        (50, 50),
        "what can't go is not met again"
    );
    assert_eq!(count(&mut cache, 7), 7, "no more is counted than is wanted");
    assert_eq!(cache.slots.held.len(), 100);
    assert!((0..50).all(|_| cache.evict_one()) && !cache.evict_one());
}

/// A referenced block that a search meets is taken off the lists, and costs nothing until it is
/// listed again.
#[test]
fn what_is_referenced_is_looked_at_once() {
    let mut cache = Cache::new(1_000);
    (0..1_000).for_each(|what| _ = cache.read(what));
    cache.slots.held.values_mut().for_each(|item| item.referenced = true);
    for _ in 0..50 {
        assert!(!cache.evict_one());
    }
    assert_eq!((cache.policy.counts().looks, cache.policy.listed()), (1_000, 0));
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: if cfg!(miri) { 4 } else { 256 },
        ..ProptestConfig::default()
    })]

    /// A block that is in two lists is given out twice; one that is never listed again is lost.
    #[test]
    fn every_idle_block_goes_in_the_end(
        blocks in 1u32..80,
        steps in proptest::collection::vec((0u8..6, 0u64..160), 0..400),
    ) {
        let mut cache = Cache::new(blocks);
        for (kind, pick) in steps {
            let block = (pick % u64::from(blocks)) as u32;
            match (kind, cache.slots.held.get_mut(&block)) {
                (0, Some(item)) => item.referenced = true,
                (1, Some(item)) => item.pinned = !item.pinned,
                (2, Some(item)) => {
                    item.referenced = false;
                    if !item.residency.is_listed() {
                        let (hash, mut residency) = (hash(item.what), item.residency);
                        let owner = Owner::Page(PageIdx::new(block as usize));
                        cache.policy.list(block, owner, &mut residency, hash);
                        cache.slots.held.get_mut(&block).unwrap().residency = residency;
                    }
                }
                // Its owner frees it, and its block is used for something else.
                (3, Some(item)) if !item.referenced => {
                    let what = item.what;
                    cache.slots.held.remove(&block);
                    cache.slots.at.remove(&what);
                    cache.free.push(block);
                }
                _ => _ = cache.read(pick),
            }
            prop_assert!(cache.policy.listed() <= blocks);
            for (block, item) in &cache.slots.held {
                let is_listed = item.residency.is_listed();
                prop_assert!(!is_listed || cache.policy.owner_of(*block).is_some());
            }
        }
        let mut idle = 0;
        for (block, item) in &mut cache.slots.held {
            item.pinned = false;
            idle += usize::from(item.residency.is_listed() && !item.referenced);
            let is_listed = item.residency.is_listed();
            prop_assert!(
                cache.policy.owner_of(*block).is_some() || item.referenced || !is_listed
            );
        }
        let mut counted = 0;
        for _ in 0..blocks {
            cache.now += 1;
            cache.policy.look_at_pinned(&mut cache.slots, cache.now, 16);
            counted = cache.policy.count_idle(&mut cache.slots, blocks, &mut SmallVec::new());
        }
        prop_assert_eq!(counted as usize, idle);
        for _ in 0..idle {
            prop_assert!(cache.evict_one() || cache.evict_one());
        }
        prop_assert!(!cache.evict_one());
    }
}
