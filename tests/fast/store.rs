//! The handles as callers meet them: what a library user is promised, on a real directory with real
//! threads.
//!
//! If these fail, callers lose acknowledged data, see a part of a commit, hang, or share a store
//! with somebody.

use crate::common;
use bytes::Bytes;
use common::role::Run;
use corepage::{Change, Durability, Error, ErrorKind, Geometry, Options, PageId, Store, Volume};
use futures_lite::future::{block_on, poll_once, zip};
use std::cell::Cell;
use std::path::Path;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};

const PAGE: usize = 4096;

/// Small enough that a new store takes milliseconds.
fn small() -> Options {
    let geometry = Geometry {
        extent_bytes: 256 << 10,
        segment_bytes: 1 << 20,
        segments_count: 4,
        vshards_count: 16,
    };
    RUN.get().with(Options {
        geometry,
        memory_bytes: 32 << 20,
        txn_bytes_max: 256 << 10,
        ..Options::default()
    })
}

thread_local! {
    /// How the stores of the test that runs on this thread are run.
    static RUN: Cell<Run> = const { Cell::new(Run { ring: false, shards: 1 }) };
}

/// What holds on the ring driver and on the portable one, with 1, 2 and 4 shards.
fn each_way(test: impl Fn()) {
    for run in Run::all() {
        RUN.set(run);
        eprintln!("{run:?}");
        test();
    }
}

fn open(dir: &Path) -> Store {
    block_on(Store::open(dir, small())).expect("the store opens")
}

fn create(dir: &Path) -> (Store, Volume) {
    let store = open(dir);
    let volume = block_on(store.create_volume("vol", 64 << 20)).expect("a volume");
    (store, volume)
}

fn find(store: &Store) -> Volume {
    block_on(store.volume("vol")).expect("the catalog is read").expect("the volume is there")
}

fn id(page: u64) -> PageId {
    PageId::new(page)
}

fn page(fill: u8) -> Vec<u8> {
    vec![fill; PAGE]
}

#[track_caller]
fn kind<T>(result: Result<T, Error>) -> ErrorKind {
    match result {
        Ok(_) => panic!("an error was expected"),
        Err(error) => error.kind(),
    }
}

#[track_caller]
fn assert_filled(volume: &Volume, page: u64, fill: u8) {
    let read = block_on(volume.read(id(page))).expect("the page is read");
    assert!(
        read.iter().all(|byte| *byte == fill),
        "page {page} begins {:?}, not {fill}",
        &read[..8]
    );
}

/// The first thing anyone needs: data outlives the process, whether it closed the store or not.
#[test]
fn reopening_finds_what_was_acknowledged() {
    each_way(|| {
        for close in [true, false] {
            let dir = tempfile::tempdir().unwrap();
            let (store, volume) = create(dir.path());
            assert!(store.recovery().created);
            let first = block_on(volume.write(id(3), page(1))).unwrap();
            let second = block_on(volume.patch(id(3), 10, &b"abc"[..])).unwrap();
            assert!(second > first);
            block_on(
                volume
                    .write_many(vec![(id(70_000), page(2).into()), (id(1 << 40), page(3).into())]),
            )
            .unwrap();
            block_on(volume.write(id(4), page(4))).unwrap();
            block_on(volume.free(id(4))).unwrap();
            if close {
                block_on(store.close()).unwrap();
            }
            drop((store, volume));
            let store = open(dir.path());
            assert_eq!((store.recovery().created, store.recovery().clean), (false, close));
            let volume = find(&store);
            assert_eq!((volume.bytes(), volume.id().get()), (64 << 20, 1));
            let read = block_on(volume.read(id(3))).unwrap();
            assert_eq!(
                (&read[..10], &read[10..13], &read[13..]),
                (&page(1)[..10], &b"abc"[..], &page(1)[13..])
            );
            assert_eq!(read.lsn(), second);
            let pages =
                block_on(volume.read_many(&[id(70_000), id(1 << 40), id(4), id(5)])).unwrap();
            assert_eq!(pages.iter().map(|p| p[PAGE - 1]).collect::<Vec<_>>(), [2, 3, 0, 0]);
            assert!(pages[2].is_absent() && pages[3].is_absent());
        }
    });
}

