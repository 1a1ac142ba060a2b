//! `corepage bench`: what it tells, and that however it ends, other data in the store stays and its
//! own volume goes.
//!
//! If these fail, figures can't be trusted or read by programs, or measuring a store costs its user
//! a volume, or leaves one that nobody wants.

// Real processes take real time.
#![allow(clippy::disallowed_methods)]

use crate::common;
use common::{Served, corepage, scratch};
use corepage::blocking::Wait;
use corepage::{Options, PageId, Store};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, ChildStderr, Output, Stdio};

const NAME: &str = "corepage-bench";

fn open(dir: &Path) -> Store {
    Store::open(dir, Options { memory_bytes: 32 << 20, ..Options::default() })
        .wait()
        .expect("it opens")
}

/// A closed store with a page in a volume of that name.
fn store_with(dir: &Path, name: &str) {
    let store = open(dir);
    let volume = store.create_volume(name, 1 << 20).wait().expect("there is room");
    volume.write(PageId::new(3), vec![7; 4096]).wait().expect("it is written");
    store.close().wait().expect("it closes");
}

/// That page, and no volume of a benchmark.
#[track_caller]
fn only_mine_is_there(dir: &Path) {
    let store = open(dir);
    let names: Vec<_> = store
        .volumes()
        .wait()
        .expect("they are listed")
        .iter()
        .map(|v| v.name().to_owned())
        .collect();
    assert_eq!(names, ["mine"]);
    let mine = store.volume("mine").wait().expect("the catalog is read").expect("it is there");
    assert_eq!(mine.read(PageId::new(3)).wait().expect("it is read")[..], [7; 4096]);
    store.close().wait().expect("it closes");
}

fn arguments<'a>(dir: &'a Path, seconds: &'a str) -> Vec<&'a str> {
    let dir = dir.to_str().expect("UTF-8");
    vec![
        "bench",
        "write",
        "--dir",
        dir,
        "--size",
        "8M",
        "--memory",
        "16M",
        "--seconds",
        seconds,
        "--format",
        "json",
    ]
}

fn bench(dir: &Path) -> Output {
    corepage(&arguments(dir, "1")).output().expect("it runs")
}

/// A benchmark that says that it measures now.
struct Measuring {
    child: Child,
    stderr: BufReader<ChildStderr>,
}

impl Measuring {
    fn start(at: &Path, arguments: &[&str]) -> Measuring {
        let mut command = corepage(arguments);
        command.current_dir(at).env("RUST_LOG", "info");
        let mut child =
            command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("it runs");
        let mut stderr = BufReader::new(child.stderr.take().expect("stderr is piped"));
        let mut text = String::new();
        while !text.contains(" measuring ") {
            let count = stderr.read_line(&mut text).expect("lines are text");
            assert!(count > 0, "it ended before it measured: {text}");
        }
        Measuring { child, stderr }
    }

    /// What it says when it is interrupted.
    fn interrupted(mut self) -> String {
        kill_process(Pid::from_child(&self.child), Signal::INT).expect("it runs");
        let mut text = String::new();
        self.stderr.read_to_string(&mut text).expect("lines are text");
        let status = self.child.wait().expect("it is ours");
        assert_eq!(status.signal(), Some(Signal::INT.as_raw()), "{status}: {text}");
        text
    }
}

