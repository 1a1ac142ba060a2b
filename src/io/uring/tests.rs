//! Tests what only the ring disk has: limits of locked memory, a kernel that forbids it, flushes
//! over several rings, polling.
//!
//! Some tests run themselves again as a child process, because limits and filters can't be undone.

use super::super::execute;
use super::super::tests::{LOG, OTHER, allocate, filled, flush, read, write};
use super::*;
use crate::base::options::Driver;
use crate::io::flush::FirstFailure;
use crate::io::flush::{Cover, FlushQueue, FlushWaiter, NextLeader};
use crate::io::tests::disk;
use crate::io::{Access, FileOptions, FlushChoice, FlushMethod, IoSlice, Polling, disk_over};
use crate::memory::{Arena, Frame};
use rustix::process::{Resource, Rlimit, setrlimit};
use rustix::thread::CapabilitySet;
use smallvec::smallvec;
use std::path::Path;
use std::process::Command;

/// A ring disk with its own files over the store in `dir`.
fn open(dir: &Path) -> UringDisk {
    let files = Files::open(dir, Access::ReadWrite, &FileOptions::default()).unwrap();
    UringDisk::with_files(files, &UringOptions::default()).unwrap()
}

/// Set in a child process: its role.
const ROLE: &str = "COREPAGE_DISK_TEST_ROLE";

/// The kernel counts locked memory per user: concurrent children that are bound by limits would
/// disturb each other.
static LOCKED: std::sync::Mutex<()> = std::sync::Mutex::new(());

/// Runs the test named `name` of this module in a child process, in the given role, and returns
/// what it printed.
fn child(name: &str, role: &str) -> String {
    let mut command = Command::new(std::env::current_exe().unwrap());
    let (_, module) = module_path!().split_once("::").unwrap();
    let name = format!("{module}::{name}");
    command.args(["--exact", &name, "--nocapture", "--test-threads=1"]).env(ROLE, role);
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "in the role {role}:\n{text}");
    assert!(text.contains("1 passed"), "the child did not run {name}:\n{text}");
    text
}

fn role() -> Option<String> {
    std::env::var(ROLE).ok()
}

/// With little locked memory the ring must work, with less memory registered, and report that.
#[test]
fn every_limit_of_locked_memory_works_and_is_reported() {
    let Some(role) = role() else {
        let _alone = LOCKED.lock();
        let registered = ["65536", "8388608", "unlimited"].map(|limit| {
            let text = child("every_limit_of_locked_memory_works_and_is_reported", limit);
            let bytes =
                text.lines().find_map(|line| line.split("registered=").nth(1)).expect(&text);
            bytes.trim().parse::<u64>().unwrap()
        });
        assert!(registered[0] <= 65536, "{registered:?}");
        assert!((1 << 20..=8 << 20).contains(&registered[1]), "{registered:?}");
        assert_eq!(registered[2], 64 << 20);
        return;
    };
    if role != "unlimited" {
        limit_locks(role.parse().unwrap());
    }
    let dir = tempfile::tempdir().unwrap();
    let mut disk = open(dir.path());
    let mut arena = Arena::new(64 << 8).unwrap();
    disk.register(arena.mapping());
    println!("registered={}", disk.report().fixed_bytes);
    println!("{}", disk.report());
    allocate(&mut disk, LOG, 0, 64 << 20).unwrap();
    // The frames span the arena, so some are registered, some in part, and some not at all.
    let frames: Vec<Frame> = (0..30).map(|i| filled(&mut arena, 9, i)).collect();
    for (i, frame) in (0..).zip(&frames) {
        write(&mut disk, LOG, i << 21, &[frame]).unwrap();
    }
    drop(frames);
    for i in 0..30 {
        let back = read(&mut disk, &mut arena, LOG, i << 21, &[9]).unwrap();
        assert!(back[0].iter().all(|b| u64::from(*b) == i));
    }
}

