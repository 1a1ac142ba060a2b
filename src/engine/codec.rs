//! Converts between a page and its stored bytes: [`seal`] makes the bytes and the page's entry,
//! [`open`] checks them.
//!
//! Invariants
//! 1. Nothing else makes or checks an entry of the page map: write-back, group commit and
//!    compaction seal; loading, recovery and `verify` open.
//! 2. A page is sealed before blocks are allocated for it: only then is their number known.
//! 3. No byte passes [`open`] that is not what [`seal`] was given.
//!
//! There is one codec, *plain*: the stored bytes are those of the page, one block, with their
//! CRC32C. Map nodes are not pages: the entry that names a node has its checksum (see
//! `format::node`).

use crate::base::checksum::crc32c;
use crate::base::{BLOCK, BlockAddr, Lsn};
use crate::format::node::Entry;
use crate::memory::FrameRef;
use std::fmt;

/// A page as it is stored.
pub(crate) struct Sealed {
    bytes: FrameRef,
    checksum: u32,
}

/// Makes the stored bytes of a page.
pub(crate) fn seal(page: FrameRef) -> Sealed {
    Sealed { checksum: crc32c(&page), bytes: page }
}

impl Sealed {
    /// The number of blocks that it takes.
    pub(crate) fn blocks(&self) -> u32 {
        debug_assert_eq!(self.bytes.len(), BLOCK, "plain pages are a block");
        1
    }

    /// The entry that names it at `place`.
    pub(crate) fn entry(&self, place: BlockAddr, lsn: Lsn) -> Entry {
        Entry::plain(place, lsn, self.checksum)
    }

    /// The bytes to write.
    pub(crate) fn into_bytes(self) -> FrameRef {
        self.bytes
    }
}

/// The reason why stored bytes are not a page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Refusal {
    /// The entry names a size, a codec or a key that this version does not write.
    Unknown,
    /// The bytes are not those that were sealed.
    Damaged,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Refusal::Unknown => "has a form that this version does not know",
            Refusal::Damaged => "does not have the bytes that were written",
        })
    }
}

/// What an entry says about the bytes that it names, small enough for lists of many pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Expected {
    checksum: u32,
}

impl Expected {
    /// # Errors
    /// [`Refusal::Unknown`].
    pub(crate) fn of(entry: &Entry) -> Result<Expected, Refusal> {
        let is_plain = entry.class == 0 && entry.codec == 0 && entry.key_id.get() == 0;
        match is_plain && entry.len.get() as usize == BLOCK {
            true => Ok(Expected { checksum: entry.crc.get() }),
            false => Err(Refusal::Unknown),
        }
    }

    /// The page that is stored in these bytes.
    ///
    /// # Errors
    /// [`Refusal::Damaged`].
    pub(crate) fn open(self, stored: &[u8]) -> Result<&[u8], Refusal> {
        match stored.len() == BLOCK && crc32c(stored) == self.checksum {
            true => Ok(stored),
            false => Err(Refusal::Damaged),
        }
    }
}

/// The page that `entry` names, from its stored bytes.
///
/// # Errors
/// A [`Refusal`].
pub(crate) fn open<'a>(entry: &Entry, stored: &'a [u8]) -> Result<&'a [u8], Refusal> {
    Expected::of(entry)?.open(stored)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Arena;

    fn sealed(byte: u8) -> Sealed {
        let mut arena = Arena::new(4).expect("memory");
        let mut frame = arena.alloc(0).expect("it is empty");
        frame.try_mut().expect("it is new").fill(byte);
        seal(frame.pin())
    }

    /// If this fails, a reader gets bytes that were never written, or is refused bytes that were.
    #[test]
    fn what_was_sealed_opens_and_nothing_else_does() {
        let sealed = sealed(7);
        assert_eq!(sealed.blocks(), 1);
        let entry = sealed.entry(BlockAddr::default(), Lsn::new(3));
        let mut stored = sealed.into_bytes().to_vec();
        assert_eq!(open(&entry, &stored), Ok(&[7; BLOCK][..]));
        for at in [0, 1, 2047, BLOCK - 1] {
            stored[at] ^= 0x10;
            assert_eq!(open(&entry, &stored), Err(Refusal::Damaged), "byte {at}");
            stored[at] ^= 0x10;
        }
        assert_eq!(open(&entry, &stored[..BLOCK - 1]), Err(Refusal::Damaged));
    }

    /// If this fails, a page of a later version is read as if it were plain.
    #[test]
    fn an_entry_of_another_codec_is_refused() {
        let sealed = sealed(7);
        let plain = sealed.entry(BlockAddr::default(), Lsn::new(3));
        let others = [
            Entry { class: 1, ..plain },
            Entry { codec: 1, ..plain },
            Entry { key_id: 1.into(), ..plain },
            Entry { len: 100.into(), ..plain },
        ];
        for entry in others {
            assert_eq!(open(&entry, &[7; BLOCK]), Err(Refusal::Unknown));
        }
    }
}
