//! A log group: the unit in which the log is written, and in which recovery accepts or drops it.
//!
//! ```text
//! | head 256 B | records ... | images ... | zeros | inline page | inline page | ...
//! |<------------------ body blocks -------------->|<---- one block each ------->|
//! ```
//! The head is sealed by `head_crc`, seeded with the epoch's salt and covering the group's own
//! position, so that neither recycled bytes, nor user data that happens to be a copy of a log, can
//! pass for a group. `body_crc` covers the rest of the body blocks, padding included. An image
//! stands for one whole page: its bytes are inline in this group, or at their final address in an
//! extent, and its entry has their checksum.

use super::node::Entry;
use super::{LSN_END, crc_around, get};
use crate::base::{BLOCK, Lsn, PageKey, SegmentNo, ShardId, ShardSet, VolumeId};
use std::mem::offset_of;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The most runs of LSNs that a group can hold.
pub const RUNS_MAX: usize = 8;
/// Bytes of the head; records follow.
pub const HEAD_BYTES: usize = size_of::<Head>();
pub(super) const MAGIC: [u8; 8] = *b"CPGROUP\0";

/// Consecutive LSNs.
#[repr(C)]
#[derive(
    Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Default,
)]
pub struct RawRun {
    /// The first LSN.
    pub first: U64,
    /// The number of LSNs.
    pub count: U64,
}

/// Head of a group.
#[repr(C)]
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
pub struct Head {
    /// `CPGROUP`.
    pub magic: [u8; 8],
    /// CRC32C of the head, seeded with the salt, this field as zeros.
    pub head_crc: U32,
    /// CRC32C of the body after the head.
    pub body_crc: U32,
    /// The epoch.
    pub epoch: U64,
    /// The segment's generation: grows each time that a segment is begun.
    pub generation: U64,
    /// Grows by one with each group of this log in this epoch.
    pub number: U64,
    /// `head_crc` of the group before; zero for the first.
    pub prev_crc: U32,
    /// The shard whose log it is.
    pub shard: U16,
    /// Runs in use.
    pub runs_count: U16,
    /// The segment it stands in.
    pub segment: U32,
    /// The block it begins at.
    pub block: U32,
    /// Body blocks, the head's included.
    pub body_blocks: U32,
    /// All blocks, inline pages included.
    pub blocks: U32,
    /// Bytes of records after the head.
    pub records_bytes: U32,
    /// Page images after the records.
    pub images_count: U32,
    /// Commits recorded.
    pub commits_count: U32,
    /// The key with which the body is encrypted: 0 = not encrypted.
    pub key_id: U16,
    /// Zero.
    pub reserved: U16,
    /// Every commit up to here was durable when this group was submitted.
    pub watermark: U64,
    /// The newest superblock when this group was submitted.
    pub superblock_generation: U64,
    /// All LSNs that this shard allocated and this group accounts for, whether or not a commit uses
    /// them.
    pub runs: [RawRun; RUNS_MAX],
    /// Nonce of the encryption.
    pub nonce: [u8; 12],
    /// Authentication tag of the encryption.
    pub tag: [u8; 16],
    /// Zero.
    pub reserved2: [u8; 4],
}

/// Head of the record of one commit; [`RawChange`]s follow, behind the [`RawParts`] if it is a
/// commit over shards.
#[repr(C)]
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
pub struct RawRecord {
    /// The commit.
    pub lsn: U64,
    /// Bytes of the record, this head included.
    pub bytes: U32,
    /// Changes.
    pub changes_count: U32,
    /// 0 = a whole commit, 1 = the owner's part of a commit over shards, 2 = another shard's part
    /// of one.
    pub kind: u8,
    /// Zero.
    pub reserved: [u8; 7],
}

/// The other shards of a commit over shards: it counts only if each of them has logged its part
/// under the same LSN.
#[repr(C)]
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
pub struct RawParts {
    /// In the owner's record: a bit for each other shard that has a part. In another's: the bit of
    /// the owner.
    pub shards: U64,
}

/// What a change does to its page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum ChangeKind {
    /// The page is as in a slot.
    Image = 1,
    /// Some of its bytes are replaced.
    Patch = 2,
    /// It is absent.
    Free = 3,
}

