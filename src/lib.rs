//! # corepage
#![allow(dead_code)]
pub mod checksum;
mod coalesce;
mod commit;
pub mod disk;
mod error;
pub mod format;
mod log;
mod map;
pub mod metrics;
mod options;
pub mod pool;
mod recovery;
pub mod shard;
#[cfg(any(test, feature = "sim"))]
pub mod sim;
pub mod types;
pub use error::{Error, ErrorKind, Result};
pub use options::{Geometry, Options};
pub use recovery::RecoveryReport;
