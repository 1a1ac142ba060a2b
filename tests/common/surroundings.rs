//! Hostile surroundings for a process, and none of them for its neighbours: a system call refused,
//! a limit lowered, a file system of its own.
//!
//! 1. Limits and filters are set in the child between fork and exec; this process and the machine
//!    stay as they are.
//! 2. A [`Mounted`] file system is unmounted when it is dropped, also when the test fails; its loop
//!    device goes with it.
//! 3. What needs root is skipped loudly without, and is a failure where COREPAGE_REQUIRE_TOOLS=1 is
//!    set.
#![allow(unsafe_code)]

use super::scratch::{loop_devices, mounts};
use super::{has_tool, run, scratch, skip};
use rustix::process::{Resource, Rlimit, setrlimit};
use rustix::thread::CapabilitySet;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule,
};
use std::collections::BTreeMap;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What a process is not to have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Without {
    /// io_uring: setting a ring up fails with this error, by a seccomp filter, as in containers.
    Ring(i32),
    /// The right to use a ring (EPERM), which is another than the right to make one.
    RingUse,
    /// Direct I/O: opening with O_DIRECT, and setting it later, fail with EINVAL, as file systems
    /// do that lack it.
    DirectIo,
    /// Locked memory above this many bytes; the capability to exceed the limit is removed, too.
    LocksAbove(u64),
    /// More open files than these.
    FilesAbove(u64),
    /// Files larger than this many bytes.
    FileSizesAbove(u64),
    /// More address space than this many bytes.
    AddressSpaceAbove(u64),
    /// More threads and processes of its user than these.
    ThreadsAbove(u64),
}

/// io_uring forbidden as Docker's profile does it, and as older ones do.
pub const NO_RING: Without = Without::Ring(libc::EPERM);
/// The same by a filter that plays an old kernel.
pub const OLD_KERNEL: Without = Without::Ring(libc::ENOSYS);

/// Makes `command` start its process without these.
pub fn start_without<'c>(command: &'c mut Command, these: &[Without]) -> &'c mut Command {
    let filters: Vec<BpfProgram> = these.iter().filter_map(filter).collect();
    let these = these.to_vec();
    let confine = move || {
        for it in &these {
            match *it {
                Without::LocksAbove(bytes) => {
                    limit(Resource::Memlock, bytes)?;
                    // From the bounding set, or a root process would have it again after exec.
                    let lock = CapabilitySet::IPC_LOCK;
                    if rustix::thread::capabilities(None)?.effective.contains(lock) {
                        rustix::thread::remove_capability_from_bounding_set(lock)?;
                    }
                }
                Without::FilesAbove(count) => limit(Resource::Nofile, count)?,
                Without::FileSizesAbove(bytes) => limit(Resource::Fsize, bytes)?,
                Without::AddressSpaceAbove(bytes) => limit(Resource::As, bytes)?,
                Without::ThreadsAbove(count) => limit(Resource::Nproc, count)?,
                Without::Ring(_) | Without::RingUse | Without::DirectIo => {}
            }
        }
        filters.iter().try_for_each(|filter| {
            seccompiler::apply_filter(filter).map_err(|_| io::ErrorKind::Other.into())
        })
    };
    // SAFETY: between fork and exec the closure makes system calls only (prctl, setrlimit,
    // seccomp), on memory that was allocated before; it takes no lock and allocates nothing.
    unsafe { command.pre_exec(confine) }
}

/// Runs `body` in a forked child of this process, which then becomes `true`; the child has ended on
/// return. For what forks at any time and uses what it has inherited, as processes do that start
/// others.
///
/// # Panics
/// If the child could not be made, or `body` has returned an error or panicked.
pub fn in_forked_child(mut body: impl FnMut() -> Result<(), String> + Send + Sync + 'static) {
    let mut command = Command::new("true");
    let run = move || match std::panic::catch_unwind(std::panic::AssertUnwindSafe(&mut body)) {
        Ok(Ok(())) => Ok(()),
        Ok(Err(what)) => {
            eprintln!("in the forked child: {what}");
            Err(io::ErrorKind::Other.into())
        }
        Err(_) => Err(io::ErrorKind::Other.into()),
    };
    // SAFETY: it does more than is promised to work in a child of a process with threads: the C
    // library here makes its allocator whole after a fork, and what the body uses of this process
    // is for it to look after: that is what is tested.
    let ended = unsafe { command.pre_exec(run) }.status();
    assert!(ended.expect("the forked child does what it was to do").success());
}

