//! A shard on a simulated disk whose clients request far more than its memory holds: what it keeps
//! stays bounded.

use super::{Change, Commit, NodeWaiter, Request, Response, Shard, Token};
use crate::base::options::{Geometry, Options, SHARD_MEMORY_MIN, TABLE_BYTES_PER_FRAME};
use crate::base::{BLOCK, Micros, PageId, PageKey, ShardId, VShard, VolumeId};
use crate::format::extent::NodeKey;
use crate::format::node::Child;
use crate::testing::local_cluster::LocalCluster;
use crate::testing::random::Rng;
use crate::testing::sim::disk::SimDisk;
use bytes::Bytes;
use smallvec::SmallVec;

/// One shard, which gets one request at a time.
struct Bench {
    disk: SimDisk,
    all: LocalCluster,
    now: Micros,
    token: u64,
}

/// Two MiB, the least that a shard can have.
fn options() -> Options {
    let geometry = Geometry {
        extent_bytes: 64 << 10,
        segment_bytes: 128 << 10,
        segments_count: 4,
        vshards_count: 4,
    };
    Options { geometry, memory_bytes: 2 << 20, ..Options::default() }
}

fn key(page: u64) -> PageKey {
    PageKey::new(VolumeId::new(1), PageId::new(page))
}

impl Bench {
    fn open(options: &Options) -> Bench {
        Bench::open_with(options, 1)
    }

    fn open_with(options: &Options, shards_count: u16) -> Bench {
        let mut disk = SimDisk::new(1);
        let opening = crate::engine::recovery::begin(&mut disk, options, shards_count, 7, 0)
            .expect("the store can be made");
        let mut all = LocalCluster::new(opening.shards);
        all.run_until_open(&mut disk, 0).expect("the store opens");
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
            self.all.poll_once(&mut self.disk, self.now);
            self.disk.advance_to(self.now);
        }
        panic!("no answer to a request: {:#?}", self.all.shards);
    }

    fn read(&mut self, pages: impl IntoIterator<Item = u64>) -> Vec<u8> {
        match self
            .ask(Request::Read(pages.into_iter().map(key).collect::<SmallVec<[PageKey; 1]>>()))
        {
            Response::Pages(pages) => pages.iter().map(|page| page[0]).collect(),
            other => panic!("{other:?}"),
        }
    }

    fn commit(&mut self, reads: Vec<u64>, changes: Vec<(u64, Change)>) {
        let reads = reads.into_iter().map(|page| (key(page), crate::base::Lsn::ZERO)).collect();
        let changes = changes.into_iter().map(|(page, change)| (key(page), change)).collect();
        self.ask(Request::Commit(Commit { reads, changes, durable: true }));
    }
}

fn put(byte: u8) -> Change {
    Change::Put(Bytes::from(vec![byte; BLOCK]))
}

/// If this fails, a client that reads, validates or frees what was never written fills the memory
/// of the process: 16 GiB of a sparse volume took 1.25 GiB of a server that was given 32 MiB.
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
        let entries = bench.shard().cache.table.pages.len();
        assert!(entries <= 4, "{entries} entries in the page table after page {at}");
    }
    assert_eq!(bench.read([0]), [7]);
}

/// Pages with a leaf each, three for every frame: neither they nor the map fit into memory.
fn fill_far(bench: &mut Bench) -> u64 {
    let pages = 3 * u64::from(bench.shard().ctx.limits.memory_blocks);
    for at in (0..pages).step_by(8) {
        bench.commit(vec![], (at..at + 8).map(|n| (n * 64, put(n as u8))).collect());
    }
    // What is dirty can't leave memory; how much may be dirty is not tested here.
    bench.ask(Request::Checkpoint);
    pages
}

/// How many of the hot pages were in memory, of 20 reads of each.
fn hot_hits(bench: &mut Bench, hot: u64) -> u64 {
    let before = bench.shard().ctx.stats.cache_hits;
    for n in (0..20).flat_map(|_| 0..hot) {
        assert_eq!(bench.read([n * 64]), [n as u8]);
    }
    bench.shard().ctx.stats.cache_hits - before
}

