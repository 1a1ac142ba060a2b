//! How large the files of a new store are.
//!
//! 1. A creation makes its files by these functions, so what is told before it is what it takes.
//!
//! It does *not* make anything.

use super::extent::{TABLE_ROWS, table_offset};
use super::root;
use super::superblock::SEGMENTS_MIN;
use crate::base::options::Geometry;

/// Extents of a new store for each shard: the reserves of all purposes and a little more; it grows
/// from there.
const EXTENTS_FIRST: u32 = 16;

/// Segments of a new log. It gets longer when it is used (`engine::log`): a store that nobody
/// writes to stays small.
pub(crate) const SEGMENTS_FIRST: u32 = SEGMENTS_MIN;

/// Bytes by which the logs of so many shards may get longer than they are in a new store.
pub(crate) fn log_growth_bytes(geometry: &Geometry, shards_count: u16) -> u64 {
    u64::from(shards_count)
        * u64::from(geometry.segments_count - SEGMENTS_FIRST)
        * geometry.segment_bytes
}

/// Extents of a new store with so many shards that may have `extents_max` of them.
pub(crate) fn extents_count(shards_count: u16, extents_max: u32) -> u32 {
    (EXTENTS_FIRST * u32::from(shards_count)).min(extents_max)
}

/// The data file of a new store: the largest of its files, but for a log of huge segments.
pub(crate) fn data_bytes(geometry: &Geometry, shards_count: u16, extents_max: u32) -> u64 {
    u64::from(extents_count(shards_count, extents_max)) * geometry.extent_bytes
}

/// All files of a new store.
pub(crate) fn store_bytes(geometry: &Geometry, shards_count: u16, extents_max: u32) -> u64 {
    let logs = u64::from(shards_count) * u64::from(SEGMENTS_FIRST) * geometry.segment_bytes;
    let table = table_offset(extents_count(shards_count, extents_max).div_ceil(TABLE_ROWS), 0);
    logs + data_bytes(geometry, shards_count, extents_max)
        + table
        + root::meta_bytes(geometry.vshards_count)
}
