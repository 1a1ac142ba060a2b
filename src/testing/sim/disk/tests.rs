//! Tests the promises of the simulated disk: if one is broken, the simulator silently proves less
//! than it claims.

use super::*;
use crate::io::{IoSlice, execute};
use crate::memory::{Arena, Frame};
use smallvec::smallvec;

struct DiskFixture {
    arena: Rc<RefCell<Arena>>,
    disk: SimDisk,
}

impl DiskFixture {
    fn new(seed: u64, blocks: u64) -> Self {
        let mut fixture = DiskFixture {
            arena: Rc::new(RefCell::new(Arena::new(64).unwrap())),
            disk: SimDisk::new(seed),
        };
        execute(
            &mut fixture.disk,
            DiskOp::Allocate { file: FileId::Data, from: 0, to: blocks * 4096 },
        )
        .unwrap();
        fixture
    }

    fn frame(&self, byte: u8) -> Frame {
        let mut frame = self.arena.borrow_mut().alloc(0).unwrap();
        frame.try_mut().unwrap().fill(byte);
        frame
    }

    fn write_op(&self, block: u64, bytes: &[u8]) -> DiskOp {
        let from = bytes.iter().map(|&byte| IoSlice::whole(self.frame(byte).pin())).collect();
        DiskOp::Write { file: FileId::Data, offset: block * 4096, from }
    }

    fn write(&mut self, block: u64, bytes: &[u8]) {
        let op = self.write_op(block, bytes);
        execute(&mut self.disk, op).unwrap();
    }

    fn flush(&mut self) -> Result<DiskOp> {
        execute(&mut self.disk, flush_op())
    }

    fn read(&mut self, block: u64) -> Vec<u8> {
        let into = smallvec![self.frame(0xee)];
        match execute(
            &mut self.disk,
            DiskOp::Read { file: FileId::Data, offset: block * 4096, into },
        )
        .unwrap()
        {
            DiskOp::Read { into, .. } => into[0].to_vec(),
            other => panic!("{other:?} came back for a read"),
        }
    }

    fn crashed(&self, loss: Loss, seed: u64) -> DiskFixture {
        DiskFixture { arena: self.arena.clone(), disk: self.disk.crash(loss, &mut Rng::new(seed)) }
    }
}

fn flush_op() -> DiskOp {
    DiskOp::Flush { files: smallvec![FileId::Data] }
}

/// If the simulator kept what was not flushed, a store that never flushes would pass.
#[test]
fn what_was_not_flushed_can_be_lost_and_what_was_flushed_can_not() {
    let mut fixture = DiskFixture::new(1, 4);
    fixture.write(0, &[1, 2]);
    fixture.flush().unwrap();
    fixture.write(1, &[3, 4]);
    assert_eq!(fixture.read(1), [3; 4096]);
    for seed in 0..50 {
        let mut rng = Rng::new(seed);
        let mut after = fixture.crashed(Loss::random(&mut rng), seed);
        assert_eq!(after.read(0), [1; 4096]);
        assert!(
            after
                .read(1)
                .chunks(SECTOR)
                .all(|sector| sector == [2; SECTOR] || sector == [3; SECTOR])
        );
    }
    assert_eq!(fixture.crashed(Loss::Everything, 1).read(1), [2; 4096]);
    assert_eq!(fixture.crashed(Loss::Nothing, 1).read(1), [3; 4096]);
    assert_eq!(fixture.read(1), [3; 4096], "the disk that crashed stays as it is");
}

/// A group is flushed while the next one is being written: if the flush covered that as well, it
/// would hide a lost acknowledgement.
#[test]
fn a_flush_covers_what_completed_before_it_was_submitted_and_nothing_else() {
    let mut fixture = DiskFixture::new(2, 4);
    fixture.disk.set_latency(Latency {
        read: (1, 1),
        write: (10, 10),
        flush: (100, 100),
        block: 0,
        stall_one_in: 1 << 40,
        slow_reads: (0, 1),
    });
    fixture.write(0, &[1]);
    let in_flight = fixture.write_op(1, &[2]);
    fixture.disk.submit(OpId(1), in_flight);
    fixture.disk.submit(OpId(2), flush_op());
    let mut done = Vec::new();
    while done.len() < 2 {
        fixture.disk.wait(None);
        fixture.disk.reap(&mut done);
    }
    assert_eq!((done[0].id, done[1].id), (OpId(1), OpId(2)));
    let mut after = fixture.crashed(Loss::Everything, 1);
    assert_eq!((after.read(0)[0], after.read(1)[0]), (1, 0));
}

/// Checksums guard against torn pages and log blocks, so these must occur.
#[test]
fn writes_tear_at_sectors_and_older_versions_can_win() {
    let mut fixture = DiskFixture::new(3, 4);
    fixture.write(0, &[1, 1]);
    fixture.write(0, &[2, 2]);
    let (mut torn, mut older, mut mixed) = (false, false, false);
    for seed in 0..200 {
        let loss = Loss::random(&mut Rng::new(seed));
        let mut after = fixture.crashed(loss, seed);
        let image = [after.read(0), after.read(1)].concat();
        let count = |byte| image.chunks(SECTOR).filter(|sector| sector == &[byte; SECTOR]).count();
        assert_eq!(count(0) + count(1) + count(2), 2 * SECTORS);
        torn |= after.disk.counters().writes_torn > 0;
        older |= count(1) == 2 * SECTORS;
        mixed |= count(0) > 0 && count(1) > 0 && count(2) > 0;
    }
    assert!(torn && older && mixed, "torn {torn}, an older write won {older}, all mixed {mixed}");
}

