//! Checkpoints, at each shard: a new page map becomes durable, and the log before it is not needed
//! any more. Shard 0 leads; see `leader`.
//!
//! ```text
//! Idle --Begin--> Begun --Redo(LSN)--> Watermark --> Pages --> Capture --> Handover --> Summaries --> Waiting --Done--> Idle
//!                 places               it has        dirty     nodes, one  all others   of extents    Ready: table, flush and
//!                 left so far          reached       pages     virtual     have         in use        superblock are the
//!                 are retired          the LSN       written   shard a     captured                   leader's
//!                                                              turn; roots too
//! ```
//! Invariants
//! 1. The redo LSN is chosen when every shard has begun. Every record up to it is applied where it
//!    belongs once the watermark has reached it, since a commit over shards holds the watermark
//!    back until each part is durable; so the new roots reflect every record up to it, and name
//!    nothing that is not durable. They may reflect later ones: page LSNs guard the redo.
//! 2. What is retired was left before the redo LSN was chosen, so the redo LSN has passed its
//!    successor.
//! 3. Commits go on all the while. A virtual shard is fixed at one moment, each at its own.
//! 4. Until the first superblock copy is durable, the roots, the table and the log of the
//!    checkpoint before count.
//! 5. It needs no more memory than is kept for it, however large the store and however much of it
//!    is dirty: nodes are written from where they are, and whatever would change one waits for that
//!    write; roots, summaries and the table go out in parts.
//! 6. Only after both copies are durable are log segments recycled and retired places given out
//!    again.

pub(in crate::engine) mod leader;
mod log_growth;

use crate::base::error::Error;
use crate::base::{BLOCK, Lsn, ShardId, VShard};
use crate::engine::map::{NodeIdx, Stream};
use crate::engine::message::{Begin, Contribution, Handover, Message};
use crate::engine::writeback::plan;
use crate::engine::{OpKind, Response, Shard, Step, Token};
use crate::format::extent::ItemKind;
use crate::format::root;
use crate::format::superblock::Superblock;
use crate::io::{Completion, DiskOp, FileId, IoSlice};
use crate::memory::Frame;
use smallvec::SmallVec;

/// Where a checkpoint stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum Phase {
    #[default]
    Idle,
    /// It is told, and waits until what must not run beside it has ended.
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

/// A new epoch that the checkpoint's superblock begins (the one that ends a recovery).
#[derive(Clone, Copy, Debug)]
pub struct NewEpoch {
    /// Its number.
    pub epoch: u64,
    /// The seed of its group checksums.
    pub salt: u64,
    /// The first LSN that it may use.
    pub first_lsn: Lsn,
}

/// The checkpoint under way, and who waits for one.
pub(in crate::engine) struct Checkpoint {
    /// The newest one that is durable.
    pub(in crate::engine) superblock: Superblock,
    phase: Phase,
    wanted: bool,
    /// The leader has been asked for it.
    asked: bool,
    begin: Option<Begin>,
    redo: Lsn,
    /// Pages whose version at the beginning is not in the map yet.
    pub(in crate::engine) pages_left: u64,
    /// Operations of this phase under way.
    ops: u32,
    /// Nodes whose writes are under way.
    nodes: Vec<NodeIdx>,
    /// Virtual shards with a new root, and its block.
    roots: Vec<(VShard, Frame)>,
    /// Written captures whose map leaf is being written.
    pub(in crate::engine) behind_nodes: Vec<usize>,
    /// Shards that have handed over what their capture means here.
    handovers: u16,
    pub(in crate::engine) waiters: Vec<Token>,
    pub(in crate::engine) next_waiters: Vec<Token>,
}

/// Places that were left and wait for a checkpoint, for each frame of memory. With what is
/// remembered of their successors each takes 16 bytes of the heap: a 32nd of the memory at most.
const LEFT_PER_FRAME_MAX: usize = 8;
/// Writes of nodes and roots under way, before another virtual shard is captured.
const NODE_OPS_MAX: u32 = 64;
/// Roots that gather before they are written, so that neighbours go together.
const ROOTS_AT_A_TIME: usize = 64;

