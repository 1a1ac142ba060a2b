//! A device that fails under a real file system: flushes, writes and reads, on ext4, XFS and btrfs,
//! at the first operation, later, during a checkpoint, during recovery, and on one shard of a
//! commit over two.
//!
//! Whatever fails: the call that meets it gets an error that names the system's error and says what
//! to do, nothing is acknowledged afterwards, and once the device is well the store opens with
//! every commit that was acknowledged as durable, each commit whole. The device has a volatile
//! cache, which a failed flush loses, so a flush that is tried again and called good shows. Every
//! case asserts that its fault has fired.
//!
//! Short by default; COREPAGE_FAULTS=n tries the first n operations of checkpoint and recovery one
//! by one, and n faults at random moments, with both drivers.

// Real devices take real time; nothing here is a matter of timing but that nothing hangs.
#![allow(clippy::disallowed_methods)]

use crate::common;
use common::device::{Device, Fault, MARK, Marks, OF_STORE, Op};
use common::role::{Run, ring_works};
use common::{Rng, corepage, seed};
use corepage::{Change, Durability, Error, ErrorKind, Geometry, Options, PageId, Store, Volume};
use futures_lite::future::{block_on, or};
use std::collections::BTreeMap;
use std::fs::File;
use std::future::Future;
use std::os::unix::fs::FileExt;
use std::time::Duration;

const PAGE: usize = 4096;
/// No multiple of the kinds of commits, so that each page meets them all.
const PAIRS: u64 = 25;
/// In the pages and patches of the first and of the second shard, so that the device can tell them
/// apart.
const OF_FIRST: Marks = &[b"corepage-fault-A"];
const OF_SECOND: Marks = &[b"corepage-fault-B"];
const EIO: i32 = libc::EIO;

/// Waits, but not for ever.
fn now<T>(future: impl Future<Output = T>) -> T {
    block_on(or(future, async {
        async_io::Timer::after(Duration::from_secs(120)).await;
        panic!("the store hangs")
    }))
}

/// How far a long run goes.
fn faults_count() -> u64 {
    std::env::var("COREPAGE_FAULTS").ok().and_then(|text| text.parse().ok()).unwrap_or(0)
}

/// The bytes at the begin of a page with this value, on this side of its pair.
fn head(value: u64, side: usize) -> Vec<u8> {
    [&value.to_le_bytes()[..], MARK, [OF_FIRST, OF_SECOND][side][0]].concat()
}

fn whole(value: u64, side: usize) -> Vec<u8> {
    let mut bytes = head(value, side).repeat(PAGE / 40 + 1);
    bytes.truncate(PAGE);
    bytes
}

fn value_of(page: &[u8]) -> u64 {
    u64::from_le_bytes(page[..8].try_into().expect("eight bytes"))
}

/// A store on a device that fails now and then, and what is known of it.
struct DeviceTest {
    // Before the device that it is on.
    store: Option<(Store, Volume)>,
    device: Device,
    run: Run,
    /// Pages of which the first is the first shard's, the second the second's.
    pairs: Vec<[PageId; 2]>,
    /// What was acknowledged as durable.
    durable: BTreeMap<PageId, u64>,
    /// What was not, and may be there all the same: whole or not at all.
    doubt: Vec<(PageId, u64)>,
    next: u64,
    /// Faults that have fired.
    fired: u64,
}

impl DeviceTest {
    fn new(kind: &str, ring: bool) -> Option<DeviceTest> {
        let device = Device::new(kind)?;
        let (durable, doubt) = Default::default();
        let run = Run { ring, shards: 2 };
        let mut test = DeviceTest {
            device,
            run,
            store: None,
            pairs: Vec::new(),
            durable,
            doubt,
            next: 0,
            fired: 0,
        };
        test.open().expect("a well device");
        Some(test)
    }

