//! What the engine is tested with: the simulator, fuzz targets, counts of instructions. Not in a
//! release build.

#[cfg(any(test, fuzzing))]
pub mod cost;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
#[cfg(any(test, fuzzing))]
pub(crate) mod local_cluster;
#[cfg(any(test, feature = "sim"))]
#[cfg_attr(not(test), allow(dead_code, reason = "some of it serves the unit tests only"))]
pub mod sim;
