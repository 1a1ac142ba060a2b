//! Which segments of the logs must be read whole to find every group that matters after a crash.
//!
//! ```text
//! beginnings of all segments --> segments that hold groups above the redo LSN --> the segment each log would have begun next
//! ```
//! A group matters if it holds an LSN above the redo LSN, or records a watermark above those found elsewhere. What an epoch does
//! with its segments:
//!
//! Invariants
//! 1. An epoch begins with all segments free. A log begins the free segment with the lowest number when the next group does
//!    not fit into the last one, at block 0, with the next generation. So a segment without a group of the epoch at block 0 was
//!    not begun in this epoch, unless that group was torn by the crash, or lost since.
//! 2. All LSNs in a log's groups lie below the LSNs that the shard itself draws for later groups: a part of another shard's
//!    commit was drawn before it came. So a generation is entirely at or below the redo LSN if a later one begins with
//!    an own LSN that follows it directly or lies at or below it. It is not needed; nor are the watermarks in it, since those of
//!    later groups are as high.
//! 3. A group is written into the next segment only after the last one is full. So what crash or damage can hide are groups
//!    behind the last one found: in the same segment, which is read whole, or in the one that was begun next, which is read whole
//!    too. A segment becomes free only with a superblock that the heads of later groups name. If the last group names the superblock
//!    found, the free segments are known and so is the next one; otherwise all that may have been free are read.
//! 4. Nothing is left out if anything at all is odd: a segment with groups of the epoch, but none at its beginning; a
//!    file that is too short; two segments of one generation; a number missing in a log, or a head that does not name the one
//!    before; a group that is torn; an LSN that no group accounts for. Then every block of every log is read.
//!
//! So reading the needed segments finds what reading everything finds, unless damage has made all groups that were written
//! into a whole segment disappear without a trace, *and* the first groups of the segment after it, in another file.
//! `verify` reads everything in any case.

use super::read::{Range, read_ranges};
use super::scan::{Reader, redo_lsn};
use super::segment::Found;
use crate::disk::FileId;
use crate::error::Result;
use crate::format::group::GroupHead;
use crate::types::{BLOCK, Lsn, SegmentNo, ShardId};

/// Blocks at the beginning of a segment that are looked at to see whether the epoch has used it: more than the first, so that one
/// group that was lost does not hide those behind it. At most a sixteenth of the segment, so that looking costs little.
const BEGINNING_BLOCKS_MAX: u64 = 16;

/// The segments that one log has begun in this epoch, as far as they are still there.
struct BegunSegments {
    shard: ShardId,
    /// In the order of their generations: the segment, and the head of its first group.
    begun: Vec<(SegmentNo, GroupHead)>,
}

/// The logs, as the beginnings of their segments show them.
pub(super) struct Logs {
    logs: Vec<BegunSegments>,
    segments_count: u32,
    redo: Lsn,
    /// Of the superblock found.
    superblock_generation: u64,
}

impl Logs {
    /// Reads the beginnings of all segments; `None` if something is odd.
    pub(super) fn look(reader: &mut Reader<'_>) -> Result<Option<Logs>> {
        let superblock = reader.superblock;
        let (segment_bytes, segments_count) = (superblock.geometry.segment_bytes, superblock.geometry.segments_count);
        let segment_blocks = segment_bytes / BLOCK as u64;
        let shards = (0..superblock.logs.len() as u16).map(ShardId::new);
        let logs = shards.map(|shard| BegunSegments { shard, begun: Vec::new() }).collect();
        let superblock_generation = superblock.generation;
        let mut this = Logs { logs, segments_count, redo: redo_lsn(superblock), superblock_generation };
        let mut segments = Vec::new();
        for log in &this.logs {
            for segment in (0..segments_count).map(SegmentNo::new) {
                if reader.disk.len(FileId::Log(log.shard, segment))?.is_none_or(|len| len < segment_bytes) {
                    return Ok(None);
                }
                segments.push((log.shard, segment));
            }
        }
        let blocks = (segment_blocks / 16).clamp(1, BEGINNING_BLOCKS_MAX);
        reader.bytes_read += segments.len() as u64 * blocks * BLOCK as u64;
        let range = |&(shard, segment): &_| Range { file: FileId::Log(shard, segment), offset: 0, blocks };
        let mut is_odd = false;
        let (mut last, mut block, mut has_first) = (usize::MAX, 0, false);
        read_ranges(reader.disk, reader.arena, segments.iter().map(range), |index, bytes| {
            if last != index {
                (last, block, has_first) = (index, 0, false);
            }
            let (shard, segment) = segments[index];
            for here in bytes.chunks(BLOCK) {
                let position = (shard, segment, block);
                let head = GroupHead::open(here, superblock.salt, superblock.epoch, position, segment_blocks as u32);
                if let Some(head) = head {
                    if block == 0 {
                        this.logs[shard.index()].begun.push((segment, head));
                        has_first = true;
                    }
                    is_odd |= !has_first;
                }
                block += 1;
            }
            Ok(())
        })?;
        for log in &mut this.logs {
            log.begun.sort_by_key(|(_, head)| head.generation);
            is_odd |= log.begun.windows(2).any(|pair| pair[0].1.generation == pair[1].1.generation);
        }
        Ok((!is_odd).then_some(this))
    }

