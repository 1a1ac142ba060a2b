//! The report of a disk: in one line, what was found when it was opened.
//!
//! It does *not* decide anything.

use super::flush::FlushMethod;
use std::fmt;

/// Whether the driver polls the device for completions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Polling {
    /// The driver polls.
    On,
    /// The driver does not poll, for this reason.
    Off(String),
}

/// What a disk offers, as found when it was opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskReport {
    /// The driver: `io_uring` or `portable`.
    pub driver: &'static str,
    /// The file system's name, or its magic number.
    pub file_system: String,
    /// Whether transfers bypass the page cache.
    pub direct: bool,
    /// How writes become durable.
    pub flush: FlushMethod,
    /// The most operations that are at the device at a time.
    pub depth: usize,
    /// Entries of the ring; 0 without one.
    pub ring_entries: u32,
    /// Bytes of memory registered with the kernel, which it then need not look up for each
    /// transfer.
    pub fixed_bytes: u64,
    /// Bytes of memory that were offered for registration.
    pub offered_bytes: u64,
    /// Whether the driver polls for completions.
    pub polling: Polling,
    /// Why the preferred driver is not used.
    pub fallback: Option<String>,
}

impl DiskReport {
    /// The report for a store without a disk.
    pub fn none() -> Self {
        DiskReport {
            driver: "none",
            file_system: "no file system".into(),
            direct: false,
            flush: FlushMethod::PerFile,
            depth: 0,
            ring_entries: 0,
            fixed_bytes: 0,
            offered_bytes: 0,
            polling: Polling::Off("there is no device".into()),
            fallback: None,
        }
    }
}

impl fmt::Display for DiskReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let how = if self.direct {
            "direct I/O"
        } else {
            "buffered I/O (no direct I/O on this file system)"
        };
        f.write_str(self.driver)?;
        if let Some(why) = &self.fallback {
            write!(f, ", because {why},")?;
        }
        write!(f, " on {}, {how}, {}, depth {}", self.file_system, self.flush, self.depth)?;
        if self.ring_entries == 0 {
            return Ok(());
        }
        write!(f, ", ring of {} entries", self.ring_entries)?;
        if self.offered_bytes > 0 {
            let mib = |bytes: u64| bytes as f64 / (1 << 20) as f64;
            write!(
                f,
                ", {:.1} of {:.1} MiB registered",
                mib(self.fixed_bytes),
                mib(self.offered_bytes)
            )?;
        }
        match &self.polling {
            Polling::On => write!(f, ", polled"),
            Polling::Off(why) => write!(f, ", not polled ({why})"),
        }
    }
}
