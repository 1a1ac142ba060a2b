//! The program: commands over the library's public API, and nothing that callers of the library
//! could not do.

pub mod bench;
pub mod cli;
pub mod server;
