//! A polled NVMe disk: a guest with an emulated one, in which the store polls for completions
//! (asserted), or says why it does not; then the power is cut, and the disk's log replayed as in
//! `tests/root/crash_replay.rs`. And a disk with a volatile cache on which single writes are made
//! durable by FUA. `scripts/nvme-guest` runs these; 2 power cuts for each machine, or as many as
//! COREPAGE_GUEST_CUTS says.

// Real machines take real time.
#![allow(clippy::disallowed_methods)]

use crate::common;
use common::guest::{Disk, Guest, Machine, kernel};
use common::history::{change, group_cells, place};
use common::recording::{Counts, Recording};
use common::replay::Subset;
use common::role::{Run, Task, say};
use common::workload::{open, work};
use common::{Rng, seed};
use corepage::{Durability, Store, Volume};
use futures_lite::future::block_on;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
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
        "fail-write" | "fail-flush" => until_a_commit_fails(&volume),
        "fail-read" => until_a_read_fails(store, volume, &dir.join("store"), run),
        role => panic!("no role {role}"),
    }
}

/// As the blind commits of the ordinary work, all durable.
fn until_a_commit_fails(volume: &Volume) {
    for seq in 1.. {
        let changes = group_cells(0).map(|cell| (place(cell), change(seq, cell))).collect();
        match block_on(volume.apply(changes, Durability::Durable)) {
            Ok(lsn) => say(format_args!("blind 0 {seq} {lsn} 1")),
            Err(e) => return say(format_args!("\nfailed: {e}")),
        }
    }
}

/// What was read once is in memory: the store is opened anew for each time.
fn until_a_read_fails(store: Store, volume: Volume, dir: &Path, run: Run) {
    let changes = group_cells(0).map(|cell| (place(cell), change(1, cell))).collect();
    let lsn = block_on(volume.apply(changes, Durability::Durable)).expect("a commit");
    say(format_args!("blind 0 1 {lsn} 1"));
    block_on(store.close()).expect("the store closes");
    let once = async || -> corepage::Result<()> {
        let store = Store::open(dir, run.options()).await?;
        let volume = store.volume("cells").await?.expect("it was made");
        for cell in group_cells(0) {
            volume.read(place(cell)).await?;
        }
        store.close().await
    };
    loop {
        if let Err(e) = block_on(once()) {
            return say(format_args!("\nfailed: {e}"));
        }
    }
}

fn cuts_count() -> u64 {
    std::env::var("COREPAGE_GUEST_CUTS").ok().and_then(|text| text.parse().ok()).unwrap_or(2)
}

/// What the guest said of its disk, and what the store did.
fn said<'l>(lines: &'l [(u64, String)], beginning: &str) -> &'l str {
    let line = lines.iter().find_map(|(_, line)| line.strip_prefix(beginning));
    line.unwrap_or_else(|| {
        panic!("no line `{beginning}`: {:?}", &lines[lines.len().saturating_sub(30)..])
    })
}

fn power_is_cut(machine: Machine, polls: &str, seed_: u64) {
    let Some(kernel) = kernel() else { return };
    let guest = Guest::boot(&kernel, machine, "write");
    guest.wait();
    std::thread::sleep(Duration::from_millis(3000 + 50 * cuts_count()));
    let (dir, lines) = guest.cut();
    let (queue, disk) = (said(&lines, "queue "), said(&lines, "disk: "));
    let fua = lines
        .iter()
        .rev()
        .find_map(|(_, line)| line.strip_prefix("fua writes "))
        .expect("counted every two seconds");
    println!("{machine:?}: {queue}; {disk}; writes with FUA: {fua}");
    let io_poll = u64::from(machine.poll_queues > 0);
    // QEMU's NVMe controller calls its cache volatile and offers FUA, whatever it does.
    assert_eq!(
        queue,
        format!("io_poll={io_poll} logical_block_size={} fua=1 write back", machine.block_bytes)
    );
    assert!(
        fua.parse::<u64>().is_ok_and(|count| count > 10),
        "log writes are to be durable by FUA: {fua}"
    );
    assert!(disk.starts_with("io_uring on ext4, direct I/O") && disk.contains(polls), "{disk}");
    let before = dir.path().join("before");
    let Some(mut recording) = Recording::new("ext4", &dir.path().join("log"), &before, lines)
    else {
        return;
    };
    let counts: Counts = recording.replay(cuts_count(), seed_, &mut Rng::new(seed(seed_)));
    let flushes = recording.disk.log.entries.iter().filter(|entry| entry.flushes()).count();
    println!("{machine:?}: {counts:?}; {} entries, {flushes} flushes", recording.end());
    assert!(counts.states == cuts_count() && counts.required > 0, "{counts:?}");
}

