//! The root of a virtual shard: one block, in two alternating slots after the superblock copies.
//!
//! A root counts if the superblock names its generation and its checksum; the slot is `generation %
//! 2`.

use super::node::Child;
use super::superblock::{SUPERBLOCK_BYTES, SUPERBLOCK_COPIES, Superblock};
use super::{crc_around, get, put};
use crate::base::{BLOCK, Lsn, VShard};
use std::mem::offset_of;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Volumes that a store can have, the catalog included.
pub const VOLUMES_MAX: usize = 248;
pub(super) const MAGIC: [u8; 8] = *b"CPROOT\0\0";

/// The head; [`VOLUMES_MAX`] [`Child`]ren follow, one for each volume's tree.
#[repr(C)]
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
pub struct Head {
    /// `CPROOT`.
    pub magic: [u8; 8],
    /// CRC32C of the block, this field as zeros.
    pub crc: U32,
    /// The virtual shard.
    pub vshard: U16,
    /// Zero.
    pub reserved: U16,
    /// The store's identity.
    pub store_id: [u8; 16],
    /// Grows by one with each root of this virtual shard.
    pub generation: U64,
    /// The tree reflects every record up to here.
    pub redo_lsn: U64,
    /// The checkpoint that wrote it.
    pub checkpoint: U64,
    /// Zero.
    pub reserved2: [u8; 72],
}

const _: () = assert!(size_of::<Head>() == 128 && 128 + VOLUMES_MAX * size_of::<Child>() == BLOCK);

/// The byte offset in the meta file of the slot for generation `generation`.
pub fn offset(vshard: VShard, generation: u64, vshards_count: u32) -> u64 {
    let slot = generation % 2 * u64::from(vshards_count) + u64::from(vshard.get());
    SUPERBLOCK_COPIES * SUPERBLOCK_BYTES as u64 + slot * BLOCK as u64
}

/// The byte offset in the meta file of the root of `vshard` that counts.
pub fn named_offset(superblock: &Superblock, vshard: VShard) -> u64 {
    let generation = superblock.vshards[vshard.index()].root.generation;
    offset(vshard, generation, superblock.geometry.vshards_count)
}

/// Bytes of the meta file.
pub fn meta_bytes(vshards_count: u32) -> u64 {
    offset(VShard::new(0), 0, vshards_count) + 2 * u64::from(vshards_count) * BLOCK as u64
}

/// Fills `out`, one block, and returns its checksum.
pub fn encode(head: &RootHead, children: &[Child; VOLUMES_MAX], out: &mut [u8]) -> u32 {
    out.fill(0);
    let raw = Head {
        magic: MAGIC,
        crc: 0.into(),
        vshard: head.vshard.get().into(),
        reserved: 0.into(),
        store_id: head.store_id,
        generation: head.generation.into(),
        redo_lsn: head.redo_lsn.get().into(),
        checkpoint: head.checkpoint.into(),
        reserved2: [0; 72],
    };
    put(out, 0, &raw);
    put(out, size_of::<Head>(), children);
    let crc = crc_around(0, out, offset_of!(Head, crc));
    put(out, offset_of!(Head, crc), &U32::from(crc));
    crc
}

/// The head of a root, in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RootHead {
    /// The virtual shard whose root it is.
    pub vshard: VShard,
    /// The store's identity.
    pub store_id: [u8; 16],
    /// Grows by one with each root of this virtual shard.
    pub generation: u64,
    /// The tree reflects every record up to here.
    pub redo_lsn: Lsn,
    /// The checkpoint that wrote it.
    pub checkpoint: u64,
}

/// Checks and decodes a slot that must hold the root that the superblock names; the message says
/// what is wrong.
pub fn decode_named(
    superblock: &Superblock,
    vshard: VShard,
    bytes: &[u8],
) -> Result<(RootHead, Box<[Child; VOLUMES_MAX]>), String> {
    let named = superblock.vshards[vshard.index()].root;
    let (head, crc, children) = decode(bytes)?;
    if head.vshard != vshard || head.store_id != superblock.store_id {
        return Err("is another root: a write went astray".into());
    }
    if head.generation != named.generation {
        let found = head.generation;
        return Err(format!(
            "has generation {found}, but the superblock names {}: a write was lost",
            named.generation
        ));
    }
    if crc != named.crc && !planted!(NamedSumIgnored) {
        return Err("is another one than the superblock names, of the same generation: a write \
                    was lost"
            .into());
    }
    Ok((head, children))
}

/// A root, its checksum, and the children of its virtual shard.
type Decoded = (RootHead, u32, Box<[Child; VOLUMES_MAX]>);

/// Checks and decodes a slot; the message says what is wrong.
pub fn decode(bytes: &[u8]) -> Result<Decoded, &'static str> {
    let raw: &Head = get(bytes, 0).ok_or("is too short")?;
    if raw.magic != MAGIC {
        return Err("is not a root");
    }
    if crc_around(0, bytes, offset_of!(Head, crc)) != raw.crc.get() {
        return Err("has a wrong checksum");
    }
    let children: &[Child; VOLUMES_MAX] = get(bytes, size_of::<Head>()).ok_or("is too short")?;
    let head = RootHead {
        vshard: VShard::new(raw.vshard.get()),
        store_id: raw.store_id,
        generation: raw.generation.get(),
        redo_lsn: Lsn::new(raw.redo_lsn.get()),
        checkpoint: raw.checkpoint.get(),
    };
    Ok((head, raw.crc.get(), Box::new(*children)))
}
