//! Tests of the portable disk on a real directory: what it promises the engine, and what it must
//! leave alone.

use super::*;
use crate::base::error::ErrorKind;
use crate::base::{BLOCK, SegmentNo, ShardId};
use crate::io::{Access, FileOptions, IoSlice, PageCache, execute};
use crate::memory::{Arena, Frame};
use smallvec::smallvec;
use std::path::Path;

const LOG: FileId = FileId::Log(ShardId::new(0), SegmentNo::new(0));

fn open(dir: &Path, access: Access) -> Result<PortableDisk> {
    PortableDisk::with_files(
        Files::open(dir, access, &FileOptions::default())?,
        &PortableOptions::default(),
    )
}

fn filled(arena: &mut Arena, order: u8, byte: u8) -> Frame {
    let mut frame = arena.alloc(order).unwrap();
    frame.try_mut().unwrap().fill(byte);
    frame
}

fn write(disk: &mut PortableDisk, file: FileId, offset: u64, frames: &[&Frame]) -> Result<()> {
    let from = frames.iter().map(|f| IoSlice::whole(f.pin())).collect();
    execute(disk, DiskOp::Write { file, offset, from }).map(drop)
}

fn read(
    disk: &mut PortableDisk,
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

fn allocate(disk: &mut PortableDisk, file: FileId, from: u64, to: u64) -> Result<()> {
    execute(disk, DiskOp::Allocate { file, from, to }).map(drop)
}

fn error<T>(result: Result<T>) -> Error {
    result.err().expect("an error")
}

/// Every layer above relies on getting back what it wrote, over many pieces and after reopening.
#[test]
fn what_was_written_is_read_back() {
    let dir = tempfile::tempdir().unwrap();
    let mut arena = Arena::new(1024).unwrap();
    for round in 0..2 {
        let mut disk = open(&dir.path().join("new/store"), Access::ReadWrite).unwrap();
        if round == 0 {
            assert_eq!(disk.len(LOG).unwrap(), None);
            allocate(&mut disk, LOG, 0, 4 << 20).unwrap();
            let frames: Vec<Frame> =
                (0..200).map(|i| filled(&mut arena, u8::from(i % 7 == 0), i)).collect();
            write(&mut disk, LOG, 8192, &frames.iter().collect::<Vec<_>>()).unwrap();
            execute(&mut disk, DiskOp::Flush { files: smallvec![LOG] }).unwrap();
        }
        assert_eq!(disk.len(LOG).unwrap(), Some(4 << 20));
        let orders: Vec<u8> = (0..200).map(|i| u8::from(i % 7 == 0)).collect();
        let frames = read(&mut disk, &mut arena, LOG, 8192, &orders).unwrap();
        for (i, frame) in frames.iter().enumerate() {
            assert!(frame.iter().all(|b| usize::from(*b) == i), "frame {i}");
        }
        assert!(!disk.report().file_system.is_empty());
        println!("{}", disk.report());
    }
}

/// Bytes that do not exist must never be made up.
#[test]
fn a_read_past_the_end_is_an_error_with_file_offset_and_length() {
    let dir = tempfile::tempdir().unwrap();
    let mut arena = Arena::new(64).unwrap();
    let mut disk = open(dir.path(), Access::ReadWrite).unwrap();
    allocate(&mut disk, LOG, 0, 8192).unwrap();
    let error = error(read(&mut disk, &mut arena, LOG, 4096, &[0, 0]));
    assert_eq!(error.kind(), ErrorKind::Io);
    let text = error.to_string();
    assert!(
        ["log-000-0000", "8192 bytes", "4096"].iter().all(|part| text.contains(part)),
        "{text}"
    );
    assert!(
        read(&mut disk, &mut arena, FileId::Data, 0, &[0]).is_err(),
        "a file that does not exist"
    );
    std::fs::File::options()
        .append(true)
        .open(dir.path().join("log-000-0000"))
        .unwrap()
        .set_len(8292)
        .unwrap();
    assert!(read(&mut disk, &mut arena, LOG, 8192, &[0]).is_err(), "a part of a block");
}

/// Allocation must give zeros, and must not damage what lies next to them.
#[test]
fn allocation_writes_zeros_there_and_only_there() {
    let dir = tempfile::tempdir().unwrap();
    let mut arena = Arena::new(1024).unwrap();
    let mut disk = open(dir.path(), Access::ReadWrite).unwrap();
    allocate(&mut disk, LOG, 0, 4096 * 3).unwrap();
    let frame = filled(&mut arena, 0, 7);
    write(&mut disk, LOG, 0, &[&frame, &frame, &frame]).unwrap();
    allocate(&mut disk, LOG, 4096, 8192).unwrap();
    allocate(&mut disk, LOG, 4096 * 3, 3 << 20).unwrap();
    let blocks = read(&mut disk, &mut arena, LOG, 0, &[0, 0, 0, 9]).unwrap();
    for (block, byte) in blocks.iter().zip([7, 0, 7, 0]) {
        assert!(block.iter().all(|b| *b == byte));
    }
    assert_eq!(error(allocate(&mut disk, LOG, 1, 4096)).kind(), ErrorKind::Invalid);
}

/// A full disk is an error that a user can act on, and the space taken on the way is given back.
#[test]
fn an_allocation_that_fails_leaves_the_former_length() {
    let dir = tempfile::tempdir().unwrap();
    let mut disk = open(dir.path(), Access::ReadWrite).unwrap();
    allocate(&mut disk, LOG, 0, 8192).unwrap();
    let error = error(allocate(&mut disk, LOG, 8192, 1 << 52));
    assert_eq!(error.kind(), ErrorKind::Full, "{error}");
    assert_eq!(disk.len(LOG).unwrap(), Some(8192));
}

/// Two processes that used one store would destroy it.
#[test]
fn a_store_is_opened_once() {
    let dir = tempfile::tempdir().unwrap();
    let mut disk = open(dir.path(), Access::ReadWrite).unwrap();
    // Both found an empty directory: the second one learns of the first when it makes its first
    // file.
    let mut late = open(dir.path(), Access::ReadWrite).unwrap();
    allocate(&mut disk, LOG, 0, 4096).unwrap();
    assert_eq!(error(allocate(&mut late, LOG, 0, 4096)).kind(), ErrorKind::InUse);
    for access in [Access::ReadWrite, Access::ReadOnly] {
        let error = error(open(dir.path(), access));
        assert_eq!(error.kind(), ErrorKind::InUse);
        assert!(error.to_string().contains(&dir.path().display().to_string()), "{error}");
    }
    drop(disk);
    open(dir.path(), Access::ReadWrite).unwrap();
    let readers =
        (open(dir.path(), Access::ReadOnly).unwrap(), open(dir.path(), Access::ReadOnly).unwrap());
    assert_eq!(error(open(dir.path(), Access::ReadWrite)).kind(), ErrorKind::InUse);
    drop(readers);
}

/// A verifier must not be able to damage what it reads.
#[test]
fn read_only_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mut arena = Arena::new(64).unwrap();
    assert_eq!(error(open(dir.path(), Access::ReadOnly)).kind(), ErrorKind::NotFound);
    assert_eq!(error(open(&dir.path().join("none"), Access::ReadOnly)).kind(), ErrorKind::NotFound);
    assert!(!dir.path().join("none").exists());
    allocate(&mut open(dir.path(), Access::ReadWrite).unwrap(), LOG, 0, 8192).unwrap();
    let mut disk = open(dir.path(), Access::ReadOnly).unwrap();
    let frame = filled(&mut arena, 0, 7);
    assert_eq!(error(write(&mut disk, LOG, 0, &[&frame])).kind(), ErrorKind::Invalid);
    assert_eq!(error(allocate(&mut disk, FileId::Data, 0, 4096)).kind(), ErrorKind::Invalid);
    assert_eq!(error(allocate(&mut disk, LOG, 0, 4096)).kind(), ErrorKind::Invalid);
    let names: Vec<_> =
        std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names, ["log-000-0000"]);
    assert!(read(&mut disk, &mut arena, LOG, 0, &[0]).unwrap()[0].iter().all(|b| *b == 0));
}

