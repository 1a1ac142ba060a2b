//! A killed run of the tests leaves file systems mounted, over loop devices, over a FUSE disk whose
//! server died with it. If a test here fails, such a run makes unrelated tests of later runs fail,
//! until a person cleans the machine up.

// Real processes take real time.
#![allow(clippy::disallowed_methods)]

use crate::common;
use common::device::Device;
use common::role::{Role, Run, Task, say};
use common::scratch::{loop_devices, mounts, remove_leftovers, scratch, unmount_below};
use common::surroundings::{Mounted, is_root};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// Not a test of its own: a run that is going to be killed.
#[test]
fn child() {
    let Some(_) = Task::of_this_process() else { return };
    let device = Device::new("ext4").expect("the parent has looked whether one can be made");
    say(format_args!("\nstore {}", device.store().display()));
    say("ready");
    std::thread::sleep(Duration::from_secs(600));
}

fn child_in(dir: &Path) -> Command {
    Role::command("device", dir, Run { ring: false, shards: 1 })
}

/// Starts this child, kills it, and says where its device was mounted.
fn killed(child: Command) -> PathBuf {
    let child = Role::listen(child, || 0);
    child.wait();
    let lines = child.kill();
    let store = lines.iter().find_map(|line| line.strip_prefix("store "));
    Path::new(store.expect("the child says it")).parent().expect("a mount point").into()
}

fn can_mount() -> bool {
    let tools = ["mount", "losetup", "fusermount3", "mkfs.ext4", "mkfs.btrfs", "unshare"];
    is_root() && common::has_fuse() && tools.iter().all(|tool| common::has_tool(tool))
}

/// Takes down what is mounted below its directory.
struct Below(PathBuf);

impl Drop for Below {
    fn drop(&mut self) {
        unmount_below(std::slice::from_ref(&self.0));
    }
}

#[test]
fn file_systems_are_made_beside_a_disk_that_died_with_another_run() {
    if !can_mount() {
        return;
    }
    // Below a directory of this run, so that no other test removes it.
    let dir = scratch("leftovers");
    let _below = Below(dir.path().into());
    let mut child = child_in(dir.path());
    child.env("COREPAGE_TEST_DIR", dir.path());
    let dead = killed(child);
    drop(Mounted::image("btrfs").expect("root and all tools are there"));
    assert!(mounts().iter().any(|mount| mount.point == dead), "there was no obstacle");
}

#[test]
fn what_a_killed_run_left_is_removed_by_the_next() {
    if !can_mount() {
        return;
    }
    let dir = scratch("leftovers");
    let dead = killed(child_in(dir.path()));
    remove_leftovers();
    // Another run that began at this moment may be at it.
    let place = dead.parent().expect("a directory of the build's");
    let id = place.file_name().expect("a name").to_str().expect("a name of ours");
    let id = id.split('.').nth(1).expect("the id of the run");
    let of_run = |path: &Path| path.to_str().is_some_and(|path| path.contains(&format!(".{id}.")));
    let left = || {
        let files = std::fs::read_dir(place.parent().expect("the build's")).expect("its entries");
        files.flatten().any(|entry| of_run(&entry.path()))
            || mounts().iter().any(|mount| of_run(&mount.point))
            || loop_devices().iter().any(|(_, file)| of_run(file))
    };
    let is_gone = (0..500).any(|_| {
        !left() || {
            std::thread::sleep(Duration::from_millis(20));
            false
        }
    });
    assert!(is_gone, "mounts, loop devices or files of run {id} are left");
}
