//! The write-ahead log of one shard: it gives groups their positions, and knows which of them are
//! durable and which segments are free.
//!
//! ```text
//! group:    open --close--> Writing --written--> Written --flush--> Flushing --ok--> durable
//! segment:  Free --begun--> Active --full--> Sealed --the redo LSN has passed it--> Free
//! ```
//! A log begins with few segments, and gets longer when it is used: see [`growth`].
//!
//! Invariants
//! 1. A block that holds a group is not written again until its segment has been free.
//! 2. A flush counts only for groups whose writes had all completed before it was submitted.
//! 3. Groups become durable to the outside in the order of their numbers.
//! 4. A segment is free only when a durable superblock says that every record in it is in the
//!    roots.
//! 5. The open group always fits into the rest of the active segment, or a segment is free: the
//!    shard admits no commit otherwise. So a group can always be closed, and a checkpoint never
//!    waits for log space.

mod growth;
mod open;
mod stored;

pub(crate) use open::{Chunks, OpenChange, OpenGroup, OpenImage, PartRef};
pub(crate) use stored::{StoredGroup, head_at};

use crate::base::{Lsn, SegmentNo};
use crate::format::superblock::{LogEnd, LogState};
use crate::memory::Frame;
use growth::Growth;
use std::collections::VecDeque;

/// The state of a closed group.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum GroupState {
    /// Some of its writes are in flight.
    Writing(u32),
    /// All its writes have completed.
    Written,
    /// A flush that covers it is in flight.
    Flushing,
    /// A flush that covers it has succeeded.
    Durable,
}

/// A group on its way to the device.
pub(crate) struct InFlight {
    pub number: u64,
    /// The lowest LSN that this shard allocated for it; [`Lsn::MAX`] if it holds only parts.
    pub first_lsn: Lsn,
    /// Commits over shards whose part here becomes durable with it.
    pub parts: Vec<PartRef>,
    pub state: GroupState,
    pub segment: SegmentNo,
    /// Whether it has pages that are written straight into extents.
    pub wrote_data: bool,
    /// Its buffers, which are reused.
    pub chunks: Vec<Frame>,
}

