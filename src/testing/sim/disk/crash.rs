//! Makes the images of the disk that a power loss or the death of a process can leave behind.
//!
//! Invariants
//! 1. What was durable is kept. Every other sector is kept or dropped according to the kind of
//!    loss, independently of the order of writes; among versions of one sector, the newest that is
//!    kept wins.
//! 2. Operations in flight may have been carried out completely, in part or not at all.
//! 3. After the death of a process its writes stay visible and volatile: its successor reads them,
//!    and may still lose them.
//! 4. Making an image does not change the crashed disk, so that many can be made of one crash.

use super::device::{Landing, State};
use super::file::{BlockState, SECTOR, SECTORS, SimFile, Version};
use super::{DiskCounters, SimDisk};
use crate::base::BLOCK;
use crate::base::mix::mix;
use crate::io::FileId;
use crate::testing::random::Rng;
use std::collections::BTreeMap;
use std::rc::Rc;

/// What a crash does to data that is not durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// All of it is lost.
    Everything,
    /// All is kept, including operations in flight.
    Nothing,
    /// Each sector is kept with this chance in a hundred.
    Sectors(u64),
    /// Each write is kept whole with this chance in a hundred, or lost whole.
    Writes(u64),
    /// Of each write some sectors from its beginning are kept.
    Prefixes,
    /// Of each file all is kept or all is lost.
    Files,
    /// The process dies and the machine keeps running: all is kept and stays volatile, operations
    /// in flight land or not.
    Process,
}

impl Loss {
    /// A random kind of loss, with its values.
    pub fn random(rng: &mut Rng) -> Self {
        match rng.below(9) {
            0 => Loss::Everything,
            1 => Loss::Nothing,
            2 => Loss::Sectors(50),
            3 => Loss::Sectors(*rng.pick(&[5, 20, 80, 95])),
            4 => Loss::Writes(50),
            5 => Loss::Writes(*rng.pick(&[10, 90])),
            6 => Loss::Prefixes,
            7 => Loss::Files,
            _ => Loss::Process,
        }
    }
}

/// Decides for one crash what is kept; the same question gets the same answer, without a table.
struct Fate {
    loss: Loss,
    salt: u64,
}

impl Fate {
    fn roll(&self, what: [u64; 3]) -> u64 {
        what.iter().fold(self.salt, |hash, part| mix(hash ^ part))
    }

    fn keeps(&self, file: u64, block: u64, version: &Version, sector: usize) -> bool {
        // A doomed version is only in the page cache, which is not written back any more.
        if version.doomed {
            return false;
        }
        match self.loss {
            Loss::Everything => false,
            Loss::Nothing | Loss::Process => true,
            Loss::Sectors(percent) => {
                self.roll([version.op, (file << 48) + block, sector as u64]) % 100 < percent
            }
            Loss::Writes(percent) => self.roll([version.op, 0, 0]) % 100 < percent,
            Loss::Prefixes => {
                // Usually a part, often the whole: the length is not known here, so draw up to 64
                // blocks.
                let reach =
                    self.roll([version.op, 0, 0]) % (1 << (3 + self.roll([version.op, 1, 0]) % 7));
                u64::from(version.index) * SECTORS as u64 + (sector as u64) < reach
            }
            Loss::Files => self.roll([file, 0, 0]).is_multiple_of(2),
        }
    }
}

/// What was kept and dropped of each write, by its number.
type BlocksByOp = BTreeMap<u64, (u64, u64)>;

