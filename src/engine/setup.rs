//! A shard as recovery makes it: with what was found, and nothing under way.

use super::Shard;
use super::blocked::{Blocked, Held};
use super::checkpoint::{Checkpoint, NewEpoch};
use super::compaction::{Compactor, Moves};
use super::lead::Lead;
use super::order::Waits;
use super::pages::Table;
use super::part::Reserved;
use super::reads::Wanted;
use super::redo::Recovering;
use super::space::Space;
use crate::base::metrics::ShardStats;
use crate::base::options::Limits;
use crate::base::{Deal, Lsn, Micros, ShardId};
use crate::engine::commit::GlobalOrder;
use crate::engine::log::Log;
use crate::engine::map::{Extents, Map};
use crate::format::superblock::Superblock;
use crate::memory::{Arena, Eviction, Frame};
use hashbrown::HashMap;
use slab::Slab;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, VecDeque};
use std::sync::Arc;

/// What a shard is made of, as found by recovery.
pub(crate) struct Setup {
    pub id: ShardId,
    pub deal: Deal,
    pub limits: Limits,
    pub order: Arc<GlobalOrder>,
    pub arena: Arena,
    pub map: Map,
    pub extents: Extents,
    pub log: Log,
    pub superblock: Superblock,
    pub superblock_frames: Vec<Frame>,
    /// What is to be redone; `None` after a clean close.
    pub recovering: Option<Recovering>,
    /// The commit up to which the store was recovered.
    pub cut: Lsn,
    /// The epoch to be begun, for the leader.
    pub new_epoch: Option<NewEpoch>,
    pub seed: u64,
    pub now: Micros,
}

impl Shard {
    pub(crate) fn new(mut parts: Setup) -> Self {
        let hasher = || foldhash::fast::FixedState::with_seed(parts.seed);
        let (held, waits) = (Held::at_first(&mut parts.arena), Waits::new(&parts.order, parts.deal));
        Shard {
            id: parts.id,
            deal: parts.deal,
            order: parts.order,
            now: parts.now,
            eviction: Eviction::new(parts.arena.blocks()),
            arena: parts.arena,
            table: Table::new(parts.limits.memory_blocks, parts.seed),
            map: parts.map.with_capacity(parts.limits.memory_blocks),
            limits: parts.limits,
            extents: parts.extents,
            log: parts.log,
            superblock: parts.superblock,
            superblock_frames: parts.superblock_frames,
            ops: Slab::new(),
            effects: VecDeque::new(),
            pending: Slab::new(),
            ready: VecDeque::new(),
            ready_parts: VecDeque::new(),
            finished: VecDeque::new(),
            loopback: VecDeque::new(),
            cross: BTreeMap::new(),
            cross_next: 1,
            cross_waiting: Vec::new(),
            decidable: VecDeque::new(),
            cross_undurable: BTreeSet::new(),
            parts: HashMap::with_hasher(hasher()),
            reserved: Reserved::default(),
            waits,
            waiting: BinaryHeap::new(),
            waiting_seq: 0,
            node_waiters: HashMap::with_hasher(hasher()),
            wanted: Wanted::default(),
            flushing: false,
            dirty: Vec::new(),
            dirty_since: 0,
            captures: Slab::new(),
            unsettled: BinaryHeap::new(),
            page_writes: 0,
            reserved_blocks: 0,
            moves: Vec::new(),
            moves_asked: Moves::default(),
            compactor: Compactor::new(hasher()),
            checkpoint: Checkpoint::default(),
            lead: Lead::new(parts.new_epoch),
            summaries: Vec::new(),
            summaries_under_way: 0,
            space: Space::default(),
            blocked: Blocked::default(),
            held,
            closing: None,
            closed: false,
            quiet: false,
            failed: None,
            open_error: None,
            recovering: parts.recovering,
            redone: false,
            cut: parts.cut,
            opening: true,
            again: false,
            stats: ShardStats::default(),
            #[cfg(any(test, feature = "sim"))]
            drawn: Vec::new(),
            #[cfg(any(test, feature = "sim"))]
            reused_early: Vec::new(),
        }
    }
}
