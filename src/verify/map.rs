//! The page map, node by node from the roots down, and every page that it names.
//!
//! Invariants
//! 1. A node is taken apart only after its sum was found right; a wrong one ends this branch and no other.
//! 2. The depth is that of the tree's top, which is bounded; no node can lead back up.

use super::Verifier;
use super::extents::Named;
use super::head::Trees;
use crate::checksum::crc32c;
use crate::disk::FileId;
use crate::error::Result;
use crate::format::catalog;
use crate::format::extent::{Item, ItemKind, NodeKey, data_blocks};
use crate::format::node::{self, Child, Entry, LEAF_ENTRIES, NODE_CHILDREN};
use crate::format::superblock::Superblock;
use crate::types::{BLOCK, Lsn, PageKey, Place, VShard, VolumeId};

/// The level of a tree that covers all 64-bit keys: 6 bits in a leaf, 8 in each level above.
pub(super) const LEVEL_MAX: u8 = 8;
/// Pages of one read at most.
const RUN_PAGES_MAX: usize = 64;

/// What stays the same during the walk.
struct Walk<'a> {
    superblock: &'a Superblock,
    extents: &'a mut [Named],
    data_blocks: u32,
}

impl Walk<'_> {
    fn offset(&self, place: Place) -> u64 {
        place.offset(self.superblock.geometry.extent_bytes)
    }

    /// The map names `what` at `place`; the message says why that can't be.
    fn name(&mut self, place: Place, what: ItemKind) -> Result<(), &'static str> {
        let item = Item { block: place.block, what };
        let extent =
            self.extents.get_mut(place.extent.index()).ok_or("is said to lie in an extent that does not exist")?;
        extent.name(item, self.data_blocks)
    }

    /// The ids of the pages below a node, in words.
    fn pages_below(&self, key: NodeKey, volume: &str) -> String {
        let bits = 6 + 8 * u32::from(key.level);
        let first = key.prefix.checked_shl(bits).unwrap_or(0);
        let last = first | 1u64.checked_shl(bits).map_or(u64::MAX, |size| size - 1);
        let vshards = self.superblock.geometry.vshards_count;
        // Above the largest key, ids would wrap: the last run of ids is then as good a bound.
        let key_bits = 64 - vshards.trailing_zeros();
        let last = last.min(1u64.checked_shl(key_bits).map_or(u64::MAX, |size| size - 1));
        let id = |dense| PageKey::from_place(key.volume, key.vshard, dense, vshards).page;
        let (first, last) = (id(first), id(last));
        format!("pages {first:?} to {last:?} of {volume}, those of them in virtual shard {}", key.vshard.get())
    }
}

fn describe(key: NodeKey) -> String {
    let kind = if key.level == 0 { "leaf" } else { "interior" };
    format!("{kind} node {} of level {} ({:?}, {:?})", key.prefix, key.level, key.vshard, key.volume)
}

