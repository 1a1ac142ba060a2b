//! Clients of the engine, each one operation after another, and the check of what they have left.
//!
//! A page says which it is, and the tag of the write that it is from (`corepage::testing::pattern`).
//! `newest` says for each page which tag was acknowledged last; a client has pages of its own.

use crate::PAGE;
use crate::reference::{processor_time, sample};
use crate::report::Sample;
use bytes::Bytes;
use corepage::testing::pattern::{self, Label};
use corepage::testing::random::Rng;
use corepage::{Change, Durability, OnShard, PageId, ShardHandle, Store, Volume};
use futures_lite::future::block_on;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// The operation that clients repeat.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Read a page.
    Read,
    /// Commit 128 bytes of a page, durably.
    Patch,
    /// Commit a whole page, durably.
    Put,
}

/// Where clients call from.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum CallSite {
    /// Tasks on the shards' threads.
    Shards,
    /// As many threads of their own, each with an executor.
    Threads(u64),
}

/// Who the pages are labelled with.
const OWNER: u64 = u64::from_le_bytes(*b"bench\0\0\0");

/// A page's bytes.
fn page(id: u64, tag: u64) -> Bytes {
    pattern::page(Label { owner: OWNER, number: id, version: tag }).into()
}

/// A volume with clients.
#[derive(Clone)]
pub struct BenchVolume {
    /// The store.
    pub store: Store,
    /// The volume, of which every page is written.
    pub volume: Volume,
    newest: Arc<[AtomicU64]>,
}

/// One measurement.
#[derive(Clone, Copy)]
pub struct Run {
    /// The operation that is repeated.
    pub operation: Operation,
    /// Where from.
    pub call_site: CallSite,
    /// Operations in flight over all clients.
    pub in_flight: u64,
    /// For how long.
    pub time: Duration,
    /// Its number: later ones have higher ones.
    pub round: u64,
}

struct Client {
    bench: BenchVolume,
    /// The volume, for clients on a shard.
    on_shard: Option<Volume<OnShard>>,
    pages: Arc<[u64]>,
    own: Range<u64>,
    rng: Rng,
    run: Run,
}

impl Client {
    async fn go(mut self, until: Instant) -> Vec<u32> {
        let mut times = Vec::new();
        let mut begun = Instant::now();
        let mut tag = self.run.round << 32;
        while begun < until {
            let at = self.own.start + self.rng.below(self.own.end - self.own.start);
            let id = self.pages[at as usize];
            tag += 1;
            self.once(id, tag).await;
            let now = Instant::now();
            times.push((now - begun).as_nanos().min(u32::MAX.into()) as u32);
            begun = now;
        }
        times
    }

    async fn once(&self, id: u64, tag: u64) {
        let (volume, page_id) = (&self.bench.volume, PageId::new(id));
        let change = match self.run.operation {
            Operation::Read => {
                let page = match &self.on_shard {
                    Some(volume) => volume.read(page_id).await,
                    None => volume.read(page_id).await,
                };
                let page = page.expect("a page is read");
                let number = Label::of(&page).map(|label| label.number);
                return assert_eq!(number, Some(id), "another page was served");
            }
            Operation::Patch => {
                let bytes = pattern::patch(id, tag).into();
                Change::Patch { offset: pattern::PATCH_AT as u32, bytes }
            }
            Operation::Put => Change::Put(page(id, tag)),
        };
        let committed = match (&self.on_shard, change) {
            (Some(volume), change) => {
                volume.apply(vec![(page_id, change)], Durability::Durable).await
            }
            (None, Change::Patch { offset, bytes }) => volume.patch(page_id, offset, bytes).await,
            (None, Change::Put(bytes)) => volume.write(page_id, bytes).await,
            (None, Change::Free) => unreachable!("nobody frees"),
        };
        committed.expect("a commit succeeds");
        self.bench.newest[id as usize].store(tag, Ordering::Relaxed);
    }
}

impl BenchVolume {
    /// Every page written once.
    pub fn prefilled(store: Store, pages: u64) -> BenchVolume {
        let volume =
            block_on(store.create_volume("bench", pages * PAGE as u64)).expect("a volume is made");
        let newest = (0..pages).map(|_| AtomicU64::new(0)).collect();
        let bench = BenchVolume { store, volume, newest };
        let step = (bench.store.txn_bytes_max() / PAGE as u64).min(256);
        for first in (0..pages).step_by(step as usize) {
            let batch = (first..(first + step).min(pages))
                .map(|id| (PageId::new(id), page(id, 0)))
                .collect();
            block_on(bench.volume.write_many(batch)).expect("pages are written");
        }
        block_on(bench.store.checkpoint()).expect("a checkpoint is made");
        bench
    }

