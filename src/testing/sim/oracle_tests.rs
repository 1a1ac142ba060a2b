//! The judge must condemn: these tests tell it each lie that a store could tell.

use super::model::page_bytes;
use super::oracle::{Oracle, Tolerance};
use crate::base::error::{Error, ErrorKind};
use crate::base::{BLOCK, Lsn, PageId, PageKey, ShardId, ShardMap, VolumeId};
use crate::engine::{Change, Commit, PageRef, Request, Response, Token};
use crate::memory::Arena;
use smallvec::smallvec;

const P: PageKey = PageKey::new(VolumeId::new(1), PageId::new(7));
const Q: PageKey = PageKey::new(VolumeId::new(1), PageId::new(8));
const R: PageKey = PageKey::new(VolumeId::new(1), PageId::new(512));

struct Court {
    oracle: Oracle,
    arena: Arena,
    token: u64,
}

fn lsn(n: u64) -> Lsn {
    Lsn::new(n)
}

impl Court {
    /// A judge that has seen P written by LSN 1 (durable) and by LSN 2 (buffered), with tags 1 and
    /// 2.
    fn new() -> Self {
        let tolerance =
            Tolerance { commit_bytes_max: 1 << 20, read_pages_max: 8, ..Tolerance::default() };
        let mut court =
            Court { oracle: Oracle::new(tolerance), arena: Arena::new(64).unwrap(), token: 0 };
        for (n, durable) in [(1, true), (2, false)] {
            let token = court.put(n, Vec::new(), durable);
            court.oracle.on_allocated(token, lsn(n)).unwrap();
            court.oracle.on_reply(token, &Ok(Response::Committed(lsn(n)))).unwrap();
        }
        court
    }

    /// The same for two shards: P belongs to shard 0 and R to shard 1.
    fn of_two() -> Self {
        let mut court = Court::new();
        court.oracle.shard_map(ShardMap::new(8, 2));
        let owner = |key: PageKey| ShardMap::new(8, 2).shard_of(key);
        assert_ne!(owner(P), owner(R));
        court
    }

    fn ask(&mut self, request: Request) -> Token {
        let shard = match &request {
            Request::Commit(commit) if !commit.changes.is_empty() => {
                ShardMap::new(8, 2).shard_of(commit.changes[0].0)
            }
            _ => ShardId::new(0),
        };
        self.token += 1;
        self.oracle.on_request(Token(self.token), &request, shard, 0);
        Token(self.token)
    }

    /// A commit over both shards that has its LSN; its owner is the shard of P, or of R if `other`.
    fn spread(&mut self, n: u64, other: bool) -> Token {
        let mut changes =
            vec![(P, Change::Put(page_bytes(P, n))), (R, Change::Put(page_bytes(R, n)))];
        if other {
            changes.reverse();
        }
        let token =
            self.ask(Request::Commit(Commit { reads: Vec::new(), changes, durable: false }));
        self.oracle.on_allocated(token, lsn(n)).unwrap();
        token
    }

    fn acknowledge(&mut self, token: Token, n: u64) {
        self.oracle.on_reply(token, &Ok(Response::Committed(lsn(n)))).unwrap();
    }

    fn put(&mut self, tag: u64, reads: Vec<(PageKey, Lsn)>, durable: bool) -> Token {
        let changes = vec![(P, Change::Put(page_bytes(P, tag)))];
        self.ask(Request::Commit(Commit { reads, changes, durable }))
    }

    fn page(&mut self, at: u64, tag: u64) -> PageRef {
        let mut frame = self.arena.alloc(0).unwrap();
        frame.try_mut().unwrap().copy_from_slice(&page_bytes(P, tag));
        PageRef::new(Some(frame.pin()), lsn(at))
    }

    /// Whether it accepts this as the content of P.
    fn reads(&mut self, page: PageRef) -> bool {
        let token = self.ask(Request::Read(smallvec![P]));
        self.oracle.on_reply(token, &Ok(Response::Pages(smallvec![page]))).is_ok()
    }

    fn recovers(&mut self, recovered_lsn: u64, page: PageRef) -> bool {
        self.oracle.judge_state(lsn(recovered_lsn), false, &[(P, page)]).is_ok()
    }
}

fn no() -> Error {
    Error::new(ErrorKind::Conflict, "a conflict")
}

/// Lost, torn, invented and foreign pages after a crash.
#[test]
fn a_state_that_is_no_prefix_is_condemned() {
    let mut court = Court::new();
    let (old, new, mixed) = (court.page(1, 1), court.page(2, 2), court.page(2, 1));
    assert!(court.recovers(1, old.clone()) && court.recovers(2, new.clone()));
    assert!(!court.recovers(2, old.clone()), "a commit within the cut is missing");
    assert!(!court.recovers(1, new), "a commit above the cut is there");
    assert!(!court.recovers(2, mixed), "old bytes under a new LSN");
    assert!(!court.recovers(0, PageRef::new(None, Lsn::ZERO)), "an acknowledged commit is gone");
    assert!(!court.recovers(99, old), "recovered beyond everything that was allocated");
}

