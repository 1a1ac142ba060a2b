//! Transactions: they are optimistic, validated at commit, and serializable.
//!
//! Invariants
//! 1. Each page is read from the store once, so what a transaction sees does not change under it.
//! 2. It sees its own changes.
//! 3. Nothing leaves it before `commit`; dropping it earlier costs nothing.

use super::{Access, AnyThread, OnShard, Store, Volume};
use crate::base::error::{Error, Result};
use crate::base::{BLOCK, Lsn, PageId, PageKey};
use crate::engine::{Change, Commit, PageRef};
use bytes::Bytes;
use hashbrown::HashMap;
use std::ops::Deref;

/// A page as a transaction sees it. Dereferences to its 4,096 bytes.
#[derive(Clone, Debug)]
pub enum PageView {
    /// The page as it is in the store, without a copy.
    Stored(PageRef),
    /// A copy of the page with the transaction's own changes.
    Changed(Vec<u8>),
}

impl Deref for PageView {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match self {
            PageView::Stored(page) => page,
            PageView::Changed(bytes) => bytes,
        }
    }
}

/// What a transaction has read and will change.
#[derive(Default)]
struct Work {
    reads: HashMap<PageKey, PageRef, foldhash::fast::FixedState>,
    changes: Vec<(PageKey, Change)>,
}

impl Work {
    /// Its own changes of a page, in order. The iterator must not be held across an await: the
    /// future could not move between threads.
    fn own(&self, key: PageKey) -> impl Iterator<Item = &Change> {
        self.changes.iter().filter(move |(changed, _)| *changed == key).map(|(_, change)| change)
    }

    /// Whether the transaction has replaced the whole page, so that it need not be read.
    fn has_replaced(&self, key: PageKey) -> bool {
        matches!(self.own(key).next(), Some(Change::Put(_) | Change::Free))
    }

    fn must_read(&self, key: PageKey) -> bool {
        !self.has_replaced(key) && !self.reads.contains_key(&key)
    }

    /// The page as the transaction sees it. If the page has to be read, it must have been.
    fn view(&self, key: PageKey) -> PageView {
        let stored = if self.has_replaced(key) { None } else { self.reads.get(&key) };
        let mut own = self.own(key).peekable();
        match stored {
            Some(page) if own.peek().is_none() => PageView::Stored(page.clone()),
            stored => {
                let mut bytes = stored.map_or_else(|| vec![0; BLOCK], |page| page.to_vec());
                own.for_each(|change| apply(&mut bytes, change));
                PageView::Changed(bytes)
            }
        }
    }

    fn change(&mut self, key: PageKey, change: Change) -> Result<()> {
        match &change {
            Change::Put(bytes) if bytes.len() != BLOCK => {
                let (len, page) = (bytes.len(), key.page);
                return Err(Error::invalid(format_args!(
                    "{len} bytes given for {page:?}, but a page has {BLOCK}"
                )));
            }
            Change::Patch { offset, bytes }
                if bytes.is_empty() || *offset as usize + bytes.len() > BLOCK =>
            {
                let (len, page) = (bytes.len(), key.page);
                return Err(Error::invalid(format_args!(
                    "a patch of {len} bytes at {offset} of {page:?} does not fit into {BLOCK} \
                     bytes"
                )));
            }
            _ => {}
        }
        self.changes.push((key, change));
        Ok(())
    }

    fn into_commit(self) -> Commit {
        let mut reads: Vec<(PageKey, Lsn)> =
            self.reads.iter().map(|(key, page)| (*key, page.version())).collect();
        reads.sort();
        Commit { reads, changes: self.changes, durable: true }
    }
}

/// A transaction over any pages of any volumes of one store.
///
/// In a task on a shard ([`ShardTxn`]), pages of that shard are read without a hop. The volumes may
/// come from any handle of the store.
#[must_use = "a transaction does nothing until it is committed"]
pub struct Txn<A: Access = AnyThread> {
    store: Store<A>,
    work: Work,
}

/// A transaction of a task on a shard, from [`ShardHandle::begin`](Store::begin).
pub type ShardTxn = Txn<OnShard>;

impl<A: Access> Txn<A> {
    pub(super) fn new(store: Store<A>) -> Self {
        Txn { store, work: Work::default() }
    }

