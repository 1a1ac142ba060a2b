//! Requests under way: from arrival to the one reply that each gets.
//!
//! Invariants
//! 1. A pending request holds its pages (they stay in the table) until it is released, once.
//! 2. A request is `ready`/`finished` exactly once, when the last page that it needs is there or
//!    has failed.
//! 3. Replies that promise durability wait in `waiting`, ordered by LSN, for the watermark.

mod check;

#[cfg(any(test, feature = "sim"))]
pub(super) use check::FREE_BYTES;

use super::blocked::Held;
use super::budget::request_weight;
use super::cache::range_scan::Walk;
use super::cache::table::Page;
use super::event::{Commit, Request, Response, Token};
use super::redo::RedoChange;
use super::txn::participant::Part;
use super::{Change, Shard};
use crate::base::error::{Error, ErrorKind};
use crate::base::{BlockAddr, IndexedSlab, Lsn, PageIdx, PageKey, RequestIdx, ShardId};
use smallvec::SmallVec;
use std::cmp::Ordering;
use std::collections::VecDeque;

/// A request that waits for pages.
pub(super) struct Pending {
    pub token: Option<Token>,
    pub kind: PendingKind,
    /// Pages, in the order of the request: those read, then those changed.
    pub pages: SmallVec<[PageIdx; 2]>,
    missing: u32,
    /// Its place among those who ask for map nodes.
    pub asked: u64,
    /// Which of the pages must keep their bytes in memory, by bits.
    with_data: SmallVec<[u64; 1]>,
    /// How often a commit has given back what it had pinned, to wait for a map node.
    pub yields: u8,
    /// It waits at the head of the queue.
    pub stays: bool,
    /// Its part of `Held::request_bytes`.
    pub weight: u64,
    pub error: Option<Error>,
}

pub(super) enum PendingKind {
    /// So many of the pages were in memory.
    Read(u32),
    Walk(Box<Walk>),
    Commit(Commit),
    /// Of a commit over shards.
    Part(Box<Part>),
    Redo(Vec<RedoChange>),
    /// Compaction, of that shard, wants to move the page away from here.
    Move(BlockAddr, ShardId),
}

impl Pending {
    /// The commit, or the part of one.
    pub fn commit(&self) -> Option<&Commit> {
        match &self.kind {
            PendingKind::Commit(commit) => Some(commit),
            PendingKind::Part(part) => Some(&part.commit),
            _ => None,
        }
    }

    /// Whether a caller waits for it.
    pub fn is_own(&self) -> bool {
        matches!(self.kind, PendingKind::Read(_) | PendingKind::Walk(_) | PendingKind::Commit(_))
    }

    /// Whether it waits for a page or a node.
    pub fn is_waiting(&self) -> bool {
        self.missing > 0
    }

    fn needs_data(&self, i: usize) -> bool {
        self.with_data.get(i / 64).is_some_and(|bits| bits >> (i % 64) & 1 == 1)
    }

    /// How many of the pages are there because they were read.
    pub fn reads_count(&self) -> usize {
        self.commit().map_or(0, |commit| commit.reads.len())
    }
}

/// Which changes need the old bytes of their page.
pub(super) fn patched(changes: &[(PageKey, Change)]) -> Vec<bool> {
    changes.iter().map(|(_, change)| matches!(change, Change::Patch { .. })).collect()
}

/// The error for a commit that was on its way when the store stopped.
pub(super) fn outcome_unknown(lsn: Lsn, cause: &Error) -> Error {
    let context = format_args!(
        "whether commit {lsn} will be found is not known: {cause}; reopen the store and look"
    );
    Error::new(ErrorKind::OutcomeUnknown, context)
}

/// Requests under way in this shard, and those whose pages are all there.
pub(super) struct Requests {
    pub pending: IndexedSlab<RequestIdx, Pending>,
    /// Commits whose pages are all there, in the order in which they became so.
    pub ready: VecDeque<RequestIdx>,
    /// Parts of commits over shards whose pages are all there.
    pub ready_parts: VecDeque<RequestIdx>,
    /// Other requests whose pages are all there.
    pub finished: VecDeque<RequestIdx>,
    /// What requests keep from others.
    pub held: Held,
}

impl Requests {
    pub fn new(held: Held) -> Self {
        Requests {
            pending: IndexedSlab::default(),
            ready: VecDeque::new(),
            ready_parts: VecDeque::new(),
            finished: VecDeque::new(),
            held,
        }
    }
}

/// A reply that waits until everything up to `lsn` is durable.
pub(super) struct Waiting {
    lsn: Lsn,
    seq: u64,
    token: Token,
    response: Response,
    /// A commit: if the log fails, nobody knows whether it will be found.
    is_commit: bool,
}

