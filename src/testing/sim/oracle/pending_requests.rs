//! The requests that are not answered yet, as the oracle remembers them.
//!
//! It does *not* check answers.

use super::Tolerance;
use crate::base::{BLOCK, Lsn, Micros, PageKey, ShardId};
use crate::engine::{Change, Commit, Request};
use crate::testing::sim::model;

/// The most map nodes above a page, including its leaf.
const PATH_NODES_MAX: u64 = 9;

/// A request in progress.
pub(super) struct PendingRequest {
    pub what: Kind,
    pub at: Micros,
    /// The shard that it went to.
    pub shard: ShardId,
    /// The newest LSN when it was made.
    pub seen: Lsn,
    /// The newest LSN acknowledged to any client when it was made.
    pub ordered: Lsn,
    /// When it was made, in events.
    pub moment: u64,
    pub allocated: Option<Lsn>,
    /// A commit over several shards.
    pub spread: bool,
    /// Requests of its kind that reached its shard after it and were answered before it.
    pub overtaken: u64,
}

/// The kind of a request.
pub(super) enum Kind {
    /// Pages, each with the LSN of the oldest version that the read may return.
    Read(Vec<(PageKey, Lsn)>),
    Commit(Commit),
    Flush,
    WaitDurable(Lsn),
    Checkpoint,
    Stats,
    Close,
}

impl Kind {
    /// The kind of a request; `oldest` gives the oldest version of a page that a read may return.
    pub fn of(request: &Request, oldest: impl Fn(PageKey) -> Lsn) -> Self {
        match request {
            Request::Read(keys) => Kind::Read(keys.iter().map(|&key| (key, oldest(key))).collect()),
            Request::Commit(Commit { reads, changes, durable }) => Kind::Commit(Commit {
                reads: reads.clone(),
                changes: changes.clone(),
                durable: *durable,
            }),
            Request::Flush => Kind::Flush,
            Request::WaitDurable(lsn) => Kind::WaitDurable(*lsn),
            Request::Checkpoint => Kind::Checkpoint,
            Request::Stats => Kind::Stats,
            Request::Allocated(_) => unreachable!("pending past the judge"),
            Request::Close => Kind::Close,
        }
    }

    /// Whether requests of these two kinds are in the same queues.
    pub fn is_like(&self, other: &Kind) -> bool {
        matches!((self, other), (Kind::Read(_), Kind::Read(_)) | (Kind::Commit(_), Kind::Commit(_)))
    }

    /// The bytes of the request, as the limit on commits counts them.
    pub fn bytes(&self) -> u64 {
        let Kind::Commit(commit) = self else { return 0 };
        commit.changes.iter().map(|(_, change)| model::change_bytes(change)).sum()
    }

    /// Whether it may be refused as too large: by its bytes, or since there could be more map nodes
    /// above its pages than memory holds.
    pub fn may_be_too_large(&self, tolerance: &Tolerance) -> bool {
        let Kind::Commit(commit) = self else { return false };
        let pages =
            commit.changes.iter().filter(|(_, change)| !matches!(change, Change::Free)).count()
                as u64;
        let frames = commit.changes.len() as u64 * PATH_NODES_MAX + pages;
        self.bytes() > tolerance.commit_bytes_max
            || (tolerance.commit_frames_max > 0 && frames > tolerance.commit_frames_max)
    }

    /// Whether it has to be refused.
    pub fn must_fail(&self, tolerance: &Tolerance) -> bool {
        self.bytes() > tolerance.commit_bytes_max || self.is_wrong(usize::MAX)
    }

    /// Whether it is invalid on purpose.
    pub fn is_wrong(&self, read_pages_max: usize) -> bool {
        match self {
            Kind::Read(keys) => keys.is_empty() || keys.len() > read_pages_max,
            Kind::Commit(commit) => commit.changes.iter().any(|(_, change)| match change {
                Change::Put(bytes) => bytes.len() != BLOCK,
                Change::Patch { offset, bytes } => {
                    bytes.is_empty() || *offset as usize + bytes.len() > BLOCK
                }
                Change::Free => false,
            }),
            _ => false,
        }
    }

    /// Describes it in a few words.
    pub fn describe(&self) -> String {
        match self {
            Kind::Read(keys) => format!("read {keys:?}"),
            Kind::Commit(Commit { reads, changes, durable }) => {
                let changes: Vec<_> = changes.iter().map(model::describe_change).collect();
                format!("commit of {changes:?}, reads {reads:?}, durable {durable}")
            }
            Kind::Flush => "flush".into(),
            Kind::WaitDurable(lsn) => format!("wait for {lsn:?}"),
            Kind::Checkpoint => "checkpoint".into(),
            Kind::Stats => "stats".into(),
            Kind::Close => "close".into(),
        }
    }
}
