//! The open group: records gather in chunks of the arena until it is closed.
//!
//! Invariants
//! 1. Records of one page are in LSN order. All LSNs that this shard allocated for the group are in
//!    its runs, used or not; a part of another shard's commit is recorded, and its owner accounts
//!    for the LSN.
//! 2. An image stands for one page within one *atomic span*: further changes of the page in the
//!    same span are absorbed by it. A span ends with a run, and before and after each commit over
//!    shards: the end of a recovered log can lie between two spans, never within one, so every
//!    state in which a crash can leave the store can be restored.
//! 3. Nothing of the group is written to a device before [`OpenGroup::finish`] has sealed it.

use crate::base::checksum::crc32c_append;
use crate::base::{BLOCK, ImageIdx, Lsn, Micros, PageKey, ShardId};
use crate::format::group::{
    ChangeKind, GroupHead, HEAD_BYTES, PageImage, RUNS_MAX, RawChange, RawImage, RawParts,
    RawRecord, Role,
};
use crate::memory::{Frame, FrameRef};
use zerocopy::IntoBytes;

/// Buffers of equal size, taken from the arena once.
pub(crate) struct Chunks {
    stock: Vec<Frame>,
    bytes: usize,
    /// Their number: in stock, in the open group and in flight.
    count: usize,
}

impl Chunks {
    /// A stock of these buffers, each of `bytes`.
    pub(crate) fn new(stock: Vec<Frame>, bytes: usize) -> Self {
        let count = stock.len();
        assert!(count > 0 && bytes > 0, "{count} buffers of {bytes} bytes: no group can be made");
        Chunks { stock, bytes, count }
    }

    fn take(&mut self) -> Frame {
        self.stock.pop().expect("admission kept chunks in stock")
    }
}

/// The image of a page that is written with the group.
pub(crate) struct OpenImage {
    pub key: PageKey,
    /// The LSN of the newest change in the image.
    pub lsn: Lsn,
    /// The atomic span it belongs to.
    pub span: u32,
    /// Its bytes, if the page was changed again in a later span.
    pub sealed: Option<FrameRef>,
    /// Whether the page was freed again in the same span: then nothing is written.
    pub is_freed: bool,
}

/// What a commit does to a page, as its record says.
#[derive(Clone, Copy)]
pub(crate) enum OpenChange<'a> {
    /// The page becomes this image of the group.
    Image(ImageIdx),
    /// The page gets these bytes from this offset on.
    Patch(u32, &'a [u8]),
    /// The page becomes absent.
    Free,
}

/// The open group.
pub(crate) struct OpenGroup {
    chunks: Chunks,
    filled: Vec<Frame>,
    len: usize,
    record_at: usize,
    record_changes: u32,
    runs: Vec<(Lsn, u64)>,
    span: u32,
    last_lsn: Lsn,
    commits_count: u32,
    /// Page images.
    pub images: Vec<OpenImage>,
    /// When its first record was begun.
    pub opened_at: Micros,
    /// Whether a request waits for its durability.
    pub urgent: bool,
    /// Commits over shards whose part here becomes durable with it.
    pub parts: Vec<PartRef>,
}

/// A commit over shards, by its owner and the number that the owner gave it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(crate) struct PartRef {
    pub owner: ShardId,
    pub txn: u64,
}

/// A group that is ready to be written, without its inline pages.
pub(crate) struct Finished {
    pub chunks: Vec<Frame>,
    pub parts: Vec<PartRef>,
    pub body_len: usize,
}

impl OpenGroup {
    pub(crate) fn new(chunks: Chunks) -> Self {
        OpenGroup {
            chunks,
            filled: Vec::new(),
            len: HEAD_BYTES,
            record_at: 0,
            record_changes: 0,
            runs: Vec::new(),
            span: 0,
            last_lsn: Lsn::ZERO,
            commits_count: 0,
            images: Vec::new(),
            opened_at: 0,
            urgent: false,
            parts: Vec::new(),
        }
    }

    /// Panics if the counts of the group contradict each other: recovery would refuse its head.
    fn assert_state(&self) {
        assert!(
            HEAD_BYTES <= self.len && self.record_at <= self.len,
            "a record at {} of {} bytes",
            self.record_at,
            self.len
        );
        assert!(
            self.len <= self.filled.len() * self.chunks.bytes || self.len == HEAD_BYTES,
            "{} bytes in {} buffers of {}",
            self.len,
            self.filled.len(),
            self.chunks.bytes
        );
        match self.runs.last() {
            Some((first, count)) => assert!(
                *count > 0 && first.plus(*count - 1) <= self.last_lsn,
                "{count} LSNs from {first:?} on, and the last one is {:?}",
                self.last_lsn
            ),
            None => assert!(
                self.commits_count == 0,
                "{} commits, and no LSN was allocated for them",
                self.commits_count
            ),
        }
        assert!(
            !self.is_empty() || (self.images.is_empty() && self.parts.is_empty()),
            "{} images and {} parts in a group without a record",
            self.images.len(),
            self.parts.len()
        );
    }

