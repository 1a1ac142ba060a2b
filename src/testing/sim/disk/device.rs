//! The simulated device: it checks an operation, delays it, and carries it out or fails it.
//!
//! Invariants
//! 1. A completion is the only moment at which contents change: a write becomes visible whole, and
//!    what a flush covers becomes durable.
//! 2. A failed write leaves any part behind, a failed flush makes any part durable and dooms the
//!    rest.
//! 3. Once the power is off, nothing changes; what was in flight is kept aside for the crash
//!    images.
//!
//! It does *not* make crash images.

use super::Latency;
use super::fault::{self, DiskCounters, Fault, OpKind};
use super::file::{Block, SECTOR, SECTORS, SimFile, Version};
use crate::base::error::{Error, Result};
use crate::base::mix::mix;
use crate::base::{BLOCK, Micros};
use crate::io::{Completion, DiskOp, FileId, OpId};
use crate::testing::random::Rng;
use crate::testing::sim::canary::{Canary, planted};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

/// All of a simulated disk.
pub(super) struct State {
    pub(super) now: Micros,
    pub(super) rng: Rng,
    pub(super) latency: Latency,
    pub(super) files: BTreeMap<FileId, SimFile>,
    pub(super) flying: Vec<Flying>,
    /// Operations in flight when the power was cut; they may have got through partly.
    pub(super) landing: Vec<Landing>,
    /// The number of the operation submitted last.
    pub(super) number: u64,
    /// Operations completed.
    pub(super) done: u64,
    /// Submissions and completions; the power can be cut at any of them.
    pub(super) events: u64,
    pub(super) power_off_at: Option<u64>,
    pub(super) is_off: bool,
    pub(super) faults: Vec<Fault>,
    /// Files of which a flush has failed: all later flushes of them fail, as the seam promises.
    pub(super) unflushable: BTreeMap<FileId, i32>,
    pub(super) counters: DiskCounters,
    pub(super) violation: Option<String>,
    pub(super) trace: u64,
    pub(super) zero: Block,
    /// Blocks that were read, if a test records them.
    pub(super) read: Option<BTreeSet<(FileId, u64)>>,
}

/// An operation in flight.
pub(super) struct Flying {
    pub(super) id: OpId,
    pub(super) op: DiskOp,
    pub(super) number: u64,
    pub(super) due: Micros,
    /// For a flush, `State::done` at its submission.
    pub(super) covers: u64,
    /// For a write, its contents, block by block.
    pub(super) blocks: Vec<Block>,
}

/// An operation that was in flight when the power was cut.
#[derive(Clone)]
pub(super) enum Landing {
    Write { file: FileId, number: u64, first: u64, blocks: Vec<Block> },
    Allocate { file: FileId, from: u64, to: u64 },
}

pub(super) fn power_is_off(what: &dyn std::fmt::Display) -> Error {
    Error::io(what, std::io::Error::other("the simulated power is off"))
}

impl State {
    pub(super) fn submit(&mut self, id: OpId, op: DiskOp, factor: u64) {
        self.number += 1;
        if let Err(violation) = self.check(&op) {
            self.violation.get_or_insert(violation);
        }
        let blocks = match &op {
            DiskOp::Write { from, .. } => copy_blocks(from.iter().map(|slice| slice.bytes())),
            _ => Vec::new(),
        };
        let flying = Flying {
            id,
            due: self.due(&op, factor),
            number: self.number,
            covers: self.done,
            blocks,
            op,
        };
        self.note(&flying, 1);
        self.count_overlaps(&flying);
        self.flying.push(flying);
        self.event();
    }

    /// Checks the seam's rules for a submission.
    fn check(&self, op: &DiskOp) -> Result<(), String> {
        let breach = |why: &str| Err(format!("{op:?}: {why}"));
        let (file, offset, entries, end) = match op {
            DiskOp::Flush { files } if files.is_empty() => return breach("a flush of no file"),
            DiskOp::Flush { files } => {
                return match files.iter().find(|file| !self.files.contains_key(file)) {
                    Some(file) => breach(&format!("{file} does not exist")),
                    None => Ok(()),
                };
            }
            DiskOp::Allocate { from, to, .. } => {
                let whole = from % BLOCK as u64 == 0 && to % BLOCK as u64 == 0 && from < to;
                return if whole { Ok(()) } else { breach("not whole blocks") };
            }
            DiskOp::Read { file, offset, into } => (file, *offset, into.len(), offset + op.bytes()),
            DiskOp::Write { file, offset, from } => {
                (file, *offset, from.len(), offset + op.bytes())
            }
        };
        if entries == 0 || entries > 256 || offset == end {
            return breach("an empty list or one of more than 256 entries");
        }
        if offset % BLOCK as u64 != 0 || end % BLOCK as u64 != 0 {
            return breach("not whole blocks");
        }
        match self.files.get(file) {
            None => breach("the file does not exist"),
            Some(content) if content.len() < end => breach("beyond what was allocated"),
            Some(_) => Ok(()),
        }
    }

