//! The page map, node by node from the roots down, and every page that it names.
//!
//! ```text
//! stack of nodes --a batch, by place--> read together
//!     --interior--> their children, onto the stack
//!     --leaf------> pages, until there are enough: read in order
//! ```
//! Invariants
//! 1. A node is decoded only after its checksum was found right; a wrong one ends this branch and
//!    no other.
//! 2. The depth is that of the tree's top, which is bounded; no node can lead back up.
//! 3. Memory is bounded: the stack holds the roots' trees and, of each level, the children of one
//!    batch of nodes; of pages [`PAGES_AT_A_TIME`] and those of one batch of leaves are remembered,
//!    and none of their bytes.

use super::named::{LEVEL_MAX, Named, Trees};
use super::report::{Damage, VolumeBytes};
use super::{Mend, Verifier};
use crate::base::checksum::crc32c;
use crate::base::error::Result;
use crate::base::{BLOCK, BlockAddr, Lsn, PageId, PageKey, VShard, VolumeId};
use crate::engine::codec::Expected;
use crate::format::catalog;
use crate::format::extent::{Item, ItemKind, NodeKey, data_blocks};
use crate::format::node::{self, Child, Entry, LEAF_ENTRIES, NODE_CHILDREN};
use crate::format::superblock::Superblock;
use crate::io::FileId;

/// Nodes of one batch: two for each read in flight, so that neighbours can be read together.
const NODES_AT_A_TIME: usize = 128;
/// Pages that are read together, sorted by address: the more, the longer the reads in a store that
/// was written at random. They fill 256 MiB, and the list of them takes 2.5 MiB.
const PAGES_AT_A_TIME: usize = 65_536;

/// A page as a leaf names it.
struct NamedPage {
    place: BlockAddr,
    page: PageKey,
    expected: Expected,
}

/// The state of the walk: the nodes and pages that must still be read.
struct Walk<'a> {
    superblock: &'a Superblock,
    extents: &'a mut [Named],
    data_blocks: u32,
    nodes: Vec<(NodeKey, Child)>,
    pages: Vec<NamedPage>,
}

impl Walk<'_> {
    fn offset(&self, place: BlockAddr) -> u64 {
        place.offset(self.superblock.geometry.extent_bytes)
    }

    /// Notes that the map names `what` at `place`; the message says why that can't be right.
    fn name(&mut self, place: BlockAddr, what: ItemKind) -> Result<(), &'static str> {
        let item = Item { block: place.block, what };
        let extent = self
            .extents
            .get_mut(place.extent.index())
            .ok_or("is said to lie in an extent that does not exist")?;
        extent.name(item, self.data_blocks)
    }

    /// The first and the last id of the pages below a node. Pages of other virtual shards lie
    /// between them.
    fn pages_below(&self, key: NodeKey) -> (PageId, PageId) {
        let bits = 6 + 8 * u32::from(key.level);
        let first = key.prefix.checked_shl(bits).unwrap_or(0);
        let last = first | 1u64.checked_shl(bits).map_or(u64::MAX, |size| size - 1);
        let vshards = self.superblock.geometry.vshards_count;
        // Above the largest key, ids would wrap: the last run of ids is then as good a bound.
        let key_bits = 64 - vshards.trailing_zeros();
        let last = last.min(1u64.checked_shl(key_bits).map_or(u64::MAX, |size| size - 1));
        let id = |page_index| PageKey::from_place(key.volume, key.vshard, page_index, vshards).page;
        (id(first), id(last))
    }

    /// The next batch, in the order of their addresses.
    fn batch(&mut self) -> Vec<(NodeKey, Child)> {
        let mut batch = self.nodes.split_off(self.nodes.len().saturating_sub(NODES_AT_A_TIME));
        batch.sort_unstable_by_key(|(_, child)| child.place());
        batch
    }
}

fn describe(key: NodeKey) -> String {
    let kind = if key.level == 0 { "leaf" } else { "interior" };
    format!(
        "{kind} node {} of level {} ({:?}, {:?})",
        key.prefix, key.level, key.vshard, key.volume
    )
}

