//! One core's share of the store, as a state machine without I/O, clock or randomness: events in, effects out.
//!
//! ```text
//! request --> pages (resolve, load) --> commits (validate, admit, draw, apply) --> open group
//!      \--> cross (ask all shards, draw) <--messages--> part (hold, vote, apply) ------^   |close
//!       reply <-- watermark <-- flush <-- log write, pages straight to their places <--+
//!   dirty pages --> write-back (window, sorted, merged) --> places --> page map --> checkpoint --> superblock
//! ```
//! Invariants
//! 1. Everything happens in [`Shard::turn`] and [`Shard::complete`]; between two calls nothing changes.
//! 2. No effect of a commit leaves the shard before its LSN is drawn.
//! 3. A durable reply leaves only when the watermark has reached the commit.
//! 4. After the first failed write or flush nothing is acknowledged any more (`failed`), and nothing more is written.
//! 5. Every queue is bounded: [`Shard::accepting`] says when to stop bringing requests.
//!
//! It names no file system, ring, clock, thread or random source: drivers and the simulator do.

mod admission;
mod allocated;
#[cfg(any(test, feature = "sim"))]
mod audit;
mod blocked;
mod budget;
mod cache;
mod checkpoint;
pub(crate) mod coalesce;
pub(crate) mod commit;
mod commits;
mod compaction;
mod context;
mod cross;
mod event;
mod eviction;
mod groups;
mod holds;
mod lead;
mod life;
pub(crate) mod log;
pub(crate) mod map;
#[cfg(test)]
mod memory_tests;
mod message;
#[cfg(any(test, feature = "sim"))]
#[cfg_attr(not(test), allow(dead_code, reason = "some of it serves the unit tests only"))]
pub(crate) mod observe;
mod order;
#[cfg(test)]
mod overwrite_tests;
mod pages;
mod part;
mod pins;
mod precedence;
mod reads;
pub(crate) mod recovery;
mod redo;
mod requests;
mod setup;
mod space;
#[cfg(any(test, fuzzing))]
mod together;
mod whereabouts;
mod writeback;

pub use allocated::PageRange;
pub(crate) use budget::request_bytes;
pub(crate) use checkpoint::NewEpoch;
pub(crate) use commits::LSN_AHEAD_MAX;
pub use event::{Change, Commit, Effect, PageRef, Request, Response, Token};
pub use message::Message;
pub(crate) use pins::{Pins, Taken};
pub(crate) use redo::Recovering;
pub(crate) use setup::Setup;
#[cfg(any(test, fuzzing))]
pub(crate) use together::Together;

use crate::base::error::{Error, ErrorKind};
use crate::base::metrics::ShardStats;
use crate::base::{Deal, ExtentNo, Lsn, Micros, ShardId};
use crate::engine::log::{FlushSet, Log};
use crate::engine::map::Map;
use crate::io::{Completion, DiskOp};
use blocked::{Lack, MEMORY_RETRY_US, Step};
use cache::PageCache;
use checkpoint::Checkpoint;
use compaction::Compaction;
use context::Context;
use cross::Coordinator;
use lead::Lead;
use life::Life;
use order::WatermarkWaiters;
use part::Participant;
use reads::{NodeWaiter, NodeWanted, PageRead};
use redo::Redo;
use requests::Requests;
use space::{Growth, Space};
use writeback::WriteBack;

/// What an operation under way is for.
enum OpKind {
    /// Pages, and `None` for what lies between them.
    PageRead(Vec<Option<PageRead>>),
    NodeRead(NodeWanted),
    /// The log write of a group.
    GroupLog(u64),
    /// Pages of a group, straight to their places.
    GroupData(u64, Vec<usize>),
    /// The flush of some groups.
    GroupFlush(FlushSet),
    /// Dirty pages to their places.
    PageWrite(Vec<usize>),
    SummaryWrite(ExtentNo),
    SummaryRead(ExtentNo),
    /// A step of the checkpoint.
    Checkpoint,
    /// More data space.
    Grow(Growth),
    /// Some blocks of a log group that is redone, from this one on.
    RedoRead(usize),
}

/// One shard. See the module's documentation.
pub struct Shard {
    ctx: Context,
    cache: PageCache,
    map: Map,
    space: Space,
    log: Log,
    requests: Requests,
    coordinator: Coordinator,
    participant: Participant,
    watermark: WatermarkWaiters,
    writeback: WriteBack,
    compaction: Compaction,
    checkpoint: Checkpoint,
    lead: Lead,
    redo: Redo,
    life: Life,
}

