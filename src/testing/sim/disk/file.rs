//! A file of the simulated disk: what is durable, what is in the volatile cache on top of it, and
//! what is visible.
//!
//! Invariants
//! 1. What a read gives is the newest version of a block; what is durable is `durable`; all
//!    versions between them are in `volatile`, oldest first. So a power loss can leave, for each
//!    512-byte sector, any of them.
//! 2. A doomed version (of a flush that failed) never becomes durable by a later flush: the system
//!    call that succeeds after one that failed proves nothing.
//! 3. Contents are shared, never changed in place: an image of a disk costs one reference count a
//!    block.
//!
//! It does *not* know time, operations in flight or chance.

use crate::base::BLOCK;
use std::collections::BTreeSet;
use std::rc::Rc;

/// The unit that a device writes completely or not at all.
pub const SECTOR: usize = 512;
/// Sectors of a block.
pub const SECTORS: usize = BLOCK / SECTOR;

/// The contents of one block.
pub type Block = Rc<[u8; BLOCK]>;

/// One write of a block that is not durable yet.
#[derive(Clone)]
pub struct Version {
    /// The operation, by its number.
    pub op: u64,
    /// Which block of the operation this is, in the order of transfer, for writes that were cut
    /// short.
    pub index: u32,
    /// When the operation completed; flushes cover what completed before they were submitted.
    pub done: u64,
    /// Whether a flush that should have made it durable failed.
    pub doomed: bool,
    /// The whole block as it is visible after this write.
    pub bytes: Block,
}

/// A block with its history.
#[derive(Clone)]
pub struct BlockState {
    /// The contents that are there after a power loss, unless sectors of a newer version are.
    pub durable: Block,
    /// What was durable before: damage tests use it as the contents after a lost write.
    pub previous: Option<Block>,
    /// Newer versions, oldest first.
    pub volatile: Vec<Version>,
}

/// A file.
#[derive(Clone, Default)]
pub struct SimFile {
    blocks: Vec<BlockState>,
    /// Blocks with volatile versions.
    dirty: BTreeSet<u32>,
}

impl BlockState {
    fn zeros(zero: &Block) -> Self {
        BlockState { durable: zero.clone(), previous: None, volatile: Vec::new() }
    }

    /// What a read gives.
    pub fn visible(&self) -> &Block {
        self.volatile.last().map_or(&self.durable, |version| &version.bytes)
    }

    /// Makes `bytes` durable, and keeps what was before.
    pub fn harden(&mut self, bytes: Block) {
        if !Rc::ptr_eq(&bytes, &self.durable) {
            self.previous = Some(std::mem::replace(&mut self.durable, bytes));
        }
    }
}

impl SimFile {
    /// Its length in bytes.
    pub fn len(&self) -> u64 {
        (self.blocks.len() * BLOCK) as u64
    }

    /// The block with this number.
    pub fn block(&self, number: u64) -> Option<&BlockState> {
        self.blocks.get(number as usize)
    }

    /// The same block, which damage and crash images may change.
    pub fn block_mut(&mut self, number: u64) -> Option<&mut BlockState> {
        self.blocks.get_mut(number as usize)
    }

    /// Adds a version on top of a block.
    pub fn write(&mut self, number: u64, version: Version) {
        self.blocks[number as usize].volatile.push(version);
        self.dirty.insert(number as u32);
    }

    /// Makes durable what completed up to `covers`.
    pub fn flush(&mut self, covers: u64) {
        self.dirty.retain(|&number| {
            let state = &mut self.blocks[number as usize];
            let newest = state.volatile.iter().rposition(|v| v.done <= covers && !v.doomed);
            if let Some(newest) = newest {
                let bytes = state.volatile[newest].bytes.clone();
                state.harden(bytes);
                state.volatile.drain(..=newest);
            }
            !state.volatile.is_empty()
        });
    }

    /// Fails a flush: what it covered is durable or lost for good, as `lost` decides.
    pub fn fail_flush(&mut self, covers: u64, mut lost: impl FnMut() -> bool) {
        for &number in &self.dirty {
            for version in &mut self.blocks[number as usize].volatile {
                version.doomed |= version.done <= covers && lost();
            }
        }
        self.flush(covers);
    }

    /// Makes the blocks `from..to` exist as durable zeros; blocks between the end and `from` too.
    pub fn allocate(&mut self, from: u64, to: u64, zero: &Block) {
        let len = self.blocks.len().max(to as usize);
        self.blocks.resize_with(len, || BlockState::zeros(zero));
        for number in from..to {
            let state = &mut self.blocks[number as usize];
            state.harden(zero.clone());
            state.volatile.clear();
            self.dirty.remove(&(number as u32));
        }
    }

    /// Takes the numbers of the blocks with volatile versions: the caller settles these.
    pub fn take_dirty(&mut self) -> BTreeSet<u32> {
        std::mem::take(&mut self.dirty)
    }

    /// Whether no version is volatile.
    pub fn is_settled(&self) -> bool {
        self.dirty.is_empty()
    }
}
