//! Driving a shard for real: a thread that waits for requests and completions and turns the shard.
//!
//! ```text
//! handle --register--> in-flight table --push--> inbox --wake--> shard thread --> shard --> reply --> in-flight table
//! ```

mod inbox;
mod inflight;
mod portable;

pub(crate) use portable::Runtime;