/// If this fails, a store that has been read throughout has no cache any more: map nodes took all
/// of the memory, since they left it only when no page could, and pages that are read all the time
/// were read from the device each time.
#[test]
fn pages_in_use_stay_in_memory_when_a_large_volume_is_read_at_random() {
    let mut bench = Bench::open(&options());
    let pages = fill_far(&mut bench);
    let (hot, mut random) = (12, Rng::new(3));
    assert!(hot_hits(&mut bench, hot) >= 19 * hot);
    for _ in 0..64 * u64::from(bench.shard().ctx.limits.memory_blocks) / 4 {
        let n = random.below(pages);
        assert_eq!(bench.read([n * 64]), [n as u8]);
    }
    let hits = hot_hits(&mut bench, hot);
    assert!(hits >= 19 * hot, "{hits} of {} reads of pages in use were hits", 20 * hot);
    // And while others read at random: of ten reads one is of a page in use.
    let mut missed = 0;
    for i in 0..20_000 {
        let n = if i % 10 == 0 { i / 10 % hot } else { random.below(pages) };
        let before = bench.shard().ctx.stats.cache_hits;
        bench.read([n * 64]);
        missed += u64::from(i % 10 == 0 && bench.shard().ctx.stats.cache_hits == before);
    }
    assert!(
        missed <= 100,
        "{missed} of 2,000 reads of pages in use were misses while others read at random"
    );
    bench.shard().audit().expect("counts are kept");
}

/// If this fails, pages that are read once, one after another, count as pages in use: reading a
/// large volume twice drives out what is read all the time.
#[test]
fn the_read_that_brings_a_page_into_memory_is_no_use_of_it() {
    let mut bench = Bench::open(&options());
    bench.commit(vec![], vec![(1, put(1)), (2, put(2))]);
    bench.ask(Request::Checkpoint);
    let table = &mut bench.all.shards[0].cache.table;
    let idx = table.find(key(1)).expect("it was written");
    assert!(table.pages[idx].is_unreferenced(), "it is clean");
    table.evict(idx);
    for (read, uses) in [(1, 0), (2, 1), (3, 2)] {
        assert_eq!(bench.read([1]), [1]);
        let table = &bench.shard().cache.table;
        let page = &table.pages[table.find(key(1)).expect("it was read")];
        assert_eq!(page.residency.uses(), uses, "after {read} reads");
    }
}

/// If this fails, a store gets slower the more memory it has: each frame cost two sweeps of all
/// pages and nodes, 112,000 pages a second became 141.
#[test]
fn a_frame_is_had_for_a_few_looks_however_full_memory_is() {
    let mut bench = Bench::open(&options());
    let pages = fill_far(&mut bench);
    let mut random = Rng::new(5);
    for i in 0..10_000u64 {
        let n = random.below(pages);
        bench.read([n * 64]);
        if i % 3 == 0 {
            bench.commit(vec![], vec![(n * 64, put(n as u8))]);
        }
    }
    let (counts, blocks) =
        (bench.shard().cache.eviction.counts(), u64::from(bench.shard().ctx.limits.memory_blocks));
    println!("{counts:?}");
    assert!(counts.evicted > 10 * blocks, "{counts:?}: memory was short all the time");
    assert!(counts.looks <= 4 * counts.evicted + blocks, "{counts:?}");
}

/// Brings the requests that `request` makes of 0, 1, 2 ... to each shard until none takes more;
/// returns how many were taken.
fn fill_with_requests(bench: &mut Bench, most: u64, request: impl Fn(u64) -> Request) -> u64 {
    let mut taken = 0;
    loop {
        let before = taken;
        for shard in 0..bench.all.shards.len() {
            if bench.all.shards[shard].accepting() {
                bench.all.request(ShardId::new(shard as u16), Token(taken), request(taken));
                taken += 1;
            }
            bench.all.shards[shard].audit().expect("counts are kept");
        }
        let held: Vec<u64> =
            bench.all.shards.iter().map(|shard| shard.reservations.request_bytes).collect();
        assert!(taken <= most, "{held:?} bytes are held, and more is taken after {taken} requests");
        if taken == before {
            return taken;
        }
    }
}

