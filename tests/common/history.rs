//! Transactions over several shards and what must be there of them after a crash: the oracle of
//! `tests/root/kill_shards.rs`.
//!
//! Each attempt is announced before its commit with all that it read, so the commits that are there
//! after a crash can be replayed in the order of their LSNs: each must have read exactly what the
//! replay holds, and the replay must end in the very bytes that are in the store.
//!
//! What is there: a chain for each cell (page), from its last writer back through what each writer
//! saw to what was there before. Groups of cells that are written blindly, all at a time, carry a
//! sequence number instead.

use super::Rng;
use corepage::{Change, PageId};
use std::collections::{BTreeMap, BTreeSet};

pub const PAGE: usize = 4096;
/// Cells of transactions.
pub const CELLS: u64 = 60;
/// Groups of cells behind them, each written blindly by one thread.
pub const GROUPS: u64 = 2;
const GROUP_CELLS: u64 = 5;
pub const ALL_CELLS: u64 = CELLS + GROUPS * GROUP_CELLS;

/// Each cell is in a run of pages of its own, so neighbours belong to different shards.
pub fn place(cell: u64) -> PageId {
    PageId::new(cell * 512 + cell % 7)
}

pub fn group_cells(group: u64) -> impl Iterator<Item = u64> {
    (0..GROUP_CELLS).map(move |i| CELLS + group * GROUP_CELLS + i)
}

/// What the writer `id` does to a cell; its first eight bytes are always the id.
pub fn change(id: u64, cell: u64) -> Change {
    let mut rng = Rng::of(&[id, cell]);
    let whole = rng.below(3) == 0;
    let mut bytes = rng.bytes(if whole { PAGE } else { 100 });
    bytes[..8].copy_from_slice(&id.to_le_bytes());
    if whole { Change::Put(bytes.into()) } else { Change::Patch { offset: 0, bytes: bytes.into() } }
}

pub fn writer_of(page: &[u8]) -> u64 {
    u64::from_le_bytes(page[..8].try_into().expect("eight bytes"))
}

/// A cell as found: LSN and bytes.
#[derive(Clone, Debug, PartialEq)]
pub struct Cell {
    pub lsn: u64,
    pub bytes: Vec<u8>,
}

impl Cell {
    pub fn writer(&self) -> u64 {
        writer_of(&self.bytes)
    }
}

pub fn parse_dump(dump: &[u8]) -> Vec<Cell> {
    let cell = |c: &[u8]| Cell { lsn: writer_of(c), bytes: c[8..].to_vec() };
    dump.chunks(8 + PAGE).map(cell).collect()
}

/// What an attempt saw at a cell, and whether it writes it.
#[derive(Clone, Copy, Debug)]
pub struct Seen {
    pub cell: u64,
    pub writes: bool,
    pub writer: u64,
    pub lsn: u64,
}

/// What the child said.
#[derive(Clone, Debug, Default)]
pub struct Said {
    pub tries: BTreeMap<u64, Vec<Seen>>,
    pub shards: BTreeMap<u64, u64>,
    pub acks: BTreeMap<u64, u64>,
    pub refused: BTreeSet<u64>,
    /// (group, seq) to (LSN, durable).
    pub blind: BTreeMap<(u64, u64), (u64, bool)>,
    /// Newest acknowledged LSN before a flush, and what the flush gave.
    pub flushes: Vec<(u64, u64)>,
}

impl Said {
    pub fn parse(lines: impl IntoIterator<Item = impl AsRef<str>>) -> Said {
        let mut said = Said::default();
        for line in lines {
            let mut words = line.as_ref().split(' ');
            let what = words.next().unwrap_or_default();
            let rest: Vec<Vec<u64>> =
                words.map(|w| w.split(':').map_while(|n| n.parse().ok()).collect()).collect();
            let number = |i: usize| rest[i][0];
            match what {
                "try" => {
                    let seen = rest[2..].iter().map(|s| Seen {
                        cell: s[0],
                        writes: s[1] == 1,
                        writer: s[2],
                        lsn: s[3],
                    });
                    said.tries.insert(number(0), seen.collect());
                    said.shards.insert(number(0), number(1));
                }
                "ack" => drop(said.acks.insert(number(0), number(1))),
                "no" => drop(said.refused.insert(number(0))),
                "blind" => {
                    said.blind.insert((number(0), number(1)), (number(2), number(3) == 1));
                }
                "flush" => said.flushes.push((number(0), number(1))),
                _ => {}
            }
        }
        said
    }