impl Shard {
    /// Advances everything as far as it goes without a completion; afterwards drain
    /// [`next_effect`](Self::next_effect).
    pub fn turn(&mut self, now: Micros) {
        self.ctx.now = self.ctx.now.max(now);
        self.note_watermark();
        self.settle_behind_nodes();
        for _ in 0..16 {
            self.ctx.again = false;
            self.ctx.blocked.begin_lap();
            self.deliver_to_self();
            self.finish_ready();
            self.run_parts();
            self.run_commits();
            self.retry_cross();
            self.decide();
            self.advance_groups();
            self.write_back();
            self.advance_lead();
            self.advance_checkpoint();
            self.advance_redo();
            self.advance_space();
            self.advance_compaction();
            self.advance_moves();
            self.write_summaries();
            self.submit_reads();
            self.advance_close();
            if !self.ctx.again {
                break;
            }
        }
        self.relieve_memory();
        self.nudge_others();
    }

    fn deliver_to_self(&mut self) {
        while let Some(message) = self.ctx.loopback.pop_front() {
            self.message(self.ctx.id, message);
        }
    }

    /// The next thing to be done, if any.
    pub fn next_effect(&mut self) -> Option<Effect> {
        self.ctx.effects.pop_front()
    }

    /// When `turn` should be called at the latest if nothing arrives; `None`: not before something does.
    pub fn deadline(&self) -> Option<Micros> {
        if self.ctx.again {
            return Some(self.ctx.now);
        }
        let window = self.ctx.limits.coalesce_window_us;
        // A group that may not go before a write completes needs no turn before that: a deadline in the past would
        // make the driver spin.
        let may_go = !self.log.open.is_empty() && self.log.in_flight.len() < self.ctx.limits.log_writes_max;
        let group = may_go.then(|| self.log.open.opened_at + window);
        let pages =
            self.may_write_back().then(|| self.writeback.dirty_since.max(self.ctx.now.saturating_sub(window)) + window);
        let growth = self.space.stalled.then_some(self.ctx.now + space::GROW_RETRY_US);
        // Memory that readers give back says nothing: whoever waits for it has to look.
        let memory = self.ctx.blocked.lacks_memory().then_some(self.ctx.now + MEMORY_RETRY_US);
        if self.ctx.failed.is_some() {
            // Reads go on after a failure, and wait for memory as before.
            return memory;
        }
        let next = [group, pages, growth, memory, self.next_retry(), self.front_ends()].into_iter().flatten().min()?;
        Some(next.max(self.ctx.now + 1))
    }

    /// Whether `Close` has been carried out.
    pub fn is_closed(&self) -> bool {
        self.life.closed
    }

    /// Brings the end of an operation.
    pub fn complete(&mut self, completion: Completion) {
        let kind = self.ctx.ops.remove(completion.id.0 as usize);
        match kind {
            OpKind::PageRead(reads) => self.pages_read(reads, completion),
            OpKind::NodeRead(wanted) => self.node_read(wanted, completion),
            OpKind::GroupLog(number) => self.group_written(number, completion.result),
            OpKind::GroupData(number, captures) => {
                let ok = completion.result.is_ok();
                self.group_written(number, completion.result);
                if ok {
                    self.captures_written(captures);
                }
            }
            OpKind::GroupFlush(set) => self.group_flushed(set, completion.result),
            OpKind::PageWrite(captures) => {
                self.writeback.page_writes -= captures.len();
                match completion.result {
                    Ok(()) => self.captures_written(captures),
                    Err(error) => self.fail(error),
                }
            }
            OpKind::SummaryWrite(extent) => {
                self.space.summaries_under_way -= 1;
                match completion.result {
                    Ok(()) => self.space.extents.summary_written(extent),
                    Err(error) => self.fail(error),
                }
            }
            OpKind::SummaryRead(extent) => self.summary_read(extent, completion),
            OpKind::Checkpoint => self.checkpoint_step_done(completion),
            OpKind::Grow(growth) => self.grown(growth, completion.result),
            OpKind::RedoRead(at) => self.redo_read(at, completion),
        }
    }

    /// Which shard owns which page.
    pub(crate) fn deal(&self) -> Deal {
        self.ctx.deal
    }