/// Plain reads may return any version that was current since they were requested, and no other.
#[test]
fn stale_foreign_and_mislabelled_reads_are_condemned() {
    let mut court = Court::new();
    let pages =
        [court.page(2, 2), court.page(1, 1), court.page(2, 1), court.page(1, 2), court.page(2, 9)];
    let right: Vec<bool> = pages.into_iter().map(|page| court.reads(page)).collect();
    assert_eq!(right, [true, false, false, false, false]);
    assert!(!court.reads(PageRef::new(None, Lsn::ZERO)), "a page that is there is not absent");
    let token = court.ask(Request::Read(smallvec![P]));
    let commit = court.put(3, Vec::new(), true);
    court.oracle.on_allocated(commit, lsn(3)).unwrap();
    let between = court.page(2, 2);
    court.oracle.on_reply(token, &Ok(Response::Pages(smallvec![between]))).unwrap();
}

/// A client that reads a page as freed must be able to wait until that is durable.
#[test]
fn a_free_that_is_not_durable_and_not_told_is_condemned() {
    let mut court = Court::new();
    let free = court
        .ask(Request::Commit(Commit { changes: vec![(P, Change::Free)], ..Commit::default() }));
    court.oracle.on_allocated(free, lsn(3)).unwrap();
    let absent = |at| PageRef::new(None, lsn(at));
    let right: Vec<bool> = [0, 2, 3, 4].into_iter().map(|at| court.reads(absent(at))).collect();
    assert_eq!(right, [false, false, true, false]);
    court.oracle.on_watermark(lsn(3), lsn(3)).unwrap();
    assert!(court.reads(absent(0)) && court.reads(absent(3)), "durable: nobody has to wait");
    let again = court
        .ask(Request::Commit(Commit { changes: vec![(P, Change::Free)], ..Commit::default() }));
    court.oracle.on_allocated(again, lsn(4)).unwrap();
    assert!(
        court.reads(absent(0)) && !court.reads(absent(4)),
        "it was absent before, and nothing has changed"
    );
}

/// Transactions on changed reads, and conflicts out of thin air.
#[test]
fn wrong_commits_and_wrong_conflicts_are_condemned() {
    let mut court = Court::new();
    let stale = court.put(3, vec![(P, lsn(1))], true);
    assert!(court.oracle.on_allocated(stale, lsn(3)).unwrap_err().contains("it read"));
    let mut court = Court::new();
    let stale = court.put(3, vec![(P, lsn(1))], true);
    court.oracle.on_reply(stale, &Err(no())).unwrap();
    let fresh = court.put(3, vec![(P, lsn(2)), (Q, Lsn::ZERO)], true);
    assert!(court.oracle.on_reply(fresh, &Err(no())).is_err(), "nothing has changed");
    let reader = |reads| Request::Commit(Commit { reads, changes: Vec::new(), durable: true });
    let token = court.ask(reader(vec![(P, lsn(2))]));
    court.oracle.on_reply(token, &Ok(Response::Committed(lsn(2)))).unwrap();
    assert_eq!(
        court.oracle.durable(),
        lsn(2),
        "the answer to a reader says that what it read is durable"
    );
    let token = court.ask(reader(vec![(P, lsn(1))]));
    assert!(court.oracle.on_reply(token, &Ok(Response::Committed(lsn(1)))).is_err());
}

/// LSNs used twice, allocated twice, out of order, or by no request; after a crash too.
#[test]
fn lsns_that_are_not_new_are_condemned() {
    let mut court = Court::new();
    let token = court.put(3, Vec::new(), true);
    assert!(court.oracle.on_allocated(token, lsn(2)).is_err());
    court.oracle.on_allocated(token, lsn(3)).unwrap();
    assert!(
        court.oracle.on_allocated(token, lsn(4)).is_err()
            && court.oracle.on_allocated(Token(99), lsn(5)).is_err()
    );
    court.oracle.on_crash();
    court.oracle.restart_at(lsn(1), lsn(1));
    let token = court.put(4, Vec::new(), true);
    assert!(
        court.oracle.on_allocated(token, lsn(3)).is_err(),
        "allocated before the crash, and dropped"
    );
}

