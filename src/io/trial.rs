//! What can only be found out by trying: whether a directory can be made, written, and passed the page cache by in.
//!
//! Invariants
//! 1. A trial leaves nothing behind, and changes no file of a store.
//! 2. A disk that is full is told from a directory that this user may not write.

use super::backoff::patiently;
use super::device;
use crate::base::BLOCK;
use crate::base::error::{Error, ErrorKind, Result};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use std::fmt;
use std::fs::File;
use std::path::Path;

/// Whether a block can be written and read directly in `directory`, which is `path`, and whether the kernel vouches for
/// it. Leaves nothing behind.
///
/// # Errors
/// `Io`: the directory can't be written. `Full`: there is no room for one block.
pub(super) fn try_direct(directory: &File, path: &Path) -> Result<(bool, bool)> {
    let scratch = scratch(directory, path)?;
    let mut block = Box::new(Block([0x5a; BLOCK]));
    let takes = set_direct(&scratch).is_ok();
    let written = if takes { patiently(|| rustix::io::pwrite(&scratch, &block.0, 0)) } else { Ok(0) };
    if let Err(e @ (Errno::NOSPC | Errno::DQUOT)) = written {
        return Err(not_made(format_args!("trying direct I/O in {}", path.display()), "", e.into()));
    }
    let works = written == Ok(BLOCK) && {
        block.0.fill(0);
        patiently(|| rustix::io::pread(&scratch, &mut block.0, 0)) == Ok(BLOCK) && block.0 == [0x5a; BLOCK]
    };
    let says = device::says_direct(&scratch);
    Ok((works && says != Some(false), works && says == Some(true)))
}

/// Whether a read that passes the page cache by works; the file stays as it is.
pub(super) fn reads_directly(file: &File) -> bool {
    let mut block = Box::new(Block([0; BLOCK]));
    let Ok(flags) = rustix::fs::fcntl_getfl(file) else { return false };
    let works = rustix::fs::fcntl_setfl(file, flags | OFlags::DIRECT).is_ok()
        && patiently(|| rustix::io::pread(file, &mut block.0, 0)) == Ok(BLOCK);
    let _ = rustix::fs::fcntl_setfl(file, flags);
    works
}

/// The error for a file or directory that can't be made: what to do about it, if it is not for lack of space.
pub(super) fn not_made(doing: impl fmt::Display, advice: &str, e: std::io::Error) -> Error {
    match e.kind() {
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
            Error::io(doing, e).with_kind(ErrorKind::Full)
        }
        _ => Error::io(format_args!("{doing}{advice}"), e),
    }
}

pub(super) fn set_direct(file: &File) -> rustix::io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(file)?;
    rustix::fs::fcntl_setfl(file, flags | OFlags::DIRECT)
}

/// A file that is gone when it is closed. That it can be made shows that the directory can be written.
pub(super) fn scratch(directory: &File, path: &Path) -> Result<File> {
    let mode = Mode::from_raw_mode(0o600);
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    if let Ok(file) = patiently(|| rustix::fs::openat(directory, ".", flags | OFlags::TMPFILE, mode)) {
        return Ok(file.into());
    }
    named_scratch(directory, path)
}

/// The same for file systems that have no files without a name (FUSE, NFS). The name is of chance: a process id comes again, in a
/// container at each start, and a process that was killed in between has left its file.
fn named_scratch(directory: &File, path: &Path) -> Result<File> {
    let mode = Mode::from_raw_mode(0o600);
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::CREATE | OFlags::EXCL;
    let not_written = |e: Errno| {
        let context = format_args!("the directory {} can't be written", path.display());
        not_made(context, ": give this user the right to, or use another", e.into())
    };
    loop {
        let mut chance = [0; 8];
        rustix::rand::getrandom(&mut chance, rustix::rand::GetRandomFlags::empty()).map_err(not_written)?;
        let name = format!(".corepage-probe-{:016x}", u64::from_ne_bytes(chance));
        match rustix::fs::openat(directory, name.as_str(), flags, mode) {
            Err(Errno::EXIST | Errno::INTR) => {}
            Err(e) => return Err(not_written(e)),
            Ok(made) => {
                let _ = rustix::fs::unlinkat(directory, name.as_str(), rustix::fs::AtFlags::empty());
                return Ok(made.into());
            }
        }
    }
}

/// A block at an address that direct I/O takes.
#[repr(C, align(4096))]
pub(super) struct Block(pub(super) [u8; BLOCK]);

/// Makes it, and those above it that are missing, and their names durable: the path must outlive a crash as a whole, or
/// the store in it is nowhere to be found.
pub(super) fn make_directory(path: &Path) -> Result<()> {
    make_directories(path, path, &mut |parent| File::open(parent)?.sync_all())
}

