//! Who is blocked in a shard, and by what: one rule for waiting instead of a list of cases.
//!
//! Every lap of a turn tries every step, and a step that finds a shortage registers itself. So
//! after a turn the set says exactly who waits now, and the audit can ask of each who will wake it.
//!
//! Invariants
//! 1. A step that stops for memory, log room, space, the watermark or a node write is registered in
//!    the lap in which it stops; [`Shard::ensure_frames`] registers its caller itself.
//! 2. Whoever is registered is woken by something under way, or by a deadline. Memory always has a
//!    deadline: readers drop their pages on other threads and tell nobody.
//! 3. A step keeps the time since when it has been blocked without a success, and since when again
//!    and again. The first in its queue gets `Busy` if pages pinned by readers are the cause, after
//!    [`MEMORY_WAIT_US`] without a success or [`MEMORY_WAIT_MAX_US`] with some; and after
//!    [`MEMORY_WAIT_MAX_US`] without one whatever the cause is, unless a write under way will give
//!    memory back. Dirty map nodes are never left to be the cause: a checkpoint is asked for.
//!
//! It does not decide who goes first: each queue is first in, first out.

use super::requests::PendingKind;
#[cfg(any(test, feature = "sim"))]
use super::txn::participant::Reserved;
use super::{OpKind, Shard};
use crate::base::error::{Error, ErrorKind};
use crate::base::{Lsn, Micros};
use crate::memory::Arena;

/// How often a step that is blocked by memory tries again, if nothing else happens.
pub(super) const MEMORY_RETRY_US: Micros = 10_000;
/// How long the first in a queue waits for memory that readers have pinned.
const MEMORY_WAIT_US: Micros = 1_000_000;
/// How long it waits at most, whatever holds the memory: nothing that the shard does by itself
/// takes that long.
const MEMORY_WAIT_MAX_US: Micros = 10_000_000;
/// After how long a shortage counts as one of memory, and not only as one of frames between two
/// completions.
const SHORTAGE_US: Micros = 100_000;
/// A step that has not been blocked for so long begins to wait anew.
const FORGOTTEN_US: Micros = 10 * MEMORY_RETRY_US;
/// Requests under way keep pages in this part of the memory; one more is begun below it.
const DATA_SHARE: usize = 4;
/// The most map nodes that are above a page, its leaf included: who reads it needs them.
const PATH_NODES: u32 = 9;

/// A step of the shard that may have to wait.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Step {
    /// The first commit that is ready.
    Commit,
    /// A vote on a part of a commit over shards: it says "not now", and is asked again.
    Vote,
    /// Commits over shards that have all votes.
    Decide,
    NodeRead,
    PageRead,
    /// The batch that is redone.
    Redo,
    /// A group that is read to be redone.
    RedoRead,
    Compaction,
    /// Dirty pages to their places.
    WriteBack,
    /// Of the checkpoint: map nodes, summaries, extent table.
    Capture,
    Summary,
    Table,
}

const STEPS: usize = Step::Table as usize + 1;

impl Step {
    /// Without it no checkpoint ends, and without checkpoints nothing leaves memory: it may take
    /// the frames that are kept for it.
    pub(super) fn is_of_checkpoint(self) -> bool {
        matches!(self, Step::Capture | Step::Summary | Step::Table)
    }
}

/// Who waits in these is refused in the end.
const REFUSED: [Step; 4] = [Step::Commit, Step::Redo, Step::NodeRead, Step::PageRead];

/// What a step waits for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Lack {
    /// Frames.
    Memory,
    /// Room or buffers of the log.
    LogRoom,
    /// Data space.
    Space,
    /// Dirty pages and nodes to be written: they are too many.
    WriteBack,
    /// The watermark.
    Watermark,
    /// A part of a commit over shards in front, to be voted for.
    Turn,
}

const LACKS: [Lack; 6] =
    [Lack::Memory, Lack::LogRoom, Lack::Space, Lack::WriteBack, Lack::Watermark, Lack::Turn];

/// How a step is blocked by memory.
#[derive(Clone, Copy, Default, Debug)]
struct Shortage {
    since: Micros,
    /// The same, with successes in between: since when it has been met again and again.
    pressed_since: Micros,
    /// When it was met last.
    met_at: Micros,
    /// There was no success since.
    is_blocked: bool,
    /// Frames that must be free, those that are left alone included.
    frames: u32,
}

