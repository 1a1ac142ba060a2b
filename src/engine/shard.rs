//! One shard: events in, effects out. It owns its components and decides in which order they
//! advance.

use super::blocked::MEMORY_RETRY_US;
use super::work::{STEPS_COUNT, Work, WorkSet};
use super::{Effect, Message, OpKind, Shard, space};
use crate::base::error::Error;
use crate::base::{Lsn, Micros, OpIdx, ShardId, ShardMap};
use crate::io::Completion;

/// The most laps of a turn: the next turn, which is due at once, continues with the rest.
const LAPS_MAX: u32 = 16;

/// A step of a turn.
type TurnStep = fn(&mut Shard);

/// The steps of a lap in their order, each with the reason for its position.
const STEPS: [(Work, TurnStep, &str); STEPS_COUNT] = [
    (
        Work::Loopback,
        Shard::deliver_to_self,
        "messages to itself are what other shards' messages are, and come before requests",
    ),
    (
        Work::Finished,
        Shard::finish_ready,
        "reads need nothing from the steps below, and give back what they hold",
    ),
    (
        Work::Parts,
        Shard::run_parts,
        "votes before commits: a part that was promised room must not find it taken by the same \
         lap",
    ),
    (Work::Commits, Shard::run_commits, "allocates LSNs and fills the open group"),
    (
        Work::Redo,
        Shard::run_redo,
        "before write-back: without room it presses for pages to be written, and that would be due \
         again and again",
    ),
    (
        Work::Retries,
        Shard::retry_coordinated,
        "asks again, also those that the commits above were in the way of",
    ),
    (Work::Decisions, Shard::decide, "after the commits, so that one group takes both"),
    (Work::Groups, Shard::advance_groups, "closes the group with all that was allocated above"),
    (
        Work::WriteBack,
        Shard::write_back,
        "after the groups: a page that went to its place with one is dirty no more",
    ),
    (
        Work::Leader,
        Shard::advance_leader,
        "the leader's step makes messages for the checkpoint below",
    ),
    (Work::Checkpoint, Shard::advance_checkpoint, "sees the pages and groups of this lap"),
    (Work::RedoReads, Shard::advance_redo, "while a store opens: reads the log, for the next lap"),
    (Work::Space, Shard::advance_space, "knows what the steps above want"),
    (Work::Compaction, Shard::advance_compaction, "chooses extents with what is free now"),
    (Work::Moves, Shard::advance_moves, "what compaction asks for, here and elsewhere"),
    (Work::Summaries, Shard::write_summaries, "of extents that the steps above have filled"),
    (
        Work::Reads,
        Shard::submit_reads,
        "last of what takes memory: writes give it back, reads only take it",
    ),
    (
        Work::Close,
        Shard::advance_close,
        "nothing is under way any more, or it is not the time to close",
    ),
];

/// A lap takes each bit by its row: the rows stand in the order of the bits.
const _: () = {
    let mut row = 0;
    while row < STEPS_COUNT {
        assert!(STEPS[row].0 as usize == row);
        row += 1;
    }
};

impl Shard {
    /// Advances everything as far as it goes without a completion; afterwards drain
    /// [`next_effect`](Self::next_effect). Without work it costs a look at the watermark: a read of
    /// cached pages makes none.
    pub fn turn(&mut self, now: Micros) {
        self.ctx.now = self.ctx.now.max(now);
        self.note_watermark();
        if self.ctx.due.is_some_and(|due| self.ctx.now >= due) {
            self.ctx.need_all();
        }
        if self.ctx.work.is_empty() {
            return;
        }
        self.publish_behind_nodes();
        for _ in 0..LAPS_MAX {
            self.run_lap();
            self.tell_failure();
            self.note_watermark();
            if self.ctx.work.is_empty() {
                break;
            }
        }
        #[cfg(any(test, feature = "sim"))]
        self.assert_no_work_is_left();
        self.relieve_memory();
        // The driver of the shard asks for the failure right after the turn.
        self.tell_failure();
        self.watermark.request_flushes(&mut self.ctx);
        self.ctx.due = self.next_due();
    }

