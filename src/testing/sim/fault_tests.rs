//! Devices that fail, fill up and rot, under the simulator.

use super::disk::{Area, ENOSPC, Fault, Loss, OpKind};
use super::model::page_bytes;
use super::run::{Outcome, Plan, SimRun};
use super::tests::{plan, quiet};
use super::workload::{self, Profile};
use crate::base::error::ErrorKind;
use crate::base::options::Options;
use crate::base::{BLOCK, PageId, PageKey, VolumeId};
use crate::engine::{Change, Commit, Request};
use crate::format::extent::data_blocks;
use crate::io::FileId;
use crate::testing::random::Rng;

fn commit(changes: Vec<(PageKey, Change)>) -> Request {
    Request::Commit(Commit { reads: Vec::new(), changes, durable: true })
}

fn key(n: u64) -> PageKey {
    PageKey::new(VolumeId::new(1), PageId::new(n))
}

fn put(n: u64, tag: u64) -> Request {
    commit(vec![(key(n), Change::Put(page_bytes(key(n), tag)))])
}

/// Runs `test` for each seed; names the one that failed.
fn for_seeds(seeds: u64, mut test: impl FnMut(u64) -> Outcome) {
    for seed in 1..=seeds {
        test(seed).unwrap_or_else(|why| panic!("seed {seed}: {why}"));
    }
}

fn steps(sim: &mut SimRun, count: u32) -> Outcome {
    (0..count).try_for_each(|_| sim.step())
}

/// Injects one error of the device, at some time, then checks everything that the contract says
/// about a store that has failed.
fn fails_and_stops(seed: u64, fault: Fault) -> Outcome<u64> {
    let mut sim = SimRun::new(quiet(seed));
    sim.begin()?;
    steps(&mut sim, 60)?;
    sim.disk.inject(fault);
    sim.tolerate_errors(true);
    for _ in 0..3_000 {
        sim.step()?;
        if sim.disk.counters().faults() > 0 {
            break;
        }
    }
    if sim.disk.counters().faults() == 0 {
        return Ok(0);
    }
    // Some more requests, which meet the failure on their way.
    steps(&mut sim, 40)?;
    sim.publish_to_map()?;
    let durable = sim.oracle.durable();
    let answer = sim.call(put(1, 1 << 40))?;
    match answer.as_ref().map_err(|error| error.kind()) {
        Err(ErrorKind::Closed | ErrorKind::Io) => {}
        _ => return Err(format!("after a failed write a commit is answered with {answer:?}")),
    }
    let answer = sim.call(Request::Flush)?;
    if answer.is_ok() && sim.oracle.durable() > durable {
        return Err(format!("after a failed write a flush is answered with {answer:?}"));
    }
    let unknown = sim.oracle.counters().unknown;
    let mut rng = Rng::new(seed);
    sim.reopen(Loss::random(&mut rng))?;
    sim.tolerate_errors(false);
    steps(&mut sim, 100)?;
    sim.publish_to_map()?;
    sim.reopen(Loss::random(&mut rng))?;
    Ok(1 + unknown)
}

/// A store that accepts a failed flush on the second try loses what was acknowledged after it.
#[test]
fn failed_log_write_or_flush_stops_acknowledgements() {
    for (kind, area) in [
        (OpKind::Write, Area::Log),
        (OpKind::Flush, Area::Log),
        (OpKind::Write, Area::File(FileId::Data)),
        (OpKind::Write, Area::File(FileId::Meta)),
        (OpKind::Write, Area::File(FileId::Table)),
        (OpKind::Flush, Area::Any),
    ] {
        let (mut fired, mut unknown) = (0, 0);
        for_seeds(40, |seed| {
            let after = Rng::new(seed).below(20);
            let fault = Fault { forever: seed % 2 == 0, ..Fault::once(kind, area, after) };
            let found =
                fails_and_stops(seed, fault).map_err(|why| format!("{kind:?} {area:?}: {why}"))?;
            fired += found.min(1);
            unknown += found.saturating_sub(1);
            Ok(())
        });
        println!("{kind:?} {area:?}: {fired} fired, {unknown} commits of unknown outcome");
        assert!(fired >= 5, "{kind:?} {area:?} fired {fired} times only");
    }
}

