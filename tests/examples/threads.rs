//! A plain threaded program: transfers between accounts, each a transaction over two pages, by as
//! many threads as you like.
//!
//! ```text
//! cargo run --release --example threads -- DIR [SECONDS]
//! ```
//! Prints a line for each transfer once it is durable; kill it at any time, and start it again: the
//! sum is checked first.

// A program takes real time.
#![allow(clippy::disallowed_methods)]

use corepage::blocking::Wait;
use corepage::{ErrorKind, Options, PageId, Result, Store, Volume};
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

const ACCOUNTS: u64 = 1000;
const THREADS: u64 = 4;
const EACH: i64 = 100;

/// Pages far from each other, so that accounts are of all shards.
fn account(n: u64) -> PageId {
    PageId::new(n * 37)
}

fn number(page: &[u8]) -> i64 {
    i64::from_le_bytes(page[..8].try_into().expect("a page has 8 bytes"))
}

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let dir = arguments.next().expect("usage: threads DIR [SECONDS]");
    let seconds =
        arguments.next().map_or(1, |seconds| seconds.parse().expect("SECONDS is a number"));
    let store = Store::open(dir, Options::default()).wait()?;
    let bank = match store.volume("bank").wait()? {
        Some(bank) => bank,
        None => store.create_volume("bank", 1 << 30).wait()?,
    };
    check(&bank)?;
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (store, bank, stop) = (&store, &bank, &stop);
        let work: Vec<_> = (0..THREADS)
            .map(|thread| scope.spawn(move || transfers(store, bank, thread, stop)))
            .collect();
        std::thread::sleep(Duration::from_secs(seconds));
        stop.store(true, Ordering::Relaxed);
        work.into_iter().try_for_each(|thread| thread.join().expect("no panic"))
    })?;
    check(&bank)?;
    store.close().wait()
}

/// No money is made or lost.
fn check(bank: &Volume) -> Result<()> {
    let pages = bank.read_many(&(0..ACCOUNTS).map(account).collect::<Vec<_>>()).wait()?;
    let sum: i64 = pages.iter().map(|page| number(page)).sum();
    assert_eq!(sum, 0, "the accounts do not add up");
    println!("{ACCOUNTS} accounts add up");
    Ok(())
}

fn transfers(store: &Store, bank: &Volume, thread: u64, stop: &AtomicBool) -> Result<()> {
    let mut dice = thread;
    let mut throw = |below: u64| {
        dice = dice.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (dice >> 33) % below
    };
    while !stop.load(Ordering::Relaxed) {
        let (from, to, amount) = (throw(ACCOUNTS), throw(ACCOUNTS), throw(EACH as u64) as i64);
        let lsn = loop {
            let mut txn = store.begin();
            for (account_no, change) in [(from, -amount), (to, amount)] {
                let balance = number(&txn.read(bank, account(account_no)).wait()?);
                txn.patch(bank, account(account_no), 0, (balance + change).to_le_bytes().to_vec())?;
            }
            match txn.commit().wait() {
                Ok(lsn) => break lsn,
                // Somebody else was at one of the accounts.
                Err(error) if error.kind() == ErrorKind::Conflict => {}
                Err(error) => return Err(error),
            }
        };
        let line = format!("transfer {from} {to} {amount} durable at {lsn}\n");
        std::io::stdout().write_all(line.as_bytes()).expect("somebody reads");
    }
    Ok(())
}
