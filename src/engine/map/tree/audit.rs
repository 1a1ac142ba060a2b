//! Recounts what the map counts and compares the two: for tests.

use super::{Map, parent_of};
use crate::base::{NodeIdx, VShard};
use crate::format::extent::NodeKey;
use std::collections::BTreeMap;

impl Map {
    /// # Errors
    /// The count that has drifted.
    pub(crate) fn audit(&self) -> Result<(), String> {
        let dirty: usize =
            (0..self.roots.len()).map(|i| self.dirty_in(VShard::new(i as u16))).sum();
        if dirty != self.dirty_count {
            return Err(format!(
                "{} dirty nodes by what is kept, {dirty} counted",
                self.dirty_count
            ));
        }
        let mut children_of: BTreeMap<NodeKey, u16> = BTreeMap::new();
        let nodes = || {
            self.nodes
                .iter()
                .enumerate()
                .filter_map(|(no, node)| Some((NodeIdx::new(no), node.as_ref()?)))
        };
        nodes().for_each(|(_, node)| *children_of.entry(parent_of(node.key)).or_default() += 1);
        if self.index.len() != nodes().count() {
            return Err(format!(
                "{} nodes in the index, {} in memory",
                self.index.len(),
                nodes().count()
            ));
        }
        let awaited = || nodes().filter(|(_, node)| node.pins > 0 && node.key.level == 0);
        let awaited_dirty = awaited().filter(|(_, node)| node.dirty).count() as u64;
        let interior = nodes().filter(|(_, node)| node.key.level > 0).count() as u64;
        let kept = [self.awaited, self.awaited_dirty, self.interior];
        let counted = [awaited().count() as u64, awaited_dirty, interior];
        if kept != counted {
            return Err(format!(
                "leaves to be changed, dirty ones, and nodes above leaves: {kept:?} kept, \
                 {counted:?} counted"
            ));
        }
        for (idx, node) in nodes() {
            let key = node.key;
            let children = children_of.get(&key).copied().unwrap_or(0);
            if self.find(key) != Some(idx) || node.children != children {
                return Err(format!(
                    "{key:?}: {} children in memory by what is kept, {children} counted",
                    node.children
                ));
            }
            let parent = self.find(parent_of(key)).map(|parent| self.node(parent));
            if parent.is_some_and(|parent| node.dirty && !parent.dirty) {
                return Err(format!("{key:?} is dirty, and its parent is not"));
            }
            // The entry must state where it was last written: otherwise it would be read from
            // elsewhere once it has left memory.
            if node.place.is_some() && node.place != self.named(key).map(|child| child.place()) {
                return Err(format!(
                    "{key:?} is at {:?}, and what names it says something else",
                    node.place
                ));
            }
            let is_listed = self.roots[key.vshard.index()]
                .dirty_nodes
                .contains(&(key.level, key.volume, key.prefix));
            if node.dirty != is_listed {
                return Err(format!(
                    "{key:?} is dirty: {}, listed as dirty: {is_listed}",
                    node.dirty
                ));
            }
        }
        Ok(())
    }
}
