//! What the store does when the machine has no more of something: disk space, file descriptors,
//! cores that are not busy, the directory itself, or the file system's leave to write.
//!
//! Everywhere the same: a clear error that says what is missing, nothing that was acknowledged is
//! lost, and the store works again when there is enough. If these fail, a full disk or a busy
//! machine costs data, or leaves a store that does not open. Locked memory is in
//! `tests/root/surroundings.rs`, a device that fails in `tests/root/failing_device.rs`, both on a
//! simulated disk, operation by operation, in `src/testing/sim`.

// Real processes take real time; nothing here is a matter of timing but that nothing hangs.
#![allow(clippy::disallowed_methods)]

use crate::common;
use common::device::{Device, OF_STORE};
use common::role::{Run, ring_works};
use common::surroundings::{Mounted, Without, start_without, tool};
use common::{Rng, Served, corepage, has_tool, nbd, scratch};
use corepage::testing::pattern;
use corepage::{Driver, Error, ErrorKind, Geometry, Options, PageId, Store, Volume};
use futures_lite::future::{block_on, or};
use std::collections::BTreeMap;
use std::fs::File;
use std::future::Future;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

const PAGE: usize = 4096;
const ROLE: &str = "COREPAGE_RESOURCES_ROLE";
const STORE: &str = "COREPAGE_RESOURCES_STORE";

/// Waits, but not for ever; except in a child, which has no descriptors for a timer.
fn now<T>(future: impl Future<Output = T>) -> T {
    if std::env::var_os(ROLE).is_some() {
        return block_on(future);
    }
    block_on(or(future, async {
        async_io::Timer::after(Duration::from_secs(120)).await;
        panic!("the store hangs")
    }))
}

fn options(run: Run) -> Options {
    let geometry = Geometry {
        extent_bytes: 256 << 10,
        segment_bytes: 256 << 10,
        segments_count: 4,
        vshards_count: 16,
    };
    run.with(Options { geometry, memory_bytes: 16 << 20, ..Options::default() })
}

/// Ring where it works, and portable.
fn runs() -> Vec<Run> {
    let drivers = if ring_works() { vec![true, false] } else { vec![false] };
    drivers.into_iter().map(|ring| Run { ring, shards: 2 }).collect()
}

fn whole(value: u64) -> Vec<u8> {
    pattern::words(value, PAGE)
}

/// An open store, and what was acknowledged as durable.
struct Held {
    store: Store,
    volume: Volume,
    durable: BTreeMap<PageId, u64>,
}

impl Held {
    fn open(dir: &Path, options: Options) -> Result<Held, Error> {
        let store = now(Store::open(dir, options))?;
        let volume = match now(store.volume("v"))? {
            Some(volume) => volume,
            None => now(store.create_volume("v", 1 << 40))?,
        };
        Ok(Held { store, volume, durable: BTreeMap::new() })
    }

    /// Another process's crash as seen from here: no clean close. What was durable is to be found
    /// by the next one.
    fn crash(self) -> BTreeMap<PageId, u64> {
        self.durable
    }

    fn reopen(dir: &Path, options: Options, durable: BTreeMap<PageId, u64>) -> Held {
        let held =
            Held::open(dir, options).unwrap_or_else(|e| panic!("it does not open again: {e}"));
        let held = Held { durable, ..held };
        held.check();
        held
    }

    fn write(&mut self, page: u64, value: u64) -> Result<(), Error> {
        let page = PageId::new(page);
        now(self.volume.write(page, whole(value)))?;
        self.durable.insert(page, value);
        Ok(())
    }

