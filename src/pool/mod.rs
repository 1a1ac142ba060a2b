//! Memory: the arena of 4 KiB blocks from which everything that meets the device is taken.

mod arena;
mod buddy;
mod eviction;
mod word;

pub use arena::{Arena, ArenaKind, Frame, FrameRef, Mapping};
pub(crate) use eviction::{Eviction, Owner, Residency, Residents, Standing};
