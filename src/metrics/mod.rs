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
    /// The newest LSN drawn.
    pub last_lsn: u64,
    /// Everything up to here is durable.
    pub durable_lsn: u64,
}