/// Binds this thread to a limit of locked memory. Drops the right to exceed it first: with that
/// right it would not apply.
fn limit_locks(bytes: u64) {
    if let Ok(mut sets) = rustix::thread::capabilities(None) {
        sets.effective.remove(CapabilitySet::IPC_LOCK);
        rustix::thread::set_capabilities(None, sets).unwrap();
    }
    setrlimit(Resource::Memlock, Rlimit { current: Some(bytes), maximum: Some(bytes) }).unwrap();
}

/// A server that restarts at once must not fall back to the slow driver because its predecessor's
/// memory has not been returned yet.
#[test]
fn a_ring_made_again_at_once_finds_room() {
    if role().is_none() {
        let _alone = LOCKED.lock();
        child("a_ring_made_again_at_once_finds_room", "again");
        return;
    }
    // Room for one, not for two.
    limit_locks(64 << 10);
    for _ in 0..10 {
        drop(super::ring::Ring::new(256, RingMode::Interrupts).unwrap());
    }
}

/// Where io_uring is forbidden, the reason must be reported and the portable disk used.
#[test]
fn a_forbidden_io_uring_is_named_and_the_portable_disk_taken() {
    let Some(role) = role() else {
        probe().unwrap();
        for (role, said) in [
            ("1", "seccomp filter forbids io_uring (EPERM)"),
            ("38", "(ENOSYS)"),
            ("12", "(ENOMEM)"),
        ] {
            let text = child("a_forbidden_io_uring_is_named_and_the_portable_disk_taken", role);
            assert!(text.contains(said), "{said}: {text}");
        }
        return;
    };
    forbid(425, role.parse().unwrap());
    let why = probe().expect_err("the filter forbids it");
    println!("{why}");
    let dir = tempfile::tempdir().unwrap();
    let files = Files::open(dir.path(), Access::ReadWrite, &FileOptions::default()).unwrap();
    let refused = UringDisk::with_files(files.clone(), &UringOptions::default())
        .err()
        .expect("there is no ring");
    assert_eq!(refused.kind(), ErrorKind::Unsupported);
    let mut disk = disk_over(files).unwrap();
    allocate(disk.as_mut(), LOG, 0, 4096).unwrap();
}

/// Makes a system call fail with `errno` on this thread and on those that it starts.
fn forbid(number: i64, errno: u32) {
    use seccompiler::{SeccompAction, SeccompFilter};
    let arch = std::env::consts::ARCH.try_into().unwrap();
    let rules = [(number, vec![])].into();
    let filter =
        SeccompFilter::new(rules, SeccompAction::Allow, SeccompAction::Errno(errno), arch).unwrap();
    let program: seccompiler::BpfProgram = filter.try_into().unwrap();
    seccompiler::apply_filter(&program).unwrap();
}

/// A log segment whose name a power loss removes might as well never have been written. If a
/// directory can't be synced, every operation that would rely on it must fail, with any driver.
#[test]
fn a_directory_that_can_t_be_synced_fails_the_allocation() {
    if role().is_none() {
        child("a_directory_that_can_t_be_synced_fails_the_allocation", "sync");
        return;
    }
    // Set before the workers start: a filter applies to threads that are started later.
    forbid(libc::SYS_fsync, 5);
    for driver in [Driver::Ring, Driver::Portable] {
        let dir = tempfile::tempdir().unwrap();
        let files = Files::open(dir.path(), Access::ReadWrite, &FileOptions::default()).unwrap();
        let mut disk = disk(driver, files, 8);
        let error = allocate(disk.as_mut(), LOG, 0, 4096).expect_err("its name is not durable");
        assert!(error.to_string().contains("syncing the directory entry of"), "{error}");
    }
}

/// The right to create rings is useless without the right to use them.
#[test]
fn a_ring_that_can_t_be_entered_is_found_by_the_probe() {
    if role().is_none() {
        child("a_ring_that_can_t_be_entered_is_found_by_the_probe", "enter");
        return;
    }
    forbid(426, 1);
    let why = probe().expect_err("the filter forbids it");
    assert!(why.to_string().contains("entering"), "{why}");
}

