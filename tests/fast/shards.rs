//! Several shards as callers meet them: what a commit over shards, a flush, and a changed number of
//! shards promise.
//!
//! If these fail, a store loses data with the next machine, transactions that each were right are
//! wrong together, or a flush covers only one core's writes.

use crate::common;
use bytes::Bytes;
use common::role::Run;
use corepage::{Durability, Error, ErrorKind, Geometry, Options, PageId, Store, Volume};
use futures_lite::future::block_on;
use std::path::Path;
use std::sync::Barrier;
use std::sync::atomic::{AtomicU64, Ordering};

const PAGE: usize = 4096;

fn small() -> Options {
    let geometry = Geometry {
        extent_bytes: 256 << 10,
        segment_bytes: 1 << 20,
        segments_count: 4,
        vshards_count: 16,
    };
    Options { geometry, memory_bytes: 32 << 20, txn_bytes_max: 256 << 10, ..Options::default() }
}

fn open(dir: &Path, run: Run) -> Store {
    block_on(Store::open(dir, run.with(small()))).expect("the store opens")
}

/// On each driver, with two shards or more.
fn each_way(test: impl Fn(Run, &Store, &Volume)) {
    for run in Run::all().into_iter().filter(|run| run.shards > 1) {
        let dir = tempfile::tempdir().expect("a directory");
        let store = open(dir.path(), run);
        let volume = block_on(store.create_volume("vol", 64 << 20)).expect("a volume");
        assert_eq!(store.shards_count(), usize::from(run.shards));
        test(run, &store, &volume);
    }
}

/// Pages of as many shards as there are: the first of each.
fn one_of_each(store: &Store, volume: &Volume) -> Vec<PageId> {
    let first =
        |shard| (0..).map(|run| id(run * 512)).find(|page| store.shard_of(volume, *page) == shard);
    (0..store.shards_count()).map(|shard| first(shard).expect("each shard has pages")).collect()
}

fn id(page: u64) -> PageId {
    PageId::new(page)
}

fn page(fill: u8) -> Bytes {
    vec![fill; PAGE].into()
}

fn fill(volume: &Volume, page: PageId) -> u8 {
    block_on(volume.read(page)).expect("the page is read")[7]
}

#[track_caller]
fn refusal<T>(result: Result<T, Error>) -> (ErrorKind, String) {
    match result {
        Ok(_) => panic!("an error was expected"),
        Err(error) => (error.kind(), error.to_string()),
    }
}

/// A machine with more cores, or fewer, must not cost anybody data; nor may a change of the driver.
#[test]
fn any_number_of_shards_finds_all_data_and_volumes() {
    let dir = tempfile::tempdir().expect("a directory");
    let text = |step: u64, i: u64| page((step * 50 + i + 1) as u8);
    let mut lsn = None;
    for step in 0..10u64 {
        let store = open(dir.path(), Run::of_step(step));
        for before in 0..step {
            let volume = block_on(store.volume(&format!("v{before}")))
                .expect("the catalog")
                .expect("the volume");
            assert_eq!(volume.bytes(), (before + 1) << 20);
            let ids: Vec<_> = (0..40).map(|i| id(i * 300)).collect();
            for (i, read) in (0..).zip(block_on(volume.read_many(&ids)).expect("the pages")) {
                let last = if i < step - before { step - 1 } else { before };
                let expected = if i == 39 { page(0) } else { text(last, i) };
                assert!(
                    read[..] == expected[..],
                    "page {i} of v{before} after step {step} begins {:?}",
                    &read[..4]
                );
            }
        }
        let created =
            block_on(store.create_volume(&format!("v{step}"), (step + 1) << 20)).expect("a volume");
        let pages = (0..40).map(|i| (id(i * 300), text(step, i))).collect();
        let now = block_on(created.write_many(pages)).expect("a commit");
        assert!(Some(now) > lsn, "LSN {now} after {lsn:?}");
        block_on(created.free(id(39 * 300))).expect("a free");
        for before in 0..step {
            let volume = block_on(store.volume(&format!("v{before}")))
                .expect("the catalog")
                .expect("the volume");
            let pages = (0..=step - before).map(|i| (id(i * 300), text(step, i))).collect();
            lsn = Some(block_on(volume.write_many(pages)).expect("a commit"));
        }
        lsn = lsn.max(Some(now));
        // Now closed, now dropped as in a crash.
        if step % 2 == 0 {
            block_on(store.close()).expect("a clean close");
        }
    }
}

