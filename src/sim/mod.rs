//! The deterministic simulator.
pub mod canary;
pub mod disk;
pub mod rng;
pub use canary::{Canary, planted};
