//! Planted bugs: each must be caught by the ordinary checks, or the checks prove nothing.
//!
//! A place in the engine or in the simulated disk asks [`planted`] at the moment at which the bug would do its
//! damage, and misbehaves if the answer is yes. Bugs are planted per thread: recovery, too, can ask. The question counts, so that a test can tell "not caught" from
//! "never reached". To add one: a variant, its line in [`Canary::ALL`], and one question in the code.
//!
//! It is compiled for tests and for the feature `sim` only, never into a release of the engine.

use std::cell::Cell;

/// A bug that can be planted; at most one at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Canary {
    /// A flush is reported as done and makes nothing durable. Planted in the simulated disk.
    FlushSkipped,
    /// A write that transferred only a part is taken for complete. Planted in the simulated disk.
    ShortWriteIgnored,
    /// A durable commit is acknowledged before its log write and flush are done.
    AcknowledgedEarly,
    /// A place is given out again while a durable root or a log record still names it.
    PlaceReusedEarly,
    /// A log segment is recycled before a durable root covers the records in it.
    LogTrimmedEarly,
}

impl Canary {
    /// All of them.
    pub const ALL: [Canary; 5] = [
        Canary::FlushSkipped,
        Canary::ShortWriteIgnored,
        Canary::AcknowledgedEarly,
        Canary::PlaceReusedEarly,
        Canary::LogTrimmedEarly,
    ];

    /// Whether this is the bug that is planted; does not count.
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

/// Whether `which` is the bug that is planted; counts it as fired if so. Ask only where the bug changes something.
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
