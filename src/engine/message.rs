//! The messages that shards send each other. Drivers carry them and never look into them.
//!
//! Invariants
//! 1. Between two shards messages arrive in the order in which they were sent, each once.
//! 2. No sender waits for room: the protocols bound how many messages can be in flight between two
//!    shards (commits in progress at their owner, one checkpoint, one compaction for each shard),
//!    not the driver that carries them.
//!
//! ```text
//! commit      owner --Prepare--> part --Vote--> owner --Decide--> part --Applied, Durable--> owner
//! checkpoint  any --WantCheckpoint--> leader --Begin--> all --Began--> leader --Redo--> all
//!             all --Captured--> all --Ready--> leader (table, flush, superblock) --Done--> all
//! opening     all --Redone--> leader, then a checkpoint
//! closing     leader --Quiesce--> all --Quiet--> leader
//! space       any --WantSpace--> leader --Granted | Denied--> any
//!             any --DonateExtents--> others --Granted, maybe none--> any
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
    /// The answer to `Prepare`.
    Vote(u64, Vote),
    /// All votes are in.
    Decide(u64, Decision),
    /// The part is visible.
    Applied(u64),
    /// The part is durable.
    Durable(u64),
    /// A request waits until everything up to here is durable: the receiver must write its open
    /// group.
    RequestFlush(Lsn),
    /// The sender has stopped after a failed write or flush: so must every other shard.
    Failed(Error),
    /// A checkpoint is wanted.
    WantCheckpoint(Pace),
    /// A checkpoint begins.
    Begin(Begin),
    /// The sender waits for the end of the checkpoint under way.
    AskForHurry,
    /// Something waits for the end of the checkpoint.
    Hurry,
    /// The sender has begun the checkpoint.
    Began,
    /// Every shard has begun it: the new roots must reflect every record up to here.
    Redo(Lsn),
    /// The sender's trees are captured; carries what this means for the extents of the receiver.
    Captured(Box<Handover>),
    /// The sender's part of the checkpoint is written; carries its part of the table and the
    /// superblock.
    Ready(Box<Contribution>),
    /// The checkpoint is durable, by this superblock.
    Done(Box<Superblock>),
    /// The sender has redone its part of the log.
    Redone,
    /// The store is being closed: take no more requests, and say when the last is done.
    Quiesce,
    /// The sender has no request in progress.
    Quiet,
    /// The sender needs more extents, and may exceed the limit by this many.
    WantSpace(u32),
    /// The receiver owns these extents from now on.
    Granted(Vec<ExtentNo>),
    /// The data space can't grow.
    Denied,
    /// The receiver gives some free extents to the sender, if it has more than it needs; or
    /// (`Stuck`) if it has more than two, because the sender can't finish an opening or a
    /// checkpoint.
    DonateExtents(Urgency),
    /// Compaction needs this item moved away from here.
    Move(ItemKind, BlockAddr),
    /// The item that was here is on its way, or need not move, or can't be read.
    Moved(BlockAddr, Option<Error>),
}

/// One shard's part of a commit.
#[derive(Clone, Debug, Default)]
pub struct PrepareRequest {
    /// The pages read, each with the version read.
    pub reads: Vec<(PageKey, Lsn)>,
    /// The changes, in order.
    pub changes: Vec<(PageKey, Change)>,
    /// Whether it is the part of the owner, which logs a record even without pages of its own.
    pub owner_logs: bool,
    /// When the commit was first requested: the oldest goes first.
    pub since: Micros,
}

/// A shard's vote on its part of a commit.
#[derive(Debug)]
pub enum Vote {
    /// All pages are as they were read, are held, and have their room reserved; carries the newest
    /// version that was read.
    Yes(Lsn),
    /// A page is held by another commit.
    Conflict,
    /// Memory, log room or space is short for now.
    Busy,
    /// The part can't be carried out.
    No(Error),
}

/// The owner's decision about a part.
#[derive(Clone, Copy, Debug)]
pub enum Decision {
    /// The part is carried out under this LSN; a request waits for its durability, or for its
    /// effect, or for neither.
    Commit {
        /// The LSN.
        lsn: Lsn,
        /// Whether a request waits until it is durable.
        urgent: bool,
    },
    /// The part is dropped.
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

/// The urgency of a request for space.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Urgency {
    /// The limit may be exceeded by this many extents.
    Overcommit(u32),
    /// An opening or a checkpoint can't finish without it.
    Stuck,
}

/// The properties of a checkpoint that begins.
#[derive(Clone, Copy, Debug)]
pub struct Begin {
    /// The epoch that it begins, if it ends a recovery.
    pub new_epoch: Option<NewEpoch>,
    /// Whether it closes the store.
    pub clean: bool,
    /// How fast its pages go to their places.
    pub pace: Pace,
}

/// How fast the pages of a checkpoint go to their places.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Pace {
    /// Spread over the log that is left.
    Spread,
    /// At once: something waits for its end.
    Urgent,
}

/// What a capture means for the extents of another shard.
#[derive(Debug, Default)]
pub struct Handover {
    /// Places that the new roots name and the old ones don't.
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
    /// The length of its log, and where it ends.
    pub log: LogState,
}
