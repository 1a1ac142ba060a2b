//! Fuzz target: logs with arbitrary contents.
//!
//! 1. A block that may be a group: what the decoder accepts is within its bounds, and encoding and
//!    decoding it again gives the same result.
//! 2. Logs of two shards made of arbitrary groups, some of them damaged: recovery finds the same
//!    end of the log as a simple model and keeps the groups up to it, or refuses where the model
//!    says that durable commits are missing.

use super::input::Input;
use super::memory::{Image, MemoryDisk};
use crate::base::checksum::crc32c;
use crate::base::error::ErrorKind;
use crate::base::options::Geometry;
use crate::base::{
    BLOCK, BlockAddr, ExtentNo, Lsn, PageId, PageKey, SegmentNo, ShardId, ShardMap, ShardSet,
    VolumeId,
};
use crate::engine::recovery::{self, Scan};
use crate::format::LSN_END;
use crate::format::group::{
    Body, GroupHead, HEAD_BYTES, Head, ImageState, LoggedChange, PageImage, RUNS_MAX, RawChange,
    RawParts, RawRecord, Record, Role,
};
use crate::format::node::Entry;
use crate::format::superblock::{LogState, Superblock, VShardState};
use crate::io::FileId;
use crate::memory::Arena;
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::mem::offset_of;
use std::sync::{Arc, LazyLock};
use zerocopy::IntoBytes;

const SALT: u64 = 0x5a17;
const EPOCH: u64 = 3;
/// Smaller than any store's, so that an execution has little to read.
const SEGMENT_BLOCKS: u32 = 8;
const SEGMENTS: u32 = 2;
const EXTENT_BYTES: u64 = 64 << 10;
/// Extents of the data file, all zeros.
const EXTENTS: u32 = 2;

thread_local! {
    static ARENA: RefCell<Arena> = RefCell::new(Arena::new(512).expect("memory for reading"));
}

/// Empty logs of two shards, and extents.
static ZEROS: LazyLock<Arc<Image>> = LazyLock::new(|| {
    let segments = (0..2)
        .flat_map(|shard| (0..SEGMENTS).map(move |no| (ShardId::new(shard), SegmentNo::new(no))));
    let logs =
        segments.map(|(shard, no)| (FileId::Log(shard, no), SEGMENT_BLOCKS as usize * BLOCK));
    let all = logs.chain([(FileId::Data, EXTENTS as usize * EXTENT_BYTES as usize)]);
    Arc::new(all.map(|(file, len)| (file, vec![0; len])).collect())
});

/// Runs the target.
pub fn log(data: &[u8]) {
    let mut input = Input(data);
    match input.u8() % 2 {
        0 => block(&mut input),
        _ => cut(&mut input),
    }
}

// --- one block that may be a group ---

fn block(input: &mut Input) {
    let (repairs, blocks) = (input.u8(), input.below(3) + 1);
    let mut bytes = input.take(blocks * BLOCK).to_vec();
    bytes.resize(blocks * BLOCK, 0);
    repair(&mut bytes, repairs, blocks);
    let here = (ShardId::new(0), SegmentNo::new(1), 2);
    let Some(head) = GroupHead::open(&bytes, SALT, EPOCH, here, SEGMENT_BLOCKS) else { return };
    assert!(
        head.body_blocks >= 1
            && head.body_blocks <= head.blocks
            && head.block + head.blocks <= SEGMENT_BLOCKS
    );
    assert!(head.runs.len() <= RUNS_MAX);
    let mut sealed = [0; HEAD_BYTES];
    let mut again = head.clone();
    again.seal(SALT, &mut sealed);
    assert_eq!(GroupHead::open(&sealed, SALT, EPOCH, here, SEGMENT_BLOCKS).as_ref(), Some(&again));
    assert_eq!(GroupHead { head_crc: again.head_crc, ..head.clone() }, again);
    let Some(body) = Body::open(&head, &bytes) else { return };
    assert_eq!(crc32c(&bytes[HEAD_BYTES..head.body_blocks as usize * BLOCK]), head.body_crc);
    assert_eq!(body.images.len(), head.images_count as usize);
    for image in &body.images {
        let ImageState::Inline(at) = image.state else { continue };
        assert!(
            (head.body_blocks..head.blocks).contains(&at),
            "an inline page outside of its group"
        );
    }
    let Some(records) = body.records() else { return };
    let mut encoded = Vec::new();
    records.iter().for_each(|record| encode(record, &mut encoded));
    assert_eq!(encoded.len(), head.records_bytes as usize, "bytes between records");
    let mut copy = bytes.clone();
    copy[HEAD_BYTES..HEAD_BYTES + encoded.len()].copy_from_slice(&encoded);
    let body_crc = crc32c(&copy[HEAD_BYTES..head.body_blocks as usize * BLOCK]);
    let body = Body::open(&GroupHead { body_crc, ..head }, &copy).expect("the same images");
    let decoded = body.records().expect("what was encoded can be decoded");
    let plain = |records: &[Record]| {
        format!("{:?}", records.iter().map(|r| (r.lsn, r.role, &r.changes)).collect::<Vec<_>>())
    };
    assert_eq!(plain(&decoded), plain(&records));
}