impl std::fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{:?} redo {:?} pages left {} ops {}",
            self.phase, self.redo, self.pages_left, self.ops
        )?;
        write!(f, " handovers {} wanted {} asked {}", self.handovers, self.wanted, self.asked)
    }
}

impl Checkpoint {
    pub(in crate::engine) fn new(superblock: Superblock) -> Self {
        Checkpoint {
            superblock,
            phase: Phase::default(),
            wanted: false,
            asked: false,
            begin: None,
            redo: Lsn::default(),
            pages_left: 0,
            ops: 0,
            nodes: Vec::new(),
            roots: Vec::new(),
            behind_nodes: Vec::new(),
            handovers: 0,
            waiters: Vec::new(),
            next_waiters: Vec::new(),
        }
    }

    pub(in crate::engine) fn is_active(&self) -> bool {
        self.phase != Phase::Idle
    }

    /// Dirty pages must go to their places now.
    pub(in crate::engine) fn wants_pages(&self) -> bool {
        self.phase == Phase::Pages
    }

    /// What is open must become durable now.
    pub(in crate::engine) fn wants_groups(&self) -> bool {
        !matches!(self.phase, Phase::Idle | Phase::Told)
    }

    /// The LSN that the watermark must reach.
    pub(in crate::engine) fn waits_for(&self) -> Option<Lsn> {
        (self.phase == Phase::Watermark).then_some(self.redo)
    }
}

impl Shard {
    /// A checkpoint is to begin, once the one under way has ended.
    pub(in crate::engine) fn need_checkpoint(&mut self) {
        if !self.checkpoint.wanted {
            self.checkpoint.wanted = true;
            self.ctx.work_pending = true;
        }
    }

    /// Whether a checkpoint is wanted or under way.
    pub(crate) fn checkpoint_under_way(&self) -> bool {
        self.checkpoint.wanted || self.checkpoint.is_active()
    }

