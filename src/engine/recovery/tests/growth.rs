//! Logs that get longer: when they do, the effects of a crash or a full disk, and what is taken for
//! damage.

use super::*;
use crate::base::SegmentNo;
use crate::base::error::ErrorKind;
use crate::format::crc_around;
use crate::testing::sim::disk::ENOSPC;
use std::collections::BTreeMap;

/// Commits with which the logs of two shards go round several times.
const COMMITS_ENOUGH: u64 = 120;
/// The most commits until each log has all its segments.
const COMMITS_MAX: u64 = 2_000;
/// Sets of four pages that are written again and again.
const SETS: u64 = 32;

/// The content of each set of pages, as far as it is known.
struct Model {
    rng: Rng,
    written: BTreeMap<u64, u8>,
    /// The commit that was not answered: its set holds what it held, or this.
    in_doubt: Option<(u64, u8)>,
    commits: u64,
}

/// The pages of a set: all of one virtual shard, which differs from that of the set before.
fn pages(set: u64) -> impl Iterator<Item = PageKey> {
    (0..4).map(move |i| key((set % 8) << 9 | (set / 8 * 4 + i)))
}

impl Model {
    fn new() -> Model {
        Model { rng: Rng::new(7), written: BTreeMap::new(), in_doubt: None, commits: 0 }
    }

    /// Runs another commit, small enough to be written into the log whole.
    fn write(&mut self, d: &mut Driver) -> Result<()> {
        self.commits += 1;
        // In random order: if shards took turns, the same one would begin each of their
        // checkpoints.
        let (set, byte) = (self.rng.below(SETS), self.commits as u8);
        let changes = pages(set).map(|key| (key, put(byte))).collect();
        match d.ask(Request::Commit(Commit { reads: vec![], changes, durable: true })) {
            Ok(_) => _ = self.written.insert(set, byte),
            Err(error) => {
                self.in_doubt = Some((set, byte));
                return Err(error);
            }
        }
        Ok(())
    }

    fn fill(&mut self, d: &mut Driver, commits: u64) {
        for _ in 0..commits {
            self.write(d).unwrap_or_else(|error| panic!("commit {}: {error}", self.commits));
        }
    }

    /// Writes until the logs are as long as expected.
    fn fill_until(&mut self, d: &mut Driver, expected: &[u64], what: &str) {
        let last = self.commits + COMMITS_MAX;
        while segments(d) != expected {
            assert!(self.commits < last, "{what}: {:?}, not {expected:?}", segments(d));
            self.fill(d, 1);
        }
    }

    /// Checks that everything acknowledged is there.
    fn check(&mut self, d: &mut Driver, what: &str) {
        let in_doubt = self.in_doubt.take();
        for set in 0..SETS {
            let found: Vec<Vec<u8>> = pages(set).map(|key| d.read(key)).collect();
            let byte = found[0][0];
            assert!(
                found.iter().all(|page| page.iter().all(|b| *b == byte)),
                "{what}: set {set} is torn"
            );
            let expected = self.written.get(&set).copied().unwrap_or(0);
            assert!(
                byte == expected || in_doubt == Some((set, byte)),
                "{what}: set {set} is {byte}, not {expected}"
            );
            self.written.insert(set, byte);
        }
    }
}

/// A store on its own disk, which can be crashed and opened again.
fn crash(d: &Driver, loss: Loss, seed: u64) -> SimDisk {
    d.disk.crash(loss, &mut Rng::new(seed))
}

fn segments(d: &Driver) -> Vec<u64> {
    d.all.shards.iter().map(|shard| shard.log_segments()).collect()
}

/// Segments that the newest superblock counts, of each log.
fn counted(disk: &SimDisk) -> Vec<u32> {
    let mut arena = Arena::new(READ_BLOCKS).expect("memory");
    // Read from an image, since the disk may be in use.
    let mut image = disk.crash(Loss::Everything, &mut Rng::new(1));
    let found = find_superblock(&mut image, &mut arena).expect("a superblock");
    found.superblock.logs.iter().map(|log| log.segments_made).collect()
}

/// Files that the log of a shard has.
fn files(disk: &SimDisk, shard: u16) -> usize {
    disk.files()
        .iter()
        .filter(|(file, _)| matches!(file, FileId::Log(of, _) if of.get() == shard))
        .count()
}

