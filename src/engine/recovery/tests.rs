//! Opens, closes and crashes one shard on the simulated disk: these are the plain paths. The
//! simulator tests the hard ones (`sim/`).

mod creation;
pub(crate) mod growth;
mod lives;
pub(crate) mod scans;
mod superblocks;

use super::*;
use crate::base::{PageId, PageKey, VolumeId};
use crate::engine::{Change, Commit, Request, Response, Token};
use crate::testing::local_cluster::LocalCluster;
use crate::testing::random::Rng;
use crate::testing::sim::disk::{Area, Damage, Fault, Loss, OpKind, SECTORS, SimDisk};
use bytes::Bytes;

mod slow_reads;

struct Driver {
    disk: SimDisk,
    all: LocalCluster,
    shard_map: ShardMap,
    now: Micros,
    token: u64,
    /// The counts of the shards are recounted at each answer.
    audits: bool,
}

/// A store whose pages and map nodes are many times its memory.
fn crowded() -> Options {
    let geometry = crate::Geometry { vshards_count: 64, ..options().geometry };
    Options { geometry, memory_bytes: 2 << 20, ..options() }
}

fn options() -> Options {
    Options {
        geometry: crate::Geometry {
            extent_bytes: 64 << 10,
            segment_bytes: 128 << 10,
            segments_count: 4,
            vshards_count: 4,
        },
        memory_bytes: 4 << 20,
        ..Options::default()
    }
}

impl Driver {
    fn open(disk: SimDisk) -> (Driver, RecoveryReport) {
        Driver::open_with(disk, &options())
    }

    fn open_with(disk: SimDisk, options: &Options) -> (Driver, RecoveryReport) {
        Driver::open_shards(disk, options, 1)
    }

    fn open_shards(
        mut disk: SimDisk,
        options: &Options,
        shards_count: u16,
    ) -> (Driver, RecoveryReport) {
        let opening =
            begin(&mut disk, options, shards_count, 7, 0).expect("the store can be opened");
        let mut all = LocalCluster::new(opening.shards);
        all.run_until_open(&mut disk, 0).expect("the store opens");
        let (now, shard_map) = (disk.now() + 1_000_000, all.shards[0].shard_map());
        (Driver { disk, all, shard_map, now, token: 0, audits: true }, opening.report)
    }

    fn ask(&mut self, request: Request) -> Result<Response> {
        let token = self.begin(request);
        let (to, answer) = self.answer();
        assert_eq!(to, token, "one request at a time");
        answer
    }

    fn begin(&mut self, request: Request) -> Token {
        self.token += 1;
        let shard = match &request {
            Request::Read(keys) => self.shard_map.shard_of(keys[0]),
            Request::Commit(commit) => self.shard_map.shard_of(commit.changes[0].0),
            _ => ShardId::LEADER,
        };
        self.all.request(shard, Token(self.token), request);
        Token(self.token)
    }

    fn answer(&mut self) -> (Token, Result<Response>) {
        for _ in 0..100_000 {
            if let Some(reply) = self.all.replies.pop() {
                let shards = self.all.shards.iter().filter(|_| self.audits);
                shards.for_each(|shard| shard.audit().expect("counts are kept"));
                return reply;
            }
            self.step();
        }
        panic!("no answer to a request: {:#?}", self.all.shards);
    }

    fn step(&mut self) {
        self.now += 50;
        self.all.poll_once(&mut self.disk, self.now);
        self.disk.advance_to(self.now);
    }

    /// Runs several requests at once; all must succeed.
    fn commit_together(&mut self, commits: Vec<Commit>) {
        let count = commits.len();
        commits.into_iter().for_each(|commit| _ = self.begin(Request::Commit(commit)));
        for _ in 0..count {
            let (_, answer) = self.answer();
            assert!(matches!(answer, Ok(Response::Committed(_))), "{answer:?}");
        }
    }

    fn commit(&mut self, changes: Vec<(PageKey, Change)>) -> Lsn {
        match self.ask(Request::Commit(Commit { reads: vec![], changes, durable: true })) {
            Ok(Response::Committed(lsn)) => lsn,
            other => panic!("{other:?}: {:#?}", self.all.shards),
        }
    }

