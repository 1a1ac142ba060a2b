//! NBD: block devices for real clients (qemu, the kernel's client, nbdcopy, fio), one export per volume.
//!
//! ```text
//!  listener ── accept ──> connection thread: handshake ──> transmission
//!  (a thread each)                                           │ reads requests, waits at the gate when too many are in flight
//!                                                            v
//!                              reply thread: runs each request against its Export, writes the reply
//! ```
//!
//! 1. A connection owns its two threads, its gate and its socket; nothing it sends can reach another connection, except
//!    through the store.
//! 2. At most [`Limits::connections_max`] connections, each with at most `requests_max` requests and `bytes_max` bytes of
//!    payload in flight. A full gate stops reading from the socket, which is the client's back-pressure.
//! 3. The protocol knows exports only through the traits below, so it is tested without a store.
//!
//! Not here: TLS, extended headers.

mod gate;
mod handshake;
mod listener;
mod proto;
mod server;
mod socket;
mod span;
mod structured;
mod transmission;
mod volume;

#[cfg(test)]
mod tests;

pub use listener::{Address, Listener, Plan};
pub use proto::Errno;
pub use server::Server;
pub use socket::Socket;
pub use structured::Stretch;
pub use volume::StoreExports;

use bytes::Bytes;
use std::future::Future;
use std::ops::Range;
use std::time::Duration;

/// What one server takes on; each bound with its reason.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connections, over all listeners: two threads each.
    pub connections_max: usize,
    /// Requests in flight on a connection: beyond 64 a fast device gains nothing, and replies only get later.
    pub requests_max: usize,
    /// Payload in flight on a connection, in and out: one request of the largest size, or 64 of 512 KiB. Times
    /// `connections_max` it is the most memory that clients can take who send much and read nothing (4 GiB).
    pub bytes_max: usize,
    /// From the accepted connection to the end of the handshake, so that silent clients don't use up the connections.
    pub handshake: Duration,
    /// Options in one handshake; clients need about five.
    pub options_max: usize,
    /// How long a stopping server waits for replies to be taken before it cuts the connections.
    pub grace: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            connections_max: 128,
            requests_max: 64,
            bytes_max: 32 << 20,
            handshake: Duration::from_secs(10),
            options_max: 128,
            grace: Duration::from_secs(5),
        }
    }
}

/// Parts of a buffer, in order, none empty, no two touching.
pub type Holes = Vec<Range<usize>>;

/// One block device. Ranges are inside it: the protocol has checked them.
pub trait Export: Send + Sync {
    /// Its size now. Clients are told it once; requests beyond it are refused.
    fn bytes(&self) -> u64;
    /// Fills `into`, which is zeros, with the bytes from `offset` on; which parts of it are not stored anywhere, in order.
    fn read(&self, offset: u64, into: &mut [u8]) -> impl Future<Output = Result<Holes, Errno>> + Send;
    /// Brings what is stored of a range into memory, as far as there is room; nothing may come of it.
    fn cache(&self, offset: u64, length: u64) -> impl Future<Output = Result<(), Errno>> + Send;
    /// What the range is, in order from `offset` on: at least one stretch, none of them empty, not all of the range if it is
    /// long.
    fn allocation(&self, offset: u64, length: u32) -> impl Future<Output = Result<Vec<Stretch>, Errno>> + Send;
    /// Writes `data` at `offset`; durable before it returns if `fua`.
    fn write(&self, offset: u64, data: Bytes, fua: bool) -> impl Future<Output = Result<(), Errno>> + Send;
    /// Makes `length` bytes from `offset` read as zeros: by giving their space back, or by writing if not `hole`.
    fn zero(&self, offset: u64, length: u64, hole: bool, fua: bool) -> impl Future<Output = Result<(), Errno>> + Send;
    /// Makes every write that returned before, on any connection, durable.
    fn flush(&self) -> impl Future<Output = Result<(), Errno>> + Send;
}

/// The block devices of a server.
pub trait Exports: Send + Sync + 'static {
    /// One of them.
    type Export: Export;
    /// Their names.
    fn names(&self) -> Result<Vec<String>, Errno>;
    /// The one of this name, or the default one if it is empty, with its own name.
    fn find(&self, name: &str) -> Result<Option<(String, Self::Export)>, Errno>;
}
