//! Measurements, not tests: `cargo test --release --lib io::bench -- --ignored --nocapture
//! --test-threads=1`.
//!
//! Goal: ratios between drivers and between flush methods on this machine, in interleaved rounds.
//! Not a goal: absolute figures, which would need a quiet machine.
#![allow(clippy::disallowed_methods, reason = "time is what is measured")]

use super::tests::{DriverDisk, allocate, filled};
use super::uring::{UringDisk, UringOptions};
use super::*;
use crate::base::options::Driver;
use crate::memory::Arena;
use crate::testing::random::Rng;
use smallvec::smallvec;
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

/// How much is measured.
#[derive(Clone, Copy)]
struct Size {
    file_bytes: u64,
    round: Duration,
    rounds: usize,
}

const WHOLE: Size = Size { file_bytes: 512 << 20, round: Duration::from_millis(700), rounds: 5 };
/// Just enough to see that a measurement works.
const SMOKE: Size = Size { file_bytes: 8 << 20, round: Duration::from_millis(2), rounds: 1 };

fn log(shard: u16) -> FileId {
    FileId::Log(ShardId::new(shard), SegmentNo::new(0))
}

fn make(files: &Arc<Files>, driver: Driver) -> Box<dyn DriverDisk> {
    let portable = PortableOptions { workers_count: 16 };
    match driver {
        Driver::Ring => {
            Box::new(UringDisk::with_files(files.clone(), &UringOptions::default()).unwrap())
        }
        Driver::Portable => Box::new(PortableDisk::with_files(files.clone(), &portable).unwrap()),
        Driver::Auto => unreachable!("a measurement names its driver"),
    }
}

/// Keeps `depth` reads under way for a round. Returns reads per second.
fn reads(disk: &mut dyn Disk, arena: &mut Arena, depth: usize, rng: &mut Rng, size: Size) -> f64 {
    let mut done = Vec::new();
    let mut spare: Vec<_> = (0..depth).map(|_| arena.alloc(0).unwrap()).collect();
    let (mut count, mut flying) = (0u64, 0);
    let start = Instant::now();
    while start.elapsed() < size.round || flying > 0 {
        while start.elapsed() < size.round
            && let Some(frame) = spare.pop()
        {
            let offset = rng.below(size.file_bytes / 4096) * 4096;
            disk.submit(OpId(0), DiskOp::Read { file: log(0), offset, into: smallvec![frame] });
            flying += 1;
        }
        disk.push();
        disk.reap(&mut done);
        if done.is_empty() {
            disk.wait(None);
            disk.reap(&mut done);
        }
        for completion in done.drain(..) {
            completion.result.unwrap();
            let DiskOp::Read { into, .. } = completion.op else {
                panic!("a read comes back as one")
            };
            spare.extend(into);
            (count, flying) = (count + 1, flying - 1);
        }
    }
    count as f64 / start.elapsed().as_secs_f64()
}

/// Writes a block and flushes it, again and again, for a round. Returns the microseconds that each
/// took.
fn write_and_flush(disk: &mut dyn Disk, arena: &mut Arena, shard: u16, size: Size) -> Vec<f64> {
    let frame = filled(arena, 0, 1);
    let mut times = Vec::new();
    let start = Instant::now();
    // At least once, however busy the machine is.
    while times.is_empty() || start.elapsed() < size.round {
        let begun = Instant::now();
        let offset = (times.len() as u64 % 2048) * 4096;
        let from = smallvec![IoSlice::whole(frame.pin())];
        execute(disk, DiskOp::Write { file: log(shard), offset, from }).unwrap();
        execute(disk, DiskOp::Flush { files: smallvec![log(shard)] }).unwrap();
        times.push(begun.elapsed().as_nanos() as f64 / 1000.0);
    }
    times
}

fn quantile(values: &mut [f64], q: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    values[((values.len() - 1) as f64 * q) as usize]
}

fn store(page_cache: PageCache, size: Size) -> (tempfile::TempDir, Arc<Files>) {
    let dir = tempfile::tempdir().unwrap();
    let options = FileOptions { page_cache, ..FileOptions::default() };
    let files = Files::open(dir.path(), Access::ReadWrite, &options).unwrap();
    let mut disk = make(&files, Driver::Portable);
    allocate(disk.as_mut(), log(0), 0, size.file_bytes).unwrap();
    for shard in 1..4 {
        allocate(disk.as_mut(), log(shard), 0, 16 << 20).unwrap();
    }
    drop(disk);
    (dir, files)
}

/// Microseconds of processor time of this process so far, the kernel's part included.
fn processor_us() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    time.tv_sec as f64 * 1e6 + time.tv_nsec as f64 / 1e3
}

