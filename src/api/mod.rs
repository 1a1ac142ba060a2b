//! The handles that callers hold: the store, its volumes, and transactions.
//!
//! Invariants
//! 1. A handle holds no state of pages: it asks the shard for everything. So handles are cheap to
//!    clone, and any number of them, on any thread and runtime, see the same store.
//! 2. A future that is dropped before its first poll has done nothing; one that is dropped later
//!    undoes nothing that was submitted.
//! 3. Each call is written once, over [`Access`], for any thread and for tasks on a shard; and
//!    whatever can be awaited can also be waited for ([`blocking`]) and queued ([`queue`]).
//! 4. Ordinary transactions name volumes in the catalog (volume 0): creation is as atomic and
//!    durable as any commit.

mod access;
pub mod blocking;
mod catalog;
mod exclusive;
mod freeing;
mod on_shard;
pub mod queue;
mod read;
mod scan;
mod space;
mod txn;
mod volume;
mod wait;

pub use access::{Access, AnyThread, OnShard};
use freeing::{Freeing, Handles};
pub use on_shard::ShardHandle;
pub use scan::Scan;
pub use space::Allocated;
pub use txn::{PageView, ShardTxn, Txn};
pub use volume::{Durability, Volume};

use crate::base::error::{Error, ErrorKind, Result};
use crate::base::metrics::ShardStats;
use crate::base::options::{Options, frames_in};
use crate::base::{Lsn, ShardId};
use crate::engine::recovery::RecoveryReport;
use crate::engine::{Commit, PageRef, PinQuota, Request, Response};
use crate::format::root::VOLUMES_MAX;
use crate::io::DiskReport;
use crate::runtime::{OpenMode, RuntimeHandle, RuntimeReport};
use smallvec::SmallVec;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// The most pages of one read request; larger reads are split.
const READ_PAGES: usize = 64;
/// The part of the memory that one handle can pin.
const PINS_SHARE: u64 = 4;

/// An open store. Clones are handles to the same store. [`close`](Store::close) ends it cleanly. If
/// the last handle is dropped instead, the store ends as in a crash: nothing that was acknowledged
/// as durable is lost, and the next open recovers.
///
/// Dropping the last handle blocks until the device has finished all operations, so that the store
/// can be opened again at once. On a shard's own thread, in a task or a waker there, it does not
/// block: the store ends a little later, and opening it waits for that.
///
/// Volumes, transactions and scans share the pin quota of the handle that they were made from: the
/// pages that they hold can take a quarter of the memory. A clone has a quota of its own.
///
/// `A` says where the handle is used: on any thread, or in a task on a shard ([`ShardHandle`]).
/// [`open`](Store::open), [`open_existing`](Store::open_existing) and [`close`](Store::close) are
/// for any thread; both offer everything else.
pub struct Store<A: Access = AnyThread> {
    access: A,
    inner: Arc<Inner>,
    pins: Arc<PinQuota>,
}

/// The state that all handles share. It does not keep the store open: [`AnyThread`] does.
struct Inner {
    runtime: Arc<RuntimeHandle>,
    read_pages: usize,
    closing: Mutex<bool>,
    /// The state that all handles to each volume share.
    volumes: Box<[Arc<volume::VolumeState>]>,
    /// Held while a volume is resized or deleted, and while some of its pages are freed.
    resizing: Arc<exclusive::Exclusive>,
    freeing: Arc<Freeing>,
}

impl<A: Access> Clone for Store<A> {
    fn clone(&self) -> Self {
        Store { access: self.access.clone(), inner: self.inner.clone(), pins: self.pins.another() }
    }
}

impl<A: Access> std::fmt::Debug for Store<A> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut text = f.debug_struct("Store");
        if let Some(shard) = self.access.shard() {
            text.field("shard", &shard);
        }
        text.field("recovery", &self.inner.runtime.recovery).finish()
    }
}

impl Store {
    /// Opens the store in directory `dir`, or creates one there if it holds none. After a crash
    /// this recovers: on return the store holds exactly the commits up to
    /// [`RecoveryReport::recovered_lsn`], among them all that were acknowledged as durable.
    ///
    /// Dropping the future cancels the opening, even in the middle of a long recovery, and leaves
    /// the store as after a crash. Like dropping a store, that blocks until the device has finished
    /// all operations.
    ///
    /// # Errors
    /// `InUse`: another process, or another handle in this one, has it open. `Unsupported`: another
    /// format version. `Corrupt`: damage that recovery must not ignore; nothing was changed.
    /// `Invalid`: an option; the message says which. `Io`, `Full`: the directory can't be written.
    pub async fn open(dir: impl AsRef<Path>, options: Options) -> Result<Store> {
        Store::open_wanted(dir.as_ref(), options, OpenMode::CreateIfMissing).await
    }

