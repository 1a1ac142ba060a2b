//! Pairs of transactions, each reading what the other writes, on different shards: at most one of a
//! pair may commit.
//!
//! The judge checks every commit of every run against its reads; these tests produce the
//! interleavings that matter on purpose, and count them.

use super::model::page_bytes;
use super::run::{Outcome, Plan, SimRun};
use super::tests::{SHARDS_MAX, quiet};
use super::workload;
use crate::base::error::ErrorKind;
use crate::base::options::Options;
use crate::base::{Lsn, PageId, PageKey, VolumeId};
use crate::engine::{Change, Commit, Request, Response};
use crate::testing::random::Rng;

/// The number of pairs by how they ended.
#[derive(Clone, Copy, Debug, Default)]
struct Duels {
    /// The first one committed and the other did not, or the other way round.
    one: u64,
    /// None committed: each met what the other held.
    none: u64,
    /// Both committed, which a pair that does not exclude each other may.
    both: u64,
    /// Conflicts with no reason but a hold.
    held: u64,
}

/// A store of several shards, if the test may have several.
fn wide(seed: u64) -> SimRun {
    let options = workload::options(&mut Rng::new(seed));
    let geometry = crate::base::options::Geometry { vshards_count: 8, ..options.geometry.clone() };
    let options = Options { geometry, ..options };
    let shards = SHARDS_MAX.min(2)..=SHARDS_MAX;
    SimRun::new(Plan { options: Some(options), shards, ..quiet(seed) })
}

/// The page `n` of run `run`: neighbouring runs are of different shards.
fn key(run: u64, n: u64) -> PageKey {
    PageKey::new(VolumeId::new(1), PageId::new(run * 512 + n))
}

fn put(key: PageKey, tag: u64) -> (PageKey, Change) {
    (key, Change::Put(page_bytes(key, tag)))
}

impl SimRun {
    /// The pages with the LSNs at which a client reads them.
    fn look(&mut self, keys: &[PageKey]) -> Outcome<Vec<(PageKey, Lsn)>> {
        let mut seen = Vec::new();
        for &key in keys {
            match self.call(Request::Read([key].into_iter().collect()))? {
                Ok(Response::Pages(pages)) => seen.push((key, pages[0].version())),
                other => return Err(format!("reading {key:?}: {other:?}")),
            }
        }
        Ok(seen)
    }

    /// Runs two commits at a time, the second after up to a few turns; returns which of them
    /// committed.
    fn duel(&mut self, first: Commit, second: Commit, duels: &mut Duels) -> Outcome<[bool; 2]> {
        let before = self.oracle.counters();
        let mut tokens = Vec::new();
        for commit in [first, second] {
            let token = self.ask(Request::Commit(commit));
            self.watch(token);
            tokens.push(token);
            for _ in 0..self.rng.below(6) {
                self.pass()?;
            }
        }
        let mut done = [false; 2];
        for (done, token) in done.iter_mut().zip(tokens) {
            *done = match self.wait_for(token)?.map_err(|error| error.kind()) {
                Ok(Response::Committed(_)) => true,
                Err(ErrorKind::Conflict) => false,
                other => return Err(format!("a commit is answered with {other:?}")),
            };
        }
        match done {
            [true, true] => duels.both += 1,
            [false, false] => duels.none += 1,
            _ => duels.one += 1,
        }
        duels.held += self.oracle.counters().conflicts_held - before.conflicts_held;
        Ok(done)
    }
}

/// Each reads X and Y, and writes one of them: if both commit, no serial order explains it.
fn skew(seed: u64, duels: &mut Duels) -> Outcome {
    let mut sim = wide(seed);
    sim.begin()?;
    let mut rng = Rng::new(seed);
    for n in 0..20 {
        let (x, y) = (key(0, n % 3), key(rng.within(1, 3), n % 3));
        let reads = sim.look(&[x, y])?;
        let durable = rng.one_in(2);
        let crosswise =
            |write, tag| Commit { reads: reads.clone(), changes: vec![put(write, tag)], durable };
        if sim.duel(crosswise(x, 2 * n + 1), crosswise(y, 2 * n + 2), duels)? == [true, true] {
            return Err(format!("write skew over {x:?} and {y:?}: both committed"));
        }
    }
    sim.reopen(super::disk::Loss::Everything)
}