    pub(in crate::engine) fn advance_checkpoint(&mut self) {
        if self.ctx.failed.is_some() {
            return;
        }
        match self.checkpoint.phase {
            Phase::Idle
                if (self.checkpoint.wanted || self.checkpoint_is_due())
                    && !self.checkpoint.asked =>
            {
                self.checkpoint.asked = true;
                self.ctx.send(ShardId::LEADER, Message::WantCheckpoint);
            }
            Phase::Told => self.begin_when_ready(),
            Phase::Watermark
                if self.ctx.order.watermark() >= self.checkpoint.redo
                    || planted!(RedoNotAwaited) =>
            {
                self.count_pages();
            }
            Phase::Pages if self.checkpoint.pages_left == 0 => {
                self.checkpoint.phase = Phase::Capture { next: 0 };
                self.ctx.work_pending = true;
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

    /// Whether the log or the list of places that were left has become long enough, or enough nodes
    /// are dirty. Checkpoints for the sake of space are asked for [there](Self::advance_space).
    fn checkpoint_is_due(&self) -> bool {
        let left_max = self.ctx.limits.memory_blocks as usize * LEFT_PER_FRAME_MAX;
        let memory_is_used =
            self.space.extents.pending_free_count() > left_max || self.dirty_nodes_are_many();
        self.log.is_long() || (!self.life.opening && memory_is_used)
    }

    /// The leader begins a checkpoint.
    pub(in crate::engine) fn begin_checkpoint(&mut self, begin: Begin) {
        assert_eq!(self.checkpoint.phase, Phase::Idle, "one checkpoint at a time");
        let c = &mut self.checkpoint;
        (c.wanted, c.asked, c.begin) = (false, false, Some(begin));
        c.phase = Phase::Told;
        c.waiters = std::mem::take(&mut c.next_waiters);
        self.ctx.work_pending = true;
    }

    fn begin_when_ready(&mut self) {
        let Some(begin) = self.checkpoint.begin else { return };
        // The last checkpoint finds nothing under way, and leaves nothing behind.
        if begin.clean
            && !(self.requests.pending.is_empty()
                && self.participant.parts.is_empty()
                && self.coordinator.commits.is_empty()
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
        }
        self.space.extents.begin_checkpoint();
        self.trim_log_early();
        self.checkpoint.phase = Phase::Begun;
        self.ctx.send(ShardId::LEADER, Message::Began);
        self.ctx.work_pending = true;
    }

    /// Every shard has begun: this is what the roots must reflect.
    pub(in crate::engine) fn redo_lsn_chosen(&mut self, redo: Lsn) {
        assert_eq!(self.checkpoint.phase, Phase::Begun, "the LSN comes when all have begun");
        self.checkpoint.redo = redo;
        self.checkpoint.phase = Phase::Watermark;
        self.ctx.work_pending = true;
    }

    /// All that the roots must reflect is applied: which pages are not in the map yet?
    fn count_pages(&mut self) {
        self.checkpoint.phase = Phase::Pages;
        self.checkpoint.pages_left = 0;
        let slots = self.log.open.slots.iter().filter_map(|slot| self.cache.table.find(slot.key));
        let captured = self.writeback.captures.iter().map(|(_, capture)| capture.page);
        let behind: Vec<usize> =
            self.writeback.dirty.iter().copied().chain(slots).chain(captured).collect();
        for idx in behind {
            let page = &mut self.cache.table.pages[idx];
            if page.lsn > page.mapped_lsn && page.checkpoint_target == Lsn::ZERO {
                page.checkpoint_target = page.lsn;
                self.checkpoint.pages_left += 1;
            }
        }
        self.ctx.work_pending = true;
    }

    /// A version of the page is in the map.
    pub(in crate::engine) fn page_published(&mut self, idx: usize) {
        let page = &mut self.cache.table.pages[idx];
        if page.checkpoint_target != Lsn::ZERO && page.mapped_lsn >= page.checkpoint_target {
            page.checkpoint_target = Lsn::ZERO;
            self.checkpoint.pages_left -= 1;
        }
    }

    /// The next virtual shard from `next` on that is this shard's and has anything to write; those
    /// before it are done with.
    fn next_dirty(&mut self, mut next: u16) -> u16 {
        while u32::from(next) < self.ctx.limits.geometry.vshards_count {
            let vshard = VShard::new(next);
            if self.ctx.shard_map.owner(vshard) == self.ctx.id {
                if self.map.is_dirty(vshard) {
                    break;
                }
                self.space.extents.captured(vshard, std::iter::empty(), Vec::new());
            }
            next += 1;
        }
        self.checkpoint.phase = Phase::Capture { next };
        next
    }

    fn capture_vshard(&mut self, next: u16) {
        let next = self.next_dirty(next);
        if u32::from(next) >= self.ctx.limits.geometry.vshards_count {
            self.write_roots();
            if self.checkpoint.ops == 0 {
                std::mem::take(&mut self.checkpoint.nodes)
                    .into_iter()
                    .for_each(|node| self.map.written(node));
                self.hand_over();
            }
            return;
        }
        let vshard = VShard::new(next);
        let nodes = self.map.dirty_in(vshard) as u32;
        if self.checkpoint.ops >= NODE_OPS_MAX || !self.space_for_nodes(nodes) {
            return;
        }
        // The root has a frame of its own; nodes are written from where they are.
        let frames = if planted!(CaptureAllAtOnce) { nodes + 2 } else { 1 };
        if !self.ensure_frames(frames, Step::Capture) {
            self.write_roots();
            return;
        }
        self.ctx.work_pending = true;
        self.checkpoint.phase = Phase::Capture { next: next + 1 };
        let mut retired = Vec::new();
        let (extents, summaries) = (&mut self.space.extents, &mut self.space.summaries);
        let alloc = |key| {
            let (place, full) = extents
                .alloc(Stream::Map, ItemKind::Node(key))
                .expect("space for the nodes was just seen");
            summaries.extend(full);
            place
        };
        let writes = self.map.capture(vshard, alloc, &mut retired);
        self.space.extents.captured(vshard, writes.iter().map(|w| w.place), retired);
        self.checkpoint.nodes.extend(writes.iter().map(|w| w.node));
        self.ctx.stats.nodes_written += writes.len() as u64;
        // The root has one, too.
        self.ctx.stats.checksums += writes.len() as u64 + 1;
        let mut frame = self.ctx.arena.alloc(0).expect("a frame was ensured");
        let out = frame.try_mut().expect("a new frame has no pins");
        let number = self.checkpoint.superblock.checkpoint + 1;
        self.map.encode_root(
            vshard,
            self.checkpoint.superblock.store_id,
            self.checkpoint.redo,
            number,
            out,
        );
        self.checkpoint.roots.push((vshard, frame));
        if self.checkpoint.roots.len() >= ROOTS_AT_A_TIME {
            self.write_roots();
        }
        let blocks = writes.into_iter().map(|w| (w.place, IoSlice::whole(w.frame))).collect();
        for run in plan::runs(blocks, self.ctx.limits.vectored_pages_max) {
            let offset = run.place.offset(self.ctx.limits.geometry.extent_bytes);
            self.checkpoint_op(DiskOp::Write {
                file: FileId::Data,
                offset,
                from: run.items.into(),
            });
        }
    }

    pub(in crate::engine) fn checkpoint_op(&mut self, op: DiskOp) {
        self.checkpoint.ops += 1;
        self.submit(OpKind::Checkpoint, op);
    }

    /// All is captured: the others learn what it means for their extents.
    fn hand_over(&mut self) {
        let changes = self.space.extents.hand_over();
        let mut out: Vec<Handover> =
            self.ctx.shard_map.shards().map(|_| Handover::default()).collect();
        let home = |place: crate::base::BlockAddr| self.first_home(place.extent).index();
        for (place, what) in changes.named {
            out[home(place)].named.push((place, what));
        }
        for place in changes.retired {
            out[home(place)].retired.push(place);
        }
        for place in changes.left {
            out[home(place)].left.push(place);
        }
        self.checkpoint.phase = Phase::Handover;
        for (shard, handover) in self.ctx.shard_map.shards().zip(out) {
            if shard != self.ctx.id {
                self.ctx.send(shard, Message::Captured(Box::new(handover)));
            }
        }
        self.ctx.work_pending = true;
    }

    /// Another shard has captured its trees.
    pub(in crate::engine) fn handed_over(&mut self, handover: Handover) {
        self.checkpoint.handovers += 1;
        self.space.extents.take_over(handover.named, handover.retired, handover.left);
        self.ctx.work_pending = true;
    }

    fn list_summaries(&mut self) {
        self.checkpoint.handovers = 0;
        if self.checkpoint.begin.is_some_and(|begin| begin.new_epoch.is_some()) {
            // Nothing more comes out of the log: what recovery kept apart is an extent like any
            // other.
            self.space.extents.end_adoption();
        }
        self.space.summaries.extend(self.space.extents.unsummarized());
        self.space.summaries.sort();
        self.space.summaries.dedup();
        self.checkpoint.phase = Phase::Summaries;
        self.ctx.work_pending = true;
    }

    /// Writes the roots captured so far: nothing names their places before the superblock does.
    fn write_roots(&mut self) {
        let count = self.ctx.limits.geometry.vshards_count;
        let roots = std::mem::take(&mut self.checkpoint.roots);
        let offset = |vshard| root::offset(vshard, self.map.root(vshard).version.generation, count);
        let writes = roots
            .into_iter()
            .map(|(vshard, frame)| (FileId::Meta, offset(vshard), frame))
            .collect();
        self.submit_blocks(writes);
    }

    /// Writes blocks, neighbours together.
    pub(in crate::engine) fn submit_blocks(&mut self, mut writes: Vec<(FileId, u64, Frame)>) {
        writes.sort_by_key(|(file, offset, _)| (*file, *offset));
        let mut run: Option<(FileId, u64, SmallVec<[IoSlice; 4]>)> = None;
        for (file, offset, frame) in writes {
            let slice = IoSlice::whole(frame.pin());
            match &mut run {
                Some((f, start, from))
                    if *f == file
                        && *start + (from.len() * BLOCK) as u64 == offset
                        && from.len() < self.ctx.limits.vectored_pages_max =>
                {
                    from.push(slice);
                }
                _ => {
                    if let Some((file, offset, from)) =
                        run.replace((file, offset, smallvec::smallvec![slice]))
                    {
                        self.checkpoint_op(DiskOp::Write { file, offset, from });
                    }
                }
            }
        }
        if let Some((file, offset, from)) = run {
            self.checkpoint_op(DiskOp::Write { file, offset, from });
        }
    }

    /// One of the checkpoint's operations has ended.
    pub(in crate::engine) fn checkpoint_step_done(&mut self, completion: Completion) {
        self.checkpoint.ops -= 1;
        if let Err(error) = completion.result {
            self.fail(error);
        }
        if self.ctx.failed.is_some() || self.checkpoint.ops > 0 {
            return;
        }
        self.ctx.work_pending = true;
        if self.checkpoint.phase == Phase::Waiting {
            self.leader_step_done(completion.op);
        }
    }

    /// The shard's part is written: the leader may go on.
    fn contribute(&mut self) {
        assert_eq!(self.checkpoint.ops, 0, "nodes and roots are written before the handover");
        let mine = (0..self.ctx.limits.geometry.vshards_count as u16).map(VShard::new);
        let mine = mine.filter(|vshard| self.ctx.shard_map.owner(*vshard) == self.ctx.id);
        let clean = self.checkpoint.begin.is_some_and(|begin| begin.clean);
        let contribution = Contribution {
            rows: self.space.extents.rows(),
            roots: mine.map(|vshard| (vshard, self.map.root(vshard).version)).collect(),
            log: self.log.state(clean),
        };
        self.checkpoint.phase = Phase::Waiting;
        if planted!(RecycledBeforeSuperblock) {
            self.log.recycle(self.checkpoint.redo);
        }
        self.ctx.send(ShardId::LEADER, Message::Ready(Box::new(contribution)));
    }

    /// Both copies of the superblock are durable.
    pub(in crate::engine) fn end_checkpoint(&mut self, superblock: Superblock) {
        assert_eq!(
            self.checkpoint.phase,
            Phase::Waiting,
            "the superblock follows the last contribution"
        );
        let begin = self.checkpoint.begin.take().expect("it has begun");
        let redo = self.checkpoint.redo;
        self.checkpoint.phase = Phase::Idle;
        self.checkpoint.superblock = superblock;
        self.ctx.stats.checkpoints += 1;
        self.log.recycle(redo);
        self.use_new_segments();
        let freed = self.space.extents.end_checkpoint();
        self.space.summaries.extend(self.space.extents.filled());
        let compacts = self.compaction.compactor.look_again();
        self.note_reclaimed(compacts);
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
            self.checkpoint.wanted = true;
        }
        self.ctx.work_pending = true;
    }

    /// No checkpoint will end any more.
    pub(in crate::engine) fn fail_checkpoint(&mut self, stopped: &Error) {
        let c = &mut self.checkpoint;
        let waiters: Vec<Token> = c.waiters.drain(..).chain(c.next_waiters.drain(..)).collect();
        for token in waiters {
            self.ctx.reply(token, Err(stopped.clone()));
        }
    }

    fn trim_log_early(&mut self) {
        if planted!(LogTrimmedEarly) {
            self.log.recycle(Lsn::MAX);
        }
    }
}
