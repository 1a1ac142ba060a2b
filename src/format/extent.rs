//! The extent table, and the summaries at the end of an extent.
//!
//! Table block `i` describes extents `128 * i` and on. It has two slots: checkpoint number `c`
//! writes slot `c % 2`. A block counts if it carries the checkpoint number of the superblock. The
//! superblock also holds a checksum over all table blocks, since a checkpoint that a crash has
//! interrupted had the same number as the next one.

use super::{crc_around, get, put};
use crate::base::checksum::crc32c_append;
use crate::base::{BLOCK, ExtentNo, Lsn, PageKey, VShard, VolumeId};
use std::mem::offset_of;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Extents that one table block describes.
pub const TABLE_ROWS: u32 = 128;
pub(super) const TABLE_MAGIC: [u8; 8] = *b"CPTABLE\0";
pub(super) const SUMMARY_MAGIC: [u8; 8] = *b"CPSUMMRY";

/// Head of a table block; [`TABLE_ROWS`] [`TableRow`]s follow.
#[repr(C)]
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
pub struct TableHead {
    /// `CPTABLE`.
    pub magic: [u8; 8],
    /// CRC32C of the block, this field as zeros.
    pub crc: U32,
    /// Which table block.
    pub index: U32,
    /// The store's identity.
    pub store_id: [u8; 16],
    /// The checkpoint that wrote it.
    pub checkpoint: U64,
    /// Zero.
    pub reserved: [u8; 24],
}

/// One extent at the time of a checkpoint. All zeros: free.
#[repr(C)]
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
    Unaligned,
    Default,
)]
pub struct TableRow {
    /// 0 = free, 1 = in use.
    pub state: u8,
    /// Size class of its pages.
    pub class: u8,
    /// Blocks that the roots of this checkpoint refer to.
    pub live: U16,
    /// The checksum of the summary that counts.
    pub summary_crc: U32,
    /// Which of the two summary areas that is.
    pub summary_slot: u8,
    /// Zero.
    pub reserved: [u8; 15],
}

/// Head of a summary; [`SummaryItem`]s follow. An extent ends with two summary areas, used in turn:
/// an extent that is still being filled gets a new summary with each checkpoint, and the one before
/// stays until that is durable.
#[repr(C)]
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
pub struct SummaryHead {
    /// `CPSUMMRY`.
    pub magic: [u8; 8],
    /// CRC32C of the summary's blocks, this field as zeros.
    pub crc: U32,
    /// The extent.
    pub extent: U32,
    /// The store's identity.
    pub store_id: [u8; 16],
    /// Items that follow.
    pub count: U32,
    /// Zero.
    pub reserved: [u8; 28],
}

/// What was written to a block of an extent. It may have been superseded since: the map decides.
#[repr(C)]
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
pub struct SummaryItem {
    /// The page's version; zero for a node.
    pub lsn: U64,
    /// The page's id, or the node's prefix.
    pub id: U64,
    /// First block.
    pub block: U16,
    /// Blocks.
    pub blocks: U16,
    /// 0 = page, 1 = map node.
    pub kind: u8,
    /// The volume.
    pub volume: u8,
    /// The node's level.
    pub level: u8,
    /// Size class.
    pub class: u8,
    /// The node's virtual shard.
    pub vshard: U16,
    /// Zero.
    pub reserved: [u8; 6],
}

const _: () = assert!(size_of::<TableHead>() == 64 && size_of::<TableRow>() == 24);
const _: () = assert!(64 + TABLE_ROWS as usize * size_of::<TableRow>() <= BLOCK);
const _: () = assert!(size_of::<SummaryHead>() == 64 && size_of::<SummaryItem>() == 32);

/// An item of a summary: what lies at `block`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Item {
    /// The block within the extent.
    pub block: u32,
    /// What was written there.
    pub what: ItemKind,
}

/// What a block holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ItemKind {
    /// A version of a page.
    Page(PageKey, Lsn),
    /// A version of a map node.
    Node(NodeKey),
}

