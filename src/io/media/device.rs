//! What the file system and the device below it can do.
//!
//! Invariants
//! 1. Whatever is not known for certain gets the cautious answer.
//!
//! It does *not* measure, and it trusts what the device says about its cache.

use super::block::BlockDevice;
use rustix::fs::{AtFlags, StatxFlags};
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// What the medium and the device below it can do. The flush method follows from it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceTraits {
    /// The file system's name, or its magic number.
    pub file_system: String,
    /// Whether transfers bypass the page cache, and the kernel vouches for it (statx, Linux 6.1).
    /// ext4 accepts the flag and still uses the cache where it journals data.
    pub surely_direct: bool,
    /// Whether all files of the store are on one device.
    pub one_device: bool,
    /// Whether all files of the store lie on one descriptor, so that a flush of it covers them all.
    pub one_descriptor: bool,
    /// Whether the device has no cache that a power loss empties.
    pub write_through: bool,
    /// Whether the device can make a single write durable (FUA).
    pub fua: bool,
}

impl DeviceTraits {
    /// Describes the file system of `handle` and the device below it. The medium adds how the files
    /// are spread and whether direct I/O works; until then the cautious answers stand.
    pub(in crate::io) fn look(handle: &File) -> DeviceTraits {
        let device = handle
            .metadata()
            .ok()
            .and_then(|meta| BlockDevice::look(Path::new("/sys"), meta.dev()));
        let device = device.unwrap_or_default();
        DeviceTraits {
            file_system: file_system(handle),
            surely_direct: false,
            one_device: false,
            one_descriptor: false,
            write_through: device.write_cache.is_some_and(|cache| cache == "write through"),
            fua: device.fua == Some(true),
        }
    }
}

/// Whether transfers of this file bypass the page cache, as the kernel reports it; `None` if it
/// does not.
pub(super) fn says_direct(file: &File) -> Option<bool> {
    let stat = rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).ok()?;
    (stat.stx_mask & StatxFlags::DIOALIGN.bits() != 0).then_some(stat.stx_dio_offset_align != 0)
}

/// Bytes that this user may still fill, if the file system reports them. Those in memory may report
/// zero blocks, none of them free, which says nothing.
pub(in crate::io) fn free_bytes(handle: impl AsFd) -> Option<u64> {
    let stat = rustix::fs::fstatvfs(handle).ok().filter(|stat| stat.f_blocks > 0)?;
    Some(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// The name of the file system, from the magic numbers of statfs(2).
pub(in crate::io) fn file_system(handle: impl AsFd) -> String {
    let Ok(stat) = rustix::fs::fstatfs(handle) else { return "an unknown file system".into() };
    let name = match stat.f_type as u32 {
        0xef53 => "ext4",
        0x5846_5342 => "xfs",
        0x9123_683e => "btrfs",
        0x0102_1994 => "tmpfs",
        0x8584_58f6 => "ramfs",
        0x794c_7630 => "overlayfs",
        0x2fc1_2fc1 => "zfs",
        0xf2f5_2010 => "f2fs",
        0x6573_5546 => "fuse",
        0x6969 => "nfs",
        0x0102_1997 => "9p",
        other => return format!("file system {other:#x}"),
    };
    name.into()
}
