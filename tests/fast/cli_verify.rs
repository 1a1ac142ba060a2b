//! `corepage verify` as its user meets it: exit codes, the list, JSON, and what it says of a store
//! that it can't look at.
//!
//! If these fail, a script takes a damaged store for a whole one, or an administrator learns that
//! something is damaged and not what that means for the data on it, nor what to do.

// Real processes take real time.
#![allow(clippy::disallowed_methods)]

use crate::common;
use common::{Served, corepage, scratch, snapshot};
use serde_json::Value;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Output;

const PAGE: u64 = 4096;

fn verify(dir: &Path, arguments: &[&str]) -> Output {
    let mut command = corepage(&["verify", "--dir"]);
    command.arg(dir).args(arguments).output().expect("corepage starts")
}

fn served(dir: &Path) -> Served {
    Served::start_with(dir, &["--nbd", "tcp:127.0.0.1:0", "--volume", "disk", "--size", "8M"])
}

/// A closed store with a volume `disk`, and one page of it damaged: that of byte 12288.
fn damaged_store(dir: &Path) {
    let server = served(dir);
    let mut client = server.client();
    for page in 0..8u8 {
        client.write(0, u64::from(page) * PAGE, &[b'a' + page; PAGE as usize]);
    }
    assert!(server.stop().success());
    let data =
        fs::File::options().read(true).write(true).open(dir.join("data")).expect("the data file");
    let mut block = [0; PAGE as usize];
    let blocks = data.metadata().expect("its length").len() / PAGE;
    let at = (0..blocks).map(|n| n * PAGE).find(|at| {
        data.read_exact_at(&mut block, *at).expect("a block");
        block.iter().all(|byte| *byte == b'd')
    });
    data.write_all_at(b"rot", at.expect("the page lies somewhere") + 100).expect("damage");
}

fn json(output: &Output) -> Value {
    let text = String::from_utf8_lossy(&output.stdout);
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

/// Whole is 0, damaged is 1, and what could not be looked at is neither.
#[test]
fn exit_codes_tell_whole_damaged_and_unchecked_apart() {
    let dir = scratch("verify-codes");
    let (store, none) = (dir.path().join("store"), dir.path().join("none"));
    let server = served(&store);
    let file = dir.path().join("file");
    fs::write(&file, "a file").expect("a file");
    let said = verify(&file, &[]);
    let said = String::from_utf8_lossy(&said.stderr).into_owned();
    assert!(said.contains("file is not a directory, so no store is in it"), "{said}");
    for (what, path) in [("in use", &store), ("not there", &none), ("a file", &file)] {
        let output = verify(path, &["--format", "json"]);
        assert_eq!(output.status.code(), Some(2), "{what}");
        let told = json(&output);
        assert_eq!(told["state"], "unchecked", "{what}: {told}");
        assert!(told["error"].as_str().is_some_and(|error| !error.is_empty()), "{what}: {told}");
        assert!(String::from_utf8_lossy(&output.stderr).starts_with("error: "), "{what}");
    }
    assert!(server.stop().success());
    let output = verify(&store, &["--format", "json"]);
    let told = json(&output);
    assert_eq!((output.status.code(), &told["state"]), (Some(0), &Value::from("whole")), "{told}");
    assert!(
        told["bytes_read"].as_u64() > Some(0) && told["damaged"] == Value::Array(vec![]),
        "{told}"
    );
    damaged_store(&store);
    let output = verify(&store, &["--format", "json"]);
    let told = json(&output);
    assert_eq!(
        (output.status.code(), &told["state"]),
        (Some(1), &Value::from("damaged")),
        "{told}"
    );
}

/// A page number says nothing to whoever has a file system on the volume: the bytes do, and what is
/// said to mend it does.
#[test]
fn damage_is_told_in_bytes_of_the_volume_and_writing_them_mends_it() {
    for mend_by_trim in [false, true] {
        let dir = scratch("verify-bytes");
        damaged_store(dir.path());
        let before = snapshot(dir.path());
        let output = verify(dir.path(), &[]);
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(said.contains("p3 of volume disk (bytes 12288 to 16383)"), "{said}");
        assert!(said.contains("mended by writing these bytes again"), "{said}");
        let told = json(&verify(dir.path(), &["--format", "json"]));
        let damage = &told["damaged"][0];
        assert_eq!(told["damaged_count"], 1, "{told}");
        assert_eq!(damage["mend"], "overwrite", "{told}");
        let bytes = &damage["volume_bytes"];
        assert_eq!(bytes["volume"], "disk", "{told}");
        let (offset, length) = (
            bytes["offset"].as_u64().expect("a number"),
            bytes["length"].as_u64().expect("a number"),
        );
        assert_eq!((offset, length, &bytes["all"]), (3 * PAGE, PAGE, &Value::Bool(true)), "{told}");
        assert!(snapshot(dir.path()) == before, "verify changed something");
        // As it is said to be mended.
        let server = served(dir.path());
        let mut client = server.client();
        let wanted = if mend_by_trim {
            assert_eq!(client.call(0, common::nbd::TRIM, offset, length as u32, &[]), 0);
            vec![0; PAGE as usize]
        } else {
            client.write(0, offset, &[b'D'; PAGE as usize]);
            vec![b'D'; PAGE as usize]
        };
        assert_eq!(client.read(offset, length as u32), wanted);
        assert!(server.stop().success());
        let output = verify(dir.path(), &[]);
        assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stdout));
    }
}

/// A result that goes to a full disk, for example a report in a cron job, must not count as one.
#[test]
fn output_that_is_lost_is_an_error() {
    let dir = scratch("verify-full");
    assert!(served(dir.path()).stop().success());
    let dir = dir.path().to_str().expect("a path of the test");
    for (code, arguments) in [
        (2, &["verify", "--dir", dir][..]),
        (2, &["verify", "--format", "json", "--dir", dir]),
        (1, &["doctor", "--dir", dir]),
        (1, &["doctor", "--format", "json", "--dir", dir]),
        (1, &["volume", "list", "--dir", dir]),
        (1, &["volume", "create", "more", "1M", "--dir", dir]),
    ] {
        let full =
            fs::File::options().write(true).open("/dev/full").expect("a device that is full");
        let output = corepage(arguments).stdout(full).output().expect("corepage starts");
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {said}");
        assert!(said.starts_with("error: ") && said.contains("stdout"), "{arguments:?}: {said}");
    }
}

/// Who reads only the first lines has had enough: that is no failure.
#[test]
fn a_reader_that_has_had_enough_is_no_failure() {
    let dir = scratch("verify-pipe");
    assert!(served(dir.path()).stop().success());
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    let mut command = corepage(&["verify", "--dir"]);
    let output = command.arg(dir.path()).stdout(writer).output().expect("corepage starts");
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
}
