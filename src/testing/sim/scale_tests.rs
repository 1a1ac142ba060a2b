//! Stores far larger than their memory, with deep trees, slow reads and pages that clients hold.
//!
//! `COREPAGE_SEEDS=n` runs n seeds, as for the ordinary runs, a part of which is strained in the
//! same way.

use super::run::{Plan, run};
use super::strain::{self, Layout, Strain};
use super::tests::{many_seeds, number, run_all, strained};
use crate::base::BLOCK;
use crate::testing::random::Rng;

/// A durable page that a slow read makes unreachable is lost as surely as one that was never
/// written; a store that stands still because it has no memory, or turns for nothing, is of no use.
#[test]
fn strained_stores_survive_every_crash() {
    let total = run_all("strained_stores_survive_every_crash", 12, strained);
    if many_seeds() && number("COREPAGE_SEEDS").is_none() {
        let never: Vec<_> = total
            .rare
            .all()
            .into_iter()
            .filter(|(name, count)| *count == 0 && is_usual(name))
            .collect();
        assert!(
            never.is_empty(),
            "never happened in these runs, which prove nothing about it: {never:?}"
        );
    }
}

/// Strained seeds that have found a bug, with nine images of each crash. They pin down, in this
/// order: a commit that evicted the map nodes which had just been read for it, and read them again
/// without end ("no answer for 60 s" after 4.7 million evictions); and reads that waited one behind
/// the other, each for as long as anybody waits for memory at most, with nothing under way; nodes
/// of which an older waiter took no precedence over those in between, so that two who moved nodes
/// took each other's path away; and a commit that lost the path to one of its new pages for that to
/// another.
const TELLING_STRAINED: [u64; 7] = [1013, 200_186, 300_087, 300_732, 400_072, 501_622, 502_136];

/// If this fails, a client whose pages are far apart waits for a minute or for ever while readers
/// hold most of the memory.
#[test]
fn telling_strained_seeds_find_nothing() {
    for seed in TELLING_STRAINED {
        let plan = Plan { images: 9, ..strained(seed) };
        run(&plan).unwrap_or_else(|failure| panic!("{failure}"));
    }
}

/// Frames of a shard with the least valid memory.
const FRAMES_LEAST: u64 = strain::MEMORY_LEAST / BLOCK as u64;

/// A strained store of one shard, with `times` pages for each frame of its memory.
fn of_memories(seed: u64, times: u64) -> Plan {
    let mut chance = Rng::new(seed);
    // Some of the frames hold the log, and some pages are left out or freed.
    let large = Some((Layout::Dense, FRAMES_LEAST * times * 3 / 2));
    Plan {
        strain: Some(Strain { large, ..Strain::small(&mut chance) }),
        shards: 1..=1,
        images: 3,
        ..strained(seed)
    }
}

/// If this fails, a store much larger than its memory loses pages, or makes no progress.
#[test]
fn a_store_of_a_hundred_memories_survives_crashes() {
    let run_stats = run(&of_memories(7, 100)).unwrap_or_else(|failure| panic!("{failure}"));
    assert!(run_stats.rare.lives_of_hundred_memories > 0, "{run_stats:#?}");
}

/// The same at a size that no default run can have: it takes minutes, and some gigabytes.
/// `COREPAGE_SEEDS` sets the number of seeds.
#[test]
#[ignore = "takes minutes: cargo test --lib thousand_memories -- --ignored"]
fn stores_of_a_thousand_memories_survive_crashes() {
    for seed in 1..=number("COREPAGE_SEEDS").unwrap_or(1) {
        let run_stats =
            run(&of_memories(seed, 1_000)).unwrap_or_else(|failure| panic!("{failure}"));
        println!(
            "seed {seed}: {} states, {:#?}",
            run_stats.crashes + run_stats.crashes_in_recovery,
            run_stats.rare
        );
        assert!(run_stats.rare.lives_of_thousand_memories > 0, "{run_stats:#?}");
    }
}

/// Whether an event is frequent enough to be seen in a few seeds.
fn is_usual(name: &str) -> bool {
    let seldom = [
        "busy_by_pins",
        "busy_without_pins",
        "checkpoints_starved",
        "lives_of_hundred_memories",
        "lives_of_thousand_memories",
        "reads_orphaned",
        "reads_orphaned_by_checkpoint",
        "reads_stale",
    ];
    !seldom.contains(&name)
}
