//! Commits must leave enough for map nodes: space for those that they will change, in a full store,
//! and memory for those that they make.

use super::*;

/// Each in a leaf of its own.
const PAGES: u64 = 4_000;
/// The error of a full device.
const ENOSPC: i32 = 28;

fn lone(n: u64) -> PageKey {
    key(n * 64)
}

/// If this fails, a store on a full device stops in a checkpoint, and does not open again: commits
/// have been given the space that the map nodes of their pages need.
#[test]
fn commits_leave_space_for_the_map_nodes_that_they_will_dirty() {
    // Half full, so that all of them are carried out; and so full that some may be refused.
    leaves_space_for_nodes(50, false).unwrap_or_else(|why| panic!("half full: {why}"));
    leaves_space_for_nodes(70, true).unwrap_or_else(|why| panic!("full: {why}"));
}

fn leaves_space_for_nodes(fill_percent: u32, may_be_full: bool) -> Outcome {
    let options = Options { fill_percent, memory_bytes: 64 << 20, ..options() };
    let mut cluster = ParkedCluster::open(SimDisk::new(12), &options, 1)?;
    for at in (0..PAGES).step_by(50) {
        cluster.commit((at..at + 50).map(|n| (lone(n), put(n))).collect(), true)?;
    }
    cluster.checkpoint()?;
    cluster.disk.inject(Fault {
        kind: Some(OpKind::Allocate),
        area: Area::Any,
        after: 0,
        forever: true,
        errno: ENOSPC,
    });
    let mut last = vec![0; PAGES as usize];
    for round in 1..4 {
        // Pages gather in memory while the device is slow.
        cluster.disk.set_latency(Latency {
            write: (2_000_000, 3_000_000),
            stall_one_in: u64::MAX,
            ..Latency::default()
        });
        let commit =
            |n| Commit { reads: Vec::new(), changes: vec![(lone(n), put(round))], durable: false };
        let asked: Vec<Token> =
            (0..PAGES).map(|n| cluster.ask(Request::Commit(commit(n)))).collect();
        cluster.pass(1_000_000)?;
        cluster.disk.set_latency(Latency::default());
        for (n, token) in asked.into_iter().enumerate() {
            match cluster.answer(token)? {
                Ok(_) => last[n] = round,
                Err(error) if may_be_full && error.kind() == ErrorKind::Full => {}
                Err(error) => {
                    return Err(format!(
                        "round {round}, page {n}: {error}: {}",
                        cluster.describe()
                    ));
                }
            }
        }
        cluster.checkpoint()?;
    }
    let crashed = cluster.disk.crash(Loss::Everything, &mut Rng::new(1));
    let mut cluster = ParkedCluster::open(crashed, &options, 1)?;
    let written = last.into_iter().enumerate().filter(|(_, round)| *round > 0);
    let model: Model = written.map(|(n, round)| (lone(n as u64), round as u8)).collect();
    println!("{} of {PAGES} pages were overwritten", model.len());
    check(&mut cluster, &model)
}

/// If this fails, a shard panics because it has no frame left: its search for memory takes map nodes that
/// are nowhere on the device, made by a commit that came to nothing, and the commit that has just
/// counted them as there makes them anew.
#[test]
fn frames_suffice_for_nodes_that_the_search_for_them_takes() {
    must(counts_nodes_anew());
}

pub(super) fn counts_nodes_anew() -> Outcome {
    let options = Options { memory_bytes: 8 << 20, ..tiny() };
    let mut cluster = ParkedCluster::open(SimDisk::new(13), &options, 1)?;
    cluster.fill(PAGES, 50)?;
    // Each below a node of its own, in a tree that is high enough.
    let far = |n: u64| key((n + 1) << 20);
    cluster.commit(vec![(far(1 << 20), put(1))], true)?;
    cluster.checkpoint()?;
    let pages = cluster.all.shards[0].txn_bytes_max() / BLOCK as u64;
    let mut read = 0;
    for round in 0..24 {
        let changes = || (round * pages..(round + 1) * pages).map(|n| (far(n), put(n))).collect();
        // Two commits of one turn: the second meets the change of the first.
        let lsn = cluster.read(key(0))?.map_err(|error| error.to_string())?.lsn();
        let first = Commit { reads: vec![], changes: vec![(key(0), patch(round))], durable: true };
        let second = Commit { reads: vec![(key(0), lsn)], changes: changes(), durable: true };
        let (first, second) =
            (cluster.ask(Request::Commit(first)), cluster.ask(Request::Commit(second)));
        cluster.answer(first)?.map_err(|error| error.to_string())?;
        if cluster.answer(second)?.is_ok() {
            return Err("there was no conflict".into());
        }
        // The nodes that it has made leave memory one by one, the leaves first.
        for _ in 0..round * 50 {
            read = (read + 1) % PAGES;
            cluster.read(key(read))?.map_err(|error| error.to_string())?;
        }
        cluster.commit(changes(), true)?;
    }
    check(&mut cluster, &(0..24 * pages).step_by(17).map(|n| (far(n), n as u8)).collect())
}
