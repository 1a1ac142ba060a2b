//! The examples, run as a reader would run them, under load, and killed: what they said was durable
//! is there afterwards.

// Real processes take real time.
#![allow(clippy::disallowed_methods)]

use crate::common;
use common::scratch;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Lines, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

const KILLS: u64 = 4;
const CLIENTS: u64 = 4;

/// Killed when it is dropped.
struct Running {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Running {
    /// Cargo builds examples together with the tests, next to them.
    fn start(example: &str, arguments: &[&Path]) -> Running {
        let tests = std::env::current_exe().expect("this test has a path");
        let built = tests
            .parent()
            .and_then(Path::parent)
            .expect("it lies in deps")
            .join("examples")
            .join(example);
        assert!(
            built.exists(),
            "no {}: `cargo test` builds it; for this test alone: cargo build --examples",
            built.display()
        );
        let mut command = Command::new(built);
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let lines = BufReader::new(child.stdout.take().expect("it is piped")).lines();
        Running { child, lines }
    }

    /// Waits for a line that begins so.
    fn wait_for(mut self, begin: &str) -> Running {
        let found = self.lines.find(|line| line.as_ref().is_ok_and(|line| line.starts_with(begin)));
        assert!(found.is_some(), "it ended without a line {begin:?}: {:?}", self.child.wait());
        self
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

struct Client {
    socket: BufReader<UnixStream>,
}

impl Client {
    fn connect(socket: &Path) -> Client {
        Client { socket: BufReader::new(UnixStream::connect(socket).expect("the server listens")) }
    }

    /// The answer, or `None` once the server is gone.
    fn ask(&mut self, line: &str) -> Option<String> {
        self.socket.get_mut().write_all(format!("{line}\n").as_bytes()).ok()?;
        let mut answer = String::new();
        // A line that breaks off is no answer.
        (self.socket.read_line(&mut answer).ok()? > 0 && answer.ends_with('\n'))
            .then(|| answer.trim_end().to_string())
    }
}

fn places() -> (tempfile::TempDir, PathBuf, PathBuf) {
    let dir = scratch("examples");
    let (store, socket) = (dir.path().join("store"), dir.path().join("s"));
    (dir, store, socket)
}

/// Each client sets keys of its own to counted texts; the newest acknowledged one of each, or the
/// one after it, is there after a kill.
#[test]
fn the_tokio_server_keeps_what_it_acknowledged() {
    let (_dir, store, socket) = places();
    let mut known: Vec<BTreeMap<u64, u64>> = vec![BTreeMap::new(); CLIENTS as usize];
    let mut sets = 0;
    for kill in 0..=KILLS {
        let server = Running::start("tokio_server", &[&store, &socket]).wait_for("listening on");
        for (client, keys) in (0..).zip(&mut known) {
            let mut connection = Client::connect(&socket);
            for (key, count) in keys {
                let answer = connection
                    .ask(&format!("get {}", client + *key * CLIENTS))
                    .expect("the server is there");
                let found: u64 =
                    answer.strip_prefix("is value ").expect("a value").parse().expect("a number");
                assert!(
                    (*count..=*count + 1).contains(&found),
                    "key {key}: {count} was acknowledged, {found} is there"
                );
                *count = found;
            }
        }
        if kill == KILLS {
            let mut connection = Client::connect(&socket);
            for wrong in ["", "set", "set x y", "get 1 2", "del 1", "set 5"] {
                assert!(
                    connection.ask(wrong).expect("it stays").starts_with("error "),
                    "{wrong:?}"
                );
            }
            break;
        }
        let work = |client: u64, mut keys: BTreeMap<u64, u64>| {
            let mut connection = Client::connect(&socket);
            let mut done = 0;
            for n in 0.. {
                let key = (n * 7) % 97;
                let count = keys.get(&key).copied().unwrap_or(0);
                let Some(answer) =
                    connection.ask(&format!("set {} value {}", client + key * CLIENTS, count + 1))
                else {
                    break;
                };
                assert!(answer.starts_with("ok "), "{answer}");
                keys.insert(key, count + 1);
                done += 1;
            }
            (keys, done)
        };
        let after = std::thread::scope(|scope| {
            let work = &work;
            let clients: Vec<_> = (0..CLIENTS)
                .zip(known.clone())
                .map(|(client, keys)| scope.spawn(move || work(client, keys)))
                .collect();
            std::thread::sleep(Duration::from_millis(150 + 70 * kill));
            drop(server);
            clients.into_iter().map(|client| client.join().expect("no panic")).collect::<Vec<_>>()
        });
        sets += after.iter().map(|(_, done)| done).sum::<u64>();
        known = after.into_iter().map(|(keys, _)| keys).collect();
    }
    assert!(sets > 100, "only {sets} values were set");
}

/// All clients add to the same sums, each with its own key first, so that connections are on all
/// shards and keys of all shards are reached from each; no acknowledged addition is lost, and none
/// is done twice.
#[test]
fn the_glommio_server_keeps_its_sums() {
    let (_dir, store, socket) = places();
    const KEYS: u64 = 8;
    let key = |n: u64| n * 511;
    let mut least = [0; KEYS as usize];
    let mut most = [0; KEYS as usize];
    for kill in 0..=KILLS {
        let server = Running::start("glommio_server", &[&store, &socket]).wait_for("listening on");
        let mut connection = Client::connect(&socket);
        for n in 0..KEYS as usize {
            let answer =
                connection.ask(&format!("get {}", key(n as u64))).expect("the server is there");
            let found: i64 = answer.strip_prefix("is ").expect("a sum").parse().expect("a number");
            assert!(
                (least[n]..=most[n]).contains(&found),
                "{found} is not from {} to {}",
                least[n],
                most[n]
            );
            (least[n], most[n]) = (found, found);
        }
        if kill == KILLS {
            for wrong in ["", "add", "add x 1", "get 1 2", "add 1", "add 1 x"] {
                assert!(
                    connection.ask(wrong).expect("it stays").starts_with("error "),
                    "{wrong:?}"
                );
            }
            break;
        }
        let work = |client: u64| {
            let mut connection = Client::connect(&socket);
            let (mut acknowledged, mut tried) = ([0; KEYS as usize], [0; KEYS as usize]);
            for n in client.. {
                let at = (n % KEYS) as usize;
                tried[at] += 1;
                let Some(answer) = connection.ask(&format!("add {} 1", key(at as u64))) else {
                    break;
                };
                assert!(answer.starts_with("ok "), "{answer}");
                acknowledged[at] += 1;
            }
            (acknowledged, tried)
        };
        let after = std::thread::scope(|scope| {
            let work = &work;
            let clients: Vec<_> =
                (0..CLIENTS).map(|client| scope.spawn(move || work(client))).collect();
            std::thread::sleep(Duration::from_millis(150 + 70 * kill));
            drop(server);
            clients.into_iter().map(|client| client.join().expect("no panic")).collect::<Vec<_>>()
        });
        for (acknowledged, tried) in after {
            (0..KEYS as usize).for_each(|n| {
                least[n] += acknowledged[n];
                most[n] += tried[n];
            });
        }
    }
    assert!(least.iter().sum::<i64>() > 100, "too few additions to show anything: {least:?}");
}

/// It checks its sum itself, at each start.
#[test]
fn the_threaded_program_makes_and_loses_no_money() {
    let (_dir, store, _) = places();
    let mut transfers = 0;
    for kill in 0..KILLS {
        let mut program =
            Running::start("threads", &[&store, Path::new("60")]).wait_for("1000 accounts add up");
        std::thread::sleep(Duration::from_millis(100 + 70 * kill));
        let _ = program.child.kill();
        let rest = program.lines.by_ref().map_while(Result::ok);
        transfers += rest.filter(|line| line.starts_with("transfer")).count();
    }
    assert!(transfers > 100, "only {transfers} transfers");
    let mut last =
        Running::start("threads", &[&store, Path::new("1")]).wait_for("1000 accounts add up");
    last.lines.by_ref().for_each(drop);
    let status = last.child.wait().expect("it is ours");
    assert!(status.success(), "{status}");
}
