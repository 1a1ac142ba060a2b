//! The deterministic simulator: a whole store with its clients, its disk and its crashes, from one seed.
//!
//! Read in this order: [`rng`] (chance), [`disk`] (the device that loses, tears and fails), [`net`], [`pace`], `host` and
//! [`cluster`] (shards that talk, each at its own speed), [`model`] and [`oracle`] (what must hold), [`workload`] (what
//! clients do), [`world`] (who runs it all), `harm` (errors and damage on the way), `strain` (size, slow
//! reads, pages held on to), `late`, `watch` and `progress` (reads told late; spinning and memory), [`rare`] (what seldom happens),
//! [`shrink`] (a failing run made
//! small), [`canary`] (bugs that must be found).
//!
//! Invariants
//! 1. One thread, a virtual clock, one seed: the same plan gives the same trace, to the bit.
//! 2. What is driven are the shards that releases contain, without a line of its own for the simulator but the
//!    planted bugs and the list of LSNs drawn.
//!
//! It does *not* run in a release: it is compiled for tests and for the feature `sim`.

pub mod canary;
pub mod cluster;
pub mod disk;
mod drive;
mod harm;
mod host;
mod late;
pub mod model;
pub mod net;
pub mod oracle;
pub mod pace;
pub mod plan;
mod progress;
pub mod rare;
pub mod rng;
pub mod shrink;
mod strain;
mod watch;
pub mod workload;
pub mod world;

#[cfg(test)]
mod damage_tests;
#[cfg(test)]
mod error_tests;
#[cfg(test)]
mod fault_tests;
#[cfg(test)]
mod isolation_tests;
#[cfg(test)]
mod oracle_tests;
#[cfg(test)]
mod race_tests;
#[cfg(test)]
mod rig;
#[cfg(test)]
mod scale_tests;
#[cfg(test)]
mod small_tests;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod waiting_tests;

pub use canary::{Canary, planted};
