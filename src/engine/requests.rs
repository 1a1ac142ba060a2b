//! Requests in progress: from arrival to the one reply that each gets.
//!
//! Invariants
//! 1. A pending request is in exactly one queue once everything that it needs is there or has
//!    failed, and in none before.
//! 2. It ends when the cache releases its pages (see `cache::holds`); the step that releases it
//!    answers it.
//!
//! It knows neither pages nor commits: what a request waits for is counted, not named.

use super::Change;
use super::context::Context;
use super::event::{Commit, Token};
use super::log::PartRef;
use super::reservations::Reserved;
use crate::base::error::Error;
use crate::base::{BlockAddr, IndexedSlab, Micros, PageIdx, PageKey, RequestIdx, ShardId};
use crate::engine::Work;
use smallvec::SmallVec;
use std::collections::VecDeque;

/// A request that waits for pages.
pub(super) struct Pending {
    pub token: Option<Token>,
    pub kind: PendingKind,
    /// Its pages, in the order of the request: those read, then those changed.
    pub pages: SmallVec<[PageIdx; 2]>,
    missing: u32,
    /// Its age among the requests that need map nodes.
    pub asked: u64,
    /// A bit for each page: whether its bytes must stay in memory.
    with_data: SmallVec<[u64; 1]>,
    /// How often a commit has given back what it had pinned, to wait for a map node.
    pub yields: u8,
    /// Whether it waits at the head of the queue.
    pub stays: bool,
    /// Its part of `Reservations::request_bytes`.
    pub weight: u64,
    pub error: Option<Error>,
}

pub(super) enum PendingKind {
    /// The number of its pages that were in memory.
    Read(u32),
    /// The cache has its state.
    Walk,
    Commit(Commit),
    /// A part of a commit over shards.
    Part(Box<Part>),
    /// A batch of changes; the redo has them.
    Redo,
    /// The compaction of that shard needs the page moved away from here.
    Move(BlockAddr, ShardId),
}

/// A part in the table of requests.
pub(super) struct Part {
    pub of: PartRef,
    pub commit: Commit,
    pub owner_logs: bool,
    /// When the commit was first requested.
    pub since: Micros,
    /// The reservation of a `Yes` vote.
    pub reserved: Option<Reserved>,
}

impl Pending {
    /// Panics if the state of the request contradicts itself: it would be carried out without a
    /// page that it needs, or never be answered.
    fn assert_state(&self) {
        let pages = self.pages.len();
        assert!(
            self.token.is_some() == self.is_own(),
            "a caller waits for {:?}, and {pages} pages are for a caller: {}",
            self.token,
            self.is_own()
        );
        assert!(
            self.with_data.len() == pages.div_ceil(64).max(1),
            "{pages} pages, and {} words say which of them must keep their bytes",
            self.with_data.len()
        );
        let is_commit = matches!(self.kind, PendingKind::Commit(_));
        assert!(
            is_commit || !self.stays,
            "a request of {pages} pages stays in the queue of commits, and is none"
        );
        if let Some(commit) = self.commit() {
            let (reads, changes) = (commit.reads.len(), commit.changes.len());
            assert!(
                pages == reads + changes,
                "a commit of {reads} reads and {changes} changes has {pages} pages"
            );
        }
    }

    /// The commit, or the part of a commit.
    pub fn commit(&self) -> Option<&Commit> {
        match &self.kind {
            PendingKind::Commit(commit) => Some(commit),
            PendingKind::Part(part) => Some(&part.commit),
            _ => None,
        }
    }

    /// Whether a caller waits for it.
    pub fn is_own(&self) -> bool {
        matches!(self.kind, PendingKind::Read(_) | PendingKind::Walk | PendingKind::Commit(_))
    }

    /// Whether it waits for a page or a node.
    pub fn is_waiting(&self) -> bool {
        self.missing > 0
    }

    pub fn needs_data(&self, i: usize) -> bool {
        self.with_data.get(i / 64).is_some_and(|bits| bits >> (i % 64) & 1 == 1)
    }

    /// How many of the pages the request reads.
    pub fn reads_count(&self) -> usize {
        self.commit().map_or(0, |commit| commit.reads.len())
    }
}

