//! Openings that wait: for pages that a checkpoint in the middle of the redo counts, and for space
//! that is not there.

use super::*;
use crate::testing::sim::disk::ENOSPC;

/// If this fails, a store hangs while it is opened: a checkpoint in the middle of the redo waits
/// for a patched page that the redo has found written to its place by a later commit.
#[test]
fn a_checkpoint_in_the_redo_does_not_wait_for_pages_that_are_found_written() {
    must(settles_what_is_found_written());
}

/// One shard is full of dirty map nodes again and again, and needs checkpoints. Meanwhile the other
/// is in the middle of a log in which each page is patched, and written to its place two commits
/// later: whenever the checkpoint counts dirty pages, there are some that the next batch of the
/// redo finds written.
pub(super) fn settles_what_is_found_written() -> Outcome {
    // A commit is one batch of the redo: with the least memory these are 16 changes.
    const PATCHED: usize = 8;
    const COMMITS: usize = 600;
    const LONE: usize = 2_000;
    let small = Options { inline_pages_max: 0, ..smallest(2, 8) };
    let large = Options { memory_bytes: 192 << 20, ..small.clone() };
    let mut cluster = ParkedCluster::open(SimDisk::new(14), &large, 2)?;
    let shard_map = cluster.shard_map;
    let of = |shard, shift: u32| {
        (1u64..)
            .map(move |n| key(n << shift))
            .filter(move |key| shard_map.shard_of(*key) == ShardId::new(shard))
    };
    let lone: Vec<PageKey> = of(1, 18).take(LONE).collect();
    let patched: Vec<PageKey> = of(0, 0).take(PATCHED * COMMITS).collect();
    let sets: Vec<&[PageKey]> = patched.chunks(PATCHED).collect();
    let mut model = Model::new();
    for keys in lone.chunks(50) {
        cluster.commit(keys.iter().map(|key| (*key, put(1))).collect(), true)?;
        model.extend(keys.iter().map(|key| (*key, 1)));
    }
    let mut asked = Vec::new();
    for (at, keys) in sets.iter().enumerate() {
        let mut changes: Vec<_> = keys.iter().map(|key| (*key, patch(2))).collect();
        if at >= 2 {
            changes.extend(sets[at - 2].iter().map(|key| (*key, put(3))));
            model.extend(sets[at - 2].iter().map(|key| (*key, 3)));
        }
        asked.push(cluster.ask(Request::Commit(Commit {
            reads: Vec::new(),
            changes,
            durable: false,
        })));
    }
    for token in asked {
        cluster.answer(token)?.map_err(|error| format!("a commit: {error}"))?;
    }
    cluster.call(Request::Flush)?.map_err(|error| format!("a flush: {error}"))?;
    let crashed = cluster.disk.crash(Loss::Everything, &mut Rng::new(1));
    // The device takes no time: messages of several checkpoints arrive while a group is redone, and
    // not while one is read.
    crashed.set_latency(Latency {
        read: (1, 1),
        write: (1, 1),
        flush: (1, 1),
        ..Latency::default()
    });
    let mut cluster = ParkedCluster::open(crashed, &small, 2)?;
    check(&mut cluster, &model)
}

/// If this fails, the owner of a store on a full device waits for ever for it to open, without a
/// message.
#[test]
fn an_opening_that_finds_no_space_for_its_pages_ends_with_an_error_and_loses_nothing() {
    must(ends_without_space());
}

/// One shard leaves hardly more free extents than its reserve, and pages in every virtual shard
/// that are only in the log. Dealt out to many shards, these extents are too few for each to have
/// one.
pub(super) fn ends_without_space() -> Outcome {
    const SHARDS: u16 = 16;
    // Counted before the last checkpoint, whose map nodes take some.
    const EXTENTS_LEFT: u64 = 20;
    let geometry =
        Geometry { extent_bytes: 64 << 10, vshards_count: SHARDS.into(), ..options().geometry };
    let many =
        Options { geometry, memory_bytes: 64 << 20, coalesce_window_us: 10_000, ..options() };
    let one = Options { data_bytes_max: 12 << 20, ..many.clone() };
    // All shards have logs: on the full device none could be made.
    let mut cluster = ParkedCluster::open(SimDisk::new(15), &many, SHARDS)?;
    cluster.call(Request::Close)?.map_err(|error| format!("closing: {error}"))?;
    let mut cluster = ParkedCluster::open(cluster.disk, &one, 1)?;
    // The same number of pages in every virtual shard.
    let page = |n: u64| key(n % u64::from(SHARDS) * 512 + n / u64::from(SHARDS));
    let mut model = Model::new();
    let free_extents = |cluster: &mut ParkedCluster| match cluster.call(Request::Stats)? {
        Ok(Response::Stats(stats)) => Ok(stats.extents_free),
        other => Err(format!("{other:?}")),
    };
    for n in (0..).step_by(usize::from(SHARDS)) {
        let keys: Vec<PageKey> = (n..n + u64::from(SHARDS)).map(page).collect();
        cluster.commit(keys.iter().map(|key| (*key, put(1))).collect(), true)?;
        model.extend(keys.into_iter().map(|key| (key, 1)));
        if free_extents(&mut cluster)? <= EXTENTS_LEFT {
            break;
        }
    }
    cluster.checkpoint()?;
    let left = free_extents(&mut cluster)?;
    let whole = |n| (page(n), Change::Patch { offset: 0, bytes: Bytes::from(vec![2; BLOCK]) });
    cluster.commit((0..SHARDS.into()).map(whole).collect(), true)?;
    model.extend((0..SHARDS.into()).map(|n| (page(n), 2)));
    let crashed = cluster.disk.crash(Loss::Everything, &mut Rng::new(1));
    crashed.inject(Fault {
        forever: true,
        errno: ENOSPC,
        ..Fault::once(OpKind::Allocate, Area::Any, 0)
    });
    let refused = match ParkedCluster::open(crashed.clone(), &many, SHARDS) {
        Err(why) if why.contains("no space is left for") => why,
        Err(why) => return Err(why),
        Ok(_) => return Err(format!("{left} free extents were enough for {SHARDS} shards")),
    };
    println!("{left} free extents, {} pages: {refused}", model.len());
    // With space again, everything is there.
    let freed = crashed.crash(Loss::Everything, &mut Rng::new(2));
    freed.clear_faults();
    let mut cluster = ParkedCluster::open(freed, &many, SHARDS)?;
    check(&mut cluster, &model)
}
