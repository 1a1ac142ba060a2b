//! The store for plain threads: the same handles, whose calls wait.
//!
//! ```
//! use corepage::{Options, PageId, blocking::Store};
//!
//! # fn main() -> corepage::Result<()> {
//! # let dir = tempfile::tempdir().expect("a directory for the example");
//! let store = Store::open(dir.path(), Options::default())?;
//! let disk = store.create_volume("disk", 64 << 20)?;
//! disk.write(PageId::new(7), vec![1; 4096])?; // durable on return
//! assert_eq!(disk.read(PageId::new(7))?[0], 1);
//!
//! let mut txn = store.begin();
//! let first = txn.read(&disk, PageId::new(7))?[0];
//! txn.write(&disk, PageId::new(8), vec![first + 1; 4096])?;
//! txn.commit()?;
//! store.close()
//! # }
//! ```
//!
//! Invariants
//! 1. A call does what its asynchronous twin does, with its errors and its durability, and nothing
//!    besides.
//! 2. No call waits on a thread that drives a shard: it would wait for itself. It gets `Invalid`
//!    there.
//!
//! In an asynchronous runtime use the twins: a call here blocks the thread that it is made on.

use super::wait::block_on;
use super::{Allocated, Durability, PageView};
use crate::base::error::{Error, Result};
use crate::base::metrics::ShardStats;
use crate::base::options::Options;
use crate::base::{Lsn, PageId};
use crate::engine::recovery::RecoveryReport;
use crate::engine::{Change, PageRef};
use crate::runtime::{self, RuntimeReport};
use bytes::Bytes;
use std::future::Future;
use std::path::Path;
use std::time::Duration;

/// Waits for a future on this thread.
fn wait<T>(future: impl Future<Output = Result<T>>) -> Result<T> {
    if runtime::is_shard_thread() {
        return Err(Error::invalid(
            "a blocking call on a thread that drives a shard would wait for itself: use the \
             asynchronous call there",
        ));
    }
    block_on(future)
}

/// An open store; see [`crate::Store`], which it gives by [`asynchronous`](Self::asynchronous).
#[derive(Clone, Debug)]
pub struct Store(super::Store);

/// A volume; see [`crate::Volume`].
#[derive(Clone, Debug)]
pub struct Volume(super::Volume);

/// A transaction; see [`crate::Txn`].
#[must_use = "a transaction does nothing until it is committed"]
pub struct Txn(super::Txn);

/// Pages in order; see [`crate::Volume::scan`].
#[must_use = "a scan does nothing until it is asked for pages"]
pub struct Scan(super::Scan);

impl From<super::Store> for Store {
    fn from(store: super::Store) -> Self {
        Store(store)
    }
}

impl From<super::Volume> for Volume {
    fn from(volume: super::Volume) -> Self {
        Volume(volume)
    }
}

impl Store {
    /// As [`crate::Store::open`].
    pub fn open(dir: impl AsRef<Path>, options: Options) -> Result<Store> {
        wait(super::Store::open(dir, options)).map(Store)
    }

    /// As [`crate::Store::open_existing`].
    pub fn open_existing(dir: impl AsRef<Path>, options: Options) -> Result<Store> {
        wait(super::Store::open_existing(dir, options)).map(Store)
    }

    /// The asynchronous twin of this handle.
    pub fn asynchronous(&self) -> &super::Store {
        &self.0
    }

    /// As [`crate::Store::create_volume`].
    pub fn create_volume(&self, name: &str, bytes: u64) -> Result<Volume> {
        wait(self.0.create_volume(name, bytes)).map(Volume)
    }

    /// As [`crate::Store::volume`].
    pub fn volume(&self, name: &str) -> Result<Option<Volume>> {
        Ok(wait(self.0.volume(name))?.map(Volume))
    }

    /// As [`crate::Store::volumes`].
    pub fn volumes(&self) -> Result<Vec<Volume>> {
        Ok(wait(self.0.volumes())?.into_iter().map(Volume).collect())
    }

    /// As [`crate::Store::resize_volume`].
    pub fn resize_volume(&self, name: &str, bytes: u64) -> Result<()> {
        wait(self.0.resize_volume(name, bytes))
    }

    /// As [`crate::Store::delete_volume`].
    pub fn delete_volume(&self, name: &str) -> Result<()> {
        wait(self.0.delete_volume(name))
    }

    /// As [`crate::Store::wait_freed`].
    pub fn wait_freed(&self) -> Result<()> {
        wait(self.0.wait_freed())
    }

    /// As [`crate::Store::freeing_count`].
    pub fn freeing_count(&self) -> usize {
        self.0.freeing_count()
    }

    /// As [`crate::Store::begin`].
    pub fn begin(&self) -> Txn {
        Txn(self.0.begin())
    }

    /// As [`crate::Store::flush`].
    pub fn flush(&self) -> Result<Lsn> {
        wait(self.0.flush())
    }

    /// As [`crate::Store::wait_durable`].
    pub fn wait_durable(&self, lsn: Lsn) -> Result<()> {
        wait(self.0.wait_durable(lsn))
    }

