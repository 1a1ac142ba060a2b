//! The superblock: it describes a store, and writing it is the one step that makes a checkpoint or
//! a recovery valid.
//!
//! Four copies of 16 KiB stand at the start of the meta file. Generation `g` is written to copies
//! `2 * (g % 2)` and the one after it, one after the other, a flush after each: so a crash spoils
//! at most one copy, and a generation of which both copies are unreadable is damage.

use super::{FORMAT_VERSION, LSN_END, Plain, crc_around, get, put};
use crate::base::options::Geometry;
use crate::base::{Lsn, SegmentNo, ShardId};
use std::mem::offset_of;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of one copy.
pub const SUPERBLOCK_BYTES: usize = 16 * 1024;
/// Copies.
pub const SUPERBLOCK_COPIES: u64 = 4;
/// The most shards, and so logs, that a store can have at a time.
pub const SHARDS_MAX: usize = 64;
/// The least segments of a log: one is filled while the records in the other become part of the
/// roots.
pub const SEGMENTS_MIN: u32 = 2;
/// The most virtual shards.
pub const VSHARDS_MAX: usize = 512;
pub(super) const MAGIC: [u8; 8] = *b"COREPAGE";
/// Stands where the last copy of the first superblock is written while a store is being created.
pub const CREATION_MARK: &[u8; 32] = b"corepage: creation under way    ";

/// The fixed part.
#[repr(C)]
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
pub struct Head {
    /// `COREPAGE`.
    pub magic: [u8; 8],
    /// [`FORMAT_VERSION`].
    pub version: U32,
    /// CRC32C of all 16 KiB, this field as zeros.
    pub crc: U32,
    /// Which of the four copies this is.
    pub copy: U32,
    /// Shards of the shard map, and so logs.
    pub shards_count: U16,
    /// 1 after a clean close: the logs hold nothing that is needed.
    pub clean: u8,
    /// Zero: the flush method is chosen anew at each open.
    pub flush_method: u8,
    /// Random, made with the store.
    pub store_id: [u8; 16],
    /// Grows by one with each superblock.
    pub generation: U64,
    /// Grows by one each time the store is opened for writing.
    pub epoch: U64,
    /// The first LSN that this epoch may use.
    pub epoch_first_lsn: U64,
    /// Random, made with the epoch: the seed of its group checksums.
    pub salt: U64,
    /// The newest checkpoint: the number that extent table blocks must carry.
    pub checkpoint: U64,
    /// All commits up to here were durable when this was written.
    pub watermark: U64,
    /// After recovery, until a checkpoint contains commits of the epoch: the LSN after the
    /// recovered one. From then on: no LSN from here on was allocated when the last step of the
    /// checkpoint began.
    pub next_lsn: U64,
    /// Bytes of an extent.
    pub extent_bytes: U64,
    /// Bytes of a log segment.
    pub segment_bytes: U64,
    /// The most segments of a log; its row says how many it has so far.
    pub segments_count: U32,
    /// Virtual shards.
    pub vshards_count: U32,
    /// Extents that existed. If the data file has grown since, later ones are free.
    pub extents_count: U32,
    /// CRC32C of the checksums of all blocks of the extent table, in order.
    pub table_crc: U32,
    /// Zero.
    pub reserved: [u8; 128],
}

/// The log of one shard: its length, and its end after a clean close. Otherwise the fields of the
/// end are zeros.
#[repr(C)]
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Default)]
pub struct LogRow {
    /// The segment last written to.
    pub segment: U32,
    /// The block in it after the last group.
    pub block: U32,
    /// Its generation.
    pub generation: U64,
    /// The last group's number; zero if the epoch wrote none.
    pub number: U64,
    /// The last group's head checksum.
    pub checksum: U32,
    /// Segments that the log has so far, of `segments_count`; zero: all of them.
    pub segments_made: U32,
}

/// One virtual shard: its root and its owner.
#[repr(C)]
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Default)]
pub struct VShardRow {
    /// The generation of the root slot that counts.
    pub generation: U64,
    /// The roots named here reflect every record up to this LSN.
    pub redo_lsn: U64,
    /// The shard that owns it in this epoch.
    pub shard: U16,
    /// Zero.
    pub reserved: U16,
    /// The checksum of that root.
    pub root_crc: U32,
}

const LOGS_AT: usize = size_of::<Head>();
const VSHARDS_AT: usize = LOGS_AT + SHARDS_MAX * size_of::<LogRow>();
const _: () =
    assert!(size_of::<Head>() == 256 && size_of::<LogRow>() == 32 && size_of::<VShardRow>() == 24);
const _: () = assert!(VSHARDS_AT + VSHARDS_MAX * size_of::<VShardRow>() <= SUPERBLOCK_BYTES);

