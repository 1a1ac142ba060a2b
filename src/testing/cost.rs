//! Measures what an operation costs a shard in instructions: a figure that is the same on a busy
//! machine and on a quiet one.
//!
//! ```text
//! ClusterBench: shards of a store in memory, driven by one thread; time is virtual (100 us a poll)
//!   └─ an operation of OPERATIONS: prepared (not counted), then repeated inside `counted`
//! ```
//! `scripts/instructions` runs it under callgrind, which counts what happens inside [`counted`]
//! only.
//!
//! Invariants
//! 1. Everything that shards do, and nothing else, passes through [`counted`] while counting is on:
//!    no client, no disk.
//! 2. A run is deterministic: it uses no clock, no thread and no random source.
//! 3. Answers are checked: an operation that fails, or reads another page than it asked for, ends
//!    the run.
//!
//! It does *not* measure time, memory accesses, or the threads and rings around a shard: `corepage
//! bench` does. It is compiled for tests and under `--cfg fuzzing`, where the engine has none of
//! the simulator's planted bugs.

mod counting;

use crate::base::mix::mix;
use crate::base::options::Options;
use crate::base::{BLOCK, Micros, PageId, PageKey, ShardId, ShardMap, VolumeId};
use crate::engine::recovery;
use crate::engine::{Change, Commit, Request, Response, StateMachine, Token};
use crate::testing::fuzz::memory::MemoryDisk;
use crate::testing::local_cluster::LocalCluster;
use crate::testing::pattern::{self, Label};
use counting::{CountedShard, CountingDisk};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Memory of a shard: the least that is useful, so that a volume of many times this size is made
/// quickly.
const MEMORY: u64 = 4 << 20;
/// A volume of 64 times the memory.
const FAR_PAGES: u64 = 64 * MEMORY / BLOCK as u64;
/// Pages that fit into memory with room to spare.
const NEAR_PAGES: u64 = 256;
/// Pages that are requested again and again after the volume of `FAR_PAGES` was read at random.
const HOT_PAGES: u64 = 100;
/// Commits over two shards, all of the same page, that wait for each other while others are
/// counted.
const CONTENDING: usize = 8;
/// Virtual time that a poll takes.
const POLL_US: Micros = 100;
/// If an answer takes more polls than this, it will never arrive: half a minute, longer than
/// anything may wait.
const POLLS_MAX: u64 = 300_000;

/// The kind of an operation.
#[derive(Clone, Copy)]
enum Kind {
    Read,
    ReadAbsent,
    Put { durable: bool },
    Patch,
    PutOverTwo,
}

/// Which pages an operation uses.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Pages {
    /// One of `NEAR_PAGES`, all of which are in memory.
    Near,
    /// One of `HOT_PAGES`, in a volume of which `FAR_PAGES` were read at random before.
    Hot,
    /// A random one of `FAR_PAGES`.
    Far,
}

/// An operation to be counted.
#[derive(Clone, Copy)]
pub struct Operation {
    /// Its name.
    pub name: &'static str,
    kind: Kind,
    pages: Pages,
    /// Requests that arrive together.
    batch: usize,
    shards: u16,
    is_contended: bool,
}

const fn one(name: &'static str, kind: Kind, pages: Pages, batch: usize) -> Operation {
    Operation { name, kind, pages, batch, shards: 1, is_contended: false }
}

const fn over_two(name: &'static str, kind: Kind, batch: usize, is_contended: bool) -> Operation {
    Operation { name, kind, pages: Pages::Near, batch, shards: 2, is_contended }
}

