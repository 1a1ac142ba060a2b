//! `corepage stat` shard by shard, what `volume` says of names that are not there, and counters that must agree with each other.
//!
//! If these fail, whoever looks for a slow shard or a mistyped name is misled.

// Real processes take real time.
#![allow(clippy::disallowed_methods)]

mod common;

use common::{Served, corepage, scratch};
use corepage::blocking::Store;
use corepage::{Options, PageId};
use serde_json::Value;
use std::path::Path;

fn stat(dir: &Path, arguments: &[&str]) -> String {
    let dir = dir.to_str().expect("UTF-8");
    let output = corepage(&[&["stat", "--dir", dir], arguments].concat()).output().expect("it runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("UTF-8")
}

#[test]
fn stat_tells_each_shard_and_they_make_up_the_total() {
    let dir = scratch("stat-shards");
    let served = Served::start_with(dir.path(), &["--nbd", "tcp:127.0.0.1:0", "--shards", "2"]);
    let mut client = served.client();
    for n in 0..200 {
        // Far enough from each other to be of both shards.
        client.write(1, n * 4096 * 97, &[7; 4096]);
    }
    let told: Value = serde_json::from_str(&stat(dir.path(), &["--shards", "--count", "1", "--format", "json"]))
        .expect("one line of JSON");
    let shards = told["shards"].as_array().expect("each shard");
    assert_eq!(shards.len(), 2);
    let count = |of: &Value, name: &str| of["total"][name].as_u64().unwrap_or_else(|| panic!("{name} in {of}"));
    for name in ["page_writes", "commits", "device_operations", "checksums", "bytes_written"] {
        let sum: u64 = shards.iter().map(|shard| count(shard, name)).sum();
        assert!(sum == count(&told, name) && shards.iter().all(|shard| count(shard, name) > 0), "{name}: {told}");
    }
    assert!(count(&told, "page_writes") >= 200);
    for of in shards.iter().chain([&told]) {
        let is_number = |name: &str| of[name].is_number();
        assert!(is_number("iops") && is_number("hit_ratio") && is_number("commits_per_flush"), "{of}");
        assert!(of["interval"]["commit_latency"]["p999_us"].is_number(), "{of}");
    }
    let without: Value = serde_json::from_str(&stat(dir.path(), &["--count", "1", "--format", "json"])).expect("JSON");
    assert!(without["shards"].is_null() && without["total"].is_object(), "{without}");
    let table = stat(dir.path(), &["--shards", "--count", "2"]);
    let ends: Vec<_> = table.lines().skip(2).map(|line| line.split_whitespace().last().expect("columns")).collect();
    assert!(ends.len() == 6 && ends[1..3] == ["s0", "s1"] && ends[4..] == ["s0", "s1"], "{table}");
    assert!(served.stop().success());
}

#[test]
fn a_volume_that_is_not_there_is_not_asked_to_be_deleted() {
    let dir = scratch("unknown");
    let served = Served::start(dir.path());
    let delete = ["volume", "delete", "dsik", "--dir", dir.path().to_str().expect("UTF-8")];
    let output = corepage(&delete).output().expect("it runs");
    let text = String::from_utf8(output.stderr).expect("UTF-8");
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("dsik") && text.contains("there are: disk") && !text.contains("--yes"), "{text}");
    assert!(served.stop().success());
}

#[test]
fn counters_of_the_device_and_of_checksums_add_up() {
    let dir = scratch("counters");
    let options = || Options { shards: Some(2), memory_bytes: 32 << 20, ..Options::default() };
    let store = Store::open(dir.path(), options()).expect("it opens");
    let volume = store.create_volume("v", 1 << 30).expect("there is room");
    let before = store.stats().expect("it is open");
    for n in 0..500 {
        volume.write_back(PageId::new(n), vec![n as u8; 4096]).expect("there is room");
    }
    store.flush().expect("it is durable");
    store.checkpoint().expect("all is in its place");
    let now = store.stats().expect("it is open").since(&before);
    assert!(now.pages_written >= 500 && now.coalesced_writes > 0, "{now:?}");
    assert_eq!(now.coalesced_writes, now.pages_written - now.page_write_ops);
    assert!(now.log_groups > 0 && now.nodes_written > 0);
    // One for each page and node, two for each group, one for each of the two copies of a superblock.
    assert!(now.checksums >= now.pages_written + now.nodes_written + 2 * now.log_groups + 2, "{now:?}");
    assert!(now.device_flushes > now.flushes && now.flushes > 0, "a checkpoint flushes, too: {now:?}");
    assert!(now.device_operations >= now.device_reads + now.device_writes + now.device_flushes, "{now:?}");
    assert!(now.submissions > 0 && now.hit_ratio() <= 1.0);
    store.close().expect("it closes");
}
