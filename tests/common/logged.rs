//! A disk whose every write and flush is logged: QEMU's storage daemon with `blklogwrites`, through
//! NBD, nbdfuse and a loop device, with a file system on it. (The daemon's own FUSE export is no
//! way: it mixes concurrent writes up.)

use super::device::quick;
use super::surroundings::{Mounted, is_root, loop_device, make_file_system, tool};
use super::{has_fuse, has_tool, scratch};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// The smallest that mkfs.xfs makes is 300 MiB; the file is sparse.
pub const DISK_BYTES: u64 = 512 << 20;

/// `-blockdev` arguments, for QEMU and its storage daemon: the node `logged`, on `image` and `log`
/// in `dir`.
pub fn block_nodes(dir: &Path) -> Vec<String> {
    // The host need not flush: it does not crash.
    let file = |node: &str, name: &str| {
        format!(
            "driver=file,node-name={node},filename={},cache.no-flush=on",
            dir.join(name).display()
        )
    };
    let logged = "driver=blklogwrites,node-name=logged,file=f0,log=l0,log-sector-size=512,\
                  log-super-update-interval=1";
    let nodes = [file("f0", "image"), file("l0", "log"), logged.to_owned()];
    nodes.into_iter().flat_map(|node| ["--blockdev".to_owned(), node]).collect()
}

/// An empty disk and an empty log in `dir`.
pub fn empty_disk(dir: &Path) {
    std::fs::File::create(dir.join("image"))
        .and_then(|file| file.set_len(DISK_BYTES))
        .expect("an image");
    std::fs::File::create(dir.join("log")).expect("a log");
}

/// How long the log in `dir` is. What was acknowledged before that was known is in it.
pub fn log_bytes(dir: &Path) -> u64 {
    std::fs::metadata(dir.join("log")).map_or(0, |log| log.len())
}

/// The disk with a file system on it, mounted.
pub struct Logged {
    mounted: Option<Mounted>,
    looped: Option<String>,
    fuse: Option<Child>,
    daemon: Option<Child>,
    dir: tempfile::TempDir,
    sockets: tempfile::TempDir,
}

impl Logged {
    /// `kind` as in mkfs.KIND. `None`, loudly, where it can't be.
    pub fn new(kind: &str) -> Option<Logged> {
        let tools = ["qemu-storage-daemon", "nbdfuse", "mount", "losetup", &format!("mkfs.{kind}")];
        if !is_root() || !tools.iter().all(|name| has_tool(name)) || !has_fuse() {
            return None;
        }
        let sockets = tempfile::tempdir().expect("a short path");
        let dir = scratch(kind);
        empty_disk(dir.path());
        let mut it = Logged { mounted: None, looped: None, fuse: None, daemon: None, dir, sockets };
        let socket = it.sockets.path().join("nbd");
        let mut daemon = Command::new("qemu-storage-daemon");
        daemon.args(block_nodes(it.dir.path()));
        daemon.args(["--nbd-server", &format!("addr.type=unix,addr.path={}", socket.display())]);
        daemon.args(["--export", "type=nbd,id=e,node-name=logged,name=disk,writable=on"]);
        it.daemon = Some(daemon.stdin(Stdio::null()).spawn().expect("the storage daemon starts"));
        appears(&socket);
        let served = it.served();
        std::fs::create_dir(&served).expect("a mount point");
        let mut fuse = Command::new("nbdfuse");
        fuse.arg(served.join("disk")).arg(format!("nbd+unix:///disk?socket={}", socket.display()));
        it.fuse = Some(fuse.stdin(Stdio::null()).spawn().expect("nbdfuse starts"));
        appears(&served.join("disk"));
        let looped = loop_device(&["--find", "--show", "--direct-io=on"], &served.join("disk"));
        make_file_system(kind, quick(kind), Path::new(&looped));
        it.mounted = Some(Mounted::device(kind, Path::new(&looped)));
        it.looped = Some(looped);
        Some(it)
    }

    fn served(&self) -> PathBuf {
        self.dir.path().join("served")
    }

    /// Where the file system is.
    pub fn path(&self) -> &Path {
        self.mounted.as_ref().expect("mounted").path()
    }

    /// Where the log is.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Takes all down but the log.
    pub fn finish(&mut self) {
        self.mounted = None;
        if let Some(looped) = self.looped.take() {
            let _ = tool("losetup").args(["--detach", &looped]).status();
        }
        if let Some(mut fuse) = self.fuse.take() {
            // The loop device lets go of its file a little later.
            let unmounts = || {
                tool("umount")
                    .arg(self.served())
                    .output()
                    .is_ok_and(|output| output.status.success())
            };
            let gone = (0..200).any(|_| {
                unmounts() || {
                    std::thread::sleep(Duration::from_millis(20));
                    false
                }
            });
            if !gone {
                let _ = fuse.kill();
                let _ = tool("umount").arg("--lazy").arg(self.served()).output();
            }
            let _ = fuse.wait();
        }
        if let Some(mut daemon) = self.daemon.take() {
            let _ = rustix::process::kill_process(
                rustix::process::Pid::from_child(&daemon),
                rustix::process::Signal::TERM,
            );
            let _ = daemon.wait();
        }
    }
}

impl Drop for Logged {
    fn drop(&mut self) {
        self.finish();
    }
}

fn appears(path: &Path) {
    let there = (0..3000).any(|_| {
        path.exists() || {
            std::thread::sleep(Duration::from_millis(10));
            false
        }
    });
    assert!(there, "{} does not appear", path.display());
}
