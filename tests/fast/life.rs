//! The life of a server process: what reaches it from outside - signals, limits, a log that nobody
//! reads, a device that fails - and how it ends.
//!
//! A server serves or has ended, cleanly wherever that is possible, and its exit code says which.
//! If these fail, a log rotation or a supervisor's habits cost a recovery, or a service looks
//! healthy and serves nobody.

// Real processes take real time; nothing here is a matter of timing but that nothing hangs.
#![allow(clippy::disallowed_methods)]

use crate::common;
use common::nbd::Client;
use common::surroundings::{Without, start_without};
use common::{Served, corepage, nbd, scratch};
use rustix::process::{Pid, Resource, Rlimit, Signal, kill_process, prlimit};
use std::fs::File;
use std::io::{PipeReader, Read};
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// A small server on a free port.
fn serve(dir: &Path) -> Command {
    let mut command =
        corepage(&["serve", "--nbd", "tcp:127.0.0.1:0", "--memory", "32M", "--shards", "1"]);
    command.args(["--volume", "v", "--size", "1G", "--dir"]).arg(dir);
    command
}

fn pid(served: &Served) -> Pid {
    Pid::from_raw(served.id() as i32).expect("a process has a number")
}

fn signal(served: &Served, signal: Signal) {
    // It may have ended meanwhile.
    let _ = kill_process(pid(served), signal);
}

/// What a closed store says when it is opened again.
fn was_closed_cleanly(dir: &Path) -> bool {
    let served = Served::spawn(serve(dir), 1);
    let clean = served.lines.iter().any(|line| line.contains("closed cleanly"));
    assert!(served.stop().success());
    clean
}

/// A client that breaks the protocol, so that the server has something to say about it.
fn break_protocol(served: &Served) {
    let mut client = Client::greeted(&served.address());
    client.send(b"this is no option at all");
    assert!(client.is_closed());
}

/// All that is in a pipe, once nobody writes to it any more.
fn all_of(mut pipe: PipeReader) -> String {
    let mut text = String::new();
    pipe.read_to_string(&mut text).expect("text");
    text
}

/// If this fails, a restarted log collector ends the server at its next line: unclean, or alive and
/// accepting nobody.
#[test]
fn a_log_that_nobody_takes_is_no_reason_to_end() {
    let full = || Stdio::from(File::options().write(true).open("/dev/full").expect("/dev/full"));
    let broken = || Stdio::from(std::io::pipe().expect("a pipe").1);
    for (name, stderr) in [("a closed pipe", broken()), ("a full device", full())] {
        let dir = scratch("broken-log");
        let mut command = serve(dir.path());
        command.env("RUST_LOG", "debug").stderr(stderr);
        let served = Served::spawn(command, 1);
        for _ in 0..3 {
            break_protocol(&served);
        }
        served.client().write(nbd::FUA, 0, b"still here");
        assert_eq!(served.stop().code(), Some(0), "{name}");
        assert!(was_closed_cleanly(dir.path()), "{name}");
    }
}

/// If this fails, a log reader that stalls stalls every thread of the server that has something to
/// say.
#[test]
fn a_log_reader_that_stalls_holds_up_nobody() {
    let dir = scratch("stalled-log");
    let (reader, writer) = std::io::pipe().expect("a pipe");
    // No line is of interest: the pipe is full from the start.
    rustix::io::ioctl_fionbio(&writer, true).expect("a pipe that does not block");
    while rustix::io::write(&writer, &[b'\n'; 4096]).is_ok() {}
    rustix::io::ioctl_fionbio(&writer, false).expect("a pipe that blocks");
    let mut command = serve(dir.path());
    command.env("RUST_LOG", "debug").stderr(writer);
    let served = Served::spawn(command, 1);
    for _ in 0..3 {
        break_protocol(&served);
    }
    served.client().write(nbd::FUA, 0, b"still here");
    assert!(served.stop().success());
    drop(reader);
}

/// If this fails, clients that come again and again fill the disk with lines that say the same.
#[test]
fn lines_of_a_kind_are_bounded() {
    let dir = scratch("repeated");
    let (reader, writer) = std::io::pipe().expect("a pipe");
    let mut command = serve(dir.path());
    command.env("RUST_LOG", "info").stderr(writer);
    let served = Served::spawn(command, 1);
    for _ in 0..40 {
        break_protocol(&served);
    }
    assert!(served.stop().success());
    let said = all_of(reader);
    let lines = said.lines().filter(|line| line.contains("connection ended")).count();
    assert!((1..=12).contains(&lines), "{lines} lines about 40 clients:\n{said}");
}

fn is_ignored(signal: Signal) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").expect("/proc is there");
    let ignored = status
        .lines()
        .find_map(|line| line.strip_prefix("SigIgn:"))
        .expect("the kernel says what is ignored");
    let ignored = u64::from_str_radix(ignored.trim(), 16).expect("a mask");
    ignored & 1 << (signal.as_raw() - 1) != 0
}

