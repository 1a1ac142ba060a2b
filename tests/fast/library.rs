//! The library where people embed it: in any runtime, on plain threads, in an event loop of their
//! own, and dropped half-way.

// Real time passes.
#![allow(clippy::disallowed_methods)]

use corepage::blocking::Wait;
use corepage::queue::{Completion, Op, Output, Queue};
use corepage::{Change, Durability, ErrorKind, Options, PageId, Result, Store, Volume};
use futures_lite::future::{block_on, poll_once};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Waker};
use std::time::{Duration, Instant};

fn options() -> Options {
    Options { shards: Some(2), memory_bytes: 32 << 20, ..Options::default() }
}

fn open(options: Options) -> (tempfile::TempDir, Store, Volume) {
    let dir = tempfile::tempdir().unwrap();
    let store = block_on(Store::open(dir.path(), options)).unwrap();
    let volume = block_on(store.create_volume("v", 1 << 30)).unwrap();
    (dir, store, volume)
}

fn id(n: u64) -> PageId {
    PageId::new(n)
}

fn page(fill: u8) -> Vec<u8> {
    vec![fill; 4096]
}

/// One of each operation, on pages of both shards; what it needs it makes itself.
async fn one_of_each(dir: std::path::PathBuf) -> Result<()> {
    let store = Store::open(&dir, options()).await?;
    let disk = store.create_volume("disk", 64 << 20).await?;
    for n in [0, 600, 1200, 1800] {
        disk.write_back(id(n), page(n as u8)).await?;
    }
    disk.patch(id(600), 5, &b"patch"[..]).await?;
    let mut txn = store.begin();
    let first = txn.read(&disk, id(600)).await?[5];
    txn.write(&disk, id(1), page(first))?;
    txn.free(&disk, id(1200))?;
    let lsn = txn.commit().await?;
    assert!(lsn <= store.durable_lsn());
    store.wait_durable(lsn).await?;
    let pages = disk.read_many(&[id(1), id(600), id(1200)]).await?;
    assert_eq!((pages[0][0], &pages[1][5..10], pages[2].is_absent()), (b'p', &b"patch"[..], true));
    let mut scan = disk.scan(id(0), id(u64::MAX));
    let mut seen = Vec::new();
    while let Some((page, _)) = scan.next().await? {
        seen.push(page.get());
    }
    assert_eq!(seen, [0, 1, 600, 1800]);
    drop((pages, scan));
    disk.free_range(id(0), id(600)).await?;
    assert_eq!(disk.allocated(id(0), id(u64::MAX), 10).await?.ranges, [(id(1800), id(1800))]);
    store.resize_volume("disk", 8 << 20).await?;
    store.flush().await?;
    store.checkpoint().await?;
    store.delete_volume("disk").await?;
    store.wait_freed().await?;
    store.close().await
}

#[test]
fn every_operation_works_from_every_runtime() {
    let dirs: Vec<_> = (0..5).map(|_| tempfile::tempdir().unwrap()).collect();
    let dir = |n: usize| dirs[n].path().join("store");
    let many = tokio::runtime::Builder::new_multi_thread().worker_threads(2).build().unwrap();
    many.block_on(async { tokio::spawn(one_of_each(dir(0))).await.unwrap() }).unwrap();
    tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap()
        .block_on(one_of_each(dir(1)))
        .unwrap();
    smol::block_on(smol::spawn(one_of_each(dir(2)))).unwrap();
    let (at, executor) = (dir(3), glommio::LocalExecutorBuilder::default());
    executor.spawn(move || async move { one_of_each(at).await }).unwrap().join().unwrap().unwrap();
    block_on(one_of_each(dir(4))).unwrap();
}

#[test]
fn blocking_calls_work_on_threads_and_are_refused_where_they_would_wait_for_themselves() {
    let (_dir, store, volume) = open(options());
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let (store, disk) = (store.clone(), volume.clone());
            scope.spawn(move || {
                for n in 0..50 {
                    loop {
                        let mut txn = store.begin();
                        let count = u64::from_le_bytes(
                            txn.read(&disk, id(0)).wait().unwrap()[..8].try_into().unwrap(),
                        );
                        txn.patch(&disk, id(0), 0, (count + 1).to_le_bytes().to_vec()).unwrap();
                        txn.write(&disk, id(1 + thread * 600 + n), page(n as u8)).unwrap();
                        match txn.commit().wait() {
                            Err(error) if error.kind() == ErrorKind::Conflict => {}
                            other => {
                                other.unwrap();
                                break;
                            }
                        }
                    }
                }
            });
        }
    });
    assert_eq!(volume.read(id(0)).wait().unwrap()[..8], 200u64.to_le_bytes());
    let scanned: Result<Vec<_>> = volume.scan(id(1), id(u64::MAX)).blocking().collect();
    assert_eq!(scanned.unwrap().len(), 200);
    let disk = volume.clone();
    let refused =
        store.on_shard(0, move |_| async move { disk.read(id(0)).wait().map(drop) }).unwrap();
    let refused = block_on(refused).unwrap().unwrap_err();
    assert!(
        refused.kind() == ErrorKind::Invalid && refused.to_string().contains("await the call"),
        "{refused}"
    );
    store.close().wait().unwrap();
}

