//! What shards say to each other. Drivers carry messages and never look into them.
//!
//! Invariants
//! 1. Between two shards messages arrive in the order in which they were sent, each once.
//! 2. Nobody waits for room: how many can be under way between two shards is bounded by the
//!    protocols (commits under way at their owner, one checkpoint, one compaction a shard), not by
//!    the one who carries them.
//!
//! ```text
//! commit      owner --Prepare--> part --Vote--> owner --Decide--> part --Applied, Durable--> owner
//! checkpoint  any --Want--> leader --Begin--> all --Began--> leader --Redo--> all --Captured--> all
//!             all --Ready--> leader (table, flush, superblock) --Done--> all
//! opening     all --Redone--> leader, then a checkpoint        closing  leader --Quiesce--> all --Quiet--> leader
//! space       any --WantSpace--> leader --Granted | Denied--> any --Spare--> others --Granted--> any
//! compaction  owner of the extent --Move--> shard of the page --Moved--> owner
//! ```

use super::event::Change;
use crate::base::error::Error;
use crate::base::{BlockAddr, ExtentNo, Lsn, Micros, PageKey, VShard};
use crate::format::extent::{ItemKind, TableRow};
use crate::format::superblock::{LogState, RootVersion, Superblock};

/// A message from one shard to another.
#[derive(Debug)]
pub enum Message {
    /// The part of a commit over shards that concerns the receiver: hold its pages and vote.
    Prepare(u64, Box<PrepareRequest>),
    /// The answer.
    Vote(u64, Vote),
    /// All votes are in.
    Decide(u64, Decision),
    /// The part is visible.
    Applied(u64),
    /// The part is durable.
    Durable(u64),
    /// Somebody waits until everything up to here is durable: what is open is to be written.
    RequestFlush(Lsn),
    /// The sender has stopped after a failed write or flush: so must everybody.
    Failed(Error),
    /// A checkpoint is wanted.
    WantCheckpoint(Pace),
    /// One begins.
    Begin(Begin),
    /// The sender waits for the end of the checkpoint under way.
    AskForHurry,
    /// Somebody waits for its end.
    Hurry,
    /// The sender has begun it.
    Began,
    /// Everybody has: the new roots must reflect every record up to here.
    Redo(Lsn),
    /// The sender's trees are captured; what this means for the extents of the receiver.
    Captured(Box<Handover>),
    /// What the sender has to say in table and superblock; its part is written.
    Ready(Box<Contribution>),
    /// The checkpoint is durable, by this superblock.
    Done(Box<Superblock>),
    /// The sender has redone its part of the log.
    Redone,
    /// The store is being closed: take no more requests, and say when the last is done.
    Quiesce,
    /// The sender has no request under way.
    Quiet,
    /// The sender needs more extents, and may go so many beyond the limit.
    WantSpace(u32),
    /// These extents are the receiver's from now on.
    Granted(Vec<ExtentNo>),
    /// The data space can't grow.
    Denied,
    /// Give some free extents to the sender, if you have more than you need; or (`Stuck`) more than
    /// two, because the sender can't finish an opening or a checkpoint.
    DonateExtents(Urgency),
    /// Compaction wants this moved from here.
    Move(ItemKind, BlockAddr),
    /// What was there is on its way, or needs not move; or it can't be read.
    Moved(BlockAddr, Option<Error>),
}

/// One shard's part of a commit.
#[derive(Clone, Debug, Default)]
pub struct PrepareRequest {
    /// Pages read, with the version read.
    pub reads: Vec<(PageKey, Lsn)>,
    /// Changes, in order.
    pub changes: Vec<(PageKey, Change)>,
    /// It is the part of the owner, which logs a record even without pages of its own.
    pub owner_logs: bool,
    /// When the commit was asked for first: the oldest goes first.
    pub since: Micros,
}

/// What a shard says to its part of a commit.
#[derive(Debug)]
pub enum Vote {
    /// All is as it was read, held and reserved; the newest version that was read.
    Yes(Lsn),
    /// A page is held by another commit.
    Conflict,
    /// Memory, log room or space are short for now.
    Busy,
    /// It can't be done.
    No(Error),
}

/// What becomes of a part.
#[derive(Clone, Copy, Debug)]
pub enum Decision {
    /// It is done under this LSN; somebody waits for its durability, or for its effect, or for
    /// neither.
    Commit {
        /// The LSN.
        lsn: Lsn,
        /// Somebody waits until it is durable.
        urgent: bool,
    },
    /// Nothing is done.
    Abort,
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

/// How much a request for space matters.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Urgency {
    /// The limit may be exceeded by this many extents.
    Overcommit(u32),
    /// Nothing goes on without it.
    Stuck,
}

/// The beginning of a checkpoint.
#[derive(Clone, Copy, Debug)]
pub struct Begin {
    /// It begins an epoch: the one that ends a recovery.
    pub new_epoch: Option<NewEpoch>,
    /// It ends the store's life.
    pub clean: bool,
    /// How fast its pages go to their places.
    pub pace: Pace,
}

/// How fast the pages of a checkpoint go to their places.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Pace {
    /// Spread over the log that is left.
    Spread,
    /// At once: somebody waits for its end.
    Urgent,
}

/// What a capture means for the extents of another shard.
#[derive(Debug, Default)]
pub struct Handover {
    /// Places that the new roots name and the old ones did not.
    pub named: Vec<(BlockAddr, ItemKind)>,
    /// Places that the new roots do not name, free with this checkpoint.
    pub retired: Vec<BlockAddr>,
    /// Places that the new roots do not name, free with the next checkpoint.
    pub pending_free: Vec<BlockAddr>,
}

/// A shard's part of table and superblock.
#[derive(Debug)]
pub struct Contribution {
    /// Rows of the extents that it owns.
    pub rows: Vec<(ExtentNo, TableRow)>,
    /// Its roots.
    pub roots: Vec<(VShard, RootVersion)>,
    /// How long its log is, and where it ends.
    pub log: LogState,
}
