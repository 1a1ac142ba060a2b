//! Probes io_uring: whether a ring can be created, why not, and which driver `auto` chooses.

use super::Roots;
use crate::io::{ProcessLimits, UnavailableReason, UringUnavailable, uring};
use std::fmt;

/// The drivers' names.
pub(super) const RING: &str = "io_uring";
const PORTABLE: &str = "portable";

/// Whether a ring can be created.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct IoUring {
    /// A ring was created and torn down.
    pub available: bool,
    /// Why it could not be created, if it could not.
    pub refusal: Option<UnavailableReason>,
    /// The kernel's error (`EPERM` and so on), or the feature that its io_uring lacks.
    pub error: Option<String>,
    /// kernel.io_uring_disabled: 0 allows it, 1 allows it to the privileged only, 2 forbids it;
    /// absent before Linux 6.6.
    pub disabled_setting: Option<u32>,
    /// Whether a seccomp filter is installed for this process.
    pub seccomp_filter: bool,
}

impl IoUring {
    /// Creates a ring and tears it down.
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

    /// The reason and the error together, if there is no ring.
    pub fn refused(&self) -> Option<UringUnavailable> {
        self.refusal.map(|reason| UringUnavailable {
            reason,
            error: self.error.clone().unwrap_or_default(),
        })
    }
}

/// The limit of locked memory below which an executor refuses to start.
const EXECUTOR_LOCKED_MIN: u64 = 512 << 10;

/// Why the executors of the ring driver can't be started, if they can't.
pub(crate) fn executor_refused() -> Option<String> {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Memlock).current?;
    (limit < EXECUTOR_LOCKED_MIN).then(|| {
        format!(
            "the limit of locked memory is {} KiB, and the executor needs {} KiB: raise it \
             (ulimit -l, LimitMEMLOCK)",
            limit >> 10,
            EXECUTOR_LOCKED_MIN >> 10
        )
    })
}

/// The driver that `auto` chooses.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct AutoDriver {
    /// `io_uring` or `portable`.
    pub name: &'static str,
    /// Why it is not the ring driver, if it is not.
    pub because: Option<String>,
}

impl AutoDriver {
    pub(super) fn is_ring(&self) -> bool {
        self.name == RING
    }

    /// Probes this machine and chooses for this process.
    pub fn auto() -> AutoDriver {
        AutoDriver::choose(&IoUring::try_one(&Roots::default())).unless(executor_refused())
    }

    /// Falls back to the portable driver if the executor was refused.
    pub(super) fn unless(self, refused: Option<String>) -> AutoDriver {
        match refused {
            Some(why) if self.because.is_none() => {
                AutoDriver { name: PORTABLE, because: Some(why) }
            }
            _ => self,
        }
    }

    /// Chooses the driver that follows from the outcome of a probe.
    pub fn choose(io_uring: &IoUring) -> AutoDriver {
        match io_uring.refused() {
            Some(refused) => AutoDriver { name: PORTABLE, because: Some(refused.to_string()) },
            None => AutoDriver { name: RING, because: None },
        }
    }
}

impl fmt::Display for AutoDriver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)?;
        self.because.iter().try_for_each(|because| write!(f, ", because {because}"))
    }
}