/// Memory that is not to be had for a while.
#[derive(Default)]
pub(super) struct Held {
    /// Frames that are taken for good: log buffers and the superblock's.
    pub fixed: u32,
    /// Pages whose bytes requests under way need in memory, each time that one is needed.
    pub data: usize,
    /// Pages that compaction is about to move away, and nodes that wait for a read before it moves
    /// them.
    pub moves: usize,
    /// What requests of callers take of the heap (see `budget`).
    pub request_bytes: u64,
    /// Captures of freed pages: each keeps an entry of the page table until it is in the map.
    pub frees_unpublished: u64,
}

impl Held {
    /// What is taken before the shard begins.
    pub(super) fn at_first(arena: &mut Arena) -> Held {
        Held { fixed: arena.blocks() - arena.free_blocks(), ..Held::default() }
    }
}

/// Who is blocked.
#[derive(Default, Debug)]
pub(super) struct Blocked {
    /// By lack: a bit for each step.
    steps: [u16; LACKS.len()],
    memory: [Shortage; STEPS],
    /// The part of a commit over shards that others let go first.
    pub in_front: Option<super::txn::precedence::InFront>,
    /// Requests for frames that failed in this lap: each has a step registered.
    refusals: u32,
    /// The watermark that somebody waits for because too much is drawn above it.
    far_ahead: Option<Lsn>,
    /// When it was looked last into who has the memory.
    judged_at: Micros,
}

impl Blocked {
    /// A new lap begins: whoever is still blocked says so again.
    pub(super) fn begin_lap(&mut self) {
        self.steps = Default::default();
        self.refusals = 0;
        self.far_ahead = None;
    }

    pub(super) fn register(&mut self, step: Step, lack: Lack) {
        self.steps[lack as usize] |= 1 << step as usize;
    }

    /// `step` waits until the watermark has reached `lsn`.
    pub(super) fn wait_for_watermark(&mut self, step: Step, lsn: Lsn) {
        self.register(step, Lack::Watermark);
        self.far_ahead = Some(self.far_ahead.map_or(lsn, |before| before.min(lsn)));
    }

    pub(super) fn awaited_lsn(&self) -> Option<Lsn> {
        self.far_ahead
    }

    pub(super) fn is_blocked(&self, step: Step, lack: Lack) -> bool {
        self.steps[lack as usize] & 1 << step as usize != 0
    }

    /// Whether a step of a checkpoint is blocked by memory.
    #[cfg(any(test, feature = "sim"))]
    pub(super) fn is_checkpoint_starved(&self) -> bool {
        let steps = [Step::Capture, Step::Summary, Step::Table];
        steps.into_iter().any(|step| self.is_blocked(step, Lack::Memory))
    }

    pub(super) fn lacks_memory(&self) -> bool {
        self.steps[Lack::Memory as usize] != 0
    }

    /// `step` found fewer than `frames` free.
    pub(super) fn refuse_frames(&mut self, step: Step, frames: u32, now: Micros) {
        self.refusals += 1;
        if planted!(MemoryWaiterForgotten) {
            return;
        }
        self.register(step, Lack::Memory);
        let shortage = &mut self.memory[step as usize];
        let is_forgotten = now > shortage.met_at + FORGOTTEN_US;
        if is_forgotten {
            shortage.pressed_since = now;
        }
        if is_forgotten || !shortage.is_blocked {
            shortage.since = now;
        }
        (shortage.met_at, shortage.is_blocked, shortage.frames) = (now, true, frames);
    }

    /// `step` found its frames.
    pub(super) fn grant_frames(&mut self, step: Step) {
        self.memory[step as usize].is_blocked = false;
    }

    /// How long `step` has been blocked by memory.
    fn waited(&self, step: Step, now: Micros) -> Option<Micros> {
        self.is_blocked(step, Lack::Memory).then(|| now - self.memory[step as usize].since)
    }

    /// Whether `step` has been blocked by memory for so long that it is to be judged who has it:
    /// without a success, or again and again. A read that gets a frame each time that another
    /// request is refused would not end otherwise.
    fn is_to_be_judged(&self, step: Step, now: Micros) -> bool {
        self.waited(step, now)
            .is_some_and(|waited| waited >= MEMORY_WAIT_US || self.is_pressed(step, now))
    }

    /// Whether `step` has met the shortage again and again for as long as anybody waits at most.
    fn is_pressed(&self, step: Step, now: Micros) -> bool {
        now - self.memory[step as usize].pressed_since >= MEMORY_WAIT_MAX_US
    }
}