    fn open(&mut self) -> Result<(), Error> {
        let geometry = Geometry {
            extent_bytes: 256 << 10,
            segment_bytes: 256 << 10,
            segments_count: 4,
            vshards_count: 16,
        };
        let options =
            self.run.with(Options { geometry, memory_bytes: 16 << 20, ..Options::default() });
        let store = now(Store::open(self.device.store(), options))?;
        let volume = match now(store.volume("v"))? {
            Some(volume) => volume,
            None => now(store.create_volume("v", 1 << 40))?,
        };
        if self.pairs.is_empty() {
            let mut sides = [0, 1].map(|side| {
                let pages = (0..).map(|run| PageId::new(run * 512));
                pages
                    .filter(|page| store.shard_of(&volume, *page) == side)
                    .take(PAIRS as usize)
                    .collect::<Vec<_>>()
            });
            let second = std::mem::take(&mut sides[1]);
            self.pairs = sides[0].iter().zip(second).map(|(a, b)| [*a, b]).collect();
        }
        self.store = Some((store, volume));
        Ok(())
    }

    fn handles(&self) -> (&Store, &Volume) {
        let (store, volume) = self.store.as_ref().expect("the store is open");
        (store, volume)
    }

    /// One durable commit, now of this kind, now of that.
    fn step(&mut self) -> Result<(), Error> {
        self.next += 1;
        let value = self.next;
        let [a, b] = self.pairs[(value % PAIRS) as usize];
        let both = || [(a, 0), (b, 1)].into_iter();
        let is_pair = !value.is_multiple_of(3);
        self.doubt =
            both().take(if is_pair { 2 } else { 1 }).map(|(page, _)| (page, value)).collect();
        let (store, volume) = self.handles();
        match value % 3 {
            0 => {
                now(volume.write_back(a, whole(value, 0)))?;
                now(store.flush())?;
            }
            1 => {
                let mut txn = store.begin();
                for (page, side) in both() {
                    now(txn.read(volume, page))?;
                    txn.write(volume, page, whole(value, side))?;
                }
                now(txn.commit())?;
            }
            _ => {
                let patch = |(page, side)| {
                    (page, Change::Patch { offset: 0, bytes: head(value, side).into() })
                };
                now(volume.apply(both().map(patch).collect(), Durability::Durable))?;
            }
        }
        self.durable.extend(std::mem::take(&mut self.doubt));
        Ok(())
    }

    fn steps(&mut self, count: u64) {
        (0..count).for_each(|_| self.step().expect("a well device"));
    }

    /// Works until something fails, which it must.
    fn work_until_it_fails(&mut self) -> Error {
        (0..2000).find_map(|_| self.step().err()).unwrap_or_else(|| {
            panic!(
                "the device failed {} times, and nobody noticed in 2,000 commits",
                self.device.fired()
            )
        })
    }

    /// Nothing more is acknowledged; what is read is right.
    fn is_stopped(&mut self) {
        let [a, _] = self.pairs[0];
        self.is_refused(
            "a write",
            |_, volume, value| now(volume.write(a, whole(value, 0))).map(drop),
            Some(a),
        );
        self.is_refused(
            "a patch",
            |_, volume, value| now(volume.patch(a, 0, head(value, 0))).map(drop),
            Some(a),
        );
        self.is_refused("a flush", |store, _, _| now(store.flush()).map(drop), None);
        self.is_refused("a checkpoint", |store, _, _| now(store.checkpoint()).map(drop), None);
        let (store, volume) = self.handles();
        for pair in &self.pairs {
            let Ok(pages) = now(volume.read_many(pair)) else { continue };
            for (page, id) in pages.iter().zip(pair) {
                let right = [self.durable.get(id).copied().unwrap_or(0)];
                let doubtful =
                    self.doubt.iter().filter(|(page, _)| page == id).map(|(_, value)| *value);
                assert!(
                    right.into_iter().chain(doubtful).any(|v| v == value_of(page)),
                    "a wrong page was served"
                );
            }
        }
        now(store.close()).expect_err("a store that has failed closes cleanly");
    }