/// All operations.
pub const OPERATIONS: &[Operation] = &[
    one("read-cached", Kind::Read, Pages::Near, 1),
    one("read-cached-32", Kind::Read, Pages::Near, 32),
    one("read-hot-32", Kind::Read, Pages::Hot, 32),
    one("read-far-32", Kind::Read, Pages::Far, 32),
    one("read-absent", Kind::ReadAbsent, Pages::Near, 1),
    one("read-absent-32", Kind::ReadAbsent, Pages::Near, 32),
    one("put", Kind::Put { durable: false }, Pages::Near, 1),
    one("put-32", Kind::Put { durable: false }, Pages::Near, 32),
    one("put-durable", Kind::Put { durable: true }, Pages::Near, 1),
    one("put-durable-32", Kind::Put { durable: true }, Pages::Near, 32),
    one("put-far-32", Kind::Put { durable: false }, Pages::Far, 32),
    one("patch-durable-32", Kind::Patch, Pages::Near, 32),
    over_two("over-two", Kind::PutOverTwo, 1, false),
    over_two("over-two-32", Kind::PutOverTwo, 32, false),
    over_two("put-beside-32", Kind::Put { durable: false }, 32, false),
    over_two("put-beside-contended-32", Kind::Put { durable: false }, 32, true),
];

/// What happened while counting was on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Done {
    /// Operations.
    pub operations: u64,
    /// Polls, of 100 virtual microseconds.
    pub polls: u64,
    /// Reads that went to the disk.
    pub disk_reads: u64,
    /// Bytes that went to the disk.
    pub disk_bytes_written: u64,
    /// Contending commits over shards that were answered.
    pub contending: u64,
}

/// Prepares the operation of this name and runs it `count` times, rounded up to whole batches;
/// `None` if there is no such operation.
pub fn run(name: &str, count: u64) -> Option<Done> {
    let operation = *OPERATIONS.iter().find(|operation| operation.name == name)?;
    Some(ClusterBench::new(operation).measure(count))
}

struct ClusterBench {
    operation: Operation,
    disk: CountingDisk,
    cluster: LocalCluster<CountedShard>,
    shard_map: ShardMap,
    answers: BTreeMap<Token, Response>,
    next_token: u64,
    now: Micros,
    is_counting: bool,
    done: Done,
    /// Pages of each shard, in the order in which they are used.
    own: Vec<Vec<PageKey>>,
    step: u64,
    contending: Vec<Token>,
}

impl ClusterBench {
    fn new(operation: Operation) -> ClusterBench {
        let options =
            Options { memory_bytes: MEMORY * u64::from(operation.shards), ..Options::default() };
        let mut disk =
            CountingDisk { disk: MemoryDisk::new(Arc::default()), reads: 0, bytes_written: 0 };
        let opening =
            recovery::begin(&mut disk, &options, operation.shards, 7, 0).expect("a store is made");
        let shard_map = ShardMap::new(options.geometry.vshards_count, operation.shards);
        let pages = if operation.pages == Pages::Near { NEAR_PAGES } else { FAR_PAGES };
        let of = |shard| {
            (0..)
                .map(key)
                .filter(|key| shard_map.shard_of(*key) == shard)
                .take(pages as usize)
                .collect()
        };
        let shards =
            opening.shards.into_iter().map(|shard| CountedShard { shard, is_counting: false });
        let mut bench = ClusterBench {
            operation,
            disk,
            cluster: LocalCluster::new(shards.collect()),
            shard_map,
            answers: BTreeMap::new(),
            next_token: 0,
            now: 0,
            is_counting: false,
            done: Done::default(),
            own: shard_map.shards().map(of).collect(),
            step: 0,
            contending: Vec::new(),
        };
        bench.poll_until(|bench| bench.cluster.shards.iter().all(CountedShard::is_open));
        bench
    }

    fn measure(mut self, count: u64) -> Done {
        self.prepare();
        self.is_counting = true;
        self.cluster.shards.iter_mut().for_each(|shard| shard.is_counting = true);
        (self.disk.reads, self.disk.bytes_written) = (0, 0);
        while self.done.operations < count {
            self.batch();
            self.done.operations += self.operation.batch as u64;
        }
        (self.done.disk_reads, self.done.disk_bytes_written) =
            (self.disk.reads, self.disk.bytes_written);
        self.done
    }

