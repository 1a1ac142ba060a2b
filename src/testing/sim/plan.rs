//! The plan of a run, its counters, and its failure.

use super::canary::Canary;
use super::cluster::ClusterCounters;
use super::disk::{DamageCounters, DiskCounters};
use super::oracle::OracleCounters;
use super::rare::Rare;
use super::strain::Strain;
use super::workload::{Profile, Smaller};
use crate::base::metrics::ShardStats;
use crate::base::options::Options;

/// The plan of a run.
#[derive(Clone)]
pub struct Plan {
    /// The seed, from which everything else follows.
    pub seed: u64,
    /// Crashes and closes; after each the store is opened again.
    pub lives: u32,
    /// Images of the disk that are recovered and checked for each crash; the run continues with the
    /// last.
    pub images: u32,
    /// The most events of the disk in a life.
    pub events_max: u64,
    /// The percentage of recoveries that are cut short by a crash.
    pub recovery_crash_percent: u64,
    /// The percentage of lives, and of recoveries, with an error of the device.
    pub fault_percent: u64,
    /// The percentage of crashes after which a damaged disk is opened too.
    pub damage_percent: u64,
    /// The percentage of seeds that are strained: by size, slow reads or pinned pages.
    pub strain_percent: u64,
    /// Instead of the seed's own.
    pub strain: Option<Strain>,
    /// A planted bug.
    pub canary: Option<Canary>,
    /// Instead of the seed's own.
    pub options: Option<Options>,
    /// Instead of the seed's own.
    pub profile: Option<Profile>,
    /// The parts of the profile that are left out.
    pub smaller: Smaller,
    /// The numbers of shards from which each open draws one, as far as the store allows.
    pub shards: std::ops::RangeInclusive<u16>,
}

/// Counters of a run.
#[derive(Clone, Debug, Default)]
pub struct RunStats {
    /// States of the disk that were recovered after a crash during work.
    pub crashes: u64,
    /// Crashes in recovery.
    pub crashes_in_recovery: u64,
    /// Of those, crashes in the recovery after such a crash.
    pub crashes_in_second_recovery: u64,
    /// Of those, crashes in the recovery after two such crashes.
    pub crashes_in_third_recovery: u64,
    /// Openings that an error of the device has ended.
    pub failed_openings: u64,
    /// Lives that an error of the device has ended.
    pub failed_lives: u64,
    /// Damage to what crashes left.
    pub damage: DamageCounters,
    /// Clean closes.
    pub closes: u64,
    /// Requests made.
    pub requests: u64,
    /// Virtual microseconds.
    pub virtual_us: u64,
    /// Answers.
    pub oracle: OracleCounters,
    /// Turns and messages.
    pub cluster: ClusterCounters,
    /// Rare events.
    pub rare: Rare,
    /// Operations and losses.
    pub disk: DiskCounters,
    /// The newest counters that the shards of each life gave, summed.
    pub shard: ShardStats,
    /// A hash of all operations and answers, in order.
    pub trace: u64,
}

/// A run that failed.
#[derive(Clone, Debug)]
pub struct Failure {
    /// The seed of the run.
    pub seed: u64,
    /// The life in which it failed.
    pub life: u32,
    /// The number of requests before.
    pub requests: u64,
    /// The reason.
    pub why: String,
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Failure { seed, life, requests, why } = self;
        write!(f, "seed {seed}, life {life}, after {requests} requests: {why}")
    }
}

impl RunStats {
    /// Adds another run's.
    pub fn add(&mut self, other: &RunStats) {
        self.crashes += other.crashes;
        self.crashes_in_recovery += other.crashes_in_recovery;
        self.crashes_in_second_recovery += other.crashes_in_second_recovery;
        self.crashes_in_third_recovery += other.crashes_in_third_recovery;
        self.failed_openings += other.failed_openings;
        self.failed_lives += other.failed_lives;
        self.damage.add(&other.damage);
        self.closes += other.closes;
        self.requests += other.requests;
        self.virtual_us += other.virtual_us;
        self.rare.add(&other.rare);
        self.disk.add(&other.disk);
        self.oracle.add(&other.oracle);
        self.cluster.add(&other.cluster);
        self.add_stats(&other.shard);
        // Order must not matter: the threads of a campaign end in any order.
        self.trace = self.trace.wrapping_add(other.trace);
    }

    /// Adds the counters of some shards.
    pub fn add_stats(&mut self, stats: &ShardStats) {
        self.shard.checkpoints += stats.checkpoints;
        self.shard.extents_compacted += stats.extents_compacted;
        self.shard.pages_moved += stats.pages_moved;
    }
}