/// Corrects what arbitrary bytes would hardly ever have right, as the bits of `which` select: the
/// magic, the place, the sizes and the checksums.
fn repair(bytes: &mut [u8], which: u8, blocks: usize) {
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    if which & 1 == 0 {
        put(0, b"CPGROUP\0");
    }
    if which & 2 == 0 {
        put(offset_of!(Head, epoch), &EPOCH.to_le_bytes());
        put(offset_of!(Head, shard), &[0, 0]);
        put(offset_of!(Head, segment), &[1, 0, 0, 0]);
        put(offset_of!(Head, block), &[2, 0, 0, 0]);
    }
    if which & 4 == 0 {
        put(offset_of!(Head, body_blocks), &[blocks as u8, 0, 0, 0]);
        put(offset_of!(Head, blocks), &[blocks as u8 + 2, 0, 0, 0]);
    }
    if which & 8 == 0 {
        let at = offset_of!(Head, body_blocks);
        let claimed =
            u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes")) as usize;
        let end = claimed.saturating_mul(BLOCK).clamp(HEAD_BYTES, bytes.len());
        let body_crc = crc32c(&bytes[HEAD_BYTES..end]);
        bytes[offset_of!(Head, body_crc)..][..4].copy_from_slice(&body_crc.to_le_bytes());
        seal(bytes, SALT);
    }
}

/// Writes the checksum of the head at the start of `bytes`.
pub(super) fn seal(bytes: &mut [u8], salt: u64) {
    let at = offset_of!(Head, head_crc);
    let sum = crate::format::crc_around(crc32c(&salt.to_le_bytes()), &bytes[..HEAD_BYTES], at);
    bytes[at..at + 4].copy_from_slice(&sum.to_le_bytes());
}

fn encode(record: &Record, out: &mut Vec<u8>) {
    let at = out.len();
    out.extend_from_slice(&[0; size_of::<RawRecord>()]);
    if let Some(shards) = record.role.shards() {
        out.extend_from_slice(RawParts { shards: shards.bits().into() }.as_bytes());
    }
    for change in &record.changes {
        let (kind, key, len, offset, patch): (u8, PageKey, u32, u32, &[u8]) = match *change {
            LoggedChange::Image(key, image) => (1, key, image, 0, &[]),
            LoggedChange::Patch(key, offset, bytes) => (2, key, bytes.len() as u32, offset, bytes),
            LoggedChange::Free(key) => (3, key, 0, 0, &[]),
        };
        assert!(kind != 2 || offset as usize + patch.len() <= BLOCK, "a patch beyond its page");
        let (volume, page) = (key.volume.get(), key.page.get().into());
        let raw = RawChange {
            kind,
            volume,
            class: 0,
            reserved: 0,
            len: len.into(),
            offset: offset.into(),
            page,
        };
        out.extend_from_slice(raw.as_bytes());
        out.extend_from_slice(patch);
    }
    let raw = RawRecord {
        lsn: record.lsn.get().into(),
        bytes: ((out.len() - at) as u32).into(),
        changes_count: (record.changes.len() as u32).into(),
        kind: record.role.kind(),
        reserved: [0; 7],
    };
    out[at..at + size_of::<RawRecord>()].copy_from_slice(raw.as_bytes());
}