    /// Writes all pages, makes a checkpoint, and warms up with some operations.
    fn prepare(&mut self) {
        for shard in 0..self.own.len() {
            for from in (0..self.own[shard].len()).step_by(32) {
                let keys: Vec<_> = self.own[shard].iter().skip(from).take(32).copied().collect();
                let puts =
                    keys.into_iter().map(|key| commit(vec![(key, put(key, 0))], true)).collect();
                self.ask(ShardId::new(shard as u16), puts);
            }
        }
        self.ask(ShardId::LEADER, vec![Request::Checkpoint]);
        let warm = match self.operation.pages {
            Pages::Near => 2 * NEAR_PAGES,
            Pages::Far => FAR_PAGES / 4,
            Pages::Hot => FAR_PAGES,
        };
        if self.operation.pages == Pages::Hot {
            for _ in 0..warm / 32 {
                let keys: Vec<_> = (0..32).map(|_| self.any_page(0)).collect();
                self.read(&keys);
            }
        }
        for _ in 0..warm.div_ceil(self.operation.batch as u64) {
            self.batch();
        }
    }

    fn any_page(&mut self, shard: usize) -> PageKey {
        self.step += 1;
        let all = &self.own[shard];
        all[(mix(self.step) % all.len() as u64) as usize]
    }

    /// The page of the next step: hot ones in turn, near ones in turn (no page twice in a batch),
    /// far ones at random.
    fn next_page(&mut self, shard: usize) -> PageKey {
        let among = match self.operation.pages {
            Pages::Far => return self.any_page(shard),
            Pages::Near => NEAR_PAGES,
            Pages::Hot => HOT_PAGES,
        };
        self.step += 1;
        self.own[shard][(self.step % among) as usize]
    }

    /// Runs one batch of the operation.
    fn batch(&mut self) {
        let batch = self.operation.batch;
        match self.operation.kind {
            Kind::Read => {
                let keys: Vec<_> = (0..batch).map(|_| self.next_page(0)).collect();
                self.read(&keys);
            }
            Kind::ReadAbsent => {
                let absent = |_| {
                    self.step += 1;
                    read(key((1 << 40) + mix(self.step) % (1 << 32)))
                };
                let requests = (0..batch).map(absent).collect();
                for answer in self.ask(ShardId::LEADER, requests) {
                    assert!(matches!(answer, Response::Pages(pages) if pages[0].is_absent()));
                }
            }
            Kind::Put { durable } => {
                self.keep_contending();
                let puts = |_| {
                    let key = self.next_page(0);
                    commit(vec![(key, put(key, self.step))], durable)
                };
                let requests = (0..batch).map(puts).collect();
                self.ask(ShardId::LEADER, requests);
            }
            Kind::Patch => {
                let patch = |_| {
                    let key = self.next_page(0);
                    let bytes = pattern::patch(key.page.get(), self.step).into();
                    commit(
                        vec![(key, Change::Patch { offset: pattern::PATCH_AT as u32, bytes })],
                        true,
                    )
                };
                let requests = (0..batch).map(patch).collect();
                self.ask(ShardId::LEADER, requests);
            }
            Kind::PutOverTwo => {
                let puts = |_| {
                    let keys = [self.next_page(0), self.own[1][(self.step % NEAR_PAGES) as usize]];
                    commit(keys.map(|key| (key, put(key, self.step))).into(), true)
                };
                let requests = (0..batch).map(puts).collect();
                self.ask(ShardId::LEADER, requests);
            }
        }
    }

    fn read(&mut self, keys: &[PageKey]) {
        let answers = self.ask(ShardId::LEADER, keys.iter().map(|key| read(*key)).collect());
        for (key, answer) in keys.iter().zip(answers) {
            let Response::Pages(pages) = answer else { panic!("{answer:?}") };
            let number = Label::of(&pages[0]).map(|label| label.number);
            assert_eq!(number, Some(key.page.get()), "another page than was asked for");
        }
    }

