//! The tools around a store as a user meets them: `volume` and `stat`, with and without a server,
//! and its control socket.

// Real processes take real time.
#![allow(clippy::disallowed_methods)]

use crate::common;
use common::{Served, corepage, scratch};
use corepage::blocking::Wait;
use corepage::{Options, PageId, Store, Volume};
use serde_json::Value;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Output;

fn tool(dir: &Path, arguments: &[&str]) -> Output {
    let dir = dir.to_str().expect("UTF-8");
    corepage(&[arguments, &["--dir", dir]].concat()).output().expect("it runs")
}

/// What it prints if it succeeds.
#[track_caller]
fn done(dir: &Path, arguments: &[&str]) -> String {
    let output = tool(dir, arguments);
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    assert!(output.stderr.is_empty(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("UTF-8")
}

/// Its exit code and its one line of complaint; behind one about an argument stands where to find
/// help.
#[track_caller]
fn refused(dir: &Path, arguments: &[&str]) -> (i32, String) {
    let output = tool(dir, arguments);
    let text = String::from_utf8(output.stderr).expect("UTF-8");
    let text = text.replace("\n\nFor more information, try '--help'.\n", "\n");
    assert!(
        output.stdout.is_empty() && text.starts_with("error: ") && text.lines().count() == 1,
        "{text}"
    );
    (output.status.code().expect("no signal"), text)
}

fn volumes(dir: &Path) -> Vec<(String, u64)> {
    let listed: Value =
        serde_json::from_str(&done(dir, &["volume", "list", "--format", "json"])).expect("JSON");
    let line = |v: &Value| (v["name"].as_str().unwrap().to_owned(), v["bytes"].as_u64().unwrap());
    listed.as_array().unwrap().iter().map(line).collect()
}

/// The same commands on a closed store, and on one that is served.
fn life_of_a_volume(dir: &Path) {
    assert_eq!(
        done(dir, &["volume", "create", "two", "1G"]),
        "created two, 1.0 GiB (1073741824 bytes)\n"
    );
    let (code, text) = refused(dir, &["volume", "create", "two", "1G"]);
    assert!(code == 1 && text.contains("exists already"), "{text}");
    assert!(refused(dir, &["volume", "create", "odd", "4097"]).1.contains("use 4096 or 8192"));
    assert!(refused(dir, &["volume", "create", "huge", "8E"]).1.contains("9223372036854771712"));
    let long = "a".repeat(4096);
    for action in [&["create", &long, "1G"][..], &["resize", &long, "1G"], &["delete", &long]] {
        assert!(
            refused(dir, &[&["volume"], action].concat()).1.contains("255 bytes at most"),
            "{action:?}"
        );
    }
    assert_eq!(
        done(dir, &["volume", "resize", "two", "2G"]),
        "two has 2.0 GiB now (2147483648 bytes)\n"
    );
    let (code, text) = refused(dir, &["volume", "resize", "two", "1M"]);
    assert!(code == 2 && text.contains("--yes"), "{text}");
    done(dir, &["volume", "resize", "two", "1M", "--yes"]);
    assert_eq!(volumes(dir), [("disk".into(), 1 << 30), ("two".into(), 1 << 20)]);
    let table = done(dir, &["volume", "list"]);
    assert!(table.starts_with("NAME") && table.contains("\ntwo   1.0 MiB"), "{table}");
    assert!(refused(dir, &["volume", "delete", "two"]).1.contains("--yes"));
    assert_eq!(done(dir, &["volume", "delete", "two", "--yes"]), "deleted two\n");
    for gone in [&["volume", "delete", "two", "--yes"][..], &["volume", "resize", "two", "1G"]] {
        let (code, text) = refused(dir, gone);
        assert!(code == 1 && text.contains("two") && text.contains("there are: disk"), "{text}");
    }
}

#[test]
fn volumes_come_grow_shrink_and_go_with_and_without_a_server() {
    let dir = scratch("volumes");
    let (code, text) = refused(dir.path(), &["volume", "list"]);
    assert!(
        code == 1 && text.contains("there is no store") && text.contains("corepage serve"),
        "{text}"
    );
    let served = Served::start(dir.path());
    life_of_a_volume(dir.path());
    // Clients that connect see what is there by then.
    done(dir.path(), &["volume", "create", "new", "64M"]);
    let mut client = common::nbd::Client::go(&served.address(), "new");
    assert_eq!(client.bytes, 64 << 20);
    client.write(1, 63 << 20, b"far");
    done(dir.path(), &["volume", "resize", "new", "32M", "--yes"]);
    assert_eq!(
        client.call(0, common::nbd::READ, 63 << 20, 3, &[]),
        common::nbd::EINVAL,
        "it was cut off"
    );
    assert_eq!(common::nbd::Client::go(&served.address(), "new").bytes, 32 << 20);
    done(dir.path(), &["volume", "delete", "new", "--yes"]);
    assert_eq!(client.call(0, common::nbd::READ, 0, 3, &[]), libc::ESHUTDOWN as u32, "it is gone");
    assert!(served.stop().success());
    life_of_a_volume(dir.path());
    assert!(!dir.path().join("control.sock").exists(), "a server leaves no socket");
}

#[test]
fn stat_tells_what_the_server_did_in_each_second() {
    let dir = scratch("stat");
    let (code, text) = refused(dir.path(), &["stat"]);
    assert!(
        code == 1 && text.contains("no server answers") && text.contains("corepage serve"),
        "{text}"
    );
    let served = Served::start(dir.path());
    let mut client = served.client();
    let mut lines = {
        let mut stat = corepage(&[
            "stat",
            "--format",
            "json",
            "--count",
            "3",
            "--dir",
            dir.path().to_str().unwrap(),
        ]);
        let mut child = stat.stdout(std::process::Stdio::piped()).spawn().expect("it runs");
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        // One after another, so that they are of the time that is told.
        for n in 0..400 {
            client.write(1, n * 4096, &[7; 4096]);
        }
        let lines: Vec<Value> = lines
            .map(|line| serde_json::from_str(&line.unwrap()).expect("a line of JSON"))
            .collect();
        assert!(child.wait().unwrap().success());
        lines
    };
    assert_eq!(lines.len(), 3);
    let last = lines.pop().unwrap();
    assert!(last["seconds"].as_f64().unwrap() >= 0.9, "{last}");
    assert!(last["total"]["page_writes"].as_u64().unwrap() >= 400, "{last}");
    assert!(last["total"]["commit_latency"]["count"].as_u64().unwrap() >= 400);
    let by_line: u64 = lines
        .iter()
        .chain([&last])
        .map(|line| line["interval"]["page_writes"].as_u64().unwrap())
        .sum();
    assert!(by_line <= last["total"]["page_writes"].as_u64().unwrap());
    let socket = dir.path().join("control.sock");
    assert_eq!(
        socket.metadata().unwrap().permissions().mode() & 0o777,
        0o600,
        "only its owner may"
    );
    let table = corepage(&["stat", "--count", "2", "--connect", socket.to_str().unwrap()])
        .output()
        .unwrap();
    let table = String::from_utf8(table.stdout).unwrap();
    assert!(table.lines().count() == 4 && table.contains("commits"), "{table}");
    let widths: Vec<usize> = table.lines().map(str::len).collect();
    assert!(widths.iter().all(|width| *width <= 120), "{widths:?}");
    assert!(served.stop().success());
}

fn line(socket: &mut UnixStream, bytes: &[u8]) -> Value {
    socket.write_all(bytes).expect("it takes a line");
    let mut answer = String::new();
    BufReader::new(&*socket).read_line(&mut answer).expect("it answers");
    serde_json::from_str(&answer).unwrap_or_else(|error| panic!("{error}: {answer:?}"))
}

#[test]
fn a_hostile_control_client_hurts_only_itself() {
    let dir = scratch("control");
    let served = Served::start(dir.path());
    let socket = dir.path().join("control.sock");
    let connect = || UnixStream::connect(&socket).expect("the socket is there");
    let mut client = connect();
    for bad in [
        "x\n",
        "\n",
        "{}\n",
        "[]\n",
        "{\"ask\":\"nothing\"}\n",
        "{\"ask\":\"create\",\"name\":7}\n",
        "\u{fffd}\n",
    ] {
        let answer = line(&mut client, bad.as_bytes());
        assert!(
            answer["error"].as_str().unwrap().starts_with("not a request"),
            "{bad:?}: {answer}"
        );
    }
    let answer = line(&mut client, b"{\"ask\":\"create\",\"name\":\"\",\"bytes\":4096}\n");
    assert!(answer["error"].as_str().unwrap().contains("1 to 255 bytes"), "{answer}");
    assert!(line(&mut client, b"{\"ask\":\"volumes\"}\n")["ok"].is_array(), "it goes on");
    let answer = line(&mut connect(), &[b'a'; 5000]);
    assert!(answer["error"].as_str().unwrap().contains("at most 4096"), "{answer}");
    // As many silent ones as there is room for; the next is sent away, and room comes back.
    let silent: Vec<UnixStream> = (0..20).map(|_| connect()).collect();
    let mut closed = 0;
    for mut socket in &silent {
        socket.set_read_timeout(Some(std::time::Duration::from_millis(200))).unwrap();
        let mut told = String::new();
        // The others wait for a request of theirs.
        closed += usize::from(
            socket.read_to_string(&mut told).is_ok() && told.contains("which is the most"),
        );
    }
    assert!(closed >= 4, "only {closed} of 20 were sent away");
    assert!(
        line(&mut client, b"{\"ask\":\"volumes\"}\n")["ok"].is_array(),
        "the first one is served"
    );
    assert_eq!(served.client().read(0, 3), [0; 3], "and so are others");
    drop(silent);
    assert!(served.stop().success(), "with a client connected");
}

fn freeing(dir: &Path) -> u64 {
    let told = done(dir, &["stat", "--count", "1", "--format", "json"]);
    let told: Value = serde_json::from_str(&told).expect("a line of JSON");
    told["volumes_freeing"].as_u64().unwrap_or_else(|| panic!("{told}"))
}

/// Else a user reads "no memory is left" about a volume that is gone, and has its space back only
/// after the next start.
#[test]
fn a_volume_whose_pages_fill_the_memory_is_deleted_and_its_space_comes_back_while_it_is_served() {
    let dir = scratch("warm");
    let served = Served::start_with(dir.path(), &["--nbd", "tcp:127.0.0.1:0", "--memory", "64M"]);
    done(dir.path(), &["volume", "create", "y", "512M"]);
    let mut client = common::nbd::Client::go(&served.address(), "y");
    for at in (0..64 << 20).step_by(16 << 20) {
        client.write(0, at, &vec![5; 16 << 20]);
    }
    client.flush();
    for at in (0..64 << 20).step_by(16 << 20) {
        assert!(client.read(at, 16 << 20).iter().all(|byte| *byte == 5));
    }
    assert_eq!(done(dir.path(), &["volume", "delete", "y", "--yes"]), "deleted y\n");
    assert!(!done(dir.path(), &["volume", "list"]).contains("y "));
    while freeing(dir.path()) > 0 {}
    assert!(served.stop().success());
    let store = Store::open(dir.path(), Options { memory_bytes: 64 << 20, ..Options::default() })
        .wait()
        .expect("it opens");
    store.checkpoint().wait().expect("it is alive");
    let live = store.stats().wait().expect("it is alive").blocks_live;
    assert!(live < 2000, "{live} blocks are live in a store without pages");
    store.close().wait().expect("it closes");
}

/// A store of 60,000 pages in a volume `big`, closed.
fn store_with_a_large_volume(dir: &Path) {
    let store = Store::open(dir, Options { memory_bytes: 64 << 20, ..Options::default() })
        .wait()
        .expect("it opens");
    let volume = store.create_volume("big", 1 << 30).wait().expect("there is room");
    for first in (0..60_000).step_by(1000) {
        let page = |n| (PageId::new(n), corepage::Change::Put(vec![7; 4096].into()));
        for part in (first..first + 1000).collect::<Vec<u64>>().chunks(100) {
            let changes = part.iter().copied().map(page).collect();
            volume.apply(changes, corepage::Durability::Buffered).wait().expect("there is room");
        }
    }
    store.close().wait().expect("it closes");
}

fn is_empty_after_the_next_open(dir: &Path) {
    let store = Store::open(dir, Options { memory_bytes: 64 << 20, ..Options::default() })
        .wait()
        .expect("it opens");
    store.wait_freed().wait().expect("pages can be freed");
    store.checkpoint().wait().expect("it is alive");
    store.checkpoint().wait().expect("it is alive");
    let live = store.stats().wait().expect("it is alive").blocks_live;
    assert!(live < 2000, "{live} blocks are live in a store without pages");
    store.close().wait().expect("it closes");
}

/// Ctrl-C must not be the choice between waiting for minutes and a crash.
#[test]
fn deleting_a_large_volume_without_a_server_can_be_interrupted_and_is_finished_later() {
    let dir = scratch("interrupted");
    store_with_a_large_volume(dir.path());
    let place = dir.path().to_str().expect("UTF-8");
    let mut command = corepage(&["volume", "delete", "big", "--yes", "--dir", place]);
    let (out, err) = (std::process::Stdio::piped(), std::process::Stdio::piped());
    let mut child = command.stdout(out).stderr(err).spawn().expect("it runs");
    let mut said = String::new();
    let mut out = BufReader::new(child.stdout.take().expect("piped"));
    out.read_line(&mut said).expect("it says something");
    assert_eq!(said, "deleted big\n");
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).expect("it runs");
    let output = child.wait_with_output().expect("it is ours");
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        output.status.code() == Some(1) && text.starts_with("error: interrupted"),
        "{output:?}"
    );
    assert!(done(dir.path(), &["volume", "list"]).contains("no volumes"));
    is_empty_after_the_next_open(dir.path());
}

