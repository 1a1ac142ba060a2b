//! Configures the C library's memory allocator for this process.
//!
//! 1. Freed memory goes back to the system: what the allocator may keep is bounded, and is part of
//!    the constant that `serve --help` states next to `--memory`.
//!
//! By default it has eight pools of free memory for each core, and once a large buffer was freed it
//! keeps buffers of that size in them. With connections that come and go, a process would grow to
//! many times what it uses.
#![allow(unsafe_code)]
#![cfg_attr(not(all(target_os = "linux", target_env = "gnu")), allow(dead_code))]

/// Pools of free memory. More would help only if many threads allocated all the time, which none
/// does on a hot path.
const ARENAS_MAX: i32 = 4;
/// Blocks of at least this size are mapped one by one, and unmapped when they are freed. Setting
/// the limit explicitly keeps it fixed. It is above the size of most requests of NBD clients
/// (`nbdcopy` sends 256 KiB): a mapping for each of those would mean a page fault for each page,
/// which cost as much processor time as a third of the write itself.
const MAPPED_FROM_BYTES: i32 = 1 << 20;
/// Free memory at the end of a pool beyond this is given back.
const KEPT_BYTES_MAX: i32 = 512 << 10;

/// Sets these limits. Must be called before there are other threads.
pub fn bound() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    for (parameter, value) in [
        (libc::M_ARENA_MAX, ARENAS_MAX),
        (libc::M_MMAP_THRESHOLD, MAPPED_FROM_BYTES),
        (libc::M_TRIM_THRESHOLD, KEPT_BYTES_MAX),
    ] {
        // SAFETY: the call takes two numbers and touches no memory of ours; no other thread
        // allocates yet. If it fails, the process takes more memory, but works all the same.
        let _ = unsafe { libc::mallopt(parameter, value) };
    }
}
