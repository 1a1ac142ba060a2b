//! Reads how much processor time and memory the control groups of this process allow (cgroups(7),
//! versions 1 and 2).
//!
//! Invariants
//! 1. A group is also bound by the limits of all groups above it: the lowest counts.
//! 2. A limit that can't be read or understood counts as none.
//!
//! It does *not* see groups above the root of a container's own view: the kernel hides them.

use super::mounts::unescape;
use super::{Roots, text};
use std::path::{Path, PathBuf};

/// The thousandths of a processor that this process may use, if a control group limits them.
pub(super) fn look(roots: &Roots) -> Option<u64> {
    quota_millis(&roots.proc("self/cgroup")?, &roots.proc("self/mountinfo")?, text)
}

/// Computes the same from the texts of `/proc/self/cgroup` and `/proc/self/mountinfo`; `read`
/// returns a file's text.
pub(super) fn quota_millis(
    membership: &str,
    mountinfo: &str,
    read: impl Fn(&Path) -> Option<String>,
) -> Option<u64> {
    lowest("cpu", membership, mountinfo, |version, group| processor_millis(version, group, &read))
}

/// The bytes of memory that this process may use, if a control group limits them.
pub(super) fn memory_limit_bytes(roots: &Roots) -> Option<u64> {
    match (roots.proc("self/cgroup"), roots.proc("self/mountinfo")) {
        (Some(membership), Some(mountinfo)) => memory_bytes(&membership, &mountinfo, text),
        // Without /proc, the group that a container sees is usually its own.
        _ => {
            let own = |version, name| memory_limit(version, &roots.sys.join(name), &text);
            own(2, "fs/cgroup").or_else(|| own(1, "fs/cgroup/memory"))
        }
    }
}

/// Computes the same from the texts of `/proc/self/cgroup` and `/proc/self/mountinfo`.
pub(super) fn memory_bytes(
    membership: &str,
    mountinfo: &str,
    read: impl Fn(&Path) -> Option<String>,
) -> Option<u64> {
    lowest("memory", membership, mountinfo, |version, group| memory_limit(version, group, &read))
}

/// The lowest limit that the groups of this process set by `controller`.
fn lowest(
    controller: &str,
    membership: &str,
    mountinfo: &str,
    limit: impl Fn(u8, &Path) -> Option<u64>,
) -> Option<u64> {
    let mounts: Vec<Hierarchy> =
        mountinfo.lines().filter_map(|line| Hierarchy::parse(line, controller)).collect();
    let limits = membership.lines().filter_map(|line| {
        // `0::/path` for version 2, `4:cpu,cpuacct:/path` for version 1.
        let (_, rest) = line.split_once(':')?;
        let (controllers, path) = rest.split_once(':')?;
        let hierarchy = match controllers {
            "" => mounts.iter().find(|mount| mount.version == 2)?,
            _ if controllers.split(',').any(|name| name == controller) => {
                mounts.iter().find(|mount| mount.version == 1)?
            }
            _ => return None,
        };
        hierarchy.lowest(Path::new(path), &limit)
    });
    limits.min()
}

/// A mounted tree of control groups that may set limits.
struct Hierarchy {
    version: u8,
    /// The group that is mounted: in a container it is not the topmost one.
    root: PathBuf,
    point: PathBuf,
}

impl Hierarchy {
    /// `36 35 98:0 /root /mount/point options [optional...] - type source super-options`
    fn parse(line: &str, controller: &str) -> Option<Hierarchy> {
        let (left, right) = line.split_once(" - ")?;
        let (mut left, mut right) = (left.split(' ').skip(3), right.split(' '));
        let (root, point) =
            (PathBuf::from(unescape(left.next()?)), PathBuf::from(unescape(left.next()?)));
        let version = match right.next()? {
            "cgroup2" => 2,
            "cgroup" if right.nth(1)?.split(',').any(|option| option == controller) => 1,
            _ => return None,
        };
        Some(Hierarchy { version, root, point })
    }

    /// The lowest limit among the group `path` and those above it.
    fn lowest(&self, path: &Path, limit: &impl Fn(u8, &Path) -> Option<u64>) -> Option<u64> {
        // If the group is outside what is mounted here, only the mounted one can be read.
        let below = path.strip_prefix(&self.root).ok().filter(|below| !below.starts_with(".."));
        let group = self.point.join(below.unwrap_or(Path::new("")));
        let above = group.ancestors().take_while(|group| group.starts_with(&self.point));
        above.filter_map(|group| limit(self.version, group)).min()
    }
}

fn processor_millis(
    version: u8,
    group: &Path,
    read: &impl Fn(&Path) -> Option<String>,
) -> Option<u64> {
    let (quota, period) = match version {
        2 => {
            let text = read(&group.join("cpu.max"))?;
            let (quota, period) = text.split_once(' ')?;
            (quota.to_owned(), period.to_owned())
        }
        _ => (read(&group.join("cpu.cfs_quota_us"))?, read(&group.join("cpu.cfs_period_us"))?),
    };
    // `max` and -1 do not parse as such numbers, and mean no limit.
    let (quota, period): (u64, u64) = (quota.trim().parse().ok()?, period.trim().parse().ok()?);
    quota.checked_mul(1000)?.checked_div(period)
}

/// Above `memory.high` the kernel slows a group down until it hardly makes progress; above
/// `memory.max` it kills a process in it.
fn memory_limit(version: u8, group: &Path, read: &impl Fn(&Path) -> Option<String>) -> Option<u64> {
    let names: &[&str] = match version {
        2 => &["memory.max", "memory.high"],
        _ => &["memory.limit_in_bytes"],
    };
    // Version 1 reports "no limit" as a number that is larger than any memory.
    let number =
        |name: &&str| read(&group.join(name))?.trim().parse().ok().filter(|bytes| *bytes < 1 << 62);
    names.iter().filter_map(number).min()
}