// --- logs made of groups ---

/// A group in the model.
struct Made {
    head: GroupHead,
    /// Whether its head can be read.
    is_found: bool,
    /// Whether it is complete, not counting pages at their final places.
    is_whole: bool,
    /// Whether its pages at their final places are there.
    is_placed: bool,
    records: Vec<(Lsn, Role)>,
}

impl Made {
    /// The first and the last LSN of each run that it accounts for, and those of which it has a
    /// part.
    fn lsns(&self) -> impl Iterator<Item = u64> {
        let run = |&(first, count): &(Lsn, u64)| {
            [first.get(), first.get().saturating_add(count.saturating_sub(1))]
        };
        let records = self.records.iter().filter(|_| self.is_whole).map(|(lsn, _)| lsn.get());
        self.head.runs.iter().flat_map(run).chain(records)
    }

    fn last(&self) -> u64 {
        self.lsns().max().unwrap_or(0)
    }

    fn first(&self) -> u64 {
        self.lsns().min().unwrap_or(u64::MAX)
    }
}

fn cut(input: &mut Input) {
    let superblock = superblock(input);
    let mut disk = MemoryDisk::new(ZEROS.clone());
    let mut used = [[0; SEGMENTS as usize]; 2];
    let mut made: Vec<Made> = Vec::new();
    for _ in 0..12 {
        if input.is_empty() {
            break;
        }
        made.extend(group(input, &mut disk, &mut used));
    }
    let scan =
        |arena: &mut Arena| recovery::scan(&mut disk, arena, &superblock, ShardMap::new(2, 2));
    let scanned = ARENA.with_borrow_mut(scan);
    match (expected(&superblock, &mut made), scanned) {
        (None, Err(error)) => {
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
            assert!(error.to_string().contains("restore"), "{error}");
        }
        (Some(recovered_lsn), Ok(scan)) => compare(&superblock, &made, recovered_lsn, &scan),
        (None, Ok(scan)) => {
            panic!("durable commits are missing, but the log ends at {}", scan.recovered_lsn)
        }
        (Some(recovered_lsn), Err(error)) => panic!("all up to {recovered_lsn} is there: {error}"),
    }
}

fn superblock(input: &mut Input) -> Superblock {
    let lsn = |input: &mut Input| Lsn::new(input.number().min(LSN_END - 1));
    let mut vshard = || VShardState { redo_lsn: lsn(input), ..VShardState::default() };
    let vshards = vec![vshard(), vshard()];
    let watermark = lsn(input);
    Superblock {
        clean: false,
        store_id: [7; 16],
        generation: 40,
        epoch: EPOCH,
        epoch_first_lsn: lsn(input),
        salt: SALT,
        checkpoint: 5,
        watermark,
        next_lsn: lsn(input),
        geometry: Geometry {
            extent_bytes: EXTENT_BYTES,
            segment_bytes: u64::from(SEGMENT_BLOCKS) * BLOCK as u64,
            segments_count: SEGMENTS,
            vshards_count: 2,
        },
        extents_count: EXTENTS,
        table_crc: 0,
        logs: vec![LogState::without_end(SEGMENTS); 2],
        vshards,
    }
}