    /// The volume in the store that was opened again.
    pub fn again(self, store: Store) -> BenchVolume {
        let volume = block_on(store.volume("bench"))
            .expect("volumes are listed")
            .expect("the volume is there");
        BenchVolume { store, volume, newest: self.newest }
    }

    /// How many pages there are.
    pub fn pages(&self) -> u64 {
        self.newest.len() as u64
    }

    fn clients(
        &self,
        run: Run,
        count: u64,
        pages: &Arc<[u64]>,
        handle: Option<&ShardHandle>,
    ) -> Vec<Client> {
        let all = pages.len() as u64;
        let own = |n: u64| match run.operation {
            Operation::Read => 0..all,
            Operation::Patch | Operation::Put => n * all / count..(n + 1) * all / count,
        };
        let client = |n: u64| Client {
            bench: self.clone(),
            on_shard: handle.map(|handle| self.volume.on(handle).expect("it is of this store")),
            pages: pages.clone(),
            own: own(n),
            rng: Rng::of(&[run.round, n, handle.map_or(0, |handle| handle.shard() as u64)]),
            run,
        };
        (0..count).map(client).collect()
    }

    /// Measures.
    pub fn run(&self, run: Run) -> Sample {
        let all: Vec<u64> = (0..self.pages()).collect();
        match run.call_site {
            CallSite::Shards => {
                let shards = self.store.shards_count();
                let of = |id: &u64| self.store.shard_of(&self.volume, PageId::new(*id));
                let mut dealt: Vec<Vec<u64>> = vec![Vec::new(); shards];
                all.iter().for_each(|id| dealt[of(id)].push(*id));
                self.on_shards(run, dealt)
            }
            CallSite::Threads(threads) => self.on_threads(run, threads, &all),
        }
    }

    fn on_shards(&self, run: Run, dealt: Vec<Vec<u64>>) -> Sample {
        let count = (run.in_flight / dealt.len() as u64).max(1);
        let (start, cpu) = (Instant::now(), processor_time());
        let until = start + run.time;
        let begin = |(shard, pages): (usize, Vec<u64>)| {
            let (bench, pages) = (self.clone(), Arc::from(pages));
            let body = move |handle: ShardHandle| async move {
                let clients = bench.clients(run, count, &pages, Some(&handle));
                let tasks: Vec<_> =
                    clients.into_iter().map(|client| handle.spawn(client.go(until))).collect();
                let mut times = Vec::new();
                for task in tasks {
                    times.extend(task.await.expect("the store is open"));
                }
                times
            };
            self.store.on_shard(shard, body).expect("there is a shard")
        };
        let ends: Vec<_> = dealt.into_iter().enumerate().map(begin).collect();
        let mut times = Vec::new();
        ends.into_iter().for_each(|end| times.extend(block_on(end).expect("the store is open")));
        sample(times, start.elapsed(), processor_time() - cpu)
    }

    fn on_threads(&self, run: Run, threads: u64, all: &[u64]) -> Sample {
        let count = (run.in_flight / threads).max(1);
        let (start, cpu) = (Instant::now(), processor_time());
        let until = start + run.time;
        let begin = |pages: &[u64]| {
            let (bench, pages) = (self.clone(), Arc::from(pages));
            std::thread::spawn(move || {
                let clients = bench.clients(run, count, &pages, None);
                let executor = async_executor::LocalExecutor::new();
                let tasks: Vec<_> =
                    clients.into_iter().map(|client| executor.spawn(client.go(until))).collect();
                block_on(executor.run(async {
                    let mut times = Vec::new();
                    for task in tasks {
                        times.extend(task.await);
                    }
                    times
                }))
            })
        };
        let ends: Vec<_> = all.chunks(all.len().div_ceil(threads as usize)).map(begin).collect();
        let mut times = Vec::new();
        ends.into_iter().for_each(|end| times.extend(end.join().expect("no client panics")));
        sample(times, start.elapsed(), processor_time() - cpu)
    }

    /// Every page is there, whole, as it was acknowledged last. `whole`: pages were written whole,
    /// else patched.
    pub fn verify(&self, whole: bool) {
        let ids: Vec<PageId> = (0..self.pages()).map(PageId::new).collect();
        for ids in ids.chunks(64) {
            let pages = block_on(self.volume.read_many(ids)).expect("pages are read");
            for (id, page) in ids.iter().map(|id| id.get()).zip(pages) {
                let newest = self.newest[id as usize].load(Ordering::Relaxed);
                let wanted = if whole { (newest, 0) } else { (0, newest) };
                let found = pattern::check(OWNER, id, &page);
                assert_eq!(found, Some(wanted), "page {id} (version, patch)");
            }
        }
    }
}
