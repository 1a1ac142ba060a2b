//! Checkpoints, at each shard: a new page map becomes durable, and the log before it is not needed
//! any more. Shard 0 leads; see `leader`.
//!
//! ```text
//! Idle --Begin--> Begun       blocks given up are retired
//!      --Redo(LSN)--> Watermark   it has reached the LSN
//!                 --> Pages       dirty pages are written
//!                 --> Capture     nodes, one virtual shard a turn; roots too
//!                 --> Handover    all others have captured
//!                 --> Summaries   of extents in use
//!                 --> Waiting     after Ready: table, flush and superblock are the leader's
//!      --Done--> Idle
//! ```
//! Invariants
//! 1. The redo LSN is chosen when every shard has begun. Every record up to it is applied where it
//!    belongs once the watermark has reached it, since a commit over shards holds the watermark
//!    back until each part is durable; so the new roots reflect every record up to it, and name
//!    nothing that is not durable. They may reflect later ones: page LSNs guard the redo.
//! 2. What is retired was given up before the redo LSN was chosen, so the redo LSN has passed its
//!    successor.
//! 3. Commits continue all the while. Each virtual shard is captured at one moment of its own.
//! 4. Until the first superblock copy is durable, the roots, the table and the log of the
//!    checkpoint before count.
//! 5. It needs no more memory than is reserved for it, however large the store and however much of
//!    it is dirty: nodes are written in place, and whatever would change one waits for that write;
//!    roots, summaries and the table are written in parts.
//! 6. Only after both copies are durable are log segments recycled and retired places given out
//!    again.

pub(in crate::engine) mod leader;
mod log_growth;

mod capture;

use self::leader::Leader;
use crate::base::error::Error;
use crate::base::{Lsn, Micros, NodeIdx, PageIdx, ShardId, VShard};
use crate::engine::message::{Begin, Contribution, Message, Pace};
use crate::engine::reservations::dirty_nodes_are_many;
use crate::engine::writeback::Spread;
use crate::engine::{OpKind, Response, Shard, Token};
use crate::format::superblock::{LogEnd, Superblock};
use crate::io::{Completion, DiskOp};
use crate::memory::Frame;

/// The phase of a checkpoint.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum Phase {
    #[default]
    Idle,
    /// It was announced, and waits until everything that must not run at the same time has ended.
    Told,
    Begun,
    Watermark,
    Pages,
    Capture {
        next: u16,
    },
    Handover,
    Summaries,
    Waiting,
}

impl Phase {
    /// Whether `next` may come after this one. A virtual shard that has nothing to write is
    /// skipped.
    fn leads_to(self, next: Phase) -> bool {
        use Phase::*;
        match (self, next) {
            (Capture { next: before }, Capture { next: after }) => before <= after,
            (Idle, Told) | (Told, Begun) | (Begun, Watermark) | (Watermark, Pages) => true,
            (Pages, Capture { next }) => next == 0,
            (Capture { .. }, Handover) | (Handover, Summaries) => true,
            (Summaries, Waiting) | (Waiting, Idle) => true,
            _ => false,
        }
    }
}

/// The checkpoint in progress, and the requests that wait for one.
pub(in crate::engine) struct Checkpoint {
    phase: Phase,
    /// Whether the leader has been asked for one.
    asked: bool,
    /// The next LSN of the store as last seen, and since when it has been so.
    next_lsn: Lsn,
    next_lsn_since: Micros,
    begin: Option<Begin>,
    redo: Lsn,
    /// Operations of this phase in flight.
    ops: u32,
    /// Nodes whose writes are under way.
    nodes: Vec<NodeIdx>,
    /// Virtual shards with a new root, and its block.
    roots: Vec<(VShard, Frame)>,
    /// Shards that have handed over what their capture means here.
    handovers: u16,
    pub(in crate::engine) waiters: Vec<Token>,
    pub(in crate::engine) next_waiters: Vec<Token>,
    /// The state of shard 0's work for all.
    pub(in crate::engine) leader: Leader,
}

