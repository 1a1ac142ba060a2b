//! Removes nodes of which every page was freed, whatever is in memory below them.
//!
//! A commit that frees an absent page, or that fails, makes nodes in memory on the path to that
//! page. They are clean and empty, and the device has no copy of them: a node above them counts as
//! empty.

use super::{Map, NODE_BITS};
use crate::base::NodeIdx;
use crate::format::extent::NodeKey;

impl Map {
    /// Whether a node names nothing and is not needed. Drops nodes below it that were never
    /// written, hold nothing and are not pinned.
    pub(super) fn is_empty(&mut self, idx: NodeIdx) -> bool {
        let node = self.node(idx);
        if node.pins > 0 || node.is_written || node.frame.iter().any(|byte| *byte != 0) {
            return false;
        }
        let key = node.key;
        for slot in 0..1u64 << NODE_BITS {
            if self.node(idx).children == 0 {
                return true;
            }
            let below =
                NodeKey { level: key.level - 1, prefix: key.prefix << NODE_BITS | slot, ..key };
            let Some(child) = self.find(below) else { continue };
            let node = self.node(child);
            if node.dirty || node.place.is_some() || !self.is_empty(child) {
                return false;
            }
            self.remove(child);
        }
        self.node(idx).children == 0
    }
}
