//! Reads what the superblock names: the roots and the extent table. It checks each block, and names
//! the damaged one.

use super::read::{Range, read_ranges};
use crate::base::error::{Error, Result};
use crate::base::{BLOCK, VShard};
use crate::format::extent::{
    TABLE_ROWS, TableRow, data_blocks, decode_table, table_crc, table_offset,
};
use crate::format::node::Child;
use crate::format::root::{self, VOLUMES_MAX};
use crate::format::superblock::{RootVersion, Superblock};
use crate::io::{Disk, FileId};
use crate::memory::Arena;

/// The structures that the superblock names.
pub(crate) struct Loaded {
    /// The root of each virtual shard.
    pub roots: Vec<(Box<[Child; VOLUMES_MAX]>, RootVersion)>,
    /// The extent table.
    pub table: Vec<TableRow>,
}

/// Reads the roots and the extent table that the superblock names.
pub(crate) fn load(
    disk: &mut dyn Disk,
    arena: &mut Arena,
    superblock: &Superblock,
) -> Result<Loaded> {
    let (store_id, checkpoint) = (superblock.store_id, superblock.checkpoint);
    let block = |file, offset| Range { file, offset, blocks: 1 };
    let vshards = (0..superblock.geometry.vshards_count as u16).map(VShard::new);
    let root_ranges =
        vshards.map(|vshard| block(FileId::Meta, root::named_offset(superblock, vshard)));
    let mut roots = Vec::with_capacity(superblock.geometry.vshards_count as usize);
    read_ranges(disk, arena, root_ranges, |i, bytes| {
        roots.push(root(superblock, VShard::new(i as u16), bytes)?);
        Ok(())
    })?;
    let data_blocks = data_blocks((superblock.geometry.extent_bytes / BLOCK as u64) as u32);
    let table_blocks = superblock.extents_count.div_ceil(TABLE_ROWS);
    let table_ranges =
        (0..table_blocks).map(|index| block(FileId::Table, table_offset(index, checkpoint)));
    let (mut table, mut sums) = (Vec::new(), Vec::new());
    read_ranges(disk, arena, table_ranges, |i, bytes| {
        let index = i as u32;
        let (rows, sum) = decode_table(store_id, index, checkpoint, bytes).map_err(|what| {
            let offset = table_offset(index, checkpoint);
            Error::corrupt(format_args!(
                "block {index} of the extent table (byte {offset} of file extents) {what}"
            ))
        })?;
        for (row, no) in rows.iter().zip(index * TABLE_ROWS..) {
            if u32::from(row.live.get()) > data_blocks {
                return Err(Error::corrupt(format_args!(
                    "extent {no} has {} live blocks of {data_blocks} by the extent table",
                    row.live.get()
                )));
            }
        }
        table.extend(rows);
        sums.push(sum);
        Ok(())
    })?;
    if table_crc(sums) != superblock.table_crc && !planted!(NamedSumIgnored) {
        let from = table_offset(0, checkpoint);
        return Err(Error::corrupt(format_args!(
            "the extent table (every second block of file extents, from byte {from} on) is \
             another one than the superblock names, of the same checkpoint: a write was lost"
        )));
    }
    Ok(Loaded { roots, table })
}

/// Decodes the root of a virtual shard.
fn root(
    superblock: &Superblock,
    vshard: VShard,
    bytes: &[u8],
) -> Result<(Box<[Child; VOLUMES_MAX]>, RootVersion)> {
    let (_, children) = root::decode_named(superblock, vshard, bytes).map_err(|what| {
        let (number, offset) = (vshard.get(), root::named_offset(superblock, vshard));
        Error::corrupt(format_args!(
            "the root of virtual shard {number} (byte {offset} of the meta file) {what}"
        ))
    })?;
    Ok((children, superblock.vshards[vshard.index()].root))
}