/// Whoever finds that a page was freed can wait until that is durable, however he found it: else a
/// crash brings back what he has taken for gone.
#[test]
fn readers_of_freed_pages_can_wait_until_the_free_is_durable() {
    let (_dir, store, disk) = open(options());
    let free = |n| {
        block_on(disk.write_many((0..4).map(|i| (id(n + i), page(1).into())).collect())).unwrap();
        block_on(disk.apply(vec![(id(n), Change::Free)], Durability::Buffered)).unwrap()
    };
    let waits = |seen, freed| {
        block_on(store.wait_durable(seen)).unwrap();
        assert!(store.durable_lsn() >= freed, "{seen} was waited for, and {freed} is not durable");
    };
    let mut queue = Queue::new(1).unwrap();
    for n in (0..60).map(|n| n * 600) {
        let freed = free(n);
        let read = block_on(disk.read(id(n))).unwrap();
        assert!(read.is_absent());
        waits(read.lsn(), freed);
        let freed = free(n);
        let found = block_on(disk.allocated(id(n), id(n + 9), 9)).unwrap();
        assert_eq!(found.ranges, [(id(n + 1), id(n + 3))]);
        waits(found.lsn, freed);
        let freed = free(n);
        let mut scan = disk.scan(id(n), id(n + 9));
        assert_eq!(block_on(scan.next()).unwrap().unwrap().0, id(n + 1));
        waits(scan.lsn(), freed);
        let freed = free(n);
        let mut done = Vec::new();
        queue.submit(n, Op::read(&disk, id(n))).unwrap();
        queue.wait(1, None, &mut done).unwrap();
        let Ok(Output::Pages(pages)) = &done[0].result else { panic!("{done:?}") };
        waits(pages[0].lsn(), freed);
        let (shard, freed, at) = (store.shard_of(&disk, id(n)), free(n), disk.clone());
        let task = store.on_shard(shard, move |handle| async move {
            let seen = at.on(&handle)?.read(id(n)).await?.lsn();
            handle.wait_durable(seen).await
        });
        block_on(task.unwrap()).unwrap().unwrap();
        assert!(store.durable_lsn() >= freed);
        // Such a read is valid, and so is what is made of it.
        let freed = free(n);
        let mut txn = store.begin();
        assert_eq!(block_on(txn.read(&disk, id(n))).unwrap()[..], page(0));
        txn.write(&disk, id(n + 5), page(2)).unwrap();
        assert!(block_on(txn.commit()).unwrap() > freed);
    }
    block_on(store.close()).unwrap();
}

fn readable(queue: &Queue, ms: i64) -> bool {
    let timeout = Timespec::try_from(Duration::from_millis(ms as u64)).unwrap();
    poll(&mut [PollFd::new(queue, PollFlags::IN)], Some(&timeout)).unwrap() == 1
}

