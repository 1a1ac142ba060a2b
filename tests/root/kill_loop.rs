//! A writer killed at random, over and over, on the same store, which is opened with another number
//! of shards each time, now by ring, now portable. 20 kills in each test, or as many as
//! COREPAGE_KILLS says.
//!
//! Every write is a function of (region, sequence number), so from the sequence number found after
//! a crash follows what *every* page must hold, and one comparison shows wholeness, order and
//! prefix at once. If these fail, transactions come back in part, out of order, or not at all
//! although they were acknowledged.
//!
//! The library's writer is this very program, started again as a child with the role in an
//! environment variable.

// Real processes take real time; nothing here is replayed from a seed but the data.
#![allow(clippy::disallowed_methods)]

use crate::common;
use bytes::Bytes;
use common::device::Device;
use common::role::{Role, Run, Task, say};
use common::{Rng, Served, kills_count, nbd, progress, scratch, seed};
use corepage::{Change, Durability, ErrorKind, Lsn, PageId, Store, Volume};
use futures_lite::future::block_on;
use std::collections::{BTreeMap, HashSet};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

const PAGE: usize = 4096;
/// Pages of a region: the first one carries the sequence number, the others are written at random.
const REGION_PAGES: u64 = 400;
/// Region 0 belongs to transactions that read before they write, from several threads; each other
/// to one thread that writes blindly, now durable, now buffered.
const REGIONS: u64 = 4;
const CHAIN_THREADS: usize = 3;

/// Where a page of the trace is: those of the last region side by side, all others so far apart
/// that most of a transaction's pages belong to different shards.
fn place(page: u64) -> PageId {
    PageId::new(if page < (REGIONS - 1) * REGION_PAGES { page * 97 } else { (1 << 20) + page })
}

/// What transaction `seq` of a region does, sequence page included.
fn changes(region: u64, seq: u64) -> Vec<(u64, Change)> {
    let mut rng = Rng::of(&[region, seq]);
    let count = if rng.below(20) == 0 { 150 } else { 1 + rng.below(12) };
    let base = region * REGION_PAGES;
    let mut first = vec![0; PAGE];
    first[..8].copy_from_slice(&seq.to_le_bytes());
    let mut all = vec![(base, Change::Put(first.into()))];
    for _ in 0..count {
        let page = base + 1 + rng.below(REGION_PAGES - 1);
        let change = match rng.below(10) {
            0..6 => Change::Put(rng.bytes(PAGE).into()),
            6..9 => {
                let offset = rng.below(PAGE as u64 - 1);
                let length = 1 + rng.below((PAGE as u64 - offset).min(300));
                Change::Patch { offset: offset as u32, bytes: rng.bytes(length as usize).into() }
            }
            _ => Change::Free,
        };
        all.push((page, change));
    }
    all
}

/// What the volume must hold.
struct Model {
    bytes: Vec<u8>,
    applied: [u64; REGIONS as usize],
}

impl Model {
    fn new() -> Self {
        Model {
            bytes: vec![0; (REGIONS * REGION_PAGES) as usize * PAGE],
            applied: [0; REGIONS as usize],
        }
    }

    /// Goes on to transaction `seq` of `region`.
    fn advance(&mut self, region: u64, seq: u64) {
        for seq in self.applied[region as usize] + 1..=seq {
            for (page, change) in changes(region, seq) {
                let page = &mut self.bytes[page as usize * PAGE..][..PAGE];
                match change {
                    Change::Put(bytes) => page.copy_from_slice(&bytes),
                    Change::Patch { offset, bytes } => {
                        page[offset as usize..][..bytes.len()].copy_from_slice(&bytes)
                    }
                    Change::Free => page.fill(0),
                }
            }
        }
        self.applied[region as usize] = seq;
    }
}

/// An acknowledgement as the child reports it.
#[derive(Clone, Copy, Debug)]
struct Ack {
    region: u64,
    seq: u64,
    lsn: u64,
    durable: bool,
}

impl Ack {
    fn parse(line: &str) -> Option<Ack> {
        let mut words = line.strip_prefix("ack ")?.split(' ').map(|w| w.parse::<u64>());
        let mut word = || words.next()?.ok();
        Some(Ack { region: word()?, seq: word()?, lsn: word()?, durable: word()? == 1 })
    }

    fn say(&self) {
        say(format_args!(
            "ack {} {} {} {}",
            self.region,
            self.seq,
            self.lsn,
            u64::from(self.durable)
        ));
    }
}