    fn read(&mut self, key: PageKey) -> Vec<u8> {
        match self.ask(Request::Read(smallvec::smallvec![key])) {
            Ok(Response::Pages(pages)) => pages[0].to_vec(),
            other => panic!("{other:?}"),
        }
    }
}

fn key(page: u64) -> PageKey {
    PageKey::new(VolumeId::new(1), PageId::new(page))
}

fn put(byte: u8) -> Change {
    Change::Put(Bytes::from(vec![byte; BLOCK]))
}

/// The first promise: what was acknowledged is there after a crash, and after a clean close.
#[test]
fn commits_are_found_again() {
    let (mut d, report) = Driver::open(SimDisk::new(1));
    assert!(report.created && report.clean);
    let first = d.commit((0..8).map(|i| (key(i), put(i as u8))).collect());
    assert!(
        d.commit(vec![(key(3), Change::Patch { offset: 10, bytes: Bytes::from_static(b"hello") })])
            > first
    );
    d.commit(vec![(key(4), Change::Free), (key(1 << 40), put(9))]);
    let check = |d: &mut Driver| {
        assert_eq!(d.read(key(5)), vec![5; BLOCK]);
        assert_eq!(&d.read(key(3))[8..16], b"\x03\x03hello\x03");
        assert_eq!(d.read(key(4)), vec![0; BLOCK]);
        assert_eq!(d.read(key(1 << 40)), vec![9; BLOCK]);
        assert_eq!(d.read(key(77)), vec![0; BLOCK]);
    };
    check(&mut d);
    let crashed = d.disk.crash(Loss::random(&mut Rng::new(3)), &mut Rng::new(4));
    let (mut d, report) = Driver::open(crashed);
    assert!(!report.clean && report.commits_applied == 3, "{report:?}");
    check(&mut d);
    assert!(matches!(d.ask(Request::Close), Ok(Response::Closed)));
    let (mut d, report) = Driver::open(d.disk);
    assert!(report.clean && !report.created);
    check(&mut d);
}

/// The log's buffers hold all groups that can be in flight, each with parts, and one commit of the
/// largest size: with less that commit would wait for ever.
#[test]
fn the_log_has_buffers_for_all_that_can_be_under_way() {
    let mut arena = Arena::new(1 << 16).expect("memory");
    for (shards_count, log_writes_max, memory_bytes, segment_bytes, txn_bytes_max) in
        (0..3 * 4 * 5 * 4 * 3).map(|i| {
            let (shards, writes, memory) =
                ([1, 2, 4][i % 3], [1, 2, 5, 8][i / 3 % 4], [2, 4, 9, 33, 128][i / 12 % 5] << 20);
            let (segment, txn) =
                ([64, 256, 1024, 8192][i / 60 % 4] << 10, [4, 700, 65536][i / 240] << 10);
            (shards, writes, memory * u64::from(shards), segment, txn)
        })
    {
        let geometry = crate::Geometry { segment_bytes, vshards_count: 8, ..options().geometry };
        let options = Options {
            geometry: geometry.clone(),
            memory_bytes,
            log_writes_max,
            txn_bytes_max,
            ..options()
        };
        let limits = options.limits(&geometry, shards_count).expect("limits");
        let chunks = log_chunks(&mut arena, &limits).expect("a part of the memory");
        let chunk_blocks = limits.group_blocks.min(16);
        assert!(chunks.chunk_blocks() == chunk_blocks && chunk_blocks.is_power_of_two());
        let log_writes_max = limits.log_writes_max as u32;
        let parts = if shards_count > 1 { log_writes_max } else { 0 };
        // A head, and for each page a patch of all its bytes.
        let largest =
            (4096 + limits.txn_bytes_max + limits.txn_bytes_max / 4096 * 20).div_ceil(4096) as u32;
        let needed = limits.group_blocks * log_writes_max + largest + parts * chunk_blocks;
        let blocks = chunks.count() * chunk_blocks;
        assert!(blocks >= needed, "{blocks} blocks of buffers, {needed} may be needed: {limits:?}");
        assert!(
            blocks < limits.memory_blocks / 2,
            "{blocks} blocks of buffers leave too little: {limits:?}"
        );
    }
}