impl Drop for Measuring {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_volume_of_the_same_name_with_other_data_is_left_alone() {
    let dir = scratch("bench-name");
    store_with(dir.path(), NAME);
    let output = bench(dir.path());
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(
        text.starts_with("error: ") && text.contains("page 3") && text.contains("volume delete"),
        "{text}"
    );
    assert!(output.stdout.is_empty());
    let store = open(dir.path());
    let volume = store.volume(NAME).wait().expect("the catalog is read").expect("it was deleted");
    assert!(
        volume.bytes() == 1 << 20
            && volume.read(PageId::new(3)).wait().expect("it is read")[..] == [7; 4096]
    );
    store.close().wait().expect("it closes");
}

#[test]
fn an_interrupted_bench_takes_its_volume_out_of_the_store_again() {
    let dir = scratch("bench-int");
    store_with(dir.path(), "mine");
    let text = Measuring::start(dir.path(), &arguments(dir.path(), "600")).interrupted();
    assert!(text.starts_with("error: interrupted"), "{text}");
    only_mine_is_there(dir.path());
}

#[test]
fn what_a_killed_bench_left_is_no_hindrance_for_the_next_one() {
    let dir = scratch("bench-kill");
    store_with(dir.path(), "mine");
    drop(Measuring::start(dir.path(), &arguments(dir.path(), "600")));
    let store = open(dir.path());
    assert!(
        store.volume(NAME).wait().expect("the catalog is read").is_some(),
        "it was killed too early to leave anything"
    );
    store.close().wait().expect("it closes");
    let output = bench(dir.path());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let told: Value = serde_json::from_slice(&output.stdout).expect("JSON alone");
    assert!(
        told["verified"] == true && told["volume"] == NAME && told["dir"].is_string(),
        "{told}"
    );
    only_mine_is_there(dir.path());
}

fn bench_at(at: &Path, arguments: &[&str]) -> Output {
    corepage(&[&["bench"], arguments].concat()).current_dir(at).output().expect("it runs")
}

/// A benchmark's result that programs can't read, or that was not verified, or that costs a user
/// data, is worth nothing.
#[test]
fn bench_measures_verifies_and_leaves_nothing_behind() {
    let dir = scratch("bench");
    let small =
        ["--size", "8M", "--memory", "16M", "--seconds", "1", "--depth", "8", "--format", "json"];
    let result = |arguments: &[&str]| -> Value {
        let output = bench_at(dir.path(), &[arguments, &small].concat());
        assert!(
            output.status.success(),
            "{arguments:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        assert!(output.stderr.is_empty(), "no progress without a terminal: {output:?}");
        serde_json::from_slice(&output.stdout).expect("JSON alone")
    };
    for (workload, from) in
        [("read", "shard"), ("write", "shard"), ("commit", "thread"), ("write", "thread")]
    {
        let told = result(&[workload, "--from", from, "--clients", "2"]);
        assert!(
            told["workload"] == workload && told["from"] == from && told["verified"] == true,
            "{told}"
        );
        assert!(told["ops_per_s"].as_f64().unwrap() > 0.0 && told["machine"].is_object(), "{told}");
        let (written, live) =
            (told["write_amplification"].as_f64().unwrap(), told["live_share"].as_f64().unwrap());
        assert!(0.0 < live && live < 1.0 && (workload == "read" || written > 0.5), "{told}");
        let us = |name: &str| told["latency_us"][name].as_f64().unwrap();
        assert!(
            0.0 < us("p50")
                && us("p50") <= us("p99")
                && us("p99") <= us("p999")
                && us("p999") <= us("max"),
            "{told}"
        );
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "its store is removed");
    // In a store with other data: it works beside that and leaves it alone.
    let served = Served::start(&dir.path().join("mine"));
    served.client().write(1, 0, b"mine");
    assert!(served.stop().success());
    result(&["write", "--dir", "mine"]);
    let store = open(&dir.path().join("mine"));
    let there: Vec<_> = store
        .volumes()
        .wait()
        .expect("they are listed")
        .iter()
        .map(|v| (v.name().to_owned(), v.bytes()))
        .collect();
    assert_eq!(there, [("disk".into(), 1 << 30)]);
    store.close().wait().expect("it closes");
    let served = Served::start(&dir.path().join("mine"));
    assert_eq!(served.client().read(0, 4), b"mine");
    let output = bench_at(dir.path(), &[&["write", "--dir", "mine"], &small[..]].concat());
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(1) && text.contains("open in another process"), "{text}");
    assert!(served.stop().success());
    for (wrong, says) in [
        (&["read", "--size", "4097"][..], "4097"),
        (&["read", "--size", "64K", "--depth", "64"], "needs a page of its own"),
        (&["write", "--depth", "0"], "0"),
        (&["fly"], "qd-sweep"),
        (&["read", "--memory", "1M"], "--memory"),
    ] {
        let output = bench_at(dir.path(), wrong);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            !output.status.success() && text.starts_with("error: ") && text.contains(says),
            "{wrong:?}: {text}"
        );
    }
    assert_eq!(
        std::fs::read_dir(dir.path()).unwrap().count(),
        1,
        "only the user's own store is left"
    );
}