impl ChangeKind {
    fn decode(raw: u8) -> Option<ChangeKind> {
        [Self::Image, Self::Patch, Self::Free].into_iter().find(|kind| *kind as u8 == raw)
    }
}

/// One change; the bytes of a patch follow it.
#[repr(C)]
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
pub struct RawChange {
    /// A [`ChangeKind`].
    pub kind: u8,
    /// The volume.
    pub volume: u8,
    /// Size class.
    pub class: u8,
    /// Zero.
    pub reserved: u8,
    /// Number of the image, or bytes of the patch.
    pub len: U32,
    /// First byte of the patch.
    pub offset: U32,
    /// The page.
    pub page: U64,
}

/// A page image.
#[repr(C)]
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
pub struct RawImage {
    /// The page.
    pub page: U64,
    /// The volume.
    pub volume: u8,
    /// 0 = not written (freed again in the same span), 1 = inline, 2 = at its final address.
    pub state: u8,
    /// Zero.
    pub reserved: U16,
    /// For inline images, the block within the group.
    pub block: U32,
    /// What the page map will say of it; the address only in state 2.
    pub entry: Entry,
}

const _: () = assert!(HEAD_BYTES == 256 && size_of::<RawRecord>() == 24);
const _: () = assert!(
    size_of::<RawChange>() == 20 && size_of::<RawImage>() == 80 && size_of::<RawParts>() == 8
);

/// A head in memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GroupHead {
    /// Epoch.
    pub epoch: u64,
    /// The shard whose log it is.
    pub shard: ShardId,
    /// The segment it stands in.
    pub segment: SegmentNo,
    /// The block at which it begins.
    pub block: u32,
    /// Segment generation.
    pub generation: u64,
    /// Group number.
    pub number: u64,
    /// Checksum of the previous head.
    pub prev_crc: u32,
    /// Checksum of this head.
    pub head_crc: u32,
    /// Checksum of the body.
    pub body_crc: u32,
    /// Body blocks.
    pub body_blocks: u32,
    /// All blocks.
    pub blocks: u32,
    /// Bytes of records.
    pub records_bytes: u32,
    /// Page images.
    pub images_count: u32,
    /// Commits.
    pub commits_count: u32,
    /// Every commit up to here was durable at submission.
    pub watermark: Lsn,
    /// Newest superblock at submission.
    pub superblock_generation: u64,
    /// Runs: first LSN and count.
    pub runs: Vec<(Lsn, u64)>,
}

fn seed(salt: u64) -> u32 {
    crate::base::checksum::crc32c(&salt.to_le_bytes())
}

impl GroupHead {
    /// Fills the first [`HEAD_BYTES`] of `out`; sets `head_crc`.
    pub fn seal(&mut self, salt: u64, out: &mut [u8]) {
        let mut runs = [RawRun::default(); RUNS_MAX];
        for (raw, (first, count)) in runs.iter_mut().zip(&self.runs) {
            *raw = RawRun { first: first.get().into(), count: (*count).into() };
        }
        let mut raw = Head {
            magic: MAGIC,
            head_crc: 0.into(),
            body_crc: self.body_crc.into(),
            epoch: self.epoch.into(),
            generation: self.generation.into(),
            number: self.number.into(),
            prev_crc: self.prev_crc.into(),
            shard: self.shard.get().into(),
            runs_count: (self.runs.len() as u16).into(),
            segment: self.segment.get().into(),
            block: self.block.into(),
            body_blocks: self.body_blocks.into(),
            blocks: self.blocks.into(),
            records_bytes: self.records_bytes.into(),
            images_count: self.images_count.into(),
            commits_count: self.commits_count.into(),
            key_id: 0.into(),
            reserved: 0.into(),
            watermark: self.watermark.get().into(),
            superblock_generation: self.superblock_generation.into(),
            runs,
            nonce: [0; 12],
            tag: [0; 16],
            reserved2: [0; 4],
        };
        self.head_crc = crc_around(seed(salt), raw.as_bytes(), offset_of!(Head, head_crc));
        raw.head_crc = self.head_crc.into();
        out[..HEAD_BYTES].copy_from_slice(raw.as_bytes());
    }

