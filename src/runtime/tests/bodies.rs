//! Tests that requests in flight are bounded by the bytes that they carry, not only by their
//! number.
//!
//! If these fail, callers that give up on a store with a slow device fill the process's memory with
//! their requests, or a large commit waits for ever behind others.

use super::*;
use crate::base::{BLOCK, PageId, PageKey, VolumeId};
use crate::engine::Change;
use bytes::Bytes;
use std::sync::atomic::{AtomicU64, Ordering};

/// Counts the bytes of request bodies that still exist.
#[derive(Clone, Default)]
struct Held(Arc<AtomicU64>);

struct Body(Vec<u8>, Held);

impl AsRef<[u8]> for Body {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Drop for Body {
    fn drop(&mut self) {
        self.1.0.fetch_sub(self.0.len() as u64, Ordering::SeqCst);
    }
}

impl Held {
    /// A commit of `pages` pages of 4 KiB.
    fn commit(&self, pages: u64) -> Request {
        let change = |page| {
            let body = Body(vec![7; BLOCK], self.clone());
            self.0.fetch_add(BLOCK as u64, Ordering::SeqCst);
            (
                PageKey::new(VolumeId::new(1), PageId::new(page)),
                Change::Put(Bytes::from_owner(body)),
            )
        };
        Request::Commit(Commit {
            reads: vec![],
            changes: (0..pages).map(change).collect(),
            durable: true,
        })
    }