impl Verifier<'_> {
    /// Walks all trees.
    pub(super) fn map(&mut self, superblock: &Superblock, roots: &[Trees], extents: &mut [Named]) {
        let data_blocks = data_blocks(superblock.geometry.extent_blocks());
        let mut walk = Walk { superblock, extents, data_blocks };
        for (vshard, trees) in roots.iter().enumerate() {
            for (volume, top) in trees.iter().flat_map(|trees| trees.iter().enumerate()) {
                if top.is_present() {
                    let (vshard, volume) = (VShard::new(vshard as u16), VolumeId::new(volume as u8));
                    let key = NodeKey { vshard, volume, level: top.level, prefix: 0 };
                    self.node(&mut walk, key, *top);
                }
            }
        }
    }

    fn node(&mut self, walk: &mut Walk<'_>, key: NodeKey, child: Child) {
        let (place, offset) = (child.place(), walk.offset(child.place()));
        let checked = if child.level != key.level || key.level > LEVEL_MAX {
            Err(format!("is said to have level {}", child.level))
        } else {
            walk.name(place, ItemKind::Node(key)).map_err(str::to_string).and_then(|()| self.node_bytes(offset, child))
        };
        let bytes = match checked {
            Ok(bytes) => bytes,
            Err(what) => {
                let affects = walk.pages_below(key, &self.volume(key.volume));
                return self.damaged(describe(key), (FileId::Data, offset), what, affects);
            }
        };
        self.report.nodes += 1;
        if key.level == 0 {
            return self.leaf(walk, key, &bytes);
        }
        for slot in 0..NODE_CHILDREN {
            let child = node::child(&bytes, slot);
            if child.is_present() {
                let prefix = key.prefix << 8 | slot as u64;
                self.node(walk, NodeKey { level: key.level - 1, prefix, ..key }, child);
            }
        }
    }

    pub(super) fn node_bytes(&mut self, offset: u64, child: Child) -> Result<Vec<u8>, String> {
        let bytes = self.read(FileId::Data, offset, BLOCK).map_err(|error| error.to_string())?;
        match crc32c(&bytes) == child.crc.get() {
            true => Ok(bytes),
            false => Err("has a wrong checksum".into()),
        }
    }

    fn leaf(&mut self, walk: &mut Walk<'_>, key: NodeKey, bytes: &[u8]) {
        let vshards = walk.superblock.geometry.vshards_count;
        let mut pages: Vec<(Place, PageKey, Entry)> = Vec::new();
        for slot in 0..LEAF_ENTRIES {
            let entry = node::entry(bytes, slot);
            if !entry.is_present() {
                continue;
            }
            let page = PageKey::from_place(key.volume, key.vshard, key.prefix << 6 | slot as u64, vshards);
            let named = entry_is_plain(&entry, walk.superblock.next_lsn)
                .and_then(|()| walk.name(entry.place(), ItemKind::Page(page, entry.lsn())));
            match named {
                Ok(()) => pages.push((entry.place(), page, entry)),
                Err(what) => self.page_damaged(page, walk.offset(entry.place()), what),
            }
        }
        pages.sort_by_key(|(place, ..)| *place);
        for run in pages.chunk_by(|(a, ..), (b, ..)| a.extent == b.extent && a.block + 1 == b.block) {
            for run in run.chunks(RUN_PAGES_MAX) {
                self.pages(walk, run);
            }
        }
    }

    /// Reads pages that lie one after another.
    fn pages(&mut self, walk: &Walk<'_>, run: &[(Place, PageKey, Entry)]) {
        let offset = walk.offset(run[0].0);
        match self.read(FileId::Data, offset, run.len() * BLOCK) {
            Ok(bytes) => {
                for ((place, page, entry), bytes) in run.iter().zip(bytes.chunks(BLOCK)) {
                    match self.page(*page, entry, bytes) {
                        Ok(()) => self.report.pages += 1,
                        Err(what) => self.page_damaged(*page, walk.offset(*place), what),
                    }
                }
            }
            Err(error) if run.len() == 1 => self.page_damaged(run[0].1, offset, error),
            // One of them can't be read: which?
            Err(_) => run.iter().for_each(|page| self.pages(walk, std::slice::from_ref(page))),
        }
    }

    fn page(&mut self, page: PageKey, entry: &Entry, bytes: &[u8]) -> Result<(), &'static str> {
        if crc32c(bytes) != entry.crc.get() {
            return Err("does not have the bytes that were written");
        }
        if page.volume == VolumeId::CATALOG {
            let volume = catalog::decode(bytes)?;
            let name = if volume.name.is_empty() { "(deleted)".into() } else { volume.name };
            self.volumes.insert(VolumeId::new(page.page.get() as u8), name);
        }
        Ok(())
    }

    fn page_damaged(&mut self, page: PageKey, offset: u64, what: impl std::fmt::Display) {
        let affects = format!("{:?} of {}", page.page, self.volume(page.volume));
        self.damaged(format_args!("page {page:?}"), (FileId::Data, offset), what, affects);
    }
}

fn entry_is_plain(entry: &Entry, next_lsn: Lsn) -> Result<(), &'static str> {
    if entry.len.get() as usize != BLOCK || entry.class != 0 || entry.codec != 0 || entry.key_id.get() != 0 {
        return Err("has a form that this version does not know");
    }
    match entry.lsn() < next_lsn {
        true => Ok(()),
        false => Err("is said to be newer than the store"),
    }
}
