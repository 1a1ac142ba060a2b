//! A shard whose work an instruction counter can find, and a disk that counts its operations.

use crate::base::error::{Error, Result};
use crate::base::{Lsn, Micros, ShardId};
use crate::engine::{Effect, Message, Request, Shard, StateMachine, Token};
use crate::io::{Completion, Disk, DiskOp, FileId, OpId};
use crate::memory::Mapping;
use crate::testing::fuzz::memory::MemoryDisk;

/// Everything that shards do while counting is on. Never inlined, so that an outside counter finds
/// it.
#[inline(never)]
fn counted<R>(work: impl FnOnce() -> R) -> R {
    work()
}

/// A shard whose work is all [`counted`] while counting is on.
pub(super) struct CountedShard {
    pub(super) shard: Shard,
    pub(super) is_counting: bool,
}

impl CountedShard {
    fn work<R>(&mut self, work: impl FnOnce(&mut Shard) -> R) -> R {
        let shard = &mut self.shard;
        match self.is_counting {
            true => counted(|| work(shard)),
            false => work(shard),
        }
    }
}

impl StateMachine for CountedShard {
    type Message = Message;

    fn request(&mut self, token: Token, request: Request) {
        self.work(|shard| shard.request(token, request));
    }

    fn message(&mut self, from: ShardId, message: Message) {
        self.work(|shard| shard.message(from, message));
    }

    fn complete(&mut self, completion: Completion) {
        self.work(|shard| shard.complete(completion));
    }

    fn turn(&mut self, now: Micros) {
        self.work(|shard| shard.turn(now));
    }

    fn next_effect(&mut self) -> Option<Effect> {
        self.work(Shard::next_effect)
    }

    fn deadline(&self) -> Option<Micros> {
        self.shard.deadline()
    }

    fn accepting(&self) -> bool {
        self.shard.accepting()
    }

    fn is_open(&self) -> bool {
        self.shard.is_open()
    }

    fn is_closed(&self) -> bool {
        self.shard.is_closed()
    }

    fn ops_under_way(&self) -> usize {
        self.shard.ops_under_way()
    }

    fn waits_for(&self) -> Option<Lsn> {
        self.shard.waits_for()
    }

    fn failure(&self) -> Option<Error> {
        self.shard.failure()
    }

    fn mapping(&self) -> Option<Mapping> {
        Some(self.shard.mapping())
    }
}

/// A disk that counts its operations.
pub(super) struct CountingDisk {
    pub(super) disk: MemoryDisk,
    pub(super) reads: u64,
    pub(super) bytes_written: u64,
}

impl Disk for CountingDisk {
    fn submit(&mut self, id: OpId, op: DiskOp) {
        match &op {
            DiskOp::Read { .. } => self.reads += 1,
            DiskOp::Write { from, .. } => {
                self.bytes_written += from.iter().map(|slice| u64::from(slice.len)).sum::<u64>();
            }
            DiskOp::Flush { .. } | DiskOp::Allocate { .. } => {}
        }
        self.disk.submit(id, op);
    }

    fn reap(&mut self, out: &mut Vec<Completion>) {
        self.disk.reap(out);
    }

    fn wait(&mut self, timeout_us: Option<Micros>) {
        self.disk.wait(timeout_us);
    }

    fn len(&mut self, file: FileId) -> Result<Option<u64>> {
        self.disk.len(file)
    }

    fn files(&mut self) -> Result<Vec<FileId>> {
        self.disk.files()
    }
}
