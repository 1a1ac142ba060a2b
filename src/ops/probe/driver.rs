//! io_uring: whether a ring can really be set up, why not, and which driver follows.

use super::Roots;
use crate::io::{ProcessLimits, UnavailableReason, UringUnavailable, uring};
use std::fmt;

/// Whether this version has the ring driver.
pub(super) const RING_DRIVER: bool = true;
/// The drivers' names.
pub(super) const RING: &str = "io_uring";
const PORTABLE: &str = "portable";

/// Whether a ring can be set up.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct IoUring {
    /// It was done.
    pub available: bool,
    /// Why it was not.
    pub refusal: Option<UnavailableReason>,
    /// The error that the kernel gave (`EPERM` and so on), or what its io_uring lacks.
    pub error: Option<String>,
    /// kernel.io_uring_disabled: 0 allowed, 1 for the privileged only, 2 forbidden; absent before Linux 6.6.
    pub disabled_setting: Option<u32>,
    /// Whether a seccomp filter is on this process.
    pub seccomp_filter: bool,
}

impl IoUring {
    /// Sets a ring up, and takes it down again.
    pub(super) fn try_one(roots: &Roots) -> IoUring {
        let it = ProcessLimits::read(&roots.proc);
        IoUring::new(uring::probe_ordinary().err(), it.setting, it.filter)
    }

    pub(super) fn new(
        refused: Option<UringUnavailable>,
        disabled_setting: Option<u32>,
        seccomp_filter: bool,
    ) -> IoUring {
        IoUring {
            available: refused.is_none(),
            refusal: refused.as_ref().map(|refused| refused.reason),
            error: refused.map(|refused| refused.error),
            disabled_setting,
            seccomp_filter,
        }
    }

    /// The refusal as a whole.
    pub fn refused(&self) -> Option<UringUnavailable> {
        self.refusal.map(|reason| UringUnavailable { reason, error: self.error.clone().unwrap_or_default() })
    }
}

/// Locked memory without which an executor refuses to start.
const EXECUTOR_LOCKED_MIN: u64 = 512 << 10;

/// Why the executors of the ring driver can't be started, if they can't.
pub(crate) fn executor_refused() -> Option<String> {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Memlock).current?;
    (limit < EXECUTOR_LOCKED_MIN).then(|| {
        format!(
            "the limit of locked memory is {} KiB, and the executor needs {} KiB: raise it (ulimit -l, LimitMEMLOCK)",
            limit >> 10,
            EXECUTOR_LOCKED_MIN >> 10
        )
    })
}

/// The way to the disk that is taken.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct Driver {
    /// `io_uring` or `portable`.
    pub name: &'static str,
    /// Why it is not the ring.
    pub because: Option<String>,
}

impl Driver {
    /// What `auto` takes on this machine, for this process.
    pub fn auto() -> Driver {
        Driver::choose(&IoUring::try_one(&Roots::default())).unless(executor_refused())
    }

    /// The portable driver if there is such a reason against the ring.
    pub(super) fn unless(self, refused: Option<String>) -> Driver {
        match refused {
            Some(why) if self.because.is_none() => Driver { name: PORTABLE, because: Some(why) },
            _ => self,
        }
    }

    /// What `auto` takes where a ring was tried with this outcome.
    pub fn choose(io_uring: &IoUring) -> Driver {
        match io_uring.refused() {
            Some(refused) => Driver { name: PORTABLE, because: Some(refused.to_string()) },
            None if RING_DRIVER => Driver { name: RING, because: None },
            None => Driver { name: PORTABLE, because: Some("the ring driver is not in this version".to_owned()) },
        }
    }
}

impl fmt::Display for Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)?;
        self.because.iter().try_for_each(|because| write!(f, ", because {because}"))
    }
}
