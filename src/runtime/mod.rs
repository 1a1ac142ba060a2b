//! The threads of a store: one for each shard, pinned to a core. A thread takes requests, messages
//! and completions, turns its shard, and carries out the effects.
//!
//! ```text
//! handle --acquire permits--> in-flight table --> inbox --unpark--> round of the thread --> reply
//! task on the shard ----------------------------> queue of its own, no hop ---^
//! ```
//! Read in this order: `start` (opens a store), `shard_thread` and `event_loop` (one thread's life
//! and its work), `shared` and `request_permits` (how requests get there), `task_context` (tasks on
//! a shard's own thread), `handle` (the running store).
//!
//! Invariants
//! 1. Every request gets a reply, even when a shard panics or the store is dropped: nothing hangs.
//! 2. At most `requests_max` requests of handles are in flight, and those to one shard carry at
//!    most a sixteenth of its memory plus one request; callers beyond that wait, and get `Busy` if
//!    too many already wait.
//! 3. If one shard ends without a clean close, all do.
//! 4. The runtime finds out whether the machine lacks something (io_uring, memory locks) before it
//!    touches the store; if so, the portable driver runs, and the report says why.

mod bootstrap;
mod clock;
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

pub(crate) use handle::{Runtime, RuntimeHandle};
pub(crate) use reply::Reply;
pub use report::RuntimeReport;
pub(crate) use shard_thread::is_shard_thread;
pub(crate) use start::{OpenMode, start};
pub(crate) use task_context::{LocalReply, TaskContext};

#[cfg(all(test, not(corepage_loom)))]
mod end_tests;
#[cfg(all(test, not(corepage_loom)))]
mod manual_benches;
#[cfg(all(test, not(corepage_loom)))]
mod tests;
#[cfg(all(test, corepage_loom))]
mod watermark_loom;