/// A flush is the promise on which file systems and databases build; a drop without it is a crash.
#[test]
fn a_flush_makes_buffered_writes_durable() {
    each_way(|| {
        let dir = tempfile::tempdir().unwrap();
        let (store, volume) = create(dir.path());
        let mut last = None;
        for i in 0..300 {
            last = Some(block_on(volume.write_back(id(i % 100), page(i as u8))).unwrap());
        }
        assert_filled(&volume, 99, 43);
        let flushed = block_on(store.flush()).unwrap();
        assert!(Some(flushed) >= last);
        block_on(store.wait_durable(flushed)).unwrap();
        // Not flushed: it may be lost, but nothing before it.
        block_on(volume.write_back(id(0), page(255))).unwrap();
        drop((store, volume));
        let store = open(dir.path());
        let volume = find(&store);
        for i in 1..100 {
            assert_filled(&volume, i, (200 + i) as u8);
        }
        assert!([200, 255].contains(&block_on(volume.read(id(0))).unwrap()[0]));
    });
}

/// Two transactions that read the same page and change it: without this, one of two payments is
/// lost.
#[test]
fn a_transaction_whose_reads_changed_is_refused() {
    each_way(|| {
        let dir = tempfile::tempdir().unwrap();
        let (store, volume) = create(dir.path());
        block_on(volume.write(id(1), page(1))).unwrap();
        let mut slow = store.begin();
        assert_eq!(block_on(slow.read(&volume, id(1))).unwrap()[0], 1);
        assert_eq!(block_on(slow.read(&volume, id(9))).unwrap()[0], 0);
        slow.write(&volume, id(2), page(7)).unwrap();
        let mut absent = store.begin();
        block_on(absent.read(&volume, id(9))).unwrap();
        let mut unharmed = store.begin();
        block_on(unharmed.read(&volume, id(500))).unwrap();
        block_on(volume.patch(id(1), 0, &[2][..])).unwrap();
        assert_eq!(
            block_on(slow.read(&volume, id(1))).unwrap()[0],
            1,
            "what it sees does not change under it"
        );
        assert_eq!(kind(block_on(slow.commit())), ErrorKind::Conflict);
        assert_filled(&volume, 2, 0);
        block_on(volume.write(id(9), page(3))).unwrap();
        assert_eq!(kind(block_on(absent.commit())), ErrorKind::Conflict, "absence is a read, too");
        block_on(unharmed.commit()).unwrap();
    });
}

/// A transaction that does not see its own writes computes with old values.
#[test]
fn a_transaction_sees_its_own_changes_and_nobody_else_does_before_commit() {
    each_way(|| {
        let dir = tempfile::tempdir().unwrap();
        let (store, volume) = create(dir.path());
        block_on(volume.write(id(1), page(1))).unwrap();
        let mut txn = store.begin();
        txn.patch(&volume, id(1), 4095, &[9][..]).unwrap();
        txn.write(&volume, id(2), page(2)).unwrap();
        txn.patch(&volume, id(2), 0, &[8][..]).unwrap();
        txn.free(&volume, id(3)).unwrap();
        txn.patch(&volume, id(3), 1, &[7][..]).unwrap();
        let mut expected = [page(1), page(2), page(0)];
        (expected[0][4095], expected[1][0], expected[2][1]) = (9, 8, 7);
        for (i, bytes) in expected.iter().enumerate() {
            assert_eq!(&block_on(txn.read(&volume, id(i as u64 + 1))).unwrap()[..], &bytes[..]);
        }
        assert_filled(&volume, 1, 1);
        assert_filled(&volume, 2, 0);
        let lsn = block_on(txn.commit()).unwrap();
        for (i, bytes) in expected.iter().enumerate() {
            let read = block_on(volume.read(id(i as u64 + 1))).unwrap();
            assert_eq!((&read[..], read.lsn()), (&bytes[..], lsn));
        }
    });
}

