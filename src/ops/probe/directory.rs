//! Probes the directory of the store: its file system, whether direct I/O works there, and the
//! block device behind it.
//!
//! 1. If a directory does not exist, its nearest existing parent is probed; nothing is made.

use super::Roots;
use super::mounts::mount_of;
use crate::io::{self, BlockDevice, DirectoryProbe, FlushMethod};
use std::fs::File;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Whether transfers can bypass the page cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
pub enum DirectIo {
    /// A block was written and read back with it.
    Works,
    /// The file system refuses it.
    Refused,
    /// It can't be tested, since the directory can't be written.
    Unknown,
}

/// A directory, its file system and its device.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct Directory {
    /// The path as the user gave it.
    pub path: PathBuf,
    /// The path that was probed: the given one, or its nearest existing parent.
    pub looked_at: PathBuf,
    /// Why the directory can't be written, if it can't.
    pub unwritable: Option<String>,
    /// The file system's name.
    pub file_system: Option<String>,
    /// Bytes that this user may still fill.
    pub free_bytes: Option<u64>,
    /// Whether it already holds a store.
    pub holds_store: bool,
    /// Whether direct I/O works.
    pub direct_io: DirectIo,
    /// The device, if there is one.
    pub device: Option<BlockDevice>,
    /// How writes become durable there.
    pub flush: Option<FlushMethod>,
}

impl Directory {
    pub(super) fn look(roots: &Roots, path: &Path) -> Directory {
        let looked_at = nearest(path);
        let mut found = Directory {
            path: path.to_owned(),
            looked_at: looked_at.clone(),
            unwritable: None,
            file_system: None,
            free_bytes: None,
            holds_store: path.join("meta").exists(),
            direct_io: DirectIo::Unknown,
            device: None,
            flush: None,
        };
        if !looked_at.is_dir() {
            found.unwritable = Some(format!("{} is not a directory", looked_at.display()));
            return found;
        }
        let handle = match File::open(&looked_at) {
            Ok(handle) => handle,
            Err(e) => {
                found.unwritable = Some(format!("{} can't be opened: {e}", looked_at.display()));
                return found;
            }
        };
        let mount = roots
            .proc("self/mountinfo")
            .and_then(|text| mount_of(&text, &looked_at.canonicalize().ok()?));
        let device_path = mount.as_ref().map(|mount| mount.source.clone());
        let probed = DirectoryProbe::run(&handle, &looked_at);
        found.file_system = Some(probed.file_system);
        found.free_bytes = probed.free_bytes;
        match probed.transfers {
            Ok((direct, flush)) => {
                found.direct_io = if direct == io::DirectIo::Refused {
                    DirectIo::Refused
                } else {
                    DirectIo::Works
                };
                found.flush = Some(flush);
            }
            Err(e) => found.unwritable = Some(e.to_string()),
        }
        let own = handle.metadata().ok().map(|meta| meta.dev());
        let behind = || {
            let meta = std::fs::metadata(device_path?).ok()?;
            meta.file_type().is_block_device().then(|| meta.rdev())
        };
        found.device = own
            .and_then(|dev| BlockDevice::look(&roots.sys, dev))
            .or_else(|| BlockDevice::look(&roots.sys, behind()?));
        found
    }
}

/// `path`, or the nearest of its parents that exists.
fn nearest(path: &Path) -> PathBuf {
    let existing = path
        .ancestors()
        .filter(|p| !p.as_os_str().is_empty())
        .find(|p| p.symlink_metadata().is_ok());
    existing.unwrap_or(Path::new(".")).to_owned()
}
