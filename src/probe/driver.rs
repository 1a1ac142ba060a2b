//! io_uring: whether a ring can really be set up, why not, and which driver follows.
//!
//! 1. Only a ring that was set up shows that one can be. The files in /proc serve to explain a refusal.

use super::Roots;
use super::machine::{MemoryLocks, has_capability};
use rustix::io::Errno;
use serde::Serialize;
use std::fmt;

/// Whether this version has the ring driver. Until then io_uring is looked at and reported, and not used.
pub(super) const RING_DRIVER: bool = false;
/// The drivers' names.
pub(super) const RING: &str = "io_uring";
const PORTABLE: &str = "portable";
/// Entries of the ring that is tried: those of a shard's.
const ENTRIES: u32 = 256;
/// The bit of `CAP_SYS_ADMIN` (capabilities(7)).
const CAP_SYS_ADMIN: u32 = 21;

/// Why there is no ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum RingRefusal {
    /// The kernel does not have it: older than 5.1, or built without.
    Kernel,
    /// A seccomp filter on this process refuses it, as those of containers do.
    Seccomp,
    /// The setting kernel.io_uring_disabled refuses it.
    Setting,
    /// A security module, or something else that gives no reason, refuses it.
    Policy,
    /// The limit of locked memory is used up.
    MemoryLocks,
    /// The limit of open files is used up.
    OpenFiles,
    /// Anything else; the error's name tells.
    Other,
}

/// Whether a ring can be set up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct IoUring {
    /// It was done.
    pub available: bool,
    /// Why it was not.
    pub refusal: Option<RingRefusal>,
    /// The error that the kernel gave: `EPERM` and so on.
    pub error: Option<String>,
    /// kernel.io_uring_disabled: 0 allowed, 1 for the privileged only, 2 forbidden; absent before Linux 6.6.
    pub disabled_setting: Option<u32>,
    /// Whether a seccomp filter is on this process.
    pub seccomp_filter: bool,
}

/// What explains a refusal.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Circumstances {
    /// kernel.io_uring_disabled.
    pub setting: Option<u32>,
    /// A seccomp filter is there.
    pub filter: bool,
    /// The process has `CAP_SYS_ADMIN`.
    pub admin: bool,
    /// The limit of locked memory is enforced.
    pub locks_enforced: bool,
}

impl IoUring {
    /// Sets a ring up, and takes it down again.
    pub(super) fn try_one(roots: &Roots, locks: &MemoryLocks) -> IoUring {
        let outcome = io_uring::IoUring::new(ENTRIES).map(drop);
        let circumstances = Circumstances {
            setting: roots.proc("sys/kernel/io_uring_disabled").and_then(|text| text.parse().ok()),
            filter: roots.status("Seccomp").is_some_and(|mode| mode == "2"),
            admin: roots.status("CapEff").is_some_and(|hex| has_capability(&hex, CAP_SYS_ADMIN)),
            locks_enforced: locks.enforced,
        };
        let errno = outcome.err().map(|e| Errno::from_io_error(&e).unwrap_or(Errno::INVAL));
        IoUring {
            available: errno.is_none(),
            refusal: errno.map(|errno| explain(errno, circumstances)),
            error: errno.map(errno_name),
            disabled_setting: circumstances.setting,
            seccomp_filter: circumstances.filter,
        }
    }
}

/// Invariant 1's other half: which of the possible reasons it was.
pub(super) fn explain(errno: Errno, it: Circumstances) -> RingRefusal {
    match errno {
        // The setting exists only where io_uring does, so there it is a filter that plays an old kernel.
        Errno::NOSYS if it.filter && it.setting.is_some() => RingRefusal::Seccomp,
        Errno::NOSYS => RingRefusal::Kernel,
        Errno::PERM | Errno::ACCESS => match it.setting {
            Some(2) => RingRefusal::Setting,
            Some(1) if !it.admin => RingRefusal::Setting,
            _ if it.filter => RingRefusal::Seccomp,
            _ => RingRefusal::Policy,
        },
        Errno::NOMEM if it.locks_enforced => RingRefusal::MemoryLocks,
        Errno::MFILE | Errno::NFILE => RingRefusal::OpenFiles,
        _ => RingRefusal::Other,
    }
}

fn errno_name(errno: Errno) -> String {
    let name = match errno {
        Errno::NOSYS => "ENOSYS",
        Errno::PERM => "EPERM",
        Errno::ACCESS => "EACCES",
        Errno::NOMEM => "ENOMEM",
        Errno::MFILE => "EMFILE",
        Errno::NFILE => "ENFILE",
        Errno::INVAL => "EINVAL",
        other => return format!("error {}", other.raw_os_error()),
    };
    name.to_owned()
}

impl fmt::Display for IoUring {
    /// As in "portable, because …".
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(refusal) = self.refusal else { return write!(f, "io_uring is available") };
        match refusal {
            RingRefusal::Kernel => write!(f, "this kernel has no io_uring")?,
            RingRefusal::Seccomp => write!(f, "a seccomp filter forbids io_uring")?,
            RingRefusal::Setting => write!(f, "the setting kernel.io_uring_disabled forbids io_uring")?,
            RingRefusal::Policy => write!(f, "a security policy forbids io_uring")?,
            RingRefusal::MemoryLocks => write!(f, "the limit of locked memory leaves no room for an io_uring ring")?,
            RingRefusal::OpenFiles => write!(f, "the limit of open files leaves none for an io_uring ring")?,
            RingRefusal::Other => write!(f, "an io_uring ring can't be set up")?,
        }
        write!(f, " ({})", self.error.as_deref().unwrap_or("no error given"))
    }
}

/// The way to the disk that is taken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Driver {
    /// `io_uring` or `portable`.
    pub name: &'static str,
    /// Why it is not the ring.
    pub because: Option<String>,
}

impl Driver {
    /// What `auto` takes on this machine, for this process.
    pub fn auto() -> Driver {
        let roots = Roots::default();
        Driver::choose(&IoUring::try_one(&roots, &MemoryLocks::look(&roots)))
    }

    /// What `auto` takes where a ring was tried with this outcome.
    pub fn choose(io_uring: &IoUring) -> Driver {
        if !io_uring.available {
            Driver { name: PORTABLE, because: Some(io_uring.to_string()) }
        } else if RING_DRIVER {
            Driver { name: RING, because: None }
        } else {
            Driver { name: PORTABLE, because: Some("the ring driver is not in this version".to_owned()) }
        }
    }
}

impl fmt::Display for Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)?;
        self.because.iter().try_for_each(|because| write!(f, ", because {because}"))
    }
}
