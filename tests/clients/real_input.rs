//! The main job on real input: a disk image full of real files goes in through a real client, the
//! server is killed, and the image comes out again byte for byte.
//!
//! If this fails, nobody can trust the store with a file system.

use crate::common;
use common::role::{Run, ring_works};
use common::{Served, has_tool, run, scratch};
use std::fs::{self, File};
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The whole volume once, and a part of it for each further way to run the store.
const LARGE: u64 = 1 << 30;
const SMALL: u64 = 96 << 20;

/// Copies files from `from` to `to`, directories and all, until `left` bytes are used up.
fn copy_some(from: &Path, to: &Path, left: &mut u64) {
    let Ok(entries) = fs::read_dir(from) else { return };
    let mut paths: Vec<PathBuf> = entries.flatten().map(|e| e.path()).collect();
    paths.sort();
    for path in paths {
        let Ok(meta) = fs::symlink_metadata(&path) else { continue };
        let target = to.join(path.file_name().expect("a directory entry has a name"));
        if meta.is_dir() {
            fs::create_dir_all(&target).expect("a directory of the copy");
            copy_some(&path, &target, left);
        } else if meta.is_file() && meta.len() <= *left && fs::copy(&path, &target).is_ok() {
            *left -= meta.len();
        }
    }
}

/// Real files: the compiler's own libraries and the system's.
fn real_files(to: &Path, bytes: u64) {
    let sysroot = Command::new(std::env::var("RUSTC").unwrap_or("rustc".into()))
        .args(["--print", "sysroot"])
        .output();
    let sysroot =
        sysroot.map(|o| String::from_utf8_lossy(&o.stdout).trim().to_owned()).unwrap_or_default();
    let mut left = bytes;
    for source in [format!("{sysroot}/lib"), "/usr/share/doc".into(), "/usr/lib".into()] {
        let to = to.join(source.replace('/', "_"));
        fs::create_dir_all(&to).expect("a directory of the copy");
        copy_some(Path::new(&source), &to, &mut left);
    }
    assert!(left < bytes / 2, "found only {} MiB of files to copy", (bytes - left) >> 20);
}

/// Where two files differ first.
fn first_difference(a: &Path, b: &Path, bytes: u64) -> Option<u64> {
    let open = |path: &Path| {
        BufReader::with_capacity(1 << 20, File::open(path).expect("a file to compare"))
    };
    let (mut a, mut b) = (open(a), open(b));
    let (mut left, mut right) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    for mib in 0..bytes >> 20 {
        a.read_exact(&mut left).expect("the whole image");
        b.read_exact(&mut right).expect("the whole image");
        if let Some(at) = left.iter().zip(&right).position(|(x, y)| x != y) {
            return Some((mib << 20) + at as u64);
        }
    }
    (a.read(&mut left).expect("its end") + b.read(&mut right).expect("its end") > 0)
        .then_some(bytes)
}

/// A tool that may be outside of a user's path.
fn tool(name: &str) -> Command {
    let mut command = Command::new(name);
    command.env("PATH", std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin");
    command
}

/// An ext4 file system of `bytes` bytes in a file, two thirds of it real files.
fn image(dir: &Path, bytes: u64) -> PathBuf {
    let (files, image) = (dir.join("files"), dir.join("in.img"));
    fs::create_dir(&files).expect("a directory");
    real_files(&files, bytes / 3 * 2);
    File::create(&image).and_then(|f| f.set_len(bytes)).expect("room for the image");
    run(tool("mkfs.ext4").args(["-q", "-F", "-d"]).arg(&files).arg(&image));
    fs::remove_dir_all(&files).expect("the files go");
    image
}

/// Puts the image into a store, kills its server, and takes it out of a server that is run in
/// another way.
fn in_and_out(dir: &Path, image: &Path, bytes: u64, first: Run, then: Run) {
    fs::create_dir_all(dir).expect("a directory");
    let (store, out) = (dir.join("store"), dir.join("out.img"));
    let sized = |run: Run| {
        let mut arguments = run.arguments();
        let listen = ["--nbd", "tcp:127.0.0.1:0", "--volume", "disk", "--size", &bytes.to_string()];
        arguments.extend(listen.map(str::to_owned));
        let arguments: Vec<&str> = arguments.iter().map(|a| &a[..]).collect();
        Served::start_with(&store, &arguments)
    };
    let served = sized(first);
    run(tool("nbdcopy")
        .args(["--connections=4", "--flush"])
        .arg(image)
        .arg(format!("{}/disk", served.uris[0])));
    served.kill();
    let served = sized(then);
    run(tool("nbdcopy").arg("--connections=4").arg(format!("{}/disk", served.uris[0])).arg(&out));
    let differs = first_difference(image, &out, bytes);
    assert_eq!(
        differs, None,
        "the first byte that differs; written by {first:?}, read by {then:?}"
    );
    run(tool("e2fsck").arg("-fn").arg(&out));
    assert!(served.stop().success());
    fs::remove_dir_all(dir).expect("the store goes");
}

fn has_tools() -> bool {
    ["mkfs.ext4", "e2fsck", "nbdcopy"].iter().all(|tool| has_tool(tool))
}

#[test]
fn a_disk_image_survives_the_servers_death_byte_for_byte() {
    if has_tools() {
        let dir = scratch("real");
        let image = image(dir.path(), LARGE);
        in_and_out(&dir.path().join("large"), &image, LARGE, Run::of_step(0), Run::of_step(1));
    }
}

#[test]
fn a_disk_image_survives_on_each_driver_with_any_number_of_shards() {
    if !has_tools() {
        return;
    }
    let dir = scratch("real-ways");
    let image = image(dir.path(), SMALL);
    let (ring, portable) =
        (|shards| Run { ring: ring_works(), shards }, |shards| Run { ring: false, shards });
    // What one driver wrote is read by the other, with another number of shards.
    for (first, then) in [(ring(1), portable(2)), (ring(4), ring(1)), (portable(2), ring(4))] {
        in_and_out(&dir.path().join("way"), &image, SMALL, first, then);
    }
}
