//! Starts that are refused: a clear `error: …` with what to do, an exit code, and nothing changed.
//!
//! If these fail, a typing error costs a store, or leaves its user guessing.

// Real processes take real time.
#![allow(clippy::disallowed_methods)]

use crate::common;
use common::{Served, corepage, scratch, snapshot};
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// Runs `corepage` to its end.
fn corepage_says(arguments: &[&str]) -> Output {
    corepage(arguments).output().expect("corepage starts")
}

/// The complaint of a run that must end with `code`.
#[track_caller]
fn refused(code: i32, arguments: &[&str]) -> String {
    let output = corepage_says(arguments);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {text}");
    assert!(text.starts_with("error: "), "{arguments:?}: {text}");
    assert!(!text.contains("panicked"), "{text}");
    text
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a path of the test")
}

/// A store that was closed cleanly, with a volume `disk` of 8 MiB.
fn closed_store(dir: &Path) {
    let served =
        Served::start_with(dir, &["--nbd", "tcp:127.0.0.1:0", "--volume", "disk", "--size", "8M"]);
    served.client().write(0, 0, b"kept");
    assert!(served.stop().success());
}

#[test]
fn wrong_arguments_are_explained_and_touch_nothing() {
    let dir = scratch("usage");
    let store = dir.path().join("store");
    let wrong: [(&[&str], &str); 18] = [
        (&["--volume", "", "--size", "1G"], "255"),
        (&["--sise", "1G"], "--size"),
        (&["--driver", "magic"], "possible values"),
        (&["--memory", "much"], "64M"),
        (&["--volume", "v"], "--size"),
        (&["--size", "1G"], "--volume"),
        (&["--volume", "v", "--size", "0"], "4096"),
        (&["--volume", "v", "--size", "1000"], "4096"),
        (&["--volume", "v", "--size", "1X"], "64M"),
        (&["--volume", "v", "--size", "1000001"], "use 999424 or 1003520"),
        (&["--volume", "v", "--size", "8E"], "9223372036854771712"),
        (&["--volume", "v", "--size", "99999999999999999999"], "16 EiB or more"),
        (&["--volume", &"a".repeat(4096), "--size", "1G"], "255 bytes at most"),
        (&["--nbd", "tcp:0.0.0.0:10809"], "127.0.0.1"),
        (&["--nbd", "tcp:192.168.0.1:10809"], "ssh"),
        (&["--nbd", "unix:/tmp/x", "--nbd", "tcp:[::]:10809"], "--allow-remote"),
        (&["--nbd", "10809"], "tcp:HOST:PORT"),
        (&["stray"], "stray"),
    ];
    for (arguments, hint) in wrong {
        let said = refused(2, &[&["serve", "--dir", text(&store)], arguments].concat());
        assert!(said.contains(hint), "no hint at {hint}: {said}");
    }
    for (arguments, hint) in [
        (["--cores", "0,977"], "core 977"),
        (["--shards", "65"], "64"),
        (["--shards", "0"], "shards"),
    ] {
        // Not the usual port, which another process may have.
        let said = refused(
            1,
            &[&["serve", "--nbd", "tcp:127.0.0.1:0", "--dir", text(&store)], &arguments[..]]
                .concat(),
        );
        assert!(said.contains(hint), "no hint at {hint}: {said}");
    }
    refused(2, &["no-such-command"]);
    assert_eq!(snapshot(dir.path()), []);
}

#[test]
fn help_and_version_are_not_errors() {
    for arguments in [&["--help"][..], &["--version"], &["serve", "--help"], &["verify", "--help"]]
    {
        let output = corepage_says(arguments);
        assert_eq!(output.status.code(), Some(0));
        assert!(output.stderr.is_empty() && !output.stdout.is_empty());
    }
    let help = String::from_utf8(corepage_says(&["--help"]).stdout).expect("text");
    assert!(help.contains("Examples:") && help.contains("nbdcopy"), "{help}");
}

