//! Puts strain on a store: far more pages than memory, deep trees, slow reads, pinned pages,
//! clients that go away.
//!
//! Invariants
//! 1. It has a random source of its own, so that a seed without strain is the run that it always
//!    was.
//! 2. A large store is filled before the first crash; afterwards the pages that were changed and a
//!    sample of the others are checked after each crash, and now and then all of them.
//! 3. Pages that clients have pinned are unpinned at some time, and are then as they were.
//!
//! It does *not* know faults of the device; see `inject`.

mod held_pages;
mod requests;

use super::disk::Latency;
use super::late::Holding;
use super::workload::{Profile, memory_for};
use crate::base::mix::mix;
use crate::base::options::{Geometry, Options};
use crate::base::{PageId, PageKey, VShard, VolumeId};
use crate::engine::PageRef;
use crate::testing::random::Rng;
use std::collections::BTreeSet;

/// The smallest valid memory of a shard.
pub(super) const MEMORY_LEAST: u64 = 2 << 20;
/// A large store lives `1 / LARGE_LIVES` as many lives, each `LARGE_EVENTS` times as long, so that its
/// memory is turned over.
pub(super) const LARGE_LIVES: u32 = 5;
pub(super) const LARGE_EVENTS: u64 = 20;
/// The most images of each crash of a large store that are recovered.
pub(super) const LARGE_IMAGES: u32 = 6;
/// The percentage of strained seeds that are made for events which hardly ever happen by
/// themselves.
const MADE_PERCENT: u64 = 30;
/// The most small trees that there can be: each has a volume of its own.
const TREES_MAX: u64 = 245;
/// Pages of a small tree, one for each level that it gets.
const TREE_PAGES: [u64; 5] = [3, 70, 1 << 14, 1 << 22, 1 << 40];

/// The layout of the pages of a large store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// Side by side: much data, few map nodes.
    Dense,
    /// Each in a leaf of its own: more map nodes than memory.
    Lone,
    /// Half and half.
    Mixed,
    /// Side by side, with memory for most of them, and written in floods to a slow device.
    Roomy,
    /// Many small trees that grow while their tops are read late, and enough pages to turn memory
    /// over meanwhile.
    Growing,
    /// Each in a leaf of its own, and changed everywhere while clients hold as much as they can:
    /// checkpoints find no memory.
    Pinned,
}

/// The strain on a run.
#[derive(Clone, Debug, Default)]
pub struct Strain {
    /// A large store, and the number of its pages.
    pub large: Option<(Layout, u64)>,
    /// Reads whose completions come late.
    pub holding: Holding,
    /// One in `.0` reads takes `.1` times as long; 0: none.
    pub slow_reads: (u64, u64),
    /// The largest percentage of frames that clients hold, besides the few that they always hold.
    pub pins_percent: u64,
    /// The percentage of answers that no client takes.
    pub drop_percent: u64,
    /// The percentage of ends of a store that leave pages in the hands of clients.
    pub keep_percent: u64,
}

/// A page that a client holds on to.
pub struct HeldPage {
    page: PageRef,
    /// Its bytes as they were at first.
    bytes: Box<[u8]>,
    /// Checkpoints that had ended by then.
    checkpoints: u64,
}

impl HeldPage {
    fn check(&self) -> Result<(), String> {
        if self.page[..] != self.bytes[..] {
            return Err(format!("a page of {:?} changed while it was held", self.page.lsn()));
        }
        Ok(())
    }
}

/// The small trees of a large store: each of a virtual shard and a volume of its own, from low to
/// high.
pub type Trees = Vec<Vec<PageKey>>;

impl Strain {
    /// The strain of a seed; `percent` of all seeds have any. `is_free`: the plan leaves options and
    /// profile to the seed.
    pub fn random(percent: u64, is_free: bool, chance: &mut Rng) -> Strain {
        if !chance.chance(percent) {
            return Strain::default();
        }
        if is_free && chance.chance(MADE_PERCENT) {
            return Strain::made_for_something(chance);
        }
        let large = (is_free && chance.chance(65)).then(|| {
            let layouts = [
                Layout::Lone,
                Layout::Lone,
                Layout::Mixed,
                Layout::Dense,
                Layout::Dense,
                Layout::Roomy,
            ];
            let layout = *chance.pick(&layouts);
            match layout {
                // A hundred times the least memory of a shard, rarely, since a check of all of it
                // takes long.
                Layout::Dense if chance.chance(3) => (layout, chance.within(20_000, 64_000)),
                // Ten times, and more.
                Layout::Dense if chance.chance(80) => (layout, chance.within(6_600, 9_000)),
                _ => (layout, chance.within(1_000, 2_500)),
            }
        });
        Strain { large, ..Strain::small(chance) }
    }

    /// Strain that makes events frequent which hardly ever happen by themselves.
    fn made_for_something(chance: &mut Rng) -> Strain {
        let strain = Strain::small(chance);
        if chance.one_in(2) {
            let holding =
                Holding { pages_percent: 1, nodes_percent: 2, tops_percent: 90, turns_max: 8_000 };
            let large = Some((Layout::Growing, chance.within(600, 1_200)));
            return Strain { large, holding, slow_reads: (0, 1), pins_percent: 0, ..strain };
        }
        Strain {
            large: Some((Layout::Pinned, chance.within(1_000, 2_500))),
            pins_percent: 100,
            ..strain
        }
    }