/// A transaction that is refused by one shard must leave nothing in the others.
#[test]
fn a_conflict_in_one_shard_leaves_nothing_in_any() {
    each_way(|run, store, volume| {
        let pages = one_of_each(store, volume);
        block_on(volume.write_many(pages.iter().map(|p| (*p, page(1))).collect()))
            .expect("a commit");
        for loser in &pages {
            let mut txn = store.begin();
            for p in &pages {
                block_on(txn.read(volume, *p)).expect("a read");
                txn.write(volume, *p, page(9)).expect("its own volume");
            }
            block_on(volume.write(*loser, page(2))).expect("a commit");
            assert_eq!(refusal(block_on(txn.commit())).0, ErrorKind::Conflict, "{run:?}");
            for p in &pages {
                assert_eq!(fill(volume, *p), if p == loser { 2 } else { 1 }, "{run:?}");
            }
            // Nothing is held on to: the same goes through at once.
            let again = pages.iter().map(|p| (*p, page(1))).collect();
            block_on(volume.write_many(again)).expect("a commit after a conflict");
        }
        assert_eq!(
            block_on(store.stats()).expect("counters").conflicts,
            pages.len() as u64,
            "{run:?}"
        );
    });
}

/// Two doctors on call, on two shards, each of whom may leave if the other stays (write skew):
/// never both.
#[test]
fn write_skew_over_shards_does_not_happen() {
    const ROUNDS: u64 = 40;
    each_way(|run, store, volume| {
        let pages = one_of_each(store, volume);
        let (a, b) = (pages[0], pages[1]);
        let committed = AtomicU64::new(0);
        for round in 0..ROUNDS {
            block_on(volume.write_many(vec![(a, page(1)), (b, page(1))])).expect("a commit");
            let barrier = Barrier::new(2);
            std::thread::scope(|scope| {
                for leaves in [a, b] {
                    let (barrier, committed) = (&barrier, &committed);
                    scope.spawn(move || {
                        let mut txn = store.begin();
                        let on_call: u32 = [a, b]
                            .iter()
                            .map(|p| u32::from(block_on(txn.read(volume, *p)).expect("a read")[7]))
                            .sum();
                        barrier.wait();
                        if on_call < 2 {
                            return;
                        }
                        txn.write(volume, leaves, page(0)).expect("its own volume");
                        match block_on(txn.commit()) {
                            Ok(_) => drop(committed.fetch_add(1, Ordering::Relaxed)),
                            Err(e) => assert_eq!(e.kind(), ErrorKind::Conflict, "{e}"),
                        }
                    });
                }
            });
            assert!(fill(volume, a) + fill(volume, b) > 0, "{run:?}, round {round}: both left");
        }
        assert!((1..=ROUNDS).contains(&committed.into_inner()));
    });
}

/// Booking by "nobody has booked yet", looked up over pages of all shards that do not exist
/// (phantom): one only.
#[test]
fn phantoms_over_shards_do_not_happen() {
    const THREADS: usize = 3;
    each_way(|run, store, volume| {
        let shards = one_of_each(store, volume);
        for round in 1..20u64 {
            let seats: Vec<_> = shards.iter().map(|p| id(p.get() + round)).collect();
            let barrier = Barrier::new(THREADS);
            std::thread::scope(|scope| {
                for thread in 0..THREADS {
                    let (seats, barrier) = (&seats, &barrier);
                    scope.spawn(move || {
                        let mut txn = store.begin();
                        let free = seats
                            .iter()
                            .all(|p| block_on(txn.read(volume, *p)).expect("a read")[0] == 0);
                        barrier.wait();
                        if free {
                            txn.write(volume, seats[thread % seats.len()], page(1 + thread as u8))
                                .expect("its own");
                            let done = block_on(txn.commit());
                            assert!(done.is_ok() || refusal(done).0 == ErrorKind::Conflict);
                        }
                    });
                }
            });
            let booked = seats.iter().filter(|p| fill(volume, **p) > 0).count();
            assert!(booked <= 1, "{run:?}, round {round}: {booked} seats are booked");
        }
    });
}

