//! Addresses in the data space and in the log.

use std::fmt;

/// An extent's number: extent `n` begins at byte `n * extent_bytes` of the data space.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct ExtentNo(u32);

impl ExtentNo {
    /// The extent with this number.
    pub const fn new(raw: u32) -> Self {
        ExtentNo(raw)
    }
    /// The number.
    pub const fn get(self) -> u32 {
        self.0
    }
    /// The number, as an index.
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Debug for ExtentNo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "e{}", self.0)
    }
}

/// The address of a block in the data space: an extent, and a block within it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct BlockAddr {
    /// The extent.
    pub extent: ExtentNo,
    /// The 4 KiB block within the extent.
    pub block: u32,
}

impl BlockAddr {
    /// The byte offset in the data space.
    pub const fn offset(self, extent_bytes: u64) -> u64 {
        self.extent.0 as u64 * extent_bytes + self.block as u64 * super::BLOCK as u64
    }

    /// Packs both numbers into one, with the extent in the high half: the form on disk.
    pub const fn pack(self) -> u64 {
        (self.extent.0 as u64) << 32 | self.block as u64
    }

    /// The inverse of [`pack`](Self::pack).
    pub const fn unpack(raw: u64) -> Self {
        BlockAddr { extent: ExtentNo((raw >> 32) as u32), block: raw as u32 }
    }
}

impl fmt::Debug for BlockAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}+{}", self.extent, self.block)
    }
}

/// A log segment's number within its shard's log.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct SegmentNo(u32);

impl SegmentNo {
    /// The segment with this number.
    pub const fn new(raw: u32) -> Self {
        SegmentNo(raw)
    }
    /// The number.
    pub const fn get(self) -> u32 {
        self.0
    }
    /// The number, as an index.
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Debug for SegmentNo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "seg{}", self.0)
    }
}
