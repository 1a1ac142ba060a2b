//! A range of memory in the kernel's layout (`struct iovec`), for transfers and for registration.

/// A range of memory in the kernel's layout.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct IoVec {
    pub(super) at: *mut u8,
    pub(super) len: usize,
}