fn limit(resource: Resource, value: u64) -> io::Result<()> {
    Ok(setrlimit(resource, Rlimit { current: Some(value), maximum: Some(value) })?)
}

fn filter(without: &Without) -> Option<BpfProgram> {
    let condition = |argument, operator, value| {
        SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value)
            .expect("an argument that exists")
    };
    let rule = |conditions| SeccompRule::new(conditions).expect("conditions");
    let direct = libc::O_DIRECT as u64;
    let (errno, calls) = match *without {
        Without::Ring(errno) => (errno, vec![(libc::SYS_io_uring_setup, vec![])]),
        Without::RingUse => (libc::EPERM, vec![(libc::SYS_io_uring_enter, vec![])]),
        Without::DirectIo => {
            let flags = |argument| condition(argument, SeccompCmpOp::MaskedEq(direct), direct);
            let sets = condition(1, SeccompCmpOp::Eq, libc::F_SETFL as u64);
            let open = (libc::SYS_openat, vec![rule(vec![flags(2)])]);
            (libc::EINVAL, vec![open, (libc::SYS_fcntl, vec![rule(vec![sets, flags(2)])])])
        }
        Without::LocksAbove(_)
        | Without::FilesAbove(_)
        | Without::FileSizesAbove(_)
        | Without::AddressSpaceAbove(_)
        | Without::ThreadsAbove(_) => return None,
    };
    let calls: BTreeMap<i64, Vec<SeccompRule>> = calls.into_iter().collect();
    let architecture = std::env::consts::ARCH.try_into().expect("seccomp knows this processor");
    let filter = SeccompFilter::new(
        calls,
        SeccompAction::Allow,
        SeccompAction::Errno(errno as u32),
        architecture,
    );
    Some(filter.expect("a filter").try_into().expect("a program"))
}

/// A file system of its own for one test, on an image file that grows as it is filled.
pub struct Mounted {
    point: PathBuf,
    _scratch: tempfile::TempDir,
}

/// Enough for a store, and for the smallest file systems that mkfs.xfs and mkfs.btrfs make.
const IMAGE_BYTES: u64 = 2 << 30;

impl Mounted {
    /// `kind` as in mkfs.KIND; `None`, loudly, without root or without the tool.
    pub fn image(kind: &str) -> Option<Mounted> {
        Mounted::image_with(kind, "loop")
    }

    /// The same with options for mount, of which `loop` must be one.
    pub fn image_with(kind: &str, options: &str) -> Option<Mounted> {
        let mkfs = format!("mkfs.{kind}");
        if !is_root() || !has_tool(&mkfs) || !has_tool("mount") {
            return None;
        }
        let scratch = scratch(kind);
        let image = scratch.path().join("image");
        std::fs::File::create(&image)
            .and_then(|file| file.set_len(IMAGE_BYTES))
            .expect("an image file");
        make_file_system(kind, &["-q"], &image);
        // The loop device is let go when the file system is unmounted.
        Some(Mounted::mount(scratch, &["-o", options, "-t", kind], &image))
    }

    /// A file system in memory that refuses direct I/O, as tmpfs did before Linux 6.6.
    pub fn ramfs() -> Option<Mounted> {
        if !is_root() || !has_tool("mount") {
            return None;
        }
        Some(Mounted::mount(scratch("ramfs"), &["-t", "ramfs"], Path::new("none")))
    }

    /// A file system in memory that takes no more than an image.
    pub fn memory() -> Option<Mounted> {
        if !is_root() || !has_tool("mount") {
            return None;
        }
        let size = format!("size={}", IMAGE_BYTES + (64 << 20));
        Some(Mounted::mount(scratch("memory"), &["-t", "tmpfs", "-o", &size], Path::new("none")))
    }

