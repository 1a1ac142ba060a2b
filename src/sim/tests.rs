//! The promises of the store, kept through thousands of crashes, errors of the device and planted bugs.
//!
//! `COREPAGE_SEED=n` runs one seed, `COREPAGE_SEEDS=n` so many; each failure prints the command that repeats it.

use super::engine::open_store;
use super::world::{Failure, Plan, Tally, run};

fn plan(seed: u64) -> Plan {
    Plan {
        seed,
        lives: 25,
        images: 2,
        events_max: 600,
        recovery_crash_percent: 20,
        canary: None,
        faults: Vec::new(),
        options: None,
        profile: None,
        open: open_store,
    }
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

/// The seeds to run: the one asked for, or so many from one on.
fn seeds(usual: u64) -> std::ops::RangeInclusive<u64> {
    match number("COREPAGE_SEED") {
        Some(seed) => seed..=seed,
        None => 1..=number("COREPAGE_SEEDS").unwrap_or(usual),
    }
}

fn must(test: &str, result: Result<Tally, Failure>) -> Tally {
    result.unwrap_or_else(|failure| {
        let seed = failure.seed;
        panic!("{failure}\nrepeat: COREPAGE_SEED={seed} cargo test --lib sim::tests::{test} -- --nocapture")
    })
}

/// If this fails, a store loses or invents data in a crash: nothing else about it matters then.
#[test]
fn acknowledged_commits_survive_every_crash() {
    let began = std::time::Instant::now();
    let mut total = Tally::default();
    for seed in seeds(200) {
        total.add(&must("acknowledged_commits_survive_every_crash", run(&plan(seed))));
    }
    println!("{total:#?}\n{:?}", began.elapsed());
    if number("COREPAGE_SEED").is_none() {
        assert!(total.crashes + total.crashes_in_recovery >= 10_000, "{total:?}");
    }
}
