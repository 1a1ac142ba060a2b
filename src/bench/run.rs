//! One measurement.
//!
//! 1. At most `depth` operations are under way, spread evenly over tasks or threads; each works on pages of its own.
//! 2. An operation counts if it ended within the time; the others are waited for.
//! 3. The first error ends the run.

use super::Field;
use super::page;
use corepage::queue::{Completion, Op, Output, Queue};
use corepage::{Change, Durability, Error, ErrorKind, PageId, Result, ShardHandle};
use futures_lite::future::block_on;
use hdrhistogram::Histogram;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// What is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Pages at random are read.
    Read,
    /// Pages at random are written whole, each a durable commit.
    Write,
    /// 128 bytes of pages at random are written, each a durable commit.
    Commit,
}

/// Where it is called from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum At {
    /// Tasks on the shards' own threads: no hop.
    Shards,
    /// So many threads.
    Threads(usize),
}

/// A measurement to make.
#[derive(Clone)]
pub struct Run {
    pub work: Work,
    pub at: At,
    /// Operations under way.
    pub depth: usize,
    pub time: Duration,
    pub seed: u64,
    /// Ends it early.
    pub stop: Arc<AtomicBool>,
}

/// What came of it.
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

/// Pages of one client, and chance.
struct Mine {
    /// Every `step`th of `pages`, from `first` on.
    pages: Arc<Vec<u64>>,
    first: usize,
    step: usize,
    state: u64,
}

impl Mine {
    fn draw(&mut self) -> u64 {
        // Steele and Vigna, "Computationally easy, spectrally good multipliers", 2021: a linear congruential generator.
        self.state = self.state.wrapping_mul(0xd134_2543_de82_ef95).wrapping_add(1);
        let count = (self.pages.len() - self.first).div_ceil(self.step) as u64;
        let place = ((u128::from(self.state) * u128::from(count)) >> 64) as usize;
        self.pages[self.first + place * self.step]
    }
}

impl Run {
    /// Makes it.
    pub fn measure(&self, field: Arc<Field>) -> Result<Outcome> {
        let begun = Instant::now();
        let end = begun + self.time;
        let parts = match self.at {
            At::Shards => self.on_shards(&field, end)?,
            At::Threads(count) => self.on_threads(&field, count, end)?,
        };
        let mut all = histogram();
        for part in parts {
            all.add(part).expect("all have the same bounds");
        }
        Ok(Outcome { operations: all.len(), seconds: begun.elapsed().min(self.time).as_secs_f64(), latency: all })
    }

    fn goes_on(&self, end: Instant) -> bool {
        Instant::now() < end && !self.stop.load(Ordering::Relaxed)
    }

    fn on_shards(&self, field: &Arc<Field>, end: Instant) -> Result<Vec<Histogram<u64>>> {
        let shards = field.store.shards_count();
        let mut by_shard = vec![Vec::new(); shards];
        for number in 0..field.pages {
            by_shard[field.store.shard_of(&field.volume, PageId::new(number))].push(number);
        }
        let mut tasks = Vec::new();
        for (shard, pages) in by_shard.into_iter().map(Arc::new).enumerate() {
            let count = (self.depth / shards + usize::from(shard < self.depth % shards)).min(pages.len());
            for first in 0..count {
                let mine = Mine { pages: pages.clone(), first, step: count, state: self.seed ^ (first as u64) << 32 };
                let (run, field) = (self.clone(), field.clone());
                tasks.push(field.clone().store.on_shard(shard, move |handle| run.task(handle, field, mine, end))?);
            }
        }
        tasks.into_iter().map(|task| block_on(task)?).collect()
    }

    async fn task(
        self,
        handle: ShardHandle,
        field: Arc<Field>,
        mut mine: Mine,
        end: Instant,
    ) -> Result<Histogram<u64>> {
        let mut latency = histogram();
        while self.goes_on(end) {
            let number = mine.draw();
            let (id, begun) = (PageId::new(number), Instant::now());
            match self.work {
                Work::Read => check(number, &handle.read(&field.volume, id).await?)?,
                Work::Write | Work::Commit => {
                    let change = next_change(self.work, &field, number);
                    handle.commit(&field.volume, vec![(id, change)]).await?;
                    acknowledged(self.work, &field, number);
                }
            }
            count(&mut latency, begun, end);
        }
        Ok(latency)
    }