/// The same, of which `path` is the part on the way to `whole`; `sync` makes the names in a directory durable.
fn make_directories(path: &Path, whole: &Path, sync: &mut dyn FnMut(&Path) -> std::io::Result<()>) -> Result<()> {
    if path.as_os_str().is_empty() || path.is_dir() {
        return Ok(());
    }
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    make_directories(parent, whole, sync)?;
    match std::fs::create_dir(path) {
        // Another process was faster; whether it has synced the name by now is not known.
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists && path.is_dir() => {}
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => return Err(in_the_way(path, whole, e)),
        made => made.map_err(|e| {
            let context = format_args!("making the directory {}", whole.display());
            not_made(context, " (use one that this user may write)", e)
        })?,
    }
    match sync(parent) {
        // A parent that may be written and not read: its owner has to see to it that the name lasts.
        Err(e) if e.kind() == std::io::ErrorKind::PermissionDenied => Ok(()),
        synced => synced.map_err(|e| Error::io(format_args!("making durable the name of {}", path.display()), e)),
    }
}

/// Something else than a directory is at `path`, on the way to `whole`.
fn in_the_way(path: &Path, whole: &Path, e: std::io::Error) -> Error {
    let link = std::fs::read_link(path);
    let is_file = std::fs::symlink_metadata(path).map(|meta| !meta.is_dir());
    let (path, whole) = (path.display(), whole.display());
    match link {
        Ok(to) => Error::invalid(format_args!(
            "the directory {whole} can't be made: {path} is a symbolic link to {}, and no directory is there; make that one, or mount \
             what it is on",
            to.display()
        )),
        Err(_) => match is_file {
            Ok(true) => Error::invalid(format_args!(
                "the directory {whole} can't be made: {path} is a file; name another directory, or move the file away"
            )),
            // There is a directory, and it can't be looked at: the file system has failed.
            Ok(false) => Error::io(format_args!("making the directory {whole}"), e),
            Err(e) => Error::io(format_args!("looking at {path}"), e),
        },
    }
}

/// Makes the names on the way to a directory durable: an earlier opening may have made some of them, and died before it
/// had. Once for a store, before it is made; a directory that can't be synced is its owner's to see to.
pub(super) fn sync_names_of(path: &Path) {
    let Ok(path) = path.canonicalize() else { return };
    for above in path.ancestors().skip(1) {
        let _ = File::open(above).and_then(|above| above.sync_all());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    /// If this fails, a store can't be opened again in a container on a file system such as FUSE after one kill at the wrong moment:
    /// the process id is the same at each start.
    #[test]
    fn what_a_killed_process_has_left_of_a_trial_is_in_nobodys_way() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(format!(".corepage-probe-{}", std::process::id())), "left").unwrap();
        let directory = File::open(dir.path()).unwrap();
        let files: Vec<_> = (0..3).map(|_| named_scratch(&directory, dir.path()).unwrap()).collect();
        assert_eq!(dir.path().read_dir().unwrap().count(), 1, "nothing more is left");
        drop(files);
    }

    /// Whoever names a file, or a link to a disk that is not mounted, has to learn which, and what to do.
    #[test]
    fn what_is_in_the_way_of_a_directory_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let (file, link) = (dir.path().join("file"), dir.path().join("link"));
        std::fs::write(&file, "mine").unwrap();
        std::os::unix::fs::symlink("/nothing/is/there", &link).unwrap();
        let text = |path: &Path| make_directory(path).unwrap_err().to_string();
        assert!(text(&file).contains("file is a file"), "{}", text(&file));
        assert!(text(&file.join("below")).contains("file is a file"), "{}", text(&file.join("below")));
        assert!(text(&link).contains("a symbolic link to /nothing/is/there"), "{}", text(&link));
    }

    /// A power loss that takes the name of one directory on the way takes the store, with all that was acknowledged.
    #[test]
    fn the_name_of_each_directory_that_is_made_is_made_durable() {
        let dir = tempfile::tempdir().unwrap();
        let there = dir.path().join("there");
        std::fs::create_dir(&there).unwrap();
        let mut synced: Vec<(PathBuf, bool)> = Vec::new();
        make_directories(&there.join("a/b/c"), &there.join("a/b/c"), &mut |parent| {
            // As it is when its names become durable.
            synced.push((parent.to_owned(), parent.read_dir()?.next().is_some()));
            Ok(())
        })
        .unwrap();
        assert!(there.join("a/b/c").is_dir());
        assert_eq!(synced, [(there.clone(), true), (there.join("a"), true), (there.join("a/b"), true)]);
        let of = |name: &str, sync: &mut dyn FnMut(&Path) -> std::io::Result<()>| {
            make_directories(&there.join(name), &there.join(name), sync)
        };
        of("a/b", &mut |_| panic!("it is there")).unwrap();
        let refused = of("d", &mut |_| Err(std::io::Error::other("planted"))).unwrap_err();
        assert!(refused.to_string().contains("making durable the name of"), "{refused}");
        // The directory that was asked for is named, not one on the way to it.
        std::fs::write(there.join("file"), "mine").unwrap();
        let refused = of("file/below/it", &mut |_| Ok(())).unwrap_err();
        assert!(refused.to_string().contains("file/below/it"), "{refused}");
        make_directory(&there.join("e/f")).unwrap();
        assert!(there.join("e/f").is_dir());
    }
}
