//! Commits of one shard: their validation, the allocation of their LSNs, and their effect; each is
//! admitted before its LSN is allocated (see `admission`).
//!
//! Invariants
//! 1. All commits of a turn get their LSNs by one allocation, before any effect of the turn leaves.
//! 2. Validation and effect are one step: no other commit comes between.
//! 3. An allocated LSN that isn't used (after a conflict with an earlier commit of the same turn)
//!    stays in its group's run: it is void, and accounted for.
//! 4. While a part of a commit over shards is in front (see `precedence`), no commit is admitted.
//! 5. A commit that meets a page held by a commit over shards waits; one that fails anyway does
//!    not.

use crate::base::error::{Error, Result};
use crate::base::{BLOCK, ImageIdx, Lsn, PageIdx, PageKey, RequestIdx};
use crate::engine::Work;
use crate::engine::log::{OpenChange, OpenImage};
use crate::engine::requests::PendingKind;
use crate::engine::reservations::Need;
use crate::engine::txn::admission::{Admission, Ahead};
use crate::engine::watermark::Outcome;
use crate::engine::{Change, Lack, Response, Shard, Step, Token};
use crate::format::group::Role;
use bytes::Bytes;
use smallvec::SmallVec;

impl Shard {
    /// Carries out the commits whose pages are there, as far as there is room.
    pub(in crate::engine) fn run_commits(&mut self) {
        let mut batch: SmallVec<[RequestIdx; 32]> = SmallVec::new();
        let mut need = Need::default();
        self.space.stalled = false;
        while let Some(waiter) = self.requests.first_ready() {
            if self.requests.pending[waiter].is_waiting() {
                break;
            }
            self.requests.pending[waiter].stays = false;
            if let Some(error) = self.refusal(waiter) {
                self.requests.take_ready();
                self.finish_commit(waiter, Err(error), Lsn::ZERO);
                continue;
            }
            if let Some(idx) = self.locked_page(waiter).filter(|_| !planted!(HoldIgnored)) {
                self.requests.take_ready();
                self.wait_for_page_lock(waiter, idx);
                continue;
            }
            let PendingKind::Commit(commit) = &self.requests.pending[waiter].kind else {
                unreachable!("only commits")
            };
            if commit.changes.is_empty() {
                // It needs no LSN: all that it read is current.
                self.requests.take_ready();
                let read_lsn = self.read_lsn(waiter);
                self.finish_commit(waiter, Ok(None), read_lsn);
                continue;
            }
            if self.commits_are_behind() {
                self.ctx.blocked.register(Step::Commit, Lack::Turn);
                break;
            }
            let with = need.plus(Need::of(commit, &self.map));
            let ahead = if batch.is_empty() { Ahead::Nothing } else { Ahead::Others };
            match self.admit(waiter, with, ahead) {
                Admission::Yes => {
                    self.requests.take_ready();
                    batch.push(waiter);
                    need = with;
                }
                Admission::Waiting if self.requests.pending[waiter].stays => break,
                Admission::Waiting => {
                    self.requests.take_ready();
                }
                Admission::Stalled => break,
                Admission::No(error) => {
                    self.requests.take_ready();
                    self.finish_commit(waiter, Err(error), Lsn::ZERO);
                }
            }
        }
        self.execute(&batch);
    }

    /// The error of a commit, or of a part of one, that fails in any case: a page can't be read,
    /// the store has stopped, or something that it read has changed.
    fn refusal(&self, waiter: RequestIdx) -> Option<Error> {
        let failure = self.requests.pending[waiter].error.as_ref().or(self.ctx.failed.as_ref());
        failure.cloned().or_else(|| self.validate(waiter).err())
    }

    /// Whether every page that the commit read is still as it was read.
    pub(in crate::engine) fn validate(&self, waiter: RequestIdx) -> Result<()> {
        let pending = &self.requests.pending[waiter];
        let Some(commit) = pending.commit() else { return Ok(()) };
        for ((key, lsn), idx) in commit.reads.iter().zip(&pending.pages) {
            let now = self.cache.table.pages[*idx].version();
            if now != *lsn {
                return Err(Error::conflict(*key, *lsn, now));
            }
        }
        Ok(())
    }

    pub(in crate::engine) fn changed_pages(&self, waiter: RequestIdx) -> SmallVec<[PageIdx; 4]> {
        let pending = &self.requests.pending[waiter];
        pending.pages[pending.reads_count()..].iter().copied().collect()
    }

