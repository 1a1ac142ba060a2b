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