/// Concurrent increments: each that was acknowledged counts once, over conflicts, on many threads
/// and handles.
#[test]
fn no_increment_is_lost_among_many_threads() {
    each_way(|| {
        const THREADS: u64 = 8;
        const EACH: u64 = 25;
        let dir = tempfile::tempdir().unwrap();
        let (store, volume) = create(dir.path());
        let conflicts = AtomicU64::new(0);
        let add = |thread: u64| {
            let own = id(1000 + thread);
            for _ in 0..EACH {
                loop {
                    let mut txn = store.begin();
                    let sum = u64::from_le_bytes(
                        block_on(txn.read(&volume, id(0))).unwrap()[..8].try_into().unwrap(),
                    ) + 1;
                    txn.patch(&volume, id(0), 0, sum.to_le_bytes().to_vec()).unwrap();
                    let mine = block_on(txn.read(&volume, own)).unwrap()[0] + 1;
                    txn.patch(&volume, own, 0, vec![mine]).unwrap();
                    match block_on(txn.commit()) {
                        Ok(_) => break,
                        Err(error) if error.kind() == ErrorKind::Conflict => {
                            conflicts.fetch_add(1, Ordering::Relaxed)
                        }
                        Err(error) => panic!("{error}"),
                    };
                }
            }
        };
        std::thread::scope(|scope| {
            (0..THREADS).for_each(|thread| drop(scope.spawn(move || add(thread))))
        });
        let count = |volume: &Volume, page| {
            u64::from_le_bytes(block_on(volume.read(id(page))).unwrap()[..8].try_into().unwrap())
        };
        assert_eq!(count(&volume, 0), THREADS * EACH);
        assert_eq!(block_on(store.stats()).unwrap().conflicts, conflicts.into_inner());
        drop((store, volume));
        let store = open(dir.path());
        let volume = find(&store);
        assert_eq!(count(&volume, 0), THREADS * EACH);
        (0..THREADS).for_each(|thread| assert_eq!(count(&volume, 1000 + thread), EACH));
    });
}

/// A commit is whole or absent, also for readers that race it: all pages of one carry the same LSN
/// and fill.
#[test]
fn commits_of_many_pages_are_atomic() {
    each_way(|| {
        let dir = tempfile::tempdir().unwrap();
        let (store, volume) = create(dir.path());
        std::thread::scope(|scope| {
            for writer in 0..3u8 {
                let volume = &volume;
                scope.spawn(move || {
                    for round in 0..20 {
                        let fill = writer * 50 + round + 1;
                        let pages =
                            (0..20).map(|i| (id(i * 777), Bytes::from(page(fill)))).collect();
                        block_on(volume.write_many(pages)).unwrap();
                    }
                });
            }
            for _ in 0..200 {
                let mut txn = store.begin();
                let seen: Vec<u8> = (0..20)
                    .map(|i| block_on(txn.read(&volume, id(i * 777))).unwrap()[i as usize])
                    .collect();
                if block_on(txn.commit()).is_ok() {
                    assert!(seen.iter().all(|fill| *fill == seen[0]), "{seen:?}");
                }
            }
        });
    });
}

/// Callers give up; what they submitted stands, others are not disturbed, and nothing leaks until
/// all is used up.
#[test]
fn dropped_futures_undo_nothing_and_leak_nothing() {
    each_way(|| {
        let dir = tempfile::tempdir().unwrap();
        let store =
            block_on(Store::open(dir.path(), Options { requests_max: 8, ..small() })).unwrap();
        let volume = block_on(store.create_volume("vol", 64 << 20)).unwrap();
        for round in 0..200u64 {
            // Never polled: nothing was submitted.
            drop(volume.write(id(1), page(99)));
            let mut write = pin!(volume.write(id(2), page(round as u8)));
            let _ = block_on(poll_once(&mut write));
            let mut read = pin!(volume.read(id(2)));
            let _ = block_on(poll_once(&mut read));
        }
        block_on(store.flush()).unwrap();
        assert_filled(&volume, 1, 0);
        let read = block_on(volume.read(id(2))).unwrap();
        assert!(read.iter().all(|byte| *byte == read[0]) && !read.is_absent());
    });
}

/// More callers than places: they wait and are served; beyond the bound they hear `Busy`, and
/// nobody hangs.
#[test]
fn overload_is_back_pressure_then_busy() {
    each_way(|| {
        let dir = tempfile::tempdir().unwrap();
        let store =
            block_on(Store::open(dir.path(), Options { requests_max: 2, ..small() })).unwrap();
        let volume = block_on(store.create_volume("vol", 64 << 20)).unwrap();
        let outcomes: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..64u64)
                .map(|i| {
                    let volume = &volume;
                    scope.spawn(move || block_on(volume.write(id(i), page(i as u8 + 1))))
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        for (i, outcome) in outcomes.iter().enumerate() {
            match outcome {
                Ok(_) => assert_filled(&volume, i as u64, i as u8 + 1),
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
                    assert_filled(&volume, i as u64, 0);
                }
            }
        }
        assert!(outcomes.iter().filter(|outcome| outcome.is_ok()).count() >= 10);
        block_on(store.close()).unwrap();
    });
}

