//! What a shard waits for, in words: for messages about runs that hang, and for debuggers.

use super::Shard;
#[cfg(any(test, feature = "sim"))]
use super::Token;
#[cfg(any(test, feature = "sim"))]
use crate::base::Lsn;

#[cfg(any(test, feature = "sim"))]
impl Shard {
    /// Which request got which LSN, in order, since last asked: also for commits that are never answered.
    pub fn take_drawn(&mut self) -> Vec<(Token, Lsn)> {
        std::mem::take(&mut self.drawn)
    }

    /// What it waits for, for the message about a run that hangs.
    pub fn whereabouts(&self) -> String {
        format!(
            "{:?} with {} left and {} coming, {} pending, {} ready, {} finished, {} ops, {} waiting for durability, \
             open group of {} urgent {}, {} groups in flight, flushing {}, {} dirty, {} captures, {} page writes, \
             {} blocks reserved, {} dirty nodes, checkpoint {:?}, {} extents being compacted, {} moves, growing {}, \
             stalled for space {}, {} segments free, {} frames ({}), {:?}, next {} watermark {}, failed {:?}, \
             closing {}",
            self.extents.space(),
            self.extents.left_count(),
            self.extents.coming(),
            self.pending.len(),
            self.ready.len(),
            self.finished.len(),
            self.ops.len(),
            self.waiting.len(),
            self.log.open.slots.len(),
            self.log.open.urgent,
            self.log.in_flight.len(),
            self.flushing,
            self.dirty.len(),
            self.captures.len(),
            self.page_writes,
            self.reserved_blocks,
            self.map.dirty_count(),
            self.checkpoint,
            self.compactor.count(),
            self.moves.len(),
            self.space.growing,
            self.space.stalled,
            self.log.free_segments(),
            self.arena.blocks(),
            self.memory(),
            self.blocked,
            self.order.next(),
            self.order.watermark(),
            self.failed,
            self.closing.is_some(),
        )
    }
}

impl std::fmt::Debug for Shard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shard")
            .field("id", &self.id)
            .field("next", &self.order.next())
            .field("watermark", &self.order.watermark())
            .field("pending", &self.pending.len())
            .field("ready", &self.ready.len())
            .field("waiting", &self.waiting.len())
            .field("ops", &self.ops.len())
            .field("groups_in_flight", &self.log.in_flight.len())
            .field("open_group", &self.log.open.first_lsn())
            .field("free_segments", &self.log.free_segments())
            .field("flushing", &self.flushing)
            .field("dirty", &self.dirty.len())
            .field("captures", &self.captures.len())
            .field("reserved_blocks", &self.reserved_blocks)
            .field("dirty_nodes", &self.map.dirty_count())
            .field("memory", &self.memory())
            .field("checkpoint", &self.checkpoint)
            .field("space", &self.extents.space())
            .field("left", &self.extents.left_count())
            .field("compacting", &self.compactor.count())
            .field("growing", &self.space.growing)
            .field("failed", &self.failed)
            .finish()
    }
}
