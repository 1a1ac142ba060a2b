//! Nodes that arrive from the device: which of them are still part of the tree.
//!
//! A read takes as long as it takes, and the tree does not wait for it. The parent of the node is
//! pinned meanwhile, but the top of a tree has none: while it is being read (or waits for memory to
//! be read into) the tree may grow above it, and the new top may be written and evicted before the
//! old one arrives.
//!
//! Invariants
//! 1. A node comes into memory only as the one that its parent in memory, or the root block, names
//!    at that moment: at the same place, with the same checksum, at the same level. Any other is
//!    dropped, and who waits for it looks up again.
//! 2. Having no parent in memory is lawful for the top that the root block names, and for no other
//!    node: taken for a top, a node further down would overwrite the root, and all that the tree
//!    above it names would be lost.
//! 3. Looking up again ends: a node is dropped only after its tree has grown, and a tree grows
//!    eight times at most.

use super::{Map, parent_of, slot_of};
use crate::base::NodeIdx;
use crate::format::extent::NodeKey;
use crate::format::node::{self, Child};
use crate::memory::Frame;

impl Map {
    /// Takes a node that was read from the place of `child`, and whose checksum was right. False:
    /// the tree does not name it there any more, and it was dropped.
    pub(crate) fn insert_loaded(&mut self, key: NodeKey, child: Child, frame: Frame) -> bool {
        let is_current = self.names(key, child) || planted!(OrphanInserted);
        if is_current && self.find(key).is_none() {
            self.insert(key, Some(child.place()), frame);
        }
        is_current
    }

    /// Whether the tree names node `key` as `child`, as far as that can be told without a read.
    pub(crate) fn names(&self, key: NodeKey, child: Child) -> bool {
        self.named(key) == Some(child)
    }

    /// What the parent of a node, or the root block, says of it; `None`: there is no such node, or
    /// its parent is not in memory.
    pub(super) fn named(&self, key: NodeKey) -> Option<Child> {
        let child = match self.find(parent_of(key)) {
            Some(parent) => node::child(&self.node(parent).frame, slot_of(key)),
            None if self.is_top(key) => self.top(key.vshard, key.volume),
            None => return None,
        };
        child.is_present().then_some(child)
    }

    /// Whether the root block names the node.
    fn is_top(&self, key: NodeKey) -> bool {
        let top = self.top(key.vshard, key.volume);
        top.is_present() && top.level == key.level && key.prefix == 0
    }

    /// The parent of a node in memory, or of one that comes into it; `None`: it is the top.
    pub(super) fn parent(&self, key: NodeKey) -> Option<NodeIdx> {
        let parent = self.find(parent_of(key));
        assert!(
            parent.is_some() || self.is_top(key) || planted!(OrphanInserted),
            "{key:?} has no parent in memory, and is not the top of its tree, {}",
            self.top(key.vshard, key.volume).level
        );
        parent
    }
}