    /// Keeps the contending commits over two shards in flight: replaces those that were answered.
    fn keep_contending(&mut self) {
        if !self.operation.is_contended {
            return;
        }
        for token in std::mem::take(&mut self.contending) {
            match self.answers.remove(&token) {
                Some(_) => self.done.contending += u64::from(self.is_counting),
                None => self.contending.push(token),
            }
        }
        while self.contending.len() < CONTENDING {
            // These pages are not among those that the counted commits write.
            let keys = [0, 1].map(|shard| {
                let own = |key: &PageKey| self.shard_map.shard_of(*key) == ShardId::new(shard);
                (1 << 20..).map(key).find(own).expect("each shard has pages")
            });
            let request = commit(keys.map(|key| (key, put(key, 1))).into(), false);
            let token = self.request(ShardId::new(1), request);
            self.contending.push(token);
        }
    }

    fn request(&mut self, to: ShardId, request: Request) -> Token {
        self.next_token += 1;
        let token = Token(self.next_token);
        self.cluster.request(to, token, request);
        token
    }

    /// Submits all requests together. Returns the answers in order.
    fn ask(&mut self, to: ShardId, requests: Vec<Request>) -> Vec<Response> {
        let tokens: Vec<_> =
            requests.into_iter().map(|request| self.request(to, request)).collect();
        self.poll_until(|bench| tokens.iter().all(|token| bench.answers.contains_key(token)));
        tokens.iter().map(|token| self.answers.remove(token).expect("it was answered")).collect()
    }

    fn poll_until(&mut self, is_over: impl Fn(&ClusterBench) -> bool) {
        for _ in 0..POLLS_MAX {
            self.poll_once();
            if is_over(self) {
                return;
            }
        }
        panic!("no answer after {POLLS_MAX} polls: {:?}", self.done);
    }

    /// Delivers completions, turns each shard, and carries out its effects.
    fn poll_once(&mut self) {
        self.now += POLL_US;
        self.done.polls += u64::from(self.is_counting);
        self.cluster.poll_once(&mut self.disk, self.now);
        for (token, result) in self.cluster.replies.drain(..) {
            let answer = result.unwrap_or_else(|error| panic!("{}: {error}", self.operation.name));
            self.answers.insert(token, answer);
        }
    }
}

fn key(page: u64) -> PageKey {
    PageKey::new(VolumeId::new(1), PageId::new(page))
}

fn read(key: PageKey) -> Request {
    Request::Read([key].into_iter().collect())
}

fn put(key: PageKey, step: u64) -> Change {
    let owner = key.volume.get().into();
    let label = Label { owner, number: key.page.get(), version: step };
    Change::Put(pattern::page(label).into())
}

fn commit(changes: Vec<(PageKey, Change)>, durable: bool) -> Request {
    Request::Commit(Commit { reads: Vec::new(), changes, durable })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn done(name: &str) -> Done {
        run(name, 256).unwrap_or_else(|| panic!("{name} is an operation"))
    }

    /// If this fails, the figures measure something other than their names say, and a slower
    /// operation may go unnoticed.
    #[test]
    fn each_operation_does_what_its_name_says() {
        for operation in OPERATIONS.iter().filter(|operation| operation.pages == Pages::Near) {
            let done = done(operation.name);
            assert!(done.operations >= 256, "{}: {done:?}", operation.name);
            assert_eq!(done.disk_reads, 0, "{}: all is in memory", operation.name);
            let is_read = matches!(operation.kind, Kind::Read | Kind::ReadAbsent);
            assert_eq!(done.disk_bytes_written == 0, is_read, "{}: {done:?}", operation.name);
        }
        assert!(run("no such operation", 1).is_none());
        assert_eq!(done("over-two"), done("over-two"), "a run is deterministic");
    }

    /// If this fails, a shard whose volume is much larger than its memory reads popular pages from
    /// the disk again and again.
    #[test]
    fn pages_in_use_stay_in_memory_after_a_volume_of_64_times_the_memory_was_read() {
        assert_eq!(done("read-hot-32").disk_reads, 0);
        assert!(
            done("read-far-32").disk_reads > 256,
            "a volume larger than the memory is read from the disk"
        );
        assert!(done("put-far-32").disk_bytes_written > 0, "its pages are written some time");
    }
}
