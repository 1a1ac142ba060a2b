//! What an opening takes from its process is given back when the store is closed, refused or lost:
//! descriptors, threads, mappings, memory.
//!
//! A program of one test, since the whole process is counted.
#![allow(clippy::disallowed_methods, missing_docs)]

mod common;

use corepage::{ErrorKind, Geometry, Options, PageId, Store};
use futures_lite::future::block_on;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Openings of each kind but one: a thousand in all.
const ROUNDS: usize = 330;
/// Openings of a store that is in use, all at once, since each waits for two seconds: its owner may
/// be about to end.
const HELD: usize = 8;
/// Openings before anything is counted: allocators and statics take what they keep.
const WARM: usize = 10;
/// The allocator keeps some of what it was given, no matter how many rounds there are.
const MEMORY_MARGIN: u64 = 8 << 20;
/// Mappings come and go with the arenas of the allocator, a few for each thread that ever was.
const MAPPINGS_MARGIN: usize = 16;

#[derive(Debug)]
struct Taken {
    descriptors: usize,
    threads: usize,
    mappings: usize,
    resident: u64,
}

fn taken() -> Taken {
    let count = |dir: &str| std::fs::read_dir(dir).expect("/proc is there").count();
    let text = |file: &str| std::fs::read_to_string(file).expect("/proc is there");
    let pages: u64 = text("/proc/self/statm")
        .split(' ')
        .nth(1)
        .and_then(|n| n.parse().ok())
        .expect("a number of pages");
    Taken {
        descriptors: count("/proc/self/fd"),
        threads: count("/proc/self/task"),
        mappings: text("/proc/self/maps").lines().count(),
        resident: pages * 4096,
    }
}

fn options() -> Options {
    let geometry = Geometry {
        extent_bytes: 256 << 10,
        segment_bytes: 1 << 20,
        segments_count: 4,
        vshards_count: 8,
    };
    Options { geometry, memory_bytes: 8 << 20, shards: Some(2), ..Options::default() }
}

/// Opened, used, closed or just dropped.
fn clean(dir: &Path, closes: bool) {
    block_on(async {
        let store = Store::open(dir, options()).await.expect("the store opens");
        let volume =
            store.volume("v").await.expect("it is looked up").expect("its volume is there");
        volume.write_back(PageId::new(3), vec![1; 4096]).await.expect("a page is written");
        if closes {
            store.close().await.expect("the store closes");
        }
    });
}

fn refused(dir: &Path, options: Options, kind: ErrorKind) {
    let error = block_on(Store::open(dir, options)).expect_err("the opening is refused");
    assert_eq!(error.kind(), kind, "{error}");
}

/// If this fails, a program that opens and closes stores (one for each tenant, tests, tools) runs
/// out of descriptors, threads or memory after some hundred openings.
#[test]
fn a_thousand_openings_leave_nothing_behind() {
    let (dir, held, damaged) =
        (common::scratch("leaks"), common::scratch("leaks-held"), common::scratch("leaks-damaged"));
    for dir in [&dir, &held, &damaged] {
        block_on(async {
            let store = Store::open(dir.path(), options()).await.expect("a new store");
            store.create_volume("v", 1 << 20).await.expect("a new volume");
            store.close().await.expect("the store closes");
        });
    }
    let meta = std::fs::File::options()
        .write(true)
        .open(damaged.path().join("meta"))
        .expect("the meta file is there");
    meta.write_all_at(&vec![7; 64 << 10], 0).expect("the superblocks are overwritten");
    drop(meta);
    let holder =
        block_on(Store::open(held.path(), options())).expect("the store that is held opens");
    let round = |n: usize| {
        clean(dir.path(), n.is_multiple_of(2));
        refused(damaged.path(), options(), ErrorKind::Corrupt);
        refused(dir.path(), Options { shards: Some(65), ..options() }, ErrorKind::Invalid);
    };
    let refused_as_held = || {
        std::thread::scope(|scope| {
            for _ in 0..HELD {
                scope.spawn(|| refused(held.path(), options(), ErrorKind::InUse));
            }
        });
    };
    (0..WARM).for_each(round);
    refused_as_held();
    let before = taken();
    (0..ROUNDS).for_each(round);
    refused_as_held();
    // A thread that has been joined is gone from /proc a moment later.
    let settled = (0..50).map(|_| taken()).find(|now| {
        let is_settled = now.threads <= before.threads;
        if !is_settled {
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
        is_settled
    });
    let after = settled.unwrap_or_else(taken);
    println!("before {before:?}, after {after:?}");
    assert_eq!(
        after.descriptors,
        before.descriptors,
        "descriptors, after {} openings",
        3 * ROUNDS + HELD
    );
    assert!(
        after.threads <= before.threads,
        "{before:?}, {after:?}: threads, after {} openings",
        3 * ROUNDS + HELD
    );
    assert!(after.mappings <= before.mappings + MAPPINGS_MARGIN, "mappings: {before:?}, {after:?}");
    assert!(after.resident <= before.resident + MEMORY_MARGIN, "memory: {before:?}, {after:?}");
    drop(holder);
}
