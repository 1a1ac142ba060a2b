//! Answers reads of pages: at once if all pages are in memory, else when the last one has arrived.
//!
//! Invariants
//! 1. A read of pages that are cached, or absent according to the map in memory, does not become a
//!    pending request, and makes no work for a turn.
//! 2. A reader gets the newest version, durable or not, with the LSN that tells it which.

use crate::base::{BLOCK, Lsn, PageIdx, PageKey, RequestIdx, VolumeId};
use crate::engine::cache::table::{Needs, Page};
use crate::engine::map::Lookup;
use crate::engine::op_kind::PageRead;
use crate::engine::requests::PendingKind;
use crate::engine::{PageRef, Response, Shard};
use smallvec::SmallVec;

impl Shard {
    /// Returns these pages if all are in memory, or absent according to the part of the map in
    /// memory: then the read does not become a pending request, and makes no work. Else the caller
    /// must begin a request for them; the table then has what the map says about them.
    pub(in crate::engine) fn cached(&mut self, keys: &[PageKey]) -> Option<SmallVec<[PageRef; 1]>> {
        let watermark = self.ctx.order.watermark();
        // `None`: absent, by the map.
        let mut found: SmallVec<[Option<PageIdx>; 2]> = SmallVec::new();
        for key in keys {
            match self.cache.table.find(*key) {
                Some(idx) if self.cache.table.pages[idx].has(Needs::Bytes) => found.push(Some(idx)),
                Some(_) => return None,
                None => match self.map.lookup(*key) {
                    Lookup::Found(None) => found.push(None),
                    Lookup::Found(entry) => {
                        let idx = self.cache.table.entry(*key);
                        self.resolve(idx, entry);
                        return None;
                    }
                    Lookup::Load(..) => return None,
                },
            }
        }
        let table = &mut self.cache.table;
        let pages = found.iter().map(|idx| {
            let Some(idx) = idx else { return PageRef::new(None, Lsn::ZERO) };
            let page = &mut table.pages[*idx];
            page.residency.used();
            page.as_read(watermark)
        });
        let pages: SmallVec<[PageRef; 1]> = pages.collect();
        let is_catalog = keys.first().is_some_and(|key| key.volume == VolumeId::CATALOG);
        self.count_read_pages(&pages, is_catalog, pages.len() as u32);
        Some(pages)
    }

    /// Counts the pages that a caller gets, `hits` of which were in memory when they were
    /// requested.
    fn count_read_pages(&mut self, pages: &[PageRef], is_catalog: bool, hits: u32) {
        let (count, stats) = (pages.len() as u64, &mut self.ctx.stats);
        if is_catalog {
            stats.catalog_reads += count;
            return;
        }
        let absent = pages.iter().filter(|page| page.is_absent()).count() as u64;
        stats.page_reads += count;
        stats.absent_reads += absent;
        // One that was in memory may have been freed since.
        stats.cache_hits += u64::from(hits).min(count - absent);
        stats.bytes_read += count * BLOCK as u64;
    }

    pub(in crate::engine) fn finish_read(&mut self, waiter: RequestIdx) {
        assert!(
            !self.requests.pending[waiter].is_waiting(),
            "{waiter:?} is answered, and waits for a page"
        );
        // Before the release, since the table keeps no entry of an absent page that no request
        // names.
        let watermark = self.ctx.order.watermark();
        let pages = self.requests.pending[waiter]
            .pages
            .iter()
            .map(|idx| self.cache.table.pages[*idx].as_read(watermark));
        let pages: SmallVec<[PageRef; 1]> = pages.collect();
        let is_catalog = self.requests.pending[waiter]
            .pages
            .first()
            .is_some_and(|idx| self.cache.table.pages[*idx].is_catalog());
        let pending = self.release(waiter);
        let token = pending.token.expect("a read has a token");
        if let Some(error) = pending.error {
            self.ctx.reply(token, Err(error));
            return;
        }
        if let PendingKind::Read(hits) = pending.kind {
            self.count_read_pages(&pages, is_catalog, hits);
        }
        self.ctx.reply(token, Ok(Response::Pages(pages)));
    }

    /// Counts a read of pages that goes to the device, if a caller waits for one of them.
    pub(super) fn count_page_read(&mut self, reads: &[Option<PageRead>]) {
        let is_caller = |waiter: RequestIdx| {
            !matches!(self.requests.pending[waiter].kind, PendingKind::Move(..))
        };
        let is_awaited = |page: &Page| !page.is_catalog() && page.waiters().any(is_caller);
        let awaited =
            reads.iter().flatten().any(|read| is_awaited(&self.cache.table.pages[read.page]));
        self.ctx.stats.caller_reads += u64::from(awaited);
    }
}