#[test]
#[ignore = "scripts/nvme-guest runs it: it needs a kernel for the guest"]
fn polled_with_blocks_of_512_bytes() {
    power_is_cut(
        Machine { block_bytes: 512, poll_queues: 2, shards: 2, disk: Disk::Nvme },
        ", polled",
        1,
    );
}

#[test]
#[ignore = "scripts/nvme-guest runs it: it needs a kernel for the guest"]
fn polled_with_blocks_of_4096_bytes() {
    power_is_cut(
        Machine { block_bytes: 4096, poll_queues: 2, shards: 1, disk: Disk::Nvme },
        ", polled",
        2,
    );
}

#[test]
#[ignore = "scripts/nvme-guest runs it: it needs a kernel for the guest"]
fn without_queues_for_polling_the_store_does_not_poll_and_says_so() {
    let why = ", not polled (the device has no queues for it: a polled read says ";
    power_is_cut(Machine { block_bytes: 512, poll_queues: 0, shards: 2, disk: Disk::Nvme }, why, 3);
}

/// What is acknowledged after one write with FUA, and no flush, is there after the power has gone.
#[test]
#[ignore = "scripts/nvme-guest runs it: it needs a kernel for the guest"]
fn writes_with_fua_are_durable_on_a_disk_with_a_volatile_cache() {
    let why = ", not polled (the device has no queues for it: a polled read says ";
    power_is_cut(
        Machine { block_bytes: 512, poll_queues: 0, shards: 2, disk: Disk::ScsiWithCache },
        why,
        4,
    );
}

/// QEMU's NVMe controller offers FUA and ignores it (10.0.2): with a write cache, what the store
/// wrote with `RWF_DSYNC` is lost with the power. The oracle must find that. If this fails, QEMU
/// has learnt it: let all machines have the cache then.
#[test]
#[ignore = "scripts/nvme-guest runs it: it needs a kernel for the guest"]
fn a_controller_that_ignores_fua_is_found() {
    let Some(kernel) = kernel() else { return };
    let machine =
        Machine { block_bytes: 512, poll_queues: 2, shards: 2, disk: Disk::NvmeWithCache };
    let guest = Guest::boot(&kernel, machine, "write");
    guest.wait();
    std::thread::sleep(Duration::from_millis(1500));
    let (dir, lines) = guest.cut();
    let (log, before) = (dir.path().join("log"), dir.path().join("before"));
    let Some(mut recording) = Recording::new("ext4", &log, &before, lines) else { return };
    let end = recording.end();
    let (image, _) = recording.disk.at(end, Subset::Nothing, &mut Rng::new(seed(6)));
    let found = recording.examine(&image, &recording.known(end), Run::of_step(1));
    println!("{machine:?}: {found:?}");
    assert!(found.is_err(), "nothing is lost: does the controller act on FUA now?");
}