/// Runs laps until `count` requests are answered; then nothing of them is held any more.
fn answer_all(bench: &mut Bench, count: u64) {
    for _ in 0..1_000_000 {
        if bench.all.replies.len() as u64 == count
            && bench.all.shards.iter().all(|shard| shard.reservations.request_bytes == 0)
        {
            break;
        }
        bench.now += 50;
        bench.all.poll_once(&mut bench.disk, bench.now);
        bench.disk.advance_to(bench.now);
    }
    assert_eq!(
        bench.all.replies.len() as u64,
        count,
        "what is taken is answered: {:#?}",
        bench.all.shards
    );
    bench
        .all
        .replies
        .drain(..)
        .for_each(|(token, reply)| assert!(reply.is_ok(), "{token:?}: {reply:?}"));
    for shard in &bench.all.shards {
        assert_eq!((shard.reservations.request_bytes, shard.accepting()), (0, true));
        shard.audit().expect("counts are kept");
    }
}

/// If this fails, clients that validate many reads, or send large commits, take a multiple of the
/// memory in requests in progress: 4,096 requests, each naming as many absent pages as it may, were
/// 800 MiB in a shard of 2 MiB.
#[test]
fn requests_under_way_are_bounded_by_what_they_take() {
    let mut bench = Bench::open(&options());
    let limit = bench.shard().ctx.limits.request_bytes_max;
    let reads = |n| (0..512).map(|i| (key((n * 512 + i) << 10), crate::base::Lsn::ZERO)).collect();
    let taken = fill_with_requests(&mut bench, 100, |n| {
        Request::Commit(Commit { reads: reads(n), changes: vec![], durable: true })
    });
    assert!(
        bench.shard().reservations.request_bytes < 2 * limit,
        "{} of {limit} bytes",
        bench.shard().reservations.request_bytes
    );
    answer_all(&mut bench, taken);
    let taken = fill_with_requests(&mut bench, 100, |n| {
        let changes = (0..8).map(|i| (key((n * 8 + i) << 10), put(n as u8))).collect();
        Request::Commit(Commit { reads: vec![], changes, durable: true })
    });
    assert!(taken >= 4 && bench.shard().reservations.request_bytes < 2 * limit, "{taken} requests");
    answer_all(&mut bench, taken);
}

/// If this fails, a valid commit waits for ever for a shard that has nothing to do, or shards wait
/// for each other's budget.
#[test]
fn the_largest_commits_over_shards_are_taken_at_their_owners_cost() {
    let geometry = Geometry { segment_bytes: 512 << 10, ..options().geometry };
    let mut bench = Bench::open_with(&Options { geometry, memory_bytes: 4 << 20, ..options() }, 2);
    let limits = bench.shard().ctx.limits.clone();
    let request = |n: u64| {
        let (reads, changes) = (limits.txn_bytes_max / 64, limits.txn_bytes_max / BLOCK as u64);
        let far = |i: u64| key((n * 4096 + i) << 9);
        Request::Commit(Commit {
            reads: (0..reads).map(|i| (far(i), crate::base::Lsn::ZERO)).collect(),
            changes: (0..changes).map(|i| (far(reads + i), put(n as u8))).collect(),
            durable: true,
        })
    };
    for round in 0..3 {
        let taken = fill_with_requests(&mut bench, 2, |n| request(2 * round + n));
        assert_eq!(taken, 2, "one is more than the limit, and each shard takes one");
        answer_all(&mut bench, taken);
    }
    // Requests of other shards leave a shard's own callers their budget.
    bench.all.request(ShardId::LEADER, Token(0), request(100));
    while bench.all.shards[1].requests.pending.is_empty() {
        bench.now += 50;
        bench.all.poll_once(&mut bench.disk, bench.now);
        bench.disk.advance_to(bench.now);
        assert!(bench.all.replies.is_empty(), "the other one has had its part");
    }
    let (owner, other) = (&bench.all.shards[0], &bench.all.shards[1]);
    assert!(!owner.accepting(), "it has taken what it may");
    assert_eq!((other.reservations.request_bytes, other.accepting()), (0, true));
    answer_all(&mut bench, 1);
}