/// Makes all superblock copies count this many segments of each log; zero as in stores from before
/// logs grew.
fn recount(disk: &mut SimDisk, segments: u32) {
    let mut arena = Arena::new(READ_BLOCKS).expect("memory");
    for copy in 0..4 {
        let first = Superblock::offset(copy) / BLOCK as u64;
        let mut bytes: Vec<u8> =
            (first..first + 4).flat_map(|block| disk.block(FileId::Meta, block)).collect();
        let Ok(superblock) = Superblock::decode(copy, &bytes) else { continue };
        for log in 0..superblock.logs.len() {
            let at = 256 + 32 * log + 28;
            bytes[at..at + 4].copy_from_slice(&segments.to_le_bytes());
        }
        let crc = crc_around(0, &bytes, 12);
        bytes[12..16].copy_from_slice(&crc.to_le_bytes());
        create::write_bytes(disk, &mut arena, FileId::Meta, Superblock::offset(copy), &bytes)
            .expect("it is written");
    }
    execute(disk, DiskOp::Flush { files: smallvec::smallvec![FileId::Meta] })
        .expect("it is flushed");
}

/// The error of an opening that fails and changes nothing.
fn refusal(disk: &mut SimDisk, shards: u16) -> Error {
    begin(disk, &options(), shards, 7, 0).map(drop).expect_err("it is not opened")
}

/// If this fails, a new store takes gigabytes before anything is in it, or a used one has a
/// checkpoint for every few megabytes for ever; or each opening requests again the room that a log
/// has taken.
#[test]
fn a_log_gets_longer_when_it_is_used() {
    let (mut d, _) = Driver::open_shards(SimDisk::new(1), &options(), 2);
    let mut model = Model::new();
    assert_eq!((segments(&d), files(&d.disk, 0), files(&d.disk, 1)), (vec![2, 2], 2, 2));
    for _ in 0..5 {
        d.ask(Request::Checkpoint).expect("a checkpoint");
        model.fill(&mut d, 1);
    }
    assert_eq!(files(&d.disk, 0) + files(&d.disk, 1), 4, "what is not long does not grow");
    model.fill_until(&mut d, &[4, 4], "a store in use");
    assert_eq!(counted(&d.disk), [4, 4]);
    d.ask(Request::Close).expect("it closes");
    let closed = crash(&d, Loss::Nothing, 1);
    assert_eq!((counted(&closed), files(&closed, 0)), (vec![4, 4], 4), "a store keeps what it has");
    let (mut d, report) = Driver::open_shards(closed, &options(), 2);
    assert!(report.clean && segments(&d) == [4, 4]);
    model.check(&mut d, "after a close");
    // A shard that is added begins small, and one that is removed takes its log with it.
    for (shards, expected) in [(1, vec![4]), (2, vec![4, 2])] {
        d = Driver::open_shards(crash(&d, Loss::Everything, 2), &options(), shards).0;
        assert_eq!(
            (segments(&d), counted(&d.disk)),
            (expected.iter().map(|n| u64::from(*n)).collect(), expected)
        );
        model.check(&mut d, "with another number of shards");
        model.fill(&mut d, 3);
    }
    // Files of a removed log stay, and are made again for an added one.
    model.fill_until(&mut d, &[4, 4], "with a shard that came in");
    let (mut d, _) = Driver::open_shards(crash(&d, Loss::Everything, 3), &options(), 2);
    model.check(&mut d, "at the end");
}

/// Cuts the power after this many events of a store whose logs get longer; returns whether there
/// was a file that no superblock counted, or `None` if there were fewer events.
fn cut_power(events: u64) -> Option<bool> {
    let (mut d, _) = Driver::open_shards(SimDisk::new(events), &options(), 2);
    let mut model = Model::new();
    d.disk.cut_power_after(events);
    while model.commits < COMMITS_ENOUGH && model.write(&mut d).is_ok() {}
    if !d.disk.is_off() {
        return None;
    }
    let what = format!("cut after {events} events");
    let loss = Loss::random(&mut Rng::new(events));
    let disk = crash(&d, loss, events);
    let uncounted =
        (0..2).any(|shard| files(&disk, shard) > counted(&disk)[usize::from(shard)] as usize);
    let (mut d, _) = Driver::open_shards(disk, &options(), 2);
    model.check(&mut d, &what);
    // It continues to grow where it was interrupted.
    model.fill_until(&mut d, &[4, 4], &what);
    let (mut d, _) = Driver::open_shards(crash(&d, Loss::Everything, events), &options(), 2);
    model.check(&mut d, &what);
    Some(uncounted)
}

