//! Tests when a new store is made, and when existing files are left alone.

use super::*;
use crate::base::SegmentNo;
use crate::io::Completion;

/// Copies the files of `from` except those in `missing`, and cuts those in `emptied` to a block of
/// zeros.
pub(super) fn copy_of(from: &mut SimDisk, missing: &[FileId], emptied: &[FileId]) -> SimDisk {
    let mut to = SimDisk::new(9);
    let mut arena = Arena::new(READ_BLOCKS).expect("memory");
    for (file, bytes) in SimDisk::files(from) {
        if missing.contains(&file) {
            continue;
        }
        let len = if emptied.contains(&file) { BLOCK as u64 } else { bytes };
        execute(&mut to, DiskOp::Allocate { file, from: 0, to: len }).expect("a file");
        for offset in (0..len).step_by(BLOCK).filter(|_| !emptied.contains(&file)) {
            let bytes = read_bytes(from, &mut arena, file, offset, BLOCK).expect("it is read");
            if bytes.iter().any(|byte| *byte != 0) {
                create::write_bytes(&mut to, &mut arena, file, offset, &bytes)
                    .expect("it is written");
            }
        }
    }
    to
}

/// All bytes of all files.
fn image(disk: &SimDisk) -> Vec<(FileId, Vec<Vec<u8>>)> {
    let files = SimDisk::files(disk).into_iter();
    files
        .map(|(file, len)| (file, (0..len / BLOCK as u64).map(|i| disk.block(file, i)).collect()))
        .collect()
}

/// If this fails, `serve` on a directory in which some files of a store are empty or missing (a bad
/// copy, a file system that was repaired) makes a new, empty store over the data that is still
/// there.
#[test]
fn nothing_is_created_over_what_is_left_of_a_store() {
    let (mut d, _) = Driver::open(SimDisk::new(1));
    d.commit((0..8).map(|i| (key(i), put(7))).collect());
    assert!(matches!(d.ask(Request::Checkpoint), Ok(Response::Checkpointed(_))));
    let all: Vec<_> = SimDisk::files(&d.disk).into_iter().map(|(file, _)| file).collect();
    let kinds = |set: u32| {
        // By bits: meta, extents, data, the first log segment, the other ones.
        let first = FileId::Log(ShardId::LEADER, SegmentNo::new(0));
        let bit = |file: &FileId| match file {
            FileId::Meta => 0,
            FileId::Table => 1,
            FileId::Data => 2,
            log if *log == first => 3,
            FileId::Log(..) => 4,
        };
        all.iter().copied().filter(|file| set >> bit(file) & 1 == 1).collect::<Vec<_>>()
    };
    let mut tried = 0;
    for (missing, emptied) in
        (0..32).flat_map(|missing| (0..32).map(move |emptied| (missing, emptied)))
    {
        // Without its superblock. A directory without the first segment is refused by its names
        // already, and with neither data, table nor other segments nothing is left.
        let left = !missing & 0b10110;
        if missing & emptied != 0
            || (missing | emptied) & 1 == 0
            || missing & 0b1000 != 0
            || left == 0
        {
            continue;
        }
        tried += 1;
        let mut disk = copy_of(&mut d.disk, &kinds(missing), &kinds(emptied));
        let before = image(&disk);
        let what = format!("missing {:?}, empty {:?}", kinds(missing), kinds(emptied));
        let Err(error) = begin(&mut disk, &options(), 1, 7, 0) else {
            panic!("a store was made: {what}")
        };
        assert_eq!(error.kind(), crate::ErrorKind::Corrupt, "{what}: {error}");
        assert!(error.to_string().contains("nothing was changed"), "{error}");
        assert!(stored_geometry(&mut disk).is_err(), "{what}");
        assert!(image(&disk) == before, "{what}: files were changed");
    }
    assert!(tried > 30, "{tried}");
}

/// If this fails, a store whose creation was cut short by a crash can't be made in that directory
/// any more.
#[test]
fn a_creation_that_a_crash_has_cut_short_begins_anew() {
    let mut rng = Rng::new(5);
    let (mut anew, mut finished) = (0, 0);
    for events in 0..400 {
        let mut disk = SimDisk::new(events);
        disk.cut_power_after(events);
        if begin(&mut disk, &options(), 2, 7, 0).is_ok() {
            break;
        }
        // Twice, the second time while it starts over.
        for round in 0..2 {
            let mut out: Vec<Completion> = Vec::new();
            disk.reap(&mut out);
            disk = disk.crash(Loss::random(&mut rng), &mut rng);
            if round == 0 {
                disk.cut_power_after(rng.below(60));
                let _ = begin(&mut disk, &options(), 2, 7, 0);
            }
        }
        let report = match begin(&mut disk, &options(), 2, 7, 0) {
            Ok(opening) => opening.report,
            Err(error) => panic!("cut after {events} events, the store can't be made: {error}"),
        };
        *if report.created { &mut anew } else { &mut finished } += 1;
    }
    assert!(anew > 20 && finished > 0, "{anew} begun anew, {finished} found finished");
}