    fn bytes(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }
}

/// The smallest limit on a store's requests: 256 KiB for each shard.
const SHARD_BYTES: u64 = 256 << 10;

fn with_little_memory(shards: u16, requests_max: usize, test: impl Fn(Runtime)) {
    for driver in drivers() {
        let dir = tempfile::tempdir().expect("a directory");
        let memory_bytes = u64::from(shards) * (2 << 20);
        let options = Options {
            shards: Some(shards),
            driver,
            requests_max,
            memory_bytes,
            ..Options::default()
        };
        test(start(&dir, options, toys).expect("toys open"));
    }
}

/// Stops the thread of a shard until the sender is dropped.
fn stop(runtime: &Runtime, shard: ShardId) -> crossbeam::channel::Sender<()> {
    let (go, wait) = crossbeam::channel::bounded::<()>(0);
    let (tell, stopped) = crossbeam::channel::bounded(1);
    let task = runtime.handle().spawn_on(shard, move |_| async move {
        tell.send(()).expect("it is waited for");
        let _ = wait.recv();
    });
    drop(task.expect("it starts"));
    stopped.recv().expect("the task runs");
    go
}

/// Waits until nothing is in flight; if something stays in flight, it fails.
fn settle(runtime: &Runtime, held: &Held) {
    let shared = runtime.handle().shared_for_tests();
    let all = || {
        std::iter::once(&shared.request_permits)
            .chain(shared.mailboxes.iter().map(|mailbox| &mailbox.byte_permits))
    };
    let since = std::time::Instant::now();
    while all().any(|places| places.in_use() != (0, 0)) || held.bytes() != 0 {
        let under_way: Vec<_> = all().map(|places| places.in_use()).collect();
        assert!(
            since.elapsed() < Duration::from_secs(60),
            "{under_way:?}, {} bytes held",
            held.bytes()
        );
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// 4,096 requests of the largest size are many times the memory, and all of them used to be
/// accepted from callers that gave up.
#[test]
fn commits_of_callers_that_give_up_take_a_sixteenth_of_the_memory() {
    with_little_memory(2, 4096, |runtime| {
        let held = Held::default();
        let go = stop(&runtime, ShardId::new(0));
        for n in 0..2000 {
            let pages = 1 + n % 16;
            let mut asked =
                Box::pin(runtime.handle().submit_to(ShardId::new(0), held.commit(pages)));
            let taken = block_on(poll_once(&mut asked));
            drop((taken, asked));
            let most = SHARD_BYTES + 16 * (BLOCK as u64 + 64);
            assert!(
                held.bytes() <= most,
                "{} bytes of requests that nobody waits for",
                held.bytes()
            );
        }
        assert!(held.bytes() >= SHARD_BYTES / 2, "the bound is used: {}", held.bytes());
        // Other shards have limits of their own.
        assert!(
            matches!(ask(&runtime, 1, held.commit(100)), Ok(Response::Committed(_))),
            "one shard holds up another"
        );
        // A request without bytes still gets through, to this shard and to others.
        let reply = ask(&runtime, 1, Request::WaitDurable(Lsn::new(1)));
        assert!(matches!(reply, Ok(Response::Flushed(_))), "{reply:?}");
        let mut light = Box::pin(
            runtime.handle().submit_to(ShardId::new(0), Request::WaitDurable(Lsn::new(1))),
        );
        assert!(matches!(block_on(poll_once(&mut light)), Some(Ok(_))), "it needs a place only");
        drop(go);
        settle(&runtime, &held);
        assert!(ask(&runtime, 0, held.commit(1)).is_ok(), "there is room again");
        close(&runtime);
    });
}

/// The limit must also hold for tasks on the shard's own thread whose replies are dropped.
#[test]
fn commits_that_tasks_give_up_take_a_sixteenth_of_the_memory() {
    with_little_memory(1, 4096, |runtime| {
        let held = Held::default();
        let theirs = held.clone();
        let task = runtime.handle().spawn_on(ShardId::new(0), move |local| async move {
            let mut largest = 0;
            for n in 0..2000 {
                drop(local.call(theirs.commit(1 + n % 16)));
                largest = largest.max(theirs.bytes());
            }
            // Each call that is awaited is answered, in order, and so is one that is larger than
            // the whole limit.
            let calls: Vec<_> = (0..200)
                .map(|n| local.call(theirs.commit(if n == 100 { 100 } else { 1 })))
                .collect();
            assert!(matches!(
                local.call(Request::WaitDurable(Lsn::new(1))).await,
                Ok(Response::Flushed(_))
            ));
            let mut lsns = Vec::new();
            for call in calls {
                let Ok(Response::Committed(lsn)) = call.await else {
                    panic!("a call is not answered")
                };
                lsns.push(lsn);
            }
            assert!(lsns.is_sorted());
            largest
        });
        let largest = block_on(task.expect("it starts")).expect("it ends");
        let most = SHARD_BYTES + 16 * BLOCK as u64;
        assert!(largest <= most, "{largest} bytes of requests that nobody waits for");
        settle(&runtime, &held);
        close(&runtime);
    });
}

/// When a shard ends, deferred requests must be answered, too.
#[test]
fn the_end_of_a_shard_answers_what_was_kept_back() {
    with_little_memory(1, 64, |runtime| {
        let (held, (tell, told)) = (Held::default(), crossbeam::channel::bounded(1));
        let (theirs, go) = (held.clone(), tell.clone());
        let task = runtime.handle().spawn_on(ShardId::new(0), move |local| async move {
            let calls: Vec<_> = (0..8).map(|_| local.call(theirs.commit(100))).collect();
            go.send(Vec::new()).expect("it is waited for");
            let mut kinds = Vec::new();
            for call in calls {
                // An endless task would see these results; the planted panic comes first.
                kinds.push(call.await.map(drop).map_err(|error| error.kind()));
            }
            tell.send(kinds).expect("it is waited for");
        });
        drop(task.expect("it starts"));
        told.recv().expect("the task runs");
        assert!(ask(&runtime, 0, Request::Stats).is_err(), "the shard has panicked");
        for kind in told.recv().expect("the task ends") {
            let known = [Ok(()), Err(ErrorKind::OutcomeUnknown), Err(ErrorKind::Closed)];
            assert!(known.contains(&kind), "{kind:?}");
        }
        block_on(runtime.handle().ended());
        drop(runtime);
        assert_eq!(held.bytes(), 0, "nothing is kept of requests that did not begin");
    });
}

/// A large commit gets its turn, however many small ones come after it, and so does one of any
/// size.
#[test]
fn a_commit_of_any_size_goes_in_its_turn() {
    with_little_memory(2, 64, |runtime| {
        let held = Held::default();
        let go = stop(&runtime, ShardId::new(0));
        let submit =
            |pages| Box::pin(runtime.handle().submit_to(ShardId::new(0), held.commit(pages)));
        let mut first = submit(1000);
        assert!(
            matches!(block_on(poll_once(&mut first)), Some(Ok(_))),
            "nothing else is under way"
        );
        let mut waiting: Vec<_> = [1, 500, 1, 1].map(submit).into();
        assert!(
            waiting.iter_mut().all(|one| block_on(poll_once(one)).is_none()),
            "too much is under way"
        );
        // A caller that gives up blocks no other.
        drop(waiting.remove(0));
        drop(go);
        let mut lsns = Vec::new();
        for one in waiting {
            let Ok(Response::Committed(lsn)) = block_on(async { one.await?.await }) else {
                panic!("not answered")
            };
            lsns.push(lsn);
        }
        assert!(lsns.is_sorted(), "first come, first served: {lsns:?}");
        settle(&runtime, &held);
        close(&runtime);
    });
}

/// Lost wake-ups show as hangs, hence few permits, few bytes, callers of both kinds, and some that
/// give up in every state.
#[test]
fn every_request_is_answered_however_places_and_bytes_run_out() {
    with_little_memory(2, 3, |runtime| {
        let held = Held::default();
        std::thread::scope(|scope| {
            for thread in 0..6u64 {
                let (runtime, held) = (&runtime, &held);
                scope.spawn(move || {
                    for i in 0..150 {
                        let n = thread * 1000 + i;
                        let request = match n % 3 {
                            0 => Request::WaitDurable(Lsn::new(n)),
                            // 1 to 200 pages, which can be more than there is room for.
                            _ => held.commit(1 + n * 37 % 200 * (n % 2)),
                        };
                        let mut asked = Box::pin(
                            runtime.handle().submit_to(ShardId::new((n % 2) as u16), request),
                        );
                        match n % 5 {
                            0 => drop(block_on(poll_once(&mut asked))),
                            _ => {
                                // Too many callers may wait, but each must get an answer.
                                if let Err(error) = block_on(async { asked.await?.await }) {
                                    assert_eq!(error.kind(), ErrorKind::Busy);
                                }
                            }
                        }
                    }
                });
            }
        });
        settle(&runtime, &held);
        close(&runtime);
    });
}