/// Two processes over one store would destroy it.
#[test]
fn a_store_is_open_once() {
    each_way(|| {
        let dir = tempfile::tempdir().unwrap();
        let (store, _volume) = create(dir.path());
        let second = block_on(Store::open(dir.path(), small()));
        assert_eq!(kind(second), ErrorKind::InUse);
        block_on(store.close()).unwrap();
        // Closed, though handles are left: the files are free at once.
        let again = open(dir.path());
        assert_eq!(kind(block_on(store.flush())), ErrorKind::Closed);
        block_on(again.close()).unwrap();
    });
}

/// Giving up on opening must not leave the store open and locked.
#[test]
fn an_open_that_is_dropped_lets_go() {
    each_way(|| {
        let dir = tempfile::tempdir().unwrap();
        drop(create(dir.path()));
        for _ in 0..10 {
            let mut opening = pin!(Store::open(dir.path(), small()));
            let _ = block_on(poll_once(&mut opening));
        }
        let mut tries = 0;
        let store = loop {
            match block_on(Store::open(dir.path(), small())) {
                Ok(store) => break store,
                Err(error) => assert_eq!(error.kind(), ErrorKind::InUse, "{error}"),
            }
            tries += 1;
            assert!(tries < 1000, "the store stays locked");
            #[allow(
                clippy::disallowed_methods,
                reason = "the end of another thread is waited for"
            )]
            std::thread::sleep(std::time::Duration::from_millis(10));
        };
        find(&store);
    });
}

/// After `close` every handle says so; none hangs. Pages that callers hold stay readable.
#[test]
fn a_closed_store_refuses_and_held_pages_stay() {
    each_way(|| {
        let dir = tempfile::tempdir().unwrap();
        let (store, volume) = create(dir.path());
        block_on(volume.write(id(1), page(5))).unwrap();
        let held = block_on(volume.read(id(1))).unwrap();
        let racing: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4u64)
                .map(|i| {
                    let volume = &volume;
                    scope.spawn(move || {
                        (0..50).map(|_| block_on(volume.write(id(i), page(5)))).collect::<Vec<_>>()
                    })
                })
                .collect();
            block_on(store.close()).unwrap();
            threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
        });
        assert!(
            racing.iter().filter_map(|r| r.as_ref().err()).all(|e| e.kind() == ErrorKind::Closed)
        );
        assert_eq!(kind(block_on(volume.read(id(1)))), ErrorKind::Closed);
        assert_eq!(kind(block_on(store.close())), ErrorKind::Closed);
        drop((store, volume));
        assert!(held.iter().all(|byte| *byte == 5));
    });
}

/// Volumes are separate spaces with unique names, whoever creates them at the same time.
#[test]
fn volumes_are_separate_and_named_once() {
    each_way(|| {
        let dir = tempfile::tempdir().unwrap();
        let (store, volume) = create(dir.path());
        let other = block_on(store.create_volume("other", 8192)).unwrap();
        block_on(volume.write(id(1), page(1))).unwrap();
        block_on(other.write(id(1), page(2))).unwrap();
        assert_filled(&volume, 1, 1);
        let long = "x".repeat(256);
        assert_eq!(kind(block_on(store.create_volume("vol", 4096))), ErrorKind::AlreadyExists);
        for (name, bytes) in
            [("", 4096), ("n", 0), ("n", 4097), (long.as_str(), 4096), ("a\nb", 4096)]
        {
            assert_eq!(
                kind(block_on(store.create_volume(name, bytes))),
                ErrorKind::Invalid,
                "{name} {bytes}"
            );
        }
        let (a, b) =
            block_on(zip(store.create_volume("twin", 4096), store.create_volume("twin", 4096)));
        assert_eq!([a.is_ok(), b.is_ok()].iter().filter(|ok| **ok).count(), 1);
        let names = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..6)
                .map(|i| {
                    let store = &store;
                    scope.spawn(move || {
                        block_on(store.create_volume(&format!("t{i}"), 4096)).unwrap().id()
                    })
                })
                .collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap())
                .collect::<std::collections::BTreeSet<_>>()
        });
        assert_eq!(names.len(), 6);
        block_on(store.close()).unwrap();
        let store = open(dir.path());
        let volumes = block_on(store.volumes()).unwrap();
        assert_eq!(volumes.len(), 9);
        assert_filled(&block_on(store.volume("other")).unwrap().unwrap(), 1, 2);
        assert!(block_on(store.volume("none")).unwrap().is_none());
    });
}

