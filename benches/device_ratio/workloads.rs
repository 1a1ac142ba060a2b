//! The five workloads.

use crate::clients::{BenchVolume, CallSite, Operation, Run};
use crate::reference::{Fio, bare_file, bare_latency, best, device_bytes, middle, processor_time};
use crate::report::{Measure, Row, Sample, Target};
use crate::{PAGE, Plan};
use corepage::{Options, PageId, Store};
use futures_lite::future::block_on;
use rustix::thread::{CpuSet, sched_setaffinity};
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;

fn open(plan: &Plan, name: &str, options: &Options) -> Store {
    block_on(Store::open(plan.dir.join(name), options.clone())).expect("the store opens")
}

fn one_shard(plan: &Plan, memory_bytes: u64) -> Options {
    Options { cores: Some(vec![plan.core]), memory_bytes, ..Options::default() }
}

fn all_cores(memory_bytes: u64) -> Options {
    Options { memory_bytes, ..Options::default() }
}

/// Closes the store, opens it again and checks every page.
fn verified(plan: &Plan, name: &str, options: &Options, bench: BenchVolume, whole: bool) {
    block_on(bench.store.close()).expect("the store closes");
    let bench = bench.again(open(plan, name, options));
    bench.verify(whole);
    block_on(bench.store.close()).expect("the store closes");
    std::fs::remove_dir_all(plan.dir.join(name)).expect("the store's files can be removed");
}

/// Far more pages than memory, at random, by tasks on the one shard; each page's checksum is
/// verified by the engine, its number here. The map is in memory.
pub fn cold_reads(plan: &Plan) -> Vec<Row> {
    let options = one_shard(plan, if plan.pages < 100_000 { 8 * MIB } else { 64 * MIB });
    let store = open(plan, "read", &options);
    println!("read: {}", store.report());
    let bench = BenchVolume::prefilled(store, plan.pages);
    block_on(bench.store.close()).expect("the store closes");
    let bench = bench.again(open(plan, "read", &options));
    for page in (0..plan.pages).step_by(16) {
        block_on(bench.volume.read(PageId::new(page))).expect("a page is read");
    }
    let fio = Fio::new(plan, plan.pages);
    let mut rows = Vec::new();
    for depth in [1, 16, 64, 256] {
        let (mut engine, mut reference) = (Vec::new(), Vec::new());
        let before = block_on(bench.store.stats()).expect("counters");
        for round in 0..plan.rounds as u64 {
            let run = Run {
                operation: Operation::Read,
                call_site: CallSite::Shards,
                in_flight: depth,
                time: plan.time,
                round,
            };
            engine.push(bench.run(run));
            reference.extend(fio.random("randread", depth));
        }
        let after = block_on(bench.store.stats()).expect("counters");
        let (reads, device) =
            (after.page_reads - before.page_reads, after.device_reads - before.device_reads);
        rows.push(Row {
            what: format!("cold random 4 KiB reads, depth {depth}, 1 shard"),
            engine,
            reference,
            measure: Measure::Rate,
            target: Target::RatioMin(0.85),
            note: format!("{:.3} device reads a page; fio", device as f64 / reads.max(1) as f64),
        });
    }
    verified(plan, "read", &options, bench, true);
    rows
}

/// Small durable commits, many in flight.
pub fn commits(plan: &Plan) -> Vec<Row> {
    let mut rows = Vec::new();
    rows.extend(commits_on(plan, "1 shard", &one_shard(plan, 256 * MIB)));
    if plan.shards > 1 {
        rows.extend(commits_on(plan, &format!("{} shards", plan.shards), &all_cores(256 * MIB)));
    }
    rows
}

fn commits_on(plan: &Plan, shards: &str, options: &Options) -> Vec<Row> {
    let bench = BenchVolume::prefilled(open(plan, "commit", options), plan.hot_pages);
    let places = [
        ("tasks on shards", CallSite::Shards),
        ("1 thread", CallSite::Threads(1)),
        ("2 threads", CallSite::Threads(2)),
    ];
    let mut samples: Vec<Vec<Sample>> = vec![Vec::new(); places.len()];
    let before = block_on(bench.store.stats()).expect("counters");
    // The first round warms the log.
    for round in 0..=plan.rounds as u64 {
        for ((_, at), samples) in places.iter().zip(&mut samples) {
            let run = Run {
                operation: Operation::Patch,
                call_site: *at,
                in_flight: 1024,
                time: plan.time,
                round: round + 1,
            };
            let sample = bench.run(run);
            samples.extend((round > 0).then_some(sample));
        }
    }
    let after = block_on(bench.store.stats()).expect("counters");
    let per = |n: u64| n as f64 / (after.commits - before.commits).max(1) as f64;
    let note = format!(
        "{:.0} commits a flush; {:.2} pages written, {:.0} log bytes a commit",
        1.0 / per(after.log_flushes - before.log_flushes),
        per(after.pages_written - before.pages_written),
        per(after.log_bytes - before.log_bytes)
    );
    verified(plan, "commit", options, bench, false);
    let row = |((name, at), engine): (&(&str, CallSite), Vec<Sample>)| Row {
        what: format!("durable 128 B patches, 1024 on {shards}, {name}"),
        engine,
        reference: Vec::new(),
        measure: Measure::Rate,
        target: if *at == CallSite::Threads(2) { Target::Nothing } else { Target::Min(200.0) },
        note: if *at == CallSite::Shards { note.clone() } else { String::new() },
    };
    places.iter().zip(samples).map(row).collect()
}