impl Waiting {
    pub fn lsn(&self) -> Lsn {
        self.lsn
    }
}

impl PartialEq for Waiting {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}
impl Eq for Waiting {}
impl PartialOrd for Waiting {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Waiting {
    /// The lowest LSN is the greatest: the heap gives it first.
    fn cmp(&self, other: &Self) -> Ordering {
        (other.lsn, other.seq).cmp(&(self.lsn, self.seq))
    }
}

impl Shard {
    /// Brings a request; its reply comes as an effect, of this or a later turn.
    pub fn request(&mut self, token: Token, request: Request) {
        if let Err(error) = self.admit_request(&request) {
            self.ctx.reply(token, Err(error));
            return;
        }
        if let Request::Read(keys) = &request
            && let Some(pages) = self.cached(keys)
        {
            self.ctx.reply(token, Ok(Response::Pages(pages)));
            return;
        }
        self.ctx.work_pending = true;
        match request {
            Request::Read(keys) => {
                let pages: SmallVec<[PageIdx; 2]> =
                    keys.iter().map(|key| self.cache.table.get(*key)).collect();
                let stored = |page: &Page| page.has(true) && !page.absent;
                let hits = pages.iter().filter(|idx| stored(&self.cache.table.pages[**idx])).count()
                    as u32;
                self.begin(Some(token), PendingKind::Read(hits), pages, |_| true);
            }
            Request::Allocated(asked) => {
                let walk = self.begin_walk(asked);
                self.begin(Some(token), PendingKind::Walk(walk), SmallVec::new(), |_| false);
            }
            Request::Commit(commit) if !self.is_local(&commit) => {
                self.begin_coordinated(token, commit)
            }
            Request::Commit(commit) => {
                let pages = self.pages_of(&commit.reads, &commit.changes);
                let reads = commit.reads.len();
                let patched = patched(&commit.changes);
                self.begin(Some(token), PendingKind::Commit(commit), pages, |i| {
                    i >= reads && patched[i - reads]
                });
            }
            Request::Flush => {
                let upto = self.ctx.order.next().before();
                let own = self.log.bound() > upto
                    && upto > self.ctx.order.watermark()
                    && planted!(FlushForOwnShard);
                let awaited = if own { self.ctx.order.watermark() } else { upto };
                // Before the first commit of an epoch that is the last one of the state that was
                // found.
                let said = if upto < self.checkpoint.superblock.epoch_first_lsn {
                    self.redo.recovered_lsn
                } else {
                    upto
                };
                self.reply_when_durable(awaited, token, Response::Flushed(said), false);
            }
            Request::WaitDurable(lsn) => {
                self.reply_when_durable(lsn, token, Response::Durable, false)
            }
            Request::Checkpoint => self.request_checkpoint(token),
            Request::Stats => {
                let stats = Box::new(self.counters());
                self.ctx.reply(token, Ok(Response::Stats(stats)));
            }
            Request::Close => self.request_close(token),
        }
    }

    /// The pages of a commit: those read, then those changed. To have read one was the use, not to
    /// say so.
    pub(super) fn pages_of(
        &mut self,
        reads: &[(PageKey, Lsn)],
        changes: &[(PageKey, Change)],
    ) -> SmallVec<[PageIdx; 2]> {
        let mut pages: SmallVec<[PageIdx; 2]> =
            reads.iter().map(|(key, _)| self.cache.table.entry(*key)).collect();
        pages.extend(changes.iter().map(|(key, _)| self.cache.table.get(*key)));
        pages
    }

    /// Registers a request and asks for its pages; `data(i)` says whether page `i` is needed with
    /// its bytes.
    pub(super) fn begin(
        &mut self,
        token: Option<Token>,
        kind: PendingKind,
        pages: SmallVec<[PageIdx; 2]>,
        data: impl Fn(usize) -> bool,
    ) -> RequestIdx {
        let weight = request_weight(&kind, pages.len());
        self.requests.held.request_bytes += weight;
        let (mut with_data, mut bits): (SmallVec<[u64; 1]>, u64) = (SmallVec::new(), 0);
        for (i, idx) in pages.iter().enumerate() {
            if i > 0 && i % 64 == 0 {
                with_data.push(std::mem::take(&mut bits));
            }
            self.cache.table.pages[*idx].holds += 1;
            if data(i) {
                bits |= 1 << (i % 64);
                self.cache.table.hold_bytes(*idx);
                self.requests.held.data += 1;
            }
        }
        with_data.push(bits);
        let count = pages.len();
        let pending = Pending {
            token,
            kind,
            pages,
            missing: 1,
            asked: 0,
            with_data,
            yields: 0,
            stays: false,
            weight,
            error: None,
        };
        let waiter = self.requests.pending.insert(pending);
        for i in 0..count {
            // It stays until the last one has been asked for: `missing` counts one more until then.
            let idx = self.requests.pending[waiter].pages[i];
            if !self.want_quiet(idx, data(i), waiter) {
                self.requests.pending[waiter].missing += 1;
            }
        }
        // The one that stood for "not all asked yet".
        self.need_met(waiter, None);
        waiter
    }

