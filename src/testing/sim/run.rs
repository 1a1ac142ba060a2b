//! One store, its clients, its disk and its crashes, on one thread and by one seed.
//!
//! A run is a sequence of lives: it opens the store (perhaps with crashes), checks every page
//! against the model, works until the power fails or the store is closed, makes the disk that is
//! left, and so on.
//!
//! Invariants
//! 1. Everything that happens follows from the plan; the same plan gives the same trace.
//! 2. Without errors of the device every request is answered in bounded virtual time: if nothing is
//!    in flight and no deadline is set while a request waits, the run fails, as it does if the
//!    shards turn without end.
//! 3. The number of shards changes at each open.
//!
//! It does *not* check answers; see `oracle`.

mod counts;

use super::canary::plant;
use super::cluster::{Cluster, Opened};
use super::disk::{Latency, Loss, SimDisk, is_of_the_device};
use super::net::Mark;
use super::oracle::{Oracle, Tolerance};
pub use super::plan::{Failure, Plan, RunStats};
use super::strain::{HeldPage, LARGE_EVENTS, LARGE_IMAGES, LARGE_LIVES, Strain, Trees, chance_of};
use super::workload::{PrepareRequest, Profile, Workload};
use crate::base::error::Result as StoreResult;
use crate::base::metrics::ShardStats;
use crate::base::mix::mix;
use crate::base::options::Options;
use crate::base::{Lsn, PageId, PageKey, ShardId, VolumeId};
use crate::engine::{Request, Response, Token};
use crate::testing::random::Rng;
use std::collections::{BTreeMap, BTreeSet};

/// Events after the answer to `Close` within which all shards are closed.
const CLOSING_MAX: u32 = 10_000;
/// Crashes of recoveries in a row.
const RECOVERY_CRASHES_MAX: u32 = 3;
/// Steps without an event of the disk, after which the run requests a checkpoint.
const QUIET_STEPS_MAX: u32 = 10_000;

/// A commit may always take one in `COMMIT_SHARE_MIN` frames of a shard, whatever else is kept
/// there.
const COMMIT_SHARE_MIN: u64 = 4;

/// A run of one plan: the store, its clients, its disk and its crashes.
pub struct SimRun {
    pub(super) plan: Plan,
    pub(super) rng: Rng,
    pub(super) options: Options,
    pub(super) workload: Workload,
    pub(super) oracle: Oracle,
    pub(super) disk: SimDisk,
    pub(super) cluster: Option<Cluster>,
    /// Answered commits over several shards, each with the messages that must arrive before no page
    /// is locked for it.
    pub(super) lingering: Vec<(Token, Mark)>,
    /// The newest counters that each shard gave.
    pub(super) stats: BTreeMap<ShardId, ShardStats>,
    /// Pages that clients have pinned.
    pub(super) held: Vec<HeldPage>,
    /// Pages of ended stores that clients still have pinned.
    pub(super) outlived: Vec<HeldPage>,
    /// Whether clients under strain are unpinning their pages.
    pub(super) giving_back: bool,
    pub(super) strain: Strain,
    /// Reads that turn the memory of a large store over, and come before all other requests.
    pub(super) sweeps_left: u64,
    /// The small trees of a large store.
    pub(super) trees: Trees,
    /// The random source of strain.
    pub(super) chance: Rng,
    pub(super) next_token: u64,
    /// The answers that a test waits for.
    pub(super) watched: BTreeMap<Token, Option<StoreResult<Response>>>,
    recovery_events: u64,
    life: u32,
    pub(super) run_stats: RunStats,
}

pub(super) type Outcome<T = ()> = std::result::Result<T, String>;

/// Runs a plan to its end. A panic of the engine is a failure like any other.
pub fn run(plan: &Plan) -> std::result::Result<RunStats, Failure> {
    plant(plan.canary);
    let mut sim = SimRun::new(plan.clone());
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| sim.go()));
    plant(None);
    let why = match result {
        Ok(Ok(())) => return Ok(sim.sum_up()),
        Ok(Err(why)) => why,
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| text.to_string()));
            format!("panic: {}", text.unwrap_or_default())
        }
    };
    let why = why + &sim.strain.describe(&sim.options);
    let failure =
        Failure { seed: plan.seed, life: sim.life, requests: sim.run_stats.requests, why };
    // Destructors that assert must not touch what a panic has left half done.
    std::mem::forget(sim);
    Err(failure)
}