    /// Asks until it is refused: a shard that has not failed itself hears of it a moment later.
    /// What it acknowledges until then must be there, as all else.
    fn is_refused(
        &mut self,
        what: &str,
        ask: impl Fn(&Store, &Volume, u64) -> Result<(), Error>,
        writes: Option<PageId>,
    ) {
        let error = (0..100).find_map(|_| {
            self.next += 1;
            let (store, volume) = self.handles();
            let result = ask(store, volume, self.next);
            if result.is_ok() {
                self.durable.extend(writes.map(|page| (page, self.next)));
            }
            assert!(
                !result.as_ref().is_err_and(|e| e.kind() == ErrorKind::OutcomeUnknown),
                "{what} was submitted after a failure"
            );
            result.err()
        });
        let error = error
            .unwrap_or_else(|| panic!("{what} is acknowledged again and again after a failure"));
        assert_eq!(error.kind(), ErrorKind::Closed, "{what}: {error}");
        assert!(error.to_string().contains("reopen"), "{what}: no word of what to do: {error}");
    }

    /// Lets the store go, and the device be well again.
    fn heal(&mut self) {
        self.store = None;
        self.device.heal();
    }

    /// All that was durable is there, and what was in doubt whole or not at all.
    fn check(&mut self, case: &str) {
        let (_, volume) = self.handles();
        let mut found = BTreeMap::new();
        for pair in &self.pairs {
            let pages = now(volume.read_many(pair)).unwrap_or_else(|e| panic!("{case}: {e}"));
            found.extend(pair.iter().copied().zip(pages.iter().map(|page| value_of(page))));
        }
        let came = self.doubt.iter().filter(|(page, value)| found[page] == *value).count();
        assert!(came == 0 || came == self.doubt.len(), "{case}: half a commit: {:?}", self.doubt);
        if came > 0 {
            self.durable.extend(std::mem::take(&mut self.doubt));
        }
        self.doubt.clear();
        for (page, value) in &found {
            let wanted = self.durable.get(page).copied().unwrap_or(0);
            assert_eq!(*value, wanted, "{case}: page {page:?} was acknowledged as {wanted}");
        }
    }

    /// A name for the case, with its surroundings.
    fn case(&self, what: &str) -> String {
        format!(
            "{} by {}: {what}",
            self.device.kind(),
            if self.run.ring { "ring" } else { "portable" }
        )
    }

    /// How often the fault has fired; said together with what came of it.
    fn fired(&mut self, case: &str, error: Option<&Error>) -> u64 {
        let fired = self.device.fired();
        self.fired += fired;
        let error = error.map_or("nothing was told".into(), |e| format!("{:?}: {e}", e.kind()));
        println!("{case}: {fired} fired; {error}");
        fired
    }

    /// The device is well again, and the store is opened and checked.
    fn recover(&mut self, case: &str) {
        self.heal();
        self.open()
            .unwrap_or_else(|e| panic!("{case}: the store does not open on a well device: {e}"));
        self.check(case);
    }

    /// The device fails as told while the store works.
    fn fails_at_work(&mut self, what: &str, fault: Fault) {
        let case = self.case(what);
        self.steps(3);
        self.device.break_it(fault);
        let error = self.work_until_it_fails();
        assert!(self.fired(&case, Some(&error)) > 0, "{case}: {error}, but no fault fired");
        assert_clear(&case, &error);
        self.is_stopped();
        self.recover(&case);
    }

    /// The same while it writes a checkpoint. Returns whether the fault fired.
    fn fails_at_checkpoint(&mut self, what: &str, fault: Fault) -> bool {
        let case = self.case(&format!("checkpoint, {what}"));
        self.steps(PAIRS);
        self.device.break_it(fault);
        let result = now(self.handles().0.checkpoint());
        let fired = self.fired(&case, result.as_ref().err()) > 0;
        assert_eq!(
            fired,
            result.is_err(),
            "{case}: the store was told of no failure, or of one that was not"
        );
        if let Err(error) = result {
            assert_clear(&case, &error);
            self.is_stopped();
        }
        self.recover(&case);
        fired
    }

