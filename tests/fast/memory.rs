//! The memory of a server process: what `--memory` says, whatever its clients do.
//!
//! If this fails, a server in a container with a limit is killed by the kernel, and one without a
//! limit takes the machine's memory away from everybody else: in both cases because one client asks
//! for much and reads nothing.

// Real processes take real time; nothing here is a matter of timing.
#![allow(clippy::disallowed_methods)]

use crate::common;
use common::nbd::{
    BLOCK_STATUS, CACHE, Client, NO_HOLE, READ, TRIM, WRITE, WRITE_ZEROES, request_bytes,
};
use common::{Served, corepage, scratch};

const MIB: u64 = 1 << 20;
/// What the process may take beside its memory, as `serve --help` says: this, and this for each
/// shard.
const CONSTANT: u64 = 16 * MIB;
const SHARD_CONSTANT: u64 = 4 * MIB;
const SHARDS: u64 = 2;

fn status(served: &Served, key: &str) -> u64 {
    let told = std::fs::read_to_string(format!("/proc/{}/status", served.id())).expect("it runs");
    let line = told
        .lines()
        .find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))
        .expect("a line of that name");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") << 10
}

struct Hostile {
    served: Served,
    path: String,
    bound: u64,
}

impl Hostile {
    fn start(dir: &std::path::Path, memory: u64) -> Hostile {
        let path = dir.join("s").to_str().expect("UTF-8").to_owned();
        let (nbd, memory_text, shards) =
            (format!("unix:{path}"), memory.to_string(), SHARDS.to_string());
        let arguments = [
            "--nbd",
            &nbd,
            "--memory",
            &memory_text,
            "--volume",
            "disk",
            "--size",
            "1T",
            "--shards",
            &shards,
        ];
        let served = Served::start_with(&dir.join("store"), &arguments);
        Hostile { served, path, bound: memory / 10 * 11 + CONSTANT + SHARDS * SHARD_CONSTANT }
    }

    fn client(&self) -> Client {
        Client::go(&self.path, "disk")
    }

    /// Asks for 2 GiB, and never reads any of it.
    fn stalled_reader(&self, structured: bool) -> Client {
        let mut client =
            if structured { Client::structured(&self.path, "disk") } else { self.client() };
        let asked: Vec<u8> =
            (0..64).flat_map(|n| request_bytes(0, READ, n, n % 2 * 32 * MIB, 32 << 20)).collect();
        client.send(&asked);
        client
    }

    #[track_caller]
    fn check(&self, after: &str) {
        let (now, peak) = (status(&self.served, "VmRSS"), status(&self.served, "VmHWM"));
        eprintln!(
            "{after}: {} MiB now, {} MiB at most, of {}",
            now / MIB,
            peak / MIB,
            self.bound / MIB
        );
        assert!(
            peak <= self.bound,
            "{} MiB after {after}, at most {} MiB were to be",
            peak / MIB,
            self.bound / MIB
        );
    }
}

/// Many requests at a time, each answered without data.
fn all(client: &mut Client, command: u16, flags: u16, ranges: impl Iterator<Item = (u64, u32)>) {
    let ranges: Vec<_> = ranges.collect();
    for part in ranges.chunks(64) {
        for (offset, length) in part {
            client.request(flags, command, *offset, *length, &[]);
        }
        for _ in part {
            assert_eq!(client.reply().1, 0, "command {command}");
        }
    }
}

fn hostile_mix(memory: u64, readers: usize) {
    let dir = scratch("memory");
    let hostile = Hostile::start(dir.path(), memory);
    hostile.check("the start");
    let mut good = hostile.client();
    let data: Vec<u8> = (0..32 << 20).map(|n: u32| (n >> 12) as u8 | 1).collect();
    for at in [0, 32 * MIB] {
        good.write(0, at, &data);
    }
    good.flush();
    assert!(good.read(32 * MIB, 32 << 20) == data);
    hostile.check("writing 64 MiB in two requests");
    let stalled: Vec<Client> = (0..readers).map(|n| hostile.stalled_reader(n % 2 == 0)).collect();
    for round in 0..2 {
        good.write(0, 0, &data[..8 << 20]);
        assert!(good.read(0, 32 << 20) == data, "round {round}: another client's data");
    }
    hostile.check("stalled readers");
    let mut others: Vec<Client> = (0..4).map(|_| hostile.client()).collect();
    for client in &mut others {
        all(client, WRITE_ZEROES, NO_HOLE, (0..4).map(|n| (n * 64 * MIB + 256 * MIB, 1 << 20)));
        all(client, TRIM, 0, (0..64).map(|n| (n * 4 * MIB + 256 * MIB, 4 << 20)));
        all(client, CACHE, 0, (0..3).map(|n| (n * 32 * MIB, 32 << 20)));
    }
    let mut mapped = Client::structured(&hostile.path, "disk");
    for n in 0..64 {
        mapped.request(0, BLOCK_STATUS, n * 1024 * MIB, 1 << 30, &[]);
    }
    for n in 0..64 {
        good.write(0, n * 2 * MIB + 512 * MIB, &data[..4096]);
    }
    hostile.check("trims, zeroes, caching, block status");
    for n in 0..32 {
        good.read((100 << 30) + n * 32 * MIB, 32 << 20);
    }
    hostile.check("reading 1 GiB of nothing");
    let store = dir.path().join("store");
    for _ in 0..3 {
        let listed = corepage(&["volume", "list", "--dir", store.to_str().expect("UTF-8")])
            .output()
            .expect("it runs");
        assert!(listed.status.success());
    }
    let senders: Vec<Client> = (0..16)
        .map(|n| {
            let mut client = hostile.client();
            client.send(&request_bytes(0, WRITE, 1, n * 64 * MIB, 32 << 20));
            client.send(&data[..64 << 10]);
            client
        })
        .collect();
    assert!(good.read(0, 32 << 20) == data, "others don't read for those who don't send");
    hostile.check("stalled senders");
    drop((stalled, others, mapped, senders));
    assert!(good.read(0, 32 << 20) == data);
    let Hostile { served, .. } = hostile;
    drop(good);
    assert!(served.stop().success());
}

#[test]
fn a_server_takes_no_more_than_its_memory_and_a_constant_whatever_its_clients_do() {
    hostile_mix(64 * MIB, 100);
}

#[test]
fn the_smallest_server_takes_no_more_than_its_memory_and_a_constant_either() {
    hostile_mix(16 * MIB, 10);
}

/// The help is the contract: a constant that is said there and another one here would prove
/// nothing.
#[test]
fn the_constant_is_the_one_that_the_help_states() {
    let help = corepage(&["serve", "--help"]).output().expect("it runs");
    let help = String::from_utf8(help.stdout)
        .expect("UTF-8")
        .split_whitespace()
        .collect::<Vec<_>>()
        .join(" ");
    let (constant, shard) = (
        format!("up to {} MiB more", CONSTANT / MIB),
        format!("{} MiB for each shard", SHARD_CONSTANT / MIB),
    );
    assert!(help.contains(&constant) && help.contains(&shard), "{help}");
}
