//! What of io_uring works here, asked by using it.
//!
//! It does *not* touch a file of the store: polling is tried on a scratch file.
#![allow(unsafe_code)]

use super::super::files::{Access, Block, Files};
use super::super::report::Polling;
use super::ring::Ring;
use crate::types::BLOCK;
use io_uring::{IoUring, Probe, opcode, types};
use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};
use std::io;
use std::os::fd::AsRawFd;

/// Whether the ring disk can be used here.
///
/// # Errors
/// Why not, with what mends it; take the portable disk then.
pub fn probe() -> Result<(), String> {
    let ring = Ring::new(4, false).map_err(|e| explain("making a ring", &e))?;
    let ring: &IoUring = ring.get();
    let params = ring.params();
    if !params.is_feature_ext_arg() || !params.is_feature_nodrop() || !params.is_feature_submit_stable() {
        let release = rustix::system::uname().release().to_string_lossy().into_owned();
        return Err(format!("io_uring of Linux {release} has no timed waits: Linux 5.11 or newer is needed"));
    }
    let mut known = Probe::new();
    ring.submitter().register_probe(&mut known).map_err(|e| explain("asking what the ring can do", &e))?;
    let needed = [
        ("READ", opcode::Read::CODE),
        ("WRITE", opcode::Write::CODE),
        ("READV", opcode::Readv::CODE),
        ("WRITEV", opcode::Writev::CODE),
        ("READ_FIXED", opcode::ReadFixed::CODE),
        ("WRITE_FIXED", opcode::WriteFixed::CODE),
        ("FSYNC", opcode::Fsync::CODE),
    ];
    match needed.iter().find(|(_, code)| !known.is_supported(*code)) {
        Some((name, _)) => Err(format!("io_uring of this kernel does not know {name}")),
        // That entries may be submitted is another right than to make a ring.
        None => ring.submit().map(drop).map_err(|e| explain("entering a ring", &e)),
    }
}

/// Why the kernel refused, and what mends it.
pub(super) fn explain(doing: &str, e: &io::Error) -> String {
    let errno = e.raw_os_error().map(Errno::from_raw_os_error);
    let why = match errno {
        Some(Errno::NOSYS) => "this kernel has no io_uring, or a filter of system calls (seccomp) hides it".to_string(),
        Some(Errno::PERM | Errno::ACCESS) => {
            let setting = std::fs::read_to_string("/proc/sys/kernel/io_uring_disabled").unwrap_or_default();
            match setting.trim() {
                "" | "0" => "a filter of system calls (seccomp) or a security module forbids it, as containers do by \
                             default: allow io_uring_setup, io_uring_enter and io_uring_register"
                    .to_string(),
                value => format!("an administrator has forbidden it: kernel.io_uring_disabled is {value}"),
            }
        }
        Some(Errno::NOMEM) => {
            let limit = getrlimit(Resource::Memlock).current;
            let limit = limit.map_or("unlimited".to_string(), |bytes| format!("{} KiB", bytes / 1024));
            format!(
                "the limit of locked memory ({limit}; `ulimit -l`) or of the control group leaves no room: raise it"
            )
        }
        Some(Errno::MFILE | Errno::NFILE) => "the limit of open files is reached (`ulimit -n`): raise it".to_string(),
        _ => "for no reason that is known here".to_string(),
    };
    format!("io_uring can't be used: {doing} failed with {e}: {why}")
}

/// Whether the device below these files can be polled: by a polled read of data that was really written. Without
/// that, the kernel answers for a hole in the file, and every later read fails.
pub(super) fn polling(files: &Files) -> Polling {
    match try_polling(files) {
        Ok(()) => Polling::On,
        Err(why) => Polling::Off(why),
    }
}

fn try_polling(files: &Files) -> Result<(), String> {
    if files.access() == Access::ReadOnly {
        return Err("the store is open for reading only".into());
    }
    if !files.is_direct() {
        return Err("that needs direct I/O".into());
    }
    let file = files.scratch().map_err(|e| e.to_string())?;
    let failed = |what: &str, e: &dyn std::fmt::Display| format!("{what} failed: {e}");
    let mut block = Box::new(Block([0x5a; BLOCK]));
    files.set_direct(&file).map_err(|e| failed("direct I/O", &e))?;
    let written = rustix::io::pwrite(&file, &block.0, 0).map_err(|e| failed("a write", &e))?;
    rustix::fs::fdatasync(&file).map_err(|e| failed("a flush", &e))?;
    let mut ring = Ring::new(4, true).map_err(|e| failed("making a polling ring", &e))?;
    block.0.fill(0);
    let read = opcode::Read::new(types::Fd(file.as_raw_fd()), block.0.as_mut_ptr(), BLOCK as u32).build();
    // SAFETY: the block and the file live until the completion was taken, below; if it never comes they are leaked.
    unsafe { ring.put(&read, true) };
    let mut taken = Vec::new();
    while taken.is_empty() && ring.broken().is_none() {
        ring.wait(None);
        ring.take(&mut taken);
    }
    let Some((_, result)) = taken.pop() else {
        std::mem::forget((block, file));
        return Err("a polled read could not be waited for".into());
    };
    ring.completed();
    match result {
        n if n == BLOCK as i32 && written == BLOCK && block.0 == [0x5a; BLOCK] => Ok(()),
        n if n < 0 => {
            let e = io::Error::from_raw_os_error(-n);
            Err(format!("the device has no queues for it: a polled read says {e}; NVMe: nvme.poll_queues"))
        }
        n => Err(format!("a polled read gave {n} bytes, or not those written")),
    }
}
