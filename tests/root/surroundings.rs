//! The store where it is not welcome: io_uring forbidden, no locked memory, no direct I/O, other
//! file systems.
//!
//! Everywhere the same: it opens, says which way it goes and why, and what was acknowledged as
//! durable is there after SIGKILL. Once through the server, once through the library, each in a
//! process of its own. If these fail, the store does not run in containers, or runs there in a way
//! that nobody was told of.

// Real processes take real time.
#![allow(clippy::disallowed_methods)]

use crate::common;
use common::surroundings::{Mounted, NO_RING, OLD_KERNEL, Without, is_root, start_without, tool};
use common::{Rng, Served, corepage, has_tool, nbd, scratch};
use corepage::{Options, PageId, Store};
use futures_lite::future::block_on;
use rustix::process::Pid;
use serde_json::Value;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};

const PAGE: usize = 4096;
/// Pages that are written. With every third one patched, the log, straight writes and write-back
/// all have work.
const PAGES: u64 = 300;
const ROLE: &str = "COREPAGE_SURROUNDINGS_ROLE";
const STORE: &str = "COREPAGE_SURROUNDINGS_STORE";
const NBD: [&str; 6] = ["--driver", "auto", "--volume", "v", "--size", "64M"];

/// What `corepage doctor` says in the same surroundings; the server must do as it says.
fn doctor(without: &[Without], dir: &Path) -> Value {
    let mut command = corepage(&["doctor", "--format", "json", "--dir"]);
    let output = start_without(command.arg(dir), without).output().expect("corepage starts");
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).expect("JSON")
}

/// What the store has to say of itself there.
struct Expected {
    /// The driver, and why it is not another.
    driver: String,
    /// With a piece that this test wants in it, whatever doctor thinks.
    driver_hint: &'static str,
    /// How it transfers.
    transfers: &'static str,
    file_system: String,
    /// The way of flushing.
    flush: String,
}

impl Expected {
    fn new(without: &[Without], dir: &Path) -> Expected {
        let facts = doctor(without, dir);
        let (name, because) = (&facts["driver"]["name"], facts["driver"]["because"].as_str());
        let driver = name.as_str().expect("a name").to_owned();
        let forbidden = without.iter().any(|it| matches!(it, Without::Ring(_) | Without::RingUse));
        let available = facts["machine"]["io_uring"]["available"] == true;
        assert!(!(forbidden && available), "the filter is not in force");
        // Where a ring can be had, and locked memory for the executor around it, it is taken.
        if available && because.is_none_or(|why| !why.contains("the executor needs 512 KiB")) {
            assert_eq!(driver, "io_uring");
        }
        let direct = &facts["machine"]["directory"]["direct_io"];
        if without.contains(&Without::DirectIo) {
            assert_eq!(direct, "refused", "the filter is not in force");
        }
        let findings = facts["findings"].as_array().expect("findings");
        let flush = findings
            .iter()
            .find(|finding| finding["subject"] == "file system")
            .expect("the subject is there");
        Expected {
            flush: flush["used"].as_str().expect("text").to_owned(),
            driver_hint: match without {
                [Without::Ring(libc::EPERM), ..] => "portable, because",
                [Without::RingUse, ..] => "(EPERM when entering a ring)",
                [Without::Ring(_), ..] => "(ENOSYS)",
                _ => "",
            },
            driver: because.map_or(driver.clone(), |why| format!("{driver}, because {why}")),
            transfers: if direct == "works" { "direct I/O" } else { "buffered I/O" },
            file_system: facts["machine"]["directory"]["file_system"]
                .as_str()
                .expect("a name")
                .to_owned(),
        }
    }

    /// `disk` is what the store reports.
    #[track_caller]
    fn check(&self, disk: &str) {
        for wanted in [
            &self.driver,
            self.driver_hint,
            self.transfers,
            &format!(" {},", self.file_system),
            &self.flush,
        ] {
            assert!(disk.contains(wanted), "{disk}: no `{wanted}`");
        }
    }
}

/// Both ways into the store, in a directory and surroundings of the test's choice.
fn keeps_what_it_acknowledged(without: &[Without], dir: &Path) {
    let expected = Expected::new(without, dir);
    the_server_keeps_it(without, &dir.join("served"), &expected);
    the_library_keeps_it(without, &dir.join("embedded"), &expected);
}

// --- the server ---

fn the_server_keeps_it(without: &[Without], dir: &Path, expected: &Expected) {
    let sockets = tempfile::tempdir().expect("a short path");
    let address = format!("unix:{}/nbd", sockets.path().display());
    let start = || Served::start_without(without, dir, &[&NBD[..], &["--nbd", &address]].concat());
    let check = |served: &Served| {
        expected
            .check(served.lines.iter().find(|line| line.starts_with("store ")).expect("a report"));
    };
    let served = start();
    check(&served);
    let mut client = served.client();
    let data = Rng::new(4).bytes(PAGES as usize * PAGE);
    for (n, chunk) in data.chunks(PAGE * 7).enumerate() {
        let flags = if n % 3 == 0 { nbd::FUA } else { 0 };
        client.write(flags, (n * 7 * PAGE) as u64, chunk);
    }
    client.flush();
    served.kill();
    let served = start();
    check(&served);
    assert!(
        served.client().read(0, data.len() as u32) == data,
        "what was flushed is not there after SIGKILL"
    );
    assert!(served.stop().success());
    let mut verify = corepage(&["verify", "--dir"]);
    common::run(start_without(verify.arg(dir), without));
}

