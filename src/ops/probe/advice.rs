//! Derives advice from the facts: for each subject what was found, how the engine uses it, and what
//! would be better.
//!
//! 1. The advice is a pure function: the same machine gives the same advice, so each sentence can
//!    be tested without such a machine.
//! 2. `Fatal` means that no store can be opened, and nothing else: without a ring or direct I/O a
//!    store is only slower.
//! 3. A command is complete and can be copied as it is; the reader fills in the names in capitals.

use super::{AutoDriver, DirectIo, Machine};
use crate::base::options::{Geometry, Options};
use crate::format::fresh;
use crate::io::{BlockDevice, UnavailableReason};

/// Bytes of a huge page, transparent or explicit.
const HUGE_BYTES: u64 = 2 << 20;
/// Files that a server has open besides those of its shards: data, table, meta, directory, sockets,
/// signals, the standard three, and one client each of NBD and of the control socket.
const OPEN_FILES_OF_SERVER: u64 = 15;
/// Files that a shard has open besides its log segments: its ring, those of its executor, and the
/// descriptors that wake them.
const OPEN_FILES_OF_SHARD: u64 = 6;
/// With this limit open files are no concern.
const OPEN_FILES_ENOUGH: u64 = 1024;

/// How good a fact is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
pub enum Level {
    /// The fact is as it should be.
    Good,
    /// The store runs, but slower or less safely than it could.
    Improvable,
    /// No store can be opened.
    Fatal,
}

/// A change to the machine or to the options that would make the store faster or safer.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct Suggestion {
    /// What to do, and what that brings.
    pub what: String,
    /// The command, if there is one.
    pub command: Option<String>,
}

/// The advice on one subject. The names of the JSON form (`here`, `better`) are older than those of
/// the fields, and stay.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct Finding {
    /// What the advice is about.
    pub subject: &'static str,
    /// How good the facts are.
    pub level: Level,
    /// What was found on this machine.
    #[cfg_attr(feature = "serde", serde(rename = "here"))]
    pub found: String,
    /// How the engine uses it.
    pub used: String,
    /// What would improve it, the best suggestion first.
    #[cfg_attr(feature = "serde", serde(rename = "better"))]
    pub suggestions: Vec<Suggestion>,
}

impl Finding {
    fn good(subject: &'static str, found: impl Into<String>, used: impl Into<String>) -> Finding {
        Finding {
            subject,
            level: Level::Good,
            found: found.into(),
            used: used.into(),
            suggestions: Vec::new(),
        }
    }

    fn but(mut self, level: Level) -> Finding {
        self.level = level;
        self
    }

    fn suggest(mut self, what: impl Into<String>, command: Option<&str>) -> Finding {
        self.suggestions
            .push(Suggestion { what: what.into(), command: command.map(str::to_owned) });
        self
    }
}

impl Machine {
    /// All subjects, in a fixed order.
    pub fn advice(&self) -> Vec<Finding> {
        self.advice_with(&self.driver())
    }

    pub(super) fn advice_with(&self, driver: &AutoDriver) -> Vec<Finding> {
        vec![
            self.kernel(),
            self.ring(driver),
            self.locks(driver),
            self.file_system(),
            self.direct_io(),
            self.device(),
            self.polling(driver),
            self.huge(),
            self.processors(),
            self.checksums(),
            self.files(),
        ]
    }

    /// Whether a store can be opened here.
    pub fn can_run(&self) -> bool {
        self.advice().iter().all(|finding| finding.level < Level::Fatal)
    }

    fn kernel(&self) -> Finding {
        let found = format!("Linux {}", self.kernel.release);
        match &self.kernel.refused {
            None => Finding::good("kernel", found, "supported"),
            Some(why) => Finding::good("kernel", found, why)
                .but(Level::Fatal)
                .suggest("a newer kernel", None),
        }
    }