    /// Allocates the LSNs of a turn's commits and carries them out.
    fn execute(&mut self, batch: &[RequestIdx]) {
        if batch.is_empty() {
            return;
        }
        let first = self.ctx.order.allocate_lsns(self.ctx.id, batch.len() as u64);
        let watermark = self.ctx.order.watermark();
        assert!(
            first > watermark,
            "{first:?} was allocated, and all up to {watermark:?} is durable"
        );
        self.log.open.add_run(first, batch.len() as u64, self.ctx.now);
        for (i, waiter) in batch.iter().enumerate() {
            let lsn = first.plus(i as u64);
            let read_lsn = self.read_lsn(*waiter);
            let result = self.validate(*waiter).map(|()| {
                self.apply(*waiter, lsn, Role::Whole);
                Some(lsn)
            });
            self.finish_commit(*waiter, result, read_lsn);
        }
        self.ctx.need(Work::Groups);
        self.ctx.room_changed();
    }

    /// The newest change of any page that the commit read, a `Free` included: its reply waits until
    /// that is durable.
    pub(in crate::engine) fn read_lsn(&self, waiter: RequestIdx) -> Lsn {
        let pending = &self.requests.pending[waiter];
        let read = pending.pages[..pending.reads_count()]
            .iter()
            .map(|idx| self.cache.table.pages[*idx].lsn);
        read.max().unwrap_or(Lsn::ZERO)
    }

    pub(in crate::engine) fn finish_commit(
        &mut self,
        waiter: RequestIdx,
        result: Result<Option<Lsn>>,
        read_lsn: Lsn,
    ) {
        if let Ok(Some(lsn)) = result {
            assert!(read_lsn < lsn, "{waiter:?} got {lsn:?}, and has read {read_lsn:?}");
        }
        let pending = self.release(waiter);
        let token = pending.token.expect("a commit has a token");
        let PendingKind::Commit(commit) = pending.kind else { unreachable!("only commits") };
        #[cfg(any(test, feature = "sim"))]
        if let Ok(Some(lsn)) = &result {
            self.ctx.allocated.push((token, *lsn));
        }
        match result {
            Err(error) => self.ctx.reply(token, Err(error)),
            Ok(None) => self.reply_committed(token, read_lsn, read_lsn, Outcome::Known),
            Ok(Some(lsn)) => {
                let waits = commit.durable && !planted!(AcknowledgedEarly);
                let awaited = if waits { lsn } else { read_lsn };
                self.reply_committed(token, lsn, awaited, Outcome::Unknown);
            }
        }
    }

    /// Answers that the commit has `lsn` once everything up to `awaited` is durable.
    pub(in crate::engine) fn reply_committed(
        &mut self,
        token: Token,
        lsn: Lsn,
        awaited: Lsn,
        outcome: Outcome,
    ) {
        self.watermark.reply_when_durable(
            &mut self.ctx,
            &mut self.log,
            awaited,
            token,
            Response::Committed(lsn),
            outcome,
        );
    }

    /// Carries a commit out and writes its record into the open group.
    pub(in crate::engine) fn apply(&mut self, waiter: RequestIdx, lsn: Lsn, role: Role) {
        let pages = self.changed_pages(waiter);
        let changes = match &mut self.requests.pending[waiter].kind {
            PendingKind::Commit(commit) => &mut commit.changes,
            // The changes stay counted where the pages are: only their order matters from here on.
            PendingKind::Part(part) => &mut part.commit.changes,
            _ => unreachable!("only commits"),
        };
        let changes = std::mem::take(changes);
        self.ctx.stats.commits += u64::from(!matches!(role, Role::Part(_)));
        self.log.open.begin_record(role, self.ctx.now);
        for ((key, change), idx) in changes.into_iter().zip(pages) {
            match change {
                Change::Put(bytes) => self.apply_put(idx, key, &bytes, lsn),
                Change::Patch { offset, bytes } => self.apply_patch(idx, key, offset, &bytes, lsn),
                Change::Free => self.apply_free(idx, key, lsn),
            }
        }
        self.log.open.end_record(role, lsn);
    }

    fn apply_put(&mut self, idx: PageIdx, key: PageKey, bytes: &Bytes, lsn: Lsn) {
        assert!(bytes.len() == BLOCK, "{key:?}: {} bytes are written", bytes.len());
        self.ctx.stats.page_writes += 1;
        self.ctx.stats.bytes_written += bytes.len() as u64;
        self.seal_older_image(idx);
        self.set_content(idx, 0, bytes);
        let image = match self.cache.table.pages[idx].image {
            Some(image) => {
                self.ctx.stats.absorbed_writes += 1;
                image
            }
            None => self.new_image(idx, key, lsn),
        };
        self.log.open.images[image.index()].lsn = lsn;
        self.log.open.change(key, OpenChange::Image(image));
        self.changed(idx, lsn);
    }

