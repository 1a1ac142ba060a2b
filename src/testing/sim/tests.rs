//! The promises of the store, kept through thousands of crashes, errors of the device and planted
//! bugs.
//!
//! `COREPAGE_SEED=n` runs one seed, `COREPAGE_SEEDS=n` n of them, from `COREPAGE_FIRST_SEED=n` on,
//! `COREPAGE_IMAGES=n` recovers n images of each crash; each failure is made smaller, unless
//! `COREPAGE_SHRINK=0`, and prints the command that repeats it.

use super::canary::{Canary, plant, take_fired};
use super::race_tests::{checkpoints_in_redo, crashes_in_redo};
use super::run::{Failure, Outcome, Plan, RunStats, run};
use super::shrink::shrink;
use super::workload::Smaller;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A plan in which nothing breaks except by what the test itself does.
pub(super) fn quiet(seed: u64) -> Plan {
    Plan {
        recovery_crash_percent: 0,
        fault_percent: 0,
        damage_percent: 0,
        strain_percent: 0,
        ..plan(seed)
    }
}

/// The most shards of a store in these tests.
pub(super) const SHARDS_MAX: u16 = 4;

/// A strained seed, whatever share of the ordinary ones is strained.
pub(super) fn strained(seed: u64) -> Plan {
    Plan { strain_percent: 100, ..plan(seed) }
}

/// The percentage of seeds of the ordinary runs that are strained; `COREPAGE_STRAIN=n` overrides
/// it.
const STRAINED_PERCENT: u64 = 10;

pub(super) fn plan(seed: u64) -> Plan {
    let plan = Plan {
        seed,
        lives: 25,
        images: number("COREPAGE_IMAGES").unwrap_or(4) as u32,
        events_max: 600,
        recovery_crash_percent: 20,
        fault_percent: 10,
        damage_percent: 10,
        strain_percent: number("COREPAGE_STRAIN").unwrap_or(STRAINED_PERCENT),
        strain: None,
        canary: None,
        options: None,
        profile: None,
        smaller: Smaller::default(),
        shards: 1..=SHARDS_MAX,
    };
    match std::env::var("COREPAGE_PLAN") {
        Ok(text) => plan
            .read(&text)
            .unwrap_or_else(|| panic!("COREPAGE_PLAN={text} is not a plan that was printed")),
        Err(_) => plan,
    }
}

pub(super) fn number(name: &str) -> Option<u64> {
    std::env::var(name)
        .ok()
        .map(|text| text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

/// The seeds to run: the one that `COREPAGE_SEED` names, or a number of them from
/// `COREPAGE_FIRST_SEED` on.
fn seeds(usual: u64) -> std::ops::RangeInclusive<u64> {
    match number("COREPAGE_SEED") {
        Some(seed) => seed..=seed,
        None => {
            let first = number("COREPAGE_FIRST_SEED").unwrap_or(1);
            first..=first - 1 + number("COREPAGE_SEEDS").unwrap_or(usual)
        }
    }
}

/// Whether more than one seed is run, so that the counts mean something.
pub(super) fn many_seeds() -> bool {
    number("COREPAGE_SEED").is_none()
}

/// Runs the plan of each seed, on all cores, and adds up; fails with the lowest seed that fails.
pub(super) fn run_all(test: &str, usual: u64, plan_of: impl Fn(u64) -> Plan + Sync) -> RunStats {
    let seeds = seeds(usual);
    let next = AtomicU64::new(*seeds.start());
    let work = || {
        let mut total = RunStats::default();
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if !seeds.contains(&seed) {
                return Ok(total);
            }
            if seed.is_multiple_of(500) {
                eprintln!("{test}: seed {seed}");
            }
            match run(&plan_of(seed)) {
                Ok(run_stats) => total.add(&run_stats),
                Err(failure) => {
                    next.store(u64::MAX / 2, Ordering::Relaxed);
                    return Err(failure);
                }
            }
        }
    };
    let results = on_all_cores(work);
    let mut total = RunStats::default();
    let mut failures: Vec<Failure> = Vec::new();
    for result in results {
        match result {
            Ok(run_stats) => total.add(&run_stats),
            Err(failure) => failures.push(failure),
        }
    }
    if let Some(failure) = failures.into_iter().min_by_key(|failure| failure.seed) {
        if number("COREPAGE_SHRINK") == Some(0) {
            panic!("{failure}\nrepeat: {}", repeat(test, failure.seed, None));
        }
        eprintln!("{failure}\nrepeat: {}\nmaking it smaller ...", repeat(test, failure.seed, None));
        let plan = plan_of(failure.seed);
        let (plan, failure) = shrink(&plan, failure);
        panic!("{failure}\nrepeat: {}", repeat(test, failure.seed, Some(&plan)));
    }
    println!("{total:#?}");
    total
}

/// Does `work` on a thread for each core.
pub(super) fn on_all_cores<T: Send>(work: impl Fn() -> T + Sync) -> Vec<T> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..cores).map(|_| scope.spawn(&work)).collect();
        threads.into_iter().map(|thread| thread.join().expect("a run catches its panics")).collect()
    })
}

