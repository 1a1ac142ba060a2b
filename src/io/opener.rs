//! Identifies the process that opened a store: a forked child inherits its memory and descriptors,
//! but none of its threads.
//!
//! ```text
//!   a page that the kernel empties in a forked child:
//!   mark of this process --fork--> 0 in the child --the child's first store--> another mark
//! ```
//! Invariants
//! 1. [`Opener::is_here`] is true in the process that opened the store and false in every child of
//!    it, even in one that opens stores of its own. It costs a load.
//! 2. Marks are never used twice: a child continues the count of its parent.
//!
//! It does *not* watch for forks: each use of a store checks.
#![allow(unsafe_code)]

use crate::base::error::{Error, ErrorKind};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// A multiple of every page size that Linux uses on supported machines.
const PAGE_BYTES: usize = 64 << 10;

/// The last mark that was given out.
static MARKS: AtomicU64 = AtomicU64::new(0);

/// The process that made this value.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Opener {
    mark: u64,
    pid: u32,
}

impl Default for Opener {
    /// This process.
    fn default() -> Self {
        let pid = std::process::id();
        let Some(word) = word() else { return Opener { mark: 0, pid } };
        let new = MARKS.fetch_add(1, Ordering::Relaxed) + 1;
        let mark = word
            .compare_exchange(0, new, Ordering::Relaxed, Ordering::Relaxed)
            .err()
            .unwrap_or(new);
        Opener { mark, pid }
    }
}

impl Opener {
    /// Whether the calling process is the one that made this value, and not a forked child of it.
    #[inline]
    pub(crate) fn is_here(&self) -> bool {
        match word() {
            Some(word) => word.load(Ordering::Relaxed) == self.mark,
            None => std::process::id() == self.pid,
        }
    }

    /// The error of a handle in a forked child.
    #[cold]
    pub(crate) fn refusal(&self) -> Error {
        Error::new(
            ErrorKind::InUse,
            format_args!(
                "this handle belongs to a store that process {} has open, and this process {} was \
                 forked from it: use the store there, or open it here once it is closed there",
                self.pid,
                std::process::id()
            ),
        )
    }
}

/// The word that a fork sets to zero; `None` where the kernel has no such memory (before Linux
/// 4.14).
fn word() -> Option<&'static AtomicU64> {
    static WORD: OnceLock<Option<&'static AtomicU64>> = OnceLock::new();
    *WORD.get_or_init(map)
}

#[cfg(miri)]
fn map() -> Option<&'static AtomicU64> {
    None
}

#[cfg(not(miri))]
fn map() -> Option<&'static AtomicU64> {
    use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous};
    let access = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a fresh mapping at an address of the kernel's choice; nothing else refers to it.
    let page =
        unsafe { mmap_anonymous(std::ptr::null_mut(), PAGE_BYTES, access, MapFlags::PRIVATE) }
            .ok()?;
    // SAFETY: the range is that mapping, which holds nothing yet.
    let wiped = unsafe { madvise(page, PAGE_BYTES, Advice::LinuxWipeOnFork) };
    if wiped.is_err() {
        // SAFETY: the range is that mapping, and no reference to it has been given out.
        let _ = unsafe { rustix::mm::munmap(page, PAGE_BYTES) };
        return None;
    }
    // SAFETY: the mapping is never unmapped, is aligned to a page, is zero at first, and is
    // accessed by atomics only.
    Some(unsafe { &*page.cast::<AtomicU64>() })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// If this fails, an intact store refuses its own process.
    #[test]
    fn a_process_is_itself_on_every_thread() {
        let opener = Opener::default();
        assert!(opener.is_here());
        assert_eq!(
            opener,
            std::thread::spawn(Opener::default).join().unwrap(),
            "one mark for a process"
        );
        assert!(std::thread::spawn(move || opener.is_here()).join().unwrap());
        assert!(!Opener { mark: opener.mark + 1, pid: opener.pid + 1 }.is_here());
    }
}