    /// The same while it recovers. Returns whether the fault fired.
    fn fails_at_recovery(&mut self, what: &str, fault: Fault) -> bool {
        let case = self.case(&format!("recovery, {what}"));
        self.steps(PAIRS);
        // There is something to recover from.
        self.device.break_it(once(Op::Write, 5));
        self.work_until_it_fails();
        self.heal();
        self.device.break_it(fault);
        let result = self.open();
        let fired = self.fired(&case, result.as_ref().err()) > 0;
        assert!(fired || result.is_ok(), "{case}: no fault fired, and it does not open");
        match result {
            Err(error) => assert_named(&case, &error),
            // Damage that was passed over may not be what was acknowledged.
            Ok(()) => self.check(&case),
        }
        self.recover(&case);
        fired
    }

    /// A read fails: the call that wanted it does, and nothing else.
    fn fails_to_read(&mut self, what: &str, with: Marks) {
        let case = self.case(what);
        self.steps(2 * PAIRS);
        now(self.handles().0.close()).expect("a well device");
        // With nothing in memory.
        self.heal();
        self.open().expect("a well device");
        let [a, b] = self.pairs[0];
        self.device.break_it(Fault { op: Op::Read, errno: EIO, after: 0, times: u64::MAX, with });
        let (_, volume) = self.handles();
        let patches = [(a, 0), (b, 1)].map(|(page, side)| {
            (page, Change::Patch { offset: 0, bytes: head(u64::MAX, side).into() })
        });
        let error = now(volume.apply(patches.into(), Durability::Durable))
            .expect_err("a page can't be read");
        assert_eq!(error.kind(), ErrorKind::Io, "{case}: {error}");
        assert_named(&case, &error);
        let error = now(volume.read_many(&[a, b])).expect_err("a page can't be read");
        assert!(self.fired(&case, Some(&error)) > 0);
        assert_eq!(error.kind(), ErrorKind::Io, "{case}: {error}");
        // So that none is under way any more, which a later one would share.
        [a, b].map(|page| now(self.handles().1.read(page)).map(drop)).into_iter().for_each(drop);
        self.device.heal_device();
        self.check(&case);
        self.steps(PAIRS);
        self.check(&case);
    }

    /// All is well in the end.
    fn end(mut self) {
        self.steps(10);
        now(self.handles().0.close()).expect("a well device");
        self.store = None;
        common::run(corepage(&["verify", "--dir"]).arg(self.device.store()));
        println!("{}", self.case(&format!("{} faults fired, {} commits", self.fired, self.next)));
    }
}

/// The message names the system's error, and where to find more.
fn assert_named(case: &str, error: &Error) {
    let text = error.to_string();
    assert!(text.contains("os error"), "{case}: the system's error is not named: {text}");
    let is_full = text.contains("(os error 28)");
    assert!(
        is_full || text.contains("see the kernel's log"),
        "{case}: no word of what to do: {text}"
    );
}

/// And what to do with the store.
fn assert_clear(case: &str, error: &Error) {
    assert_named(case, error);
    assert!(error.to_string().contains("reopen"), "{case}: no word of what to do: {error}");
}

/// Fails once, and only transfers of the store.
fn once(op: Op, after: u64) -> Fault {
    Fault { op, errno: EIO, after, times: 1, with: OF_STORE }
}

/// From then on all of them fail, the file system's as well.
fn dead(op: Op, after: u64) -> Fault {
    Fault { times: u64::MAX, with: &[], ..once(op, after) }
}

