//! # corepage
pub mod disk;
mod error;
mod options;
pub mod pool;
pub mod types;
pub use error::{Error, ErrorKind, Result};
pub use options::{Geometry, Options};
