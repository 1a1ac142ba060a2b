//! Describes what a shard waits for: for messages about runs that hang, and for debuggers.

use super::Shard;
#[cfg(any(test, feature = "sim"))]
use super::Token;
#[cfg(any(test, feature = "sim"))]
use crate::base::Lsn;

#[cfg(any(test, feature = "sim"))]
impl Shard {
    /// Which request got which LSN, in order, since the last call, including commits that are never
    /// answered.
    pub fn take_allocated(&mut self) -> Vec<(Token, Lsn)> {
        std::mem::take(&mut self.ctx.allocated)
    }

    /// Describes what the shard waits for.
    pub fn dump_state(&self) -> String {
        format!(
            "{:?} with {} pending free and {} coming, {} pending, {} ready, {} finished, {} ops, \
             {} waiting for durability, open group of {} urgent {}, {} groups in flight, flushing \
             {}, {} dirty, {} versions on their way, {} page writes, {} blocks reserved, {} dirty \
             nodes, checkpoint {:?}, {} extents being compacted, {} moves, growing {}, stalled for \
             space {}, {} segments free, {} frames ({}), {:?}, next {} watermark {}, failed {:?}, \
             closing {}",
            self.space.extents.space(),
            self.space.extents.pending_free_count(),
            self.space.extents.coming(),
            self.requests.pending.len(),
            self.requests.queued().0,
            self.requests.queued().1,
            self.ctx.ops.len(),
            self.watermark.replies_count(),
            self.log.open.images.len(),
            self.log.open.urgent,
            self.log.in_flight.len(),
            self.log.flushing,
            self.writeback.counts().dirty,
            self.writeback.counts().versions,
            self.writeback.counts().page_writes,
            self.reservations.dirty_blocks,
            self.map.dirty_count(),
            self.checkpoint,
            self.space.compaction.compactor.count(),
            self.space.compaction.moves.len(),
            self.space.growing,
            self.space.stalled,
            self.log.free_segments(),
            self.ctx.arena.blocks(),
            self.memory(),
            self.ctx.blocked,
            self.ctx.order.next(),
            self.ctx.order.watermark(),
            self.ctx.failed,
            self.life.closing.is_some(),
        )
    }
}

impl std::fmt::Debug for Shard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shard")
            .field("id", &self.ctx.id)
            .field("next", &self.ctx.order.next())
            .field("watermark", &self.ctx.order.watermark())
            .field("pending", &self.requests.pending.len())
            .field("ready", &self.requests.queued().0)
            .field("waiting", &self.watermark.replies_count())
            .field("ops", &self.ctx.ops.len())
            .field("groups_in_flight", &self.log.in_flight.len())
            .field("open_group", &self.log.open.first_lsn())
            .field("free_segments", &self.log.free_segments())
            .field("flushing", &self.log.flushing)
            .field("dirty", &self.writeback.counts().dirty)
            .field("versions", &self.writeback.counts().versions)
            .field("reserved_blocks", &self.reservations.dirty_blocks)
            .field("dirty_nodes", &self.map.dirty_count())
            .field("memory", &self.memory())
            .field("checkpoint", &self.checkpoint)
            .field("space", &self.space.extents.space())
            .field("pending_free", &self.space.extents.pending_free_count())
            .field("compacting", &self.space.compaction.compactor.count())
            .field("growing", &self.space.growing)
            .field("failed", &self.ctx.failed)
            .finish()
    }
}
