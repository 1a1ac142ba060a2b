//! Numbers that no store can have, under a checksum that is right: the structure is refused, so
//! that nothing computed from it wraps.
//!
//! If these fail, a store whose damage happens to have a right checksum ends the program that opens
//! it. Found while the fuzz target `log` was written.

use super::LSN_END;
use super::group::{Body, GroupHead, HEAD_BYTES, RUNS_MAX, RawChange, RawImage, RawRecord, Role};
use super::superblock::{
    LogState, Refusal, SEGMENTS_MIN, SUPERBLOCK_BYTES, Superblock, VShardState,
};
use crate::base::checksum::crc32c;
use crate::base::options::Geometry;
use crate::base::{BLOCK, Lsn, SegmentNo, ShardId};
use zerocopy::IntoBytes;

fn head() -> GroupHead {
    GroupHead {
        epoch: 1,
        generation: 1,
        number: 1,
        body_blocks: 1,
        blocks: 1,
        superblock_generation: 1,
        runs: vec![(Lsn::new(1), 1)],
        ..GroupHead::default()
    }
}

fn opened(mut head: GroupHead) -> Option<GroupHead> {
    let mut bytes = [0; HEAD_BYTES];
    head.seal(7, &mut bytes);
    GroupHead::open(&bytes, 7, 1, (head.shard, head.segment, head.block), 16)
}

#[test]
fn a_group_with_lsns_out_of_reach_is_none() {
    assert!(opened(head()).is_some());
    for (first, count) in [(u64::MAX, 0), (1, u64::MAX), (u64::MAX, u64::MAX), (LSN_END - 1, 1)] {
        assert_eq!(
            opened(GroupHead { runs: vec![(Lsn::new(first), count)], ..head() }),
            None,
            "{first}+{count}"
        );
    }
    assert!(opened(GroupHead { runs: vec![(Lsn::new(LSN_END - 2), 1)], ..head() }).is_some());
    assert_eq!(opened(GroupHead { watermark: Lsn::new(LSN_END), ..head() }), None);
}

/// Redo reads as many blocks as the head says: more than the segment has, or fewer than the
/// records, and it reads foreign ones.
#[test]
fn a_group_that_does_not_fit_is_none() {
    let at = |block| GroupHead { block, ..head() };
    let right = [
        GroupHead { body_blocks: 16, blocks: 16, ..head() },
        GroupHead { body_blocks: 1, blocks: 1, ..at(15) },
        GroupHead { records_bytes: (BLOCK - HEAD_BYTES) as u32, ..head() },
        GroupHead { runs: vec![(Lsn::new(1), 1); RUNS_MAX], ..head() },
    ];
    for head in right {
        assert!(opened(head.clone()).is_some(), "{head:?}");
    }
    let wrong = [
        GroupHead { body_blocks: 0, ..head() },
        GroupHead { body_blocks: 2, blocks: 1, ..head() },
        GroupHead { body_blocks: 1, blocks: 17, ..head() },
        GroupHead { body_blocks: 17, blocks: 17, ..head() },
        GroupHead { body_blocks: 1, blocks: 2, ..at(15) },
        at(16),
        at(17),
        GroupHead { records_bytes: (BLOCK - HEAD_BYTES + 1) as u32, ..head() },
        GroupHead { records_bytes: u32::MAX, ..head() },
        GroupHead { images_count: (BLOCK / size_of::<RawImage>()) as u32, ..head() },
        GroupHead { runs: vec![(Lsn::new(1), 1); RUNS_MAX + 1], ..head() },
    ];
    for head in wrong {
        assert_eq!(opened(head.clone()), None, "{head:?}");
    }
}

/// A group of another place, epoch or opening is an old one that happens to lie here: its commits
/// are not this log's.
#[test]
fn a_group_of_elsewhere_is_none() {
    let mut bytes = [0; HEAD_BYTES];
    head().seal(7, &mut bytes);
    let open = |salt, epoch, shard, segment, block| {
        GroupHead::open(
            &bytes,
            salt,
            epoch,
            (ShardId::new(shard), SegmentNo::new(segment), block),
            16,
        )
    };
    assert!(open(7, 1, 0, 0, 0).is_some());
    let wrong =
        [(8, 1, 0, 0, 0), (7, 2, 0, 0, 0), (7, 1, 1, 0, 0), (7, 1, 0, 1, 0), (7, 1, 0, 0, 1)];
    for (salt, epoch, shard, segment, block) in wrong {
        assert_eq!(
            open(salt, epoch, shard, segment, block),
            None,
            "{salt} {epoch} {shard} {segment} {block}"
        );
    }
}

