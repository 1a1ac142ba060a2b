//! Files that are made: for whom, whether there is room for them, and how they go if it comes to nothing.
//!
//! Invariants
//! 1. Only a store whose first file this opening has made is ever removed: nobody was given it, so it holds nothing.
//! 2. Its first file goes last: without that the others are no store's.

use super::{FIRST, Files};
use crate::disk::{FileId, device};
use crate::error::{Error, ErrorKind};
use rustix::fs::Mode;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::PoisonError;

impl Files {
    /// Gives a file that was made owner and mode of those that are there, or the owner of the directory: a store that an administrator has
    /// opened once stays its user's.
    pub(super) fn like_the_others(&self, made: impl std::os::fd::AsFd) {
        let first = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        let first = first.values().find_map(|file| file.get()?.metadata().ok());
        let Some(like) = first.as_ref().map(|meta| (meta.uid(), meta.gid(), Some(meta.mode() & 0o777))).or_else(|| {
            let directory = self.handle.metadata().ok()?;
            Some((directory.uid(), directory.gid(), None))
        }) else {
            return;
        };
        let (uid, gid, mode) = like;
        if let Some(mode) = mode {
            let _ = rustix::fs::fchmod(&made, Mode::from_raw_mode(mode));
        }
        // Only root may give files away; who is not root has made them as itself, like those that are there.
        let (uid, gid) = (rustix::fs::Uid::from_raw(uid), rustix::fs::Gid::from_raw(gid));
        if rustix::process::geteuid().is_root() {
            let _ = rustix::fs::fchown(&made, Some(uid), Some(gid));
        }
    }

    /// That there is no store where one has to be.
    pub(crate) fn no_store(&self) -> Error {
        let context = format_args!("there is no store in {}: is what it is on mounted?", self.path.display());
        Error::new(ErrorKind::NotFound, context)
    }

    /// Removes the files of a creation that has failed, if it was all made since these were opened. Nothing may be under way.
    pub(crate) fn remove_creation(&self) {
        let made = std::mem::take(&mut *self.made.lock().unwrap_or_else(PoisonError::into_inner));
        if made.first() != Some(&FIRST) {
            return;
        }
        // The first one last: without it the others are no store's, and nobody takes them for one.
        for id in made.iter().rev() {
            let name = id.to_string();
            if let Err(e) = rustix::fs::unlinkat(&self.handle, name.as_str(), rustix::fs::AtFlags::empty()) {
                tracing::warn!("{} of a store that could not be made is left: {e}", self.path.join(name).display());
            }
        }
    }

    /// Bytes that the files have, and those that the file system says are left for this user.
    pub(crate) fn room(&self) -> (u64, Option<u64>) {
        let files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        let lens = files.values().filter_map(|file| Some(file.get()?.metadata().ok()?.len()));
        (lens.sum(), device::free_bytes(&self.handle))
    }

    /// The directory.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(in crate::disk) fn missing(&self, id: FileId) -> Error {
        let path = self.path.join(id.to_string());
        let context = format_args!("the file {} is missing: bring the store back from a backup", path.display());
        Error::new(ErrorKind::NotFound, context)
    }
}
