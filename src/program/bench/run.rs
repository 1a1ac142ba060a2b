//! Makes one measurement.
//!
//! 1. At most `depth` operations are in flight, spread evenly over tasks or threads, each of which
//!    works on pages of its own.
//! 2. An operation counts if it ends within the time; the others are only waited for.
//! 3. The first error ends the run. `Busy` is not an error: such an operation is repeated, and its
//!    time continues.

use super::bench_volume;
use super::bench_volume::{BenchVolume, PAUSE, until_not_busy};
use corepage::queue::{Completion, Op, Output, Queue};
use corepage::testing::pattern;
use corepage::testing::random::Rng;
use corepage::{
    Change, Durability, Error, ErrorKind, OnShard, PageId, Result, ShardHandle, Volume,
};
use futures_lite::future::{block_on, yield_now};
use hdrhistogram::Histogram;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// The operation that a run repeats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Reads random pages.
    Read,
    /// Writes whole random pages, each in a durable commit.
    Write,
    /// Writes 128 bytes of random pages, each in a durable commit.
    Commit,
}

/// Where the operations are called from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CallSite {
    /// Tasks on the shards' own threads, without a hop.
    Shards,
    /// This many threads.
    Threads(usize),
}

/// A measurement to make.
#[derive(Clone)]
pub struct Run {
    pub operation: Operation,
    pub call_site: CallSite,
    /// Operations in flight.
    pub depth: usize,
    pub time: Duration,
    pub seed: u64,
    /// Ends the measurement early.
    pub stop: Arc<AtomicBool>,
}

/// The result of a measurement.
pub struct Outcome {
    pub operations: u64,
    pub seconds: f64,
    /// In nanoseconds.
    pub latency: Histogram<u64>,
}

impl Outcome {
    pub fn rate(&self) -> f64 {
        self.operations as f64 / self.seconds.max(1e-9)
    }

    /// Microseconds.
    pub fn percentile(&self, percent: f64) -> f64 {
        self.latency.value_at_percentile(percent) as f64 / 1000.0
    }
}

fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(100, 600_000_000_000, 3).expect("the bounds are in order")
}

/// The pages from which one client picks at random.
struct ClientPages {
    /// The client has every `step`th of these pages, from `first` on.
    pages: Arc<Vec<u64>>,
    first: usize,
    step: usize,
    rng: Rng,
}

impl ClientPages {
    fn draw(&mut self) -> u64 {
        let count = (self.pages.len() - self.first).div_ceil(self.step) as u64;
        let place = self.rng.below(count) as usize;
        self.pages[self.first + place * self.step]
    }
}

impl Run {
    /// Runs the measurement.
    pub fn measure(&self, bench: &Arc<BenchVolume>) -> Result<Outcome> {
        let pages = self.pages(bench);
        let begun = Instant::now();
        let end = begun + self.time;
        let parts = match self.call_site {
            CallSite::Shards => self.on_shards(bench, pages, end)?,
            CallSite::Threads(count) => self.on_threads(bench, &pages[0], count, end)?,
        };
        let mut all = histogram();
        for part in parts {
            all.add(part).expect("all have the same bounds");
        }
        Ok(Outcome {
            operations: all.len(),
            seconds: begun.elapsed().min(self.time).as_secs_f64(),
            latency: all,
        })
    }

    /// The pages of each shard, or all in one.
    fn pages(&self, bench: &BenchVolume) -> Vec<Arc<Vec<u64>>> {
        let shards =
            if self.call_site == CallSite::Shards { bench.store.shards_count() } else { 1 };
        let mut all = vec![Vec::new(); shards];
        for number in 0..bench.pages {
            let shard = if shards == 1 {
                0
            } else {
                bench.store.shard_of(&bench.volume, PageId::new(number))
            };
            all[shard].push(number);
        }
        all.into_iter().map(Arc::new).collect()
    }

    fn goes_on(&self, now: Instant, end: Instant) -> bool {
        now < end && !self.stop.load(Ordering::Relaxed)
    }

    /// If one client has failed, stops the others.
    fn or_stop<T>(&self, result: Result<T>) -> Result<T> {
        result.inspect_err(|_| self.stop.store(true, Ordering::Relaxed))
    }

