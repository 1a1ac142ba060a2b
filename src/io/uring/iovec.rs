//! A piece of memory as the kernel takes it in lists (`struct iovec`), for transfers and for
//! registration.

/// A piece of memory as the kernel takes it (`struct iovec`).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct IoVec {
    pub(super) at: *mut u8,
    pub(super) len: usize,
}
