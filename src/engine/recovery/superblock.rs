//! Chooses the superblock: reads the four copies once, and says which of them counts and what each
//! of the others is.
//!
//! ```text
//! meta file --read--> Copies: what each of the four is --choose--> the newest, or an error
//! ```
//! Invariants
//! 1. Nothing else reads or judges copies: recovery decides by [`Copies::choose`], and `verify`
//!    reports on the same [`Copies`], more strictly.
//! 2. A copy that can't be read hides none of the others.
//! 3. If the generation that may follow the newest readable one can't be read at all, the newest is
//!    not used: the unreadable generation may have counted, and its commits would be lost.
//!
//! It does *not* write, and does not read what the superblock names (see `load`).

use super::read::read_bytes;
use crate::base::error::{Error, ErrorKind, Result};
use crate::format::FORMAT_VERSION;
use crate::format::superblock::{Refusal, SUPERBLOCK_BYTES, SUPERBLOCK_COPIES, Superblock};
use crate::io::{Disk, FileId};
use crate::memory::Arena;
use std::fmt;

/// The state of one copy.
pub(crate) enum CopyState {
    /// A superblock.
    Whole(Superblock),
    /// All zeros: a creation leaves a copy like this, and the first opening overwrites it.
    Zeros,
    /// Bytes that are not this copy of a superblock of this version.
    Refused(Refusal),
    /// The meta file ends before it, after this many bytes.
    BeyondEnd(u64),
    /// The device can't read it.
    Unread(Error),
}

impl CopyState {
    /// Whether a crash while this copy was written leaves it like this; a broken device may too.
    pub(crate) fn may_be_torn(&self) -> bool {
        matches!(self, CopyState::Zeros | CopyState::Refused(Refusal::Magic | Refusal::Sum))
    }

    fn whole(&self) -> Option<&Superblock> {
        match self {
            CopyState::Whole(superblock) => Some(superblock),
            _ => None,
        }
    }
}

/// Says what is wrong with a copy; follows its name in a message.
impl fmt::Display for CopyState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CopyState::Whole(superblock) => write!(f, "has generation {}", superblock.generation),
            CopyState::Zeros => f.write_str("is all zeros"),
            CopyState::Refused(Refusal::Magic) => f.write_str("is not a superblock"),
            CopyState::Refused(Refusal::Version(version)) => {
                write!(f, "claims to be of format version {version}")
            }
            CopyState::Refused(Refusal::Sum) => f.write_str("has a wrong checksum"),
            CopyState::Refused(Refusal::Values) => {
                f.write_str("is another copy, or contradicts itself: a write went astray")
            }
            CopyState::BeyondEnd(bytes) => {
                write!(f, "lies beyond the end of the meta file, which has {bytes} bytes")
            }
            CopyState::Unread(error) => write!(f, "can't be read: {error}"),
        }
    }
}

/// The superblock that counts.
pub(crate) struct FoundSuperblock {
    pub superblock: Superblock,
    /// Copies that can't be used.
    pub unreadable: Vec<u64>,
    /// Copies that should have the same generation and have an older one: a crash came between the
    /// two writes.
    pub behind: Vec<u64>,
    /// What is wrong with each copy that can't be used.
    pub warnings: Vec<String>,
}

/// The newest superblock, and what is wrong with the copies that can't be used.
///
/// # Errors
/// As [`Copies::read`] and [`Copies::choose`].
pub(crate) fn find_superblock(disk: &mut dyn Disk, arena: &mut Arena) -> Result<FoundSuperblock> {
    Copies::read(disk, arena)?.choose(disk)
}

/// All copies, in order.
pub(crate) struct Copies(Vec<CopyState>);

impl Copies {
    /// Reads and decodes them. Without a meta file all of them lie beyond its end.
    ///
    /// # Errors
    /// The length of the meta file can't be determined.
    pub(crate) fn read(disk: &mut dyn Disk, arena: &mut Arena) -> Result<Copies> {
        let len = disk.len(FileId::Meta)?.unwrap_or(0);
        let mut state = |copy| {
            let offset = Superblock::offset(copy);
            if len < offset + SUPERBLOCK_BYTES as u64 {
                return CopyState::BeyondEnd(len);
            }
            match read_bytes(disk, arena, FileId::Meta, offset, SUPERBLOCK_BYTES) {
                Ok(bytes) => match Superblock::decode(copy, &bytes) {
                    Ok(superblock) => CopyState::Whole(superblock),
                    Err(_) if bytes.iter().all(|byte| *byte == 0) => CopyState::Zeros,
                    Err(refusal) => CopyState::Refused(refusal),
                },
                Err(error) => CopyState::Unread(error),
            }
        };
        Ok(Copies((0..SUPERBLOCK_COPIES).map(&mut state).collect()))
    }

    /// Each copy with its number.
    pub(crate) fn states(&self) -> impl Iterator<Item = (u64, &CopyState)> {
        (0..).zip(&self.0)
    }

