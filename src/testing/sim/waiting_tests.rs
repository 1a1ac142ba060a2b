//! Who waits for memory, log, space or the device, and who wakes it.
//!
//! A shard that nobody wakes hangs, and one whose deadline is due for nothing spins: both fail the
//! test at once (see `parked_cluster`).

use super::disk::{Area, Fault, Latency, Loss, OpKind, SimDisk};
use super::parked_cluster::*;
use super::run::Outcome;
use crate::base::error::ErrorKind;
use crate::base::options::{Geometry, Options};
use crate::base::{BLOCK, Micros, PageKey, ShardId};
use crate::engine::{Change, Commit, PageRef, Request, Response, Token};
use crate::testing::random::Rng;
use bytes::Bytes;
use std::collections::BTreeMap;

mod compaction_tests;
mod fairness_tests;
mod opening_tests;
mod path_tests;
mod space_tests;

/// Pages that are written: each with the byte that it is full of.
type Model = BTreeMap<PageKey, u8>;

/// All of them, for planted bugs.
pub(super) fn all() -> Outcome {
    rests_at_the_limit()?;
    frees_what_is_in_memory()?;
    waits_for_readers()?;
    answers_beside_reads()?;
    first_come_first_served()?;
    ends_in_the_smallest_memory(1, 1)?;
    writes_the_table_in_parts()?;
    redoes_in_parts(1, 1)?;
    compaction_tests::reads_side_by_side()?;
    opening_tests::settles_what_is_found_written()?;
    opening_tests::ends_without_space()?;
    path_tests::answered_beside_readers()?;
    fairness_tests::goes_through_beside_a_stream()
}

/// If this fails, a core runs at full speed for as long as the device is busy with the pages that
/// it has been given.
#[test]
fn a_shard_rests_while_its_page_writes_are_at_their_limit() {
    must(rests_at_the_limit());
}

fn rests_at_the_limit() -> Outcome {
    let mut cluster = ParkedCluster::open(SimDisk::new(1), &options(), 1)?;
    const PAGES: u64 = 1_800;
    cluster.fill(PAGES, 100)?;
    cluster.checkpoint()?;
    cluster.disk.set_latency(Latency { write: (500_000, 600_000), ..Latency::default() });
    for at in (0..PAGES).step_by(100) {
        let changes = (at..at + 100).map(|n| (key(n), patch(n))).collect();
        cluster.ask(Request::Commit(Commit { reads: Vec::new(), changes, durable: false }));
    }
    let laps = cluster.rounds;
    cluster.pass(5_000_000)?;
    let laps = cluster.rounds - laps;
    println!("{laps} laps in 5 s");
    if laps > 2_000 { Err(format!("{laps} laps in 5 s")) } else { Ok(()) }
}

/// If this fails, deleting a volume whose pages are in memory ends with "no memory", though nobody
/// holds a page.
#[test]
fn pages_in_memory_are_freed_by_many_commits_at_a_time() {
    must(frees_what_is_in_memory());
}

fn frees_what_is_in_memory() -> Outcome {
    let options = Options { memory_bytes: 8 << 20, ..options() };
    let mut cluster = ParkedCluster::open(SimDisk::new(2), &options, 1)?;
    const PAGES: u64 = 3_200;
    cluster.fill(PAGES, 100)?;
    for n in 0..PAGES {
        cluster.read(key(n))?.map_err(|error| format!("page {n}: {error}"))?;
    }
    let free = |at| {
        let changes = (at..at + 400).map(|n| (key(n), Change::Free)).collect();
        Request::Commit(Commit { reads: Vec::new(), changes, durable: false })
    };
    let asked: Vec<Token> = (0..PAGES).step_by(400).map(|at| cluster.ask(free(at))).collect();
    for token in asked {
        cluster.answer(token)?.map_err(|error| format!("a commit of frees: {error}"))?;
    }
    Ok(())
}

/// Reads and keeps pages until none can be had.
fn pin_all(cluster: &mut ParkedCluster, pages: u64) -> Outcome<Vec<PageRef>> {
    let mut pinned = Vec::new();
    for n in 0..pages {
        match cluster.read(key(n))? {
            Ok(page) => pinned.push(page),
            Err(error) if error.kind() == ErrorKind::Busy => return Ok(pinned),
            Err(error) => return Err(format!("page {n}: {error}")),
        }
    }
    Err(format!("all {pages} pages fit into memory"))
}