impl SimRun {
    /// The run of a plan, before its first event.
    pub fn new(plan: Plan) -> Self {
        let mut rng = Rng::new(plan.seed);
        let options = super::workload::options(&mut rng);
        let mut chance = chance_of(plan.seed);
        let is_free = plan.options.is_none() && plan.profile.is_none();
        let strain = plan.strain.clone();
        let strain =
            strain.unwrap_or_else(|| Strain::random(plan.strain_percent, is_free, &mut chance));
        let options = strain.options(plan.options.clone().unwrap_or(options), &mut chance);
        let profile = Profile::random(&mut rng);
        let profile = plan.profile.clone().unwrap_or(profile);
        let (profile, trees) = strain.profile(profile, options.geometry.vshards_count, &mut chance);
        let profile = profile.smaller(&plan.smaller);
        let disk = SimDisk::new(rng.draw());
        let slow = rng.within(1, 8);
        let usual = Latency::default();
        let latency = Latency { flush: (usual.flush.0 * slow, usual.flush.1 * slow), ..usual };
        disk.set_latency(strain.latency(latency));
        let tolerance = Tolerance {
            full: options.data_bytes_max > 0,
            read_pages_max: options.vectored_pages_max,
            ..Tolerance::default()
        };
        SimRun {
            workload: Workload::new(profile, options.clone(), rng.fork(2)),
            oracle: Oracle::new(tolerance),
            options,
            rng,
            disk,
            cluster: None,
            lingering: Vec::new(),
            stats: BTreeMap::new(),
            held: Vec::new(),
            outlived: Vec::new(),
            giving_back: false,
            sweeps_left: 0,
            strain,
            trees,
            chance,
            next_token: 0,
            watched: BTreeMap::new(),
            recovery_events: 40,
            life: 0,
            run_stats: RunStats::default(),
            plan,
        }
    }

    /// All lives.
    fn go(&mut self) -> Outcome {
        self.begin()?;
        self.fill()?;
        let step = if self.is_large() { LARGE_LIVES } else { 1 };
        for life in (0..self.plan.lives).step_by(step as usize) {
            self.life = life;
            self.count_life();
            self.live()?;
            self.end()?;
        }
        Ok(())
    }

    /// Opens the store for the first time.
    pub(super) fn begin(&mut self) -> Outcome {
        let opened = self.open()?;
        if opened.recovered_lsn > self.oracle.last() {
            return Err(format!("a new store begins at {:?}", opened.recovered_lsn));
        }
        Ok(())
    }

    /// Opens the store on the disk, through up to three crashes in recovery and errors of the
    /// device.
    pub(super) fn open(&mut self) -> Outcome<Opened> {
        for depth in 0.. {
            let at = self.disk.events();
            if depth < RECOVERY_CRASHES_MAX && self.rng.chance(self.plan.recovery_crash_percent) {
                self.disk.cut_power_after(self.rng.within(1, self.recovery_events));
            }
            let fails = depth < RECOVERY_CRASHES_MAX && self.rng.chance(self.plan.fault_percent);
            if fails {
                self.plan_fault(self.recovery_events / 2);
            }
            let opened = self.open_once();
            self.check_disk()?;
            if self.disk.is_off() {
                self.run_stats.crashes_in_recovery += 1;
                self.run_stats.crashes_in_second_recovery += u64::from(depth > 0);
                self.run_stats.crashes_in_third_recovery += u64::from(depth > 1);
            } else if fails && self.disk.counters().faults() > 0 {
                // Whatever the answer is: recovery must cope with what it has left.
                self.run_stats.failed_openings += 1;
                opened?.map_or_else(|error| is_of_the_device(&error), |_| Ok(()))?;
            } else {
                if fails {
                    self.disk.clear_faults();
                    self.tolerate_errors(false);
                }
                let (cluster, mut opened) =
                    opened?.map_err(|error| format!("recovery: {error}"))?;
                // A recovery that crashed may have begun to use the store again.
                opened.clean |= depth > 0;
                self.disk.keep_power();
                // Crashes come at almost any event of a recovery; some don't happen, so that the
                // end is reached.
                self.recovery_events = (self.disk.events() - at + 2).max(8);
                self.begin_life(cluster);
                self.count_recovery(opened);
                self.let_go_outlived()?;
                return Ok(opened);
            }
            let loss = Loss::random(&mut self.rng);
            let image = self.disk.crash(loss, &mut self.rng);
            self.replace_disk(image);
        }
        unreachable!("the loop ends with the last recovery")
    }

    /// Opens the store on the disk with any number of shards.
    fn open_once(&mut self) -> Outcome<StoreResult<(Cluster, Opened)>> {
        let most = self.options.geometry.vshards_count as u16;
        let (least, most) =
            (most.min(*self.plan.shards.start()), most.min(*self.plan.shards.end()));
        let any = self.rng.within(least.into(), most.into()) as u16;
        // With more memory than one shard's, the store would soon be no larger than its memory.
        let shards = if self.is_large() && self.chance.chance(60) { least } else { any };
        // Each shard needs memory of its own.
        let options = Options {
            memory_bytes: self.options.memory_bytes * u64::from(shards),
            ..self.options.clone()
        };
        let (mut cluster, opened) = match Cluster::begin(
            &self.disk,
            &options,
            shards,
            self.strain.holding,
            &mut self.rng,
        ) {
            Ok(begun) => begun,
            Err(error) => return Ok(Err(error)),
        };
        Ok(cluster.finish_opening()?.map(|()| (cluster, opened)))
    }