/// The command that repeats a run of a test.
fn repeat(test: &str, seed: u64, plan: Option<&Plan>) -> String {
    let plan =
        plan.map(|plan| format!("COREPAGE_PLAN=\"{}\" ", plan.describe())).unwrap_or_default();
    format!("{plan}COREPAGE_SEED={seed} cargo test --lib {test} -- --nocapture")
}

/// Runs all of `cases`, on all cores, and adds up; fails with the first that fails.
pub(super) fn run_cases<C: Sync + std::fmt::Debug>(
    cases: &[C],
    run: impl Fn(&C) -> Outcome<RunStats> + Sync,
) -> RunStats {
    let next = AtomicU64::new(0);
    let work = || {
        let mut total = RunStats::default();
        while let Some(case) = cases.get(next.fetch_add(1, Ordering::Relaxed) as usize) {
            let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| run(case)));
            match caught.unwrap_or_else(|_| Err("panic: see above".into())) {
                Ok(run_stats) => total.add(&run_stats),
                Err(why) => {
                    next.store(u64::MAX / 2, Ordering::Relaxed);
                    return Err(format!("{case:?}: {why}"));
                }
            }
        }
        Ok(total)
    };
    let mut total = RunStats::default();
    for result in on_all_cores(work) {
        total.add(&result.unwrap_or_else(|why| panic!("{why}")));
    }
    total
}

fn must(test: &str, result: Result<RunStats, Failure>) -> RunStats {
    result
        .unwrap_or_else(|failure| panic!("{failure}\nrepeat: {}", repeat(test, failure.seed, None)))
}

/// If this fails, a store loses or invents data in a crash: then nothing else about it matters.
#[test]
fn acknowledged_commits_survive_every_crash() {
    let total = run_all("acknowledged_commits_survive_every_crash", 110, plan);
    assert_eq!(
        total.disk.overlaps, 0,
        "two writes to one place at a time: the one that counts is chance"
    );
    if many_seeds() && number("COREPAGE_SEEDS").is_none() {
        assert!(total.crashes + total.crashes_in_recovery >= 10_000, "too few crashes");
        assert!(
            total.rare.segments_added > 200,
            "logs got longer by {} segments only",
            total.rare.segments_added
        );
    }
}

/// Seeds that have found a bug, or were the only ones to catch a mutant, with as many images of
/// each crash as it took: `RedoneUnsettled`, `ReadNotFlushed`, `NamedSumIgnored`,
/// `OpeningWaitsForSpace`, in this order; the last one's (one copy of a superblock left) has no
/// switch. A change of recovery moves what a seed reaches, so directed tests catch the first, the
/// second and the fourth as well.
const TELLING_SEEDS: [u64; 5] = [74, 254, 999, 3508, 3619];

fn telling(seed: u64) -> Plan {
    Plan { images: 9, strain_percent: 0, ..plan(seed) }
}

/// If this fails, a bug has come back that once took thousands of seeds to find.
#[test]
fn telling_seeds_find_nothing() {
    for seed in TELLING_SEEDS {
        must("telling_seeds_find_nothing", run(&telling(seed)));
    }
}

