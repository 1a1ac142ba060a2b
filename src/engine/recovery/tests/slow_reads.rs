//! Reads that take so long that the store continues without them: commits, checkpoints and
//! evictions come in between.
//!
//! If these fail, a page that was acknowledged as durable, and checkpointed, is gone; or `verify`
//! is silent about it; or a client that reads a page as freed can't wait until that is durable.

use super::*;
use crate::engine::PageRange;
use crate::ops::verify::verify_disk;
use crate::testing::sim::Canary;
use crate::testing::sim::canary::{plant, take_fired};
use crate::testing::sim::disk::Latency;

/// So long that nothing arrives before time is advanced.
const HELD_BACK_US: Micros = 1 << 40;
/// Pages of another volume, each in a leaf of its own: they take all memory when they are read.
const OTHERS: u64 = 1_500;

fn far(n: u64) -> PageKey {
    PageKey::new(VolumeId::new(2), PageId::new(n * 64))
}

fn one_tree() -> Options {
    let geometry = crate::Geometry { vshards_count: 1, ..options().geometry };
    Options { geometry, memory_bytes: 2 << 20, ..options() }
}

impl Driver {
    fn laps(&mut self, count: u32) {
        for _ in 0..count {
            self.now += 50;
            self.all.poll_once(&mut self.disk, self.now);
            self.disk.advance_to(self.now);
        }
    }

    /// Makes a request whose reads at the device are held back.
    fn begin_slowly(&mut self, request: Request) -> Token {
        let slow = (HELD_BACK_US, HELD_BACK_US);
        self.disk.set_latency(Latency { read: slow, ..Latency::default() });
        let token = self.begin(request);
        self.laps(20);
        self.disk.set_latency(Latency::default());
        token
    }

    fn nodes_overtaken(&mut self) -> u64 {
        match self.ask(Request::Stats) {
            Ok(Response::Stats(stats)) => stats.nodes_overtaken,
            other => panic!("{other:?}"),
        }
    }

    fn checkpoint(&mut self) {
        let answer = self.ask(Request::Checkpoint);
        assert!(matches!(answer, Ok(Response::Checkpointed(_))), "{answer:?}");
    }
}

/// A request needs the only leaf of a tree, which is read slowly. A commit to another leaf gives
/// the tree a new top, a checkpoint writes that, readers of other pages need the memory; then the
/// leaf arrives, and a page in it is changed. Returns the closed store, and how many nodes were
/// overtaken.
fn grow_under(request: Request) -> (SimDisk, u64) {
    let (mut d, _) = Driver::open_with(SimDisk::new(1), &one_tree());
    d.commit(vec![(key(0), put(1))]);
    for n in 0..OTHERS {
        d.commit(vec![(far(n), put(n as u8))]);
    }
    assert!(matches!(d.ask(Request::Close), Ok(Response::Closed)));
    let (mut d, _) = Driver::open_with(d.disk, &one_tree());
    d.audits = !Canary::OrphanInserted.is_planted();
    let slow = d.begin_slowly(request);
    d.commit(vec![(key(100), put(100))]);
    d.checkpoint();
    for n in 0..OTHERS {
        assert_eq!(d.read(far(n))[0], n as u8);
    }
    assert!(d.all.replies.is_empty(), "the leaf has not come");
    d.now += HELD_BACK_US;
    let (token, answer) = d.answer();
    assert!(token == slow && answer.is_ok(), "{answer:?}");
    d.commit(vec![(key(0), put(2))]);
    d.checkpoint();
    let overtaken = d.nodes_overtaken();
    assert!(matches!(d.ask(Request::Close), Ok(Response::Closed)));
    (d.disk, overtaken)
}

/// The request that needs the node: a read, a commit or a walk.
fn requests() -> [Request; 3] {
    let (first, last) = (PageId::new(0), PageId::new(50));
    [
        Request::Read(smallvec::smallvec![key(0)]),
        Request::Commit(Commit {
            changes: vec![(key(1), put(7))],
            durable: true,
            ..Commit::default()
        }),
        Request::Allocated(PageRange { volume: key(0).volume, first, last, ranges_max: 10 }),
    ]
}