fn cut_power_at(events: impl Iterator<Item = u64>) -> (u64, u64) {
    let (mut cuts, mut uncounted) = (0, 0);
    for found in events.map_while(cut_power) {
        cuts += 1;
        uncounted += u64::from(found);
    }
    (cuts, uncounted)
}

/// If this fails, a crash while a log gets longer costs what was acknowledged, or the store can't
/// be opened any more.
#[test]
fn a_crash_at_any_event_of_a_growth_loses_nothing() {
    let (cuts, uncounted) = cut_power_at((1..).step_by(3));
    println!("{cuts} crashes, {uncounted} with files that no superblock counted");
    assert!(
        cuts > 150 && uncounted > 10,
        "{cuts} crashes, {uncounted} with files that no superblock counted"
    );
}

/// If this fails, a store on a full disk stops, or loses what it acknowledges, because its log
/// could not get longer; or it tries the file system again and again.
#[test]
fn a_log_that_can_not_get_longer_stays_as_it_is() {
    let (mut d, _) = Driver::open_shards(SimDisk::new(1), &options(), 1);
    let mut model = Model::new();
    d.disk.inject(Fault {
        forever: true,
        errno: ENOSPC,
        ..Fault::once(OpKind::Allocate, Area::Log, 0)
    });
    model.fill(&mut d, COMMITS_ENOUGH);
    let (tries, checkpoints) =
        (d.disk.counters().faults_allocate, d.all.shards[0].checkpoints_ended());
    assert!(tries > 1 && tries <= checkpoints, "{tries} tries in {checkpoints} checkpoints");
    assert_eq!((segments(&d), counted(&d.disk)), (vec![2], vec![2]));
    let (mut d, _) = Driver::open_shards(crash(&d, Loss::Everything, 1), &options(), 1);
    model.check(&mut d, "on a full disk");
    d.disk.clear_faults();
    model.fill_until(&mut d, &[4], "with room again");
}

/// If the log of one shard can't get longer, or only by one segment, the other's does, and nothing
/// is lost.
fn one_of_two_fails() {
    for (no, expected) in [(2, 2), (3, 3)] {
        let (mut d, _) = Driver::open_shards(SimDisk::new(1), &options(), 2);
        let mut model = Model::new();
        let area = Area::File(FileId::Log(ShardId::new(1), SegmentNo::new(no)));
        d.disk.inject(Fault {
            forever: true,
            errno: ENOSPC,
            ..Fault::once(OpKind::Allocate, area, 0)
        });
        model.fill_until(&mut d, &[4, expected], "one is cut short");
        model.fill(&mut d, COMMITS_ENOUGH);
        assert_eq!((segments(&d), counted(&d.disk)), (vec![4, expected], vec![4, expected as u32]));
        let (mut d, _) = Driver::open_shards(crash(&d, Loss::Everything, 1), &options(), 2);
        model.check(&mut d, "after a crash");
    }
}

/// If this fails, one shard's full disk holds up all others, or the superblock counts a file that
/// is not there.
#[test]
fn each_log_gets_as_long_as_it_can() {
    one_of_two_fails();
}

/// If this fails, a store that was made before logs grew can't be opened, or what its log holds is
/// lost.
#[test]
fn a_store_from_before_logs_grew_has_all_its_segments() {
    let (mut d, _) = Driver::open_shards(SimDisk::new(1), &options(), 2);
    let mut model = Model::new();
    model.fill_until(&mut d, &[4, 4], "before");
    model.fill(&mut d, 5);
    let mut disk = crash(&d, Loss::Everything, 1);
    recount(&mut disk, 0);
    assert_eq!(counted(&disk), [4, 4]);
    let (mut d, _) = Driver::open_shards(disk, &options(), 2);
    model.check(&mut d, "an old store");
    model.fill(&mut d, COMMITS_ENOUGH);
    assert_eq!((segments(&d), counted(&d.disk)), (vec![4, 4], vec![4, 4]));
}