    /// The head at the start of `block_bytes`, if there is one that belongs to this epoch and
    /// position and whose numbers fit a segment of `segment_blocks`.
    pub fn open(
        block_bytes: &[u8],
        salt: u64,
        epoch: u64,
        (shard, segment, block): (ShardId, SegmentNo, u32),
        segment_blocks: u32,
    ) -> Option<GroupHead> {
        let raw: &Head = get(block_bytes, 0)?;
        let checksum = || crc_around(seed(salt), raw.as_bytes(), offset_of!(Head, head_crc));
        if raw.magic != MAGIC || raw.epoch.get() != epoch || raw.head_crc.get() != checksum() {
            return None;
        }
        let here = raw.shard.get() == shard.get()
            && raw.segment.get() == segment.get()
            && raw.block.get() == block;
        let runs = raw.runs.get(..usize::from(raw.runs_count.get())).filter(|_| here)?;
        let head = GroupHead {
            epoch,
            shard,
            segment,
            block,
            generation: raw.generation.get(),
            number: raw.number.get(),
            prev_crc: raw.prev_crc.get(),
            head_crc: raw.head_crc.get(),
            body_crc: raw.body_crc.get(),
            body_blocks: raw.body_blocks.get(),
            blocks: raw.blocks.get(),
            records_bytes: raw.records_bytes.get(),
            images_count: raw.images_count.get(),
            commits_count: raw.commits_count.get(),
            watermark: Lsn::new(raw.watermark.get()),
            superblock_generation: raw.superblock_generation.get(),
            runs: runs.iter().map(|r| (Lsn::new(r.first.get()), r.count.get())).collect(),
        };
        head.is_consistent(segment_blocks).then_some(head)
    }

    /// Whether the numbers fit each other and a segment of `segment_blocks`. Asked before a group
    /// is written, and after one was read.
    pub fn is_consistent(&self, segment_blocks: u32) -> bool {
        let needed = HEAD_BYTES as u64
            + u64::from(self.records_bytes)
            + u64::from(self.images_count) * size_of::<RawImage>() as u64;
        let end = |(first, count): &(Lsn, u64)| first.get().checked_add(*count);
        let ends = self.runs.iter().map(|run| end(run).unwrap_or(u64::MAX));
        (1..=self.blocks).contains(&self.body_blocks)
            && self.blocks <= segment_blocks.saturating_sub(self.block)
            && self.runs.len() <= RUNS_MAX
            && needed <= u64::from(self.body_blocks) * BLOCK as u64
            && ends.chain([self.watermark.get()]).all(|lsn| lsn < LSN_END)
    }
}

/// One change of a decoded record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoggedChange<'a> {
    /// The page is as in this image.
    Image(PageKey, u32),
    /// Bytes from an offset.
    Patch(PageKey, u32, &'a [u8]),
    /// The page is absent.
    Free(PageKey),
}

/// Where the bytes of an image are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageState {
    /// Nowhere: the page was freed again in the same atomic span.
    NotWritten,
    /// In the group, at this block of it.
    Inline(u32),
    /// At the address that the entry names.
    Placed,
}

/// A decoded page image.
#[derive(Clone, Copy)]
pub struct PageImage {
    /// The page.
    pub key: PageKey,
    /// Where its bytes are.
    pub state: ImageState,
    /// Version and checksum; a complete entry if the image is at its final address.
    pub entry: Entry,
}

impl PageImage {
    /// The form on disk.
    pub fn encode(&self) -> RawImage {
        let (state, block) = match self.state {
            ImageState::NotWritten => (0, 0),
            ImageState::Inline(block) => (1, block),
            ImageState::Placed => (2, 0),
        };
        RawImage {
            page: self.key.page.get().into(),
            volume: self.key.volume.get(),
            state,
            reserved: 0.into(),
            block: block.into(),
            entry: self.entry,
        }
    }
}

/// The checked body of a group.
pub struct Body<'a> {
    records: &'a [u8],
    /// The page images.
    pub images: Vec<PageImage>,
}

/// Which part of a commit a record holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// All of it.
    Whole,
    /// The part of the shard that allocated the LSN; the set has the other shards with parts.
    Owner(ShardSet),
    /// The part of another shard; the set has the owner.
    Part(ShardSet),
}

