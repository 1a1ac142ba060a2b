//! NBD: block devices for real clients (qemu, the kernel's client, nbdcopy, fio), one export per
//! volume.
//!
//! ```text
//!  listener ── accept ──> connection thread: handshake ──> transmission
//!  (a thread each)                                           │ reads requests, waits at the gate
//!                                                            v
//!                              reply thread: runs each request against its Export, writes the reply
//! ```
//!
//! 1. A connection owns its two threads, its gate and its socket; nothing that it sends can affect
//!    another connection, except through the store.
//! 2. Connections are limited and shared fairly by peers (`admission`), and each has at most
//!    `requests_max` requests in flight. The memory for payloads, replies and running requests
//!    comes out of one [`Memory`]. Without memory nothing is read from the socket, which is the
//!    client's back-pressure.
//! 3. The protocol knows exports only through the traits below, so it is tested without a store.
//!
//! It does *not* support TLS or extended headers.

mod admission;
mod connection;
mod extents;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod gate;
mod handshake;
mod holes;
mod listener;
mod memory;
mod pause;
mod proto;
mod reads;
mod server;
mod socket;
mod span;
mod transmission;
mod volume;

#[cfg(test)]
mod store_tests;
#[cfg(test)]
mod tests;

pub use admission::reserve;
pub use listener::{Address, Listener, Plan};
pub use memory::{CONNECTIONS_LIMIT, Division, Memory};
pub use server::Server;
pub use socket::{Deadline, Socket};
pub use volume::StoreExports;

use bytes::Bytes;
use corepage::Durability;
use holes::Holes;
use proto::{Extent, ExtentKind, Fault};
use std::future::Future;
use std::time::Duration;

/// The limits of one server, each with its reason.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Requests in flight on a connection: beyond 64 a fast device gains nothing, and replies only
    /// get later.
    pub requests_max: usize,
    /// While others wait for memory, a client is cut off if it takes longer than this for a
    /// payload, or for a part of a large one, or takes no replies for this long while it has writes
    /// in flight. At half a minute that is 60 KiB a second, with little memory less.
    pub payload_stall: Duration,
    /// The time from the accepted connection to the end of the handshake, and between two signs of
    /// life in it, so that silent clients don't use up the connections. Asking about each of 247
    /// exports takes a client minutes over a slow line; libnbd needs a minute over any TCP
    /// connection, since it delays the end of one question for each export by 200 ms.
    pub handshake: Duration,
    pub handshake_pause: Duration,
    /// The most bytes sent and answered in one handshake. Listing the 247 volumes that a store can
    /// have takes about 200 KiB.
    pub handshake_bytes_max: usize,
    /// How long a stopping server waits for clients to take their replies before it cuts the
    /// connections.
    pub grace: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            requests_max: 64,
            payload_stall: Duration::from_secs(30),
            handshake: Duration::from_secs(300),
            handshake_pause: Duration::from_secs(10),
            handshake_bytes_max: 16 << 20,
            grace: Duration::from_secs(5),
        }
    }
}

/// One block device. The protocol has checked that ranges are inside it and not empty.
pub trait Export: Send + Sync {
    /// Its size as this connection's client knows it, which does not change.
    fn bytes(&self) -> u64;
    /// Its current size. Requests beyond it are refused.
    fn bytes_now(&self) -> u64;
    /// Whether it was deleted: then every request fails for that reason.
    fn is_deleted(&self) -> bool {
        false
    }
    /// The longest write, in whole pages, that is one commit if it begins with a page. Longer ones
    /// may be passed in parts.
    fn write_bytes_max(&self) -> usize;
    /// Fills `into`, which is all zeros, with the bytes from `offset` on. It may leave parts that
    /// are not stored alone and add them to `holes`.
    fn read(
        &self,
        offset: u64,
        into: &mut [u8],
        holes: &mut Holes,
    ) -> impl Future<Output = Result<(), Fault>> + Send;
    /// Writes `data` at `offset`.
    fn write(
        &self,
        offset: u64,
        data: Bytes,
        durability: Durability,
    ) -> impl Future<Output = Result<(), Fault>> + Send;
    /// Makes `length` bytes from `offset` read as zeros: as a hole, which gives back their space, or
    /// by writing them.
    fn zero(
        &self,
        offset: u64,
        length: u64,
        kind: ExtentKind,
        durability: Durability,
    ) -> impl Future<Output = Result<(), Fault>> + Send;
    /// Makes durable every write that returned before, on any connection.
    fn flush(&self) -> impl Future<Output = Result<(), Fault>> + Send;
    /// Reads a part of the range into memory, as far as that makes sense.
    fn cache(&self, offset: u64, length: u64) -> impl Future<Output = Result<(), Fault>> + Send;
    /// Returns which parts of the range are stored: one or more extents from `offset` on, at most
    /// `extents_max`. They may end before the range, but not beyond it.
    fn allocation(
        &self,
        offset: u64,
        length: u32,
        extents_max: usize,
    ) -> impl Future<Output = Result<Vec<Extent>, Fault>> + Send;
}

/// The block devices of a server.
pub trait Exports: Send + Sync + 'static {
    /// A block device of the server.
    type Export: Export;
    /// Returns their names.
    fn names(&self) -> Result<Vec<String>, Fault>;
    /// Returns the one of this name, or the default one if the name is empty, with its own name.
    fn find(&self, name: &str) -> Result<Option<(String, Self::Export)>, Fault>;
}
