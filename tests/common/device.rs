//! A disk whose failures a test chooses: a file served by this process through FUSE, a loop device
//! over it, a file system on that. What fails below reaches the store as it would from a real disk:
//! as an error of the block device, through the file system, which has troubles of its own with it.
//!
//! 1. It has a volatile write cache: a flush that fails takes what it was to make durable with it
//!    (writes of the store, as told by their bytes), and the next one succeeds. So a flush that is
//!    tried again and called good loses data here.
//! 2. A fault says which operations fail, and how often it has fired: a test asserts that it has.
//! 3. A write can be [held](Device::hold): it has begun, and has not reached the disk, until it is
//!    let go.
//! 4. File system, loop device and FUSE mount go when it is dropped, also when the test fails.

use super::surroundings::{Mounted, is_root, loop_device, make_file_system, tool};
use super::{has_fuse, has_tool, scratch};
use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags,
    Generation, INodeNo, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry,
    ReplyOpen, ReplyWrite, Request, WriteFlags,
};
use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, UNIX_EPOCH};

/// What a device does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    Read,
    Write,
    Flush,
}

/// Bytes by which the device knows what it transfers: one of these must be in it. None: whatever it
/// is.
pub type Marks = &'static [&'static [u8]];

/// In all that a store writes but map nodes, and in nothing that a file system writes for itself:
/// `MARK` is for the test to put into pages and patches, the others begin the store's own
/// structures.
pub const OF_STORE: Marks =
    &[MARK, b"CPGROUP\0", b"COREPAGE", b"CPROOT\0\0", b"CPTABLE\0", b"CPSUMMRY"];
pub const MARK: &[u8] = b"corepage-fault-0";

/// Which operations fail, and how.
#[derive(Clone, Copy, Debug)]
pub struct Fault {
    pub op: Op,
    pub errno: i32,
    /// So many of them are still well.
    pub after: u64,
    /// So many fail; then the device is well again.
    pub times: u64,
    /// Only transfers of bytes with one of these in them; a flush: only if a write of the store has
    /// not been flushed.
    pub with: Marks,
}

#[derive(Default)]
struct State {
    fault: Option<Fault>,
    /// Operations that the fault is about, since it was set.
    seen: u64,
    fired: u64,
    /// Writes of the store since the last flush: where, and what was there before.
    cache: Vec<(u64, Vec<u8>)>,
    hold: Hold,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Hold {
    #[default]
    Nothing,
    /// The next write with one of these in it.
    Next(Marks),
    /// It is here.
    Held,
}

/// What the device's threads share with the test.
#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    hold_changed: Condvar,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no thread of the device failed")
    }

    fn wait_while(&self, condition: impl FnMut(&mut State) -> bool) {
        let wait =
            self.hold_changed.wait_timeout_while(self.state(), Duration::from_secs(60), condition);
        let timed_out = wait.expect("no thread of the device failed").1.timed_out();
        assert!(!timed_out, "waited in vain for a write that is to be held, or to be let go");
    }

    fn set_hold(&self, hold: Hold) {
        self.state().hold = hold;
        self.hold_changed.notify_all();
    }

    /// In a thread of the device: waits, if this write is the one to be held.
    fn pass(&self, data: &[u8]) {
        let mut state = self.state();
        let Hold::Next(marks) = state.hold else { return };
        if holds(data, marks) {
            state.hold = Hold::Held;
            drop(state);
            self.hold_changed.notify_all();
            self.wait_while(|state| state.hold == Hold::Held);
        }
    }
}

impl State {
    /// Whether this operation fails, and with what.
    fn judge(&mut self, op: Op, about: impl FnOnce(Marks) -> bool) -> Option<Errno> {
        let fault = self
            .fault
            .filter(|fault| fault.op == op && (fault.with.is_empty() || about(fault.with)))?;
        self.seen += 1;
        let fails = self.seen > fault.after && self.fired < fault.times;
        self.fired += u64::from(fails);
        fails.then(|| Errno::from_i32(fault.errno))
    }
}

fn holds(bytes: &[u8], marks: Marks) -> bool {
    let begins = |at: usize| marks.iter().any(|mark| bytes[at..].starts_with(mark));
    bytes.iter().enumerate().any(|(at, byte)| byte.eq_ignore_ascii_case(&b'c') && begins(at))
}

/// The one file, served.
struct Disk {
    image: File,
    bytes: u64,
    shared: Arc<Shared>,
}

const DISK: INodeNo = INodeNo(2);
const ANY_TIME: Duration = Duration::from_secs(3600);

impl Disk {
    fn attr(&self, ino: INodeNo) -> FileAttr {
        let (kind, perm) =
            if ino == DISK { (FileType::RegularFile, 0o600) } else { (FileType::Directory, 0o700) };
        FileAttr {
            ino,
            size: self.bytes,
            blocks: self.bytes / 512,
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind,
            perm,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }
}

impl Filesystem for Disk {
    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match name.to_str() {
            Some("disk") => reply.entry(&ANY_TIME, &self.attr(DISK), Generation(0)),
            _ => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&ANY_TIME, &self.attr(ino));
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(1), FopenFlags::FOPEN_DIRECT_IO);
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let mut bytes = vec![0; u64::from(size).min(self.bytes.saturating_sub(offset)) as usize];
        self.image.read_exact_at(&mut bytes, offset).expect("the image can be read");
        match self.shared.state().judge(Op::Read, |marks| holds(&bytes, marks)) {
            Some(error) => reply.error(error),
            None => reply.data(&bytes),
        }
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        self.shared.pass(data);
        let mut state = self.shared.state();
        if let Some(error) = state.judge(Op::Write, |marks| holds(data, marks)) {
            return reply.error(error);
        }
        if holds(data, OF_STORE) {
            let mut before = vec![0; data.len()];
            self.image.read_exact_at(&mut before, offset).expect("the image can be read");
            state.cache.push((offset, before));
        }
        self.image.write_all_at(data, offset).expect("the image can be written");
        reply.written(data.len() as u32);
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        let mut state = self.shared.state();
        let dirty = !state.cache.is_empty();
        let error = state.judge(Op::Flush, |_| dirty);
        let cache = std::mem::take(&mut state.cache);
        match error {
            None => reply.ok(),
            Some(error) => {
                for (offset, before) in cache.iter().rev() {
                    self.image.write_all_at(before, *offset).expect("the image can be written");
                }
                reply.error(error);
            }
        }
    }
}

