//! What the file system and the device below it are like, and which way of flushing follows from that.
//!
//! Invariants
//! 1. [`choose`] is a pure function of [`DeviceTraits`] and the user's choice.
//! 2. What is not known for sure counts as the careful answer.
//!
//! It does *not* measure, and it trusts what the device says of its cache.

use super::block::BlockDevice;
use super::trial::try_direct;
use crate::base::error::{Error, Result};
use rustix::fs::{AtFlags, StatxFlags};
use serde::Serialize;
use std::fmt;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// How writes become durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FlushMethod {
    /// One `fdatasync` for each file that was written.
    PerFile,
    /// One `fdatasync` for all files that are to be flushed at a time.
    Shared,
    /// Log writes are durable when they complete (`RWF_DSYNC`); other files get an `fdatasync` each.
    Dsync,
}

impl fmt::Display for FlushMethod {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            FlushMethod::PerFile => "fdatasync per file",
            FlushMethod::Shared => "one fdatasync for all files",
            FlushMethod::Dsync => "durable log writes (RWF_DSYNC)",
        })
    }
}

/// What the user wants.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FlushChoice {
    /// What suits file system and device.
    #[default]
    Auto,
    /// [`FlushMethod::PerFile`]: safe everywhere.
    PerFile,
    /// [`FlushMethod::Shared`]; refused where it would lose data. On XFS it is up to the user that no file of the
    /// store is ever copied by reference (`cp --reflink`, the default of `cp`): the first write to such a file is no
    /// plain overwrite, and only a flush of that very file makes it durable.
    Shared,
    /// [`FlushMethod::Dsync`].
    Dsync,
}

/// What the choice depends on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceTraits {
    /// The file system's name, or its magic number.
    pub file_system: String,
    /// Whether transfers pass the page cache by, and the kernel vouches for it (statx, Linux 6.1). ext4 accepts the
    /// flag and uses the cache all the same where it journals data.
    pub surely_direct: bool,
    /// Whether all files of the store are on the device of their directory.
    pub one_device: bool,
    /// Whether the device has no cache that a power loss empties.
    pub write_through: bool,
    /// Whether the device can make a single write durable (FUA).
    pub fua: bool,
}

/// The way of flushing for such a device.
///
/// # Errors
/// `Invalid` if what the user wants would lose data there.
pub fn choose(traits: &DeviceTraits, choice: FlushChoice) -> Result<FlushMethod> {
    match choice {
        FlushChoice::PerFile => Ok(FlushMethod::PerFile),
        FlushChoice::Dsync => Ok(FlushMethod::Dsync),
        FlushChoice::Auto if traits.surely_direct && (traits.write_through || traits.fua) => Ok(FlushMethod::Dsync),
        FlushChoice::Auto if traits.file_system == "ext4" && obstacle(traits).is_none() => Ok(FlushMethod::Shared),
        FlushChoice::Auto => Ok(FlushMethod::PerFile),
        FlushChoice::Shared => match obstacle(traits) {
            None => Ok(FlushMethod::Shared),
            Some(why) => Err(Error::invalid(format_args!(
                "one flush can't stand for all files of this store, because {why}: choose another flush method"
            ))),
        },
    }
}

/// Why one `fdatasync` does not cover the other files.
fn obstacle(traits: &DeviceTraits) -> Option<String> {
    if !["ext4", "xfs"].contains(&traits.file_system.as_str()) {
        return Some(format!("{} does not promise that", traits.file_system));
    }
    if !traits.one_device {
        return Some("they are on several devices".into());
    }
    if !traits.surely_direct {
        return Some("transfers go through the page cache, or the kernel can't say (before Linux 6.1)".into());
    }
    None
}

/// Looks at the directory's file system and at the device below it.
pub(super) fn look(handle: &File, surely_direct: bool, one_device: bool) -> DeviceTraits {
    let device = handle.metadata().ok().and_then(|meta| BlockDevice::look(Path::new("/sys"), meta.dev()));
    let device = device.unwrap_or_default();
    DeviceTraits {
        file_system: file_system(handle),
        surely_direct,
        one_device,
        write_through: device.write_cache.is_some_and(|cache| cache == "write through"),
        fua: device.fua == Some(true),
    }
}

