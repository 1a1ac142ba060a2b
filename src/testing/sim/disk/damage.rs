//! Damages durable data, as bit rot, lost and misdirected writes do.
//!
//! Invariants
//! 1. Only settled disks are damaged (nothing volatile, nothing in flight), so that reads see the
//!    damage.
//! 2. It returns whether it changed anything: damage that changes nothing can't be detected and
//!    proves nothing.

use super::SimDisk;
use super::file::{SECTOR, SECTORS, SimFile};
use crate::base::BLOCK;
use crate::io::FileId;
use std::rc::Rc;

/// Counters of damaged stores.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DamageCounters {
    /// Sectors or blocks changed.
    pub done: u64,
    /// Stores that were not opened, with an error that names the damage.
    pub refused: u64,
    /// Stores that were opened and named the damage when something was read.
    pub named: u64,
    /// Stores that lost commits above every recorded watermark.
    pub cut: u64,
    /// Stores that had lost nothing, and repaired a copy of the superblock with a warning.
    pub mended: u64,
    /// Stores that had lost nothing: the damaged bytes were not needed.
    pub harmless: u64,
}

impl DamageCounters {
    /// Adds another run's.
    pub fn add(&mut self, other: &DamageCounters) {
        self.done += other.done;
        self.refused += other.refused;
        self.named += other.named;
        self.cut += other.cut;
        self.mended += other.mended;
        self.harmless += other.harmless;
    }
}

/// Damage to some sectors of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Damage {
    /// One bit is flipped.
    Flip {
        /// The bit's number, from the first sector on.
        bit: usize,
    },
    /// The sectors read as zeros.
    Zero,
    /// The last write was lost: the sectors read as before it.
    Stale,
    /// The sectors are swapped with as many others of the same file.
    Swap {
        /// The first of the others.
        with: u64,
    },
}

impl SimDisk {
    /// Damages `count` sectors of a file from `first` on, all in one block. Returns `false` if that
    /// changed nothing.
    ///
    /// # Panics
    /// If there are no such sectors, they are of several blocks, or anything is volatile or in
    /// flight.
    pub fn damage(&self, file: FileId, first: u64, count: usize, damage: Damage) -> bool {
        let mut state = self.0.borrow_mut();
        assert!(state.flying.is_empty(), "damage while operations are in flight");
        let content = state.files.get_mut(&file).expect("the file exists");
        assert!(content.is_settled(), "damage while {file} has volatile blocks");
        let before = read(content, first, count);
        let after = match damage {
            Damage::Flip { bit } => {
                let mut bytes = before.clone();
                bytes[bit / 8 % (count * SECTOR)] ^= 1 << (bit % 8);
                bytes
            }
            Damage::Zero => vec![0; count * SECTOR],
            Damage::Stale => {
                let (block, range) = place(first, count);
                let block = content.block(block).expect("the block exists");
                block
                    .previous
                    .as_ref()
                    .map_or_else(|| before.clone(), |previous| previous[range].to_vec())
            }
            Damage::Swap { with } => {
                let other = read(content, with, count);
                write(content, with, &before);
                other
            }
        };
        write(content, first, &after);
        before != after
    }
}

/// The block of some sectors, and the bytes in it.
fn place(first: u64, count: usize) -> (u64, std::ops::Range<usize>) {
    let at = (first as usize % SECTORS) * SECTOR;
    assert!(at + count * SECTOR <= BLOCK, "sectors of several blocks");
    (first / SECTORS as u64, at..at + count * SECTOR)
}

fn read(file: &SimFile, first: u64, count: usize) -> Vec<u8> {
    let (block, range) = place(first, count);
    file.block(block).expect("the block exists").durable[range].to_vec()
}

fn write(file: &mut SimFile, first: u64, bytes: &[u8]) {
    let (block, range) = place(first, bytes.len() / SECTOR);
    let block = file.block_mut(block).expect("the block exists");
    let mut whole = *block.durable;
    whole[range].copy_from_slice(bytes);
    block.durable = Rc::new(whole);
}
