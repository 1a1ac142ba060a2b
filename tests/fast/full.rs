//! A store that is full, by its own limit or its file system's: what makes room is not refused, and
//! the room is there at once.
//!
//! If these fail, whoever meets a full disk can't delete, shrink or discard what fills it: no error
//! tells that trying again helps.

use crate::common;
use common::role::{Run, ring_works};
use corepage::testing::pattern;
use corepage::{Error, ErrorKind, Options, PageId, Store, Volume};
use futures_lite::future::block_on;

/// Pages of one write: 1 MiB.
const BATCH: u64 = 256;

fn options(run: Run, extents: u64) -> Options {
    let default = Options::default();
    let data_bytes_max = extents * default.geometry.extent_bytes;
    run.with(Options { memory_bytes: 32 << 20, data_bytes_max, ..default })
}

fn runs() -> Vec<Run> {
    [1, 2].map(|shards| Run { ring: ring_works(), shards }).into()
}

/// Writes pages from `first` on until the store refuses; the page behind the last one, and why.
fn fill(store: &Store, volume: &Volume, first: u64) -> (u64, Error) {
    let mut next = first;
    loop {
        let mut txn = store.begin();
        for page in next..next + BATCH {
            let bytes = pattern::words(page, 4096);
            txn.write(volume, PageId::new(page), bytes)
                .expect("a write of a transaction is kept for its commit");
        }
        match block_on(txn.commit()) {
            Ok(_) => next += BATCH,
            Err(error) if error.kind() == ErrorKind::Busy => {}
            Err(error) => return (next, error),
        }
    }
}

/// A volume that is as full as the store lets it be, and an empty one.
fn filled(run: Run) -> (tempfile::TempDir, Store, Volume, Volume, u64) {
    let dir = common::scratch("full");
    let store =
        block_on(Store::open(dir.path().join("store"), options(run, 40 * u64::from(run.shards))))
            .expect("a store");
    let full = block_on(store.create_volume("full", 64 << 30)).expect("a volume");
    let other = block_on(store.create_volume("other", 64 << 30)).expect("a volume");
    let (pages, error) = fill(&store, &full, 0);
    assert_eq!(error.kind(), ErrorKind::Full, "{error}");
    (dir, store, full, other, pages)
}

/// The space of what was freed can be used, by another volume and at once.
#[track_caller]
fn has_room_for(store: &Store, other: &Volume, pages: u64) {
    let (written, error) = fill(store, other, 0);
    assert!(written >= pages, "only {written} pages of {pages} could be written: {error}");
}

#[test]
fn a_volume_of_a_full_store_is_deleted_at_the_first_try_and_its_space_is_there_for_others() {
    for run in runs() {
        let (_dir, store, full, other, pages) = filled(run);
        drop(full);
        block_on(store.delete_volume("full")).expect("a deletion makes room");
        block_on(store.wait_freed()).expect("so does what it does in the background");
        has_room_for(&store, &other, pages * 3 / 4);
    }
}

#[test]
fn a_volume_of_a_full_store_is_made_smaller_at_the_first_try() {
    for run in runs() {
        let (_dir, store, _full, other, pages) = filled(run);
        block_on(store.resize_volume("full", pages / 2 * 4096)).expect("it makes room");
        block_on(store.wait_freed()).expect("so does what it does in the background");
        has_room_for(&store, &other, pages / 3);
    }
}

/// What a client's discard does, of much and of little.
#[test]
fn pages_of_a_full_store_are_freed_at_the_first_try() {
    for run in runs() {
        let (_dir, store, full, other, pages) = filled(run);
        block_on(full.free(PageId::new(3))).expect("a free of one page");
        let mut txn = store.begin();
        for page in 1000..1512 {
            txn.free(&full, PageId::new(page)).expect("kept for the commit");
        }
        block_on(txn.commit()).expect("a free of many pages");
        block_on(full.free_range(PageId::new(0), PageId::new(pages / 2)))
            .expect("a free of half of the volume");
        block_on(full.free_range(PageId::new(0), PageId::new(u64::MAX))).expect("a free of all");
        has_room_for(&store, &other, pages * 3 / 4);
    }
}
