//! The main job on real input: a disk image full of real files goes in through a real client, the server is killed, and
//! the image comes out again byte for byte.
//!
//! If this fails, nobody can trust the store with a file system.

mod common;

use common::{Served, has_tool, run, scratch};
use std::fs::{self, File};
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::Command;

const IMAGE_BYTES: u64 = 1 << 30;
/// Of real files: enough that most of the image is data, and less than it holds.
const FILES_BYTES: u64 = 700 << 20;

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
fn real_files(to: &Path) {
    let sysroot = Command::new(std::env::var("RUSTC").unwrap_or("rustc".into())).args(["--print", "sysroot"]).output();
    let sysroot = sysroot.map(|o| String::from_utf8_lossy(&o.stdout).trim().to_owned()).unwrap_or_default();
    let mut left = FILES_BYTES;
    for source in [format!("{sysroot}/lib"), "/usr/share/doc".into(), "/usr/lib".into()] {
        let to = to.join(source.replace('/', "_"));
        fs::create_dir_all(&to).expect("a directory of the copy");
        copy_some(Path::new(&source), &to, &mut left);
    }
    assert!(left < FILES_BYTES / 2, "found only {} MiB of files to copy", (FILES_BYTES - left) >> 20);
}

/// Where two files differ first.
fn first_difference(a: &Path, b: &Path) -> Option<u64> {
    let open = |path: &Path| BufReader::with_capacity(1 << 20, File::open(path).expect("a file to compare"));
    let (mut a, mut b) = (open(a), open(b));
    let (mut left, mut right) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    for mib in 0..IMAGE_BYTES >> 20 {
        a.read_exact(&mut left).expect("the whole image");
        b.read_exact(&mut right).expect("the whole image");
        if let Some(at) = left.iter().zip(&right).position(|(x, y)| x != y) {
            return Some((mib << 20) + at as u64);
        }
    }
    (a.read(&mut left).expect("its end") + b.read(&mut right).expect("its end") > 0).then_some(IMAGE_BYTES)
}

#[test]
fn a_disk_image_survives_the_servers_death_byte_for_byte() {
    if !["mkfs.ext4", "e2fsck", "nbdcopy"].iter().all(|tool| has_tool(tool)) {
        return;
    }
    let dir = scratch("real");
    let (files, image, out) = (dir.path().join("files"), dir.path().join("in.img"), dir.path().join("out.img"));
    fs::create_dir(&files).expect("a directory");
    real_files(&files);
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    let tool = |name: &str| {
        let mut command = Command::new(name);
        command.env("PATH", &path);
        command
    };
    File::create(&image).and_then(|f| f.set_len(IMAGE_BYTES)).expect("room for the image");
    run(tool("mkfs.ext4").args(["-q", "-F", "-d"]).arg(&files).arg(&image));
    fs::remove_dir_all(&files).expect("the files go");

    let store = dir.path().join("store");
    let served = Served::start(&store);
    run(tool("nbdcopy").args(["--connections=4", "--flush"]).arg(&image).arg(format!("{}/disk", served.uris[0])));
    served.kill();

    let served = Served::start(&store);
    run(tool("nbdcopy").arg("--connections=4").arg(format!("{}/disk", served.uris[0])).arg(&out));
    assert_eq!(first_difference(&image, &out), None, "the first byte that differs");
    run(tool("e2fsck").arg("-fn").arg(&out));
    assert!(served.stop().success());
}