#[test]
#[ignore = "a measurement"]
fn ring_against_portable() {
    compare_all_drivers(WHOLE);
}

fn compare_all_drivers(size: Size) {
    // Reads from the page cache cost the device nothing, so they show what the drivers cost.
    for page_cache in [PageCache::Bypass, PageCache::Use] {
        compare_drivers(page_cache, size);
    }
}

fn compare_drivers(page_cache: PageCache, size: Size) {
    let (_dir, files) = store(page_cache, size);
    let mut arena = Arena::new(4096).unwrap();
    let mut rng = Rng::new(1);
    let drivers = [Driver::Ring, Driver::Portable];
    let mut disks = drivers.map(|driver| make(&files, driver));
    disks.iter_mut().for_each(|disk| disk.register(arena.mapping()));
    disks.iter().for_each(|disk| println!("{}", disk.report()));
    for depth in [1, 4, 16, 64, 256] {
        let (mut rates, mut costs) = ([vec![], vec![]], [vec![], vec![]]);
        for _ in 0..size.rounds {
            for (i, disk) in disks.iter_mut().enumerate() {
                let before = processor_us();
                let rate = reads(disk.as_mut(), &mut arena, depth, &mut rng, size);
                costs[i].push((processor_us() - before) / (rate * size.round.as_secs_f64()));
                rates[i].push(rate / 1000.0);
            }
        }
        let [ring, portable] = rates.map(|mut rates| quantile(&mut rates, 0.5));
        let [cost, portable_cost] = costs.map(|mut costs| quantile(&mut costs, 0.5));
        println!(
            "reads depth {depth:3}: ring {ring:6.1} k/s, {cost:5.2} us; portable {portable:6.1} \
             k/s, {portable_cost:5.2} us; ratio {:.2}",
            ring / portable
        );
    }
    let mut times = [vec![], vec![]];
    for _ in 0..size.rounds {
        for (disk, times) in disks.iter_mut().zip(&mut times) {
            times.extend(write_and_flush(disk.as_mut(), &mut arena, 1, size));
        }
    }
    for (driver, times) in drivers.iter().zip(&mut times) {
        let [p50, p99] = [0.5, 0.99].map(|q| quantile(times, q));
        println!("write 4 KiB + flush, {driver:?}: p50 {p50:.0} us, p99 {p99:.0} us");
    }
}

#[test]
#[ignore = "a measurement"]
fn one_flush_for_all_files_against_one_per_file() {
    compare_flushes(WHOLE);
}

fn compare_flushes(size: Size) {
    let (dir, files) = store(PageCache::Bypass, size);
    drop(files);
    for (driver, shards) in [(Driver::Ring, 1), (Driver::Ring, 2), (Driver::Ring, 3)] {
        let mut times = [vec![], vec![]];
        let mut counts = [vec![], vec![]];
        for round in 0..2 * size.rounds {
            let i = round % 2;
            let flush = [FlushChoice::Shared, FlushChoice::PerFile][i];
            let options = FileOptions { flush, ..FileOptions::default() };
            let files = Files::open(dir.path(), Access::ReadWrite, &options).unwrap();
            let both = at_a_time(&files, driver, shards, size);
            counts[i].push(both.len() as f64 / size.round.as_secs_f64() / 1000.0);
            times[i].extend(both);
        }
        for (i, name) in ["shared", "per file"].into_iter().enumerate() {
            let rate = quantile(&mut counts[i], 0.5);
            let [p50, p99] = [0.5, 0.99].map(|q| quantile(&mut times[i], q));
            println!(
                "{driver:?}, {shards} shards, {name}: {rate:.1} k/s, p50 {p50:.0} us, p99 \
                 {p99:.0} us"
            );
        }
    }
}

/// If this fails, the figures in the decisions can't be measured again.
#[test]
fn each_measurement_works() {
    compare_all_drivers(SMOKE);
    compare_flushes(SMOKE);
}

/// Several shards write and flush, each on its own thread. Returns the microseconds that each flush
/// took.
fn at_a_time(files: &Arc<Files>, driver: Driver, shards: u16, size: Size) -> Vec<f64> {
    let barrier = Barrier::new(shards.into());
    std::thread::scope(|scope| {
        let shard = |n| {
            let barrier = &barrier;
            move || {
                let mut disk = make(files, driver);
                let mut arena = Arena::new(64).unwrap();
                barrier.wait();
                write_and_flush(disk.as_mut(), &mut arena, n, size)
            }
        };
        let threads: Vec<_> = (1..=shards).map(|n| scope.spawn(shard(n))).collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    })
}