/// If this fails, a failure found at night can't be repeated in the morning.
#[test]
fn same_seed_same_trace() {
    for seed in [1, 7, 23] {
        let plan = Plan { lives: 6, ..plan(seed) };
        let (first, second) =
            (must("same_seed_same_trace", run(&plan)), must("same_seed_same_trace", run(&plan)));
        assert_eq!((first.trace, first.cluster), (second.trace, second.cluster), "seed {seed}");
        assert_eq!((first.oracle, first.disk), (second.oracle, second.disk), "seed {seed}");
        assert_ne!(
            first.trace,
            must("same_seed_same_trace", run(&Plan { seed: seed + 100, ..plan })).trace
        );
    }
}

/// If this fails, an engineer who hunts a bug reads a thousand requests where three would do.
#[test]
fn a_failing_run_shrinks_and_is_repeated_from_its_text() {
    let whole = (1..=5).map(|seed| Plan { canary: Some(Canary::PartNotValidated), ..plan(seed) });
    let failing = |plan: Plan| run(&plan).err().map(|failure| (plan, failure));
    let (whole, failure) = whole
        .into_iter()
        .filter_map(failing)
        .max_by_key(|(_, f)| f.requests)
        .expect("it is caught");
    let requests = failure.requests;
    let (small, smaller) = shrink(&whole, failure);
    println!(
        "{requests} requests, {} after shrinking to {}: {smaller}",
        smaller.requests,
        small.describe()
    );
    assert!(
        smaller.requests * 4 <= requests,
        "{requests} requests, and {} still",
        smaller.requests
    );
    let text = small.describe();
    let again = Plan {
        canary: whole.canary,
        ..plan(small.seed).read(&text).expect("what is written can be read")
    };
    let repeated = run(&again).expect_err("it fails again");
    assert_eq!((repeated.why, repeated.requests), (smaller.why, smaller.requests));
    assert!(plan(1).read("1 2 3").is_none() && plan(1).read("nonsense").is_none());
}

/// Finds telling seeds: prints which of `COREPAGE_SEEDS` seeds catch the planted bug
/// `COREPAGE_CANARY`, with nine images of each crash. Use it when a change of the engine has moved
/// those in [`TELLING_SEEDS`].
#[test]
#[ignore = "a tool: it looks for seeds, and takes minutes"]
fn seeds_that_catch_a_planted_bug() {
    let name = std::env::var("COREPAGE_CANARY").expect("COREPAGE_CANARY names a planted bug");
    let canary = Canary::ALL
        .iter()
        .copied()
        .find(|canary| format!("{canary:?}") == name)
        .expect("it exists");
    let next = AtomicU64::new(1);
    on_all_cores(|| {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed > number("COREPAGE_SEEDS").unwrap_or(500) {
                return;
            }
            for (name, plan) in
                [("telling", telling as fn(u64) -> Plan), ("crashes in redo", crashes_in_redo)]
            {
                if let Err(failure) = run(&Plan { canary: Some(canary), ..plan(seed) }) {
                    println!(
                        "{name}, seed {seed}: {}",
                        failure.why.lines().next().unwrap_or_default()
                    );
                }
            }
        }
    });
}

/// The result of the search for a planted bug.
struct Found {
    canary: Canary,
    fired: u64,
    /// The runs that have caught it, and their messages.
    caught: Option<(String, String)>,
    took: Duration,
}

fn ran(test: fn()) -> Outcome {
    test();
    Ok(())
}