#[test]
fn a_tree_that_grows_while_its_top_is_read_loses_nothing() {
    for request in requests() {
        let what = format!("{request:?}");
        let (mut disk, overtaken) = grow_under(request);
        let report = verify_disk(&mut disk).expect("a store");
        let (mut d, _) = Driver::open_with(disk, &one_tree());
        assert_eq!([d.read(key(0))[0], d.read(key(100))[0]], [2, 100], "{what}");
        assert!(report.is_whole(), "{what}: {:?}", report.damaged);
        assert_eq!(overtaken, 1, "{what}: the leaf came too late");
    }
}

/// Checks that `verify` names a page that was lost in this way.
#[test]
fn verify_names_the_page_that_no_root_reaches() {
    let [reader, commit, _] = requests();
    for request in [reader, commit] {
        take_fired();
        plant(Some(Canary::OrphanInserted));
        let (mut disk, _) = grow_under(request);
        plant(None);
        assert!(take_fired() > 0, "the leaf is taken for the top");
        let report = verify_disk(&mut disk).expect("a store");
        println!("{report}\n{:?}", report.damaged);
        let named = |page: &str| report.damaged.iter().filter(|d| d.affects.contains(page)).count();
        assert_eq!(named("p100 of volume number 1"), 1, "the page that is gone is named once");
        assert_eq!(named(" of volume number 2"), 0, "pages that are there are not named");
        assert!(
            named("p0 of volume number 1") == 0 && named("p1 of") == 0,
            "nor is a page that was overwritten"
        );
        let (mut d, _) = Driver::open_with(disk, &one_tree());
        assert_eq!(d.read(key(100))[0], 0, "it is gone");
    }
}

/// A page that is read as absent names the commit that freed it as long as that is not durable, so
/// that its reader can wait for it. A transaction that has read it is valid all the same.
#[test]
fn a_free_that_is_not_durable_is_told_to_readers() {
    let (mut d, _) = Driver::open(SimDisk::new(1));
    d.commit((0..3).map(|n| (key(n), put(1))).collect());
    d.disk.set_latency(Latency { flush: (HELD_BACK_US, HELD_BACK_US), ..Latency::default() });
    let free = Commit { changes: vec![(key(1), Change::Free)], ..Commit::default() };
    let Ok(Response::Committed(freed)) = d.ask(Request::Commit(free)) else {
        panic!("it is acknowledged when visible")
    };
    let volume = key(0).volume;
    let whole = PageRange { volume, first: PageId::new(0), last: PageId::new(9), ranges_max: 10 };
    let read = |d: &mut Driver| match d.ask(Request::Read(smallvec::smallvec![key(1), key(7)])) {
        Ok(Response::Pages(pages)) => (pages[0].lsn(), pages[1].lsn(), pages[0].version()),
        other => panic!("{other:?}"),
    };
    let walk = |d: &mut Driver| match d.ask(Request::Allocated(whole)) {
        Ok(Response::Allocated { ranges, lsn, .. }) => (ranges.len(), lsn),
        other => panic!("{other:?}"),
    };
    assert_eq!(read(&mut d), (freed, Lsn::ZERO, Lsn::ZERO));
    assert_eq!(walk(&mut d), (2, freed), "the page that is missing is a change like any other");
    let wait = d.begin(Request::WaitDurable(freed));
    d.laps(1000);
    assert!(d.all.replies.is_empty(), "it is not durable");
    d.disk.set_latency(Latency::default());
    d.now += 2 * HELD_BACK_US;
    let (token, answer) = d.answer();
    assert!(token == wait && matches!(answer, Ok(Response::Durable)), "{answer:?}");
    let reads = vec![(key(1), Lsn::ZERO), (key(7), Lsn::ZERO)];
    let transaction = Commit { reads, changes: vec![(key(2), put(9))], durable: true };
    assert!(
        matches!(d.ask(Request::Commit(transaction)), Ok(Response::Committed(_))),
        "it read what is there"
    );
    assert_eq!(
        (read(&mut d), walk(&mut d)),
        ((Lsn::ZERO, Lsn::ZERO, Lsn::ZERO), (2, Lsn::ZERO)),
        "durable"
    );
}