    /// Opens the store in directory `dir` as [`open`](Self::open) does, but never creates one. Use
    /// it where the file system of `dir` may not be mounted yet: a new, empty store would hide the
    /// real one.
    ///
    /// # Errors
    /// `NotFound`: there is no store, or only one whose creation was interrupted. Else as
    /// [`open`](Self::open).
    pub async fn open_existing(dir: impl AsRef<Path>, options: Options) -> Result<Store> {
        Store::open_wanted(dir.as_ref(), options, OpenMode::MustExist).await
    }

    async fn open_wanted(dir: &Path, options: Options, wanted: OpenMode) -> Result<Store> {
        let read_pages = options.vectored_pages_max.min(READ_PAGES);
        let pins = PinQuota::new((frames_in(options.memory_bytes) / PINS_SHARE) as usize);
        let runtime = crate::runtime::start(dir.to_path_buf(), options, wanted).await?;
        let volumes = (0..VOLUMES_MAX).map(|_| Arc::default()).collect();
        let (closing, resizing) = Default::default();
        let freeing = Arc::<Freeing>::default();
        let handle = runtime.handle().clone();
        let access = AnyThread::keeps_open(runtime, Handles(freeing.clone()));
        let inner = Inner { runtime: handle, read_pages, closing, volumes, resizing, freeing };
        let store = Store { access, inner: Arc::new(inner), pins };
        if let Err(error) = store.begin_finishing().await {
            // The volumes whose records can be read are still useful.
            tracing::warn!(%error, "it is not known whether a volume was left half deleted");
        }
        Ok(store)
    }

    /// Finishes what is in progress, makes everything durable and records the end of the log, so
    /// that the next open has nothing to recover. All other handles get `Closed` from then on.
    ///
    /// # Errors
    /// `Closed`: the store is already closed, or has stopped after a failed write; then nothing
    /// more can be done. `Busy`: the shards were too busy to close; the store is open, and can be
    /// closed later.
    pub async fn close(&self) -> Result<()> {
        let first = !std::mem::replace(
            &mut *self.inner.closing.lock().unwrap_or_else(PoisonError::into_inner),
            true,
        );
        if !first {
            return Err(Error::new(ErrorKind::Closed, "the store is closed; open it again"));
        }
        let result = self.inner.runtime.close().await;
        if result.as_ref().is_err_and(|error| error.kind() == ErrorKind::Busy) {
            // The close failed: the store is open, and the next call may close it.
            *self.inner.closing.lock().unwrap_or_else(PoisonError::into_inner) = false;
            return result;
        }
        self.inner.runtime.ended().await;
        result
    }
}

impl<A: Access> Store<A> {
    /// Reports what the opening found and did.
    pub fn recovery(&self) -> &RecoveryReport {
        &self.inner.runtime.recovery
    }

    /// The most bytes that one commit may count: 4 KiB for each page written or patched, 512 bytes
    /// for each page freed. It is `Options::txn_bytes_max`, or less if the memory or the log
    /// segments are too small for that.
    pub fn txn_bytes_max(&self) -> u64 {
        self.inner.runtime.txn_bytes_max
    }

    /// Reports what the disk offered when the store was opened: the driver, and why it is not a
    /// better one; direct I/O, file system, flush method.
    pub fn disk_report(&self) -> &DiskReport {
        &self.inner.runtime.report.disk
    }

    /// Reports how the store runs: driver, shards, cores, and the [disk's
    /// report](Self::disk_report).
    pub fn report(&self) -> &RuntimeReport {
        &self.inner.runtime.report
    }

    /// Clones the handle; the clone shares this handle's pin quota.
    fn same_handle(&self) -> Self {
        let (access, inner, pins) = (self.access.clone(), self.inner.clone(), self.pins.clone());
        Store { access, inner, pins }
    }

    /// A handle for the library's own work, which does not count as a caller's.
    fn own_handle(&self) -> Store {
        let (inner, pins) = (self.inner.clone(), self.pins.another());
        Store { access: AnyThread::of_engine(), inner, pins }
    }

    /// Submits a request to a shard, or to the one that it belongs to. Once this returns, dropping
    /// the reply does not undo it.
    async fn submit(&self, shard: Option<ShardId>, request: Request) -> Result<A::Reply> {
        match self.access.submit(&self.inner.runtime, shard, request) {
            Ok(reply) => Ok(reply),
            Err((shard, request)) => {
                self.inner.runtime.submit_to(shard, request).await.map(A::Reply::from)
            }
        }
    }

    /// Submits a request to the shard that it belongs to, and awaits its reply. In a task on that
    /// shard it awaits nothing else.
    async fn ask(&self, request: Request) -> Result<Response> {
        match self.access.submit(&self.inner.runtime, None, request) {
            Ok(reply) => reply.await,
            Err((shard, request)) => self.inner.runtime.submit_to(shard, request).await?.await,
        }
    }

    async fn commit(&self, commit: Commit) -> Result<Lsn> {
        committed(self.ask(Request::Commit(commit)).await?)
    }

    /// Begins a transaction, which holds nothing until it has read a page.
    pub fn begin(&self) -> Txn<A> {
        Txn::new(self.same_handle())
    }