/// Money moves between accounts on all shards, some threads look at all of them: the sum never
/// changes.
#[test]
fn transfers_over_shards_keep_the_sum() {
    const EACH: u8 = 100;
    let balance = |bytes: &[u8]| u64::from(bytes[0]);
    for run in Run::all().into_iter().filter(|run| run.shards > 1) {
        let dir = tempfile::tempdir().expect("a directory");
        let store = open(dir.path(), run);
        let volume = block_on(store.create_volume("vol", 64 << 20)).expect("a volume");
        let accounts: Vec<_> = (0..8).map(|i| id(i * 512)).collect();
        let total = accounts.len() as u64 * u64::from(EACH);
        block_on(volume.write_many(accounts.iter().map(|p| (*p, page(EACH))).collect()))
            .expect("a commit");
        let (moved, looked) = (AtomicU64::new(0), AtomicU64::new(0));
        std::thread::scope(|scope| {
            for thread in 0..3usize {
                let (store, volume, accounts, moved, looked) =
                    (&store, &volume, &accounts, &moved, &looked);
                scope.spawn(move || {
                    for n in 0..60usize {
                        let mut txn = store.begin();
                        let mut read = |p| balance(&block_on(txn.read(volume, p)).expect("a read"));
                        if n % 4 == 0 {
                            let sum: u64 = accounts.iter().map(|p| read(*p)).sum();
                            if block_on(txn.commit()).is_ok() {
                                assert_eq!(sum, total, "{run:?}");
                                looked.fetch_add(1, Ordering::Relaxed);
                            }
                            continue;
                        }
                        let (from, to) =
                            (accounts[(n * 3 + thread) % 8], accounts[(n * 5 + thread + 1) % 8]);
                        let (has, gets) = (read(from), read(to));
                        if from == to || has == 0 || gets == 255 {
                            continue;
                        }
                        txn.patch(volume, from, 0, vec![has as u8 - 1]).expect("its own volume");
                        txn.patch(volume, to, 0, vec![gets as u8 + 1]).expect("its own volume");
                        match block_on(txn.commit()) {
                            Ok(_) => drop(moved.fetch_add(1, Ordering::Relaxed)),
                            Err(e) => assert_eq!(e.kind(), ErrorKind::Conflict, "{e}"),
                        }
                    }
                });
            }
        });
        let sum = |volume: &Volume| -> u64 {
            accounts.iter().map(|p| balance(&block_on(volume.read(*p)).expect("a read"))).sum()
        };
        assert_eq!(sum(&volume), total, "{run:?}");
        assert!(moved.into_inner() > 10 && looked.into_inner() > 0, "{run:?}");
        drop((store, volume));
        let store = open(dir.path(), Run { shards: 3, ..run });
        assert_eq!(
            sum(&block_on(store.volume("vol")).expect("the catalog").expect("the volume")),
            total,
            "{run:?}"
        );
    }
}

/// A file system flushes once, on one connection: what was acknowledged anywhere before must be
/// durable then.
#[test]
fn a_flush_covers_what_was_acknowledged_on_any_shard() {
    for run in Run::all().into_iter().filter(|run| run.shards > 1) {
        let dir = tempfile::tempdir().expect("a directory");
        let store = open(dir.path(), run);
        let volume = block_on(store.create_volume("vol", 64 << 20)).expect("a volume");
        let pages = one_of_each(&store, &volume);
        std::thread::scope(|scope| {
            for (n, first) in pages.iter().enumerate() {
                let volume = &volume;
                scope.spawn(move || {
                    for i in 0..100 {
                        block_on(
                            volume.write_back(
                                id(first.get() + i % 20),
                                page((n as u64 * 50 + i) as u8),
                            ),
                        )
                        .expect("a write");
                    }
                });
            }
        });
        let both =
            pages.iter().map(|p| (id(p.get() + 30), corepage::Change::Put(page(7)))).collect();
        let last = block_on(volume.apply(both, Durability::Buffered)).expect("a commit");
        assert!(block_on(store.flush()).expect("a flush") >= last);
        drop((store, volume));
        let store = open(dir.path(), Run { shards: 1, ..run });
        let volume = block_on(store.volume("vol")).expect("the catalog").expect("the volume");
        assert!(store.recovery().recovered_lsn >= last && !store.recovery().clean);
        for (n, first) in pages.iter().enumerate() {
            for i in 80..100 {
                let expected = (n as u64 * 50 + i) as u8;
                assert_eq!(fill(&volume, id(first.get() + i % 20)), expected, "{run:?}, shard {n}");
            }
            assert_eq!(fill(&volume, id(first.get() + 30)), 7, "{run:?}, shard {n}");
        }
    }
}

