//! Turns user choices into checked limits. Every bound of the engine is set or derived here, with
//! its reason.

use crate::base::error::{Error, Result};
use crate::base::{BLOCK, Micros, ShardSet};

const KIB: u64 = 1024;
const MIB: u64 = 1024 * KIB;

/// Sizes that are chosen when a store is created and can't be changed later.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Bytes of an extent, the unit of data space: a power of two, 64 KiB to 8 MiB.
    pub extent_bytes: u64,
    /// Bytes of a log segment: a power of two, 64 KiB to 1 GiB.
    pub segment_bytes: u64,
    /// Log segments of each shard, at least 4. Together these bound the log that recovery may have
    /// to read.
    pub segments_count: u32,
    /// Virtual shards: a power of two, up to 512. A store can't use more cores than this.
    pub vshards_count: u32,
}

impl Default for Geometry {
    fn default() -> Self {
        Geometry {
            extent_bytes: 4 * MIB,
            segment_bytes: 16 * MIB,
            segments_count: 8,
            vshards_count: 256,
        }
    }
}

/// The most shards that a store runs with.
pub(crate) const SHARDS_MAX: u16 = 64;
const _: () = assert!(SHARDS_MAX <= ShardSet::SHARDS_MAX);

/// The least memory of a shard: it holds log buffers, a superblock, and pages of the largest size
/// class to work with.
pub(crate) const SHARD_MEMORY_MIN: u64 = 2 * MIB;

/// The most bytes that the tables take for each 4 KiB frame: an entry of the page table for its
/// page, and for a quarter of the frames one more for a freed page; an entry of the table of map
/// nodes, since any frame may hold one and tables don't shrink; the frame's places in the lists of
/// the arena and of the eviction policy. A test compares this with the sizes of all these.
pub(crate) const TABLE_BYTES_PER_FRAME: u64 = 512;

/// The least limit on the bytes of requests in progress in a shard: enough for about two hundred
/// small ones.
const REQUEST_BYTES_MIN: u64 = 256 * KIB;

/// The driver that moves bytes between memory and device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Driver {
    /// io_uring where it works, else plain threads; the report says which, and why.
    #[default]
    Auto,
    /// io_uring; opening fails with the reason where it does not work.
    Ring,
    /// Plain threads and system calls.
    Portable,
}

impl std::str::FromStr for Driver {
    type Err = Error;

    fn from_str(name: &str) -> Result<Driver> {
        match name {
            "auto" => Ok(Driver::Auto),
            "ring" => Ok(Driver::Ring),
            "portable" => Ok(Driver::Portable),
            _ => Err(Error::invalid(format_args!(
                "there is no driver `{name}`: use auto, ring or portable"
            ))),
        }
    }
}