/// Commits of the largest size, as patches, which go through the log whole: there are buffers for
/// each, whatever else is in progress.
#[test]
fn commits_of_the_largest_size_all_go_through() {
    let geometry = crate::Geometry { segment_bytes: 1 << 20, ..options().geometry };
    for (shards_count, log_writes_max) in [(1, 1), (1, 8), (2, 1), (2, 8)] {
        let memory_bytes = (4 << 20) * u64::from(shards_count);
        let tight =
            Options { geometry: geometry.clone(), memory_bytes, log_writes_max, ..options() };
        let (mut d, _) = Driver::open_shards(SimDisk::new(5), &tight, shards_count);
        let pages = d.all.shards[0].txn_bytes_max() / BLOCK as u64;
        assert_eq!(pages, 64, "a sixteenth of a shard's memory, four groups");
        let patch = |byte: u8| Change::Patch { offset: 0, bytes: Bytes::from(vec![byte; BLOCK]) };
        let commit =
            |no: u64| (0..pages).map(|i| (key(no * pages + i), patch(no as u8 + 1))).collect();
        // The first ones one at a time, then many at once, with small ones between them.
        (0..3).for_each(|no| _ = d.commit(commit(no)));
        let large = (3..15).map(commit);
        let small =
            (0..60).map(|i| vec![(key(5_000 + i), patch(99)), (key(6_000 + i * 7), patch(98))]);
        let together =
            large.chain(small).map(|changes| Commit { reads: vec![], changes, durable: true });
        d.commit_together(together.collect());
        let crashed = d.disk.crash(Loss::Everything, &mut Rng::new(4));
        let (mut d, report) = Driver::open_shards(crashed, &tight, shards_count);
        assert!(!report.clean);
        for no in 0..15 {
            (0..pages)
                .for_each(|i| assert_eq!(d.read(key(no * pages + i)), vec![no as u8 + 1; BLOCK]));
        }
    }
}

/// A group of many commits, written by a store with much memory, is redone by one with little: a
/// part at a time.
#[test]
fn what_a_large_store_has_logged_is_redone_in_little_memory() {
    let geometry = crate::Geometry { segment_bytes: 1 << 20, ..options().geometry };
    let large =
        Options { geometry, memory_bytes: 64 << 20, coalesce_window_us: 10_000, ..options() };
    let (mut d, _) = Driver::open_with(SimDisk::new(5), &large);
    let patch =
        |i: u64| (key(i), Change::Patch { offset: 7, bytes: Bytes::from(vec![i as u8; 20]) });
    let commits =
        (0..1000).map(|i| Commit { reads: vec![], changes: vec![patch(i)], durable: i == 999 });
    d.commit_together(commits.collect());
    let crashed = d.disk.crash(Loss::Everything, &mut Rng::new(4));
    let (mut d, report) = Driver::open_with(crashed, &Options { memory_bytes: 2 << 20, ..large });
    assert!(report.commits_applied == 1000 && report.groups_scanned < 10, "{report:?}");
    (0..1000).for_each(|i| assert_eq!(d.read(key(i))[7..27], [i as u8; 20]));
}

/// A device may return other bytes at the second read than at the first. What the redo reads is
/// judged like what the scan read: otherwise a caller gets bytes that were never written (contract
/// 5).
#[test]
fn what_the_redo_reads_is_checked_as_the_scan_has_checked_it() {
    let (mut d, _) = Driver::open(SimDisk::new(1));
    d.commit(vec![(key(1), put(7))]);
    let mut disk = d.disk.crash(Loss::Everything, &mut Rng::new(1));
    let logs = disk.files().into_iter().filter(|(file, _)| matches!(file, FileId::Log(..)));
    let blocks = logs.flat_map(|(file, len)| (0..len / BLOCK as u64).map(move |no| (file, no)));
    let (file, image) = blocks
        .into_iter()
        .find(|(file, no)| disk.block(*file, *no) == [7; BLOCK])
        .expect("the log holds the page");
    let opening = begin(&mut disk, &options(), 1, 7, 0).expect("the scan finds a whole log");
    assert_eq!(opening.report.commits_applied, 1);
    let flip = Damage::Flip { bit: 99 };
    assert!(disk.damage(file, image * SECTORS as u64, SECTORS, flip));
    let mut all = LocalCluster::new(opening.shards);
    let error = all.run_until_open(&mut disk, 0).expect_err("the page is not what was written");
    assert_eq!(error.kind(), crate::ErrorKind::Corrupt, "{error}");
}

