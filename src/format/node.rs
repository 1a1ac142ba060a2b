//! Map nodes: leaves of 64 entries and interior nodes of 256 children.
//!
//! A node has no head and no checksum of its own: its parent holds its address and its CRC32C, so
//! one chain of checksums leads from the root to every byte, and a lost or misdirected write of a
//! node shows in its parent.

use super::get;
use crate::base::{BLOCK, BlockAddr, Lsn};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Entries of a leaf.
pub const LEAF_ENTRIES: usize = 64;
/// Children of an interior node.
pub const NODE_CHILDREN: usize = 256;

/// The address of a page, and what its bytes must be. All zeros: there is no such page.
#[repr(C)]
#[derive(
    Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Default,
)]
pub struct Entry {
    /// Extent in the high half, block in the low half.
    pub place: U64,
    /// The commit that wrote this version; zero only in an entry without a page.
    pub lsn: U64,
    /// Bytes stored.
    pub len: U32,
    /// CRC32C of the bytes stored.
    pub crc: U32,
    /// Size of the page: 4 KiB << class.
    pub class: u8,
    /// How it is compressed: 0 = not compressed.
    pub codec: u8,
    /// The key with which it is encrypted: 0 = not encrypted.
    pub key_id: U16,
    /// Zero.
    pub flags: U32,
    /// Nonce of the encryption.
    pub nonce: [u8; 12],
    /// Authentication tag of the encryption.
    pub tag: [u8; 16],
    /// Zero.
    pub reserved: U32,
}

/// The address of a child node, and its checksum. All zeros: there is no child.
#[repr(C)]
#[derive(
    Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Default,
)]
pub struct Child {
    /// Extent in the high half, block in the low half.
    pub place: U64,
    /// CRC32C of the node's 4 KiB.
    pub crc: U32,
    /// The child's level; leaves have 0.
    pub level: u8,
    /// 1 if there is a child.
    pub present: u8,
    /// Zero.
    pub reserved: U16,
}

const _: () = assert!(
    size_of::<Entry>() * LEAF_ENTRIES == BLOCK && size_of::<Child>() * NODE_CHILDREN == BLOCK
);

impl Entry {
    /// An entry for a plain 4 KiB page.
    pub fn plain(place: BlockAddr, lsn: Lsn, crc: u32) -> Self {
        Entry {
            place: place.pack().into(),
            lsn: lsn.get().into(),
            len: (BLOCK as u32).into(),
            crc: crc.into(),
            ..Entry::default()
        }
    }

    /// Whether there is such a page.
    pub fn is_present(&self) -> bool {
        self.lsn.get() != 0
    }

    /// The address.
    pub fn place(&self) -> BlockAddr {
        BlockAddr::unpack(self.place.get())
    }

    /// The version.
    pub fn lsn(&self) -> Lsn {
        Lsn::new(self.lsn.get())
    }
}

impl Child {
    /// A child at `place`.
    pub fn at(place: BlockAddr, crc: u32, level: u8) -> Self {
        Child { place: place.pack().into(), crc: crc.into(), level, present: 1, reserved: 0.into() }
    }

    /// Whether there is one.
    pub fn is_present(&self) -> bool {
        self.present == 1
    }

    /// The address.
    pub fn place(&self) -> BlockAddr {
        BlockAddr::unpack(self.place.get())
    }
}

/// Entry `slot` of a leaf; an empty one if `slot` is out of range.
pub fn entry(leaf: &[u8], slot: usize) -> Entry {
    get::<Entry>(leaf, slot * size_of::<Entry>()).copied().unwrap_or_default()
}

/// Child `slot` of an interior node; an empty one if `slot` is out of range.
pub fn child(node: &[u8], slot: usize) -> Child {
    get::<Child>(node, slot * size_of::<Child>()).copied().unwrap_or_default()
}
