//! Generic channels between threads: a bounded inbox, slots for replies, queues between each pair
//! of threads, and parking. What they carry is a type parameter.
//!
//! ```text
//! foreign thread --in-flight table--> inbox -\                    /-> reply slot -> foreign thread
//!                                             > one thread's round <
//! other thread ----SPSC ring---------------> /         |          \-> SPSC ring --> other thread
//!                                                      |               (or outbox)
//!                         parking word: "I wait, for level x too" <-- a thread brings something
//! ```
//! Invariants
//! 1. No lock is taken, and no system call is made unless the thread to be woken is parked.
//! 2. A thread that brings something makes it visible, fences, then checks the parking word; a
//!    thread that parks announces it, fences, then checks everything again. One of the two sees the
//!    other, so no wake-up is lost.
//! 3. All queues are bounded, except the outboxes: these hold at most what the protocol above them
//!    allows in flight.
//!
//! loom checks the protocols (the `loom` modules in `parking`, `inbox`, `channels` and
//! `reply_slot`). Nothing here knows shards, requests or pages: `runtime` supplies those.

mod channels;
mod in_flight;
mod inbox;
mod parking;
mod reply_slot;

pub(crate) use channels::Channels;
pub(crate) use in_flight::{InFlight, Reply};
pub(crate) use inbox::Inbox;
#[cfg(all(test, corepage_loom))]
pub(crate) use parking::testing;
pub(crate) use parking::{Parking, Wake, unpark_for_level};
pub(crate) use reply_slot::{Abandoned, Polled, ReplySlot};
