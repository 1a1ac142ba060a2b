//! Begins to open a store: one thread runs the first part of recovery on its disk, which makes the
//! shards of all threads.

use crate::base::error::{Error, Result};
use crate::base::options::Options;
use crate::base::{Micros, ShardMap};
use crate::engine::Shard;
use crate::engine::order::GlobalOrder;
use crate::engine::recovery::{self, RecoveryReport};
use crate::io::Disk;
use std::sync::Arc;

/// The shards of a store that is being opened, and what they share.
pub(super) struct Bootstrap<M> {
    pub(super) shards: Vec<M>,
    pub(super) recovery: RecoveryReport,
    pub(super) order: Arc<GlobalOrder>,
    /// The most bytes that one commit may have.
    pub(super) txn_bytes_max: u64,
    /// Which shard owns which pages.
    pub(super) shard_map: ShardMap,
}

/// Begins to open the store on `disk`.
pub(super) fn bootstrap(
    disk: &mut dyn Disk,
    options: &Options,
    shards_count: u16,
    now: Micros,
) -> Result<Bootstrap<Shard>> {
    let mut random = [0; 8];
    rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())
        .map_err(|e| Error::io("getting random bytes from the kernel", e.into()))?;
    let opening = recovery::begin(disk, options, shards_count, u64::from_le_bytes(random), now)?;
    let report = opening.report;
    for warning in &report.warnings {
        tracing::warn!("{warning}");
    }
    let first = opening.shards.first().ok_or_else(|| Error::invalid("a store needs a shard"))?;
    Ok(Bootstrap {
        txn_bytes_max: first.txn_bytes_max(),
        shard_map: first.shard_map(),
        order: opening.order,
        shards: opening.shards,
        recovery: report,
    })
}
