//! Checks what every disk promises, with each driver on each medium, on a real file system.

use super::media::MediaOptions;
use super::media::single_file::SingleFile;
use super::uring::{UringDisk, UringOptions};
use super::*;
use crate::base::BLOCK;
use crate::base::error::ErrorKind;
use crate::base::options::Driver;
use crate::memory::Arena;
use smallvec::smallvec;
use std::path::Path;
use std::sync::Arc;

pub(super) const LOG: FileId = FileId::Log(ShardId::new(0), SegmentNo::new(0));
pub(super) const OTHER: FileId = FileId::Log(ShardId::new(1), SegmentNo::new(0));

/// What the drivers have in common besides the trait [`Disk`].
pub(super) trait DriverDisk: Disk {
    fn waker(&self) -> DiskWaker;
    fn report(&self) -> DiskReport;
}

impl DriverDisk for UringDisk {
    fn waker(&self) -> DiskWaker {
        UringDisk::waker(self)
    }

    fn report(&self) -> DiskReport {
        UringDisk::report(self)
    }
}

impl DriverDisk for PortableDisk {
    fn waker(&self) -> DiskWaker {
        PortableDisk::waker(self)
    }

    fn report(&self) -> DiskReport {
        PortableDisk::report(self)
    }
}

/// Makes another disk of this driver over these files.
pub(super) fn disk(driver: Driver, files: Arc<Files>, workers_count: usize) -> Box<dyn DriverDisk> {
    let ring = UringOptions { ring_entries: 16, ..UringOptions::default() };
    match driver {
        Driver::Ring => Box::new(UringDisk::with_files(files, &ring).unwrap()),
        Driver::Portable => {
            Box::new(PortableDisk::with_files(files, &PortableOptions { workers_count }).unwrap())
        }
        Driver::Auto => unreachable!("a test names its driver"),
    }
}

/// Where a test's files lie.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Medium {
    /// A file for each role.
    Directory,
    /// One file for all roles, as on a raw device.
    SingleFile,
}

/// What a test runs on.
pub(super) struct Case<'a> {
    dir: &'a Path,
    medium: Medium,
    driver: Driver,
    pub(super) options: &'a FileOptions,
}

impl Case<'_> {
    pub(super) fn make(&self, files: Arc<Files>) -> Box<dyn DriverDisk> {
        disk(self.driver, files, 4)
    }

    pub(super) fn files(&self) -> Arc<Files> {
        self.try_files(Access::ReadWrite, self.options).unwrap()
    }

    pub(super) fn try_files(&self, access: Access, options: &FileOptions) -> Result<Arc<Files>> {
        match self.medium {
            Medium::Directory => Files::open(self.dir, access, options),
            Medium::SingleFile => {
                let media: MediaOptions = options.for_media(access);
                Files::over(Box::new(SingleFile::open(self.dir, &media)?), access, options)
            }
        }
    }
}

