//! The program: commands over the library's public API, which do nothing that other callers of the
//! library could not do.

pub mod bench;
pub mod cli;
pub mod server;