    /// Runs the steps that have work, or all of them while one may unblock any other.
    fn run_lap(&mut self) {
        let was_unsettled = self.is_unsettled();
        if was_unsettled {
            self.ctx.work = WorkSet::ALL;
        }
        self.ctx.blocked.begin_lap();
        for (work, step, _) in STEPS {
            if self.ctx.work.take(work) {
                step(self);
            }
        }
        if !was_unsettled && self.is_unsettled() {
            self.ctx.need_all();
        }
    }

    /// Whether any event may give any step work: while the shard opens, closes or has failed,
    /// during a checkpoint, and as long as a step is blocked.
    fn is_unsettled(&self) -> bool {
        self.life.opening
            || self.life.closing.is_some()
            || self.ctx.failed.is_some()
            || self.ctx.checkpoint.is_wanted_or_active()
            || self.ctx.blocked.is_any()
            || self.space.stalled
    }

    /// Called when something was delivered that may unblock any step.
    fn note_event(&mut self) {
        if self.is_unsettled() {
            self.ctx.need_all();
        }
    }

    /// Panics if a step has work and its bit is not set: nothing would make the shard do it.
    #[cfg(any(test, feature = "sim"))]
    fn assert_no_work_is_left(&mut self) {
        if !self.ctx.work.is_empty() || self.is_unsettled() {
            return;
        }
        let effects = self.ctx.effects.len();
        for (work, step, _) in STEPS {
            // The next turn requests space again that was refused.
            if work == Work::Space && self.space.failed.is_some() {
                continue;
            }
            step(self);
            assert!(
                self.ctx.work.is_empty() && self.ctx.effects.len() == effects,
                "{work:?} has work, and nothing has said so: {:?}",
                self.ctx.effects.back()
            );
        }
    }

    /// Called when the watermark may have advanced, by this shard or another.
    fn note_watermark(&mut self) {
        if self.watermark.has_advanced(&mut self.ctx) {
            self.publish_durable();
            self.note_event();
        }
    }

    pub(super) fn deliver_to_self(&mut self) {
        while let Some(message) = self.ctx.loopback.pop_front() {
            self.message(self.ctx.id, message);
        }
    }

    /// The next effect to carry out, if any.
    pub fn next_effect(&mut self) -> Option<Effect> {
        self.ctx.effects.pop_front()
    }

    /// When `turn` should be called at the latest if nothing arrives; `None`: not before something
    /// does.
    pub fn deadline(&self) -> Option<Micros> {
        if self.ctx.work.is_empty() { self.ctx.due } else { Some(self.ctx.now) }
    }

    /// The same, computed again.
    pub(super) fn next_due(&self) -> Option<Micros> {
        if !self.ctx.work.is_empty() {
            return Some(self.ctx.now);
        }
        let window = self.ctx.limits.coalesce_window_us;
        // A group that may not go before a write completes needs no turn before that: a deadline in
        // the past would make the driver spin.
        let may_go =
            !self.log.open.is_empty() && self.log.in_flight.len() < self.ctx.limits.log_writes_max;
        let group = may_go.then(|| self.log.open.opened_at + window);
        let pages = self.write_back_due();
        let growth = self.space.stalled.then_some(self.ctx.now + space::GROW_RETRY_US);
        // Readers give memory back without notice: steps that wait for it have to look.
        let memory = self.ctx.blocked.lacks_memory().then_some(self.ctx.now + MEMORY_RETRY_US);
        if self.ctx.failed.is_some() {
            // Reads continue after a failure, and wait for memory as before.
            return memory;
        }
        let checkpoint = self.idle_checkpoint_due();
        let next = [group, pages, growth, memory, checkpoint, self.next_retry(), self.front_ends()]
            .into_iter()
            .flatten()
            .min()?;
        Some(next.max(self.ctx.now + 1))
    }

    /// Whether `Close` has been carried out.
    pub fn is_closed(&self) -> bool {
        self.life.closed
    }

