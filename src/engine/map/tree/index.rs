//! Finds the nodes in memory by key.
//!
//! Invariants
//! 1. The index holds exactly the nodes of the table, each once. It has only their numbers, and
//!    compares keys in the table, so it takes a fifth of the memory that keys would.
//!
//! It does not know why a node is in memory, or for how long.

use super::Map;
use crate::base::NodeIdx;
use crate::format::extent::NodeKey;
use hashbrown::HashTable;
use std::hash::BuildHasher;

impl Map {
    /// The node, if it is in memory.
    pub(super) fn find(&self, key: NodeKey) -> Option<NodeIdx> {
        self.index.find(self.hasher.hash_one(key), |idx| self.node(*idx).key == key).copied()
    }

    /// Adds a node that is in the table.
    pub(super) fn enter(&mut self, key: NodeKey, idx: NodeIdx) {
        assert!(self.find(key).is_none(), "{key:?} is in memory once");
        let (nodes, hasher) = (&self.nodes, &self.hasher);
        let hash_of = |idx: &NodeIdx| {
            hasher.hash_one(nodes[idx.index()].as_ref().expect("a node in the index exists").key)
        };
        self.index.insert_unique(hasher.hash_one(key), idx, hash_of);
    }

    /// Removes the node of that key, which was `idx` and has left the table.
    pub(super) fn left(&mut self, key: NodeKey, idx: NodeIdx) {
        let entry = self.index.find_entry(self.hasher.hash_one(key), |at| *at == idx);
        entry.expect("a node in memory is in the index").remove();
    }

    /// Makes room for `nodes` nodes from the start, so that no table grows, and is in memory twice,
    /// while the cache fills. The unused part takes no memory.
    pub(crate) fn with_capacity(mut self, nodes: u32) -> Self {
        self.nodes.reserve_exact(nodes as usize);
        self.noted.reserve_exact(nodes as usize);
        assert!(self.index.is_empty(), "a map begins with nothing in memory");
        self.index = HashTable::with_capacity(nodes as usize);
        self
    }
}
