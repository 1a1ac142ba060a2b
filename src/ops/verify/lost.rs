//! Names pages that may be gone: those of an extent in which the table counts more live blocks than
//! the roots reach.
//!
//! The counts of the table and the roots are of one checkpoint and must agree. Where the table
//! counts more, a part of the map was lost, and with it, maybe, the pages that it named. The
//! summary of the extent says what was written there, and the map shows which of it was
//! superseded:
//!
//! ```text
//! item of the summary
//!     --block is named--> there
//!     --the map names the page at this version or a newer one--> superseded, or moved
//!     --else--> freed, or gone: it is reported
//! ```
//! Invariants
//! 1. Only extents whose counts disagree are examined: in a healthy store nothing is reported, even
//!    if pages were freed in it.
//! 2. The report is bounded: it names [`PAGES_MAX`] pages of an extent, and counts the others.
//!
//! It does *not* say that a page is gone: it may have been freed, which only its user knows.

use super::Verifier;
use super::named::{LEVEL_MAX, Named, Trees};
use crate::base::{BLOCK, Lsn, PageKey};
use crate::format::extent::{Item, ItemKind, NodeKey};
use crate::format::node::{self, Entry};
use crate::format::superblock::Superblock;
use std::collections::BTreeMap;

/// Pages of an extent that are named.
const PAGES_MAX: usize = 16;

/// The trees, and the nodes on the path to the last page that was looked up.
pub(super) struct Finder<'a> {
    superblock: &'a Superblock,
    roots: &'a [Trees],
    path: [Option<(NodeKey, Vec<u8>)>; LEVEL_MAX as usize + 1],
}

impl<'a> Finder<'a> {
    pub(super) fn new(superblock: &'a Superblock, roots: &'a [Trees]) -> Self {
        Finder { superblock, roots, path: Default::default() }
    }
}

impl Verifier<'_> {
    /// Describes what an extent may have lost if `missing` of its live blocks are not reached.
    pub(super) fn lost(
        &mut self,
        finder: &mut Finder<'_>,
        named: &Named,
        items: &[Item],
        missing: u32,
    ) -> String {
        let (mut pages, mut nodes): (BTreeMap<PageKey, Lsn>, usize) = Default::default();
        for item in items.iter().filter(|item| !named.has(item.block)) {
            match item.what {
                ItemKind::Page(key, lsn)
                    if self.mapped_lsn(finder, key).is_none_or(|mapped| mapped < lsn) =>
                {
                    let newest = pages.entry(key).or_default();
                    *newest = lsn.max(*newest);
                }
                ItemKind::Page(..) => {}
                ItemKind::Node(_) => nodes += 1,
            }
        }
        let name = |(key, lsn): (&PageKey, &Lsn)| {
            let byte = key
                .page
                .get()
                .checked_mul(BLOCK as u64)
                .map_or(String::new(), |byte| format!("byte {byte}, "));
            format!("{:?} of {} ({byte}LSN {lsn})", key.page, self.volume(key.volume))
        };
        describe(missing, pages.len(), pages.iter().take(PAGES_MAX).map(name), nodes)
    }

    /// The LSN of the version of a page that the map names.
    fn mapped_lsn(&mut self, finder: &mut Finder<'_>, key: PageKey) -> Option<Lsn> {
        let (vshard, page_index) = key.place_in(finder.superblock.geometry.vshards_count);
        let trees = finder.roots.get(vshard.index())?.as_ref()?;
        let mut child =
            *trees.get(usize::from(key.volume.get())).filter(|top| top.level <= LEVEL_MAX)?;
        let shifted = |bits: u32| page_index.checked_shr(bits).unwrap_or(0);
        let mut level = child.level;
        if shifted(6 + 8 * u32::from(level)) != 0 {
            return None;
        }
        while child.is_present() {
            let at = NodeKey {
                vshard,
                volume: key.volume,
                level,
                prefix: shifted(6 + 8 * u32::from(level)),
            };
            let known = &mut finder.path[usize::from(level)];
            if known.as_ref().is_none_or(|(node, _)| *node != at) {
                let offset = child.place().offset(finder.superblock.geometry.extent_bytes);
                *known = Some((at, self.node_bytes(offset, child).ok()?));
            }
            let (_, bytes) = known.as_ref()?;
            if level == 0 {
                return Some(node::entry(bytes, (page_index % 64) as usize))
                    .filter(Entry::is_present)
                    .map(|e| e.lsn());
            }
            child = node::child(bytes, shifted(6 + 8 * u32::from(level - 1)) as usize % 256);
            level -= 1;
        }
        None
    }
}

/// Describes what may be gone of `missing` blocks: some of `count` pages, the first of which are
/// named, or of `nodes` map nodes.
fn describe(
    missing: u32,
    count: usize,
    named: impl Iterator<Item = String>,
    nodes: usize,
) -> String {
    let blocks =
        format!("{missing} block{} that the table counts", if missing == 1 { "" } else { "s" });
    if count == 0 {
        return match nodes {
            0 => "nothing but its space: all that was written there is superseded".into(),
            _ => format!(
                "{blocks} held map nodes, and pages that they named, in other extents, may be gone"
            ),
        };
    }
    let mut candidates: Vec<String> = named.collect();
    if count > candidates.len() {
        candidates.push(format!("{} more pages", count - candidates.len()));
    }
    if nodes > 0 {
        candidates.push(format!("{nodes} map nodes"));
    }
    format!(
        "pages that may be gone: {blocks} held some of these, which the map does not name, nor a \
         newer version (a page that was freed is among them): {}",
        candidates.join(", ")
    )
}

#[cfg(test)]
mod tests {
    use super::describe;

    /// An extent holds up to 2,046 pages: who reads a report must not lose the line that matters
    /// among them.
    #[test]
    fn what_may_be_gone_is_told_in_bounds() {
        let pages = |count: usize| (0..count.min(super::PAGES_MAX)).map(|n| format!("p{n}"));
        let one = describe(1, 1, pages(1), 0);
        assert!(one.contains("1 block that") && one.ends_with(": p0"), "{one}");
        let many = describe(7, 2_000, pages(2_000), 3);
        assert!(
            many.contains("7 blocks that")
                && many.ends_with("p14, p15, 1984 more pages, 3 map nodes"),
            "{many}"
        );
        assert!(many.len() < 500);
        let nodes = describe(2, 0, pages(0), 2);
        assert!(nodes.contains("held map nodes") && nodes.contains("may be gone"), "{nodes}");
        assert!(!describe(1, 0, pages(0), 0).contains("gone"));
    }
}
