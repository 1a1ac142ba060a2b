//! Decides which nodes may leave memory, together with the eviction policy.
//!
//! Invariants
//! 1. A node can go if it is clean, not pinned and has no children in memory, so a parent goes only
//!    after its children.
//! 2. A node that becomes able to go is put into `idle`, unless the policy lists it already; the
//!    policy takes it from there before it searches. A node is in `idle` at most once, so that list
//!    is not longer than the table of nodes.

use super::{Map, Node, parent_of};
use crate::base::NodeIdx;
use crate::memory::{Eviction, NODES_COUNTED, Owner, Residency, Standing};
use smallvec::SmallVec;
use std::hash::BuildHasher;

impl Node {
    fn can_go(&self) -> bool {
        !self.is_needed() && self.children == 0
    }

    /// Whether it must stay in memory even without children there.
    fn is_needed(&self) -> bool {
        self.dirty || self.is_written || self.pins > 0
    }
}

impl Map {
    /// Called when a reference to the node ends, or when it is new: if it can go, the policy will
    /// list it.
    pub(super) fn note_idle(&mut self, idx: NodeIdx) {
        let Some(node) = self.nodes[idx.index()].as_ref() else { return };
        if node.can_go()
            && !node.residency.is_listed()
            && !std::mem::replace(&mut self.noted[idx.index()], true)
        {
            self.idle.push(idx);
        }
    }

    /// Gives the policy the nodes that have become idle since the last call.
    pub(crate) fn list_idle(&mut self, policy: &mut Eviction) {
        while let Some(idx) = self.idle.pop() {
            self.noted[idx.index()] = false;
            let Some(node) = self.nodes[idx.index()].as_mut() else { continue };
            if node.can_go() && !node.residency.is_listed() {
                let hash = self.hasher.hash_one(node.key);
                policy.list(node.frame.block(), Owner::Node(idx), &mut node.residency, hash);
            }
        }
    }

    /// The state of node `idx`, if `block` holds it.
    pub(crate) fn standing(&self, idx: NodeIdx, block: u32) -> Standing {
        match self.nodes.get(idx.index()) {
            Some(Some(node)) if node.frame.block() == block => match node.can_go() {
                false => Standing::Referenced,
                true if node.frame.pins() > 0 => Standing::Pinned,
                true => Standing::Idle,
            },
            _ => Standing::Gone,
        }
    }

    /// The number of further nodes that could go if `nodes`, which can go, went: those above them
    /// that nothing else keeps in memory.
    pub(crate) fn idle_above(&self, nodes: &[NodeIdx]) -> u32 {
        let mut gone: SmallVec<[NodeIdx; NODES_COUNTED]> = nodes.iter().copied().collect();
        // Parents, each with the children that would be gone.
        let mut parents: SmallVec<[(NodeIdx, u16); NODES_COUNTED]> = SmallVec::new();
        let mut idle = 0;
        while let Some(node) = gone.pop() {
            let Some(parent) = self.find(parent_of(self.node(node).key)) else { continue };
            let at = parents.iter().position(|(of, _)| *of == parent).unwrap_or_else(|| {
                parents.push((parent, 0));
                parents.len() - 1
            });
            parents[at].1 += 1;
            let of = self.node(parent);
            if parents[at].1 == of.children && !of.is_needed() && of.frame.pins() == 0 {
                idle += 1;
                gone.push(parent);
            }
        }
        idle
    }

    /// The policy's record of node `idx`.
    pub(crate) fn residency(&mut self, idx: NodeIdx) -> &mut Residency {
        &mut self.node_mut(idx).residency
    }

    /// Drops node `idx`, which can go; returns a hash of its key.
    pub(crate) fn evict(&mut self, idx: NodeIdx) -> u64 {
        let node = self.remove(idx);
        assert!(node.can_go(), "{:?} was evicted while something needed it", node.key);
        self.hasher.hash_one(node.key)
    }

    /// # Errors
    /// A node that could go and that the policy does not know: its memory is lost.
    #[cfg(any(test, feature = "sim"))]
    pub(crate) fn audit_listed(&self, policy: &Eviction) -> Result<(), String> {
        for (no, node) in self.nodes.iter().enumerate() {
            let Some(node) = node else { continue };
            let owner = policy.owner_of(node.frame.block());
            let is_listed =
                node.residency.is_listed() && owner == Some(Owner::Node(NodeIdx::new(no)));
            if node.can_go() && !is_listed && !self.noted[no] {
                return Err(format!(
                    "{:?} could go, and the eviction policy does not list it: {owner:?}",
                    node.key
                ));
            }
        }
        Ok(())
    }

    /// The nodes that can go now.
    #[cfg(test)]
    pub(crate) fn idle(&self) -> Vec<NodeIdx> {
        let can_go = |(no, node): (usize, &Option<Node>)| {
            node.as_ref().is_some_and(Node::can_go).then_some(NodeIdx::new(no))
        };
        self.nodes.iter().enumerate().filter_map(can_go).collect()
    }

    /// Drops one node that can go, without a policy.
    #[cfg(test)]
    pub(crate) fn evict_one(&mut self) -> bool {
        let no = self.nodes.iter().position(|node| node.as_ref().is_some_and(Node::can_go));
        no.inspect(|no| _ = self.evict(NodeIdx::new(*no))).is_some()
    }
}
