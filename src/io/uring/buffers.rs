//! Memory that is registered with the kernel once, so that no transfer looks up its pages again.
//!
//! Invariants
//! 1. Registered memory stays mapped, at its address, until it is unregistered: [`Buffers`] holds
//!    the mapping.
//! 2. A range counts as registered only if all of it lies within one buffer.
//!
//! The kernel may refuse: registered memory counts against the limit of locked memory (`ulimit
//! -l`), which is usually 8 MiB and shared by all processes of a user. Then half is tried, and so
//! on; the rest stays unregistered, and works all the same.
//!
//! It does *not* fail.
#![allow(unsafe_code)]

use super::iovec::IoVec;
use crate::memory::Mapping;
use io_uring::IoUring;
use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};

/// The largest buffer that the kernel accepts.
const BUFFER_BYTES: usize = 1 << 30;
/// The least memory that is worth a buffer.
const LEAST_BYTES: usize = 64 << 10;

#[derive(Default)]
pub(super) struct Buffers {
    memory: Option<Mapping>,
    start: usize,
    registered: usize,
}

impl Buffers {
    /// Registers as much of `memory` as the kernel accepts. `sharers` disks share the limit of
    /// locked memory.
    pub(super) fn register(ring: &IoUring, memory: Mapping, sharers: usize) -> Buffers {
        let start = memory.start().as_ptr() as usize;
        let mut buffers = Buffers { start, registered: 0, memory: None };
        let mut bytes = memory.bytes();
        while bytes >= LEAST_BYTES {
            let vectors: Vec<IoVec> = (0..bytes)
                .step_by(BUFFER_BYTES)
                .map(|at| IoVec {
                    at: memory.start().as_ptr().wrapping_add(at),
                    len: BUFFER_BYTES.min(bytes - at),
                })
                .collect();
            // SAFETY: an `IoVec` is laid out as an `iovec`, and the list outlives the call.
            let list =
                unsafe { std::slice::from_raw_parts(vectors.as_ptr().cast(), vectors.len()) };
            // SAFETY: the memory stays mapped (invariant 1). Its bytes change only by operations
            // that own them.
            match unsafe { ring.submitter().register_buffers(list) } {
                Ok(()) => {
                    buffers.registered = bytes;
                    break;
                }
                Err(e) if e.raw_os_error() == Some(Errno::NOMEM.raw_os_error()) => {
                    bytes = less(bytes, sharers)
                }
                Err(_) => break,
            }
        }
        buffers.memory = Some(memory);
        buffers
    }

    /// The buffer that holds all of these bytes.
    pub(super) fn find(&self, at: *const u8, len: usize) -> Option<u16> {
        let from = (at as usize).checked_sub(self.start)?;
        let buffer = from / BUFFER_BYTES;
        (from + len <= self.registered && (from + len - 1) / BUFFER_BYTES == buffer)
            .then_some(buffer as u16)
    }

    pub(super) fn registered(&self) -> u64 {
        self.registered as u64
    }

    pub(super) fn offered(&self) -> u64 {
        self.memory.as_ref().map_or(0, |memory| memory.bytes() as u64)
    }

    /// Unregisters the buffers now: the kernel would do so only some time after the ring is closed.
    pub(super) fn unregister(&mut self, ring: &IoUring) {
        if std::mem::take(&mut self.registered) > 0 {
            let _ = ring.submitter().unregister_buffers();
        }
    }
}

/// How many bytes to try after `bytes` were refused: half as many, at most this disk's share of
/// half of the limit. The other half is for the rings themselves and for the user's other
/// processes.
fn less(bytes: usize, sharers: usize) -> usize {
    let limit = getrlimit(Resource::Memlock).current.map_or(usize::MAX, |limit| limit as usize);
    let next = (bytes / 2).min(limit / 2 / sharers.max(1));
    next - next % LEAST_BYTES.min(next.max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The kernel would refuse a transfer that extends beyond its buffer, or do worse.
    #[test]
    fn only_what_lies_within_one_buffer_counts_as_registered() {
        let start = 1 << 40;
        let buffers = Buffers { memory: None, start, registered: BUFFER_BYTES + 8192 };
        let find = |from: usize, len| buffers.find(std::ptr::without_provenance(start + from), len);
        assert_eq!(find(0, 4096), Some(0));
        assert_eq!(find(BUFFER_BYTES - 4096, 4096), Some(0));
        assert_eq!(find(BUFFER_BYTES - 4096, 8192), None);
        assert_eq!(find(BUFFER_BYTES, 8192), Some(1));
        assert_eq!(find(BUFFER_BYTES + 4096, 8192), None);
        assert_eq!(buffers.find(std::ptr::without_provenance(start - 4096), 4096), None);
        assert_eq!(Buffers::default().find(std::ptr::without_provenance(start), 4096), None);
    }

    /// Every refusal must lead to a smaller attempt, or registration never ends.
    #[test]
    fn less_is_less() {
        for bytes in [LEAST_BYTES, 8 << 20, 3 << 30] {
            let next = less(bytes, 4);
            assert!(next < bytes && next.is_multiple_of(4096), "{bytes}: {next}");
        }
    }
}
