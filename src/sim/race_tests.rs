//! Races that chance seldom runs: work made so that it runs them all the time.

use super::disk::{Latency, Loss};
use super::rng::Rng;
use super::tests::{plan, quiet, run_all};
use super::workload::{self, Ask, Profile};
use super::world::{Outcome, Plan, World};
use crate::types::{PageId, PageKey, VolumeId};

fn key(n: u64) -> PageKey {
    PageKey::new(VolumeId::new(1), PageId::new(n))
}

/// Asks for nothing but these.
fn only(asks: &[(Ask, u32)]) -> Vec<u32> {
    let mut weights = vec![0; workload::ASKS.len()];
    for &(ask, weight) in asks {
        weights[ask as usize] = weight;
    }
    weights
}

/// Overwrites pages while compaction moves them, on a device that takes long for writes of many blocks, as moves are, and not for
/// commits. Returns how many pages were moved.
pub(super) fn overtaken_moves(seed: u64) -> Outcome<u64> {
    const PAGES: u64 = 1_500;
    let mut rng = Rng::new(seed);
    let mut profile = Profile::random(&mut rng);
    profile.universe = (0..PAGES).map(|n| key((n % 8) * 512 + n / 8)).collect();
    profile.weights = only(&[(Ask::Put, 20), (Ask::Read, 10)]);
    (profile.in_flight, profile.hot_percent, profile.durable_percent) = (4, 0, 100);
    let shards = 1 + (seed % 2) as u16;
    let mut options = workload::options(&mut rng);
    options.geometry.vshards_count = options.geometry.vshards_count.max(2);
    (options.fill_percent, options.inline_pages_max) = (70, 0);
    let plan = Plan { options: Some(options), profile: Some(profile), shards: shards..=shards, ..quiet(seed) };
    let mut world = World::new(plan);
    world.disk.set_latency(Latency { read: (5, 20), write: (1, 5), flush: (1, 5), block: 300, stall_one_in: 1 << 40 });
    world.begin()?;
    while world.tally.requests < 10 * PAGES {
        for _ in 0..1_000 {
            world.step()?;
        }
    }
    world.settle()?;
    let moved = world.stats_now()?.pages_moved;
    world.reopen(Loss::Everything)?;
    Ok(moved)
}

/// A slow move would bring the version back that a commit has replaced meanwhile.
#[test]
fn a_page_that_is_overwritten_while_it_moves_keeps_its_new_version() {
    for seed in 1..=2 {
        let moved = overtaken_moves(seed).unwrap_or_else(|why| panic!("seed {seed}: {why}"));
        println!("seed {seed}: {moved} pages moved");
        assert!(moved > 1_000, "seed {seed}: {moved} pages moved only");
    }
}

/// Logs that are long beside memory and name many map nodes: shards of a recovery need checkpoints in the middle of their redo, each
/// at another place in its own, and pages that were patched before are named as written in place by later groups.
pub(super) fn checkpoints_in_redo(seed: u64) -> Plan {
    let mut rng = Rng::new(seed);
    let mut options = workload::options(&mut rng);
    options.geometry.vshards_count = 8;
    (options.geometry.segment_bytes, options.geometry.segments_count) = (256 << 10, 6);
    (options.memory_bytes, options.inline_pages_max) = (2 << 20, 0);
    let hot = (0..6).map(|n| key(n * 600));
    let lone = (1..150).map(|n| key(n << 18));
    let universe = hot.chain(lone).collect();
    let weights = only(&[(Ask::Put, 20), (Ask::Patch, 20), (Ask::Read, 5)]);
    let hot_percent = *rng.pick(&[50, 80]);
    let profile = Profile { universe, weights, hot_percent, in_flight: 16, ..Profile::random(&mut rng) };
    let (lives, events_max) = (16, 2_000);
    Plan { options: Some(options), profile: Some(profile), shards: 2..=4, lives, events_max, ..plan(seed) }
}

/// A store that can't be opened after a crash is lost, however whole its bytes are.
#[test]
fn recovery_ends_with_checkpoints_in_the_middle_of_it() {
    run_all("recovery_ends_with_checkpoints_in_the_middle_of_it", 10, checkpoints_in_redo);
}
