//! A volume: a sparse space of pages with a name.

use super::catalog::Shared;
use super::{Inner, Store};
use crate::base::error::{Error, ErrorKind, Result};
use crate::base::{Lsn, PageId, PageKey, VolumeId};
use crate::engine::{Change, Commit, PageRef};
use bytes::Bytes;
use std::sync::{Arc, Weak};

/// When a commit is acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// When it is durable, and everything before it.
    Durable,
    /// As soon as it is ordered and visible to all; durable after a later flush, at the latest.
    Buffered,
}

/// A handle to one volume. Pages are 4,096 bytes; those never written, or freed, read as zeros.
#[derive(Debug)]
pub struct Volume {
    store: Store,
    id: VolumeId,
    name: Arc<str>,
    shared: Arc<Shared>,
}

impl Clone for Volume {
    fn clone(&self) -> Self {
        let (id, name, shared) = (self.id, self.name.clone(), self.shared.clone());
        Volume { store: self.store.same_handle(), id, name, shared }
    }
}

impl Volume {
    pub(super) fn new(store: Store, id: VolumeId, name: &str, shared: Arc<Shared>) -> Self {
        Volume { store, id, name: name.into(), shared }
    }

    /// Whether it is still there, and of this store.
    pub(super) fn check_of(&self, store: &Weak<Inner>) -> Result<()> {
        if !std::ptr::eq(store.as_ptr(), Arc::as_ptr(&self.store.inner)) {
            return Err(Error::invalid(format_args!(
                "volume {} belongs to another store",
                self.name
            )));
        }
        self.check()
    }

    /// Whether it is still there.
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

    /// Its size now, as exported to clients; 0 once it is deleted. The library lets any page id be
    /// used.
    pub fn bytes(&self) -> u64 {
        self.shared.bytes()
    }

    /// The store it belongs to.
    pub fn store(&self) -> &Store {
        &self.store
    }

    pub(super) fn key(&self, page: PageId) -> PageKey {
        PageKey::new(self.id, page)
    }

    /// The newest version of a page, durable or not ([`PageRef::lsn`] tells which, of a page that
    /// was freed too).
    ///
    /// # Errors
    /// `Corrupt`: the bytes on the device are not those that were written. `Io`: they can't be
    /// read. `Busy`: no memory is free, or this handle holds as many pages as it may. `NotFound`:
    /// the volume was deleted. `Closed`.
    pub async fn read(&self, page: PageId) -> Result<PageRef> {
        self.check()?;
        let pages = self.store.read(&[self.key(page)]).await?;
        pages.into_iter().next().ok_or_else(|| Error::internal("a read gave no page"))
    }

    /// Several pages, in the order asked: neighbours on the device are read together. Each is the
    /// newest version of its own moment: use a transaction to read several pages of one state.
    ///
    /// # Errors
    /// As [`read`](Self::read), of the first page that fails.
    pub async fn read_many(&self, pages: &[PageId]) -> Result<Vec<PageRef>> {
        self.check()?;
        let keys: Vec<PageKey> = pages.iter().map(|page| self.key(*page)).collect();
        self.store.read(&keys).await
    }

    /// Writes a whole page of 4,096 bytes; durable on return.
    ///
    /// # Errors
    /// `Invalid`: another length. `Full`: no space; nothing was done. `OutcomeUnknown`: the device
    /// failed while the commit was on its way; reopen and look. `Closed`.
    pub async fn write(&self, page: PageId, bytes: impl Into<Bytes>) -> Result<Lsn> {
        self.apply(vec![(page, Change::Put(bytes.into()))], Durability::Durable).await
    }

    /// Writes a whole page; ordered and visible on return, durable after a later [`Store::flush`].
    /// Repeated writes of a page within the window are absorbed.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub async fn write_back(&self, page: PageId, bytes: impl Into<Bytes>) -> Result<Lsn> {
        self.apply(vec![(page, Change::Put(bytes.into()))], Durability::Buffered).await
    }

    /// Writes several pages as one commit: all or none; durable on return.
    ///
    /// # Errors
    /// As [`write`](Self::write), and `TooLarge` beyond `txn_bytes_max`.
    pub async fn write_many(&self, pages: Vec<(PageId, Bytes)>) -> Result<Lsn> {
        let changes = pages.into_iter().map(|(page, bytes)| (page, Change::Put(bytes))).collect();
        self.apply(changes, Durability::Durable).await
    }

    /// Writes `bytes` at byte `offset` of a page; durable on return. Only these bytes go through
    /// the log.
    ///
    /// # Errors
    /// `Invalid`: no bytes, or they do not fit into the page. Else as [`write`](Self::write).
    pub async fn patch(&self, page: PageId, offset: u32, bytes: impl Into<Bytes>) -> Result<Lsn> {
        self.apply(vec![(page, Change::Patch { offset, bytes: bytes.into() })], Durability::Durable)
            .await
    }

    /// Frees a page: it reads as zeros and takes no space any more; durable on return.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub async fn free(&self, page: PageId) -> Result<Lsn> {
        self.apply(vec![(page, Change::Free)], Durability::Durable).await
    }

    /// Any changes of pages of this volume as one commit, in order: all or none.
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