/// A map node's name: its virtual shard, volume, level (leaves have 0) and the high bits of the
/// keys below it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct NodeKey {
    /// Virtual shard.
    pub vshard: VShard,
    /// Volume.
    pub volume: VolumeId,
    /// Level; leaves have 0.
    pub level: u8,
    /// The page's index without the bits that this node and those below it decode.
    pub prefix: u64,
}

/// Blocks of one of the two summary areas at the end of an extent of `extent_blocks` blocks: the
/// least that list every other block. Asked several times for each commit, so it is worked out
/// without a search.
pub const fn summary_blocks(extent_blocks: u32) -> u32 {
    // Room for a head and an item for each block that is in neither area: HEAD + (extent - 2 *
    // area) * ITEM <= area * BLOCK.
    const HEAD: u32 = size_of::<SummaryHead>() as u32;
    const ITEM: u32 = size_of::<SummaryItem>() as u32;
    (HEAD + extent_blocks * ITEM).div_ceil(BLOCK as u32 + 2 * ITEM)
}

/// For extents of every legal size the summary has room for all items, and a smaller one would not.
const _: () = {
    let mut extent_blocks = 16;
    while extent_blocks <= 2048 {
        let blocks = summary_blocks(extent_blocks);
        assert!(
            summary_fits(extent_blocks, blocks)
                && (blocks == 1 || !summary_fits(extent_blocks, blocks - 1))
        );
        extent_blocks *= 2;
    }
};

const fn summary_fits(extent_blocks: u32, blocks: u32) -> bool {
    let items = (extent_blocks - 2 * blocks) as usize;
    size_of::<SummaryHead>() + items * size_of::<SummaryItem>() <= blocks as usize * BLOCK
}

/// Blocks of an extent that hold pages and nodes; the summary areas follow.
pub const fn data_blocks(extent_blocks: u32) -> u32 {
    extent_blocks - 2 * summary_blocks(extent_blocks)
}

/// The block at which summary area `slot` of an extent begins.
pub const fn summary_at(extent_blocks: u32, slot: u8) -> u32 {
    data_blocks(extent_blocks) + (slot as u32 & 1) * summary_blocks(extent_blocks)
}

/// The byte offset in the table file of block `index` of checkpoint `checkpoint`.
pub const fn table_offset(index: u32, checkpoint: u64) -> u64 {
    (index as u64 * 2 + checkpoint % 2) * BLOCK as u64
}

/// The checksum over the checksums of all table blocks, in order.
pub fn table_crc(sums: impl IntoIterator<Item = u32>) -> u32 {
    sums.into_iter().fold(0, |all, sum| crc32c_append(all, &sum.to_le_bytes()))
}

/// Fills one table block and returns its checksum; `rows` has at most [`TABLE_ROWS`].
pub fn encode_table(
    store_id: [u8; 16],
    index: u32,
    checkpoint: u64,
    rows: &[TableRow],
    out: &mut [u8],
) -> u32 {
    out.fill(0);
    let head = TableHead {
        magic: TABLE_MAGIC,
        crc: 0.into(),
        index: index.into(),
        store_id,
        checkpoint: checkpoint.into(),
        reserved: [0; 24],
    };
    put(out, 0, &head);
    for (i, row) in rows.iter().enumerate() {
        put(out, size_of::<TableHead>() + i * size_of::<TableRow>(), row);
    }
    let crc = crc_around(0, out, offset_of!(TableHead, crc));
    put(out, offset_of!(TableHead, crc), &U32::from(crc));
    crc
}