#[test]
fn a_directory_that_cannot_be_used_is_named() {
    let dir = scratch("directory");
    let file = dir.path().join("file");
    fs::write(&file, "mine").expect("a file");
    let before = snapshot(dir.path());
    for bad in [file.clone(), file.join("below"), "/proc/corepage".into()] {
        let said = refused(1, &["serve", "--nbd", "tcp:127.0.0.1:0", "--dir", text(&bad)]);
        assert!(said.contains(text(&bad)), "{said}");
        refused(2, &["verify", "--dir", text(&bad)]);
        refused(1, &["volume", "list", "--dir", text(&bad)]);
    }
    let said = refused(1, &["volume", "list", "--dir", text(&file)]);
    assert!(
        said.contains("not a directory") && !said.contains("serve"),
        "a server can't make one there either: {said}"
    );
    refused(2, &["verify", "--dir", text(&dir.path().join("none"))]);
    assert_eq!(snapshot(dir.path()), before);
}

#[test]
fn a_store_of_another_version_is_refused_and_left_alone() {
    let dir = scratch("version");
    closed_store(dir.path());
    let meta =
        fs::File::options().write(true).open(dir.path().join("meta")).expect("the meta file");
    for copy in 0..4 {
        meta.write_all_at(&99u32.to_le_bytes(), copy * 16384 + 8)
            .expect("the version of a superblock copy");
    }
    let before = snapshot(dir.path());
    let said = refused(1, &["serve", "--nbd", "tcp:127.0.0.1:0", "--dir", text(dir.path())]);
    assert!(said.contains("version 99"), "{said}");
    assert!(refused(2, &["verify", "--dir", text(dir.path())]).contains("version 99"));
    assert!(snapshot(dir.path()) == before, "the refused store was changed");
}

#[test]
fn a_damaged_superblock_is_refused_and_left_alone() {
    let dir = scratch("superblock");
    closed_store(dir.path());
    let meta =
        fs::File::options().write(true).open(dir.path().join("meta")).expect("the meta file");
    for copy in 0..4 {
        meta.write_all_at(&[0xa5; 64], copy * 16384 + 100).expect("a superblock copy");
    }
    let before = snapshot(dir.path());
    refused(1, &["serve", "--nbd", "tcp:127.0.0.1:0", "--dir", text(dir.path())]);
    let verified = corepage_says(&["verify", "--dir", text(dir.path())]);
    let said = String::from_utf8_lossy(&verified.stdout);
    assert!(verified.status.code() == Some(1) && said.contains("superblock copy 3"), "{said}");
    assert!(snapshot(dir.path()) == before, "the refused store was changed");
}

#[test]
fn a_store_in_use_stays_with_its_server() {
    let dir = scratch("in-use");
    let served = Served::start(dir.path());
    let mut client = served.client();
    client.write(common::nbd::FUA, 0, b"first");
    let said = refused(1, &["serve", "--nbd", "tcp:127.0.0.1:0", "--dir", text(dir.path())]);
    assert!(said.contains("use"), "{said}");
    refused(2, &["verify", "--dir", text(dir.path())]);
    assert_eq!(client.read(0, 5), b"first");
    assert!(served.stop().success());
}

#[test]
fn an_address_in_use_is_refused_before_a_store_is_made() {
    let dir = scratch("address");
    let store = dir.path().join("store");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let tcp = format!("tcp:{}", taken.local_addr().expect("its number"));
    let sockets = tempfile::tempdir().expect("a short path");
    let (live, file) = (sockets.path().join("live"), sockets.path().join("file"));
    let listener = UnixListener::bind(&live).expect("a socket");
    fs::write(&file, "mine").expect("a file");
    let before = snapshot(sockets.path());
    let long = format!("unix:{}/{}", sockets.path().display(), "x".repeat(120));
    let unix = |path: &Path| format!("unix:{}", path.display());
    for address in [tcp, unix(&live), unix(&file), unix(&sockets.path().join("none/socket")), long]
    {
        let said = refused(1, &["serve", "--dir", text(&store), "--nbd", &address]);
        assert!(said.contains(address.split_once(':').expect("a kind").1), "{said}");
    }
    assert_eq!(snapshot(dir.path()), []);
    assert_eq!(snapshot(sockets.path()), before);
    assert!(
        std::os::unix::net::UnixStream::connect(&live).is_ok(),
        "the live socket was taken away"
    );
    drop(listener);
}