/// A service manager kills a server that does not stop in time; a volume being deleted must not
/// make it miss that.
#[test]
fn a_server_stops_while_a_large_volume_is_being_freed_and_the_next_start_goes_on() {
    let dir = scratch("stopped");
    store_with_a_large_volume(dir.path());
    let served = Served::start_with(dir.path(), &["--nbd", "tcp:127.0.0.1:0", "--memory", "64M"]);
    assert_eq!(done(dir.path(), &["volume", "delete", "big", "--yes"]), "deleted big\n");
    assert!(served.stop().success());
    let store = Store::open(dir.path(), Options { memory_bytes: 64 << 20, ..Options::default() })
        .wait()
        .expect("it opens");
    assert!(store.recovery().clean, "it was not closed cleanly");
    let live = store.stats().wait().expect("it is alive").blocks_live;
    assert!(live > 10_000, "{live} blocks are live: the server stopped only when all was freed");
    store.close().wait().expect("it closes, too");
    is_empty_after_the_next_open(dir.path());
}

/// Killed while a volume is being made smaller or deleted: it is whole, or it is cut; what was cut
/// off never comes back, and what was not stays as it was.
#[test]
fn a_kill_while_a_volume_is_cut_leaves_it_whole_or_cut() {
    const PAGES: u64 = 30_000;
    const KEPT: u64 = 1000;
    let dir = scratch("cut");
    let open = || {
        Store::open(dir.path(), Options { memory_bytes: 64 << 20, ..Options::default() })
            .wait()
            .expect("it opens")
    };
    let pages = |volume: &Volume| {
        let (mut all, mut next) = (0, Some(PageId::new(0)));
        while let Some(first) = next {
            let part = volume
                .allocated(first, PageId::new(u64::MAX), 1000)
                .wait()
                .expect("the map is read");
            all +=
                part.ranges.iter().map(|(first, last)| last.get() - first.get() + 1).sum::<u64>();
            next = part.next;
        }
        all
    };
    let (mut cut, mut whole, mut halfway) = (0, 0, 0);
    for round in 0..10u64 {
        let deletes = round % 2 == 0;
        let store = open();
        let volume = match store.volume("v").wait().expect("the catalog is read") {
            Some(volume) => volume,
            None => store.create_volume("v", PAGES * 4096).wait().expect("there is room"),
        };
        for n in 0..PAGES {
            volume
                .write_back(PageId::new(n), vec![1 + round as u8; 4096])
                .wait()
                .expect("there is room");
        }
        let id = volume.id();
        store.close().wait().expect("it closes");
        drop((store, volume));
        let size = (KEPT * 4096).to_string();
        let arguments = if deletes {
            vec!["delete", "v", "--yes"]
        } else {
            vec!["resize", "v", &size, "--yes"]
        };
        let place = dir.path().to_str().expect("UTF-8");
        let served = Served::start(dir.path());
        let mut command = corepage(&[&["volume"], &arguments[..], &["--dir", place]].concat());
        let mut child = command.stderr(std::process::Stdio::null()).spawn().expect("it runs");
        // The last two come to their end, however slow the machine is.
        if round < 8 {
            std::thread::sleep(std::time::Duration::from_millis(4 + 7 * round));
            served.kill();
            child.wait().expect("it is ours");
        } else {
            assert!(child.wait().expect("it is ours").success());
            assert!(served.stop().success());
        }
        let store = open();
        match store.volume("v").wait().expect("the catalog is read") {
            Some(volume) if volume.bytes() == PAGES * 4096 => {
                assert_eq!(pages(&volume), PAGES, "round {round}: whole, but for some pages");
                whole += 1;
            }
            Some(volume) => {
                halfway += u64::from(pages(&volume) > KEPT);
                assert!(
                    !deletes && volume.bytes() == KEPT * 4096,
                    "round {round}: {} bytes",
                    volume.bytes()
                );
                store.resize_volume("v", PAGES * 4096).wait().expect("it grows");
                assert_eq!(pages(&volume), KEPT, "round {round}: pages have come back");
                cut += 1;
            }
            None => {
                assert!(deletes, "round {round}: it was not to be deleted");
                // Its number is given again once its pages are gone.
                let mut made = 0;
                while store
                    .create_volume(&format!("n{made}"), 4096)
                    .wait()
                    .expect("there is a number")
                    .id()
                    != id
                {
                    made += 1;
                    assert!(made < 240, "round {round}: the number is never free");
                    std::thread::sleep(std::time::Duration::from_millis(20));
                }
                for n in 0..=made {
                    let volume = store
                        .volume(&format!("n{n}"))
                        .wait()
                        .expect("the catalog is read")
                        .expect("it was made");
                    assert_eq!(pages(&volume), 0, "round {round}: pages of another volume");
                    store.delete_volume(volume.name()).wait().expect("it goes");
                }
                cut += 1;
            }
        }
        if let Some(volume) = store.volume("v").wait().expect("the catalog is read") {
            for n in (0..KEPT).step_by(97) {
                assert_eq!(
                    volume.read(PageId::new(n)).wait().expect("it is there")[..],
                    [1 + round as u8; 4096],
                    "page {n}"
                );
            }
        }
        store.close().wait().expect("it closes");
    }
    assert!(cut >= 2, "{cut} cut, {whole} whole");
    eprintln!("{cut} cut, {whole} whole; {halfway} shortened ones were found half-way");
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
    let told: Value = serde_json::from_str(&done(
        dir.path(),
        &["stat", "--shards", "--count", "1", "--format", "json"],
    ))
    .expect("one line of JSON");
    let shards = told["shards"].as_array().expect("each shard");
    assert_eq!(shards.len(), 2);
    let count = |of: &Value, name: &str| {
        of["total"][name].as_u64().unwrap_or_else(|| panic!("{name} in {of}"))
    };
    for name in ["page_writes", "commits", "device_operations", "checksums", "bytes_written"] {
        let sum: u64 = shards.iter().map(|shard| count(shard, name)).sum();
        assert!(
            sum == count(&told, name) && shards.iter().all(|shard| count(shard, name) > 0),
            "{name}: {told}"
        );
    }
    assert!(count(&told, "page_writes") >= 200);
    for of in shards.iter().chain([&told]) {
        let is_number = |name: &str| of[name].is_number();
        assert!(
            is_number("iops") && is_number("hit_ratio") && is_number("commits_per_flush"),
            "{of}"
        );
        assert!(of["interval"]["commit_latency"]["p999_us"].is_number(), "{of}");
    }
    let without: Value =
        serde_json::from_str(&done(dir.path(), &["stat", "--count", "1", "--format", "json"]))
            .expect("JSON");
    assert!(without["shards"].is_null() && without["total"].is_object(), "{without}");
    let table = done(dir.path(), &["stat", "--shards", "--count", "2"]);
    let ends: Vec<_> = table
        .lines()
        .skip(2)
        .map(|line| line.split_whitespace().last().expect("columns"))
        .collect();
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
    assert!(
        text.contains("dsik") && text.contains("there are: disk") && !text.contains("--yes"),
        "{text}"
    );
    assert!(served.stop().success());
}