    /// Delivers the end of an operation.
    pub fn complete(&mut self, completion: Completion) {
        self.note_event();
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
            OpKind::GroupFlush(set) => {
                let parts = self.group_flushed(set, completion.result);
                self.parts_durable(parts);
            }
            OpKind::PageWrite(versions) => self.pages_written(versions, completion.result),
            OpKind::SummaryWrite(extent) => {
                let writes = self.space.summaries_under_way;
                assert!(writes > 0, "the summary of {extent:?} is written, of {writes} writes");
                self.space.summaries_under_way -= 1;
                self.ctx.need(Work::Checkpoint);
                match completion.result {
                    Ok(()) => self.space.extents.summary_written(extent),
                    Err(error) => self.ctx.fail(error),
                }
            }
            OpKind::SummaryRead(extent) => self.summary_read(extent, completion),
            OpKind::Checkpoint => self.checkpoint_step_done(completion),
            OpKind::Grow(growth) => self.grown(growth, completion.result),
            OpKind::LogSegment => self.segment_made(completion.result),
            OpKind::RedoRead(at) => self.redo_read(at, completion),
        }
        self.tell_failure();
    }

    /// The map that says which shard owns which page.
    pub(crate) fn shard_map(&self) -> ShardMap {
        self.ctx.shard_map
    }

    /// Delivers a message from another shard.
    pub fn message(&mut self, from: ShardId, message: Message) {
        self.note_event();
        match message {
            Message::Prepare(txn, ask) => self.prepare(from, txn, *ask),
            Message::Vote(txn, vote) => self.voted(from, txn, vote),
            Message::Decide(txn, decision) => self.decided(from, txn, decision),
            Message::Applied(txn) => self.part_applied(txn),
            Message::Durable(txn) => self.part_durable(txn),
            Message::RequestFlush(upto) => {
                self.watermark.flush_requested(&mut self.ctx, &mut self.log, upto)
            }
            Message::Failed(error) => self.ctx.stop(error),
            Message::WantCheckpoint(pace) => self.checkpoint_wanted(pace),
            Message::Begin(begin) => self.begin_checkpoint(begin),
            Message::AskForHurry => self.hurry_asked(),
            Message::Hurry => self.hurry_checkpoint(),
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
        self.tell_failure();
    }

    /// Whether opening is over: requests may come. Until then it only needs turns, completions and
    /// messages.
    pub fn is_open(&self) -> bool {
        !self.life.opening
    }

    /// The lowest LSN for whose durability something here waits: when the watermark reaches it, a
    /// turn is due even if nothing has arrived. `None`: nothing waits.
    pub fn waits_for(&self) -> Option<Lsn> {
        let page = self.writeback.awaited_lsn();
        let reply = self.watermark.next_reply().filter(|_| !planted!(NobodyWoken));
        // A shard that has stopped writes nothing more: for those LSNs it would be woken again and
        // again.
        let writes = [
            self.checkpoint.waits_for(),
            self.writeback.stuck_until(),
            self.ctx.blocked.awaited_lsn(),
        ]
        .map(|lsn| lsn.filter(|_| self.ctx.failed.is_none()));
        [page, reply].into_iter().chain(writes).flatten().min()
    }

    /// The limits of one commit.
    pub(crate) fn txn_bytes_max(&self) -> u64 {
        self.ctx.limits.txn_bytes_max
    }

    /// Why the shard stopped, if it did.
    pub(crate) fn failure(&self) -> Option<Error> {
        self.life.open_error.clone().or_else(|| self.ctx.failed.clone())
    }

    /// The memory that its operations read into and write from.
    pub(crate) fn mapping(&self) -> crate::memory::Mapping {
        self.ctx.arena.mapping()
    }

    /// Operations in flight.
    pub(crate) fn ops_under_way(&self) -> usize {
        self.ctx.ops.len()
    }

    /// Answers everything that waits, once, that the store has stopped: nothing that it waits for
    /// will come.
    pub(super) fn tell_failure(&mut self) {
        let Some(cause) = self.ctx.failure_cause.take() else { return };
        // What is durable by now is answered as durable: it may have become so in the same
        // delivery.
        self.note_watermark();
        // No part is voted for any more, and reads continue.
        self.participant.clear_front();
        if self.life.opening {
            self.life.open_error.get_or_insert_with(|| cause.clone());
        }
        let stopped = self.ctx.failed.clone().expect("there is a cause");
        self.watermark.fail_replies(&mut self.ctx, &cause, &stopped);
        self.fail_coordinated(&cause, &stopped);
        self.drop_parts();
        self.fail_checkpoint(&stopped);
        self.ctx.need_all();
    }
}
