//! The map's counts, counted anew: for tests.

use super::{Map, parent_of};
use crate::format::extent::NodeKey;
use crate::types::VShard;
use std::collections::BTreeMap;

impl Map {
    /// # Errors
    /// The count that has drifted.
    pub(crate) fn audit(&self) -> Result<(), String> {
        let dirty: usize = (0..self.roots.len()).map(|i| self.dirty_in(VShard::new(i as u16))).sum();
        if dirty != self.dirty_count {
            return Err(format!("{} dirty nodes by what is kept, {dirty} counted", self.dirty_count));
        }
        let mut children_of: BTreeMap<NodeKey, u32> = BTreeMap::new();
        self.index.keys().for_each(|key| *children_of.entry(parent_of(*key)).or_default() += 1);
        for (key, idx) in &self.index {
            let node = self.node(*idx);
            let children = children_of.get(key).copied().unwrap_or(0);
            if node.key != *key || node.children != children {
                return Err(format!(
                    "{key:?}: {} children in memory by what is kept, {children} counted",
                    node.children
                ));
            }
            let parent = self.index.get(&parent_of(*key)).map(|parent| self.node(*parent));
            if parent.is_some_and(|parent| node.dirty && !parent.dirty) {
                return Err(format!("{key:?} is dirty, and its parent is not"));
            }
            // Where it was last written: else it would be read from there once it has left memory.
            if node.place.is_some() && node.place != self.named(*key).map(|child| child.place()) {
                return Err(format!("{key:?} is at {:?}, and what names it says something else", node.place));
            }
            let is_listed = self.roots[key.vshard.index()].dirty_nodes.contains(&(key.level, key.volume, key.prefix));
            if node.dirty != is_listed {
                return Err(format!("{key:?} is dirty: {}, listed as dirty: {is_listed}", node.dirty));
            }
        }
        Ok(())
    }
}