/// Not a test of its own: what the child does.
#[test]
fn child() {
    let Some(Task { role, dir, run }) = Task::of_this_process() else { return };
    let store = block_on(Store::open(dir.join("store"), run.options()))
        .expect("the store opens after a kill");
    let volume = match block_on(store.volume("trace")).expect("volumes can be looked up") {
        Some(volume) => volume,
        None => block_on(store.create_volume("trace", 64 << 20)).expect("a volume is made"),
    };
    if role == "write" {
        println!("\nready");
        write(&store, &volume);
    }
    std::fs::write(dir.join("dump"), dump(&volume)).expect("the dump is written");
    if role == "close" {
        block_on(store.close()).expect("the store closes");
    }
    println!("\ndumped");
    if role != "close" {
        std::thread::sleep(Duration::from_secs(600));
    }
}

/// All pages of the trace.
fn dump(volume: &Volume) -> Vec<u8> {
    let ids: Vec<_> = (0..REGIONS * REGION_PAGES).map(place).collect();
    let pages =
        ids.chunks(64).flat_map(|ids| block_on(volume.read_many(ids)).expect("pages can be read"));
    pages.flat_map(|page| page.to_vec()).collect()
}

fn sequence(page: &[u8]) -> u64 {
    u64::from_le_bytes(page[..8].try_into().expect("eight bytes"))
}

fn write(store: &Store, volume: &Volume) {
    std::thread::scope(|scope| {
        (0..CHAIN_THREADS).for_each(|_| drop(scope.spawn(|| while chain(store, volume) {})));
        for region in 1..REGIONS {
            scope.spawn(move || blind(volume, region));
        }
    });
}

/// One transaction of region 0, which follows from the one it read.
fn chain(store: &Store, volume: &Volume) -> bool {
    let attempt = || async {
        let mut txn = store.begin();
        let seq = sequence(&txn.read(volume, place(0)).await?) + 1;
        for (page, change) in changes(0, seq) {
            txn.change(volume, place(page), change)?;
        }
        Ok::<_, corepage::Error>((seq, txn.commit().await?))
    };
    match block_on(attempt()) {
        Ok((seq, lsn)) => Ack { region: 0, seq, lsn: lsn.get(), durable: true }.say(),
        Err(e) => assert!(matches!(e.kind(), ErrorKind::Conflict | ErrorKind::Busy), "{e}"),
    }
    true
}

/// Transactions of a region of one's own, in their order.
fn blind(volume: &Volume, region: u64) {
    let first = place(region * REGION_PAGES);
    let mut seq = sequence(&block_on(volume.read(first)).expect("the sequence page can be read"));
    loop {
        seq += 1;
        let durable = Rng::of(&[region, seq, 1]).below(4) == 0;
        let durability = if durable { Durability::Durable } else { Durability::Buffered };
        let lsn = apply(volume, &changes(region, seq), durability);
        Ack { region, seq, lsn: lsn.get(), durable }.say();
    }
}

