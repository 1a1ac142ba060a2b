//! Finds the mount that a path lies on (proc_pid_mountinfo(5)), for file systems that hide their
//! device from `stat`.

use std::path::{Path, PathBuf};

/// A mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Mount {
    /// The kernel's name of the file system: `ext4`, `fuse.sshfs`.
    pub file_system: String,
    /// The mounted source, often a device's path.
    pub source: PathBuf,
}

/// The mount that `path`, which is absolute and without links, lies on.
pub(super) fn mount_of(mountinfo: &str, path: &Path) -> Option<Mount> {
    let mut best: Option<(usize, Mount)> = None;
    for line in mountinfo.lines() {
        let Some((point, mount)) = parse(line) else { continue };
        let depth = point.components().count();
        // Of two mounts on one point, the later one hides the other.
        if path.starts_with(&point) && best.as_ref().is_none_or(|(most, _)| depth >= *most) {
            best = Some((depth, mount));
        }
    }
    Some(best?.1)
}

/// `36 35 98:0 /root /mount/point options [optional...] - type source super-options`
fn parse(line: &str) -> Option<(PathBuf, Mount)> {
    let (left, right) = line.split_once(" - ")?;
    let point = left.split(' ').nth(4)?;
    let mut right = right.split(' ');
    let file_system = right.next()?.to_owned();
    Some((
        PathBuf::from(unescape(point)),
        Mount { file_system, source: PathBuf::from(unescape(right.next()?)) },
    ))
}

/// Undoes escapes such as `\040`.
pub(super) fn unescape(text: &str) -> String {
    let mut out = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        let octal = after
            .get(..3)
            .filter(|_| byte == b'\\')
            .and_then(|digits| std::str::from_utf8(digits).ok());
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                out.push(byte);
                rest = &after[3..];
            }
            None => {
                out.push(byte);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}
