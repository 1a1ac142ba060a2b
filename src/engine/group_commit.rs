//! Group commit: the open group is closed whenever a log write may start and a request waits for
//! it. It is written with one vectored write, flushed together with all others that are complete,
//! and only then acknowledged.
//!
//! Invariants
//! 1. No timer delays a durable commit: the window holds back only groups that no request waits
//!    for.
//! 2. The close of a group decides for all its pages whether they go inline or straight to their
//!    places.
//! 3. A flush is submitted after the completion of every write that it covers.
//! 4. The bound is raised only after a flush has succeeded.

use super::writeback::PageVersion;
use super::{OpKind, Shard};
use crate::base::error::Error;
use crate::base::{BLOCK, BlockAddr, ImageIdx, Lsn};
use crate::engine::Work;
use crate::engine::codec::{self, Sealed};
use crate::engine::log::{FlushSet, GroupState, InFlight, OpenImage, PartRef};
use crate::engine::map::Stream;
use crate::engine::writeback::plan;
use crate::format::extent::ItemKind;
use crate::format::group::{GroupHead, ImageState, PageImage};
use crate::format::node::Entry;
use crate::io::{DiskOp, FileId, IoSlice};
use crate::memory::Frame;
use smallvec::SmallVec;

/// A page image of the group that is being closed, in its stored form.
struct SealedImage {
    no: ImageIdx,
    sealed: Sealed,
    /// The page's newest version is this image.
    is_current: bool,
    place: Option<BlockAddr>,
}

impl Shard {
    /// Closes the open group if it may be written, and flushes the groups that are written.
    pub(super) fn advance_groups(&mut self) {
        if self.ctx.failed.is_some() {
            return;
        }
        if self.should_close() {
            self.close_group();
        }
        self.flush_groups();
    }

    fn should_close(&self) -> bool {
        let open = &self.log.open;
        if open.is_empty() || self.log.in_flight.len() >= self.ctx.limits.log_writes_max {
            return false;
        }
        open.urgent
            || open.images.len() >= self.ctx.limits.coalesce_batch_pages
            || open.body_blocks_with(0, 0) > self.ctx.limits.group_blocks / 2
            || self.ctx.now >= open.opened_at + self.ctx.limits.coalesce_window_us
            || self.life.closing.is_some()
            || self.ctx.checkpoint.wants_groups
    }

    fn close_group(&mut self) {
        self.writeback.unblock(&mut self.ctx);
        let body_blocks = self.log.open.body_blocks_with(0, 0);
        let mut open = std::mem::take(&mut self.log.open.images);
        let mut sealed_images = self.take_images(&mut open);
        let inline = sealed_images.len() <= self.ctx.limits.inline_pages_max;
        let (images, reserved) = (sealed_images.len() as u64, self.reservations.dirty_blocks);
        assert!(
            images <= reserved,
            "a group of {images} images, and {reserved} blocks are reserved"
        );
        self.reservations.dirty_blocks -= images;
        if !inline {
            self.place_images(&open, &mut sealed_images);
        }
        let images = self.describe(&open, &sealed_images, body_blocks);
        let inline_blocks = if inline { sealed_images.len() as u32 } else { 0 };
        let (first_lsn, last_lsn) =
            (self.log.open.first_lsn().unwrap_or(Lsn::MAX), self.log.open.last_lsn());
        let position = self.log.place(body_blocks + inline_blocks, last_lsn);
        let mut head = GroupHead {
            epoch: self.ctx.superblock.epoch,
            shard: self.ctx.id,
            segment: position.segment,
            block: position.block,
            generation: position.generation,
            number: position.number,
            prev_crc: position.prev_crc,
            body_blocks,
            blocks: body_blocks + inline_blocks,
            watermark: self.ctx.order.watermark(),
            superblock_generation: self.ctx.superblock.generation,
            // Counts, checksums and runs are filled in when the group is finished.
            ..GroupHead::default()
        };
        let finished =
            self.log.open.finish(&images, inline_blocks, &mut head, self.ctx.superblock.salt);
        assert_eq!(head.body_blocks, body_blocks, "the size was foreseen");
        assert!(head.is_consistent(self.log.segment_blocks()), "no group to be read: {head:?}");
        self.log.sealed(head.head_crc);
        let mut from = body_slices(&finished.chunks, finished.body_len);
        let data_writes = if inline {
            from.extend(
                sealed_images.into_iter().map(|image| IoSlice::whole(image.sealed.into_bytes())),
            );
            0
        } else {
            self.write_images(position.number, &images, &open, sealed_images)
        };
        self.log.submitted(InFlight {
            number: position.number,
            first_lsn,
            parts: finished.parts,
            state: GroupState::Writing(1 + data_writes),
            segment: position.segment,
            wrote_data: data_writes > 0,
            chunks: finished.chunks,
        });
        self.ctx.stats.log_groups += 1;
        self.ctx.stats.checksums += 2;
        self.ctx.stats.log_bytes += from.iter().map(|s| u64::from(s.len)).sum::<u64>();
        let offset = u64::from(position.block) * BLOCK as u64;
        let file = FileId::Log(self.ctx.id, position.segment);
        self.ctx.submit(OpKind::GroupLog(position.number), DiskOp::Write { file, offset, from });
        self.ctx.room_changed();
    }