// --- the library ---

/// Not a test of its own: what the child does.
#[test]
fn child() {
    let (Ok(role), Some(dir)) = (std::env::var(ROLE), std::env::var_os(STORE)) else { return };
    let store = block_on(Store::open(dir, Options::default())).expect("the store opens");
    println!("\ndisk: {}", store.disk_report());
    if role == "write" {
        let volume = block_on(store.create_volume("v", 64 << 20)).expect("a volume is made");
        for n in 0..PAGES {
            let whole = Rng::of(&[n]).bytes(PAGE);
            if n % 2 == 0 {
                block_on(volume.write(PageId::new(n), whole)).expect("a durable write");
            } else {
                block_on(volume.write_back(PageId::new(n), whole)).expect("a buffered write");
            }
            if n % 3 == 0 {
                block_on(volume.patch(PageId::new(n), 100, &b"patched"[..])).expect("a patch");
            }
        }
        block_on(store.flush()).expect("a flush");
        println!("ready");
        // Until it is killed, or its parent is gone and nobody can.
        let _ = std::io::stdin().lines().next();
        return;
    }
    let volume = block_on(store.volume("v"))
        .expect("volumes can be looked up")
        .expect("the volume is there");
    for n in 0..PAGES {
        let mut wanted = Rng::of(&[n]).bytes(PAGE);
        if n % 3 == 0 {
            wanted[100..107].copy_from_slice(b"patched");
        }
        assert!(
            block_on(volume.read(PageId::new(n))).expect("a read")[..] == wanted[..],
            "page {n}"
        );
    }
    block_on(store.close()).expect("the store closes");
    println!("ready");
}

/// This program again as a child in a role; killed when it is dropped.
struct Role {
    child: Child,
    /// What it has not said yet.
    rest: Option<BufReader<ChildStdout>>,
    disk: String,
}

impl Role {
    /// Returns when the child says that it is ready.
    fn start(role: &str, without: &[Without], dir: &Path) -> Role {
        let mut command = Command::new(std::env::current_exe().expect("this program"));
        command
            .args(["--exact", "surroundings::child", "--nocapture"])
            .env(ROLE, role)
            .env(STORE, dir);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let child = start_without(&mut command, without).spawn().expect("this program starts");
        let mut role = Role { child, rest: None, disk: String::new() };
        let mut stdout = BufReader::new(role.child.stdout.take().expect("stdout is piped"));
        loop {
            let mut line = String::new();
            let length = stdout.read_line(&mut line).expect("the child's output can be read");
            assert!(length > 0, "the child failed: see above");
            if let Some(rest) = line.strip_prefix("disk: ") {
                role.disk = rest.trim_end().to_owned();
            } else if line == "ready\n" {
                role.rest = Some(stdout);
                return role;
            }
        }
    }

    /// Waits for its end, which must be a good one.
    fn finish(mut self) {
        let rest = self.rest.take().map(std::io::read_to_string);
        assert!(rest.is_some_and(|rest| rest.is_ok()));
        assert!(
            self.child.wait().expect("the child ends").success(),
            "the child failed: see above"
        );
    }
}