#[test]
fn an_interrupted_bench_removes_what_it_made() {
    let dir = scratch("interrupted");
    let arguments = ["bench", "write", "--size", "8M", "--memory", "16M", "--seconds", "60"];
    let text = Measuring::start(dir.path(), &arguments).interrupted();
    assert!(text.starts_with("error: interrupted"), "{text}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "it left its store behind");
}

/// Minutes of measuring are lost where the clean-up afterwards decides whether their result is
/// shown: here the memory is full of the benchmark's own pages when its volume is deleted.
#[test]
fn a_result_is_printed_though_the_memory_is_full_when_its_volume_is_deleted() {
    let dir = scratch("full");
    for place in [&[][..], &["--dir", "mine"]] {
        let arguments =
            ["read", "--size", "64M", "--memory", "16M", "--seconds", "1", "--format", "json"];
        let output = bench_at(dir.path(), &[&arguments[..], place].concat());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let told: Value = serde_json::from_slice(&output.stdout).expect("JSON alone");
        assert!(
            told["verified"] == true && told["ops_per_s"].as_f64().is_some_and(|rate| rate > 0.0),
            "{told}"
        );
    }
    let store = open(&dir.path().join("mine"));
    assert_eq!(store.volumes().wait().expect("they are listed").len(), 0);
    store.close().wait().expect("it closes");
}

/// Beside the others, since it takes a second for each of its depths.
#[test]
fn a_sweep_measures_each_depth_and_leaves_nothing_behind() {
    let dir = scratch("sweep");
    let sweep =
        bench_at(dir.path(), &["qd-sweep", "--size", "8M", "--memory", "16M", "--seconds", "1"]);
    let table = String::from_utf8(sweep.stdout).unwrap();
    let rows = |of: &str| table.lines().filter(|line| line.starts_with(of)).count();
    assert!(
        rows("read ") == 9 && rows("write ") == 9 && table.contains("all 2048 pages verified"),
        "{table}"
    );
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "its store is removed");
}

/// Every depth that `--help` allows is measured: a store that is busy is asked again, as its
/// callers do.
#[test]
fn any_depth_that_is_allowed_is_run() {
    let dir = scratch("bench-depth");
    let most = ["65536", "300M"];
    for [workload, from, depth, size] in [
        ["read", "shard", "4096", "64M"],
        ["write", "thread", most[0], most[1]],
        ["read", "thread", "10000", "64M"],
    ] {
        let mut command =
            corepage(&["bench", workload, "--from", from, "--depth", depth, "--size", size]);
        let command = command
            .args(["--memory", "64M", "--seconds", "1", "--format", "json"])
            .current_dir(dir.path());
        let output = command.output().expect("it runs");
        assert!(
            output.status.success(),
            "depth {depth}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        let told: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        assert_eq!(
            (&told["depth"], &told["verified"]),
            (&depth.parse().expect("a number"), &true.into()),
            "{told}"
        );
    }
}

/// A bar that stands at 0 % with "0s left" until all is over tells its user to give up.
#[test]
fn progress_moves_while_it_is_measured() {
    if !common::has_tool("script") {
        return;
    }
    let dir = scratch("bench-progress");
    let program = env!("CARGO_BIN_EXE_corepage");
    let run = format!("'{program}' bench read --size 8M --memory 16M --seconds 3");
    let mut command = std::process::Command::new("script");
    let output = command
        .args(["-qec", &run, "/dev/null"])
        .current_dir(dir.path())
        .output()
        .expect("it runs");
    let shown = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{shown}");
    let percent = |line: &str| {
        line.split_once(" %")?.0.rsplit(|c: char| !c.is_ascii_digit()).next()?.parse::<u32>().ok()
    };
    let told: Vec<u32> =
        shown.split('\r').filter(|part| part.contains("measuring")).filter_map(percent).collect();
    assert!(told.iter().any(|percent| (1..100).contains(percent)), "{told:?} of {shown:?}");
    assert!(told.is_sorted(), "it only grows: {told:?}");
    assert!(!shown.contains(" 0 %, 0 s left"), "what is not known is not said: {shown:?}");
}

/// Words of the library (`memory_bytes`, half of the number that was typed) say nothing to whoever
/// typed `--memory 100T`.
#[test]
fn what_a_benchmark_can_not_have_is_refused_in_the_words_of_its_arguments() {
    let dir = scratch("bench-refused");
    let cases: [(i32, &[&str], &str); 4] = [
        (1, &["--memory", "100T"], "--memory: 100.0 TiB"),
        (2, &["--memory", "1M"], "2.0 MiB is the least"),
        (2, &["--size", "1000001"], "use 999424 or 1003520"),
        (2, &["--size", "4M", "--depth", "65536"], "256.0 MiB"),
    ];
    for (code, arguments, hint) in cases {
        let mut command = corepage(&["bench", "read", "--seconds", "1"]);
        let output = command.args(arguments).current_dir(dir.path()).output().expect("it runs");
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {said}");
        assert!(
            said.starts_with("error: ") && said.contains(hint) && !said.contains("_bytes"),
            "{arguments:?}: {said}"
        );
    }
    assert_eq!(std::fs::read_dir(dir.path()).expect("a directory").count(), 0, "nothing is made");
}
