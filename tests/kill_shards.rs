//! Transactions over several shards, killed at random: each one writes down what it saw. The store is opened with another
//! number of shards each time, now by ring, now portable. 20 kills, or as many as COREPAGE_KILLS says.
//!
//! Each attempt is announced before its commit with all that it read, so the parent can replay the commits that are there
//! after a crash in the order of their LSNs: each must have read exactly what the replay holds, and the replay must end in
//! the very bytes that are in the store. If this fails, commits over shards come back in part, out of order, not at all
//! although they were acknowledged, or on top of what never was.
//!
//! What is there: a chain for each cell (page), from its last writer back through what each writer saw to what was there
//! before. Groups of cells that are written blindly, all at a time, carry a sequence number instead.

// Real processes take real time; nothing here is replayed from a seed but the data.
#![allow(clippy::disallowed_methods)]

mod common;

use common::role::{Role, Run, Task, say};
use common::{Chance, kills_count, scratch};
use corepage::{Change, Durability, ErrorKind, PageId, Store, Volume};
use futures_lite::future::block_on;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

const PAGE: usize = 4096;
/// Cells of transactions; the first few are wanted by all of them.
const CELLS: u64 = 60;
const HOT: u64 = 8;
/// Groups of cells behind them, each written blindly by one thread.
const GROUPS: u64 = 2;
const GROUP_CELLS: u64 = 5;
const ALL_CELLS: u64 = CELLS + GROUPS * GROUP_CELLS;
const THREADS: u64 = 3;

/// Each cell is in a run of pages of its own, so neighbours belong to different shards.
fn place(cell: u64) -> PageId {
    PageId::new(cell * 512 + cell % 7)
}

fn group_cells(group: u64) -> impl Iterator<Item = u64> {
    (0..GROUP_CELLS).map(move |i| CELLS + group * GROUP_CELLS + i)
}

/// What the writer `id` does to a cell; its first eight bytes are always the id.
fn change(id: u64, cell: u64) -> Change {
    let mut chance = Chance::of(&[id, cell]);
    let whole = chance.below(3) == 0;
    let mut bytes = chance.bytes(if whole { PAGE } else { 100 });
    bytes[..8].copy_from_slice(&id.to_le_bytes());
    if whole { Change::Put(bytes.into()) } else { Change::Patch { offset: 0, bytes: bytes.into() } }
}

fn writer_of(page: &[u8]) -> u64 {
    u64::from_le_bytes(page[..8].try_into().expect("eight bytes"))
}

// --- the child ---

/// Not a test of its own: what the child does.
#[test]
fn child() {
    let Some(Task { role, dir, run }) = Task::of_this_process() else { return };
    let store = block_on(Store::open(dir.join("store"), run.options())).expect("the store opens after a kill");
    let volume = match block_on(store.volume("cells")).expect("volumes can be looked up") {
        Some(volume) => volume,
        None => block_on(store.create_volume("cells", 1 << 30)).expect("a volume is made"),
    };
    if let Some(round) = role.strip_prefix("write ") {
        say("\nready");
        work(&store, &volume, round.parse().expect("a number"));
    }
    let ids: Vec<_> = (0..ALL_CELLS).map(place).collect();
    let pages = block_on(volume.read_many(&ids)).expect("all cells can be read");
    let dump: Vec<u8> = pages.iter().flat_map(|p| [&p.lsn().get().to_le_bytes(), &p[..]].concat()).collect();
    std::fs::write(dir.join("dump"), dump).expect("the dump is written");
    say(format_args!("\ncut {}", store.recovery().cut));
    if role == "close" {
        block_on(store.close()).expect("the store closes");
    }
    say("dumped");
    if role != "close" {
        std::thread::sleep(Duration::from_secs(600));
    }
}

fn work(store: &Store, volume: &Volume, round: u64) {
    let newest = AtomicU64::new(0);
    let newest = &newest;
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            scope.spawn(move || {
                for n in 1.. {
                    let id = (round + 1) << 32 | (thread + 1) << 24 | n;
                    if let Some(lsn) = block_on(transaction(store, volume, id)) {
                        newest.fetch_max(lsn, Ordering::SeqCst);
                    }
                }
            });
        }
        for group in 0..GROUPS {
            scope.spawn(move || blind(volume, group, newest));
        }
        scope.spawn(move || {
            loop {
                let before = newest.load(Ordering::SeqCst);
                let lsn = block_on(store.flush()).expect("a flush");
                say(format_args!("flush {before} {lsn}"));
                std::thread::sleep(Duration::from_millis(7));
            }
        });
    });
}

