//! Counters of a shard.

/// Counters of one shard since it was opened.
#[derive(Clone, Debug, Default)]
pub struct ShardStats {
    /// Commits applied.
    pub commits: u64,
    /// Pages read by callers.
    pub page_reads: u64,
    /// Of those, found in memory.
    pub cache_hits: u64,
    /// Whole pages written by callers.
    pub page_writes: u64,
    /// Byte ranges written by callers.
    pub patches: u64,
    /// Pages freed by callers.
    pub frees: u64,
    /// Log groups written.
    pub log_groups: u64,
    /// Bytes of log written, headers, padding and inline pages included.
    pub log_bytes: u64,
    /// Flushes submitted.
    pub flushes: u64,
    /// Page images written to the data space.
    pub pages_written: u64,
    /// Write operations that carried them.
    pub page_write_ops: u64,
    /// Changes of a page that needed no device write of their own, because a later one covered them.
    pub absorbed_writes: u64,
    /// Map nodes written.
    pub nodes_written: u64,
    /// Device reads of pages and nodes.
    pub device_reads: u64,
    /// Checksums computed.
    pub checksums: u64,
    /// Checkpoints completed.
    pub checkpoints: u64,
    /// Extents whose pages were moved away.
    pub extents_compacted: u64,
    /// Pages moved by compaction.
    pub pages_moved: u64,
    /// Extents in the data space.
    pub extents_total: u64,
    /// Of those, free.
    pub extents_free: u64,
    /// Blocks in use by the newest page map, or held for an older one.
    pub blocks_live: u64,
    /// Commits refused with `Conflict`.
    pub conflicts: u64,
    /// Commits over several shards, counted at their owner.
    pub commits_cross: u64,
    /// Of those, asked for again because a page was held, or room was short.
    pub cross_retries: u64,
    /// Votes against a commit over shards because a page was held.
    pub holds_met: u64,
    /// Commits of one shard that waited for a page that was held.
    pub held_back: u64,
    /// Messages to other shards.
    pub messages: u64,
    /// The newest LSN drawn.
    pub last_lsn: u64,
    /// Everything up to here is durable.
    pub durable_lsn: u64,
}

impl ShardStats {
    /// Adds the counters of another shard of the same store.
    pub fn add(&mut self, other: &ShardStats) {
        self.commits += other.commits;
        self.page_reads += other.page_reads;
        self.cache_hits += other.cache_hits;
        self.page_writes += other.page_writes;
        self.patches += other.patches;
        self.frees += other.frees;
        self.log_groups += other.log_groups;
        self.log_bytes += other.log_bytes;
        self.flushes += other.flushes;
        self.pages_written += other.pages_written;
        self.page_write_ops += other.page_write_ops;
        self.absorbed_writes += other.absorbed_writes;
        self.nodes_written += other.nodes_written;
        self.device_reads += other.device_reads;
        self.checksums += other.checksums;
        self.checkpoints += other.checkpoints;
        self.extents_compacted += other.extents_compacted;
        self.pages_moved += other.pages_moved;
        self.extents_total += other.extents_total;
        self.extents_free += other.extents_free;
        self.blocks_live += other.blocks_live;
        self.conflicts += other.conflicts;
        self.commits_cross += other.commits_cross;
        self.cross_retries += other.cross_retries;
        self.holds_met += other.holds_met;
        self.held_back += other.held_back;
        self.messages += other.messages;
        self.last_lsn = self.last_lsn.max(other.last_lsn);
        self.durable_lsn = self.durable_lsn.max(other.durable_lsn);
    }
}