/// The report tells what the machine offers; it must never claim polling if the first polled read
/// fails.
#[test]
fn polling_is_used_only_where_it_works() {
    let dir = tempfile::tempdir().unwrap();
    let mut disk = open(dir.path());
    let mut arena = Arena::new(16).unwrap();
    allocate(&mut disk, LOG, 0, 4096).unwrap();
    flush(&mut disk, &[LOG]).unwrap();
    read(&mut disk, &mut arena, LOG, 0, &[0]).unwrap();
    let report = disk.report();
    println!("{report}");
    if let Polling::Off(why) = report.polling {
        assert!(!why.is_empty());
    }
    let options = UringOptions { polling: false, ring_entries: 8, ..UringOptions::default() };
    let disk = UringDisk::with_files(disk.files.clone(), &options).unwrap();
    assert_eq!(disk.report().polling, Polling::Off("not asked for".into()));
    assert_eq!(disk.report().ring_entries, 8);
}

/// The disk must not stop waiting for good because one entry was refused: here the ring can't use
/// the file.
#[test]
fn an_error_of_the_device_is_an_error_of_the_operation() {
    let dir = tempfile::tempdir().unwrap();
    let mut disk = open(dir.path());
    let mut arena = Arena::new(1024).unwrap();
    allocate(&mut disk, LOG, 0, 4 << 20).unwrap();
    // Direct I/O does not accept this offset: each of the entries fails, the operation once.
    let into = smallvec![arena.alloc(9).unwrap()];
    let error = execute(&mut disk, DiskOp::Read { file: LOG, offset: 1, into })
        .expect_err("it is no block");
    assert!(error.to_string().contains("at 1 of"), "{error}");
    assert_eq!(error.kind(), ErrorKind::Io);
    read(&mut disk, &mut arena, LOG, 0, &[9]).unwrap();
}

/// A ring over a directory whose log is really flushed, whether or not the device could make single
/// writes durable; with one flush for all files if `shared`, where that is allowed.
fn flushing(dir: &std::path::Path, shared: bool) -> (Arc<Files>, UringDisk) {
    let open = |flush| {
        Files::open(dir, Access::ReadWrite, &FileOptions { flush, ..FileOptions::default() })
    };
    let choices = if shared {
        [FlushChoice::Shared, FlushChoice::PerFile]
    } else {
        [FlushChoice::PerFile; 2]
    };
    let files = choices
        .into_iter()
        .find_map(|choice| open(choice).ok())
        .expect("files that are flushed each");
    let disk = UringDisk::with_files(files.clone(), &UringOptions::default()).unwrap();
    (files, disk)
}

/// A failed flush must stay failed, for every disk and every file that it stood for.
#[test]
fn a_failed_round_is_the_answer_to_all_later_flushes() {
    for shared in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let (files, disk) = flushing(dir.path(), shared);
        let mut disks =
            [disk, UringDisk::with_files(files.clone(), &UringOptions::default()).unwrap()];
        allocate(&mut disks[0], LOG, 0, 8192).unwrap();
        allocate(&mut disks[1], OTHER, 0, 8192).unwrap();
        flush(&mut disks[0], &[LOG, OTHER]).unwrap();
        // Another thread leads this batch: whoever joins now waits for the next one.
        let file = files.file(LOG);
        let nobody = FlushWaiter::Call(Box::new(|_| {}));
        let batch = files
            .join(&disks[0].flush_queue, &file, Cover::AnyFile, nobody)
            .expect("nothing is under way");
        disks[0].submit(OpId(1), DiskOp::Flush { files: smallvec![LOG] });
        disks[0].push();
        let cause = std::io::Error::from_raw_os_error(5);
        assert!(batch.end(Err(Error::io("flushing", cause)), NextLeader::Same).is_none());
        let mut done = Vec::new();
        while done.is_empty() {
            disks[0].wait(None);
            disks[0].reap(&mut done);
        }
        assert!(done[0].result.is_err());
        for disk in &mut disks {
            flush(disk, &[LOG]).expect_err("it stays failed");
            let covered = flush(disk, &[OTHER]);
            assert_eq!(covered.is_err(), files.flush_method() == FlushMethod::Shared);
            allocate(disk, LOG, 8192, 12288).expect_err("its flush can't be trusted either");
        }
    }
}