    /// Opens the store on the disk, once; returns the error if it can't be opened.
    pub(super) fn try_open(&mut self) -> Outcome<StoreResult<Opened>> {
        let opened = self.open_once()?;
        self.check_disk()?;
        Ok(opened.map(|(cluster, opened)| {
            self.begin_life(cluster);
            opened
        }))
    }

    /// Crashes, and continues with the disk that is left.
    pub(super) fn crash(&mut self, loss: Loss) -> Outcome {
        self.let_go_at_end()?;
        self.oracle.on_crash();
        self.end_life();
        let image = self.disk.crash(loss, &mut self.rng);
        self.replace_disk(image);
        Ok(())
    }

    fn begin_life(&mut self, cluster: Cluster) {
        self.end_life();
        self.go_on_with(cluster);
    }

    fn go_on_with(&mut self, cluster: Cluster) {
        self.oracle.shard_map(cluster.shard_map());
        let tolerance = self.oracle.tolerance();
        // Ordinary stores are dense enough: their commits find room for their map nodes.
        let commit_frames_max =
            if self.is_large() { cluster.frames_least() / COMMIT_SHARE_MIN } else { 0 };
        let commit_bytes_max = cluster.txn_bytes_max();
        self.oracle.tolerate(Tolerance { commit_bytes_max, commit_frames_max, ..tolerance });
        self.workload.begin_life(cluster.shard_map(), cluster.timing.idle, cluster.txn_bytes_max());
        self.cluster = Some(cluster);
    }

    /// Recovers and checks what a crash at this moment would leave; the run itself goes on
    /// unchanged.
    pub(super) fn peek(&mut self, loss: Loss) -> Outcome {
        let cluster = self.cluster.take().expect("the store is open");
        let (lingering, stats) =
            (std::mem::take(&mut self.lingering), std::mem::take(&mut self.stats));
        let image = self.disk.crash(loss, &mut self.rng);
        let disk = std::mem::replace(&mut self.disk, image);
        self.run_stats.crashes += 1;
        let checked = self.open().and_then(|opened| self.check(opened));
        self.end_life();
        let image = std::mem::replace(&mut self.disk, disk);
        self.run_stats.disk.add(&image.counters());
        (self.lingering, self.stats) = (lingering, stats);
        self.go_on_with(cluster);
        checked.map(drop).map_err(|why| format!("after {loss:?}: {why}"))
    }

    pub(super) fn end_life(&mut self) {
        if let Some(cluster) = self.cluster.take() {
            self.run_stats.cluster.add(&cluster.counters());
            self.run_stats.rare.add(&cluster.rare());
            self.run_stats.rare.lives_with_three_levels += u64::from(cluster.levels_most() >= 3);
            self.run_stats.add_stats(&self.stats_told());
        }
        self.lingering.clear();
        self.stats.clear();
    }

    fn replace_disk(&mut self, image: SimDisk) {
        self.run_stats.disk.add(&self.disk.counters());
        self.run_stats.trace = mix(self.run_stats.trace ^ self.disk.trace());
        self.run_stats.virtual_us += image.now() - self.run_stats.virtual_us.min(image.now());
        self.disk = image;
    }

    pub(super) fn check_disk(&self) -> Outcome {
        self.disk
            .violation()
            .map_or(Ok(()), |violation| Err(format!("breach of the disk seam: {violation}")))
    }

    /// Works until the power fails or the store is closed.
    fn live(&mut self) -> Outcome {
        let longer = if self.is_large() { LARGE_EVENTS } else { 1 };
        let events = longer
            * match self.rng.below(10) {
                0 => self.rng.within(1, 8),
                1..=5 => self.rng.within(1, 1 + self.plan.events_max / 4),
                _ => self.rng.within(1, self.plan.events_max),
            };
        if self.rng.one_in(10) {
            let until = self.disk.events() + events;
            while self.disk.events() < until {
                self.busy_steps()?;
            }
            return self.close();
        }
        if self.rng.chance(self.plan.fault_percent) {
            self.plan_fault(events / 2);
        }
        self.disk.cut_power_after(events);
        while !self.disk.is_off() {
            self.busy_steps()?;
            if self.cluster().failure().is_some() {
                self.run_stats.failed_lives += 1;
                return self.after_failure();
            }
        }
        Ok(())
    }

