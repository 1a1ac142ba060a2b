//! What every component of a shard gets: the shard's identity, the time, its memory, and the queue
//! of effects.
//!
//! Invariants
//! 1. Effects leave in the order in which they were made.
//! 2. `failed` is set once, and nothing is written from then on.

use super::OpKind;
use super::blocked::Blocked;
use super::event::{Response, Token};
use super::message::Message;
use super::state_machine::Effect;
use super::work::{Work, WorkSet};
#[cfg(any(test, feature = "sim"))]
use crate::base::Lsn;
use crate::base::error::{Error, ErrorKind, Result};
use crate::base::metrics::ShardStats;
use crate::base::options::Limits;
use crate::base::{IndexedSlab, Micros, OpIdx, ShardId, ShardMap};
use crate::engine::log::OpenGroup;
use crate::engine::order::GlobalOrder;
use crate::format::superblock::Superblock;
use crate::io::{DiskOp, OpId};
use crate::memory::Arena;
use std::collections::VecDeque;
use std::sync::Arc;

/// What other components request of the checkpoint, or act upon. Only [`Context::need_checkpoint`]
/// and the checkpoint write it.
#[derive(Clone, Copy, Default, Debug)]
pub(super) struct CheckpointStatus {
    /// Whether one must begin once the current one has ended.
    pub wanted: bool,
    /// Whether one is in progress.
    pub active: bool,
    /// Whether dirty pages must go to their places.
    pub wants_pages: bool,
    /// Whether they must go at once, since something waits for the end of the checkpoint.
    pub is_urgent: bool,
    /// Whether the open group must become durable now.
    pub wants_groups: bool,
}

impl CheckpointStatus {
    pub fn is_wanted_or_active(self) -> bool {
        self.wanted || self.active
    }
}

/// The state that a shard's components share.
pub(super) struct Context {
    pub id: ShardId,
    pub shard_map: ShardMap,
    pub limits: Limits,
    pub order: Arc<GlobalOrder>,
    /// The time in microseconds, as passed to the current turn.
    pub now: Micros,
    pub arena: Arena,
    pub stats: ShardStats,
    /// Which steps wait, and for what.
    pub blocked: Blocked,
    /// Operations in flight.
    pub ops: IndexedSlab<OpIdx, OpKind>,
    pub effects: VecDeque<Effect>,
    /// Messages to this shard itself.
    pub loopback: VecDeque<Message>,
    /// The steps that have work.
    pub work: WorkSet,
    /// When the next turn is due at the latest, if nothing arrives before.
    pub due: Option<Micros>,
    /// Why this shard has stopped writing.
    pub failed: Option<Error>,
    /// What made it stop, until all waiting requests have been answered: see
    /// [`Shard::tell_failure`](super::Shard).
    pub failure_cause: Option<Error>,
    /// The newest superblock that is durable. Only the end of a checkpoint replaces it.
    pub superblock: Superblock,
    /// What other components may request of checkpoints, and know about the current one.
    pub checkpoint: CheckpointStatus,
    /// When a request was answered last.
    pub replied_at: Micros,
    /// Which request got which LSN.
    #[cfg(any(test, feature = "sim"))]
    pub allocated: Vec<(Token, Lsn)>,
}

impl Context {
    pub fn new(
        id: ShardId,
        shard_map: ShardMap,
        limits: Limits,
        order: Arc<GlobalOrder>,
        now: Micros,
        arena: Arena,
        superblock: Superblock,
    ) -> Self {
        Context {
            id,
            shard_map,
            limits,
            order,
            now,
            arena,
            stats: ShardStats::default(),
            blocked: Blocked::default(),
            ops: IndexedSlab::default(),
            effects: VecDeque::new(),
            loopback: VecDeque::new(),
            work: WorkSet::ALL,
            due: None,
            failed: None,
            failure_cause: None,
            superblock,
            checkpoint: CheckpointStatus::default(),
            replied_at: now,
            #[cfg(any(test, feature = "sim"))]
            allocated: Vec::new(),
        }
    }

    /// Records that a step has work.
    pub fn need(&mut self, work: Work) {
        self.work.add(work);
    }

    /// Called when space, log room or memory for map nodes was taken or given back: the steps that
    /// keep some free look again.
    pub fn room_changed(&mut self) {
        self.need(Work::Space);
        self.need(Work::Checkpoint);
    }

    /// Called when something waits for what the open group holds, if it holds anything.
    pub fn press(&mut self, open: &mut OpenGroup) {
        if !open.is_empty() {
            open.urgent = true;
            self.need(Work::Groups);
        }
    }

    /// Records that every step may have work.
    pub fn need_all(&mut self) {
        self.work = WorkSet::ALL;
    }

    /// Sends a message to another shard, or keeps it for this one.
    pub fn send(&mut self, to: ShardId, message: Message) {
        if to == self.id {
            self.loopback.push_back(message);
            self.need(Work::Loopback);
        } else {
            self.stats.messages += 1;
            self.effects.push_back(Effect::Send(to, message));
        }
    }

    /// Starts an operation of the device.
    pub fn submit(&mut self, kind: OpKind, op: DiskOp) {
        assert!(op.is_aligned(), "{op:?} is not of whole blocks");
        let id = self.ops.insert(kind);
        self.effects.push_back(Effect::Submit(OpId(id.index() as u64), op));
    }

    /// Requests a checkpoint, once the current one has ended.
    pub fn need_checkpoint(&mut self) {
        if !self.checkpoint.wanted {
            self.checkpoint.wanted = true;
            self.need_all();
        }
    }

    /// Called when a write or a flush has failed: from now on no shard acknowledges anything.
    pub fn fail(&mut self, error: Error) {
        if self.failed.is_some() {
            return;
        }
        tracing::error!(shard = self.id.get(), %error, "the store stops writing; reopen it");
        for shard in self.shard_map.others(self.id) {
            self.send(shard, Message::Failed(error.clone()));
        }
        self.stop(error);
    }

    /// Called when this or another shard has failed.
    pub fn stop(&mut self, error: Error) {
        if self.failed.is_some() {
            return;
        }
        let stopped = Error::new(
            ErrorKind::Closed,
            format_args!(
                "the store has stopped writing after a failure ({error}); reopen it to recover"
            ),
        );
        self.failed = Some(stopped);
        self.failure_cause = Some(error);
        self.need_all();
    }

    /// Answers a request.
    pub fn reply(&mut self, token: Token, result: Result<Response>) {
        if matches!(&result, Err(error) if error.kind() == ErrorKind::Conflict) {
            self.stats.conflicts += 1;
        }
        self.replied_at = self.now;
        self.effects.push_back(Effect::Reply(token, result));
    }
}
