//! What a store in a directory would find there: asked before there is one.

use super::flush::{FlushChoice, FlushMethod, choose};
use super::media::{DeviceTraits, DirectIo, file_system, free_bytes, try_direct};
use crate::base::error::Result;
use std::fs::File;
use std::path::Path;

/// What a store in a directory would find there.
pub(crate) struct Prospect {
    /// The file system's name, or its magic number.
    pub file_system: String,
    /// Bytes that this user may still fill, if the file system says.
    pub free_bytes: Option<u64>,
    /// Whether direct I/O works there, and how writes would become durable.
    pub transfers: Result<(DirectIo, FlushMethod)>,
}

impl Prospect {
    /// Tries it in `directory`, which is `path`; leaves nothing behind.
    pub(crate) fn of(directory: &File, path: &Path) -> Prospect {
        let transfers = try_direct(directory, path).and_then(|direct| {
            let surely_direct = direct == DirectIo::Vouched;
            let traits = DeviceTraits { surely_direct, one_device: true, ..DeviceTraits::look(directory) };
            Ok((direct, choose(&traits, FlushChoice::Auto)?))
        });
        Prospect { file_system: file_system(directory), free_bytes: free_bytes(directory), transfers }
    }
}