    /// Takes some steps, until the disk is used. Requests a checkpoint from a store that does not
    /// use it (it may refuse everything as full).
    fn busy_steps(&mut self) -> Outcome {
        let before = self.disk.events();
        for _ in 0..QUIET_STEPS_MAX {
            self.step()?;
            if self.disk.events() > before
                || self.disk.is_off()
                || self.cluster().failure().is_some()
            {
                return Ok(());
            }
        }
        self.ask(Request::Checkpoint);
        Ok(())
    }

    /// Closes the store, with requests in progress.
    pub(super) fn close(&mut self) -> Outcome {
        self.ask(Request::Close);
        if self.rng.one_in(2) {
            let late = self.workload.next_ask();
            if late != PrepareRequest::Idle {
                let request = self.workload.request(late, &self.oracle);
                self.ask(request);
            }
        }
        self.publish_to_map()?;
        for _ in 0..CLOSING_MAX {
            if self.cluster().is_closed() {
                self.run_stats.closes += 1;
                return Ok(());
            }
            if self.cluster().next_at().is_none() {
                break;
            }
            self.pass()?;
        }
        Err(format!(
            "Close was answered, and not all shards are closed: {}",
            self.cluster().describe()
        ))
    }

    /// Makes images of the disk after the crash, several if planned, and continues with the last.
    fn end(&mut self) -> Outcome {
        self.let_go_at_end()?;
        self.oracle.on_crash();
        self.end_life();
        self.tolerate_errors(false);
        let crashed = self.disk.clone();
        let was_off = crashed.is_off();
        if self.rng.chance(self.plan.damage_percent) {
            self.damage_something(&crashed)?;
        }
        let images =
            if self.is_large() { self.plan.images.min(LARGE_IMAGES) } else { self.plan.images };
        for n in 0..images {
            let loss = Loss::random(&mut self.rng);
            let abandons = loss == Loss::Process && self.oracle.outstanding() > 0;
            self.run_stats.rare.stores_abandoned += u64::from(abandons);
            let image = crashed.crash(loss, &mut self.rng);
            self.replace_disk(image);
            self.run_stats.crashes += u64::from(was_off);
            let opened = self.open().map_err(|why| format!("after {loss:?}: {why}"))?;
            let recovered_lsn =
                self.check(opened).map_err(|why| format!("after {loss:?}: {why}"))?;
            if n + 1 < images {
                self.end_life();
            } else {
                self.oracle.restart_at(recovered_lsn, opened.recovered_lsn);
                self.workload.on_restart();
            }
        }
        Ok(())
    }

    /// Opens the store again on the disk as it is.
    pub(super) fn reopen(&mut self, loss: Loss) -> Outcome {
        self.crash(loss)?;
        let opened = self.open()?;
        let recovered_lsn = self.check(opened)?;
        self.oracle.restart_at(recovered_lsn, opened.recovered_lsn);
        self.workload.on_restart();
        Ok(())
    }

    /// Opens the store again without reading any page, so that nothing is in memory.
    pub(super) fn reopen_unchecked(&mut self, loss: Loss) -> Outcome {
        self.crash(loss)?;
        let opened = self.open()?;
        self.oracle.restart_at(opened.recovered_lsn, opened.recovered_lsn);
        self.workload.on_restart();
        Ok(())
    }

    /// Checks the whole state against the model; returns the LSN that it shows.
    pub(super) fn check(&mut self, opened: Opened) -> Outcome<Lsn> {
        let (looked_at, all) = self.pick_checked();
        let mut there = BTreeSet::new();
        // Not all at once, since there may be less memory than pages.
        for keys in looked_at.chunks(100) {
            let pages = self.read_now(keys)?;
            self.oracle.judge_state(opened.recovered_lsn, opened.clean, &pages)?;
            there.extend(pages.iter().filter(|(_, page)| !page.is_absent()).map(|(key, _)| *key));
        }
        let universe: BTreeSet<PageKey> = looked_at.iter().copied().collect();
        let volumes: BTreeSet<VolumeId> = universe.iter().map(|key| key.volume).collect();
        for volume in volumes.into_iter().filter(|_| all) {
            // In small parts where there is little memory: each part begins at the top of the
            // trees.
            let part = if self.is_large() { 64 } else { 1 };
            let ranges_max = (1 + self.rng.below(8) as usize) * part;
            let mut told = self.allocated_now(volume, ranges_max)?;
            // Some tests write pages that are not of the workload.
            told.retain(|page| universe.contains(&PageKey::new(volume, *page)));
            let read: Vec<PageId> =
                there.iter().filter(|key| key.volume == volume).map(|key| key.page).collect();
            if told != read {
                return Err(format!(
                    "{volume:?} is said to have {told:?}, but reads find {read:?}"
                ));
            }
        }
        Ok(opened.recovered_lsn)
    }
}