/// The most blocks that wait for a checkpoint to retire them, for each frame of memory. With the
/// record of its successor each takes 16 bytes of the heap: at most a 32nd of the memory.
const LEFT_PER_FRAME_MAX: usize = 8;
/// The most writes of nodes and roots in flight before another virtual shard is captured.
const NODE_OPS_MAX: u32 = 64;
/// For how long nothing has been committed before a store is idle.
const IDLE_US: Micros = 1_000_000;
/// Roots that are collected before they are written, so that adjacent ones go together.
const ROOTS_AT_A_TIME: usize = 64;

impl std::fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{:?} redo {:?} ops {} handovers {} asked {}",
            self.phase, self.redo, self.ops, self.handovers, self.asked
        )
    }
}

impl Checkpoint {
    pub(in crate::engine) fn new(leader: Leader) -> Self {
        Checkpoint {
            phase: Phase::default(),
            asked: false,
            next_lsn: Lsn::ZERO,
            next_lsn_since: 0,
            begin: None,
            redo: Lsn::default(),
            ops: 0,
            nodes: Vec::new(),
            roots: Vec::new(),
            handovers: 0,
            waiters: Vec::new(),
            next_waiters: Vec::new(),
            leader,
        }
    }

    /// Panics if the state of the checkpoint contradicts its phase: the superblock would name what
    /// is not written, or the checkpoint would never end.
    fn assert_state(&self) {
        let (phase, ops) = (self.phase, self.ops);
        assert!(
            self.begin.is_some() == (phase != Phase::Idle),
            "the leader has begun {:?}, and the checkpoint is {phase:?}",
            self.begin
        );
        assert!(
            ops == 0 || matches!(phase, Phase::Capture { .. } | Phase::Waiting),
            "{ops} operations of a checkpoint are under way while it is {phase:?}"
        );
        let (nodes, roots) = (self.nodes.len(), self.roots.len());
        assert!(
            (nodes == 0 && roots == 0) || matches!(phase, Phase::Capture { .. }),
            "{nodes} nodes and {roots} roots are being written while the checkpoint is {phase:?}"
        );
        let may_have_handovers = matches!(
            phase,
            Phase::Begun
                | Phase::Watermark
                | Phase::Pages
                | Phase::Capture { .. }
                | Phase::Handover
        );
        assert!(
            self.handovers == 0 || may_have_handovers,
            "{} shards have handed over while the checkpoint is {phase:?}",
            self.handovers
        );
    }

    /// The next phase; what it needs is there, and what it must not find is gone.
    fn enter(&mut self, phase: Phase) {
        assert!(self.phase.leads_to(phase), "{phase:?} does not follow {:?}", self.phase);
        self.phase = phase;
        self.assert_state();
    }

    /// The LSN that the watermark must reach.
    pub(in crate::engine) fn waits_for(&self) -> Option<Lsn> {
        (self.phase == Phase::Watermark).then_some(self.redo)
    }
}

impl Shard {
    /// Changes the phase; every change goes through here, since other components see the phase by
    /// the status.
    fn enter_phase(&mut self, phase: Phase) {
        let versions = self.writeback.awaited_versions();
        assert!(
            versions == 0 || phase == Phase::Pages,
            "{versions} pages are waited for while the checkpoint is {phase:?}"
        );
        self.checkpoint.enter(phase);
        self.ctx.checkpoint.active = phase != Phase::Idle;
        self.ctx.checkpoint.is_urgent = self.life.opening
            || self.checkpoint.begin.is_some_and(|begin| begin.pace == Pace::Urgent);
        self.ctx.checkpoint.wants_pages = phase == Phase::Pages;
        self.ctx.checkpoint.wants_groups = !matches!(phase, Phase::Idle | Phase::Told);
    }