    /// The number of buffers in stock, of filled ones, and of all: the rest is in flight.
    pub(super) fn chunk_counts(&self) -> (usize, usize, usize) {
        (self.chunks.stock.len(), self.filled.len(), self.chunks.count)
    }

    /// Whether the group has no LSN and no record.
    pub(crate) fn is_empty(&self) -> bool {
        self.runs.is_empty() && self.len == HEAD_BYTES
    }

    pub(crate) fn first_lsn(&self) -> Option<Lsn> {
        self.runs.first().map(|(first, _)| *first)
    }

    /// The highest LSN in it, including parts.
    pub(crate) fn last_lsn(&self) -> Lsn {
        self.last_lsn
    }

    /// The atomic span that is being filled.
    pub(crate) fn span(&self) -> u32 {
        self.span
    }

    /// Begins a new atomic span: a recovered log may end here.
    pub(crate) fn end_span(&mut self) {
        self.span += 1;
    }

    /// Whether there is no room for another run of LSNs.
    pub(crate) fn runs_full(&self) -> bool {
        self.runs.len() == RUNS_MAX
    }

    /// The number of body blocks with `bytes` of records and `images` images more.
    pub(crate) fn body_blocks_with(&self, bytes: usize, images: usize) -> u32 {
        (self.len + bytes + (self.images.len() + images) * size_of::<RawImage>()).div_ceil(BLOCK)
            as u32
    }

    /// Whether the stock has chunks for bodies of `blocks` in total, if up to `more` of them begin
    /// a chunk of their own.
    pub(crate) fn stock_suffices(&self, blocks: u32, more: usize) -> bool {
        let chunks = (blocks as usize * BLOCK).div_ceil(self.chunks.bytes) + more;
        chunks <= self.filled.len() + self.chunks.stock.len()
    }

    /// Accounts for `count` LSNs from `first`.
    pub(crate) fn add_run(&mut self, first: Lsn, count: u64, now: Micros) {
        assert!(
            count > 0 && self.runs.last().is_none_or(|(last, count)| last.plus(*count) <= first),
            "{count} LSNs from {first:?} on come after {:?}",
            self.runs
        );
        self.begin_at(now);
        match self.runs.last_mut() {
            Some((last_first, last_count)) if last_first.plus(*last_count) == first => {
                *last_count += count
            }
            _ => {
                self.runs.push((first, count));
                self.end_span();
            }
        }
        self.last_lsn = self.last_lsn.max(first.plus(count - 1));
        assert!(
            self.runs.len() <= RUNS_MAX,
            "admission left a run free: there are {} of {RUNS_MAX}",
            self.runs.len()
        );
    }

    fn begin_at(&mut self, now: Micros) {
        if self.is_empty() {
            self.opened_at = now;
        }
    }

    /// Begins the record of a commit, or of a part of one.
    pub(crate) fn begin_record(&mut self, role: Role, now: Micros) {
        self.begin_at(now);
        self.record_at = self.len;
        self.record_changes = 0;
        self.append(&[0; size_of::<RawRecord>()]);
        if let Some(shards) = role.shards() {
            self.append(RawParts { shards: shards.bits().into() }.as_bytes());
        }
    }

    /// Adds one change of the commit to the record.
    pub(crate) fn change(&mut self, key: PageKey, change: OpenChange<'_>) {
        let (kind, len, offset, patch) = match change {
            OpenChange::Image(image) => {
                let images = self.images.len();
                assert!(image.index() < images, "{key:?} is as in {image:?}, of {images}");
                (ChangeKind::Image, image.index() as u32, 0, &[][..])
            }
            OpenChange::Patch(offset, bytes) => {
                (ChangeKind::Patch, bytes.len() as u32, offset, bytes)
            }
            OpenChange::Free => (ChangeKind::Free, 0, 0, &[][..]),
        };
        let raw = RawChange {
            kind: kind as u8,
            volume: key.volume.get(),
            class: 0,
            reserved: 0,
            len: len.into(),
            offset: offset.into(),
            page: key.page.get().into(),
        };
        self.append(raw.as_bytes());
        self.append(patch);
        self.record_changes += 1;
    }

    /// Ends the record.
    pub(crate) fn end_record(&mut self, role: Role, lsn: Lsn) {
        self.last_lsn = self.last_lsn.max(lsn);
        let raw = RawRecord {
            lsn: lsn.get().into(),
            bytes: ((self.len - self.record_at) as u32).into(),
            changes_count: self.record_changes.into(),
            kind: role.kind(),
            reserved: [0; 7],
        };
        self.overwrite(self.record_at, raw.as_bytes());
        self.commits_count += u32::from(!matches!(role, Role::Part(_)));
    }

