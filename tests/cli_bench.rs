//! `corepage bench` beside somebody's data: whatever happens to it, that data stays, and its own goes.
//!
//! If these fail, measuring a store costs its user a volume, or leaves one that nobody wants.

// Real processes take real time.
#![allow(clippy::disallowed_methods)]

mod common;

use common::{corepage, scratch};
use corepage::blocking::Store;
use corepage::{Options, PageId};
use rustix::process::{Pid, Signal, kill_process};
use std::path::Path;
use std::process::{Child, Output, Stdio};
use std::time::Duration;

const NAME: &str = "corepage-bench";

fn open(dir: &Path) -> Store {
    Store::open(dir, Options { memory_bytes: 32 << 20, ..Options::default() }).expect("it opens")
}

/// A closed store with a page in a volume of that name.
fn store_with(dir: &Path, name: &str) {
    let store = open(dir);
    let volume = store.create_volume(name, 1 << 20).expect("there is room");
    volume.write(PageId::new(3), vec![7; 4096]).expect("it is written");
    store.close().expect("it closes");
}

/// That page, and no volume of a benchmark.
#[track_caller]
fn only_mine_is_there(dir: &Path) {
    let store = open(dir);
    let names: Vec<_> = store.volumes().expect("they are listed").iter().map(|v| v.name().to_owned()).collect();
    assert_eq!(names, ["mine"]);
    let mine = store.volume("mine").expect("the catalog is read").expect("it is there");
    assert_eq!(mine.read(PageId::new(3)).expect("it is read")[..], [7; 4096]);
    store.close().expect("it closes");
}

fn arguments<'a>(dir: &'a Path, seconds: &'a str) -> Vec<&'a str> {
    let dir = dir.to_str().expect("UTF-8");
    vec!["bench", "write", "--dir", dir, "--size", "8M", "--memory", "16M", "--seconds", seconds, "--format", "json"]
}

fn bench(dir: &Path) -> Output {
    corepage(&arguments(dir, "1")).output().expect("it runs")
}

/// A benchmark that has begun to write pages of its own.
fn begun(dir: &Path) -> Child {
    let mut command = corepage(&arguments(dir, "600"));
    let child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("it runs");
    // All its pages once are 8 MiB.
    let written = || {
        let told = std::fs::read_to_string(format!("/proc/{}/io", child.id())).unwrap_or_default();
        let bytes = told.lines().find_map(|line| line.strip_prefix("write_bytes: "));
        bytes.and_then(|bytes| bytes.parse::<u64>().ok()).unwrap_or(0)
    };
    while written() < 8 << 20 {
        std::thread::sleep(Duration::from_millis(5));
    }
    std::thread::sleep(Duration::from_millis(300));
    child
}

#[test]
fn a_volume_of_the_same_name_with_data_of_somebody_is_left_alone() {
    let dir = scratch("bench-name");
    store_with(dir.path(), NAME);
    let output = bench(dir.path());
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.starts_with("error: ") && text.contains("page 3") && text.contains("volume delete"), "{text}");
    assert!(output.stdout.is_empty());
    let store = open(dir.path());
    let volume = store.volume(NAME).expect("the catalog is read").expect("it was deleted");
    assert!(volume.bytes() == 1 << 20 && volume.read(PageId::new(3)).expect("it is read")[..] == [7; 4096]);
    store.close().expect("it closes");
}

#[test]
fn an_interrupted_bench_takes_its_volume_out_of_the_store_again() {
    let dir = scratch("bench-int");
    store_with(dir.path(), "mine");
    let child = begun(dir.path());
    kill_process(Pid::from_child(&child), Signal::INT).expect("it runs");
    let output = child.wait_with_output().expect("it is ours");
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(1) && text.starts_with("error: interrupted"), "{text}");
    only_mine_is_there(dir.path());
}

#[test]
fn what_a_killed_bench_left_is_no_hindrance_for_the_next_one() {
    let dir = scratch("bench-kill");
    store_with(dir.path(), "mine");
    let mut child = begun(dir.path());
    child.kill().expect("it runs");
    child.wait().expect("it is ours");
    let store = open(dir.path());
    assert!(store.volume(NAME).expect("the catalog is read").is_some(), "it was killed too early to leave anything");
    store.close().expect("it closes");
    let output = bench(dir.path());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let told: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON alone");
    assert!(told["verified"] == true && told["volume"] == NAME && told["dir"].is_string(), "{told}");
    only_mine_is_there(dir.path());
}