/// A crash can happen between submission and completion, even of an allocation.
#[test]
fn operations_in_flight_at_a_crash_get_through_whole_in_part_or_not_at_all() {
    let mut fixture = DiskFixture::new(4, 2);
    let op = fixture.write_op(0, &[7, 7]);
    fixture.disk.submit(OpId(1), op);
    fixture.disk.submit(OpId(2), DiskOp::Allocate { file: FileId::Table, from: 0, to: 8192 });
    let (mut sectors, mut lengths) = ([0; 2 * SECTORS + 1], std::collections::BTreeSet::new());
    for seed in 0..300 {
        let mut after = fixture.crashed(Loss::random(&mut Rng::new(seed)), seed);
        let image = [after.read(0), after.read(1)].concat();
        sectors[image.chunks(SECTOR).filter(|sector| sector == &[7; SECTOR]).count()] += 1;
        lengths.insert(after.disk.len(FileId::Table).unwrap());
    }
    assert!(
        sectors[0] > 0
            && sectors[2 * SECTORS] > 0
            && sectors[1..2 * SECTORS].iter().sum::<u32>() > 0
    );
    assert_eq!(lengths.into_iter().collect::<Vec<_>>(), [None, Some(0), Some(4096), Some(8192)]);
}

/// The successor of a dead process reads what its predecessor did not flush, and a power loss can
/// still take it.
#[test]
fn after_the_death_of_a_process_its_writes_are_visible_and_still_volatile() {
    let mut fixture = DiskFixture::new(5, 2);
    fixture.write(0, &[1]);
    let mut successor = fixture.crashed(Loss::Process, 1);
    assert_eq!(successor.read(0), [1; 4096]);
    assert_eq!(successor.crashed(Loss::Everything, 1).read(0), [0; 4096]);
    successor.flush().unwrap();
    assert_eq!(successor.crashed(Loss::Everything, 1).read(0), [1; 4096]);
}

/// Retrying a failed flush and calling it good is the classic way to lose acknowledged data;
/// another shard's flush of the same file is such a retry.
#[test]
fn flushes_after_a_failed_one_fail_and_make_nothing_of_it_durable() {
    let mut lost = 0;
    for seed in 0..20 {
        let mut fixture = DiskFixture::new(seed, 2);
        fixture.disk.inject(Fault::once(OpKind::Flush, Area::Any, 0));
        fixture.write(0, &[1]);
        assert_eq!(fixture.flush().unwrap_err().kind(), crate::ErrorKind::Io);
        assert_eq!(
            fixture.flush().unwrap_err().kind(),
            crate::ErrorKind::Io,
            "whoever asks next is told, too"
        );
        assert_eq!(fixture.read(0), [1; 4096], "it is still visible");
        lost += u32::from(fixture.crashed(Loss::Nothing, 1).read(0) == [0; 4096]);
        assert_eq!(fixture.disk.counters().faults_flush, 2);
    }
    assert!(lost > 0);
}

/// A crash must be possible while recovery holds the disk.
#[test]
fn after_the_power_is_cut_every_operation_fails_and_nothing_changes() {
    let mut fixture = DiskFixture::new(6, 2);
    fixture.write(0, &[1]);
    fixture.flush().unwrap();
    fixture.disk.cut_power_after(1);
    let op = fixture.write_op(0, &[9]);
    assert!(execute(&mut fixture.disk, op).is_err(), "cut between submission and completion");
    assert!(
        fixture.flush().is_err()
            && fixture.disk.len(FileId::Data).is_err()
            && fixture.disk.is_off()
    );
    assert_eq!(fixture.crashed(Loss::Everything, 1).read(0), [1; 4096]);
    assert_eq!(fixture.crashed(Loss::Nothing, 1).read(0), [9; 4096]);
}

/// A breach of the seam's rules must be noticed.
#[test]
fn a_transfer_outside_of_what_was_allocated_is_a_violation() {
    let mut fixture = DiskFixture::new(7, 2);
    let op = fixture.write_op(1, &[1, 2]);
    assert!(execute(&mut fixture.disk, op).is_err());
    assert!(fixture.disk.violation().unwrap().contains("beyond what was allocated"));
}

/// The damage tests of the store rely on these.
#[test]
fn damage_changes_the_durable_contents_as_named() {
    let mut fixture = DiskFixture::new(8, 3);
    fixture.write(0, &[1, 2]);
    fixture.flush().unwrap();
    fixture.write(0, &[3]);
    fixture.flush().unwrap();
    assert!(fixture.disk.damage(FileId::Data, 0, SECTORS, Damage::Stale));
    assert_eq!(fixture.read(0), [1; 4096]);
    assert!(fixture.disk.damage(FileId::Data, 0, SECTORS, Damage::Swap { with: 8 }));
    assert_eq!((fixture.read(0)[0], fixture.read(1)[0]), (2, 1));
    assert!(fixture.disk.damage(FileId::Data, 0, SECTORS, Damage::Flip { bit: 8 }));
    assert_eq!(fixture.read(0)[..3], [2, 3, 2]);
    assert!(
        fixture.disk.damage(FileId::Data, 0, SECTORS, Damage::Zero)
            && !fixture.disk.damage(FileId::Data, 16, SECTORS, Damage::Zero)
    );
}