/// A bad block in one copy of the superblock must not keep its store from being opened: the others
/// are there for that.
#[test]
fn a_superblock_copy_that_cannot_be_read_keeps_no_store_closed() {
    let (mut d, _) = Driver::open(SimDisk::new(1));
    d.commit(vec![(key(1), put(7))]);
    assert!(matches!(d.ask(Request::Close), Ok(Response::Closed)));
    // All copies are read to see whether there is a store, and again to use it.
    for reads in 0..8 {
        let disk = d.disk.crash(Loss::Nothing, &mut Rng::new(1));
        disk.inject(Fault::once(OpKind::Read, Area::File(FileId::Meta), reads));
        let (mut d, report) = Driver::open(disk);
        assert_eq!(d.disk.counters().faults_read, 1);
        assert!(
            !report.created && d.read(key(1)) == vec![7; BLOCK],
            "read {reads} of the meta file failed"
        );
    }
}

/// A failed flush may have lost pages that the kernel still shows. An opening that finds their
/// commit must not rely on what it sees: a power cut would take pages that were served since.
#[test]
fn pages_that_a_failed_flush_has_lost_are_written_again() {
    let (mut shown_new, mut doomed) = (0, 0);
    for seed in 0..30 {
        let change = |byte: u8| (0..8).map(|i| (key(i), put(byte))).collect::<Vec<_>>();
        let (mut d, _) = Driver::open(SimDisk::new(seed));
        d.commit(change(1));
        d.disk.inject(Fault::once(OpKind::Flush, Area::Any, 0));
        let commit = Commit { reads: vec![], changes: change(2), durable: true };
        assert!(d.ask(Request::Commit(commit)).is_err(), "its flush has failed");
        let lost = d.disk.crash(Loss::Nothing, &mut Rng::new(seed));
        let (mut after_power, _) = Driver::open(lost);
        doomed += u32::from(after_power.read(key(0))[0] == 1);
        let (mut d, _) = Driver::open(d.disk.crash(Loss::Process, &mut Rng::new(seed)));
        let shown: Vec<_> = (0..8).map(|i| d.read(key(i))).collect();
        shown_new += u32::from(shown[0][0] == 2);
        let (mut d, _) = Driver::open(d.disk.crash(Loss::Everything, &mut Rng::new(seed)));
        for (i, shown) in (0..).zip(&shown) {
            assert!(d.read(key(i)) == *shown, "seed {seed}: page {i} was served and is gone");
        }
    }
    assert!(shown_new > 0 && doomed > 0, "{shown_new} {doomed}");
}

/// Opens the store as far as to a checkpoint in the middle of the redo; returns the recovered LSN.
fn checkpoint_before_the_last(disk: &mut SimDisk) -> Lsn {
    let opening = begin(disk, &options(), 1, 7, 0).expect("the store can be opened");
    let mut all = LocalCluster::new(opening.shards);
    all.request(ShardId::LEADER, Token(1), Request::Checkpoint);
    let mut now = disk.now();
    while all.replies.is_empty() {
        // It must not run a lap more: the checkpoint that ends the recovery would make the logs
        // superfluous.
        now += 50;
        all.poll_once(disk, now);
        disk.advance_to(now);
        assert!(all.shards[0].failure().is_none(), "the checkpoint ends");
    }
    opening.report.recovered_lsn
}

/// A process dies with commits in its logs that no flush has covered; the next one reads them, and
/// a checkpoint in the middle of its redo records them as durable. A power cut then must not find
/// them gone: the store would be refused as damaged.
#[test]
pub(crate) fn what_a_recovery_records_as_durable_survives_a_power_cut() {
    let mut unflushed = 0;
    for seed in 0..24 {
        let (mut d, _) = Driver::open(SimDisk::new(seed));
        d.commit(vec![(key(0), put(1))]);
        for n in 1..20 {
            d.begin(Request::Commit(Commit {
                reads: vec![],
                changes: vec![(key(n), put(2))],
                durable: true,
            }));
        }
        // Somewhere between the first log write and the end of its flush.
        (0..seed % 12).for_each(|_| d.step());
        let mut disk = d.disk.crash(Loss::Process, &mut Rng::new(seed));
        let recovered_lsn = checkpoint_before_the_last(&mut disk);
        let lost = d.disk.crash(Loss::Everything, &mut Rng::new(seed));
        unflushed += u32::from(
            begin(&mut lost.clone(), &options(), 1, 7, 0).expect("it opens").report.recovered_lsn
                < recovered_lsn,
        );
        let (_, report) = Driver::open(disk.crash(Loss::Everything, &mut Rng::new(seed)));
        assert!(
            report.recovered_lsn >= recovered_lsn,
            "seed {seed}: {recovered_lsn:?} was recorded, {:?} is left",
            report.recovered_lsn
        );
    }
    assert!(unflushed > 0, "all that was read had been flushed");
}

