//! Stores far larger than their memory, with deep trees, slow reads and pages held on to.
//!
//! `COREPAGE_SEEDS=n` runs so many seeds, as for the ordinary runs, of which a part is strained in the same way.

use super::tests::{many_seeds, number, run_all, strained};

/// A durable page that a slow read makes unreachable is lost as surely as one that was never written; a store that stands still for
/// want of memory, or turns for nothing, is of no use to anybody.
#[test]
fn strained_stores_survive_every_crash() {
    let total = run_all("strained_stores_survive_every_crash", 12, strained);
    if many_seeds() && number("COREPAGE_SEEDS").is_none() {
        let never: Vec<_> =
            total.rare.all().into_iter().filter(|(name, count)| *count == 0 && is_usual(name)).collect();
        assert!(never.is_empty(), "never happened in these runs, which prove nothing about it: {never:?}");
    }
}

/// Whether an event is frequent enough to be seen in a few seeds.
fn is_usual(name: &str) -> bool {
    let seldom = [
        "busy_by_pins",
        "busy_without_pins",
        "checkpoints_starved",
        "reads_orphaned",
        "reads_orphaned_by_checkpoint",
        "reads_stale",
    ];
    !seldom.contains(&name)
}
