//! Extents: what the map names in each, against its summary and its live count.

use super::head::Trees;
use super::lost::Finder;
use super::read::Bytes;
use super::{Mend, Verifier};
use crate::base::{BLOCK, ExtentNo, Place};
use crate::format::extent::{Item, ItemKind, TableRow, decode_summary, summary_at, summary_blocks};
use crate::format::superblock::Superblock;
use crate::io::FileId;

/// Summaries that are read at a time.
const SUMMARIES_AT_A_TIME: usize = 64;
/// An extent's state in the table.
const IN_USE: u8 = 1;

/// One extent as the table says, and what of it the map names.
pub(super) struct Named {
    /// `None`: its table block is damaged.
    row: Option<TableRow>,
    /// One bit for each block.
    blocks: Vec<u64>,
    /// The items named, mixed into one number that does not depend on their order.
    mix: u64,
}

impl Named {
    pub(super) fn new(row: Option<TableRow>, extent_blocks: u32) -> Self {
        Named { row, blocks: vec![0; extent_blocks.div_ceil(64) as usize], mix: 0 }
    }

    /// Blocks that are to be read if the table is right: what is live, and the summary.
    pub(super) fn blocks_to_read(&self, superblock: &Superblock) -> u64 {
        let summary = u64::from(summary_blocks(superblock.geometry.extent_blocks()));
        self.row.filter(|row| row.state == IN_USE).map_or(0, |row| u64::from(row.live.get()) + summary)
    }

    pub(super) fn has(&self, block: u32) -> bool {
        self.blocks.get(block as usize / 64).is_some_and(|bits| bits >> (block % 64) & 1 == 1)
    }

    fn count(&self) -> u32 {
        self.blocks.iter().map(|bits| bits.count_ones()).sum()
    }

    /// The map names this item; the message says why it can't.
    pub(super) fn name(&mut self, item: Item, data_blocks: u32) -> Result<(), &'static str> {
        if item.block >= data_blocks {
            return Err("is said to lie in the summaries of its extent");
        }
        if self.has(item.block) {
            return Err("is said to lie where something else lies");
        }
        self.blocks[item.block as usize / 64] |= 1 << (item.block % 64);
        self.mix ^= mix(item);
        Ok(())
    }
}

fn mix(item: Item) -> u64 {
    let (a, b, c) = match item.what {
        ItemKind::Page(key, lsn) => (key.page.get(), lsn.get(), u64::from(key.volume.get()) << 8),
        ItemKind::Node(key) => {
            let levels = u64::from(key.vshard.get()) << 24 | u64::from(key.level) << 16;
            (key.prefix, u64::MAX, levels | u64::from(key.volume.get()) << 8 | 1)
        }
    };
    [a, b, c, u64::from(item.block)].iter().fold(0, |sum, word| {
        let z = (sum ^ word).wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z ^ (z >> 27)
    })
}

