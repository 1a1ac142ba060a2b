//! The ring driver: a pinned glommio executor for each shard, in which one task drives the shard
//! and its io_uring.
//!
//! Invariants
//! 1. While the shard has nothing to do, the thread waits in the shard's own ring, not in the
//!    executor's: whatever must wake the core goes through the shard's ring. The executor's reactor
//!    (6.6 µs a turn) stays off the path of an operation: it gets a turn when its preemption timer
//!    expires.
//! 2. Whatever would make an executor panic is checked before one is started.
//!
//! It does *not* use glommio's files, channels or buffers: in measurements they cost 1.4 to 90
//! times as much as ours.

use super::shard_thread::ThreadContext;
use crate::base::error::{Error, ErrorKind};
use crate::engine::StateMachine;
use crate::io::uring::{self, UringDisk, UringOptions};
use glommio::{LocalExecutor, LocalExecutorBuilder, Placement};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

/// At least 1 ms: with less, an executor that has runnable tasks can stall for ever.
const PREEMPT_TIMER: Duration = Duration::from_millis(100);
/// The least memory that an executor accepts; it counts three times against the limit of locked
/// memory.
const IO_MEMORY: usize = 64 << 10;
/// Entries of the executor's own rings, which only its timers use.
const RING_DEPTH: usize = 32;

/// Checks that the ring driver can run here.
///
/// # Errors
/// The reason why it can't, with the remedy.
pub(super) fn probe() -> Result<(), String> {
    uring::probe().map_err(|why| why.to_string())?;
    crate::ops::probe::executor_refused().map_or(Ok(()), Err)
}

fn executor(pin: Option<usize>) -> Result<LocalExecutor, Error> {
    let refused = |why: &str| {
        Error::new(ErrorKind::Unsupported, format_args!("starting an executor failed: {why}"))
    };
    // The executor's builder can't pin it: it reads all cores from /sys, and panics in a container
    // without /sys.
    if let Some(core) = pin.filter(|core| !super::cores::pin(*core)) {
        return Err(refused(&format!("its thread can't be pinned to core {core}")));
    }
    let make = || {
        let builder = LocalExecutorBuilder::new(Placement::Unbound);
        builder.io_memory(IO_MEMORY).ring_depth(RING_DEPTH).preempt_timer(PREEMPT_TIMER).make()
    };
    match catch_unwind(AssertUnwindSafe(make)) {
        Ok(made) => made.map_err(|e| refused(&e.to_string())),
        Err(panic) => {
            Err(refused(panic.downcast_ref::<String>().map_or("it panicked", |text| text)))
        }
    }
}

/// The body of a shard's thread.
pub(super) fn thread<M: StateMachine>(context: ThreadContext<M>) {
    let executor = match executor(context.pin) {
        Ok(executor) => executor,
        Err(error) => return context.refuse(error),
    };
    executor.run(async move {
        let options = UringOptions {
            ring_entries: context.ring_entries,
            disks_count: usize::from(context.shards_count),
            ..UringOptions::default()
        };
        let disk = match UringDisk::with_files(context.files.clone(), &options) {
            Ok(disk) => disk,
            Err(error) => return context.refuse(error),
        };
        let (waker, report) = (disk.waker(), disk.report());
        let Some(mut shard_thread) = context.attach_disk(disk, waker, report) else { return };
        while shard_thread.run() {
            glommio::yield_if_needed().await;
        }
    });
}
