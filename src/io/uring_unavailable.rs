//! Explains why io_uring is unavailable: the kernel's error says little, so the limits of this
//! process are read as well.
//!
//! Invariants
//! 1. Only an attempt shows whether a ring can be created. The files in /proc explain a refusal and
//!    never predict one.
//! 2. If several reasons apply, the one that has to be removed first is named: the machine's
//!    setting before a filter.
//!
//! It does *not* create a ring.

use rustix::io::Errno;
use std::fmt;
use std::path::Path;

/// Bit numbers of capabilities (capabilities(7)).
const CAP_IPC_LOCK: u32 = 14;
const CAP_SYS_ADMIN: u32 = 21;

/// Why no ring could be created.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
pub enum UnavailableReason {
    /// The kernel lacks io_uring or a part of it that is needed: it is older than 5.11, or built
    /// without it.
    Kernel,
    /// A seccomp filter on this process refuses it, as the filters of containers do.
    Seccomp,
    /// The setting kernel.io_uring_disabled refuses it.
    Setting,
    /// A security module refuses it, or something else that gives no reason.
    Policy,
    /// The limit of locked memory is used up.
    MemoryLocks,
    /// The limit of open files is used up.
    OpenFiles,
    /// Any other reason; the error's name tells which.
    Other,
}

/// The kernel refused to create a ring.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct UringUnavailable {
    /// The reason, as far as it is known.
    pub reason: UnavailableReason,
    /// The kernel's error (`EPERM`), or what its io_uring lacks.
    pub error: String,
}

impl UringUnavailable {
    /// Explains a kernel error from the limits of this process.
    pub(crate) fn by_error(doing: &str, e: &std::io::Error) -> UringUnavailable {
        let errno = Errno::from_io_error(e).unwrap_or(Errno::INVAL);
        let error = match doing {
            "creating a ring" => errno_name(errno),
            _ => format!("{} when {doing}", errno_name(errno)),
        };
        UringUnavailable { reason: explain(errno, &ProcessLimits::read(Path::new("/proc"))), error }
    }
}

impl fmt::Display for UringUnavailable {
    /// Completes a sentence such as "portable, because …".
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let why = match self.reason {
            UnavailableReason::Kernel => "this kernel has no io_uring, or too old a one",
            UnavailableReason::Seccomp => "a seccomp filter forbids io_uring",
            UnavailableReason::Setting => "the setting kernel.io_uring_disabled forbids io_uring",
            UnavailableReason::Policy => "a security policy forbids io_uring",
            UnavailableReason::MemoryLocks => {
                "the limit of locked memory leaves no room for an io_uring ring"
            }
            UnavailableReason::OpenFiles => {
                "the limit of open files leaves none for an io_uring ring"
            }
            UnavailableReason::Other => "an io_uring ring can't be set up",
        };
        write!(f, "{why} ({})", self.error)
    }
}

/// What may keep this process from using io_uring.
#[derive(Clone, Debug, Default)]
pub(crate) struct ProcessLimits {
    /// kernel.io_uring_disabled: 0 allows it, 1 allows it to the privileged only, 2 forbids it;
    /// absent before Linux 6.6.
    pub setting: Option<u32>,
    /// Whether a seccomp filter is installed.
    pub filter: bool,
    /// Whether the process has `CAP_SYS_ADMIN`.
    pub admin: bool,
    /// Whether the kernel enforces the limit of locked memory.
    pub locks_enforced: bool,
}

impl ProcessLimits {
    /// Reads `proc`, which is `/proc`.
    pub(crate) fn read(proc: &Path) -> ProcessLimits {
        let text = |name: &str| std::fs::read_to_string(proc.join(name)).unwrap_or_default();
        // Each thread has its own filters and capabilities.
        let (status, uid_map) = (text("thread-self/status"), text("self/uid_map"));
        let field =
            |name: &str| status.lines().find_map(|line| Some(line.strip_prefix(name)?.trim()));
        let has = |bit| field("CapEff:").is_some_and(|hex| has_capability(hex, bit));
        // Capabilities in a user namespace other than the initial one do not count for locks.
        let is_initial = uid_map.is_empty() || is_whole_id_map(&uid_map);
        ProcessLimits {
            setting: text("sys/kernel/io_uring_disabled").trim().parse().ok(),
            filter: field("Seccomp:") == Some("2"),
            admin: has(CAP_SYS_ADMIN),
            locks_enforced: !(is_initial && has(CAP_IPC_LOCK)),
        }
    }
}

