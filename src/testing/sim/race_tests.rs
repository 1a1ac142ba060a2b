//! Races that chance seldom produces: these tests produce them all the time.

use super::disk::{Latency, Loss};
use super::model::page_bytes;
use super::run::{Outcome, Plan, SimRun};
use super::tests::{plan, quiet, run_all};
use super::workload::{self, PrepareRequest, Profile};
use crate::base::{PageId, PageKey, VolumeId};
use crate::engine::{Change, Commit, Request};
use crate::testing::random::Rng;

fn key(n: u64) -> PageKey {
    PageKey::new(VolumeId::new(1), PageId::new(n))
}

/// The weights for a profile with only these requests.
fn only(prepares: &[(PrepareRequest, u32)]) -> Vec<u32> {
    let mut weights = vec![0; workload::ASKS.len()];
    for &(ask, weight) in prepares {
        weights[ask as usize] = weight;
    }
    weights
}

/// Overwrites pages while compaction moves them, on a device that takes long for writes of many
/// blocks, as moves are, and not for commits. Returns how many pages were moved.
pub(super) fn overtaken_moves(seed: u64) -> Outcome<u64> {
    const PAGES: u64 = 1_500;
    let mut rng = Rng::new(seed);
    let mut profile = Profile::random(&mut rng);
    profile.universe = (0..PAGES).map(|n| key((n % 8) * 512 + n / 8)).collect();
    profile.weights = only(&[(PrepareRequest::Put, 20), (PrepareRequest::Read, 10)]);
    (profile.in_flight, profile.hot_percent, profile.durable_percent) = (4, 0, 100);
    let shards = 1 + (seed % 2) as u16;
    let mut options = workload::options(&mut rng);
    options.geometry.vshards_count = options.geometry.vshards_count.max(2);
    (options.fill_percent, options.inline_pages_max) = (70, 0);
    // All pages are in memory: what moves is the oldest, and to be read first it would come and go
    // one page at a time.
    options.memory_bytes = 16 << 20;
    let plan = Plan {
        options: Some(options),
        profile: Some(profile),
        shards: shards..=shards,
        ..quiet(seed)
    };
    let mut sim = SimRun::new(plan);
    let latency =
        Latency { read: (5, 20), write: (1, 5), flush: (1, 5), block: 300, ..Latency::default() };
    sim.disk.set_latency(Latency { stall_one_in: 1 << 40, ..latency });
    sim.begin()?;
    while sim.run_stats.requests < 10 * PAGES {
        for _ in 0..1_000 {
            sim.step()?;
        }
    }
    sim.publish_to_map()?;
    let moved = sim.stats_now()?.pages_moved;
    sim.reopen(Loss::Everything)?;
    Ok(moved)
}

/// If this fails, a slow move brings back the version that a commit has replaced meanwhile.
#[test]
fn a_page_that_is_overwritten_while_it_moves_keeps_its_new_version() {
    for seed in 1..=2 {
        let moved = overtaken_moves(seed).unwrap_or_else(|why| panic!("seed {seed}: {why}"));
        println!("seed {seed}: {moved} pages moved");
        assert!(moved > 1_000, "seed {seed}: {moved} pages moved only");
    }
}

