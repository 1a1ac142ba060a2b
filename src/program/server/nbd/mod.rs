//! NBD: block devices for real clients (qemu, the kernel's client, nbdcopy, fio), one export per
//! volume.
//!
//! ```text
//!  listener ── accept ──> connection thread: handshake ──> transmission
//!  (a thread each)                                           │ reads requests, waits at the gate when too many are in flight
//!                                                            v
//!                              reply thread: runs each request against its Export, writes the reply
//! ```
//!
//! 1. A connection owns its two threads, its gate and its socket; nothing it sends can reach
//!    another connection, except through the store.
//! 2. Connections are bounded, and shared fairly by peers (`admission`), each with at most
//!    `requests_max` requests in flight. Payloads, replies and what requests need while they are
//!    worked on come out of one [`Memory`]. Without it nothing is read from the socket, which is
//!    the client's back-pressure.
//! 3. The protocol knows exports only through the traits below, so it is tested without a store.
//!
//! Not here: TLS, extended headers.

mod admission;
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
use holes::Holes;
use proto::{Extent, Fault};
use std::future::Future;
use std::time::Duration;

/// What one server takes on; each bound with its reason.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Requests in flight on a connection: beyond 64 a fast device gains nothing, and replies only
    /// get later.
    pub requests_max: usize,
    /// How long a client may take for a payload, or for a part of a large one, or take no replies
    /// while it has writes in flight, while others wait for memory: then it is cut off. At half a
    /// minute that is 60 KiB a second, with little memory less.
    pub payload_stall: Duration,
    /// From the accepted connection to the end of the handshake, and between two signs of life in
    /// it, so that silent clients don't use up the connections. To ask about each of 247 exports
    /// takes a client minutes over a slow line; libnbd needs one over any TCP connection, since it
    /// holds back the end of one question for each export for 200 ms.
    pub handshake: Duration,
    pub handshake_pause: Duration,
    /// What is sent and answered in one handshake. To list the 247 volumes that a store can have
    /// takes about 200 KiB.
    pub handshake_bytes_max: usize,
    /// How long a stopping server waits for replies to be taken before it cuts the connections.
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

/// One block device. Ranges are inside it and not empty: the protocol has checked them.
pub trait Export: Send + Sync {
    /// Its size as this connection's client was told it, which does not change.
    fn bytes(&self) -> u64;
    /// Its size now. Requests beyond it are refused.
    fn bytes_now(&self) -> u64;
    /// Whether it was deleted: then every request fails for that reason, whatever it asks.
    fn is_deleted(&self) -> bool {
        false
    }
    /// Bytes up to which a write that begins with a page is one commit: whole pages. Longer ones
    /// may be given in parts.
    fn write_bytes_max(&self) -> usize;
    /// Fills `into`, all zeros before, with the bytes from `offset` on. Parts that are not stored
    /// it may leave alone and add to `holes`.
    fn read(
        &self,
        offset: u64,
        into: &mut [u8],
        holes: &mut Holes,
    ) -> impl Future<Output = Result<(), Fault>> + Send;
    /// Writes `data` at `offset`; durable before it returns if `fua`.
    fn write(
        &self,
        offset: u64,
        data: Bytes,
        fua: bool,
    ) -> impl Future<Output = Result<(), Fault>> + Send;
    /// Makes `length` bytes from `offset` read as zeros: by giving their space back, or by writing
    /// if not `hole`.
    fn zero(
        &self,
        offset: u64,
        length: u64,
        hole: bool,
        fua: bool,
    ) -> impl Future<Output = Result<(), Fault>> + Send;
    /// Makes every write that returned before, on any connection, durable.
    fn flush(&self) -> impl Future<Output = Result<(), Fault>> + Send;
    /// Brings a part of the range into memory, as far as that makes sense.
    fn cache(&self, offset: u64, length: u64) -> impl Future<Output = Result<(), Fault>> + Send;
    /// What of the range is stored: one or more extents from `offset` on, at most `extents_max`.
    /// They may end before the range, but not behind it.
    fn allocation(
        &self,
        offset: u64,
        length: u32,
        extents_max: usize,
    ) -> impl Future<Output = Result<Vec<Extent>, Fault>> + Send;
}

/// The block devices of a server.
pub trait Exports: Send + Sync + 'static {
    /// One of them.
    type Export: Export;
    /// Their names.
    fn names(&self) -> Result<Vec<String>, Fault>;
    /// The one of this name, or the default one if it is empty, with its own name.
    fn find(&self, name: &str) -> Result<Option<(String, Self::Export)>, Fault>;
}