    fn due(&mut self, op: &DiskOp, factor: u64) -> Micros {
        let (from, to) = match op {
            DiskOp::Read { .. } => self.latency.read,
            DiskOp::Write { .. } => self.latency.write,
            DiskOp::Flush { .. } | DiskOp::Allocate { .. } => self.latency.flush,
        };
        let mut took = self.rng.within(from, to);
        if matches!(op, DiskOp::Write { .. }) {
            took += self.latency.block * op.bytes() / BLOCK as u64;
        }
        if self.rng.one_in(self.latency.stall_one_in) {
            took *= self.rng.within(1, 100);
        }
        // Without slow reads nothing is drawn, so that such a disk behaves like one that never had
        // them.
        let (one_in, times) = self.latency.slow_reads;
        if matches!(op, DiskOp::Read { .. }) && one_in > 0 && self.rng.one_in(one_in) {
            took *= self.rng.within(1, times);
        }
        self.now + took * factor
    }

    pub(super) fn reap(&mut self, out: &mut Vec<Completion>) {
        while !self.is_off {
            let next =
                (0..self.flying.len()).min_by_key(|&i| (self.flying[i].due, self.flying[i].number));
            let Some(index) = next.filter(|&i| self.flying[i].due <= self.now) else { return };
            let flying = self.flying.swap_remove(index);
            out.push(self.complete(flying));
            self.event();
        }
        for Flying { id, op, .. } in self.flying.drain(..) {
            let result = Err(power_is_off(&format_args!("{op:?}")));
            out.push(Completion { id, op, result });
        }
    }

    fn complete(&mut self, mut flying: Flying) -> Completion {
        self.done += 1;
        self.note(&flying, 2);
        let kind = OpKind::of(&flying.op);
        let struck = fault::strike(&mut self.faults, &flying.op);
        if let (DiskOp::Flush { files }, Some(errno)) = (&flying.op, struck) {
            files.iter().for_each(|file| _ = self.unflushable.insert(*file, errno));
        }
        let result = match struck.or_else(|| self.failed_before(&flying.op)) {
            Some(errno) => {
                self.counters.count_fault(kind);
                self.fail(&flying);
                Err(fault::error_of(&flying.op, errno))
            }
            None if self.violation.is_some() => {
                Err(Error::invalid("a rule of the disk seam was broken"))
            }
            None => {
                self.counters.count_done(kind);
                self.carry_out(&mut flying);
                Ok(())
            }
        };
        Completion { id: flying.id, op: flying.op, result }
    }

    fn failed_before(&self, op: &DiskOp) -> Option<i32> {
        let DiskOp::Flush { files } = op else { return None };
        files.iter().find_map(|file| self.unflushable.get(file).copied())
    }

    fn carry_out(&mut self, flying: &mut Flying) {
        match &mut flying.op {
            DiskOp::Read { file, offset, into } => {
                let content = &self.files[file];
                let mut number = *offset / BLOCK as u64;
                for frame in into.iter_mut() {
                    for chunk in frame_bytes(frame).chunks_mut(BLOCK) {
                        let state = content.block(number).expect("checked at submission");
                        chunk.copy_from_slice(&state.visible()[..]);
                        if let Some(read) = &mut self.read {
                            read.insert((*file, number));
                        }
                        number += 1;
                    }
                }
            }
            DiskOp::Write { file, offset, from } => {
                let same =
                    from.iter().flat_map(|slice| slice.bytes().chunks(BLOCK)).zip(&flying.blocks);
                if same.clone().any(|(now, then)| now != &then[..]) {
                    let breach = format!(
                        "write {file} {offset}: the buffer was changed while it was in flight"
                    );
                    self.violation.get_or_insert(breach);
                }
                let (file, first) = (*file, *offset / BLOCK as u64);
                let sectors = flying.blocks.len() * SECTORS;
                let mut reached = sectors;
                if Canary::ShortWriteIgnored.is_planted() && self.rng.one_in(8) {
                    planted(Canary::ShortWriteIgnored);
                    reached = self.rng.below(sectors as u64) as usize;
                }
                self.land(file, first, flying.number, &flying.blocks, reached);
            }
            DiskOp::Flush { files } => {
                if Canary::FlushSkipped.is_planted() && self.rng.one_in(2) {
                    planted(Canary::FlushSkipped);
                    return;
                }
                for file in files.iter() {
                    self.files.get_mut(file).expect("checked at submission").flush(flying.covers);
                }
            }
            DiskOp::Allocate { file, from, to } => {
                let (from, to) = (*from / BLOCK as u64, *to / BLOCK as u64);
                self.files.entry(*file).or_default().allocate(from, to, &self.zero);
            }
        }
    }

