//! Finds the groups in a log segment, which is read from front to back.
//!
//! Invariants
//! 1. A group counts only if it is whole: head, body and inline pages. After a torn one the search
//!    continues block by block.
//! 2. Bytes are kept only while a group that begins in them continues in the next ones: at most as
//!    many as the largest group has, which is bounded by the largest commit that the writer
//!    allowed.
//! 3. Of a group only what the search for the end of the log and the redo need is kept, not its
//!    content: 1 % of the size of a usual log, and at most a third of one that consists only of the
//!    smallest parts of commits over shards.
//!
//! It does *not* read, nor decide about what is missing; see `scan`.

use crate::base::{BLOCK, BlockAddr, Lsn, SegmentNo, ShardId, ShardMap, ShardSet};
use crate::engine::codec::Expected;
use crate::engine::log::{StoredGroup, head_at};
use crate::format::group::{GroupHead, LoggedChange, Role};
use crate::format::superblock::Superblock;

/// A group with a valid head.
pub(super) struct Found {
    pub head: GroupHead,
    /// Whether head, body and pages are as they were written.
    pub whole: bool,
    /// The lowest LSN that it accounts for or has a part of.
    pub first_lsn: Lsn,
    /// The highest such LSN.
    pub last_lsn: Lsn,
    /// Commits recorded in it, except the parts of other shards' commits: first LSN and number of
    /// consecutive ones.
    pub commits: Vec<(Lsn, u64)>,
    /// Records of commits over shards.
    pub parts: Vec<(Lsn, Role)>,
    /// Pages written directly into extents, and what must be there.
    pub placed: Vec<(BlockAddr, Expected)>,
    /// The shards of the new shard map whose pages it changes.
    pub concerns: ShardSet,
}

impl Found {
    /// A group with only its head known.
    fn new(head: GroupHead) -> Self {
        let last = |(first, count): &(Lsn, u64)| {
            Lsn::new(first.get().saturating_add(count.saturating_sub(1)))
        };
        Found {
            whole: false,
            first_lsn: head.runs.iter().map(|(first, _)| *first).min().unwrap_or(Lsn::MAX),
            last_lsn: head.runs.iter().map(last).max().unwrap_or(Lsn::ZERO),
            commits: Vec::new(),
            parts: Vec::new(),
            placed: Vec::new(),
            concerns: ShardSet::EMPTY,
            head,
        }
    }

    /// Opens the group that `here` begins with; `here` has all blocks that the head claims.
    fn open(head: GroupHead, here: &[u8], shard_map: ShardMap) -> Self {
        let mut found = Found::new(head);
        let Ok(group) = StoredGroup::open(&found.head, here) else { return found };
        for record in &group.records {
            found.first_lsn = found.first_lsn.min(record.lsn);
            found.last_lsn = found.last_lsn.max(record.lsn);
            if !matches!(record.role, Role::Part(_)) {
                match found.commits.last_mut() {
                    Some((first, count)) if first.plus(*count) == record.lsn => *count += 1,
                    _ => found.commits.push((record.lsn, 1)),
                }
            }
            if record.role != Role::Whole {
                found.parts.push((record.lsn, record.role));
            }
            for change in &record.changes {
                let (LoggedChange::Image(key, _)
                | LoggedChange::Patch(key, ..)
                | LoggedChange::Free(key)) = change;
                found.concerns.insert(shard_map.shard_of(*key));
            }
        }
        let placed = group.placed();
        found.whole = placed.is_ok();
        found.placed = placed.unwrap_or_default();
        found
    }

    /// Commits with LSNs above `after`, up to `upto`.
    pub(super) fn commits_within(&self, after: Lsn, upto: Lsn) -> u64 {
        let within = |&(first, count): &(Lsn, u64)| {
            let (from, end) = (first.get().max(after.get() + 1), first.get() + count);
            end.min(upto.get().saturating_add(1)).saturating_sub(from)
        };
        self.commits.iter().map(within).sum()
    }

    /// Drops what only the redo and the end of the log need, since the roots reflect the group.
    fn forget_content(&mut self) {
        (self.commits, self.parts, self.placed) = (Vec::new(), Vec::new(), Vec::new());
    }
}

/// The search through one segment.
pub(super) struct SegmentSearch<'a> {
    superblock: &'a Superblock,
    /// The roots reflect everything up to here, and all of it was durable.
    redo: Lsn,
    /// The shard map for the epoch that begins.
    shard_map: ShardMap,
    shard: ShardId,
    segment: SegmentNo,
    /// The next block to examine.
    at: u32,
    /// The bytes from there on: the beginning of a group whose rest is not read yet.
    held: Vec<u8>,
}

impl<'a> SegmentSearch<'a> {
    pub(super) fn new(
        superblock: &'a Superblock,
        shard_map: ShardMap,
        (shard, segment): (ShardId, SegmentNo),
    ) -> Self {
        let redo = superblock.redo_lsn().min(superblock.watermark);
        SegmentSearch { superblock, redo, shard_map, shard, segment, at: 0, held: Vec::new() }
    }

    /// Searches the next whole blocks of the segment.
    pub(super) fn take(&mut self, bytes: &[u8], found: &mut Vec<Found>) {
        if self.held.is_empty() {
            let done = self.search(bytes, found);
            self.held.extend_from_slice(&bytes[done..]);
        } else {
            let mut held = std::mem::take(&mut self.held);
            held.extend_from_slice(bytes);
            let done = self.search(&held, found);
            held.drain(..done);
            // Releases the memory: the next group is likely smaller.
            self.held = if held.is_empty() { Vec::new() } else { held };
        }
    }

    /// Searches `bytes`, which begin with block `at`; returns how many bytes are done.
    fn search(&mut self, bytes: &[u8], found: &mut Vec<Found>) -> usize {
        let mut done = 0;
        while let Some(here) = bytes.get(done..).filter(|here| !here.is_empty()) {
            let mut blocks = 1;
            let position = (self.shard, self.segment, self.at);
            if let Some(head) = head_at(self.superblock, position, here) {
                if head.blocks as usize * BLOCK > here.len() {
                    break;
                }
                let mut group = Found::open(head, here, self.shard_map);
                if group.last_lsn <= self.redo {
                    group.forget_content();
                }
                if group.whole {
                    blocks = group.head.blocks;
                }
                found.push(group);
            } else if planted!(SegmentEndsAtGap) {
                return bytes.len();
            }
            self.at += blocks;
            done += blocks as usize * BLOCK;
        }
        done
    }
}