/// How to open a store. The defaults suit a server that has the machine to itself.
#[derive(Clone, Debug)]
pub struct Options {
    /// The geometry of a store that does not exist yet; an existing store keeps its own.
    pub geometry: Geometry,
    /// Bytes of memory (default 256 MiB) for pages, map nodes and log buffers, and for the tables
    /// that index them, which take an eighth on top of each 4 KiB. It is divided among the shards,
    /// at least 2 MiB each; with that little the tables come on top.
    ///
    /// Within 10 % and a constant, this is all that a store takes. Requests in progress come on
    /// top, from when the store accepts them until they are answered, even if their futures are
    /// dropped: in each shard, the contents of commits up to a sixteenth of its memory (256 KiB at
    /// least) plus one commit of any size, the same again for tasks on the shard, and 1 KiB for
    /// each read. While that is used up, further commits wait, first come, first served; until then
    /// their contents belong to their callers. The constant consists of threads, rings, 4 KiB for
    /// each virtual shard, and for each extent of the data space 72 bytes in each shard and 72
    /// bytes once. Opening after a crash takes, in each shard, a group of the log as it was written
    /// and its decoded form: 1 MiB, or the largest commit that the log holds.
    pub memory_bytes: u64,
    /// How long a group of buffered commits waits for more of them, in microseconds (1,000 to
    /// 10,000, default 5,000). After two such times without a commit a shard writes its dirty pages
    /// to their places; while commits come, they wait for a checkpoint, or until memory is short.
    /// A durable commit is never delayed by it.
    pub coalesce_window_us: Micros,
    /// The number of whole pages with which a group of buffered commits goes to the log before that
    /// time is over (1 to 64, default 64).
    pub coalesce_batch_pages: usize,
    /// The most pages of one vectored read or write at the device (1 to 64, default 64).
    pub vectored_pages_max: usize,
    /// The most log writes that a shard has in flight (1 to 8, default 4).
    pub log_writes_max: usize,
    /// Up to this many whole pages of a log group are written into the log, and to their place
    /// later (default 4). If there are more, they are written once, straight to their place. 0:
    /// always once.
    pub inline_pages_max: usize,
    /// The most bytes that one commit may count (default 4 MiB): 4 KiB for each page written or
    /// patched, 512 bytes for each page freed. Little memory or short log segments lower it;
    /// `Store::txn_bytes_max` returns the limit in force.
    pub txn_bytes_max: u64,
    /// The most bytes of the data file; 0 (the default): as much as the file system has.
    pub data_bytes_max: u64,
    /// The percentage of the data space that must be live before the space grows (30 to 85, default
    /// 70). Below it, compaction reclaims dead blocks by moving the live ones around them; it
    /// leaves alone dead blocks up to the size that the log can have. A lower value takes more disk
    /// space for the same pages and makes sustained overwriting faster, since less is moved.
    pub fill_percent: u32,
    /// Requests in progress at a time, over all handles (default 4,096), provided that
    /// `memory_bytes` has room for their contents; more wait, and then get `Busy`.
    pub requests_max: usize,
    /// The cores to run on, one shard each (default: all that the opening thread may use; where
    /// control groups allow the time of fewer, that many shards on any of them).
    pub cores: Option<Vec<usize>>,
    /// How many shards to run (default: one on each core, but no more than the store has virtual
    /// shards, nor than the memory allows at 2 MiB each, nor `data_bytes_max` at 12 extents each).
    /// More shards than cores work, but don't poll.
    pub shards: Option<u16>,
    /// Whether to poll instead of waiting when there is nothing to do: lower latency, at the cost
    /// of a whole core per shard.
    pub poll: bool,
    /// The driver that moves bytes between memory and device (default: the best that works).
    pub driver: Driver,
    /// Entries of each shard's io_uring (a power of two, 16 to 4,096, default 256): the most
    /// transfers that a shard has at the device at a time.
    pub ring_entries: u32,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            geometry: Geometry::default(),
            memory_bytes: 256 * MIB,
            coalesce_window_us: 5_000,
            coalesce_batch_pages: 64,
            vectored_pages_max: 64,
            log_writes_max: 4,
            inline_pages_max: 4,
            txn_bytes_max: 4 * MIB,
            data_bytes_max: 0,
            fill_percent: 70,
            requests_max: 4096,
            cores: None,
            shards: None,
            poll: false,
            driver: Driver::Auto,
            ring_entries: 256,
        }
    }
}

/// Checked options, with the limits that follow from them. The name of each count ends in its unit.
#[derive(Clone, Debug)]
pub(crate) struct Limits {
    pub geometry: Geometry,
    pub shards_count: u16,
    pub memory_blocks: u32,
    pub coalesce_window_us: Micros,
    pub coalesce_batch_pages: usize,
    pub vectored_pages_max: usize,
    pub log_writes_max: usize,
    pub inline_pages_max: usize,
    pub txn_bytes_max: u64,
    pub data_extents_max: u32,
    /// How many of a hundred blocks of data space must be live before the space grows.
    pub fill_percent: u32,
    pub requests_max: usize,
    /// With this many heap bytes of callers' requests in progress, a shard accepts no more of them.
    pub request_bytes_max: u64,
    /// Blocks of the buffer that collects a log group, a power of two. An eighth of a segment, so
    /// that little is wasted when the end of a segment is too small for the next group; at most 1
    /// MiB, enough for 8,000 small commits, and at most a 64th of the memory.
    pub group_blocks: u32,
}