/// If this fails, a commit that waits for memory hangs although readers have dropped their pages,
/// or it is refused at once, or never, or told the wrong reason.
#[test]
fn memory_that_readers_have_pinned_is_waited_for_and_then_busy() {
    must(waits_for_readers());
}

fn waits_for_readers() -> Outcome {
    let options = Options { memory_bytes: 4 << 20, ..options() };
    let mut cluster = ParkedCluster::open(SimDisk::new(3), &options, 1)?;
    const PAGES: u64 = 1_600;
    cluster.fill(PAGES, 50)?;
    cluster.checkpoint()?;
    let pinned = pin_all(&mut cluster, PAGES)?;
    cluster.now += 1_000_000;
    let commit = |n| {
        Request::Commit(Commit {
            reads: Vec::new(),
            changes: vec![(key(n), put(7))],
            durable: true,
        })
    };
    let (begun, asked) =
        (cluster.now, [cluster.ask(commit(1)), cluster.ask(commit(2)), cluster.ask(commit(3))]);
    for token in asked {
        let Err(error) = cluster.answer(token)? else { return Err("there was memory".into()) };
        let waited = cluster.now - begun;
        if error.kind() != ErrorKind::Busy || !error.to_string().contains("readers have pinned") {
            return Err(format!("{} pages are pinned: {error}", pinned.len()));
        }
        if !(900_000..1_500_000).contains(&waited) {
            return Err(format!("refused after {waited} us"));
        }
    }
    // Whatever readers hold: the log must not grow without end.
    cluster.checkpoint()?;
    cluster.now += 1_000_000;
    let token = cluster.ask(commit(4));
    cluster.pass(300_000)?;
    if cluster.answers.contains_key(&token) {
        return Err("refused without a wait".into());
    }
    // Nobody tells the shard.
    drop(pinned);
    cluster
        .answer(token)?
        .map(drop)
        .map_err(|error| format!("after the pages were dropped: {error}"))
}

/// If this fails, a reader hangs for ever after a failed write, in a store that still serves reads:
/// nobody looks for memory any more.
#[test]
fn reads_that_wait_for_memory_are_woken_after_a_failure() {
    must(reads_after_a_failure());
}

fn reads_after_a_failure() -> Outcome {
    let options = Options { memory_bytes: 4 << 20, ..options() };
    let mut cluster = ParkedCluster::open(SimDisk::new(3), &options, 1)?;
    const PAGES: u64 = 1_600;
    cluster.fill(PAGES, 50)?;
    cluster.checkpoint()?;
    let mut pinned = pin_all(&mut cluster, PAGES)?;
    // Enough for the commit.
    pinned.truncate(pinned.len() - 50);
    cluster.disk.inject(Fault::once(OpKind::Flush, Area::Any, 0));
    if cluster.commit(vec![(key(1), put(9))], true).is_ok() {
        return Err("the flush did not fail".into());
    }
    let mut held = vec![pinned, pin_all(&mut cluster, PAGES)?];
    let mut waiting = None;
    for n in 1..200 {
        let asked = cluster.ask(Request::Read(smallvec::smallvec![key(PAGES - n)]));
        cluster.pass(300_000)?;
        match cluster.answers.remove(&asked) {
            None => {
                waiting = Some(asked);
                break;
            }
            Some(Ok(Response::Pages(pages))) => held.push(pages.to_vec()),
            Some(Err(error)) if error.kind() == ErrorKind::Busy => cluster.now += 1_000_000,
            Some(other) => return Err(format!("a read is answered with {other:?}")),
        }
    }
    let waiting = waiting.ok_or("no read waits")?;
    // Nobody tells the shard.
    drop(held);
    cluster
        .answer(waiting)?
        .map(drop)
        .map_err(|error| format!("after the pages were dropped: {error}"))
}

/// If this fails, a request that can't get its memory beside readers takes what others have just
/// read, again and again: they read it from the device each time, at full speed and for nothing,
/// and two of these keep each other from ever going on.
#[test]
fn a_search_for_memory_that_must_fail_takes_nothing_from_others() {
    must(fails_and_takes_nothing());
}

