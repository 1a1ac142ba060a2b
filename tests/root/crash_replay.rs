//! The power is cut: the store runs on a disk whose every write and flush is logged, with ext4 or
//! XFS on it; the disk is rebuilt as it may be if the power had gone at points of the log, with any
//! subset of what was not flushed, mounted, and the store opened. 10 such states on each, or as
//! many as COREPAGE_REPLAY_STATES says.
//!
//! The oracle (`tests/common/history.rs`) knows at which length of the log each acknowledgement was
//! heard: from there on it holds. If this fails, what was acknowledged as durable is lost with the
//! power, or a commit comes back in part.

// Real processes take real time; nothing here is replayed from a seed but the choice of states.
#![allow(clippy::disallowed_methods)]

use crate::common;
use common::logged::{DISK_BYTES, Logged, log_bytes};
use common::recording::{Counts, Recording};
use common::replay::{Log, SECTOR, Subset};
use common::role::{Role, Run, Task, say};
use common::workload::{open, work};
use common::{Rng, scratch, seed};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Duration;

/// Not a test of its own: what the child does.
#[test]
fn child() {
    let Some(Task { dir, run, .. }) = Task::of_this_process() else { return };
    let (store, volume) = open(&dir.join("store"), run);
    say("\nready");
    work(&store, &volume, 0, false);
}

// --- states ---

fn states_count() -> u64 {
    std::env::var("COREPAGE_REPLAY_STATES").ok().and_then(|text| text.parse().ok()).unwrap_or(10)
}

/// A store at work for some time on a logged disk with this file system.
fn record(kind: &'static str, run: Run, ms: u64) -> Option<Recording> {
    let mut logged = Logged::new(kind)?;
    let dir = logged.dir().to_owned();
    let writer = Role::start_stamped("write", logged.path(), run, move || log_bytes(&dir));
    writer.wait();
    std::thread::sleep(Duration::from_millis(ms));
    let lines = writer.kill_stamped();
    logged.finish();
    let before = logged.dir().join("before");
    File::create(&before).and_then(|file| file.set_len(DISK_BYTES)).expect("an empty disk");
    Recording::new(kind, &logged.dir().join("log"), &before, lines)
}

/// A recording for each 100 states, each with another driver and number of shards.
fn replay_on(kind: &'static str) {
    let (mut left, mut step, mut sum) = (states_count(), 0, Counts::default());
    let mut rng = Rng::new(seed(9));
    while left > 0 {
        let states = left.min(100);
        let Some(mut recording) = record(kind, Run::of_step(step), 300 + 8 * states) else {
            return;
        };
        let counts = recording.replay(states, step, &mut rng);
        let (known, flushes) =
            (&recording.all, recording.disk.log.entries.iter().filter(|e| e.flushes()).count());
        println!(
            "{kind}, {:?}: {counts:?}; {} entries, {flushes} flushes, {} acknowledged",
            Run::of_step(step),
            recording.end(),
            known.acknowledged().0.len()
        );
        sum += counts;
        (left, step) = (left - states, step + 1);
    }
    println!("{kind}: {sum:?}");
    assert!(sum.states == states_count() && sum.there > 0 && sum.required > 0, "{sum:?}");
}

#[test]
fn what_was_acknowledged_outlives_the_power_on_ext4() {
    replay_on("ext4");
}

#[test]
fn what_was_acknowledged_outlives_the_power_on_xfs() {
    replay_on("xfs");
}

/// Otherwise the tests above would show nothing.
#[test]
fn a_disk_that_lies_and_an_acknowledgement_that_comes_too_early_are_found() {
    let Some(mut recording) = record("ext4", Run::of_step(0), 500) else { return };
    let (ready, end, mut rng) = (recording.ready, recording.end(), Rng::new(seed(5)));
    let (image, _) = recording.disk.at(ready, Subset::All, &mut rng);
    let run = Run::of_step(1);
    recording.examine(&image, &recording.known(ready), run).expect("nothing is wrong yet");
    std::fs::remove_file(&image).expect("the image goes");
    let (image, _) = recording.disk.at(ready, Subset::All, &mut rng);
    let early = recording.examine(&image, &recording.known(end), run);
    println!("early: {early:?}");
    assert!(early.is_err_and(|e| e.contains("durable")), "an early acknowledgement is not found");
    std::fs::remove_file(&image).expect("the image goes");
    let image = recording.disk.of_a_liar(end, &mut rng);
    let lied = recording.examine(&image, &recording.known(end), run);
    println!("lied: {lied:?}");
    assert!(lied.is_err(), "lost flushes are not found");
}