    fn apply_patch(&mut self, idx: PageIdx, key: PageKey, offset: u32, bytes: &Bytes, lsn: Lsn) {
        self.ctx.stats.patches += 1;
        self.ctx.stats.bytes_written += bytes.len() as u64;
        self.seal_older_image(idx);
        self.set_content(idx, offset as usize, bytes);
        match self.cache.table.pages[idx].image {
            // The page's image is written with this group: it holds the patch.
            Some(image) => {
                self.log.open.images[image.index()].lsn = lsn;
                self.log.open.change(key, OpenChange::Image(image));
            }
            None => self.log.open.change(key, OpenChange::Patch(offset, bytes)),
        }
        self.changed(idx, lsn);
    }

    fn apply_free(&mut self, idx: PageIdx, key: PageKey, lsn: Lsn) {
        self.ctx.stats.frees += 1;
        if self.cache.table.pages[idx].absent {
            return;
        }
        self.seal_older_image(idx);
        self.cache.table.set_frame(idx, None);
        self.set_absent(idx, true);
        if let Some(image) = self.cache.table.pages[idx].image.take() {
            self.log.open.images[image.index()].is_freed = true;
            self.reservations.dirty_blocks -= 1;
        }
        self.log.open.change(key, OpenChange::Free);
        self.changed(idx, lsn);
    }

    fn new_image(&mut self, idx: PageIdx, key: PageKey, lsn: Lsn) -> ImageIdx {
        let page = &self.cache.table.pages[idx];
        assert!(
            page.image.is_none() && page.frame.is_some(),
            "{key:?} gets an image, has {:?}, and is in memory: {}",
            page.image,
            page.frame.is_some()
        );
        let span = self.log.open.span();
        self.log.open.images.push(OpenImage { key, lsn, span, sealed: None, is_freed: false });
        self.reservations.dirty_blocks += 1;
        let image = ImageIdx::new(self.log.open.images.len() - 1);
        self.cache.table.pages[idx].image = Some(image);
        image
    }

    /// Keeps an image of an earlier span as it was: a recovered log may end between the two.
    fn seal_older_image(&mut self, idx: PageIdx) {
        let page = &mut self.cache.table.pages[idx];
        let Some(at) = page.image else { return };
        let span = self.log.open.span();
        let image = &mut self.log.open.images[at.index()];
        assert!(
            image.key == page.key && !image.is_freed,
            "{:?} has {at:?}, which is of {:?}, freed: {}",
            page.key,
            image.key,
            image.is_freed
        );
        if image.span != span {
            image.sealed = page.frame.as_ref().map(|f| f.pin());
            page.image = None;
        }
    }

    /// Writes `bytes` at `offset` of the page, into a new frame if the old one is pinned.
    pub(in crate::engine) fn set_content(&mut self, idx: PageIdx, offset: usize, bytes: &[u8]) {
        let whole = bytes.len() == BLOCK;
        let page = &mut self.cache.table.pages[idx];
        let range = offset..offset + bytes.len();
        assert!(range.end <= BLOCK, "{:?} is changed at {range:?}", page.key);
        if let Some(content) = page.frame.as_mut().and_then(|f| f.try_mut()) {
            content[range].copy_from_slice(bytes);
        } else {
            let mut frame = self.ctx.arena.alloc(0).expect("a frame for each change was admitted");
            let content = frame.try_mut().expect("a new frame has no pins");
            match &page.frame {
                _ if whole => {}
                Some(old) => content.copy_from_slice(old),
                None => content.fill(0),
            }
            content[range].copy_from_slice(bytes);
            self.cache.table.set_frame(idx, Some(frame));
        }
        self.set_absent(idx, false);
    }

    /// Whether the page is absent, and so will take no block.
    pub(in crate::engine) fn set_absent(&mut self, idx: PageIdx, absent: bool) {
        let page = &mut self.cache.table.pages[idx];
        if page.dirty_from.is_some() {
            self.space.freed_pages += u64::from(absent);
            self.space.freed_pages -= u64::from(page.absent);
        }
        page.absent = absent;
    }

    /// Records that the page has a new version: it must get to its place, and what waits for it is
    /// served.
    pub(in crate::engine) fn changed(&mut self, idx: PageIdx, lsn: Lsn) {
        let page = &mut self.cache.table.pages[idx];
        assert!(page.lsn <= lsn, "{:?} is at {:?}, and becomes {lsn:?}", page.key, page.lsn);
        page.lsn = lsn;
        let was_dirty = page.dirty_from.is_some();
        if !was_dirty {
            page.dirty_from = Some(lsn);
            self.reservations.dirty_blocks += 1;
            self.space.freed_pages += u64::from(page.absent);
        } else {
            self.ctx.stats.absorbed_writes += u64::from(page.image.is_none());
        }
        if !page.queued {
            page.queued = true;
            self.writeback.enqueue(idx);
        } else if !was_dirty {
            self.writeback.note_dirty();
        }
        self.writeback.note_activity(self.ctx.now);
        if self.dirty_pages_are_many() {
            self.ctx.need(Work::WriteBack);
        }
        self.cache.table.pages[idx].assert_state();
        self.wake_waiters(idx);
    }
}