/// Answers that promise too much or the wrong thing, and errors without a reason.
#[test]
fn false_answers_are_condemned() {
    type Case = (Request, Result<Response, Error>);
    let error = |kind| Err(Error::new(kind, "an error"));
    let put = || Request::Commit(Commit { changes: vec![(P, Change::Free)], ..Commit::default() });
    let cases: Vec<Case> = vec![
        (Request::Flush, Ok(Response::Flushed(lsn(1)))),
        (Request::Flush, Ok(Response::Durable)),
        (put(), Ok(Response::Committed(lsn(3)))),
        (put(), error(ErrorKind::Io)),
        (put(), error(ErrorKind::Full)),
        (put(), error(ErrorKind::Closed)),
        (put(), error(ErrorKind::OutcomeUnknown)),
        (put(), error(ErrorKind::Invalid)),
        (put(), error(ErrorKind::TooLarge)),
        (Request::Read(smallvec![P]), error(ErrorKind::Corrupt)),
        (Request::Read(smallvec![P]), Ok(Response::Pages(smallvec![]))),
    ];
    for (request, answer) in cases {
        let text = format!("{request:?} -> {answer:?}");
        let mut court = Court::new();
        let token = court.ask(request);
        assert!(court.oracle.on_reply(token, &answer).is_err(), "{text}");
        assert!(court.oracle.on_reply(token, &answer).is_err(), "a second answer");
    }
    let mut court = Court::new();
    let token = court.put(3, Vec::new(), true);
    court.oracle.on_allocated(token, lsn(3)).unwrap();
    assert!(
        court.oracle.on_reply(token, &Err(no())).is_err(),
        "refused after its LSN was allocated"
    );
    let token = court.ask(Request::Flush);
    court.oracle.on_reply(token, &Ok(Response::Flushed(lsn(3)))).unwrap();
    let lost = PageRef::new(None, Lsn::ZERO);
    assert!(!court.recovers(2, lost) && BLOCK == 4096, "flushed, and gone");
}

/// A commit over several shards need not be visible before it is acknowledged; but it must be at
/// its owner, for readers that have already seen it, and afterwards.
#[test]
fn what_is_seen_of_a_commit_over_shards_never_goes_back() {
    let mut court = Court::of_two();
    let token = court.spread(3, true);
    let [old, new] = [(2, 2), (3, 3)].map(|(at, tag)| court.page(at, tag));
    assert!(court.reads(old.clone()), "allocated at the other shard, on its way to that of P");
    assert!(court.reads(new.clone()) && !court.reads(old.clone()), "seen, and then not any more");
    let mut court = Court::of_two();
    let token_at_home = court.spread(3, false);
    assert!(!court.reads(old.clone()), "allocated at the shard of P itself");
    court.acknowledge(token_at_home, 3);
    let mut court = Court::of_two();
    assert_eq!(court.spread(3, true), token);
    court.acknowledge(token, 3);
    assert!(!court.reads(old.clone()) && court.reads(new), "acknowledged");
    let mut court = Court::of_two();
    let token = court.spread(3, true);
    let alone = court.put(4, Vec::new(), false);
    court.oracle.on_allocated(alone, lsn(4)).unwrap();
    assert!(!court.reads(old), "a later commit of the shard itself is there");
    court.acknowledge(token, 3);
}

/// A hold excuses a conflict only while it can exist, and only for commits that it excludes.
#[test]
fn conflicts_are_excused_only_by_holds_that_can_be_met() {
    let transact = |court: &mut Court, reads| {
        let changes = vec![(Q, Change::Free)];
        court.ask(Request::Commit(Commit { reads, changes, durable: false }))
    };
    let mut court = Court::of_two();
    let spread = court.ask(Request::Commit(Commit {
        reads: vec![(P, lsn(2))],
        changes: vec![(R, Change::Free)],
        durable: false,
    }));
    let reader = transact(&mut court, vec![(P, lsn(2))]);
    assert!(
        court.oracle.on_reply(reader, &Err(no())).is_err(),
        "readers of one page do not exclude each other"
    );
    let writer = court.put(9, Vec::new(), false);
    assert!(court.oracle.on_reply(writer, &Err(no())).is_err(), "who only writes waits");
    let during = transact(&mut court, vec![(R, Lsn::ZERO)]);
    court.oracle.on_reply(spread, &Err(Error::new(ErrorKind::Busy, "busy"))).unwrap();
    let lingering = transact(&mut court, vec![(R, Lsn::ZERO)]);
    court.oracle.on_let_go(spread);
    for token in [during, lingering] {
        court.oracle.on_reply(token, &Err(no())).unwrap();
        court.oracle.on_let_go(token);
    }
    let after = transact(&mut court, vec![(R, Lsn::ZERO)]);
    assert!(court.oracle.on_reply(after, &Err(no())).is_err(), "nothing is held any more");
    assert_eq!(court.oracle.counters().conflicts_held, 5);
}

/// Readers of the watermark take everything below it for durable.
#[test]
fn a_watermark_is_a_promise() {
    let mut court = Court::new();
    let (old, lost) = (court.page(1, 1), PageRef::new(None, Lsn::ZERO));
    assert!(court.recovers(1, old.clone()) && !court.recovers(0, lost));
    court.oracle.on_watermark(lsn(2), lsn(2)).unwrap();
    assert!(!court.recovers(1, old), "the watermark had reached 2");
    assert!(court.oracle.on_watermark(lsn(1), lsn(1)).is_err(), "it fell");
}
