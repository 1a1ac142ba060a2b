//! Reading the logs to their ends, and finding the cut.
//!
//! Invariants
//! 1. A group counts only whole: head, body, inline pages, and, above the highest recorded watermark, the pages at
//!    their final places too. At or below the watermark a page that does not match its sum is damage, found when it
//!    is read.
//! 2. The search goes on behind a torn group, block by block: with several writes in flight a whole group may stand
//!    behind it, and its head may record a watermark that makes the gap damage.
//! 3. The cut is the last LSN before the first one, above what the roots reflect, that no whole group of any log accounts
//!    for, or whose commit is not complete: a commit over shards needs the part of each shard that its owner names.
//!    A cut below the highest recorded watermark is damage, and refused.
//! 4. Bytes left from earlier uses of a segment pass only if they are groups of this epoch at this very position;
//!    those are older than the redo LSN and ignored.

use super::load::read_bytes;
use crate::checksum::crc32c;
use crate::disk::{Disk, FileId};
use crate::error::{Error, Result};
use crate::format::group::{Body, GroupHead, LoggedChange, Record, Role, Slot, SlotState};
use crate::format::superblock::Superblock;
use crate::pool::Arena;
use crate::types::{BLOCK, Deal, Lsn, Place, SegmentNo, ShardId};
use hashbrown::HashSet;

/// A whole group.
pub(crate) struct ScannedGroup {
    pub head: GroupHead,
    /// Places that its slots name.
    pub places: Vec<Place>,
    /// It lies above every recorded watermark: nobody knows whether a flush has covered it.
    pub is_doubtful: bool,
    /// The shards of the new deal whose pages it changes, a bit for each.
    pub concerns: u64,
}

/// What the logs hold.
pub(crate) struct Scan {
    /// Whole groups with something above the redo LSN and at or below the cut, each log in its order.
    pub groups: Vec<ScannedGroup>,
    /// Groups with a valid head that are not whole.
    pub torn: u64,
    /// What the roots reflect.
    pub redo: Lsn,
    /// The state to be restored. If nothing of the epoch is left it lies right before the epoch's first LSN.
    pub cut: Lsn,
    /// The highest LSN seen anywhere.
    pub highest: Lsn,
    /// Commits above the redo LSN, up to the cut.
    pub applied: u64,
    /// Commits in whole groups above the cut.
    pub dropped: u64,
    /// Extents up to the highest one that a kept group names.
    pub extents_named: u32,
}

impl Scan {
    /// For a store that was closed cleanly.
    pub(crate) fn nothing(superblock: &Superblock) -> Self {
        let cut = superblock.next_lsn.before();
        Scan { groups: Vec::new(), torn: 0, redo: cut, cut, highest: cut, applied: 0, dropped: 0, extents_named: 0 }
    }

    /// The last commit of the state to be restored: the epoch begins above LSNs that were dropped.
    pub(crate) fn state(&self, superblock: &Superblock) -> Lsn {
        if self.cut < superblock.epoch_first_lsn { superblock.next_lsn.before() } else { self.cut }
    }
}

/// What is needed of a record.
struct FoundRecord {
    lsn: Lsn,
    role: Role,
}

struct Found {
    head: GroupHead,
    slots: Vec<Slot>,
    records: Vec<FoundRecord>,
    concerns: u64,
    whole: bool,
}

impl Found {
    /// The highest LSN that it accounts for or has a part of.
    fn last_lsn(&self) -> Lsn {
        let run = |(first, count): &(Lsn, u64)| Lsn::new(first.get().saturating_add(count.saturating_sub(1)));
        let runs = self.head.runs.iter().map(run);
        runs.chain(self.records.iter().map(|record| record.lsn)).max().unwrap_or(Lsn::ZERO)
    }

    fn first_lsn(&self) -> Lsn {
        let runs = self.head.runs.iter().map(|(first, _)| *first);
        runs.chain(self.records.iter().map(|record| record.lsn)).min().unwrap_or(Lsn::MAX)
    }
}

/// Scans all logs; `deal` is the one to be.
pub(crate) fn scan(disk: &mut dyn Disk, arena: &mut Arena, superblock: &Superblock, deal: Deal) -> Result<Scan> {
    let mut found = Vec::new();
    for shard in (0..superblock.logs.len() as u16).map(ShardId::new) {
        for segment in (0..superblock.geometry.segments_count).map(SegmentNo::new) {
            scan_segment(disk, arena, superblock, deal, (shard, segment), &mut found)?;
        }
    }
    found.sort_by_key(|f| (f.head.shard, f.head.number));
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
    for f in found.iter_mut().filter(|f| f.whole && f.last_lsn() > watermark) {
        f.whole = placed_pages_match(disk, arena, superblock, f)? || planted!(PlacedUnchecked);
    }
    let cut = find_cut(&found, redo);
    if cut < watermark && !planted!(DamageTakenForTail) {
        return Err(missing(&found, cut, watermark));
    }
    let highest = found.iter().map(Found::last_lsn).fold(watermark.max(superblock.next_lsn.before()), Lsn::max);
    Ok(keep(found, redo, cut, highest, watermark))
}

