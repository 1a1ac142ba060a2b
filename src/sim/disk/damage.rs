//! Damage to what is durable: what bit rot, lost and misdirected writes leave behind.
//!
//! Invariants
//! 1. Damage is done to settled disks only (nothing volatile, nothing in flight), so that it is what is read.
//! 2. It says whether it changed anything: damage that changes nothing can't be detected and proves nothing.

use super::SimDisk;
use crate::disk::FileId;
use crate::types::BLOCK;
use std::rc::Rc;

/// Damage to one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Damage {
    /// One bit is flipped.
    Flip {
        /// Its number within the block.
        bit: usize,
    },
    /// The block reads as zeros.
    Zero,
    /// The last write of the block got lost: it reads as before it.
    Stale,
    /// The block and another of the same file are swapped.
    Swap {
        /// The other.
        with: u64,
    },
}

impl SimDisk {
    /// Damages a block of a file; `false` if that left it as it was.
    ///
    /// # Panics
    /// If there is no such block, or anything is volatile or in flight.
    pub fn damage(&self, file: FileId, block: u64, damage: Damage) -> bool {
        let mut state = self.0.borrow_mut();
        assert!(state.flying.is_empty(), "damage while operations are in flight");
        let zero = state.zero.clone();
        let content = state.files.get_mut(&file).expect("the file exists");
        assert!(content.is_settled(), "damage while {file} has volatile blocks");
        let other = match damage {
            Damage::Swap { with } => Some(content.block(with).expect("the other block exists").durable.clone()),
            _ => None,
        };
        let target = content.block_mut(block).expect("the block exists");
        let before = target.durable.clone();
        let after = match damage {
            Damage::Flip { bit } => {
                let mut bytes = *before;
                bytes[bit / 8 % BLOCK] ^= 1 << (bit % 8);
                Rc::new(bytes)
            }
            Damage::Zero => zero,
            Damage::Stale => target.previous.clone().unwrap_or_else(|| before.clone()),
            Damage::Swap { .. } => other.expect("taken above"),
        };
        target.durable = after.clone();
        if let Damage::Swap { with } = damage {
            content.block_mut(with).expect("the other block exists").durable = before.clone();
        }
        *before != *after
    }
}
