//! Work on a shard's own thread: requests from there take no hop, no lock and no copy.
//!
//! Invariants
//! 1. A handle lives on its shard's thread only; what a task returns must be able to leave it.
//! 2. Reads are of pages that belong to the shard ([`Store::shard_of`] says which); commits may
//!    touch any pages.

use super::{Inner, ShardTxn, Store, Volume, committed, pages};
use crate::base::error::{Error, Result};
use crate::base::{Lsn, PageId, PageKey, ShardId};
use crate::engine::{Change, Commit, PageRef, PinQuota, Request};
use crate::runtime::TaskContext;
use smallvec::SmallVec;
use std::future::Future;
use std::sync::{Arc, Weak};

/// A shard, for a task that runs on its thread.
#[derive(Clone)]
pub struct ShardHandle {
    local: TaskContext,
    pins: Arc<PinQuota>,
    /// Of which the shard is; it does not keep it open.
    store: Weak<Inner>,
}

impl std::fmt::Debug for ShardHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", self.local.shard())
    }
}

impl ShardHandle {
    /// The shard's number.
    pub fn shard(&self) -> usize {
        self.local.shard().index()
    }

    /// The newest version of a page of this shard, durable or not.
    ///
    /// # Errors
    /// `Invalid`: the page belongs to another shard, or the volume to another store. Else as
    /// [`Volume::read`].
    pub async fn read(&self, volume: &Volume, page: PageId) -> Result<PageRef> {
        let key = self.key(volume, page)?;
        let mut pins = PinQuota::take(&self.pins, 1)?;
        let read = self.local.call(Request::Read(SmallVec::from_buf([key]))).await?;
        pages(read)?
            .pop()
            .map(|page| page.counted(&mut pins))
            .ok_or_else(|| Error::internal("a read gave no page"))
    }

    /// Pages of this shard, at most `vectored_pages_max` of them, in the order asked.
    ///
    /// # Errors
    /// As [`read`](Self::read), of the first page that fails.
    pub async fn read_many(
        &self,
        volume: &Volume,
        ids: &[PageId],
    ) -> Result<SmallVec<[PageRef; 1]>> {
        volume.check_of(&self.store)?;
        let mut pins = PinQuota::take(&self.pins, ids.len())?;
        let keys: SmallVec<[PageKey; 1]> = ids.iter().map(|page| volume.key(*page)).collect();
        let pages = pages(self.local.call(Request::Read(keys)).await?)?;
        Ok(pages.into_iter().map(|page| page.counted(&mut pins)).collect())
    }

    /// As [`Store::wait_durable`], without a hop.
    ///
    /// # Errors
    /// As [`Store::wait_durable`].
    pub async fn wait_durable(&self, lsn: Lsn) -> Result<()> {
        self.local.call(Request::WaitDurable(lsn)).await.map(drop)
    }

    /// One atomic commit of changes of a volume's pages, in order; durable on return. Cheapest if
    /// the pages are this shard's.
    ///
    /// # Errors
    /// As [`Volume::apply`].
    pub async fn commit(&self, volume: &Volume, changes: Vec<(PageId, Change)>) -> Result<Lsn> {
        volume.check_of(&self.store)?;
        let changes =
            changes.into_iter().map(|(page, change)| (volume.key(page), change)).collect();
        self.commit_work(Commit { reads: Vec::new(), changes, durable: true }).await
    }

    /// Begins a transaction that reads pages of this shard.
    pub fn begin(&self) -> ShardTxn {
        ShardTxn::new(self.clone())
    }

    pub(super) async fn commit_work(&self, commit: Commit) -> Result<Lsn> {
        committed(self.local.call(Request::Commit(commit)).await?)
    }

    pub(super) fn key(&self, volume: &Volume, page: PageId) -> Result<PageKey> {
        volume.check_of(&self.store)?;
        Ok(volume.key(page))
    }

    /// Runs `future` as a task of its own on this thread; it goes on if the result is dropped.
    ///
    /// # Errors
    /// `Closed`: the store is, or was closed before the task ended.
    pub fn spawn<T, F>(&self, future: F) -> impl Future<Output = Result<T>> + use<T, F>
    where
        T: Send + 'static,
        F: Future<Output = T> + 'static,
    {
        self.local.spawn(future)
    }
}

impl Store {
    /// How many shards there are.
    pub fn shards_count(&self) -> usize {
        self.inner.runtime.shard_map().shards_count().into()
    }

    /// The shard to which a page belongs while the store is open.
    pub fn shard_of(&self, volume: &Volume, page: PageId) -> usize {
        self.inner.runtime.shard_map().shard_of(volume.key(page)).index()
    }

    /// Runs the future that `make` makes as a task on the thread of shard `shard`. It runs on if
    /// the result is dropped, and must not block: the shard waits meanwhile.
    ///
    /// # Errors
    /// `Invalid`: there is no such shard. `Busy`: too many tasks are on their way there. `Closed`:
    /// the store is, or was closed before the task ended.
    ///
    /// # Panics
    /// The result panics if the task did.
    pub fn on_shard<T, F, G>(
        &self,
        shard: usize,
        make: G,
    ) -> Result<impl Future<Output = Result<T>> + Send + use<T, F, G>>
    where
        T: Send + 'static,
        F: Future<Output = T> + 'static,
        G: FnOnce(ShardHandle) -> F + Send + 'static,
    {
        if shard >= self.shards_count() {
            let count = self.shards_count();
            return Err(Error::invalid(format_args!(
                "there is no shard {shard}: the store has {count}, from 0 on"
            )));
        }
        let (pins, store) = (self.pins.another(), Arc::downgrade(&self.inner));
        self.inner
            .runtime
            .spawn_on(ShardId::new(shard as u16), |local| make(ShardHandle { local, pins, store }))
    }
}