    /// As [`image`](Self::image), with the image file in `dir`.
    pub fn image_in(kind: &str, dir: &Path) -> Option<Mounted> {
        let mkfs = format!("mkfs.{kind}");
        if !is_root() || !has_tool(&mkfs) || !has_tool("mount") {
            return None;
        }
        let image = dir.join("image");
        std::fs::File::create(&image)
            .and_then(|file| file.set_len(IMAGE_BYTES))
            .expect("an image file");
        make_file_system(kind, &["-q"], &image);
        Some(Mounted::mount(scratch(kind), &["-o", "loop", "-t", kind], &image))
    }

    /// A file system that is on a block device already.
    pub fn device(kind: &str, device: &Path) -> Mounted {
        Mounted::mount(scratch(kind), &["-t", kind], device)
    }

    /// A file system in a file that is there already; what mount says if it can't be mounted.
    pub fn try_file(kind: &str, options: &str, file: &Path) -> Result<Mounted, String> {
        let scratch = scratch(kind);
        let point = scratch.path().join("mnt");
        std::fs::create_dir(&point).expect("a mount point");
        let output = tool("mount")
            .args(["-o", options, "-t", kind])
            .arg(file)
            .arg(&point)
            .output()
            .expect("mount starts");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        if output.status.success() { Ok(Mounted { point, _scratch: scratch }) } else { Err(said) }
    }

    fn mount(scratch: tempfile::TempDir, options: &[&str], source: &Path) -> Mounted {
        let point = scratch.path().join("mnt");
        std::fs::create_dir(&point).expect("a mount point");
        run(tool("mount").args(options).arg(source).arg(&point));
        Mounted { point, _scratch: scratch }
    }

    pub fn path(&self) -> &Path {
        &self.point
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let unmounts = |options: &[&str]| {
            tool("umount")
                .args(options)
                .arg(&self.point)
                .output()
                .is_ok_and(|output| output.status.success())
        };
        // A killed process lets go of its files only when its last transfer is done.
        for _ in 0..50 {
            if unmounts(&[]) {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
        assert!(unmounts(&["--lazy"]), "{} can't be unmounted", self.point.display());
    }
}

/// Runs mkfs.KIND with these options on a file or device.
///
/// mkfs.btrfs asks for the file of every mounted loop device of the machine, and gives up if one
/// can't be found: the FUSE server below it has died, say, with a killed run of another checkout.
/// It does not see such mounts here.
pub fn make_file_system(kind: &str, options: &[&str], on: &Path) {
    let mkfs = format!("mkfs.{kind}");
    let devices = loop_devices();
    let is_dead = |source: &Path| {
        devices.iter().any(|(device, file)| device == source && file.metadata().is_err())
    };
    let dead = mounts().into_iter().filter(|mount| is_dead(&mount.source)).map(|mount| mount.point);
    let dead: Vec<PathBuf> = dead.collect();
    if dead.is_empty() {
        return run(tool(&mkfs).args(options).arg(on));
    }
    // In a namespace of its own, so that they stay mounted for everybody else.
    let hide = r#"until [ "$1" = -- ]; do umount --lazy "$1"; shift; done; shift; exec "$@""#;
    let mut command = tool("unshare");
    command.args(["--mount", "--propagation", "private", "sh", "-c", hide, "sh"]).args(dead);
    run(command.args(["--", &mkfs]).args(options).arg(on));
}

/// A tool that may be in a folder which not every PATH contains.
pub fn tool(name: &str) -> Command {
    let path = std::env::var("PATH").unwrap_or_default();
    let mut command = Command::new(name);
    command.env("PATH", format!("{path}:/usr/sbin:/sbin"));
    command
}

/// Makes a loop device over this file: its name. Whoever makes it detaches it.
pub fn loop_device(options: &[&str], file: &Path) -> String {
    let output = tool("losetup").args(options).arg(file).output().expect("losetup starts");
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).expect("a name").trim().into()
}

pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
        || skip("this is not root, who alone may mount file systems")
}