impl SimDisk {
    /// Makes the disk that is found after a crash at this moment; the crashed one is not changed.
    pub fn crash(&self, loss: Loss, rng: &mut Rng) -> SimDisk {
        let state = self.0.borrow();
        let fate = Fate { loss, salt: rng.draw() };
        let mut files = state.files.clone();
        let landing = if state.is_off { state.landing.clone() } else { state.in_flight_now() };
        let mut counters = DiskCounters { crashes: 1, ..Default::default() };
        let mut done = state.done;
        for operation in &landing {
            // Any of several operations in flight may have been carried out last: they are already
            // in random order.
            done += 1;
            land(&mut files, operation, loss, done, rng, &mut counters, &state);
        }
        if loss != Loss::Process {
            publish_to_map(&mut files, &fate, &mut counters);
        }
        let image = SimDisk::with(rng.fork(1), files, state.now, state.zero.clone());
        {
            let mut new = image.0.borrow_mut();
            new.counters = counters;
            new.done = done;
            new.number = state.number;
            new.latency = state.latency;
        }
        image
    }
}

/// Carries out an operation that was in flight, as far as the loss allows.
fn land(
    files: &mut BTreeMap<FileId, SimFile>,
    operation: &Landing,
    loss: Loss,
    done: u64,
    rng: &mut Rng,
    counters: &mut DiskCounters,
    state: &State,
) {
    match operation {
        Landing::Allocate { file, from, to } => {
            counters.allocations_in_flight += 1;
            let reach = match loss {
                Loss::Everything => *from,
                Loss::Nothing => *to,
                _ => rng.within(*from, *to),
            };
            // Absent, empty, partial or whole.
            if reach > *from || (loss != Loss::Everything && rng.one_in(2)) {
                files.entry(*file).or_default().allocate(*from, reach, &state.zero);
            }
        }
        Landing::Write { file, number, first, blocks } => {
            counters.writes_in_flight += 1;
            let sectors = blocks.len() * SECTORS;
            // After the death of a process the kernel finishes the write, or had not taken it yet.
            let part = rng.below(sectors as u64 + 1) as usize;
            let reach =
                if loss == Loss::Process { *rng.pick(&[0, sectors, part]) } else { sectors };
            let Some(content) = files.get_mut(file) else { return };
            for (index, block) in blocks.iter().enumerate().take(reach.div_ceil(SECTORS)) {
                let Some(old) = content.block(first + index as u64) else { return };
                let cut = ((reach - index * SECTORS) * SECTOR).min(BLOCK);
                let mut bytes = **old.visible();
                bytes[..cut].copy_from_slice(&block[..cut]);
                let version = Version {
                    op: *number,
                    index: index as u32,
                    done,
                    doomed: false,
                    bytes: Rc::new(bytes),
                };
                content.write(first + index as u64, version);
            }
        }
    }
}

/// Makes durable what is kept, and forgets the rest.
fn publish_to_map(files: &mut BTreeMap<FileId, SimFile>, fate: &Fate, counters: &mut DiskCounters) {
    let mut blocks_by_op = BlocksByOp::new();
    for (number, (_, content)) in files.iter_mut().enumerate() {
        for block in content.take_dirty() {
            let state = content.block_mut(block.into()).expect("a dirty block exists");
            settle_block(state, fate, number as u64, block.into(), &mut blocks_by_op);
        }
    }
    for (kept, dropped) in blocks_by_op.into_values() {
        counters.sectors_kept += kept;
        counters.sectors_dropped += dropped;
        counters.writes_torn += u64::from(kept > 0 && dropped > 0);
    }
}

fn settle_block(
    state: &mut BlockState,
    fate: &Fate,
    file: u64,
    block: u64,
    blocks_by_op: &mut BlocksByOp,
) {
    let volatile = std::mem::take(&mut state.volatile);
    let mut bytes = *state.durable;
    for sector in 0..SECTORS {
        let range = sector * SECTOR..(sector + 1) * SECTOR;
        for version in &volatile {
            let (kept, dropped) = blocks_by_op.entry(version.op).or_default();
            if fate.keeps(file, block, version, sector) {
                bytes[range.clone()].copy_from_slice(&version.bytes[range.clone()]);
                *kept += 1;
            } else {
                *dropped += 1;
            }
        }
    }
    if bytes != *state.durable {
        state.harden(Rc::new(bytes));
    }
}
