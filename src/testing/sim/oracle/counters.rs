//! Counts the answers of a run by kind: a run in which everything conflicts proves little.

/// The numbers of what the judge has seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OracleCounters {
    /// Commits that got an LSN.
    pub commits_drawn: u64,
    /// Of those, over several shards.
    pub spread_drawn: u64,
    /// Durable commits acknowledged.
    pub commits_durable: u64,
    /// Buffered commits acknowledged.
    pub commits_buffered: u64,
    /// Transactions without changes that were acknowledged.
    pub commits_reading: u64,
    /// Commits refused with `Conflict`.
    pub conflicts: u64,
    /// Of those, the ones whose only reason was that a commit over several shards held a page.
    pub conflicts_held: u64,
    /// The most later requests that overtook one request.
    pub overtaken_most: u64,
    /// Requests refused with `Busy`.
    pub busy: u64,
    /// Commits refused with `Full`.
    pub full: u64,
    /// Of those, over several shards.
    pub spread_full: u64,
    /// Requests refused as wrong or too large, rightly.
    pub invalid: u64,
    /// Requests answered with `Closed` or `Io`.
    pub stopped: u64,
    /// Commits answered with `OutcomeUnknown`.
    pub unknown: u64,
    /// Pages read and found right.
    pub pages_read: u64,
    /// Of those, older than the newest version allocated when they were requested: a commit over
    /// several shards had been allocated but had not reached the page's shard.
    pub pages_behind: u64,
    /// Commits over several shards during which another one that touched one of their pages was in
    /// progress.
    pub spread_overlaps: u64,
    /// Flushes, waits, checkpoints, closes.
    pub others: u64,
    /// Commits in doubt at a crash: they had an LSN, but were not acknowledged as durable.
    pub in_doubt: u64,
    /// Of those, over several shards.
    pub spread_in_doubt: u64,
    /// Commits in doubt, found after recovery.
    pub in_doubt_kept: u64,
    /// Of those, over several shards.
    pub spread_kept: u64,
}

impl OracleCounters {
    /// Adds another run's.
    pub fn add(&mut self, other: &OracleCounters) {
        self.commits_drawn += other.commits_drawn;
        self.spread_drawn += other.spread_drawn;
        self.commits_durable += other.commits_durable;
        self.commits_buffered += other.commits_buffered;
        self.commits_reading += other.commits_reading;
        self.conflicts += other.conflicts;
        self.conflicts_held += other.conflicts_held;
        self.overtaken_most = self.overtaken_most.max(other.overtaken_most);
        self.busy += other.busy;
        self.full += other.full;
        self.spread_full += other.spread_full;
        self.invalid += other.invalid;
        self.stopped += other.stopped;
        self.unknown += other.unknown;
        self.pages_read += other.pages_read;
        self.pages_behind += other.pages_behind;
        self.spread_overlaps += other.spread_overlaps;
        self.others += other.others;
        self.in_doubt += other.in_doubt;
        self.spread_in_doubt += other.spread_in_doubt;
        self.in_doubt_kept += other.in_doubt_kept;
        self.spread_kept += other.spread_kept;
    }
}