/// One client, one commit after another.
pub fn latency(plan: &Plan) -> Vec<Row> {
    let options = one_shard(plan, 64 * MIB);
    let bench = BenchVolume::prefilled(open(plan, "latency", &options), 1024);
    let file = bare_file(&plan.dir.join("bare"));
    let bare = || {
        // On the core that the shard has.
        let (file, core, commits) =
            (file.try_clone().expect("a descriptor"), plan.core, plan.commits);
        let thread = std::thread::spawn(move || {
            let mut cores = CpuSet::new();
            cores.set(core);
            let _ = sched_setaffinity(None, &cores);
            bare_latency(&file, commits)
        });
        thread.join().expect("no panic")
    };
    let (mut engine, mut reference) = (Vec::new(), Vec::new());
    for round in 0..=plan.rounds as u64 {
        // As long as the bare loop takes, about.
        let theirs = if plan.alone { Sample::default() } else { bare() };
        let time = Duration::from_micros(plan.commits as u64 * 100);
        let run = Run {
            operation: Operation::Patch,
            call_site: CallSite::Shards,
            in_flight: 1,
            time,
            round: round + 1,
        };
        let ours = bench.run(run);
        if round > 0 {
            engine.push(ours);
            reference.extend((!plan.alone).then_some(theirs));
        }
    }
    let note = format!("reference's P99 {:.0} us", middle(&reference, |sample| sample.p99_us));
    verified(plan, "latency", &options, bench, false);
    vec![Row {
        what: "durable 128 B patch, 1 client on the shard".into(),
        engine,
        reference,
        measure: Measure::P50,
        target: Target::RatioMax(1.3),
        note,
    }]
}

/// Whole pages at random, each a durable commit, over a space in which everything has been written
/// before.
pub fn overwrites(plan: &Plan) -> Vec<Row> {
    [70, 50, 30].into_iter().map(|fill_percent| overwrites_at(plan, fill_percent)).collect()
}

fn overwrites_at(plan: &Plan, fill_percent: u32) -> Row {
    let options = Options { fill_percent, ..all_cores(256 * MIB) };
    let bench = BenchVolume::prefilled(open(plan, "overwrite", &options), plan.pages / 2);
    let fio = Fio::new(plan, plan.pages);
    let in_flight = if plan.pages < 100_000 { 256 } else { 2048 };
    let run = Run {
        operation: Operation::Put,
        call_site: CallSite::Shards,
        in_flight,
        time: plan.warm,
        round: 1,
    };
    let warm = bench.run(run);
    let warmed = warm.rate * plan.warm.as_secs_f64() / bench.pages() as f64;
    let (mut engine, mut reference) = (Vec::new(), Vec::new());
    let (mut bytes, mut read, mut commits) = (0, 0, 0.0);
    let before = block_on(bench.store.stats()).expect("counters");
    for round in 0..plan.rounds as u64 {
        let (moved, begun) = (device_bytes(), Instant::now());
        let ours = bench.run(Run { time: 2 * plan.time, round: round + 2, ..run });
        commits += ours.rate * begun.elapsed().as_secs_f64();
        let now = device_bytes();
        (read, bytes) = (read + now.0 - moved.0, bytes + now.1 - moved.1);
        engine.push(ours);
        reference.extend(best(
            [64, 128, 256].into_iter().filter_map(|depth| fio.random("randwrite", depth)),
        ));
    }
    let after = block_on(bench.store.stats()).expect("counters");
    let note = format!(
        "{:.2} bytes written a byte (log {:.2}, moved {:.2}, map {:.2}), {:.2} read; written over \
         {:.1} times before and {:.1} times then; {} checkpoints, {:.0} commits a flush, {:.0} % \
         of {} MiB live; fio's best",
        bytes as f64 / (commits * PAGE as f64),
        (after.log_bytes - before.log_bytes) as f64 / (commits * PAGE as f64),
        (after.pages_moved - before.pages_moved) as f64 / commits,
        (after.nodes_written - before.nodes_written) as f64 / commits,
        read as f64 / (commits * PAGE as f64),
        warmed,
        commits / bench.pages() as f64,
        after.checkpoints - before.checkpoints,
        (after.commits - before.commits) as f64
            / (after.log_flushes - before.log_flushes).max(1) as f64,
        bench.pages() as f64 * PAGE as f64 * 100.0
            / (after.extents_total * options.geometry.extent_bytes).max(1) as f64,
        after.extents_total * options.geometry.extent_bytes / MIB,
    );
    verified(plan, "overwrite", &options, bench, true);
    Row {
        what: format!(
            "durable 4 KiB overwrites, {in_flight} on {} shards, fill {fill_percent} %",
            plan.shards
        ),
        engine,
        reference,
        measure: Measure::Rate,
        target: Target::RatioMin(1.5),
        note,
    }
}

/// Nothing happens.
pub fn idle(plan: &Plan) -> Vec<Row> {
    let options = all_cores(256 * MIB);
    let bench = BenchVolume::prefilled(open(plan, "idle", &options), 1024);
    std::thread::sleep(Duration::from_millis(300));
    let (start, cpu) = (Instant::now(), processor_time());
    std::thread::sleep(plan.idle);
    let used = (processor_time() - cpu).as_secs_f64() / start.elapsed().as_secs_f64() * 100.0;
    verified(plan, "idle", &options, bench, true);
    vec![Row {
        what: format!("processor time of an idle store, {} shards", plan.shards),
        engine: vec![Sample { rate: used, ..Sample::default() }],
        reference: Vec::new(),
        measure: Measure::Percent,
        target: Target::Below(0.5),
        note: String::new(),
    }]
}
