//! How the C library's memory allocator is set for this process.
//!
//! 1. Memory that was given back goes back to the system: what the allocator may keep is bounded,
//!    and part of the constant that `serve --help` states beside `--memory`.
//!
//! By default it has eight pools of free memory for each core, and after a large buffer was freed
//! once it keeps buffers of that size in them. With connections that come and go a process would
//! grow to many times of what it uses.
#![allow(unsafe_code)]
#![cfg_attr(not(all(target_os = "linux", target_env = "gnu")), allow(dead_code))]

/// Pools of free memory. More only help where many threads allocate all the time, which none does
/// on a hot path.
const ARENAS_MAX: i32 = 4;
/// Blocks from this size on are mapped one by one, and unmapped when they are freed. Said
/// explicitly, the limit stays where it is. Above the size of most requests of NBD clients
/// (`nbdcopy` sends 256 KiB): a mapping for each of those is a page fault for each of their pages,
/// which cost as much processor time as a third of the write itself.
const MAPPED_FROM_BYTES: i32 = 1 << 20;
/// Free memory at the end of a pool beyond which it is given back.
const KEPT_BYTES_MAX: i32 = 512 << 10;

/// Sets it; to be called before there are other threads.
pub fn bound() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    for (parameter, value) in [
        (libc::M_ARENA_MAX, ARENAS_MAX),
        (libc::M_MMAP_THRESHOLD, MAPPED_FROM_BYTES),
        (libc::M_TRIM_THRESHOLD, KEPT_BYTES_MAX),
    ] {
        // SAFETY: takes two numbers and touches no memory of ours; no other thread allocates yet.
        // Where it can't be set the process takes more memory, and works all the same.
        let _ = unsafe { libc::mallopt(parameter, value) };
    }
}