impl Shard {
    /// At the end of a turn in which somebody found no memory: what keeps it is brought to give it
    /// back, or the first in the queue is refused.
    pub(super) fn relieve_memory(&mut self) {
        if !self.ctx.blocked.lacks_memory() {
            return;
        }
        let now = self.ctx.now;
        let waited = |step| self.ctx.blocked.waited(step, now);
        let longest =
            [Step::Commit, Step::Vote, Step::NodeRead, Step::PageRead, Step::Redo, Step::RedoRead]
                .into_iter()
                .filter_map(waited)
                .max();
        let Some(longest) = longest else { return };
        let at_rest = self.ctx.ops.is_empty()
            && self.writeback.dirty.is_empty()
            && self.writeback.versions.is_empty();
        let is_long = at_rest
            || longest >= SHORTAGE_US
            || REFUSED.into_iter().any(|step| self.is_met_still(step));
        if is_long
            && self.ctx.failed.is_none()
            && self.map.dirty_count() > 0
            && !self.checkpoint_under_way()
        {
            // A dirty node stays in memory until a checkpoint has written it.
            self.need_checkpoint();
        }
        if REFUSED.into_iter().any(|step| self.ctx.blocked.is_to_be_judged(step, now)) {
            self.refuse_for_memory();
        }
    }

    /// Whether `step` is blocked by memory, and has been again and again for as long as a request
    /// waits at most.
    fn is_met_still(&self, step: Step) -> bool {
        self.ctx.blocked.is_blocked(step, Lack::Memory)
            && self.ctx.blocked.is_pressed(step, self.ctx.now)
    }

    /// Whether requests under way leave most of the memory to those in front of them, who may need
    /// it to end.
    pub(super) fn holds_little(&self) -> bool {
        self.requests.held.data <= self.frames_usable() as usize / DATA_SHARE
    }

    /// The same for parts of commits over shards: they can't wait, so they get a little more.
    pub(super) fn holds_little_for_parts(&self) -> bool {
        self.requests.held.data <= self.frames_usable() as usize / DATA_SHARE * 3 / 2
    }

    /// Refuses the first in each queue that has waited long enough, if what readers have pinned is
    /// the cause, or far too long.
    fn refuse_for_memory(&mut self) {
        if self.ctx.now < self.ctx.blocked.judged_at + MEMORY_RETRY_US {
            return;
        }
        self.ctx.blocked.judged_at = self.ctx.now;
        self.look_at_pinned();
        let pinned = self.pinned_by_readers();
        // What commits that wait have pinned of the map comes back only with their answers. Where
        // readers have little of the memory, others are the cause.
        let readers_have_much = pinned >= self.frames_usable() / DATA_SHARE as u32;
        let kept = if readers_have_much && !self.gives_memory_back() {
            self.map.awaited_count(false) as u32
        } else {
            0
        };
        let others = self.cache.table.resident().held + PATH_NODES + kept;
        for step in REFUSED {
            let waited = self
                .ctx
                .blocked
                .waited(step, self.ctx.now)
                .filter(|_| self.ctx.blocked.is_to_be_judged(step, self.ctx.now));
            let Some(waited) = waited else { continue };
            let frames = self.ctx.blocked.memory[step as usize].frames;
            // Whether it would be refused even if all else had been given back.
            let by_pins = pinned > 0 && pinned + frames + others > self.frames_usable();
            // Whoever comes next has waited behind the one that was refused: not as long again for
            // each, if nothing is under way.
            let is_stuck =
                self.ctx.ops.is_empty() && self.ctx.blocked.is_pressed(step, self.ctx.now);
            let patience = if is_stuck { SHORTAGE_US } else { MEMORY_WAIT_MAX_US };
            if !by_pins && (waited < patience || self.gives_memory_back()) {
                continue;
            }
            let error = match &self.ctx.failed {
                // What is dirty stays so: to try again would not help.
                Some(failed) if !by_pins => failed.clone(),
                _ => self.no_memory(frames, pinned, by_pins),
            };
            match step {
                Step::NodeRead => self.refuse_node_read(&error),
                Step::PageRead => self.refuse_page_read(&error),
                _ => self.refuse_ready(error),
            }
            if by_pins {
                // The next one may be refused at once: it has waited as long.
                self.ctx.blocked.judged_at = 0;
            }
            self.ctx.work_pending = true;
        }
    }

    /// Whether something under way ends with more memory than there was: a write makes what it
    /// writes clean. Reads only take memory, and where it is short there is always one under way:
    /// whoever waited until there is none would wait without end.
    fn gives_memory_back(&self) -> bool {
        let is_read = |op: &OpKind| matches!(op, OpKind::PageRead(_) | OpKind::NodeRead(_));
        let writes = self.ctx.failed.is_none() && self.checkpoint_under_way();
        writes || !self.ctx.ops.iter().all(|(_, op)| is_read(op))
    }

