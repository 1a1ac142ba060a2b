//! Volumes as a caller sees them: what is allocated, scans, sizes, deletion, pins.

// Real time passes.
#![allow(clippy::disallowed_methods)]

use crate::common::Rng;
use bytes::Bytes;
use corepage::{ErrorKind, Options, PageId, Store, Volume};
use futures_lite::future::block_on;
use std::collections::BTreeMap;

fn options() -> Options {
    Options { shards: Some(2), memory_bytes: 16 << 20, ..Options::default() }
}

fn id(n: u64) -> PageId {
    PageId::new(n)
}

fn page(n: u64) -> Vec<u8> {
    let mut page = vec![0; 4096];
    page[..8].copy_from_slice(&n.to_le_bytes());
    page
}

/// All that is allocated, asked for in parts.
fn allocated(volume: &Volume, ranges_max: usize) -> Vec<u64> {
    let (mut all, mut next) = (Vec::new(), Some(id(0)));
    while let Some(first) = next {
        let part = block_on(volume.allocated(first, id(u64::MAX), ranges_max)).unwrap();
        all.extend(part.ranges.iter().flat_map(|(first, last)| first.get()..=last.get()));
        assert!(part.next.is_none_or(|next| next > first), "no progress at {first:?}");
        next = part.next;
    }
    all
}

fn scanned(volume: &Volume) -> Vec<(u64, u64)> {
    let mut scan = volume.scan(id(0), id(u64::MAX));
    let mut all = Vec::new();
    while let Some((page, bytes)) = block_on(scan.next()).unwrap() {
        all.push((page.get(), u64::from_le_bytes(bytes[..8].try_into().unwrap())));
    }
    all
}

/// Where pages are.
struct Places(Rng);

impl Places {
    /// Dense, sparse and lone ids, the last one too.
    fn draw(&mut self) -> u64 {
        match self.0.below(10) {
            0..=5 => self.0.below(4000),
            6 | 7 => (1 << 20) + self.0.below(100_000),
            8 => self.0.below(64) << 50 | self.0.below(3),
            _ => u64::MAX - self.0.below(3),
        }
    }
}

#[test]
fn what_is_allocated_and_scanned_is_what_was_written_dirty_or_not_also_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = block_on(Store::open(dir.path(), options())).unwrap();
    block_on(store.create_volume("other", 1 << 20)).unwrap();
    block_on(store.create_volume("v", 1 << 30)).unwrap();
    let (mut model, mut places) = (BTreeMap::new(), Places(Rng::new(1)));
    for round in 0..12 {
        let volume = block_on(store.volume("v")).unwrap().unwrap();
        for n in 0..300 {
            let at = places.draw();
            if places.0.below(4) == 0 {
                block_on(volume.free(id(at))).unwrap();
                model.remove(&at);
            } else {
                block_on(volume.write_back(id(at), page(round << 32 | n))).unwrap();
                model.insert(at, round << 32 | n);
            }
        }
        let ids: Vec<u64> = model.keys().copied().collect();
        assert_eq!(
            allocated(&volume, 1 + places.0.below(40) as usize),
            ids,
            "round {round}, dirty"
        );
        match round % 3 {
            0 => drop(block_on(store.checkpoint()).unwrap()),
            1 => {
                block_on(store.close()).unwrap();
                drop(volume);
                store = block_on(Store::open(dir.path(), options())).unwrap();
            }
            _ => {}
        }
        let volume = block_on(store.volume("v")).unwrap().unwrap();
        assert_eq!(allocated(&volume, 1000), ids, "round {round}");
        let all: Vec<(u64, u64)> = model.iter().map(|(at, n)| (*at, *n)).collect();
        assert_eq!(scanned(&volume), all, "round {round}");
    }
    let volume = block_on(store.volume("v")).unwrap().unwrap();
    let (first, last) = (id(1000), id(1 << 52));
    block_on(volume.free_range(first, last)).unwrap();
    model.retain(|at, _| !(first.get()..=last.get()).contains(at));
    assert_eq!(
        allocated(&volume, 7),
        model.keys().copied().collect::<Vec<_>>(),
        "a range was freed"
    );
    assert_eq!(block_on(volume.allocated(last, first, 1)).unwrap().ranges, [], "an empty range");
    let other = block_on(store.volume("other")).unwrap().unwrap();
    assert_eq!(allocated(&other, 1), Vec::<u64>::new(), "another volume");
    block_on(store.close()).unwrap();
}

