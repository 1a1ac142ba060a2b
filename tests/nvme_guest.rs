//! A polled NVMe disk: a guest with an emulated one, in which the store polls for completions (asserted), or says why it
//! does not; then the power is cut, and the disk's log replayed as in `tests/crash_replay.rs`. `scripts/nvme-guest` runs
//! these; 2 power cuts for each machine, or as many as COREPAGE_GUEST_CUTS says.

// Real machines take real time.
#![allow(clippy::disallowed_methods)]

mod common;

use common::guest::{Guest, Machine, kernel};
use common::recording::{Recording, Tally};
use common::role::{Task, say};
use common::workload::{open, work};
use common::{Chance, seed};
use std::time::Duration;

/// Not a test of its own: what the child does, in the guest.
#[test]
fn child() {
    let Some(Task { role, dir, run }) = Task::of_this_process() else { return };
    let (store, volume) = open(&dir.join("store"), run);
    say(format_args!("\ndisk: {}", store.disk_report()));
    say("\nready");
    match role.as_str() {
        "write" => work(&store, &volume, 0, false),
        role => panic!("no role {role}"),
    }
}

fn cuts_count() -> u64 {
    std::env::var("COREPAGE_GUEST_CUTS").ok().and_then(|text| text.parse().ok()).unwrap_or(2)
}

/// What the guest said of its disk, and what the store did.
fn said<'l>(lines: &'l [(u64, String)], beginning: &str) -> &'l str {
    let line = lines.iter().find_map(|(_, line)| line.strip_prefix(beginning));
    line.unwrap_or_else(|| panic!("no line `{beginning}`: {:?}", &lines[lines.len().saturating_sub(30)..]))
}

fn power_is_cut(machine: Machine, polls: &str, seed_: u64) {
    let Some(kernel) = kernel() else { return };
    let guest = Guest::boot(&kernel, machine, "write");
    guest.wait();
    std::thread::sleep(Duration::from_millis(3000 + 50 * cuts_count()));
    let (dir, lines) = guest.cut();
    let (queue, disk) = (said(&lines, "queue "), said(&lines, "disk: "));
    let fua = lines.iter().find_map(|(_, line)| line.strip_prefix("fua writes ")).unwrap_or("not counted");
    println!("{machine:?}: {queue}; {disk}; writes with FUA: {fua}");
    let io_poll = u64::from(machine.poll_queues > 0);
    assert_eq!(queue, format!("io_poll={io_poll} logical_block_size={}", machine.block_bytes));
    assert!(disk.starts_with("io_uring on ext4, direct I/O") && disk.contains(polls), "{disk}");
    let before = dir.path().join("before");
    let Some(mut recording) = Recording::new("ext4", &dir.path().join("log"), &before, lines) else { return };
    let tally: Tally = recording.replay(cuts_count(), seed_, &mut Chance::new(seed(seed_)));
    let flushes = recording.disk.log.entries.iter().filter(|entry| entry.flushes()).count();
    println!("{machine:?}: {tally:?}; {} entries, {flushes} flushes", recording.end());
    assert!(tally.states == cuts_count() && tally.required > 0, "{tally:?}");
}

#[test]
fn polled_with_blocks_of_512_bytes() {
    power_is_cut(Machine { block_bytes: 512, poll_queues: 2, shards: 2 }, ", polled", 1);
}

#[test]
fn polled_with_blocks_of_4096_bytes() {
    power_is_cut(Machine { block_bytes: 4096, poll_queues: 2, shards: 1 }, ", polled", 2);
}

#[test]
fn without_queues_for_polling_the_store_does_not_poll_and_says_so() {
    let why = ", not polled (the device has no queues for it: a polled read says ";
    power_is_cut(Machine { block_bytes: 512, poll_queues: 0, shards: 2 }, why, 3);
}
