//! Commits over shards beside a stream of commits of one shard that never ends.

use super::*;
use std::collections::VecDeque;

/// Commits of one shard that are always under way.
const STREAM: usize = 24;
/// A commit over shards has gone through by then. Without a place in the queue it gets `Busy` after 10 s.
const BOUND_US: Micros = 2_000_000;

/// If this fails, a transaction over several shards is refused as `Busy` for as long as others keep one of its shards busy, however
/// long its caller tries.
#[test]
fn a_commit_over_shards_gets_its_turn_beside_an_endless_stream_of_others() {
    must(goes_through_beside_a_stream());
}

/// Two callers, each with most of its pages at another shard: neither may keep the other one out.
#[test]
fn commits_over_shards_that_compete_for_two_shards_all_get_their_turn() {
    must(compete_for_two_shards());
}

/// Keeps a stream of commits of one shard each under way.
struct Stream {
    pages: Vec<Vec<PageKey>>,
    asked: VecDeque<Token>,
    next: usize,
}

impl Stream {
    fn new(rig: &Rig, shards: &[u16]) -> Stream {
        let of = |shard: &u16| own_pages(rig, *shard, 0).take(2_000).collect();
        Stream { pages: shards.iter().map(of).collect(), asked: VecDeque::new(), next: 0 }
    }

    /// A lap, and as many new ones as have been answered.
    fn lap(&mut self, rig: &mut Rig) -> Outcome {
        while self.asked.len() < STREAM * self.pages.len() {
            let pages = &self.pages[self.next % self.pages.len()];
            let at = self.next / self.pages.len() * 4;
            let changes = (at..at + 4).map(|n| (pages[n % pages.len()], put(n as u64))).collect();
            self.asked.push_back(rig.ask(Request::Commit(Commit { reads: Vec::new(), changes, durable: false })));
            self.next += 1;
        }
        rig.lap()?;
        for token in std::mem::take(&mut self.asked) {
            match rig.answers.remove(&token) {
                Some(answer) => _ = answer.map_err(|error| format!("a commit of one shard: {error}"))?,
                None => self.asked.push_back(token),
            }
        }
        Ok(())
    }
}

/// Pages of one shard, from a page on.
fn own_pages(rig: &Rig, shard: u16, from: u64) -> impl Iterator<Item = PageKey> + use<> {
    let deal = rig.deal;
    (from..).map(key).filter(move |key| deal.shard_of(*key) == ShardId::new(shard))
}

/// A rig of two shards with little memory and a slow device, and the commits over shards: `most` pages at one, and one at the other.
fn rig_of_two() -> Outcome<Rig> {
    let rig = Rig::open(SimDisk::new(11), &smallest(2, 8), 2)?;
    rig.disk.set_latency(Latency { write: (20_000, 30_000), ..Latency::default() });
    Ok(rig)
}

fn over_two(rig: &Rig, most_at: u16, most: usize, from: u64) -> Request {
    let mut changes: Vec<(PageKey, Change)> = Vec::new();
    changes.extend(own_pages(rig, 1 - most_at, from).take(1).map(|key| (key, put(1))));
    changes.extend(own_pages(rig, most_at, from).take(most).map(|key| (key, put(2))));
    Request::Commit(Commit { reads: Vec::new(), changes, durable: false })
}

pub(super) fn goes_through_beside_a_stream() -> Outcome {
    let mut rig = rig_of_two()?;
    let most = rig.all.shards[0].txn_bytes_max() as usize / BLOCK - 1;
    let mut stream = Stream::new(&rig, &[0]);
    let warm = rig.now + 1_000_000;
    while rig.now < warm {
        stream.lap(&mut rig)?;
    }
    for (round, pages) in [most, most / 2, 8].into_iter().enumerate() {
        let request = over_two(&rig, 0, pages, 100_000 * (round as u64 + 1));
        let (token, begun, before) = (rig.ask(request), rig.now, stream.next);
        let answer = loop {
            stream.lap(&mut rig)?;
            if let Some(answer) = rig.answers.remove(&token) {
                break answer;
            }
        };
        let waited = rig.now - begun;
        println!("{pages} pages: {waited} us, {} others begun", stream.next - before);
        if let Err(error) = answer {
            return Err(format!("a commit of {pages} pages beside a stream: {error}"));
        }
        if waited > BOUND_US {
            return Err(format!("a commit of {pages} pages has waited {waited} us: {}", rig.describe()));
        }
    }
    Ok(())
}

fn compete_for_two_shards() -> Outcome {
    let mut rig = rig_of_two()?;
    let most = rig.all.shards[0].txn_bytes_max() as usize / BLOCK - 1;
    let mut stream = Stream::new(&rig, &[0, 1]);
    let mut asked: BTreeMap<Token, Micros> = BTreeMap::new();
    let (end, mut round, mut longest, mut ended) = (rig.now + 20_000_000, 0, 0, 0);
    while rig.now < end {
        while asked.len() < 4 {
            round += 1;
            let request =
                over_two(&rig, (round % 2) as u16, most / (1 + round as usize % 3), 10_000 + 2_000 * (round % 8));
            asked.insert(rig.ask(request), rig.now);
        }
        stream.lap(&mut rig)?;
        for (token, begun) in asked.clone() {
            let Some(answer) = rig.answers.remove(&token) else { continue };
            answer.map_err(|error| format!("a commit over shards, after {} us: {error}", rig.now - begun))?;
            asked.remove(&token);
            longest = longest.max(rig.now - begun);
            ended += 1;
        }
    }
    println!("{ended} commits over shards beside {} of one, the longest took {longest} us", stream.next);
    if ended < 20 || longest > 3 * BOUND_US {
        return Err(format!("{ended} commits over shards, the longest took {longest} us: {}", rig.describe()));
    }
    Ok(())
}
