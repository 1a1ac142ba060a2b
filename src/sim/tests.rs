//! The promises of the store, kept through thousands of crashes, errors of the device and planted bugs.
//!
//! `COREPAGE_SEED=n` runs one seed, `COREPAGE_SEEDS=n` so many; each failure prints the command that repeats it.

use super::canary::{Canary, take_fired};
use super::world::{Failure, Plan, Tally, run};
use std::sync::atomic::{AtomicU64, Ordering};

/// Most shards of a store in these tests.
pub(super) const SHARDS_MAX: u16 = 4;

pub(super) fn plan(seed: u64) -> Plan {
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
        shards: 1..=SHARDS_MAX,
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

/// Whether more than one seed is run, so that there are numbers that mean something.
pub(super) fn many_seeds() -> bool {
    number("COREPAGE_SEED").is_none()
}

/// Runs the plan of each seed, on all cores, and adds up; fails with the lowest seed that fails.
pub(super) fn run_all(test: &str, usual: u64, plan_of: impl Fn(u64) -> Plan + Sync) -> Tally {
    let seeds = seeds(usual);
    let next = AtomicU64::new(*seeds.start());
    let work = || {
        let mut total = Tally::default();
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if !seeds.contains(&seed) {
                return Ok(total);
            }
            match run(&plan_of(seed)) {
                Ok(tally) => total.add(&tally),
                Err(failure) => {
                    next.store(u64::MAX / 2, Ordering::Relaxed);
                    return Err(failure);
                }
            }
        }
    };
    let results = on_all_cores(work);
    let mut total = Tally::default();
    let mut failures: Vec<Failure> = Vec::new();
    for result in results {
        match result {
            Ok(tally) => total.add(&tally),
            Err(failure) => failures.push(failure),
        }
    }
    if let Some(failure) = failures.into_iter().min_by_key(|failure| failure.seed) {
        complain(test, &failure);
    }
    println!("{total:#?}");
    total
}

/// Does `work` on a thread for each core.
fn on_all_cores<T: Send>(work: impl Fn() -> T + Sync) -> Vec<T> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..cores).map(|_| scope.spawn(&work)).collect();
        threads.into_iter().map(|thread| thread.join().expect("a run catches its panics")).collect()
    })
}

/// Fails, with the command that repeats it.
pub(super) fn complain(test: &str, failure: &Failure) -> ! {
    let seed = failure.seed;
    panic!("{failure}\nrepeat: COREPAGE_SEED={seed} cargo test --lib {test} -- --nocapture")
}

fn must(test: &str, result: Result<Tally, Failure>) -> Tally {
    result.unwrap_or_else(|failure| complain(test, &failure))
}

/// If this fails, a store loses or invents data in a crash: nothing else about it matters then.
#[test]
fn acknowledged_commits_survive_every_crash() {
    let total = run_all("acknowledged_commits_survive_every_crash", 200, plan);
    assert_eq!(total.disk.overlaps, 0, "two writes to one place at a time: the one that counts is chance");
    if many_seeds() {
        assert!(total.crashes + total.crashes_in_recovery >= 10_000, "too few crashes");
    }
}

/// If this fails, a failure found at night can't be repeated in the morning.
#[test]
fn same_seed_same_trace() {
    for seed in [1, 7, 23] {
        let plan = Plan { lives: 6, ..plan(seed) };
        let (first, second) = (must("same_seed_same_trace", run(&plan)), must("same_seed_same_trace", run(&plan)));
        assert_eq!((first.trace, first.cluster), (second.trace, second.cluster), "seed {seed}");
        assert_eq!((first.oracle, first.disk), (second.oracle, second.disk), "seed {seed}");
        assert_ne!(first.trace, must("same_seed_same_trace", run(&Plan { seed: seed + 100, ..plan })).trace);
    }
}

/// A checker that can't fail is a defect: every planted bug must do its damage and be found, by the same runs.
#[test]
fn every_planted_bug_fires_and_is_caught() {
    let next = AtomicU64::new(0);
    let work = || {
        let mut found = Vec::new();
        while let Some(&canary) = Canary::ALL.get(next.fetch_add(1, Ordering::Relaxed) as usize) {
            take_fired();
            let caught = (1..=100).find_map(|seed| run(&Plan { canary: Some(canary), ..plan(seed) }).err());
            let why = caught.as_ref().map(|failure| failure.to_string());
            let why = why.map(|text| text.lines().next().unwrap_or_default().chars().take(300).collect::<String>());
            found.push((canary, take_fired(), why));
        }
        found
    };
    let found: Vec<_> = on_all_cores(work).into_iter().flatten().collect();
    for (canary, fired, why) in &found {
        println!("{canary:?}: fired {fired} times, caught by {why:?}");
    }
    let missed: Vec<_> = found.iter().filter(|(_, fired, why)| *fired == 0 || why.is_none()).collect();
    assert!(missed.is_empty(), "never reached, or not caught: {missed:?}");
}
