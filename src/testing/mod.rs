//! The tools that test the engine: the simulator, fuzz targets and instruction counts; and what all
//! tests and benchmarks share: one random source and one pattern of pages.
//!
//! A release of the library has none of these; one with the program has [`random`] and [`pattern`],
//! for `corepage bench`.

#![allow(missing_docs, reason = "nothing of it is for users of the library")]

#[cfg(any(test, fuzzing))]
pub mod cost;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
#[cfg(any(test, fuzzing))]
pub(crate) mod local_cluster;
pub mod pattern;
pub mod random;
#[cfg(any(test, feature = "testing"))]
pub mod replay;
#[cfg(any(test, feature = "sim"))]
#[cfg_attr(not(test), allow(dead_code, reason = "some of it serves the unit tests only"))]
pub mod sim;
