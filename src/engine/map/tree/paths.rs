//! Counts the nodes that changes need, from their leaves to the top, before any of them is pinned.
//!
//! Invariants
//! 1. Nothing is read, created or marked.
//! 2. The quick answers count a node once for each page below it, so they are upper bounds;
//!    [`Map::nodes_for`] counts each once.

use super::{Map, prefix};
use crate::base::PageKey;
use crate::format::extent::NodeKey;
use hashbrown::HashSet;

impl Map {
    /// Nodes from the leaf of `key` to the root, which a change may dirty.
    pub(crate) fn path_len(&self, key: PageKey) -> u64 {
        let (vshard, page_index) = self.position(key);
        let mut top = self.top(vshard, key.volume).level;
        while prefix(page_index, top) != 0 {
            top += 1;
        }
        u64::from(top) + 1
    }

    /// Nodes that [`pin`](Self::pin) would have to create for `key`: the number of frames that it
    /// takes.
    pub(crate) fn missing_nodes(&self, key: PageKey) -> u32 {
        let (vshard, page_index) = self.position(key);
        let mut top = self.top(vshard, key.volume).level;
        while prefix(page_index, top) != 0 {
            top += 1;
        }
        let at = |level| NodeKey {
            vshard,
            volume: key.volume,
            level,
            prefix: prefix(page_index, level),
        };
        let path = (0..=top).take_while(|level| self.find(at(*level)).is_none()).count() as u32;
        // A tree that grows gets its new tops above the old one too.
        path + u32::from(top - self.top(vshard, key.volume).level)
    }

    /// Nodes that must be in memory at the same time so that all of `keys` can be changed, and the
    /// number of those that are not.
    pub(crate) fn nodes_for(&self, keys: impl Iterator<Item = PageKey>) -> (u32, u32) {
        let mut nodes: HashSet<NodeKey, foldhash::fast::FixedState> = HashSet::default();
        for key in keys {
            let (vshard, page_index) = self.position(key);
            let old = self.top(vshard, key.volume).level;
            let mut top = old;
            while prefix(page_index, top) != 0 {
                top += 1;
            }
            let node = |level, prefix| NodeKey { vshard, volume: key.volume, level, prefix };
            nodes.extend((0..=top).map(|level| node(level, prefix(page_index, level))));
            // A tree that grows gets its new tops above the old one too.
            nodes.extend((old + 1..=top).map(|level| node(level, 0)));
        }
        let missing = nodes.iter().filter(|node| self.find(**node).is_none()).count();
        (nodes.len() as u32, missing as u32)
    }
}