/// Grows trees while their only leaf is read: the new top is written and leaves memory before the
/// leaf arrives. Then pages of the leaf are changed. Returns how many nodes came too late.
pub(super) fn growth_under_reads(seed: u64) -> Outcome<u64> {
    const ROUNDS: u64 = 4;
    const OTHERS: u64 = 1_300;
    let mut rng = Rng::new(seed);
    let page = |volume, id| PageKey::new(VolumeId::new(volume), PageId::new(id));
    let volumes = 2..=9u8;
    let others: Vec<PageKey> = (0..OTHERS).map(|n| page(1, n * 64)).collect();
    let mut profile = Profile::random(&mut rng);
    profile.universe =
        volumes.clone().flat_map(|v| [0, 1, 100, 1 << 14].map(|id| page(v, id))).collect();
    profile.universe.extend(&others);
    let mut options = workload::options(&mut rng);
    (options.geometry.vshards_count, options.memory_bytes) = (1, 2 << 20);
    (options.data_bytes_max, options.coalesce_window_us) = (0, 1_000);
    let plan =
        Plan { options: Some(options), profile: Some(profile), shards: 1..=1, ..quiet(seed) };
    let mut sim = SimRun::new(plan);
    let fast = Latency {
        read: (1, 5),
        write: (1, 5),
        flush: (1, 5),
        stall_one_in: 1 << 40,
        ..Latency::default()
    };
    sim.disk.set_latency(fast);
    sim.begin()?;
    for keys in others.chunks(20) {
        sim.put_all(keys)?;
    }
    let mut overtaken = 0;
    for _ in 0..ROUNDS {
        let low: Vec<PageKey> = volumes.clone().map(|v| page(v, rng.below(2))).collect();
        sim.put_all(&low)?;
        sim.call(Request::Checkpoint)?.map_err(|error| error.to_string())?;
        // Nothing is in memory.
        sim.reopen_unchecked(Loss::Nothing)?;
        sim.disk.set_latency(Latency { read: (20_000_000, 30_000_000), ..fast });
        for key in &low {
            sim.ask(Request::Read([*key].into_iter().collect()));
        }
        let soon = sim.disk.now() + 1_000_000;
        while sim.cluster().next_at().is_some_and(|at| at < soon) {
            sim.pass()?;
        }
        sim.disk.set_latency(fast);
        let high: Vec<PageKey> =
            volumes.clone().map(|v| page(v, *rng.pick(&[100, 1 << 14]))).collect();
        sim.put_all(&high)?;
        sim.call(Request::Checkpoint)?.map_err(|error| error.to_string())?;
        for key in &others {
            sim.call(Request::Read([*key].into_iter().collect()))?
                .map_err(|error| error.to_string())?;
        }
        sim.publish_to_map()?;
        sim.put_all(&low)?;
        sim.call(Request::Checkpoint)?.map_err(|error| error.to_string())?;
        overtaken += sim.stats_now()?.nodes_overtaken;
        sim.reopen(Loss::Everything)?;
        // The trees are empty again, and as low as can be.
        for key in low.into_iter().chain(high) {
            let free =
                Commit { changes: vec![(key, Change::Free)], durable: true, ..Commit::default() };
            sim.call(Request::Commit(free))?.map_err(|error| error.to_string())?;
        }
        sim.call(Request::Checkpoint)?.map_err(|error| error.to_string())?;
    }
    Ok(overtaken)
}

impl SimRun {
    /// Writes each of these pages, durably.
    fn put_all(&mut self, keys: &[PageKey]) -> Outcome {
        for key in keys {
            self.next_token += 1;
            let changes = vec![(*key, Change::Put(page_bytes(*key, self.next_token)))];
            let commit = Commit { changes, durable: true, ..Commit::default() };
            self.call(Request::Commit(commit))?.map_err(|error| error.to_string())?;
        }
        Ok(())
    }
}

/// If this fails, a leaf that is taken for the top of its tree although the tree has grown
/// overwrites the root: everything that the tree above it names is lost, checkpointed or not.
#[test]
fn a_tree_that_grows_while_its_top_is_read_keeps_all_its_pages() {
    for seed in 1..=3 {
        let overtaken = growth_under_reads(seed).unwrap_or_else(|why| panic!("seed {seed}: {why}"));
        println!("seed {seed}: {overtaken} nodes came too late");
        assert!(overtaken >= 20, "seed {seed}: {overtaken} nodes came too late only");
    }
}

/// Logs that are long compared to memory and name many map nodes: shards need checkpoints in the
/// middle of their redo, each at another place in its log, and later groups name pages that were
/// patched before as written in place.
pub(super) fn checkpoints_in_redo(seed: u64) -> Plan {
    let mut rng = Rng::new(seed);
    let mut options = workload::options(&mut rng);
    options.geometry.vshards_count = 8;
    (options.geometry.segment_bytes, options.geometry.segments_count) = (256 << 10, 6);
    (options.memory_bytes, options.inline_pages_max) = (2 << 20, 0);
    let hot = (0..6).map(|n| key(n * 600));
    let lone = (1..150).map(|n| key(n << 18));
    let universe = hot.chain(lone).collect();
    let weights =
        only(&[(PrepareRequest::Put, 20), (PrepareRequest::Patch, 20), (PrepareRequest::Read, 5)]);
    let hot_percent = *rng.pick(&[50, 80]);
    let profile =
        Profile { universe, weights, hot_percent, in_flight: 16, ..Profile::random(&mut rng) };
    let plan =
        Plan { shards: 2..=4, lives: 16, events_max: 2_000, strain_percent: 0, ..plan(seed) };
    Plan { options: Some(options), profile: Some(profile), ..plan }
}

/// The same with crashes in most recoveries: what a checkpoint in the middle of a redo has recorded
/// must hold afterwards, even for bytes that a dead process wrote and never flushed.
pub(super) fn crashes_in_redo(seed: u64) -> Plan {
    Plan {
        recovery_crash_percent: 85,
        fault_percent: 0,
        damage_percent: 0,
        images: 9,
        ..checkpoints_in_redo(seed)
    }
}

/// A store that can't be opened after a crash is lost, however whole its bytes are.
#[test]
fn recovery_ends_with_checkpoints_in_the_middle_of_it() {
    run_all("recovery_ends_with_checkpoints_in_the_middle_of_it", 10, checkpoints_in_redo);
}
