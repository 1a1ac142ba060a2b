//! The portable driver: a plain thread drives the shard, and others do its I/O with plain system
//! calls.
//!
//! It polls only if an option says so: the threads that do the I/O need the cores.

use super::cores;
use super::shard_thread::ThreadContext;
use crate::engine::StateMachine;
use crate::io::{PortableDisk, PortableOptions};

/// The most threads that do I/O, over all shards.
const WORKERS_MAX: usize = 64;
/// The most threads that do I/O for one shard.
const WORKERS: usize = 8;

/// The body of a shard's thread.
pub(super) fn thread<M: StateMachine>(context: ThreadContext<M>) {
    let workers_count = (WORKERS_MAX / usize::from(context.shards_count)).clamp(2, WORKERS);
    let disk =
        match PortableDisk::with_files(context.files.clone(), &PortableOptions { workers_count }) {
            Ok(disk) => disk,
            Err(error) => return context.refuse(error),
        };
    // Pinned after the disk has started its threads, which inherit the cores that this one may use.
    if let Some(core) = context.pin
        && !cores::pin(core)
    {
        tracing::warn!(core, "a shard's thread could not be pinned");
    }
    let (waker, report) = (disk.waker(), disk.report());
    let Some(mut shard_thread) = context.attach_disk(disk, waker, report) else { return };
    while shard_thread.run() {}
}