/// Mistakes of the caller are errors that change nothing.
#[test]
fn wrong_arguments_are_refused_and_change_nothing() {
    each_way(|| {
        let dir = tempfile::tempdir().unwrap();
        let (store, volume) = create(dir.path());
        assert_eq!(kind(block_on(volume.write(id(1), vec![1; 4095]))), ErrorKind::Invalid);
        assert_eq!(kind(block_on(volume.patch(id(1), 4096, vec![1]))), ErrorKind::Invalid);
        assert_eq!(kind(block_on(volume.patch(id(1), u32::MAX, vec![1]))), ErrorKind::Invalid);
        assert_eq!(kind(block_on(volume.patch(id(1), 0, vec![]))), ErrorKind::Invalid);
        let many = (0..65).map(|i| (id(i), Bytes::from(page(1)))).collect();
        assert_eq!(kind(block_on(volume.write_many(many))), ErrorKind::TooLarge);
        let changes =
            vec![(id(1), Change::Put(page(1).into())), (id(2), Change::Put(Bytes::new()))];
        assert_eq!(kind(block_on(volume.apply(changes, Durability::Buffered))), ErrorKind::Invalid);
        let elsewhere = tempfile::tempdir().unwrap();
        let (_other, foreign) = create(elsewhere.path());
        let mut txn = store.begin();
        assert_eq!(kind(txn.write(&foreign, id(1), page(1))), ErrorKind::Invalid);
        assert_eq!(kind(block_on(txn.read(&foreign, id(1)))), ErrorKind::Invalid);
        (0..65).for_each(|i| assert_filled(&volume, i, 0));
    });
}

/// A reader that asks for more pages than one request takes gets them all, in its order.
#[test]
fn many_pages_are_read_in_the_order_asked() {
    each_way(|| {
        let dir = tempfile::tempdir().unwrap();
        let (store, volume) = create(dir.path());
        for i in 0..200 {
            block_on(volume.write_back(id(i * 3), page(i as u8))).unwrap();
        }
        block_on(store.checkpoint()).unwrap();
        let ids: Vec<_> = (0..200).rev().map(|i| id(i * 3)).collect();
        let fills: Vec<u8> =
            block_on(volume.read_many(&ids)).unwrap().iter().map(|p| p[17]).collect();
        assert!(fills.into_iter().eq((0..200).rev()));
        assert!(block_on(volume.read_many(&[])).unwrap().is_empty());
    });
}

/// Somebody's files in a mistyped directory must survive.
#[test]
fn a_directory_with_foreign_files_is_left_alone() {
    each_way(|| {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("data"), "precious").unwrap();
        assert_eq!(kind(block_on(Store::open(dir.path(), small()))), ErrorKind::Invalid);
        assert_eq!(std::fs::read_to_string(dir.path().join("data")).unwrap(), "precious");
    });
}

/// A store that has lost its superblocks must say so: made anew in place, it would be filled with
/// zeros.
#[test]
fn a_store_without_its_meta_file_is_refused_and_not_made_anew() {
    each_way(|| {
        let dir = tempfile::tempdir().unwrap();
        let (store, volume) = create(dir.path());
        block_on(volume.write(id(1), page(5))).unwrap();
        block_on(store.close()).unwrap();
        drop((store, volume));
        let (meta, aside) = (dir.path().join("meta"), dir.path().join("aside"));
        std::fs::rename(&meta, &aside).unwrap();
        assert!(block_on(Store::open(dir.path(), small())).is_err());
        std::fs::rename(&aside, &meta).unwrap();
        assert_filled(&find(&open(dir.path())), 1, 5);
    });
}