    fn newest(&self) -> Option<&Superblock> {
        // The first error, if there are several.
        let whole = self.0.iter().rev().filter_map(CopyState::whole);
        whole.max_by_key(|superblock| superblock.generation)
    }

    /// Whether one of them is a superblock, of whatever version.
    pub(super) fn has_superblock(&self) -> bool {
        let is_one = |state: &CopyState| {
            matches!(state, CopyState::Whole(_) | CopyState::Refused(Refusal::Version(_)))
        };
        self.0.iter().any(is_one)
    }

    /// Why one of them could not be read.
    pub(super) fn read_error(&self) -> Option<&Error> {
        self.0.iter().find_map(|state| match state {
            CopyState::Unread(error) => Some(error),
            _ => None,
        })
    }

    /// The superblock with which the store is opened.
    ///
    /// # Errors
    /// `Unsupported` if there are only copies of another version; `Corrupt` if no copy can be used,
    /// or if a newer generation may have been lost; the device's error if a missing copy could not
    /// be read.
    pub(crate) fn choose(&self, disk: &mut dyn Disk) -> Result<FoundSuperblock> {
        let Some(newest) = self.newest() else { return Err(self.none_can_be_used(disk)?) };
        let is_whole = |copy: u64| self.0[copy as usize].whole().is_some();
        let unreadable: Vec<u64> = (0..SUPERBLOCK_COPIES).filter(|copy| !is_whole(*copy)).collect();
        // A crash spoils one copy at most. A store that was just created has written the copies of
        // one generation only, and there was nothing before that could be lost.
        if newest.generation > 1
            && !Superblock::copies_of(newest.generation + 1).into_iter().any(is_whole)
        {
            let what = format!(
                "both superblock copies that may be newer than generation {} can't be used, and \
                 opening the older state could lose commits",
                newest.generation
            );
            return Err(self.refused(&what));
        }
        let is_worth_a_warning =
            |state: &CopyState| newest.generation > 1 || !matches!(state, CopyState::Zeros);
        let warnings = self.warnings(is_worth_a_warning);
        let generation_of = |copy: u64| self.0[copy as usize].whole().map(|s| s.generation);
        let pair = Superblock::copies_of(newest.generation);
        let behind = pair
            .into_iter()
            .filter(|copy| generation_of(*copy).is_some_and(|found| found < newest.generation))
            .collect();
        Ok(FoundSuperblock { superblock: newest.clone(), unreadable, behind, warnings })
    }

    /// What is wrong with the copies that can't be used.
    fn warnings(&self, is_wanted: impl Fn(&CopyState) -> bool) -> Vec<String> {
        let unusable = self.states().filter(|(_, state)| state.whole().is_none());
        let warning = |(copy, state)| {
            let offset = Superblock::offset(copy);
            format!("superblock copy {copy} (byte {offset} of the meta file) {state}")
        };
        unusable.filter(|(_, state)| is_wanted(state)).map(warning).collect()
    }

    fn none_can_be_used(&self, disk: &mut dyn Disk) -> Result<Error> {
        // Next to a copy of this version, one that claims another version would be damaged.
        let version = self.0.iter().find_map(|state| match state {
            CopyState::Refused(Refusal::Version(version)) => Some(version),
            _ => None,
        });
        if let Some(version) = version {
            return Ok(Error::new(
                ErrorKind::Unsupported,
                format_args!(
                    "the store has format version {version}; this program reads version \
                     {FORMAT_VERSION} only: open it with the program that wrote it"
                ),
            ));
        }
        let what = format!(
            "no superblock copy can be used, and no new store is made over what is there, {}",
            files_there(disk)?
        );
        Ok(self.refused(&what))
    }

    /// A failed read says nothing about the store: a backup is needed only if what was read is
    /// wrong.
    fn refused(&self, what: &str) -> Error {
        let all = self.warnings(|_| true).join("; ");
        match self.read_error() {
            Some(error) => Error::new(
                error.kind(),
                format_args!(
                    "{what} ({all}). Nothing was changed; see that the device can be read, then \
                     open the store again"
                ),
            ),
            None => Error::corrupt(format_args!(
                "{what} ({all}); nothing was changed: restore the directory from a backup, or use \
                 another one for a new store"
            )),
        }
    }
}

/// Lists the files that are there without a superblock.
fn files_there(disk: &mut dyn Disk) -> Result<String> {
    let files = disk.files()?;
    let logs_count = files.iter().filter(|file| matches!(file, FileId::Log(..))).count();
    let mut names = Vec::new();
    for file in files.into_iter().filter(|file| !matches!(file, FileId::Log(..))) {
        names.push(format!("`{file}` of {} bytes", disk.len(file)?.unwrap_or(0)));
    }
    names.push(format!("{logs_count} log files"));
    Ok(names.join(", "))
}
