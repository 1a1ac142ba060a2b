//! The store for plain threads: [`Wait`] waits for any call.
//!
//! ```
//! use corepage::{Options, PageId, Store, blocking::Wait};
//!
//! # fn main() -> corepage::Result<()> {
//! # let dir = tempfile::tempdir().expect("a directory for the example");
//! let store = Store::open(dir.path(), Options::default()).wait()?;
//! let disk = store.create_volume("disk", 64 << 20).wait()?;
//! disk.write(PageId::new(7), vec![1; 4096]).wait()?; // durable on return
//! assert_eq!(disk.read(PageId::new(7)).wait()?[0], 1);
//!
//! let mut txn = store.begin();
//! let first = txn.read(&disk, PageId::new(7)).wait()?[0];
//! txn.write(&disk, PageId::new(8), vec![first + 1; 4096])?;
//! txn.commit().wait()?;
//! for page in disk.scan(PageId::new(0), PageId::new(u64::MAX)).blocking() {
//!     println!("{:?}", page?.0);
//! }
//! store.close().wait()
//! # }
//! ```
//!
//! Invariants
//! 1. A call that is waited for does exactly what it does when it is awaited, with the same errors
//!    and durability: there is no second API that could lack a call.
//! 2. No call waits on a thread that drives a shard, since it would wait for itself: it gets
//!    `Invalid` there.
//!
//! In an asynchronous runtime, await the calls instead: [`wait`](Wait::wait) blocks the calling
//! thread.

use super::wait::block_on;
use super::{AnyThread, Scan};
use crate::base::error::{Error, Result};
use crate::base::{Lsn, PageId};
use crate::engine::PageRef;
use crate::runtime;
use std::future::Future;

/// The output of a call: a result or, for [`Store::failed`](crate::Store::failed), just an error.
trait Refusable {
    fn refused(error: Error) -> Self;
}

impl<T> Refusable for Result<T> {
    fn refused(error: Error) -> Self {
        Err(error)
    }
}

impl Refusable for Error {
    fn refused(error: Error) -> Self {
        error
    }
}

/// Waits for a call on this thread. Every future that corepage returns implements it.
pub trait Wait: Future + Sized {
    /// Blocks this thread until the call is done. It allocates nothing.
    ///
    /// # Errors
    /// Those of the call. `Invalid`: this thread drives a shard, and would wait for itself; the
    /// call did not begin. Await it there.
    fn wait(self) -> Self::Output;
}

impl<F: Future<Output: Refusable>> Wait for F {
    fn wait(self) -> F::Output {
        if runtime::is_shard_thread() {
            return F::Output::refused(Error::invalid(
                "a blocking call on a thread that drives a shard would wait for itself: await the \
                 call there",
            ));
        }
        block_on(self)
    }
}

/// An iterator over pages in order, from [`Scan::blocking`]. It ends after an error.
#[must_use = "a scan does nothing until it is asked for pages"]
pub struct Pages(Scan);

impl Scan<AnyThread> {
    /// Turns the scan into an iterator. Each step blocks this thread until its page has been read;
    /// the iterator ends after an error.
    pub fn blocking(self) -> Pages {
        Pages(self)
    }
}

impl Pages {
    /// As [`Scan::lsn`].
    pub fn lsn(&self) -> Lsn {
        self.0.lsn()
    }
}

impl Iterator for Pages {
    type Item = Result<(PageId, PageRef)>;

    fn next(&mut self) -> Option<Self::Item> {
        let next = self.0.next().wait().transpose();
        if let Some(Err(_)) = next {
            self.0.end();
        }
        next
    }
}
