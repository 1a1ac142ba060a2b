//! Runs a whole store on each medium: creates it, writes, abandons it without a close, opens it
//! again.

use super::Access;
use super::tests::{Case, LOG, allocate, each_driver};
use crate::base::options::{Geometry, Options};
use crate::base::{BLOCK, PageId, PageKey, VolumeId};
use crate::engine::recovery;
use crate::engine::{Change, Commit, Request, Response, Token};
use crate::io::{FileId, FileOptions};
use crate::testing::local_cluster::LocalCluster;

const PAGES: u64 = 100;
const SHARDS: u16 = 2;

fn options() -> Options {
    // Small, since every driver on every medium makes a store; segments of 256 KiB, so that the log
    // goes around.
    let geometry = Geometry {
        extent_bytes: 64 << 10,
        segment_bytes: 256 << 10,
        segments_count: 4,
        vshards_count: 4,
    };
    Options { geometry, memory_bytes: 8 << 20, ..Options::default() }
}

fn key(page: u64) -> PageKey {
    PageKey::new(VolumeId::new(1), PageId::new(page))
}

fn content(page: u64, round: u8) -> Vec<u8> {
    vec![(page as u8).wrapping_mul(31).wrapping_add(round); BLOCK]
}

/// One life of a store, which ends as a crash does.
fn live(case: &Case<'_>, requests: Vec<(PageKey, Request)>) -> Vec<Response> {
    let mut disk = case.make(case.files());
    let opening =
        recovery::begin(disk.as_mut(), &options(), SHARDS, 7, 0).expect("the store begins to open");
    let mut all = LocalCluster::new(opening.shards);
    all.run_until_open(disk.as_mut(), 0).expect("the store opens");
    let shard_map = all.shards[0].shard_map();
    let count = requests.len();
    for (i, (key, request)) in requests.into_iter().enumerate() {
        all.request(shard_map.shard_of(key), Token(i as u64), request);
    }
    all.run_until(disk.as_mut(), 1_000_000, |all| all.replies.len() == count)
        .expect("no shard fails");
    let mut replies = std::mem::take(&mut all.replies);
    replies.sort_by_key(|(token, _)| token.0);
    replies.into_iter().map(|(_, reply)| reply.expect("every request is answered")).collect()
}

fn puts(round: u8) -> Vec<(PageKey, Request)> {
    let put = |page| {
        let changes = vec![(key(page), Change::Put(content(page, round).into()))];
        (key(page), Request::Commit(Commit { reads: vec![], changes, durable: true }))
    };
    (0..PAGES).map(put).collect()
}

/// If this fails, a medium that is not a directory, such as a raw device, would need changes above
/// the seam: some code finds files by their names, or takes a file's offset for one of the
/// descriptor.
#[test]
fn a_store_opens_is_written_crashes_and_opens_again_on_every_medium() {
    each_driver(|case| {
        for round in 0..3 {
            let committed = live(case, puts(round));
            assert!(committed.iter().all(|reply| matches!(reply, Response::Committed(_))));
            let reads = (0..PAGES)
                .map(|page| (key(page), Request::Read([key(page)].into_iter().collect())))
                .collect();
            for (page, reply) in (0..PAGES).zip(live(case, reads)) {
                let Response::Pages(pages) = reply else { panic!("a read is answered with pages") };
                assert!(*pages[0] == content(page, round)[..], "page {page} after crash {round}");
            }
        }
        let files =
            case.try_files(Access::ReadOnly, &FileOptions::default()).expect("nobody has it open");
        assert!(files.existing().contains(&FileId::Data) && files.existing().len() > 4);
    });
}

/// A child that the host program has forked, or a ring that the kernel is still tearing down, holds
/// a store's descriptors a moment longer than the store does: that must not make the next opening
/// fail with `InUse`.
#[test]
fn a_closed_store_is_unlocked_though_its_descriptors_are_still_held() {
    each_driver(|case| {
        let files = case.files();
        let mut disk = case.make(files.clone());
        allocate(disk.as_mut(), LOG, 0, 4096).unwrap();
        let entry = files.file(LOG);
        let held = files.location(&entry.file).unwrap().descriptor.clone();
        drop((disk, files));
        case.try_files(Access::ReadWrite, case.options).expect("it is closed");
        drop(held);
    });
}