    /// Seals the images that are written; their pages leave the open group.
    fn take_images(&mut self, open: &mut [OpenImage]) -> Vec<SealedImage> {
        let mut sealed_images = Vec::with_capacity(open.len());
        for (i, image) in open.iter_mut().enumerate().filter(|(_, image)| !image.is_freed) {
            let at = ImageIdx::new(i);
            let idx = self
                .cache
                .table
                .find(image.key)
                .expect("a page with an image in the group stays in the table");
            let page = &mut self.cache.table.pages[idx];
            let is_current = page.image == Some(at);
            assert!(
                if is_current { image.lsn == page.lsn } else { image.lsn < page.lsn },
                "an image of {:?} at {:?}, the newest: {is_current}, and the page is at {:?}",
                image.key,
                image.lsn,
                page.lsn
            );
            if is_current {
                page.image = None;
            }
            let frame = image
                .sealed
                .take()
                .or_else(|| page.frame.as_ref().map(|f| f.pin()))
                .expect("an image that is written has content");
            self.ctx.stats.checksums += 1;
            sealed_images.push(SealedImage {
                no: at,
                sealed: codec::seal(frame),
                is_current,
                place: None,
            });
        }
        sealed_images
    }

    /// Gives the images their final addresses, neighbours next to each other.
    fn place_images(&mut self, open: &[OpenImage], sealed_images: &mut [SealedImage]) {
        sealed_images.sort_by_key(|image| (open[image.no.index()].key, open[image.no.index()].lsn));
        for image in sealed_images.iter_mut() {
            let OpenImage { key, lsn, .. } = open[image.no.index()];
            let what = ItemKind::Page(key, lsn);
            let place = self.alloc_place(Stream::Data, what, image.sealed.blocks());
            image.place = Some(place.expect("admission reserved a block for each image"));
        }
    }

    fn describe(
        &self,
        open: &[OpenImage],
        sealed_images: &[SealedImage],
        body_blocks: u32,
    ) -> Vec<PageImage> {
        let not_written = |image: &OpenImage| PageImage {
            key: image.key,
            state: ImageState::NotWritten,
            entry: Entry::default(),
        };
        let mut images: Vec<PageImage> = open.iter().map(not_written).collect();
        for (i, image) in sealed_images.iter().enumerate() {
            let place = image.place.unwrap_or_default();
            images[image.no.index()].entry = image.sealed.entry(place, open[image.no.index()].lsn);
            images[image.no.index()].state = match image.place {
                Some(_) => ImageState::Placed,
                None => ImageState::Inline(body_blocks + i as u32),
            };
        }
        images
    }