/// Where one flush stands for all files, a flush that was in progress when another failed can't be
/// trusted.
#[test]
fn a_failure_reaches_the_rounds_of_other_disks_that_are_under_way() {
    let told = Arc::new(std::sync::Mutex::new(Vec::new()));
    let failed = FirstFailure::default();
    let flush_queue = [(); 2].map(|()| FlushQueue::with(failed.clone()));
    let dir = tempfile::tempdir().unwrap();
    let file =
        Files::open(dir.path(), Access::ReadWrite, &FileOptions::default()).unwrap().file(LOG);
    let [one, two] = flush_queue.map(|flush_queue| {
        let told = told.clone();
        let waiter = FlushWaiter::Call(Box::new(move |result: Result<()>| {
            told.lock().unwrap().push(result.is_ok())
        }));
        flush_queue.join(&file.file, Cover::AnyFile, waiter).expect("nothing is under way")
    });
    // The batch of a leader that panics has failed.
    drop(one);
    assert!(two.end(Ok(()), NextLeader::Same).is_none());
    assert_eq!(*told.lock().unwrap(), [false, false]);
}

/// A flush that is requested while a batch is in progress joins the next one, which another disk
/// may have to lead.
#[test]
fn the_next_round_is_led_by_whoever_waits_for_it() {
    let dir = tempfile::tempdir().unwrap();
    let (files, mut disk) = flushing(dir.path(), false);
    allocate(&mut disk, LOG, 0, 8192).unwrap();
    let file = files.file(LOG);
    let stranger = RemoteEvents::new(disk.waker());
    let leaders = || [NextLeader::AnotherIfAny(None), NextLeader::AnotherIfAny(Some(&stranger))];
    for (leader, polls) in
        leaders().into_iter().zip([false; 2]).chain(leaders().into_iter().zip([true; 2]))
    {
        let batch = files.join(
            &disk.flush_queue,
            &file,
            Cover::AnyFile,
            FlushWaiter::Call(Box::new(|_| {})),
        );
        disk.submit(OpId(1), DiskOp::Flush { files: smallvec![LOG] });
        disk.push();
        disk.wait(Some(1000));
        let mut done = Vec::new();
        disk.reap(&mut done);
        assert!(done.is_empty(), "a flush was answered by a batch that began before it");
        assert!(
            batch.expect("nothing is under way").end(Ok(()), leader).is_none(),
            "the ring leads"
        );
        // A thread that polls never waits, and has nothing to push.
        let laps = if polls { 60_000 } else { u32::MAX };
        for _ in 0..laps {
            match polls {
                #[allow(
                    clippy::disallowed_methods,
                    reason = "the kernel is given time, as between two laps"
                )]
                true => std::thread::sleep(std::time::Duration::from_millis(1)),
                false => disk.wait(None),
            }
            disk.reap(&mut done);
            if !done.is_empty() {
                break;
            }
        }
        assert!(done.first().expect("the batch never reached the kernel").result.is_ok());
    }
}

/// The first flush of a log after opening also covers what a process that died has left, so it must
/// be a real one.
#[test]
fn durable_writes_spare_only_flushes_of_what_this_process_wrote() {
    let dir = tempfile::tempdir().unwrap();
    allocate(&mut open(dir.path()), LOG, 0, 8192).unwrap();
    let options = FileOptions { flush: FlushChoice::Dsync, ..FileOptions::default() };
    let files = Files::open(dir.path(), Access::ReadWrite, &options).unwrap();
    let mut disk = UringDisk::with_files(files.clone(), &UringOptions::default()).unwrap();
    let log = [files.file(LOG)];
    assert_eq!(files.to_flush(&log).unwrap().len(), 1);
    flush(&mut disk, &[LOG]).unwrap();
    assert_eq!(files.to_flush(&log).unwrap().len(), 0);
    allocate(&mut disk, FileId::Data, 0, 8192).unwrap();
    assert_eq!(
        files.to_flush(&[files.file(FileId::Data)]).unwrap().len(),
        1,
        "its writes are not durable by themselves"
    );
    let mut arena = Arena::new(16).unwrap();
    let frame = filled(&mut arena, 0, 3);
    for _ in 0..3 {
        write(&mut disk, LOG, 0, &[&frame]).unwrap();
        flush(&mut disk, &[LOG]).unwrap();
    }
    let from = smallvec![IoSlice::whole(frame.pin()), IoSlice::whole(frame.pin())];
    execute(&mut disk, DiskOp::Write { file: LOG, offset: 0, from }).unwrap();
}