    /// Reads a page as this transaction sees it. The page is pinned until the transaction ends.
    ///
    /// # Errors
    /// As [`Volume::read`]; `Invalid` if the volume belongs to another store.
    pub async fn read<V: Access>(&mut self, volume: &Volume<V>, page: PageId) -> Result<PageView> {
        let key = self.key(volume, page)?;
        if self.work.must_read(key) {
            let page = self.store.read_one(key).await?;
            self.work.reads.insert(key, page);
        }
        Ok(self.work.view(key))
    }

    /// Reads several pages as this transaction sees them and returns them in the requested order.
    /// Those that it has not read yet are read at the same time, and pinned until the transaction
    /// ends.
    ///
    /// # Errors
    /// As [`read`](Self::read), for the first page that fails.
    pub async fn read_many<V: Access>(
        &mut self,
        volume: &Volume<V>,
        pages: &[PageId],
    ) -> Result<Vec<PageView>> {
        volume.check_of(&self.store)?;
        let keys: Vec<PageKey> = pages.iter().map(|page| volume.key(*page)).collect();
        let mut missing: Vec<PageKey> =
            keys.iter().copied().filter(|key| self.work.must_read(*key)).collect();
        missing.sort_unstable();
        missing.dedup();
        let read = self.store.read(&missing).await?;
        self.work.reads.extend(missing.into_iter().zip(read));
        Ok(keys.into_iter().map(|key| self.work.view(key)).collect())
    }

    /// Replaces a page with exactly 4,096 bytes when the transaction commits.
    ///
    /// # Errors
    /// `Invalid`: the length is wrong, or the volume belongs to another store.
    pub fn write<V: Access>(
        &mut self,
        volume: &Volume<V>,
        page: PageId,
        bytes: impl Into<Bytes>,
    ) -> Result<()> {
        self.change(volume, page, Change::Put(bytes.into()))
    }

    /// Replaces the bytes of a page from byte `offset` on when the transaction commits.
    ///
    /// # Errors
    /// `Invalid`: there are no bytes, they do not fit into the page, or the volume belongs to
    /// another store.
    pub fn patch<V: Access>(
        &mut self,
        volume: &Volume<V>,
        page: PageId,
        offset: u32,
        bytes: impl Into<Bytes>,
    ) -> Result<()> {
        self.change(volume, page, Change::Patch { offset, bytes: bytes.into() })
    }

    /// Frees a page when the transaction commits.
    ///
    /// # Errors
    /// `Invalid`: the volume belongs to another store.
    pub fn free<V: Access>(&mut self, volume: &Volume<V>, page: PageId) -> Result<()> {
        self.change(volume, page, Change::Free)
    }

    /// Makes any change to a page when the transaction commits.
    ///
    /// # Errors
    /// As [`write`](Self::write), [`patch`](Self::patch) and [`free`](Self::free).
    pub fn change<V: Access>(
        &mut self,
        volume: &Volume<V>,
        page: PageId,
        change: Change,
    ) -> Result<()> {
        self.work.change(self.key(volume, page)?, change)
    }

    fn key<V: Access>(&self, volume: &Volume<V>, page: PageId) -> Result<PageKey> {
        volume.check_of(&self.store)?;
        Ok(volume.key(page))
    }

    /// Commits all changes, if nothing that was read has changed since, else none. On return the
    /// commit is durable, and so is everything that was read. Returns the commit's LSN or, without
    /// changes, the highest LSN that was read.
    ///
    /// # Errors
    /// `Conflict`: something that was read has changed; begin a new transaction. `TooLarge`,
    /// `Full`, `Busy`: nothing was done. `OutcomeUnknown`: the device failed while the commit was
    /// on its way; reopen the store and check.
    pub async fn commit(self) -> Result<Lsn> {
        self.store.commit(self.work.into_commit()).await
    }
}

fn apply(page: &mut [u8], change: &Change) {
    match change {
        Change::Put(bytes) => page.copy_from_slice(bytes),
        Change::Patch { offset, bytes } => {
            let start = *offset as usize;
            page[start..start + bytes.len()].copy_from_slice(bytes);
        }
        Change::Free => page.fill(0),
    }
}