/// The same after a flush that has failed: of what the dead process has written since, the kernel
/// may show what it will never write. If this fails, a store that was reopened after such a
/// failure, and then lost its power in the middle of the redo, is refused as damaged.
#[test]
fn what_a_failed_flush_has_lost_of_the_log_is_written_again() {
    let mut doomed = 0;
    for seed in 0..24 {
        let (mut d, _) = Driver::open(SimDisk::new(seed));
        d.commit(vec![(key(0), put(1))]);
        d.disk.inject(Fault::once(OpKind::Flush, Area::Log, 0));
        let commit = Commit { reads: vec![], changes: vec![(key(1), put(2))], durable: true };
        assert!(d.ask(Request::Commit(commit)).is_err(), "its flush has failed");
        let lost = d.disk.crash(Loss::Everything, &mut Rng::new(seed));
        let mut disk = d.disk.crash(Loss::Process, &mut Rng::new(seed));
        let recovered_lsn = checkpoint_before_the_last(&mut disk);
        doomed += u32::from(
            begin(&mut lost.clone(), &options(), 1, 7, 0).expect("it opens").report.recovered_lsn
                < recovered_lsn,
        );
        let mut after = disk.crash(Loss::Everything, &mut Rng::new(seed));
        let found =
            begin(&mut after, &options(), 1, 7, 0).map(|opening| opening.report.recovered_lsn);
        assert!(
            found.as_ref().is_ok_and(|found| *found >= recovered_lsn),
            "seed {seed}: {recovered_lsn:?} was recorded, now {found:?}"
        );
    }
    assert!(doomed > 0, "nothing was lost");
}

/// Reads longer than one operation (a group with a large commit, the table of a large store) are
/// put together in order.
#[test]
fn a_long_read_is_put_together_in_order() {
    let (mut disk, mut arena) = (SimDisk::new(1), Arena::new(READ_BLOCKS).unwrap());
    let bytes: Vec<u8> = (0..200u8).flat_map(|block| [block + 1; BLOCK]).collect();
    execute(&mut disk, DiskOp::Allocate { file: FileId::Data, from: 0, to: bytes.len() as u64 })
        .unwrap();
    create::write_bytes(&mut disk, &mut arena, FileId::Data, 0, &bytes).unwrap();
    for (first, count) in [(0, 200), (3, 64), (3, 65), (5, 129), (199, 1)] {
        let (from, len) = (first * BLOCK, count * BLOCK);
        let found = read_bytes(&mut disk, &mut arena, FileId::Data, from as u64, len).unwrap();
        assert!(found == bytes[from..from + len], "{count} blocks from block {first}");
    }
}

/// Space and log are reclaimed: a store that is overwritten for ever does not grow for ever.
#[test]
fn overwriting_reclaims_space_and_log() {
    let (mut d, _) = Driver::open(SimDisk::new(2));
    let mut rng = Rng::new(5);
    let mut model = [0u8; 200];
    for round in 0..1500u64 {
        let n = rng.within(1, 7);
        let changes = (0..n).map(|_| {
            let page = rng.below(200);
            model[page as usize] = round as u8;
            (key(page), put(round as u8))
        });
        let changes = changes.collect();
        d.commit(changes);
    }
    for page in 0..200 {
        assert_eq!(d.read(key(page)), vec![model[page as usize]; BLOCK], "page {page}");
    }
    let Ok(Response::Stats(stats)) = d.ask(Request::Stats) else { panic!("no counters") };
    println!("{stats:#?}");
    assert!(stats.checkpoints > 3 && stats.extents_total < 60, "{stats:?}");
    let crashed = d.disk.crash(Loss::random(&mut Rng::new(3)), &mut Rng::new(4));
    let (mut d, _) = Driver::open(crashed);
    for page in 0..200 {
        assert_eq!(d.read(key(page)), vec![model[page as usize]; BLOCK], "page {page}");
    }
}