/// If this fails, a supervisor that repeats SIGTERM, or a logout, costs a recovery.
#[test]
fn repeated_signals_of_supervisors_end_it_cleanly() {
    // Where these tests run under `nohup`, the server inherits that, and a SIGHUP stays ignored.
    let repeated =
        [Signal::TERM, Signal::HUP, Signal::INT].into_iter().filter(|signal| !is_ignored(*signal));
    for repeated in repeated {
        let dir = scratch("repeated-signal");
        let mut served = Served::spawn(serve(dir.path()), 1);
        let mut client = served.client();
        for page in 0..256 {
            client.write(0, page << 20, &[7; 4096]);
        }
        for _ in 0..20 {
            signal(&served, repeated);
            std::thread::sleep(Duration::from_millis(5));
        }
        let status = served.wait();
        assert_eq!((status.code(), status.signal()), (Some(0), None), "{repeated:?}");
        drop(served);
        assert!(was_closed_cleanly(dir.path()), "{repeated:?}");
    }
}

/// If this fails, a server started under `nohup` ends with the terminal after all.
#[test]
fn a_hangup_that_was_ignored_stays_ignored() {
    let dir = scratch("nohup");
    let plain = serve(dir.path());
    let mut command = Command::new("sh");
    command
        .args(["-c", "trap '' HUP; exec \"$0\" \"$@\""])
        .arg(plain.get_program())
        .args(plain.get_args());
    command.env("RUST_LOG", "error").stdin(Stdio::null());
    let served = Served::spawn(command, 1);
    let mut client = served.client();
    for round in 0..20 {
        signal(&served, Signal::HUP);
        client.write(0, round * 4096, &[1; 4096]);
    }
    assert!(served.stop().success());
}

/// If this fails, a limit of file sizes (`ulimit -f`) kills the server in the middle of its work.
#[test]
fn a_limit_of_file_sizes_is_a_full_disk() {
    let dir = scratch("file-size");
    let mut command = serve(dir.path());
    start_without(&mut command, &[Without::FileSizesAbove(8 << 20)]);
    let output = command.output().expect("corepage starts");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{:?} {said}", output.status);
    assert!(said.contains("ulimit -f"), "{said}");

    let mut command = serve(dir.path());
    start_without(&mut command, &[Without::FileSizesAbove(96 << 20)]);
    let served = Served::spawn(command, 1);
    let mut client = served.client();
    let mut written = 0;
    while client.call(nbd::FUA, nbd::WRITE, written, 1 << 20, &vec![5; 1 << 20]) == 0 {
        written += 1 << 20;
        assert!(written < 1 << 30, "the limit is not in force");
    }
    assert_eq!(client.call(nbd::FUA, nbd::WRITE, written, 1 << 20, &vec![5; 1 << 20]), nbd::ENOSPC);
    assert!(
        written >= 16 << 20 && client.read(written - 4096, 4096) == [5; 4096],
        "{written} bytes"
    );
    assert!(served.stop().success());
}

/// Makes every further write of the server fail, as a device does that has died.
fn break_writes(served: &Served) {
    let none = Rlimit { current: Some(0), maximum: None };
    prlimit(Some(pid(served)), Resource::Fsize, none).expect("a limit for a child");
}

/// If this fails, a server whose device had an error answers EIO until a person looks, though a
/// start would mend it.
#[test]
fn a_store_that_has_stopped_ends_the_server_for_its_supervisor() {
    let dir = scratch("stopped");
    let (reader, writer) = std::io::pipe().expect("a pipe");
    let mut command = serve(dir.path());
    command.stderr(writer);
    let mut served = Served::spawn(command, 1);
    let mut client = served.client();
    client.write(nbd::FUA, 0, b"kept");
    break_writes(&served);
    assert!(!client.try_write(nbd::FUA, 4096, b"lost"), "it was acknowledged");
    assert_eq!(served.wait().code(), Some(1));
    drop(served);
    let said = all_of(reader);
    let last = said.lines().last().unwrap_or_default();
    assert!(last.starts_with("error: ") && last.contains("reopen"), "{said}");
    let served = Served::spawn(serve(dir.path()), 1);
    assert_eq!(served.client().read(0, 4), b"kept");
    assert!(served.stop().success());
}

/// If this fails, data that can still be read can't be saved from a store whose device takes no
/// writes.
#[test]
fn a_store_that_has_stopped_is_still_read_if_that_is_asked_for() {
    let dir = scratch("stays");
    let mut command = serve(dir.path());
    command.args(["--on-failure", "stay"]);
    let served = Served::spawn(command, 1);
    let mut client = served.client();
    client.write(nbd::FUA, 0, b"kept");
    break_writes(&served);
    assert!(!client.try_write(nbd::FUA, 4096, b"lost"), "it was acknowledged");
    assert_eq!(served.client().read(0, 4), b"kept");
    assert_eq!(served.stop().code(), Some(1));
}

