//! The result of a verification: damages, with their positions, what they affect and what mends
//! them.
//!
//! Invariants
//! 1. The list is bounded ([`DAMAGED_MAX`]); further damages are only counted.
//! 2. What is said to mend a damage does: `src/ops/verify/store_damage_tests.rs` damages each
//!    structure and tries it.
//!
//! It does *not* print; it implements `Display`.

use crate::base::{BLOCK, PageId};
use crate::io::FileId;
use std::fmt;

/// Damages that are listed; more are only counted, since a lost device would fill the memory with
/// them.
pub(super) const DAMAGED_MAX: usize = 1000;

/// Bytes of a volume that can't be read.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct VolumeBytes {
    /// The volume's name, or its number if that can't be read.
    pub volume: String,
    /// The first byte, as clients of the volume count.
    pub offset: u64,
    /// The number of bytes.
    pub length: u64,
    /// Whether all of these bytes are affected. If not, pages of other virtual shards lie among
    /// them, which are not.
    pub all: bool,
}

impl VolumeBytes {
    /// All of the pages `first` to `last`; `None` for ids beyond the largest volume of bytes, which only
    /// users of the library can have.
    pub(super) fn of(volume: String, first: PageId, last: PageId) -> Option<VolumeBytes> {
        let offset = first.get().checked_mul(BLOCK as u64)?;
        let end = last.get().checked_add(1)?.checked_mul(BLOCK as u64)?;
        Some(VolumeBytes { volume, offset, length: end.checked_sub(offset)?, all: true })
    }

    /// The last byte.
    pub fn last(&self) -> u64 {
        self.offset + self.length.saturating_sub(1)
    }
}

/// How a damage can be mended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mend {
    /// Writing the page anew.
    Overwrite,
    /// An opening and a clean close.
    Reopen,
    /// Writing anew the pages in an extent.
    Rewrite,
    /// Copying what can still be read into another store.
    CopyOut,
    /// A backup of the whole directory.
    Restore,
}

impl Mend {
    /// The variant in one word, for programs.
    pub fn name(self) -> &'static str {
        match self {
            Mend::Overwrite => "overwrite",
            Mend::Reopen => "reopen",
            Mend::Rewrite => "rewrite",
            Mend::CopyOut => "copy_out",
            Mend::Restore => "restore",
        }
    }
}

impl fmt::Display for Mend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Mend::Overwrite => {
                "writing these bytes again, whole pages of 4096 at a time, or trimming them: then \
                 they read as zeros"
            }
            Mend::Reopen => {
                "opening the store and closing it cleanly (`corepage serve`, then SIGTERM)"
            }
            Mend::Rewrite => {
                "nothing needs to be done at once; writing or trimming all that lies in this \
                 extent ends it"
            }
            Mend::CopyOut => {
                "copying what can still be read into a new store, or restoring a backup of the \
                 whole directory"
            }
            Mend::Restore => "restoring a backup of the whole directory",
        })
    }
}

/// One damaged structure.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Damage {
    /// Its name: `page v1/p12`, `superblock copy 2`.
    pub structure: String,
    /// The file.
    pub file: FileId,
    /// The first byte of the structure in the file.
    pub offset: u64,
    /// What is wrong with it.
    pub what: String,
    /// What can't be read, or can't be relied on, because of it.
    pub affects: String,
    /// The bytes of a volume that can't be read, if the damage affects only them.
    pub bytes: Option<VolumeBytes>,
    /// What mends it.
    pub mend: Mend,
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Damage { structure, file, offset, what, affects, mend, .. } = self;
        write!(
            f,
            "{structure} (byte {offset} of file {file}) {what}; affected: {affects}; mended by \
             {mend}"
        )
    }
}

/// What [`verify`](super::verify) found. `Display` sums it up in a few lines, without the list of
/// damages.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct VerifyReport {
    /// The damaged structures, at most 1,000 of them.
    pub damaged: Vec<Damage>,
    /// Damaged structures beyond those listed.
    pub damaged_more: u64,
    /// Notes that are worth knowing and not about damage.
    pub notes: Vec<String>,
    /// The store was closed cleanly. If not, the log may hold commits whose pages were not read.
    pub clean: bool,
    /// Pages read and compared.
    pub pages: u64,
    /// Map nodes read and compared.
    pub nodes: u64,
    /// Extents with a summary.
    pub extents: u64,
    /// Log groups read and compared.
    pub groups: u64,
}

impl VerifyReport {
    /// Whether nothing is damaged.
    pub fn is_whole(&self) -> bool {
        self.damaged.is_empty()
    }

    /// The number of damaged structures, listed or not.
    pub fn damaged_count(&self) -> u64 {
        self.damaged.len() as u64 + self.damaged_more
    }

    pub(super) fn add(&mut self, damage: Damage) {
        if self.damaged.len() == DAMAGED_MAX {
            self.damaged_more += 1;
        } else {
            self.damaged.push(damage);
        }
    }
}

impl fmt::Display for VerifyReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for note in &self.notes {
            writeln!(f, "note: {note}")?;
        }
        let VerifyReport { pages, nodes, extents, groups, .. } = self;
        write!(
            f,
            "read {pages} pages, {nodes} map nodes, {extents} extent summaries, {groups} log \
             groups: "
        )?;
        match self.damaged_count() {
            0 => write!(f, "all whole"),
            1 => write!(f, "1 is damaged"),
            n => write!(f, "{n} are damaged"),
        }
    }
}

/// The progress of a verification.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct VerifyProgress {
    /// Bytes read.
    pub bytes_done: u64,
    /// Bytes to read in all, by the superblock and the extent table; 0 until these are read.
    pub bytes_total: u64,
}
