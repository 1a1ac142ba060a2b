//! Every byte on disk: its layout, its encoding and its checks.
//!
//! Invariants
//! 1. Numbers are little endian; structures have no unnamed padding; their sizes are asserted here.
//! 2. A structure read from a device becomes a value of one of these types only through a function
//!    that checks its checksum and says what is wrong. Nothing here panics on any input.
//! 3. A structure that carries its own checksum computes it with that field zero.
//!
//! `docs/format.md` states the byte offsets; a test compares it with these types.

#[cfg(test)]
mod bounds_tests;
pub mod catalog;
#[cfg(test)]
mod document_tests;
pub mod extent;
pub(crate) mod fresh;
pub mod group;
pub mod node;
pub mod root;
pub mod superblock;

use crate::base::checksum::crc32c_append;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The version of everything described here. Another version is refused with a clear error.
pub const FORMAT_VERSION: u32 = 3;

/// Every LSN, generation and epoch is below this: at a billion a second it takes 292 years to get
/// there. A structure with a larger one is refused, whatever its checksum, so that arithmetic on
/// accepted values can't wrap.
pub const LSN_END: u64 = 1 << 63;

/// A type whose bytes in memory are its bytes on disk.
pub(crate) trait Plain: FromBytes + IntoBytes + Immutable + KnownLayout + Unaligned {}
impl<T: FromBytes + IntoBytes + Immutable + KnownLayout + Unaligned> Plain for T {}

/// The value at byte `at` of `bytes`, if `bytes` reach to its end.
pub(crate) fn get<T: Plain>(bytes: &[u8], at: usize) -> Option<&T> {
    T::ref_from_prefix(bytes.get(at..)?).ok().map(|(value, _)| value)
}

/// Writes `value` at byte `at`.
///
/// # Panics
/// If it does not fit: the caller laid the structure out.
pub(crate) fn put<T: Plain>(bytes: &mut [u8], at: usize, value: &T) {
    bytes[at..at + size_of::<T>()].copy_from_slice(value.as_bytes());
}

/// The checksum of `bytes`, with the four bytes at `field`, where the checksum itself stands,
/// counted as zeros.
pub(crate) fn crc_around(seed: u32, bytes: &[u8], field: usize) -> u32 {
    let sum = crc32c_append(seed, &bytes[..field]);
    let sum = crc32c_append(sum, &[0; 4]);
    crc32c_append(sum, &bytes[field + 4..])
}
