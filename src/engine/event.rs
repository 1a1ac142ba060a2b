//! The requests that a shard takes, and their answers.

use super::pins::{Pin, PinReservation};
use crate::base::{BLOCK, Lsn, PageId, PageKey, VolumeId};
use crate::memory::FrameRef;
use bytes::Bytes;
use smallvec::SmallVec;
use std::ops::Deref;

/// The driver's name for a request in progress; each gets exactly one reply.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Token(pub u64);

/// A caller's request to a shard.
#[derive(Debug)]
pub enum Request {
    /// The newest version of these pages, durable or not; unwritten pages read as zeros. At most
    /// `vectored_pages_max` of them.
    Read(SmallVec<[PageKey; 1]>),
    /// Finds the pages of this shard in a part of a volume that are not absent.
    Allocated(PageRange),
    /// One atomic commit.
    Commit(Commit),
    /// Replies when every commit acknowledged before is durable.
    Flush,
    /// Replies when the commit with this LSN, and all before it, are durable.
    WaitDurable(Lsn),
    /// Writes all dirty pages and a new page map; afterwards recovery need not read the log up to
    /// here.
    Checkpoint,
    /// Counters.
    Stats,
    /// Finishes the requests in progress, makes a checkpoint and records the end of the log. Later
    /// requests get `Closed`.
    Close,
}

/// A request for the pages of a volume that exist.
#[derive(Debug, Clone, Copy)]
pub struct PageRange {
    /// The volume.
    pub volume: VolumeId,
    /// The first page requested.
    pub first: PageId,
    /// The last page requested.
    pub last: PageId,
    /// Roughly the most ranges to return.
    pub ranges_max: usize,
}

/// One atomic commit: all of `changes`, in order, if no page of `reads` has changed since.
#[derive(Debug, Default)]
pub struct Commit {
    /// Pages read, with the LSN of the version read (zero for an absent page).
    pub reads: Vec<(PageKey, Lsn)>,
    /// Changes; a page may occur more than once. Empty: only the reads are validated.
    pub changes: Vec<(PageKey, Change)>,
    /// Whether to reply only when it is durable, or as soon as it is ordered and visible.
    pub durable: bool,
}

/// A change of one page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Replaces the whole page by exactly 4,096 bytes.
    Put(Bytes),
    /// Replaces some bytes of the page, at least one. An absent page counts as zeros.
    Patch {
        /// The first byte to replace, from 0 to 4,095.
        offset: u32,
        /// The new bytes; they end within the page.
        bytes: Bytes,
    },
    /// Frees the page: from then on it is absent, and reads as zeros.
    Free,
}

/// Answers to [`Request`]s.
#[derive(Debug)]
pub enum Response {
    /// To `Read`, in the order of the request.
    Pages(SmallVec<[PageRef; 1]>),
    /// To `Allocated`: first and last pages of ranges, in order; and where to continue, if that was
    /// not all.
    Allocated {
        /// The ranges that were found.
        ranges: Vec<(PageId, PageId)>,
        /// Everything before this page was reported.
        next: Option<PageId>,
        /// The newest change of a visited page that may not be durable yet, or zero. Freeing a page
        /// counts as a change.
        lsn: Lsn,
    },
    /// To `Commit`: its LSN; for a commit without changes the highest LSN it read.
    Committed(Lsn),
    /// To `Flush`: everything up to here is durable.
    Flushed(Lsn),
    /// To `WaitDurable`.
    Durable,
    /// To `Checkpoint`: the log up to here is no longer needed.
    Checkpointed(Lsn),
    /// To `Stats`.
    Stats(Box<crate::base::metrics::ShardStats>),
    /// To `Close`.
    Closed,
}

/// A page as it was when it was read, without a copy. Dereferences to its 4,096 bytes, which never
/// change.
///
/// It pins the page: its memory is not reused until the last clone is dropped, so hold it briefly.
/// Once the pins of a handle take a quarter of the memory, its reads get `Busy`. A page stays valid
/// after the store is closed.
#[derive(Clone, Debug)]
pub struct PageRef {
    frame: Option<FrameRef>,
    lsn: Lsn,
    /// Counts against the handle that read the page.
    pin: Option<Pin>,
}

static ZEROS: [u8; BLOCK] = [0; BLOCK];

impl PageRef {
    pub(crate) fn new(frame: Option<FrameRef>, lsn: Lsn) -> Self {
        PageRef { frame, lsn, pin: None }
    }

    /// The LSN of the commit that wrote this version, which may not be durable yet:
    /// `Store::wait_durable` waits for it. For an absent page it is the LSN of the commit that
    /// freed the page while that commit may not be durable, and zero afterwards.
    pub fn lsn(&self) -> Lsn {
        self.lsn
    }

    /// The version that a transaction has read: zero for every absent page. A page that is written
    /// and freed again in between is as absent as before.
    pub(crate) fn version(&self) -> Lsn {
        if self.is_absent() { Lsn::ZERO } else { self.lsn }
    }

    /// The same page, counted against `share`; a page without memory does not count.
    pub(crate) fn counted(mut self, share: &mut PinReservation) -> PageRef {
        if !self.is_absent() {
            self.pin = share.one();
        }
        self
    }

    /// The same page with its pin, which a page without memory gives back.
    pub(crate) fn pinned(self, pin: Pin) -> PageRef {
        PageRef { pin: Some(pin).filter(|_| self.frame.is_some()), ..self }
    }

    /// Whether the page was never written, or was freed. Then its bytes are zeros.
    pub fn is_absent(&self) -> bool {
        self.frame.is_none()
    }
}

impl Deref for PageRef {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        self.frame.as_deref().unwrap_or(&ZEROS)
    }
}
