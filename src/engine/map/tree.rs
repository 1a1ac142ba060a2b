//! The page map in memory: nodes are read when first needed, changed in place, and written to new
//! blocks at checkpoints.
//!
//! ```text
//! root block (virtual shard) --volume--> interior nodes (256 children) --> leaf (64 entries)
//!                                                                            --> page
//! ```
//! Invariants
//! 1. A node is in memory only while its parent is. Only the top of a tree has no parent: the root
//!    block, which is always in memory, names it (`arrival`). So marking a path dirty needs no I/O.
//! 2. The ancestors of a dirty node are dirty; `dirty_nodes` of its virtual shard holds exactly the
//!    dirty nodes.
//! 3. A node that is pinned, dirty, or has children in memory is not evicted.
//! 4. A child entry in a parent states the address and checksum of the child as last *written*;
//!    while the child is in memory, that one counts.
//! 5. The map never names a version above the watermark: only the write-back calls [`Map::set`],
//!    and only then.
//!
//! It does not read or write the device, allocate blocks, or know which pages are cached.

mod arrival;
#[cfg(any(test, feature = "sim"))]
mod audit;
mod emptied;
mod index;
mod leaves;
mod paths;
mod pins;
mod residency;

pub(crate) use leaves::NextLeaf;

use crate::base::checksum::crc32c;
use crate::base::{BLOCK, BlockAddr, Lsn, NodeIdx, PageKey, VShard, VolumeId};
use crate::format::extent::NodeKey;
use crate::format::node::{self, Child, Entry};
use crate::format::put;
use crate::format::root::{RootHead, VOLUMES_MAX};
use crate::format::superblock::RootVersion;
use crate::memory::{Arena, Frame, FrameRef, Residency};
use hashbrown::HashTable;
use std::collections::BTreeSet;

/// Pages of a leaf: 64.
pub(crate) const LEAF_PAGES: u64 = 1 << LEAF_BITS;
const LEAF_BITS: u32 = 6;
const NODE_BITS: u32 = 8;

/// A node in memory.
struct Node {
    key: NodeKey,
    frame: Frame,
    /// The address to which it was last written.
    place: Option<BlockAddr>,
    dirty: bool,
    /// Whether a checkpoint is writing it.
    is_written: bool,
    /// For a leaf, the pages that will change it; for others, reads of their children.
    pins: u32,
    /// Children in memory.
    children: u16,
    residency: Residency,
}

impl Node {
    /// Panics if the state of the node contradicts itself: that is a bug, and continuing would
    /// write it to the wrong address, or drop it while something needs it.
    fn assert_state(&self) {
        let key = self.key;
        assert!(!self.is_written || self.place.is_some(), "{key:?} is written to no address");
        assert!(key.level > 0 || self.children == 0, "{key:?} is a leaf and has children");
        assert!(self.children <= 1 << NODE_BITS, "{key:?} has {} children", self.children);
    }
}

/// The most memory that a node takes besides its frame: its entry, up to 16/7 slots in the index,
/// its slots in three lists, and half a slot in the set of dirty nodes, of which a third may be
/// dirty, if the leaves of that set are at least half full.
#[cfg(test)]
pub(crate) const NODE_BYTES: usize = size_of::<Option<Node>>()
    + (size_of::<NodeIdx>() + 1) * 16 / 7
    + 1
    + size_of::<(NodeIdx, bool, u32)>()
    + size_of::<(u8, VolumeId, u64)>();

/// A virtual shard's root in memory.
pub(crate) struct Root {
    /// Children by volume.
    pub children: Box<[Child; VOLUMES_MAX]>,
    /// The root as last written.
    pub version: RootVersion,
    /// Its nodes that the next checkpoint writes, leaves first.
    dirty_nodes: BTreeSet<(u8, VolumeId, u64)>,
}

/// The result of a lookup.
pub(crate) enum Lookup {
    /// The entry, or none: all nodes on the path were in memory.
    Found(Option<Entry>),
    /// This node must be read first; the child entry has its address and checksum.
    Load(NodeKey, Child),
}

