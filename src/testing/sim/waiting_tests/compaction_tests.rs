//! Compaction of a store that consists mostly of map nodes, on a device whose reads are slow.

use super::*;
use std::collections::VecDeque;

/// Each page has a leaf of its own: more nodes than memory.
const PAGES: u64 = 1_500;
/// The time of a read of the device.
const READ_US: Micros = 10_000;
/// The number of commits, each of one page, and the longest that they may take: they take 75 s.
/// With nodes read one after the other it was 461 s.
const COMMITS: u64 = 6_000;
const BOUND_US: Micros = 150_000_000;

/// If this fails, writers of a volume of pages far apart wait until its map nodes have been read
/// one after the other.
#[test]
fn map_nodes_that_compaction_moves_are_read_side_by_side() {
    must(reads_side_by_side());
}

pub(super) fn reads_side_by_side() -> Outcome {
    let options = Options { data_bytes_max: 36 << 20, ..tiny() };
    let mut cluster = ParkedCluster::open(SimDisk::new(11), &options, 1)?;
    let lone = |n: u64| key((n + 1) << 20);
    for n in 0..PAGES {
        cluster.commit(vec![(lone(n), put(n))], false)?;
    }
    cluster.checkpoint()?;
    cluster.disk.set_latency(Latency { read: (READ_US, READ_US), ..Latency::default() });
    let mut asked: VecDeque<Token> = VecDeque::new();
    let mut rng = Rng::new(3);
    let begun = cluster.now;
    for n in 0..COMMITS {
        let commit = Commit {
            reads: Vec::new(),
            changes: vec![(lone(rng.below(PAGES)), put(n))],
            durable: false,
        };
        asked.push_back(cluster.ask(Request::Commit(commit)));
        if asked.len() >= 32 {
            cluster.answer(asked.pop_front().expect("some"))?.map_err(|error| error.to_string())?;
        }
    }
    let took = cluster.now - begun;
    println!("{COMMITS} commits in {} s", took / 1_000_000);
    if took > BOUND_US {
        Err(format!("{COMMITS} commits took {} s", took / 1_000_000))
    } else {
        Ok(())
    }
}
