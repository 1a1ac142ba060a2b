//! The work that is cut off by a crash: transactions, blind commits and flushes of several threads,
//! each announced and acknowledged on stdout, for the oracle in `tests/common/history.rs`.

use super::Rng;
use super::history::{ALL_CELLS, CELLS, GROUPS, change, group_cells, place, writer_of};
use super::role::{Run, say};
use corepage::{Durability, ErrorKind, Store, Volume};
use futures_lite::future::block_on;
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// The first few cells are wanted by all transactions.
const HOT: u64 = 8;
const THREADS: u64 = 3;

/// The store in `dir`, and its volume of cells; both are made if they are not there.
pub fn open(dir: &Path, run: Run) -> (Store, Volume) {
    let store = block_on(Store::open(dir, run.options())).expect("the store opens after a kill");
    let volume = match block_on(store.volume("cells")).expect("volumes can be looked up") {
        Some(volume) => volume,
        None => block_on(store.create_volume("cells", 1 << 30)).expect("a volume is made"),
    };
    (store, volume)
}

/// `early`: all that is acknowledged is called durable.
pub fn work(store: &Store, volume: &Volume, round: u64, early: bool) {
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
            scope.spawn(move || blind(volume, group, newest, early));
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
    let mut rng = Rng::of(&[id]);
    let mut cells = BTreeSet::new();
    let count = 2 + rng.below(5);
    while (cells.len() as u64) < count {
        cells.insert(if rng.below(4) == 0 { rng.below(HOT) } else { rng.below(ALL_CELLS) });
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
        let writes = cell < CELLS && (!changed || rng.below(3) > 0);
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
fn blind(volume: &Volume, group: u64, newest: &AtomicU64, early: bool) {
    let first = group_cells(group).next().expect("a group has cells");
    let mut seq = writer_of(&block_on(volume.read(place(first))).expect("the cell can be read"));
    loop {
        seq += 1;
        let durable = Rng::of(&[group, seq, 1]).below(4) == 0;
        let durability = if durable { Durability::Durable } else { Durability::Buffered };
        let lsn = loop {
            let changes = group_cells(group).map(|cell| (place(cell), change(seq, cell))).collect();
            match block_on(volume.apply(changes, durability)) {
                Ok(lsn) => break lsn,
                Err(e) => assert!(matches!(e.kind(), ErrorKind::Conflict | ErrorKind::Busy), "{e}"),
            }
            std::thread::sleep(Duration::from_millis(1));
        };
        say(format_args!("blind {group} {seq} {lsn} {}", u8::from(durable || early)));
        newest.fetch_max(lsn.get(), Ordering::SeqCst);
        if seq.is_multiple_of(3) {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}