    /// Writes images straight to their final addresses; returns the number of writes.
    fn write_images(
        &mut self,
        group: u64,
        images: &[PageImage],
        open: &[OpenImage],
        sealed_images: Vec<SealedImage>,
    ) -> u32 {
        let mut blocks = Vec::with_capacity(sealed_images.len());
        for image in sealed_images {
            let entry = images[image.no.index()].entry;
            let idx = self
                .cache
                .table
                .find(open[image.no.index()].key)
                .expect("a page with an image in the group stays in the table");
            let page = &mut self.cache.table.pages[idx];
            page.versions += 1;
            if image.is_current && page.dirty_from.is_some() {
                self.leave_dirty(idx);
            }
            let version = self.add_version(PageVersion {
                page: idx,
                lsn: entry.lsn(),
                entry: Some(entry),
                moved_from: None,
            });
            blocks.push((entry.place(), (version, image.sealed.into_bytes())));
        }
        self.ctx.stats.pages_written += blocks.len() as u64;
        let runs = plan::writes(blocks, self.ctx.limits.vectored_pages_max);
        let count = runs.len() as u32;
        for run in runs {
            self.ctx.stats.page_write_ops += 1;
            self.ctx.stats.coalesced_writes += run.items.len() as u64 - 1;
            let (versions, frames): (Vec<_>, Vec<_>) = run.items.into_iter().unzip();
            let from = frames.into_iter().map(IoSlice::whole).collect();
            let offset = run.place.offset(self.ctx.limits.geometry.extent_bytes);
            self.ctx.submit(
                OpKind::GroupData(group, versions),
                DiskOp::Write { file: FileId::Data, offset, from },
            );
        }
        count
    }

    /// Called when a write of a group has ended.
    pub(super) fn group_written(&mut self, number: u64, result: Result<(), Error>) {
        match result {
            Err(error) if !planted!(WriteErrorForgotten) => self.ctx.fail(error),
            _ => {
                self.log.write_completed(number);
                self.ctx.need(Work::Groups);
            }
        }
    }

    fn flush_groups(&mut self) {
        if self.log.flushing {
            return;
        }
        let Some(set) = self.log.begin_flush() else { return };
        assert!(!set.segments.is_empty(), "groups {:?} lie in no segment", set.numbers);
        let mut files: SmallVec<[FileId; 4]> =
            set.segments.iter().map(|no| FileId::Log(self.ctx.id, *no)).collect();
        if set.data && !planted!(DataNotFlushed) {
            files.push(FileId::Data);
        }
        self.ctx.stats.log_flushes += 1;
        self.ctx.submit(OpKind::GroupFlush(set), DiskOp::Flush { files });
    }

    /// Called when a flush has ended: either what it covered is durable, or nothing is acknowledged
    /// from now on. Returns the parts of commits over shards that have become durable here.
    pub(super) fn group_flushed(
        &mut self,
        set: FlushSet,
        result: Result<(), Error>,
    ) -> Vec<PartRef> {
        if let Err(error) = result
            && !planted!(FlushErrorForgotten)
        {
            self.ctx.fail(error);
            return Vec::new();
        }
        if self.ctx.failed.is_some() {
            return Vec::new();
        }
        let parts = self.log.flushed(&set.numbers);
        self.watermark.publish(&mut self.ctx, self.log.bound());
        self.ctx.need(Work::Groups);
        // Clients that waited for this group may commit again.
        self.writeback.note_activity(self.ctx.now);
        self.ctx.need(Work::Checkpoint);
        parts
    }
}

/// The first `len` bytes of the chunks.
fn body_slices(chunks: &[Frame], len: usize) -> SmallVec<[IoSlice; 4]> {
    let mut slices = SmallVec::new();
    let mut left = len;
    for chunk in chunks {
        let len = left.min(chunk.len());
        if len > 0 {
            slices.push(IoSlice { frame: chunk.pin(), start: 0, len: len as u32 });
        }
        left -= len;
    }
    assert!(left == 0, "a group of {len} bytes is {left} longer than its buffers");
    slices
}
