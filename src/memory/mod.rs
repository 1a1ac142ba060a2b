//! Memory: the arena of 4 KiB blocks, from which all memory for transfers to and from the device
//! comes.

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
