//! The global log sequence number.

use std::fmt;

/// A commit's place in the total order over all shards. 0 stands for "before every commit" and for
/// pages that were never written; the first commit has 1.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Lsn(u64);

impl Lsn {
    /// The place before every commit.
    pub const ZERO: Lsn = Lsn(0);
    /// The place after every commit: the bound of a shard that holds nothing back.
    pub const MAX: Lsn = Lsn(u64::MAX);

    /// The LSN with this number, as stored on disk.
    pub const fn new(raw: u64) -> Self {
        Lsn(raw)
    }

    /// The number as stored on disk.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The LSN `n` places later.
    ///
    /// # Panics
    /// If 64 bits overflow, which takes 584 years at a billion commits a second.
    pub const fn plus(self, n: u64) -> Self {
        match self.0.checked_add(n) {
            Some(v) => Lsn(v),
            None => panic!("LSN overflow"),
        }
    }

    /// The previous LSN; zero stays zero.
    pub const fn before(self) -> Self {
        Lsn(self.0.saturating_sub(1))
    }
}

impl fmt::Debug for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "lsn {}", self.0)
    }
}

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}