    /// There is space again: the store may have asked for it a moment ago, and asks again a little
    /// later.
    fn writes_again(&mut self) {
        for _ in 0..1000 {
            match self.write(1, 2) {
                Ok(()) => return,
                Err(error) => assert_eq!(error.kind(), ErrorKind::Full, "{error}"),
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        panic!("there is space, and the store does not take it");
    }

    /// Writes new pages until that fails.
    fn write_until_it_fails(&mut self) -> Error {
        for n in 0..4000u64 {
            // Over all virtual shards.
            let page = n % 32 * 512 + n / 32;
            if let Err(error) = self.write(page, n + 1) {
                return error;
            }
        }
        panic!("4,000 pages found room where there is none")
    }

    fn check(&self) {
        for (page, value) in &self.durable {
            let found =
                now(self.volume.read(*page)).unwrap_or_else(|e| panic!("page {page:?}: {e}"));
            assert!(found[..] == whole(*value)[..], "page {page:?} was acknowledged as {value}");
        }
    }
}

// --- disk space ---

/// Takes all space of a file system but so much, until it is dropped.
struct Ballast(PathBuf);

impl Ballast {
    fn leave(dir: &Path, bytes: u64) -> Ballast {
        let file = File::create(dir.join("ballast")).expect("a file");
        let (mut taken, mut piece) = (0, 256 << 20);
        // To the last block if none may be left, including those reserved for root.
        while piece >= 4096 {
            let left = available(dir);
            if bytes > 0 && left <= bytes {
                break;
            }
            let next = if bytes > 0 { piece.min((left - bytes).max(4096)) } else { piece };
            match rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), taken, next) {
                Ok(()) => taken += next,
                Err(_) => piece /= 2,
            }
            file.sync_all().expect("a file");
        }
        Ballast(dir.join("ballast"))
    }
}