/// Runs `test` with each driver on each medium, and each with and without direct I/O.
pub(super) fn each_driver(test: impl Fn(&Case<'_>)) {
    for driver in [Driver::Ring, Driver::Portable] {
        for medium in [Medium::Directory, Medium::SingleFile] {
            for page_cache in [PageCache::Bypass, PageCache::Use] {
                let dir = tempfile::tempdir().unwrap();
                let options = FileOptions { page_cache, ..FileOptions::default() };
                test(&Case { dir: dir.path(), medium, driver, options: &options });
            }
        }
    }
}

pub(super) fn filled(arena: &mut Arena, order: u8, byte: u8) -> Frame {
    let mut frame = arena.alloc(order).unwrap();
    frame.try_mut().unwrap().fill(byte);
    frame
}

pub(super) fn write(
    disk: &mut dyn Disk,
    file: FileId,
    offset: u64,
    frames: &[&Frame],
) -> Result<()> {
    let from = frames.iter().map(|f| IoSlice::whole(f.pin())).collect();
    execute(disk, DiskOp::Write { file, offset, from }).map(drop)
}

pub(super) fn read(
    disk: &mut dyn Disk,
    arena: &mut Arena,
    file: FileId,
    offset: u64,
    orders: &[u8],
) -> Result<Vec<Frame>> {
    let into = orders.iter().map(|o| filled(arena, *o, 0xee)).collect();
    match execute(disk, DiskOp::Read { file, offset, into })? {
        DiskOp::Read { into, .. } => Ok(into.into_vec()),
        other => panic!("{other:?} came back"),
    }
}

pub(super) fn allocate(disk: &mut dyn Disk, file: FileId, from: u64, to: u64) -> Result<()> {
    execute(disk, DiskOp::Allocate { file, from, to }).map(drop)
}

pub(super) fn flush(disk: &mut dyn Disk, files: &[FileId]) -> Result<()> {
    execute(disk, DiskOp::Flush { files: files.into() }).map(drop)
}

/// What was written is read back, at every size, in one piece of memory and in many, registered and
/// not.
#[test]
fn all_sizes_and_all_runs_of_frames_come_back() {
    each_driver(|case| {
        let mut disk = case.make(case.files());
        let mut arena = Arena::new(4096).unwrap();
        allocate(disk.as_mut(), LOG, 0, 8 << 20).unwrap();
        let shapes: &[&[u8]] = &[
            &[0],
            &[1],
            &[9],
            &[0, 1, 0, 3, 0, 7, 0, 0],
            &[8, 0, 8],
            &[7, 7, 7, 7, 7, 7, 7],
            &[0; 200],
            &[9, 0, 9],
        ];
        for registered in [false, true] {
            if registered {
                disk.register(arena.mapping());
            }
            for (i, orders) in shapes.iter().enumerate() {
                // Every second one is given back at once, so that those that stay are not adjacent.
                let mut holes = Vec::new();
                let frames: Vec<Frame> = (0u8..)
                    .zip(*orders)
                    .map(|(n, &order)| {
                        holes.push(arena.alloc(0).unwrap());
                        filled(&mut arena, order, n.wrapping_mul(7).wrapping_add(i as u8))
                    })
                    .collect();
                drop(holes);
                write(disk.as_mut(), LOG, 4096, &frames.iter().collect::<Vec<_>>()).unwrap();
                flush(disk.as_mut(), &[LOG]).unwrap();
                drop(frames);
                let back = read(disk.as_mut(), &mut arena, LOG, 4096, orders).unwrap();
                for (n, frame) in (0u8..).zip(&back) {
                    let byte = n.wrapping_mul(7).wrapping_add(i as u8);
                    assert!(frame.iter().all(|b| *b == byte), "shape {i}, frame {n}");
                }
            }
        }
        println!("{}", disk.report());
    });
}

/// A part of a frame is written to its place and nowhere else.
#[test]
fn slices_of_frames_are_written_and_nothing_else() {
    each_driver(|case| {
        let mut disk = case.make(case.files());
        let mut arena = Arena::new(64).unwrap();
        disk.register(arena.mapping());
        allocate(disk.as_mut(), LOG, 0, 32768).unwrap();
        let mut frame = arena.alloc(3).unwrap();
        for (i, block) in frame.try_mut().unwrap().chunks_mut(BLOCK).enumerate() {
            block.fill(i as u8 + 1);
        }
        let slice = |start: u32, len: u32| IoSlice { frame: frame.pin(), start, len };
        let from = smallvec![slice(8192, 4096), slice(20480, 8192)];
        execute(disk.as_mut(), DiskOp::Write { file: LOG, offset: 4096, from }).unwrap();
        let back = read(disk.as_mut(), &mut arena, LOG, 0, &[0; 8]).unwrap();
        assert_eq!(back.iter().map(|f| f[17]).collect::<Vec<_>>(), [0, 3, 6, 7, 0, 0, 0, 0]);
    });
}

/// With far more operations than the ring takes, each completes once, with the right result.
#[test]
fn a_flood_of_operations_completes() {
    each_driver(|case| {
        let mut disk = case.make(case.files());
        let mut arena = Arena::new(8192).unwrap();
        disk.register(arena.mapping());
        allocate(disk.as_mut(), LOG, 0, 4 << 20).unwrap();
        for i in 0..1024u64 {
            let frame = filled(&mut arena, 0, (i % 251) as u8);
            disk.submit(
                OpId(i),
                DiskOp::Write {
                    file: LOG,
                    offset: i * 4096,
                    from: smallvec![IoSlice::whole(frame.pin())],
                },
            );
        }
        let mut done = Vec::new();
        await_all(disk.as_mut(), &mut done, 1024);
        for i in 0..1024u64 {
            // Every eighth is larger than one entry takes.
            let order = if i % 8 == 0 { 8 } else { 0 };
            let into = smallvec![filled(&mut arena, order, 0xee)];
            let offset = if order == 8 { 0 } else { i * 4096 };
            disk.submit(OpId(i), DiskOp::Read { file: LOG, offset, into });
            if i % 64 == 0 {
                disk.submit(OpId(2000 + i), DiskOp::Flush { files: smallvec![LOG] });
            }
            if arena.free_blocks() < 1024 {
                disk.push();
                disk.wait(None);
                disk.reap(&mut done);
                done.iter_mut().for_each(check_and_drop);
            }
        }
        await_all(disk.as_mut(), &mut done, 1024 + 16);
        let mut ids: Vec<u64> = done.iter().map(|c| c.id.0).collect();
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), 1024 + 16);
    });
}