/// A user's own file named `data` must survive a mistyped path.
#[test]
fn foreign_files_with_our_names_are_refused_and_untouched() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("data"), b"precious").unwrap();
    let error = error(open(dir.path(), Access::ReadWrite));
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(error.to_string().contains("`data`"), "{error}");
    assert_eq!(std::fs::read(dir.path().join("data")).unwrap(), b"precious");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
}

/// If more operations are submitted than the queue takes, all must come back, each once.
#[test]
fn a_flood_of_operations_completes() {
    let dir = tempfile::tempdir().unwrap();
    let mut arena = Arena::new(2048).unwrap();
    let options = FileOptions { page_cache: PageCache::Use, ..FileOptions::default() };
    let files = Files::open(dir.path(), Access::ReadWrite, &options).unwrap();
    let mut disk = PortableDisk::with_files(files, &PortableOptions { workers_count: 2 }).unwrap();
    assert!(!disk.report().direct);
    allocate(&mut disk, LOG, 0, 1 << 20).unwrap();
    for i in 0..1000 {
        let into = smallvec![arena.alloc(0).unwrap()];
        disk.submit(OpId(i), DiskOp::Read { file: LOG, offset: (i % 256) * BLOCK as u64, into });
    }
    let mut done = Vec::new();
    while done.len() < 1000 {
        disk.wait(None);
        disk.reap(&mut done);
    }
    let mut ids: Vec<u64> = done.iter().map(|c| c.id.0).collect();
    ids.sort_unstable();
    assert!(ids.into_iter().eq(0..1000));
    assert!(done.iter().all(|c| c.result.is_ok()));
}

/// Requests come from other threads while the shard's thread waits for the disk.
#[test]
fn another_thread_ends_a_wait() {
    let dir = tempfile::tempdir().unwrap();
    let mut disk = open(dir.path(), Access::ReadWrite).unwrap();
    let waker = disk.waker();
    let other = std::thread::spawn(move || waker.wake());
    disk.wait(None);
    other.join().unwrap();
    disk.wait(Some(1000));
}