/// Writes a group after the others of its segment; `None` if there is no room.
fn group(
    input: &mut Input,
    disk: &mut MemoryDisk,
    used: &mut [[u32; SEGMENTS as usize]; 2],
) -> Option<Made> {
    let (shard, segment) = (input.below(2), input.below(SEGMENTS as usize));
    let used = &mut used[shard][segment];
    let (shard, segment) = (ShardId::new(shard as u16), SegmentNo::new(segment as u32));
    let mut head = GroupHead {
        epoch: EPOCH,
        shard,
        segment,
        generation: 1,
        number: input.u8().into(),
        body_blocks: 1,
        blocks: 1,
        watermark: Lsn::new(input.number()),
        superblock_generation: u64::from(input.u8() % 42),
        ..GroupHead::default()
    };
    head.runs = (0..input.below(4)).map(|_| (Lsn::new(input.number()), input.number())).collect();
    let (images, is_placed) = images(input, &mut head);
    let mut body = vec![0; HEAD_BYTES];
    let records = records(input, images.len(), &mut body);
    head.records_bytes = (body.len() - HEAD_BYTES) as u32;
    images.iter().for_each(|image| body.extend_from_slice(image.encode().as_bytes()));
    if body.len() > BLOCK {
        return None;
    }
    body.resize(head.blocks as usize * BLOCK, 0);
    head.block = *used;
    head.body_crc = crc32c(&body[HEAD_BYTES..BLOCK]);
    head.seal(SALT, &mut body);
    let damage = if input.u8() % 4 == 1 { Some(input.below(body.len())) } else { None };
    if let Some(at) = damage {
        body[at] ^= 0x10;
    }
    if *used + head.blocks > SEGMENT_BLOCKS {
        return None;
    }
    *used += head.blocks;
    for (number, bytes) in (u64::from(head.block)..).zip(body.chunks(BLOCK)) {
        disk.block_mut(FileId::Log(shard, segment), number)?.copy_from_slice(bytes);
    }
    let runs_fit = head
        .runs
        .iter()
        .all(|(first, count)| first.get().checked_add(*count).is_some_and(|e| e < LSN_END));
    let is_sane = runs_fit && head.watermark.get() < LSN_END;
    let is_found = is_sane && damage.is_none_or(|at| at >= HEAD_BYTES);
    let is_whole =
        is_found && damage.is_none() && records.iter().all(|(lsn, _)| lsn.get() < LSN_END);
    Some(Made { head, is_found, is_whole, is_placed, records })
}

/// Makes up to two images. Tells also whether the pages that they place are there.
fn images(input: &mut Input, head: &mut GroupHead) -> (Vec<PageImage>, bool) {
    let count = input.below(3);
    let (mut images, mut is_placed) = (Vec::new(), true);
    let kinds: Vec<u8> = (0..count).map(|_| input.u8()).collect();
    let inline = kinds.iter().filter(|kind| *kind % 3 == 1).count() as u32;
    head.blocks = 1 + inline;
    head.images_count = count as u32;
    let mut next = 1;
    for kind in kinds {
        let key = PageKey::new(VolumeId::new(1), PageId::new(input.u8().into()));
        let state = match kind % 3 {
            0 => ImageState::NotWritten,
            1 => {
                next += 1;
                ImageState::Inline(next - 1)
            }
            _ => ImageState::Placed,
        };
        let place = BlockAddr {
            extent: ExtentNo::new(u32::from(input.u8()) % 3),
            block: u32::from(input.u8()) % 20,
        };
        let is_wrong = kind >= 128 && state == ImageState::Placed;
        let crc = crc32c(&[0; BLOCK]) ^ u32::from(is_wrong);
        let inside = place.offset(EXTENT_BYTES) + BLOCK as u64 <= u64::from(EXTENTS) * EXTENT_BYTES;
        is_placed &= state != ImageState::Placed || (inside && !is_wrong);
        images.push(PageImage { key, state, entry: Entry::plain(place, Lsn::new(1), crc) });
    }
    (images, is_placed)
}

fn records(input: &mut Input, images: usize, body: &mut Vec<u8>) -> Vec<(Lsn, Role)> {
    let mut records = Vec::new();
    for _ in 0..input.below(4) {
        let lsn = Lsn::new(input.number());
        let role = match input.u8() % 3 {
            0 => Role::Whole,
            1 => Role::Owner(ShardSet::from_bits(u64::from(input.u8() % 4))),
            _ => Role::Part(ShardSet::from_bits(u64::from(input.u8() % 4))),
        };
        let patch = [9; 16];
        let changes = (0..input.below(3)).map(|_| {
            let key = PageKey::new(VolumeId::new(1), PageId::new(u64::from(input.u8()) << 6));
            match input.u8() {
                kind if kind % 3 == 0 && images > 0 => {
                    LoggedChange::Image(key, u32::from(kind) % images as u32)
                }
                kind if kind % 3 == 1 => {
                    LoggedChange::Patch(key, u32::from(kind), &patch[..usize::from(kind) % 16])
                }
                _ => LoggedChange::Free(key),
            }
        });
        let changes = changes.collect();
        encode(&Record { lsn, role, changes }, body);
        records.push((lsn, role));
    }
    records
}

