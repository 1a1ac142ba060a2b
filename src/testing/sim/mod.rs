//! The deterministic simulator: a whole store with its clients, its disk and its crashes, from one
//! seed.
//!
//! Read in this order: [`disk`] (a device that loses, tears and
//! fails), [`net`], [`timing`], `host` and [`cluster`] (shards that exchange messages, each at its
//! own speed), [`model`] and [`oracle`] (the promises that are checked), [`workload`] (requests of
//! clients), [`run`] and `steps` (a whole run), `inject` (errors and damage), `strain` (large
//! stores, slow reads, pinned pages), `late` (delayed completions), `watch` and `progress`
//! (spinning, memory), [`rare`] (counts of rare events), [`shrink`] (makes a failing run smaller),
//! [`canary`] (bugs that must be found).
//!
//! Invariants
//! 1. One thread, a virtual clock, one seed: the same plan gives the same trace, to the bit.
//! 2. The shards are those of releases. The only lines in them for the simulator are the planted
//!    bugs and the list of allocated LSNs.
//!
//! It does *not* run in a release: it is compiled for tests and for the feature `sim`.

pub mod canary;
pub mod cluster;
pub mod disk;
mod host;
mod inject;
mod late;
pub mod model;
pub mod net;
pub mod oracle;
pub mod plan;
mod progress;
pub mod rare;
pub mod run;
pub mod shrink;
mod steps;
mod strain;
pub mod timing;
mod watch;
pub mod workload;

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
mod parked_cluster;
#[cfg(test)]
mod race_tests;
#[cfg(test)]
mod scale_tests;
#[cfg(test)]
mod small_tests;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod waiting_tests;

pub use canary::{Canary, planted};
