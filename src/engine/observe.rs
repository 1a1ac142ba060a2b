//! Shows the simulator the inside of a shard: what each read is for, what waits for memory, and how
//! many of everything there are.
//!
//! Invariants
//! 1. Nothing here changes anything.
//! 2. It counts what is there, and relies on no kept count.
//!
//! It does *not* exist in a release build, and judges nothing.

use super::{OpKind, Shard};
use crate::base::OpIdx;
use crate::format::extent::NodeKey;
use crate::io::OpId;

/// Levels of the tree of a virtual shard and a volume: none, or that of its top and one more.
type Levels = u8;

/// A read of a map node in flight, and what the map now says about the node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NodeLoad {
    /// Whether the root block names the node.
    pub(crate) is_top: bool,
    /// The levels of its tree.
    pub(crate) levels: Levels,
    /// Whether its parent is in memory, or it is the top.
    pub(crate) has_parent: bool,
    /// Whether the map names this node at the place from which it is read.
    pub(crate) is_current: bool,
}

/// The number of everything that a shard keeps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    /// Frames of the arena.
    pub(crate) frames: u64,
    /// Pages in the table, and how many of them have their bytes or a change on its way.
    pub(crate) pages: u64,
    pub(crate) pages_needed: u64,
    /// Map nodes in memory.
    pub(crate) nodes: u64,
    /// Requests in progress here, including parts of commits over shards, and the pages that they
    /// name.
    pub(crate) requests: u64,
    pub(crate) requests_pages: u64,
    /// Commits over shards that this shard leads.
    pub(crate) cross: u64,
    /// Replies that wait for the watermark.
    pub(crate) waiting: u64,
    /// Nodes that something waits for, and everything that waits for one.
    pub(crate) node_waits: u64,
    pub(crate) node_waiters: u64,
    /// Reads that have not been submitted.
    pub(crate) reads_wanted: u64,
    /// Operations in flight.
    pub(crate) ops: u64,
    /// Versions on their way to their places.
    pub(crate) versions: u64,
}

impl Shard {
    /// Whether operation `id` reads pages for requests.
    pub(crate) fn is_page_read(&self, id: OpId) -> bool {
        matches!(self.ctx.ops.get(OpIdx::new(id.0 as usize)), Some(OpKind::PageRead(_)))
    }

    /// The read of a map node, if operation `id` is one.
    pub(crate) fn node_load(&self, id: OpId) -> Option<NodeLoad> {
        let Some(OpKind::NodeRead(wanted)) = self.ctx.ops.get(OpIdx::new(id.0 as usize)) else {
            return None;
        };
        let (key, place) = (wanted.key, wanted.child.place());
        let top = self.map.root(key.vshard).children[usize::from(key.volume.get())];
        let is_top = top.is_present() && top.level == key.level;
        let levels = if top.is_present() { top.level + 1 } else { 0 };
        let above = NodeKey { level: key.level + 1, prefix: key.prefix >> 8, ..key };
        let has_parent = is_top || self.map.is_resident(above);
        let is_current =
            matches!(self.map.find_node(key), Ok(Some(child)) if child.place() == place);
        Some(NodeLoad { is_top, levels, has_parent, is_current })
    }

    /// The levels of this shard's highest tree.
    pub(crate) fn levels_most(&self) -> Levels {
        let vshards = self.ctx.shard_map.owned_by(self.ctx.id);
        let tops = vshards.flat_map(|vshard| self.map.root(vshard).children.iter());
        tops.filter(|top| top.is_present()).map(|top| top.level + 1).max().unwrap_or(0)
    }

    /// Whether something waited for memory at the end of the last turn.
    pub(crate) fn is_short_of_memory(&self) -> bool {
        self.ctx.blocked.lacks_memory()
    }

    /// Commits, and parts of commits, that have all their pages and have not been carried out.
    pub(crate) fn commits_ready(&self) -> usize {
        self.requests.queued().0
    }

    /// Whether a checkpoint waits for memory.
    pub(crate) fn is_checkpoint_starved(&self) -> bool {
        self.ctx.blocked.is_checkpoint_starved()
    }

    /// Checkpoints that have ended since the store was opened.
    pub(crate) fn checkpoints_ended(&self) -> u64 {
        self.ctx.stats.checkpoints
    }

    /// Blocks of pages and nodes that have come from the device.
    pub(crate) fn blocks_read(&self) -> u64 {
        self.ctx.stats.checksums
    }

    /// Segments of the log that may be used.
    pub(crate) fn log_segments(&self) -> u64 {
        self.log.segments_count() as u64
    }

    /// Frames of the arena.
    pub(crate) fn frames(&self) -> u64 {
        self.ctx.arena.blocks().into()
    }

    /// Takes a frame away from the shard.
    pub(crate) fn take_frame(&mut self) -> Option<crate::memory::Frame> {
        self.ctx.arena.alloc(0)
    }

    /// Counts everything.
    pub(crate) fn counts(&self) -> Counts {
        let pages = || self.cache.table.pages.iter().map(|(_, page)| page);
        let needed = pages().filter(|page| {
            page.frame.is_some()
                || page.versions > 0
                || page.image.is_some()
                || page.dirty_from.is_some()
                || page.queued
        });
        let pages_needed = needed.count() as u64;
        Counts {
            frames: self.ctx.arena.blocks().into(),
            pages: self.cache.table.pages.len() as u64,
            pages_needed,
            nodes: self.map.nodes_count().into(),
            requests: self.requests.pending.len() as u64,
            requests_pages: self
                .requests
                .pending
                .iter()
                .map(|(_, pending)| pending.pages.len() as u64)
                .sum(),
            cross: self.coordinator.commits_count() as u64,
            waiting: self.watermark.replies_count() as u64,
            node_waits: self.cache.node_waiters.len() as u64,
            node_waiters: self
                .cache
                .node_waiters
                .values()
                .map(|waiters| waiters.list.len() as u64)
                .sum(),
            reads_wanted: self.cache.wanted.pages.len() as u64,
            ops: self.ctx.ops.len() as u64,
            versions: self.writeback.counts().versions as u64,
        }
    }
}