/// A node that a checkpoint writes.
pub(crate) struct NodeWrite {
    /// The address.
    pub place: BlockAddr,
    /// Its bytes, fixed by a pin: the node is not changed until the pin is dropped.
    pub frame: FrameRef,
    /// The node, which stays in memory: until it is [written](Map::written) other bytes are at its
    /// address, and it must not be read from there.
    pub node: NodeIdx,
}

/// The page map of all virtual shards that one shard owns.
pub(crate) struct Map {
    vshards_count: u32,
    roots: Vec<Root>,
    nodes: Vec<Option<Node>>,
    vacant: Vec<NodeIdx>,
    index: HashTable<NodeIdx>,
    hasher: foldhash::fast::FixedState,
    dirty_count: usize,
    /// Leaves that pages will change, and the number of those that are dirty already.
    awaited: u64,
    awaited_dirty: u64,
    /// Nodes in memory that are not leaves.
    interior: u64,
    /// Nodes that have become idle, for the eviction policy, and whether a node is in that list.
    idle: Vec<NodeIdx>,
    noted: Vec<bool>,
}

fn prefix(page_index: u64, level: u8) -> u64 {
    page_index.checked_shr(LEAF_BITS + NODE_BITS * u32::from(level)).unwrap_or(0)
}

fn slot_in(page_index: u64, level: u8) -> usize {
    match level {
        0 => (page_index & ((1 << LEAF_BITS) - 1)) as usize,
        _ => {
            (page_index >> (LEAF_BITS + NODE_BITS * u32::from(level - 1))) as usize
                & ((1 << NODE_BITS) - 1)
        }
    }
}

/// The slot of the node `key` in its parent.
fn slot_of(key: NodeKey) -> usize {
    key.prefix as usize & ((1 << NODE_BITS) - 1)
}

fn parent_of(key: NodeKey) -> NodeKey {
    NodeKey { level: key.level + 1, prefix: key.prefix >> NODE_BITS, ..key }
}

impl Map {
    /// The map with these roots, and no node in memory.
    pub(crate) fn new(roots: Vec<(Box<[Child; VOLUMES_MAX]>, RootVersion)>, seed: u64) -> Self {
        let root = |(children, version)| Root { children, version, dirty_nodes: BTreeSet::new() };
        Map {
            vshards_count: roots.len() as u32,
            roots: roots.into_iter().map(root).collect(),
            nodes: Vec::new(),
            vacant: Vec::new(),
            index: HashTable::new(),
            hasher: foldhash::fast::FixedState::with_seed(seed),
            dirty_count: 0,
            awaited: 0,
            awaited_dirty: 0,
            interior: 0,
            idle: Vec::new(),
            noted: Vec::new(),
        }
    }

    /// The virtual shard of `key`, and its index there.
    pub(crate) fn position(&self, key: PageKey) -> (VShard, u64) {
        key.place_in(self.vshards_count)
    }

    /// Nodes in memory.
    pub(crate) fn nodes_count(&self) -> u32 {
        self.index.len() as u32
    }

    /// The number of nodes in memory, and of those that are pinned.
    #[cfg(test)]
    pub(crate) fn in_memory(&self) -> (usize, usize) {
        let pinned = self.nodes.iter().flatten().filter(|node| node.pins > 0).count();
        (self.index.len(), pinned)
    }

    /// Nodes that the next checkpoint will write.
    pub(crate) fn dirty_count(&self) -> usize {
        self.dirty_count
    }

    /// Panics if the counts contradict each other: that is a bug, and continuing would write too
    /// few nodes, or admit more changes than there are frames for.
    fn assert_counts(&self) {
        let nodes = self.index.len() as u64;
        assert!(self.awaited_dirty <= self.awaited, "more awaited leaves are dirty than awaited");
        assert!(self.awaited + self.interior <= nodes, "more nodes are counted than in memory");
        assert!(self.dirty_count as u64 <= nodes, "more nodes are dirty than in memory");
        assert_eq!(self.nodes.len(), nodes as usize + self.vacant.len(), "a node was lost");
    }

