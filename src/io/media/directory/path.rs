//! The path to the directory: making it, and making its name durable.
//!
//! If a power loss took the name of one directory on the way, the store below it could not be found
//! any more.

use crate::base::error::{Error, Result};
use crate::io::media::probe_direct_io::not_made;
use std::fs::File;
use std::path::Path;

/// Makes the directory and its missing parents, and makes their names durable: a crash must not
/// take a part of the path.
pub(super) fn make_directory(path: &Path) -> Result<()> {
    make_directories(path, path, &mut |parent| File::open(parent)?.sync_all())
}

/// Makes `path`, which is on the way to `whole`; `sync` makes the names in a directory durable.
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
        // Another process was faster; whether it has synced the name by now is not known.
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
        // A parent that may be written and not read: its owner has to see to it that the name
        // lasts.
        Err(e) if e.kind() == std::io::ErrorKind::PermissionDenied => Ok(()),
        synced => synced.map_err(|e| {
            Error::io(format_args!("making durable the name of {}", path.display()), e)
        }),
    }
}

/// The error for a `path` on the way to `whole` that is not a directory.
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
            // There is a directory, and it can't be looked at: the file system has failed.
            Ok(false) => Error::io(format_args!("making the directory {whole}"), e),
            Err(e) => Error::io(format_args!("looking at {path}"), e),
        },
    }
}

/// Makes the names on the way to a directory durable: an earlier opening may have made some of them
/// and died before it synced them. Done once for a store, before it is made; errors are ignored,
/// since a parent may not be readable.
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

    /// A user who names a file, or a link to a disk that is not mounted, has to learn which, and
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

    /// A power loss that takes the name of one directory on the way takes the store, with all that
    /// was acknowledged.
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
        assert_eq!(
            synced,
            [(there.clone(), true), (there.join("a"), true), (there.join("a/b"), true)]
        );
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
