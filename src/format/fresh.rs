//! Computes how large the files of a new store are.
//!
//! 1. A creation makes its files with these functions, so it takes the space that was announced.
//!
//! It does *not* make files.

use super::extent::{TABLE_ROWS, table_offset};
use super::root;
use super::superblock::SEGMENTS_MIN;
use crate::base::options::Geometry;

/// Extents of a new store for each shard: enough for all reserves, and a little more. It grows from
/// there.
const EXTENTS_FIRST: u32 = 16;

/// Segments of a new log. It gets longer when it is used (`engine::log`): a store without writes
/// stays small.
pub(crate) const SEGMENTS_FIRST: u32 = SEGMENTS_MIN;

/// Bytes by which the logs of `shards_count` shards may get longer than they are in a new store.
pub(crate) fn log_growth_bytes(geometry: &Geometry, shards_count: u16) -> u64 {
    u64::from(shards_count)
        * u64::from(geometry.segments_count - SEGMENTS_FIRST)
        * geometry.segment_bytes
}

/// Extents of a new store with `shards_count` shards that may have at most `extents_max`.
pub(crate) fn extents_count(shards_count: u16, extents_max: u32) -> u32 {
    (EXTENTS_FIRST * u32::from(shards_count)).min(extents_max)
}

/// Bytes of the data file of a new store: its largest file, unless log segments are huge.
pub(crate) fn data_bytes(geometry: &Geometry, shards_count: u16, extents_max: u32) -> u64 {
    u64::from(extents_count(shards_count, extents_max)) * geometry.extent_bytes
}

/// Bytes of all files of a new store.
pub(crate) fn store_bytes(geometry: &Geometry, shards_count: u16, extents_max: u32) -> u64 {
    let logs = u64::from(shards_count) * u64::from(SEGMENTS_FIRST) * geometry.segment_bytes;
    let table = table_offset(extents_count(shards_count, extents_max).div_ceil(TABLE_ROWS), 0);
    logs + data_bytes(geometry, shards_count, extents_max)
        + table
        + root::meta_bytes(geometry.vshards_count)
}