/// A device that can't read a block must not make the store serve something else, or stop working.
#[test]
fn a_read_error_is_an_error_and_never_wrong_data() {
    let mut fired = 0;
    for_seeds(40, |seed| {
        let mut sim = SimRun::new(quiet(seed));
        sim.begin()?;
        steps(&mut sim, 300)?;
        sim.publish_to_map()?;
        sim.reopen(Loss::Process)?;
        // The check after reopening has read everything: only a newly opened store reads again.
        let answer = sim.call(Request::Close)?;
        answer.map_err(|error| error.to_string())?;
        sim.reopen_unchecked(Loss::Nothing)?;
        sim.tolerate_errors(true);
        for after in 0..6 {
            sim.disk.inject(Fault::once(OpKind::Read, Area::Any, after * 2));
        }
        steps(&mut sim, 300)?;
        sim.publish_to_map()?;
        fired += sim.disk.counters().faults_read;
        sim.disk.clear_faults();
        sim.tolerate_errors(false);
        steps(&mut sim, 100)?;
        sim.publish_to_map()?;
        sim.reopen(Loss::Everything)
    });
    println!("{fired} read errors fired");
    assert!(fired >= 100, "{fired} read errors fired");
}

/// A full store that could not free pages any more would be lost to its owner.
#[test]
fn a_full_disk_refuses_commits_cleanly_and_goes_on_when_there_is_space() {
    for_seeds(10, |seed| {
        let options = workload::options(&mut Rng::new(seed));
        let extents = (20 + seed) * u64::from(super::tests::SHARDS_MAX);
        let options =
            Options { data_bytes_max: extents * options.geometry.extent_bytes, ..options };
        let mut sim = SimRun::new(Plan { options: Some(options), ..quiet(seed) });
        sim.begin()?;
        let (mut written, mut refused) = (0, 0);
        for n in 0..8_000 {
            match sim.call(put(n, n + 1))?.map_err(|error| error.kind()) {
                Ok(_) => written = n + 1,
                Err(ErrorKind::Full) => {
                    refused += 1;
                    if refused > 3 {
                        break;
                    }
                }
                Err(kind) => return Err(format!("page {n} is refused with {kind:?}")),
            }
        }
        if refused == 0 || written < 50 {
            return Err(format!("{written} pages written, {refused} refused: it never was full"));
        }
        for n in 0..written {
            sim.call(Request::Read(smallvec::smallvec![key(n)]))?
                .map_err(|e| format!("a read fails: {e}"))?;
        }
        for n in 0..written / 2 {
            sim.call(commit(vec![(key(n), Change::Free)]))?
                .map_err(|e| format!("a free fails: {e}"))?;
        }
        for n in 0..written / 4 {
            sim.call(put(n, n + 10_000))?
                .map_err(|e| format!("after frees page {n} is refused: {e}"))?;
        }
        sim.reopen(Loss::Everything)?;
        if sim.call(put(0, 1 << 30))?.is_err() {
            // When they are dealt out again, one shard may have more than its share of the pages.
            for n in written / 2..written {
                sim.call(commit(vec![(key(n), Change::Free)]))?
                    .map_err(|e| format!("a free after reopening: {e}"))?;
            }
            sim.call(Request::Checkpoint)?.map_err(|e| format!("after reopening: {e}"))?;
            sim.call(put(0, 1 << 30))?.map_err(|e| format!("after reopening and frees: {e}"))?;
        }
        Ok(())
    });
}

/// The same when the file system says that it is full.
#[test]
fn a_file_system_without_space_is_a_full_store_until_there_is_space() {
    for_seeds(10, |seed| {
        let mut sim = SimRun::new(quiet(seed));
        let tolerance = sim.oracle.tolerance();
        sim.oracle.tolerate(super::oracle::Tolerance { full: true, ..tolerance });
        sim.begin()?;
        sim.disk.inject(Fault {
            forever: true,
            errno: ENOSPC,
            ..Fault::once(OpKind::Allocate, Area::Any, 1)
        });
        let mut n = 0;
        let full = loop {
            n += 1;
            match sim.call(put(n, n))? {
                Ok(_) if n < 5_000 => {}
                answer => break answer.map_err(|error| error.kind()),
            }
        };
        if !matches!(full, Err(ErrorKind::Full)) {
            return Err(format!("page {n} of a full file system is answered with {full:?}"));
        }
        sim.disk.clear_faults();
        sim.disk.advance_to(sim.disk.now() + 10_000_000);
        if let Err(error) = sim.call(put(n, n))? {
            return Err(format!("with space again: {error}: {}", sim.cluster().describe()));
        }
        sim.reopen(Loss::Everything)
    });
}