impl Verifier<'_> {
    /// Walks all trees, that of the catalog first, so that messages can name volumes.
    pub(super) fn map(&mut self, superblock: &Superblock, roots: &[Trees], extents: &mut [Named]) {
        let data_blocks = data_blocks(superblock.geometry.extent_blocks());
        let mut walk =
            Walk { superblock, extents, data_blocks, nodes: Vec::new(), pages: Vec::new() };
        for of_catalog in [true, false] {
            for (vshard, trees) in roots.iter().enumerate() {
                for (volume, top) in trees.iter().flat_map(|trees| trees.iter().enumerate()) {
                    let (vshard, volume) =
                        (VShard::new(vshard as u16), VolumeId::new(volume as u8));
                    if top.is_present() && (volume == VolumeId::CATALOG) == of_catalog {
                        walk.nodes
                            .push((NodeKey { vshard, volume, level: top.level, prefix: 0 }, *top));
                    }
                }
            }
            while !walk.nodes.is_empty() {
                self.nodes(&mut walk);
                if walk.pages.len() >= PAGES_AT_A_TIME {
                    self.pages(&mut walk);
                }
            }
            self.pages(&mut walk);
        }
    }

    /// Reads a batch of nodes, and adds what they name to the lists of what to read.
    fn nodes(&mut self, walk: &mut Walk<'_>) {
        let mut batch = walk.batch();
        batch.retain(|(key, child)| {
            let named = if child.level != key.level || key.level > LEVEL_MAX {
                Err(format!("is said to have level {}", child.level))
            } else {
                walk.name(child.place(), ItemKind::Node(*key)).map_err(str::to_string)
            };
            named.map_err(|what| self.node_damaged(walk, *key, *child, what)).is_ok()
        });
        let offsets: Vec<u64> = batch.iter().map(|(_, child)| walk.offset(child.place())).collect();
        let mut read = Vec::with_capacity(batch.len());
        self.blocks(&offsets, |n, bytes| read.push((n, bytes.map(<[u8]>::to_vec))));
        for (n, bytes) in read {
            let (key, child) = batch[n];
            match bytes.and_then(|bytes| checked(bytes, child)) {
                Ok(bytes) => self.node(walk, key, &bytes),
                Err(what) => self.node_damaged(walk, key, child, what),
            }
        }
    }

    fn node(&mut self, walk: &mut Walk<'_>, key: NodeKey, bytes: &[u8]) {
        self.report.nodes += 1;
        if key.level == 0 {
            return self.leaf(walk, key, bytes);
        }
        for slot in 0..NODE_CHILDREN {
            let child = node::child(bytes, slot);
            if child.is_present() {
                let prefix = key.prefix << 8 | slot as u64;
                walk.nodes.push((NodeKey { level: key.level - 1, prefix, ..key }, child));
            }
        }
    }

    fn node_damaged(&mut self, walk: &Walk<'_>, key: NodeKey, child: Child, what: String) {
        self.map_is_whole = false;
        let ((first, last), volume) = (walk.pages_below(key), self.volume(key.volume));
        let all = walk.superblock.geometry.vshards_count == 1 || last.get() - first.get() < 64;
        let bytes = self.bytes_of(key.volume, first, last);
        let bytes = bytes.map(|bytes| VolumeBytes { all, ..bytes });
        let place = bytes
            .as_ref()
            .map_or(String::new(), |b| format!(" (bytes {} to {})", b.offset, b.last()));
        let part = if all {
            String::new()
        } else {
            format!(", those of them in virtual shard {}", key.vshard.get())
        };
        self.report.add(Damage {
            structure: describe(key),
            file: FileId::Data,
            offset: walk.offset(child.place()),
            what,
            affects: format!("pages {first:?} to {last:?} of {volume}{place}{part}"),
            bytes,
            mend: Mend::CopyOut,
        });
    }

    pub(super) fn node_bytes(&mut self, offset: u64, child: Child) -> Result<Vec<u8>, String> {
        self.read(FileId::Data, offset, BLOCK).and_then(|bytes| checked(bytes, child))
    }

    fn leaf(&mut self, walk: &mut Walk<'_>, key: NodeKey, bytes: &[u8]) {
        let vshards = walk.superblock.geometry.vshards_count;
        for slot in 0..LEAF_ENTRIES {
            let entry = node::entry(bytes, slot);
            if !entry.is_present() {
                continue;
            }
            let page =
                PageKey::from_place(key.volume, key.vshard, key.prefix << 6 | slot as u64, vshards);
            let named = expected(&entry, walk.superblock.next_lsn).and_then(|expected| {
                walk.name(entry.place(), ItemKind::Page(page, entry.lsn()))?;
                Ok(expected)
            });
            match named {
                Ok(expected) => walk.pages.push(NamedPage { place: entry.place(), page, expected }),
                // The entry is wrong, not the page.
                Err(what) => {
                    self.map_is_whole = false;
                    self.page_damaged(page, walk.offset(entry.place()), what, Mend::CopyOut);
                }
            }
        }
    }

    /// Reads the pages that leaves have named.
    fn pages(&mut self, walk: &mut Walk<'_>) {
        let mut pages = std::mem::take(&mut walk.pages);
        pages.sort_unstable_by_key(|named| named.place);
        let offsets: Vec<u64> = pages.iter().map(|named| walk.offset(named.place)).collect();
        let (mut damaged, mut records, mut whole) = (Vec::new(), Vec::new(), 0);
        self.blocks(&offsets, |n, bytes| match bytes.map(|bytes| pages[n].expected.open(bytes)) {
            Ok(Ok(page)) => {
                whole += 1;
                if pages[n].page.volume == VolumeId::CATALOG {
                    records.push((n, catalog::decode(page)));
                }
            }
            Ok(Err(refusal)) => damaged.push((n, refusal.to_string())),
            Err(what) => damaged.push((n, what)),
        });
        for (n, record) in records {
            let what = record.map(|volume| {
                let name = if volume.name.is_empty() { "(deleted)".into() } else { volume.name };
                self.volumes.insert(VolumeId::new(pages[n].page.page.get() as u8), name);
            });
            if let Err(what) = what {
                whole -= 1;
                damaged.push((n, what.to_string()));
            }
        }
        self.report.pages += whole;
        for (n, what) in damaged {
            let page = pages[n].page;
            let mend =
                if page.volume == VolumeId::CATALOG { Mend::Restore } else { Mend::Overwrite };
            self.page_damaged(page, offsets[n], what, mend);
        }
        // Keeps its memory for the next batch.
        pages.clear();
        walk.pages = pages;
    }

    fn page_damaged(
        &mut self,
        page: PageKey,
        offset: u64,
        what: impl std::fmt::Display,
        mend: Mend,
    ) {
        let bytes = self.bytes_of(page.volume, page.page, page.page);
        let place = bytes
            .as_ref()
            .map_or(String::new(), |b| format!(" (bytes {} to {})", b.offset, b.last()));
        self.report.add(Damage {
            structure: format!("page {page:?}"),
            file: FileId::Data,
            offset,
            what: what.to_string(),
            affects: format!("{:?} of {}{place}", page.page, self.volume(page.volume)),
            bytes,
            mend,
        });
    }
}

fn checked(bytes: Vec<u8>, child: Child) -> Result<Vec<u8>, String> {
    match crc32c(&bytes) == child.crc.get() {
        true => Ok(bytes),
        false => Err("has a wrong checksum".into()),
    }
}

/// What the bytes of the page must be, if its entry is plausible.
fn expected(entry: &Entry, next_lsn: Lsn) -> Result<Expected, String> {
    let expected = Expected::of(entry).map_err(|refusal| refusal.to_string())?;
    match entry.lsn() < next_lsn {
        true => Ok(expected),
        false => Err("is said to be newer than the store".into()),
    }
}
