//! One core's share of the store, as a state machine without I/O, clock or randomness: events in,
//! effects out.
//!
//! ```text
//! request --> cache (resolve, load) --> commits (validate, admit, LSN, apply) ----> open group
//!      \--> coordinator (prepare, LSN) <--messages--> participant (lock, vote, apply) -^   |close
//!       reply <-- watermark <-- flush <-- log write, pages straight to their places <--+
//!   dirty pages --> write-back (sorted, merged) --> extents --> page map --> checkpoint
//!                                                                    --> superblock
//! ```
//! Invariants
//! 1. Everything happens in [`Shard::turn`] and [`Shard::complete`]; between two calls nothing
//!    changes.
//! 2. No effect of a commit leaves the shard before its LSN is allocated.
//! 3. A durable reply leaves only when the watermark has reached the commit.
//! 4. After the first failed write or flush (`failed`) nothing is acknowledged any more, and
//!    nothing more is written.
//! 5. Every queue is bounded: [`Shard::accepting`] says when to stop bringing requests.
//!
//! It names no file system, ring, clock, thread or random source: drivers and the simulator do.

mod shard;

// Requests and effects, what all components share, and what is in progress.
mod context;
mod event;
mod pins;
mod life;
mod message;
mod op_kind;
mod requests;
mod reservations;
mod blocked;
mod dispatch;
mod build;
mod state_machine;
mod work;

// The path of a write.
mod txn;
mod cache;
mod shortage;
mod budget;
pub(crate) mod order;
mod watermark;
pub(crate) mod log;
mod group_commit;
pub(crate) mod codec;
mod writeback;
pub(crate) mod map;
mod space;
mod checkpoint;
pub(crate) mod recovery;
mod redo;

// For tests and for messages about runs that hang.
#[cfg(any(test, feature = "sim"))]
mod audit;
mod debug;
#[cfg(test)]
mod memory_tests;
#[cfg(any(test, feature = "sim"))]
#[cfg_attr(not(test), allow(dead_code, reason = "some of it serves the unit tests only"))]
pub(crate) mod observe;
#[cfg(test)]
mod overwrite_tests;
#[cfg(test)]
mod writeback_tests;

pub(crate) use budget::request_bytes;
pub(crate) use build::ShardParts;
pub use event::{Change, Commit, PageRange, PageRef, Request, Response, Token};
pub use message::Message;
pub(crate) use message::NewEpoch;
pub(crate) use order::LSN_AHEAD_MAX;
pub(crate) use pins::{PinQuota, PinReservation};
pub(crate) use redo::Recovering;
#[cfg(any(test, feature = "sim"))]
pub(crate) use state_machine::Activity;
pub use state_machine::Effect;
pub(crate) use state_machine::{Host, StateMachine, step};

use blocked::{Lack, Step};
use cache::{NodeWaiter, PageCache};
use checkpoint::Checkpoint;
use context::Context;
use life::Life;
use log::Log;
use map::Map;
use op_kind::OpKind;
use redo::Redo;
use requests::Requests;
use reservations::Reservations;
use space::Space;
use txn::coordinator::Coordinator;
use txn::participant::Participant;
use watermark::WatermarkWaiters;
use work::Work;
use writeback::WriteBack;

/// One shard: its components, which [`turn`](Shard::turn) advances. They stand lowest first: a
/// component may call only those before it, as `tests/tidy/calls.rs` checks.
pub struct Shard {
    life: Life,
    ctx: Context,
    map: Map,
    log: Log,
    reservations: Reservations,
    requests: Requests,
    watermark: WatermarkWaiters,
    cache: PageCache,
    space: Space,
    writeback: WriteBack,
    coordinator: Coordinator,
    participant: Participant,
    redo: Redo,
    checkpoint: Checkpoint,
}
