//! How writes become durable, and which method suits a medium.
//!
//! Invariants
//! 1. [`choose`] is a pure function of [`DeviceTraits`] and the user's choice.
//! 2. A method that would lose data on the medium is never chosen, and is refused if the user asks
//!    for it.

use crate::base::error::{Error, Result};
use crate::io::media::DeviceTraits;
use std::fmt;

/// How writes become durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
pub enum FlushMethod {
    /// One `fdatasync` for each file that was written.
    PerFile,
    /// One `fdatasync` for all files that are flushed together.
    Shared,
    /// Log writes are durable when they complete (`RWF_DSYNC`); other files get an `fdatasync`
    /// each.
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

/// The user's choice.
#[cfg_attr(
    not(test),
    allow(dead_code, reason = "callers of the library take what suits the device")
)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FlushChoice {
    /// The method that suits the file system and the device.
    #[default]
    Auto,
    /// [`FlushMethod::PerFile`]: safe everywhere.
    PerFile,
    /// [`FlushMethod::Shared`]; refused where it would lose data. On XFS the user must make sure
    /// that no file of the store is ever copied by reference (`cp --reflink`, the default of `cp`):
    /// the first write to such a file is not a plain overwrite, and only a flush of that very file
    /// makes it durable.
    Shared,
    /// [`FlushMethod::Dsync`].
    Dsync,
}

/// The flush method for such a device.
///
/// # Errors
/// `Invalid` if the user's choice would lose data on it.
pub fn choose(traits: &DeviceTraits, choice: FlushChoice) -> Result<FlushMethod> {
    match choice {
        FlushChoice::PerFile => Ok(FlushMethod::PerFile),
        FlushChoice::Dsync => Ok(FlushMethod::Dsync),
        FlushChoice::Auto if traits.surely_direct && (traits.write_through || traits.fua) => {
            Ok(FlushMethod::Dsync)
        }
        FlushChoice::Auto if prefers_shared(traits) && obstacle(traits).is_none() => {
            Ok(FlushMethod::Shared)
        }
        FlushChoice::Auto => Ok(FlushMethod::PerFile),
        FlushChoice::Shared => match obstacle(traits) {
            None => Ok(FlushMethod::Shared),
            Some(why) => Err(Error::invalid(format_args!(
                "one flush can't stand for all files of this store, because {why}: choose another \
                 flush method"
            ))),
        },
    }
}

/// Whether one flush stands for all files without a promise by the user. XFS needs one: see
/// [`FlushChoice::Shared`].
fn prefers_shared(traits: &DeviceTraits) -> bool {
    traits.one_descriptor || traits.file_system == "ext4"
}

/// Why one `fdatasync` does not cover the other files, if it does not.
fn obstacle(traits: &DeviceTraits) -> Option<String> {
    if traits.one_descriptor {
        return None;
    }
    if !["ext4", "xfs"].contains(&traits.file_system.as_str()) {
        return Some(format!("{} does not promise that", traits.file_system));
    }
    if !traits.one_device {
        return Some("they are on several devices".into());
    }
    if !traits.surely_direct {
        return Some(
            "transfers go through the page cache, or the kernel can't say (before Linux 6.1)"
                .into(),
        );
    }
    None
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
            one_descriptor: false,
            write_through: false,
            fua: false,
        }
    }

    /// One flush for all files, where that is not enough, loses acknowledged commits at a power
    /// loss.
    #[test]
    fn one_flush_stands_for_all_files_only_where_that_is_safe() {
        use FlushChoice::{Auto, Shared};
        assert_eq!(choose(&traits("ext4"), Auto).unwrap(), FlushMethod::Shared);
        assert_eq!(choose(&traits("xfs"), Auto).unwrap(), FlushMethod::PerFile);
        assert_eq!(choose(&traits("xfs"), Shared).unwrap(), FlushMethod::Shared);
        let buffered = DeviceTraits { surely_direct: false, ..traits("ext4") };
        let scattered = DeviceTraits { one_device: false, ..traits("ext4") };
        let one_descriptor = DeviceTraits { one_descriptor: true, ..traits("tmpfs") };
        assert_eq!(choose(&one_descriptor, Auto).unwrap(), FlushMethod::Shared);
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
