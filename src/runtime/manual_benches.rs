//! Benchmarks of the runtime that are run by hand: `cargo test --release --lib figures -- --ignored
//! --nocapture --test-threads 1`.
//!
//! They are not tests: they print figures, and assert only what would otherwise make these
//! meaningless.
#![allow(clippy::disallowed_methods, reason = "figures are times")]

use super::handle::Runtime;
use crate::base::options::{Driver, Options};
use crate::base::{PageId, PageKey, ShardId, VolumeId};
use crate::engine::{Change, Commit, Request, Response};
use futures_lite::future::{block_on, poll_once};
use smallvec::{SmallVec, smallvec};
use std::future::Future;
use std::time::{Duration, Instant};

fn key() -> PageKey {
    PageKey::new(VolumeId::new(1), PageId::new(7))
}

fn read() -> Request {
    Request::Read(smallvec![key()])
}

fn with_page(options: Options, figure: impl Fn(&Runtime, ShardId)) {
    let dir = tempfile::tempdir().expect("a directory");
    let options = Options { shards: Some(1), ..options };
    let runtime = block_on(super::start::start(
        dir.path().to_path_buf(),
        options,
        super::start::OpenMode::CreateIfMissing,
    ))
    .expect("it opens");
    let commit = Commit {
        reads: vec![],
        changes: vec![(key(), Change::Put(vec![7; 4096].into()))],
        durable: true,
    };
    let shard = runtime.handle().shard_map().shard_of(key());
    block_on(async { runtime.handle().submit_to(shard, Request::Commit(commit)).await?.await })
        .expect("it is durable");
    figure(&runtime, shard);
    block_on(async { runtime.handle().submit_to(ShardId::LEADER, Request::Close).await?.await })
        .expect("it closes");
    block_on(runtime.handle().ended());
}

fn spin_on<T>(future: impl Future<Output = T>) -> T {
    let mut future = std::pin::pin!(future);
    loop {
        if let Some(value) = block_on(poll_once(&mut future)) {
            return value;
        }
        std::hint::spin_loop();
    }
}

fn p50(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

/// If this fails, the figures that the documents give can't be measured again.
#[test]
fn each_measurement_works() {
    reads_from_a_foreign_thread(1000);
    reads_from_a_task(1000);
    idle_store(Duration::from_millis(1));
}

#[test]
#[ignore = "prints figures"]
fn figures_of_a_cached_read_from_a_foreign_thread() {
    reads_from_a_foreign_thread(1);
}

/// Makes `part` times fewer reads than a measurement needs.
fn reads_from_a_foreign_thread(part: usize) {
    for driver in [Driver::Ring, Driver::Portable] {
        for (name, poll, spins, pause, count) in [
            ("shard polls, caller polls", true, true, Duration::ZERO, 200_000),
            ("shard polls, caller parks", true, false, Duration::ZERO, 100_000),
            ("shard polls for a bounded time, caller parks", false, false, Duration::ZERO, 100_000),
            ("shard parked, caller polls", false, true, Duration::from_millis(1), 1000),
            ("shard parked, caller parks", false, false, Duration::from_millis(1), 1000),
        ] {
            let options = Options { driver, poll, ..Options::default() };
            with_page(options, |runtime, shard| {
                let times = (0..count / part).map(|_| {
                    std::thread::sleep(pause);
                    let start = Instant::now();
                    let asked = async { runtime.handle().submit_to(shard, read()).await?.await };
                    let reply = if spins { spin_on(asked) } else { block_on(asked) };
                    let time = start.elapsed();
                    assert!(matches!(reply, Ok(Response::Pages(pages)) if pages[0][0] == 7));
                    time
                });
                println!("{driver:?}, {name}: round trip P50 {:?}", p50(times.collect()));
            });
        }
    }
}

#[test]
#[ignore = "prints figures"]
fn figures_of_a_cached_read_from_a_task_on_the_shard() {
    reads_from_a_task(1);
}

fn reads_from_a_task(part: usize) {
    for driver in [Driver::Ring, Driver::Portable] {
        for depth in [1usize, 16, 64] {
            with_page(Options { driver, ..Options::default() }, |runtime, shard| {
                let calls = 2_000_000 / part;
                let task = runtime.handle().spawn_on(shard, move |local| async move {
                    let start = Instant::now();
                    for _ in 0..calls / depth {
                        let replies: SmallVec<[_; 64]> =
                            (0..depth).map(|_| local.call(read())).collect();
                        for reply in replies {
                            let reply = reply.await;
                            assert!(
                                matches!(reply, Ok(Response::Pages(pages)) if pages[0][0] == 7)
                            );
                        }
                    }
                    start.elapsed()
                });
                let time = block_on(task.expect("it starts")).expect("it ends");
                println!(
                    "{driver:?}, depth {depth}: {:.0} ns a call",
                    time.as_nanos() as f64 / calls as f64
                );
            });
        }
    }
}

#[test]
#[ignore = "prints figures"]
fn figures_of_an_idle_store() {
    idle_store(Duration::from_secs(5));
}

fn idle_store(time: Duration) {
    let ticks = || {
        let stat = std::fs::read_to_string("/proc/self/stat").expect("it is there");
        let fields: Vec<u64> =
            stat.split(' ').skip(13).take(2).map(|n| n.parse().expect("a number")).collect();
        fields.iter().sum::<u64>()
    };
    for driver in [Driver::Ring, Driver::Portable] {
        with_page(Options { driver, ..Options::default() }, |_, _| {
            std::thread::sleep(time / 5);
            let before = ticks();
            std::thread::sleep(time);
            // A tick is a hundredth of a second, so ticks per second are percent.
            let percent = (ticks() - before) as f64 / time.as_secs_f64();
            println!("{driver:?}, idle: {percent:.2} % of a core");
        });
    }
}
