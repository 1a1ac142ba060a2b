//! The data that the passes of a verification share: the trees that the roots name, and the blocks
//! of each extent that the map has named so far.
//!
//! It does *not* read anything.

use crate::base::mix::mix;
use crate::format::extent::{Item, ItemKind, TableRow, summary_blocks};
use crate::format::node::Child;
use crate::format::root::VOLUMES_MAX;
use crate::format::superblock::Superblock;

/// The level of a tree that covers all 64-bit keys: 6 bits in a leaf, 8 in each level above.
pub(super) const LEVEL_MAX: u8 = 8;

/// The trees of a virtual shard, one for each volume; `None` if its root is damaged.
pub(super) type Trees = Option<Box<[Child; VOLUMES_MAX]>>;

/// An extent's state in the table.
pub(super) const IN_USE: u8 = 1;

/// One extent: its row in the table, and its blocks that the map names.
pub(super) struct Named {
    /// `None`: its table block is damaged.
    pub(super) row: Option<TableRow>,
    /// One bit for each block.
    blocks: Vec<u64>,
    /// The items named, mixed into one number that does not depend on their order.
    pub(super) hash: u64,
}

impl Named {
    pub(super) fn new(row: Option<TableRow>, extent_blocks: u32) -> Self {
        Named { row, blocks: vec![0; extent_blocks.div_ceil(64) as usize], hash: 0 }
    }

    /// Blocks to read if the table is right: the live ones, and the summary.
    pub(super) fn blocks_to_read(&self, superblock: &Superblock) -> u64 {
        let summary = u64::from(summary_blocks(superblock.geometry.extent_blocks()));
        self.row
            .filter(|row| row.state == IN_USE)
            .map_or(0, |row| u64::from(row.live.get()) + summary)
    }

    pub(super) fn has(&self, block: u32) -> bool {
        self.blocks.get(block as usize / 64).is_some_and(|bits| bits >> (block % 64) & 1 == 1)
    }

    pub(super) fn count(&self) -> u32 {
        self.blocks.iter().map(|bits| bits.count_ones()).sum()
    }

    /// Notes that the map names this item; the message says why that can't be right.
    pub(super) fn name(&mut self, item: Item, data_blocks: u32) -> Result<(), &'static str> {
        if item.block >= data_blocks {
            return Err("is said to lie in the summaries of its extent");
        }
        if self.has(item.block) {
            return Err("is said to lie where something else lies");
        }
        self.blocks[item.block as usize / 64] |= 1 << (item.block % 64);
        self.hash ^= hash(item);
        Ok(())
    }
}

pub(super) fn hash(item: Item) -> u64 {
    let (a, b, c) = match item.what {
        ItemKind::Page(key, lsn) => (key.page.get(), lsn.get(), u64::from(key.volume.get()) << 8),
        ItemKind::Node(key) => {
            let levels = u64::from(key.vshard.get()) << 24 | u64::from(key.level) << 16;
            (key.prefix, u64::MAX, levels | u64::from(key.volume.get()) << 8 | 1)
        }
    };
    [a, b, c, u64::from(item.block)].iter().fold(0, |sum, word| mix(sum ^ word))
}
