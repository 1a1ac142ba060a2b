//! Makes every operation of a few reference workloads fail, in every way in which operations fail.
//!
//! After SQLite's I/O error loop (<https://sqlite.org/testing.html>, section 3.2): fail the first
//! operation, run, check; fail the second, and so on, until a run goes through without meeting its
//! error. `COREPAGE_ERRORS=all` tries each of the seven errors, once and for ever, at each
//! operation, instead of one of them.

use super::disk::is_of_the_device;
use super::disk::{Area, ERRNOS, Fault, Loss};
use super::model::{page_bytes, patch_bytes};
use super::run::{Outcome, Plan, RunStats, SimRun};
use super::tests::{quiet, run_cases};
use super::workload::{self, Profile};
use crate::base::mix::mix;
use crate::base::{PageId, PageKey, VolumeId};
use crate::engine::{Change, Commit, Request};
use crate::testing::random::Rng;

/// The bound on the operations of a workload: far more than any of them has.
const INDEX_MAX: u64 = 5_000;

/// When the error strikes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum When {
    /// While the store is made, used and closed.
    Life,
    /// While a crash is recovered from, and everything read.
    Recovery,
}

#[derive(Clone, Copy, Debug)]
struct Case {
    /// Which reference workload.
    seed: u64,
    shards: u16,
    when: When,
    /// The number of operations that succeed before.
    after: u64,
    errno: i32,
    forever: bool,
}

fn key(n: u64) -> PageKey {
    // Two pages in each run of 512: several virtual shards.
    PageKey::new(VolumeId::new(1), PageId::new(n % 2 + n / 2 * 512))
}

const PAGES: u64 = 16;

fn commit(
    reads: Vec<PageKey>,
    changes: Vec<(PageKey, Change)>,
    durable: bool,
    sim: &SimRun,
) -> Request {
    let told = |key| (key, sim.oracle.model.at(key, sim.oracle.last()).told());
    Request::Commit(Commit { reads: reads.into_iter().map(told).collect(), changes, durable })
}

/// One after another: each kind of commit, of one shard and of several, flushes and checkpoints;
/// then the store is closed, or it is left with requests under way.
fn work(sim: &mut SimRun, rng: &mut Rng, when: When) -> Outcome {
    for n in 1..=if when == When::Life { 24 } else { 30 } {
        let put = |n: u64, tag| (key(n), Change::Put(page_bytes(key(n), tag)));
        let at = rng.below(PAGES);
        let request = match n % 8 {
            1 => commit(vec![], vec![put(at, n)], true, sim),
            2 => commit(vec![], (0..6).map(|i| put(at + i * 3, n * 100 + i)).collect(), true, sim),
            3 => {
                let bytes = patch_bytes(n, 500);
                commit(vec![], vec![(key(at), Change::Patch { offset: 40, bytes })], true, sim)
            }
            4 => commit(
                vec![key(at), key(at + 5)],
                vec![put(at, n), put(at + 9, n + 1000)],
                true,
                sim,
            ),
            5 => commit(vec![], vec![put(at, n)], false, sim),
            6 => commit(vec![], vec![(key(at), Change::Free), put(at + 4, n)], false, sim),
            7 => Request::Flush,
            _ => Request::Checkpoint,
        };
        if n > 24 {
            sim.ask(request);
            sim.pass()?;
            continue;
        }
        // The judge has checked the answer, whatever it is.
        let _ = sim.call(request)?;
        sim.call(Request::Read(smallvec::smallvec![key(at)])).map(drop)?;
    }
    if when == When::Life { sim.call(Request::Close).map(drop) } else { Ok(()) }
}