    /// As `want`, but counts before it asks: the answer may come at once.
    fn want_quiet(&mut self, idx: PageIdx, data: bool, waiter: RequestIdx) -> bool {
        self.requests.pending[waiter].missing += 1;
        let has = self.want(idx, data, waiter);
        self.requests.pending[waiter].missing -= 1;
        has
    }

    /// One thing that the request waited for is there, or has failed.
    pub(super) fn need_met(&mut self, waiter: RequestIdx, error: Option<Error>) {
        let pending = &mut self.requests.pending[waiter];
        if error.is_some() {
            pending.error = error;
        }
        pending.missing -= 1;
        if pending.missing == 0 {
            self.ctx.work_pending = true;
            match pending.kind {
                PendingKind::Commit(_) if pending.stays => {}
                PendingKind::Commit(_) | PendingKind::Redo(_) => {
                    self.requests.ready.push_back(waiter)
                }
                PendingKind::Part(_) => self.requests.ready_parts.push_back(waiter),
                PendingKind::Read(_) | PendingKind::Walk(_) | PendingKind::Move(..) => {
                    self.requests.finished.push_back(waiter)
                }
            }
        }
    }

    /// A ready request must wait for one more thing.
    pub(super) fn need_more(&mut self, waiter: RequestIdx) {
        self.requests.pending[waiter].missing += 1;
    }

    /// Ends a request: its pages may go, and those without memory are gone from the table
    /// afterwards.
    pub(super) fn release(&mut self, waiter: RequestIdx) -> Pending {
        let pending = self.requests.pending.remove(waiter);
        self.requests.held.request_bytes -= pending.weight;
        self.requests.held.moves -= usize::from(matches!(pending.kind, PendingKind::Move(..)));
        for (i, idx) in pending.pages.iter().enumerate() {
            self.cache.table.pages[*idx].holds -= 1;
            if pending.needs_data(i) {
                self.cache.table.let_bytes_go(*idx);
                self.requests.held.data -= 1;
            }
            self.unpin_if_clean(*idx);
        }
        pending
    }

    /// Answers reads, and hands moves to compaction.
    pub(super) fn finish_ready(&mut self) {
        while let Some(waiter) = self.requests.finished.pop_front() {
            match self.requests.pending[waiter].kind {
                PendingKind::Move(from, owner) => self.move_ready(waiter, from, owner),
                PendingKind::Walk(_) => self.walk(waiter),
                _ => self.finish_read(waiter),
            }
        }
    }

    /// Replies now or when `lsn` is durable.
    pub(super) fn reply_when_durable(
        &mut self,
        lsn: Lsn,
        token: Token,
        response: Response,
        is_commit: bool,
    ) {
        if lsn <= self.ctx.order.watermark() {
            self.ctx.reply(token, Ok(response));
            return;
        }
        self.log.open.urgent = true;
        self.watermark.wanted = self.watermark.wanted.max(lsn);
        self.ctx.work_pending = true;
        self.watermark.replies_seq += 1;
        self.watermark.replies.push(Waiting {
            lsn,
            seq: self.watermark.replies_seq,
            token,
            response,
            is_commit,
        });
    }

    /// The watermark has advanced.
    pub(super) fn acknowledge(&mut self) {
        let watermark = self.ctx.order.watermark();
        while self.watermark.replies.peek().is_some_and(|w| w.lsn <= watermark) {
            if let Some(w) = self.watermark.replies.pop() {
                self.ctx.reply(w.token, Ok(w.response));
            }
        }
    }

    /// Ends everything that waits for durability: it will not come any more.
    pub(super) fn fail_writers(&mut self, cause: &Error) {
        let stopped = self.ctx.failed.clone().expect("called when failed");
        for w in std::mem::take(&mut self.watermark.replies) {
            let error = if w.is_commit { outcome_unknown(w.lsn, cause) } else { stopped.clone() };
            self.ctx.reply(w.token, Err(error));
        }
        self.fail_coordinated(cause, &stopped);
        self.drop_parts();
        self.fail_checkpoint(&stopped);
        self.ctx.work_pending = true;
    }
}