/// The number of frames, with their tables, that fit into `memory_bytes`.
pub(crate) fn frames_in(memory_bytes: u64) -> u64 {
    memory_bytes / (BLOCK as u64 + TABLE_BYTES_PER_FRAME)
}

fn power_of_two(name: &str, value: u64, min: u64, max: u64) -> Result<()> {
    if value.is_power_of_two() && (min..=max).contains(&value) {
        return Ok(());
    }
    Err(Error::invalid(format_args!(
        "{name} is {value}: it must be a power of two from {min} to {max}"
    )))
}

fn within(name: &str, value: u64, min: u64, max: u64) -> Result<()> {
    if (min..=max).contains(&value) {
        return Ok(());
    }
    Err(Error::invalid(format_args!("{name} is {value}: it must be from {min} to {max}")))
}

impl Geometry {
    pub(crate) fn check(&self) -> Result<()> {
        power_of_two("extent_bytes", self.extent_bytes, 64 * KIB, 8 * MIB)?;
        power_of_two("segment_bytes", self.segment_bytes, 64 * KIB, 1024 * MIB)?;
        within("segments_count", self.segments_count.into(), 4, 1024)?;
        power_of_two("vshards_count", self.vshards_count.into(), 1, 512)
    }

    /// Blocks of an extent, including the summary.
    pub(crate) fn extent_blocks(&self) -> u32 {
        (self.extent_bytes / BLOCK as u64) as u32
    }
}

fn check_shards(shards_count: u16, geometry: &Geometry) -> Result<()> {
    within("shards", shards_count.into(), 1, SHARDS_MAX.into())?;
    if u32::from(shards_count) > geometry.vshards_count {
        return Err(Error::invalid(format_args!(
            "{shards_count} shards, but the store has {} virtual shards, and each shard needs \
             one; their number was fixed when the store was created: open it with fewer shards",
            geometry.vshards_count
        )));
    }
    Ok(())
}

impl Options {
    /// The limit on heap bytes of requests in progress in each shard: a sixteenth of its memory,
    /// since more requests than that make nothing faster, and at least [`REQUEST_BYTES_MIN`].
    pub(crate) fn request_bytes_max(&self, shards_count: u16) -> u64 {
        (self.memory_bytes / u64::from(shards_count) / 16).max(REQUEST_BYTES_MIN)
    }

