//! Probes whether direct I/O works in a directory, by writing and reading one block.
//!
//! Some file systems accept the flag on open and then fail each transfer, so only a transfer can
//! tell.
//!
//! Invariants
//! 1. A probe leaves nothing behind, and changes no file of a store.
//! 2. A full disk is distinguished from a directory that this user may not write.

use super::device;
use crate::base::BLOCK;
use crate::base::error::{Error, ErrorKind, Result};
use crate::io::backoff::retry_transient;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use std::fmt;
use std::fs::File;
use std::path::Path;

/// The result of a probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DirectIo {
    /// The file system refuses direct I/O, or says that it uses the page cache anyway.
    Refused,
    /// A block was transferred with it.
    Works,
    /// A block was transferred with it, and the kernel vouches that the page cache was bypassed.
    Vouched,
}

impl DirectIo {
    /// A block was transferred through `file`.
    fn judged(file: &File) -> DirectIo {
        match device::says_direct(file) {
            Some(false) => DirectIo::Refused,
            None => DirectIo::Works,
            Some(true) => DirectIo::Vouched,
        }
    }
}

/// Writes and reads a block directly in `directory`, which is `path`. Leaves nothing behind.
///
/// # Errors
/// `Io`: the directory can't be written. `Full`: there is no room for one block.
pub(in crate::io) fn try_direct(directory: &File, path: &Path) -> Result<DirectIo> {
    let scratch = scratch(directory, path)?;
    let mut block = Box::new(Block([PATTERN; BLOCK]));
    let takes = set_direct(&scratch).is_ok();
    let written =
        if takes { retry_transient(|| rustix::io::pwrite(&scratch, &block.0, 0)) } else { Ok(0) };
    if let Err(e @ (Errno::NOSPC | Errno::DQUOT)) = written {
        return Err(not_made(
            format_args!("trying direct I/O in {}", path.display()),
            "",
            e.into(),
        ));
    }
    let works = written == Ok(BLOCK) && {
        block.0.fill(0);
        retry_transient(|| rustix::io::pread(&scratch, &mut block.0, 0)) == Ok(BLOCK)
            && block.0 == [PATTERN; BLOCK]
    };
    Ok(if works { DirectIo::judged(&scratch) } else { DirectIo::Refused })
}

/// Whether a direct read of a file works; the file is not changed.
pub(super) fn try_direct_read(file: &File) -> DirectIo {
    let mut block = Box::new(Block([0; BLOCK]));
    let Ok(flags) = rustix::fs::fcntl_getfl(file) else { return DirectIo::Refused };
    let works = rustix::fs::fcntl_setfl(file, flags | OFlags::DIRECT).is_ok()
        && retry_transient(|| rustix::io::pread(file, &mut block.0, 0)) == Ok(BLOCK);
    let _ = rustix::fs::fcntl_setfl(file, flags);
    if works { DirectIo::judged(file) } else { DirectIo::Refused }
}

/// The error for a file or directory that can't be made, with advice unless the disk is full.
pub(super) fn not_made(doing: impl fmt::Display, advice: &str, e: std::io::Error) -> Error {
    match e.kind() {
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
            Error::io(doing, e).with_kind(ErrorKind::Full)
        }
        _ => Error::io(format_args!("{doing}{advice}"), e),
    }
}

pub(in crate::io) fn set_direct(file: &File) -> rustix::io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(file)?;
    rustix::fs::fcntl_setfl(file, flags | OFlags::DIRECT)
}

/// Makes a file that disappears when it is closed. Success shows that the directory can be written.
pub(super) fn scratch(directory: &File, path: &Path) -> Result<File> {
    let mode = Mode::from_raw_mode(0o600);
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    if let Ok(file) =
        retry_transient(|| rustix::fs::openat(directory, ".", flags | OFlags::TMPFILE, mode))
    {
        return Ok(file.into());
    }
    named_scratch(directory, path)
}

/// Does the same on file systems that have no files without a name (FUSE, NFS). The name is random:
/// a process id recurs, in a container at each start, and would collide with the file that a killed
/// process left.
fn named_scratch(directory: &File, path: &Path) -> Result<File> {
    let mode = Mode::from_raw_mode(0o600);
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::CREATE | OFlags::EXCL;
    let not_written = |e: Errno| {
        let context = format_args!("the directory {} can't be written", path.display());
        not_made(context, ": give this user the right to, or use another", e.into())
    };
    loop {
        let mut random = [0; 8];
        rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())
            .map_err(not_written)?;
        let name = format!(".corepage-probe-{:016x}", u64::from_ne_bytes(random));
        match rustix::fs::openat(directory, name.as_str(), flags, mode) {
            Err(Errno::EXIST | Errno::INTR) => {}
            Err(e) => return Err(not_written(e)),
            Ok(made) => {
                let _ =
                    rustix::fs::unlinkat(directory, name.as_str(), rustix::fs::AtFlags::empty());
                return Ok(made.into());
            }
        }
    }
}

/// A block at an address that direct I/O accepts.
#[repr(C, align(4096))]
pub(in crate::io) struct Block(pub(in crate::io) [u8; BLOCK]);

/// The byte that a probe writes; neither a hole nor fresh memory reads as this.
pub(in crate::io) const PATTERN: u8 = 0x5a;

#[cfg(test)]
mod tests {
    use super::*;

    /// If this fails, a kill at the wrong moment keeps a store in a container on a file system such
    /// as FUSE from ever being opened again: the process id is the same at each start.
    #[test]
    fn a_file_that_a_killed_process_left_does_not_stop_the_next_probe() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(format!(".corepage-probe-{}", std::process::id())), "left")
            .unwrap();
        let directory = File::open(dir.path()).unwrap();
        let files: Vec<_> =
            (0..3).map(|_| named_scratch(&directory, dir.path()).unwrap()).collect();
        assert_eq!(dir.path().read_dir().unwrap().count(), 1, "nothing more is left");
        drop(files);
    }
}