/// A full disk must end the opening of a store with an error, not leave its owner waiting, and must
/// lose nothing.
#[test]
pub(super) fn a_full_disk_ends_an_opening_with_an_error() {
    let (mut refused, mut opened) = (0, 0);
    for_seeds(60, |seed| {
        let mut rng = Rng::new(seed);
        let mut options = workload::options(&mut rng);
        let geometry = &mut options.geometry;
        (geometry.extent_bytes, geometry.vshards_count) = (64 << 10, 8);
        (geometry.segment_bytes, geometry.segments_count) = (256 << 10, 6);
        (options.inline_pages_max, options.memory_bytes, options.coalesce_window_us) =
            (16, 4 << 20, 10_000);
        let profile = Profile { durable_percent: 100, in_flight: 16, ..Profile::random(&mut rng) };
        let plan = Plan { options: Some(options), profile: Some(profile), ..quiet(seed) };
        let mut sim = SimRun::new(plan);
        sim.begin()?;
        steps(&mut sim, 2_000)?;
        sim.crash(Loss::random(&mut rng))?;
        sim.disk.inject(Fault {
            forever: true,
            errno: ENOSPC,
            ..Fault::once(OpKind::Allocate, Area::Any, 0)
        });
        match sim.try_open()? {
            Ok(_) => opened += 1,
            Err(error) if error.kind() == ErrorKind::Full => refused += 1,
            Err(error) => {
                return Err(format!("a full disk is met with {:?}: {error}", error.kind()));
            }
        }
        sim.disk.clear_faults();
        sim.reopen(Loss::Nothing)
    });
    println!("{refused} refused, {opened} opened");
    assert!(refused > 0 && opened > 0, "{refused} refused, {opened} opened");
}

/// With more pages than there is room for, compaction never rests.
pub(super) fn full_store(seed: u64) -> Plan {
    let mut rng = Rng::new(seed);
    let options = workload::options(&mut rng);
    let shards = (1 + seed % 4).min(options.geometry.vshards_count.into()) as u16;
    let extents = rng.within(13, 15) * u64::from(shards);
    let options = Options { data_bytes_max: extents * options.geometry.extent_bytes, ..options };
    // More pages than there is room for over all shards: the store is full with any number of them.
    let blocks = extents * options.geometry.extent_bytes / BLOCK as u64;
    let universe = (0..blocks).map(|n| key((n % 8) * 512 + n / 8)).collect();
    let profile = Profile { universe, ..Profile::random(&mut rng) };
    Plan {
        options: Some(options),
        profile: Some(profile),
        shards: 1..=shards,
        strain_percent: 0,
        ..plan(seed)
    }
}

/// Random work with little space; the checks are those of all runs.
#[test]
fn crashes_of_full_stores_lose_nothing() {
    let total = super::tests::run_all("crashes_of_full_stores_lose_nothing", 25, full_store);
    if super::tests::many_seeds() {
        assert!(
            total.oracle.full > 100,
            "{} commits refused: it never was full",
            total.oracle.full
        );
        assert!(total.oracle.spread_full > 10, "no commit over shards was refused as full");
    }
}

/// Without reclaiming, a store that is only ever overwritten fills the disk.
#[test]
fn overwriting_a_store_ten_times_does_not_grow_it() {
    const PAGES: u64 = 600;
    for_seeds(4, |seed| {
        let mut sim = SimRun::new(quiet(seed));
        sim.begin()?;
        let mut rng = Rng::new(seed);
        let mut sizes = Vec::new();
        for round in 0..11 {
            for n in 0..PAGES {
                let n = if round == 0 { n } else { rng.below(PAGES) };
                sim.call(put(n, round * PAGES + n + 1))?.map_err(|error| error.to_string())?;
            }
            sim.call(Request::Checkpoint)?.map_err(|error| error.to_string())?;
            sizes.push(sim.stats_now()?.extents_total);
        }
        println!("seed {seed}: extents after each round {sizes:?}");
        if sizes[10] > sizes[1] + sizes[1] / 4 + 4 {
            return Err(format!("the store grew: {sizes:?}"));
        }
        sim.reopen(Loss::Everything)
    });
}