impl Drop for Role {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn the_library_keeps_it(without: &[Without], dir: &Path, expected: &Expected) {
    let writer = Role::start("write", without, dir);
    expected.check(&writer.disk);
    // As SIGKILL, which is what `drop` sends.
    drop(writer);
    let reader = Role::start("read", without, dir);
    expected.check(&reader.disk);
    reader.finish();
}

// --- the surroundings ---

#[test]
fn in_ordinary_surroundings_doctor_and_store_agree() {
    let dir = scratch("ordinary");
    keeps_what_it_acknowledged(&[], dir.path());
}

#[test]
fn with_io_uring_forbidden_the_store_goes_the_portable_way_and_says_why() {
    for forbidden in [NO_RING, OLD_KERNEL, Without::RingUse] {
        let dir = scratch("no-ring");
        keeps_what_it_acknowledged(&[forbidden], dir.path());
    }
}

/// 64 KiB were the default for a decade, and are in many containers still.
#[test]
fn with_little_or_no_locked_memory_the_store_runs() {
    for bytes in [64 << 10, 0] {
        let dir = scratch("locks");
        let without = [Without::LocksAbove(bytes)];
        let locks = doctor(&without, dir.path())["machine"]["memory_locks"].clone();
        assert_eq!(
            (&locks["limit_bytes"], &locks["enforced"]),
            (&Value::from(bytes), &Value::Bool(true)),
            "the limit is not in force"
        );
        keeps_what_it_acknowledged(&without, dir.path());
    }
}

#[test]
fn with_direct_io_refused_the_store_goes_through_the_page_cache_and_says_so() {
    let dir = scratch("no-direct");
    keeps_what_it_acknowledged(&[Without::DirectIo], dir.path());
}

#[test]
fn with_everything_refused_at_once_the_store_runs() {
    let dir = scratch("nothing");
    keeps_what_it_acknowledged(&[NO_RING, Without::DirectIo, Without::LocksAbove(0)], dir.path());
}

#[test]
fn the_store_keeps_its_promises_on_btrfs_and_xfs() {
    for kind in ["btrfs", "xfs"] {
        let Some(mounted) = Mounted::image(kind) else { continue };
        assert_eq!(Expected::new(&[], mounted.path()).file_system, kind);
        keeps_what_it_acknowledged(&[], mounted.path());
        keeps_what_it_acknowledged(&[NO_RING], &mounted.path().join("no-ring"));
    }
}

/// Without a filter's help: one that refuses direct I/O, and one that takes the flag and goes
/// through the cache.
#[test]
fn the_store_runs_on_file_systems_without_direct_io() {
    let journals_data = || Mounted::image_with("ext4", "loop,data=journal");
    for mounted in [Mounted::ramfs(), journals_data()].into_iter().flatten() {
        assert_eq!(Expected::new(&[], mounted.path()).transfers, "buffered I/O");
        keeps_what_it_acknowledged(&[], mounted.path());
    }
}

/// If this fails, a limit of threads is told as a bug, or without what would help.
#[test]
fn a_limit_of_threads_is_said_with_what_raises_it() {
    if !is_root() {
        return;
    }
    // A user of its own, so that nobody else's threads count; it may not be able to reach the
    // directory of the build.
    let uid = 1_000_000 + std::process::id();
    let place = tempfile::Builder::new().prefix("threads").tempdir_in("/tmp").expect("a directory");
    let program = place.path().join("corepage");
    std::fs::copy(corepage(&[]).get_program(), &program).expect("a copy of the program");
    std::os::unix::fs::chown(place.path(), Some(uid), None).expect("a directory of that user");
    let mut served = 0;
    for limit in 1..=24 {
        let store = place.path().join(format!("store-{limit}"));
        let mut command = Command::new(&program);
        command
            .args([
                "serve",
                "--nbd",
                "tcp:127.0.0.1:0",
                "--shards",
                "2",
                "--memory",
                "32M",
                "--dir",
            ])
            .arg(&store);
        command
            .env("RUST_LOG", "error")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        start_without(&mut command, &[Without::ThreadsAbove(limit)]);
        let mut child = command.uid(uid).spawn().expect("it starts");
        let mut line = String::new();
        BufReader::new(child.stdout.take().expect("piped")).read_line(&mut line).expect("text");
        let runs = line.starts_with("store ");
        if runs {
            rustix::process::kill_process(Pid::from_child(&child), rustix::process::Signal::TERM)
                .expect("it runs");
            served += 1;
        }
        let output = child.wait_with_output().expect("it ends");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!said.contains("panicked"), "with {limit} threads: {said}");
        match runs {
            true => assert!(output.status.success(), "with {limit} threads: {said}"),
            false => assert!(
                output.status.code() == Some(1) && said.contains("ulimit -u"),
                "with {limit}: {said}"
            ),
        }
        let _ = std::fs::remove_dir_all(&store);
    }
    assert!((1..24).contains(&served), "{served} of 24 limits were enough");
}

/// If this fails, `doctor` promises io_uring in a container in which `serve` then takes the slower
/// driver.
#[test]
fn a_container_without_sys_and_proc_runs_what_doctor_says() {
    if !is_root() || !has_tool("unshare") || !has_tool("mount") {
        return;
    }
    for hidden in ["/sys", "/proc", "/sys /proc"] {
        let dir = scratch("no-sys");
        let within = |arguments: &[&str]| {
            let script = format!(
                "for it in {hidden}; do mount -t tmpfs none $it || exit 9; done; exec \"$0\" \
                 \"$@\""
            );
            let mut command = tool("unshare");
            command.args(["--mount", "--propagation", "private", "sh", "-c", &script]);
            command.arg(corepage(&[]).get_program()).args(arguments).arg("--dir").arg(dir.path());
            command.env("RUST_LOG", "error").stdin(Stdio::null());
            command
        };
        let doctor = within(&["doctor", "--format", "json"]).output().expect("unshare runs");
        let doctor = String::from_utf8_lossy(&doctor.stdout).into_owned();
        let ring = doctor.contains("\"name\": \"io_uring\"");
        assert!(ring || doctor.contains("\"name\": \"portable\""), "{doctor}");
        let served =
            Served::spawn(within(&["serve", "--nbd", "tcp:127.0.0.1:0", "--memory", "32M"]), 1);
        assert_eq!(
            served.lines[0].contains("; io_uring on"),
            ring,
            "without {hidden}: {:?}",
            served.lines
        );
        assert!(served.stop().success());
    }
}