    /// The segments that hold, or may hold, groups above the redo LSN, and the one in which each log ends.
    pub(super) fn needed(&self) -> Vec<(ShardId, SegmentNo)> {
        let needed = |log: &BegunSegments| {
            let shard = log.shard;
            let mut segments: Vec<SegmentNo> = log.begun[self.first_needed(log)..].iter().map(|(no, _)| *no).collect();
            if segments.is_empty() {
                // The first one that an epoch begins.
                segments.push(SegmentNo::new(0));
            }
            segments.into_iter().map(move |segment| (shard, segment))
        };
        self.logs.iter().flat_map(needed).collect()
    }

    /// Index of the first generation that is not known to be entirely in the roots; the last one always counts.
    fn first_needed(&self, log: &BegunSegments) -> usize {
        let is_reflected = |(_, head): &(SegmentNo, GroupHead)| {
            head.runs.first().is_some_and(|(first, _)| first.before() <= self.redo)
        };
        log.begun.iter().rposition(is_reflected).unwrap_or(0)
    }

    /// The segments into which the group after the last one of each log may have gone, as far as they are not read yet;
    /// `found` is what the needed ones hold.
    pub(super) fn successors(&self, found: &[Found]) -> Vec<(ShardId, SegmentNo)> {
        if planted!(SegmentSkipped) {
            return Vec::new();
        }
        let of_log = |log: &BegunSegments| {
            let shard = log.shard;
            let mine: Vec<&Found> = found.iter().filter(|f| f.head.shard == shard).collect();
            self.next_of(log, &mine).into_iter().map(move |segment| (shard, segment))
        };
        self.logs.iter().flat_map(of_log).collect()
    }

    fn next_of(&self, log: &BegunSegments, found: &[&Found]) -> Vec<SegmentNo> {
        // Without a group, segment 0 would have been the first, and it is read.
        let Some((active, last_begun)) = log.begun.last() else { return Vec::new() };
        let is_current = |f: &Found, segment: SegmentNo, begun: &GroupHead| {
            f.head.segment == segment && f.head.generation == begun.generation
        };
        let in_use = |segment: SegmentNo, begun: &GroupHead| {
            segment == *active || found.iter().any(|f| is_current(f, segment, begun) && f.last_lsn > self.redo)
        };
        let mut free: Vec<SegmentNo> = (0..self.segments_count).map(SegmentNo::new).collect();
        free.retain(|no| !log.begun.iter().any(|(segment, head)| segment == no && in_use(*segment, head)));
        let is_last = |f: &&&Found| is_current(f, *active, last_begun);
        let last = found.iter().filter(is_last).max_by_key(|f| f.head.number);
        if last.is_some_and(|f| f.head.superblock_generation == self.superblock_generation) {
            // The newest segment among them may have been the active one when the others became free: then it is not.
            let sealed_since = log.begun.iter().rev().map(|(no, _)| *no).find(|no| free.contains(no));
            let (first, other) = (free.first().copied(), free.iter().copied().find(|no| Some(*no) != sealed_since));
            free.retain(|no| Some(*no) == first || Some(*no) == other);
        }
        free.retain(|no| !self.needed_of(log).contains(no));
        free
    }

    fn needed_of(&self, log: &BegunSegments) -> Vec<SegmentNo> {
        log.begun[self.first_needed(log)..].iter().map(|(no, _)| *no).collect()
    }

    /// Whether nothing is torn in what was found, and the groups of each log follow one another without a gap.
    pub(super) fn are_unbroken(&self, found: &[Found]) -> bool {
        self.logs.iter().all(|log| {
            let is_left_over = |f: &Found| {
                let of = log.begun.iter().find(|(segment, _)| *segment == f.head.segment);
                of.is_some_and(|(_, head)| f.head.generation < head.generation)
            };
            let mine = found.iter().filter(|f| f.head.shard == log.shard && !is_left_over(f));
            let mut current: Vec<&Found> = mine.collect();
            current.sort_by_key(|f| f.head.number);
            let follows = |pair: &[&Found]| {
                let (before, after) = (pair[0], pair[1]);
                let adjoins =
                    after.head.number == before.head.number + 1 && after.head.prev_crc == before.head.head_crc;
                adjoins || before.last_lsn <= self.redo
            };
            current.iter().all(|f| f.whole) && current.windows(2).all(follows)
        })
    }
}