/// Looks for a planted bug, with the runs that every change has to pass.
#[allow(clippy::disallowed_methods)] // How long it took is told, and nothing depends on it.
fn hunt(canary: Canary) -> Found {
    take_fired();
    let begun = Instant::now();
    let random = |name: &str, plan: fn(u64) -> Plan, seeds: Vec<u64>| {
        seeds.into_iter().find_map(|seed| {
            let failure = run(&Plan { canary: Some(canary), ..plan(seed) }).err()?;
            Some((format!("{name}, seed {seed}"), failure.why))
        })
    };
    let ordinary = |seeds: std::ops::RangeInclusive<u64>| {
        // Without strain: it is known which of them catches what.
        let plan = |seed| Plan { strain_percent: 0, ..plan(seed) };
        random("acknowledged_commits_survive_every_crash", plan, seeds.collect())
    };
    let special = |name: &str, run: fn() -> Outcome| {
        plant(Some(canary));
        let caught = std::panic::catch_unwind(run).unwrap_or_else(|_| Err("panic".into()));
        plant(None);
        caught.err().map(|why| (name.to_owned(), why))
    };
    let overtaken = || super::race_tests::overtaken_moves(1).map(drop);
    let grown = || super::race_tests::growth_under_reads(1).map(drop);
    let recorded = || {
        ran(crate::engine::recovery::tests::what_a_recovery_records_as_durable_survives_a_power_cut)
    };
    let full = || ran(super::fault_tests::a_full_disk_ends_an_opening_with_an_error);
    let grows = || ran(crate::engine::recovery::tests::growth::planted_bugs);
    let caught = ordinary(1..=15)
        .or_else(|| special("logs_get_longer", grows))
        .or_else(|| {
            special(
                "damage_to_any_sector_of_a_closed_store_is_noticed",
                super::damage_tests::smallest,
            )
        })
        .or_else(|| {
            special(
                "a_lost_write_does_not_bring_back_an_interrupted_checkpoint",
                super::damage_tests::all_lost,
            )
        })
        .or_else(|| {
            let examined = crate::engine::recovery::tests::scans::examined;
            special("a_gap_is_the_end_of_a_log_only_after_every_block_was_examined", examined)
        })
        .or_else(|| special("a_full_disk_ends_an_opening_with_an_error", full))
        .or_else(|| special("every_operation_may_fail_in_every_way", super::error_tests::smallest))
        .or_else(|| random("strained_stores_survive_every_crash", strained, (1..=12).collect()))
        .or_else(|| {
            random(
                "crashes_of_full_stores_lose_nothing",
                super::fault_tests::full_store,
                (1..=25).collect(),
            )
        })
        .or_else(|| {
            special("a_page_that_is_overwritten_while_it_moves_keeps_its_new_version", overtaken)
        })
        .or_else(|| special("a_tree_that_grows_while_its_top_is_read_keeps_all_its_pages", grown))
        .or_else(|| special("what_a_recovery_records_as_durable_survives_a_power_cut", recorded))
        .or_else(|| special("shards_wait_and_are_woken", super::waiting_tests::all))
        .or_else(|| {
            random(
                "recovery_ends_with_checkpoints_in_the_middle_of_it",
                checkpoints_in_redo,
                (1..=10).collect(),
            )
        })
        .or_else(|| random("telling_seeds_find_nothing", telling, TELLING_SEEDS.to_vec()))
        .or_else(|| ordinary(16..=200));
    let first_line =
        |why: String| why.lines().next().unwrap_or_default().chars().take(120).collect();
    let caught = caught.map(|(by, why)| (by, first_line(why)));
    Found { canary, fired: take_fired(), caught, took: begun.elapsed() }
}

/// A checker that can't fail is a defect: every planted bug must do its damage and be found, by the
/// same runs. `COREPAGE_CANARY=name` looks for one of them.
#[test]
fn every_planted_bug_fires_and_is_caught() {
    let only = std::env::var("COREPAGE_CANARY").ok();
    let is_wanted =
        |canary: &Canary| only.as_ref().is_none_or(|name| format!("{canary:?}") == *name);
    let canaries: Vec<Canary> = Canary::ALL.iter().copied().filter(is_wanted).collect();
    assert!(!canaries.is_empty(), "no planted bug is named {only:?}");
    let next = AtomicU64::new(0);
    let work = || {
        let mut found = Vec::new();
        while let Some(&canary) = canaries.get(next.fetch_add(1, Ordering::Relaxed) as usize) {
            found.push(hunt(canary));
        }
        found
    };
    let mut found: Vec<_> = on_all_cores(work).into_iter().flatten().collect();
    found.sort_by_key(|found| found.canary);
    println!("| planted bug | fired | caught by | after | how it showed |");
    for Found { canary, fired, caught, took } in &found {
        let (by, why) = caught.clone().unwrap_or(("NOTHING".into(), String::new()));
        println!("| {canary:?} | {fired} | {by} | {} ms | {why} |", took.as_millis());
    }
    let missed = found.iter().filter(|found| found.fired == 0 || found.caught.is_none());
    let missed: Vec<_> = missed.map(|found| (found.canary, found.fired)).collect();
    assert!(missed.is_empty(), "never reached, or not caught: {missed:?}");
}