/// A checked superblock in memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Superblock {
    /// The store was closed cleanly.
    pub clean: bool,
    /// The store's identity.
    pub store_id: [u8; 16],
    /// Generation of this superblock.
    pub generation: u64,
    /// Epoch.
    pub epoch: u64,
    /// First LSN of the epoch.
    pub epoch_first_lsn: Lsn,
    /// Seed of group checksums.
    pub salt: u64,
    /// Number of the newest checkpoint.
    pub checkpoint: u64,
    /// Every commit up to here was durable.
    pub watermark: Lsn,
    /// Above every LSN that was allocated.
    pub next_lsn: Lsn,
    /// Fixed sizes.
    pub geometry: Geometry,
    /// Extents that existed.
    pub extents_count: u32,
    /// The checksum of the extent table.
    pub table_crc: u32,
    /// The log of each shard.
    pub logs: Vec<LogState>,
    /// The root and the owner of each virtual shard.
    pub vshards: Vec<VShardState>,
}

/// [`LogRow`] in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogState {
    /// Segments of the log, which recovery reads.
    pub segments_made: u32,
    /// Its end, after a clean close.
    pub end: LogEnd,
}

impl LogState {
    /// A log of `segments_made` segments whose end is not recorded.
    pub fn without_end(segments_made: u32) -> Self {
        LogState { segments_made, end: LogEnd::default() }
    }
}

/// The end of a log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LogEnd {
    /// The segment last written to.
    pub segment: SegmentNo,
    /// The block after the last group.
    pub block: u32,
    /// The segment's generation.
    pub generation: u64,
    /// The last group's number.
    pub number: u64,
    /// The last group's checksum.
    pub checksum: u32,
}

/// [`VShardRow`] in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VShardState {
    /// The root that counts.
    pub root: RootVersion,
    /// Every record up to here is in the root.
    pub redo_lsn: Lsn,
    /// Owner in the shard map.
    pub shard: ShardId,
}

impl LogRow {
    fn decode(&self, segments_count: u32) -> LogState {
        let segments_made = match self.segments_made.get() {
            // A store from before logs could grow has all segments, and zero here.
            0 => segments_count,
            made => made,
        };
        let end = LogEnd {
            segment: SegmentNo::new(self.segment.get()),
            block: self.block.get(),
            generation: self.generation.get(),
            number: self.number.get(),
            checksum: self.checksum.get(),
        };
        LogState { segments_made, end }
    }
}

/// Identifies a root among those of its virtual shard. It takes both fields: a checkpoint that a
/// crash has interrupted has written a root of the same generation as the next one, and a device
/// may lose a write.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RootVersion {
    /// Its generation, by which it is found.
    pub generation: u64,
    /// Its checksum.
    pub crc: u32,
}

/// Why bytes are not accepted as a copy of the superblock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// They are not a superblock.
    Magic,
    /// They are a superblock of another version.
    Version(u32),
    /// The checksum is wrong.
    Sum,
    /// The checksum is right, but this is another copy, or the values make no sense.
    Values,
}

impl Superblock {
    /// The segments of all logs.
    pub fn segments(&self) -> impl Iterator<Item = (ShardId, SegmentNo)> {
        let shards = (0..).map(ShardId::new).zip(&self.logs);
        shards.flat_map(|(shard, log)| {
            (0..log.segments_made).map(move |no| (shard, SegmentNo::new(no)))
        })
    }

    /// The LSN up to which the roots reflect every record.
    pub fn redo_lsn(&self) -> Lsn {
        let redo_of = self.vshards.iter().map(|vshard| vshard.redo_lsn);
        redo_of.min().unwrap_or(Lsn::ZERO).max(self.epoch_first_lsn.before())
    }

    /// The byte offset in the meta file of copy `copy`.
    pub fn offset(copy: u64) -> u64 {
        copy * SUPERBLOCK_BYTES as u64
    }

    /// The copies that generation `generation` is written to, in order.
    pub fn copies_of(generation: u64) -> [u64; 2] {
        let first = generation % 2 * 2;
        [first, first + 1]
    }