impl Drop for Ballast {
    fn drop(&mut self) {
        let bytes = std::fs::metadata(&self.0).expect("the ballast is there").len();
        std::fs::remove_file(&self.0).expect("the ballast goes");
        // Some file systems give space back a moment after their transaction is over.
        let dir = self.0.parent().expect("a directory");
        for _ in 0..1000 {
            rustix::fs::syncfs(File::open(dir).expect("a directory")).expect("a file system");
            if available(dir) >= bytes / 2 {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("the space of what was removed is not given back");
    }
}

fn available(dir: &Path) -> u64 {
    let stat = rustix::fs::statvfs(dir).expect("a file system");
    stat.f_bavail * stat.f_frsize
}

#[test]
fn a_disk_too_small_for_a_new_store_is_told_and_the_next_try_needs_no_help() {
    for kind in ["ext4", "xfs", "btrfs"] {
        let Some(mounted) = Mounted::image(kind) else { continue };
        let dir = mounted.path().join("store");
        let (mut refused, mut made) = (0, 0);
        for kib in [0, 64, 1 << 10, 2500, 5 << 10, 9 << 10, 10_500, 12 << 10, 64 << 10] {
            let ballast = Ballast::leave(mounted.path(), kib << 10);
            match Held::open(&dir, options(runs()[0])) {
                Ok(held) => made += u64::from(held.store.recovery().created),
                Err(error) => {
                    refused += 1;
                    assert!(
                        error.to_string().contains("(os error 28)"),
                        "{kind}, {kib} KiB: {error}"
                    );
                    assert_eq!(error.kind(), ErrorKind::Full, "{kind}, {kib} KiB: {error}");
                    println!("{kind}, {kib} KiB: {error}");
                }
            }
            drop(ballast);
            let mut held = Held::open(&dir, options(runs()[0]))
                .unwrap_or_else(|e| panic!("{kind}, {kib} KiB: {e}"));
            held.write(7, kib + 1).expect("there is space");
            held.check();
            now(held.store.close()).expect("a well disk");
            drop(held);
            std::fs::remove_dir_all(&dir).expect("the store goes");
        }
        assert!(refused >= 4 && made >= 1, "{kind}: refused {refused} times, made {made} times");
    }
}

#[test]
fn a_full_disk_refuses_what_needs_room_and_keeps_the_rest_going() {
    for (kind, run) in
        ["ext4", "xfs"].into_iter().flat_map(|kind| runs().into_iter().map(move |run| (kind, run)))
    {
        let Some(mounted) = Mounted::image(kind) else { continue };
        let dir = mounted.path().join("store");
        let mut held = Held::open(&dir, options(run)).expect("there is space");
        held.write(1, 1).expect("there is space");
        let report = held.store.disk_report().to_string();
        let transfers = report.split(", ").nth(1).expect("how it transfers").to_owned();
        let ballast = Ballast::leave(mounted.path(), 0);
        let error = held.write_until_it_fails();
        assert_eq!(error.kind(), ErrorKind::Full, "{error}");
        println!("{kind}, {run:?}: {} pages, then {error}", held.durable.len());
        // Reads go on, and what has its room already: frees, checkpoints, flushes.
        held.check();
        let (first, _) = held.durable.pop_first().expect("pages were written");
        now(held.volume.free(first)).expect("a free needs no room");
        now(held.store.checkpoint()).expect("a checkpoint has its room");
        now(held.store.flush()).expect("a flush needs no room");
        held.check();
        // Recovery finds its room, too; logs for more shards can't be had, and trying costs
        // nothing.
        let durable = held.crash();
        let more = Held::open(&dir, options(Run { shards: 4, ..run }))
            .err()
            .expect("no room for two more logs");
        assert_eq!(more.kind(), ErrorKind::Full, "{more}");
        let mut held = Held::reopen(&dir, options(run), durable);
        assert!(
            held.store.disk_report().to_string().contains(&transfers),
            "{kind}: {}",
            held.store.disk_report()
        );
        assert_eq!(held.write_until_it_fails().kind(), ErrorKind::Full);
        drop(ballast);
        held.writes_again();
        held.check();
        let durable = held.crash();
        let held = Held::reopen(&dir, options(Run { shards: 4, ..run }), durable);
        now(held.store.close()).expect("a well disk");
    }
}

/// It writes everything to new places, also what exists already, so that a full one fails writes
/// that have their room everywhere else. The store stops, and has everything when there is space.
#[test]
fn a_full_btrfs_stops_the_store_and_loses_nothing() {
    let Some(mounted) = Mounted::image("btrfs") else { return };
    let dir = mounted.path().join("store");
    let run = runs()[0];
    let mut held = Held::open(&dir, options(run)).expect("there is space");
    let ballast = Ballast::leave(mounted.path(), 0);
    let error = held.write_until_it_fails();
    assert!(
        error.to_string().contains("(os error 28)") || error.kind() == ErrorKind::Full,
        "{error}"
    );
    println!("btrfs: {} pages, then {:?}: {error}", held.durable.len(), error.kind());
    let mut durable = held.crash();
    // It may be in there, or not.
    durable.retain(|page, _| !error.to_string().contains(&format!("{page:?}")));
    if let Err(error) = Held::open(&dir, options(run)) {
        assert!(error.to_string().contains("(os error 28)"), "{error}");
    }
    drop(ballast);
    let mut held = Held::reopen(&dir, options(run), durable);
    held.write(1, 2).expect("there is space again");
    now(held.store.close()).expect("a well disk");
}

// --- file descriptors ---

/// Not a test of its own: what the child does.
#[test]
fn child() {
    let (Ok(role), Some(dir)) = (std::env::var(ROLE), std::env::var_os(STORE)) else { return };
    let say = |line: String| {
        std::io::stdout().lock().write_all(format!("\n{line}\n").as_bytes()).expect("a pipe")
    };
    let driver = if role == "portable" { Driver::Portable } else { Driver::Auto };
    match Held::open(dir.as_ref(), Options { driver, ..options(Run { ring: false, shards: 2 }) }) {
        _ if role == "nothing" => say("done".into()),
        Err(error) => say(format!("refused {:?} {error}", error.kind())),
        Ok(mut held) => {
            (0..50).for_each(|n| held.write(n * 512, n + 1).expect("an open store works"));
            held.check();
            say("done".into());
            if role == "hold" {
                // Until it is killed, or its parent is gone and nobody can.
                let _ = std::io::stdin().lines().next();
            }
            now(held.store.close()).expect("an open store closes");
        }
    }
}

fn start(role: &str, dir: &Path, without: &[Without]) -> Child {
    let mut command = Command::new(std::env::current_exe().expect("this program"));
    command.args(["--exact", "resources::child", "--nocapture"]).env(ROLE, role).env(STORE, dir);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    start_without(&mut command, without).spawn().expect("this program starts")
}

#[test]
fn with_few_file_descriptors_the_store_runs_or_says_what_is_missing() {
    for role in ["auto", "portable"] {
        let (mut refused, mut done) = (0, 0);
        let dir = scratch("descriptors");
        for limit in 3.. {
            let without = [Without::FilesAbove(limit)];
            let said = |role| {
                let output =
                    start(role, dir.path(), &without).wait_with_output().expect("the child ends");
                (
                    output.status.success(),
                    String::from_utf8_lossy(&output.stdout).into_owned(),
                    output,
                )
            };
            let (good, text, output) = said(role);
            if good && text.contains("\ndone\n") {
                done += 1;
            } else if good && text.contains("\nrefused ") {
                refused += 1;
                assert!(text.contains("(os error 24); raise the limit"), "limit {limit}: {text}");
            } else {
                // Not even the program by itself runs.
                assert!(
                    refused + done == 0 && !said("nothing").0,
                    "limit {limit}: {text} {output:?}"
                );
            }
            if done == 4 {
                break;
            }
            assert!(limit < 200, "200 descriptors are not enough: {text}");
        }
        println!("{role}: refused at {refused} limits");
        assert!(refused > 5, "{role}: refused at {refused} limits only");
    }
}

/// Clients that come when there are no descriptors left wait; those that are there are served.
#[test]
fn a_server_out_of_file_descriptors_serves_whom_it_has_and_later_the_others() {
    let dir = scratch("connections");
    let served = Served::start_without(
        &[Without::FilesAbove(96)],
        dir.path(),
        &["--nbd", "tcp:127.0.0.1:0"],
    );
    let mut first = served.client();
    first.write(nbd::FUA, 0, &[1; PAGE]);
    let crowd: Vec<_> = (0..120).map(|_| nbd::Client::connect(&served.address())).collect();
    for n in 1..20 {
        first.write(nbd::FUA, n * PAGE as u64, &[n as u8; PAGE]);
        assert!(first.read(n * PAGE as u64, PAGE as u32) == [n as u8; PAGE]);
    }
    drop(crowd);
    let mut later = served.client();
    assert!(later.read(0, PAGE as u32) == [1; PAGE]);
    assert!(served.stop().success());
}

// --- the directory ---

#[test]
fn a_store_whose_directory_is_moved_goes_on_and_is_found_there() {
    for run in runs() {
        let dir = scratch("moved");
        let (before, after) = (dir.path().join("before"), dir.path().join("after"));
        let mut held = Held::open(&before, options(run)).expect("a store");
        (0..50).for_each(|n| held.write(n, 1).expect("a well disk"));
        std::fs::rename(&before, &after).expect("the directory is moved");
        (0..100).for_each(|n| held.write(n, 2).expect("a well disk"));
        now(held.store.checkpoint()).expect("a well disk");
        let mut held = Held::reopen(&after, options(run), held.crash());
        // Removed under it: the files are there as long as it is; nothing hangs or breaks.
        std::fs::remove_dir_all(&after).expect("the files lose their names");
        (0..100).for_each(|n| held.write(n, 3).expect("the files are still there"));
        held.check();
        let _ = now(held.store.close());
        assert!(!after.exists(), "closing made the directory anew");
    }
}

/// As after an error in the file system itself, or by an administrator.
#[test]
fn a_file_system_that_turns_read_only_stops_the_store_and_loses_nothing() {
    for (kind, run) in
        ["ext4", "xfs"].into_iter().flat_map(|kind| runs().into_iter().map(move |run| (kind, run)))
    {
        let Some(mut device) = Device::new(kind) else { continue };
        let dir = device.store();
        let mounted = dir.parent().expect("a mount point").to_owned();
        let mut held = Held::open(&dir, options(run)).expect("a store");
        (0..60).for_each(|n| held.write(n * 512, 1).expect("a well disk"));
        let mut remount = tool("mount");
        let refused =
            remount.args(["-o", "remount,ro"]).arg(&mounted).output().expect("mount starts");
        assert!(
            !refused.status.success(),
            "the kernel lets a file system go while files are open for writing"
        );
        if kind == "ext4" {
            common::run(tool("mount").args(["-o", "remount,abort"]).arg(&mounted));
        } else if has_tool("xfs_io") {
            common::run(tool("xfs_io").args(["-x", "-c", "shutdown"]).arg(&mounted));
        } else {
            continue;
        }
        let error = held.write_until_it_fails();
        println!("{kind}, {run:?}: {:?}: {error}", error.kind());
        assert!(
            error.to_string().contains("os error") && error.to_string().contains("reopen"),
            "{error}"
        );
        assert!(matches!(error.kind(), ErrorKind::OutcomeUnknown | ErrorKind::Closed), "{error}");
        assert_eq!(
            now(held.volume.write(PageId::new(3), whole(9))).expect_err("stopped").kind(),
            ErrorKind::Closed
        );
        now(held.store.close()).expect_err("a store that has failed closes cleanly");
        let mut durable = held.crash();
        let error = Held::open(&dir, options(run)).err().expect("nothing can be written");
        assert!(error.to_string().contains("os error"), "{error}");
        device.heal();
        // Page 1 may hold what was in doubt.
        durable.remove(&PageId::new(0));
        let held = Held::reopen(&device.store(), options(run), durable);
        now(held.store.close()).expect("a well disk");
    }
}

#[test]
fn a_store_that_another_process_has_is_refused_to_all_others() {
    let dir = scratch("two");
    let mut child = start("hold", dir.path(), &[]);
    let mut lines = BufReader::new(child.stdout.take().expect("stdout is piped")).lines();
    assert!(lines.any(|line| line.expect("the child's output") == "done"), "the child failed");
    let links = scratch("link");
    let link = links.path().join("same");
    std::os::unix::fs::symlink(dir.path(), &link).expect("a link");
    for path in [dir.path(), &link] {
        let error = Held::open(path, options(runs()[0])).err().expect("it is open");
        assert_eq!(error.kind(), ErrorKind::InUse, "{error}");
        assert!(error.to_string().contains("open in another process"), "{error}");
    }
    for arguments in [&["verify", "--dir"][..], &["serve", "--nbd", "tcp:127.0.0.1:0", "--dir"]] {
        let output = corepage(arguments).arg(dir.path()).output().expect("corepage starts");
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            !output.status.success() && text.contains("open in another process"),
            "{arguments:?}: {text}"
        );
    }
    child.kill().expect("the child was still there");
    child.wait().expect("a killed process ends");
    let held = Held::open(dir.path(), options(runs()[0])).expect("nobody has it any more");
    assert!(!held.store.recovery().clean);
}

// --- cores ---

/// Direct writes, flushes and buffered writes are completed by workers of the kernel, which need a
/// core now and then.
#[test]
fn shards_that_poll_on_all_cores_do_not_starve_the_kernel_that_serves_them() {
    let shards = std::thread::available_parallelism().map_or(1, |n| n.get().min(16)) as u16;
    let disk = scratch("polling");
    let memory = Mounted::ramfs();
    let places = [Some(disk.path()), memory.as_ref().map(Mounted::path)];
    for (dir, ring) in places.into_iter().flatten().flat_map(|dir| [(dir, true), (dir, false)]) {
        if ring && !ring_works() {
            continue;
        }
        let polling = Options { poll: true, ..options(Run { ring, shards }) };
        let held = Held::open(&dir.join(format!("store-{ring}")), polling).expect("a store");
        std::thread::scope(|scope| {
            for thread in 0..4u64 {
                let (store, volume) = (&held.store, &held.volume);
                scope.spawn(move || {
                    for n in 0..50 {
                        let page = PageId::new((thread * 50 + n) % 16 * 512 + thread * 50 + n);
                        now(volume.write(page, whole(n))).expect("a well disk");
                        if n % 10 == 0 {
                            now(store.flush()).expect("a well disk");
                        }
                    }
                });
            }
        });
        now(held.store.checkpoint()).expect("a well disk");
        now(held.store.close()).expect("a well disk");
    }
}

// --- signals ---

/// A command that has begun to open the store in `dir`: its signals are not the system's any more.
fn opening(dir: &Path, arguments: &[&str]) -> Child {
    let mut command = corepage(arguments);
    command.arg("--dir").arg(dir).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().expect("corepage starts");
    let tasks = format!("/proc/{}/task", child.id());
    let names = || {
        let tasks = std::fs::read_dir(&tasks).into_iter().flatten().flatten();
        tasks
            .filter_map(|task| std::fs::read_to_string(task.path().join("comm")).ok())
            .collect::<String>()
    };
    let since = std::time::Instant::now();
    while !names().contains("corepage-open") {
        assert!(since.elapsed() < Duration::from_secs(60), "it does not begin to open the store");
        std::thread::sleep(Duration::from_millis(1));
    }
    child
}

fn signal(child: &Child, signal: rustix::process::Signal) {
    rustix::process::kill_process(rustix::process::Pid::from_child(child), signal)
        .expect("it was still running");
}

/// An operator who stops a server that recovers for minutes must not have to kill it, and must see
/// that it was stopped, not that it failed. Whoever has the lock here keeps it for longer than
/// opening would wait.
#[test]
fn a_signal_while_the_store_is_being_opened_ends_the_command() {
    use rustix::process::Signal;
    use std::os::unix::process::ExitStatusExt;
    let dir = scratch("signals");
    assert!(Served::start(dir.path()).stop().success());
    let log = File::open(dir.path().join("log-000-0000")).expect("a log segment");
    rustix::fs::flock(&log, rustix::fs::FlockOperation::NonBlockingLockExclusive)
        .expect("nobody has it");
    let before = common::snapshot(dir.path());
    for sent in [Signal::TERM, Signal::INT] {
        for command in
            [&["serve", "--nbd", "tcp:127.0.0.1:0"][..], &["volume", "create", "v", "1M"]]
        {
            let child = opening(dir.path(), command);
            signal(&child, sent);
            let output = child.wait_with_output().expect("it ends");
            let said = String::from_utf8_lossy(&output.stderr);
            assert_eq!(
                output.status.signal(),
                Some(sent.as_raw()),
                "{command:?}: {} {said}",
                output.status
            );
            assert!(output.stdout.is_empty() && !said.contains("fuser"), "{said}");
        }
        // With a line that says why there is no result.
        let child = opening(dir.path(), &["bench", "read", "--size", "1M"]);
        signal(&child, sent);
        let output = child.wait_with_output().expect("it ends");
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.signal(), Some(sent.as_raw()), "{} {said}", output.status);
        assert!(said.contains("came while the store"), "{said}");
    }
    assert!(common::snapshot(dir.path()) == before, "the store was changed");
    drop(log);
    assert!(Served::start(dir.path()).stop().success());
}