/// Whoever asks for the impossible must read what is possible, and the store must be as before.
#[test]
fn impossible_shards_and_cores_are_refused_with_what_is_possible() {
    let small = || Options { memory_bytes: 128 << 20, ..small() };
    let dir = tempfile::tempdir().expect("a directory");
    let refused = |options: Options| refusal(block_on(Store::open(dir.path(), options)));
    let (kind, text) = refused(Options { shards: Some(17), ..small() });
    assert_eq!(kind, ErrorKind::Invalid);
    assert!(text.contains("17 shards") && text.contains("16 virtual shards"), "{text}");
    let store = open(dir.path(), Run { ring: false, shards: 16 });
    block_on(
        block_on(store.create_volume("vol", 64 << 20)).expect("a volume").write(id(1), page(3)),
    )
    .expect("a write");
    block_on(store.close()).expect("a clean close");
    // The store has its own number, whatever the options say.
    let geometry = Geometry { vshards_count: 256, ..small().geometry };
    let (kind, text) = refused(Options { shards: Some(17), geometry, ..small() });
    assert_eq!(kind, ErrorKind::Invalid);
    assert!(text.contains("17 shards") && text.contains("16 virtual shards"), "{text}");
    for shards in [0, 65] {
        let (kind, text) = refused(Options { shards: Some(shards), ..small() });
        assert!(kind == ErrorKind::Invalid && text.contains(&shards.to_string()), "{text}");
    }
    let (kind, text) = refused(Options { cores: Some(vec![4711]), ..small() });
    assert!(kind == ErrorKind::Invalid && text.contains("core 4711"), "{text}");
    let (kind, text) = refused(Options { cores: Some(vec![]), ..small() });
    assert!(kind == ErrorKind::Invalid && text.contains("empty"), "{text}");
    let store = open(dir.path(), Run { ring: false, shards: 2 });
    assert!(store.recovery().clean);
    assert_eq!(
        fill(&block_on(store.volume("vol")).expect("the catalog").expect("the volume"), id(1)),
        3
    );
}

/// A store that was made for one core must open, unasked, on a machine with more.
#[test]
fn a_store_with_few_virtual_shards_opens_on_any_machine_with_default_options() {
    for vshards_count in [1, 2] {
        let dir = tempfile::tempdir().expect("a directory");
        let geometry = Geometry { vshards_count, ..small().geometry };
        let store = block_on(Store::open(dir.path(), Options { geometry, ..small() }))
            .expect("the store opens");
        let volume = block_on(store.create_volume("vol", 1 << 20)).expect("a volume");
        block_on(volume.write(id(3), page(7))).expect("a durable write");
        drop((volume, store));
        let store = block_on(Store::open(dir.path(), Options::default())).expect("any core count");
        assert!(store.shards_count() <= vshards_count as usize);
        let volume = block_on(store.volume("vol")).expect("the catalog").expect("the volume");
        assert_eq!(fill(&volume, id(3)), 7);
        block_on(store.close()).expect("it closes");
        drop((volume, store));
        // Who names a number gets it, or is told why not; what is in the options of the geometry of
        // new stores is no reason.
        let named = |shards, vshards_count| {
            let geometry = Geometry { vshards_count, ..Geometry::default() };
            block_on(Store::open(
                dir.path(),
                Options { geometry, shards: Some(shards), ..Options::default() },
            ))
        };
        let (kind, why) = refusal(named(4, 256));
        assert_eq!(kind, ErrorKind::Invalid);
        assert!(
            why.contains(&format!("4 shards, but the store has {vshards_count} virtual")),
            "{why}"
        );
        drop(named(vshards_count as u16, 1).expect("the store has as many"));
    }
}
