//! Reads the logs and finds where they end: the LSN up to which the store is recovered.
//!
//! Invariants
//! 1. A group counts only if it is whole: head, body, inline pages, and, above the highest recorded
//!    watermark, also the pages at their final addresses. At or below the watermark a page that
//!    does not match its checksum is damage, which is found when the page is read.
//! 2. The search continues after a torn group, block by block: with several writes in flight a
//!    whole group may follow it, and its head may record a watermark that makes the gap damage.
//! 3. The recovered LSN is the last one before the first one, above what the roots reflect, that no
//!    whole group of any log accounts for, or whose commit is not complete: a commit over shards
//!    needs the part of each shard that its owner names. If it is below the highest recorded
//!    watermark, that is damage, and the store is refused.
//! 4. Bytes from earlier uses of a segment are accepted only if they are groups of this epoch at
//!    this very position; those are older than the redo LSN and ignored.
//! 5. A log has the segments that the superblock counts. The file of a later one was left by a
//!    growth that was interrupted, and holds no group of this epoch: if it does, the superblock
//!    that counts it was lost.
//! 6. Every block of every log is examined before anything is dropped or refused. Any block may
//!    hold a later watermark, and the groups that would show whether a segment was begun can be
//!    lost.
//! 7. The logs are read with many reads in flight. Memory is bounded by these, by the largest
//!    group, and by a small part of the records to redo (see `read` and `segment`).

use super::read::{IN_FLIGHT_MAX, Range, read_pieces, read_ranges};
use super::segment::{Found, SegmentSearch};
use crate::base::error::{Error, Result};
use crate::base::{BLOCK, BlockAddr, Lsn, SegmentNo, ShardId, ShardMap, ShardSet};
use crate::engine::codec::Expected;
use crate::format::group::{GroupHead, Role};
use crate::format::superblock::Superblock;
use crate::io::{Disk, FileId};
use crate::memory::Arena;
use hashbrown::HashSet;

/// A whole group.
pub(crate) struct ScannedGroup {
    pub head: GroupHead,
    /// Addresses of the pages that it has put into extents.
    pub places: Vec<BlockAddr>,
    /// Whether it is above every recorded watermark, so that possibly no flush has covered it.
    pub is_doubtful: bool,
    /// The shards of the new shard map whose pages it changes.
    pub concerns: ShardSet,
}

/// The result of reading the logs.
pub(crate) struct Scan {
    /// Whole groups with LSNs above the redo LSN, up to the recovered one; those of each log are in
    /// order.
    pub groups: Vec<ScannedGroup>,
    /// Groups with a valid head that are not whole.
    pub torn: u64,
    /// The roots reflect every record up to here.
    pub redo: Lsn,
    /// The store is restored as of this LSN. If nothing of the epoch is left, it is the one before
    /// the epoch's first.
    pub recovered_lsn: Lsn,
    /// The highest LSN seen anywhere.
    pub highest: Lsn,
    /// Commits above the redo LSN, up to the recovered one.
    pub applied: u64,
    /// Commits in whole groups above the recovered LSN.
    pub dropped: u64,
    /// The number of the highest extent that a kept group names, plus one.
    pub extents_named: u32,
}

impl Scan {
    /// The result for a store that was closed cleanly.
    pub(crate) fn nothing(superblock: &Superblock) -> Self {
        let recovered_lsn = superblock.next_lsn.before();
        Scan {
            groups: Vec::new(),
            torn: 0,
            redo: recovered_lsn,
            recovered_lsn,
            highest: recovered_lsn,
            applied: 0,
            dropped: 0,
            extents_named: 0,
        }
    }

    /// Panics if the result contradicts itself: that is a bug, and continuing would restore another
    /// state than the one that is reported.
    fn assert_state(&self) {
        let (redo, recovered) = (self.redo, self.recovered_lsn);
        assert!(redo <= recovered, "{recovered} is recovered, and the roots reflect {redo}");
        for ScannedGroup { head, places, .. } in &self.groups {
            let named =
                places.iter().all(|p| p.extent.get().saturating_add(1) <= self.extents_named);
            assert!(named, "{head:?} names an extent above {}", self.extents_named);
        }
    }

    /// The last commit of the state to restore: the epoch begins above LSNs that were dropped.
    pub(crate) fn state(&self, superblock: &Superblock) -> Lsn {
        if self.recovered_lsn < superblock.epoch_first_lsn {
            superblock.next_lsn.before()
        } else {
            self.recovered_lsn
        }
    }
}

/// The disk, and everything else that reading the logs takes.
struct Reader<'a> {
    disk: &'a mut dyn Disk,
    arena: &'a mut Arena,
    superblock: &'a Superblock,
    /// The shard map for the epoch that begins.
    shard_map: ShardMap,
}