fn fails_and_takes_nothing() -> Outcome {
    let options = tiny();
    let mut cluster = ParkedCluster::open(SimDisk::new(14), &options, 1)?;
    const PAGES: u64 = 1_200;
    cluster.fill(PAGES, 20)?;
    cluster.checkpoint()?;
    let mut pinned = pin_all(&mut cluster, PAGES)?;
    // More than a read takes, less than a commit takes.
    pinned.truncate(pinned.len() - 12);
    let (hot, n) = (PAGES - 1, PAGES - 2);
    cluster.read(key(hot))?.map_err(|error| format!("a read beside pins: {error}"))?;
    let commit = Commit { reads: Vec::new(), changes: vec![(key(n), put(9))], durable: false };
    let waiting = cluster.ask(Request::Commit(commit));
    cluster.pass(100_000)?;
    let before = cluster.all.shards[0].blocks_read();
    for _ in 0..20 {
        cluster.read(key(hot))?.map_err(|error| format!("a read of a page in memory: {error}"))?;
        cluster.pass(20_000)?;
    }
    if cluster.answers.contains_key(&waiting) {
        return Err(format!("the commit was to wait: {}", cluster.describe()));
    }
    let read = cluster.all.shards[0].blocks_read() - before;
    let answer = cluster.answer(waiting)?;
    if read > 1 {
        return Err(format!(
            "20 reads of one page beside a commit in want of memory read {read} blocks from the \
             device"
        ));
    }
    match answer {
        Err(error) if error.kind() == ErrorKind::Busy => Ok(()),
        other => Err(format!("a commit beside {} pinned pages: {other:?}", pinned.len())),
    }
}

/// If this fails, a client that writes gets no answer for as long as others read from a slow
/// device: each frame that becomes free goes to a read, of which one is always under way.
#[test]
fn a_commit_is_answered_while_reads_take_all_the_memory_there_is() {
    must(answers_beside_reads());
}

fn answers_beside_reads() -> Outcome {
    let options = Options { requests_max: 64, ..tiny() };
    let mut cluster = ParkedCluster::open(SimDisk::new(8), &options, 1)?;
    const PAGES: u64 = 1_200;
    cluster.fill(PAGES, 20)?;
    cluster.checkpoint()?;
    let mut pinned = pin_all(&mut cluster, PAGES)?;
    // Enough for the commit, if nobody else had any of it.
    pinned.truncate(pinned.len() - 30);
    cluster.disk.set_latency(Latency { read: (400_000, 600_000), ..Latency::default() });
    let mut next = PAGES / 2;
    let mut ask = |cluster: &mut ParkedCluster| {
        next = PAGES / 2 + (next + 11) % (PAGES / 2);
        cluster.ask(Request::Read(smallvec::smallvec![key(next)]));
    };
    (0..40).for_each(|_| ask(&mut cluster));
    let commit = Commit { reads: Vec::new(), changes: vec![(key(1), put(9))], durable: true };
    let (begun, asked) = (cluster.now, cluster.ask(Request::Commit(commit)));
    let mut reads = 0;
    while !cluster.answers.contains_key(&asked) {
        cluster.poll_once()?;
        let answered: Vec<Token> =
            cluster.answers.keys().copied().filter(|token| *token != asked).collect();
        for token in answered {
            cluster
                .answers
                .remove(&token)
                .expect("just seen")
                .map_err(|error| format!("a read: {error}"))?;
            ask(&mut cluster);
            reads += 1;
        }
        if cluster.now - begun > 15_000_000 {
            return Err(format!(
                "{reads} reads are answered in 15 s, and no commit: {}",
                cluster.describe()
            ));
        }
    }
    match cluster.answer(asked)? {
        Err(error) if error.kind() != ErrorKind::Busy => {
            Err(format!("a commit beside {reads} reads: {error}"))
        }
        _ => Ok(()),
    }
}

/// If this fails, a read that needs a map node waits for ever while memory is short and others keep
/// asking.
#[test]
fn who_asked_first_for_a_map_node_is_served_first() {
    must(first_come_first_served());
}