/// A change that names an image which is not there.
#[test]
fn a_change_without_its_image_is_none() {
    let image = size_of::<RawImage>();
    for (images, named, is_record) in
        [(1, 0, true), (1, 1, false), (0, 0, false), (2, 1, true), (2, u32::MAX, false)]
    {
        let record_bytes = size_of::<RawRecord>() + size_of::<RawChange>();
        let record = RawRecord {
            lsn: 1.into(),
            bytes: (record_bytes as u32).into(),
            changes_count: 1.into(),
            kind: Role::Whole.kind(),
            reserved: [0; 7],
        };
        let change = RawChange {
            kind: 1,
            volume: 0,
            class: 0,
            reserved: 0,
            len: named.into(),
            offset: 0.into(),
            page: 0.into(),
        };
        let mut body = vec![0; BLOCK];
        let content = [record.as_bytes(), change.as_bytes(), &vec![0; images * image]].concat();
        body[HEAD_BYTES..HEAD_BYTES + content.len()].copy_from_slice(&content);
        let head = GroupHead {
            records_bytes: record_bytes as u32,
            images_count: images as u32,
            body_crc: crc32c(&body[HEAD_BYTES..]),
            ..head()
        };
        let body = Body::open(&head, &body).expect("a body");
        assert_eq!(body.records().is_some(), is_record, "image {named} of {images}");
    }
}

#[test]
fn a_record_with_an_lsn_out_of_reach_is_none() {
    for (lsn, is_record) in [(LSN_END - 1, true), (LSN_END, false), (u64::MAX, false)] {
        let bytes = size_of::<RawRecord>() as u32;
        let record = RawRecord {
            lsn: lsn.into(),
            bytes: bytes.into(),
            changes_count: 0.into(),
            kind: Role::Whole.kind(),
            reserved: [0; 7],
        };
        let mut body = vec![0; BLOCK];
        body[HEAD_BYTES..HEAD_BYTES + bytes as usize].copy_from_slice(record.as_bytes());
        let head =
            GroupHead { records_bytes: bytes, body_crc: crc32c(&body[HEAD_BYTES..]), ..head() };
        assert_eq!(
            Body::open(&head, &body).expect("a body").records().is_some(),
            is_record,
            "{lsn}"
        );
    }
}

#[test]
fn a_superblock_with_numbers_out_of_reach_is_refused() {
    let right = Superblock {
        clean: true,
        store_id: [1; 16],
        generation: 1,
        epoch: 1,
        epoch_first_lsn: Lsn::new(1),
        salt: u64::MAX,
        checkpoint: 1,
        watermark: Lsn::ZERO,
        next_lsn: Lsn::new(1),
        geometry: Geometry::default(),
        extents_count: 1,
        table_crc: 7,
        logs: vec![LogState::without_end(SEGMENTS_MIN)],
        vshards: vec![VShardState::default(); Geometry::default().vshards_count as usize],
    };
    let decoded = |superblock: &Superblock| {
        let mut bytes = vec![0; SUPERBLOCK_BYTES];
        superblock.encode(0, &mut bytes);
        Superblock::decode(0, &bytes)
    };
    assert_eq!(decoded(&right).as_ref(), Ok(&right));
    let far = Lsn::new(LSN_END);
    let wrong: [fn(&mut Superblock, Lsn); 7] = [
        |s, far| s.generation = far.get(),
        |s, far| s.epoch = far.get(),
        |s, far| s.checkpoint = far.get(),
        |s, far| s.epoch_first_lsn = far,
        |s, far| s.watermark = far,
        |s, far| s.next_lsn = far,
        |s, far| s.vshards[3].redo_lsn = far,
    ];
    for (i, change) in wrong.iter().enumerate() {
        let mut superblock = right.clone();
        change(&mut superblock, far);
        assert_eq!(decoded(&superblock), Err(Refusal::Values), "{i}");
    }
}
