//! Reads pages in order, with the next ones already on their way.
//!
//! Invariants
//! 1. Pages come in the order of their ids, each once; pages that are not allocated are skipped
//!    without a read.
//! 2. A bounded number of reads is in flight: [`AHEAD`] batches.
//! 3. Dropping a call of [`Scan::next`] loses nothing: what it has taken out of one place is in
//!    another before it waits.
//! 4. Each page is the newest version at a moment of its own. A page that is written after the scan
//!    has passed it, or freed before it is read, is not seen.

use super::read::Reads;
use super::space::Look;
use super::{Access, Allocated, AnyThread, Store, Volume};
use crate::base::error::{ErrorKind, Result};
use crate::base::{Lsn, PageId, PageKey};
use crate::engine::PageRef;
use std::collections::VecDeque;

/// Pages in a batch.
const BATCH: usize = 64;
/// Batches in flight, or read and not yet taken: 2 MiB at 64 pages each.
const AHEAD: usize = 8;
/// Ranges that are requested at a time.
const RANGES: usize = 256;

/// Reads the pages of a volume in order; made by [`Volume::scan`].
#[must_use = "a scan does nothing until it is asked for pages"]
pub struct Scan<A: Access = AnyThread> {
    volume: Volume<A>,
    last: PageId,
    /// Where the next lookup of allocated ranges begins; `None` if there is no more.
    next: Option<PageId>,
    /// A lookup in progress.
    look: Option<Look<A>>,
    /// Ranges that are known to be allocated and not requested yet.
    ranges: VecDeque<(PageId, PageId)>,
    /// The next batch, which is not requested yet.
    ids: Vec<PageId>,
    batches: VecDeque<(Vec<PageId>, Reads<A>)>,
    /// Pages of the batch that is being handed out.
    pages: VecDeque<(PageId, PageRef)>,
    lsn: Lsn,
}

impl<A: Access> Volume<A> {
    /// Reads the allocated pages from `first` to `last` in order, ahead of the caller. A scan is
    /// not a snapshot: each page is the newest version at the moment when it was read, up to 512
    /// pages before it is handed out, durable or not ([`Scan::lsn`] tells which, for missing pages
    /// too).
    pub fn scan(&self, first: PageId, last: PageId) -> Scan<A> {
        let next = (first <= last).then_some(first);
        let (ranges, ids, batches, pages, lsn) = Default::default();
        Scan { volume: self.clone(), last, next, look: None, ranges, ids, batches, pages, lsn }
    }
}

impl<A: Access> Scan<A> {
    /// Returns the next page, or `None` at the end. After an error the scan continues after the
    /// pages that could not be read. Dropping the future loses no page.
    ///
    /// # Errors
    /// As [`Volume::read`] and [`Volume::allocated`].
    pub async fn next(&mut self) -> Result<Option<(PageId, PageRef)>> {
        loop {
            if let Some(page) = self.pages.pop_front() {
                return Ok(Some(page));
            }
            self.read_ahead().await?;
            let Some((_, reads)) = self.batches.front_mut() else { return Ok(None) };
            let result = reads.wait().await;
            let Some((ids, reads)) = self.batches.pop_front() else { return Ok(None) };
            let pages = result.and_then(|()| reads.into_pages())?;
            // This includes pages that were freed before they were read, which are not handed out.
            self.lsn = pages.iter().map(PageRef::lsn).fold(self.lsn, Lsn::max);
            self.pages = ids.into_iter().zip(pages).filter(|(_, page)| !page.is_absent()).collect();
        }
    }

    /// Once the store is durable up to this LSN, so is everything that the scan has returned, and
    /// the frees of pages that it has skipped: [`Store::wait_durable`] waits for it. It grows as
    /// the scan proceeds.
    pub fn lsn(&self) -> Lsn {
        self.lsn
    }

    /// Ends the scan: it returns no more pages.
    pub(super) fn end(&mut self) {
        self.next = None;
        self.look = None;
        self.ranges.clear();
        self.ids.clear();
        self.batches.clear();
        self.pages.clear();
    }

    async fn read_ahead(&mut self) -> Result<()> {
        while self.batches.len() < AHEAD {
            self.find_ids().await?;
            if self.ids.is_empty() {
                return Ok(());
            }
            let keys: Vec<PageKey> = self.ids.iter().map(|page| self.volume.key(*page)).collect();
            let begun = self.store().begin_read(&keys).await;
            if begun.as_ref().is_err_and(|error| error.kind() == ErrorKind::Busy)
                && !self.batches.is_empty()
            {
                // The pin quota allows no more reads for now.
                return Ok(());
            }
            let ids = std::mem::take(&mut self.ids);
            self.batches.push_back((ids, begun?));
        }
        Ok(())
    }

    fn store(&self) -> &Store<A> {
        self.volume.store()
    }

    /// Fills the next batch.
    async fn find_ids(&mut self) -> Result<()> {
        while self.ids.len() < BATCH {
            let Some((first, last)) = self.ranges.pop_front() else {
                if !self.look_on().await? {
                    break;
                }
                continue;
            };
            self.ids.push(first);
            if first < last {
                self.ranges.push_front((PageId::new(first.get() + 1), last));
            }
        }
        Ok(())
    }

    /// Looks up more allocated ranges; false at the end.
    async fn look_on(&mut self) -> Result<bool> {
        if self.look.is_none()
            && let Some(next) = self.next
        {
            self.volume.check()?;
            self.look =
                Some(self.store().begin_look(self.volume.id(), next, self.last, RANGES).await?);
        }
        let Some(look) = &mut self.look else { return Ok(false) };
        let result = look.wait().await;
        let Some(look) = self.look.take() else { return Ok(false) };
        result?;
        let Allocated { ranges, next, lsn } = look.into_allocated();
        self.lsn = self.lsn.max(lsn);
        (self.ranges, self.next) = (ranges.into(), next);
        Ok(true)
    }
}