impl Reader<'_> {
    /// The segments to read, with their numbers of blocks: first those that the superblock counts.
    fn segments(&mut self) -> Result<Vec<(ShardId, SegmentNo, u64)>> {
        let (superblock, bytes) = (self.superblock, self.superblock.geometry.segment_bytes);
        let mut segments = Vec::new();
        for (shard, segment) in superblock.segments() {
            let file = FileId::Log(shard, segment);
            match self.disk.len(file)? {
                Some(len) if len >= bytes => segments.push((shard, segment, bytes / BLOCK as u64)),
                Some(len) => {
                    return Err(Error::corrupt(format_args!(
                        "the file {file} has {len} bytes of {bytes}: it was truncated. Nothing \
                         was changed; bring it back from a backup"
                    )));
                }
                None => {
                    return Err(Error::corrupt(format_args!(
                        "the file {file} is missing. Nothing was changed; bring it back from a \
                         backup"
                    )));
                }
            }
        }
        for file in self.disk.files()? {
            let FileId::Log(shard, segment) = file else { continue };
            if superblock
                .logs
                .get(shard.index())
                .is_some_and(|log| segment.get() >= log.segments_made)
            {
                let len = self.disk.len(file)?.unwrap_or(0).min(bytes);
                segments.push((shard, segment, len / BLOCK as u64));
            }
        }
        Ok(segments)
    }

    /// The groups in all logs.
    fn search(&mut self) -> Result<Vec<Found>> {
        let (superblock, shard_map) = (self.superblock, self.shard_map);
        let segments = self.segments()?;
        let range = |&(shard, segment, blocks): &_| Range {
            file: FileId::Log(shard, segment),
            offset: 0,
            blocks,
        };
        let mut found = Vec::new();
        let mut search: Option<(usize, SegmentSearch<'_>)> = None;
        let mut passed_over = None;
        let ranges = segments.iter().map(range);
        read_pieces(self.disk, self.arena, IN_FLIGHT_MAX, ranges, |index, _, piece| {
            let (shard, segment, _) = segments[index];
            let is_counted = segment.get() < superblock.logs[shard.index()].segments_made;
            let bytes = match piece {
                _ if passed_over == Some(index) => return Ok(()),
                Ok(bytes) => bytes,
                Err(error) if !is_counted => {
                    // The store needs nothing in this file.
                    let file = FileId::Log(shard, segment);
                    tracing::warn!(%error, %file, "a log file that is not in use can't be read");
                    passed_over = Some(index);
                    return Ok(());
                }
                Err(error) => return Err(error),
            };
            // Ranges are delivered one after another, so there is one search at a time.
            if search.as_ref().is_none_or(|(of, _)| *of != index) {
                search = Some((index, SegmentSearch::new(superblock, shard_map, (shard, segment))));
            }
            if let Some((_, search)) = &mut search {
                search.take(bytes, &mut found);
            }
            Ok(())
        })?;
        Ok(found)
    }

    /// Decides from the groups found where the log ends.
    fn judge(&mut self, mut found: Vec<Found>) -> Result<Scan> {
        let superblock = self.superblock;
        found.sort_by_key(|f| (f.head.shard, f.head.number));
        let is_counted =
            |f: &&Found| f.head.segment.get() < superblock.logs[f.head.shard.index()].segments_made;
        if let Some(f) = found.iter().find(|f| !is_counted(f)) {
            return Err(Error::corrupt(format_args!(
                "the file {} holds a part of the log, but the newest superblock found, of \
                 generation {}, does not count it: a superblock write was lost; restore the meta \
                 file from a backup",
                FileId::Log(f.head.shard, f.head.segment),
                superblock.generation
            )));
        }
        let redo = superblock.redo_lsn();
        let watermark = found.iter().map(|f| f.head.watermark).fold(superblock.watermark, Lsn::max);
        if let Some(f) = found.iter().find(|f| f.head.superblock_generation > superblock.generation)
        {
            return Err(Error::corrupt(format_args!(
                "the log knows of superblock generation {}, but the newest found is {}: a \
                 superblock write was lost; restore the meta file from a backup",
                f.head.superblock_generation, superblock.generation
            )));
        }
        self.check_placed(&mut found, watermark)?;
        let recovered_lsn = find_recovered_lsn(&found, redo);
        if recovered_lsn < watermark && !planted!(DamageTakenForTail) {
            return Err(missing(&found, recovered_lsn, watermark));
        }
        let lasts = found.iter().map(|f| f.last_lsn);
        let named = watermark.max(superblock.next_lsn.before()).max(recovered_lsn);
        let highest = lasts.fold(named, Lsn::max);
        let scan = Scan { highest, ..keep(found, redo, recovered_lsn, watermark) };
        scan.assert_state();
        Ok(scan)
    }

    /// Marks groups above the watermark as torn if one of their pages is not at its final address.
    fn check_placed(&mut self, found: &mut [Found], watermark: Lsn) -> Result<()> {
        let data_bytes = self.disk.len(FileId::Data)?.unwrap_or(0);
        let extent_bytes = self.superblock.geometry.extent_bytes;
        // In the order of the reads: offset, what must be there, group.
        let mut expected: Vec<(u64, Expected, usize)> = Vec::new();
        for (i, f) in
            found.iter_mut().enumerate().filter(|(_, f)| f.whole && f.last_lsn > watermark)
        {
            let offsets =
                f.placed.iter().map(|(place, expected)| (place.offset(extent_bytes), *expected, i));
            if offsets.clone().all(|(offset, ..)| offset + BLOCK as u64 <= data_bytes) {
                expected.extend(offsets);
            } else {
                f.whole = planted!(PlacedUnchecked);
            }
        }
        let mut next = expected.iter();
        let ranges = neighbours_together(expected.iter().map(|(offset, ..)| *offset));
        let ranges =
            ranges.into_iter().map(|(offset, blocks)| Range { file: FileId::Data, offset, blocks });
        read_ranges(self.disk, self.arena, ranges, |_, bytes| {
            for (stored, (_, page, group)) in bytes.chunks(BLOCK).zip(next.by_ref()) {
                found[*group].whole &= page.open(stored).is_ok() || planted!(PlacedUnchecked);
            }
            Ok(())
        })
    }
}