    pub(in crate::engine) fn advance_checkpoint(&mut self) {
        if self.ctx.failed.is_some() {
            return;
        }
        self.ask_for_hurry();
        match self.checkpoint.phase {
            Phase::Idle if !self.checkpoint.asked => {
                self.note_next_lsn();
                if let Some(pace) = self.checkpoint_due() {
                    self.checkpoint.asked = true;
                    self.ctx.send(ShardId::LEADER, Message::WantCheckpoint(pace));
                }
            }
            Phase::Told => self.begin_when_ready(),
            Phase::Watermark
                if self.ctx.order.watermark() >= self.checkpoint.redo
                    || planted!(RedoNotAwaited) =>
            {
                self.count_pages();
            }
            Phase::Pages if self.writeback.awaited_versions() == 0 => {
                self.enter_phase(Phase::Capture { next: 0 });
                self.ctx.need_all();
            }
            Phase::Capture { next } => self.capture_vshard(next),
            Phase::Handover
                if self.checkpoint.handovers == self.ctx.shard_map.shards_count() - 1 =>
            {
                self.list_summaries()
            }
            Phase::Summaries
                if self.space.summaries_under_way == 0 && self.space.summaries.is_empty() =>
            {
                self.contribute()
            }
            _ => {}
        }
    }

    /// Whether a checkpoint is due, and how fast it must be: because one was requested, the log or
    /// the list of blocks to retire has become long, many nodes are dirty, or the shard is idle.
    /// The [space](Self::advance_space) requests its own checkpoints.
    fn checkpoint_due(&self) -> Option<Pace> {
        let left_max = self.ctx.limits.memory_blocks as usize * LEFT_PER_FRAME_MAX;
        let memory_is_used = self.space.extents.pending_free_count() > left_max
            || dirty_nodes_are_many(&self.map, &self.ctx.limits);
        if self.ctx.checkpoint.wanted || (!self.life.opening && memory_is_used) {
            return Some(Pace::Urgent);
        }
        let is_idle = self.idle_checkpoint_due().is_some_and(|due| self.ctx.now >= due);
        (self.log.is_long() || is_idle).then_some(Pace::Spread)
    }

    /// Notes whether any shard has committed something: a checkpoint is one of all shards.
    fn note_next_lsn(&mut self) {
        let next = self.ctx.order.next();
        if self.checkpoint.next_lsn != next {
            (self.checkpoint.next_lsn, self.checkpoint.next_lsn_since) = (next, self.ctx.now);
        }
    }

    /// When a store that does nothing begins a checkpoint, after which it opens at once: only if
    /// there is something to write, so one is enough.
    pub(in crate::engine) fn idle_checkpoint_due(&self) -> Option<Micros> {
        let is_idle = self.checkpoint.phase == Phase::Idle
            && !self.checkpoint.asked
            && !self.life.opening
            && self.life.closing.is_none()
            && self.log.is_idle()
            && self.writeback.is_idle()
            && self.space.compaction.compactor.count() == 0
            && self.map.dirty_count() > 0;
        is_idle.then(|| self.checkpoint.next_lsn_since + IDLE_US)
    }

    /// If something here waits for the end of a checkpoint that takes its time, all shards are to
    /// hurry: this one alone can't end it.
    fn ask_for_hurry(&mut self) {
        let waits = self.ctx.checkpoint.wanted || self.ctx.blocked.is_any();
        if let Some(begin) = &mut self.checkpoint.begin
            && begin.pace == Pace::Spread
            && waits
        {
            begin.pace = Pace::Urgent;
            self.ctx.checkpoint.is_urgent = true;
            self.ctx.send(ShardId::LEADER, Message::AskForHurry);
        }
    }

    /// Called when something waits for the end of the checkpoint in progress.
    pub(in crate::engine) fn hurry_checkpoint(&mut self) {
        if let Some(begin) = &mut self.checkpoint.begin {
            begin.pace = Pace::Urgent;
            self.ctx.checkpoint.is_urgent = true;
            self.ctx.need_all();
        }
    }

