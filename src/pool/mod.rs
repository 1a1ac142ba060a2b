//! Memory: the arena of 4 KiB blocks from which everything that meets the device is taken.

mod arena;
mod buddy;
mod word;

pub use arena::{Arena, ArenaKind, Frame, FrameRef, Mapping};