impl Role {
    /// The number on disk.
    pub fn kind(self) -> u8 {
        match self {
            Role::Whole => 0,
            Role::Owner(_) => 1,
            Role::Part(_) => 2,
        }
    }

    /// The shards that the record names; `None` in the record of a whole commit.
    pub fn shards(self) -> Option<ShardSet> {
        match self {
            Role::Whole => None,
            Role::Owner(shards) | Role::Part(shards) => Some(shards),
        }
    }
}

/// A commit, or a part of one, as logged.
pub struct Record<'a> {
    /// The commit.
    pub lsn: Lsn,
    /// Which part of it this is.
    pub role: Role,
    /// Its changes, in order.
    pub changes: Vec<LoggedChange<'a>>,
}

impl<'a> Body<'a> {
    /// Checks the body in `bytes`, the group's body blocks. `None` if the checksum is wrong or it
    /// contradicts itself.
    pub fn open(head: &GroupHead, bytes: &'a [u8]) -> Option<Body<'a>> {
        let body = bytes.get(..head.body_blocks as usize * BLOCK)?;
        if crate::base::checksum::crc32c(&body[HEAD_BYTES..]) != head.body_crc {
            return None;
        }
        let records_end = HEAD_BYTES + head.records_bytes as usize;
        let mut images = Vec::new();
        for i in 0..head.images_count as usize {
            let raw: &RawImage = get(body, records_end + i * size_of::<RawImage>())?;
            let state = match raw.state {
                0 => ImageState::NotWritten,
                1 if (head.body_blocks..head.blocks).contains(&raw.block.get()) => {
                    ImageState::Inline(raw.block.get())
                }
                2 => ImageState::Placed,
                _ => return None,
            };
            let key = PageKey::new(VolumeId::new(raw.volume), raw.page.get().into());
            images.push(PageImage { key, state, entry: raw.entry });
        }
        Some(Body { records: &body[HEAD_BYTES..records_end], images })
    }

    /// The commits, in order. `None` if a record contradicts itself.
    pub fn records(&self) -> Option<Vec<Record<'a>>> {
        let mut records = Vec::new();
        let mut at = 0;
        while at < self.records.len() {
            let raw: &RawRecord = get(self.records, at)?;
            let end = at
                .checked_add(raw.bytes.get() as usize)
                .filter(|end| *end <= self.records.len())?;
            let mut next = at + size_of::<RawRecord>();
            let role = self.role(raw.kind, &mut next)?;
            let mut changes = Vec::new();
            for _ in 0..raw.changes_count.get() {
                let change = self.change(&mut next)?;
                changes.push(change);
            }
            if next != end || raw.lsn.get() >= LSN_END {
                return None;
            }
            records.push(Record { lsn: Lsn::new(raw.lsn.get()), role, changes });
            at = end;
        }
        Some(records)
    }

    fn role(&self, kind: u8, at: &mut usize) -> Option<Role> {
        if kind == 0 {
            return Some(Role::Whole);
        }
        let parts: &RawParts = get(self.records, *at)?;
        *at += size_of::<RawParts>();
        match kind {
            1 => Some(Role::Owner(ShardSet::from_bits(parts.shards.get()))),
            2 => Some(Role::Part(ShardSet::from_bits(parts.shards.get()))),
            _ => None,
        }
    }

    fn change(&self, at: &mut usize) -> Option<LoggedChange<'a>> {
        let raw: &RawChange = get(self.records, *at)?;
        *at += size_of::<RawChange>();
        let key = PageKey::new(VolumeId::new(raw.volume), raw.page.get().into());
        match ChangeKind::decode(raw.kind)? {
            ChangeKind::Image if (raw.len.get() as usize) < self.images.len() => {
                Some(LoggedChange::Image(key, raw.len.get()))
            }
            ChangeKind::Image => None,
            ChangeKind::Patch => {
                let bytes = self.records.get(*at..*at + raw.len.get() as usize)?;
                let end = u64::from(raw.offset.get()) + u64::from(raw.len.get());
                *at += bytes.len();
                (end <= BLOCK as u64).then_some(LoggedChange::Patch(key, raw.offset.get(), bytes))
            }
            ChangeKind::Free => Some(LoggedChange::Free(key)),
        }
    }
}
