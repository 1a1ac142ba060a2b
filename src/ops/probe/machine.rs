//! The facts about kernel, memory, processors and limits. A thin `look` reads each of them;
//! functions of text decide what the text means.

use super::Roots;
use crate::base::options::SHARDS_MAX;
use crate::io::{ProcessLimits, check_kernel};
use rustix::process::{Resource, getrlimit};
use rustix::thread::CpuSet;

/// The least locked memory that glommio requires for each executor.
const EXECUTOR_BYTES: u64 = 512 << 10;
/// Locked memory that each executor takes besides: its I/O memory (64 KiB).
const EXECUTOR_OWN_BYTES: u64 = 64 << 10;

/// The kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct Kernel {
    /// As `uname -r` prints it.
    pub release: String,
    /// Why the engine can't run on it, if it can't.
    pub refused: Option<String>,
}

impl Kernel {
    pub(super) fn look() -> Kernel {
        let release = rustix::system::uname().release().to_string_lossy().into_owned();
        Kernel { release, refused: check_kernel().err().map(|e| e.to_string()) }
    }
}

/// How much memory this process may lock; rings and registered buffers count.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct MemoryLocks {
    /// The limit in force (`ulimit -S -l`); absent if there is none.
    pub limit_bytes: Option<u64>,
    /// Up to where this user may raise it.
    pub hard_limit_bytes: Option<u64>,
    /// Whether the kernel enforces the limit for this process: it does not with the capability
    /// `CAP_IPC_LOCK`, which root has.
    pub enforced: bool,
    /// Executors that the limit allows at 576 KiB each; absent if any number. glommio obeys the
    /// limit whether the kernel enforces it or not.
    pub executors_max: Option<u64>,
}

impl MemoryLocks {
    pub(super) fn look(roots: &Roots) -> MemoryLocks {
        let limit = getrlimit(Resource::Memlock);
        MemoryLocks::new(
            limit.current,
            limit.maximum,
            ProcessLimits::read(&roots.proc).locks_enforced,
        )
    }

    pub(super) fn new(
        limit_bytes: Option<u64>,
        hard_limit_bytes: Option<u64>,
        enforced: bool,
    ) -> MemoryLocks {
        let executors_max = limit_bytes.map(|bytes| match bytes {
            0..EXECUTOR_BYTES => 0,
            _ if !enforced => u64::MAX,
            bytes => bytes / (EXECUTOR_BYTES + EXECUTOR_OWN_BYTES),
        });
        MemoryLocks {
            limit_bytes,
            hard_limit_bytes,
            enforced,
            executors_max: executors_max.filter(|count| *count < u64::MAX),
        }
    }

    /// Memory that can be registered besides `executors_count` executors: at most half of the
    /// limit, which is what the ring disks request. `None`: no limit.
    pub fn buffer_bytes(&self, executors_count: u64) -> Option<u64> {
        let limit = self.limit_bytes.filter(|_| self.enforced)?;
        let executors = executors_count.saturating_mul(EXECUTOR_BYTES + EXECUTOR_OWN_BYTES);
        Some(limit.saturating_sub(executors).min(limit / 2))
    }
}

/// The huge pages of 2 MiB.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct HugePages {
    /// The number that the administrator has reserved.
    pub reserved_count: Option<u64>,
    /// How many of those are not in use.
    pub free_count: Option<u64>,
    /// The setting of transparent huge pages: `always`, `madvise` or `never`.
    pub transparent: Option<String>,
}

impl HugePages {
    pub(super) fn look(roots: &Roots) -> HugePages {
        let number = |name: &str| {
            roots.sys(&format!("kernel/mm/hugepages/hugepages-2048kB/{name}"))?.parse().ok()
        };
        HugePages {
            reserved_count: number("nr_hugepages"),
            free_count: number("free_hugepages"),
            transparent: roots
                .sys("kernel/mm/transparent_hugepage/enabled")
                .and_then(|text| chosen(&text)),
        }
    }
}

/// The bracketed word of `always [madvise] never`.
pub(super) fn chosen(text: &str) -> Option<String> {
    let (word, _) = text.split_once('[')?.1.split_once(']')?;
    Some(word.to_owned())
}

/// The cores that the calling thread may use, in order; empty if the kernel does not say.
pub(crate) fn allowed_cores() -> Vec<usize> {
    let Ok(allowed) = rustix::thread::sched_getaffinity(None) else { return Vec::new() };
    (0..CpuSet::MAX_CPU).filter(|core| allowed.is_set(*core)).collect()
}

/// The processors.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct Cores {
    /// Processors that are online in the machine.
    pub online_count: Option<u64>,
    /// The numbers of those that this process may use.
    pub allowed: Vec<usize>,
    /// The distinct physical cores among those; absent if the machine does not report them.
    pub physical_count: Option<usize>,
    /// The processors' worth of time that control groups allow, rounded up, if that is less.
    pub quota_count: Option<usize>,
}

impl Cores {
    pub(super) fn look(roots: &Roots) -> Cores {
        let allowed = allowed_cores();
        let siblings = |cpu: &usize| {
            roots.sys(&format!("devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"))
        };
        let physical: Option<std::collections::BTreeSet<String>> =
            allowed.iter().map(siblings).collect();
        let quota = super::cgroup::look(roots).map(|millis| millis.div_ceil(1000).max(1) as usize);
        Cores {
            online_count: roots.sys("devices/system/cpu/online").and_then(|list| count(&list)),
            physical_count: physical.map(|set| set.len()).filter(|count| *count > 0),
            quota_count: quota.filter(|count| *count < allowed.len()),
            allowed,
        }
    }

    /// How many shards a store runs here by default.
    pub(super) fn shards_count(&self) -> usize {
        let allowed = self.allowed.len().clamp(1, usize::from(SHARDS_MAX));
        self.quota_count.map_or(allowed, |quota| quota.min(allowed))
    }
}

/// Counts the numbers of a list like `0-3,8`.
pub(super) fn count(list: &str) -> Option<u64> {
    list.split(',').try_fold(0, |sum, part| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (u64, u64) = (first.parse().ok()?, last.parse().ok()?);
        Some(sum + last.checked_sub(first)? + 1)
    })
}

/// How many files this process may have open, and how long they may be.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct OpenFiles {
    /// The limit in force (`ulimit -S -n`); absent if there is none.
    pub limit_count: Option<u64>,
    /// Up to where this user may raise it.
    pub hard_limit_count: Option<u64>,
    /// How long a file may be (`ulimit -f`); absent if there is no limit.
    pub file_bytes_max: Option<u64>,
}

impl OpenFiles {
    pub(super) fn look() -> OpenFiles {
        let limit = getrlimit(Resource::Nofile);
        let file_bytes_max = getrlimit(Resource::Fsize).current;
        OpenFiles { limit_count: limit.current, hard_limit_count: limit.maximum, file_bytes_max }
    }
}