impl Verifier<'_> {
    /// Reads the summary of each extent in use, and compares what is in it, and how much of it is live, with the map.
    pub(super) fn summaries(&mut self, superblock: &Superblock, roots: &[Trees], extents: &[Named]) {
        let mut finder = Finder::new(superblock, roots);
        let rows = |(i, named): (usize, &'_ Named)| Some((ExtentNo::new(i as u32), named.row?));
        for (first, some) in (0..).step_by(SUMMARIES_AT_A_TIME).zip(extents.chunks(SUMMARIES_AT_A_TIME)) {
            let numbered = || (first..).zip(some);
            let in_use = || numbered().filter_map(rows).filter(|(_, row)| row.state == IN_USE);
            let places: Vec<(u64, usize)> = in_use().map(|(no, row)| summary_place(superblock, no, row)).collect();
            let mut read = self.read_many(FileId::Data, &places).into_iter();
            for (i, named) in numbered() {
                let Some((no, row)) = rows((i, named)) else { continue };
                let summary = if row.state == IN_USE { read.next() } else { None };
                let items = match summary {
                    Some(bytes) => self.summary(superblock, (no, row), named, bytes),
                    None if row.state == 0 && named.count() == 0 => None,
                    None => {
                        self.not_in_use(superblock, (no, row), named);
                        continue;
                    }
                };
                if self.map_is_whole {
                    self.count_live(superblock, (no, row), named, items, &mut finder);
                }
            }
        }
    }

    /// An extent that the table does not say is in use, and that is not free either.
    fn not_in_use(&mut self, superblock: &Superblock, (no, row): (ExtentNo, TableRow), named: &Named) {
        let (structure, at) = (format!("extent {}", no.get()), begin(superblock, no));
        if row.state == 0 {
            let what = format!("is free in the table, but the map names {} blocks of it", named.count());
            return self.damaged(structure, at, what, "these blocks: they may be overwritten", Mend::CopyOut);
        }
        let what = format_args!("has the unknown state {}", row.state);
        self.damaged(structure, at, what, "its space", Mend::Restore);
    }

    /// Compares how much of an extent is live by the table with what the map names.
    fn count_live(
        &mut self,
        superblock: &Superblock,
        (no, row): (ExtentNo, TableRow),
        named: &Named,
        items: Option<Vec<Item>>,
        finder: &mut Finder<'_>,
    ) {
        let (live, reached) = (u32::from(row.live.get()), named.count());
        let affects = match (live.checked_sub(reached), items) {
            (Some(0), _) => return,
            (Some(missing), Some(items)) => self.lost(finder, named, &items, missing),
            (Some(missing), None) => format!("{missing} pages or map nodes that may be gone: which, is not known"),
            (None, _) => "these blocks: their extent may be taken for free too early, and overwritten".into(),
        };
        let what = format!("has {live} live blocks by the table, and the roots reach {reached} of them");
        let structure = format_args!("extent {}", no.get());
        self.damaged(structure, begin(superblock, no), what, affects, Mend::CopyOut);
    }

    /// Checks the summary of an extent, and gives the items that it lists.
    fn summary(
        &mut self,
        superblock: &Superblock,
        (no, row): (ExtentNo, TableRow),
        named: &Named,
        read: Bytes,
    ) -> Option<Vec<Item>> {
        let decoded = read.and_then(|bytes| {
            decode_summary(superblock.store_id, no, row.summary_crc.get(), &bytes).map_err(str::to_string)
        });
        let listed = |items: &[Item]| items.iter().filter(|i| named.has(i.block)).fold(0, |sum, i| sum ^ mix(*i));
        let what = match decoded {
            Ok(items) if self.map_is_whole && listed(&items) != named.mix => {
                "does not list what the map names in this extent".into()
            }
            Ok(items) => {
                self.report.extents += 1;
                return Some(items);
            }
            Err(what) => what,
        };
        let affects = "compaction of this extent; its pages are read without it";
        let (structure, at) = (format!("the summary of extent {}", no.get()), summary_place(superblock, no, row).0);
        self.damaged(structure, (FileId::Data, at), what, affects, Mend::Rewrite);
        None
    }
}

/// Where an extent begins.
fn begin(superblock: &Superblock, no: ExtentNo) -> (FileId, u64) {
    (FileId::Data, Place { extent: no, block: 0 }.offset(superblock.geometry.extent_bytes))
}

/// Where the summary of an extent lies in the data file, and how long it is.
fn summary_place(superblock: &Superblock, no: ExtentNo, row: TableRow) -> (u64, usize) {
    let blocks = superblock.geometry.extent_blocks();
    let place = Place { extent: no, block: summary_at(blocks, row.summary_slot) };
    (place.offset(superblock.geometry.extent_bytes), summary_blocks(blocks) as usize * BLOCK)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::{Lsn, PageKey, VolumeId};

    fn page(block: u32, id: u64, lsn: u64) -> Item {
        let key = PageKey::new(VolumeId::new(1), id.into());
        Item { block, what: ItemKind::Page(key, Lsn::new(lsn)) }
    }

    /// Two pages in one place means that one of them is served for the other.
    #[test]
    fn a_place_named_twice_is_found() {
        let mut named = Named::new(None, 128);
        assert_eq!(named.name(page(127, 1, 1), 128), Ok(()));
        assert!(named.name(page(127, 2, 2), 128).is_err());
        assert!(named.name(page(100, 3, 3), 100).is_err());
        assert_eq!(named.count(), 1);
    }

    /// The comparison with the summary must notice any one field that differs.
    #[test]
    fn items_that_differ_in_one_field_differ_when_mixed() {
        let all = [page(1, 2, 3), page(2, 2, 3), page(1, 3, 3), page(1, 2, 4)];
        for (i, a) in all.iter().enumerate() {
            assert!(all[i + 1..].iter().all(|b| mix(*a) != mix(*b)));
        }
    }
}
