//! Volumes: each is a named, sparse array of pages.

use super::{Access, AnyThread, Store};
use crate::base::error::{Error, ErrorKind, Result};
use crate::base::{Lsn, PageId, PageKey, VolumeId};
use crate::engine::{Change, Commit, PageRef};
use crate::format::catalog;
use bytes::Bytes;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// When a commit is acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// When the commit and everything before it are durable.
    Durable,
    /// As soon as the commit has its LSN and is visible to all; it is durable after a later flush
    /// at the latest.
    Buffered,
}

/// The state that all handles to a volume share.
#[derive(Debug, Default)]
pub(super) struct VolumeState {
    bytes: AtomicU64,
    deleted: AtomicBool,
    /// The version of the record that `bytes` comes from.
    lsn: Mutex<Lsn>,
}

impl VolumeState {
    pub(super) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Acquire)
    }

    pub(super) fn is_deleted(&self) -> bool {
        self.deleted.load(Ordering::Acquire)
    }

    /// Takes over the record of version `lsn`, unless a newer one is already known.
    pub(super) fn learn(&self, lsn: Lsn, volume: &catalog::Volume) {
        let mut known = self.lsn.lock().unwrap_or_else(PoisonError::into_inner);
        if lsn >= *known {
            *known = lsn;
            self.bytes.store(volume.bytes, Ordering::Release);
            self.deleted.store(volume.name.is_empty(), Ordering::Release);
        }
    }
}

/// A handle to one volume: a sparse array of pages of 4,096 bytes, addressed by [`PageId`]. Pages
/// that were never written, or were freed, read as zeros.
pub struct Volume<A: Access = AnyThread> {
    store: Store<A>,
    id: VolumeId,
    name: Arc<str>,
    shared: Arc<VolumeState>,
}

impl<A: Access> Clone for Volume<A> {
    fn clone(&self) -> Self {
        let (id, name, shared) = (self.id, self.name.clone(), self.shared.clone());
        Volume { store: self.store.same_handle(), id, name, shared }
    }
}

impl<A: Access> std::fmt::Debug for Volume<A> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (id, name) = (self.id, &self.name);
        f.debug_struct("Volume").field("id", &id).field("name", name).finish_non_exhaustive()
    }
}

impl<A: Access> Volume<A> {
    pub(super) fn new(store: Store<A>, id: VolumeId, name: &str, shared: Arc<VolumeState>) -> Self {
        Volume { store, id, name: name.into(), shared }
    }

    /// Returns the same volume through another handle of its store: a clone with a pin quota of its
    /// own, or the handle of a shard, whose task then reaches the pages of its shard without a hop.
    ///
    /// # Errors
    /// `Invalid`: the handle belongs to another store. `NotFound`: the volume was deleted.
    pub fn on<B: Access>(&self, store: &Store<B>) -> Result<Volume<B>> {
        self.check_of(store)?;
        let (id, name, shared) = (self.id, self.name.clone(), self.shared.clone());
        Ok(Volume { store: store.same_handle(), id, name, shared })
    }

    /// Checks that the volume still exists and belongs to this store.
    pub(super) fn check_of<B: Access>(&self, store: &Store<B>) -> Result<()> {
        if !Arc::ptr_eq(&store.inner, &self.store.inner) {
            return Err(Error::invalid(format_args!(
                "volume {} belongs to another store",
                self.name
            )));
        }
        self.check()
    }

    /// Checks that the volume still exists.
    pub(super) fn check(&self) -> Result<()> {
        if self.shared.is_deleted() {
            return Err(Error::new(
                ErrorKind::NotFound,
                format_args!("the volume {} was deleted", self.name),
            ));
        }
        Ok(())
    }