    /// A message from another shard.
    pub fn message(&mut self, from: ShardId, message: Message) {
        self.ctx.again = true;
        match message {
            Message::Prepare(txn, ask) => self.prepare(from, txn, *ask),
            Message::Vote(txn, vote) => self.voted(from, txn, vote),
            Message::Decide(txn, decision) => self.decided(from, txn, decision),
            Message::Applied(txn) => self.part_applied(txn),
            Message::Durable(txn) => self.part_durable(txn),
            Message::Nudge(upto) => self.nudged(upto),
            Message::Failed(error) => self.stop(error),
            Message::WantCheckpoint => self.checkpoint_wanted(),
            Message::Begin(begin) => self.begin_checkpoint(begin),
            Message::Began => self.shard_began(),
            Message::Redo(redo) => self.redo_lsn_chosen(redo),
            Message::Captured(handover) => self.handed_over(*handover),
            Message::Ready(contribution) => self.shard_ready(from, *contribution),
            Message::Done(superblock) => self.end_checkpoint(*superblock),
            Message::Redone => self.shard_redone(),
            Message::Quiesce => self.quiesce(),
            Message::Quiet => self.shard_quiet(),
            Message::WantSpace(beyond) => self.space_wanted_by(from, beyond),
            Message::Granted(extents) => self.space_granted(extents),
            Message::Denied => self.space_denied(),
            Message::Spare(urgent) => self.spare_space(from, urgent),
            Message::Move(what, place) => self.move_asked(from, what, place),
            Message::Moved(place, error) => self.moved(from, place, error),
        }
    }

    /// Whether opening is over: requests may come. Until then it only needs turns, completions and messages.
    pub fn is_open(&self) -> bool {
        !self.life.opening
    }

    /// The lowest LSN for whose durability something here waits: when the watermark reaches it, a turn is due even if
    /// nothing has arrived. `None`: nothing waits.
    pub fn waits_for(&self) -> Option<Lsn> {
        let page = self.writeback.unsettled.peek().map(|unsettled| unsettled.lsn());
        let reply = self.watermark.replies.peek().map(|waiting| waiting.lsn()).filter(|_| !planted!(NobodyWoken));
        // A shard that has stopped writes nothing more: for those it would be woken again and again.
        let writes = [self.checkpoint.waits_for(), self.watermark.dirty_stuck, self.ctx.blocked.awaited_lsn()]
            .map(|lsn| lsn.filter(|_| self.ctx.failed.is_none()));
        [page, reply].into_iter().chain(writes).flatten().min()
    }

    /// What one commit may count at most.
    pub(crate) fn txn_bytes_max(&self) -> u64 {
        self.ctx.limits.txn_bytes_max
    }

    /// What is in memory, in words.
    fn memory(&self) -> String {
        let (resident, pages) = (self.cache.table.resident(), self.cache.table.pages.len());
        let (in_readers_hands, counts) = (self.cache.eviction.pinned(), self.cache.eviction.counts());
        let (nodes, dirty) = (self.map.nodes_count(), self.map.dirty_count());
        format!(
            "{} of {pages} pages with their bytes, {} of them needed by requests, {in_readers_hands} pinned by readers when last \
             seen, {nodes} nodes, {dirty} of them dirty, {counts:?}",
            resident.pages, resident.held
        )
    }

    /// Why it stopped, if it did.
    pub(crate) fn failure(&self) -> Option<Error> {
        self.life.open_error.clone().or_else(|| self.ctx.failed.clone())
    }

    /// Operations under way.
    pub(crate) fn ops_under_way(&self) -> usize {
        self.ctx.ops.len()
    }

    fn submit(&mut self, kind: OpKind, op: DiskOp) {
        self.count_read(&kind);
        self.ctx.submit(kind, op);
    }

    /// A write or a flush failed: nothing is acknowledged from now on, by any shard.
    fn fail(&mut self, error: Error) {
        if self.ctx.failed.is_some() {
            return;
        }
        tracing::error!(shard = self.ctx.id.get(), %error, "the store stops writing; reopen it");
        for shard in self.ctx.deal.others(self.ctx.id) {
            self.ctx.send(shard, Message::Failed(error.clone()));
        }
        self.stop(error);
    }

    /// This or another shard has failed.
    fn stop(&mut self, error: Error) {
        if self.ctx.failed.is_some() {
            return;
        }
        let stopped = Error::new(
            ErrorKind::Closed,
            format_args!("the store has stopped writing after a failure ({error}); reopen it to recover"),
        );
        self.ctx.failed = Some(stopped);
        // No part is voted for any more, and reads go on.
        self.ctx.blocked.in_front = None;
        if self.life.opening {
            self.life.open_error.get_or_insert_with(|| error.clone());
        }
        self.fail_writers(&error);
    }

    /// Counters, as of now.
    fn counters(&mut self) -> ShardStats {
        let space = self.space.extents.space();
        self.ctx.stats.extents_total = space.total.into();
        self.ctx.stats.extents_free = space.free.into();
        self.ctx.stats.blocks_total = u64::from(space.total) * u64::from(space.data_blocks);
        self.ctx.stats.blocks_live = space.live_blocks;
        self.ctx.stats.blocks_dead = self.space.extents.left_count() as u64;
        self.ctx.stats.extents_passed_over = self.space.extents.passed_over();
        self.ctx.stats.last_lsn = self.ctx.order.next().before().get();
        self.ctx.stats.durable_lsn = self.ctx.order.watermark().get();
        self.ctx.stats.clone()
    }
}
