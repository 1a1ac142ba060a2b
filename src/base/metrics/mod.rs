//! Counters and latencies of a shard, as callers see them.
//!
//! Invariants
//! 1. Counters only grow while a store is open, except those that describe the current state:
//!    extents, blocks, LSNs.
//! 2. Several shards are combined by the sum of their counters and the union of their latencies; of
//!    LSNs the highest counts.
//!
//! `runtime` measures the latencies.

mod latency;
mod recent;

pub use latency::Latency;
pub(crate) use recent::Recent;

use std::time::Duration;

/// Declares the struct, and how two of them are added.
macro_rules! stats {
    (
        sum { $($(#[$sum_doc:meta])* pub $sum:ident: u64,)* }
        now { $($(#[$now_doc:meta])* pub $now:ident: u64,)* }
        max { $($(#[$max_doc:meta])* pub $max:ident: u64,)* }
    ) => {
        /// Counters of one shard, or of all, since the store was opened. It serialises under the
        /// names of its fields, with latencies as counts and microseconds.
        #[derive(Clone, Debug, Default)]
        #[cfg_attr(feature = "serde", derive(serde::Serialize))]
        #[non_exhaustive]
        pub struct ShardStats {
            $($(#[$sum_doc])* pub $sum: u64,)*
            $($(#[$now_doc])* pub $now: u64,)*
            $($(#[$max_doc])* pub $max: u64,)*
            /// The latency of callers' reads, from their arrival at the shard to the answer,
            /// including errors; one for each request, however many pages it asks for.
            pub read_latency: Latency,
            /// The latency of commits that are answered when they are durable.
            pub commit_latency: Latency,
            /// The latency of commits that are answered when they are ordered and visible, and are
            /// durable after a flush.
            pub buffered_latency: Latency,
            /// The latency of callers' flushes; its count is the number of flushes.
            pub flush_latency: Latency,
            /// The most operations of callers (reads, commits and flushes) that were answered
            /// within one second. For several shards it is at most their sum.
            pub peak_iops: u64,
            #[cfg_attr(feature = "serde", serde(skip))]
            pub(crate) recent: Recent,
        }

        impl ShardStats {
            /// Adds the counters of another shard of the same store.
            pub fn add(&mut self, other: &ShardStats) {
                $(self.$sum += other.$sum;)*
                $(self.$now += other.$now;)*
                $(self.$max = self.$max.max(other.$max);)*
                self.read_latency.add(&other.read_latency);
                self.commit_latency.add(&other.commit_latency);
                self.buffered_latency.add(&other.buffered_latency);
                self.flush_latency.add(&other.flush_latency);
                self.recent.add(&other.recent);
                self.peak_iops += other.peak_iops;
            }

            /// What was counted since `earlier`, an earlier state of the same counters; those that
            /// describe the current state stay as they are.
            pub fn since(&self, earlier: &ShardStats) -> ShardStats {
                ShardStats {
                    $($sum: self.$sum.saturating_sub(earlier.$sum),)*
                    read_latency: self.read_latency.since(&earlier.read_latency),
                    commit_latency: self.commit_latency.since(&earlier.commit_latency),
                    buffered_latency: self.buffered_latency.since(&earlier.buffered_latency),
                    flush_latency: self.flush_latency.since(&earlier.flush_latency),
                    ..self.clone()
                }
            }
        }
    };
}

stats! {
    sum {
    /// Page versions that had to wait until a checkpoint had written their map leaf.
    pub settles_delayed: u64,
    /// Commits applied.
    pub commits: u64,
    /// Pages read by callers. Reads of the engine's own, such as those of volumes' records, are not
    /// included.
    pub page_reads: u64,
    /// The pages among those that are not stored, since they were never written or were freed: they
    /// read as zeros.
    pub absent_reads: u64,
    /// The stored pages among those that were in memory when they were requested.
    pub cache_hits: u64,
    /// Records of volumes that the engine read, in memory or not: all of them each time a volume is
    /// looked up by name.
    pub catalog_reads: u64,
    /// Bytes of the pages read by callers.
    pub bytes_read: u64,
    /// Bytes written by callers: whole pages and ranges.
    pub bytes_written: u64,
    /// Reads at the device. Those that are neither `caller_reads` nor `node_reads` are the engine's
    /// own: pages that compaction moves, summaries, records of volumes, and pages for redo after a
    /// crash.
    pub device_reads: u64,
    /// The reads among those for which a caller waited, to read pages or to change a part of them.
    pub caller_reads: u64,
    /// The reads among those of map nodes, for callers and for the engine.
    pub node_reads: u64,
    /// The reads among those of more than one block.
    pub vectored_reads: u64,
    /// Bytes read from the device.
    pub device_bytes_read: u64,
    /// Writes at the device: log, pages, map and everything else.
    pub device_writes: u64,
    /// The writes among those of more than one part.
    pub vectored_writes: u64,
    /// Bytes written to the device.
    pub device_bytes_written: u64,
    /// Flushes at the device: of the log, and of checkpoints.
    pub device_flushes: u64,
    /// All operations submitted to the ring or the portable driver: reads, writes, flushes and
    /// allocations.
    pub device_operations: u64,
    /// System calls that submitted operations to the kernel, or waited for them.
    pub submissions: u64,
    /// Whole pages written by callers.
    pub page_writes: u64,
    /// Byte ranges written by callers.
    pub patches: u64,
    /// Pages freed by callers.
    pub frees: u64,
    /// Log groups written.
    pub log_groups: u64,
    /// Bytes of log written, including headers, padding and inline pages.
    pub log_bytes: u64,
    /// Flushes of the log at the device; those of checkpoints are only in `device_flushes`. The
    /// count of `flush_latency` is the number of flushes that callers requested.
    pub log_flushes: u64,
    /// Page images written to the data space.
    pub pages_written: u64,
    /// Write operations that carried them.
    pub page_write_ops: u64,
    /// Page images that shared the write operation of an adjacent one: `pages_written` minus
    /// `page_write_ops`.
    pub coalesced_writes: u64,
    /// Changes of a page that needed no device write of their own, because a later one covered
    /// them.
    pub absorbed_writes: u64,
    /// Map nodes written.
    pub nodes_written: u64,
    /// Map nodes that were read and dropped because their tree had grown above them in the
    /// meantime.
    pub nodes_overtaken: u64,
    /// Checksums computed for writing or checking: of pages, nodes, summaries, log groups (head and
    /// body), roots, tables and superblocks. Those that recovery checks before the shard runs are
    /// not counted.
    pub checksums: u64,
    /// Checkpoints completed.
    pub checkpoints: u64,
    /// Extents whose pages were moved away.
    pub extents_compacted: u64,
    /// Pages moved by compaction.
    pub pages_moved: u64,
    /// Commits refused with `Conflict`.
    pub conflicts: u64,
    /// Commits over several shards, counted at their owner.
    pub commits_cross: u64,
    /// Repeated attempts of those, because a page was locked or room was short.
    pub cross_retries: u64,
    /// Votes against a commit over shards because a page was locked.
    pub holds_met: u64,
    /// Commits of one shard that waited for a locked page.
    pub held_back: u64,
    /// Messages sent to other shards.
    pub messages: u64,
    }
    now {
    /// Extents in the data space.
    pub extents_total: u64,
    /// The free extents among those.
    pub extents_free: u64,
    /// Extents that compaction skips, since a part of them can't be read.
    pub extents_passed_over: u64,
    /// Blocks for pages and map nodes in all extents.
    pub blocks_total: u64,
    /// Blocks that the newest page map uses, or that are held for an older one.
    pub blocks_live: u64,
    /// The blocks among those that are held for an older map: they become free after the next
    /// checkpoint, or the one after that.
    pub blocks_dead: u64,
    }
    max {
    /// The newest LSN that was allocated.
    pub last_lsn: u64,
    /// The LSN up to which everything is durable.
    pub durable_lsn: u64,
    }
}

impl ShardStats {
    /// Operations answered per second, averaged over the full seconds of the last `period`: at
    /// least one, at most 60.
    pub fn iops(&self, period: Duration) -> f64 {
        self.recent.rate(period.as_secs())
    }

    /// Commits per flush of the log; 0 before the first flush.
    pub fn commits_per_flush(&self) -> f64 {
        ratio(self.commits, self.log_flushes)
    }

    /// Bytes written to the device per byte that callers wrote; 0 before the first. Compute it over
    /// an [interval](Self::since) that includes a checkpoint or two: it then tells what overwriting
    /// costs.
    pub fn write_amplification(&self) -> f64 {
        ratio(self.device_bytes_written, self.bytes_written)
    }

    /// The share of the data space that the newest page map names, from 0 to 1: write amplification
    /// depends on it most.
    pub fn live_share(&self) -> f64 {
        ratio(self.blocks_live.saturating_sub(self.blocks_dead), self.blocks_total)
    }

    /// The share of the stored pages read that were in memory, from 0 to 1; 0 if none was read.
    /// Pages that are not stored say nothing about the cache.
    pub fn hit_ratio(&self) -> f64 {
        ratio(self.cache_hits, self.page_reads.saturating_sub(self.absent_reads))
    }
}

fn ratio(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}