// --- the log's format ---

/// A log by hand: (sector, sectors, flags), each with its number as data.
fn log_of(count: u64, entries: &[(u64, u64, u64)]) -> (tempfile::TempDir, std::io::Result<Log>) {
    let dir = scratch("log");
    let sector = |numbers: &[u64]| {
        let mut bytes: Vec<u8> = numbers.iter().flat_map(|n| n.to_le_bytes()).collect();
        bytes.resize(SECTOR as usize, 0);
        bytes
    };
    let mut bytes = sector(&[0x006a_7366_7773_6872, 1, count, SECTOR]);
    for (n, (at, sectors, flags)) in entries.iter().enumerate() {
        bytes.extend(sector(&[*at, *sectors, *flags, 0]));
        let data = if flags & 4 == 0 { sectors * SECTOR } else { 0 };
        bytes.extend(vec![n as u8 + 1; data as usize]);
    }
    std::fs::write(dir.path().join("log"), bytes).expect("a file");
    let log = Log::open(&dir.path().join("log"));
    (dir, log)
}

#[test]
fn a_log_is_read_and_applied_entry_by_entry() {
    let entries = [(0, 2, 0), (1, 2, 2), (0, 0, 1), (2, 1, 4), (0, 1, 0)];
    let (dir, log) = log_of(5, &entries);
    let log = log.expect("a log");
    let got: Vec<_> =
        log.entries.iter().map(|e| (e.at / SECTOR, e.bytes / SECTOR, e.flags)).collect();
    assert_eq!(got, entries);
    assert_eq!([0, 2, 3, 5].map(|end| log.flushed(end)), [0, 0, 3, 3]);
    let image = File::options()
        .create_new(true)
        .read(true)
        .write(true)
        .open(dir.path().join("image"))
        .expect("a file");
    let sectors = || {
        let mut bytes = [0; 3 * SECTOR as usize];
        image.read_exact_at(&mut bytes, 0).map(|()| [0, 1, 2].map(|n| bytes[n * SECTOR as usize]))
    };
    let (first, rest) = log.entries.split_at(2);
    first.iter().for_each(|e| log.apply(e, &image, 1 << 20, || true).expect("it is written"));
    assert_eq!(sectors().expect("three sectors"), [1, 2, 2]);
    rest.iter().for_each(|e| log.apply(e, &image, 1 << 20, || true).expect("it is written"));
    assert_eq!(sectors().expect("three sectors"), [5, 2, 0]);
    let mut keep = [false, true].into_iter();
    log.apply(&log.entries[0], &image, SECTOR, || keep.next().expect("two pieces"))
        .expect("it is written");
    assert_eq!(sectors().expect("three sectors"), [5, 1, 0]);
}

#[test]
fn a_log_that_was_cut_off_has_the_entries_that_are_whole_and_another_file_is_none() {
    assert_eq!(log_of(7, &[(0, 2, 0), (0, 0, 1)]).1.expect("a log").entries.len(), 2);
    assert_eq!(log_of(1, &[(0, 2, 0), (0, 0, 1)]).1.expect("a log").entries.len(), 1);
    let (dir, log) = log_of(2, &[(0, 0, 1), (0, 4, 0)]);
    assert_eq!(log.expect("a log").entries.len(), 2);
    let path = dir.path().join("log");
    File::options().write(true).open(&path).and_then(|f| f.set_len(5 * SECTOR)).expect("it is cut");
    assert_eq!(Log::open(&path).expect("a log").entries.len(), 1);
    std::fs::write(&path, [0; 4096]).expect("a file");
    assert!(Log::open(&path).is_err());
}