    fn ring(&self, driver: &AutoDriver) -> Finding {
        let Some(refused) = self.io_uring.refused() else {
            let used = if driver.is_ring() {
                "the ring driver: a ring of its own for each core"
            } else {
                "not yet: this version has the portable driver only"
            };
            return Finding::good("io_uring", "available", used);
        };
        let finding = Finding::good(
            "io_uring",
            refused.to_string(),
            "the portable driver: plain system calls",
        )
        .but(Level::Improvable);
        match refused.reason {
            UnavailableReason::Kernel => {
                finding.suggest("a kernel with io_uring: 5.11 or newer, CONFIG_IO_URING=y", None)
            }
            UnavailableReason::Seccomp => finding.suggest(
                "a filter that allows io_uring_setup, io_uring_enter and io_uring_register; in a \
                 container",
                Some("docker run --security-opt seccomp=PROFILE.json IMAGE"),
            ),
            UnavailableReason::Setting => finding
                .suggest("allow it on this machine", Some("sysctl kernel.io_uring_disabled=0")),
            UnavailableReason::MemoryLocks => finding
                .suggest(
                    "more locked memory, for this shell (as root)",
                    Some("ulimit -l unlimited"),
                )
                .suggest("the same in a systemd unit", Some("LimitMEMLOCK=infinity")),
            UnavailableReason::OpenFiles => {
                finding.suggest("more open files", Some("ulimit -n 65536"))
            }
            UnavailableReason::Policy => {
                finding.suggest("ask whoever set this machine's security policy", None)
            }
            UnavailableReason::Other => finding,
        }
    }

    fn locks(&self, driver: &AutoDriver) -> Finding {
        const SUBJECT: &str = "locked memory";
        let locks = &self.memory_locks;
        let limit = locks.limit_bytes.map_or("no limit".to_owned(), human_bytes);
        let found = match (locks.limit_bytes, locks.enforced) {
            (Some(_), false) => format!("{limit}, not enforced (CAP_IPC_LOCK)"),
            _ => limit,
        };
        if !driver.is_ring() {
            return Finding::good(SUBJECT, found, "not needed by the portable driver");
        }
        let cores = self.cores.shards_count() as u64;
        let executors = locks.executors_max.unwrap_or(cores).min(cores);
        let memory = Options::default().memory_bytes;
        let buffers = locks.buffer_bytes(executors).unwrap_or(memory).min(memory);
        let used = format!(
            "executors for {executors} of {cores} shards, {} of registered buffers",
            human_bytes(buffers)
        );
        let finding = Finding::good(SUBJECT, found, used);
        if executors == cores && buffers == memory {
            return finding;
        }
        let what =
            if executors < cores { "executors on all cores" } else { "all page memory registered" };
        finding
            .but(Level::Improvable)
            .suggest(format!("{what}, for this shell (as root)"), Some("ulimit -l unlimited"))
            .suggest(format!("{what}, in a systemd unit"), Some("LimitMEMLOCK=infinity"))
    }

    fn file_system(&self) -> Finding {
        const SUBJECT: &str = "file system";
        let directory = &self.directory;
        let name = directory.file_system.as_deref().unwrap_or("unknown");
        let free = directory
            .free_bytes
            .map(|bytes| format!(", {} free", human_bytes(bytes)))
            .unwrap_or_default();
        let found = format!("{name}{free}");
        if let Some(why) = &directory.unwritable {
            return Finding::good(SUBJECT, found, format!("no store: {why}"))
                .but(Level::Fatal)
                .suggest("another directory", Some("corepage doctor --dir DIR"));
        }
        if let Some(refused) = self.no_room(&found) {
            return refused;
        }
        let used = directory.flush.map_or("unknown".to_owned(), |flush| flush.to_string());
        let finding = Finding::good(SUBJECT, found, used);
        match name {
            "tmpfs" | "ramfs" => finding.but(Level::Improvable).suggest(
                "a directory on a disk: this one is in memory, and lost when the machine stops",
                None,
            ),
            "btrfs" => finding.but(Level::Improvable).suggest(
                "overwriting in place, if set before the store is made; costs btrfs's own \
                 checksums",
                Some("chattr +C DIR"),
            ),
            "nfs" | "9p" | "fuse" => finding.but(Level::Improvable).suggest(
                "a local file system: here another program decides what a flush promises",
                None,
            ),
            _ => finding,
        }
    }