    /// Called when the leader begins a checkpoint.
    pub(in crate::engine) fn begin_checkpoint(&mut self, begin: Begin) {
        self.checkpoint.assert_state();
        assert_eq!(self.checkpoint.phase, Phase::Idle, "one checkpoint at a time");
        self.ctx.checkpoint.wanted = false;
        let c = &mut self.checkpoint;
        (c.asked, c.begin) = (false, Some(begin));
        c.waiters = std::mem::take(&mut c.next_waiters);
        self.enter_phase(Phase::Told);
        self.ctx.need_all();
    }

    fn begin_when_ready(&mut self) {
        let Some(begin) = self.checkpoint.begin else { return };
        // The last checkpoint finds nothing in progress, and leaves nothing behind.
        if begin.clean
            && !(self.requests.pending.is_empty()
                && self.participant.is_idle()
                && self.coordinator.is_idle()
                && !self.space.growing)
        {
            return;
        }
        if begin.clean && self.log.is_growing() {
            return;
        }
        if !begin.clean {
            self.make_log_longer();
        }
        if begin.new_epoch.is_some() {
            self.redo.recovering = None;
            self.life.redoing = false;
        }
        self.space.extents.begin_checkpoint();
        if planted!(LogTrimmedEarly) {
            self.log.recycle(Lsn::MAX);
        }
        self.enter_phase(Phase::Begun);
        self.ctx.send(ShardId::LEADER, Message::Began);
        self.ctx.need_all();
    }

    /// Called when every shard has begun: `redo` is what the roots must reflect.
    pub(in crate::engine) fn redo_lsn_chosen(&mut self, redo: Lsn) {
        self.checkpoint.assert_state();
        assert_eq!(self.checkpoint.phase, Phase::Begun, "the LSN comes when all have begun");
        assert!(
            redo >= self.checkpoint.redo,
            "the roots reflect all up to {:?}, and are to reflect what is up to {redo:?}",
            self.checkpoint.redo
        );
        self.checkpoint.redo = redo;
        self.enter_phase(Phase::Watermark);
        self.ctx.need_all();
    }

    /// Called when all that the roots must reflect is applied: counts the pages that are not in the
    /// map yet.
    fn count_pages(&mut self) {
        self.checkpoint.assert_state();
        self.enter_phase(Phase::Pages);
        let images =
            self.log.open.images.iter().filter_map(|image| self.cache.table.find(image.key));
        let behind: Vec<PageIdx> = self.writeback.pages_behind().chain(images).collect();
        let mut awaited = 0;
        for idx in behind {
            let page = &mut self.cache.table.pages[idx];
            if page.lsn > page.mapped_lsn && page.checkpoint_target == Lsn::ZERO {
                page.checkpoint_target = page.lsn;
                awaited += 1;
            }
        }
        self.writeback.await_versions(awaited);
        let (written, left) = (self.log.blocks_written(), self.log.blocks_left());
        self.writeback.spread(Spread::new(awaited, self.ctx.now, written, left));
        self.ctx.need_all();
    }

    pub(in crate::engine) fn checkpoint_op(&mut self, op: DiskOp) {
        self.checkpoint.ops += 1;
        self.checkpoint.assert_state();
        self.ctx.submit(OpKind::Checkpoint, op);
    }

    /// Called when one of the checkpoint's operations has ended.
    pub(in crate::engine) fn checkpoint_step_done(&mut self, completion: Completion) {
        self.checkpoint.assert_state();
        assert!(self.checkpoint.ops > 0, "an operation of a checkpoint has ended, of none");
        self.checkpoint.ops -= 1;
        if let Err(error) = completion.result {
            self.ctx.fail(error);
        }
        if self.ctx.failed.is_some() || self.checkpoint.ops > 0 {
            return;
        }
        self.ctx.need_all();
        self.checkpoint.assert_state();
        if self.checkpoint.phase == Phase::Waiting {
            self.leader_step_done(completion.op);
        }
    }