/// If this fails, a durable commit gets "outcome unknown" because something else failed in the same
/// moment: its client repeats it.
#[test]
fn what_is_durable_is_answered_so_though_the_store_stops_in_the_same_moment() {
    let mut bench = Bench::open(&options());
    let now = bench.now;
    let shard = &mut bench.all.shards[0];
    let changes = vec![(key(1), Change::Put(Bytes::from(vec![1; BLOCK])))];
    shard
        .request(Token(9), Request::Commit(Commit { changes, durable: true, ..Commit::default() }));
    shard.turn(now);
    let replies = |shard: &mut Shard| -> Vec<bool> {
        std::iter::from_fn(|| shard.next_effect())
            .filter_map(|effect| match effect {
                super::Effect::Reply(Token(9), answer) => Some(answer.is_ok()),
                _ => None,
            })
            .collect()
    };
    assert!(replies(shard).is_empty(), "it waits for the log");
    // Its group has become durable, and before the next turn a write of pages fails.
    let next = shard.ctx.order.next();
    shard.ctx.order.publish(shard.ctx.id, next);
    shard.ctx.order.refresh();
    shard.message(
        ShardId::LEADER,
        super::Message::Failed(crate::base::error::Error::invalid("a write failed")),
    );
    assert_eq!(replies(shard), [true]);
}

/// If this fails, reads hang in a store that has failed while a part of a commit over shards was in
/// front: nothing votes for it any more, and no deadline is left.
#[test]
fn a_failure_ends_what_waits_for_a_part_in_front() {
    let mut bench = Bench::open(&options());
    let shard = &mut bench.all.shards[0];
    let age = (0, ShardId::new(1), 1);
    shard.ctx.now += 10_000_000;
    shard.note_vote(age, &super::message::Vote::Busy, super::txn::precedence::Behind::Callers);
    assert!(
        !shard.accepting() && shard.next_due().is_some(),
        "callers wait for the part, and somebody looks again"
    );
    shard.ctx.stop(crate::base::error::Error::invalid("a write failed"));
    shard.tell_failure();
    assert!(shard.accepting(), "reads go on");
}

/// If this fails, a store takes more than the memory that it was given: each frame's tables were on
/// top, an eighth of it.
#[test]
fn memory_is_frames_with_all_their_tables() {
    let version = size_of::<super::writeback::PageVersion>()
        + size_of::<super::writeback::AwaitingWatermark>();
    let pages = super::cache::table::ENTRY_BYTES + (super::cache::table::ENTRY_BYTES + version) / 4;
    let sum = pages
        + crate::engine::map::NODE_BYTES
        + crate::memory::ARENA_BLOCK_BYTES
        + crate::memory::EVICTION_BLOCK_BYTES;
    assert!(sum as u64 <= TABLE_BYTES_PER_FRAME, "{sum} bytes of tables for each frame");
    for (memory_mib, shards_count) in [(2, 1), (3, 1), (256, 1), (256, 8), (1 << 20, 64)] {
        let options = Options { memory_bytes: memory_mib << 20, ..Options::default() };
        let limits = options.limits(&Geometry::default(), shards_count).expect("it is legal");
        let all = u64::from(limits.memory_blocks) * (BLOCK as u64 + TABLE_BYTES_PER_FRAME);
        let given = (memory_mib << 20) / u64::from(shards_count);
        // The least that a shard can work with is that with frames alone.
        assert!(
            all <= given.max(SHARD_MEMORY_MIN + 512 * TABLE_BYTES_PER_FRAME),
            "{all} of {given}: {limits:?}"
        );
        assert!(all > given / 100 * 99, "{all} of {given}: {limits:?}");
    }
}

/// If this fails, a request that needed a map node long ago waits behind all later ones, if a young
/// request was the first to need its node.
#[test]
fn a_map_node_is_as_urgent_as_the_oldest_who_waits_for_it() {
    let mut bench = Bench::open(&options());
    let shard = &mut bench.all.shards[0];
    let node =
        |prefix| NodeKey { vshard: VShard::new(0), volume: VolumeId::new(1), level: 0, prefix };
    let mut want = |prefix, age| {
        let idx = shard.cache.table.entry(key(1000 + age));
        shard.cache.table.pages[idx].asked = age;
        shard.want_node(node(prefix), Child::default(), NodeWaiter::Page(idx));
    };
    [(1, 5), (2, 4), (1, 3), (2, 6)].into_iter().for_each(|(prefix, age)| want(prefix, age));
    let order: Vec<(u64, NodeKey)> =
        shard.cache.wanted.nodes.iter().map(|(age, wanted)| (*age, wanted.key)).collect();
    assert_eq!(order, [(3, node(1)), (4, node(2))]);
}
