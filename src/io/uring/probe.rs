//! Probes io_uring by using it: rings, operations, polling.
//!
//! It does *not* touch a file of the store: polling is probed on a scratch block.
#![allow(unsafe_code)]

use super::options::UringOptions;
use super::ring::{Counted, Ring, RingMode};
use crate::base::BLOCK;
use crate::io::files::Files;
use crate::io::media::{Access, Block, PATTERN};
use crate::io::report::Polling;
use crate::io::uring_unavailable::{UnavailableReason, UringUnavailable};
use io_uring::{IoUring, Probe, opcode, types};
use std::io;
use std::os::fd::AsRawFd;

/// Entries of a ring that only serves a probe.
const PROBE_DEPTH: u32 = 4;

/// Checks that the ring disk can be used here.
///
/// # Errors
/// The reason why it can't be used.
pub fn probe() -> Result<(), UringUnavailable> {
    let ring =
        Ring::new(PROBE_DEPTH, RingMode::Interrupts).map_err(|e| refused("creating a ring", &e))?;
    let ring: &IoUring = ring.get();
    let params = ring.params();
    if !params.is_feature_ext_arg()
        || !params.is_feature_nodrop()
        || !params.is_feature_submit_stable()
    {
        let release = rustix::system::uname().release().to_string_lossy().into_owned();
        return Err(lacking(format!(
            "Linux {release} has no timed waits in io_uring: 5.11 or newer is needed"
        )));
    }
    let mut supported = Probe::new();
    ring.submitter()
        .register_probe(&mut supported)
        .map_err(|e| refused("querying what the ring supports", &e))?;
    let needed = [
        ("READ", opcode::Read::CODE),
        ("WRITE", opcode::Write::CODE),
        ("READV", opcode::Readv::CODE),
        ("WRITEV", opcode::Writev::CODE),
        ("READ_FIXED", opcode::ReadFixed::CODE),
        ("WRITE_FIXED", opcode::WriteFixed::CODE),
        ("FSYNC", opcode::Fsync::CODE),
    ];
    match needed.iter().find(|(_, code)| !supported.is_supported(*code)) {
        Some((name, _)) => Err(lacking(format!("it does not support {name}"))),
        // A filter may allow creating a ring and forbid submitting entries.
        None => ring.submit().map(drop).map_err(|e| refused("entering a ring", &e)),
    }
}

/// Probes a ring of the default size, too: the locked memory may be enough for a small one only.
///
/// # Errors
/// As [`probe`].
pub(crate) fn probe_ordinary() -> Result<(), UringUnavailable> {
    probe()?;
    Ring::new(UringOptions::default().ring_entries, RingMode::Interrupts)
        .map(drop)
        .map_err(|e| refused("creating a ring", &e))
}

fn lacking(what: String) -> UringUnavailable {
    UringUnavailable { reason: UnavailableReason::Kernel, error: what }
}

/// Explains why the kernel refused.
pub(super) fn refused(doing: &str, e: &io::Error) -> UringUnavailable {
    UringUnavailable::by_error(doing, e)
}

/// Probes whether the device below these files can be polled, by a polled read of data that was
/// really written. For a hole in the file the kernel would answer itself, and every later read
/// would fail.
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
        return Err("polling needs direct I/O".into());
    }
    let scratch = files.scratch().map_err(|e| e.to_string())?;
    let (file, at) = (&scratch.descriptor, scratch.base);
    let failed = |what: &str, e: &dyn std::fmt::Display| format!("{what} failed: {e}");
    let mut block = Box::new(Block([PATTERN; BLOCK]));
    let written = rustix::io::pwrite(file, &block.0, at).map_err(|e| failed("a write", &e))?;
    rustix::fs::fdatasync(file).map_err(|e| failed("a flush", &e))?;
    let mut ring = Ring::new(PROBE_DEPTH, RingMode::Polled)
        .map_err(|e| failed("creating a polling ring", &e))?;
    block.0.fill(0);
    let read = opcode::Read::new(types::Fd(file.as_raw_fd()), block.0.as_mut_ptr(), BLOCK as u32)
        .offset(at)
        .build();
    // SAFETY: the block and the file live until the completion is taken, below; if it never arrives
    // they are leaked.
    unsafe { ring.push(&read, Counted::Yes) };
    let mut taken = Vec::new();
    while taken.is_empty() && ring.broken().is_none() {
        ring.wait(None);
        ring.reap(&mut taken);
    }
    let Some((_, result)) = taken.pop() else {
        std::mem::forget((block, scratch));
        return Err("waiting for a polled read failed".into());
    };
    ring.completed();
    match result {
        n if n == BLOCK as i32 && written == BLOCK && block.0 == [PATTERN; BLOCK] => Ok(()),
        n if n < 0 => {
            let e = io::Error::from_raw_os_error(-n);
            Err(format!(
                "the device has no queues for it: a polled read says {e}; NVMe: nvme.poll_queues"
            ))
        }
        n => Err(format!("a polled read returned {n} bytes, or wrong ones")),
    }
}
