//! Transactions over several shards, killed at random: each one writes down what it saw. The store
//! is opened with another number of shards each time, now by ring, now portable. 20 kills, or as
//! many as COREPAGE_KILLS says; `scripts/soak` makes thousands, on several file systems.
//!
//! The child says what it tries and what was acknowledged through a pipe; the oracle
//! (`tests/common/history.rs`) is in the parent, which survives. If this fails, commits over shards
//! come back in part, out of order, not at all although they were acknowledged, or on top of what
//! never was.

// Real processes take real time; nothing here is replayed from a seed but the data.
#![allow(clippy::disallowed_methods)]

use crate::common;
use common::history::{ALL_CELLS, CELLS, Cell, Counts, PAGE, Said, check, parse_dump, place};
use common::role::{Role, Run, Task, say};
use common::workload::{open, work};
use common::{Rng, kills_count, progress, scratch, seed};
use futures_lite::future::block_on;
use std::path::{Path, PathBuf};
use std::time::Duration;

// --- the child ---

/// Not a test of its own: what the child does.
#[test]
fn child() {
    let Some(Task { role, dir, run }) = Task::of_this_process() else { return };
    let (store, volume) = open(&dir.join("store"), run);
    if let Some((writer, round)) = role.split_once(' ') {
        say("\nready");
        work(&store, &volume, round.parse().expect("a number"), writer == "write-early");
    }
    let ids: Vec<_> = (0..ALL_CELLS).map(place).collect();
    let pages = block_on(volume.read_many(&ids)).expect("all cells can be read");
    let dump: Vec<u8> =
        pages.iter().flat_map(|p| [&p.lsn().get().to_le_bytes(), &p[..]].concat()).collect();
    std::fs::write(dir.join("dump"), dump).expect("the dump is written");
    say(format_args!("\ncut {}", store.recovery().recovered_lsn));
    if role == "close" {
        block_on(store.close()).expect("the store closes");
    }
    say("dumped");
    if role != "close" {
        std::thread::sleep(Duration::from_secs(600));
    }
}

// --- the parent ---

/// Changes what was found in ways that no correct store could cause: the checker must complain of
/// each.
fn checker_must_find(base: &[Cell], said: &Said, found: &[Cell], cut: u64) -> u64 {
    let mut planted = 0;
    let mut must_fail = |what: &str, said: &Said, found: &[Cell], cut: u64| {
        assert!(check(base, said, found, cut).is_err(), "the checker did not find {what}");
        planted += 1;
    };
    // One cell of a commit of several is as before.
    for cell in 0..ALL_CELLS as usize {
        let id = found[cell].writer();
        let several =
            said.tries.get(&id).is_some_and(|t| t.iter().filter(|s| s.writes).count() > 1);
        if found[cell] == base[cell] || cell < CELLS as usize && !several {
            continue;
        }
        let mut broken = found.to_vec();
        broken[cell] = base[cell].clone();
        must_fail("a commit without one of its pages", said, &broken, cut);
        let mut broken = found.to_vec();
        broken[cell].bytes[50] ^= 1;
        must_fail("a wrong byte", said, &broken, cut);
    }
    if let Some((id, seen)) = said.tries.iter().find(|(id, _)| said.acks.contains_key(id)) {
        let mut broken = said.clone();
        broken
            .tries
            .get_mut(id)
            .expect("it is there")
            .iter_mut()
            .for_each(|s| s.lsn = s.lsn.wrapping_sub(1));
        must_fail("a read of what was never there", &broken, found, cut);
        if let Some(at) = seen.iter().position(|s| !s.writes && s.lsn > 0) {
            let mut broken = said.clone();
            broken.tries.get_mut(id).expect("it is there")[at].writer += 1;
            must_fail("a read out of the serial order", &broken, found, cut);
        }
    }
    if let Some(newest) = said.acks.values().max() {
        must_fail("a cut below what was acknowledged", said, found, newest - 1);
        let mut broken = said.clone();
        broken.acks.insert(u64::MAX, cut);
        must_fail("an acknowledged commit that is not there", &broken, found, cut);
        let mut broken = said.clone();
        broken.refused.extend(said.acks.keys());
        must_fail("a refused commit that is there", &broken, found, cut);
    }
    planted
}

/// One store, killed over and over.
struct Loop {
    dir: tempfile::TempDir,
    base: Vec<Cell>,
    newest: u64,
    round: u64,
    counts: Counts,
}

impl Loop {
    fn new(name: &str) -> Loop {
        let base = vec![Cell { lsn: 0, bytes: vec![0; PAGE] }; ALL_CELLS as usize];
        Loop { dir: scratch(name), base, newest: 0, round: 0, counts: Counts::default() }
    }

    fn run(&self) -> Run {
        Run::of_step(2 * self.round)
    }