/// Ranges of blocks, by offset and number, that cover the blocks at these offsets in this order.
pub(crate) fn neighbours_together(offsets: impl Iterator<Item = u64>) -> Vec<(u64, u64)> {
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    for offset in offsets {
        match ranges.last_mut() {
            Some((first, blocks)) if *first + *blocks * BLOCK as u64 == offset => *blocks += 1,
            _ => ranges.push((offset, 1)),
        }
    }
    ranges
}

/// Scans the logs; `shard_map` is that of the epoch that begins.
pub(crate) fn scan(
    disk: &mut dyn Disk,
    arena: &mut Arena,
    superblock: &Superblock,
    shard_map: ShardMap,
) -> Result<Scan> {
    let mut reader = Reader { disk, arena, superblock, shard_map };
    let found = reader.search()?;
    reader.judge(found)
}

fn keep(found: Vec<Found>, redo: Lsn, recovered_lsn: Lsn, watermark: Lsn) -> Scan {
    let torn = found.iter().filter(|f| !f.whole).count() as u64;
    let (groups, extents_named) = (Vec::new(), 0);
    let mut scan = Scan {
        groups,
        torn,
        redo,
        recovered_lsn,
        highest: recovered_lsn,
        applied: 0,
        dropped: 0,
        extents_named,
    };
    for f in found.into_iter().filter(|f| f.whole && f.last_lsn > redo) {
        scan.applied += f.commits_within(redo, recovered_lsn);
        scan.dropped += f.commits_within(recovered_lsn, Lsn::MAX);
        if f.first_lsn > recovered_lsn {
            continue;
        }
        let places: Vec<BlockAddr> = f.placed.iter().map(|(place, _)| *place).collect();
        let named = places.iter().map(|p| p.extent.get().saturating_add(1)).max().unwrap_or(0);
        scan.extents_named = scan.extents_named.max(named);
        let is_doubtful = f.last_lsn > watermark;
        scan.groups.push(ScannedGroup { head: f.head, places, is_doubtful, concerns: f.concerns });
    }
    scan
}

fn find_recovered_lsn(found: &[Found], redo: Lsn) -> Lsn {
    let whole = || found.iter().filter(|f| f.whole);
    let mut runs: Vec<(Lsn, u64)> = whole().flat_map(|f| f.head.runs.clone()).collect();
    runs.sort();
    let mut recovered_lsn = redo;
    for (first, count) in runs {
        if first > recovered_lsn.plus(1) && !planted!(GapIgnored) {
            break;
        }
        recovered_lsn =
            recovered_lsn.max(Lsn::new(first.get().saturating_add(count).saturating_sub(1)));
    }
    let records = || whole().flat_map(|f| f.parts.iter().map(move |record| (f.head.shard, record)));
    let of_part = |(shard, (lsn, role)): (ShardId, &(Lsn, Role))| {
        matches!(role, Role::Part(_)).then_some((*lsn, shard))
    };
    let parts: HashSet<(Lsn, ShardId), foldhash::fast::FixedState> =
        records().filter_map(of_part).collect();
    let lacks_a_part = |(lsn, role): &(Lsn, Role)| {
        let Role::Owner(others) = role else { return false };
        others.iter().any(|shard| !parts.contains(&(*lsn, shard)))
    };
    let incomplete = records()
        .map(|(_, record)| record)
        .filter(|record| record.0 > redo && lacks_a_part(record) && !planted!(PartIgnored));
    incomplete.map(|(lsn, _)| lsn.before()).fold(recovered_lsn, Lsn::min)
}

fn missing(found: &[Found], recovered_lsn: Lsn, watermark: Lsn) -> Error {
    let covers = |f: &&Found| {
        !f.whole
            && f.head.runs.iter().any(|(first, count)| {
                (first.get()..first.get() + count).contains(&(recovered_lsn.get() + 1))
            })
    };
    let place = match found.iter().find(covers) {
        Some(f) => format!(
            "the group at block {} of file {} is damaged",
            f.head.block,
            FileId::Log(f.head.shard, f.head.segment)
        ),
        None => "no log holds a whole group with it, or with a part of it".to_string(),
    };
    Error::corrupt(format_args!(
        "commit {} was durable (everything up to {watermark} was), but it is gone: {place}; the \
         log is damaged in the middle. Nothing was changed; restore the log from a backup",
        recovered_lsn.get() + 1
    ))
}