    /// All that was acknowledged, as id (or sequence number) and LSN; and up to which LSN nothing
    /// may be lost.
    pub fn acknowledged(&self) -> (Vec<(u64, u64)>, u64) {
        let transactions = self.acks.iter().map(|(id, lsn)| (*id, *lsn));
        let all = transactions
            .chain(self.blind.iter().map(|((_, seq), (lsn, _))| (*seq, *lsn)))
            .collect();
        let durable = self.blind.values().filter(|(_, durable)| *durable).map(|(lsn, _)| *lsn);
        let durable = durable
            .chain(self.acks.values().copied())
            .chain(self.flushes.iter().map(|(before, _)| *before))
            .max();
        (all, durable.unwrap_or(0))
    }
}

macro_rules! ensure {
    ($holds:expr, $($why:tt)+) => { if !$holds { return Err(format!($($why)+)); } };
}

/// The commits that are there, by LSN: what each writes, and what it saw.
type History = BTreeMap<u64, (u64, Vec<u64>, Vec<Seen>)>;

/// Adds a commit; two must not have the same LSN.
fn add(
    history: &mut History,
    lsn: u64,
    id: u64,
    writes: Vec<u64>,
    seen: Vec<Seen>,
) -> Result<(), String> {
    let before = history.insert(lsn, (id, writes, seen));
    ensure!(
        before.is_none(),
        "LSN {lsn} was used by {id:#x} and by {:#x}",
        before.map_or(0, |b| b.0)
    );
    Ok(())
}

/// The transactions that are there: from each cell's last writer back to what was there before.
fn transactions(
    base: &[Cell],
    said: &Said,
    found: &[Cell],
    history: &mut History,
) -> Result<u64, String> {
    let mut lsns: BTreeMap<u64, u64> = BTreeMap::new();
    let mut written: BTreeMap<u64, BTreeSet<u64>> = BTreeMap::new();
    for cell in 0..CELLS {
        let (mut writer, mut lsn) = (found[cell as usize].writer(), found[cell as usize].lsn);
        while (writer, lsn) != (base[cell as usize].writer(), base[cell as usize].lsn) {
            let Some(seen) = said.tries.get(&writer) else {
                return Err(format!(
                    "cell {cell} was written by {writer:#x} at LSN {lsn}, which nobody announced"
                ));
            };
            ensure!(
                !said.refused.contains(&writer),
                "{writer:#x} was refused, and is in cell {cell}"
            );
            let known = *lsns.entry(writer).or_insert(lsn);
            ensure!(known == lsn, "{writer:#x} has LSN {known} and, in cell {cell}, {lsn}");
            ensure!(
                said.acks.get(&writer).is_none_or(|ack| *ack == lsn),
                "{writer:#x} was acknowledged as another LSN"
            );
            ensure!(
                written.entry(writer).or_default().insert(cell),
                "cell {cell} was written by {writer:#x} twice"
            );
            let before = seen.iter().find(|s| s.cell == cell && s.writes);
            let Some(before) = before else {
                return Err(format!("{writer:#x} is in cell {cell}, which it did not write"));
            };
            ensure!(before.lsn < lsn, "cell {cell}: LSN {lsn} saw LSN {}", before.lsn);
            (writer, lsn) = (before.writer, before.lsn);
        }
    }
    for (id, cells) in &written {
        let all: BTreeSet<u64> =
            said.tries[id].iter().filter(|s| s.writes).map(|s| s.cell).collect();
        ensure!(*cells == all, "partial commit: {id:#x} wrote {all:?}, and is in {cells:?} only");
        add(history, lsns[id], *id, all.into_iter().collect(), said.tries[id].clone())?;
    }
    Ok(written.len() as u64)
}

