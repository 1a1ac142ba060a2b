//! What opening a store may make and change, and what it must leave alone.
//!
//! If these fail, a missing mount gives an empty store in place of the one that is meant, a command
//! that only looks spoils another user's store, or a start that failed leaves gigabytes behind.

// Real processes take real time.
#![allow(clippy::disallowed_methods)]

use crate::common;
use common::surroundings::{Without, is_root, start_without};
use common::{Served, corepage, scratch, snapshot};
use corepage::blocking::Wait;
use corepage::{ErrorKind, Options, Store};
use futures_lite::future::block_on;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Output;

fn options() -> Options {
    Options { memory_bytes: 16 << 20, shards: Some(1), ..Options::default() }
}

fn run(dir: &Path, arguments: &[&str]) -> Output {
    corepage(arguments).arg("--dir").arg(dir).output().expect("corepage starts")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn a_store_that_has_to_exist_is_never_made() {
    let dir = scratch("existing");
    let (missing, empty) = (dir.path().join("missing"), dir.path().join("empty"));
    std::fs::create_dir(&empty).expect("a directory");
    for path in [&missing, &empty] {
        let error = block_on(Store::open_existing(path, options())).expect_err("there is no store");
        assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
        let error = Store::open_existing(path, options()).wait().expect_err("there is no store");
        assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
        let output = run(path, &["serve", "--existing", "--nbd", "tcp:127.0.0.1:0"]);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        assert!(text(&output.stderr).contains("there is no store in"), "{output:?}");
    }
    assert!(!missing.exists() && empty.read_dir().expect("it is there").next().is_none());
    let store = block_on(Store::open(&empty, options())).expect("a new store");
    block_on(store.close()).expect("it closes");
    let store = block_on(Store::open_existing(&empty, options())).expect("it is there now");
    block_on(store.close()).expect("it closes");
}

/// A limit of the size of files stands for all that may end a creation in the middle.
#[test]
fn a_creation_that_fails_leaves_nothing_behind() {
    let dir = scratch("failed-creation");
    std::fs::write(dir.path().join("mine"), "not the store's").expect("a file");
    let mut command = corepage(&["serve", "--shards", "1", "--nbd", "tcp:127.0.0.1:0", "--dir"]);
    let command = start_without(command.arg(dir.path()), &[Without::FileSizesAbove(20 << 20)]);
    let output = command.output().expect("corepage starts");
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let left: Vec<_> = dir
        .path()
        .read_dir()
        .expect("it is there")
        .map(|entry| entry.expect("one").file_name())
        .collect();
    assert_eq!(left, ["mine"], "{}", text(&output.stderr));
}

/// Of a store that a dead server has left, too: opening it for a look would recover it, with files
/// of the user who looks.
#[test]
fn listing_volumes_changes_no_file() {
    let dir = scratch("listing");
    let served = Served::start_with(
        dir.path(),
        &["--nbd", "tcp:127.0.0.1:0", "--volume", "first", "--size", "1M"],
    );
    assert!(served.stop().success());
    let served = Served::start(dir.path());
    assert!(run(dir.path(), &["volume", "create", "second", "2M"]).status.success());
    served.kill();
    let before = snapshot(dir.path());
    let output = run(dir.path(), &["volume", "list"]);
    assert!(output.status.success() && text(&output.stdout).contains("first"), "{output:?}");
    assert!(text(&output.stderr).contains("as of the last checkpoint"), "{output:?}");
    assert!(snapshot(dir.path()) == before, "the store was changed");
    assert!(Served::start(dir.path()).stop().success());
    let output = run(dir.path(), &["volume", "list"]);
    assert!(text(&output.stdout).contains("second") && output.stderr.is_empty(), "{output:?}");
}

#[test]
fn what_an_administrator_changes_stays_its_users() {
    if !is_root() {
        return;
    }
    let dir = scratch("owner");
    let path = dir.path().join("store");
    assert!(
        Served::start_with(&path, &["--nbd", "tcp:127.0.0.1:0", "--shards", "1"]).stop().success()
    );
    let files = || path.read_dir().expect("it is there").map(|entry| entry.expect("one").path());
    for file in files().chain([path.clone()]) {
        std::os::unix::fs::chown(&file, Some(12_345), Some(12_346)).expect("root may");
    }
    for file in files() {
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o640)).expect("root may");
    }
    let names = || files().collect::<std::collections::BTreeSet<_>>();
    let before = names();
    let created = run(&path, &["volume", "create", "more", "1M"]);
    assert!(created.status.success(), "{created:?}");
    assert_eq!(names(), before, "it has as many shards as it had");
    // With more shards there are more files: like the others.
    assert!(
        Served::start_with(&path, &["--nbd", "tcp:127.0.0.1:0", "--shards", "2"]).stop().success()
    );
    assert!(names().len() > before.len());
    for file in files() {
        let meta = file.metadata().expect("it is there");
        assert_eq!(
            (meta.uid(), meta.gid(), meta.mode() & 0o777),
            (12_345, 12_346, 0o640),
            "{}",
            file.display()
        );
    }
}

#[test]
fn a_store_whose_volumes_were_all_deleted_stays_empty() {
    let dir = scratch("all-deleted");
    let served = Served::start(dir.path());
    assert!(run(dir.path(), &["volume", "delete", "disk", "--yes"]).status.success());
    assert!(served.stop().success());
    assert!(Served::start(dir.path()).stop().success());
    assert_eq!(text(&run(dir.path(), &["volume", "list"]).stdout), "no volumes\n");
}

#[test]
fn whoever_has_the_store_open_is_named() {
    let dir = scratch("named");
    let store = block_on(Store::open(dir.path(), options())).expect("a store");
    let error = block_on(Store::open(dir.path(), options())).expect_err("it is open");
    assert!(
        error.kind() == ErrorKind::InUse
            && error.to_string().contains("already open in this process"),
        "{error}"
    );
    let output = run(dir.path(), &["verify"]);
    assert!(text(&output.stderr).contains("in another process"), "{output:?}");
    block_on(store.close()).expect("it closes");
}