#[test]
fn a_queue_gives_each_operation_one_completion_and_its_descriptor_says_when() {
    let (_dir, store, disk) = open(options());
    assert!(Queue::new(0).is_err());
    let mut queue = Queue::new(100).unwrap();
    let mut done: Vec<Completion> = Vec::new();
    assert!(!readable(&queue, 0), "nothing was asked");
    assert_eq!(
        queue.wait(5, None, &mut done).unwrap(),
        0,
        "it waits for nothing that is not there"
    );
    for round in 0..50u64 {
        let ops = (0..150).map(|n| (n, Op::write(&disk, id(n * 100), page(round as u8))));
        assert_eq!(queue.submit_batch(ops), 100, "the depth");
        let busy = queue.submit(1, Op::flush(&store)).unwrap_err();
        assert_eq!(busy.kind(), ErrorKind::Busy, "{busy}");
        while queue.in_flight() > 0 {
            let (before, min) = (done.len(), 1 + round as usize % 40);
            if round % 2 == 0 {
                // An event loop: the descriptor first, then what is there.
                assert!(
                    readable(&queue, 60_000),
                    "{} in flight, and the descriptor stays silent",
                    queue.in_flight()
                );
                queue.wait(0, None, &mut done).unwrap();
            } else {
                let some = queue.wait(min, None, &mut done).unwrap();
                assert!(some >= min || queue.in_flight() == 0, "{some} of {min}");
                assert_eq!(some, done.len() - before);
            }
        }
        let mut tags: Vec<u64> = done
            .drain(..)
            .map(|one| {
                assert!(
                    matches!(one.result, Ok(Output::Committed(lsn)) if lsn <= store.durable_lsn())
                );
                one.tag
            })
            .collect();
        tags.sort_unstable();
        assert_eq!(tags, (0..100).collect::<Vec<_>>());
    }
    let ops = [
        Op::flush(&store),
        Op::read(&disk, id(300)),
        Op::write(&disk, id(1), vec![1; 7]),
        Op::write_back(&disk, id(2), page(2)),
    ];
    assert_eq!(queue.submit_batch((0..).zip(ops)), 4);
    queue.wait(4, Some(Duration::from_secs(60)), &mut done).unwrap();
    done.sort_by_key(|one| one.tag);
    assert!(matches!(done[0].result, Ok(Output::Flushed(_))));
    assert!(matches!(&done[1].result, Ok(Output::Pages(pages)) if pages[0][0] == 49));
    assert_eq!(done[2].result.as_ref().unwrap_err().kind(), ErrorKind::Invalid);
    assert!(matches!(done[3].result, Ok(Output::Committed(_))));
    // Dropped at once: what was taken is done all the same.
    queue.submit(9, Op::write(&disk, id(70), page(70))).unwrap();
    drop(queue);
    comes_true(|| block_on(disk.read(id(70))).unwrap()[0] == 70);
    block_on(store.close()).unwrap();
}