/// The blind commits that are there: all up to the sequence number that is found in every cell of
/// the group.
fn blind_commits(
    base: &[Cell],
    said: &Said,
    found: &[Cell],
    history: &mut History,
) -> Result<(), String> {
    for group in 0..GROUPS {
        let cells: Vec<u64> = group_cells(group).collect();
        let at = |cells_of: &[Cell]| {
            cells.iter().map(|c| cells_of[*c as usize].writer()).collect::<BTreeSet<_>>()
        };
        let (before, now) = (at(base), at(found));
        ensure!(now.len() == 1, "partial commit: group {group} is at {now:?}");
        let (before, now) =
            (before.first().copied().unwrap_or(0), now.first().copied().unwrap_or(0));
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
                "{id:#x}, LSN {lsn}, saw {writer:#x} of LSN {at} in cell {cell}, where {:#x} of \
                 LSN {} was",
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
        ensure!(
            now.lsn == found.lsn,
            "cell {cell} has LSN {}, by the history {}",
            found.lsn,
            now.lsn
        );
        ensure!(
            now.bytes == found.bytes,
            "cell {cell}, LSN {}, has other bytes than its history",
            now.lsn
        );
    }
    Ok(())
}

/// What a check went through.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    /// Transactions that are there.
    pub there: u64,
    /// Acknowledgements, each of which was checked.
    pub acknowledged: u64,
    /// Acknowledged transactions over several shards.
    pub crossing: u64,
    /// Transactions under way at the kill that are there, whole.
    pub doubt_there: u64,
    /// Those of which nothing is there.
    pub doubt_gone: u64,
}

impl std::ops::AddAssign for Counts {
    fn add_assign(&mut self, more: Counts) {
        self.there += more.there;
        self.acknowledged += more.acknowledged;
        self.crossing += more.crossing;
        self.doubt_there += more.doubt_there;
        self.doubt_gone += more.doubt_gone;
    }
}

/// Whether what is `found` is what the commits up to `cut`, and no others, made of `base`.
pub fn check(base: &[Cell], said: &Said, found: &[Cell], cut: u64) -> Result<Counts, String> {
    check_known(base, said, said, found, cut)
}

/// The same after a crash in the midst of what was said: what is durable is what was `known` to be
/// by then.
pub fn check_known(
    base: &[Cell],
    said: &Said,
    known: &Said,
    found: &[Cell],
    cut: u64,
) -> Result<Counts, String> {
    let mut history = History::new();
    let there = transactions(base, said, found, &mut history)?;
    blind_commits(base, said, found, &mut history)?;
    let (acknowledged, _) = said.acknowledged();
    let (heard, durable) = known.acknowledged();
    ensure!(durable <= cut, "LSN {durable} was durable, and the cut is {cut}");
    for (before, lsn) in &known.flushes {
        ensure!(
            before <= lsn,
            "a flush to LSN {lsn} left out {before}, which was acknowledged before it"
        );
        // Before the first commit of an epoch a flush names the last LSN that the epoch leaves out.
        let vacuous = history.is_empty() && heard.is_empty();
        ensure!(*lsn <= cut || vacuous, "all up to LSN {lsn} was flushed, and the cut is {cut}");
    }
    for (id, lsn) in &acknowledged {
        let there = history.get(lsn).is_some_and(|(there, ..)| there == id);
        ensure!(
            there || *lsn > cut,
            "{id:#x} was acknowledged with LSN {lsn} and is lost, though the cut is {cut}"
        );
    }
    if let Some((newest, (id, ..))) = history.last_key_value() {
        ensure!(*newest <= cut, "{id:#x} is there with LSN {newest}, above the cut {cut}");
    }
    replay(base, found, &history)?;
    let doubtful = |id: &&u64| !said.acks.contains_key(id) && !said.refused.contains(id);
    let is_there: BTreeSet<u64> = history.values().map(|(id, ..)| *id).collect();
    let (doubt_there, doubt_gone): (Vec<u64>, Vec<u64>) =
        said.tries.keys().filter(doubtful).partition(|id| is_there.contains(id));
    let crossing =
        said.acks.keys().filter(|id| said.shards.get(id).is_some_and(|shards| *shards > 1));
    Ok(Counts {
        there,
        acknowledged: acknowledged.len() as u64,
        crossing: crossing.count() as u64,
        doubt_there: doubt_there.len() as u64,
        doubt_gone: doubt_gone.len() as u64,
    })
}
