//! Strain on a store: far more pages than memory, deep trees, slow reads, pinned pages, clients
//! that go away.
//!
//! Invariants
//! 1. It has a random source of its own, so that a seed without strain is the run that it always
//!    was.
//! 2. A large store is filled before anything is judged by crashes; afterwards each crash is held
//!    against the pages that were changed and a sample of the others, and against all of them now
//!    and then.
//! 3. Pages that clients have pinned are unpinned some time, and are then as they were.
//!
//! It does *not* know faults of the device; see `inject`.

mod held_pages;
use super::disk::Latency;
use super::late::Holding;
use super::model::page_bytes;
use super::plan::Plan;
use super::run::{Outcome, SimRun};
use super::workload::{Profile, Workload, memory_for};
use crate::base::error::ErrorKind;
use crate::base::mix::mix;
use crate::base::options::{Geometry, Options};
use crate::base::{PageId, PageKey, VShard, VolumeId};
use crate::engine::{Change, Commit, PageRef, Request};
use crate::testing::random::Rng;
use std::collections::BTreeSet;

/// The smallest memory of a shard that is legal.
pub(super) const MEMORY_LEAST: u64 = 2 << 20;
/// As many lives of a small store make one of a large one, which is so many times as long: memory
/// must be turned over.
pub(super) const LARGE_LIVES: u32 = 5;
pub(super) const LARGE_EVENTS: u64 = 20;
/// Images of each crash of a large store that are recovered, at most.
pub(super) const LARGE_IMAGES: u32 = 6;
/// Unchanged pages of a large store that are looked at after a crash.
const SAMPLE: usize = 80;
/// Tags of the pages with which a store is filled begin here: those of the workload stay below.
const FILL_TAG: u64 = 1 << 48;
/// How often a commit of these is tried while it gets `Busy`.
const FILL_TRIES: u32 = 6;
/// Of a hundred strained seeds, how many are made for what hardly ever happens by itself.
const MADE_PERCENT: u64 = 30;
/// As many small trees as there can be: each has a volume of its own.
const TREES_MAX: u64 = 245;
/// Pages of a small tree, one for each level that it gets.
const TREE_PAGES: [u64; 5] = [3, 70, 1 << 14, 1 << 22, 1 << 40];

/// How the pages of a large store lie.
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
    /// Many small trees that grow while their tops are read late, and pages enough to turn memory
    /// over meanwhile.
    Growing,
    /// Each in a leaf of its own, changed everywhere while clients hold as much as they can:
    /// checkpoints find no memory.
    Pinned,
}

/// What strains a run.
#[derive(Clone, Debug, Default)]
pub struct Strain {
    /// A large store, and how many pages it is to have.
    pub large: Option<(Layout, u64)>,
    /// Reads whose ends are told late.
    pub holding: Holding,
    /// One in `.0` reads takes `.1` times as long; 0: none.
    pub slow_reads: (u64, u64),
    /// Of a hundred frames, how many clients hold on to at most, besides the few that they always
    /// do.
    pub pins_percent: u64,
    /// The percentage of answers that no client takes.
    pub drop_percent: u64,
    /// Of a hundred ends of a store, how many leave pages in the hands of clients.
    pub keep_percent: u64,
}

/// A page that a client holds on to.
pub struct HeldPage {
    page: PageRef,
    /// As they were at first.
    bytes: Box<[u8]>,
    /// Checkpoints that had ended by then.
    checkpoints: u64,
}

impl HeldPage {
    fn check(&self) -> Outcome {
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
    /// The strain of a seed: none, for most.
    pub fn of(plan: &Plan, chance: &mut Rng) -> Strain {
        if let Some(strain) = &plan.strain {
            return strain.clone();
        }
        if !chance.chance(plan.strain_percent) {
            return Strain::default();
        }
        let is_free = plan.options.is_none() && plan.profile.is_none();
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
                // A hundred times the least memory of a shard: rarely, since all of it takes long
                // to look at.
                Layout::Dense if chance.chance(3) => (layout, chance.within(20_000, 64_000)),
                // Ten times, and more.
                Layout::Dense if chance.chance(80) => (layout, chance.within(6_600, 9_000)),
                _ => (layout, chance.within(1_000, 2_500)),
            }
        });
        Strain { large, ..Strain::small(chance) }
    }

    /// Strain under which that happens often which hardly ever does by itself.
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
        // Where no read is slow, nobody may be overtaken by many.
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

    /// What it is, for the message about a run that failed; nothing without strain.
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