/// Only a flush of that very file makes durable what a process that died has left in it; after that
/// one flush stands for all, where that is allowed.
#[test]
fn one_flush_stands_for_all_files_once_each_was_flushed() {
    let dir = tempfile::tempdir().unwrap();
    for file in [LOG, OTHER, FileId::Data] {
        allocate(&mut open(dir.path()), file, 0, 8192).unwrap();
    }
    let (files, mut disk) = flushing(dir.path(), true);
    let all = [LOG, OTHER, FileId::Data].map(|id| files.file(id));
    assert_eq!(files.to_flush(&all).unwrap().len(), 3);
    flush(&mut disk, &[LOG]).unwrap();
    assert_eq!(files.to_flush(&all[..2]).unwrap().len(), 2, "the other was not flushed yet");
    flush(&mut disk, &[LOG, OTHER, FileId::Data]).unwrap();
    let syncs = if files.flush_method() == FlushMethod::Shared { 1 } else { 3 };
    assert_eq!(files.to_flush(&all).unwrap().len(), syncs);
}

/// A device that polls needs a second ring for flushes and wake-ups. No such device is at hand, so
/// the two rings are tested without one.
#[test]
fn two_rings_work_as_one_disk() {
    let dir = tempfile::tempdir().unwrap();
    let files = Files::open(dir.path(), Access::ReadWrite, &FileOptions::default()).unwrap();
    let options = UringOptions { ring_entries: 8, ..UringOptions::default() };
    let none = Polling::Off("a test".into());
    let mut disk = UringDisk::with_rings(files.clone(), &options, none, ControlRing::Own).unwrap();
    let mut arena = Arena::new(1024).unwrap();
    disk.register(arena.mapping());
    allocate(&mut disk, LOG, 0, 4 << 20).unwrap();
    let frames: Vec<Frame> = (0..100).map(|i| filled(&mut arena, 0, i)).collect();
    for (i, frame) in (0..).zip(&frames) {
        let from = smallvec![IoSlice::whole(frame.pin())];
        disk.submit(OpId(i), DiskOp::Write { file: LOG, offset: i << 12, from });
        disk.submit(OpId(1000 + i), DiskOp::Flush { files: smallvec![LOG] });
    }
    let mut done = Vec::new();
    while done.len() < 200 {
        disk.push();
        disk.wait(None);
        disk.reap(&mut done);
    }
    assert!(done.iter().all(|c| c.result.is_ok()));
    for i in 0..100 {
        assert_eq!(read(&mut disk, &mut arena, LOG, i << 12, &[0]).unwrap()[0][5], i as u8);
    }
    let waker = disk.waker();
    let other = std::thread::spawn(move || waker.wake());
    disk.wait(None);
    other.join().unwrap();
    disk.submit(OpId(1), DiskOp::Flush { files: smallvec![LOG] });
    disk.submit(
        OpId(2),
        DiskOp::Read { file: LOG, offset: 0, into: smallvec![arena.alloc(8).unwrap()] },
    );
    disk.push();
    drop((disk, files));
    Files::open(dir.path(), Access::ReadWrite, &FileOptions::default()).unwrap();
}