    fn node(&self, idx: NodeIdx) -> &Node {
        self.nodes[idx.index()].as_ref().expect("a node in the index exists")
    }

    fn node_mut(&mut self, idx: NodeIdx) -> &mut Node {
        self.nodes[idx.index()].as_mut().expect("a node in the index exists")
    }

    fn top(&self, vshard: VShard, volume: VolumeId) -> Child {
        self.roots[vshard.index()]
            .children
            .get(usize::from(volume.get()))
            .copied()
            .unwrap_or_default()
    }

    /// Looks `key` up.
    pub(crate) fn lookup(&mut self, key: PageKey) -> Lookup {
        let (vshard, page_index) = self.position(key);
        let leaf = NodeKey { vshard, volume: key.volume, level: 0, prefix: prefix(page_index, 0) };
        if let Some(idx) = self.find(leaf) {
            let node = self.node_mut(idx);
            node.residency.used();
            return Lookup::Found(present(node::entry(&node.frame, slot_in(page_index, 0))));
        }
        let mut child = self.top(vshard, key.volume);
        let mut level = child.level;
        if !child.is_present() || prefix(page_index, level) != 0 {
            return Lookup::Found(None);
        }
        loop {
            let at =
                NodeKey { vshard, volume: key.volume, level, prefix: prefix(page_index, level) };
            let Some(idx) = self.find(at) else {
                return Lookup::Load(at, child);
            };
            let node = self.node_mut(idx);
            node.residency.used();
            if level == 0 {
                return Lookup::Found(present(node::entry(&node.frame, slot_in(page_index, 0))));
            }
            child = node::child(&node.frame, slot_in(page_index, level));
            if !child.is_present() {
                return Lookup::Found(None);
            }
            level -= 1;
        }
    }

    /// Whether a node is in memory.
    pub(crate) fn is_resident(&self, key: NodeKey) -> bool {
        self.find(key).is_some()
    }

    /// The address to which a node in memory was last written.
    #[cfg(test)]
    pub(crate) fn written_at(&self, key: NodeKey) -> Option<BlockAddr> {
        self.node(self.find(key)?).place
    }

    /// The child entry of node `key` in its parent, if the path to it is in memory; otherwise the
    /// first node on the path that is not. `Ok(None)`: there is no such node.
    pub(crate) fn find_node(&self, key: NodeKey) -> Result<Option<Child>, (NodeKey, Child)> {
        let mut child = self.top(key.vshard, key.volume);
        if !child.is_present() || child.level < key.level {
            return Ok(None);
        }
        let mut level = child.level;
        let bits_below = |level: u8| NODE_BITS * u32::from(level - key.level);
        if key.prefix.checked_shr(bits_below(level)).unwrap_or(0) != 0 {
            return Ok(None);
        }
        while level > key.level {
            let prefix = key.prefix.checked_shr(bits_below(level)).unwrap_or(0);
            let at = NodeKey { level, prefix, ..key };
            let Some(idx) = self.find(at) else { return Err((at, child)) };
            let below = key.prefix.checked_shr(bits_below(level - 1)).unwrap_or(0);
            child = node::child(&self.node(idx).frame, below as usize & ((1 << NODE_BITS) - 1));
            if !child.is_present() {
                return Ok(None);
            }
            level -= 1;
        }
        Ok(Some(child))
    }

    fn insert(&mut self, key: NodeKey, place: Option<BlockAddr>, frame: Frame) -> NodeIdx {
        let parent = self.parent(key);
        let node = Node {
            key,
            frame,
            place,
            dirty: false,
            is_written: false,
            pins: 0,
            children: 0,
            residency: Residency::default(),
        };
        let idx = match self.vacant.pop() {
            Some(idx) => idx,
            None => {
                self.nodes.push(None);
                self.noted.push(false);
                NodeIdx::new(self.nodes.len() - 1)
            }
        };
        self.nodes[idx.index()] = Some(node);
        self.enter(key, idx);
        self.interior += u64::from(key.level > 0);
        if let Some(parent) = parent {
            self.node_mut(parent).children += 1;
            self.node(parent).assert_state();
        }
        self.note_idle(idx);
        self.assert_counts();
        idx
    }

