//! The heap that callers' requests take while they are in progress, in bytes; back-pressure bounds
//! it.
//!
//! ```text
//! caller --accepting?--> request: weight added --> pages, parts on other shards, log
//!                                                --> reply: weight taken off
//! ```
//! Invariants
//! 1. `Reservations::request_bytes` is the sum of the weights of the requests that callers have
//!    brought to this shard, including commits over shards. The audit recounts it.
//! 2. While it is at its limit, no request is accepted from a caller. A shard without requests
//!    accepts one of any size, so at most one request exceeds the limit, and even the largest valid
//!    commit is accepted.
//! 3. A commit over shards is charged to its owner, including what its parts take elsewhere. So a
//!    part is never refused for bytes, no shard waits for another's budget, and callers of one
//!    shard don't pay for those of another.
//! 4. A page in the table has a frame, or is named by a request, or was freed and is on its way
//!    into the map. Admission allows no more of the last kind than a quarter of the frames, or one
//!    commit and one part; the map has no more nodes than frames.
//!
//! It does *not* count frames (the arena does), moves and redo (compaction and recovery bound their
//! own), or what a shard keeps for each extent.

use super::cache::table::ENTRY_BYTES;
use super::requests::{Pending, PendingKind};
use super::{Change, Commit, Request, Token};
use crate::base::PageKey;

/// What every request takes: its entry here, its place in the inbox, its reply, and places in
/// queues.
const REQUEST_BYTES: u64 = (size_of::<Pending>() + size_of::<(Token, Request)>() + 256) as u64;
/// What each page that a request names takes: an entry in the page table and its index, which even
/// an absent page has as long as that, and the places in the request and its reply.
const PAGE_BYTES: u64 = (ENTRY_BYTES + 64) as u64;
/// What a walk takes: the ranges that it may find before it answers, and the leaves where it
/// stands.
const WALK_BYTES: u64 = 80 << 10;

fn lists_bytes(commit: &Commit) -> u64 {
    (size_of_val(commit.reads.as_slice()) + size_of_val(commit.changes.as_slice())) as u64
}

fn bodies_bytes(commit: &Commit) -> u64 {
    let body = |(_, change): &(PageKey, Change)| match change {
        Change::Put(bytes) | Change::Patch { bytes, .. } => bytes.len() as u64,
        Change::Free => 0,
    };
    commit.changes.iter().map(body).sum()
}

/// What a caller's request has on the heap before a shard processes it: the bodies and lists of a
/// commit. For others that is little, at most the keys of a read, and their number bounds it.
pub(crate) fn request_bytes(request: &Request) -> u64 {
    match request {
        Request::Commit(commit) => lists_bytes(commit) + bodies_bytes(commit),
        _ => 0,
    }
}

/// What a request takes until it is released.
pub(super) fn request_weight(kind: &PendingKind, pages: usize) -> u64 {
    let own = match kind {
        PendingKind::Read(_) => 0,
        PendingKind::Walk => WALK_BYTES,
        PendingKind::Commit(commit) => lists_bytes(commit) + bodies_bytes(commit),
        PendingKind::Part(_) | PendingKind::Redo | PendingKind::Move(..) => return 0,
    };
    REQUEST_BYTES + pages as u64 * PAGE_BYTES + own
}

/// What a commit over `shards` shards takes, at its owner and at all parts, until it is durable
/// everywhere. The lists exist twice, since the owner may have to repeat the request; the bodies
/// are shared.
pub(super) fn coordinated_bytes(commit: &Commit, shards: usize) -> u64 {
    let pages = (commit.reads.len() + commit.changes.len()) as u64;
    REQUEST_BYTES * (1 + shards as u64)
        + pages * PAGE_BYTES
        + 2 * lists_bytes(commit)
        + bodies_bytes(commit)
}