/// What a store in a directory would find there.
pub(crate) struct Prospect {
    /// The file system's name, or its magic number.
    pub file_system: String,
    /// Bytes that this user may still fill, if the file system says.
    pub free_bytes: Option<u64>,
    /// Whether transfers pass the page cache by, and how writes become durable.
    pub transfers: Result<(bool, FlushMethod)>,
}

impl Prospect {
    /// Tries it in `directory`, which is `path`; leaves nothing behind.
    pub(crate) fn of(directory: &File, path: &Path) -> Prospect {
        let transfers = try_direct(directory, path).and_then(|(works, surely)| {
            let flush = choose(&look(directory, surely, true), FlushChoice::Auto)?;
            Ok((works, flush))
        });
        Prospect { file_system: file_system(directory), free_bytes: free_bytes(directory), transfers }
    }
}

/// Whether the kernel says that it transfers directly; `None` if it does not say.
pub(super) fn says_direct(file: &File) -> Option<bool> {
    let stat = rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).ok()?;
    (stat.stx_mask & StatxFlags::DIOALIGN.bits() != 0).then_some(stat.stx_dio_offset_align != 0)
}

/// Bytes that this user may still fill, if the file system says; those in memory say nothing: no blocks, none free.
pub(super) fn free_bytes(handle: impl AsFd) -> Option<u64> {
    let stat = rustix::fs::fstatvfs(handle).ok().filter(|stat| stat.f_blocks > 0)?;
    Some(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// The name of the file system, from the magic numbers of statfs(2).
fn file_system(handle: impl AsFd) -> String {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::error::ErrorKind;

    fn traits(file_system: &str) -> DeviceTraits {
        DeviceTraits {
            file_system: file_system.into(),
            surely_direct: true,
            one_device: true,
            write_through: false,
            fua: false,
        }
    }

    /// One flush for all files where that is not enough loses acknowledged commits at a power loss.
    #[test]
    fn one_flush_stands_for_all_files_only_where_that_is_safe() {
        use FlushChoice::{Auto, Shared};
        assert_eq!(choose(&traits("ext4"), Auto).unwrap(), FlushMethod::Shared);
        assert_eq!(choose(&traits("xfs"), Auto).unwrap(), FlushMethod::PerFile);
        assert_eq!(choose(&traits("xfs"), Shared).unwrap(), FlushMethod::Shared);
        let buffered = DeviceTraits { surely_direct: false, ..traits("ext4") };
        let scattered = DeviceTraits { one_device: false, ..traits("ext4") };
        for unfit in [traits("btrfs"), traits("tmpfs"), traits("fuse"), buffered, scattered] {
            assert_eq!(choose(&unfit, Auto).unwrap(), FlushMethod::PerFile, "{unfit:?}");
            let error = choose(&unfit, Shared).expect_err("it would lose data");
            assert_eq!(error.kind(), ErrorKind::Invalid);
        }
    }

    /// A device with a volatile cache and no FUA would be slow, not unsafe; the user may insist.
    #[test]
    fn log_writes_are_durable_by_themselves_where_the_device_can() {
        let through = DeviceTraits { write_through: true, ..traits("xfs") };
        let fua = DeviceTraits { fua: true, ..traits("ext4") };
        assert_eq!(choose(&through, FlushChoice::Auto).unwrap(), FlushMethod::Dsync);
        assert_eq!(choose(&fua, FlushChoice::Auto).unwrap(), FlushMethod::Dsync);
        assert_eq!(choose(&traits("ext4"), FlushChoice::Dsync).unwrap(), FlushMethod::Dsync);
        assert_eq!(choose(&fua, FlushChoice::PerFile).unwrap(), FlushMethod::PerFile);
    }
}
