//! Records which steps of a shard are blocked, and by what: one rule for waiting instead of a list
//! of cases.
//!
//! As long as a step is blocked, every lap of a turn tries every step, and a step that finds a
//! shortage registers itself. So after a turn the set says exactly which steps wait, and the audit
//! can check for each what will wake it.
//!
//! Invariants
//! 1. A step that stops for memory, log room, space, the watermark or a node write is registered in
//!    the lap in which it stops; [`Shard::ensure_frames`](super::Shard::ensure_frames) registers
//!    its caller itself.
//! 2. Something in progress, or a deadline, wakes each registered step. Memory always has a
//!    deadline: readers drop their pages on other threads without notice.
//! 3. A step keeps the time since when it has been blocked without a success, and since when again
//!    and again. The first in its queue gets `Busy` if pages pinned by readers are the cause, after
//!    [`MEMORY_WAIT_US`] without a success or [`MEMORY_WAIT_MAX_US`] with some; and after
//!    [`MEMORY_WAIT_MAX_US`] without one whatever the cause is, unless a write under way will give
//!    memory back. Dirty map nodes never remain the cause: a checkpoint is requested.
//!
//! It does *not* decide which request goes first: each queue is first in, first out.

use crate::base::{Lsn, Micros};

/// How often a step that is blocked by memory tries again, if nothing else happens.
pub(super) const MEMORY_RETRY_US: Micros = 10_000;
/// How long the first in a queue waits for memory that readers have pinned.
const MEMORY_WAIT_US: Micros = 1_000_000;
/// How long it waits at most, whatever holds the memory: no work of the shard itself takes that
/// long.
pub(super) const MEMORY_WAIT_MAX_US: Micros = 10_000_000;
/// How long frames must be short before that counts as a shortage of memory, and not just as one
/// between two completions.
pub(super) const SHORTAGE_US: Micros = 100_000;
/// A step that has not been blocked for this long starts a new wait.
const FORGOTTEN_US: Micros = 10 * MEMORY_RETRY_US;
/// The most map nodes above a page, including its leaf: a read of the page needs them.
pub(super) const PATH_NODES: u32 = 9;

/// A step of the shard that may have to wait.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Step {
    /// The first commit that is ready.
    Commit,
    /// A vote on a part of a commit over shards: it votes "busy", and is asked again.
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

/// The steps whose requests are refused in the end.
pub(super) const REFUSED: [Step; 4] = [Step::Commit, Step::Redo, Step::NodeRead, Step::PageRead];

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
    /// A part of a commit over shards that is in front and has to be voted for.
    Turn,
}

pub(super) const LACKS: [Lack; 6] =
    [Lack::Memory, Lack::LogRoom, Lack::Space, Lack::WriteBack, Lack::Watermark, Lack::Turn];

/// How a step is blocked by memory.
#[derive(Clone, Copy, Default, Debug)]
struct Shortage {
    since: Micros,
    /// Since when it has been blocked again and again, with successes in between.
    pressed_since: Micros,
    /// When it was last blocked.
    met_at: Micros,
    /// Whether there was no success since.
    is_blocked: bool,
    /// Frames that must be free, including those that are left alone.
    frames: u32,
}

/// Who is blocked.
#[derive(Default, Debug)]
pub(super) struct Blocked {
    /// For each lack, a bit for each step.
    steps: [u16; LACKS.len()],
    memory: [Shortage; STEPS],
    /// Requests for frames that failed in this lap: each has a step registered.
    refusals: u32,
    /// The watermark that a step waits for because too much is allocated above it.
    far_ahead: Option<Lsn>,
    /// When the shard last determined what has the memory.
    pub(super) judged_at: Micros,
}

impl Blocked {
    /// Begins a lap: steps that are still blocked register again.
    pub(super) fn begin_lap(&mut self) {
        self.steps = Default::default();
        self.refusals = 0;
        self.far_ahead = None;
    }

    pub(super) fn register(&mut self, step: Step, lack: Lack) {
        self.steps[lack as usize] |= 1 << step as usize;
    }

    /// Registers that `step` waits until the watermark has reached `lsn`.
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

    /// Whether any step is blocked.
    pub(super) fn is_any(&self) -> bool {
        self.steps != [0; LACKS.len()]
    }

    pub(super) fn lacks_memory(&self) -> bool {
        self.steps[Lack::Memory as usize] != 0
    }

    /// Registers that `step` found fewer than `frames` free.
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

    /// Records that `step` found its frames.
    pub(super) fn grant_frames(&mut self, step: Step) {
        self.memory[step as usize].is_blocked = false;
    }

    /// How long `step` has been blocked by memory.
    pub(super) fn waited(&self, step: Step, now: Micros) -> Option<Micros> {
        self.is_blocked(step, Lack::Memory).then(|| now - self.memory[step as usize].since)
    }

    /// Whether `step` has been blocked by memory for so long, without a success or again and again,
    /// that the shard must determine what has it. Otherwise a read that gets a frame each time
    /// another request is refused would never end.
    pub(super) fn is_to_be_judged(&self, step: Step, now: Micros) -> bool {
        self.waited(step, now)
            .is_some_and(|waited| waited >= MEMORY_WAIT_US || self.is_pressed(step, now))
    }

    /// Whether `step` has been blocked again and again for the longest time that a request may
    /// wait.
    pub(super) fn is_pressed(&self, step: Step, now: Micros) -> bool {
        now - self.memory[step as usize].pressed_since >= MEMORY_WAIT_MAX_US
    }

    /// Frames that `step` lacked when it was last refused.
    pub(super) fn missed_frames(&self, step: Step) -> u32 {
        self.memory[step as usize].frames
    }

    /// Whether any step waits for `lack`.
    #[cfg(any(test, feature = "sim"))]
    pub(super) fn is_lacked(&self, lack: Lack) -> bool {
        self.steps[lack as usize] != 0
    }

    /// Requests for frames that failed in this lap.
    #[cfg(any(test, feature = "sim"))]
    pub(super) fn refusals(&self) -> u32 {
        self.refusals
    }
}