fn check_and_drop(done: &mut Completion) {
    assert!(done.result.is_ok(), "{:?}", done.result);
    if let DiskOp::Read { into, .. } = &mut done.op {
        for frame in into.drain(..) {
            for (i, block) in frame.chunks(BLOCK).enumerate() {
                let i = if frame.len() > BLOCK { i as u64 } else { done.id.0 };
                assert!(
                    block.iter().all(|b| u64::from(*b) == i % 251),
                    "read {}, block {i}",
                    done.id.0
                );
            }
        }
    }
}

fn await_all(disk: &mut dyn Disk, done: &mut Vec<Completion>, count: usize) {
    while done.len() < count {
        disk.push();
        disk.wait(None);
        disk.reap(done);
        done.iter_mut().for_each(check_and_drop);
    }
    if count == 1024 {
        done.clear();
    }
}

/// Bytes that do not exist must never be made up, and the error must say where they are missing.
#[test]
fn reads_past_the_end_are_errors_with_file_offset_and_length() {
    each_driver(|case| {
        let mut disk = case.make(case.files());
        let mut arena = Arena::new(64).unwrap();
        allocate(disk.as_mut(), LOG, 0, 8192).unwrap();
        let error =
            read(disk.as_mut(), &mut arena, LOG, 4096, &[0, 0]).expect_err("one block is missing");
        assert_eq!(error.kind(), ErrorKind::Io);
        let text = error.to_string();
        assert!(
            ["log-000-0000", "8192 bytes", "4096"].iter().all(|part| text.contains(part)),
            "{text}"
        );
        assert!(
            read(disk.as_mut(), &mut arena, FileId::Data, 0, &[0]).is_err(),
            "a file that does not exist"
        );
        assert!(
            read(disk.as_mut(), &mut arena, LOG, 8192, &[0]).is_err(),
            "nothing is behind the end"
        );
        let set_len = |bytes| {
            let file =
                std::fs::File::options().write(true).open(case.dir.join("log-000-0000")).unwrap();
            file.set_len(bytes).unwrap();
        };
        if case.medium == Medium::Directory {
            set_len(8292);
            assert!(read(disk.as_mut(), &mut arena, LOG, 8192, &[0]).is_err(), "a part of a block");
        }
        let mut into = arena.alloc(0).unwrap();
        let _pin = into.pin();
        into = match execute(
            disk.as_mut(),
            DiskOp::Read { file: LOG, offset: 0, into: smallvec![into] },
        ) {
            Err(e) => {
                assert_eq!(e.kind(), ErrorKind::Invalid);
                arena.alloc(0).unwrap()
            }
            Ok(_) => panic!("a pinned frame was changed"),
        };
        drop(into);
        if case.medium == Medium::Directory {
            set_len(4096);
            assert!(
                read(disk.as_mut(), &mut arena, LOG, 4096, &[0]).is_err(),
                "a file that became shorter"
            );
        }
        read(disk.as_mut(), &mut arena, LOG, 0, &[0]).unwrap();
    });
}

