//! Walks the leaves of a volume in order, and finds the pages that they name.
//!
//! Invariants
//! 1. Parts without nodes are skipped at once; nodes on the way must be in memory,
//!    one after another.
//! 2. A node that no checkpoint has written yet is found too: its parent does not name it, but the
//!    index does.
//!
//! It does *not* know pages whose newest version is not in the map.

use super::{LEAF_BITS, Map, NODE_BITS, prefix, slot_in};
use crate::base::{VShard, VolumeId};
use crate::format::extent::NodeKey;
use crate::format::node::{self, Child};

/// The result of a search for leaves.
pub(crate) enum NextLeaf {
    /// The leaf is in memory; carries the first requested index in it.
    Leaf(u64),
    /// This node must be read first, from here, with this checksum.
    Load(NodeKey, Child),
    /// There is no such leaf.
    None,
}

impl Map {
    /// The first leaf of a volume in which a page with an index of `from..=last` may be.
    pub(crate) fn next_leaf(
        &mut self,
        vshard: VShard,
        volume: VolumeId,
        mut from: u64,
        last: u64,
    ) -> NextLeaf {
        let top = self.top(vshard, volume);
        let mut level = top.level;
        let mut child = top;
        while top.is_present() && from <= last && prefix(from, top.level) == 0 {
            let at = NodeKey { vshard, volume, level, prefix: prefix(from, level) };
            let Some(idx) = self.find(at) else { return NextLeaf::Load(at, child) };
            self.node_mut(idx).residency.used();
            if level == 0 {
                return NextLeaf::Leaf(from);
            }
            let below = |slot: usize| NodeKey {
                level: level - 1,
                prefix: at.prefix << NODE_BITS | slot as u64,
                ..at
            };
            let node = self.node(idx);
            let first = slot_in(from, level);
            let found = (first..1 << NODE_BITS)
                .map(|slot| (slot, node::child(&node.frame, slot)))
                .find(|(slot, child)| {
                    // A leaf that no checkpoint has written yet is known to the index only.
                    child.is_present() || (node.children > 0 && self.find(below(*slot)).is_some())
                });
            if let Some((slot, next)) = found {
                if slot > first {
                    from = below(slot).prefix << (LEAF_BITS + NODE_BITS * u32::from(level - 1));
                }
                (level, child) = (level - 1, next);
            } else {
                // Continue after this node, from the top.
                let shift = LEAF_BITS + NODE_BITS * u32::from(level);
                let Some(next) = (at.prefix + 1)
                    .checked_shl(shift)
                    .filter(|next| next >> shift == at.prefix + 1)
                else {
                    return NextLeaf::None;
                };
                (from, level, child) = (next, top.level, top);
            }
        }
        NextLeaf::None
    }

    /// A bit for each page of the leaf of `page_index`: whether the map names it. `None`: the leaf
    /// is not in memory.
    pub(crate) fn leaf_bits(
        &self,
        vshard: VShard,
        volume: VolumeId,
        page_index: u64,
    ) -> Option<u64> {
        let idx = self.find(NodeKey { vshard, volume, level: 0, prefix: prefix(page_index, 0) })?;
        let frame = &self.node(idx).frame;
        Some(
            (0..1 << LEAF_BITS)
                .filter(|slot| node::entry(frame, *slot).is_present())
                .map(|slot| 1 << slot)
                .sum(),
        )
    }
}
