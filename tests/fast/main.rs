//! Tests of a few seconds each that need no other program: the library's promises, and those of the
//! program that it keeps alone. Each file is a module with a promise.
//!
//! Without the feature `cli` only those of the library are compiled. `cargo test --test fast
//! store::` runs one module.

#[path = "../common/mod.rs"]
mod common;

mod access;
#[cfg(feature = "cli")]
mod cli;
#[cfg(feature = "cli")]
mod cli_bench;
#[cfg(feature = "cli")]
mod cli_verify;
#[cfg(feature = "cli")]
mod control;
#[cfg(feature = "cli")]
mod doctor;
mod full;
mod library;
#[cfg(feature = "cli")]
mod life;
#[cfg(feature = "cli")]
mod memory;
#[cfg(feature = "cli")]
mod nbd_protocol;
#[cfg(feature = "cli")]
mod nbd_structured;
#[cfg(feature = "cli")]
mod opening;
mod records;
mod shards;
mod store;
#[cfg(feature = "cli")]
mod tools;
mod volumes;