/// The library's own tests of its disks, on a disk that is polled.
#[test]
#[ignore = "scripts/nvme-guest runs it: it needs a kernel for the guest"]
fn the_tests_of_the_disks_pass_on_a_polled_one() {
    let Some(kernel) = kernel() else { return };
    if std::env::var("COREPAGE_GUEST_LIB_TESTS").is_ok_and(|path| path.is_empty()) {
        panic!("scripts/nvme-guest did not build the library's tests");
    }
    let machine = Machine { block_bytes: 4096, poll_queues: 2, shards: 1, disk: Disk::Nvme };
    let guest = Guest::boot(&kernel, machine, "lib-tests");
    guest.wait();
    let (_dir, lines) = guest.cut();
    let (queue, result, end) =
        (said(&lines, "queue "), said(&lines, "test result: "), said(&lines, "ended with "));
    println!("{machine:?}: {queue}; {result}");
    let telling = |line: &&(u64, String)| line.1.contains("FAILED") || line.1.contains("panicked");
    for (n, line) in lines.iter().enumerate().filter(|(_, line)| telling(line)) {
        println!("{}: {}", line.1, lines.get(n + 1).map_or("", |next| &next.1));
    }
    assert!(queue.starts_with("io_poll=1 logical_block_size=4096 "), "{queue}");
    assert!(
        result.starts_with("ok. ") && !result.starts_with("ok. 0 passed") && end == "0",
        "{result}"
    );
}

// --- errors of the device ---

/// Puts a fault below the guest's disk, over QEMU's monitor: from now on each operation of this
/// kind fails.
fn break_disk(dir: &Path, iotype: &str) {
    let socket = UnixStream::connect(dir.join("qmp")).expect("QEMU's monitor");
    let mut answers = BufReader::new(socket.try_clone().expect("a descriptor")).lines();
    let mut ask = |command: &str| {
        (&socket).write_all(command.as_bytes()).expect("the monitor reads");
        let answer = answers
            .by_ref()
            .map_while(Result::ok)
            .find(|line| line.contains("return") || line.contains("error"));
        let answer = answer.expect("the monitor answers");
        assert!(!answer.contains("error"), "{command}: {answer}");
    };
    ask(r#"{"execute":"qmp_capabilities"}"#);
    ask(&format!(
        r#"{{"execute":"blockdev-add","arguments":{{"driver":"blkdebug","node-name":"faulty","image":"logged","inject-error":[{{"event":"none","iotype":"{iotype}","errno":5}}]}}}}"#
    ));
    ask(
        r#"{"execute":"blockdev-reopen","arguments":{"options":[{"driver":"raw","node-name":"top","file":"faulty"}]}}"#,
    );
}

/// The fault fires (the guest's kernel says so), the store fails (the child says so), and what was
/// acknowledged until then is there. Flushes: with no write cache each write brings one, so it is a
/// write that fails by its flush.
fn device_fails(iotype: &str) {
    let Some(kernel) = kernel() else { return };
    let machine = Machine { block_bytes: 512, poll_queues: 2, shards: 2, disk: Disk::Nvme };
    let guest = Guest::boot(&kernel, machine, &format!("fail-{iotype}"));
    guest.wait();
    // Until something was acknowledged.
    std::thread::sleep(Duration::from_millis(1500));
    break_disk(guest.dir.path(), iotype);
    guest.wait();
    let (dir, lines) = guest.cut();
    let (kernels, failed) = (said(&lines, "kernel: "), said(&lines, "failed: "));
    println!("{iotype}: {kernels}; {failed}");
    assert!(said(&lines, "disk: ").contains(", polled"));
    assert!(kernels.contains("error, dev nvme0n1"), "the fault did not fire: {kernels}");
    let (log, before) = (dir.path().join("log"), dir.path().join("before"));
    let Some(mut recording) = Recording::new("ext4", &log, &before, lines) else { return };
    let (end, mut rng) = (recording.end(), Rng::new(seed(7)));
    let (image, _) = recording.disk.at(end, Subset::Nothing, &mut rng);
    let known = recording.known(end);
    let there =
        recording.examine(&image, &known, Run::of_step(2)).expect("what was acknowledged is there");
    println!(
        "{iotype}: {there} transactions are there, {} acknowledgements were heard",
        known.acknowledged().0.len()
    );
    assert!(!known.acknowledged().0.is_empty(), "nothing was acknowledged before the fault");
}

#[test]
#[ignore = "scripts/nvme-guest runs it: it needs a kernel for the guest"]
fn an_error_of_the_polled_device_is_told_and_costs_nothing_that_was_acknowledged() {
    for iotype in ["write", "flush", "read"] {
        device_fails(iotype);
    }
}
