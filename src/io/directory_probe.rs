//! Probes what a directory offers a store: its file system, its space, direct I/O and the flush
//! method.
//!
//! It does *not* open or create a store, and leaves nothing behind.

use super::flush::{FlushChoice, FlushMethod, choose};
use super::media::{DeviceTraits, DirectIo, file_system, free_bytes, try_direct};
use crate::base::error::Result;
use std::fs::File;
use std::path::Path;

/// What a directory offers a store.
pub(crate) struct DirectoryProbe {
    /// The file system's name, or its magic number.
    pub file_system: String,
    /// Bytes that this user may still fill, if the file system reports them.
    pub free_bytes: Option<u64>,
    /// Whether direct I/O works, and how writes would become durable.
    pub transfers: Result<(DirectIo, FlushMethod)>,
}

impl DirectoryProbe {
    /// Probes `directory`, which is at `path`.
    pub(crate) fn run(directory: &File, path: &Path) -> DirectoryProbe {
        let transfers = try_direct(directory, path).and_then(|direct| {
            let surely_direct = direct == DirectIo::Vouched;
            let traits =
                DeviceTraits { surely_direct, one_device: true, ..DeviceTraits::look(directory) };
            Ok((direct, choose(&traits, FlushChoice::Auto)?))
        });
        DirectoryProbe {
            file_system: file_system(directory),
            free_bytes: free_bytes(directory),
            transfers,
        }
    }
}