#[test]
fn bytes_that_a_volume_gains_are_zeros_and_bytes_that_it_loses_take_no_space() {
    let dir = tempfile::tempdir().unwrap();
    let store = block_on(Store::open(dir.path(), options())).unwrap();
    let volume = block_on(store.create_volume("v", 4096 * 4096)).unwrap();
    let (early, bytes) = (volume.clone(), |n: u64| n * 4096);
    for n in 0..4096 {
        block_on(volume.write_back(id(n), page(n + 1))).unwrap();
    }
    block_on(store.resize_volume("v", bytes(1000))).unwrap();
    assert_eq!(
        (volume.bytes(), early.bytes()),
        (bytes(1000), bytes(1000)),
        "handles know the size"
    );
    block_on(store.wait_freed()).unwrap();
    assert_eq!(allocated(&volume, 10), (0..1000).collect::<Vec<_>>());
    // A straggler: the library lets any page be written.
    block_on(volume.write(id(2000), page(7))).unwrap();
    block_on(store.resize_volume("v", bytes(8192))).unwrap();
    assert!(
        block_on(volume.read(id(2000))).unwrap().is_absent(),
        "what was beyond the end has come back"
    );
    assert_eq!(block_on(volume.read(id(999))).unwrap()[..8], 1000u64.to_le_bytes());
    block_on(store.close()).unwrap();
    drop((store, volume, early));
    let store = block_on(Store::open(dir.path(), options())).unwrap();
    let volume = block_on(store.volume("v")).unwrap().unwrap();
    assert_eq!(volume.bytes(), bytes(8192));
    assert_eq!(allocated(&volume, 10), (0..1000).collect::<Vec<_>>());
    for (name, size, kind) in [
        ("v", 0, ErrorKind::Invalid),
        ("v", 5, ErrorKind::Invalid),
        ("w", 4096, ErrorKind::NotFound),
    ] {
        let error = block_on(store.resize_volume(name, size)).unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
    }
    assert!(
        block_on(store.resize_volume("w", 4096)).unwrap_err().to_string().contains("there are: v")
    );
    block_on(store.close()).unwrap();
}

#[test]
fn a_deleted_volume_is_gone_with_its_pages_and_its_handles_say_so() {
    let dir = tempfile::tempdir().unwrap();
    let store = block_on(Store::open(dir.path(), options())).unwrap();
    let volume = block_on(store.create_volume("v", 1 << 30)).unwrap();
    let kept = block_on(store.create_volume("kept", 1 << 20)).unwrap();
    block_on(kept.write(id(1), page(11))).unwrap();
    block_on(store.checkpoint()).unwrap();
    let before = block_on(store.stats()).unwrap().blocks_live;
    for n in 0..3000 {
        block_on(volume.write_back(id(n * 7), page(n))).unwrap();
    }
    block_on(store.checkpoint()).unwrap();
    block_on(store.delete_volume("v")).unwrap();
    for error in [
        block_on(volume.read(id(0))).map(drop).unwrap_err(),
        block_on(volume.write(id(0), page(1))).map(drop).unwrap_err(),
        block_on(volume.allocated(id(0), id(9), 1)).map(drop).unwrap_err(),
        block_on(store.begin().read(&volume, id(0))).map(drop).unwrap_err(),
        block_on(store.delete_volume("v")).unwrap_err(),
    ] {
        assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
    }
    assert_eq!(block_on(store.volumes()).unwrap().len(), 1);
    // A new one of the same name has nothing of it.
    let again = block_on(store.create_volume("v", 1 << 30)).unwrap();
    assert_ne!(again.id(), volume.id(), "old handles must not reach the new volume");
    assert_eq!(allocated(&again, 10), Vec::<u64>::new());
    block_on(store.delete_volume("v")).unwrap();
    block_on(store.wait_freed()).unwrap();
    block_on(store.checkpoint()).unwrap();
    block_on(store.checkpoint()).unwrap();
    let after = block_on(store.stats()).unwrap().blocks_live;
    assert!(after < before + 200, "{before} blocks before, {after} after");
    block_on(store.close()).unwrap();
    let old = volume.id();
    drop((store, volume, again, kept));
    let store = block_on(Store::open(dir.path(), options())).unwrap();
    let mut ids = Vec::new();
    // The numbers are given back behind the open.
    for n in 0..200 {
        std::thread::sleep(std::time::Duration::from_millis(5));
        let name = format!("n{n}");
        ids.push(block_on(store.create_volume(&name, 4096)).unwrap().id());
        if ids.last() == Some(&old) {
            break;
        }
    }
    assert!(ids.contains(&old), "the number of the deleted volume is not free again");
    block_on(store.close()).unwrap();
}