/// Checks and decodes a table block, and returns its checksum; the message says what is wrong.
pub fn decode_table(
    store_id: [u8; 16],
    index: u32,
    checkpoint: u64,
    bytes: &[u8],
) -> Result<(Vec<TableRow>, u32), &'static str> {
    let head: &TableHead = get(bytes, 0).ok_or("is too short")?;
    if head.magic != TABLE_MAGIC {
        return Err("is not a table block");
    }
    if crc_around(0, bytes, offset_of!(TableHead, crc)) != head.crc.get() {
        return Err("has a wrong checksum");
    }
    if head.store_id != store_id || head.index.get() != index {
        return Err("is another block: a write went astray");
    }
    if head.checkpoint.get() != checkpoint {
        return Err("is of another checkpoint: a write was lost");
    }
    let at = |i: usize| size_of::<TableHead>() + i * size_of::<TableRow>();
    let rows =
        (0..TABLE_ROWS as usize).filter_map(|i| get::<TableRow>(bytes, at(i)).copied()).collect();
    Ok((rows, head.crc.get()))
}

/// Fills a summary area and returns its checksum.
pub fn encode_summary(store_id: [u8; 16], extent: ExtentNo, items: &[Item], out: &mut [u8]) -> u32 {
    out.fill(0);
    let head = SummaryHead {
        magic: SUMMARY_MAGIC,
        crc: 0.into(),
        extent: extent.get().into(),
        store_id,
        count: (items.len() as u32).into(),
        reserved: [0; 28],
    };
    put(out, 0, &head);
    for (i, item) in items.iter().enumerate() {
        put(out, size_of::<SummaryHead>() + i * size_of::<SummaryItem>(), &encode_item(item));
    }
    let crc = crc_around(0, out, offset_of!(SummaryHead, crc));
    put(out, offset_of!(SummaryHead, crc), &U32::from(crc));
    crc
}

fn encode_item(item: &Item) -> SummaryItem {
    let mut raw = SummaryItem {
        lsn: 0.into(),
        id: 0.into(),
        block: (item.block as u16).into(),
        blocks: 1.into(),
        kind: 0,
        volume: 0,
        level: 0,
        class: 0,
        vshard: 0.into(),
        reserved: [0; 6],
    };
    match item.what {
        ItemKind::Page(key, lsn) => {
            raw.lsn = lsn.get().into();
            raw.id = key.page.get().into();
            raw.volume = key.volume.get();
        }
        ItemKind::Node(key) => {
            raw.kind = 1;
            raw.id = key.prefix.into();
            raw.volume = key.volume.get();
            raw.level = key.level;
            raw.vshard = key.vshard.get().into();
        }
    }
    raw
}

/// Checks and decodes a summary area whose checksum must be `crc`; the message says what is wrong.
pub fn decode_summary(
    store_id: [u8; 16],
    extent: ExtentNo,
    crc: u32,
    bytes: &[u8],
) -> Result<Vec<Item>, &'static str> {
    let head: &SummaryHead = get(bytes, 0).ok_or("is too short")?;
    if crc_around(0, bytes, offset_of!(SummaryHead, crc)) != crc || head.crc.get() != crc {
        return Err("has a wrong checksum");
    }
    if head.magic != SUMMARY_MAGIC || head.store_id != store_id || head.extent.get() != extent.get()
    {
        return Err("is not this extent's summary");
    }
    let at = |i: usize| size_of::<SummaryHead>() + i * size_of::<SummaryItem>();
    let mut items = Vec::with_capacity(head.count.get() as usize % (1 << 16));
    for i in 0..head.count.get() as usize {
        let raw: &SummaryItem = get(bytes, at(i)).ok_or("has more items than room")?;
        let volume = VolumeId::new(raw.volume);
        let what = match raw.kind {
            0 => ItemKind::Page(PageKey::new(volume, raw.id.get().into()), Lsn::new(raw.lsn.get())),
            1 => ItemKind::Node(NodeKey {
                vshard: VShard::new(raw.vshard.get()),
                volume,
                level: raw.level,
                prefix: raw.id.get(),
            }),
            _ => return Err("has an item of unknown kind"),
        };
        items.push(Item { block: raw.block.get().into(), what });
    }
    Ok(items)
}
