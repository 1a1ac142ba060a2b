//! Memory: the arena of 4 KiB blocks from which everything that meets the device is taken.

mod arena;
mod buddy;
mod eviction;
mod word;

#[cfg(test)]
pub(crate) use arena::BLOCK_BYTES as ARENA_BLOCK_BYTES;
pub use arena::{Arena, Frame, FrameRef, Mapping};
#[cfg(test)]
pub(crate) use eviction::BLOCK_BYTES as EVICTION_BLOCK_BYTES;
pub(crate) use eviction::{Eviction, NODES_COUNTED, Owner, Residency, Residents, Standing};