#[test]
fn a_socket_inside_a_fresh_store_is_possible() {
    let sockets = tempfile::tempdir().expect("a short path");
    let store = sockets.path().join("store");
    let address = format!("unix:{}/nbd.sock", store.display());
    for _ in 0..2 {
        let served =
            Served::start_with(&store, &["--nbd", &address, "--volume", "v", "--size", "4096"]);
        assert_eq!(served.client().bytes, 4096);
        // Leaves a stale socket in the store's directory.
        served.kill();
    }
}

#[test]
fn a_volume_is_made_once_and_never_resized_by_accident() {
    let dir = scratch("volume");
    closed_store(dir.path());
    // A unit file that still has the first size must not keep the service down.
    let served = Served::start_with(
        dir.path(),
        &["--nbd", "tcp:127.0.0.1:0", "--volume", "disk", "--size", "16M"],
    );
    assert!(served.lines.iter().any(|l| l.contains("disk 8.0 MiB")), "{:?}", served.lines);
    assert!(served.stop().success());
    let served = Served::start_with(
        dir.path(),
        &["--nbd", "tcp:127.0.0.1:0", "--volume", "more", "--size", "1M"],
    );
    assert!(
        served.lines.iter().any(|l| l.contains("disk 8.0 MiB") && l.contains("more 1.0 MiB")),
        "{:?}",
        served.lines
    );
    let mut client = served.client();
    assert_eq!(
        (client.bytes, client.read(0, 4)),
        (8 << 20, b"kept".to_vec()),
        "`disk` is the default export"
    );
    assert!(served.stop().success());
}

#[test]
fn a_sound_store_verifies_and_serves_after_a_signal() {
    let dir = scratch("sound");
    closed_store(dir.path());
    let before = snapshot(dir.path());
    let output = corepage_says(&["verify", "--dir", text(dir.path())]);
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(snapshot(dir.path()) == before, "verify changed the store");
    let served = Served::start(dir.path());
    assert!(served.lines.iter().any(|l| l.contains("closed cleanly")), "{:?}", served.lines);
    assert_eq!(served.client().read(0, 4), b"kept");
}

/// If this fails, Ctrl-C at a question does nothing, and a second one kills a command that has the
/// store open.
#[test]
fn a_signal_at_a_question_ends_the_command_and_nothing_is_done() {
    if !common::has_tool("script") {
        return;
    }
    let dir = scratch("question");
    closed_store(dir.path());
    let run = format!(
        "exec '{}' volume delete disk --dir '{}'",
        env!("CARGO_BIN_EXE_corepage"),
        text(dir.path())
    );
    let mut command = Command::new("script");
    command.args(["-qec", &run, "/dev/null"]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().expect("script starts");
    let (mut keys, mut screen) =
        (child.stdin.take().expect("piped"), child.stdout.take().expect("piped"));
    let (mut said, mut byte) = (Vec::new(), [0]);
    while !said.ends_with(b"[y/N] ") && screen.read(&mut byte).expect("what it says") == 1 {
        said.push(byte[0]);
    }
    keys.write_all(b"\x03").expect("a key is pressed");
    let end = Instant::now() + Duration::from_secs(60);
    while child.try_wait().expect("it can be waited for").is_none() {
        if Instant::now() > end {
            child.kill().expect("it still ran");
            panic!("it goes on waiting for an answer");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    screen.read_to_end(&mut said).expect("what it says");
    let said = String::from_utf8_lossy(&said);
    assert!(said.contains("interrupted: nothing was done"), "{said}");
    assert_eq!(child.wait().expect("it has ended").code(), Some(128 + 2), "{said}");
    let verified = corepage_says(&["verify", "--format", "json", "--dir", text(dir.path())]);
    let verified = String::from_utf8_lossy(&verified.stdout);
    assert!(verified.contains("\"closed_cleanly\": true"), "{verified}");
    let listed = corepage_says(&["volume", "list", "--dir", text(dir.path())]);
    assert!(String::from_utf8_lossy(&listed.stdout).contains("disk"), "{listed:?}");
}