/// A recovery that is stopped in the middle, with writes at a slow device: it ends when the device
/// has answered, and the next one finds all that was acknowledged.
#[test]
fn a_recovery_that_a_signal_ends_on_a_slow_device_loses_nothing() {
    use std::os::unix::process::ExitStatusExt;
    let Some(device) = Device::new("ext4") else { return };
    for ring in runs().into_iter().map(|run| run.ring) {
        let dir = device.store();
        let driver = if ring { "ring" } else { "portable" };
        let arguments =
            ["--nbd", "tcp:127.0.0.1:0", "--volume", "v", "--size", "64M", "--driver", driver];
        let arguments = [&arguments[..], &["--memory", "16M"]].concat();
        let served = Served::start_with(&dir, &arguments);
        let mut client = served.client();
        let data = Rng::new(7).bytes(300 * PAGE);
        (0..300).for_each(|n| client.write(nbd::FUA, (n * PAGE) as u64, &data[n * PAGE..][..PAGE]));
        drop(client);
        served.kill();
        // It has found the log, and writes what it made of it; or it still waits for the last write
        // of the one before.
        device.hold_next(OF_STORE);
        let child = opening(&dir, &[&["serve"], &arguments[..]].concat());
        device.wait_held();
        signal(&child, rustix::process::Signal::TERM);
        device.let_go();
        let output = child.wait_with_output().expect("it ends");
        assert_eq!(output.status.signal(), Some(15), "{}", output.status);
        assert!(
            output.stdout.is_empty(),
            "it went on: {}",
            String::from_utf8_lossy(&output.stdout)
        );
        let served = Served::start_with(&dir, &arguments);
        assert!(
            served.client().read(0, data.len() as u32) == data,
            "what was acknowledged is gone"
        );
        assert!(served.stop().success());
    }
}