    /// Fills `out`, of [`SUPERBLOCK_BYTES`], with copy `copy`.
    pub fn encode(&self, copy: u64, out: &mut [u8]) {
        out.fill(0);
        let head = Head {
            magic: MAGIC,
            version: FORMAT_VERSION.into(),
            crc: 0.into(),
            copy: (copy as u32).into(),
            shards_count: (self.logs.len() as u16).into(),
            clean: self.clean.into(),
            flush_method: 0,
            store_id: self.store_id,
            generation: self.generation.into(),
            epoch: self.epoch.into(),
            epoch_first_lsn: self.epoch_first_lsn.get().into(),
            salt: self.salt.into(),
            checkpoint: self.checkpoint.into(),
            watermark: self.watermark.get().into(),
            next_lsn: self.next_lsn.get().into(),
            extent_bytes: self.geometry.extent_bytes.into(),
            segment_bytes: self.geometry.segment_bytes.into(),
            segments_count: self.geometry.segments_count.into(),
            vshards_count: self.geometry.vshards_count.into(),
            extents_count: self.extents_count.into(),
            table_crc: self.table_crc.into(),
            reserved: [0; 128],
        };
        put(out, 0, &head);
        for (i, log) in self.logs.iter().enumerate() {
            let row = LogRow {
                segment: log.end.segment.get().into(),
                block: log.end.block.into(),
                generation: log.end.generation.into(),
                number: log.end.number.into(),
                checksum: log.end.checksum.into(),
                segments_made: log.segments_made.into(),
            };
            put(out, LOGS_AT + i * size_of::<LogRow>(), &row);
        }
        for (i, vshard) in self.vshards.iter().enumerate() {
            let row = VShardRow {
                generation: vshard.root.generation.into(),
                redo_lsn: vshard.redo_lsn.get().into(),
                shard: vshard.shard.get().into(),
                reserved: 0.into(),
                root_crc: vshard.root.crc.into(),
            };
            put(out, VSHARDS_AT + i * size_of::<VShardRow>(), &row);
        }
        let crc = U32::from(crc_around(0, out, offset_of!(Head, crc)));
        put(out, offset_of!(Head, crc), &crc);
    }

    /// Checks and decodes copy `copy`.
    pub fn decode(copy: u64, bytes: &[u8]) -> Result<Self, Refusal> {
        let head: &Head = get(bytes, 0).ok_or(Refusal::Magic)?;
        if head.magic != MAGIC {
            return Err(Refusal::Magic);
        }
        if head.version.get() != FORMAT_VERSION {
            return Err(Refusal::Version(head.version.get()));
        }
        if crc_around(0, bytes, offset_of!(Head, crc)) != head.crc.get() {
            return Err(Refusal::Sum);
        }
        let geometry = Geometry {
            extent_bytes: head.extent_bytes.get(),
            segment_bytes: head.segment_bytes.get(),
            segments_count: head.segments_count.get(),
            vshards_count: head.vshards_count.get(),
        };
        let shards = usize::from(head.shards_count.get());
        // These counts say which rows are read.
        if u64::from(head.copy.get()) != copy || geometry.check().is_err() || shards > SHARDS_MAX {
            return Err(Refusal::Values);
        }
        let logs = rows(bytes, LOGS_AT, shards, |row: &LogRow| row.decode(geometry.segments_count));
        let vshards =
            rows(bytes, VSHARDS_AT, geometry.vshards_count as usize, |row: &VShardRow| {
                VShardState {
                    root: RootVersion { generation: row.generation.get(), crc: row.root_crc.get() },
                    redo_lsn: Lsn::new(row.redo_lsn.get()),
                    shard: ShardId::new(row.shard.get()),
                }
            });
        let superblock = Superblock {
            clean: head.clean == 1,
            store_id: head.store_id,
            generation: head.generation.get(),
            epoch: head.epoch.get(),
            epoch_first_lsn: Lsn::new(head.epoch_first_lsn.get()),
            salt: head.salt.get(),
            checkpoint: head.checkpoint.get(),
            watermark: Lsn::new(head.watermark.get()),
            next_lsn: Lsn::new(head.next_lsn.get()),
            geometry,
            extents_count: head.extents_count.get(),
            table_crc: head.table_crc.get(),
            logs,
            vshards,
        };
        if superblock.is_consistent() { Ok(superblock) } else { Err(Refusal::Values) }
    }

    /// Whether the values can be a store's: one log for each shard, of as many segments as the
    /// geometry allows, one row for each virtual shard, and counters that can still be raised.
    /// Asked before a superblock is written, and after one was read.
    pub fn is_consistent(&self) -> bool {
        let segments = SEGMENTS_MIN..=self.geometry.segments_count;
        let counters = [self.generation, self.epoch, self.checkpoint];
        let lsns = [self.epoch_first_lsn, self.watermark, self.next_lsn];
        let rows = self.vshards.iter().flat_map(|row| [row.redo_lsn.get(), row.root.generation]);
        self.geometry.check().is_ok()
            && (1..=SHARDS_MAX).contains(&self.logs.len())
            && self.logs.iter().all(|log| segments.contains(&log.segments_made))
            && self.vshards.len() == self.geometry.vshards_count as usize
            && counters.into_iter().chain(lsns.map(Lsn::get)).chain(rows).all(|n| n < LSN_END)
    }
}

fn rows<T: Plain, V>(bytes: &[u8], at: usize, count: usize, decode: impl Fn(&T) -> V) -> Vec<V> {
    (0..count).filter_map(|i| get::<T>(bytes, at + i * size_of::<T>())).map(decode).collect()
}
