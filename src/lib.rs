//! # corepage
#![allow(dead_code)]
pub mod disk;
mod error;
pub mod metrics;
mod options;
pub mod pool;
pub mod shard;
#[cfg(any(test, feature = "sim"))]
pub mod sim;
pub mod types;
pub use error::{Error, ErrorKind, Result};
pub use options::{Geometry, Options};
