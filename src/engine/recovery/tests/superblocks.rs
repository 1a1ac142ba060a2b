//! Superblocks and extent tables with valid and impossible contents, and what an opening does about
//! them.

use super::*;
use crate::format::extent::{TableRow, encode_table, table_crc, table_offset};

/// Between the two writes of a superblock's generation the second copy is two generations old: only
/// that copy is reported, and an opening writes it before it overwrites what the generation before
/// needs.
#[test]
fn a_superblock_copy_left_behind_is_named_and_written() {
    let mut arena = Arena::new(READ_BLOCKS).expect("memory");
    let (mut d, _) = Driver::open(SimDisk::new(1));
    for byte in 1..4 {
        d.commit(vec![(key(1), put(byte))]);
        assert!(matches!(d.ask(Request::Close), Ok(Response::Closed)));
        let found = find_superblock(&mut d.disk, &mut arena).expect("a superblock");
        assert!(
            found.behind.is_empty() && found.unreadable.is_empty() && found.warnings.is_empty()
        );
        (d, _) = Driver::open(d.disk);
    }
    let mut disk = d.disk.crash(Loss::Everything, &mut Rng::new(1));
    let newest = find_superblock(&mut disk, &mut arena).expect("a superblock").superblock;
    assert!(newest.generation >= 6);
    let older = Superblock { generation: newest.generation - 2, ..newest.clone() };
    let pair = Superblock::copies_of(newest.generation);
    let mut bytes = vec![0; SUPERBLOCK_BYTES];
    older.encode(pair[1], &mut bytes);
    create::write_bytes(&mut disk, &mut arena, FileId::Meta, Superblock::offset(pair[1]), &bytes)
        .expect("written");
    let found = find_superblock(&mut disk, &mut arena).expect("a superblock");
    assert_eq!((found.superblock.generation, found.behind), (newest.generation, vec![pair[1]]));
    // An opening that dies before its first flush changes nothing; one that dies before what
    // follows has put it right.
    for (flushes, left) in [(0, vec![pair[1]]), (2, vec![])] {
        let mut image = disk.crash(Loss::Nothing, &mut Rng::new(1));
        image.inject(Fault::once(OpKind::Flush, Area::Any, flushes));
        begin(&mut image, &options(), 1, 7, 0).map(drop).expect_err("a flush has failed");
        let mut image = image.crash(Loss::Everything, &mut Rng::new(1));
        let found = find_superblock(&mut image, &mut arena).expect("a superblock");
        assert_eq!((found.superblock.generation, found.behind), (newest.generation, left));
    }
}

/// If this fails, a store whose superblock or extent table says what no store can mean, with
/// checksums that hold (another program, a forged image), causes a panic while it is opened, or
/// later while it is served, where an error should name it.
#[test]
fn what_no_store_can_count_is_refused_when_it_is_opened() {
    let mut arena = Arena::new(READ_BLOCKS).expect("memory");
    let (mut d, _) = Driver::open(SimDisk::new(1));
    d.commit((0..8).map(|i| (key(i), put(1))).collect());
    assert!(matches!(d.ask(Request::Close), Ok(Response::Closed)));
    let honest = find_superblock(&mut d.disk, &mut arena).expect("a superblock").superblock;
    let mut table = load::load(&mut d.disk, &mut arena, &honest).expect("a table").table;
    let end = crate::format::LSN_END;
    let mut refused = |superblock: &Superblock, rows: &[TableRow]| {
        let mut image = d.disk.crash(Loss::Nothing, &mut Rng::new(1));
        let mut block = vec![0; BLOCK];
        let checkpoint = superblock.checkpoint;
        let sum = encode_table(superblock.store_id, 0, checkpoint, rows, &mut block);
        let mut write = |file, offset, bytes: &[u8]| {
            create::write_bytes(&mut image, &mut arena, file, offset, bytes).expect("written");
        };
        write(FileId::Table, table_offset(0, checkpoint), &block);
        let superblock = Superblock { table_crc: table_crc([sum]), ..superblock.clone() };
        for copy in Superblock::copies_of(superblock.generation) {
            let mut bytes = vec![0; SUPERBLOCK_BYTES];
            superblock.encode(copy, &mut bytes);
            write(FileId::Meta, Superblock::offset(copy), &bytes);
        }
        begin(&mut image, &options(), 1, 7, 0).map(drop).err()
    };
    assert!(refused(&honest, &table).is_none(), "what it was");
    let last = Lsn::new(end - 1);
    for superblock in [
        Superblock { next_lsn: Lsn::ZERO, epoch_first_lsn: Lsn::ZERO, ..honest.clone() },
        Superblock { next_lsn: last, ..honest.clone() },
        Superblock { epoch: end - 1, ..honest.clone() },
    ] {
        let error = refused(&superblock, &table).expect("it counts to the end");
        assert_eq!(error.kind(), crate::ErrorKind::Corrupt, "{error}");
    }
    // In one root, and in all: commits that no log holds and that were never made.
    for forged in [1, honest.vshards.len()] {
        let mut vshards = honest.vshards.clone();
        vshards[..forged].iter_mut().for_each(|vshard| vshard.redo_lsn = honest.next_lsn);
        let superblock = Superblock { vshards, ..honest.clone() };
        let error = refused(&superblock, &table).expect("it reflects what was never committed");
        assert_eq!(error.kind(), crate::ErrorKind::Corrupt, "{error}");
    }
    let used = table.iter_mut().find(|row| row.state == 1).expect("an extent in use");
    used.live = 2000.into();
    let error = refused(&honest, &table).expect("more live blocks than there are");
    assert!(error.to_string().contains("2000 live blocks"), "{error}");
}