    fn no_memory(&self, frames: u32, pinned: u32, by_pins: bool) -> Error {
        let usable = self.frames_usable();
        if by_pins {
            return Error::new(
                ErrorKind::Busy,
                format_args!(
                    "no memory is left in shard {}: readers have pinned {pinned} of its {usable} \
                     pages, and {frames} must be free; drop PageRefs, or open with more \
                     memory_bytes",
                    self.ctx.id.get()
                ),
            );
        }
        Error::new(
            ErrorKind::Busy,
            format_args!(
                "no memory for {} s in shard {}: {frames} of {usable} pages must be free, readers \
                 have pinned {pinned} ({}); try again, with fewer requests at a time, or open \
                 with more memory_bytes",
                MEMORY_WAIT_MAX_US / 1_000_000,
                self.ctx.id.get(),
                self.memory()
            ),
        )
    }

    /// Refuses the commit that is first in the queue, or gives the recovery up.
    fn refuse_ready(&mut self, error: Error) {
        // One that waits for a node is told by that.
        let Some(waiter) = self
            .requests
            .ready
            .front()
            .copied()
            .filter(|waiter| !self.requests.pending[*waiter].is_waiting())
        else {
            return;
        };
        self.requests.ready.pop_front();
        match self.requests.pending[waiter].kind {
            PendingKind::Redo(_) => {
                self.release(waiter);
                self.fail(error);
            }
            _ => self.finish_commit(waiter, Err(error), Lsn::ZERO),
        }
    }

    /// Frames that are not taken for good: by log buffers and the superblock.
    pub(super) fn frames_usable(&self) -> u32 {
        self.ctx.arena.blocks() - self.requests.held.fixed
    }

    /// Frames that nobody but readers can give back: pages that the search for memory has found
    /// pinned, none of them let go of when it looked again, and frames that are nowhere in the
    /// shard any more. What is being written from or read into is left out as far as that is known.
    /// It looks at no page: a shard of much memory that is starved would do nothing else.
    fn pinned_by_readers(&mut self) -> u32 {
        let pinned =
            if self.cache.eviction.saw_all_pinned() { self.cache.eviction.pinned() } else { 0 };
        let accounted = self.requests.held.fixed
            + self.cache.table.resident().pages
            + self.map.nodes_count()
            + self.frames_in_ops();
        pinned + (self.ctx.arena.blocks() - self.ctx.arena.free_blocks()).saturating_sub(accounted)
    }

    /// Frames of operations under way that are neither in the table nor in the map.
    fn frames_in_ops(&self) -> u32 {
        let summary = self.space.extents.summary_blocks();
        let of = |op: &OpKind| match op {
            OpKind::PageRead(reads) => reads.len() as u32,
            OpKind::NodeRead(_) => 1,
            OpKind::SummaryWrite(_) | OpKind::SummaryRead(_) => summary,
            OpKind::Checkpoint | OpKind::RedoRead(_) => self.ctx.limits.vectored_pages_max as u32,
            // Images of versions that have been replaced since, at most.
            OpKind::GroupLog(_) => self.ctx.limits.inline_pages_max as u32,
            OpKind::GroupData(_, versions) | OpKind::PageWrite(versions) => versions.len() as u32,
            OpKind::GroupFlush(_) | OpKind::Grow(_) | OpKind::LogSegment => 0,
        };
        self.ctx.ops.iter().map(|(_, op)| of(op)).sum()
    }

    /// # Errors
    /// Somebody who waits without anybody who would wake it.
    #[cfg(any(test, feature = "sim"))]
    pub(super) fn audit_blocked(&self) -> Result<(), String> {
        if self.ctx.blocked.refusals > 0 && !self.ctx.blocked.lacks_memory() {
            return Err(format!(
                "{} requests for frames failed, and nobody is registered",
                self.ctx.blocked.refusals
            ));
        }
        // What parts of commits over shards have reserved is given back when the decision arrives,
        // by message.
        let under_way = !self.ctx.ops.is_empty()
            || self.checkpoint_under_way()
            || self.participant.reserved != Reserved::default();
        for lack in LACKS {
            let is_woken = match lack {
                Lack::Memory | Lack::Turn => self.next_due().is_some(),
                Lack::LogRoom | Lack::WriteBack => {
                    under_way || self.next_due().is_some() || self.waits_for().is_some()
                }
                Lack::Space => {
                    let reclaims = self.space.growing || self.compaction.compactor.count() > 0;
                    under_way || reclaims || self.next_due().is_some()
                }
                Lack::Watermark => self.waits_for().is_some(),
            };
            if self.ctx.blocked.steps[lack as usize] != 0 && !is_woken {
                return Err(format!(
                    "nobody wakes those who wait for {lack:?}: {:?}",
                    self.ctx.blocked
                ));
            }
        }
        Ok(())
    }
}