    /// The finding if a new store can't be made because there is no room, or because files may not
    /// be that long.
    fn no_room(&self, found: &str) -> Option<Finding> {
        let directory = &self.directory;
        if directory.holds_store {
            return None;
        }
        let shards = self.cores.shards_count() as u16;
        let takes = |shards| fresh::store_bytes(&Geometry::default(), shards, u32::MAX);
        let on = |shards: u16| {
            if shards == 1 { "one shard".to_owned() } else { format!("{shards} shards") }
        };
        let refused = |used: String, what: &str, command| {
            Finding::good("file system", found, used).but(Level::Fatal).suggest(what, command)
        };
        if directory.free_bytes.is_some_and(|free| free < takes(shards)) {
            let used = format!(
                "no store: a new one takes {} on {}",
                human_bytes(takes(shards)),
                on(shards)
            );
            let fewer = format!(
                "a directory with more room, or fewer shards: {} on one",
                human_bytes(takes(1))
            );
            return Some(refused(used, &fewer, Some("corepage serve --shards 1 --dir DIR")));
        }
        let longest = fresh::data_bytes(&Geometry::default(), shards, u32::MAX);
        let limit = self.open_files.file_bytes_max.filter(|limit| *limit < longest)?;
        let used = format!(
            "no store: files may have {} (ulimit -f), and one of {} is made",
            human_bytes(limit),
            human_bytes(longest)
        );
        Some(refused(used, "no limit on file sizes", Some("ulimit -f unlimited")))
    }

    fn direct_io(&self) -> Finding {
        const SUBJECT: &str = "direct I/O";
        match self.directory.direct_io {
            DirectIo::Works => {
                Finding::good(SUBJECT, "works", "direct: transfers bypass the page cache")
            }
            DirectIo::Refused => Finding::good(
                SUBJECT,
                "not with this file system",
                "buffered: through the page cache",
            )
            .but(Level::Improvable)
            .suggest("a directory on ext4 or XFS", Some("corepage doctor --dir DIR")),
            DirectIo::Unknown => {
                Finding::good(SUBJECT, "could not be tried", "nothing").but(Level::Fatal)
            }
        }
    }

    fn device(&self) -> Finding {
        const SUBJECT: &str = "block device";
        let Some(device) = &self.directory.device else {
            return Finding::good(
                SUBJECT,
                "none that the kernel reports",
                "the file system decides what a flush does",
            );
        };
        let used = match (device.write_cache.as_deref(), device.fua) {
            (Some("write through"), _) => "a completed write is durable: flushes cost little",
            (Some(_), Some(true)) => "single writes can be made durable (FUA)",
            (Some(_), _) => "its cache is flushed for each group of commits",
            (None, _) => "its cache is assumed to be volatile, and flushed",
        };
        let finding = Finding::good(SUBJECT, describe(device), used);
        if device.rotational == Some(true) {
            let what =
                "a solid-state device: here each group of commits waits for the disk to turn";
            return finding.but(Level::Improvable).suggest(what, None);
        }
        finding
    }

    fn polling(&self, driver: &AutoDriver) -> Finding {
        const SUBJECT: &str = "device polling";
        match &self.directory.device {
            Some(BlockDevice { io_poll: Some(true), .. }) if driver.is_ring() => Finding::good(
                SUBJECT,
                "possible",
                "completions are polled for, if a test read succeeds",
            ),
            Some(BlockDevice { io_poll: Some(true), .. }) => {
                Finding::good(SUBJECT, "possible", "interrupts")
            }
            Some(BlockDevice { nvme: true, .. }) if driver.is_ring() => {
                let command = format!("nvme.poll_queues={}", self.cores.allowed.len().max(1));
                Finding::good(SUBJECT, "off: the driver has no polling queues", "interrupts")
                    .but(Level::Improvable)
                    .suggest("shorter latency; a boot parameter of the kernel", Some(&command))
            }
            Some(_) => Finding::good(SUBJECT, "not offered by the device", "interrupts"),
            None => Finding::good(SUBJECT, "no device", "nothing"),
        }
    }

    fn huge(&self) -> Finding {
        const SUBJECT: &str = "huge pages";
        let pages = &self.huge_pages;
        let wanted = Options::default().memory_bytes / HUGE_BYTES;
        let reserved = match (pages.reserved_count, pages.free_count) {
            (Some(0) | None, _) => "none reserved".to_owned(),
            (Some(count), free) => format!("{count} of 2 MiB reserved, {} free", free.unwrap_or(0)),
        };
        let found = format!(
            "{reserved}; transparent: {}",
            pages.transparent.as_deref().unwrap_or("not in this kernel")
        );
        if pages.free_count.is_some_and(|free| free >= wanted) {
            return Finding::good(SUBJECT, found, "reserved ones, for all page memory");
        }
        let command = format!("sysctl vm.nr_hugepages={wanted}");
        match pages.transparent.as_deref() {
            Some("always" | "madvise") => {
                Finding::good(SUBJECT, found, "transparent ones, where the kernel has them")
            }
            _ => Finding::good(SUBJECT, found, "none: pages of 4 KiB")
                .but(Level::Improvable)
                .suggest(
                    format!("reserve them for {} of memory", human_bytes(wanted * HUGE_BYTES)),
                    Some(&command),
                )
                .suggest("or let the kernel find them", {
                    Some("echo madvise > /sys/kernel/mm/transparent_hugepage/enabled")
                }),
        }
    }

