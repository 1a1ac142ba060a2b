//! File names, and the role that each name stands for.
//!
//! Invariants
//! 1. Each role has exactly one name.
//! 2. A directory without the first log segment holds no store, since creation begins with that
//!    file. If it has other files with a store's names, they belong to something else, and opening
//!    is refused.

use super::FIRST;
use crate::base::error::{Error, Result};
use crate::base::{SegmentNo, ShardId};
use crate::io::FileId;
use crate::io::media::{Creation, no_store};
use std::path::Path;

/// The files in a directory whose names are those of a store's files, in a fixed order.
pub(super) fn store_files(path: &Path) -> Result<Vec<FileId>> {
    let context = |e| Error::io(format_args!("listing the directory {}", path.display()), e);
    let mut ids = Vec::new();
    for entry in std::fs::read_dir(path).map_err(context)? {
        let name = entry.map_err(context)?.file_name();
        ids.extend(name.to_str().and_then(parse_name));
    }
    ids.sort();
    Ok(ids)
}

/// The inverse of [`FileId`]'s `Display`.
fn parse_name(name: &str) -> Option<FileId> {
    let id = match name {
        "meta" => FileId::Meta,
        "extents" => FileId::Table,
        "data" => FileId::Data,
        _ => {
            let (shard, segment) = name.strip_prefix("log-")?.split_once('-')?;
            FileId::Log(ShardId::new(shard.parse().ok()?), SegmentNo::new(segment.parse().ok()?))
        }
    };
    // "log-0-0" is not a name that we would write.
    (id.to_string() == name).then_some(id)
}

/// Invariant 2.
pub(super) fn refuse_foreign(path: &Path, ids: &[FileId], creation: Creation) -> Result<()> {
    match ids.iter().find(|id| **id != FIRST) {
        Some(foreign) if !ids.contains(&FIRST) => Err(Error::invalid(format_args!(
            "{} has a file `{foreign}` but no `{FIRST}`, so it is not a store, or only a part of \
             one: use another directory, or bring the missing files back",
            path.display()
        ))),
        _ if ids.is_empty() && creation == Creation::Refused => Err(no_store(path)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A user's file that looks like one of ours must not be taken for it.
    #[test]
    fn file_names_have_one_form() {
        let log = |shard, segment| FileId::Log(ShardId::new(shard), SegmentNo::new(segment));
        for id in [FileId::Meta, FileId::Table, FileId::Data, log(0, 0), log(1000, 12345)] {
            assert_eq!(parse_name(&id.to_string()), Some(id));
        }
        for name in ["log-0-0", "log-000-0000x", "Meta", "log-+00-0000", ""] {
            assert_eq!(parse_name(name), None, "{name}");
        }
    }
}
