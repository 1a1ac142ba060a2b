//! Maps virtual shards, and thereby pages, to the shards that own them.
//!
//! Each open makes a new shard map: another number of cores leads to another map, not to a copy of
//! the data.

use super::{PageKey, ShardId, VShard};

/// How the virtual shards of a store are distributed over its shards: one to each in turn.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ShardMap {
    vshards_count: u32,
    shards_count: u16,
}

impl ShardMap {
    /// Maps `vshards_count` virtual shards to `shards_count` shards.
    ///
    /// # Panics
    /// If there are no shards, or more shards than virtual shards.
    pub const fn new(vshards_count: u32, shards_count: u16) -> Self {
        assert!(
            shards_count > 0 && shards_count as u32 <= vshards_count,
            "each shard must own a virtual shard"
        );
        ShardMap { vshards_count, shards_count }
    }

    /// The number of shards.
    pub const fn shards_count(self) -> u16 {
        self.shards_count
    }

    /// The shard that owns `vshard`.
    pub const fn owner(self, vshard: VShard) -> ShardId {
        ShardId::new(vshard.get() % self.shards_count)
    }

    /// The shard that owns the page.
    pub fn shard_of(self, key: PageKey) -> ShardId {
        self.owner(key.place_in(self.vshards_count).0)
    }

    /// The virtual shards that `shard` owns, in order.
    pub fn owned_by(self, shard: ShardId) -> impl Iterator<Item = VShard> {
        let count = self.vshards_count as u16;
        (shard.get()..count).step_by(self.shards_count.into()).map(VShard::new)
    }

    /// All shards but `shard`, in order.
    pub fn others(self, shard: ShardId) -> impl Iterator<Item = ShardId> {
        self.shards().filter(move |other| *other != shard)
    }

    /// All shards, in order.
    pub fn shards(self) -> impl Iterator<Item = ShardId> {
        (0..self.shards_count).map(ShardId::new)
    }
}
