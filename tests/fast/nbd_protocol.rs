//! The NBD server as clients meet it: a real process, a real store, bytes on a real socket.
//!
//! If these fail, clients written against the specification can't connect, read other bytes than
//! were written, lose what was acknowledged, or are disturbed by another connection.

// Real processes take real time; nothing here is replayed from a seed but the data.
#![allow(clippy::disallowed_methods)]

use crate::common;
use common::nbd::*;
use common::role::Run;
use common::{Rng, Served, has_tool, scratch};

const GIB: u64 = 1 << 30;
const UNKNOWN: u32 = 0x8000_0006;
const UNSUPPORTED: u32 = 0x8000_0001;
const INVALID: u32 = 0x8000_0003;

/// Acknowledgement of an option.
fn ack(option: u32) -> OptionReply {
    OptionReply { option, kind: 1, data: vec![] }
}

#[test]
fn the_handshake_is_the_specifications_byte_for_byte() {
    let dir = scratch("handshake");
    let served = Served::start_with(
        dir.path(),
        &["--nbd", "tcp:127.0.0.1:0", "--volume", "vol", "--size", "1G"],
    );
    let mut client = Client::connect(&served.address());
    assert_eq!(client.take(18), b"NBDMAGICIHAVEOPT\x00\x03");
    client.send(b"\x00\x00\x00\x03");
    client.send(b"IHAVEOPT\x00\x00\x00\x03\x00\x00\x00\x00");
    let mut list =
        b"\x00\x03\xe8\x89\x04\x55\x65\xa9\x00\x00\x00\x03\x00\x00\x00\x02\x00\x00\x00\x07\x00\x00\x00\x03vol".to_vec();
    list.extend(
        b"\x00\x03\xe8\x89\x04\x55\x65\xa9\x00\x00\x00\x03\x00\x00\x00\x01\x00\x00\x00\x00",
    );
    assert_eq!(client.take(list.len()), list);

    // The only volume is the default one; asked for, its name and the block sizes are told.
    client.option(OPT_INFO, &info_data("", &[1, 3, 99]));
    let mut export = b"\x00\x00\x00\x00\x00\x00\x40\x00\x00\x00".to_vec();
    export.extend(0b1101_0110_1101_u16.to_be_bytes());
    assert_eq!(
        client.option_reply(),
        OptionReply { option: OPT_INFO, kind: 3, data: export.clone() }
    );
    assert_eq!(
        client.option_reply(),
        OptionReply { option: OPT_INFO, kind: 3, data: b"\x00\x01vol".to_vec() }
    );
    let sizes = b"\x00\x03\x00\x00\x00\x01\x00\x00\x10\x00\x02\x00\x00\x00".to_vec();
    assert_eq!(client.option_reply(), OptionReply { option: OPT_INFO, kind: 3, data: sizes });
    assert_eq!(client.option_reply(), ack(OPT_INFO));
    client.option(OPT_GO, &info_data("vol", &[]));
    assert_eq!(
        client.option_reply(),
        OptionReply { option: OPT_GO, kind: 3, data: export.clone() }
    );
    assert_eq!(client.option_reply(), ack(OPT_GO));
    assert_eq!(client.read(5, 3), [0; 3]);

    let mut old = Client::connect(&served.address());
    old.take(18);
    old.send(&[0, 0, 0, 1]);
    old.option(OPT_EXPORT_NAME, b"vol");
    assert_eq!(old.take(10 + 124), [&export[2..], &[0; 124]].concat());
    assert_eq!(old.read(0, 1), [0]);
}

#[test]
fn bad_options_are_refused_and_the_handshake_goes_on() {
    let dir = scratch("options");
    let served = Served::start(dir.path());
    let mut client = Client::greeted(&served.address());
    let mut refused = |option: u32, data: &[u8], kind: u32| {
        client.option(option, data);
        let reply = client.option_reply();
        assert_eq!((reply.option, reply.kind), (option, kind), "{data:?}");
    };
    refused(OPT_GO, &info_data("nobody", &[]), UNKNOWN);
    refused(OPT_INFO, &info_data("nobody", &[3]), UNKNOWN);
    refused(OPT_GO, b"", INVALID);
    refused(OPT_GO, b"\xff\xff\xff\xffdisk\x00\x00", INVALID);
    refused(OPT_GO, b"\x00\x00\x00\x04disk\x00\x05\x00\x01", INVALID);
    refused(OPT_LIST, b"x", INVALID);
    refused(8, b"structured replies", INVALID);
    refused(10, b"before structured replies", INVALID);
    refused(11, b"extended headers", UNSUPPORTED);
    refused(4711, &[7; 60_000], UNSUPPORTED);
    client.option(OPT_ABORT, b"");
    assert_eq!(client.option_reply(), ack(OPT_ABORT));
    assert!(client.is_closed());
    assert_eq!(served.client().bytes, GIB);
}

