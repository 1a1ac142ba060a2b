//! Determines how much memory this process can take before the kernel kills something: what the
//! machine has left, and what control groups (memory.max, memory.high) and process limits (`ulimit
//! -v`, `ulimit -d`) allow.
//!
//! Invariants
//! 1. The lowest known limit counts. An unknown limit counts as none.
//! 2. Only [`AvailableMemory::judge`] decides whether an amount fits, so `serve`, `bench` and
//!    `doctor` agree.
//!
//! It does *not* know what a store needs, and reserves nothing: other processes may take the memory
//! a moment later.

use super::{HugePages, Roots, cgroup, human_bytes};
use rustix::process::{Resource, getrlimit};

/// Bytes of a reserved huge page.
const HUGE_BYTES: u64 = 2 << 20;
/// The percentage of the available memory that may be taken without a warning; the rest is left for
/// the page cache and for other programs.
const COMFORTABLE_PERCENT: u64 = 80;

/// Memory that is available. An absent value is unknown or not limited.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct AvailableMemory {
    /// The memory of the machine.
    pub total_bytes: Option<u64>,
    /// Memory that can be taken without swapping, including free reserved huge pages.
    pub available_bytes: Option<u64>,
    /// The lowest limit of the control groups of this process.
    pub group_limit_bytes: Option<u64>,
    /// The lowest limit of the process (`ulimit -v`, `ulimit -d`).
    pub process_limit_bytes: Option<u64>,
}

/// Whether an amount of memory is available.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Room {
    /// It is available.
    Enough,
    /// It is available, but leaves little for other programs; the text says so.
    Tight(String),
    /// It is not available: the kernel would kill this process, or another one; the text says so.
    Lacking(String),
}

impl AvailableMemory {
    /// Reads the amounts from the kernel's files.
    pub fn look() -> AvailableMemory {
        AvailableMemory::look_at(&Roots::default())
    }

    pub(super) fn look_at(roots: &Roots) -> AvailableMemory {
        let info = roots.proc("meminfo").unwrap_or_default();
        let huge = HugePages::look(roots).free_count.unwrap_or(0) * HUGE_BYTES;
        let limit = |resource| getrlimit(resource).current;
        AvailableMemory {
            total_bytes: field(&info, "MemTotal").or_else(machine_bytes),
            available_bytes: field(&info, "MemAvailable").map(|bytes| bytes + huge),
            group_limit_bytes: cgroup::memory_limit_bytes(roots),
            process_limit_bytes: limit(Resource::As).into_iter().chain(limit(Resource::Data)).min(),
        }
    }

    /// The most that is available, and the limit that determines it.
    pub fn most(&self) -> Option<(u64, &'static str)> {
        let known = [
            (self.group_limit_bytes, "the limit of the control group (memory.max, memory.high)"),
            (self.process_limit_bytes, "the limit of the process (`ulimit -v`, `ulimit -d`)"),
            (self.available_bytes.or(self.total_bytes), "the memory that the machine has left"),
        ];
        known
            .into_iter()
            .filter_map(|(bytes, what)| Some((bytes?, what)))
            .min_by_key(|(bytes, _)| *bytes)
    }

    /// Whether `bytes` are available.
    pub fn judge(&self, bytes: u64) -> Room {
        let Some((most, what)) = self.most() else { return Room::Enough };
        let wanted = human_bytes(bytes);
        if bytes > most {
            let have = human_bytes(most);
            return Room::Lacking(format!("{wanted} are needed and {have} are available, {what}"));
        }
        // Divided first, since the product could overflow.
        let comfortable = most / 100 * COMFORTABLE_PERCENT;
        if bytes > comfortable {
            let have = human_bytes(most);
            return Room::Tight(format!(
                "{wanted} are more than {COMFORTABLE_PERCENT} % of the {have} that are available, \
                 {what}"
            ));
        }
        Room::Enough
    }
}

/// The bytes that a line like `MemAvailable:   20834648 kB` gives.
fn field(meminfo: &str, name: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// The memory of the machine; used where there is no /proc.
fn machine_bytes() -> Option<u64> {
    let info = rustix::system::sysinfo();
    let (total, unit) = (info.totalram as u64, u64::from(info.mem_unit));
    total.checked_mul(unit).filter(|bytes| *bytes > 0)
}
