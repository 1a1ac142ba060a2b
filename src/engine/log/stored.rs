//! A log group as read from a log: it is opened whole, or refused with the reason.
//!
//! ```text
//! bytes --head_at--> GroupHead --open--> records --placed--> pages in extents: address, checksum
//!           |none                |NotWhole           |NotWhole
//! ```
//! Invariants
//! 1. Nothing else judges the bytes of a group: the search for the end of the log, the redo and
//!    `verify` all do it here.
//! 2. A group is whole only if its body has the checksum that its head states, its records can be
//!    decoded, and each page image in it opens by its entry (see `codec`).
//!
//! It does *not* read, nor judge how groups follow one another. Pages that a group has put straight
//! into extents are not in its bytes: the caller compares them with [`Expected`].

use crate::base::{BLOCK, BlockAddr, SegmentNo, ShardId};
use crate::engine::codec::{self, Expected};
use crate::format::group::{Body, GroupHead, ImageState, PageImage, Record};
use crate::format::superblock::Superblock;
use std::fmt;

/// Why a group with a valid head is not whole.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum NotWhole {
    /// The body does not have the checksum that the head states.
    Body,
    /// The body has the right checksum but can't be decoded.
    Records,
    /// A page image, or the entry of one, is wrong in this way.
    Image(codec::Refusal),
}

impl fmt::Display for NotWhole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NotWhole::Body => f.write_str("has a wrong checksum"),
            NotWhole::Records => f.write_str("contradicts itself"),
            NotWhole::Image(refusal) => write!(f, "holds a page image that {refusal}"),
        }
    }
}

/// The head of the group at this position of the store's logs, given the `bytes` from there on;
/// `None` if no group of the present epoch begins there.
pub(crate) fn head_at(
    superblock: &Superblock,
    position: (ShardId, SegmentNo, u32),
    bytes: &[u8],
) -> Option<GroupHead> {
    let segment_blocks = (superblock.geometry.segment_bytes / BLOCK as u64) as u32;
    GroupHead::open(bytes, superblock.salt, superblock.epoch, position, segment_blocks)
}

/// A group whose body has been checked.
pub(crate) struct StoredGroup<'a> {
    /// The commits, in order.
    pub records: Vec<Record<'a>>,
    /// The page images.
    pub images: Vec<PageImage>,
    bytes: &'a [u8],
}

impl<'a> StoredGroup<'a> {
    /// Opens the group that `bytes` begin with.
    ///
    /// # Errors
    /// [`NotWhole::Body`], [`NotWhole::Records`].
    pub(crate) fn open(head: &GroupHead, bytes: &'a [u8]) -> Result<Self, NotWhole> {
        let body = Body::open(head, bytes).ok_or(NotWhole::Body)?;
        let records = body.records().ok_or(NotWhole::Records)?;
        Ok(StoredGroup { records, images: body.images, bytes })
    }

    /// Checks the page images in the group; returns the places of those that it has put into
    /// extents, and what must be there.
    ///
    /// # Errors
    /// [`NotWhole::Image`].
    pub(crate) fn placed(&self) -> Result<Vec<(BlockAddr, Expected)>, NotWhole> {
        let mut placed = Vec::new();
        for PageImage { state, entry, .. } in &self.images {
            match state {
                ImageState::NotWritten => {}
                ImageState::Inline(block) => {
                    let at = *block as usize * BLOCK;
                    let stored = self.bytes.get(at..at + BLOCK).unwrap_or_default();
                    codec::open(entry, stored).map_err(NotWhole::Image)?;
                }
                ImageState::Placed => {
                    let expected = Expected::of(entry).map_err(NotWhole::Image)?;
                    placed.push((entry.place(), expected));
                }
            }
        }
        Ok(placed)
    }
}