#[test]
fn bad_input_ends_its_own_connection_only() {
    let dir = scratch("hostile");
    let served = Served::start(dir.path());
    let address = served.address();
    let mut bystander = served.client();
    bystander.write(0, 12_345, b"still here");
    let hostile: [&[u8]; 6] = [
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\x00\x00\x00\x03NOTMAGIC\x00\x00\x00\x07\x00\x00\x00\x00",
        b"\x00\x00\x00\x03IHAVEOPT\x00\x00\x00\x07\xff\xff\xff\xff",
        b"\xff\xff\xff\xff",
        b"\x00\x00\x00\x03IHAVEOPT\x00\x00\x00\x01\x00\x00\x00\x04none",
        b"\x00\x00\x00\x03IHAVEOPT\x00\x00\x00\x01\x00\x00\x00\x02\xc3\x28",
    ];
    for bytes in hostile {
        let mut client = Client::connect(&address);
        let _ = client.try_send(bytes);
        assert!(client.is_closed(), "{bytes:?}");
        assert_eq!(bystander.read(12_345, 10), b"still here");
    }
    let mut wrong_magic = served.client();
    wrong_magic.send(&[0x13; 28]);
    assert!(wrong_magic.is_closed());
    let mut half = served.client();
    half.request(0, WRITE, 0, 1 << 20, &[1; 1000]);
    drop(half);
    let mut rng = Rng::new(7);
    for round in 0..50 {
        let mut client = if round % 2 == 0 { Client::connect(&address) } else { served.client() };
        let count = rng.below(300) as usize;
        let _ = client.try_send(&rng.bytes(count));
    }
    // Deaf clients: much asked, nothing read.
    let mut deaf: Vec<_> = (0..4).map(|_| served.client()).collect();
    deaf.iter_mut().for_each(|c| (0..20).for_each(|_| _ = c.request(0, READ, 0, 32 << 20, &[])));
    assert_eq!(bystander.read(12_345, 10), b"still here");
    assert_eq!(bystander.read(0, 1000), [0; 1000], "half a write must not be done");
    drop(deaf);
    assert!(served.stop().success());
}

#[test]
fn ranges_are_checked_without_wrapping_and_flags_are_known() {
    let dir = scratch("ranges");
    let served = Served::start(dir.path());
    let mut client = served.client();
    for command in [READ, WRITE, TRIM, WRITE_ZEROES] {
        let beyond = if matches!(command, WRITE | WRITE_ZEROES) { ENOSPC } else { EINVAL };
        let payload: &[u8] = if command == WRITE { &[1; 512] } else { &[] };
        assert_eq!(client.call(0, command, GIB - 511, 512, payload), beyond, "{command}");
        assert_eq!(client.call(0, command, GIB, 512, payload), beyond, "{command}");
        assert_eq!(client.call(0, command, u64::MAX, 512, payload), EINVAL, "{command}");
        assert_eq!(client.call(0, command, u64::MAX - 511, 512, payload), EINVAL, "{command}");
        assert_eq!(client.call(1 << 9, command, 0, 512, payload), EINVAL, "{command}");
    }
    assert_eq!(client.call(NO_HOLE, WRITE, 0, 1, b"x"), EINVAL, "NO_HOLE is for WRITE_ZEROES");
    assert_eq!(client.call(FAST_ZERO, TRIM, 0, 1, b""), EINVAL, "FAST_ZERO is for WRITE_ZEROES");
    assert_eq!(client.call(FUA, READ, 0, 0, b""), 0, "FUA is valid everywhere");
    for unknown in [7, 8, 4711] {
        assert_eq!(client.call(0, unknown, 0, 4096, b""), EINVAL);
    }
    client.write(0, GIB - 1, b"z");
    assert_eq!(client.read(GIB - 2, 2), b"\0z");
    client.write(0, 0, b"");
    client.request(0, DISC, 0, 0, b"");
    assert!(client.is_closed());
}

/// What the volume should hold, kept beside it.
struct Model {
    bytes: Vec<u8>,
    rng: Rng,
}