/// An error of an allocation or a flush fails that operation and no other.
#[test]
fn what_can_t_be_done_is_refused_and_the_rest_goes_on() {
    each_driver(|case| {
        let mut disk = case.make(case.files());
        allocate(disk.as_mut(), LOG, 0, 8192).unwrap();
        assert_eq!(
            allocate(disk.as_mut(), LOG, 1, 4096).expect_err("no whole block").kind(),
            ErrorKind::Invalid
        );
        let full = allocate(disk.as_mut(), LOG, 8192, 1 << 52).expect_err("there is not that much");
        assert_eq!(full.kind(), ErrorKind::Full, "{full}");
        assert_eq!(disk.len(LOG).unwrap(), Some(8192));
        assert!(flush(disk.as_mut(), &[LOG, FileId::Data]).is_err(), "a file that does not exist");
        flush(disk.as_mut(), &[LOG]).unwrap();
        drop(disk);
        let mut disk = case.make(case.try_files(Access::ReadOnly, case.options).unwrap());
        let mut arena = Arena::new(4).unwrap();
        let frame = filled(&mut arena, 0, 7);
        let refused = [
            write(disk.as_mut(), LOG, 0, &[&frame]),
            flush(disk.as_mut(), &[LOG]),
            allocate(disk.as_mut(), FileId::Data, 0, 4096),
            allocate(disk.as_mut(), LOG, 0, 4096),
        ];
        for result in refused {
            assert_eq!(
                result.expect_err("the store is open for reading only").kind(),
                ErrorKind::Invalid
            );
        }
        assert!(read(disk.as_mut(), &mut arena, LOG, 0, &[0]).unwrap()[0].iter().all(|b| *b == 0));
    });
}

/// Shards share the files: what one creates and writes, the others read, and the lock is released
/// with the last of them.
#[test]
fn disks_over_the_same_files_see_each_other() {
    each_driver(|case| {
        let shared = case.files();
        let (mut one, mut two) = (case.make(shared.clone()), case.make(shared));
        let mut arena = Arena::new(64).unwrap();
        assert_eq!(two.len(LOG).unwrap(), None);
        assert!(read(two.as_mut(), &mut arena, LOG, 0, &[0]).is_err());
        allocate(one.as_mut(), LOG, 0, 8192).unwrap();
        write(one.as_mut(), LOG, 4096, &[&filled(&mut arena, 0, 7)]).unwrap();
        assert_eq!(two.len(LOG).unwrap(), Some(8192));
        assert!(
            read(two.as_mut(), &mut arena, LOG, 4096, &[0]).unwrap()[0].iter().all(|b| *b == 7)
        );
        flush(two.as_mut(), &[LOG]).unwrap();
        drop(one);
        let in_use = case
            .try_files(Access::ReadWrite, case.options)
            .expect_err("the other disk holds the lock");
        assert_eq!(in_use.kind(), ErrorKind::InUse);
        drop(two);
        for _ in 0..20 {
            let mut again = case.make(case.files());
            let _ = read(again.as_mut(), &mut arena, LOG, 0, &[0]).unwrap();
        }
    });
}

/// Requests and messages come from other threads while a shard waits for its disk.
#[test]
fn another_thread_ends_a_wait_and_so_does_the_timeout() {
    each_driver(|case| {
        let mut disk = case.make(case.files());
        let waker = disk.waker();
        for delay_ms in [0, 0, 0, 5, 20] {
            let waker = waker.clone();
            let other = std::thread::spawn(move || {
                #[expect(clippy::disallowed_methods, reason = "so that the wait comes first")]
                std::thread::sleep(std::time::Duration::from_millis(delay_ms));
                waker.wake();
            });
            disk.wait(None);
            other.join().unwrap();
        }
        waker.wake();
        disk.wait(None);
        #[expect(clippy::disallowed_methods, reason = "the wait is measured")]
        let start = std::time::Instant::now();
        // A wait may end early for no reason, but not every time.
        for _ in 0..10 {
            disk.wait(Some(20_000));
        }
        #[expect(clippy::disallowed_methods, reason = "the wait is measured")]
        let elapsed = start.elapsed().as_millis();
        assert!((100..5000).contains(&elapsed), "10 waits of 20 ms took {elapsed} ms");
        disk.wait(Some(0));
    });
}