/// Reads some cells, some of which it writes, and says so before it commits.
async fn transaction(store: &Store, volume: &Volume, id: u64) -> Option<u64> {
    let mut chance = Chance::of(&[id]);
    let mut cells = BTreeSet::new();
    let count = 2 + chance.below(5);
    while (cells.len() as u64) < count {
        cells.insert(if chance.below(4) == 0 { chance.below(HOT) } else { chance.below(ALL_CELLS) });
    }
    let mut txn = store.begin();
    let (mut seen, mut shards) = (String::new(), BTreeSet::new());
    let mut changed = false;
    for cell in cells {
        let page = match txn.read(volume, place(cell)).await {
            Ok(page) => page,
            Err(e) if e.kind() == ErrorKind::Busy => return None,
            Err(e) => panic!("{e}"),
        };
        let corepage::PageView::Stored(stored) = &page else { panic!("it is not changed yet") };
        let writes = cell < CELLS && (!changed || chance.below(3) > 0);
        seen += &format!(" {cell}:{}:{}:{}", u8::from(writes), writer_of(&page), stored.lsn());
        shards.insert(store.shard_of(volume, place(cell)));
        if writes {
            changed = true;
            txn.change(volume, place(cell), change(id, cell)).expect("it is this store's volume");
        }
    }
    if !changed {
        return None;
    }
    say(format_args!("try {id} {}{seen}", shards.len()));
    match txn.commit().await {
        Ok(lsn) => {
            say(format_args!("ack {id} {lsn}"));
            Some(lsn.get())
        }
        Err(e) => {
            assert!(matches!(e.kind(), ErrorKind::Conflict | ErrorKind::Busy), "{e}");
            say(format_args!("no {id}"));
            None
        }
    }
}