/// What is freed in the background is what is beyond the end, and nothing that a volume has gained
/// again meanwhile: else a client's acknowledged pages vanish a moment after it was told that its
/// disk has grown.
#[test]
fn pages_of_a_volume_that_shrinks_and_grows_again_are_never_freed_behind_its_back() {
    let dir = tempfile::tempdir().unwrap();
    let store = block_on(Store::open(dir.path(), options())).unwrap();
    let volume = block_on(store.create_volume("v", 8192 * 4096)).unwrap();
    let (mut model, mut rng, mut end, mut overlaps) = (BTreeMap::new(), Rng::new(5), 8192, 0);
    for round in 0..40 {
        for n in 0..400 {
            let at = rng.below(end);
            block_on(volume.write_back(id(at), page(round << 32 | n))).unwrap();
            model.insert(at, round << 32 | n);
        }
        let smaller = 1 + rng.below(end);
        block_on(store.resize_volume("v", smaller * 4096)).unwrap();
        model.retain(|at, _| *at < smaller);
        overlaps += u32::from(store.freeing_count() > 0);
        end = smaller + 1 + rng.below(8192);
        block_on(store.resize_volume("v", end * 4096)).unwrap();
    }
    assert!(
        overlaps > 10,
        "only {overlaps} of 40 times was the volume still being freed when it grew"
    );
    block_on(store.wait_freed()).unwrap();
    assert_eq!(scanned(&volume), model.into_iter().collect::<Vec<_>>());
    block_on(store.close()).unwrap();
}

/// A user who is told that the volume could not be deleted, and finds it gone with its space still
/// taken, can do nothing about it.
#[test]
fn a_deletion_is_done_or_not_done_however_little_memory_is_free_and_its_pages_go_when_there_is_some()
 {
    let dir = tempfile::tempdir().unwrap();
    let store = block_on(Store::open(dir.path(), options())).unwrap();
    let kept = block_on(store.create_volume("kept", 1 << 30)).unwrap();
    let old = block_on(store.create_volume("old", 1 << 30)).unwrap();
    for n in 0..4096 {
        block_on(kept.write_back(id(n), page(n))).unwrap();
        block_on(old.write_back(id(n * 5), page(n))).unwrap();
    }
    block_on(store.checkpoint()).unwrap();
    let before = block_on(store.stats()).unwrap().blocks_live;
    // Readers hold all that can be held, each through a handle of its own.
    let mut held = Vec::new();
    'handles: for handle in 0..8 {
        let other = store.clone();
        let volume = block_on(other.volume("kept"));
        let Ok(Some(volume)) = volume else { break };
        for n in 0..512 {
            match block_on(volume.read(id(handle * 512 + n))) {
                Ok(page) => held.push(page),
                Err(error) if error.kind() == ErrorKind::Busy => break 'handles,
                Err(error) => panic!("{error}"),
            }
        }
    }
    assert!(held.len() > 1000, "only {} pages could be held", held.len());
    match block_on(store.delete_volume("old")) {
        Ok(()) => {}
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
            held.truncate(64);
            assert!(
                block_on(store.volume("old")).unwrap().is_some(),
                "it was refused, and the volume is gone"
            );
            block_on(store.delete_volume("old")).unwrap();
        }
    }
    assert!(block_on(old.read(id(0))).is_err_and(|error| error.kind() == ErrorKind::NotFound));
    drop(held);
    block_on(store.wait_freed()).unwrap();
    assert_eq!(store.freeing_count(), 0);
    block_on(store.checkpoint()).unwrap();
    block_on(store.checkpoint()).unwrap();
    let after = block_on(store.stats()).unwrap().blocks_live;
    assert!(after + 4096 <= before, "{before} blocks before, {after} after");
    block_on(store.close()).unwrap();
}