fn first_come_first_served() -> Outcome {
    let options = tiny();
    let mut cluster = ParkedCluster::open(SimDisk::new(4), &options, 1)?;
    const DENSE: u64 = 400;
    const LONE: u64 = 240;
    let lone = |n: u64| key((n + 1) << 20);
    cluster.fill(DENSE, 20)?;
    for n in 0..LONE {
        cluster.commit(vec![(lone(n), put(n))], false)?;
    }
    cluster.call(Request::Close)?.map_err(|error| error.to_string())?;
    let mut cluster = ParkedCluster::open(cluster.disk, &options, 1)?;
    let mut pinned = pin_all(&mut cluster, DENSE)?;
    pinned.truncate(pinned.len() - 6);
    let mut asked = std::collections::VecDeque::new();
    let mut next = 0;
    let mut ask = |cluster: &mut ParkedCluster| {
        next += 1;
        cluster.ask(Request::Read(smallvec::smallvec![lone((next * 7) % LONE)]))
    };
    // Always as many under way, more than there are frames for.
    (0..24).for_each(|_| asked.push_back(ask(&mut cluster)));
    for _ in 0..2_000 {
        cluster.poll_once()?;
        let answered: Vec<Token> = cluster.answers.keys().copied().collect();
        for token in answered {
            cluster
                .answers
                .remove(&token)
                .expect("just seen")
                .map_err(|error| format!("a read: {error}"))?;
            let position = asked.iter().position(|asked| *asked == token).expect("asked");
            asked.remove(position);
            asked.push_back(ask(&mut cluster));
        }
        let (oldest, newest) = (asked[0].0, asked[asked.len() - 1].0);
        if newest - oldest > 200 {
            return Err(format!("read {oldest} waits while {newest} others were asked for"));
        }
    }
    Ok(())
}

/// The store with the least memory that is allowed.
fn smallest(shards_count: u16, vshards_count: u32) -> Options {
    let geometry = Geometry { vshards_count, ..options().geometry };
    Options {
        geometry,
        memory_bytes: (2 << 20) * u64::from(shards_count),
        log_writes_max: 8,
        ..options()
    }
}

fn check(cluster: &mut ParkedCluster, model: &Model) -> Outcome {
    for (key, byte) in model {
        let page = cluster.read(*key)?.map_err(|error| format!("{key:?}: {error}"))?;
        if page.iter().any(|found| found != byte) {
            return Err(format!("{key:?} holds {} and not {byte}", page[0]));
        }
    }
    Ok(())
}

/// Carries a commit out, or is told that it can never be: nothing else is an answer.
fn commit_or_too_large(
    cluster: &mut ParkedCluster,
    model: &mut Model,
    changes: Vec<(PageKey, Change)>,
) -> Outcome<bool> {
    let request =
        Request::Commit(Commit { reads: Vec::new(), changes: changes.clone(), durable: true });
    match cluster.call(request)? {
        Ok(_) => {}
        Err(error) if error.kind() == ErrorKind::TooLarge => return Ok(false),
        Err(error) => {
            return Err(format!(
                "a commit of {} changes: {error}: {}",
                changes.len(),
                cluster.describe()
            ));
        }
    }
    for (key, change) in changes {
        match change {
            Change::Put(bytes) => _ = model.insert(key, bytes[0]),
            Change::Patch { bytes, .. } => _ = model.insert(key, bytes[0]),
            Change::Free => _ = model.remove(&key),
        }
    }
    Ok(true)
}

/// If this fails, a store hangs after a commit that it has taken, or can't be opened again: lone
/// pages make the map large, and one virtual shard may hold all of it.
#[test]
fn every_commit_that_is_taken_is_followed_by_a_checkpoint_in_the_smallest_memory() {
    for (shards, vshards) in [(1, 1), (1, 512), (2, 8), (4, 512)] {
        ends_in_the_smallest_memory(shards, vshards)
            .unwrap_or_else(|why| panic!("{shards} of {vshards}: {why}"));
    }
}

