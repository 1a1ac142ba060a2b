//! The arena: one mapping of aligned memory, cut into frames of 4 KiB << order.
//!
//! A run of blocks goes through these states:
//!
//! ```text
//!   free --alloc--> owned (Frame, pins >= 0) --dropped, no pin--> returned --drained--> free
//!                        \--Frame dropped, pins left--> orphan --last FrameRef dropped--> returned
//! ```
//!
//! Invariants
//! 1. A run has at most one [`Frame`]. Its state word counts the [`FrameRef`]s to it, and has
//!    `ORPHAN` set once the frame is gone. The run is returned exactly once: by the frame if it is
//!    dropped last (word 0), else by the reference whose release changes the word from `ORPHAN | 1`
//!    to `ORPHAN`; no other transition returns it.
//! 2. Pins are made only from a `&Frame` or a `&FrameRef`. So a holder of `&mut Frame` that sees a
//!    count of zero has exclusive access to the bytes while that borrow lasts, which makes
//!    [`Frame::try_mut`] sound. The zero is read with acquire and pins are released with release,
//!    so the last reader's reads come before the first write.
//! 3. Bytes are changed only through `try_mut`; while a pin exists there is no `&mut` to them, and
//!    [`Deref`] gives shared slices only.
//! 4. Each run that is not free holds one strong count of the shared state, and so does the arena.
//!    The mapping is unmapped with the last of them. Pins hold none: they keep their run from being
//!    returned, and the run holds the count.
//! 5. A returned run waits in a queue that has room for every block, so returning never fails, on
//!    any thread.
//! 6. All bytes are initialised from the start (fresh anonymous mappings are zero), and stay so.
//!
//! It does *not* zero frames (a fresh one has arbitrary bytes), decide who gets memory, or wait for
//! it.
#![allow(unsafe_code)]

use super::buddy::{Buddy, ORDER_MAX};
use super::word::Word;
use crate::base::BLOCK;
use crate::base::error::{Error, ErrorKind, Result};
use crossbeam::queue::ArrayQueue;
use std::fmt;
use std::mem::ManuallyDrop;
use std::ops::Deref;
use std::ptr::NonNull;
use std::sync::Arc;
/// Returned single blocks that are taken back at a time, so that no single allocation pays for all
/// of them.
const DRAIN_BATCH: usize = 64;

/// Where the arena's memory comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ArenaKind {
    /// Explicit 2 MiB huge pages (`MAP_HUGETLB`).
    HugePages,
    /// Ordinary memory for which transparent huge pages were requested (`MADV_HUGEPAGE`).
    Transparent,
    /// Ordinary 4 KiB pages.
    Small,
}

/// Bytes that the arena needs for each block besides the block itself: its state, its slot in the
/// queue of returned blocks (with a stamp), and its links in the lists of free blocks.
#[cfg(test)]
pub(crate) const BLOCK_BYTES: usize =
    size_of::<Word>() + 2 * size_of::<usize>() + super::buddy::BLOCK_BYTES;

/// The state that the arena and all its frames share.
struct Shared {
    memory: memory::Memory,
    /// One word per block; only that of a run's first block is used.
    states: Box<[Word]>,
    /// The first blocks of runs that were returned and not yet drained.
    returned: ArrayQueue<u32>,
}

impl Shared {
    /// Returns a run to the arena: it must no longer have a frame or a pin.
    ///
    /// # Safety
    /// * `shared` comes from `Arc::into_raw` and the caller gives up the run's strong count of it.
    /// * It is called once for each time the run was handed out (invariant 1).
    unsafe fn give_back(shared: NonNull<Shared>, block: u32) {
        // SAFETY: the run's own strong count, which is given up here, keeps the allocation alive
        // until the Arc is dropped.
        let shared = unsafe { Arc::from_raw(shared.as_ptr().cast_const()) };
        let pushed = shared.returned.push(block);
        debug_assert!(pushed.is_ok(), "more runs returned than there are blocks");
    }
}

/// The owner's end of the arena: hands out frames. It belongs to one thread at a time; frames and
/// pins may be dropped on any.
pub struct Arena {
    shared: Arc<Shared>,
    buddy: Buddy,
}