    /// As [`crate::Store::durable_lsn`].
    pub fn durable_lsn(&self) -> Lsn {
        self.0.durable_lsn()
    }

    /// As [`crate::Store::checkpoint`].
    pub fn checkpoint(&self) -> Result<Lsn> {
        wait(self.0.checkpoint())
    }

    /// As [`crate::Store::stats`].
    pub fn stats(&self) -> Result<ShardStats> {
        wait(self.0.stats())
    }

    /// As [`crate::Store::iops`].
    pub fn iops(&self, period: Duration) -> Result<f64> {
        wait(self.0.iops(period))
    }

    /// As [`crate::Store::recovery`].
    pub fn recovery(&self) -> &RecoveryReport {
        self.0.recovery()
    }

    /// As [`crate::Store::report`].
    pub fn report(&self) -> &RuntimeReport {
        self.0.report()
    }

    /// As [`crate::Store::close`].
    pub fn close(&self) -> Result<()> {
        wait(self.0.close())
    }
}

impl Volume {
    /// The asynchronous twin of this handle.
    pub fn asynchronous(&self) -> &super::Volume {
        &self.0
    }

    /// As [`crate::Volume::name`].
    pub fn name(&self) -> &str {
        self.0.name()
    }

    /// As [`crate::Volume::bytes`].
    pub fn bytes(&self) -> u64 {
        self.0.bytes()
    }

    /// As [`crate::Volume::read`].
    pub fn read(&self, page: PageId) -> Result<PageRef> {
        wait(self.0.read(page))
    }

    /// As [`crate::Volume::read_many`].
    pub fn read_many(&self, pages: &[PageId]) -> Result<Vec<PageRef>> {
        wait(self.0.read_many(pages))
    }

    /// As [`crate::Volume::scan`]: an iterator here, which ends after an error.
    pub fn scan(&self, first: PageId, last: PageId) -> Scan {
        Scan(self.0.scan(first, last))
    }

    /// As [`crate::Volume::write`].
    pub fn write(&self, page: PageId, bytes: impl Into<Bytes>) -> Result<Lsn> {
        wait(self.0.write(page, bytes))
    }

    /// As [`crate::Volume::write_back`].
    pub fn write_back(&self, page: PageId, bytes: impl Into<Bytes>) -> Result<Lsn> {
        wait(self.0.write_back(page, bytes))
    }

    /// As [`crate::Volume::write_many`].
    pub fn write_many(&self, pages: Vec<(PageId, Bytes)>) -> Result<Lsn> {
        wait(self.0.write_many(pages))
    }

    /// As [`crate::Volume::patch`].
    pub fn patch(&self, page: PageId, offset: u32, bytes: impl Into<Bytes>) -> Result<Lsn> {
        wait(self.0.patch(page, offset, bytes))
    }

    /// As [`crate::Volume::free`].
    pub fn free(&self, page: PageId) -> Result<Lsn> {
        wait(self.0.free(page))
    }

    /// As [`crate::Volume::free_range`].
    pub fn free_range(&self, first: PageId, last: PageId) -> Result<()> {
        wait(self.0.free_range(first, last))
    }

    /// As [`crate::Volume::allocated`].
    pub fn allocated(&self, first: PageId, last: PageId, ranges_max: usize) -> Result<Allocated> {
        wait(self.0.allocated(first, last, ranges_max))
    }

    /// As [`crate::Volume::apply`].
    pub fn apply(&self, changes: Vec<(PageId, Change)>, durability: Durability) -> Result<Lsn> {
        wait(self.0.apply(changes, durability))
    }
}

impl Txn {
    /// As [`crate::Txn::read`].
    pub fn read(&mut self, volume: &Volume, page: PageId) -> Result<PageView> {
        wait(self.0.read(&volume.0, page))
    }

    /// As [`crate::Txn::write`].
    pub fn write(&mut self, volume: &Volume, page: PageId, bytes: impl Into<Bytes>) -> Result<()> {
        self.0.write(&volume.0, page, bytes)
    }

    /// As [`crate::Txn::patch`].
    pub fn patch(
        &mut self,
        volume: &Volume,
        page: PageId,
        offset: u32,
        bytes: impl Into<Bytes>,
    ) -> Result<()> {
        self.0.patch(&volume.0, page, offset, bytes)
    }

    /// As [`crate::Txn::free`].
    pub fn free(&mut self, volume: &Volume, page: PageId) -> Result<()> {
        self.0.free(&volume.0, page)
    }

    /// As [`crate::Txn::commit`].
    pub fn commit(self) -> Result<Lsn> {
        wait(self.0.commit())
    }
}

impl Scan {
    /// As [`crate::Scan::lsn`].
    pub fn lsn(&self) -> Lsn {
        self.0.lsn()
    }
}

impl Iterator for Scan {
    type Item = Result<(PageId, PageRef)>;

    fn next(&mut self) -> Option<Self::Item> {
        let next = wait(self.0.next()).transpose();
        if let Some(Err(_)) = next {
            self.0.end();
        }
        next
    }
}