/// A program that deletes a volume and ends must not hang, nor find its store in use when it opens
/// it once more.
#[test]
fn a_store_whose_last_handle_goes_while_pages_are_freed_can_be_opened_at_once() {
    let dir = tempfile::tempdir().unwrap();
    for round in 0..6u64 {
        let store = block_on(Store::open(dir.path(), options())).unwrap();
        let volume = block_on(store.create_volume(&format!("v{round}"), 1 << 30)).unwrap();
        for n in 0..2000 {
            block_on(volume.write_back(id(n * 3), page(n))).unwrap();
        }
        block_on(store.delete_volume(volume.name())).unwrap();
        match round % 3 {
            0 => drop(store),
            1 => block_on(store.close()).unwrap(),
            _ => {
                block_on(store.wait_freed()).unwrap();
                assert_eq!(block_on(store.volumes()).unwrap().len(), 0);
            }
        }
    }
    let store = block_on(Store::open(dir.path(), options())).unwrap();
    block_on(store.wait_freed()).unwrap();
    block_on(store.checkpoint()).unwrap();
    block_on(store.checkpoint()).unwrap();
    let live = block_on(store.stats()).unwrap().blocks_live;
    assert!(live < 500, "{live} blocks are live in a store without volumes");
    block_on(store.close()).unwrap();
}

#[test]
fn a_handle_pins_no_more_than_its_share_and_other_handles_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let store = block_on(Store::open(dir.path(), options())).unwrap();
    let volume = block_on(store.create_volume("v", 1 << 30)).unwrap();
    // A quarter of the frames; each has 512 bytes of tables.
    let (most, mut held) = ((16 << 20) / (4096 + 512) / 4, Vec::new());
    for n in 0..=most {
        block_on(volume.write_back(id(n), Bytes::from(page(n)))).unwrap();
    }
    let busy = loop {
        match block_on(volume.read(id(held.len() as u64))) {
            Ok(page) => held.push(page),
            Err(error) => break error,
        }
    };
    assert_eq!((busy.kind(), held.len() as u64), (ErrorKind::Busy, most), "{busy}");
    assert!(busy.to_string().contains("drop some pages"), "{busy}");
    let another = store.clone();
    let others = block_on(another.volume("v")).unwrap().unwrap();
    assert_eq!(block_on(others.read(id(5))).unwrap()[..8], 5u64.to_le_bytes());
    assert_eq!(
        block_on(others.read_many(&(0..500).map(id).collect::<Vec<_>>())).unwrap().len(),
        500
    );
    assert!(block_on(volume.read(id(1 << 40))).is_err(), "it holds all that it may");
    held.truncate(10);
    assert!(block_on(volume.read(id(20))).is_ok(), "pins were given back");
    for (n, page) in held.iter().enumerate() {
        assert_eq!(page[..8], (n as u64).to_le_bytes(), "a pinned page has changed");
    }
    block_on(store.close()).unwrap();
    assert_eq!(held[3][..8], 3u64.to_le_bytes(), "it outlives the store");
}