/// Which changes need the old bytes of their page.
pub(super) fn patched(changes: &[(PageKey, Change)]) -> Vec<bool> {
    changes.iter().map(|(_, change)| matches!(change, Change::Patch { .. })).collect()
}

/// The requests in progress in this shard, and the queues of those whose pages are all there.
pub(super) struct Requests {
    pub pending: IndexedSlab<RequestIdx, Pending>,
    /// Commits whose pages are all there, in the order in which they became so.
    ready: VecDeque<RequestIdx>,
    /// Parts of commits over shards whose pages are all there.
    ready_parts: VecDeque<RequestIdx>,
    /// The batch of a redo whose pages are all there.
    ready_redo: Option<RequestIdx>,
    /// Other requests whose pages are all there.
    finished: VecDeque<RequestIdx>,
}

impl Requests {
    pub fn new() -> Self {
        Requests {
            pending: IndexedSlab::default(),
            ready: VecDeque::new(),
            ready_parts: VecDeque::new(),
            finished: VecDeque::new(),
            ready_redo: None,
        }
    }

    /// Registers a request that needs `pages`, those of `with_data` with their bytes. One need
    /// stays open until the caller has requested all of them and calls
    /// [`need_met`](Self::need_met).
    pub fn begin(
        &mut self,
        token: Option<Token>,
        kind: PendingKind,
        pages: SmallVec<[PageIdx; 2]>,
        with_data: SmallVec<[u64; 1]>,
        weight: u64,
    ) -> RequestIdx {
        self.pending.insert(Pending {
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
        })
    }

    /// The first commit whose pages are all there.
    pub fn first_ready(&self) -> Option<RequestIdx> {
        self.ready.front().copied()
    }

    /// Takes the first commit whose pages are all there out of the queue.
    pub fn take_ready(&mut self) {
        assert!(self.ready.pop_front().is_some(), "no commit is ready");
    }

    /// The next part of a commit over shards whose pages are all there.
    pub fn next_ready_part(&mut self) -> Option<RequestIdx> {
        self.ready_parts.pop_front()
    }

    /// The batch of a redo whose pages are all there.
    pub fn ready_redo(&self) -> Option<RequestIdx> {
        self.ready_redo
    }

    /// Takes that batch out of its slot: it has ended, or waits for something.
    pub fn take_ready_redo(&mut self) -> Option<RequestIdx> {
        self.ready_redo.take()
    }

    /// The next of the other requests whose pages are all there.
    pub fn next_finished(&mut self) -> Option<RequestIdx> {
        self.finished.pop_front()
    }

    /// Commits, parts and batches whose pages are all there, and other requests.
    pub fn queued(&self) -> (usize, usize) {
        let commits = self.ready.len() + self.ready_parts.len();
        (commits + usize::from(self.ready_redo.is_some()), self.finished.len())
    }

    /// Records that a request must wait for one more thing.
    pub fn need_more(&mut self, waiter: RequestIdx) {
        self.pending[waiter].missing += 1;
    }

    /// Records that one thing that the request waited for is there, or has failed.
    pub fn need_met(&mut self, waiter: RequestIdx, error: Option<Error>, ctx: &mut Context) {
        let pending = &mut self.pending[waiter];
        assert!(pending.missing > 0, "{waiter:?} got something, and waited for nothing");
        if error.is_some() {
            pending.error = error;
        }
        pending.missing -= 1;
        if pending.missing > 0 {
            return;
        }
        pending.assert_state();
        match pending.kind {
            PendingKind::Commit(_) => {
                if !pending.stays {
                    self.ready.push_back(waiter);
                }
                ctx.need(Work::Commits);
            }
            PendingKind::Part(_) => {
                self.ready_parts.push_back(waiter);
                ctx.need(Work::Parts);
            }
            PendingKind::Redo => {
                ctx.need(Work::Redo);
                let before = self.ready_redo.replace(waiter);
                assert!(before.is_none(), "one batch is redone at a time");
            }
            PendingKind::Read(_) | PendingKind::Walk | PendingKind::Move(..) => {
                self.finished.push_back(waiter);
                ctx.need(Work::Finished);
            }
        }
    }
}
