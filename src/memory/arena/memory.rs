//! Maps an arena's memory: explicit huge pages, transparent ones, or ordinary pages.
//!
//! Invariants
//! 1. A mapping has one owner, and is unmapped with it; in simulated runs it may be kept for the
//!    next arena of its size instead.
#![allow(unsafe_code)]

use super::*;

const HUGE: usize = 2 << 20;

pub(super) struct Memory {
    start: NonNull<u8>,
    #[cfg_attr(not(any(test, feature = "sim")), expect(dead_code))]
    len: usize,
    kind: ArenaKind,
    owner: ManuallyDrop<Owner>,
}

// SAFETY: this is owned, plain memory; Frame and FrameRef govern the access to its bytes.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

/// A mapping that is unmapped when this is dropped.
struct Owner {
    at: NonNull<u8>,
    len: usize,
}

impl Memory {
    pub(super) fn start(&self) -> NonNull<u8> {
        self.start
    }

    pub(super) fn kind(&self) -> ArenaKind {
        self.kind
    }

    /// Maps at least `len` zero bytes, aligned to 2 MiB.
    pub(super) fn map(len: usize) -> std::io::Result<Memory> {
        let len = len.next_multiple_of(HUGE);
        #[cfg(all(any(test, feature = "sim"), not(miri)))]
        if let Some(memory) = spare::take(len) {
            return Ok(memory);
        }
        if let Some(owner) = Owner::huge(len) {
            let owner = ManuallyDrop::new(owner);
            return Ok(Memory { start: owner.at, len, kind: ArenaKind::HugePages, owner });
        }
        // One huge page more than wanted, so that there is an aligned start; untouched pages cost
        // nothing.
        let owner = Owner::plain(len + HUGE)?;
        let skip = owner.at.align_offset(HUGE);
        assert!(skip <= HUGE, "the mapping holds an aligned start");
        // SAFETY: `skip` is at most HUGE, and the mapping is `len + HUGE` long.
        let start = unsafe { owner.at.add(skip) };
        let kind = if owner.advise(start, len) { ArenaKind::Transparent } else { ArenaKind::Small };
        Ok(Memory { start, len, kind, owner: ManuallyDrop::new(owner) })
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: it is taken once, here; the strong counts (invariant 4 of the arena) guarantee
        // that no run is in use any more.
        let owner = unsafe { ManuallyDrop::take(&mut self.owner) };
        #[cfg(all(any(test, feature = "sim"), not(miri)))]
        let Some(owner) = spare::keep(self, owner) else { return };
        owner.release();
    }
}

/// Mappings that simulated stores gave back, for the next store on the same thread: mapping and
/// clearing them took more than half of the time of a small crash state. They keep their contents,
/// so code that relies on fresh zeros is found out.
#[cfg(all(any(test, feature = "sim"), not(miri)))]
mod spare {
    use super::*;
    use std::cell::RefCell;

    const BYTES_MAX: usize = 8 << 20;
    const COUNT_MAX: usize = 16;

    thread_local! {
        static SPARE: RefCell<Vec<Memory>> = const { RefCell::new(Vec::new()) };
    }

    pub(super) fn take(len: usize) -> Option<Memory> {
        SPARE.with_borrow_mut(|all| {
            let index = all.iter().position(|memory| memory.len == len)?;
            Some(all.swap_remove(index))
        })
    }

    /// Keeps a mapping. Returns it if there is no room, or the thread is ending.
    pub(super) fn keep(memory: &Memory, owner: Owner) -> Option<Owner> {
        let Memory { start, len, kind, .. } = *memory;
        let mut owner = Some(owner);
        let _ = SPARE.try_with(|all| {
            let mut all = all.borrow_mut();
            if len <= BYTES_MAX && all.len() < COUNT_MAX {
                let owner = ManuallyDrop::new(owner.take().expect("it is given"));
                all.push(Memory { start, len, kind, owner });
            }
        });
        owner
    }
}

#[cfg(not(miri))]
impl Owner {
    /// Maps explicit huge pages, if an administrator has reserved enough of them. They are touched
    /// at once: where a control group forbids them, the kernel reports that only on first touch,
    /// with a signal.
    fn huge(len: usize) -> Option<Owner> {
        use rustix::mm::{Advice, MapFlags};
        let owner =
            Self::mmap(len, MapFlags::PRIVATE | MapFlags::HUGETLB | MapFlags::HUGE_2MB).ok()?;
        // SAFETY: the range is our own fresh mapping; populating it changes no bytes.
        let touched = unsafe {
            rustix::mm::madvise(owner.at.as_ptr().cast(), len, Advice::LinuxPopulateWrite)
        };
        if touched.is_err() {
            owner.release();
            return None;
        }
        Some(owner)
    }

    fn plain(len: usize) -> std::io::Result<Owner> {
        Ok(Self::mmap(len, rustix::mm::MapFlags::PRIVATE)?)
    }

    fn mmap(len: usize, flags: rustix::mm::MapFlags) -> rustix::io::Result<Owner> {
        use rustix::mm::ProtFlags;
        // SAFETY: a new anonymous mapping at an address of the kernel's choice touches no existing
        // memory.
        let at = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                flags,
            )?
        };
        let at = NonNull::new(at.cast()).ok_or(rustix::io::Errno::NOMEM)?;
        Ok(Owner { at, len })
    }

    /// Requests transparent huge pages. Returns whether the machine provides any.
    fn advise(&self, start: NonNull<u8>, len: usize) -> bool {
        let setting = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled");
        if !setting.is_ok_and(|s| !s.contains("[never]")) {
            return false;
        }
        // SAFETY: the range lies within our own mapping; the advice changes no bytes.
        unsafe {
            rustix::mm::madvise(start.as_ptr().cast(), len, rustix::mm::Advice::LinuxHugepage)
        }
        .is_ok()
    }

    fn release(self) {
        // SAFETY: this is exactly the range that was mapped, and its only owner unmaps it. A
        // failure leaks it, which is harmless.
        let _ = unsafe { rustix::mm::munmap(self.at.as_ptr().cast(), self.len) };
    }
}

#[cfg(miri)]
impl Owner {
    fn layout(len: usize) -> std::alloc::Layout {
        std::alloc::Layout::from_size_align(len, BLOCK).expect("a small test arena")
    }
    fn huge(_: usize) -> Option<Owner> {
        None
    }
    fn plain(len: usize) -> std::io::Result<Owner> {
        // SAFETY: the length is not zero.
        let at = unsafe { std::alloc::alloc_zeroed(Self::layout(len)) };
        Ok(Owner { at: NonNull::new(at).ok_or(std::io::ErrorKind::OutOfMemory)?, len })
    }
    fn advise(&self, _: NonNull<u8>, _: usize) -> bool {
        false
    }
    fn release(self) {
        // SAFETY: `plain` allocated it with the same layout.
        unsafe { std::alloc::dealloc(self.at.as_ptr(), Self::layout(self.len)) }
    }
}