fn keep(found: Vec<Found>, redo: Lsn, cut: Lsn, highest: Lsn, watermark: Lsn) -> Scan {
    let torn = found.iter().filter(|f| !f.whole).count() as u64;
    let (groups, extents_named) = (Vec::new(), 0);
    let mut scan = Scan { groups, torn, redo, cut, highest, applied: 0, dropped: 0, extents_named };
    for f in found.into_iter().filter(|f| f.whole && f.last_lsn() > redo) {
        let commits = || f.records.iter().filter(|record| !matches!(record.role, Role::Part(_)));
        scan.applied += commits().filter(|record| record.lsn > redo && record.lsn <= cut).count() as u64;
        scan.dropped += commits().filter(|record| record.lsn > cut).count() as u64;
        if f.first_lsn() > cut {
            continue;
        }
        let placed = f.slots.iter().filter(|s| s.state == SlotState::Placed);
        let places: Vec<Place> = placed.map(|s| s.entry.place()).collect();
        let named = places.iter().map(|p| p.extent.get().saturating_add(1)).max().unwrap_or(0);
        scan.extents_named = scan.extents_named.max(named);
        let is_doubtful = f.last_lsn() > watermark;
        scan.groups.push(ScannedGroup { head: f.head, places, is_doubtful, concerns: f.concerns });
    }
    scan
}

fn scan_segment(
    disk: &mut dyn Disk,
    arena: &mut Arena,
    superblock: &Superblock,
    deal: Deal,
    (shard, segment): (ShardId, SegmentNo),
    found: &mut Vec<Found>,
) -> Result<()> {
    let bytes_len = superblock.geometry.segment_bytes as usize;
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
        let f = open_group(head, here, deal);
        block += if f.whole { f.head.blocks } else { 1 };
        found.push(f);
    }
    Ok(())
}

/// What is in a group whose head is right; `here` begins with it.
fn open_group(head: GroupHead, here: &[u8], deal: Deal) -> Found {
    let nothing = |head| Found { head, slots: Vec::new(), records: Vec::new(), concerns: 0, whole: false };
    let Some(body) = Body::open(&head, here) else { return nothing(head) };
    let Some(records) = body.records() else { return nothing(head) };
    let whole = body.slots.iter().all(|slot| inline_matches(slot, here));
    let concerns = records.iter().flat_map(|record| &record.changes).fold(0, |concerns, change| {
        let (LoggedChange::Image(key, _) | LoggedChange::Patch(key, ..) | LoggedChange::Free(key)) = change;
        concerns | 1 << deal.shard_of(*key).get()
    });
    let record = |Record { lsn, role, .. }: &Record| FoundRecord { lsn: *lsn, role: *role };
    let records = records.iter().map(record).collect();
    Found { head, slots: body.slots, records, concerns, whole }
}

fn inline_matches(slot: &Slot, group: &[u8]) -> bool {
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
    let whole = || found.iter().filter(|f| f.whole);
    let mut runs: Vec<(Lsn, u64)> = whole().flat_map(|f| f.head.runs.clone()).collect();
    runs.sort();
    let mut cut = redo;
    for (first, count) in runs {
        if first > cut.plus(1) && !planted!(GapIgnored) {
            break;
        }
        cut = cut.max(Lsn::new(first.get().saturating_add(count).saturating_sub(1)));
    }
    let records = || whole().flat_map(|f| f.records.iter().map(move |record| (f.head.shard, record)));
    let of_part =
        |(shard, record): (ShardId, &FoundRecord)| matches!(record.role, Role::Part(_)).then_some((record.lsn, shard));
    let parts: HashSet<(Lsn, ShardId), foldhash::fast::FixedState> = records().filter_map(of_part).collect();
    let lacks_a_part = |record: &FoundRecord| {
        let Role::Owner(others) = record.role else { return false };
        (0..64).any(|shard| others & 1 << shard != 0 && !parts.contains(&(record.lsn, ShardId::new(shard))))
    };
    let incomplete = records()
        .map(|(_, record)| record)
        .filter(|record| record.lsn > redo && lacks_a_part(record) && !planted!(PartIgnored));
    incomplete.map(|record| record.lsn.before()).fold(cut, Lsn::min)
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
        None => "no log holds a whole group with it, or with a part of it".to_string(),
    };
    Error::corrupt(format_args!(
        "commit {} was durable (everything up to {watermark} was), but it is gone: {place}; the log is damaged in the \
         middle. Nothing was changed; restore the log from a backup",
        cut.get() + 1
    ))
}
