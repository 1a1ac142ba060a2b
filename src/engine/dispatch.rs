//! Dispatches requests of callers: each is checked, then answered at once or passed to the
//! component that it concerns.
//!
//! Invariants
//! 1. A request is answered exactly once: at once if it is refused or its pages are in memory.
//! 2. A read of cached pages makes no work for a turn.

mod check;

#[cfg(any(test, feature = "sim"))]
pub(super) use check::FREE_BYTES;

use super::Shard;
use super::cache::table::{Needs, Page};
use super::event::{Request, Response, Token};
use super::requests::{PendingKind, patched};
use super::watermark::Outcome;
use crate::base::PageIdx;
use crate::base::metrics::ShardStats;
use smallvec::SmallVec;

impl Shard {
    /// Whether more requests may be passed in; false is back-pressure.
    pub fn accepting(&self) -> bool {
        self.requests.pending.len() + self.coordinator.commits_count()
            < self.ctx.limits.requests_max
            && self.reservations.request_bytes < self.ctx.limits.request_bytes_max
            && self.reservations.holds_little()
            && !self.callers_are_behind()
    }

    /// Takes a request; its reply is an effect, of this or a later turn.
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
        match request {
            Request::Read(keys) => {
                let pages: SmallVec<[PageIdx; 2]> =
                    keys.iter().map(|key| self.cache.table.get(*key)).collect();
                let stored = |page: &Page| page.has(Needs::Bytes) && !page.absent;
                let hits = pages.iter().filter(|idx| stored(&self.cache.table.pages[**idx])).count()
                    as u32;
                self.begin(Some(token), PendingKind::Read(hits), pages, |_| true);
            }
            Request::Allocated(asked) => {
                self.begin_walk(token, asked);
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
                // Before the first commit of an epoch, that is the last commit of the recovered
                // state.
                let said = if upto < self.ctx.superblock.epoch_first_lsn {
                    self.redo.recovered_lsn
                } else {
                    upto
                };
                self.watermark.reply_when_durable(
                    &mut self.ctx,
                    &mut self.log,
                    awaited,
                    token,
                    Response::Flushed(said),
                    Outcome::Known,
                );
            }
            Request::WaitDurable(lsn) => self.watermark.reply_when_durable(
                &mut self.ctx,
                &mut self.log,
                lsn,
                token,
                Response::Durable,
                Outcome::Known,
            ),
            Request::Checkpoint => self.request_checkpoint(token),
            Request::Stats => {
                let stats = Box::new(self.counters());
                self.ctx.reply(token, Ok(Response::Stats(stats)));
            }
            Request::Close => self.request_close(token),
        }
    }

    /// Answers reads, and hands moves to compaction.
    pub(super) fn finish_ready(&mut self) {
        while let Some(waiter) = self.requests.next_finished() {
            match self.requests.pending[waiter].kind {
                PendingKind::Move(from, home) => self.move_ready(waiter, from, home),
                PendingKind::Walk => self.walk(waiter),
                _ => self.finish_read(waiter),
            }
        }
    }

    /// Counters, as of now.
    pub(super) fn counters(&mut self) -> ShardStats {
        let space = self.space.extents.space();
        self.ctx.stats.extents_total = space.total.into();
        self.ctx.stats.extents_free = space.free.into();
        self.ctx.stats.blocks_total = u64::from(space.total) * u64::from(space.data_blocks);
        self.ctx.stats.blocks_live = space.live_blocks;
        self.ctx.stats.blocks_dead = self.space.extents.pending_free_count() as u64;
        self.ctx.stats.extents_passed_over = self.space.extents.passed_over();
        self.ctx.stats.last_lsn = self.ctx.order.next().before().get();
        self.ctx.stats.durable_lsn = self.ctx.order.watermark().get();
        self.ctx.stats.clone()
    }
}