impl Arena {
    /// Maps memory for `blocks` blocks of 4 KiB, with huge pages if the machine has any.
    ///
    /// # Errors
    /// `Invalid` for zero blocks, `Busy` if the machine does not have that much memory.
    pub fn new(blocks: u32) -> Result<Arena> {
        if blocks == 0 || blocks > u32::MAX - (1 << ORDER_MAX) {
            return Err(Error::invalid(format_args!(
                "an arena of {blocks} blocks: give it at least one"
            )));
        }
        let memory = memory::Memory::map(blocks as usize * BLOCK).map_err(|e| {
            let mib = (u64::from(blocks) * BLOCK as u64) >> 20;
            Error::io(format_args!("mapping {mib} MiB of memory (lower memory_bytes)"), e)
                .with_kind(ErrorKind::Busy)
        })?;
        let shared = Shared {
            memory,
            states: (0..blocks).map(|_| Word::default()).collect(),
            returned: ArrayQueue::new(blocks as usize),
        };
        Ok(Arena { shared: Arc::new(shared), buddy: Buddy::new(blocks) })
    }

    /// Allocates a frame of 4 KiB << `order`, aligned to its size within the arena. Its bytes are
    /// arbitrary. `None` if there is no such run now, or `order` is above 9.
    pub fn alloc(&mut self, order: u8) -> Option<Frame> {
        if order != 0 || !self.buddy.has_quick() {
            self.drain(if order == 0 { DRAIN_BATCH } else { usize::MAX });
        }
        let block = self.buddy.take(order).or_else(|| {
            self.drain(usize::MAX);
            self.buddy.take(order)
        })?;
        self.shared.states[block as usize].begin();
        let shared = Arc::into_raw(self.shared.clone()).cast_mut();
        // SAFETY: `Arc::into_raw` never returns null.
        let shared = unsafe { NonNull::new_unchecked(shared) };
        Some(Frame { run: Run { shared, block, order } })
    }

    /// Blocks that can be handed out now, including those just returned.
    pub fn free_blocks(&mut self) -> u32 {
        self.drain(usize::MAX);
        self.buddy.free_blocks()
    }

    /// All blocks.
    pub fn blocks(&self) -> u32 {
        self.shared.states.len() as u32
    }

    /// The kind of memory that the machine provided.
    pub fn kind(&self) -> ArenaKind {
        self.shared.memory.kind()
    }

    /// The memory of all frames together, which stays mapped at least while the result lives.
    pub fn mapping(&self) -> Mapping {
        Mapping(self.shared.clone())
    }

    fn drain(&mut self, most: usize) {
        for _ in 0..most {
            // Checking first costs two plain loads; popping from an empty queue costs a full fence.
            if self.shared.returned.is_empty() {
                return;
            }
            let Some(block) = self.shared.returned.pop() else { return };
            self.buddy.give(block);
        }
    }
}

impl fmt::Debug for Arena {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "arena of {} blocks, {:?}", self.blocks(), self.kind())
    }
}

/// The memory of a whole arena: its address and length, for registration with the kernel. It gives
/// no access to the bytes.
pub struct Mapping(Arc<Shared>);

impl Mapping {
    /// The first byte; aligned to 2 MiB.
    pub fn start(&self) -> NonNull<u8> {
        self.0.memory.start()
    }

    /// Bytes that frames may lie in.
    pub fn bytes(&self) -> usize {
        self.0.states.len() * BLOCK
    }
}

/// The place of a run. It is plain data: `Frame` and `FrameRef` give it its meaning.
#[derive(Clone, Copy)]
struct Run {
    shared: NonNull<Shared>,
    block: u32,
    order: u8,
}

impl Run {
    fn shared(&self) -> &Shared {
        // SAFETY: a Run lives only in a Frame or FrameRef, whose run is not returned yet and holds
        // a strong count of `shared` (invariant 4). No `&mut Shared` exists.
        unsafe { self.shared.as_ref() }
    }

    fn state(&self) -> &Word {
        &self.shared().states[self.block as usize]
    }

    fn len(&self) -> usize {
        BLOCK << self.order
    }

    fn start(&self) -> NonNull<u8> {
        // SAFETY: `block` is below the arena's number of blocks, so the offset stays within the
        // mapping.
        unsafe { self.shared().memory.start().add(self.block as usize * BLOCK) }
    }