    fn on_threads(&self, field: &Arc<Field>, threads: usize, end: Instant) -> Result<Vec<Histogram<u64>>> {
        let pages = Arc::new((0..field.pages).collect::<Vec<_>>());
        let threads = threads.min(self.depth).max(1);
        std::thread::scope(|scope| {
            let clients: Vec<_> = (0..threads)
                .map(|thread| {
                    let depth = self.depth / threads + usize::from(thread < self.depth % threads);
                    let pages = pages.clone();
                    scope.spawn(move || self.client(field, thread, depth, &pages, end))
                })
                .collect();
            clients.into_iter().map(|client| client.join().expect("a client does not panic")).collect()
        })
    }

    /// One thread: a queue, and for each of its places pages of its own.
    fn client(
        &self,
        field: &Field,
        thread: usize,
        depth: usize,
        pages: &Arc<Vec<u64>>,
        end: Instant,
    ) -> Result<Histogram<u64>> {
        let (mut latency, mut queue, mut out) = (histogram(), Queue::new(&field.store, depth)?, Vec::new());
        let first = |place: usize| thread + place * self.threads();
        let mine = |place: usize| Mine {
            pages: pages.clone(),
            first: first(place) % pages.len(),
            step: self.depth.next_multiple_of(self.threads()).min(pages.len()),
            state: self.seed ^ (first(place) as u64) << 32,
        };
        let mut places: Vec<(Mine, u64, Instant)> = (0..depth).map(|place| (mine(place), 0, Instant::now())).collect();
        let submit = |queue: &mut Queue, place: usize, places: &mut Vec<(Mine, u64, Instant)>| -> Result<()> {
            let number = places[place].0.draw();
            (places[place].1, places[place].2) = (number, Instant::now());
            queue.submit(place as u64, self.op(field, number))
        };
        (0..depth).try_for_each(|place| submit(&mut queue, place, &mut places))?;
        while queue.in_flight() > 0 {
            queue.wait(1, None, &mut out)?;
            for Completion { tag, result } in out.drain(..) {
                let (_, number, begun) = places[tag as usize];
                match result? {
                    Output::Pages(pages) => pages.iter().try_for_each(|page| check(number, page))?,
                    _ => acknowledged(self.work, field, number),
                }
                count(&mut latency, begun, end);
                if self.goes_on(end) {
                    submit(&mut queue, tag as usize, &mut places)?;
                }
            }
        }
        Ok(latency)
    }

    fn threads(&self) -> usize {
        match self.at {
            At::Threads(count) => count.min(self.depth).max(1),
            At::Shards => 1,
        }
    }

    fn op(&self, field: &Field, number: u64) -> Op {
        let id = PageId::new(number);
        match self.work {
            Work::Read => Op::read(&field.volume, id),
            _ => {
                Op::Commit(field.volume.clone(), vec![(id, next_change(self.work, field, number))], Durability::Durable)
            }
        }
    }
}

fn next_change(work: Work, field: &Field, number: u64) -> Change {
    match work {
        Work::Write => Change::Put(page::whole(number, field.version(number) + 1).into()),
        _ => {
            Change::Patch { offset: page::PATCH_AT as u32, bytes: page::patch(number, field.patch(number) + 1).into() }
        }
    }
}

fn acknowledged(work: Work, field: &Field, number: u64) {
    match work {
        Work::Write => field.wrote(number, field.version(number) + 1),
        Work::Commit => field.patched(number, field.patch(number) + 1),
        Work::Read => {}
    }
}

fn check(number: u64, bytes: &[u8]) -> Result<()> {
    match page::check(number, bytes) {
        Some(_) => Ok(()),
        None => {
            Err(Error::new(ErrorKind::Corrupt, format!("page {number} was read with bytes that nobody wrote there")))
        }
    }
}

fn count(latency: &mut Histogram<u64>, begun: Instant, end: Instant) {
    let now = Instant::now();
    if now <= end {
        latency.saturating_record(now.duration_since(begun).as_nanos() as u64);
    }
}
