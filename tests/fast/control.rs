//! Commands beside a server that is not at its best: still opening, stopped, overrun, in a deep
//! directory, or a second one.
//!
//! A command never waits without a word, and what it says names the server and what helps. If these
//! fail, scripts hang, or people close the wrong process.

// Real processes take real time; nothing here is a matter of timing but that nothing hangs.
#![allow(clippy::disallowed_methods)]

use crate::common;
use common::{Served, corepage, scratch};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use rustix::process::{Pid, Signal, kill_process};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// Far beyond what any command here may take.
const LIMIT: Duration = Duration::from_secs(60);

/// A small server on a free port.
fn serve(dir: &Path) -> Command {
    let mut command =
        corepage(&["serve", "--nbd", "tcp:127.0.0.1:0", "--memory", "32M", "--shards", "2"]);
    command.args(["--volume", "v", "--size", "16M", "--dir"]).arg(dir);
    command
}

/// Runs a command to its end; one that hangs is a failure.
fn ended(mut command: Command) -> Output {
    let mut child =
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("corepage starts");
    let end = Instant::now() + LIMIT;
    while child.try_wait().expect("it can be waited for").is_none() {
        if Instant::now() > end {
            child.kill().expect("it still ran");
            child.wait().expect("a killed process ends");
            panic!("{command:?} hangs");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    child.wait_with_output().expect("its output")
}

fn volume_list(dir: &Path) -> Command {
    let mut command = corepage(&["volume", "list", "--dir"]);
    command.arg(dir);
    command
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn signal(served: &Served, signal: Signal) {
    kill_process(Pid::from_raw(served.id() as i32).expect("a number"), signal)
        .expect("the server runs");
}

/// Stops it, all of its threads.
fn stop(served: &Served) {
    signal(served, Signal::STOP);
    let is_stopped =
        |stat: &str| stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('T'));
    let tasks = || std::fs::read_dir(format!("/proc/{}/task", served.id())).expect("its threads");
    let stat = |task: std::fs::DirEntry| {
        std::fs::read_to_string(task.path().join("stat")).unwrap_or_default()
    };
    let end = Instant::now() + LIMIT;
    while !tasks().flatten().all(|task| is_stopped(&stat(task))) {
        assert!(Instant::now() < end, "it does not stop");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// If this fails, the second line of every start script is told to close the process that the first
/// one has started.
#[test]
fn a_command_during_the_start_waits_and_says_so() {
    let dir = scratch("start-race");
    let store = dir.path().join("store");
    let mut command = serve(&store);
    let mut server = command.stdout(Stdio::null()).spawn().expect("corepage starts");
    let made = store.join("meta");
    let end = Instant::now() + LIMIT;
    while !made.exists() && Instant::now() < end && server.try_wait().expect("a child").is_none() {
        std::thread::sleep(Duration::from_millis(1));
    }
    let mut create = corepage(&["volume", "create", "w", "1M", "--dir"]);
    create.arg(&store);
    let created = ended(create);
    let listed = ended(volume_list(&store));
    kill_process(Pid::from_child(&server), Signal::TERM).expect("the server runs");
    let status = server.wait().expect("it ends");
    assert!(created.status.success(), "{}", said(&created));
    let text = said(&created);
    assert!(text.is_empty() || text.contains("still opening the store"), "{text}");
    assert!(String::from_utf8_lossy(&listed.stdout).contains("\nw "), "{listed:?}");
    assert!(status.success(), "{status}");
}

/// If this fails, a frozen server freezes every script that asks it something.
#[test]
fn a_stopped_server_is_named_and_not_waited_for() {
    let dir = scratch("stopped-server");
    let served = Served::spawn(serve(dir.path()), 1);
    stop(&served);
    let listed = ended(volume_list(dir.path()));
    let mut stat = corepage(&["stat", "--count", "1", "--dir"]);
    stat.arg(dir.path());
    let stat = ended(stat);
    signal(&served, Signal::CONT);
    for output in [listed, stat] {
        let text = said(&output);
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert!(
            text.contains(&format!("process {}", served.id())) && text.contains("stopped"),
            "{text}"
        );
    }
    assert!(ended(volume_list(dir.path())).status.success());
    assert!(served.stop().success());
}

/// If this fails, a command hangs for as long as others keep the server's queue full.
#[test]
fn a_full_queue_of_the_control_socket_is_said() {
    let dir = scratch("full-queue");
    let served = Served::spawn(serve(dir.path()), 1);
    stop(&served);
    let address = SocketAddrUnix::new(dir.path().join("control.sock")).expect("a short path");
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let connect = || -> rustix::io::Result<OwnedFd> {
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        rustix::net::connect(&socket, &address)?;
        Ok(socket)
    };
    let mut waiting = Vec::new();
    while let Ok(socket) = connect() {
        waiting.push(socket);
        assert!(waiting.len() < 10_000, "the queue is never full");
    }
    let listed = ended(volume_list(dir.path()));
    drop(waiting);
    signal(&served, Signal::CONT);
    let text = said(&listed);
    assert!(listed.status.code() == Some(1) && text.contains("takes no connections"), "{text}");
    assert!(served.stop().success());
}

/// If this fails, a store in a deep directory can't be managed while it is served.
#[test]
fn a_deep_directory_has_a_control_socket_too() {
    let dir = scratch("deep");
    let deep = dir.path().join("a".repeat(120)).join("b".repeat(70));
    let served = Served::spawn(serve(&deep), 1);
    let mut create = corepage(&["volume", "create", "w", "1M", "--dir"]);
    create.arg(&deep);
    let created = ended(create);
    assert!(created.status.success(), "{}", said(&created));
    let mut stat = corepage(&["stat", "--count", "1", "--connect"]);
    stat.arg(deep.join("control.sock"));
    assert!(ended(stat).status.success());
    assert!(served.stop().success());
    assert!(!deep.join("control.sock").exists(), "the socket is left");
}

/// If this fails, whoever starts a second server is sent to look for another port.
#[test]
fn a_second_server_is_told_of_the_first() {
    let dir = scratch("second");
    let served = Served::spawn(serve(dir.path()), 1);
    let mut second = corepage(&["serve", "--nbd", &format!("tcp:{}", served.address()), "--dir"]);
    second.arg(dir.path());
    let second = ended(second);
    let text = said(&second);
    assert_eq!(second.status.code(), Some(1), "{text}");
    assert!(
        text.contains("in use") && text.contains(&format!("process {}", served.id())),
        "{text}"
    );
    assert!(!text.contains("another port"), "{text}");
    assert!(
        ended(volume_list(dir.path())).status.success(),
        "the first has lost its control socket"
    );
    assert!(served.stop().success());
}

/// If this fails, a start that was refused leaves directories and sockets behind.
#[test]
fn a_refused_start_leaves_nothing_behind() {
    let dir = scratch("refused");
    let mut command = corepage(&["serve", "--nbd", "tcp:127.0.0.1:0", "--cores", "0,977", "--dir"]);
    command.arg(dir.path().join("one/two"));
    assert_eq!(ended(command).status.code(), Some(1));
    assert_eq!(std::fs::read_dir(dir.path()).expect("it is there").count(), 0);
}