    /// Leaves behind any part of a failed write, flush or allocation.
    fn fail(&mut self, flying: &Flying) {
        match &flying.op {
            DiskOp::Read { .. } => {}
            DiskOp::Write { file, offset, .. } => {
                let reached =
                    self.rng.below(flying.blocks.len() as u64 * SECTORS as u64 + 1) as usize;
                self.land(*file, *offset / BLOCK as u64, flying.number, &flying.blocks, reached);
            }
            DiskOp::Flush { files } => {
                let percent = *self.rng.pick(&[0, 50, 100]);
                for file in files {
                    let content = self.files.get_mut(file).expect("checked at submission");
                    content.fail_flush(flying.covers, || self.rng.chance(percent));
                }
            }
            DiskOp::Allocate { file, from, to } => {
                let (from, to) = (*from / BLOCK as u64, *to / BLOCK as u64);
                let to = self.rng.within(from, to);
                if to > from {
                    self.files.entry(*file).or_default().allocate(from, to, &self.zero);
                }
            }
        }
    }

    /// Makes the first `reached` sectors of a write visible.
    fn land(&mut self, file: FileId, first: u64, op: u64, blocks: &[Block], reached: usize) {
        let Some(content) = self.files.get_mut(&file) else { return };
        for (index, block) in blocks.iter().enumerate().take(reached.div_ceil(SECTORS)) {
            let number = first + index as u64;
            let Some(state) = content.block(number) else { return };
            let whole = reached >= (index + 1) * SECTORS;
            let bytes = if whole {
                block.clone()
            } else {
                let cut = (reached - index * SECTORS) * SECTOR;
                let mut bytes = **state.visible();
                bytes[..cut].copy_from_slice(&block[..cut]);
                Rc::new(bytes)
            };
            content.write(
                number,
                Version { op, index: index as u32, done: self.done, doomed: false, bytes },
            );
        }
    }

    fn event(&mut self) {
        self.events += 1;
        self.cut_power_if_due();
    }

    pub(super) fn cut_power_if_due(&mut self) {
        if self.is_off || self.power_off_at.is_none_or(|at| self.events < at) {
            return;
        }
        self.is_off = true;
        self.landing = self.in_flight_now();
    }

    /// The operations in flight that may have got through partly.
    pub(super) fn in_flight_now(&self) -> Vec<Landing> {
        let landing = self.flying.iter().filter_map(|flying| match &flying.op {
            DiskOp::Write { file, offset, .. } => Some(Landing::Write {
                file: *file,
                number: flying.number,
                first: *offset / BLOCK as u64,
                blocks: flying.blocks.clone(),
            }),
            DiskOp::Allocate { file, from, to } => Some(Landing::Allocate {
                file: *file,
                from: *from / BLOCK as u64,
                to: *to / BLOCK as u64,
            }),
            _ => None,
        });
        landing.collect()
    }

    fn count_overlaps(&mut self, new: &Flying) {
        let range = |op: &DiskOp| match op {
            DiskOp::Read { file, offset, .. } | DiskOp::Write { file, offset, .. } => {
                Some((*file, *offset, offset + op.bytes()))
            }
            _ => None,
        };
        let Some((file, from, to)) = range(&new.op) else { return };
        let writes = |op: &DiskOp| matches!(op, DiskOp::Write { .. });
        let overlapping = self
            .flying
            .iter()
            .filter(|old| range(&old.op).is_some_and(|(f, a, b)| f == file && a < to && from < b));
        for old in overlapping {
            match (writes(&old.op), writes(&new.op)) {
                (true, true) => self.counters.overlaps += 1,
                (false, false) => {}
                _ => self.counters.reads_overwritten += 1,
            }
        }
    }

    fn note(&mut self, flying: &Flying, what: u64) {
        let (file, at) = match &flying.op {
            DiskOp::Read { file, offset, .. } | DiskOp::Write { file, offset, .. } => {
                (Some(*file), *offset)
            }
            DiskOp::Allocate { file, from, .. } => (Some(*file), *from),
            DiskOp::Flush { files } => (files.first().copied(), files.len() as u64),
        };
        let file = match file {
            None | Some(FileId::Meta) => 1,
            Some(FileId::Table) => 2,
            Some(FileId::Data) => 3,
            Some(FileId::Log(shard, segment)) => {
                (u64::from(shard.get()) << 32) + u64::from(segment.get()) + 4
            }
        };
        let mut sum = flying.blocks.len() as u64;
        if what == 1 {
            sum = flying
                .blocks
                .iter()
                .fold(sum, |sum, block| mix(sum ^ u64::from(crc32c::crc32c(&block[..]))));
        }
        let kind = OpKind::of(&flying.op) as u64;
        for part in [what, kind, file, at, flying.op.bytes(), flying.id.0, self.now, sum] {
            self.trace = mix(self.trace ^ part);
        }
    }
}

fn copy_blocks<'a>(slices: impl Iterator<Item = &'a [u8]>) -> Vec<Block> {
    let whole = |chunk: &[u8]| {
        let mut block = [0; BLOCK];
        block[..chunk.len()].copy_from_slice(chunk);
        Rc::new(block)
    };
    slices.flat_map(|bytes| bytes.chunks(BLOCK).map(whole)).collect()
}

fn frame_bytes(frame: &mut crate::memory::Frame) -> &mut [u8] {
    frame.try_mut().expect("a frame given to be read into is pinned by nobody")
}
