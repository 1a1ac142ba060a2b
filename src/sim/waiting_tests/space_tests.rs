//! What commits leave for map nodes: memory for those that they make.

use super::*;

const PAGES: u64 = 4_000;
/// If this fails, a shard panics for want of a frame: its search for memory takes map nodes that are nowhere on the device, made by a
/// commit that came to nothing, and the commit that has just counted them as there makes them anew.
#[test]
fn frames_suffice_for_nodes_that_the_search_for_them_takes() {
    must(counts_nodes_anew());
}

pub(super) fn counts_nodes_anew() -> Outcome {
    let geometry = Geometry { vshards_count: 1, ..options().geometry };
    let options = Options { memory_bytes: 8 << 20, geometry, ..options() };
    let mut rig = Rig::open(SimDisk::new(13), &options, 1)?;
    rig.fill(PAGES, 50)?;
    // Each below a node of its own, in a tree that is high enough.
    let far = |n: u64| key((n + 1) << 20);
    rig.commit(vec![(far(1 << 20), put(1))], true)?;
    rig.checkpoint()?;
    let pages = rig.all.shards[0].txn_bytes_max() / BLOCK as u64;
    let mut read = 0;
    for round in 0..24 {
        let changes = || (round * pages..(round + 1) * pages).map(|n| (far(n), put(n))).collect();
        // Two of one turn: the second meets the change of the first.
        let lsn = rig.read(key(0))?.map_err(|error| error.to_string())?.lsn();
        let first = Commit { reads: vec![], changes: vec![(key(0), patch(round))], durable: true };
        let second = Commit { reads: vec![(key(0), lsn)], changes: changes(), durable: true };
        let (first, second) = (rig.ask(Request::Commit(first)), rig.ask(Request::Commit(second)));
        rig.answer(first)?.map_err(|error| error.to_string())?;
        if rig.answer(second)?.is_ok() {
            return Err("there was no conflict".into());
        }
        // What it has made leaves memory by and by: the leaves first.
        for _ in 0..round * 50 {
            read = (read + 1) % PAGES;
            rig.read(key(read))?.map_err(|error| error.to_string())?;
        }
        rig.commit(changes(), true)?;
    }
    check(&mut rig, &(0..24 * pages).step_by(17).map(|n| (far(n), n as u8)).collect())
}
