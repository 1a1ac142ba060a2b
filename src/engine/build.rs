//! Builds a shard from what recovery has found, with nothing in progress.

use super::Shard;
use super::cache::PageCache;
use super::checkpoint::Checkpoint;
use super::checkpoint::leader::Leader;
use super::context::Context;
use super::life::Life;
use super::message::NewEpoch;
use super::redo::{Recovering, Redo};
use super::requests::Requests;
use super::reservations::Reservations;
use super::space::Space;
use super::space::compaction::Compaction;
use super::txn::coordinator::Coordinator;
use super::txn::participant::Participant;
use super::watermark::WatermarkWaiters;
use super::writeback::WriteBack;
use crate::base::options::Limits;
use crate::base::{Lsn, Micros, ShardId, ShardMap};
use crate::engine::log::Log;
use crate::engine::map::{Extents, Map};
use crate::engine::order::GlobalOrder;
use crate::format::superblock::Superblock;
use crate::memory::{Arena, Frame};
use std::sync::Arc;

/// Everything that a shard is built from, as recovery has found it.
pub(crate) struct ShardParts {
    pub id: ShardId,
    pub shard_map: ShardMap,
    pub limits: Limits,
    pub order: Arc<GlobalOrder>,
    pub arena: Arena,
    pub map: Map,
    pub extents: Extents,
    pub log: Log,
    pub superblock: Superblock,
    pub superblock_frames: Vec<Frame>,
    /// What the shard redoes first; `None` after a clean close.
    pub recovering: Option<Recovering>,
    /// The commit up to which the store was recovered.
    pub recovered_lsn: Lsn,
    /// For the leader: the epoch that the opening begins.
    pub new_epoch: Option<NewEpoch>,
    pub seed: u64,
    pub now: Micros,
}

impl Shard {
    pub(crate) fn new(mut parts: ShardParts) -> Self {
        let hasher = || foldhash::fast::FixedState::with_seed(parts.seed);
        let reservations = Reservations::new(&mut parts.arena, parts.extents.summary_blocks());
        let memory_blocks = parts.limits.memory_blocks;
        Shard {
            cache: PageCache::new(parts.arena.blocks(), memory_blocks, parts.seed),
            map: parts.map.with_capacity(memory_blocks),
            space: Space::new(parts.extents, Compaction::new(hasher())),
            log: parts.log,
            requests: Requests::new(),
            reservations,
            coordinator: Coordinator::new(),
            participant: Participant::new(hasher()),
            watermark: WatermarkWaiters::new(&parts.order, parts.shard_map),
            writeback: WriteBack::default(),
            checkpoint: Checkpoint::new(Leader::new(parts.new_epoch, parts.superblock_frames)),
            life: Life { redoing: parts.recovering.is_some(), ..Life::new() },
            redo: Redo::new(parts.recovering, parts.recovered_lsn),
            ctx: Context::new(
                parts.id,
                parts.shard_map,
                parts.limits,
                parts.order,
                parts.now,
                parts.arena,
                parts.superblock,
            ),
        }
    }
}