/// If this fails, a store that has lost a part of its log is silently opened without it.
#[test]
fn a_log_that_is_not_as_long_as_the_superblock_says_is_refused() {
    let (mut d, _) = Driver::open_shards(SimDisk::new(1), &options(), 1);
    let mut model = Model::new();
    model.fill_until(&mut d, &[4], "before");
    // So that the last segments are in use.
    model.fill(&mut d, 25);
    let last = FileId::Log(ShardId::LEADER, SegmentNo::new(3));
    let mut disk = crash(&d, Loss::Everything, 1);
    let missing = refusal(&mut creation::copy_of(&mut disk, &[last], &[]), 1);
    assert!(
        missing.kind() == ErrorKind::Corrupt && missing.to_string().contains("backup"),
        "{missing}"
    );
    let short = refusal(&mut creation::copy_of(&mut disk, &[], &[last]), 1);
    assert!(
        short.kind() == ErrorKind::Corrupt && short.to_string().contains("log-000-0003"),
        "{short}"
    );
    // More than a log has: the values make no sense.
    for nonsense in [1, 5, u32::MAX] {
        let mut disk = crash(&d, Loss::Everything, 1);
        recount(&mut disk, nonsense);
        assert_eq!(refusal(&mut disk, 1).kind(), ErrorKind::Corrupt, "{nonsense} segments");
    }
    // Fewer than are in use: an older superblock counts, since the newest was lost.
    let mut disk = crash(&d, Loss::Everything, 1);
    recount(&mut disk, 2);
    let lost = refusal(&mut disk, 1);
    assert!(
        lost.kind() == ErrorKind::Corrupt && lost.to_string().contains("superblock write was lost"),
        "{lost}"
    );
}

/// If this fails, one bad block in a file that holds nothing keeps a store from being opened.
#[test]
fn a_log_file_that_is_not_in_use_and_can_not_be_read_keeps_no_store_closed() {
    let (mut d, _) = Driver::open_shards(SimDisk::new(1), &options(), 1);
    let mut model = Model::new();
    model.fill(&mut d, 5);
    let mut disk = crash(&d, Loss::Everything, 1);
    // A file that a growth before the crash has left.
    let file = FileId::Log(ShardId::LEADER, SegmentNo::new(2));
    execute(&mut disk, DiskOp::Allocate { file, from: 0, to: options().geometry.segment_bytes })
        .expect("there is room");
    disk.inject(Fault::once(OpKind::Read, Area::File(file), 0));
    let (mut d, _) = Driver::open_shards(disk, &options(), 1);
    assert_eq!(d.disk.counters().faults_read, 1);
    model.check(&mut d, "beside a file that can't be read");
    // An unreadable block in a file that is in use is an error.
    let mut disk = crash(&d, Loss::Everything, 1);
    let used = FileId::Log(ShardId::LEADER, SegmentNo::new(0));
    disk.inject(Fault::once(OpKind::Read, Area::File(used), 0));
    assert_eq!(refusal(&mut disk, 1).kind(), ErrorKind::Io);
}

/// If this fails, the superblock counts a log file that an opening before has made, and was killed
/// before it flushed: a power cut takes the file, and the store can't be opened.
#[test]
fn the_log_of_a_new_shard_is_durable_before_the_superblock_counts_it() {
    for is_clean in [true, false] {
        let (mut d, _) = Driver::open_shards(SimDisk::new(1), &options(), 1);
        let mut model = Model::new();
        model.fill(&mut d, 5);
        assert!(!is_clean || matches!(d.ask(Request::Close), Ok(Response::Closed)));
        let mut disk = crash(&d, Loss::Everything, 1);
        // As long as they must be, but not flushed.
        let mut arena = Arena::new(READ_BLOCKS).expect("memory");
        let left = (0..SEGMENTS_FIRST).map(|no| FileId::Log(ShardId::new(1), SegmentNo::new(no)));
        for file in left.clone() {
            let to = options().geometry.segment_bytes;
            execute(&mut disk, DiskOp::Allocate { file, from: 0, to }).expect("there is room");
            create::write_bytes(&mut disk, &mut arena, file, 0, &[9; BLOCK]).expect("written");
        }
        let (mut d, report) = Driver::open_shards(disk, &options(), 2);
        assert_eq!(report.clean, is_clean);
        let image = crash(&d, Loss::Everything, 1);
        for file in left {
            assert_eq!(image.block(file, 0), [9; BLOCK], "{file} was not flushed");
        }
        model.check(&mut d, "with two shards");
    }
}

/// The runs in which planted bugs are looked for.
pub(crate) fn planted_bugs() {
    one_of_two_fails();
    cut_power_at((40..200).step_by(2));
}