fn apply(volume: &Volume, changes: &[(u64, Change)], durability: Durability) -> Lsn {
    loop {
        let changes = changes.iter().map(|(page, change)| (place(*page), change.clone())).collect();
        match block_on(volume.apply(changes, durability)) {
            Ok(lsn) => return lsn,
            Err(e) => assert!(matches!(e.kind(), ErrorKind::Conflict | ErrorKind::Busy), "{e}"),
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// All that was acknowledged is there, nothing is out of order over all regions, and no LSN comes
/// twice.
fn check_acks(acks: &[Ack], found: &[u64], lsns: &mut HashSet<u64>) {
    let present = |ack: &&Ack| ack.seq <= found[ack.region as usize];
    for ack in acks {
        assert!(lsns.insert(ack.lsn), "an LSN was used twice: {ack:?}");
        assert!(
            !ack.durable || present(&ack),
            "acknowledged as durable and lost: {ack:?}, found {found:?}"
        );
    }
    let newest_present = acks.iter().filter(present).map(|a| a.lsn).max();
    let oldest_absent = acks.iter().filter(|a| !present(a)).map(|a| a.lsn).min();
    if let (Some(present), Some(absent)) = (newest_present, oldest_absent) {
        assert!(present < absent, "not a prefix: LSN {present} is there and {absent} is not");
    }
}

/// What a trace must hold after all kills so far.
struct Judge {
    model: Model,
    lsns: HashSet<u64>,
}

impl Judge {
    fn new() -> Judge {
        Judge { model: Model::new(), lsns: HashSet::new() }
    }

    /// Holds what a reader has dumped in `dir` against what the killed writer has said.
    fn check(&mut self, round: u64, dir: &Path, acks: &[Ack]) {
        let dump = std::fs::read(dir.join("dump")).expect("the dump is there");
        let found: Vec<_> = dump.chunks(REGION_PAGES as usize * PAGE).map(sequence).collect();
        for region in 0..REGIONS {
            let (found, before) = (found[region as usize], self.model.applied[region as usize]);
            assert!(found >= before, "round {round}: region {region} went back");
            self.model.advance(region, found);
        }
        check_acks(acks, &found, &mut self.lsns);
        let differs = (0..dump.len() / PAGE)
            .find(|p| dump[p * PAGE..][..PAGE] != self.model.bytes[p * PAGE..][..PAGE]);
        assert_eq!(
            differs, None,
            "round {round}: the first page that is not as its transactions left it; {found:?}"
        );
    }
}

fn acks_of(lines: &[String]) -> Vec<Ack> {
    lines.iter().filter_map(|line| Ack::parse(line)).collect()
}

#[test]
fn a_killed_writer_leaves_a_prefix_of_whole_transactions_with_all_that_was_acknowledged() {
    let dir = scratch("kill");
    let mut judge = Judge::new();
    let mut rng = Rng::new(seed(2));
    for round in 0..kills_count() {
        let writer = Role::start("write", dir.path(), Run::of_step(2 * round));
        // One time in four the clock runs from the start, so that the kill meets the recovery.
        if rng.below(4) > 0 {
            writer.wait();
        }
        std::thread::sleep(Duration::from_millis(5 + rng.below(496)));
        let acks = acks_of(&writer.kill());
        // Now closed cleanly, now killed again: recoveries must also follow one another.
        let reader = Role::start(
            if round % 2 == 0 { "close" } else { "die" },
            dir.path(),
            Run::of_step(2 * round + 1),
        );
        reader.wait();
        judge.check(round, dir.path(), &acks);
        reader.kill();
        progress(round, || format!("{} acknowledgements", judge.lsns.len()));
    }
    println!("SUM {} {} 0 0", kills_count(), judge.lsns.len());
    assert!(
        judge.lsns.len() as u64 > kills_count(),
        "only {} transactions in all",
        judge.lsns.len()
    );
}

/// A write that a process has begun before its death reaches the disk when the device pleases.
/// Until it has, the store is in use: a successor that recovered meanwhile would have its log
/// overwritten. Here the device keeps a write of the log.
#[test]
fn no_successor_opens_while_the_device_still_has_a_write_of_a_dead_process() {
    let Some(device) = Device::new("ext4") else { return };
    let path = device.store();
    let dir = path.parent().expect("a mount point");
    let mut judge = Judge::new();
    let runs = Run::all().into_iter().filter(|run| run.shards == 2);
    for (round, run) in (0..).zip(runs.flat_map(|run| [run, run])) {
        let mut writer = Role::start("write", dir, run);
        writer.wait();
        std::thread::sleep(Duration::from_millis(200));
        device.hold(&[b"CPGROUP\0"]);
        writer.kill_only();
        // One that comes early waits a little, and is let in when the write has ended; one that has
        // waited for long is refused.
        let early = (round % 2 == 0).then(|| Role::start("close", dir, run));
        if early.is_some() {
            std::thread::sleep(Duration::from_millis(300));
        } else {
            let refused = block_on(Store::open(&path, run.options()))
                .expect_err("a write is under way still");
            assert_eq!(refused.kind(), ErrorKind::InUse, "{refused}");
        }
        assert!(device.is_holding() && !early.as_ref().is_some_and(Role::is_there));
        device.let_go();
        let acks = acks_of(&writer.kill());
        assert!(!acks.is_empty());
        let reader = early.unwrap_or_else(|| Role::start("close", dir, run));
        reader.wait();
        judge.check(round, dir, &acks);
        reader.kill();
    }
}

/// A check that can't fail shows nothing.
#[test]
fn the_checker_finds_what_is_lost_reordered_or_numbered_twice() {
    let ack = |region, seq, lsn, durable| Ack { region, seq, lsn, durable };
    let acks =
        [ack(0, 1, 10, true), ack(1, 1, 11, false), ack(0, 2, 12, true), ack(1, 2, 13, false)];
    let finds = |acks: &[Ack], found: [u64; 2], seen: &[u64]| {
        let mut lsns = seen.iter().copied().collect();
        std::panic::catch_unwind(move || check_acks(acks, &found, &mut lsns)).is_err()
    };
    assert!(!finds(&acks, [2, 2], &[]), "all is there");
    assert!(!finds(&acks, [2, 1], &[]), "a buffered one from the end may be gone");
    assert!(finds(&acks, [1, 1], &[]), "an acknowledged one is gone");
    assert!(finds(&acks, [2, 0], &[]), "one from the middle is gone");
    assert!(finds(&acks, [2, 2], &[12]), "an LSN was seen before");
}

/// Bytes of the volume that one NBD connection writes.
const SLICE: u64 = 4 << 20;

/// What an NBD connection has sent.
struct Sender {
    base: u64,
    /// As after request number `durable`.
    bytes: Vec<u8>,
    durable: u64,
    sent: u64,
}

/// Request `seq` of the connection: command, flags, offset in its slice, length, payload.
fn nbd_request(base: u64, seq: u64) -> (u16, u16, u64, u32, Bytes) {
    let mut rng = Rng::of(&[base, seq, 2]);
    let length = 1 + rng.below([100, 9_000, 70_000, 1 << 20][rng.clone().below(4) as usize]);
    let offset = rng.below(SLICE - length);
    let flags = if rng.below(3) == 0 { nbd::FUA } else { 0 };
    match rng.below(8) {
        0 => (nbd::TRIM, flags, offset, length as u32, Bytes::new()),
        1 => (nbd::WRITE_ZEROES, flags, offset, length as u32, Bytes::new()),
        _ => (nbd::WRITE, flags, offset, length as u32, rng.bytes(length as usize).into()),
    }
}

impl Sender {
    /// Sends requests until the server is gone; notes what was acknowledged as durable.
    fn work(&mut self, mut client: nbd::Client) -> u64 {
        let mut durable = self.durable;
        loop {
            self.sent += 1;
            let (command, flags, offset, length, payload) = nbd_request(self.base, self.sent);
            let head = nbd::request_bytes(flags, command, self.sent, self.base + offset, length);
            if client.try_send(&[&head, &payload[..]].concat()).is_err() {
                return durable;
            }
            match client.try_reply() {
                Err(_) => return durable,
                Ok(reply) => assert_eq!(reply, (self.sent, 0), "a request was refused"),
            }
            if flags & nbd::FUA != 0 {
                durable = self.sent;
            }
        }
    }

    /// Finds out up to which request the slice reads, which must be one from `durable` on.
    fn check(&mut self, client: &mut nbd::Client, durable: u64) {
        let found = client.read(self.base, SLICE as u32);
        let mut seq = self.durable;
        while seq < durable || (self.bytes != found && seq < self.sent) {
            seq += 1;
            let (_, _, offset, length, payload) = nbd_request(self.base, seq);
            let target = &mut self.bytes[offset as usize..][..length as usize];
            if payload.is_empty() { target.fill(0) } else { target.copy_from_slice(&payload) }
        }
        assert!(
            self.bytes == found,
            "slice {:#x} is no prefix of its requests from {durable} on",
            self.base
        );
        (self.durable, self.sent) = (seq, seq);
    }
}

#[test]
fn a_killed_server_leaves_each_connections_requests_whole_and_in_order() {
    let dir = scratch("kill-nbd");
    let mut rng = Rng::new(seed(3));
    let senders: Vec<_> = (0..3u64)
        .map(|n| Sender {
            base: n * 64 * SLICE + n * 777,
            bytes: vec![0; SLICE as usize],
            durable: 0,
            sent: 0,
        })
        .map(|sender| Arc::new(Mutex::new(sender)))
        .collect();
    let mut durable = BTreeMap::new();
    for round in 0..kills_count() {
        let served = Served::start_as(Run::of_step(round), dir.path());
        let mut client = served.client();
        for (n, sender) in senders.iter().enumerate() {
            let mut sender = sender.lock().expect("no sender failed");
            let at = durable.get(&n).copied().unwrap_or(0).max(sender.durable);
            sender.check(&mut client, at);
        }
        let threads: Vec<_> = senders
            .iter()
            .map(|sender| (sender.clone(), served.client()))
            .map(|(sender, client)| {
                std::thread::spawn(move || sender.lock().expect("no sender failed").work(client))
            })
            .collect();
        std::thread::sleep(Duration::from_millis(5 + rng.below(496)));
        served.kill();
        for (n, thread) in threads.into_iter().enumerate() {
            durable
                .insert(n, thread.join().expect("a sender's requests are served until the kill"));
        }
        progress(round, || {
            format!(
                "{} requests acknowledged as durable, with all before them",
                durable.values().sum::<u64>()
            )
        });
    }
    let served = Served::start(dir.path());
    for (n, sender) in senders.iter().enumerate() {
        sender.lock().expect("no sender failed").check(&mut served.client(), durable[&n]);
    }
    assert!(served.stop().success());
    println!("SUM {} {} 0 0", kills_count(), durable.values().sum::<u64>());
}