/// A caller with a deadline, or a server that is started and stopped again and again: whatever
/// opening has done by the moment when it is given up, what was acknowledged is there, and the
/// store can be opened at once. So it is for one that is being made.
#[test]
fn opening_may_be_given_up_at_any_moment_and_loses_nothing() {
    for run in runs() {
        let dir = scratch("given-up");
        let mut durable = BTreeMap::new();
        let mut given_up = 0;
        for attempt in 0..24u64 {
            // Longer each time, from the very beginning to the end of a recovery; and now and then
            // all the way, for more to be recovered.
            let time = Duration::from_micros(500 * attempt * attempt);
            let opening = async { Some(Store::open(dir.path(), options(run)).await) };
            let mut opening = Box::pin(opening);
            if block_on(futures_lite::future::poll_once(&mut opening)).is_none() {
                let late = async {
                    async_io::Timer::after(time).await;
                    None
                };
                match block_on(or(opening, late)) {
                    None => given_up += 1,
                    Some(opened) => drop(opened.expect("a well disk")),
                }
            }
            if attempt % 6 == 5 {
                let mut held = Held::reopen(dir.path(), options(run), std::mem::take(&mut durable));
                (0..40).for_each(|n| {
                    held.write(n * 7 % 32 * 512 + n, attempt + n).expect("a well disk")
                });
                durable = held.crash();
            }
        }
        assert!(given_up > 0, "no opening was given up");
        println!("{run:?}: {given_up} of 24 given up");
        let held = Held::reopen(dir.path(), options(run), durable);
        now(held.store.close()).expect("a well disk");
    }
}
