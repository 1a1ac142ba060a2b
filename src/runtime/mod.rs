//! Driving shards for real: a thread for each, pinned to a core, that takes requests, messages and completions, turns
//! the shard and carries out what it wants done.
//!
//! ```text
//! handle --take a place--> in-flight table --> inbox --wake--> lap of the shard's thread --> reply --> handle
//! task on the shard ------------------------> queue of its own, no hop ---^
//! ```
//! Invariants
//! 1. Every request gets a reply, also when a shard panics or the store is dropped: nothing hangs.
//! 2. At most `requests_max` requests of handles are under way, and those to one shard carry a sixteenth of its memory, or one of
//!    them passes that; callers beyond it wait, and too many of those get `Busy`.
//! 3. If one shard ends without a clean close, all do.
//! 4. What is not to be had here (io_uring, memory locks) is found out before anything is begun; then the portable
//!    driver runs, and the report says why.

mod cores;
mod driver;
mod handle;
mod local;
mod machine;
mod meter;
mod opening;
mod places;
mod portable;
mod report;
mod ring;
mod seat;
mod shared;
mod start;

pub(crate) use handle::Runtime;
pub(crate) use local::Local;
pub use report::RuntimeReport;
pub(crate) use seat::drives_a_shard;
pub(crate) use start::Wanted;

#[cfg(all(test, not(corepage_loom)))]
mod end_tests;
#[cfg(all(test, not(corepage_loom)))]
mod figures;
#[cfg(all(test, not(corepage_loom)))]
mod tests;
