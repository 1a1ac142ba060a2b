//! Compares what the map names in each extent with its summary and its live count.

use super::lost::Finder;
use super::named::{IN_USE, Named, Trees, hash};
use super::read::Bytes;
use super::{Mend, Verifier};
use crate::base::{BLOCK, BlockAddr, ExtentNo};
use crate::format::extent::{Item, TableRow, decode_summary, summary_at, summary_blocks};
use crate::format::superblock::Superblock;
use crate::io::FileId;

/// Summaries that are read at a time.
const SUMMARIES_AT_A_TIME: usize = 64;

impl Verifier<'_> {
    /// Reads the summary of each extent in use, and compares what is in it, and how much of it is
    /// live, with the map.
    pub(super) fn summaries(
        &mut self,
        superblock: &Superblock,
        roots: &[Trees],
        extents: &[Named],
    ) {
        let mut finder = Finder::new(superblock, roots);
        let rows = |(i, named): (usize, &'_ Named)| Some((ExtentNo::new(i as u32), named.row?));
        for (first, some) in
            (0..).step_by(SUMMARIES_AT_A_TIME).zip(extents.chunks(SUMMARIES_AT_A_TIME))
        {
            let numbered = || (first..).zip(some);
            let in_use = || numbered().filter_map(rows).filter(|(_, row)| row.state == IN_USE);
            let places: Vec<(u64, usize)> =
                in_use().map(|(no, row)| summary_place(superblock, no, row)).collect();
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

    /// Reports an extent that is neither in use by the table nor free.
    fn not_in_use(
        &mut self,
        superblock: &Superblock,
        (no, row): (ExtentNo, TableRow),
        named: &Named,
    ) {
        let (structure, at) = (format!("extent {}", no.get()), begin(superblock, no));
        if row.state == 0 {
            let what =
                format!("is free in the table, but the map names {} blocks of it", named.count());
            return self.damaged(
                structure,
                at,
                what,
                "these blocks: they may be overwritten",
                Mend::CopyOut,
            );
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
            (Some(missing), None) => {
                format!("{missing} pages or map nodes that may be gone: which, is not known")
            }
            (None, _) => {
                "these blocks: their extent may be taken for free too early, and overwritten".into()
            }
        };
        let what =
            format!("has {live} live blocks by the table, and the roots reach {reached} of them");
        let structure = format_args!("extent {}", no.get());
        self.damaged(structure, begin(superblock, no), what, affects, Mend::CopyOut);
    }

    /// Checks the summary of an extent, and returns the items that it lists.
    fn summary(
        &mut self,
        superblock: &Superblock,
        (no, row): (ExtentNo, TableRow),
        named: &Named,
        read: Bytes,
    ) -> Option<Vec<Item>> {
        let decoded = read.and_then(|bytes| {
            decode_summary(superblock.store_id, no, row.summary_crc.get(), &bytes)
                .map_err(str::to_string)
        });
        let listed = |items: &[Item]| {
            items.iter().filter(|i| named.has(i.block)).fold(0, |sum, i| sum ^ hash(*i))
        };
        let what = match decoded {
            Ok(items) if self.map_is_whole && listed(&items) != named.hash => {
                "does not list what the map names in this extent".into()
            }
            Ok(items) => {
                self.report.extents += 1;
                return Some(items);
            }
            Err(what) => what,
        };
        let affects = "compaction of this extent; its pages are read without it";
        let (structure, at) =
            (format!("the summary of extent {}", no.get()), summary_place(superblock, no, row).0);
        self.damaged(structure, (FileId::Data, at), what, affects, Mend::Rewrite);
        None
    }
}

/// The first byte of an extent.
fn begin(superblock: &Superblock, no: ExtentNo) -> (FileId, u64) {
    (FileId::Data, BlockAddr { extent: no, block: 0 }.offset(superblock.geometry.extent_bytes))
}

/// The byte offset in the data file of the summary of an extent, and its length.
fn summary_place(superblock: &Superblock, no: ExtentNo, row: TableRow) -> (u64, usize) {
    let blocks = superblock.geometry.extent_blocks();
    let place = BlockAddr { extent: no, block: summary_at(blocks, row.summary_slot) };
    (place.offset(superblock.geometry.extent_bytes), summary_blocks(blocks) as usize * BLOCK)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::{Lsn, PageKey, VolumeId};
    use crate::format::extent::ItemKind;

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
    fn items_that_differ_in_one_field_differ_when_hashed() {
        let all = [page(1, 2, 3), page(2, 2, 3), page(1, 3, 3), page(1, 2, 4)];
        for (i, a) in all.iter().enumerate() {
            assert!(all[i + 1..].iter().all(|b| hash(*a) != hash(*b)));
        }
    }
}
