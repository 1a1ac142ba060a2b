//! One shard: events in, effects out. It owns its components and says in which order they go on.

use super::blocked::MEMORY_RETRY_US;
use super::cache::{NodeWanted, PageCache, PageRead};
use super::checkpoint::Checkpoint;
use super::checkpoint::leader::Leader;
use super::context::Context;
use super::life::Life;
use super::log::{FlushSet, Log};
use super::map::Map;
use super::redo::Redo;
use super::requests::Requests;
use super::space::compaction::Compaction;
use super::space::{Growth, Space};
use super::txn::coordinator::Coordinator;
use super::txn::participant::Participant;
use super::watermark::WatermarkWaiters;
use super::writeback::WriteBack;
use super::{Effect, Message, space};
use crate::base::error::{Error, ErrorKind};
use crate::base::metrics::ShardStats;
use crate::base::{ExtentNo, Lsn, Micros, OpIdx, PageVersionIdx, ShardId, ShardMap};
use crate::io::{Completion, DiskOp};

/// What an operation under way is for.
pub(super) enum OpKind {
    /// Pages, and `None` for what lies between them.
    PageRead(Vec<Option<PageRead>>),
    NodeRead(NodeWanted),
    /// The log write of a group.
    GroupLog(u64),
    /// Pages of a group, straight to their places.
    GroupData(u64, Vec<PageVersionIdx>),
    /// The flush of some groups.
    GroupFlush(FlushSet),
    /// Dirty pages to their places.
    PageWrite(Vec<PageVersionIdx>),
    SummaryWrite(ExtentNo),
    SummaryRead(ExtentNo),
    /// A step of the checkpoint.
    Checkpoint,
    /// More data space.
    Grow(Growth),
    /// A segment by which the log gets longer.
    LogSegment,
    /// Some blocks of a log group that is redone, from this one on.
    RedoRead(usize),
}

/// Laps of a turn at most: what is left then is gone on with in the next turn, which is due at
/// once.
const LAPS_MAX: u32 = 16;

/// A step of a turn.
type TurnStep = fn(&mut Shard);

/// The steps of a lap in their order, and why they stand there. Each finds its own work; one that
/// makes work for a step before it sets `Context::work_pending`, and another lap follows.
const STEPS: [(TurnStep, &str); 17] = [
    (
        Shard::deliver_to_self,
        "messages to itself are what other shards' messages are, and come before requests",
    ),
    (Shard::finish_ready, "reads need nothing from the steps below, and give back what they hold"),
    (
        Shard::run_parts,
        "votes before commits: a part that was promised room must not find it taken by the same \
         lap",
    ),
    (Shard::run_commits, "draws LSNs and fills the open group"),
    (Shard::retry_coordinated, "asks again, also those that the commits above were in the way of"),
    (Shard::decide, "after the commits, so that one group takes both"),
    (Shard::advance_groups, "closes the group with all that was drawn above"),
    (
        Shard::write_back,
        "after the groups: a page that went to its place with one is dirty no more",
    ),
    (Shard::advance_leader, "the leader's step makes messages for the checkpoint below"),
    (Shard::advance_checkpoint, "sees the pages and groups of this lap"),
    (Shard::advance_redo, "while a store opens: commits of the log, for the next lap"),
    (Shard::advance_space, "knows what the steps above want"),
    (Shard::advance_compaction, "chooses extents with what is free now"),
    (Shard::advance_moves, "what compaction asks for, here and elsewhere"),
    (Shard::write_summaries, "of extents that the steps above have filled"),
    (Shard::submit_reads, "last of what takes memory: writes give it back, reads only take it"),
    (Shard::advance_close, "nothing is under way any more, or it is not the time to close"),
];

