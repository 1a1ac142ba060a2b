//! Reading the logs to their ends, and finding the cut.
//!
//! Invariants
//! 1. A group counts only whole: head, body, inline pages, and, above the highest recorded watermark, the pages at
//!    their final places too. At or below the watermark a page that does not match its sum is damage, found when it
//!    is read.
//! 2. The search goes on behind a torn group, block by block: with several writes in flight a whole group may stand
//!    behind it, and its head may record a watermark that makes the gap damage.
//! 3. The cut is the last LSN before the first one, above what the roots reflect, that no whole group accounts for.
//!    A cut below the highest recorded watermark is damage, and refused.
//! 4. Bytes left from earlier uses of a segment pass only if they are groups of this epoch at this very position;
//!    those are older than the redo LSN and ignored.

use super::load::read_bytes;
use crate::checksum::crc32c;
use crate::disk::{Disk, FileId};
use crate::error::{Error, Result};
use crate::format::group::{Body, GroupHead, SlotState};
use crate::format::superblock::Superblock;
use crate::pool::Arena;
use crate::types::{BLOCK, Lsn, Place, SegmentNo, ShardId};

/// A whole group.
pub(crate) struct ScannedGroup {
    pub head: GroupHead,
    /// Places that its slots name.
    pub places: Vec<Place>,
}

/// What the logs hold.
pub(crate) struct Scan {
    /// Whole groups with something above the redo LSN and at or below the cut, in order.
    pub groups: Vec<ScannedGroup>,
    /// Groups with a valid head that are not whole.
    pub torn: u64,
    /// What the roots reflect.
    pub redo: Lsn,
    /// The state to be restored.
    pub cut: Lsn,
    /// The highest LSN seen anywhere.
    pub highest: Lsn,
    /// Commits in whole groups above the cut.
    pub dropped: u64,
    /// Extents up to the highest one that a kept group names.
    pub extents_named: u32,
}

impl Scan {
    /// For a store that was closed cleanly.
    pub(crate) fn nothing(superblock: &Superblock) -> Self {
        let cut = superblock.next_lsn.before();
        Scan { groups: Vec::new(), torn: 0, redo: cut, cut, highest: cut, dropped: 0, extents_named: 0 }
    }
}

struct Found {
    head: GroupHead,
    slots: Vec<crate::format::group::Slot>,
    whole: bool,
}

/// Scans all logs.
pub(crate) fn scan(disk: &mut dyn Disk, arena: &mut Arena, superblock: &Superblock) -> Result<Scan> {
    let mut found = Vec::new();
    for i in 0..superblock.geometry.segments_count {
        scan_segment(disk, arena, superblock, SegmentNo::new(i), &mut found)?;
    }
    found.sort_by_key(|f| f.head.number);
    let redo_of = superblock.vshards.iter().map(|v| v.redo_lsn);
    let redo = redo_of.min().unwrap_or(Lsn::ZERO).max(superblock.epoch_first_lsn.before());
    let watermark = found.iter().map(|f| f.head.watermark).fold(superblock.watermark, Lsn::max);
    if let Some(f) = found.iter().find(|f| f.head.superblock_generation > superblock.generation) {
        return Err(Error::corrupt(format_args!(
            "the log knows of superblock generation {}, but the newest found is {}: a superblock write was lost; \
             restore the meta file from a backup",
            f.head.superblock_generation, superblock.generation
        )));
    }
    for f in found.iter_mut().filter(|f| f.whole && last_lsn(&f.head) > watermark) {
        f.whole = placed_pages_match(disk, arena, superblock, f)?;
    }
    let cut = find_cut(&found, redo);
    if cut < watermark {
        return Err(missing(&found, cut, watermark));
    }
    let highest = found.iter().map(|f| last_lsn(&f.head)).fold(watermark.max(superblock.next_lsn.before()), Lsn::max);
    Ok(keep(found, redo, cut, highest))
}