    /// Checks every value, and derives the limits of each shard of a store of geometry `geometry`
    /// with `shards_count` shards, which divide the memory among them.
    pub(crate) fn limits(&self, geometry: &Geometry, shards_count: u16) -> Result<Limits> {
        geometry.check()?;
        check_shards(shards_count, geometry)?;
        let shards = u64::from(shards_count);
        within(
            "memory_bytes (at least 2 MiB for each shard)",
            self.memory_bytes,
            SHARD_MEMORY_MIN * shards,
            1 << 42,
        )?;
        let memory_bytes = self.memory_bytes / shards;
        within("coalesce_window_us", self.coalesce_window_us, 1_000, 10_000)?;
        within("coalesce_batch_pages", self.coalesce_batch_pages as u64, 1, 64)?;
        within("vectored_pages_max", self.vectored_pages_max as u64, 1, 64)?;
        within("log_writes_max", self.log_writes_max as u64, 1, 8)?;
        within("inline_pages_max", self.inline_pages_max as u64, 0, 64)?;
        within("txn_bytes_max", self.txn_bytes_max, 4 * KIB, 64 * MIB)?;
        within("fill_percent", self.fill_percent.into(), 30, 85)?;
        within("requests_max", self.requests_max as u64, 1, 1 << 20)?;
        power_of_two("ring_entries", self.ring_entries.into(), 16, 4096)?;
        let group_bytes =
            (geometry.segment_bytes / 8).min(MIB).min(1 << (memory_bytes / 64).ilog2());
        let group_blocks = group_bytes / BLOCK as u64;
        Ok(Limits {
            geometry: geometry.clone(),
            shards_count,
            memory_blocks: frames_in(memory_bytes).max(SHARD_MEMORY_MIN / BLOCK as u64) as u32,
            coalesce_window_us: self.coalesce_window_us,
            coalesce_batch_pages: self.coalesce_batch_pages,
            vectored_pages_max: self.vectored_pages_max,
            log_writes_max: self.log_writes_max,
            inline_pages_max: self.inline_pages_max,
            // A commit must fit into one group, and the memory must hold the pages and log buffers
            // of several.
            txn_bytes_max: self
                .txn_bytes_max
                .min(memory_bytes / 16)
                .min(geometry.segment_bytes / 4),
            data_extents_max: match self.data_bytes_max {
                0 => u32::MAX,
                // Extents have numbers of 32 bits: a limit beyond that means as much as the file
                // system has.
                bytes => u32::try_from((bytes / geometry.extent_bytes).max(1)).unwrap_or(u32::MAX),
            },
            fill_percent: self.fill_percent,
            requests_max: self.requests_max,
            request_bytes_max: self.request_bytes_max(shards_count),
            group_blocks: group_blocks as u32,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extents_max(data_bytes_max: u64) -> u32 {
        let options = Options { data_bytes_max, ..Options::default() };
        options.limits(&Geometry::default(), 2).expect("it is lawful").data_extents_max
    }

    /// A very large limit must not turn into none at all, or into one that no store fits into.
    #[test]
    fn a_limit_of_the_data_space_beyond_all_extents_is_no_limit() {
        assert_eq!(extents_max(0), u32::MAX);
        assert_eq!(extents_max(1), 1);
        assert_eq!(extents_max(1 << 30), 256);
        let all = u64::from(u32::MAX) * Geometry::default().extent_bytes;
        for bytes in [all - 1, all, all + 1, 1 << 54, (1 << 54) + (256 << 20), u64::MAX] {
            assert!(extents_max(bytes) >= u32::MAX - 1, "{bytes} bytes: {}", extents_max(bytes));
        }
    }

    /// With the extreme valid values, in every combination of memory and shards, no derived limit
    /// may become zero.
    #[test]
    fn limits_at_the_ends_of_what_is_lawful_are_whole() {
        for (memory_bytes, shards) in
            [(2 * MIB, 1), (128 * MIB, SHARDS_MAX), (1 << 42, 1), (1 << 42, SHARDS_MAX)]
        {
            for (extent_bytes, segment_bytes) in [(64 * KIB, 64 * KIB), (8 * MIB, 1024 * MIB)] {
                let geometry = Geometry {
                    extent_bytes,
                    segment_bytes,
                    segments_count: 1024,
                    ..Geometry::default()
                };
                let options = Options { memory_bytes, ..Options::default() };
                let limits = options.limits(&geometry, shards).expect("it is lawful");
                let frames =
                    (memory_bytes / u64::from(shards) / (BLOCK as u64 + TABLE_BYTES_PER_FRAME))
                        .max(512);
                assert_eq!(u64::from(limits.memory_blocks), frames);
                assert_eq!(u64::from(geometry.extent_blocks()) * BLOCK as u64, extent_bytes);
                assert!(
                    limits.group_blocks.is_power_of_two() && limits.txn_bytes_max >= 4 * KIB,
                    "{limits:?}"
                );
            }
        }
        let too_much = Options { memory_bytes: (1 << 42) + 1, ..Options::default() };
        assert!(too_much.limits(&Geometry::default(), 1).is_err(), "block numbers have 32 bits");
    }
}