fn run(case: &Case) -> Outcome<(RunStats, u64)> {
    let mut rng = Rng::new(mix(case.seed ^ case.after));
    let mut options = workload::options(&mut Rng::new(case.seed));
    options.geometry.vshards_count = options.geometry.vshards_count.max(8);
    options.geometry.segment_bytes = 64 << 10;
    options.geometry.segments_count = 4;
    let profile = Profile {
        universe: (0..PAGES * 3).map(key).collect(),
        ..Profile::random(&mut Rng::new(case.seed))
    };
    let mut sim = SimRun::new(Plan {
        options: Some(options),
        profile: Some(profile),
        shards: case.shards..=case.shards,
        ..quiet(case.seed)
    });
    let fault = Fault {
        kind: None,
        area: Area::Any,
        after: case.after,
        forever: case.forever,
        errno: case.errno,
    };
    if case.when == When::Life {
        sim.disk.inject(fault.clone());
        sim.tolerate_errors(true);
    }
    match sim.try_open()? {
        Ok(_) => work(&mut sim, &mut Rng::new(case.seed), case.when)?,
        Err(error) => is_of_the_device(&error)?,
    }
    let mut faults = sim.disk.counters().faults();
    sim.crash(Loss::random(&mut rng))?;
    if case.when == When::Recovery {
        sim.disk.inject(fault);
        sim.tolerate_errors(true);
        match sim.try_open()? {
            // Reading everything may meet the error, and then that is the answer.
            Ok(opened) => {
                read_all(&mut sim)?;
                // The store was open: what it showed must not be lost again.
                sim.oracle.restart_at(opened.recovered_lsn, opened.recovered_lsn);
            }
            Err(error) => is_of_the_device(&error)?,
        }
        faults += sim.disk.counters().faults();
        sim.crash(Loss::random(&mut rng))?;
    }
    sim.tolerate_errors(false);
    let opened = sim.open()?;
    let recovered_lsn = sim.check(opened)?;
    sim.oracle.restart_at(recovered_lsn, opened.recovered_lsn);
    let put = commit(vec![], vec![(key(1), Change::Put(page_bytes(key(1), 9999)))], true, &sim);
    sim.call(put)?.map_err(|error| format!("with a device that is well again: {error}"))?;
    sim.reopen(Loss::random(&mut rng))?;
    Ok((sim.run_stats, faults))
}

fn read_all(sim: &mut SimRun) -> Outcome {
    for n in 0..PAGES * 3 {
        match sim.try_read_now(&[key(n)])? {
            Ok(_) => {}
            Err(error) => is_of_the_device(&error)?,
        }
    }
    Ok(())
}

/// The number of operations of a workload: an error strikes each of them.
fn operations(seed: u64, shards: u16, when: When) -> u64 {
    let strikes = |after| {
        let case = Case { seed, shards, when, after, errno: ERRNOS[0], forever: true };
        run(&case).unwrap_or_else(|why| panic!("{case:?}: {why}")).1 > 0
    };
    let (mut low, mut high) = (0, INDEX_MAX);
    while low < high {
        let middle = (low + high) / 2;
        if strikes(middle) { low = middle + 1 } else { high = middle }
    }
    low
}

/// The runs in which planted bugs are looked for.
pub(super) fn smallest() -> Outcome {
    let case =
        |when, after, errno, forever| Case { seed: 1, shards: 2, when, after, errno, forever };
    (0..60).try_for_each(|after| {
        run(&case(When::Recovery, after, ERRNOS[0], false))?;
        run(&case(When::Life, after * 2, ERRNOS[0], false))?;
        run(&case(When::Life, after * 2, ERRNOS[1], true)).map(drop)
    })
}

/// If this fails, the failure of some operation costs data, makes the store hang, or is taken for
/// success.
#[test]
fn every_operation_may_fail_in_every_way() {
    let all = std::env::var("COREPAGE_ERRORS").is_ok_and(|wish| wish == "all");
    let mut cases = Vec::new();
    for (seed, shards, when) in [1, 2, 3].into_iter().flat_map(|seed| {
        [(1, When::Life), (2, When::Life), (2, When::Recovery)]
            .map(move |(shards, when)| (seed, shards, when))
    }) {
        let count = operations(seed, shards, when);
        println!("reference workload {seed} on {shards} shards, {when:?}: {count} operations");
        for after in 0..count {
            let ways = ERRNOS.into_iter().flat_map(|errno| [(errno, false), (errno, true)]);
            let ways = ways.enumerate().filter(|(n, _)| all || *n as u64 == after % 14);
            cases.extend(ways.map(|(_, (errno, forever))| Case {
                seed,
                shards,
                when,
                after,
                errno,
                forever,
            }));
        }
    }
    let fired = std::sync::atomic::AtomicU64::new(0);
    run_cases(&cases, |case| {
        let (run_stats, faults) = run(case)?;
        fired.fetch_add(u64::from(faults > 0), std::sync::atomic::Ordering::Relaxed);
        Ok(run_stats)
    });
    let fired = fired.into_inner();
    println!("{} runs, in {fired} of them the error struck", cases.len());
    assert!(fired > cases.len() as u64 * 9 / 10, "{fired} of {} errors struck", cases.len());
}
