//! Commits over shards next to an endless stream of commits of one shard.

use super::*;
use std::collections::VecDeque;

/// Commits of one shard that are always in progress.
const STREAM: usize = 24;
/// The time by which a commit over shards has gone through. Without a place in the queue it gets
/// `Busy` after 10 s.
const BOUND_US: Micros = 2_000_000;

/// If this fails, a transaction over several shards is refused as `Busy` for as long as others keep
/// one of its shards busy, however long its caller tries.
#[test]
fn a_commit_over_shards_gets_its_turn_beside_an_endless_stream_of_others() {
    must(goes_through_beside_a_stream());
}

/// Two callers, each with most of its pages at another shard: neither may keep out the other.
#[test]
fn commits_over_shards_that_compete_for_two_shards_all_get_their_turn() {
    must(compete_for_two_shards());
}

/// Keeps a stream of commits, of one shard each, in progress.
struct Stream {
    pages: Vec<Vec<PageKey>>,
    asked: VecDeque<Token>,
    next: usize,
}

impl Stream {
    fn new(cluster: &ParkedCluster, shards: &[u16]) -> Stream {
        let of = |shard: &u16| own_pages(cluster, *shard, 0).take(2_000).collect();
        Stream { pages: shards.iter().map(of).collect(), asked: VecDeque::new(), next: 0 }
    }

    /// Runs a lap, and begins as many new ones as have been answered.
    fn lap(&mut self, cluster: &mut ParkedCluster) -> Outcome {
        while self.asked.len() < STREAM * self.pages.len() {
            let pages = &self.pages[self.next % self.pages.len()];
            let at = self.next / self.pages.len() * 4;
            let changes = (at..at + 4).map(|n| (pages[n % pages.len()], put(n as u64))).collect();
            self.asked.push_back(cluster.ask(Request::Commit(Commit {
                reads: Vec::new(),
                changes,
                durable: false,
            })));
            self.next += 1;
        }
        cluster.poll_once()?;
        for token in std::mem::take(&mut self.asked) {
            match cluster.answers.remove(&token) {
                Some(answer) => {
                    _ = answer.map_err(|error| format!("a commit of one shard: {error}"))?
                }
                None => self.asked.push_back(token),
            }
        }
        Ok(())
    }
}

/// Pages of one shard, from a page on.
fn own_pages(
    cluster: &ParkedCluster,
    shard: u16,
    from: u64,
) -> impl Iterator<Item = PageKey> + use<> {
    let shard_map = cluster.shard_map;
    (from..).map(key).filter(move |key| shard_map.shard_of(*key) == ShardId::new(shard))
}

/// A cluster of two shards with little memory and a slow device, and the commits over shards:
/// `most` pages at one, and one at the other.
fn rig_of_two() -> Outcome<ParkedCluster> {
    let cluster = ParkedCluster::open(SimDisk::new(11), &smallest(2, 8), 2)?;
    cluster.disk.set_latency(Latency { write: (20_000, 30_000), ..Latency::default() });
    Ok(cluster)
}

fn over_two(cluster: &ParkedCluster, most_at: u16, most: usize, from: u64) -> Request {
    let mut changes: Vec<(PageKey, Change)> = Vec::new();
    changes.extend(own_pages(cluster, 1 - most_at, from).take(1).map(|key| (key, put(1))));
    changes.extend(own_pages(cluster, most_at, from).take(most).map(|key| (key, put(2))));
    Request::Commit(Commit { reads: Vec::new(), changes, durable: false })
}

pub(super) fn goes_through_beside_a_stream() -> Outcome {
    let mut cluster = rig_of_two()?;
    let most = cluster.all.shards[0].txn_bytes_max() as usize / BLOCK - 1;
    let mut stream = Stream::new(&cluster, &[0]);
    let warm = cluster.now + 1_000_000;
    while cluster.now < warm {
        stream.lap(&mut cluster)?;
    }
    for (round, pages) in [most, most / 2, 8].into_iter().enumerate() {
        let request = over_two(&cluster, 0, pages, 100_000 * (round as u64 + 1));
        let (token, begun, before) = (cluster.ask(request), cluster.now, stream.next);
        let answer = loop {
            stream.lap(&mut cluster)?;
            if let Some(answer) = cluster.answers.remove(&token) {
                break answer;
            }
        };
        let waited = cluster.now - begun;
        println!("{pages} pages: {waited} us, {} others begun", stream.next - before);
        if let Err(error) = answer {
            return Err(format!("a commit of {pages} pages beside a stream: {error}"));
        }
        if waited > BOUND_US {
            return Err(format!(
                "a commit of {pages} pages has waited {waited} us: {}",
                cluster.describe()
            ));
        }
    }
    Ok(())
}

fn compete_for_two_shards() -> Outcome {
    let mut cluster = rig_of_two()?;
    let most = cluster.all.shards[0].txn_bytes_max() as usize / BLOCK - 1;
    let mut stream = Stream::new(&cluster, &[0, 1]);
    let mut asked: BTreeMap<Token, Micros> = BTreeMap::new();
    let (end, mut round, mut longest, mut ended) = (cluster.now + 20_000_000, 0, 0, 0);
    while cluster.now < end {
        while asked.len() < 4 {
            round += 1;
            let request = over_two(
                &cluster,
                (round % 2) as u16,
                most / (1 + round as usize % 3),
                10_000 + 2_000 * (round % 8),
            );
            asked.insert(cluster.ask(request), cluster.now);
        }
        stream.lap(&mut cluster)?;
        for (token, begun) in asked.clone() {
            let Some(answer) = cluster.answers.remove(&token) else { continue };
            answer.map_err(|error| {
                format!("a commit over shards, after {} us: {error}", cluster.now - begun)
            })?;
            asked.remove(&token);
            longest = longest.max(cluster.now - begun);
            ended += 1;
        }
    }
    println!(
        "{ended} commits over shards beside {} of one, the longest took {longest} us",
        stream.next
    );
    if ended < 20 || longest > 3 * BOUND_US {
        return Err(format!(
            "{ended} commits over shards, the longest took {longest} us: {}",
            cluster.describe()
        ));
    }
    Ok(())
}