#[track_caller]
fn comes_true(what: impl Fn() -> bool) {
    let begun = Instant::now();
    while !what() {
        assert!(begun.elapsed() < Duration::from_secs(60), "it never comes true");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Polls a future this many times, with a pause in between, and drops it; whether it was ready by
/// then.
fn polled<T>(mut future: Pin<Box<dyn Future<Output = T> + '_>>, times: usize) -> bool {
    let mut context = Context::from_waker(Waker::noop());
    for n in 0..times {
        if future.as_mut().poll(&mut context).is_ready() {
            return true;
        }
        if n % 3 == 2 {
            std::thread::sleep(Duration::from_micros(200));
        }
    }
    false
}

/// What was submitted by the first poll happens; what was never polled does not; and no place, pin
/// or lock is kept: there are only 64 places, and each is used many times.
#[test]
fn a_future_dropped_at_any_await_loses_nothing_submitted_and_leaks_nothing() {
    let (_dir, store, disk) = open(Options { requests_max: 64, ..options() });
    for n in 0..3000 {
        block_on(disk.write_back(id(n), page(1))).unwrap();
    }
    let mut drops = 0;
    for (n, polls) in (0..400u64).map(|n| (n, n as usize % 12)) {
        let fill = 2 + (n % 250) as u8;
        // Flushes that were dropped have ended when a later one has. Else a slow disk has them take
        // all places, and what is polled once waits for one: it was not submitted.
        for _shard in 0..2 {
            block_on(store.flush()).unwrap();
        }
        let ready = polled(Box::pin(disk.write(id(n), page(fill))), polls);
        drops += usize::from(!ready);
        match polls {
            0 => assert_eq!(
                block_on(disk.read(id(n))).unwrap()[0],
                1,
                "never polled, and yet written"
            ),
            _ => comes_true(|| block_on(disk.read(id(n))).unwrap()[0] == fill),
        }
        // Over both shards.
        let many = [n, 600 + n, 1200 + n].map(|at| (id(at), page(fill).into())).to_vec();
        polled(Box::pin(disk.write_many(many)), polls);
        if polls > 0 {
            comes_true(|| block_on(disk.read(id(1200 + n))).unwrap()[0] == fill);
            assert_eq!(block_on(disk.read(id(n))).unwrap()[0], fill, "a part of a commit");
        }
        let several: Vec<PageId> = (0..200).map(|at| id(at * 7)).collect();
        polled(Box::pin(disk.read(id(n))), polls);
        polled(Box::pin(disk.read_many(&several)), polls);
        polled(Box::pin(disk.allocated(id(0), id(1 << 40), 10)), polls);
        polled(Box::pin(store.flush()), polls);
        let mut scan = disk.scan(id(0), id(3000));
        polled(Box::pin(scan.next()), polls);
        drop(scan);
        let mut txn = store.begin();
        polled(Box::pin(txn.read(&disk, id(5))), polls);
        txn.patch(&disk, id(6), 0, vec![fill]).unwrap();
        polled(Box::pin(txn.commit()), polls);
    }
    assert!(drops > 100, "only {drops} futures were dropped half-way");
    for (n, polls) in (0..12u64).zip(0..) {
        let (name, size) = (format!("n{n}"), (1 + n) << 20);
        polled(Box::pin(store.create_volume(&name, size)), polls);
        polled(Box::pin(store.resize_volume("v", (2 << 30) + size)), polls);
        if polls > 0 {
            // It runs on, and the next one waits for it.
            comes_true(|| disk.bytes() == (2 << 30) + size);
        }
    }
    block_on(store.resize_volume("v", 100 * 4096)).unwrap();
    block_on(store.wait_freed()).unwrap();
    assert_eq!(
        block_on(disk.allocated(id(0), id(u64::MAX), 10)).unwrap().ranges,
        [(id(0), id(99))]
    );
    // All pins are there: half of what a handle may hold, at once.
    let half: Vec<PageId> = (0..(32 << 20) / 4096 / 8).map(|n| id(n % 100)).collect();
    assert_eq!(block_on(disk.read_many(&half)).unwrap().len(), half.len());
    assert!(half.len() == 1024);
    block_on(disk.apply(vec![(id(1), corepage::Change::Free)], Durability::Durable)).unwrap();
    block_on(store.close()).unwrap();
}

/// Whoever waits for a page and for something else at a time drops the scan's future again and
/// again.
#[test]
fn a_scan_whose_calls_are_dropped_misses_no_page() {
    let (dir, store, disk) = open(options());
    for n in 0..5000 {
        block_on(disk.write_back(id(n * 3), page(n as u8))).unwrap();
    }
    block_on(store.close()).unwrap();
    drop((store, disk));
    // With nothing in memory there is much to wait for.
    let store = block_on(Store::open(dir.path(), options())).unwrap();
    let disk = block_on(store.volume("v")).unwrap().unwrap();
    let mut scan = disk.scan(id(0), id(u64::MAX));
    let (mut seen, mut drops) = (Vec::new(), 0);
    loop {
        match block_on(poll_once(scan.next())) {
            None => drops += 1,
            Some(next) => match next.unwrap() {
                Some((page, bytes)) => seen.push((page.get(), bytes[0])),
                None => break,
            },
        }
    }
    assert_eq!(
        seen,
        (0..5000).map(|n| (n * 3, n as u8)).collect::<Vec<_>>(),
        "{drops} calls were dropped"
    );
    assert!(drops > 50, "only {drops} calls were dropped");
    block_on(store.close()).unwrap();
}

/// Counters that don't add up mislead whoever looks for a fault.
#[test]
fn counters_and_latencies_agree_with_what_was_done() {
    let (_dir, store, disk) = open(options());
    let before = block_on(store.stats()).unwrap();
    for n in 0..300 {
        block_on(disk.write_back(id(n * 7), page(n as u8))).unwrap();
    }
    block_on(disk.patch(id(0), 0, vec![1; 10])).unwrap();
    block_on(disk.free(id(7))).unwrap();
    for n in 0..300 {
        block_on(disk.read(id(n * 7))).unwrap();
    }
    block_on(disk.read_many(&[id(0), id(700), id(1400)])).unwrap();
    block_on(store.flush()).unwrap();
    block_on(store.checkpoint()).unwrap();
    let after = block_on(store.stats()).unwrap();
    let grown = |of: fn(&corepage::ShardStats) -> u64| of(&after) - of(&before);
    assert_eq!(grown(|s| s.page_writes), 300);
    assert_eq!((grown(|s| s.patches), grown(|s| s.frees), grown(|s| s.commits)), (1, 1, 302));
    assert_eq!(grown(|s| s.bytes_written), 300 * 4096 + 10);
    assert_eq!((grown(|s| s.page_reads), grown(|s| s.bytes_read)), (303, 303 * 4096));
    assert_eq!(
        (grown(|s| s.absent_reads), grown(|s| s.cache_hits)),
        (1, 302),
        "one was freed, the others are in memory"
    );
    assert_eq!(
        (grown(|s| s.buffered_latency.count()), grown(|s| s.commit_latency.count())),
        (300, 2)
    );
    assert_eq!(grown(|s| s.flush_latency.count()), 1);
    let reads = grown(|s| s.read_latency.count());
    assert!(
        (301..=303).contains(&reads),
        "{reads} reads, of several pages at a time one for each shard"
    );
    assert!(after.commit_latency.percentile(50.0) <= after.commit_latency.max());
    // The device: what went through the log and to its place, and not much more than that.
    let (user, device) = (grown(|s| s.bytes_written), grown(|s| s.device_bytes_written));
    assert!(device >= user && device < 4 * user, "{user} bytes written, {device} at the device");
    assert!(grown(|s| s.device_writes) >= grown(|s| s.page_write_ops) + grown(|s| s.log_groups));
    assert!(
        grown(|s| s.vectored_writes) > 0
            && grown(|s| s.vectored_writes) <= grown(|s| s.device_writes)
    );
    assert!(
        grown(|s| s.submissions) > 0 && grown(|s| s.log_flushes) > 0 && after.coalesced_writes > 0
    );
    let shards = block_on(store.shard_stats()).unwrap();
    assert_eq!(shards.iter().map(|s| s.page_writes).sum::<u64>(), after.page_writes);
    comes_true(|| {
        block_on(disk.read(id(0))).unwrap();
        block_on(store.iops(Duration::from_secs(1))).unwrap() > 0.0
    });
    #[cfg(feature = "serde")]
    {
        let json = serde_json::to_value(&after).unwrap();
        assert_eq!(json["page_writes"], after.page_writes);
        for field in ["count", "mean_us", "p50_us", "p99_us", "p999_us", "max_us"] {
            assert!(json["read_latency"][field].is_number(), "{field} in {json}");
        }
    }
    block_on(store.close()).unwrap();
    // After a new start pages come from the device.
    let store = block_on(Store::open(_dir.path(), options())).unwrap();
    let disk = block_on(store.volume("v")).unwrap().unwrap();
    let before = block_on(store.stats()).unwrap();
    block_on(disk.read_many(&(100..110).map(|n| id(n * 7)).collect::<Vec<_>>())).unwrap();
    let after = block_on(store.stats()).unwrap();
    assert_eq!(after.cache_hits, before.cache_hits);
    assert!(
        after.device_reads > before.device_reads && after.vectored_reads > before.vectored_reads,
        "{after:?}"
    );
    assert!(
        after.caller_reads > before.caller_reads && after.node_reads > before.node_reads,
        "{after:?}"
    );
    assert!(after.device_reads >= after.caller_reads + after.node_reads, "{after:?}");
    assert!(after.device_bytes_read >= before.device_bytes_read + 10 * 4096);
    block_on(store.close()).unwrap();
}

/// A hit ratio that counts pages which are not stored, or operations that nobody asked for, says
/// that memory suffices, or that a store is in use, when it is not so.
#[test]
fn what_nobody_asked_for_is_not_counted_and_what_is_not_stored_is_no_hit() {
    let (_dir, store, disk) = open(options());
    for _ in 0..20 {
        block_on(store.volume("v")).unwrap().expect("it is there");
        block_on(store.volumes()).unwrap();
    }
    let idle = block_on(store.stats()).unwrap();
    assert_eq!(
        (idle.page_reads, idle.bytes_read, idle.cache_hits),
        (0, 0, 0),
        "nobody has read a page"
    );
    assert_eq!(idle.read_latency.count(), 0, "the engine has read records of volumes");
    assert!(
        idle.catalog_reads >= 40 * 247,
        "they are counted where they belong: {}",
        idle.catalog_reads
    );
    // The creation of the volume is a commit, and that is all.
    assert!(idle.peak_iops <= 1, "{} operations in a second", idle.peak_iops);
    for n in 0..50 {
        block_on(disk.read(id(n))).unwrap();
    }
    let absent = block_on(store.stats()).unwrap();
    assert_eq!((absent.page_reads, absent.absent_reads, absent.cache_hits), (50, 50, 0));
    assert_eq!(absent.hit_ratio(), 0.0, "none of them is stored");
    block_on(disk.write(id(1), page(1))).unwrap();
    block_on(disk.read_many(&[id(1), id(2)])).unwrap();
    let stored = block_on(store.stats()).unwrap();
    assert_eq!((stored.page_reads, stored.absent_reads, stored.cache_hits), (52, 51, 1));
    assert_eq!(stored.hit_ratio(), 1.0, "the one that is stored was in memory");
    block_on(store.close()).unwrap();
}