/// The disk with a file system on it, mounted.
pub struct Device {
    kind: String,
    // In the order in which they must go.
    mounted: Option<Mounted>,
    looped: Option<String>,
    session: Option<BackgroundSession>,
    shared: Arc<Shared>,
    dir: tempfile::TempDir,
}

/// The smallest that mkfs.xfs makes is 300 MiB; the file is sparse.
const DISK_BYTES: u64 = 512 << 20;

impl Device {
    /// `kind` as in mkfs.KIND. `None`, loudly, where it can't be.
    pub fn new(kind: &str) -> Option<Device> {
        let tools = || {
            ["mount", "losetup", "fusermount3", &format!("mkfs.{kind}")]
                .iter()
                .all(|name| has_tool(name))
        };
        if !is_root() || !tools() || !has_fuse() {
            return None;
        }
        let dir = scratch(kind);
        let image =
            File::options().create_new(true).read(true).write(true).open(dir.path().join("image"));
        let image = image.expect("an image file");
        image.set_len(DISK_BYTES).expect("an image file");
        let shared = Arc::<Shared>::default();
        let mut device =
            Device { kind: kind.into(), mounted: None, looped: None, session: None, shared, dir };
        let served = device.dir.path().join("served");
        std::fs::create_dir(&served).expect("a mount point");
        let disk = Disk { image, bytes: DISK_BYTES, shared: device.shared.clone() };
        let mut config = Config::default();
        config.n_threads = Some(2);
        device.session =
            Some(fuser::spawn_mount(disk, &served, &config).expect("a file system through FUSE"));
        // Past the page cache, or an error would show when the kernel writes back, to nobody in
        // particular.
        device.looped =
            Some(loop_device(&["--find", "--show", "--direct-io=on"], &served.join("disk")));
        make_file_system(kind, quick(kind), device.block_device());
        device.mount();
        Some(device)
    }

    pub fn kind(&self) -> &str {
        &self.kind
    }

    fn block_device(&self) -> &Path {
        Path::new(self.looped.as_ref().expect("there while the device is"))
    }

    fn mount(&mut self) {
        self.mounted = Some(Mounted::device(&self.kind, self.block_device()));
    }

    /// Where the store goes.
    pub fn store(&self) -> PathBuf {
        self.mounted.as_ref().expect("mounted except while it is mounted anew").path().join("store")
    }

    pub fn break_it(&self, fault: Fault) {
        let mut state = self.shared.state();
        (state.fault, state.seen, state.fired) = (Some(fault), 0, 0);
    }

    /// How often the fault has fired.
    pub fn fired(&self) -> u64 {
        self.shared.state().fired
    }

    /// The next write with one of these in it is held: it returns when there is one.
    pub fn hold(&self, with: Marks) {
        self.hold_next(with);
        self.wait_held();
    }

    /// The next write with one of these in it is going to be held.
    pub fn hold_next(&self, with: Marks) {
        self.shared.set_hold(Hold::Next(with));
    }

    /// Waits until that one is here.
    pub fn wait_held(&self) {
        self.shared.wait_while(|state| state.hold != Hold::Held);
    }

    pub fn is_holding(&self) -> bool {
        self.shared.state().hold == Hold::Held
    }

    /// What is held goes on.
    pub fn let_go(&self) {
        self.shared.set_hold(Hold::Nothing);
    }

    /// The device is well again; the file system is mounted anew, since it may have given up. How
    /// often the fault fired.
    pub fn heal(&mut self) -> u64 {
        let fired = self.heal_device();
        self.mounted = None;
        self.mount();
        fired
    }

    /// Only the device.
    pub fn heal_device(&self) -> u64 {
        let mut state = self.shared.state();
        state.fault = None;
        state.fired
    }
}

/// Options that make mkfs leave out what takes time: discarding, and zeroing what is zero.
pub fn quick(kind: &str) -> &'static [&'static str] {
    match kind {
        "ext4" => &["-q", "-E", "nodiscard,lazy_itable_init=0", "-O", "^resize_inode", "-N", "256"],
        "xfs" => &["-q", "-K"],
        _ => &["-q", "-K", "-m", "single"],
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        self.heal_device();
        self.let_go();
        self.mounted = None;
        if let Some(looped) = self.looped.take() {
            let _ = tool("losetup").args(["--detach", &looped]).status();
        }
        // The loop device lets go of its file a little later.
        let served = self.dir.path().join("served");
        let unmounts =
            || tool("umount").arg(&served).output().is_ok_and(|output| output.status.success());
        for _ in 0..100 {
            if unmounts() {
                break;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        if let Some(session) = self.session.take() {
            let _ = session.umount_and_join();
        }
    }
}
