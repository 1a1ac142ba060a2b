//! What every layer uses: ids, LSNs and addresses as types, errors, options and limits, the
//! checksum, counters. It does no I/O.
//!
//! Each id is a newtype with a private field and only the arithmetic that makes sense for it;
//! `Debug` is short (`p12`, `s3`, `lsn 8041`), so that a trace is readable.

pub mod checksum;
pub(crate) mod error;
mod index;
mod lsn;
pub mod metrics;
pub mod mix;
pub(crate) mod options;
mod page;
mod place;
mod shard_map;
mod shard_set;
pub(crate) mod sync;

pub(crate) use index::{
    ImageIdx, IndexedSlab, NodeIdx, NodeMoveIdx, OpIdx, PageIdx, PageVersionIdx, RequestIdx,
};
pub use lsn::Lsn;
pub use page::{PageId, PageKey, RUN_PAGES, ShardId, VShard, VolumeId};
pub use place::{BlockAddr, ExtentNo, SegmentNo};
pub use shard_map::ShardMap;
pub use shard_set::ShardSet;

/// The unit of all I/O and of all addresses: 4 KiB, the smallest page and the physical block of
/// common devices.
pub const BLOCK: usize = 4096;

/// Virtual or real time in microseconds since some start. It is always passed in, never read from a
/// clock here.
pub type Micros = u64;