impl InFlight {
    /// Panics if the state of the group contradicts itself: it would be acknowledged too soon, or
    /// never.
    fn assert_state(&self) {
        let number = self.number;
        assert!(
            self.state != GroupState::Writing(0),
            "group {number} waits for a write, and none is under way"
        );
        assert!(
            self.first_lsn != Lsn::MAX || !self.parts.is_empty(),
            "group {number} holds neither an LSN of this shard nor a part of another's commit"
        );
        assert!(!self.chunks.is_empty(), "group {number} has no buffer, and is {:?}", self.state);
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Segment {
    Free,
    Active,
    Sealed { max_lsn: Lsn },
}

/// The segment that is being filled.
#[derive(Clone, Copy, Debug)]
struct Active {
    no: SegmentNo,
    generation: u64,
    block: u32,
    max_lsn: Lsn,
}

/// The position of a group, and what its head must say.
pub(crate) struct Position {
    pub segment: SegmentNo,
    pub block: u32,
    pub generation: u64,
    pub number: u64,
    pub prev_crc: u32,
}

/// The log of one shard in one epoch.
pub(crate) struct Log {
    segment_blocks: u32,
    segments: Vec<Segment>,
    active: Option<Active>,
    next_generation: u64,
    next_number: u64,
    prev_crc: u32,
    /// Blocks of all groups so far.
    blocks_written: u64,
    growth: Growth,
    /// The group that takes records.
    pub open: OpenGroup,
    /// Groups on their way to the device, oldest first.
    pub in_flight: VecDeque<InFlight>,
    /// Whether a flush is in flight, or has failed: then no other may begin.
    pub flushing: bool,
}

impl Log {
    /// An empty log of the segments that the superblock counts; all are free.
    pub(crate) fn new(segments_count: u32, segment_blocks: u32, chunks: Chunks) -> Self {
        Log {
            segment_blocks,
            segments: vec![Segment::Free; segments_count as usize],
            active: None,
            next_generation: 1,
            next_number: 1,
            prev_crc: 0,
            blocks_written: 0,
            growth: Growth::new(segments_count),
            open: OpenGroup::new(chunks),
            in_flight: VecDeque::new(),
            flushing: false,
        }
    }

    /// Free segments.
    pub(crate) fn free_segments(&self) -> usize {
        self.segments.iter().filter(|s| **s == Segment::Free).count()
    }

    /// Blocks of a segment.
    pub(crate) fn segment_blocks(&self) -> u32 {
        self.segment_blocks
    }

    /// Segments that may be used.
    pub(crate) fn segments_count(&self) -> usize {
        self.segments.len()
    }

    /// Whether so much of the log is in use that a checkpoint should free some of it.
    pub(crate) fn is_long(&self) -> bool {
        self.segments_count() - self.free_segments() > self.segments_count() / 2
    }

    /// Blocks of all groups since the store was opened.
    pub(crate) fn blocks_written(&self) -> u64 {
        self.blocks_written
    }

    /// Blocks that can still be written before a checkpoint must have freed some.
    pub(crate) fn blocks_left(&self) -> u64 {
        let rest = self.active.map_or(0, |a| self.segment_blocks - a.block);
        u64::from(rest) + self.free_segments() as u64 * u64::from(self.segment_blocks)
    }

    /// Whether no group is open or on its way to the device.
    pub(crate) fn is_idle(&self) -> bool {
        self.open.is_empty() && self.in_flight.is_empty()
    }

    /// Whether there is room for a group of `blocks`.
    pub(crate) fn has_room(&self, blocks: u32) -> bool {
        let rest = self.active.map_or(0, |a| self.segment_blocks - a.block);
        blocks <= rest || (blocks <= self.segment_blocks && self.segments.contains(&Segment::Free))
    }

    /// Panics if groups, segments and buffers contradict each other: a group that is not durable
    /// would be overwritten or acknowledged, or the log would eventually run out of buffers.
    fn assert_state(&self) {
        let (first, last) = (self.in_flight.front(), self.in_flight.back());
        if let (Some(first), Some(last)) = (first, last) {
            let count = self.in_flight.len() as u64;
            assert!(
                last.number == self.next_number - 1 && first.number + count == self.next_number,
                "groups {} to {} are {count} in flight, and the next one is {}",
                first.number,
                last.number,
                self.next_number
            );
            assert!(
                first.state != GroupState::Durable,
                "group {} is durable, and was not handed on",
                first.number
            );
        }
        let in_flight: usize = self.in_flight.iter().map(|group| group.chunks.len()).sum();
        let (stock, filled, all) = self.open.chunk_counts();
        assert!(
            stock + filled + in_flight == all,
            "buffers are missing: {stock} in stock, {filled} filled, {in_flight} in flight, of \
             {all}"
        );
        for group in &self.in_flight {
            group.assert_state();
            let segment = self.segments[group.segment.index()];
            assert!(
                segment != Segment::Free,
                "group {} is {:?} in {:?}, which is free",
                group.number,
                group.state,
                group.segment
            );
            assert!(
                self.flushing || group.state != GroupState::Flushing,
                "group {} waits for a flush, and none is under way",
                group.number
            );
        }
        if let Some(active) = self.active {
            let state = self.segments[active.no.index()];
            assert!(
                state == Segment::Active && active.block <= self.segment_blocks,
                "{active:?} is {state:?}, and a segment has {} blocks",
                self.segment_blocks
            );
        }
    }

    /// Takes the position for the next group. There must be [room](Self::has_room).
    pub(crate) fn place(&mut self, blocks: u32, last_lsn: Lsn) -> Position {
        assert!(blocks > 0, "a group of no blocks, up to {last_lsn:?}");
        if self.active.is_none_or(|a| self.segment_blocks - a.block < blocks) {
            self.begin_segment();
        }
        let active = self.active.as_mut().expect("a segment was just begun");
        let position = Position {
            segment: active.no,
            block: if active.block > 0 && planted!(TailBlockRewritten) {
                active.block - 1
            } else {
                active.block
            },
            generation: active.generation,
            number: self.next_number,
            prev_crc: self.prev_crc,
        };
        assert!(
            active.block + blocks <= self.segment_blocks,
            "a group of {blocks} blocks at block {} of {}",
            active.block,
            self.segment_blocks
        );
        active.block += blocks;
        self.blocks_written += u64::from(blocks);
        active.max_lsn = active.max_lsn.max(last_lsn);
        self.next_number += 1;
        position
    }

    fn begin_segment(&mut self) {
        if let Some(old) = self.active {
            self.segments[old.no.index()] = Segment::Sealed { max_lsn: old.max_lsn };
        }
        let free = self
            .segments
            .iter()
            .position(|s| *s == Segment::Free)
            .expect("admission kept a segment free");
        self.segments[free] = Segment::Active;
        let no = SegmentNo::new(free as u32);
        self.active =
            Some(Active { no, generation: self.next_generation, block: 0, max_lsn: Lsn::ZERO });
        self.next_generation += 1;
    }

    /// Keeps the checksum of the head that was just sealed, for the next group.
    pub(crate) fn sealed(&mut self, head_crc: u32) {
        self.prev_crc = head_crc;
    }

    /// Records that the writes of a group that has its [position](Self::place) are in flight.
    pub(crate) fn submitted(&mut self, group: InFlight) {
        assert!(
            matches!(group.state, GroupState::Writing(_)),
            "group {} was just submitted, and is {:?}",
            group.number,
            group.state
        );
        self.in_flight.push_back(group);
        self.assert_state();
    }

    /// Called when a durable superblock says that the roots reflect everything up to `redo`.
    pub(crate) fn recycle(&mut self, redo: Lsn) {
        self.assert_state();
        for segment in &mut self.segments {
            if matches!(segment, Segment::Sealed { max_lsn } if *max_lsn <= redo) {
                *segment = Segment::Free;
            }
        }
        self.assert_state();
    }

    /// Called when one of the writes of group `number` has completed.
    pub(crate) fn write_completed(&mut self, number: u64) {
        let group = self.in_flight.iter_mut().find(|group| group.number == number);
        let group = group.expect("a group is in flight until all its writes have completed");
        group.state = match group.state {
            GroupState::Writing(1) => GroupState::Written,
            GroupState::Writing(left) => GroupState::Writing(left - 1),
            other => panic!("group {number} had no write under way: {other:?}"),
        };
        group.assert_state();
    }

    /// Begins a flush; returns the groups that it covers, and their segments.
    pub(crate) fn begin_flush(&mut self) -> Option<FlushSet> {
        assert!(!self.flushing, "one flush of the log at a time");
        let mut set = FlushSet::default();
        for group in self.in_flight.iter_mut().filter(|g| g.state == GroupState::Written) {
            group.state = GroupState::Flushing;
            set.numbers.push(group.number);
            set.data |= group.wrote_data;
            if !set.segments.contains(&group.segment) {
                set.segments.push(group.segment);
            }
        }
        self.flushing = !set.numbers.is_empty();
        self.flushing.then_some(set)
    }

    /// Called when a flush that covered `numbers` has succeeded. Returns the parts of commits over
    /// shards in the groups that became durable in order.
    pub(crate) fn flushed(&mut self, numbers: &[u64]) -> Vec<PartRef> {
        assert!(self.flushing, "a flush of groups {numbers:?} has ended that was not submitted");
        self.flushing = false;
        for group in self.in_flight.iter_mut().filter(|g| numbers.contains(&g.number)) {
            group.state = GroupState::Durable;
        }
        let mut parts = Vec::new();
        while self.in_flight.front().is_some_and(|group| group.state == GroupState::Durable) {
            let Some(group) = self.in_flight.pop_front() else { break };
            self.open.restock(group.chunks);
            parts.extend(group.parts);
        }
        self.assert_state();
        parts
    }

    /// The lowest LSN that this shard has allocated and that is not durable in this log.
    pub(crate) fn bound(&self) -> Lsn {
        let flying = self.in_flight.iter().map(|group| group.first_lsn);
        flying.chain(self.open.first_lsn()).min().unwrap_or(Lsn::MAX)
    }

    /// What the superblock records about the log. `end` is its [`end`](Self::end) after a clean
    /// close, otherwise the default.
    pub(crate) fn state(&self, end: LogEnd) -> LogState {
        LogState { segments_made: self.growth.made(), end }
    }

    pub(crate) fn end(&self) -> LogEnd {
        self.active.map_or(LogEnd::default(), |a| LogEnd {
            segment: a.no,
            block: a.block,
            generation: a.generation,
            number: self.next_number - 1,
            checksum: self.prev_crc,
        })
    }
}

/// The groups that one flush covers.
#[derive(Default)]
pub(crate) struct FlushSet {
    /// The numbers of the groups.
    pub numbers: Vec<u64>,
    /// Their segments.
    pub segments: Vec<SegmentNo>,
    /// Whether they have pages that were written straight into extents.
    pub data: bool,
}
