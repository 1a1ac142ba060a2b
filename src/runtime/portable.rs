//! The portable driver: a plain thread drives the shard, others do its I/O with plain system calls.
//!
//! It polls only if it is told to: the threads that do the I/O need the cores.

use super::cores;
use super::seat::Seat;
use crate::engine::StateMachine;
use crate::io::portable::{PortableDisk, PortableOptions};

/// Threads that do I/O, over all shards.
const WORKERS_MAX: usize = 64;
/// The same for one shard.
const WORKERS: usize = 8;

/// The body of a shard's thread.
pub(super) fn thread<M: StateMachine>(seat: Seat<M>) {
    let workers_count = (WORKERS_MAX / usize::from(seat.shards_count)).clamp(2, WORKERS);
    let disk = match PortableDisk::with_files(seat.files.clone(), &PortableOptions { workers_count }) {
        Ok(disk) => disk,
        Err(error) => return seat.refuse(error),
    };
    // After the disk has started its threads: they inherit what this one may use.
    if let Some(core) = seat.pin
        && !cores::pin(core)
    {
        tracing::warn!(core, "a shard's thread could not be pinned");
    }
    let (waker, report) = (disk.waker(), disk.report());
    let Some(mut drive) = seat.sit(disk, waker, report) else { return };
    while drive.go() {}
}
