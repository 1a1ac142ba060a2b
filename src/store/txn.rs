//! Transactions: optimistic, validated at commit, serializable.
//!
//! Invariants
//! 1. Each page is read from the store once: what a transaction sees does not change under it.
//! 2. It sees its own changes.
//! 3. Nothing leaves it before `commit`; dropping it before costs nothing.

use super::{Store, Volume};
use crate::error::{Error, Result};
use crate::shard::{Change, Commit, PageRef};
use crate::types::{BLOCK, Lsn, PageId, PageKey};
use bytes::Bytes;
use hashbrown::HashMap;
use std::ops::Deref;

/// A page as a transaction sees it: 4,096 bytes.
#[derive(Clone, Debug)]
pub enum PageView {
    /// As in the store, without a copy.
    Stored(PageRef),
    /// With the transaction's own changes.
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

/// A transaction over any pages of any volumes of one store.
#[must_use = "a transaction does nothing until it is committed"]
pub struct Txn {
    store: Store,
    reads: HashMap<PageKey, PageRef>,
    changes: Vec<(PageKey, Change)>,
}

impl Txn {
    pub(super) fn new(store: Store) -> Self {
        Txn { store, reads: HashMap::new(), changes: Vec::new() }
    }

    /// The page as this transaction sees it. It pins the page until the transaction ends.
    ///
    /// # Errors
    /// As [`Volume::read`]; `Invalid` if the volume belongs to another store.
    pub async fn read(&mut self, volume: &Volume, page: PageId) -> Result<PageView> {
        let key = self.key(volume, page)?;
        // A page that this transaction has replaced whole needs not be read.
        let replaced = matches!(self.own(key).next(), Some(Change::Put(_) | Change::Free));
        let stored = match self.reads.get(&key) {
            _ if replaced => None,
            Some(page) => Some(page.clone()),
            None => {
                let pages = self.store.read(&[key]).await?;
                let page = pages.into_iter().next().ok_or_else(|| Error::corrupt("a read gave no page"))?;
                self.reads.insert(key, page.clone());
                Some(page)
            }
        };
        let mut own = self.own(key).peekable();
        match stored {
            Some(page) if own.peek().is_none() => Ok(PageView::Stored(page)),
            stored => {
                let mut bytes = stored.map_or_else(|| vec![0; BLOCK], |page| page.to_vec());
                own.for_each(|change| apply(&mut bytes, change));
                Ok(PageView::Changed(bytes))
            }
        }
    }

    /// Its own changes of a page, in order. Not to be held over an await: the future could not move between threads.
    fn own(&self, key: PageKey) -> impl Iterator<Item = &Change> {
        self.changes.iter().filter(move |(changed, _)| *changed == key).map(|(_, change)| change)
    }

    /// Replaces a page: exactly 4,096 bytes.
    ///
    /// # Errors
    /// `Invalid`: another length, or a volume of another store.
    pub fn write(&mut self, volume: &Volume, page: PageId, bytes: impl Into<Bytes>) -> Result<()> {
        let bytes = bytes.into();
        if bytes.len() != BLOCK {
            return Err(Error::invalid(format_args!("{} bytes given for {page:?}, a page has {BLOCK}", bytes.len())));
        }
        self.change(volume, page, Change::Put(bytes))
    }

    /// Replaces bytes of a page.
    ///
    /// # Errors
    /// `Invalid`: no bytes, they do not fit into the page, or a volume of another store.
    pub fn patch(&mut self, volume: &Volume, page: PageId, offset: u32, bytes: impl Into<Bytes>) -> Result<()> {
        let bytes = bytes.into();
        if bytes.is_empty() || offset as usize + bytes.len() > BLOCK {
            return Err(Error::invalid(format_args!(
                "a patch of {} bytes at {offset} of {page:?} does not fit into {BLOCK} bytes",
                bytes.len()
            )));
        }
        self.change(volume, page, Change::Patch { offset, bytes })
    }

    /// Frees a page.
    ///
    /// # Errors
    /// `Invalid`: a volume of another store.
    pub fn free(&mut self, volume: &Volume, page: PageId) -> Result<()> {
        self.change(volume, page, Change::Free)
    }

    /// Any change of a page; checked at the commit.
    ///
    /// # Errors
    /// `Invalid`: a volume of another store.
    pub fn change(&mut self, volume: &Volume, page: PageId, change: Change) -> Result<()> {
        let key = self.key(volume, page)?;
        self.changes.push((key, change));
        Ok(())
    }

    fn key(&self, volume: &Volume, page: PageId) -> Result<PageKey> {
        if std::sync::Arc::ptr_eq(&self.store.inner, &volume.store().inner) {
            return volume.check().map(|()| volume.key(page));
        }
        Err(Error::invalid(format_args!("volume {} belongs to another store than the transaction", volume.name())))
    }

    /// Commits: all changes or none, if nothing that was read has changed since. Durable on return, as is
    /// everything that was read.
    ///
    /// # Errors
    /// `Conflict`: something read has changed; begin anew. `TooLarge`, `Full`, `Busy`: nothing was done.
    /// `OutcomeUnknown`: the device failed while the commit was on its way; reopen and look.
    pub async fn commit(self) -> Result<Lsn> {
        let mut reads: Vec<(PageKey, Lsn)> = self.reads.iter().map(|(key, page)| (*key, page.lsn())).collect();
        reads.sort();
        drop(self.reads);
        self.store.commit(Commit { reads, changes: self.changes, durable: true }).await
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