    /// Called when the shard's part is written, so that the leader may continue.
    fn contribute(&mut self) {
        assert_eq!(self.checkpoint.ops, 0, "nodes and roots are written before the handover");
        let mine = (0..self.ctx.limits.geometry.vshards_count as u16).map(VShard::new);
        let mine = mine.filter(|vshard| self.ctx.shard_map.owner(*vshard) == self.ctx.id);
        let clean = self.checkpoint.begin.is_some_and(|begin| begin.clean);
        let (is_open, in_flight) = (!self.log.open.is_empty(), self.log.in_flight.len());
        assert!(
            !clean || (!is_open && in_flight == 0),
            "the log is closed with commits in its open group: {is_open}, and {in_flight} groups \
             in flight"
        );
        let contribution = Contribution {
            rows: self.space.extents.rows(),
            roots: mine.map(|vshard| (vshard, self.map.root(vshard).version)).collect(),
            log: self.log.state(if clean { self.log.end() } else { LogEnd::default() }),
        };
        self.enter_phase(Phase::Waiting);
        if planted!(RecycledBeforeSuperblock) {
            self.log.recycle(self.checkpoint.redo);
        }
        self.ctx.send(ShardId::LEADER, Message::Ready(Box::new(contribution)));
    }

    /// Called when both copies of the superblock are durable.
    pub(in crate::engine) fn end_checkpoint(&mut self, superblock: Superblock) {
        assert_eq!(
            self.checkpoint.phase,
            Phase::Waiting,
            "the superblock follows the last contribution"
        );
        self.checkpoint.assert_state();
        assert_eq!(self.checkpoint.ops, 0, "the superblock was written last");
        let before = self.ctx.superblock.checkpoint;
        assert!(
            superblock.checkpoint == before + 1,
            "checkpoint {} follows {before}",
            superblock.checkpoint
        );
        let begin = self.checkpoint.begin.take().expect("it has begun");
        let redo = self.checkpoint.redo;
        self.assert_named(&superblock, redo);
        self.enter_phase(Phase::Idle);
        self.ctx.superblock = superblock;
        self.ctx.stats.checkpoints += 1;
        self.log.recycle(redo);
        self.use_new_segments();
        let freed = self.space.extents.end_checkpoint();
        self.space.summaries.extend(self.space.extents.filled());
        self.note_reclaimed();
        tracing::debug!(shard = self.ctx.id.get(), %redo, freed_blocks = freed, "checkpoint");
        for token in std::mem::take(&mut self.checkpoint.waiters) {
            self.ctx.reply(token, Ok(Response::Checkpointed(redo)));
        }
        if begin.new_epoch.is_some() {
            self.life.opening = false;
        }
        if begin.clean {
            self.end_close(Ok(()));
        } else if !self.checkpoint.next_waiters.is_empty() {
            self.ctx.checkpoint.wanted = true;
        }
        self.ctx.need_all();
    }

    /// Panics if the superblock names other roots than this shard has written, or says that they
    /// reflect more of the log than they do: what is recycled now would be missing.
    fn assert_named(&self, superblock: &Superblock, redo: Lsn) {
        for vshard in self.ctx.shard_map.owned_by(self.ctx.id) {
            let (named, written) =
                (&superblock.vshards[vshard.index()], self.map.root(vshard).version);
            assert!(
                named.root == written && named.redo_lsn == redo,
                "the superblock names {named:?} for {vshard:?}, and {written:?} was written, which \
                 reflects all up to {redo:?}"
            );
        }
    }

    /// Called when no checkpoint will end any more.
    pub(in crate::engine) fn fail_checkpoint(&mut self, stopped: &Error) {
        let c = &mut self.checkpoint;
        let waiters: Vec<Token> = c.waiters.drain(..).chain(c.next_waiters.drain(..)).collect();
        for token in waiters {
            self.ctx.reply(token, Err(stopped.clone()));
        }
    }
}