/// The same under load, when a checkpoint is nearly always in progress: reclaiming garbage must not
/// make as much new garbage.
#[test]
fn sustained_overwrites_keep_most_of_the_space_live() {
    const PAGES: u64 = 1_500;
    for_seeds(4, |seed| {
        let mut rng = Rng::new(seed);
        let mut profile = Profile::random(&mut rng);
        profile.universe = (0..PAGES).map(|n| key((n % 8) * 512 + n / 8)).collect();
        profile.weights.fill(0);
        profile.weights[workload::PrepareRequest::Put as usize] = 1;
        (profile.in_flight, profile.hot_percent) = (32, 0);
        let shards = 1 + (seed % 2) as u16;
        let mut options = workload::options(&mut rng);
        options.geometry.vshards_count = options.geometry.vshards_count.max(2);
        options.fill_percent = 70;
        let log_bytes = options.geometry.segment_bytes * u64::from(options.geometry.segments_count);
        let data_blocks = u64::from(data_blocks(options.geometry.extent_blocks()));
        let mut sim = SimRun::new(Plan {
            options: Some(options),
            profile: Some(profile),
            shards: shards..=shards,
            ..quiet(seed)
        });
        sim.begin()?;
        while sim.run_stats.requests < 20 * PAGES {
            steps(&mut sim, 1_000)?;
        }
        sim.publish_to_map()?;
        let stats = sim.stats_now()?;
        let blocks = stats.extents_total * data_blocks;
        println!("seed {seed}: {PAGES} pages in {} extents, {blocks} blocks", stats.extents_total);
        // 70 %, less the extents that each shard keeps in reserve, grows by at a time, and leaves
        // alone.
        let let_be = u64::from(shards) * log_bytes / BLOCK as u64;
        let reserved = u64::from(shards) * (8 + 8) * data_blocks;
        if (PAGES + reserved) * 100 < (blocks - let_be) * 60 {
            return Err(format!(
                "{PAGES} pages take {} extents, {blocks} blocks",
                stats.extents_total
            ));
        }
        sim.reopen(Loss::Everything)
    });
}

/// A store that is not used must cost nothing.
#[test]
fn an_idle_store_asks_for_no_turns() {
    for_seeds(30, |seed| {
        let mut sim = SimRun::new(quiet(seed));
        sim.begin()?;
        steps(&mut sim, 300)?;
        sim.publish_to_map()?;
        for _ in 0..2_000 {
            if sim.cluster().next_at().is_none() {
                return Ok(());
            }
            sim.pass()?;
        }
        Err(format!("it never comes to rest: {}", sim.cluster().describe()))
    });
}

/// A store that loses a little space with every crash is full some day, whatever is freed.
#[test]
fn crashes_do_not_leak_space() {
    const PAGES: u64 = 200;
    for_seeds(4, |seed| {
        let mut sim = SimRun::new(quiet(seed));
        sim.begin()?;
        let mut rng = Rng::new(seed);
        let mut tag = 0;
        let mut sizes = Vec::new();
        for round in 0..120 {
            for n in 0..40 {
                tag += 1;
                let n = if round == 0 { n * 5 } else { rng.below(PAGES) };
                sim.call(put(n, tag))?.map_err(|error| error.to_string())?;
            }
            sim.reopen(Loss::random(&mut rng))?;
            if round % 10 == 9 {
                for n in 0..3 * PAGES {
                    tag += 1;
                    sim.call(put(n % PAGES, tag))?.map_err(|error| error.to_string())?;
                }
                for _ in 0..2 {
                    sim.call(Request::Checkpoint)?.map_err(|error| error.to_string())?;
                }
                let stats = sim.stats_now()?;
                sizes.push((stats.extents_total, stats.extents_free, stats.blocks_live));
            }
        }
        println!(
            "seed {seed}: extents, free ones and live blocks after ten crashes each {sizes:?}"
        );
        // By the eighth crash every number of shards has been used, each shard with a reserve of
        // its own.
        let (eighth, last) = (sizes[7], sizes[11]);
        if last.2 > PAGES + 60 || last.0 > eighth.0 + eighth.0 / 4 {
            return Err(format!("space was lost: {sizes:?}"));
        }
        Ok(())
    });
}