/// One shard. See the module's documentation.
pub struct Shard {
    pub(super) ctx: Context,
    pub(super) cache: PageCache,
    pub(super) map: Map,
    pub(super) space: Space,
    pub(super) log: Log,
    pub(super) requests: Requests,
    pub(super) coordinator: Coordinator,
    pub(super) participant: Participant,
    pub(super) watermark: WatermarkWaiters,
    pub(super) writeback: WriteBack,
    pub(super) compaction: Compaction,
    pub(super) checkpoint: Checkpoint,
    pub(super) leader: Leader,
    pub(super) redo: Redo,
    pub(super) life: Life,
}

impl Shard {
    /// Advances everything as far as it goes without a completion; afterwards drain
    /// [`next_effect`](Self::next_effect). Without work it costs a look at the watermark: a read of
    /// cached pages makes none.
    pub fn turn(&mut self, now: Micros) {
        self.ctx.now = self.ctx.now.max(now);
        self.note_watermark();
        if !self.ctx.work_pending && self.ctx.due.is_none_or(|due| self.ctx.now < due) {
            return;
        }
        self.publish_behind_nodes();
        for _ in 0..LAPS_MAX {
            self.ctx.work_pending = false;
            self.ctx.blocked.begin_lap();
            for (step, _) in STEPS {
                step(self);
            }
            if !self.ctx.work_pending {
                break;
            }
        }
        self.relieve_memory();
        self.request_flush_of_others();
        self.ctx.due = self.next_due();
    }

    pub(super) fn deliver_to_self(&mut self) {
        while let Some(message) = self.ctx.loopback.pop_front() {
            self.message(self.ctx.id, message);
        }
    }

    /// The next thing to be done, if any.
    pub fn next_effect(&mut self) -> Option<Effect> {
        self.ctx.effects.pop_front()
    }

    /// When `turn` should be called at the latest if nothing arrives; `None`: not before something
    /// does.
    pub fn deadline(&self) -> Option<Micros> {
        if self.ctx.work_pending { Some(self.ctx.now) } else { self.ctx.due }
    }

    /// The same, worked out anew.
    pub(super) fn next_due(&self) -> Option<Micros> {
        if self.ctx.work_pending {
            return Some(self.ctx.now);
        }
        let window = self.ctx.limits.coalesce_window_us;
        // A group that may not go before a write completes needs no turn before that: a deadline in
        // the past would make the driver spin.
        let may_go =
            !self.log.open.is_empty() && self.log.in_flight.len() < self.ctx.limits.log_writes_max;
        let group = may_go.then(|| self.log.open.opened_at + window);
        let pages = self
            .may_write_back()
            .then(|| self.writeback.dirty_since.max(self.ctx.now.saturating_sub(window)) + window);
        let growth = self.space.stalled.then_some(self.ctx.now + space::GROW_RETRY_US);
        // Memory that readers give back says nothing: whoever waits for it has to look.
        let memory = self.ctx.blocked.lacks_memory().then_some(self.ctx.now + MEMORY_RETRY_US);
        if self.ctx.failed.is_some() {
            // Reads go on after a failure, and wait for memory as before.
            return memory;
        }
        let next = [group, pages, growth, memory, self.next_retry(), self.front_ends()]
            .into_iter()
            .flatten()
            .min()?;
        Some(next.max(self.ctx.now + 1))
    }

    /// Whether `Close` has been carried out.
    pub fn is_closed(&self) -> bool {
        self.life.closed
    }