    /// Its number in the store.
    pub fn id(&self) -> VolumeId {
        self.id
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its size in bytes, as clients of the NBD server see it; 0 once it is deleted. The library
    /// does not enforce it: any page id can be used.
    pub fn bytes(&self) -> u64 {
        self.shared.bytes()
    }

    /// The store that it belongs to.
    pub fn store(&self) -> &Store<A> {
        &self.store
    }

    pub(super) fn key(&self, page: PageId) -> PageKey {
        PageKey::new(self.id, page)
    }

    /// Reads the newest version of a page, which may not be durable yet: [`PageRef::lsn`] is the
    /// LSN to wait for, even if the page was freed.
    ///
    /// # Errors
    /// `Corrupt`: the bytes on the device are not those that were written. `Io`: they can't be
    /// read. `Busy`: no memory is free, or the handle's pin quota is used up. `NotFound`: the
    /// volume was deleted. `Closed`.
    pub async fn read(&self, page: PageId) -> Result<PageRef> {
        self.check()?;
        self.store.read_one(self.key(page)).await
    }

    /// Reads several pages and returns them in the requested order. Pages that are adjacent on the
    /// device are read together. Each page is the newest version at a moment of its own: to read
    /// several pages of one state, use a transaction.
    ///
    /// # Errors
    /// As [`read`](Self::read), for the first page that fails.
    pub async fn read_many(&self, pages: &[PageId]) -> Result<Vec<PageRef>> {
        self.check()?;
        let keys: Vec<PageKey> = pages.iter().map(|page| self.key(*page)).collect();
        self.store.read(&keys).await
    }

    /// Writes a whole page of 4,096 bytes, durable on return. Returns the commit's LSN.
    ///
    /// # Errors
    /// `Invalid`: the length is wrong. `Full`: no space; nothing was done. `OutcomeUnknown`: the
    /// device failed while the commit was on its way; reopen the store and check. `Closed`.
    pub async fn write(&self, page: PageId, bytes: impl Into<Bytes>) -> Result<Lsn> {
        self.apply(vec![(page, Change::Put(bytes.into()))], Durability::Durable).await
    }

    /// Writes a whole page of 4,096 bytes. On return the write has its LSN and is visible to all;
    /// it is durable after a later [`Store::flush`]. If a page is written repeatedly between two
    /// checkpoints, only the last version reaches its place in the data file, unless memory runs
    /// short or the store is idle between two of the writes.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub async fn write_back(&self, page: PageId, bytes: impl Into<Bytes>) -> Result<Lsn> {
        self.apply(vec![(page, Change::Put(bytes.into()))], Durability::Buffered).await
    }

    /// Writes several pages as one commit, all or none, durable on return.
    ///
    /// # Errors
    /// As [`write`](Self::write); `TooLarge` beyond `txn_bytes_max`.
    pub async fn write_many(&self, pages: Vec<(PageId, Bytes)>) -> Result<Lsn> {
        let changes = pages.into_iter().map(|(page, bytes)| (page, Change::Put(bytes))).collect();
        self.apply(changes, Durability::Durable).await
    }

    /// Writes `bytes` at byte `offset` of a page, durable on return. Only these bytes go through
    /// the log.
    ///
    /// # Errors
    /// `Invalid`: there are no bytes, or they do not fit into the page. Else as
    /// [`write`](Self::write).
    pub async fn patch(&self, page: PageId, offset: u32, bytes: impl Into<Bytes>) -> Result<Lsn> {
        self.apply(vec![(page, Change::Patch { offset, bytes: bytes.into() })], Durability::Durable)
            .await
    }

    /// Frees a page, so that it reads as zeros and takes no space, durable on return.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub async fn free(&self, page: PageId) -> Result<Lsn> {
        self.apply(vec![(page, Change::Free)], Durability::Durable).await
    }

    /// Applies changes to pages of this volume in order, as one commit, all or none.
    ///
    /// # Errors
    /// As [`write_many`](Self::write_many) and [`patch`](Self::patch).
    pub async fn apply(
        &self,
        changes: Vec<(PageId, Change)>,
        durability: Durability,
    ) -> Result<Lsn> {
        self.check()?;
        let changes = changes.into_iter().map(|(page, change)| (self.key(page), change)).collect();
        self.store
            .commit(Commit {
                reads: Vec::new(),
                changes,
                durable: durability == Durability::Durable,
            })
            .await
    }
}