    /// Adds a pin; only from a `&Frame` or `&FrameRef` (invariant 2).
    fn pin(self) -> FrameRef {
        self.state().pin();
        FrameRef { run: self }
    }
}

impl fmt::Debug for Run {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "f{}", self.block)?;
        if self.order > 0 {
            write!(f, "+{}", 1u32 << self.order)?;
        }
        Ok(())
    }
}

/// The unique owner of a run of blocks. It can be read, pinned and, while nothing pins it, written.
pub struct Frame {
    run: Run,
}

// SAFETY: a Frame owns bytes (like `Box<[u8]>`), and its shared bookkeeping is atomic; `&Frame`
// gives only shared slices and pins, and changing the bytes needs `&mut Frame`.
unsafe impl Send for Frame {}
// SAFETY: as above.
unsafe impl Sync for Frame {}

impl Frame {
    /// The length in bytes: 4 KiB << order.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.run.len()
    }

    /// The number of its first block in the arena.
    #[inline]
    pub fn block(&self) -> u32 {
        self.run.block
    }

    /// Keeps the bytes from being changed, and their memory from being reused, while the result
    /// lives.
    pub fn pin(&self) -> FrameRef {
        self.run.pin()
    }

    /// The current number of pins.
    pub fn pins(&self) -> u32 {
        self.run.state().pins()
    }

    /// The bytes for writing; `None` while a pin exists.
    pub fn try_mut(&mut self) -> Option<&mut [u8]> {
        if self.pins() != 0 {
            return None;
        }
        // SAFETY: invariant 2: with `&mut self` and no pins, no other reference to these bytes
        // exists or can be made during the borrow. The run lies within the mapping, is not shared
        // with another run, and is initialised.
        Some(unsafe { std::slice::from_raw_parts_mut(self.run.start().as_ptr(), self.run.len()) })
    }
}

impl Deref for Frame {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: the run is within the mapping and initialised (invariant 6); writing needs `&mut
        // Frame` (invariant 3).
        unsafe { std::slice::from_raw_parts(self.run.start().as_ptr(), self.run.len()) }
    }
}

impl Drop for Frame {
    fn drop(&mut self) {
        if self.run.state().orphan() {
            // SAFETY: the frame is the last to go (the word was 0, so every reference is gone and
            // no more can be made): this is the one return of invariant 1, with the run's strong
            // count.
            unsafe { Shared::give_back(self.run.shared, self.run.block) }
        }
    }
}

impl fmt::Debug for Frame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.run.fmt(f)
    }
}

/// A pin: the bytes of a frame, shared and unchanging. The memory is reused only after the last pin
/// is dropped.
pub struct FrameRef {
    run: Run,
}

// SAFETY: a FrameRef gives shared access to bytes that do not change while it lives (invariant 3),
// and its count is atomic: like Arc<[u8]>.
unsafe impl Send for FrameRef {}
// SAFETY: as above.
unsafe impl Sync for FrameRef {}

impl FrameRef {
    /// The length of the frame in bytes.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.run.len()
    }
}

impl Clone for FrameRef {
    fn clone(&self) -> Self {
        self.run.pin()
    }
}

impl Deref for FrameRef {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: the run is within the mapping and initialised (invariant 6); while this pin
        // exists there is no `&mut` to the bytes (invariant 3) and the run is not returned
        // (invariant 1).
        unsafe { std::slice::from_raw_parts(self.run.start().as_ptr(), self.run.len()) }
    }
}

impl Drop for FrameRef {
    fn drop(&mut self) {
        // Copied out first: once the pin is released, the frame's owner may return the run and free
        // `shared`, so `self` must not be touched afterwards unless this was the last pin of an
        // orphan.
        let Run { shared, block, .. } = self.run;
        if self.run.state().release() {
            // SAFETY: the frame is gone and this was the last pin: exactly one release sees this
            // value, so this is the one return of invariant 1, with the run's strong count.
            unsafe { Shared::give_back(shared, block) }
        }
    }
}

impl fmt::Debug for FrameRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.run.fmt(f)
    }
}

/// The mapping itself: from the kernel, or under Miri, which has no mmap, from the allocator.
mod memory;

#[cfg(test)]
#[path = "arena_tests.rs"]
mod tests;
