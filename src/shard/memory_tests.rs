//! A shard on a simulated disk whose clients ask for far more than its memory holds: what it keeps stays bounded.

use super::{Change, Commit, Request, Response, Shard, Together, Token};
use crate::options::{Geometry, Options};
use crate::sim::disk::SimDisk;
use crate::types::{BLOCK, Micros, PageId, PageKey, ShardId, VolumeId};
use bytes::Bytes;
use smallvec::SmallVec;

/// One shard, asked one thing at a time.
struct Bench {
    disk: SimDisk,
    all: Together,
    now: Micros,
    token: u64,
}

/// Two MiB, the least that a shard can have.
fn options() -> Options {
    let geometry = Geometry { extent_bytes: 64 << 10, segment_bytes: 128 << 10, segments_count: 4, vshards_count: 4 };
    Options { geometry, memory_bytes: 2 << 20, ..Options::default() }
}

fn key(page: u64) -> PageKey {
    PageKey::new(VolumeId::new(1), PageId::new(page))
}

impl Bench {
    fn open(options: &Options) -> Bench {
        let mut disk = SimDisk::new(1);
        let opening = crate::recovery::begin(&mut disk, options, 1, 7, 0).expect("the store can be made");
        let mut all = Together::new(opening.shards);
        all.open(&mut disk, 0).expect("the store opens");
        let now = disk.now() + 1_000_000;
        Bench { disk, all, now, token: 0 }
    }

    fn shard(&self) -> &Shard {
        &self.all.shards[0]
    }

    fn ask(&mut self, request: Request) -> Response {
        self.token += 1;
        self.all.request(ShardId::LEADER, Token(self.token), request);
        for _ in 0..100_000 {
            if let Some((token, answer)) = self.all.replies.pop() {
                assert_eq!(token, Token(self.token), "one request at a time");
                return answer.expect("nothing fails");
            }
            self.now += 50;
            self.all.lap(&mut self.disk, self.now);
            self.disk.advance_to(self.now);
        }
        panic!("no answer to a request: {:#?}", self.all.shards);
    }

    fn read(&mut self, pages: impl IntoIterator<Item = u64>) -> Vec<u8> {
        match self.ask(Request::Read(pages.into_iter().map(key).collect::<SmallVec<[PageKey; 1]>>())) {
            Response::Pages(pages) => pages.iter().map(|page| page[0]).collect(),
            other => panic!("{other:?}"),
        }
    }

    fn commit(&mut self, reads: Vec<u64>, changes: Vec<(u64, Change)>) {
        let reads = reads.into_iter().map(|page| (key(page), crate::types::Lsn::ZERO)).collect();
        let changes = changes.into_iter().map(|(page, change)| (key(page), change)).collect();
        self.ask(Request::Commit(Commit { reads, changes, durable: true }));
    }
}

fn put(byte: u8) -> Change {
    Change::Put(Bytes::from(vec![byte; BLOCK]))
}

/// A client that reads, validates or frees what was never written must not fill the process's memory: 16 GiB of a sparse volume
/// took 1.25 GiB of a server that was given 32 MiB.
#[test]
fn absent_pages_take_no_memory() {
    let mut bench = Bench::open(&options());
    bench.commit(vec![], vec![(0, put(7))]);
    for at in (1u64..40_000).step_by(64) {
        // Leaves that exist, leaves that don't, and trees that would have to be taller.
        let far = at << 20;
        assert!(bench.read(at..at + 32).iter().all(|byte| *byte == 0));
        assert!(bench.read(far..far + 32).iter().all(|byte| *byte == 0));
        bench.commit(vec![at + 32, far + 32], vec![]);
        bench.commit(vec![], vec![(at + 33, Change::Free), (far + 33, Change::Free)]);
        bench.shard().audit().expect("counts are kept");
        let entries = bench.shard().table.pages.len();
        assert!(entries <= 4, "{entries} entries in the page table after page {at}");
    }
    assert_eq!(bench.read([0]), [7]);
}

/// A small generator: what is read at random is the same in each run.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % end
    }
}

/// Pages with a leaf each, three for every frame: neither they nor the map fit into memory.
fn fill_far(bench: &mut Bench) -> u64 {
    let pages = 3 * u64::from(bench.shard().limits.memory_blocks);
    for at in (0..pages).step_by(8) {
        bench.commit(vec![], (at..at + 8).map(|n| (n * 64, put(n as u8))).collect());
    }
    // What is dirty can't leave memory; how much may be is not asked here.
    bench.ask(Request::Checkpoint);
    pages
}

/// How many of the hot pages were in memory, of 20 reads of each.
fn hot_hits(bench: &mut Bench, hot: u64) -> u64 {
    let before = bench.shard().stats.cache_hits;
    for n in (0..20).flat_map(|_| 0..hot) {
        assert_eq!(bench.read([n * 64]), [n as u8]);
    }
    bench.shard().stats.cache_hits - before
}

/// If this fails, a store that has been read all over has no cache any more: map nodes took all of the memory, since they left it
/// only when no page could, and pages that are read all the time were read from the device each time.
#[test]
fn pages_in_use_stay_in_memory_when_a_large_volume_is_read_at_random() {
    let mut bench = Bench::open(&options());
    let pages = fill_far(&mut bench);
    let (hot, mut random) = (12, Random(3));
    assert!(hot_hits(&mut bench, hot) >= 19 * hot);
    for _ in 0..64 * u64::from(bench.shard().limits.memory_blocks) / 4 {
        let n = random.below(pages);
        assert_eq!(bench.read([n * 64]), [n as u8]);
    }
    let hits = hot_hits(&mut bench, hot);
    assert!(hits >= 19 * hot, "{hits} of {} reads of pages in use were hits", 20 * hot);
    // And while others read at random: of ten reads one is of a page in use.
    let mut missed = 0;
    for i in 0..20_000 {
        let n = if i % 10 == 0 { i / 10 % hot } else { random.below(pages) };
        let before = bench.shard().stats.cache_hits;
        bench.read([n * 64]);
        missed += u64::from(i % 10 == 0 && bench.shard().stats.cache_hits == before);
    }
    assert!(missed <= 100, "{missed} of 2,000 reads of pages in use were misses while others read at random");
    bench.shard().audit().expect("counts are kept");
}

/// If this fails, a store gets slower the more memory it has: each frame cost two sweeps of all pages and nodes, 112,000 pages a
/// second became 141.
#[test]
fn a_frame_is_had_for_a_few_looks_however_full_memory_is() {
    let mut bench = Bench::open(&options());
    let pages = fill_far(&mut bench);
    let mut random = Random(5);
    for i in 0..10_000u64 {
        let n = random.below(pages);
        bench.read([n * 64]);
        if i % 3 == 0 {
            bench.commit(vec![], vec![(n * 64, put(n as u8))]);
        }
    }
    let (counts, blocks) = (bench.shard().eviction.counts(), u64::from(bench.shard().limits.memory_blocks));
    println!("{counts:?}");
    assert!(counts.evicted > 10 * blocks, "{counts:?}: memory was short all the time");
    assert!(counts.looks <= 4 * counts.evicted + blocks, "{counts:?}");
}
