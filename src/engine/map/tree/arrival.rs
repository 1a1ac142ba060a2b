//! Decides whether a node that arrives from the device is still part of the tree.
//!
//! The tree does not wait for the read of a node. The parent of the node is pinned meanwhile, but
//! the top of a tree has no parent: while it is being read (or waits for memory to be read into)
//! the tree may grow above it, and the new top may be written and evicted before the old one
//! arrives.
//!
//! Invariants
//! 1. A node comes into memory only as the one that its parent in memory, or the root block, names
//!    at that moment: at the same address, with the same checksum, at the same level. Any other is
//!    dropped, and the requests that wait for it look it up again.
//! 2. Only the top that the root block names may have no parent in memory. If it were taken for the
//!    top, a node further down would overwrite the root, and all that the tree
//!    above it names would be lost.
//! 3. A lookup is repeated at most eight times: a node is dropped only after its tree has grown,
//!    and a tree grows at most eight times.

use super::{Map, parent_of, slot_of};
use crate::base::NodeIdx;
use crate::format::extent::NodeKey;
use crate::format::node::{self, Child};
use crate::memory::Frame;

impl Map {
    /// Takes a node that was read from the address in `child`, with the right checksum. Returns
    /// false, and drops the node, if the tree no longer names it there.
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

    /// The child entry of a node in its parent, or in the root block; `None` if there is no such
    /// node, or if its parent is not in memory.
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

    /// The parent of a node that is in memory, or comes into it; `None` for the top.
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