impl Model {
    fn range(&mut self) -> (usize, usize) {
        let longest = [16, 5_000, 70_000, 900_000][self.rng.below(4) as usize];
        let length = 1 + self.rng.below(longest) as usize;
        let at = self.rng.below((self.bytes.len() - length) as u64) as usize;
        // Half of them begin on a page.
        if self.rng.below(2) == 0 { (at & !4095, length) } else { (at, length) }
    }

    /// One random request, done to both.
    fn step(&mut self, client: &mut Client) {
        let (at, length) = self.range();
        let flags = if self.rng.below(8) == 0 { FUA } else { 0 };
        match self.rng.below(10) {
            0..5 => {
                let data = self.rng.bytes(length);
                self.bytes[at..at + length].copy_from_slice(&data);
                client.write(flags, at as u64, &data);
            }
            5 => {
                self.bytes[at..at + length].fill(0);
                assert_eq!(client.call(flags, TRIM, at as u64, length as u32, &[]), 0);
            }
            6 => {
                self.bytes[at..at + length].fill(0);
                let how = [0, NO_HOLE, FAST_ZERO][self.rng.below(3) as usize];
                assert_eq!(
                    client.call(flags | how, WRITE_ZEROES, at as u64, length as u32, &[]),
                    0
                );
            }
            _ => {
                assert!(
                    client.read(at as u64, length as u32) == self.bytes[at..at + length],
                    "{length} bytes at {at}"
                )
            }
        }
    }
}

#[test]
fn unaligned_requests_do_to_a_volume_what_they_do_to_an_array() {
    let dir = scratch("model");
    let served = Served::start(dir.path());
    let seed = 20;
    let mut model = Model { bytes: vec![0; 4 << 20], rng: Rng::new(seed) };
    let mut client = served.client();
    (0..600).for_each(|_| model.step(&mut client));
    client.flush();
    assert!(client.read(0, 4 << 20) == model.bytes, "seed {seed}");
    assert_eq!(client.call(NO_HOLE | FAST_ZERO, WRITE_ZEROES, 0, 4096, &[]), ENOTSUP);
    drop(client);
    assert!(served.stop().success());
    let served = Served::start(dir.path());
    assert!(served.client().read(0, 4 << 20) == model.bytes, "seed {seed}, after a restart");
}

#[test]
fn requests_of_32_mib_and_trims_of_the_whole_volume_are_served() {
    let dir = scratch("large");
    let served = Served::start(dir.path());
    let mut client = served.client();
    let data = Rng::new(3).bytes(32 << 20);
    client.write(FUA, 1, &data);
    assert!(client.read(1, 32 << 20) == data);
    assert_eq!(client.call(0, WRITE_ZEROES, 4097, 16 << 20, &[]), 0);
    assert!(client.read(1, 4096) == data[..4096]);
    assert!(client.read(4097, 16 << 20).iter().all(|b| *b == 0));
    assert!(client.read(4097 + (16 << 20), 4096) == data[4096 + (16 << 20)..][..4096]);
    assert_eq!(client.call(0, TRIM, 0, GIB as u32, &[]), 0);
    assert!(client.read(0, 32 << 20).iter().all(|b| *b == 0));
}

#[test]
fn many_requests_in_flight_are_each_answered_once() {
    let dir = scratch("flight");
    let served = Served::start(dir.path());
    let mut client = served.client();
    let page = |n: u64| Rng::new(n).bytes(4096);
    let mut open: std::collections::HashSet<u64> =
        (0..200).map(|n| client.request(0, WRITE, n * 4096, 4096, &page(n))).collect();
    while !open.is_empty() {
        let (cookie, error) = client.reply();
        assert!(open.remove(&cookie) && error == 0, "reply {cookie}: {error}");
    }
    (0..200).for_each(|n| assert!(client.read(n * 4096, 4096) == page(n), "page {n}"));
}

#[test]
fn what_was_written_with_fua_survives_a_kill() {
    let dir = scratch("fua");
    let served = Served::start(dir.path());
    let mut client = served.client();
    let pieces: Vec<_> = (0..20u64).map(|n| (n * 50_000 + n, Rng::new(n).bytes(9_000))).collect();
    pieces.iter().for_each(|(at, data)| client.write(FUA, *at, data));
    served.kill();
    let served = Served::start(dir.path());
    let mut client = served.client();
    pieces
        .iter()
        .for_each(|(at, data)| assert!(client.read(*at, data.len() as u32) == *data, "at {at}"));
}