/// Whether the hexadecimal set `hex` has capability number `bit`.
fn has_capability(hex: &str, bit: u32) -> bool {
    u64::from_str_radix(hex, 16).is_ok_and(|set| set >> bit & 1 == 1)
}

/// Whether a uid_map is that of the initial user namespace, which maps every id to itself.
fn is_whole_id_map(map: &str) -> bool {
    map.split_whitespace().eq(["0", "0", "4294967295"])
}

fn explain(errno: Errno, limits: &ProcessLimits) -> UnavailableReason {
    match errno {
        // The setting exists only where io_uring does, so this is a filter that pretends to be an
        // old kernel.
        Errno::NOSYS if limits.filter && limits.setting.is_some() => UnavailableReason::Seccomp,
        Errno::NOSYS => UnavailableReason::Kernel,
        Errno::PERM | Errno::ACCESS => match limits.setting {
            Some(2) => UnavailableReason::Setting,
            Some(1) if !limits.admin => UnavailableReason::Setting,
            _ if limits.filter => UnavailableReason::Seccomp,
            _ => UnavailableReason::Policy,
        },
        Errno::NOMEM if limits.locks_enforced => UnavailableReason::MemoryLocks,
        Errno::MFILE | Errno::NFILE => UnavailableReason::OpenFiles,
        _ => UnavailableReason::Other,
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

#[cfg(test)]
mod tests {
    use super::*;

    /// A wrong reason sends its reader to change a setting that was never the cause.
    #[test]
    fn a_refused_ring_is_explained_by_what_refused_it() {
        use UnavailableReason::*;
        let it =
            |setting, filter, admin| ProcessLimits { setting, filter, admin, locks_enforced: true };
        let cases = [
            (Errno::NOSYS, it(None, false, false), Kernel),
            (Errno::NOSYS, it(None, true, false), Kernel),
            (Errno::NOSYS, it(Some(0), true, false), Seccomp),
            (Errno::PERM, it(Some(0), true, true), Seccomp),
            (Errno::PERM, it(None, true, false), Seccomp),
            (Errno::PERM, it(Some(2), true, true), Setting),
            (Errno::PERM, it(Some(1), false, false), Setting),
            (Errno::PERM, it(Some(1), true, true), Seccomp),
            (Errno::PERM, it(Some(0), false, false), Policy),
            (Errno::ACCESS, it(Some(0), false, false), Policy),
            (Errno::NOMEM, it(Some(0), false, false), MemoryLocks),
            (Errno::NOMEM, ProcessLimits::default(), Other),
            (Errno::MFILE, it(Some(0), false, false), OpenFiles),
            (Errno::INVAL, it(Some(0), false, false), Other),
        ];
        for (errno, limits, wanted) in cases {
            assert_eq!(explain(errno, &limits), wanted, "{errno:?} {limits:?}");
        }
    }

    #[test]
    fn process_limits_are_read_as_they_are_meant() {
        let dir = tempfile::tempdir().expect("a directory");
        let read = |setting: &str, mode: u32, capabilities: &str, map: &str| {
            std::fs::create_dir_all(dir.path().join("sys/kernel")).expect("a folder");
            std::fs::create_dir_all(dir.path().join("self")).expect("a folder");
            std::fs::create_dir_all(dir.path().join("thread-self")).expect("a folder");
            let write = |name: &str, text: &str| {
                std::fs::write(dir.path().join(name), text).expect("a file")
            };
            write("sys/kernel/io_uring_disabled", setting);
            write(
                "thread-self/status",
                &format!("Name:\tx\nCapEff:\t{capabilities}\nNoNewPrivs:\t0\nSeccomp:\t{mode}\n"),
            );
            write("self/uid_map", map);
            let it = ProcessLimits::read(dir.path());
            (it.setting, it.filter, it.admin, it.locks_enforced)
        };
        let whole = "         0          0 4294967295\n";
        assert_eq!(read("0\n", 0, "000001ffffffffff", whole), (Some(0), false, true, false));
        assert_eq!(read("2\n", 2, "000001ffffffbfff", whole), (Some(2), true, true, true));
        assert_eq!(read("", 2, "0000000000000000", whole), (None, true, false, true));
        // Root in a container without privileges.
        assert_eq!(
            read("1\n", 2, "000001ffffffffff", "0 100000 65536\n"),
            (Some(1), true, true, true)
        );
        let nothing = ProcessLimits::read(Path::new("/no-such-directory"));
        assert!(nothing.setting.is_none() && !nothing.filter && nothing.locks_enforced);
    }
}
