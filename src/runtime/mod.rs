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

mod bootstrap;
mod cores;
mod event_loop;
mod handle;
mod latency_recorder;
mod opening;
mod portable;
mod reply;
mod report;
mod request_permits;
mod ring;
mod shard_thread;
mod shared;
mod start;
mod task_context;

pub(crate) use handle::Runtime;
pub(crate) use reply::Reply;
pub use report::RuntimeReport;
pub(crate) use shard_thread::is_shard_thread;
pub(crate) use start::OpenMode;
pub(crate) use task_context::TaskContext;

#[cfg(all(test, not(corepage_loom)))]
mod end_tests;
#[cfg(all(test, not(corepage_loom)))]
mod manual_benches;
#[cfg(all(test, not(corepage_loom)))]
mod tests;
#[cfg(all(test, corepage_loom))]
mod watermark_loom;
