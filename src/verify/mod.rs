//! Reads a closed store whole, and names what is damaged.
//!
//! ```text
//! superblock copies --> roots, extent table --> map nodes --> pages
//!                                                   |
//!           summaries, live counts  <--- blocks that the map names
//!           log: its recorded end (closed cleanly), or the scan that a recovery would make
//! ```
//! Invariants
//! 1. Everything that the superblock leads to is read once and compared with its sum, and each count that is stored is
//!    compared with the one found.
//! 2. Damage does not end the search: whatever can still be reached is read.
//! 3. Nothing is written, and no damaged byte is interpreted.
//! 4. Where the map reaches less than is counted as live, pages may be gone: they are named (`lost`).
//!
//! It does *not* repair, and does not look at bytes that nothing refers to.

#[cfg(test)]
mod damage_tests;
mod extents;
mod head;
mod log;
mod lost;
mod map;

use crate::disk::portable::{Access, PortableDisk};
use crate::disk::{Disk, FileId};
use crate::error::{Error, ErrorKind, Result};
use crate::pool::Arena;
use crate::recovery::read_bytes;
use crate::types::VolumeId;
use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

/// Blocks of memory for reading: room for the largest vectored read.
const ARENA_BLOCKS: u32 = 512;
/// Damages that are listed; more are only counted, since a lost device would fill the memory with them.
const DAMAGED_MAX: usize = 1000;

/// One damaged structure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damage {
    /// What it is, by name: `page v1/p12`, `superblock copy 2`.
    pub structure: String,
    /// The file.
    pub file: FileId,
    /// The first byte of the structure in the file.
    pub offset: u64,
    /// What is wrong with it.
    pub what: String,
    /// What can't be read, or not be relied on, because of it.
    pub affects: String,
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Damage { structure, file, offset, what, affects } = self;
        write!(f, "{structure} (byte {offset} of file {file}) {what}; affected: {affects}")
    }
}

/// What [`verify`] found. `Display` sums it up in a few lines, without the list of damages.
#[derive(Clone, Debug, Default)]
pub struct VerifyReport {
    /// The damaged structures, at most 1,000 of them.
    pub damaged: Vec<Damage>,
    /// Damaged structures beyond those listed.
    pub damaged_more: u64,
    /// What is not damage, and worth knowing.
    pub notes: Vec<String>,
    /// The store was closed cleanly. If not, commits may be in the log that this did not read as pages.
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
}

impl fmt::Display for VerifyReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for note in &self.notes {
            writeln!(f, "note: {note}")?;
        }
        let VerifyReport { pages, nodes, extents, groups, .. } = self;
        write!(f, "read {pages} pages, {nodes} map nodes, {extents} extent summaries, {groups} log groups: ")?;
        match self.damaged.len() as u64 + self.damaged_more {
            0 => write!(f, "all whole"),
            1 => write!(f, "1 is damaged"),
            n => write!(f, "{n} are damaged"),
        }
    }
}

/// Reads the closed store in `dir` whole and names what is damaged. Changes nothing.
///
/// # Errors
/// `NotFound` if there is no store, `InUse` if a process has it open, `Unsupported` for another format version, `Io`
/// if its files can't be opened. Damage is no error: it is in the report.
pub fn verify(dir: &Path) -> Result<VerifyReport> {
    let mut disk = PortableDisk::open(dir, Access::ReadOnly)?;
    verify_disk(&mut disk)
}

/// The same on any disk.
pub(crate) fn verify_disk(disk: &mut dyn Disk) -> Result<VerifyReport> {
    let meta_bytes = disk.len(FileId::Meta)?;
    if meta_bytes.is_none() {
        return Err(Error::new(ErrorKind::NotFound, "there is no store: its file meta is missing"));
    }
    let (arena, report) = (Arena::new(ARENA_BLOCKS)?, VerifyReport::default());
    let mut this = Verifier { disk, arena, report, volumes: BTreeMap::new() };
    let Some(superblock) = this.superblock()? else { return Ok(this.report) };
    this.report.clean = superblock.clean;
    if !superblock.clean {
        let note = "the store was not closed cleanly: what is below is its last checkpoint; open it once to recover what \
                    the log adds, close it, and verify again";
        this.report.notes.push(note.into());
    }
    let roots = this.roots(&superblock);
    let mut extents = this.table(&superblock);
    this.map(&superblock, &roots, &mut extents);
    this.summaries(&superblock, &roots, &extents);
    this.log(&superblock);
    Ok(this.report)
}

/// The disk, and what was found so far.
struct Verifier<'a> {
    disk: &'a mut dyn Disk,
    arena: Arena,
    report: VerifyReport,
    /// Names of volumes, as far as the catalog has been read.
    volumes: BTreeMap<VolumeId, String>,
}

impl Verifier<'_> {
    fn read(&mut self, file: FileId, offset: u64, len: usize) -> Result<Vec<u8>> {
        let end = self.disk.len(file)?.unwrap_or(0);
        if offset + len as u64 > end {
            return Err(Error::corrupt(format_args!("lies beyond the end of the file, which has {end} bytes")));
        }
        read_bytes(self.disk, &mut self.arena, file, offset, len)
            .map_err(|error| Error::corrupt(format_args!("can't be read: {error}")))
    }

    /// A volume in words.
    fn volume(&self, volume: VolumeId) -> String {
        match self.volumes.get(&volume) {
            _ if volume == VolumeId::CATALOG => "the catalog".into(),
            Some(name) => format!("volume {name}"),
            None => format!("volume number {}", volume.get()),
        }
    }

    fn damaged(
        &mut self,
        structure: impl fmt::Display,
        (file, offset): (FileId, u64),
        what: impl fmt::Display,
        affects: impl fmt::Display,
    ) {
        if self.report.damaged.len() == DAMAGED_MAX {
            self.report.damaged_more += 1;
            return;
        }
        let (structure, what, affects) = (structure.to_string(), what.to_string(), affects.to_string());
        self.report.damaged.push(Damage { structure, file, offset, what, affects });
    }
}