/// The ring must work on a file system in memory and on one without direct I/O, too.
#[test]
fn the_ring_works_on_file_systems_of_all_kinds() {
    for base in ["/dev/shm", "/run", "/var/tmp", "/tmp"] {
        let Ok(dir) = tempfile::tempdir_in(base) else { continue };
        let mut disk = open(dir.path());
        println!("{base}: {}", disk.report());
        let mut arena = Arena::new(1024).unwrap();
        disk.register(arena.mapping());
        allocate(&mut disk, LOG, 0, 2 << 20).unwrap();
        let frame = filled(&mut arena, 9, 0x77);
        write(&mut disk, LOG, 0, &[&frame]).unwrap();
        flush(&mut disk, &[LOG]).unwrap();
        drop(frame);
        assert!(read(&mut disk, &mut arena, LOG, 0, &[9]).unwrap()[0].iter().all(|b| *b == 0x77));
    }
}

/// A device whose queue is full, or a kernel short of memory, must get time instead of constant
/// retries, and what it refused must not count as done.
#[test]
fn a_transfer_that_the_device_refuses_for_now_is_repeated_after_a_pause() {
    for control in [ControlRing::Main, ControlRing::Own] {
        let dir = tempfile::tempdir().unwrap();
        let files = Files::open(dir.path(), Access::ReadWrite, &FileOptions::default()).unwrap();
        let off = Polling::Off("not asked for".into());
        let mut disk =
            UringDisk::with_rings(files, &UringOptions::default(), off, control).unwrap();
        let mut arena = Arena::new(1024).unwrap();
        allocate(&mut disk, LOG, 0, 8192).unwrap();
        let frame = filled(&mut arena, 0, 7);
        write(&mut disk, LOG, 4096, &[&frame]).unwrap();
        let (into, before) = (smallvec![filled(&mut arena, 0, 0xee)], disk.calls());
        disk.submit(OpId(1), DiskOp::Read { file: LOG, offset: 4096, into });
        for refusals in 1..=6 {
            let span = disk.queue.pop_front().expect("it is to be transferred, again");
            disk.span_completed(span, -libc::EAGAIN);
            assert!(disk.queue.is_empty() && disk.retries.len() == 1, "it is not repeated at once");
            let mut waits = 0;
            while disk.queue.is_empty() && disk.completions.is_empty() {
                disk.wait(None);
                waits += 1;
            }
            assert!(waits <= 4, "refusal {refusals}: {waits} waits for one pause");
            if !disk.completions.is_empty() {
                // On a slow machine the pause may be over when a wait begins, which then repeats
                // the transfer itself.
                break;
            }
        }
        let mut done = Vec::new();
        disk.reap(&mut done);
        while done.is_empty() {
            disk.wait(None);
            disk.reap(&mut done);
        }
        let Some(Completion { op: DiskOp::Read { into, .. }, result: Ok(()), .. }) = done.pop()
        else {
            panic!("it failed")
        };
        assert!(into[0].iter().all(|byte| *byte == 7));
        assert!(disk.calls() - before < 64, "{} system calls", disk.calls() - before);
        // Dropping the disk does not wait for a transfer that was refused.
        disk.submit(OpId(2), DiskOp::Read { file: LOG, offset: 0, into });
        let mut span = disk.queue.pop_front().expect("it is to be transferred");
        (0..100).for_each(|_| assert!(span.backoff.refused().is_some()));
        disk.span_completed(span, -libc::EAGAIN);
        disk.push();
    }
}

/// While the kernel takes no entries, a thread that only wants to wait must not retry without
/// pauses.
#[test]
#[allow(clippy::disallowed_methods, reason = "that time passes is what is tested")]
fn a_ring_that_can_t_be_waited_in_pauses_the_waiter() {
    if role().is_none() {
        child("a_ring_that_can_t_be_waited_in_pauses_the_waiter", "wait");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut disk = open(dir.path());
    forbid(libc::SYS_io_uring_enter, libc::EAGAIN as u32);
    let since = std::time::Instant::now();
    (0..20).for_each(|_| disk.wait(None));
    // Each wait slept for a millisecond; without a pause all of them would take a few microseconds.
    assert!(since.elapsed() >= std::time::Duration::from_millis(20), "{:?}", since.elapsed());
    // A wait with a shorter timeout is shorter.
    disk.wait(Some(100));
    assert!(disk.broken().is_none(), "it may work later");
    // The ring can't deliver its last completions either.
    std::mem::forget(disk);
}