#[test]
fn counters_of_the_device_and_of_checksums_add_up() {
    let dir = scratch("counters");
    let options = || Options { shards: Some(2), memory_bytes: 32 << 20, ..Options::default() };
    let store = Store::open(dir.path(), options()).wait().expect("it opens");
    let volume = store.create_volume("v", 1 << 30).wait().expect("there is room");
    let before = store.stats().wait().expect("it is open");
    for n in 0..500 {
        volume.write_back(PageId::new(n), vec![n as u8; 4096]).wait().expect("there is room");
    }
    store.flush().wait().expect("it is durable");
    store.checkpoint().wait().expect("all is in its place");
    let now = store.stats().wait().expect("it is open").since(&before);
    assert!(now.pages_written >= 500 && now.coalesced_writes > 0, "{now:?}");
    assert_eq!(now.coalesced_writes, now.pages_written - now.page_write_ops);
    assert!(now.log_groups > 0 && now.nodes_written > 0);
    // One for each page and node, two for each group, one for each of the two copies of a
    // superblock.
    assert!(
        now.checksums >= now.pages_written + now.nodes_written + 2 * now.log_groups + 2,
        "{now:?}"
    );
    assert!(
        now.device_flushes > now.log_flushes && now.log_flushes > 0,
        "a checkpoint flushes, too: {now:?}"
    );
    assert!(
        now.device_operations >= now.device_reads + now.device_writes + now.device_flushes,
        "{now:?}"
    );
    assert!(now.submissions > 0 && now.hit_ratio() <= 1.0);
    store.close().wait().expect("it closes");
}