    /// Brings the end of an operation.
    pub fn complete(&mut self, completion: Completion) {
        self.ctx.work_pending = true;
        let kind = self.ctx.ops.remove(OpIdx::new(completion.id.0 as usize));
        match kind {
            OpKind::PageRead(reads) => self.pages_read(reads, completion),
            OpKind::NodeRead(wanted) => self.node_read(wanted, completion),
            OpKind::GroupLog(number) => self.group_written(number, completion.result),
            OpKind::GroupData(number, versions) => {
                let ok = completion.result.is_ok();
                self.group_written(number, completion.result);
                if ok {
                    self.versions_written(versions);
                }
            }
            OpKind::GroupFlush(set) => self.group_flushed(set, completion.result),
            OpKind::PageWrite(versions) => {
                self.writeback.page_writes -= versions.len();
                match completion.result {
                    Ok(()) => self.versions_written(versions),
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
            OpKind::LogSegment => self.segment_made(completion.result),
            OpKind::RedoRead(at) => self.redo_read(at, completion),
        }
    }

    /// Which shard owns which page.
    pub(crate) fn shard_map(&self) -> ShardMap {
        self.ctx.shard_map
    }

    /// A message from another shard.
    pub fn message(&mut self, from: ShardId, message: Message) {
        self.ctx.work_pending = true;
        match message {
            Message::Prepare(txn, ask) => self.prepare(from, txn, *ask),
            Message::Vote(txn, vote) => self.voted(from, txn, vote),
            Message::Decide(txn, decision) => self.decided(from, txn, decision),
            Message::Applied(txn) => self.part_applied(txn),
            Message::Durable(txn) => self.part_durable(txn),
            Message::RequestFlush(upto) => self.flush_requested(upto),
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
            Message::DonateExtents(urgency) => self.donate_extents(from, urgency),
            Message::Move(what, place) => self.move_asked(from, what, place),
            Message::Moved(place, error) => self.moved(from, place, error),
        }
    }

    /// Whether opening is over: requests may come. Until then it only needs turns, completions and
    /// messages.
    pub fn is_open(&self) -> bool {
        !self.life.opening
    }

    /// The lowest LSN for whose durability something here waits: when the watermark reaches it, a
    /// turn is due even if nothing has arrived. `None`: nothing waits.
    pub fn waits_for(&self) -> Option<Lsn> {
        let page = self
            .writeback
            .awaiting_watermark
            .peek()
            .map(|awaiting_watermark| awaiting_watermark.lsn());
        let reply = self
            .watermark
            .replies
            .peek()
            .map(|waiting| waiting.lsn())
            .filter(|_| !planted!(NobodyWoken));
        // A shard that has stopped writes nothing more: for those it would be woken again and
        // again.
        let writes = [
            self.checkpoint.waits_for(),
            self.watermark.dirty_stuck,
            self.ctx.blocked.awaited_lsn(),
        ]
        .map(|lsn| lsn.filter(|_| self.ctx.failed.is_none()));
        [page, reply].into_iter().chain(writes).flatten().min()
    }

    /// What one commit may count at most.
    pub(crate) fn txn_bytes_max(&self) -> u64 {
        self.ctx.limits.txn_bytes_max
    }

    /// What is in memory, in words.
    pub(super) fn memory(&self) -> String {
        let (resident, pages) = (self.cache.table.resident(), self.cache.table.pages.len());
        let (in_readers_hands, counts) =
            (self.cache.eviction.pinned(), self.cache.eviction.counts());
        let (nodes, dirty) = (self.map.nodes_count(), self.map.dirty_count());
        format!(
            "{} of {pages} pages with their bytes, {} of them needed by requests, \
             {in_readers_hands} pinned by readers when last seen, {nodes} nodes, {dirty} of them \
             dirty, {counts:?}",
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

    pub(super) fn submit(&mut self, kind: OpKind, op: DiskOp) {
        self.count_read(&kind);
        self.ctx.submit(kind, op);
    }

    /// A write or a flush failed: nothing is acknowledged from now on, by any shard.
    pub(super) fn fail(&mut self, error: Error) {
        if self.ctx.failed.is_some() {
            return;
        }
        tracing::error!(shard = self.ctx.id.get(), %error, "the store stops writing; reopen it");
        for shard in self.ctx.shard_map.others(self.ctx.id) {
            self.ctx.send(shard, Message::Failed(error.clone()));
        }
        self.stop(error);
    }

    /// This or another shard has failed.
    pub(super) fn stop(&mut self, error: Error) {
        if self.ctx.failed.is_some() {
            return;
        }
        let stopped = Error::new(
            ErrorKind::Closed,
            format_args!(
                "the store has stopped writing after a failure ({error}); reopen it to recover"
            ),
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
