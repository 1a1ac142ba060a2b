//! The oldest supported kernel, checked before a file is touched.
//!
//! It does *not* probe individual features; each is probed where it is used.

use crate::base::error::{Error, ErrorKind, Result};

/// Major and minor number. Direct I/O, `preadv`, `pwritev`, `fallocate` and `flock` on all
/// supported file systems are older; 4.14 is the oldest kernel that we promise to support, not the
/// point where something breaks.
const OLDEST: (u32, u32) = (4, 14);

/// Refuses an older kernel.
///
/// # Errors
/// `Unsupported`, with both versions.
pub(crate) fn check() -> Result<()> {
    let uname = rustix::system::uname();
    check_release(&uname.release().to_string_lossy())
}

fn check_release(release: &str) -> Result<()> {
    let mut numbers =
        release.split(|c: char| !c.is_ascii_digit()).map_while(|part| part.parse::<u32>().ok());
    let version = numbers.next().zip(numbers.next());
    match version {
        Some(version) if version < OLDEST => Err(Error::new(
            ErrorKind::Unsupported,
            format_args!("this is Linux {release}; {}.{} or newer is needed", OLDEST.0, OLDEST.1),
        )),
        // A release that does not begin with two numbers is a custom kernel, which is allowed.
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An old kernel must be told from a new one, and an unusual version name must not lock a user
    /// out.
    #[test]
    fn old_kernels_are_refused_and_others_are_not() {
        for release in
            ["4.14.0", "4.19.0-27-amd64", "5.4", "6.18.44-fc-v595", "10.0.1", "custom", ""]
        {
            assert!(check_release(release).is_ok(), "{release}");
        }
        for release in ["4.13.9", "3.10.0-1160.el7.x86_64", "2.6.32"] {
            assert_eq!(check_release(release).expect_err(release).kind(), ErrorKind::Unsupported);
        }
        assert!(check().is_ok());
    }
}