// --- the model ---

fn redo(superblock: &Superblock) -> u64 {
    let lowest = superblock.vshards.iter().map(|v| v.redo_lsn.get()).min().unwrap_or(0);
    lowest.max(superblock.epoch_first_lsn.get().saturating_sub(1))
}

fn watermark(superblock: &Superblock, made: &[Made]) -> u64 {
    let found = made.iter().filter(|m| m.is_found).map(|m| m.head.watermark.get());
    found.fold(superblock.watermark.get(), u64::max)
}

/// The end of the log; `None` if the store must be refused. Marks groups that turn out to be
/// incomplete.
fn expected(superblock: &Superblock, made: &mut [Made]) -> Option<u64> {
    let watermark = watermark(superblock, made);
    for m in made.iter_mut() {
        m.is_whole &= m.last() <= watermark || m.is_placed;
    }
    if made.iter().any(|m| m.is_found && m.head.superblock_generation > superblock.generation) {
        return None;
    }
    let whole = || made.iter().filter(|m| m.is_whole);
    let redo = redo(superblock);
    let mut recovered_lsn = redo;
    // Advance one step at a time, over whichever run has the next LSN.
    while let Some(end) = whole()
        .flat_map(|m| &m.head.runs)
        .filter(|(first, count)| {
            first.get() <= recovered_lsn + 1 && first.get() + count > recovered_lsn + 1
        })
        .map(|(first, count)| first.get() + count - 1)
        .next()
    {
        recovered_lsn = end;
    }
    let parts: BTreeSet<(u64, u16)> = whole()
        .flat_map(|m| m.records.iter().map(|record| (m.head.shard.get(), record)))
        .filter(|(_, (_, role))| matches!(role, Role::Part(_)))
        .map(|(shard, (lsn, _))| (lsn.get(), shard))
        .collect();
    for (lsn, role) in whole().flat_map(|m| &m.records).filter(|(lsn, _)| lsn.get() > redo) {
        let Role::Owner(others) = role else { continue };
        if others.iter().any(|shard| !parts.contains(&(lsn.get(), shard.get()))) {
            recovered_lsn = recovered_lsn.min(lsn.get() - 1);
        }
    }
    (recovered_lsn >= watermark).then_some(recovered_lsn)
}

fn compare(superblock: &Superblock, made: &[Made], recovered_lsn: u64, scan: &Scan) {
    assert_eq!(scan.recovered_lsn.get(), recovered_lsn, "the end of the log");
    let redo = redo(superblock);
    assert_eq!(scan.redo.get(), redo, "what the roots reflect");
    let torn = made.iter().filter(|m| m.is_found && !m.is_whole).count() as u64;
    assert_eq!(scan.torn, torn, "torn groups");
    let whole = || made.iter().filter(|m| m.is_whole && m.last() > redo);
    let place = |head: &GroupHead| (head.shard, head.segment, head.block, head.number);
    let kept: BTreeSet<_> =
        whole().filter(|m| m.first() <= recovered_lsn).map(|m| place(&m.head)).collect();
    let found: BTreeSet<_> = scan.groups.iter().map(|group| place(&group.head)).collect();
    assert_eq!(found, kept, "groups to be redone");
    let watermark = watermark(superblock, made);
    for group in &scan.groups {
        let m = made.iter().find(|m| place(&m.head) == place(&group.head)).expect("it was made");
        assert_eq!(group.is_doubtful, m.last() > watermark);
    }
    let commits =
        || whole().flat_map(|m| &m.records).filter(|(_, role)| !matches!(role, Role::Part(_)));
    assert_eq!(
        scan.applied,
        commits().filter(|(lsn, _)| lsn.get() > redo && lsn.get() <= recovered_lsn).count() as u64
    );
    assert_eq!(scan.dropped, commits().filter(|(lsn, _)| lsn.get() > recovered_lsn).count() as u64);
    let seen = made.iter().filter(|m| m.is_found).map(Made::last);
    let highest = seen.fold(watermark.max(superblock.next_lsn.get().saturating_sub(1)), u64::max);
    assert!(scan.highest.get() >= highest, "LSNs seen are used again");
}