    /// Starts a writer, kills it after `ms`, and returns what it said.
    fn kill_writer(&self, role: &str, at_once: bool, ms: u64) -> Said {
        let writer = Role::start(&format!("{role} {}", self.round), self.dir.path(), self.run());
        if !at_once {
            writer.wait();
        }
        std::thread::sleep(Duration::from_millis(ms));
        Said::parse(writer.kill())
    }

    /// What a reader finds, and the cut.
    fn read(&self) -> (Vec<Cell>, u64) {
        // Now closed cleanly, now killed again: recoveries must also follow one another.
        let role = if self.round.is_multiple_of(2) { "close" } else { "die" };
        let reader = Role::start(role, self.dir.path(), Run::of_step(2 * self.round + 1));
        reader.wait();
        let found =
            parse_dump(&std::fs::read(self.dir.path().join("dump")).expect("the dump is there"));
        let cut = reader
            .kill()
            .iter()
            .find_map(|l| l.strip_prefix("cut ")?.parse().ok())
            .expect("the cut");
        (found, cut)
    }

    /// Holds what was found against what was said, and goes on from there.
    fn check(&mut self, said: &Said, found: Vec<Cell>, cut: u64) -> Result<(), String> {
        self.counts += check(&self.base, said, &found, cut)?;
        let (acknowledged, _) = said.acknowledged();
        let lsns = || acknowledged.iter().map(|(_, lsn)| *lsn);
        if let Some(oldest) = lsns().min().filter(|oldest| *oldest <= self.newest) {
            return Err(format!(
                "LSN {oldest} is not above those of former rounds, up to {}",
                self.newest
            ));
        }
        self.newest = lsns().chain([self.newest, cut]).max().unwrap_or(0);
        self.base = found;
        self.round += 1;
        Ok(())
    }
}

#[test]
fn commits_over_shards_come_back_whole_in_order_and_as_they_saw_each_other() {
    let mut it = Loop::new("kill-shards");
    let (mut rng, mut planted) = (Rng::new(seed(4)), 0);
    for round in 0..kills_count() {
        // One time in four the clock runs from the start, so that the kill meets the recovery.
        let at_once = rng.below(4) == 0;
        let said = it.kill_writer("write", at_once, 5 + rng.below(496));
        let (found, cut) = it.read();
        if planted < 500 {
            planted += checker_must_find(&it.base, &said, &found, cut);
        }
        let run = it.run();
        it.check(&said, found, cut).unwrap_or_else(|e| panic!("round {round}, {run:?}: {e}"));
        progress(round, || format!("{:?}", it.counts));
    }
    let Counts { there, acknowledged, crossing, doubt_there, doubt_gone } = it.counts;
    println!(
        "{there} transactions are there, {crossing} acknowledged ones over several shards; \
         {planted} canaries"
    );
    println!("SUM {} {acknowledged} {doubt_there} {doubt_gone}", kills_count());
    assert!(
        there > kills_count() && crossing > kills_count() && planted > 0,
        "{there} {crossing} {planted}"
    );
}

/// The oracle finds a store that acknowledges before what it acknowledges is durable.
#[test]
fn an_acknowledgement_before_its_time_is_found() {
    let mut it = Loop::new("kill-early");
    let mut rng = Rng::new(5);
    // Buffered commits called durable: each kill has a good rng to meet one that is not there
    // yet.
    for _ in 0..200 {
        let said = it.kill_writer("write-early", false, 30 + rng.below(50));
        let (found, cut) = it.read();
        if let Err(why) = it.check(&said, found, cut) {
            println!("found at kill {}: {why}", it.round + 1);
            assert!(why.contains("was durable, and the cut is"), "{why}");
            return;
        }
    }
    panic!("buffered commits were called durable, and no kill of {} showed it", it.round);
}

/// The oracle finds a disk that goes back to an earlier state, whole and clean as that may be.
#[test]
fn a_directory_set_back_to_an_earlier_state_is_found() {
    let mut it = Loop::new("kill-back");
    let said = it.kill_writer("write", false, 100);
    let (found, cut) = it.read();
    it.check(&said, found, cut).expect("nothing is wrong yet");
    let (now, earlier) = (it.dir.path().join("store"), it.dir.path().join("earlier"));
    copy(&now, &earlier);
    let said = it.kill_writer("write", false, 300);
    assert!(!said.acks.is_empty(), "nothing was acknowledged");
    std::fs::remove_dir_all(&now).expect("the store can be removed");
    std::fs::rename(&earlier, &now).expect("the earlier one takes its place");
    let (found, cut) = it.read();
    let why = it.check(&said, found, cut).expect_err("the oracle did not find it");
    assert!(why.contains("was durable, and the cut is"), "{why}");
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir(to).expect("a directory for the copy");
    for entry in std::fs::read_dir(from).expect("the store is there") {
        let from: PathBuf = entry.expect("an entry").path();
        std::fs::copy(&from, to.join(from.file_name().expect("a name"))).expect("a copy");
    }
}
