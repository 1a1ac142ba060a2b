//! The directory of the store: its file system, whether direct I/O works there, and the block device behind it.
//!
//! 1. A directory that does not exist is judged by its nearest parent that does; nothing is made.

use super::Roots;
use super::mounts::mount_of;
use crate::disk::portable::{file_system, free_bytes, try_direct};
use serde::Serialize;
use std::fs::{self, File};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Whether transfers can pass the page cache by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum DirectIo {
    /// A block was written and read.
    Works,
    /// The file system refuses it.
    Refused,
    /// The directory can't be written, so it can't be tried.
    Unknown,
}

/// A directory, and what is under it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Directory {
    /// As it was named.
    pub path: PathBuf,
    /// Where it was looked: the same, or its nearest parent.
    pub looked_at: PathBuf,
    /// Why it can't be written.
    pub unwritable: Option<String>,
    /// The file system.
    pub file_system: Option<String>,
    /// Bytes that this user may still fill.
    pub free_bytes: Option<u64>,
    /// Whether direct I/O works.
    pub direct_io: DirectIo,
    /// The device, where there is one.
    pub device: Option<Device>,
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
            direct_io: DirectIo::Unknown,
            device: None,
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
        let mount = roots.proc("self/mountinfo").and_then(|text| mount_of(&text, &looked_at.canonicalize().ok()?));
        let device_path = mount.as_ref().map(|mount| mount.source.clone());
        found.file_system = Some(file_system(&handle));
        found.free_bytes = free_bytes(&handle);
        match try_direct(&handle, &looked_at) {
            Ok(works) => found.direct_io = if works { DirectIo::Works } else { DirectIo::Refused },
            Err(e) => found.unwritable = Some(e.to_string()),
        }
        let own = handle.metadata().ok().map(|meta| meta.dev());
        let behind = || {
            let meta = fs::metadata(device_path?).ok()?;
            meta.file_type().is_block_device().then(|| meta.rdev())
        };
        found.device = own.and_then(|dev| Device::look(roots, dev)).or_else(|| Device::look(roots, behind()?));
        found
    }
}

/// `path`, or the nearest of its parents that exists.
fn nearest(path: &Path) -> PathBuf {
    let existing = path.ancestors().filter(|p| !p.as_os_str().is_empty()).find(|p| p.symlink_metadata().is_ok());
    existing.unwrap_or(Path::new(".")).to_owned()
}

/// A block device, as the kernel describes it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Device {
    /// `vda`, `nvme0n1`; of the whole device.
    pub name: String,
    /// Major and minor number, as in `/sys/dev/block`; of the partition, if it is one.
    pub number: String,
    /// The partition on it.
    pub partition: Option<String>,
    /// What it is made of, if other devices or a file are under it.
    pub on: Vec<String>,
    /// An NVMe device.
    pub nvme: bool,
    /// Whether it has a cache that a flush must empty; `write back`, or `write through` where a completed write is
    /// durable.
    pub write_cache: Option<String>,
    /// Whether it can make a single write durable.
    pub fua: Option<bool>,
    /// Whether completions can be polled.
    pub io_poll: Option<bool>,
    /// Whether it turns; absent for devices of virtual machines, of which the kernel says so whatever they are.
    pub rotational: Option<bool>,
    /// The smallest transfer.
    pub logical_block_bytes: Option<u32>,
    /// The smallest that it does not have to read before it writes.
    pub physical_block_bytes: Option<u32>,
}

impl Device {
    /// The device with the number `dev`; `None` if it is none (tmpfs, btrfs, network file systems).
    pub(super) fn look(roots: &Roots, dev: u64) -> Option<Device> {
        let number = format!("{}:{}", rustix::fs::major(dev), rustix::fs::minor(dev));
        let own = roots.sys.join("dev/block").join(&number).canonicalize().ok()?;
        let name_of = |path: &Path| path.file_name().map(|name| name.to_string_lossy().into_owned());
        let is_partition = own.join("partition").exists();
        let whole = if is_partition { own.parent()?.to_owned() } else { own.clone() };
        let name = name_of(&whole)?;
        let queue = |field: &str| super::text(&whole.join("queue").join(field));
        let flag = |field: &str| queue(field).map(|text| text != "0");
        let number_of = |field: &str| queue(field)?.parse().ok();
        let mut on: Vec<String> = fs::read_dir(whole.join("slaves"))
            .map(|list| list.filter_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned())).collect())
            .unwrap_or_default();
        on.sort();
        on.extend(super::text(&whole.join("loop/backing_file")));
        Some(Device {
            number,
            partition: if is_partition { name_of(&own) } else { None },
            on,
            nvme: name.starts_with("nvme"),
            write_cache: queue("write_cache"),
            fua: flag("fua"),
            io_poll: flag("io_poll"),
            rotational: flag("rotational").filter(|_| !name.starts_with("vd") && !name.starts_with("xvd")),
            logical_block_bytes: number_of("logical_block_size"),
            physical_block_bytes: number_of("physical_block_size"),
            name,
        })
    }
}
