//! Directories for tests below the build's own, and the removal of what killed runs left in them:
//! files, mounts, loop devices.
//!
//! 1. The name of each directory has the id of the process that made it: `NAME.ID.RANDOM`. The
//!    process holds a lock on `run-ID.lock` as long as it lives, however it ends.
//! 2. Only what belongs to an id whose lock nobody holds is removed, so runs at the same time leave
//!    each other alone. So is everything that is not below the build's directory.
//! 3. What can't be removed (a mount, by another user than root) stays for a later run that can.

use super::surroundings::tool;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

const LOCK_PREFIX: &str = "run-";
const LOCK_SUFFIX: &str = ".lock";

/// A directory for one test, on the disk that the build uses, removed at the end. COREPAGE_TEST_DIR
/// puts it elsewhere, on another file system say, and keeps it.
pub fn scratch(name: &str) -> tempfile::TempDir {
    let elsewhere = std::env::var_os("COREPAGE_TEST_DIR");
    let mut builder = tempfile::Builder::new();
    let (prefix, parent) = match &elsewhere {
        Some(elsewhere) => (name.to_owned(), Path::new(elsewhere)),
        None => (format!("{name}.{}.", run_id()), build_dir()),
    };
    builder.prefix(&prefix).disable_cleanup(elsewhere.is_some());
    builder.tempdir_in(parent).expect("a directory for the test")
}

fn build_dir() -> &'static Path {
    Path::new(env!("CARGO_TARGET_TMPDIR"))
}

/// The id of this process, whose lock it holds. The first call removes what killed runs left.
fn run_id() -> &'static str {
    static CLAIM: OnceLock<(String, File)> = OnceLock::new();
    let claim = CLAIM.get_or_init(|| {
        remove_leftovers();
        claim_id()
    });
    &claim.0
}

fn claim_id() -> (String, File) {
    let mut builder = tempfile::Builder::new();
    builder.prefix(LOCK_PREFIX).suffix(LOCK_SUFFIX);
    loop {
        let lock = builder.tempfile_in(build_dir()).expect("a lock file for this run");
        let (lock, path) = lock.keep().expect("a lock file that stays");
        // Another process may have taken it for a killed run's before it was locked.
        if lock.try_lock().is_ok() && path.exists() {
            return (id_of(&path).expect("named here").to_owned(), lock);
        }
    }
}

/// The id in the name of a lock file.
fn id_of(path: &Path) -> Option<&str> {
    path.file_name()?.to_str()?.strip_prefix(LOCK_PREFIX)?.strip_suffix(LOCK_SUFFIX)
}

/// Removes what runs of this checkout left that no longer live.
pub fn remove_leftovers() {
    for path in entries(build_dir()) {
        let Some(id) = id_of(&path) else { continue };
        let Ok(lock) = File::open(&path) else { continue };
        if lock.try_lock().is_ok() && remove_all_of(id) {
            let _ = std::fs::remove_file(&path);
        }
    }
}

fn entries(dir: &Path) -> Vec<PathBuf> {
    std::fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}

/// Whether nothing is left of this run.
fn remove_all_of(id: &str) -> bool {
    let mark = format!(".{id}.");
    let is_marked = |path: &PathBuf| {
        path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.contains(&mark))
    };
    let dirs: Vec<PathBuf> = entries(build_dir()).into_iter().filter(is_marked).collect();
    unmount_below(&dirs);
    dirs.iter().all(|dir| std::fs::remove_dir_all(dir).is_ok())
}

/// Unmounts what is mounted below these directories, and detaches the loop devices over files
/// there.
pub fn unmount_below(dirs: &[PathBuf]) {
    let is_below = |path: &Path| dirs.iter().any(|dir| path.starts_with(dir));
    // Newest first: one mount may lie on another.
    let mounts = || mounts().into_iter().rev().filter(|mount| is_below(&mount.point));
    let unmount = |mount: Mount| {
        let _ = tool("umount").arg("--lazy").arg(&mount.point).output();
    };
    // A loop device names its file only while the file system with the file is still mounted.
    mounts().filter(Mount::is_looped).for_each(unmount);
    for (device, _) in loop_devices().iter().filter(|(_, file)| is_below(file)) {
        let _ = tool("losetup").arg("--detach").arg(device).output();
    }
    mounts().for_each(unmount);
}

/// A mounted file system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    pub point: PathBuf,
    pub source: PathBuf,
}

impl Mount {
    pub fn is_looped(&self) -> bool {
        self.source.to_str().is_some_and(|source| source.starts_with("/dev/loop"))
    }
}

/// All that this process sees mounted, in the order in which it was mounted.
pub fn mounts() -> Vec<Mount> {
    let table = std::fs::read_to_string("/proc/self/mounts").expect("the table of mounts");
    table.lines().filter_map(parse_mount).collect()
}

fn parse_mount(line: &str) -> Option<Mount> {
    let mut fields = line.split(' ').map(|field| PathBuf::from(unescaped(field)));
    let source = fields.next()?;
    Some(Mount { source, point: fields.next()? })
}

/// Blanks and backslashes of a name are octal numbers in the table.
fn unescaped(field: &str) -> String {
    let mut parts = field.split('\\');
    let mut text = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let code = part.get(..3).and_then(|digits| u8::from_str_radix(digits, 8).ok());
        text.push(char::from(code.expect("three octal digits")));
        text.push_str(&part[3..]);
    }
    text
}

/// The loop devices that are in use, each with its file.
pub fn loop_devices() -> Vec<(PathBuf, PathBuf)> {
    let in_use = |path: PathBuf| {
        let file = std::fs::read_to_string(path.join("loop/backing_file")).ok()?;
        Some((Path::new("/dev").join(path.file_name()?), file.trim_end_matches('\n').into()))
    };
    entries(Path::new("/sys/block")).into_iter().filter_map(in_use).collect()
}

#[test]
fn a_mount_is_found_under_its_name_with_blanks() {
    let mount = parse_mount("/dev/loop7 /a\\040b/c\\134d ext4 rw,relatime 0 0").expect("a mount");
    assert_eq!((mount.point.as_path(), mount.is_looped()), (Path::new("/a b/c\\d"), true));
}
