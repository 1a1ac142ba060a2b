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
            let is_listed = self.roots[key.vshard.index()].dirty_nodes.contains(&(key.level, key.volume, key.prefix));
            if node.dirty != is_listed {
                return Err(format!("{key:?} is dirty: {}, listed as dirty: {is_listed}", node.dirty));
            }
        }
        Ok(())
    }
}