/// One reads an absent range, over all shards, and writes a mark; the other reads the mark and
/// writes into the range.
fn phantom(seed: u64, duels: &mut Duels) -> Outcome {
    let mut sim = wide(seed);
    sim.begin()?;
    let mut rng = Rng::new(seed);
    let mark = key(0, 100);
    for n in 0..20 {
        let range: Vec<PageKey> = (0..4).flat_map(|run| [key(run, 7), key(run, 8)]).collect();
        let seen = sim.look(&range)?;
        if let Some((key, lsn)) = seen.iter().find(|(_, lsn)| *lsn != Lsn::ZERO) {
            return Err(format!("{key:?} is freed and reads as of {lsn:?}"));
        }
        let marked = sim.look(&[mark])?;
        let durable = rng.one_in(2);
        let inserted = *rng.pick(&range);
        let scan = Commit { reads: seen, changes: vec![put(mark, 1000 + n)], durable };
        let insert = Commit { reads: marked, changes: vec![put(inserted, n)], durable };
        let (first, second) = if rng.one_in(2) { (scan, insert) } else { (insert, scan) };
        if sim.duel(first, second, duels)? == [true, true] {
            return Err(format!(
                "a phantom: {inserted:?} was inserted into a range read as absent, both committed"
            ));
        }
        let free = Commit { reads: Vec::new(), changes: vec![(inserted, Change::Free)], durable };
        sim.call(Request::Commit(free))?.map_err(|error| format!("a free fails: {error}"))?;
    }
    sim.reopen(super::disk::Loss::Everything)
}

/// Both only write, and write the same pages: they commit one after the other, without a conflict,
/// and in the same order at every shard.
fn blind(seed: u64, duels: &mut Duels) -> Outcome {
    let mut sim = wide(seed);
    sim.begin()?;
    let mut rng = Rng::new(seed);
    for n in 0..20 {
        let pages: Vec<PageKey> = (0..4).map(|run| key(run, n % 2)).collect();
        let durable = rng.one_in(2);
        let mut write = |tag| {
            let mut changes: Vec<_> = pages.iter().map(|&key| put(key, tag)).collect();
            changes.rotate_left(rng.below(4) as usize);
            Commit { reads: Vec::new(), changes, durable }
        };
        let (first, second) = (write(2 * n + 1), write(2 * n + 2));
        if sim.duel(first, second, duels)? != [true, true] {
            return Err("commits that only write were refused".into());
        }
        let seen = sim.look(&pages)?;
        if seen.iter().any(|(_, lsn)| *lsn != seen[0].1) {
            return Err(format!(
                "two commits of the same pages ended in different orders: {seen:?}"
            ));
        }
    }
    sim.reopen(super::disk::Loss::Everything)
}

fn all(seeds: u64, test: fn(u64, &mut Duels) -> Outcome) -> Duels {
    let mut duels = Duels::default();
    for seed in 1..=seeds {
        test(seed, &mut duels).unwrap_or_else(|why| panic!("seed {seed}: {why}"));
    }
    println!("{duels:?}");
    duels
}

/// If this fails, two transactions together break an invariant over two pages that each of them
/// keeps.
#[test]
fn write_skew_is_a_conflict() {
    let duels = all(40, skew);
    assert!(duels.one > 100 && duels.both == 0, "{duels:?}");
    assert!(
        SHARDS_MAX == 1 || (duels.none > 10 && duels.held > 10),
        "holds were never met: {duels:?}"
    );
}

/// If this fails, a caller can't rely on the answer that a page is absent.
#[test]
fn a_page_inserted_where_none_was_read_is_a_conflict() {
    let duels = all(40, phantom);
    assert!(duels.one > 100 && duels.both == 0, "{duels:?}");
    assert!(SHARDS_MAX == 1 || duels.held > 10, "holds were never met: {duels:?}");
}

/// If this fails, writers that read nothing get conflicts, or leave pages of two commits mixed.
#[test]
fn commits_that_only_write_never_conflict_and_are_in_one_order_everywhere() {
    let duels = all(40, blind);
    assert_eq!(duels.both, 40 * 20);
}