#[test]
fn a_flush_covers_acknowledged_writes_of_all_connections() {
    let dir = scratch("flush");
    let served = Served::start(dir.path());
    let mut writers: Vec<_> = (0..4).map(|_| served.client()).collect();
    for (n, writer) in (0u64..).zip(&mut writers) {
        writer.write(0, n * 1_000_003, &Rng::new(n).bytes(20_000));
    }
    served.client().flush();
    served.kill();
    let served = Served::start(dir.path());
    let mut client = served.client();
    (0..4u64).for_each(|n| {
        assert!(client.read(n * 1_000_003, 20_000) == Rng::new(n).bytes(20_000), "writer {n}")
    });
}

/// A client that sees this flag spreads its writes over connections and flushes on one of them
/// only.
#[test]
fn several_connections_are_announced_and_a_flush_on_one_covers_the_other_on_all_shards() {
    const CAN_MULTI_CONN: u16 = 1 << 8;
    for run in Run::all() {
        let dir = scratch("multi-conn");
        let served = Served::start_as(run, dir.path());
        let (mut writer, mut flusher) = (served.client(), served.client());
        assert_ne!(writer.flags & CAN_MULTI_CONN, 0, "{run:?}");
        if has_tool("nbdinfo") {
            common::run(
                std::process::Command::new("nbdinfo")
                    .args(["--can", "multi-conn"])
                    .arg(&served.uris[0]),
            );
        }
        // 2 MiB apart: each the next shard's.
        let pieces: Vec<_> =
            (0..8u64).map(|n| (n * (2 << 20) + n * 4_097, Rng::new(n).bytes(9_000))).collect();
        pieces.iter().for_each(|(at, data)| writer.write(0, *at, data));
        flusher.flush();
        served.kill();
        let served = Served::start_as(Run { shards: 3, ..run }, dir.path());
        let mut client = served.client();
        for (at, data) in &pieces {
            assert!(client.read(*at, data.len() as u32) == *data, "{run:?}: at {at}");
        }
    }
}

#[test]
fn stopping_with_clients_connected_is_clean() {
    let dir = scratch("stop");
    let served = Served::start(dir.path());
    let idle = served.client();
    let silent = Client::connect(&served.address());
    let mut deaf = served.client();
    (0..10).for_each(|_| _ = deaf.request(0, READ, 0, 32 << 20, &[]));
    let mut busy = served.client();
    busy.write(FUA, 0, b"before");
    let mut served = served;
    let writer = std::thread::spawn(move || {
        let mut acknowledged = 0u64;
        while busy.try_write(0, 4096 * (1 + acknowledged), &[acknowledged as u8; 4096]) {
            acknowledged += 1;
        }
        acknowledged
    });
    std::thread::sleep(std::time::Duration::from_millis(100));
    served.terminate();
    assert!(served.wait().success());
    let acknowledged = writer.join().unwrap();
    drop((idle, silent, deaf));
    let served = Served::start(dir.path());
    let mut client = served.client();
    assert_eq!(client.read(0, 6), b"before");
    for n in 0..acknowledged {
        assert_eq!(
            client.read(4096 * (1 + n), 4096),
            [n as u8; 4096],
            "acknowledged, then closed cleanly: write {n}"
        );
    }
}

#[test]
fn a_unix_socket_serves_like_a_port_and_goes_with_its_server() {
    let dir = scratch("unix");
    let socket = tempfile::tempdir().unwrap();
    let path = socket.path().join("nbd.sock");
    let address = format!("unix:{}", path.display());
    let served = Served::start_with(
        &dir.path().join("store"),
        &["--nbd", &address, "--nbd", "tcp:127.0.0.1:0"],
    );
    assert_eq!(served.uris.len(), 2);
    let mut client = served.client();
    client.write(0, 3, b"over a socket");
    let port = served.uris[1].trim_start_matches("nbd://").to_owned();
    assert_eq!(Client::go(&port, "disk").read(3, 13), b"over a socket");
    served.kill();
    // The killed server's socket is stale, and is replaced.
    let served = Served::start_with(&dir.path().join("store"), &["--nbd", &address]);
    assert_eq!(served.client().bytes, GIB);
    assert!(served.stop().success());
    assert!(!path.exists());
}

