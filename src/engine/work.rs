//! The work of a turn: one bit for each step, which is set wherever work for it is made.
//!
//! A turn runs the steps whose bits are set, in the order of the table in `shard`. A step may set
//! bits of other steps: one of a later step is served in the same lap, one of an earlier step in
//! the next lap.
//!
//! Invariants
//! 1. After a turn, a step whose bit is not set has nothing to do until something is delivered or a
//!    deadline passes. In tests a turn ends with a lap over all steps, which must find nothing.
//! 2. While a shard opens, closes, has failed, takes part in a checkpoint or has a step that is
//!    blocked, every event may unblock any step: each lap then runs all of them.
//!
//! It does *not* know what the steps do.

/// A step of a turn, in the order of a lap.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Work {
    /// Messages of the shard to itself.
    Loopback,
    /// Reads and moves whose pages are in memory.
    Finished,
    /// Parts of coordinated commits to vote on.
    Parts,
    /// Commits whose pages are in memory.
    Commits,
    /// The batch that is being redone.
    Redo,
    /// Coordinated commits whose votes to request again.
    Retries,
    /// Coordinated commits that have all votes.
    Decisions,
    /// Groups to close or to flush.
    Groups,
    /// Dirty pages to write.
    WriteBack,
    /// The leader's side of a checkpoint.
    Leader,
    /// This shard's side of a checkpoint.
    Checkpoint,
    /// Groups of the log to read while the store opens.
    RedoReads,
    /// Free space to keep ahead of need.
    Space,
    /// Items of extents that are being emptied.
    Compaction,
    /// Pages and nodes to move out of an extent.
    Moves,
    /// Summaries of extents to write.
    Summaries,
    /// Pages and nodes to read.
    Reads,
    /// The end of the store.
    Close,
}

/// The steps of a lap.
pub(super) const STEPS_COUNT: usize = Work::Close as usize + 1;

/// The steps that have work.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct WorkSet(u32);

const _: () = assert!(STEPS_COUNT <= u32::BITS as usize);

impl WorkSet {
    pub const NONE: WorkSet = WorkSet(0);
    pub const ALL: WorkSet = WorkSet((1 << STEPS_COUNT) - 1);

    pub fn is_empty(self) -> bool {
        self == WorkSet::NONE
    }

    pub fn add(&mut self, work: Work) {
        self.0 |= 1 << work as u32;
    }

    /// Removes `work`; returns whether it was in the set.
    pub fn take(&mut self, work: Work) -> bool {
        let before = self.0;
        self.0 &= !(1 << work as u32);
        self.0 != before
    }
}