fn ends_in_the_smallest_memory(shards: u16, vshards: u32) -> Outcome {
    let options = smallest(shards, vshards);
    let mut cluster = ParkedCluster::open(SimDisk::new(5), &options, shards)?;
    let pages = cluster.all.shards[0].txn_bytes_max() / BLOCK as u64;
    let (mut model, mut taken, mut refused) = (Model::new(), 0, 0);
    let whole =
        |byte: u64| Change::Patch { offset: 0, bytes: Bytes::from(vec![byte as u8; BLOCK]) };
    for (round, shift) in (1..).zip([9u32, 12, 18, 26, 40, 57]) {
        let lone = |n: u64| key(((n + 1) << shift) | (5 * round));
        let mut commits = vec![
            (0..pages).map(|n| (lone(n), put(round))).collect::<Vec<_>>(),
            (0..pages).map(|n| (lone(n), whole(round + 100))).collect(),
            (0..pages).map(|n| (key(n + 64 * round), put(n))).collect(),
        ];
        // The most frees that a commit may have, of pages that there are as far as they go.
        let there: Vec<PageKey> =
            model.keys().copied().step_by(2).chain((0..pages * 8).map(lone)).collect();
        commits.push(
            there.into_iter().take(pages as usize * 8).map(|key| (key, Change::Free)).collect(),
        );
        for changes in commits {
            match commit_or_too_large(&mut cluster, &mut model, changes)? {
                true => taken += 1,
                false => refused += 1,
            }
            if (taken + refused) % 3 == 0 {
                cluster.checkpoint()?;
            }
        }
        // Small ones are always taken.
        for n in 0..8 {
            if !commit_or_too_large(&mut cluster, &mut model, vec![(lone(n + 50), put(n))])? {
                return Err("one page is too large".into());
            }
        }
    }
    println!(
        "{shards} shards of {vshards}: {taken} commits of the largest size taken, {refused} \
         refused"
    );
    if taken < 12 || (vshards == 1 && refused == 0) {
        return Err(format!("{taken} commits were taken, {refused} refused"));
    }
    cluster.call(Request::Close)?.map_err(|error| format!("closing: {error}"))?;
    let mut cluster = ParkedCluster::open(cluster.disk, &options, shards)?;
    check(&mut cluster, &model)?;
    let lone = (0..pages / 2).map(|n| (key((n + 1) << 30), put(n))).collect();
    commit_or_too_large(&mut cluster, &mut model, lone)?;
    let crashed = cluster.disk.crash(Loss::Everything, &mut Rng::new(1));
    let mut cluster = ParkedCluster::open(crashed, &options, shards)?;
    check(&mut cluster, &model)
}

/// If this fails, the checkpoints of a store with many extents never end while readers hold most of
/// its memory, and its log fills up.
#[test]
fn the_extent_table_of_a_large_store_is_written_in_little_memory() {
    must(writes_the_table_in_parts());
}

fn writes_the_table_in_parts() -> Outcome {
    let geometry = Geometry { extent_bytes: 64 << 10, ..options().geometry };
    let options = Options { geometry, memory_bytes: 4 << 20, ..options() };
    let mut cluster = ParkedCluster::open(SimDisk::new(6), &options, 1)?;
    // More blocks of the table than a checkpoint has frames of its own.
    const PAGES: u64 = 18_000;
    cluster.fill(PAGES, 60)?;
    let pinned = pin_all(&mut cluster, PAGES)?;
    cluster.checkpoint()?;
    drop(pinned);
    let crashed = cluster.disk.crash(Loss::Everything, &mut Rng::new(1));
    let mut cluster = ParkedCluster::open(crashed, &options, 1)?;
    check(&mut cluster, &(0..PAGES).step_by(97).map(|n| (key(n), n as u8)).collect())
}

/// If this fails, a store that was filled with much memory can't be opened with little.
#[test]
fn what_was_logged_with_much_memory_is_redone_with_the_least() {
    for (shards, vshards) in [(1, 1), (1, 512), (2, 8), (4, 512)] {
        redoes_in_parts(shards, vshards)
            .unwrap_or_else(|why| panic!("{shards} of {vshards}: {why}"));
    }
}

fn redoes_in_parts(shards: u16, vshards: u32) -> Outcome {
    for inline_pages_max in [0, 64] {
        let small = smallest(shards, vshards);
        let large = Options { memory_bytes: 64 << 20, inline_pages_max, ..small.clone() };
        let mut cluster = ParkedCluster::open(SimDisk::new(7), &large, 1)?;
        let pages = cluster.all.shards[0].txn_bytes_max() / BLOCK as u64;
        let mut model = Model::new();
        let whole =
            |byte: u64| Change::Patch { offset: 0, bytes: Bytes::from(vec![byte as u8; BLOCK]) };
        for (round, shift) in (1..).zip([9u32, 18, 30]) {
            let lone = |n: u64| key(((n + 1) << shift) | (5 * round));
            for changes in [
                (0..pages).map(|n| (lone(n), put(n))).collect::<Vec<_>>(),
                (0..pages).map(|n| (lone(n), whole(n + 1))).collect(),
                (0..pages * 4).map(|n| (lone(n * 2), Change::Free)).collect(),
            ] {
                if !commit_or_too_large(&mut cluster, &mut model, changes)? {
                    return Err("a commit is too large for 64 MiB".into());
                }
            }
        }
        let crashed = cluster.disk.crash(Loss::Everything, &mut Rng::new(1));
        let mut cluster = ParkedCluster::open(crashed, &small, shards)?;
        check(&mut cluster, &model)?;
        cluster.call(Request::Close)?.map_err(|error| format!("closing: {error}"))?;
    }
    Ok(())
}
