//! Gathers facts about this machine without changing anything, and derives from them what is best
//! for the engine.
//!
//! ```text
//! /proc, /sys, system calls --readers--> Machine (facts) --advice (pure)--> findings, suggestions
//! ```
//! Invariants
//! 1. A probe leaves nothing behind: no file, no setting, no lock. Rings and direct transfers are
//!    actually tried, since no file in /proc tells whether they work.
//! 2. A fact that can't be read is absent (`None`), never guessed; no probe fails as a whole.
//! 3. One pure function makes each decision that follows from a fact, and the reports repeat it.
//!
//! It does *not* open a store, choose for it, or change the machine.

mod advice;
mod cgroup;
mod directory;
mod driver;
mod machine;
mod memory;
mod mounts;

pub use advice::{Finding, Level, Suggestion, human_bytes};
pub use directory::{DirectIo, Directory};
pub(crate) use driver::executor_refused;
pub use driver::{AutoDriver, IoUring};
pub(crate) use machine::allowed_cores;
pub use machine::{Cores, HugePages, Kernel, MemoryLocks, OpenFiles};
pub use memory::{AvailableMemory, Room};

use std::path::{Path, PathBuf};

/// Everything about a machine that decides whether the engine can run on it, and how fast.
#[derive(Clone, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct Machine {
    /// The kernel.
    pub kernel: Kernel,
    /// Whether a ring can be created; one is created to find out.
    pub io_uring: IoUring,
    /// How much memory is available.
    pub memory: AvailableMemory,
    /// How much of it may be locked.
    pub memory_locks: MemoryLocks,
    /// The directory, its file system, and the device behind it.
    pub directory: Directory,
    /// The huge pages of 2 MiB.
    pub huge_pages: HugePages,
    /// The processors.
    pub cores: Cores,
    /// How checksums are computed.
    pub checksum: String,
    /// How many files may be open.
    pub open_files: OpenFiles,
}

impl Machine {
    /// Probes the machine, as seen by this process and from the directory `dir`, which need not
    /// exist.
    pub fn look(dir: &Path) -> Machine {
        let roots = Roots::default();
        Machine {
            io_uring: IoUring::try_one(&roots),
            kernel: Kernel::look(),
            memory: AvailableMemory::look_at(&roots),
            memory_locks: MemoryLocks::look(&roots),
            directory: Directory::look(&roots, dir),
            huge_pages: HugePages::look(&roots),
            cores: Cores::look(&roots),
            checksum: crate::base::checksum::implementation(),
            open_files: OpenFiles::look(),
        }
    }

    /// The driver that `auto` chooses here.
    pub fn driver(&self) -> AutoDriver {
        AutoDriver::choose(&self.io_uring).unless(executor_refused())
    }
}

/// The thousandths of a processor that this process may use, if a control group limits them.
pub(crate) fn cpu_quota_millis() -> Option<u64> {
    cgroup::look(&Roots::default())
}

/// Where the kernel's files are; tests use files of their own.
struct Roots {
    proc: PathBuf,
    sys: PathBuf,
}

impl Default for Roots {
    fn default() -> Self {
        Roots { proc: "/proc".into(), sys: "/sys".into() }
    }
}

impl Roots {
    /// The text of a file below `/proc`, without white space at its ends.
    fn proc(&self, name: &str) -> Option<String> {
        text(&self.proc.join(name))
    }

    /// The text of a file below `/sys`.
    fn sys(&self, name: &str) -> Option<String> {
        text(&self.sys.join(name))
    }
}

fn text(path: &Path) -> Option<String> {
    Some(std::fs::read_to_string(path).ok()?.trim().to_owned())
}

#[cfg(test)]
mod tests;
