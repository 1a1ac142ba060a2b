//! Keeps nodes in memory: for pages that will change a leaf, for reads of a node's children, and
//! while the node is written.
//!
//! Invariants
//! 1. Only the pages that will change a leaf pin it, so pinned leaves are those that will be dirty.
//! 2. Pinned leaves are counted, since each will take a block of the data space, and so will the
//!    nodes above it.
//!
//! It does *not* know which pages these are, or when they change the leaf.

use super::{Map, parent_of, prefix, zeroed};
use crate::base::{NodeIdx, PageKey};
use crate::format::extent::NodeKey;
use crate::memory::Arena;

/// Levels above a leaf, in a tree that covers all keys.
const LEVELS_ABOVE: u64 = 8;

impl Map {
    /// Pins the parent of a node that is about to be read, so that it is in memory when the node
    /// arrives. `None`: the root block names the node, so nothing is pinned, and the tree may have
    /// another top when the node arrives.
    pub(crate) fn pin_parent(&mut self, key: NodeKey) -> Option<NodeIdx> {
        let parent = self.find(parent_of(key))?;
        self.node_mut(parent).pins += 1;
        Some(parent)
    }

    /// Pins the lowest node in memory on the path to the entry of `key`, and so all above it, while
    /// the leaf is made.
    pub(crate) fn pin_deepest(&mut self, key: PageKey) -> Option<NodeIdx> {
        let (vshard, page_index) = self.position(key);
        let top = self.top(vshard, key.volume);
        let levels = if top.is_present() { 0..=top.level } else { return None };
        let at = |level| NodeKey {
            vshard,
            volume: key.volume,
            level,
            prefix: prefix(page_index, level),
        };
        let node = levels.into_iter().find_map(|level| self.find(at(level)))?;
        assert!(self.node(node).key.level > 0, "a leaf that is there is pinned as such");
        self.node_mut(node).pins += 1;
        Some(node)
    }

    /// Makes sure that the leaf of `key` is in memory, and pins it. All nodes on the path that
    /// exist on disk must be in memory: a lookup has just found the entry or its absence.
    pub(crate) fn pin(&mut self, key: PageKey, arena: &mut Arena) -> NodeIdx {
        let (vshard, page_index) = self.position(key);
        let leaf = NodeKey { vshard, volume: key.volume, level: 0, prefix: prefix(page_index, 0) };
        if let Some(idx) = self.find(leaf) {
            self.pin_leaf(idx);
            return idx;
        }
        self.grow(vshard, key.volume, page_index, arena);
        let top = self.top(vshard, key.volume).level;
        for level in (0..=top).rev() {
            let at =
                NodeKey { vshard, volume: key.volume, level, prefix: prefix(page_index, level) };
            if self.find(at).is_none() {
                assert!(
                    self.named(at).is_none(),
                    "{at:?} is on the device: an empty one must not take its place"
                );
                self.insert(at, None, zeroed(arena));
            }
        }
        let idx = self.find(leaf).expect("a node that is dirty or pinned is in memory");
        self.pin_leaf(idx);
        idx
    }

    fn pin_leaf(&mut self, idx: NodeIdx) {
        let node = self.node_mut(idx);
        node.pins += 1;
        let (is_first, dirty) = (node.pins == 1, node.dirty);
        assert!(node.key.level == 0, "{:?} is pinned as a leaf", node.key);
        self.awaited += u64::from(is_first);
        self.awaited_dirty += u64::from(is_first && dirty);
        self.assert_counts();
    }

    /// Called when a checkpoint's write of a node has completed.
    pub(crate) fn written(&mut self, idx: NodeIdx) {
        let node = self.node_mut(idx);
        node.assert_state();
        assert!(node.is_written, "{:?} is not being written", node.key);
        node.is_written = false;
        self.note_idle(idx);
    }

    /// Pins the leaf of `key` if it is in memory.
    pub(crate) fn pin_if_resident(&mut self, key: PageKey) -> Option<NodeIdx> {
        let (vshard, page_index) = self.position(key);
        let leaf = NodeKey { vshard, volume: key.volume, level: 0, prefix: prefix(page_index, 0) };
        let idx = self.find(leaf)?;
        self.pin_leaf(idx);
        Some(idx)
    }

    /// Releases a pin.
    pub(crate) fn unpin(&mut self, idx: NodeIdx) {
        let node = self.node_mut(idx);
        assert!(node.pins > 0, "a pin too few on {:?}", node.key);
        node.pins -= 1;
        let (is_last, dirty) = (node.pins == 0 && node.key.level == 0, node.dirty);
        self.awaited -= u64::from(is_last);
        self.awaited_dirty -= u64::from(is_last && dirty);
        self.assert_counts();
        self.note_idle(idx);
    }

    /// Whether a checkpoint is writing the node: it must not be changed meanwhile.
    pub(crate) fn is_being_written(&self, idx: NodeIdx) -> bool {
        self.node(idx).frame.pins() > 0
    }

    /// The most nodes that pages on their way into the map will make dirty, with those above them.
    pub(crate) fn awaited_clean_count(&self) -> u64 {
        self.with_nodes_above(self.awaited - self.awaited_dirty)
    }

    /// The same while a checkpoint is under way: it may write a dirty leaf before the page changes
    /// it, so dirty leaves count as well.
    pub(crate) fn awaited_count(&self) -> u64 {
        self.with_nodes_above(self.awaited)
    }

    fn with_nodes_above(&self, leaves: u64) -> u64 {
        leaves + (leaves * LEVELS_ABOVE).min(self.interior)
    }
}