    fn remove(&mut self, idx: NodeIdx) -> Node {
        let node = self.nodes[idx.index()].take().expect("a node in the index exists");
        let is_needed = node.pins > 0 || node.is_written || node.children > 0 || node.dirty;
        assert!(!is_needed, "{:?} is needed in memory", node.key);
        node.assert_state();
        self.vacant.push(idx);
        self.left(node.key, idx);
        self.interior -= u64::from(node.key.level > 0);
        if let Some(parent) = self.find(parent_of(node.key)) {
            assert!(self.node(parent).children > 0, "{:?} is not counted", node.key);
            self.node_mut(parent).children -= 1;
            self.note_idle(parent);
        }
        self.assert_counts();
        node
    }

    /// Raises the tree of a volume until it covers `page_index`.
    fn grow(&mut self, vshard: VShard, volume: VolumeId, page_index: u64, arena: &mut Arena) {
        let v = usize::from(volume.get());
        let old = self.top(vshard, volume);
        if !old.is_present() {
            let mut level = 0;
            while prefix(page_index, level) != 0 {
                level += 1;
            }
            self.roots[vshard.index()].children[v] =
                Child { level, present: 1, ..Child::default() };
            let idx =
                self.insert(NodeKey { vshard, volume, level, prefix: 0 }, None, zeroed(arena));
            // A top that was never written must not leave memory before a checkpoint writes it.
            self.mark_dirty(idx);
            return;
        }
        let mut child = old;
        while prefix(page_index, child.level) != 0 {
            let mut frame = zeroed(arena);
            put(frame.try_mut().expect("a new frame has no pins"), 0, &child);
            let below = NodeKey { vshard, volume, level: child.level, prefix: 0 };
            let above = parent_of(below);
            let has_child = self.find(below).is_some();
            child = Child { level: above.level, present: 1, ..Child::default() };
            self.roots[vshard.index()].children[v] = child;
            let idx = self.insert(above, None, frame);
            self.node_mut(idx).children = u16::from(has_child);
            self.mark_dirty(idx);
        }
    }

    /// Sets the entry of `key` in its pinned leaf, which is not being written; returns the one
    /// before.
    pub(crate) fn set(
        &mut self,
        leaf: NodeIdx,
        key: PageKey,
        entry: Option<Entry>,
    ) -> Option<Entry> {
        let (vshard, page_index) = self.position(key);
        let node = self.node_mut(leaf);
        assert!(
            node.pins > 0 && node.key.vshard == vshard && node.key.prefix == prefix(page_index, 0)
        );
        let slot = slot_in(page_index, 0);
        let before = present(node::entry(&node.frame, slot));
        let bytes = node.frame.try_mut().expect("a leaf that is being written is not changed");
        put(bytes, slot * size_of::<Entry>(), &entry.unwrap_or_default());
        self.mark_dirty(leaf);
        before
    }

    /// Marks a node in memory as dirty, so that the next checkpoint writes it elsewhere: this is
    /// how compaction moves nodes.
    pub(crate) fn touch(&mut self, key: NodeKey) {
        if let Some(idx) = self.find(key) {
            self.mark_dirty(idx);
        }
    }

    fn mark_dirty(&mut self, mut idx: NodeIdx) {
        loop {
            let node = self.node_mut(idx);
            if node.dirty {
                return;
            }
            node.dirty = true;
            let (key, pins) = (node.key, node.pins);
            self.dirty_count += 1;
            self.awaited_dirty += u64::from(key.level == 0 && pins > 0);
            let root = &mut self.roots[key.vshard.index()];
            root.dirty_nodes.insert((key.level, key.volume, key.prefix));
            match self.parent(key) {
                Some(parent) => idx = parent,
                None => return,
            }
        }
    }

    /// Whether virtual shard `vshard` has anything for a checkpoint to write.
    pub(crate) fn is_dirty(&self, vshard: VShard) -> bool {
        !self.roots[vshard.index()].dirty_nodes.is_empty()
    }