    /// Some strain on a store of any size.
    pub fn small(chance: &mut Rng) -> Strain {
        let holding = Holding {
            pages_percent: *chance.pick(&[0, 1, 5]),
            nodes_percent: *chance.pick(&[0, 2, 10]),
            tops_percent: *chance.pick(&[0, 50, 90]),
            turns_max: *chance.pick(&[50, 500, 4_000, 8_000]),
        };
        let slow_reads = *chance.pick(&[(0, 1), (20, 100), (4, 10), (100, 1_000)]);
        // Where no read is slow, no request may be overtaken by many.
        let is_calm = chance.one_in(4);
        Strain {
            large: None,
            holding: if is_calm { Holding::default() } else { holding },
            slow_reads: if is_calm { (0, 1) } else { slow_reads },
            pins_percent: *chance.pick(&[0, 0, 5, 25, 60, 100, 100]),
            drop_percent: *chance.pick(&[0, 0, 10]),
            keep_percent: 30,
        }
    }

    /// Describes the strain, for the message about a failed run; empty without strain.
    pub fn describe(&self, options: &Options) -> String {
        let Strain { large, holding, slow_reads, pins_percent, .. } = self;
        if self.is_none() {
            return String::new();
        }
        let (memory, vshards) = (options.memory_bytes >> 20, options.geometry.vshards_count);
        format!(
            "\nstrained: large {large:?}, {memory} MiB a shard, {vshards} virtual shards, \
             {pins_percent} % held, slow reads {slow_reads:?}, {holding:?}"
        )
    }

    fn is_none(&self) -> bool {
        self.large.is_none() && self.keep_percent == 0
    }

    /// The options of a run under this strain.
    pub fn options(&self, mut options: Options, chance: &mut Rng) -> Options {
        let Some((layout, _)) = self.large else { return options };
        let vshards_count = *chance.pick(&[1, 2, 4, 8, 64, 256]);
        options.geometry = Geometry { vshards_count, ..options.geometry };
        options.memory_bytes = match layout {
            Layout::Roomy => memory_for(20),
            Layout::Dense | Layout::Growing | Layout::Pinned => MEMORY_LEAST,
            _ => memory_for((MEMORY_LEAST >> 20) + *chance.pick(&[0, 0, 0, 1, 2, 4])),
        };
        options
    }

    /// The profile of a run under this strain, and the small trees in it.
    pub fn profile(
        &self,
        profile: Profile,
        vshards_count: u32,
        chance: &mut Rng,
    ) -> (Profile, Trees) {
        let Some((layout, pages)) = self.large else { return (profile, Trees::new()) };
        let (universe, trees) = universe(layout, pages, vshards_count, chance);
        let profile = Profile {
            universe,
            // Reads that are kept back must not stop all others.
            in_flight: *chance.pick(&[12, 40, 100]),
            hot_percent: *chance.pick(&[0, 0, 20]),
            pages_max: *chance.pick(&[4, 20, 32]),
            ..profile
        };
        (profile, trees)
    }

    /// How long operations take under this strain.
    pub fn latency(&self, usual: Latency) -> Latency {
        let usual = Latency { slow_reads: self.slow_reads, ..usual };
        match self.large {
            Some((Layout::Roomy, _)) => Latency { block: 200, ..usual },
            _ => usual,
        }
    }
}

/// The pages of a large store, and the small trees among them.
fn universe(
    layout: Layout,
    count: u64,
    vshards_count: u32,
    chance: &mut Rng,
) -> (Vec<PageKey>, Trees) {
    let key = |volume, id| PageKey::new(VolumeId::new(volume), PageId::new(id));
    let shift = *chance.pick(&[6, 9, 14, 20]);
    let mut pages: BTreeSet<PageKey> = BTreeSet::new();
    let side = (count / 7 + 1).max(10_000);
    for n in 0..count {
        let is_lone = match layout {
            Layout::Lone | Layout::Growing | Layout::Pinned => true,
            Layout::Mixed => n % 2 == 0,
            Layout::Dense | Layout::Roomy => false,
        };
        let whole = chance.draw();
        let any = if chance.one_in(20) { whole } else { n << shift };
        pages.insert(if is_lone { key(1, any) } else { key(2, (n % 7) * side + n / 7) });
    }
    let mut pages: Vec<PageKey> = pages.into_iter().collect();
    for n in (1..pages.len()).rev() {
        pages.swap(n, chance.below(n as u64 + 1) as usize);
    }
    let tree = |volume: u64, chance: &mut Rng| {
        let vshard = VShard::new(chance.below(vshards_count.into()) as u16);
        let place = |page_index| {
            PageKey::from_place(VolumeId::new(volume as u8), vshard, page_index, vshards_count)
        };
        TREE_PAGES.map(|page_index| place(page_index + chance.below(8))).to_vec()
    };
    let trees_count = if layout == Layout::Growing { TREES_MAX } else { chance.within(30, 150) };
    let trees: Trees = (3..3 + trees_count).map(|volume| tree(volume, chance)).collect();
    pages.extend(trees.iter().flatten());
    (pages, trees)
}

/// The random stream of strain.
pub(super) fn chance_of(seed: u64) -> Rng {
    Rng::new(mix(seed ^ 0x7374_7261_696e))
}
