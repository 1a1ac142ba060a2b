//! What crosses between threads: requests into a shard, replies out of it, messages between shards, and wake-ups.
//!
//! ```text
//! foreign thread --in-flight table--> inbox --\                       /--> slot of the reply --> foreign thread
//!                                              > shard's thread, lap <
//! other shard ----SPSC ring-----------------> /    |                  \--> SPSC ring, or outbox --> other shard
//!                                             parking slot: "I wait, for LSN x too" <-- whoever brings something
//! ```
//! Invariants
//! 1. No lock, and no system call unless the one to be woken waits.
//! 2. Whoever brings something makes it visible, fences, then looks at the parking slot; whoever parks says so,
//!    fences, then looks at everything again. So one of the two sees the other, and no wake-up is lost.
//! 3. All queues are bounded, but the outboxes: those hold what the shards' own protocol allows to be under way.
//!
//! The protocols are checked with loom (`loom` modules in `parking`, `inbox`, `slot`). It does *not* know what a
//! request or a message means.

mod inbox;
mod inflight;
mod lanes;
mod parking;
mod slot;

pub(crate) use inbox::Inbox;
pub(crate) use inflight::{InFlight, Reply};
pub(crate) use lanes::Lanes;
pub(crate) use parking::{Parking, raised};
pub(crate) use slot::{Dropped, Polled, Slot};