    /// Makes durable everything that was acknowledged before the call, through any handle. Returns
    /// the LSN up to which everything is durable.
    ///
    /// # Errors
    /// `Closed`: the store is closed or has stopped after a failed write; buffered commits may be
    /// lost.
    pub async fn flush(&self) -> Result<Lsn> {
        match self.ask(Request::Flush).await? {
            Response::Flushed(lsn) => Ok(lsn),
            other => Err(unexpected(&other)),
        }
    }

    /// Waits until the commit `lsn` and all before it are durable. Flushes what is buffered.
    ///
    /// # Errors
    /// `Invalid`: no commit has that LSN yet. `Closed` as for [`flush`](Self::flush).
    pub async fn wait_durable(&self, lsn: Lsn) -> Result<()> {
        self.ask(Request::WaitDurable(lsn)).await.map(drop)
    }

    /// The watermark: every commit with this LSN or a lower one is durable.
    pub fn durable_lsn(&self) -> Lsn {
        self.inner.runtime.watermark()
    }

    /// Writes all dirty pages and a new page map, durable on return. Recovery after a crash need
    /// not replay the log up to the returned LSN.
    ///
    /// # Errors
    /// `Closed` as for [`flush`](Self::flush).
    pub async fn checkpoint(&self) -> Result<Lsn> {
        match self.ask(Request::Checkpoint).await? {
            Response::Checkpointed(lsn) => Ok(lsn),
            other => Err(unexpected(&other)),
        }
    }

    /// Waits until the store stops taking writes although it was not closed, and returns why: a
    /// write or a flush of the log has failed, or (`Internal`) a thread of the engine has panicked.
    /// Reads may still work; to write, reopen the store.
    ///
    /// It never returns while all is well, nor after the store was closed: await it together with
    /// something else.
    pub async fn failed(&self) -> Error {
        self.inner.runtime.failed().await
    }

    /// Counters since the store was opened, summed over all shards.
    ///
    /// # Errors
    /// `Closed`.
    pub async fn stats(&self) -> Result<ShardStats> {
        let mut total = ShardStats::default();
        for stats in self.shard_stats().await? {
            total.add(&stats);
        }
        Ok(total)
    }

    /// Operations (reads, commits, flushes) answered per second, averaged over the full seconds of
    /// the last `period`: at least one, at most 60, and no longer than the store has been open.
    ///
    /// # Errors
    /// `Closed`.
    pub async fn iops(&self, period: Duration) -> Result<f64> {
        Ok(self.stats().await?.iops(period))
    }

    /// Counters since the store was opened, for each shard in the order of their numbers.
    ///
    /// # Errors
    /// `Closed`.
    pub async fn shard_stats(&self) -> Result<Vec<ShardStats>> {
        let mut all = Vec::new();
        for shard in self.inner.runtime.shard_map().shards() {
            match self.submit(Some(shard), Request::Stats).await?.await? {
                Response::Stats(stats) => all.push(*stats),
                other => return Err(unexpected(&other)),
            }
        }
        Ok(all)
    }
}

#[inline]
fn committed(response: Response) -> Result<Lsn> {
    match response {
        Response::Committed(lsn) => Ok(lsn),
        other => Err(unexpected(&other)),
    }
}

#[inline]
fn pages(response: Response) -> Result<SmallVec<[PageRef; 1]>> {
    match response {
        Response::Pages(pages) => Ok(pages),
        other => Err(unexpected(&other)),
    }
}

fn unexpected(response: &Response) -> Error {
    Error::internal(format_args!(
        "a shard sent an answer that does not fit the request: {response:?}"
    ))
}

#[cfg(test)]
mod tests {
    use super::blocking::Wait;
    use super::*;
    use crate::base::{PageId, PageKey, VolumeId};

    /// If a bug of the engine were reported as a wrong argument or a closed store, users would look
    /// for the fault in their own code.
    #[test]
    fn requests_and_answers_that_only_the_engine_can_get_wrong_are_internal_errors() {
        let dir = tempfile::tempdir().expect("a directory");
        let options = Options { shards: Some(2), memory_bytes: 16 << 20, ..Options::default() };
        let store = Store::open(dir.path(), options).wait().expect("it opens");
        let map = store.inner.runtime.shard_map();
        let key = PageKey::new(VolumeId::new(1), PageId::new(0));
        let read = Request::Read(SmallVec::from_buf([key]));
        let owner = store.inner.runtime.shard_for(&read);
        let other = map.shards().find(|shard| *shard != owner).expect("there are two");
        for (shard, request) in [(other, read), (ShardId::new(1), Request::Checkpoint)] {
            let reply = async { store.submit(Some(shard), request).await?.await };
            let error = reply.wait().expect_err("no shard can do that");
            assert_eq!(error.kind(), ErrorKind::Internal, "{error}");
            assert!(error.to_string().contains("please report it"), "{error}");
        }
        assert_eq!(unexpected(&Response::Closed).kind(), ErrorKind::Internal);
        store.close().wait().expect("it closes");
    }
}