    fn append(&mut self, bytes: &[u8]) {
        let at = self.len;
        self.len += bytes.len();
        while self.filled.len() * self.chunks.bytes < self.len {
            let chunk = self.chunks.take();
            self.filled.push(chunk);
        }
        self.overwrite(at, bytes);
    }

    fn overwrite(&mut self, mut at: usize, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let (chunk, start) = (at / self.chunks.bytes, at % self.chunks.bytes);
            let n = bytes.len().min(self.chunks.bytes - start);
            let frame = self.filled[chunk].try_mut().expect("open chunks are not pinned");
            frame[start..start + n].copy_from_slice(&bytes[..n]);
            at += n;
            bytes = &bytes[n..];
        }
    }

    /// Completes `head` (counts, checksums, runs), writes the images, pads and seals; the group is
    /// empty afterwards.
    pub(crate) fn finish(
        &mut self,
        images: &[PageImage],
        inline_blocks: u32,
        head: &mut GroupHead,
        salt: u64,
    ) -> Finished {
        self.assert_state();
        assert!(!self.is_empty(), "a group with nothing in it is closed");
        head.records_bytes = (self.len - HEAD_BYTES) as u32;
        head.images_count = images.len() as u32;
        head.commits_count = self.commits_count;
        head.runs = std::mem::take(&mut self.runs);
        for image in images {
            self.append(image.encode().as_bytes());
        }
        let padding = self.len.next_multiple_of(BLOCK) - self.len;
        self.append(&[0; BLOCK][..padding]);
        let body_len = self.len;
        head.body_blocks = (body_len / BLOCK) as u32;
        head.blocks = head.body_blocks + inline_blocks;
        head.body_crc = self.body_sum(body_len);
        let mut sealed = [0; HEAD_BYTES];
        head.seal(salt, &mut sealed);
        self.overwrite(0, &sealed);
        self.len = HEAD_BYTES;
        self.commits_count = 0;
        self.last_lsn = Lsn::ZERO;
        self.span = 0;
        self.images.clear();
        self.urgent = false;
        let finished = Finished {
            chunks: std::mem::take(&mut self.filled),
            parts: std::mem::take(&mut self.parts),
            body_len,
        };
        self.record_at = 0;
        self.assert_state();
        finished
    }

    fn body_sum(&self, body_len: usize) -> u32 {
        let mut sum = 0;
        for (i, chunk) in self.filled.iter().enumerate() {
            let base = i * self.chunks.bytes;
            let from = if i == 0 { HEAD_BYTES } else { 0 };
            sum = crc32c_append(sum, &chunk[from..chunk.len().min(body_len - base)]);
        }
        sum
    }

    /// Takes back the buffers of groups that are durable.
    pub(super) fn restock(&mut self, chunks: Vec<Frame>) {
        self.chunks.stock.extend(chunks);
    }
}

#[cfg(test)]
impl Chunks {
    /// Blocks of each buffer.
    pub(crate) fn chunk_blocks(&self) -> u32 {
        (self.bytes / BLOCK) as u32
    }

    /// Buffers in stock.
    pub(crate) fn count(&self) -> u32 {
        self.stock.len() as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::ShardSet;
    use crate::memory::Arena;

    /// If this fails, recovery reads a wrong head, or a group is closed too late.
    #[test]
    fn a_group_says_what_came_into_it() {
        let mut arena = Arena::new(32).expect("memory");
        let chunks = (0..8).map(|_| arena.alloc(0).expect("memory")).collect();
        let mut open = OpenGroup::new(Chunks::new(chunks, BLOCK));
        for (first, now) in [(10u64, 5), (30, 105)] {
            assert!(open.is_empty() && open.first_lsn().is_none());
            let lsn = |n| Lsn::new(first + n);
            open.add_run(lsn(0), 2, now);
            open.add_run(lsn(2), 1, now + 1);
            assert_eq!((open.span(), open.last_lsn()), (1, lsn(2)));
            open.add_run(lsn(7), 1, now + 2);
            assert_eq!((open.span(), open.last_lsn(), open.first_lsn()), (2, lsn(7), Some(lsn(0))));
            // Another shard accounts for a part's LSN, and counts its commit.
            for (role, n) in [
                (Role::Whole, 0),
                (Role::Owner(ShardSet::from_bits(2)), 7),
                (Role::Part(ShardSet::from_bits(2)), 9),
            ] {
                open.begin_record(role, now + 3);
                open.end_record(role, lsn(n));
            }
            assert_eq!((open.last_lsn(), open.opened_at), (lsn(9), now));
            let mut head = GroupHead::default();
            let Finished { chunks, body_len, .. } = open.finish(&[], 0, &mut head, 7);
            assert_eq!(head.runs, [(lsn(0), 3), (lsn(7), 1)]);
            assert_eq!((head.commits_count, body_len, chunks.len()), (2, BLOCK, 1));
            open.restock(chunks);
        }
    }
}
