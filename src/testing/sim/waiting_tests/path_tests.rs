//! Commits whose pages are far apart and new: their paths through the map have no leaf that could
//! be pinned.

use super::*;
use crate::base::{PageId, VolumeId};

/// Pages that readers hold.
const PAGES: u64 = 400;

/// If this fails, a commit to new pages of a sparse volume is neither carried out nor refused while
/// readers hold most of the memory: it reads the path to one page, and so loses the path to
/// another.
#[test]
fn commits_to_new_pages_far_apart_are_answered_beside_readers() {
    must(answered_beside_readers());
}

pub(super) fn answered_beside_readers() -> Outcome {
    let options = tiny();
    let far = |volume: u8, offset: u64| {
        PageKey::new(VolumeId::new(volume), PageId::new((1 << 50) + offset))
    };
    let mut cluster = ParkedCluster::open(SimDisk::new(9), &options, 1)?;
    cluster.fill(PAGES, 20)?;
    for volume in 2..8 {
        cluster.commit(vec![(far(volume, 0), put(1))], true)?;
    }
    cluster.checkpoint()?;
    let (mut done, mut refused) = (0, 0);
    for left in (4..220).step_by(12) {
        // Reopening empties the memory of what the last round has left.
        cluster.call(Request::Close)?.map_err(|error| error.to_string())?;
        cluster = ParkedCluster::open(cluster.disk, &options, 1)?;
        let mut pinned = pin_all(&mut cluster, PAGES)?;
        pinned.truncate(pinned.len().saturating_sub(left));
        let changes = (2..8).map(|volume| (far(volume, (left as u64) << 24), put(2))).collect();
        match cluster.call(Request::Commit(Commit {
            reads: Vec::new(),
            changes,
            durable: false,
        }))? {
            Ok(_) => done += 1,
            Err(error) if error.kind() == ErrorKind::Busy => refused += 1,
            Err(error) => return Err(format!("a commit beside {left} free pages: {error}")),
        }
    }
    println!("{done} commits done, {refused} refused");
    if done > 0 && refused > 0 {
        Ok(())
    } else {
        Err(format!("{done} commits done, {refused} refused"))
    }
}

/// If this fails, a read of many pages is refused a page at a time, a second for each, while
/// readers hold the memory; until then it keeps the pages that it has from all others.
#[test]
fn a_read_of_many_pages_is_refused_as_a_whole() {
    must(refused_as_a_whole());
}

fn refused_as_a_whole() -> Outcome {
    const FAR: u64 = 40;
    const BOUND_US: u64 = 5_000_000;
    let options = tiny();
    let far = |n: u64| PageKey::new(VolumeId::new(2), PageId::new(n << 24));
    let mut cluster = ParkedCluster::open(SimDisk::new(15), &options, 1)?;
    cluster.fill(PAGES, 20)?;
    (0..FAR).try_for_each(|n| cluster.commit(vec![(far(n), put(n))], true))?;
    cluster.checkpoint()?;
    cluster.call(Request::Close)?.map_err(|error| error.to_string())?;
    cluster = ParkedCluster::open(cluster.disk, &options, 1)?;
    let pinned = pin_all(&mut cluster, PAGES)?;
    let begun = cluster.now;
    match cluster.call(Request::Read((0..FAR).map(far).collect()))? {
        Err(error) if error.kind() == ErrorKind::Busy => {}
        other => {
            return Err(format!("a read of {FAR} pages beside {} pinned: {other:?}", pinned.len()));
        }
    }
    let waited = cluster.now - begun;
    println!("refused after {waited} us");
    if waited <= BOUND_US { Ok(()) } else { Err(format!("refused after {waited} us only")) }
}