fn keep(found: Vec<Found>, redo: Lsn, cut: Lsn, highest: Lsn) -> Scan {
    let torn = found.iter().filter(|f| !f.whole).count() as u64;
    let mut scan = Scan { groups: Vec::new(), torn, redo, cut, highest, dropped: 0, extents_named: 0 };
    for f in found.into_iter().filter(|f| f.whole && last_lsn(&f.head) > redo) {
        if f.head.runs.first().is_none_or(|(first, _)| *first > cut) {
            scan.dropped += u64::from(f.head.commits_count);
            continue;
        }
        let placed = f.slots.iter().filter(|s| s.state == SlotState::Placed);
        let places: Vec<Place> = placed.map(|s| s.entry.place()).collect();
        let named = places.iter().map(|p| p.extent.get() + 1).max().unwrap_or(0);
        scan.extents_named = scan.extents_named.max(named);
        scan.groups.push(ScannedGroup { head: f.head, places });
    }
    scan
}

fn last_lsn(head: &GroupHead) -> Lsn {
    head.runs.last().map_or(Lsn::ZERO, |(first, count)| Lsn::new(first.get().saturating_add(count.saturating_sub(1))))
}

fn scan_segment(
    disk: &mut dyn Disk,
    arena: &mut Arena,
    superblock: &Superblock,
    segment: SegmentNo,
    found: &mut Vec<Found>,
) -> Result<()> {
    let (shard, bytes_len) = (ShardId::new(0), superblock.geometry.segment_bytes as usize);
    let bytes = read_bytes(disk, arena, FileId::Log(shard, segment), 0, bytes_len)?;
    let blocks = (bytes_len / BLOCK) as u32;
    let mut block = 0;
    while block < blocks {
        let here = &bytes[block as usize * BLOCK..];
        let head = GroupHead::open(here, superblock.salt, superblock.epoch, (shard, segment, block), blocks);
        let Some(head) = head else {
            block += 1;
            continue;
        };
        let body = Body::open(&head, here).filter(|body| body.records().is_some());
        let slots = body.map(|body| body.slots);
        let whole = slots.as_ref().is_some_and(|slots| slots.iter().all(|slot| inline_matches(slot, here)));
        block += if whole { head.blocks } else { 1 };
        found.push(Found { head, slots: slots.unwrap_or_default(), whole });
    }
    Ok(())
}

fn inline_matches(slot: &crate::format::group::Slot, group: &[u8]) -> bool {
    let SlotState::Inline(block) = slot.state else { return true };
    let at = block as usize * BLOCK;
    group.get(at..at + BLOCK).is_some_and(|page| crc32c(page) == slot.entry.crc.get())
}

/// Whether the pages that a group above the watermark wrote straight to their places are all there.
fn placed_pages_match(disk: &mut dyn Disk, arena: &mut Arena, superblock: &Superblock, found: &Found) -> Result<bool> {
    let data_bytes = disk.len(FileId::Data)?.unwrap_or(0);
    for slot in found.slots.iter().filter(|s| s.state == SlotState::Placed) {
        let offset = slot.entry.place().offset(superblock.geometry.extent_bytes);
        if offset + BLOCK as u64 > data_bytes {
            return Ok(false);
        }
        let page = read_bytes(disk, arena, FileId::Data, offset, BLOCK)?;
        if crc32c(&page) != slot.entry.crc.get() {
            return Ok(false);
        }
    }
    Ok(true)
}

fn find_cut(found: &[Found], redo: Lsn) -> Lsn {
    let mut runs: Vec<(Lsn, u64)> = found.iter().filter(|f| f.whole).flat_map(|f| f.head.runs.clone()).collect();
    runs.sort();
    let mut cut = redo;
    for (first, count) in runs {
        if first > cut.plus(1) {
            break;
        }
        cut = cut.max(Lsn::new(first.get().saturating_add(count).saturating_sub(1)));
    }
    cut
}

fn missing(found: &[Found], cut: Lsn, watermark: Lsn) -> Error {
    let covers = |f: &&Found| {
        !f.whole
            && f.head.runs.iter().any(|(first, count)| (first.get()..first.get() + count).contains(&(cut.get() + 1)))
    };
    let place = match found.iter().find(covers) {
        Some(f) => format!(
            "the group at block {} of file {} is damaged",
            f.head.block,
            FileId::Log(f.head.shard, f.head.segment)
        ),
        None => "no log segment holds a group with it".to_string(),
    };
    Error::corrupt(format_args!(
        "commit {} was durable (everything up to {watermark} was), but it is gone: {place}; the log is damaged in the \
         middle. Nothing was changed; restore the log from a backup",
        cut.get() + 1
    ))
}
