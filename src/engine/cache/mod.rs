//! The page cache: the table of pages, eviction, and reads in progress.

mod answer;
pub(in crate::engine) mod eviction;
mod holds;
pub(in crate::engine) mod page_lock;
pub(in crate::engine) mod loading;
pub(in crate::engine) mod range_scan;
pub(in crate::engine) mod table;

pub(in crate::engine) use loading::NodeWaiter;

use crate::base::error::Error;
use crate::base::{NodeMoveIdx, RequestIdx};
use crate::engine::cache::loading::{NodeWaiters, Wanted};
use crate::engine::cache::range_scan::Walk;
use crate::engine::cache::table::Table;
use crate::format::extent::NodeKey;
use crate::memory::Eviction;
use hashbrown::HashMap;

/// Pages in memory and on their way there.
pub(in crate::engine) struct PageCache {
    pub table: Table,
    pub eviction: Eviction,
    pub node_waiters: HashMap<NodeKey, NodeWaiters, foldhash::fast::FixedState>,
    pub wanted: Wanted,
    /// Range scans in progress, by their requests.
    pub walks: HashMap<RequestIdx, Box<Walk>, foldhash::fast::FixedState>,
    /// Nodes that compaction waited for, by its numbers: they have arrived, or will not.
    pub moves_ended: Vec<(NodeMoveIdx, Option<Error>)>,
}

impl PageCache {
    /// Makes the cache of a shard with `frames` frames, `pages_max` of which may hold pages.
    pub fn new(frames: u32, pages_max: u32, seed: u64) -> Self {
        PageCache {
            table: Table::new(pages_max, seed),
            eviction: Eviction::new(frames),
            node_waiters: HashMap::with_hasher(foldhash::fast::FixedState::with_seed(seed)),
            wanted: Wanted::default(),
            walks: HashMap::with_hasher(foldhash::fast::FixedState::with_seed(seed)),
            moves_ended: Vec::new(),
        }
    }
}
