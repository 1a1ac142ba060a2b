//! Planted bugs: each must be caught by the ordinary checks, or the checks prove nothing.
//!
//! A place in the engine or in the simulated disk calls [`planted`] at the moment when the bug
//! would do its damage, and misbehaves if the answer is yes. Bugs are planted per thread, so
//! recovery can call it, too. Calls are counted, so that a test can tell "not caught" from "never
//! reached". To add a bug, add its line in the list, and one call in the code. A bug that needs
//! more than that is a patch in `tests/mutants`, which `scripts/mutants --patches` runs.
//!
//! It is compiled only for tests and for the feature `sim`, never into a release of the engine.

use std::cell::Cell;

/// Declares the bugs: each has a line of documentation and a name.
macro_rules! canaries {
    ($($(#[$doc:meta])+ $name:ident,)+) => {
        /// A bug that can be planted; at most one at a time.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Canary {
            $($(#[$doc])+ $name,)+
        }

        impl Canary {
            /// All of them.
            pub const ALL: &[Canary] = &[$(Canary::$name,)+];
        }
    };
}

canaries! {
    /// A flush is reported as done and makes nothing durable. Planted in the simulated disk.
    FlushSkipped,
    /// A write that transferred only a part is taken for complete. Planted in the simulated disk.
    ShortWriteIgnored,
    /// A durable commit is acknowledged before its log write and flush are done.
    AcknowledgedEarly,
    /// A log segment is recycled before a durable root covers the records in it.
    LogTrimmedEarly,
    /// A shard recycles its log when its own roots are written: others, and the superblock, are not
    /// yet.
    RecycledBeforeSuperblock,
    /// A segment by which the log has grown is used before a superblock that counts it is durable.
    SegmentUsedUncounted,
    /// The superblock counts a segment whose file could not be made.
    SegmentCountedUnmade,
    /// A checkpoint does not wait until every record up to its redo LSN is applied at the shard.
    RedoNotAwaited,
    /// A commit of one shard does not wait for the hold of a commit over shards.
    HoldIgnored,
    /// Pages that a commit over shards only read are not held until it is decided.
    ReadsNotHeld,
    /// A shard votes without looking whether what was read there has changed.
    PartNotValidated,
    /// A reader of an absent page is not told of the commit that freed it: it can't wait until that
    /// is durable.
    FreeUntold,
    /// A part is reported as durable when it is applied.
    PartDurableEarly,
    /// The owner's bound rises when its own part is durable: the watermark passes parts that are
    /// not.
    PartsHoldNothingBack,
    /// FLUSH waits for what its own shard has allocated only.
    FlushForOwnShard,
    /// An idle shard's bound is the next LSN instead of none: it holds the watermark back for ever.
    IdleHoldsBack,
    /// A parked shard does not say what its replies wait for: nobody wakes it.
    NobodyWoken,
    /// The cut passes LSNs that no log accounts for.
    GapIgnored,
    /// Recovery takes a commit over shards for complete though a part is missing.
    PartIgnored,
    /// Recovery takes a group for complete without looking at the pages written straight to their
    /// places.
    PlacedUnchecked,
    /// A new epoch begins right above the LSNs found, not above those that may have been allocated.
    LsnsReused,
    /// A flush that failed is taken for done: the next one succeeds, and proves nothing.
    FlushErrorForgotten,
    /// A log write that failed is taken for done.
    WriteErrorForgotten,
    /// A page that could not be read is served as whatever its memory held.
    ReadErrorForgotten,
    /// A flush covers the log only, not the pages that its groups wrote straight to their places.
    DataNotFlushed,
    /// The superblock is written before a flush of the roots that it names.
    RootsNotFlushed,
    /// A group begins with the last block of the one before, which holds acknowledged records.
    TailBlockRewritten,
    /// A page version goes into the map when it is written, whether its commit is durable or not.
    MappedTooSoon,
    /// A moved page goes into the map whether or not a commit has replaced it meanwhile.
    MovedAnyway,
    /// A page is served whatever its checksum is.
    PageSumIgnored,
    /// A map node is used whatever its checksum is.
    NodeSumIgnored,
    /// A map node that was being read while the tree above it changed is taken all the same: it has
    /// no parent in memory.
    OrphanInserted,
    /// A root or a table of the right number is taken for the one that the superblock names,
    /// whatever its checksum is.
    NamedSumIgnored,
    /// A gap at or below a recorded watermark is taken for the torn end of the log.
    DamageTakenForTail,
    /// Recovery takes the first block that begins no group for the end of a segment: a later
    /// watermark behind it goes unseen.
    SegmentEndsAtGap,
    /// Recovery redoes what lies above the cut, too.
    CutIgnored,
    /// Recovery goes on from what it has read before a flush has covered it: a dead process may not
    /// have flushed it.
    ReadNotFlushed,
    /// A checkpoint in the middle of the redo waits for a page that the redo finds written already.
    RedoneUnsettled,
    /// Opening waits for space for ever where there is none for the pages and map nodes of the
    /// recovery.
    OpeningWaitsForSpace,
    /// The page table keeps an entry of every absent page that was ever asked for.
    AbsentKept,
    /// Recovery leaves out that pages were freed.
    FreeNotRedone,
    /// Whoever finds no memory is not registered as waiting for it: nobody looks again when readers
    /// give some back.
    MemoryWaiterForgotten,
    /// The deadline of dirty pages stays in the past while their writes are at the limit: the shard
    /// spins.
    DeadlineInThePast,
    /// The nodes of a virtual shard are captured only if there is a frame for each of them.
    CaptureAllAtOnce,
    /// The extent table is written only if there is a frame for each of its blocks.
    TableAllAtOnce,
    /// A commit is redone as a whole, however large it is beside the memory.
    RedoneAllAtOnce,
    /// A commit that could never find its memory waits for it.
    TooLargeAdmitted,
    /// A part of a commit over shards never goes in front of the commits of a shard, however long
    /// it has waited.
    VotesNeverFirst,
}

impl Canary {
    /// Whether this bug is planted; does not count as fired.
    pub fn is_planted(self) -> bool {
        PLANTED.with(Cell::get) == Some(self)
    }
}

thread_local! {
    static PLANTED: Cell<Option<Canary>> = const { Cell::new(None) };
    static FIRED: Cell<u64> = const { Cell::new(0) };
}

/// Plants a bug on this thread, or none.
pub fn plant(canary: Option<Canary>) {
    PLANTED.with(|planted| planted.set(canary));
}

/// Whether `which` is planted; if so, counts it as fired. Call it only where the bug changes
/// something.
pub fn planted(which: Canary) -> bool {
    let fires = which.is_planted();
    if fires {
        FIRED.with(|count| count.set(count.get() + 1));
    }
    fires
}

/// How often a planted bug has fired on this thread since the last call.
pub fn take_fired() -> u64 {
    FIRED.with(|count| count.replace(0))
}
