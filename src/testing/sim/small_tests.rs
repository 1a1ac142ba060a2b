//! Runs all small workloads: every sequence of a few operations on two pages, of one shard and of
//! two, crashed at every point.
//!
//! Random work finds bugs that show often; trying all sequences finds those that need three
//! particular operations in a particular order. `COREPAGE_OPERATIONS=n` sets the most operations in
//! a sequence: 2 in every test run; 4 takes half an hour.

use super::disk::Loss;
use super::model::{page_bytes, patch_bytes};
use super::run::{Outcome, Plan, RunStats, SimRun};
use super::tests::{number, quiet, run_cases};
use super::workload::{self, Profile};
use crate::base::mix::mix;
use crate::base::options::{Geometry, Options};
use crate::base::{PageId, PageKey, ShardId, ShardMap, VolumeId};
use crate::engine::{Change, Commit, Request};
use crate::testing::random::Rng;

/// The operations of a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Op {
    /// A durable write of a whole page of the first shard, and of another one.
    PutHere,
    PutThere,
    /// A durable patch of some bytes.
    PatchHere,
    /// A buffered write of a whole page.
    BufferHere,
    /// A transaction that reads one page and changes both.
    Both,
    /// A durable free of both pages.
    FreeBoth,
    Flush,
    Checkpoint,
}

const OPS: [Op; 8] = [
    Op::PutHere,
    Op::PutThere,
    Op::PatchHere,
    Op::BufferHere,
    Op::Both,
    Op::FreeBoth,
    Op::Flush,
    Op::Checkpoint,
];

/// A sequence of operations on a number of shards, requested all at once or one after another.
#[derive(Clone, Debug)]
struct Case {
    ops: Vec<Op>,
    shards: u16,
    at_once: bool,
}

impl Case {
    /// All sequences of `1..=most` operations, on one shard and on two.
    fn all(most: usize) -> Vec<Case> {
        let mut sequences: Vec<Vec<Op>> = vec![Vec::new()];
        let mut cases = Vec::new();
        for _ in 0..most {
            sequences =
                sequences.iter().flat_map(|ops| OPS.map(|op| [&ops[..], &[op]].concat())).collect();
            for (ops, shards) in sequences.iter().flat_map(|ops| [(ops, 1), (ops, 2)]) {
                cases.push(Case { ops: ops.clone(), shards, at_once: false });
                if ops.len() > 1 {
                    cases.push(Case { ops: ops.clone(), shards, at_once: true });
                }
            }
        }
        cases
    }

    fn seed(&self) -> u64 {
        let ops = self.ops.iter().fold(u64::from(self.shards), |seed, op| mix(seed ^ *op as u64));
        mix(ops ^ u64::from(self.at_once))
    }
}

/// The smallest store, so that recovery is quick.
pub(super) fn options() -> Options {
    let geometry = Geometry {
        extent_bytes: 64 << 10,
        segment_bytes: 64 << 10,
        segments_count: 4,
        vshards_count: 4,
    };
    Options {
        geometry,
        memory_bytes: 2 << 20,
        log_writes_max: 4,
        txn_bytes_max: 128 << 10,
        requests_max: 32,
        ..workload::options(&mut Rng::new(1))
    }
}

/// A page of this shard if there are two.
fn key(shard: u16) -> PageKey {
    let shard_map = ShardMap::new(options().geometry.vshards_count, 2);
    let keys = (0..).map(|n| PageKey::new(VolumeId::new(1), PageId::new(n * 512)));
    keys.into_iter()
        .find(|key| shard_map.shard_of(*key) == ShardId::new(shard))
        .expect("each shard has pages")
}

fn request(op: Op, n: u64, sim: &SimRun) -> Request {
    let (here, there) = (key(0), key(1));
    let put = |key| (key, Change::Put(page_bytes(key, n)));
    let patch = |key| (key, Change::Patch { offset: 100, bytes: patch_bytes(n, 300) });
    let told = sim.oracle.model.at(here, sim.oracle.last()).told();
    let (reads, changes) = match op {
        Op::PutHere | Op::BufferHere => (Vec::new(), vec![put(here)]),
        Op::PutThere => (Vec::new(), vec![put(there)]),
        Op::PatchHere => (Vec::new(), vec![patch(here)]),
        Op::Both => (vec![(here, told)], vec![patch(here), put(there)]),
        Op::FreeBoth => (Vec::new(), vec![(here, Change::Free), (there, Change::Free)]),
        Op::Flush => return Request::Flush,
        Op::Checkpoint => return Request::Checkpoint,
    };
    Request::Commit(Commit { reads, changes, durable: op != Op::BufferHere })
}

/// Runs until everything is answered and the disk is at rest for now; at each step checks what a
/// crash would leave.
fn publish_to_map(sim: &mut SimRun, rng: &mut Rng) -> Outcome {
    let mut seen = sim.disk.events();
    while sim.oracle.outstanding() > 0 {
        sim.pass()?;
        if sim.disk.events() == seen {
            continue;
        }
        seen = sim.disk.events();
        sim.peek(Loss::Everything)?;
        sim.peek(Loss::random(rng))?;
    }
    Ok(())
}

fn run(case: &Case) -> Outcome<RunStats> {
    let mut rng = Rng::new(case.seed());
    let profile = Profile { universe: vec![key(0), key(1)], ..Profile::random(&mut rng) };
    let plan = Plan {
        options: Some(options()),
        profile: Some(profile),
        shards: case.shards..=case.shards,
        recovery_crash_percent: 20,
        ..quiet(case.seed())
    };
    let mut sim = SimRun::new(plan);
    sim.begin()?;
    // Any number of shards opens what is left.
    sim.plan.shards = 1..=3;
    for (n, op) in case.ops.iter().enumerate() {
        let request = request(*op, n as u64 + 1, &sim);
        sim.ask(request);
        if !case.at_once {
            publish_to_map(&mut sim, &mut rng)?;
        }
    }
    publish_to_map(&mut sim, &mut rng)?;
    Ok(sim.run_stats)
}

/// If this fails, there is a bug that the smallest program can meet.
#[test]
fn every_small_workload_survives_a_crash_at_every_point() {
    let most = number("COREPAGE_OPERATIONS").unwrap_or(2) as usize;
    let cases = Case::all(most);
    let total = run_cases(&cases, run);
    println!(
        "{} workloads of up to {most} operations: {} crash states, {} crashes in recovery, {} of \
         them in a second and {} in a third one",
        cases.len(),
        total.crashes,
        total.crashes_in_recovery,
        total.crashes_in_second_recovery,
        total.crashes_in_third_recovery
    );
    assert!(total.crashes > 10 * cases.len() as u64, "{} crash states", total.crashes);
}