impl SimRun {
    /// Whether this is a large store.
    pub(super) fn is_large(&self) -> bool {
        self.strain.large.is_some()
    }

    /// On a slow device a checkpoint may take longer than a commit over shards waits for log room:
    /// then it is tried again, as its error says.
    fn fill_with(&mut self, keys: &[PageKey]) -> Outcome {
        for _ in 0..FILL_TRIES {
            let changes =
                keys.iter().map(|key| (*key, Change::Put(page_bytes(*key, FILL_TAG)))).collect();
            match self.call(Request::Commit(Commit {
                reads: Vec::new(),
                changes,
                durable: false,
            }))? {
                Err(error) if error.kind() == ErrorKind::Busy => {}
                answer => {
                    return answer.map(drop).map_err(|error| format!("filling the store: {error}"));
                }
            }
        }
        Err(format!("filling the store: busy {FILL_TRIES} times, with {} pages", keys.len()))
    }

    /// Fills a large store: most of its pages, and the lowest page of each small tree.
    pub(super) fn fill(&mut self) -> Outcome {
        if !self.is_large() {
            return Ok(());
        }
        let in_trees: BTreeSet<PageKey> = self.trees.iter().flatten().copied().collect();
        let universe = self.workload.profile.universe.clone();
        let lone = universe.iter().filter(|key| !in_trees.contains(key));
        let lone: Vec<PageKey> = lone.copied().filter(|_| !self.chance.one_in(5)).collect();
        let lows = self.trees.iter().map(|tree| tree[0]);
        let mut keys: Vec<PageKey> = lone.into_iter().chain(lows).collect();
        let shard_map = self.cluster().shard_map();
        keys.sort_by_key(|key| shard_map.shard_of(*key));
        let most = self.workload.commit_pages_max().max(1) as usize;
        for shard in keys.chunk_by(|a, b| shard_map.shard_of(*a) == shard_map.shard_of(*b)) {
            for keys in shard.chunks(most) {
                self.fill_with(keys)?;
            }
        }
        self.call(Request::Checkpoint)?.map_err(|error| format!("filling the store: {error}"))?;
        Ok(())
    }

    /// Asks for something that only a large store is asked for; whether it has.
    pub(super) fn strain(&mut self) -> bool {
        if !self.is_large() || !self.chance.chance(40) {
            return false;
        }
        if self.sweeps_left > 0 && self.chance.chance(80) {
            self.sweeps_left -= 1;
            self.sweep();
            return true;
        }
        let is_full_of_pins = self.held.len() as u64 * 10 >= self.cluster().frames() * 8;
        if is_full_of_pins && self.chance.one_in(4) {
            // What is dirty must be written with the memory that is left.
            self.ask(Request::Checkpoint);
            return true;
        }
        match self.chance.below(100) {
            0..50 if !self.trees.is_empty() => self.climb(),
            0..80 => self.sweep(),
            80..84 => _ = self.ask(Request::Checkpoint),
            84..88 => self.free_many(),
            _ if matches!(self.strain.large, Some((Layout::Roomy, _))) => self.flood(),
            _ => self.sweep(),
        }
        true
    }

