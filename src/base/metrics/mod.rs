//! Counters and latencies of a shard, as callers see them.
//!
//! Invariants
//! 1. Counters only grow while a store is open, but those that say how things are now: extents,
//!    blocks, LSNs.
//! 2. What is of several shards is the sum of their counters and the union of their latencies; LSNs
//!    are the highest.
//!
//! How latencies are taken is the drivers' business (`runtime`).

mod latency;
mod recent;

pub use latency::Latency;
pub(crate) use recent::Recent;

use std::time::Duration;

/// The struct, and how two of them are added.
macro_rules! stats {
    (sum { $($(#[$sum_doc:meta])* pub $sum:ident: u64,)* } now { $($(#[$now_doc:meta])* pub $now:ident: u64,)* } max { $($(#[$max_doc:meta])* pub $max:ident: u64,)* }) => {
        /// Counters of one shard, or of all, since the store was opened. It serialises with the
        /// names of its fields; latencies as counts and microseconds.
        #[derive(Clone, Debug, Default)]
        #[cfg_attr(feature = "serde", derive(serde::Serialize))]
        #[non_exhaustive]
        pub struct ShardStats {
            $($(#[$sum_doc])* pub $sum: u64,)*
            $($(#[$now_doc])* pub $now: u64,)*
            $($(#[$max_doc])* pub $max: u64,)*
            /// From the arrival of callers' reads at their shard to their answer, errors too; one
            /// for each request, however many pages it asked for.
            pub read_latency: Latency,
            /// The same of commits that are answered when they are durable.
            pub commit_latency: Latency,
            /// The same of commits that are answered when they are ordered and visible, and are
            /// durable after a flush.
            pub buffered_latency: Latency,
            /// The same of callers' flushes; how many there were is its count.
            pub flush_latency: Latency,
            /// The most operations of callers (reads, commits and flushes) that were answered
            /// within one second. Of several shards: at most their sum.
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

            /// What was counted since `earlier`, a state of the same counters; what says how things
            /// are now stays as it is.
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
    /// Page versions that had to wait for the write of their map leaf by a checkpoint.
    pub settles_delayed: u64,
    /// Commits applied.
    pub commits: u64,
    /// Pages read by callers. What the engine reads for itself, such as the records of volumes, is
    /// not among them.
    pub page_reads: u64,
    /// Of those, pages that are not stored, since they were never written or are freed: they read
    /// as zeros.
    pub absent_reads: u64,
    /// Of the stored ones, found in memory when they were asked for.
    pub cache_hits: u64,
    /// Records of volumes read by the engine, in memory or not: all of them each time that a volume
    /// is looked for by name.
    pub catalog_reads: u64,
    /// Bytes of the pages read by callers.
    pub bytes_read: u64,
    /// Bytes written by callers: whole pages and ranges.
    pub bytes_written: u64,
    /// Reads at the device. Those that are neither `caller_reads` nor `node_reads` are the engine's
    /// own: of what compaction moves, of summaries, of records of volumes, and of what is redone
    /// after a crash.
    pub device_reads: u64,
    /// Of those, reads of pages that a caller waited for, to read them or to change a part of them.
    pub caller_reads: u64,
    /// Of those, reads of map nodes, for callers and for the engine.
    pub node_reads: u64,
    /// Of those, of more than one block.
    pub vectored_reads: u64,
    /// Bytes read from the device.
    pub device_bytes_read: u64,
    /// Writes at the device: log, pages, map and all else.
    pub device_writes: u64,
    /// Of those, of more than one part.
    pub vectored_writes: u64,
    /// Bytes written to the device.
    pub device_bytes_written: u64,
    /// Flushes at the device: of the log, and of checkpoints.
    pub device_flushes: u64,
    /// All operations given to the ring or to the portable driver: reads, writes, flushes and
    /// allocations.
    pub device_operations: u64,
    /// System calls that handed operations to the kernel, or waited for them.
    pub submissions: u64,
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
    /// Flushes of the log at the device; those of checkpoints are counted in `device_flushes` only.
    /// How often callers asked for a flush is the count of `flush_latency`.
    pub log_flushes: u64,
    /// Page images written to the data space.
    pub pages_written: u64,
    /// Write operations that carried them.
    pub page_write_ops: u64,
    /// Page images that shared the write operation of a neighbour: `pages_written` less
    /// `page_write_ops`.
    pub coalesced_writes: u64,
    /// Changes of a page that needed no device write of their own, because a later one covered
    /// them.
    pub absorbed_writes: u64,
    /// Map nodes written.
    pub nodes_written: u64,
    /// Map nodes that had been read and were dropped, because their tree had grown above them
    /// meanwhile.
    pub nodes_overtaken: u64,
    /// Checksums computed, to write or to check: of pages, nodes, summaries, log groups (head and
    /// body), roots, tables and superblocks. What recovery checks before the shard runs is not
    /// counted.
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
    /// Of those, asked for again because a page was held, or room was short.
    pub cross_retries: u64,
    /// Votes against a commit over shards because a page was held.
    pub holds_met: u64,
    /// Commits of one shard that waited for a page that was held.
    pub held_back: u64,
    /// Messages to other shards.
    pub messages: u64,
    }
    now {
    /// Extents in the data space.
    pub extents_total: u64,
    /// Of those, free.
    pub extents_free: u64,
    /// Extents that compaction passes over, since something in them can't be read.
    pub extents_passed_over: u64,
    /// Blocks for pages and map nodes in all extents.
    pub blocks_total: u64,
    /// Blocks in use by the newest page map, or held for an older one.
    pub blocks_live: u64,
    /// Of those, held for an older one: free after the next checkpoint, or the one after that.
    pub blocks_dead: u64,
    }
    max {
    /// The newest LSN allocated.
    pub last_lsn: u64,
    /// Everything up to here is durable.
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

    /// Bytes written to the device per byte that callers wrote; 0 before the first. Take it over an
    /// [interval](Self::since) that includes a checkpoint or two: it then says what overwriting
    /// costs.
    pub fn write_amplification(&self) -> f64 {
        ratio(self.device_bytes_written, self.bytes_written)
    }

    /// The share of the data space that the newest page map names, from 0 to 1: what write
    /// amplification depends on most.
    pub fn live_share(&self) -> f64 {
        ratio(self.blocks_live.saturating_sub(self.blocks_dead), self.blocks_total)
    }

    /// The share of the stored pages read that were found in memory, from 0 to 1; 0 if none was
    /// read. Pages that are not stored say nothing about the memory.
    pub fn hit_ratio(&self) -> f64 {
        ratio(self.cache_hits, self.page_reads.saturating_sub(self.absent_reads))
    }
}

fn ratio(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}