    /// Dirty nodes of `vshard`: the number of blocks that [`capture`](Self::capture) needs.
    pub(crate) fn dirty_in(&self, vshard: VShard) -> usize {
        self.roots[vshard.index()].dirty_nodes.len()
    }

    /// Fixes the state of one virtual shard for a checkpoint: gives each dirty node a new address,
    /// bottom up, and returns the writes; the nodes stay in memory. The addresses that they give up
    /// go to `retired`. Afterwards nothing of the virtual shard is dirty, and the generation of its
    /// root is one higher. This takes no memory, however many nodes there are: their own bytes are
    /// written, and they are not changed meanwhile (`is_being_written`).
    pub(crate) fn capture(
        &mut self,
        vshard: VShard,
        mut alloc: impl FnMut(NodeKey) -> BlockAddr,
        retired: &mut Vec<BlockAddr>,
    ) -> Vec<NodeWrite> {
        let dirty = std::mem::take(&mut self.roots[vshard.index()].dirty_nodes);
        let mut writes = Vec::with_capacity(dirty.len());
        for (level, volume, prefix) in dirty {
            let key = NodeKey { vshard, volume, level, prefix };
            let idx = self.find(key).expect("a node that is dirty or pinned is in memory");
            self.dirty_count -= 1;
            let node = self.node_mut(idx);
            node.assert_state();
            assert!(node.dirty && !node.is_written, "{key:?} is listed as dirty, or written twice");
            node.dirty = false;
            retired.extend(node.place.take());
            let is_awaited = level == 0 && node.pins > 0;
            self.awaited_dirty -= u64::from(is_awaited);
            let empty = self.is_empty(idx);
            let child = if empty {
                Child::default()
            } else {
                let node = self.node_mut(idx);
                let place = alloc(key);
                node.place = Some(place);
                let crc = crc32c(&node.frame);
                node.is_written = true;
                node.assert_state();
                writes.push(NodeWrite { place, frame: node.frame.pin(), node: idx });
                Child::at(place, crc, level)
            };
            self.set_child(key, child);
            if empty {
                self.remove(idx);
            }
        }
        let root = &mut self.roots[vshard.index()];
        assert!(root.dirty_nodes.is_empty(), "{vshard:?} became dirty while it was captured");
        root.version.generation += 1;
        self.assert_counts();
        writes
    }

    fn set_child(&mut self, key: NodeKey, child: Child) {
        let volume = usize::from(key.volume.get());
        match self.parent(key) {
            Some(parent) => {
                let node = self.node_mut(parent);
                assert!(node.dirty, "the parent of a dirty node is dirty");
                let bytes =
                    node.frame.try_mut().expect("children are captured before their parent is");
                put(bytes, slot_of(key) * size_of::<Child>(), &child);
            }
            None => self.roots[key.vshard.index()].children[volume] = child,
        }
    }

    /// The root of `vshard`.
    pub(crate) fn root(&self, vshard: VShard) -> &Root {
        &self.roots[vshard.index()]
    }

    /// Encodes the root block of `vshard` as it is now.
    pub(crate) fn encode_root(
        &mut self,
        vshard: VShard,
        store_id: [u8; 16],
        redo: Lsn,
        checkpoint: u64,
        out: &mut [u8],
    ) {
        let root = &mut self.roots[vshard.index()];
        let head = RootHead {
            vshard,
            store_id,
            generation: root.version.generation,
            redo_lsn: redo,
            checkpoint,
        };
        root.version.crc = crate::format::root::encode(&head, &root.children, out);
    }
}

fn present(entry: Entry) -> Option<Entry> {
    entry.is_present().then_some(entry)
}

fn zeroed(arena: &mut Arena) -> Frame {
    let mut frame = arena.alloc(0).expect("frames for new nodes were admitted");
    frame.try_mut().expect("a new frame has no pins").fill(0);
    debug_assert_eq!(frame.len(), BLOCK);
    frame
}