/// If this fails, a script takes output that was lost for a success.
#[test]
fn output_that_is_lost_is_an_error() {
    let dir = scratch("lost-output");
    assert!(Served::spawn(serve(dir.path()), 1).stop().success());
    let dir = dir.path().to_str().expect("a path of the test");
    // Of `verify`, 1 would say that the store is damaged.
    let code = |arguments: &[&str]| if arguments[0] == "verify" { 2 } else { 1 };
    let commands: [&[&str]; 7] = [
        &["--help"],
        &["--version"],
        &["serve", "--help"],
        &["doctor", "--dir", dir],
        &["volume", "list", "--dir", dir],
        &["volume", "list", "--format", "json", "--dir", dir],
        &["verify", "--dir", dir],
    ];
    for arguments in commands {
        let full = File::options().write(true).open("/dev/full").expect("/dev/full");
        let output = corepage(arguments).stdout(full).output().expect("corepage starts");
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code(arguments)), "{arguments:?}: {said}");
        assert!(said.contains("stdout"), "{arguments:?}: {said}");
        // A reader that has enough is no error.
        let gone = std::io::pipe().expect("a pipe").1;
        let status = corepage(arguments).stdout(gone).status().expect("corepage starts");
        assert_eq!(status.code(), Some(0), "{arguments:?}");
    }
}

/// If this fails, whoever sets RUST_LOG to find a fault looks at lines that leave it out.
#[test]
fn a_log_filter_that_cannot_be_meant_is_refused() {
    for bad in ["verbose", "corepage=loud", "=="] {
        let output = corepage(&["doctor"]).env("RUST_LOG", bad).output().expect("corepage starts");
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{bad}: {said}");
        assert!(said.contains("RUST_LOG") && said.contains(bad), "{said}");
    }
}

/// If this fails, a typing error costs the machine its memory, or leaves hundreds of megabytes of a
/// store that never was.
#[test]
fn more_memory_than_there_is_is_refused_before_anything_is_made() {
    let dir = scratch("memory");
    let store = dir.path().join("store");
    let mut command = corepage(&["serve", "--nbd", "tcp:127.0.0.1:0", "--memory", "100T", "--dir"]);
    let output = command.arg(&store).output().expect("corepage starts");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("--memory") && said.contains("100.0 TiB"), "{said}");
    assert!(!store.exists(), "something was made");
}

/// If this fails, a server in a small container is killed because nobody has told it how small.
#[test]
fn the_default_memory_suits_a_limit_of_the_process() {
    let dir = scratch("small");
    let mut command = corepage(&["serve", "--nbd", "tcp:127.0.0.1:0", "--shards", "1", "--dir"]);
    command.arg(dir.path());
    start_without(&mut command, &[Without::AddressSpaceAbove(400 << 20)]);
    let served = Served::spawn(command, 1);
    served.client().write(nbd::FUA, 0, b"it runs");
    assert!(served.stop().success());
}

/// If this fails, a unit with `Type=notify` is never started, or its clients are let loose before
/// there is a server.
#[test]
fn a_supervisor_is_told_when_clients_can_connect_and_when_it_ends() {
    let dir = scratch("notify");
    let place = tempfile::tempdir().expect("a short path");
    let path = place.path().join("notify");
    let supervisor = UnixDatagram::bind(&path).expect("a socket");
    supervisor.set_read_timeout(Some(Duration::from_secs(60))).expect("a limit");
    let heard = || {
        let mut bytes = [0; 4096];
        let count = supervisor.recv(&mut bytes).expect("a message");
        String::from_utf8(bytes[..count].to_vec()).expect("text")
    };
    let mut command = serve(dir.path());
    command.env("NOTIFY_SOCKET", &path);
    let served = Served::spawn(command, 1);
    assert!(heard().starts_with("STATUS=opening"));
    let ready = heard();
    assert!(ready.starts_with("READY=1\n") && ready.contains(&served.address()), "{ready}");
    served.client().write(nbd::FUA, 0, b"it serves");
    assert!(served.stop().success());
    assert!(heard().starts_with("STOPPING=1"));
    // A supervisor that is gone is no reason not to serve.
    drop(supervisor);
    let mut command = serve(dir.path());
    command.env("NOTIFY_SOCKET", &path);
    assert!(Served::spawn(command, 1).stop().success());
}

/// If this fails, a script can't tell a benchmark that was interrupted from one that has failed.
#[test]
fn an_interrupted_benchmark_ends_by_its_signal_and_says_so_once() {
    let dir = scratch("bench-interrupted");
    let mut command = corepage(&["bench", "read", "--size", "64M", "--seconds", "100", "--dir"]);
    let mut child = command
        .arg(dir.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("it starts");
    let end = Instant::now() + Duration::from_secs(60);
    while !dir.path().join("data").exists() && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(5));
    }
    kill_process(Pid::from_child(&child), Signal::INT).expect("it runs");
    let status = child.wait().expect("it ends");
    let (mut said, mut printed) = (String::new(), String::new());
    child.stderr.take().expect("piped").read_to_string(&mut said).expect("text");
    child.stdout.take().expect("piped").read_to_string(&mut printed).expect("text");
    assert_eq!(status.signal(), Some(libc::SIGINT), "{status}: {said}");
    assert!(
        said.starts_with("error: ") && said.lines().count() == 1 && printed.is_empty(),
        "{said} {printed}"
    );
}
