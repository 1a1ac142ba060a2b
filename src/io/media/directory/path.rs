//! Makes the path to the directory, and makes its name durable.
//!
//! If a power loss removed the name of one directory on the path, the store below it could no
//! longer be found.

use crate::base::error::{Error, Result};
use crate::io::media::probe_direct_io::not_made;
use std::fs::File;
use std::path::Path;

/// Makes the directory and its missing parents, and makes their names durable: a crash must not
/// remove a part of the path.
pub(super) fn make_directory(path: &Path) -> Result<()> {
    make_directories(path, path, &mut |parent| File::open(parent)?.sync_all())
}

/// Makes `path`, which is a part of the path `whole`; `sync` makes the names in a directory
/// durable.
fn make_directories(
    path: &Path,
    whole: &Path,
    sync: &mut dyn FnMut(&Path) -> std::io::Result<()>,
) -> Result<()> {
    if path.as_os_str().is_empty() || path.is_dir() {
        return Ok(());
    }
    let parent =
        path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    make_directories(parent, whole, sync)?;
    match std::fs::create_dir(path) {
        // Another process was faster, but may not have synced the name yet.
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists && path.is_dir() => {}
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {
            return Err(in_the_way(path, whole, e));
        }
        made => made.map_err(|e| {
            let context = format_args!("making the directory {}", whole.display());
            not_made(context, " (use one that this user may write)", e)
        })?,
    }
    match sync(parent) {
        // A parent may be writable and not readable: then its owner must make sure that the name is
        // durable.
        Err(e) if e.kind() == std::io::ErrorKind::PermissionDenied => Ok(()),
        synced => synced.map_err(|e| {
            Error::io(format_args!("syncing the directory entry of {}", path.display()), e)
        }),
    }
}

/// The error for a `path` that is a part of `whole` and not a directory.
fn in_the_way(path: &Path, whole: &Path, e: std::io::Error) -> Error {
    let link = std::fs::read_link(path);
    let is_file = std::fs::symlink_metadata(path).map(|meta| !meta.is_dir());
    let (path, whole) = (path.display(), whole.display());
    match link {
        Ok(to) => Error::invalid(format_args!(
            "the directory {whole} can't be made: {path} is a symbolic link to {}, and no \
             directory is there; make that one, or mount what it is on",
            to.display()
        )),
        Err(_) => match is_file {
            Ok(true) => Error::invalid(format_args!(
                "the directory {whole} can't be made: {path} is a file; name another directory, \
                 or move the file away"
            )),
            // The directory exists but can't be examined: the file system has failed.
            Ok(false) => Error::io(format_args!("making the directory {whole}"), e),
            Err(e) => Error::io(format_args!("reading attributes of {path}"), e),
        },
    }
}

/// Makes the names on the path to a directory durable: an earlier opening may have made some of
/// them and died before it synced them. Done once for a store, before it is created; errors are
/// ignored, since a parent may not be readable.
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

    /// A user who names a file, or a link to a disk that is not mounted, must learn which it is and
    /// what to do.
    #[test]
    fn what_is_in_the_way_of_a_directory_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let (file, link) = (dir.path().join("file"), dir.path().join("link"));
        std::fs::write(&file, "mine").unwrap();
        std::os::unix::fs::symlink("/nothing/is/there", &link).unwrap();
        let text = |path: &Path| make_directory(path).unwrap_err().to_string();
        assert!(text(&file).contains("file is a file"), "{}", text(&file));
        assert!(
            text(&file.join("below")).contains("file is a file"),
            "{}",
            text(&file.join("below"))
        );
        assert!(text(&link).contains("a symbolic link to /nothing/is/there"), "{}", text(&link));
    }

    /// A power loss that removes the name of one directory on the path loses the store, with all
    /// that was acknowledged.
    #[test]
    fn the_name_of_each_directory_that_is_made_is_made_durable() {
        let dir = tempfile::tempdir().unwrap();
        let there = dir.path().join("there");
        std::fs::create_dir(&there).unwrap();
        let mut synced: Vec<(PathBuf, bool)> = Vec::new();
        make_directories(&there.join("a/b/c"), &there.join("a/b/c"), &mut |parent| {
            // Record whether the parent has entries when its names become durable.
            synced.push((parent.to_owned(), parent.read_dir()?.next().is_some()));
            Ok(())
        })
        .unwrap();
        assert!(there.join("a/b/c").is_dir());
        assert_eq!(
            synced,
            [(there.clone(), true), (there.join("a"), true), (there.join("a/b"), true)]
        );
        let of = |name: &str, sync: &mut dyn FnMut(&Path) -> std::io::Result<()>| {
            make_directories(&there.join(name), &there.join(name), sync)
        };
        of("a/b", &mut |_| panic!("it is there")).unwrap();
        let refused = of("d", &mut |_| Err(std::io::Error::other("planted"))).unwrap_err();
        assert!(refused.to_string().contains("syncing the directory entry of"), "{refused}");
        // The error names the directory that was asked for, not one on the path to it.
        std::fs::write(there.join("file"), "mine").unwrap();
        let refused = of("file/below/it", &mut |_| Ok(())).unwrap_err();
        assert!(refused.to_string().contains("file/below/it"), "{refused}");
        make_directory(&there.join("e/f")).unwrap();
        assert!(there.join("e/f").is_dir());
    }
}