fn short(kind: &str, ring: bool) {
    let Some(mut test) = DeviceTest::new(kind, ring) else { return };
    println!("{}", test.handles().0.disk_report());
    for op in [Op::Flush, Op::Write] {
        test.fails_at_work(&format!("{op:?}, the first"), once(op, 0));
        test.fails_at_work(&format!("{op:?}, later"), once(op, 23));
        assert!(test.fails_at_checkpoint(&format!("{op:?}, the first"), once(op, 0)));
        assert!(test.fails_at_checkpoint(&format!("{op:?}, later"), once(op, 1)));
        assert!(test.fails_at_recovery(&format!("{op:?}, the first"), once(op, 0)));
    }
    test.fails_at_work(
        "Write, on the first shard of two",
        Fault { with: OF_FIRST, ..once(Op::Write, 3) },
    );
    test.fails_at_work(
        "Write, on the second shard of two",
        Fault { with: OF_SECOND, ..once(Op::Write, 3) },
    );
    test.fails_at_work(
        "Write, no space in the device",
        Fault { errno: libc::ENOSPC, ..once(Op::Write, 1) },
    );
    test.fails_at_work("Write, all from then on", dead(Op::Write, 11));
    test.fails_to_read("Read, of both", OF_STORE);
    test.fails_to_read("Read, on the second shard of two", OF_SECOND);
    // More than one, since btrfs tries again by itself.
    assert!(test.fails_at_recovery("Read, the first", Fault { times: 50, ..once(Op::Read, 0) }));
    assert!(test.fails_at_recovery("Read, later", Fault { times: 50, ..once(Op::Read, 7) }));
    test.end();
}

/// Checkpoint and recovery with each of their first operations failing, and faults at random
/// moments of work.
fn long(kind: &str, ring: bool, count: u64) {
    let Some(mut test) = DeviceTest::new(kind, ring) else { return };
    for op in [Op::Flush, Op::Write] {
        let _ =
            (0..count).find(|n| !test.fails_at_checkpoint(&format!("{op:?} {n}"), once(op, *n)));
    }
    for op in [Op::Flush, Op::Write, Op::Read] {
        let times = if op == Op::Read { 50 } else { 1 };
        let _ = (0..count).find(|n| {
            !test.fails_at_recovery(&format!("{op:?} {n}"), Fault { times, ..once(op, *n) })
        });
    }
    let mut rng = Rng::new(seed(6));
    for n in 0..count {
        let op = if rng.below(2) == 0 { Op::Flush } else { Op::Write };
        let after = rng.below(150);
        let fault = if rng.below(4) == 0 { dead(op, after) } else { once(op, after) };
        test.fails_at_work(&format!("{n}: {fault:?}"), fault);
    }
    test.end();
}

#[test]
fn in_a_long_run_every_operation_fails_once() {
    let count = faults_count();
    for kind in ["ext4", "xfs", "btrfs"].into_iter().filter(|_| count > 0) {
        long(kind, false, count);
        if ring_works() {
            long(kind, true, count);
        }
    }
}

/// The oracle finds who tries a failed flush again: the device has lost what the first one was for.
#[test]
fn a_flush_that_is_tried_again_and_called_good_has_lost_data() {
    let Some(mut device) = Device::new("ext4") else { return };
    let path = device.store();
    std::fs::write(&path, [0; PAGE])
        .and_then(|()| File::open(&path)?.sync_all())
        .expect("a well device");
    let file = File::options().write(true).open(&path).expect("the file is there");
    device.break_it(once(Op::Flush, 0));
    file.write_all_at(&whole(1, 0), 0).expect("it goes into the page cache");
    file.sync_data().expect_err("the device is broken");
    file.sync_data().expect("the device is well, and the page clean");
    assert_eq!(device.fired(), 1);
    drop(file);
    device.heal();
    assert_eq!(
        value_of(&std::fs::read(device.store()).expect("it can be read")),
        0,
        "the device kept what it failed to flush"
    );
}

#[test]
fn on_ext4_what_fails_is_told_and_nothing_acknowledged_is_lost() {
    short("ext4", ring_works());
}

#[test]
fn on_xfs_what_fails_is_told_and_nothing_acknowledged_is_lost() {
    short("xfs", ring_works());
}

#[test]
fn on_btrfs_what_fails_is_told_and_nothing_acknowledged_is_lost() {
    short("btrfs", false);
}