    fn processors(&self) -> Finding {
        const SUBJECT: &str = "processors";
        let cores = &self.cores;
        let allowed = cores.allowed.len();
        let online = cores.online_count.map(|count| format!(" of {count}")).unwrap_or_default();
        let threads = cores.physical_count.filter(|count| *count < allowed);
        let threads =
            threads.map(|count| format!(", on {count} physical cores")).unwrap_or_default();
        let quota =
            cores.quota_count.map(|count| format!(", time for {count}")).unwrap_or_default();
        let found = format!("{allowed}{online} allowed{threads}{quota}");
        let shards = match cores.shards_count() {
            1 => "one shard".to_owned(),
            count => format!("{count} shards"),
        };
        // Where processor time is limited, other processes with such a limit would be pinned to the
        // same first processors.
        let place = match cores.quota_count {
            None => "each on a processor of its own",
            Some(_) => "not pinned: as many as there is time for",
        };
        let finding = Finding::good(SUBJECT, found, format!("{shards}, {place}"));
        match cores.quota_count {
            None => finding,
            Some(count) => finding.but(Level::Improvable).suggest(
                "whole processors instead of a share of time, which halts a shard in the middle \
                 of its work; in a container",
                Some(&format!("docker run --cpuset-cpus 0-{} IMAGE", count.max(1) - 1)),
            ),
        }
    }

    fn checksums(&self) -> Finding {
        let finding = Finding::good(
            "checksums",
            self.checksum.as_str(),
            "CRC-32C of every page, record and node",
        );
        if self.checksum != "tables" {
            return finding;
        }
        let what = "a processor with CRC instructions (SSE 4.2 or ARM CRC): tables are 10 to 40 \
                    times slower";
        finding.but(Level::Improvable).suggest(what, None)
    }

    fn files(&self) -> Finding {
        const SUBJECT: &str = "open files";
        let limit = self.open_files.limit_count;
        let found = limit.map_or("no limit".to_owned(), |count| format!("up to {count}"));
        let finding = Finding::good(SUBJECT, found, "log segments, data, rings, clients");
        let shards = self.cores.shards_count() as u64;
        // Counted for logs that are as long as they can get: the limit must also be enough to open
        // a store that has grown.
        let needed = OPEN_FILES_OF_SERVER
            + shards * (u64::from(Geometry::default().segments_count) + OPEN_FILES_OF_SHARD);
        match limit {
            Some(count) if count < needed => {
                Finding { used: format!("no server: {needed} are needed"), ..finding }
                    .but(Level::Fatal)
                    .suggest("all files of a store can be opened", Some("ulimit -n 65536"))
            }
            Some(count) if count < OPEN_FILES_ENOUGH.max(2 * needed) => finding
                .but(Level::Improvable)
                .suggest("room for more clients and shards", Some("ulimit -n 65536")),
            _ => finding,
        }
    }
}

/// `vda1 on vda: write back, no FUA, blocks of 512 (logical) and 4096 (physical) bytes`.
fn describe(device: &BlockDevice) -> String {
    let mut parts = vec![match &device.partition {
        Some(partition) => format!("{partition} on {}", device.name),
        None => device.name.clone(),
    }];
    if !device.on.is_empty() {
        parts[0] += &format!(" (on {})", device.on.join(", "));
    }
    parts.extend(device.write_cache.as_ref().map(|cache| format!("{cache} cache")));
    parts.extend(device.fua.map(|fua| if fua { "FUA".to_owned() } else { "no FUA".to_owned() }));
    if let (Some(logical), Some(physical)) =
        (device.logical_block_bytes, device.physical_block_bytes)
    {
        parts.push(format!("blocks of {logical}/{physical}"));
    }
    parts.extend((device.rotational == Some(true)).then(|| "rotating".to_owned()));
    parts.join(", ")
}

/// Formats bytes for people: `1.0 GiB`.
pub fn human_bytes(bytes: u64) -> String {
    let mut unit = "bytes";
    let mut value = bytes as f64;
    for next in ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"] {
        if value < 1024.0 {
            break;
        }
        (unit, value) = (next, value / 1024.0);
    }
    if unit == "bytes" { format!("{bytes} bytes") } else { format!("{value:.1} {unit}") }
}