    fn on_shards(
        &self,
        bench: &Arc<BenchVolume>,
        pages: Vec<Arc<Vec<u64>>>,
        end: Instant,
    ) -> Result<Vec<Histogram<u64>>> {
        let counts = shares(self.depth, &pages.iter().map(|pages| pages.len()).collect::<Vec<_>>());
        let mut tasks = Vec::new();
        for (shard, (pages, count)) in pages.into_iter().zip(counts).enumerate() {
            for first in 0..count {
                // A shard accepts a limited number of new tasks at a time, and more once it has
                // begun those.
                let begun = until_not_busy(|| {
                    let rng = Rng::of(&[self.seed, first as u64]);
                    let client_pages =
                        ClientPages { pages: pages.clone(), first, step: count, rng };
                    let (run, own) = (self.clone(), bench.clone());
                    let make = move |handle| async move {
                        run.or_stop(run.task(handle, own, client_pages, end).await)
                    };
                    std::future::ready(bench.store.on_shard(shard, make))
                });
                tasks.push(self.or_stop(begun));
            }
        }
        // All of them have ended on return, even after an error.
        let ended: Vec<_> = tasks.into_iter().map(|task| block_on(task?)?).collect();
        ended.into_iter().collect()
    }

    async fn task(
        &self,
        handle: ShardHandle,
        bench: Arc<BenchVolume>,
        mut client_pages: ClientPages,
        end: Instant,
    ) -> Result<Histogram<u64>> {
        // Through this handle, requests to the task's own shard take no hop.
        let volume = bench.volume.on(&handle)?;
        let (mut latency, mut now) = (histogram(), Instant::now());
        while self.goes_on(now, end) {
            let number = client_pages.draw();
            let Some((begun, answered)) = self.one(&volume, &bench, number, end).await? else {
                break;
            };
            now = answered;
            count(&mut latency, begun, now, end);
        }
        Ok(latency)
    }

    /// Runs one operation, repeatedly as long as the store is busy. Returns when it was first
    /// submitted and when it was answered, or `None` if the time was over before.
    async fn one(
        &self,
        volume: &Volume<OnShard>,
        bench: &BenchVolume,
        number: u64,
        end: Instant,
    ) -> Result<Option<(Instant, Instant)>> {
        let mut first = None;
        loop {
            // Made before the clock is read.
            let changes = (self.operation != Operation::Read)
                .then(|| vec![(PageId::new(number), next_change(self.operation, bench, number))]);
            let begun = *first.get_or_insert_with(Instant::now);
            let result = match changes {
                None => volume.read(PageId::new(number)).await.map(Some),
                Some(changes) => volume.apply(changes, Durability::Durable).await.map(|_| None),
            };
            let now = Instant::now();
            match result {
                Ok(Some(page)) => check(number, &page)?,
                Ok(None) => acknowledged(self.operation, bench, number),
                Err(error) if error.kind() == ErrorKind::Busy && self.goes_on(now, end) => {
                    yield_now().await;
                    continue;
                }
                Err(error) if error.kind() == ErrorKind::Busy => return Ok(None),
                Err(error) => return Err(error),
            }
            return Ok(Some((begun, now)));
        }
    }

    fn on_threads(
        &self,
        bench: &BenchVolume,
        pages: &Arc<Vec<u64>>,
        threads: usize,
        end: Instant,
    ) -> Result<Vec<Histogram<u64>>> {
        let threads = threads.min(self.depth).max(1);
        std::thread::scope(|scope| {
            let clients: Vec<_> = (0..threads)
                .map(|thread| {
                    let depth = self.depth / threads + usize::from(thread < self.depth % threads);
                    scope.spawn(move || self.or_stop(self.client(bench, thread, depth, pages, end)))
                })
                .collect();
            clients
                .into_iter()
                .map(|client| client.join().expect("a client does not panic"))
                .collect()
        })
    }