    /// A small tree grows, often while its lowest page is being read; a high one is freed again.
    fn climb(&mut self) {
        // The one that was left alone for the longest: it has left memory, mostly, and its top must
        // be read.
        self.trees.rotate_left(1);
        let tree = self.trees[0].clone();
        let last = self.oracle.last();
        let there =
            tree.iter().take_while(|key| self.oracle.model.at(**key, last).page.is_some()).count();
        let touched = tree.iter().all(|key| self.workload.is_touched(key));
        if !touched {
            return;
        }
        let put = |sim: &mut SimRun, key: PageKey| (key, sim.workload.put_to(key));
        if there == tree.len() || (there > 1 && self.chance.one_in(3)) {
            let changes = tree.iter().map(|key| (*key, Change::Free)).collect();
            return self.commit(changes);
        }
        if there > 0 && self.chance.chance(80) {
            self.ask(Request::Read([tree[0]].into_iter().collect()));
        }
        if there > 0 && self.chance.chance(30) {
            // What is read late is changed, too: whoever has lost the way up loses more.
            let change = put(self, tree[0]);
            self.commit(vec![change]);
        }
        if self.chance.chance(80) {
            let change = put(self, tree[there]);
            self.commit(vec![change]);
            if self.chance.chance(60) {
                // The new top is written, and leaves memory, while the old one is still being read.
                self.ask(Request::Checkpoint);
                self.sweeps_left = self.chance.within(4, 30);
            }
        }
    }

    /// Many pages are read, of which most are not in memory and some are absent.
    fn sweep(&mut self) {
        let most = self.options.vectored_pages_max as u64;
        for _ in 0..self.chance.within(1, 3) {
            let keys: BTreeSet<PageKey> =
                (0..most).filter_map(|_| touched(&self.workload, &mut self.chance)).collect();
            let last = self.oracle.last();
            let absent =
                keys.iter().filter(|key| self.oracle.model.at(**key, last).page.is_none()).count();
            self.run_stats.rare.absent_reads += absent as u64;
            if !keys.is_empty() {
                self.ask(Request::Read(keys.into_iter().collect()));
            }
        }
    }

    /// As many pages are freed as one commit may free, or some of them.
    fn free_many(&mut self) {
        let most = self.workload.commit_pages_max() * 8;
        let count = self.chance.within(1, most);
        let keys: BTreeSet<PageKey> =
            (0..count).filter_map(|_| touched(&self.workload, &mut self.chance)).collect();
        if !keys.is_empty() {
            self.commit(keys.into_iter().map(|key| (key, Change::Free)).collect());
        }
    }

    /// Many whole pages are written at a time, none durably.
    fn flood(&mut self) {
        let most = self.workload.commit_pages_max();
        for _ in 0..self.chance.within(8, 40) {
            let keys: BTreeSet<PageKey> =
                (0..most).filter_map(|_| touched(&self.workload, &mut self.chance)).collect();
            let changes: Vec<_> =
                keys.into_iter().map(|key| (key, self.workload.put_to(key))).collect();
            if !changes.is_empty() {
                self.ask(Request::Commit(Commit { reads: Vec::new(), changes, durable: false }));
            }
        }
    }

    fn commit(&mut self, changes: Vec<(PageKey, Change)>) {
        let durable = self.chance.one_in(2);
        self.ask(Request::Commit(Commit { reads: Vec::new(), changes, durable }));
    }

    /// Which pages are looked at after a crash, and whether they are all.
    pub(super) fn pick_checked(&mut self) -> (Vec<PageKey>, bool) {
        let universe = &self.workload.profile.universe;
        // As many pages are looked at in the end, however large the store is.
        let rarely = 12.max(universe.len() as u64 / 500);
        if !self.is_large() || self.chance.one_in(rarely) {
            return (universe.clone(), true);
        }
        let mut keys = self.oracle.changed();
        keys.extend((0..SAMPLE).map(|_| *self.chance.pick(universe)));
        keys.extend(self.trees.iter().filter(|_| self.chance.one_in(4)).flatten());
        (keys.into_iter().collect(), false)
    }
}

/// A page that is not of the idle shard, if one is found soon.
fn touched(workload: &Workload, chance: &mut Rng) -> Option<PageKey> {
    (0..8).map(|_| *chance.pick(&workload.profile.universe)).find(|key| workload.is_touched(key))
}

/// The stream from which strain takes its chance.
pub(super) fn chance_of(seed: u64) -> Rng {
    Rng::new(mix(seed ^ 0x7374_7261_696e))
}
