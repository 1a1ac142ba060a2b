//! Newly made files: their owner and mode, and their removal if the creation of the store fails.
//!
//! Invariants
//! 1. Only a store whose first file this opening has made and locked is ever removed: nobody has
//!    used it yet, so it holds nothing. A file that has replaced one of ours stays.
//! 2. Its first file is removed last: without it the others are not taken for a store.

use super::{Directory, FIRST};
use crate::io::FileId;
use rustix::fs::{AtFlags, Gid, Mode, Uid};
use std::os::unix::fs::MetadataExt;
use std::sync::PoisonError;

/// The permission bits of a file's mode.
const PERMISSIONS: u32 = 0o777;

impl Directory {
    /// Gives a new file the owner and mode of those that exist, or the owner of the directory, so
    /// that a store that an administrator opens once still belongs to its user.
    pub(super) fn give_to_owner_of_the_others(&self, made: impl std::os::fd::AsFd) {
        let first = self.files().values().find_map(|file| file.metadata().ok());
        let like = first.map(|meta| (meta.uid(), meta.gid(), Some(meta.mode() & PERMISSIONS)));
        let Some((uid, gid, mode)) = like.or_else(|| {
            let directory = self.handle.metadata().ok()?;
            Some((directory.uid(), directory.gid(), None))
        }) else {
            return;
        };
        if let Some(mode) = mode {
            let _ = rustix::fs::fchmod(&made, Mode::from_raw_mode(mode));
        }
        // Only root may change the owner. Any other user owns the new files, as it owns the
        // existing ones.
        if rustix::process::geteuid().is_root() {
            let _ = rustix::fs::fchown(&made, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
        }
    }

    /// Removes the files of a failed creation, if all of them were made since the directory was
    /// opened.
    pub(super) fn remove_what_was_made(&self) {
        let made = std::mem::take(&mut *self.made.lock().unwrap_or_else(PoisonError::into_inner));
        if made.first() != Some(&FIRST) {
            return;
        }
        for id in made.iter().rev() {
            let name = id.to_string();
            if !self.is_ours(*id, &name) {
                continue;
            }
            if let Err(e) = rustix::fs::unlinkat(&self.handle, name.as_str(), AtFlags::empty()) {
                tracing::warn!(
                    "{} of a store that could not be made is left: {e}",
                    self.path.join(name).display()
                );
            }
        }
    }

    /// Whether the file of this name is still the one that is open here, and not another that has
    /// replaced it.
    fn is_ours(&self, id: FileId, name: &str) -> bool {
        let named = rustix::fs::statat(&self.handle, name, AtFlags::SYMLINK_NOFOLLOW);
        let open = self.files().get(&id).and_then(|open| rustix::fs::fstat(open).ok());
        let (Ok(named), Some(open)) = (named, open) else { return false };
        (named.st_dev, named.st_ino) == (open.st_dev, open.st_ino)
    }
}

#[cfg(test)]
mod tests {
    use super::super::Opening;
    use super::*;
    use crate::base::error::ErrorKind;
    use crate::io::cancel::Cancel;
    use crate::io::media::{Creation, Media, MediaOptions, PageCache};
    use crate::io::{Access, DiskOp, FileOptions, Files, PortableDisk, PortableOptions, execute};
    use std::path::Path;
    use std::sync::Arc;

    fn open(dir: &Path) -> Arc<Files> {
        Files::open(dir, Access::ReadWrite, &FileOptions::default()).expect("nobody has it open")
    }

    fn make(files: &Arc<Files>, file: FileId) -> crate::Result<()> {
        let mut disk =
            PortableDisk::with_files(files.clone(), &PortableOptions { workers_count: 1 })?;
        execute(&mut disk, DiskOp::Allocate { file, from: 0, to: 4096 }).map(drop)
    }

    /// If this fails and two commands create a store in the same place at once, the slower one
    /// overwrites the other's store, and what that one has acknowledged is lost.
    #[test]
    fn a_store_that_was_made_meanwhile_is_not_written_over() {
        let dir = tempfile::tempdir().expect("a directory");
        let (faster, slower) = (open(dir.path()), open(dir.path()));
        make(&faster, FIRST).expect("there is none");
        std::fs::write(dir.path().join(FIRST.to_string()), [7; 4096]).expect("it is written");
        drop(faster);
        let error = make(&slower, FIRST).expect_err("there is one");
        assert!(
            error.kind() == ErrorKind::InUse
                && error.to_string().contains("another process has made"),
            "{error}"
        );
        slower.remove_creation();
        drop(slower);
        let left = std::fs::read(dir.path().join(FIRST.to_string())).expect("it is there");
        assert!(left == [7; 4096], "it was written over");
    }

    /// If this fails, a process that is stopped between making the first file and locking it takes
    /// another's store, which has used that file meanwhile, for its own: it overwrites it or
    /// removes its first file, and what was acknowledged there is lost.
    #[test]
    fn a_first_file_that_another_has_locked_first_is_its_own() {
        let dir = tempfile::tempdir().expect("a directory");
        let options = MediaOptions {
            access: Access::ReadWrite,
            creation: Creation::Allowed,
            page_cache: PageCache::Use,
            cancel: Cancel::default(),
        };
        let open = || Directory::open(dir.path(), &options).expect("no lock");
        let slower = open();
        let unlocked = slower.open_unlocked(FIRST, Opening::New).expect("there is none");
        // The faster one finds an empty file, as a creation that was cut short leaves it.
        let faster = open();
        let (id, location) = faster.existing().pop().expect("the file that was made");
        faster.grow(id, &location, 0..4096).expect("there is room");
        std::fs::write(dir.path().join(FIRST.to_string()), [7; 4096]).expect("it is written");
        drop((faster, location));

        let error = slower.lock_file(FIRST, unlocked, Opening::New).expect_err("it is taken");
        assert!(
            error.kind() == ErrorKind::InUse
                && error.to_string().contains("another process has made"),
            "{error}"
        );
        slower.remove_creation();
        let left = std::fs::read(dir.path().join(FIRST.to_string())).expect("it is there");
        assert!(left == [7; 4096], "it was written over");
    }

    /// If this fails, a process whose creation fails removes the store that another process made
    /// after an operator had removed the first one's files.
    #[test]
    fn a_failed_creation_removes_no_file_that_has_taken_the_place_of_its_own() {
        let dir = tempfile::tempdir().expect("a directory");
        let files = open(dir.path());
        make(&files, FIRST).expect("there is none");
        make(&files, FileId::Meta).expect("there is none");
        let path = dir.path().join(FIRST.to_string());
        std::fs::remove_file(&path).expect("it is there");
        std::fs::write(&path, "theirs").expect("a file");
        files.remove_creation();
        assert_eq!(std::fs::read(&path).expect("it is there"), b"theirs");
        assert!(!dir.path().join("meta").exists(), "its own are removed");
    }

    /// If this fails, a process that waited for the lock while another one made a store reports
    /// files as missing.
    #[test]
    #[allow(clippy::disallowed_methods, reason = "so that the listing comes first")]
    fn files_that_come_while_a_lock_is_waited_for_are_found() {
        let dir = tempfile::tempdir().expect("a directory");
        let maker = open(dir.path());
        make(&maker, FIRST).expect("there is none");
        let waiting = std::thread::scope(|scope| {
            let waiter = scope.spawn(|| open(dir.path()));
            std::thread::sleep(std::time::Duration::from_millis(300));
            make(&maker, FileId::Meta).expect("there is none");
            drop(maker);
            waiter.join().expect("it is opened")
        });
        assert_eq!(waiting.existing(), [FileId::Meta, FIRST]);
    }
}
