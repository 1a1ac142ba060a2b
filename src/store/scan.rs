//! Reading pages in order, with the next ones on their way already.
//!
//! Invariants
//! 1. Pages come in order of their ids, each once; what is not allocated is passed over without a read.
//! 2. A bounded number of reads is under way: [`AHEAD`] batches.
//! 3. Each page is the newest version of its own moment. A page written after the scan has passed it, or freed before it is
//!    there, is not seen.

use super::read::Reads;
use super::{Allocated, Store, Volume};
use crate::error::{ErrorKind, Result};
use crate::shard::PageRef;
use crate::types::{PageId, PageKey};
use std::collections::VecDeque;

/// Pages of a batch.
const BATCH: usize = 64;
/// Batches under way or read and not yet taken: with 64 pages each 2 MiB.
const AHEAD: usize = 8;
/// Ranges asked for at a time.
const RANGES: usize = 256;

/// Pages of a volume in order; see [`Volume::scan`].
#[must_use = "a scan does nothing until it is asked for pages"]
pub struct Scan {
    volume: Volume,
    last: PageId,
    /// Where the map is to be looked at next.
    next: Option<PageId>,
    /// Known to be allocated, and not asked for yet.
    ranges: VecDeque<(PageId, PageId)>,
    batches: VecDeque<(Vec<PageId>, Reads)>,
    /// Of the batch that is being handed out.
    pages: VecDeque<(PageId, PageRef)>,
}

impl Volume {
    /// Reads the allocated pages from `first` to `last` in order, ahead of what is taken. It is no snapshot: each page is the
    /// newest version at the moment at which it was read, up to 512 pages before it is handed out.
    pub fn scan(&self, first: PageId, last: PageId) -> Scan {
        let next = (first <= last).then_some(first);
        let (ranges, batches, pages) = Default::default();
        Scan { volume: self.clone(), last, next, ranges, batches, pages }
    }
}

impl Scan {
    /// The next page, or `None` at the end. After an error the scan goes on behind what failed.
    ///
    /// # Errors
    /// As [`Volume::read`] and [`Volume::allocated`].
    pub async fn next(&mut self) -> Result<Option<(PageId, PageRef)>> {
        loop {
            if let Some(page) = self.pages.pop_front() {
                return Ok(Some(page));
            }
            self.read_ahead().await?;
            let Some((ids, reads)) = self.batches.pop_front() else { return Ok(None) };
            let pages = reads.finish().await?;
            self.pages = ids.into_iter().zip(pages).filter(|(_, page)| !page.is_absent()).collect();
        }
    }

    /// Nothing comes any more.
    pub(super) fn end(&mut self) {
        self.next = None;
        self.ranges.clear();
        self.batches.clear();
        self.pages.clear();
    }

    async fn read_ahead(&mut self) -> Result<()> {
        while self.batches.len() < AHEAD {
            let ids = self.next_ids().await?;
            if ids.is_empty() {
                return Ok(());
            }
            let keys: Vec<PageKey> = ids.iter().map(|page| self.volume.key(*page)).collect();
            match self.store().begin_read(&keys).await {
                Ok(reads) => self.batches.push_back((ids, reads)),
                // As far as the pins go.
                Err(error) if error.kind() == ErrorKind::Busy && !self.batches.is_empty() => {
                    ids.into_iter().rev().for_each(|id| self.ranges.push_front((id, id)));
                    return Ok(());
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn store(&self) -> &Store {
        self.volume.store()
    }

    async fn next_ids(&mut self) -> Result<Vec<PageId>> {
        let mut ids = Vec::with_capacity(BATCH);
        while ids.len() < BATCH {
            let Some((first, last)) = self.ranges.pop_front() else {
                let Some(next) = self.next else { break };
                let Allocated { ranges, next } = self.volume.allocated(next, self.last, RANGES).await?;
                (self.ranges, self.next) = (ranges.into(), next);
                continue;
            };
            ids.push(first);
            if first < last {
                self.ranges.push_front((PageId::new(first.get() + 1), last));
            }
        }
        Ok(ids)
    }
}