/// Memory must not be reused while the kernel writes into it, and the store must be free
/// afterwards.
#[test]
fn a_disk_dropped_with_operations_in_flight_waits_for_them() {
    each_driver(|case| {
        let mut arena = Arena::new(4096).unwrap();
        allocate(case.make(case.files()).as_mut(), LOG, 0, 16 << 20).unwrap();
        for _ in 0..5 {
            let mut disk = case.make(case.files());
            disk.register(arena.mapping());
            for i in 0..12 {
                let into = smallvec![arena.alloc(8).unwrap()];
                disk.submit(OpId(i), DiskOp::Read { file: LOG, offset: i << 20, into });
            }
            disk.submit(OpId(90), DiskOp::Flush { files: smallvec![LOG] });
            disk.submit(OpId(91), DiskOp::Allocate { file: OTHER, from: 0, to: 1 << 20 });
            disk.push();
            drop(disk);
            let mut blocks: Vec<Frame> = Vec::new();
            while let Some(mut frame) = arena.alloc(0) {
                frame.try_mut().unwrap().fill(0x11);
                blocks.push(frame);
            }
            assert_eq!(blocks.len(), 4096, "memory did not come back");
            assert!(
                blocks.iter().all(|f| f.iter().all(|b| *b == 0x11)),
                "written after the disk was dropped"
            );
        }
    });
}

/// Each flush method completes, for one file and for several, and log writes are flushed again
/// where necessary.
#[test]
fn every_flush_method_works_with_every_driver() {
    each_driver(|case| {
        for choice in
            [FlushChoice::PerFile, FlushChoice::Dsync, FlushChoice::Shared, FlushChoice::Auto]
        {
            let options = FileOptions { flush: choice, ..case.options.clone() };
            let opened = match case.try_files(Access::ReadWrite, &options) {
                Ok(opened) => opened,
                Err(e) if choice == FlushChoice::Shared && e.kind() == ErrorKind::Invalid => {
                    continue;
                }
                Err(e) => panic!("{choice:?}: {e}"),
            };
            let mut arena = Arena::new(64).unwrap();
            let mut disk = case.make(opened);
            for file in [LOG, FileId::Data, OTHER] {
                allocate(disk.as_mut(), file, 0, 8192).unwrap();
                write(disk.as_mut(), file, 4096, &[&filled(&mut arena, 0, 9)]).unwrap();
            }
            for set in [&[LOG][..], &[LOG, OTHER], &[LOG, FileId::Data, OTHER], &[FileId::Data]] {
                flush(disk.as_mut(), set).unwrap();
            }
        }
    });
}

/// When many shards flush many times at once, every flush is answered and none waits for ever.
#[test]
fn flushes_of_several_disks_at_a_time_are_all_answered() {
    each_driver(|case| {
        let shared = case.files();
        {
            let mut first = case.make(shared.clone());
            for shard in 0..3 {
                allocate(
                    first.as_mut(),
                    FileId::Log(ShardId::new(shard), SegmentNo::new(0)),
                    0,
                    8192,
                )
                .unwrap();
            }
        }
        std::thread::scope(|scope| {
            for shard in 0..3 {
                let shared = shared.clone();
                let driver = case.driver;
                scope.spawn(move || {
                    let mut disk = disk(driver, shared, 8);
                    let log = FileId::Log(ShardId::new(shard), SegmentNo::new(0));
                    let mut done = Vec::new();
                    for i in 0..60 {
                        for j in 0..3 {
                            disk.submit(OpId(i * 3 + j), DiskOp::Flush { files: smallvec![log] });
                        }
                        while done.len() < 3 {
                            disk.push();
                            disk.wait(None);
                            disk.reap(&mut done);
                        }
                        assert!(done.drain(..).all(|c| c.result.is_ok()));
                    }
                    // One flush stays in flight.
                    disk.submit(OpId(0), DiskOp::Flush { files: smallvec![log] });
                    disk.push();
                });
            }
        });
    });
}