/// Writes all cells of a group, over and over, now durable, now buffered.
fn blind(volume: &Volume, group: u64, newest: &AtomicU64) {
    let first = group_cells(group).next().expect("a group has cells");
    let mut seq = writer_of(&block_on(volume.read(place(first))).expect("the cell can be read"));
    loop {
        seq += 1;
        let durable = Chance::of(&[group, seq, 1]).below(4) == 0;
        let durability = if durable { Durability::Durable } else { Durability::Buffered };
        let lsn = loop {
            let changes = group_cells(group).map(|cell| (place(cell), change(seq, cell))).collect();
            match block_on(volume.apply(changes, durability)) {
                Ok(lsn) => break lsn,
                Err(e) => assert!(matches!(e.kind(), ErrorKind::Conflict | ErrorKind::Busy), "{e}"),
            }
            std::thread::sleep(Duration::from_millis(1));
        };
        say(format_args!("blind {group} {seq} {lsn} {}", u8::from(durable)));
        newest.fetch_max(lsn.get(), Ordering::SeqCst);
        if seq.is_multiple_of(3) {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

// --- the checker ---

/// A cell as found: LSN and bytes.
#[derive(Clone, Debug, PartialEq)]
struct Cell {
    lsn: u64,
    bytes: Vec<u8>,
}

impl Cell {
    fn writer(&self) -> u64 {
        writer_of(&self.bytes)
    }
}

fn parse_dump(dump: &[u8]) -> Vec<Cell> {
    let cell = |c: &[u8]| Cell { lsn: writer_of(c), bytes: c[8..].to_vec() };
    dump.chunks(8 + PAGE).map(cell).collect()
}

/// What an attempt saw at a cell, and whether it writes it.
#[derive(Clone, Copy, Debug)]
struct Seen {
    cell: u64,
    writes: bool,
    writer: u64,
    lsn: u64,
}

/// What the child said.
#[derive(Clone, Debug, Default)]
struct Said {
    tries: BTreeMap<u64, Vec<Seen>>,
    shards: BTreeMap<u64, u64>,
    acks: BTreeMap<u64, u64>,
    refused: BTreeSet<u64>,
    /// (group, seq) to (LSN, durable).
    blind: BTreeMap<(u64, u64), (u64, bool)>,
    /// Newest acknowledged LSN before a flush, and what the flush gave.
    flushes: Vec<(u64, u64)>,
}

impl Said {
    fn parse(lines: &[String]) -> Said {
        let mut said = Said::default();
        for line in lines {
            let mut words = line.split(' ');
            let what = words.next().unwrap_or_default();
            let rest: Vec<Vec<u64>> = words.map(|w| w.split(':').map_while(|n| n.parse().ok()).collect()).collect();
            let number = |i: usize| rest[i][0];
            match what {
                "try" => {
                    let seen =
                        rest[2..].iter().map(|s| Seen { cell: s[0], writes: s[1] == 1, writer: s[2], lsn: s[3] });
                    said.tries.insert(number(0), seen.collect());
                    said.shards.insert(number(0), number(1));
                }
                "ack" => drop(said.acks.insert(number(0), number(1))),
                "no" => drop(said.refused.insert(number(0))),
                "blind" => drop(said.blind.insert((number(0), number(1)), (number(2), number(3) == 1))),
                "flush" => said.flushes.push((number(0), number(1))),
                _ => {}
            }
        }
        said
    }

    /// All that was acknowledged, as id (or sequence number) and LSN; and up to which LSN nothing may be lost.
    fn acknowledged(&self) -> (Vec<(u64, u64)>, u64) {
        let transactions = self.acks.iter().map(|(id, lsn)| (*id, *lsn));
        let all = transactions.chain(self.blind.iter().map(|((_, seq), (lsn, _))| (*seq, *lsn))).collect();
        let durable = self.blind.values().filter(|(_, durable)| *durable).map(|(lsn, _)| *lsn);
        let durable =
            durable.chain(self.acks.values().copied()).chain(self.flushes.iter().map(|(before, _)| *before)).max();
        (all, durable.unwrap_or(0))
    }
}

macro_rules! ensure {
    ($holds:expr, $($why:tt)+) => { if !$holds { return Err(format!($($why)+)); } };
}

/// The commits that are there, by LSN: what each writes, and what it saw.
type History = BTreeMap<u64, (u64, Vec<u64>, Vec<Seen>)>;

/// Adds a commit; two must not have the same LSN.
fn add(history: &mut History, lsn: u64, id: u64, writes: Vec<u64>, seen: Vec<Seen>) -> Result<(), String> {
    let before = history.insert(lsn, (id, writes, seen));
    ensure!(before.is_none(), "LSN {lsn} was used by {id:#x} and by {:#x}", before.map_or(0, |b| b.0));
    Ok(())
}

/// The transactions that are there: from each cell's last writer back to what was there before.
fn transactions(base: &[Cell], said: &Said, found: &[Cell], history: &mut History) -> Result<u64, String> {
    let mut lsns: BTreeMap<u64, u64> = BTreeMap::new();
    let mut written: BTreeMap<u64, BTreeSet<u64>> = BTreeMap::new();
    for cell in 0..CELLS {
        let (mut writer, mut lsn) = (found[cell as usize].writer(), found[cell as usize].lsn);
        while (writer, lsn) != (base[cell as usize].writer(), base[cell as usize].lsn) {
            let Some(seen) = said.tries.get(&writer) else {
                return Err(format!("cell {cell} was written by {writer:#x} at LSN {lsn}, which nobody announced"));
            };
            ensure!(!said.refused.contains(&writer), "{writer:#x} was refused, and is in cell {cell}");
            let known = *lsns.entry(writer).or_insert(lsn);
            ensure!(known == lsn, "{writer:#x} has LSN {known} and, in cell {cell}, {lsn}");
            ensure!(
                said.acks.get(&writer).is_none_or(|ack| *ack == lsn),
                "{writer:#x} was acknowledged as another LSN"
            );
            ensure!(written.entry(writer).or_default().insert(cell), "cell {cell} was written by {writer:#x} twice");
            let before = seen.iter().find(|s| s.cell == cell && s.writes);
            let Some(before) = before else {
                return Err(format!("{writer:#x} is in cell {cell}, which it did not write"));
            };
            ensure!(before.lsn < lsn, "cell {cell}: LSN {lsn} saw LSN {}", before.lsn);
            (writer, lsn) = (before.writer, before.lsn);
        }
    }
    for (id, cells) in &written {
        let all: BTreeSet<u64> = said.tries[id].iter().filter(|s| s.writes).map(|s| s.cell).collect();
        ensure!(*cells == all, "partial commit: {id:#x} wrote {all:?}, and is in {cells:?} only");
        add(history, lsns[id], *id, all.into_iter().collect(), said.tries[id].clone())?;
    }
    Ok(written.len() as u64)
}

/// The blind commits that are there: all up to the sequence number that is found in every cell of the group.
fn blind_commits(base: &[Cell], said: &Said, found: &[Cell], history: &mut History) -> Result<(), String> {
    for group in 0..GROUPS {
        let cells: Vec<u64> = group_cells(group).collect();
        let at = |cells_of: &[Cell]| cells.iter().map(|c| cells_of[*c as usize].writer()).collect::<BTreeSet<_>>();
        let (before, now) = (at(base), at(found));
        ensure!(now.len() == 1, "partial commit: group {group} is at {now:?}");
        let (before, now) = (before.first().copied().unwrap_or(0), now.first().copied().unwrap_or(0));
        ensure!(before <= now, "group {group} went back from {before} to {now}");
        for seq in before + 1..=now {
            // Only the last one may have found no time to be acknowledged.
            let newest = (seq == now).then_some(found[cells[0] as usize].lsn);
            let Some(lsn) = said.blind.get(&(group, seq)).map(|(lsn, _)| *lsn).or(newest) else {
                return Err(format!("group {group} is at {now}, but {seq} was never acknowledged"));
            };
            add(history, lsn, seq, cells.clone(), Vec::new())?;
        }
    }
    Ok(())
}

/// Goes through the history in the order of LSNs: each saw what is there when its turn comes.
fn replay(base: &[Cell], found: &[Cell], history: &History) -> Result<(), String> {
    let mut now = base.to_vec();
    for (lsn, (id, writes, seen)) in history {
        for Seen { cell, writer, lsn: at, .. } in seen {
            let there = &now[*cell as usize];
            ensure!(
                (there.writer(), there.lsn) == (*writer, *at),
                "{id:#x}, LSN {lsn}, saw {writer:#x} of LSN {at} in cell {cell}, where {:#x} of LSN {} was",
                there.writer(),
                there.lsn
            );
        }
        for cell in writes {
            let target = &mut now[*cell as usize];
            target.lsn = *lsn;
            match change(*id, *cell) {
                Change::Patch { offset, bytes } => {
                    target.bytes[offset as usize..][..bytes.len()].copy_from_slice(&bytes)
                }
                Change::Put(bytes) => target.bytes.copy_from_slice(&bytes),
                Change::Free => target.bytes.fill(0),
            }
        }
    }
    for (cell, (now, found)) in now.iter().zip(found).enumerate() {
        ensure!(now.lsn == found.lsn, "cell {cell} has LSN {}, by the history {}", found.lsn, now.lsn);
        ensure!(now.bytes == found.bytes, "cell {cell}, LSN {}, has other bytes than its history", now.lsn);
    }
    Ok(())
}

/// Whether what is `found` is what the commits up to `cut`, and no others, made of `base`; how many transactions.
fn check(base: &[Cell], said: &Said, found: &[Cell], cut: u64) -> Result<u64, String> {
    let mut history = History::new();
    let count = transactions(base, said, found, &mut history)?;
    blind_commits(base, said, found, &mut history)?;
    let (acknowledged, durable) = said.acknowledged();
    ensure!(durable <= cut, "LSN {durable} was durable, and the cut is {cut}");
    for (before, lsn) in &said.flushes {
        ensure!(before <= lsn, "a flush to LSN {lsn} left out {before}, which was acknowledged before it");
        // Before the first commit of an epoch a flush names the last LSN that the epoch leaves out.
        let vacuous = history.is_empty() && acknowledged.is_empty();
        ensure!(*lsn <= cut || vacuous, "all up to LSN {lsn} was flushed, and the cut is {cut}");
    }
    for (id, lsn) in acknowledged {
        let there = history.get(&lsn).is_some_and(|(there, ..)| *there == id);
        ensure!(there || lsn > cut, "{id:#x} was acknowledged with LSN {lsn} and is lost, though the cut is {cut}");
    }
    if let Some((newest, (id, ..))) = history.last_key_value() {
        ensure!(*newest <= cut, "{id:#x} is there with LSN {newest}, above the cut {cut}");
    }
    replay(base, found, &history)?;
    Ok(count)
}

/// Changes what was found in ways that no correct store could cause: the checker must complain of each.
fn checker_must_find(base: &[Cell], said: &Said, found: &[Cell], cut: u64) -> u64 {
    let mut planted = 0;
    let mut must_fail = |what: &str, said: &Said, found: &[Cell], cut: u64| {
        assert!(check(base, said, found, cut).is_err(), "the checker did not find {what}");
        planted += 1;
    };
    // One cell of a commit of several is as before.
    for cell in 0..ALL_CELLS as usize {
        let id = found[cell].writer();
        let several = said.tries.get(&id).is_some_and(|t| t.iter().filter(|s| s.writes).count() > 1);
        if found[cell] == base[cell] || cell < CELLS as usize && !several {
            continue;
        }
        let mut broken = found.to_vec();
        broken[cell] = base[cell].clone();
        must_fail("a commit without one of its pages", said, &broken, cut);
        let mut broken = found.to_vec();
        broken[cell].bytes[50] ^= 1;
        must_fail("a wrong byte", said, &broken, cut);
    }
    if let Some((id, seen)) = said.tries.iter().find(|(id, _)| said.acks.contains_key(id)) {
        let mut broken = said.clone();
        broken.tries.get_mut(id).expect("it is there").iter_mut().for_each(|s| s.lsn = s.lsn.wrapping_sub(1));
        must_fail("a read of what was never there", &broken, found, cut);
        if let Some(at) = seen.iter().position(|s| !s.writes && s.lsn > 0) {
            let mut broken = said.clone();
            broken.tries.get_mut(id).expect("it is there")[at].writer += 1;
            must_fail("a read out of the serial order", &broken, found, cut);
        }
    }
    if let Some(newest) = said.acks.values().max() {
        must_fail("a cut below what was acknowledged", said, found, newest - 1);
        let mut broken = said.clone();
        broken.acks.insert(u64::MAX, cut);
        must_fail("an acknowledged commit that is not there", &broken, found, cut);
        let mut broken = said.clone();
        broken.refused.extend(said.acks.keys());
        must_fail("a refused commit that is there", &broken, found, cut);
    }
    planted
}

#[test]
fn commits_over_shards_come_back_whole_in_order_and_as_they_saw_each_other() {
    let dir = scratch("kill-shards");
    let mut base = vec![Cell { lsn: 0, bytes: vec![0; PAGE] }; ALL_CELLS as usize];
    let (mut chance, mut newest) = (Chance::new(4), 0);
    let (mut there, mut crossing, mut planted) = (0, 0, 0);
    for round in 0..kills_count() {
        let run = Run::of_step(2 * round);
        let writer = Role::start(&format!("write {round}"), dir.path(), run);
        // One time in four the clock runs from the start, so that the kill meets the recovery.
        if chance.below(4) > 0 {
            writer.wait();
        }
        std::thread::sleep(Duration::from_millis(5 + chance.below(396)));
        let said = Said::parse(&writer.kill());
        let reader = Role::start(if round % 2 == 0 { "close" } else { "die" }, dir.path(), Run::of_step(2 * round + 1));
        reader.wait();
        let found = parse_dump(&std::fs::read(dir.path().join("dump")).expect("the dump is there"));
        let lines = reader.kill();
        let cut = lines.iter().find_map(|l| l.strip_prefix("cut ")?.parse().ok()).expect("the cut");
        let count = check(&base, &said, &found, cut).unwrap_or_else(|e| panic!("round {round}, {run:?}: {e}"));
        let (acknowledged, _) = said.acknowledged();
        if let Some(oldest) = acknowledged.iter().map(|(_, lsn)| lsn).min() {
            assert!(
                *oldest > newest,
                "round {round}: LSN {oldest} is not above those of former rounds, up to {newest}"
            );
        }
        newest = acknowledged.iter().map(|(_, lsn)| *lsn).chain([newest, cut]).max().unwrap_or(0);
        if planted < 500 {
            planted += checker_must_find(&base, &said, &found, cut);
        }
        let shards = |id: &u64| said.shards.get(id).is_some_and(|shards| *shards > 1);
        (there, crossing) = (there + count, crossing + said.acks.keys().filter(|id| shards(id)).count() as u64);
        base = found;
    }
    println!("{there} transactions are there, {crossing} acknowledged ones over several shards; {planted} canaries");
    assert!(there > kills_count() && crossing > kills_count() && planted > 0, "{there} {crossing} {planted}");
}
