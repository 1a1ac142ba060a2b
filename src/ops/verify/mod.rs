//! Reads a whole closed store, and names what is damaged.
//!
//! ```text
//! superblock copies --> roots, extent table --> map nodes --> pages
//!                                                   |
//!           summaries, live counts  <--- blocks that the map names
//!           log: its recorded end (closed cleanly), or the scan of a recovery
//! ```
//! Invariants
//! 1. Everything that can be reached from the superblock is read once and compared with its
//!    checksum, and each stored count is compared with the one found.
//! 2. Damage does not end the search: everything that can still be reached is read.
//! 3. Nothing is written, and no damaged byte is interpreted.
//! 4. Where the table counts more live blocks than the map reaches, pages may be gone: they are
//!    named (`lost`).
//!
//! It does *not* repair, and does not read bytes to which nothing refers.

#[cfg(test)]
mod damage_tests;
mod extents;
mod head;
mod inspect;
mod log;
mod lost;
mod map;
mod named;
mod read;
mod report;
#[cfg(test)]
mod store_damage_tests;

pub use inspect::{StoreSummary, VolumeSummary, inspect};
pub use report::{Damage, Mend, VerifyProgress, VerifyReport, VolumeBytes};

use crate::base::error::{Error, ErrorKind, Result};
use crate::base::{BLOCK, PageId, VolumeId};
use crate::engine::recovery::creation_is_unfinished;
use crate::format::superblock::Superblock;
use crate::io::{Access, Disk, FileId, FileOptions, Files, disk_over};
use crate::memory::Arena;
use named::Named;
use read::{ARENA_BLOCKS, Meter};
use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

/// Reads the closed store in `dir` completely and names what is damaged. It changes nothing.
/// Several processes may read a store at a time; none can open it meanwhile.
///
/// # Errors
/// `NotFound` if there is no store, `InUse` if a process has it open, `Unsupported` for another
/// format version, `Io` if its files can't be opened. Damage is not an error: it is in the report.
pub fn verify(dir: &Path) -> Result<VerifyReport> {
    verify_with(dir, |_| ())
}

/// As [`verify`], and calls `progress` after each read.
///
/// # Errors
/// As [`verify`].
pub fn verify_with(dir: &Path, mut progress: impl FnMut(VerifyProgress)) -> Result<VerifyReport> {
    let files = Files::open(dir, Access::ReadOnly, &FileOptions::default())?;
    verify_telling(disk_over(files)?.as_mut(), &mut progress)
}

/// Like [`verify`], on any disk.
#[cfg(test)]
pub(crate) fn verify_disk(disk: &mut dyn Disk) -> Result<VerifyReport> {
    verify_telling(disk, &mut |_| ())
}

fn verify_telling(
    disk: &mut dyn Disk,
    tell: &mut dyn FnMut(VerifyProgress),
) -> Result<VerifyReport> {
    let mut arena = Arena::new(ARENA_BLOCKS)?;
    require_store(disk, &mut arena)?;
    let mut this = Verifier::new(disk, arena, Meter { progress: VerifyProgress::default(), tell });
    let Some(superblock) = this.superblock()? else { return Ok(this.report) };
    this.report.clean = superblock.clean;
    if !superblock.clean {
        let note = "the store was not closed cleanly: what is below is its last checkpoint; open \
                    it once to recover what the log adds, close it, and verify again";
        this.report.notes.push(note.into());
    }
    let roots = this.roots(&superblock);
    let mut extents = this.table(&superblock);
    this.expect(&superblock, &extents);
    this.map(&superblock, &roots, &mut extents);
    this.summaries(&superblock, &roots, &extents);
    this.log(&superblock);
    Ok(this.report)
}

/// Refuses a directory without a store, or with one whose creation was interrupted.
fn require_store(disk: &mut dyn Disk, arena: &mut Arena) -> Result<()> {
    let text = if disk.len(FileId::Meta)?.is_none() {
        "there is no store: its file meta is missing"
    } else if creation_is_unfinished(disk, arena)? {
        "there is no store yet: its creation was cut short, and the next opening begins it anew"
    } else {
        return Ok(());
    };
    Err(Error::new(ErrorKind::NotFound, text))
}

/// The disk, and the results so far.
struct Verifier<'a> {
    disk: &'a mut dyn Disk,
    arena: Arena,
    report: VerifyReport,
    /// No structure that names pages or nodes is damaged. Otherwise some blocks are not named, and
    /// counts can't be compared.
    map_is_whole: bool,
    meter: Meter<'a>,
    /// Names of volumes that were found in the catalog.
    volumes: BTreeMap<VolumeId, String>,
    /// Lengths of files that were asked for.
    lengths: BTreeMap<FileId, Result<u64, String>>,
}

impl<'a> Verifier<'a> {
    fn new(disk: &'a mut dyn Disk, arena: Arena, meter: Meter<'a>) -> Self {
        let (report, volumes, lengths) =
            (VerifyReport::default(), BTreeMap::new(), BTreeMap::new());
        Verifier { disk, arena, report, map_is_whole: true, meter, volumes, lengths }
    }

    /// Reports how much there is to read, by the counts of the extent table.
    fn expect(&mut self, superblock: &Superblock, extents: &[Named]) {
        let blocks = extents.iter().map(|extent| extent.blocks_to_read(superblock)).sum::<u64>();
        self.meter.expect((blocks + log::blocks_to_read(superblock)) * BLOCK as u64);
    }

    /// How messages name a volume.
    fn volume(&self, volume: VolumeId) -> String {
        match self.volumes.get(&volume) {
            _ if volume == VolumeId::CATALOG => "the catalog".into(),
            Some(name) => format!("volume {name}"),
            None => format!("volume number {}", volume.get()),
        }
    }

    /// The bytes of a volume that its pages from `first` to `last` hold.
    fn bytes_of(&self, volume: VolumeId, first: PageId, last: PageId) -> Option<VolumeBytes> {
        if volume == VolumeId::CATALOG {
            return None;
        }
        let name = self.volumes.get(&volume).cloned();
        VolumeBytes::of(name.unwrap_or_else(|| format!("number {}", volume.get())), first, last)
    }

    fn damaged(
        &mut self,
        structure: impl fmt::Display,
        (file, offset): (FileId, u64),
        what: impl fmt::Display,
        affects: impl fmt::Display,
        mend: Mend,
    ) {
        let (structure, what, affects) =
            (structure.to_string(), what.to_string(), affects.to_string());
        self.report.add(Damage { structure, file, offset, what, affects, bytes: None, mend });
    }
}