/// Whoever insists gets what was asked for, and is told what that means.
#[test]
fn other_machines_are_let_in_only_by_the_flag_and_with_a_warning() {
    let dir = scratch("remote");
    let log = dir.path().join("stderr");
    let mut command =
        common::corepage(&["serve", "--nbd", "tcp:0.0.0.0:0", "--allow-remote", "--dir"]);
    command.arg(dir.path().join("store")).stderr(std::fs::File::create(&log).unwrap());
    let mut served = Served::spawn(command, 1);
    let port = served.address().rsplit_once(':').expect("an address").1.to_owned();
    assert_eq!(Client::go(&format!("127.0.0.1:{port}"), "disk").bytes, GIB);
    let warning = std::fs::read_to_string(&log).unwrap();
    assert!(warning.contains("0.0.0.0") && warning.contains("no password"), "{warning:?}");
    served.terminate();
    assert!(served.wait().success());
}

/// Lets this process have as many descriptors as it may.
fn raise_descriptors() {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let raised = rustix::process::Rlimit { current: limit.maximum, maximum: limit.maximum };
    rustix::process::setrlimit(rustix::process::Resource::Nofile, raised)
        .expect("up to the hard limit");
}

/// Many machines with several connections each are more clients than the usual number: it can be
/// raised, also beyond the usual limit of open files.
#[test]
fn a_thousand_clients_are_served_at_a_time_if_that_is_asked_for() {
    raise_descriptors();
    let dir = scratch("thousand");
    let path = dir.path().join("s");
    let nbd = format!("unix:{}", path.display());
    let store = dir.path().join("store");
    // As many as a shell gives by default, or fewer.
    let mut command = std::process::Command::new("sh");
    command.args([
        "-c",
        "ulimit -Sn 512; exec \"$0\" \"$@\"",
        env!("CARGO_BIN_EXE_corepage"),
        "serve",
        "--nbd",
        &nbd,
    ]);
    command
        .args(["--connections", "1024", "--dir"])
        .arg(&store)
        .env("RUST_LOG", "error")
        .stdin(std::process::Stdio::null());
    let served = Served::spawn(command, 1);
    let mut clients: Vec<Client> = (0..1024).map(|_| served.client()).collect();
    for (n, client) in clients.iter_mut().enumerate() {
        client.write(0, n as u64 * 4096, &[n as u8; 100]);
    }
    for (n, client) in clients.iter_mut().enumerate() {
        let other = (n + 1) % 1024;
        assert_eq!(client.read(other as u64 * 4096, 100), [other as u8; 100]);
    }
    assert!(Client::connect(&served.address()).is_closed(), "one more of the same user");
    drop(clients);
    assert!(served.stop().success());
}

/// A client that is refused sees a closed connection and no more: why, the operator must find in
/// the log.
#[test]
fn a_client_that_is_refused_is_told_in_the_log_with_what_to_do() {
    let dir = scratch("refused");
    let log = dir.path().join("stderr");
    let nbd = format!("unix:{}", dir.path().join("s").display());
    let tcp = "tcp:127.0.0.1:0";
    let mut command =
        common::corepage(&["serve", "--nbd", &nbd, "--nbd", tcp, "--connections", "2", "--dir"]);
    command
        .arg(dir.path().join("store"))
        .env("RUST_LOG", "warn")
        .stderr(std::fs::File::create(&log).unwrap());
    let served = Served::spawn(command, 2);
    let (mut first, second) = (served.client(), served.client());
    (0..20).for_each(|_| assert!(Client::connect(&served.address()).is_closed()));
    let told = std::fs::read_to_string(&log).unwrap();
    let lines: Vec<&str> =
        told.lines().filter(|line| line.contains("too many connections")).collect();
    assert!(!lines.is_empty() && lines[0].contains("serve --connections"), "{told}");
    assert!(
        lines[0].contains(&format!("peer=user {}", rustix::process::getuid().as_raw())),
        "{told}"
    );
    // Another peer, a machine, still gets in.
    let address = served.uris[1].trim_start_matches("nbd://").to_owned();
    let mut other = Client::go(&address, "disk");
    other.write(0, 4096, b"others too");
    first.write(0, 0, b"goes on");
    drop((first, second, other));
    assert!(served.stop().success());
    let little =
        common::corepage(&["serve", "--memory", "64M", "--connections", "1024"]).output().unwrap();
    let text = String::from_utf8_lossy(&little.stderr).into_owned();
    assert!(little.status.code() == Some(2) && text.contains("--memory of 160.0 MiB"), "{text}");
}
