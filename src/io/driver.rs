//! A disk for a single thread outside of the runtime, such as a verifier: a ring where io_uring
//! works, else threads.
//!
//! It does *not* serve the runtime, whose threads choose their driver before they start.

use super::Disk;
use super::files::Files;
use super::threads::{PortableDisk, PortableOptions};
use super::uring::{UringDisk, UringOptions};
use crate::base::error::{ErrorKind, Result};
use std::sync::Arc;

/// A disk over these files, for the thread that calls this.
///
/// # Errors
/// `Io` if threads or descriptors run out.
pub(crate) fn disk_over(files: Arc<Files>) -> Result<Box<dyn Disk>> {
    match UringDisk::with_files(files.clone(), &UringOptions::default()) {
        Ok(disk) => return Ok(Box::new(disk)),
        Err(e) if e.kind() == ErrorKind::Unsupported => tracing::debug!("portable driver: {e}"),
        Err(e) => return Err(e),
    }
    Ok(Box::new(PortableDisk::with_files(files, &PortableOptions::default())?))
}