    /// Runs the client of one thread: it has a queue, and pages of its own for each place in it.
    fn client(
        &self,
        bench: &BenchVolume,
        thread: usize,
        depth: usize,
        pages: &Arc<Vec<u64>>,
        end: Instant,
    ) -> Result<Histogram<u64>> {
        let (mut latency, mut queue, mut out) = (histogram(), Queue::new(depth)?, Vec::new());
        let first = |place: usize| thread + place * self.threads();
        let client_pages = |place: usize| ClientPages {
            pages: pages.clone(),
            first: first(place),
            step: self.depth.next_multiple_of(self.threads()),
            rng: Rng::of(&[self.seed, first(place) as u64]),
        };
        let mut places: Vec<(ClientPages, u64, Instant)> =
            (0..depth).map(|place| (client_pages(place), 0, Instant::now())).collect();
        let submit = |queue: &mut Queue,
                      place: usize,
                      places: &mut Vec<(ClientPages, u64, Instant)>|
         -> Result<()> {
            let number = places[place].0.draw();
            let op = self.op(bench, number);
            (places[place].1, places[place].2) = (number, Instant::now());
            queue.submit(place as u64, op)
        };
        (0..depth).try_for_each(|place| submit(&mut queue, place, &mut places))?;
        let mut again = Vec::new();
        while queue.in_flight() > 0 || !again.is_empty() {
            if queue.in_flight() == 0 {
                // All submitted operations have completed.
                std::thread::sleep(PAUSE);
            }
            for place in again.drain(..) {
                let number = places[place as usize].1;
                queue.submit(place, self.op(bench, number))?;
            }
            queue.wait(1, None, &mut out)?;
            // All of these answers have arrived by now, before the first of them is checked.
            let now = Instant::now();
            for Completion { tag, result } in out.drain(..) {
                let (_, number, begun) = places[tag as usize];
                match result {
                    Ok(Output::Pages(pages)) => {
                        pages.iter().try_for_each(|page| check(number, page))?
                    }
                    Ok(_) => acknowledged(self.operation, bench, number),
                    Err(error) if error.kind() == ErrorKind::Busy => {
                        if self.goes_on(now, end) {
                            again.push(tag);
                        }
                        continue;
                    }
                    Err(error) => return Err(error),
                }
                count(&mut latency, begun, now, end);
                if self.goes_on(now, end) {
                    submit(&mut queue, tag as usize, &mut places)?;
                }
            }
        }
        Ok(latency)
    }

    fn threads(&self) -> usize {
        match self.call_site {
            CallSite::Threads(count) => count.min(self.depth).max(1),
            CallSite::Shards => 1,
        }
    }

    fn op(&self, bench: &BenchVolume, number: u64) -> Op {
        let id = PageId::new(number);
        match self.operation {
            Operation::Read => Op::read(&bench.volume, id),
            _ => Op::Commit(
                bench.volume.clone(),
                vec![(id, next_change(self.operation, bench, number))],
                Durability::Durable,
            ),
        }
    }
}

fn next_change(operation: Operation, bench: &BenchVolume, number: u64) -> Change {
    match operation {
        Operation::Write => {
            Change::Put(bench_volume::page(number, bench.version(number) + 1).into())
        }
        _ => Change::Patch {
            offset: pattern::PATCH_AT as u32,
            bytes: pattern::patch(number, bench.patch(number) + 1).into(),
        },
    }
}

fn acknowledged(operation: Operation, bench: &BenchVolume, number: u64) {
    match operation {
        Operation::Write => bench.wrote(number, bench.version(number) + 1),
        Operation::Commit => bench.patched(number, bench.patch(number) + 1),
        Operation::Read => {}
    }
}

fn check(number: u64, bytes: &[u8]) -> Result<()> {
    match bench_volume::check(number, bytes) {
        Some(_) => Ok(()),
        None => Err(Error::new(
            ErrorKind::Corrupt,
            format!("page {number} was read with bytes that nobody wrote there"),
        )),
    }
}

fn count(latency: &mut Histogram<u64>, begun: Instant, now: Instant, end: Instant) {
    if now <= end {
        latency.saturating_record(now.duration_since(begun).as_nanos() as u64);
    }
}

/// Distributes `depth` operations evenly over shards with these numbers of pages, with no more
/// operations for a shard than it has pages.
fn shares(depth: usize, pages: &[usize]) -> Vec<usize> {
    let mut counts = vec![0; pages.len()];
    let mut left = depth.min(pages.iter().sum());
    while left > 0 {
        for (count, _) in counts.iter_mut().zip(pages).filter(|(count, pages)| **count < **pages) {
            *count += left.min(1);
            left -= left.min(1);
        }
    }
    counts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_depth_that_is_told_is_the_depth_that_is_run() {
        assert_eq!(shares(7, &[100, 100]), [4, 3]);
        assert_eq!(shares(1, &[100, 100]), [1, 0]);
        assert_eq!(shares(64, &[70, 0, 10]), [54, 0, 10]);
        assert_eq!(shares(9, &[2, 3]), [2, 3]);
        assert_eq!(shares(3, &[]), [0; 0]);
    }

    #[test]
    fn no_two_clients_draw_the_same_page() {
        let pages: Arc<Vec<u64>> = Arc::new((0..10).collect());
        let mut owner = [None; 10];
        for first in 0..4 {
            let mut client_pages =
                ClientPages { pages: pages.clone(), first, step: 4, rng: Rng::new(first as u64) };
            for _ in 0..200 {
                let page = client_pages.draw() as usize;
                assert!(
                    owner[page].is_none_or(|owner| owner == first),
                    "page {page} of two clients"
                );
                owner[page] = Some(first);
            }
        }
        assert!(owner.iter().all(Option::is_some), "some page is never drawn");
    }
}
