//! A set of shards.
//!
//! Invariants
//! 1. Members are below [`ShardSet::SHARDS_MAX`]; inserting a larger number panics, instead of
//!    naming a wrong shard.
//! 2. On disk a set is the bits of [`ShardSet::bits`]: bit `n` stands for shard `n`.

use super::ShardId;
use std::fmt;

/// A set of shards, as bits. The log uses it to name the shards of a commit.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct ShardSet(u64);

impl ShardSet {
    /// The most shards that there may be: format 3 has one word for a set.
    pub const SHARDS_MAX: u16 = u64::BITS as u16;
    /// No shards.
    pub const EMPTY: ShardSet = ShardSet(0);

    /// The set that contains only `shard`.
    pub fn of(shard: ShardId) -> Self {
        let mut set = ShardSet::EMPTY;
        set.insert(shard);
        set
    }

    /// The set that these bits on disk stand for.
    pub const fn from_bits(bits: u64) -> Self {
        ShardSet(bits)
    }

    /// Its bits on disk.
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// Adds a shard.
    ///
    /// # Panics
    /// If its number is too large for a set.
    pub fn insert(&mut self, shard: ShardId) {
        assert!(
            shard.get() < Self::SHARDS_MAX,
            "{shard:?} does not fit into a set: there are at most {} shards",
            Self::SHARDS_MAX
        );
        self.0 |= 1 << shard.get();
    }

    /// Whether it contains a shard.
    pub fn contains(self, shard: ShardId) -> bool {
        shard.get() < Self::SHARDS_MAX && self.0 >> shard.get() & 1 == 1
    }

    /// Its members, in order.
    pub fn iter(self) -> impl Iterator<Item = ShardId> {
        (0..Self::SHARDS_MAX).map(ShardId::new).filter(move |shard| self.contains(*shard))
    }
}

impl FromIterator<ShardId> for ShardSet {
    fn from_iter<I: IntoIterator<Item = ShardId>>(shards: I) -> Self {
        let mut set = ShardSet::EMPTY;
        shards.into_iter().for_each(|shard| set.insert(shard));
        set
    }
}

impl fmt::Debug for ShardSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// If this fails, recovery looks for the parts of a commit in the logs of the wrong shards.
    #[test]
    fn the_bits_of_a_set_are_its_members() {
        let shards = [0, 5, 63].map(ShardId::new);
        let set: ShardSet = shards.into_iter().collect();
        assert_eq!(set.bits(), 1 | 1 << 5 | 1 << 63);
        assert_eq!(set.iter().collect::<Vec<_>>(), shards);
        assert_eq!(ShardSet::from_bits(set.bits()), set);
        assert!(
            set.contains(ShardId::new(5))
                && !set.contains(ShardId::new(6))
                && !set.contains(ShardId::new(64))
        );
        assert_eq!(ShardSet::of(ShardId::new(2)).bits(), 4);
    }

    /// A shard number that wrapped around would stand for another shard.
    #[test]
    #[should_panic(expected = "at most 64 shards")]
    fn a_shard_beyond_the_limit_is_refused() {
        ShardSet::of(ShardId::new(64));
    }
}