/// Readers that keep their pages must not make others wait for ever: they get `Busy`.
#[test]
fn memory_in_the_hands_of_readers_is_busy_and_comes_back() {
    let (mut d, _) = Driver::open(SimDisk::new(3));
    for page in 0..2000 {
        d.commit(vec![(key(page), put(page as u8))]);
    }
    let mut pinned = Vec::new();
    let mut refused = 0;
    for page in 0..2000 {
        match d.ask(Request::Read(smallvec::smallvec![key(page)])) {
            Ok(Response::Pages(pages)) => pinned.extend(pages),
            Err(error) if error.kind() == crate::ErrorKind::Busy => refused += 1,
            other => panic!("{other:?}"),
        }
    }
    assert!(refused > 0, "all 2000 pages fit into memory");
    let commit = Commit { changes: vec![(key(1), put(1))], durable: true, ..Commit::default() };
    let error = d.ask(Request::Commit(commit)).unwrap_err();
    assert_eq!(error.kind(), crate::ErrorKind::Busy);
    assert!(pinned.iter().all(|page| page.iter().all(|byte| *byte == page[0])));
    pinned.clear();
    d.commit(vec![(key(1), put(77))]);
    assert_eq!(d.read(key(1))[0], 77);
    assert_eq!(d.read(key(1999))[0], 1999u32 as u8);
}

/// Pages and map nodes come and go all the time in a store that is larger than memory: none may be
/// taken for another, be lost on the way out, or come back as it was before.
#[test]
fn a_store_many_times_its_memory_is_right() {
    for seed in 0..4 {
        crowd(seed);
    }
}

fn crowd(seed: u64) {
    let (mut d, _) = Driver::open_with(SimDisk::new(seed), &crowded());
    let mut rng = Rng::new(seed);
    let mut model = std::collections::BTreeMap::new();
    let page = |n: u64| if n.is_multiple_of(5) { n << 33 } else { n * 37 };
    for round in 0..6000u64 {
        let n = rng.below(3000);
        match rng.below(10) {
            0 => {
                d.commit(vec![(key(page(n)), Change::Free)]);
                model.remove(&n);
            }
            1..=3 => {
                let bytes = Bytes::from(round.to_le_bytes().to_vec());
                d.commit(vec![(key(page(n)), Change::Patch { offset: 0, bytes })]);
                let old = model.get(&n).map_or(0, |(_, fill)| *fill);
                model.insert(n, (round, old));
            }
            4..=6 => {
                let fill = round as u8;
                let mut bytes = vec![fill; BLOCK];
                bytes[..8].copy_from_slice(&round.to_le_bytes());
                d.commit(vec![(key(page(n)), Change::Put(bytes.into()))]);
                model.insert(n, (round, fill));
            }
            _ => check(&mut d, n, key(page(n)), &model),
        }
        if round % 1500 == 1499 {
            let crashed = d.disk.crash(Loss::random(&mut rng), &mut rng);
            d = Driver::open_with(crashed, &crowded()).0;
        }
    }
    for n in 0..3000 {
        check(&mut d, n, key(page(n)), &model);
    }
}

fn check(d: &mut Driver, n: u64, key: PageKey, model: &std::collections::BTreeMap<u64, (u64, u8)>) {
    let (first, fill) = model.get(&n).copied().unwrap_or((0, 0));
    let bytes = d.read(key);
    assert_eq!(bytes[..8], first.to_le_bytes(), "page {n}");
    assert!(bytes[8..].iter().all(|b| *b == fill), "page {n}");
}

/// `doctor` reports how much room a new store takes, and has no other way to know.
#[test]
fn a_new_store_takes_the_room_that_is_told() {
    for shards in [1, 2] {
        let (d, _) = Driver::open_shards(SimDisk::new(1), &options(), shards);
        let made: u64 = d.disk.files().iter().map(|(_, len)| len).sum();
        assert_eq!(
            made,
            crate::format::fresh::store_bytes(&options().geometry, shards, u32::MAX),
            "{shards} shards"
        );
    }
}
