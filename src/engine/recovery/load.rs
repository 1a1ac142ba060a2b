//! Reading what a store is: superblock, roots, extent table. Each is checked, and named if it is
//! damaged.

use super::read::{Range, read_bytes, read_ranges};
use crate::base::VShard;
use crate::base::error::{Error, ErrorKind, Result};
use crate::format::FORMAT_VERSION;
use crate::format::extent::{TABLE_ROWS, TableRow, decode_table, table_crc, table_offset};
use crate::format::node::Child;
use crate::format::root::{self, VOLUMES_MAX};
use crate::format::superblock::{
    Refusal, RootVersion, SUPERBLOCK_BYTES, SUPERBLOCK_COPIES, Superblock,
};
use crate::io::{Disk, FileId};
use crate::memory::Arena;

/// What the superblock names.
pub(crate) struct Loaded {
    /// Each virtual shard's root.
    pub roots: Vec<(Box<[Child; VOLUMES_MAX]>, RootVersion)>,
    /// The extent table.
    pub table: Vec<TableRow>,
}

/// The superblock that counts.
pub(crate) struct FoundSuperblock {
    pub superblock: Superblock,
    /// Copies that can't be used.
    pub unreadable: Vec<u64>,
    /// Copies that should be of the same generation and are of an older one: a crash came in
    /// between.
    pub behind: Vec<u64>,
    /// What is wrong with each of them.
    pub warnings: Vec<String>,
}

/// The newest superblock, and what is wrong with the copies that can't be used.
pub(crate) fn find_superblock(disk: &mut dyn Disk, arena: &mut Arena) -> Result<FoundSuperblock> {
    let mut best: Option<Superblock> = None;
    let mut warnings = Vec::new();
    let mut other_version = None;
    let mut failed = None;
    let mut unreadable = Vec::new();
    let mut older = Vec::new();
    for copy in 0..SUPERBLOCK_COPIES {
        let offset = Superblock::offset(copy);
        if disk.len(FileId::Meta)?.unwrap_or(0) < offset + SUPERBLOCK_BYTES as u64 {
            warnings.push(format!("superblock copy {copy}: the meta file ends before it"));
            unreadable.push(copy);
            continue;
        }
        let decoded = read_bytes(disk, arena, FileId::Meta, offset, SUPERBLOCK_BYTES)
            .map(|bytes| (Superblock::decode(copy, &bytes), bytes.iter().all(|b| *b == 0)));
        match decoded {
            Ok((Ok(superblock), _)) => {
                older.push((copy, superblock.generation));
                if best.as_ref().is_none_or(|b| b.generation < superblock.generation) {
                    best = Some(superblock);
                }
            }
            Ok((Err(refusal), zeros)) => {
                unreadable.push(copy);
                let what = match refusal {
                    _ if zeros => "is all zeros",
                    Refusal::Magic => "is not a superblock",
                    Refusal::Version(version) => {
                        other_version = Some(version);
                        "claims to be of another format version"
                    }
                    Refusal::Sum => "has a wrong checksum",
                    Refusal::Values => "contradicts itself or belongs elsewhere",
                };
                warnings.push(format!(
                    "superblock copy {copy} at byte {offset} of the meta file {what}"
                ));
            }
            Err(error) => {
                unreadable.push(copy);
                warnings.push(format!("superblock copy {copy}: {error}"));
                failed.get_or_insert(error);
            }
        }
    }
    // Next to a copy of this version, one that claims another is damaged.
    if let (None, Some(version)) = (&best, other_version) {
        return Err(Error::new(
            ErrorKind::Unsupported,
            format_args!(
                "the store has format version {version}; this program reads version \
                 {FORMAT_VERSION} only: open it with the program that wrote it"
            ),
        ));
    }
    let Some(newest) = best else {
        let what = format!(
            "no superblock copy can be used, and no new store is made over what is there, {}",
            left(disk)?
        );
        return Err(no_superblock(&what, &warnings, failed));
    };
    // A store that was just created has written the copies of one generation only, and held nothing
    // before.
    if newest.generation > 1 {
        one_readable(&newest, &unreadable, &warnings, failed)?;
    } else {
        warnings.retain(|warning| !warning.ends_with("is all zeros"));
    }
    let pair = Superblock::copies_of(newest.generation);
    older.retain(|(copy, generation)| pair.contains(copy) && *generation < newest.generation);
    let behind = older.into_iter().map(|(copy, _)| copy).collect();
    Ok(FoundSuperblock { superblock: newest, unreadable, behind, warnings })
}

/// What is there without a superblock, in words.
fn left(disk: &mut dyn Disk) -> Result<String> {
    let files = disk.files()?;
    let logs_count = files.iter().filter(|file| matches!(file, FileId::Log(..))).count();
    let mut left = Vec::new();
    for file in files.into_iter().filter(|file| !matches!(file, FileId::Log(..))) {
        left.push(format!("`{file}` of {} bytes", disk.len(file)?.unwrap_or(0)));
    }
    left.push(format!("{logs_count} log files"));
    Ok(left.join(", "))
}

/// A crash spoils one copy at most. If both copies of the generation that may follow the newest are
/// unreadable, that generation may have counted: then the state found is an older one, and its use
/// would lose commits.
fn one_readable(
    newest: &Superblock,
    unreadable: &[u64],
    warnings: &[String],
    failed: Option<Error>,
) -> Result<()> {
    if !Superblock::copies_of(newest.generation + 1).iter().all(|copy| unreadable.contains(copy)) {
        return Ok(());
    }
    let what = format!(
        "both superblock copies that may be newer than generation {} can't be used, and opening \
         the older state could lose commits",
        newest.generation
    );
    Err(no_superblock(&what, warnings, failed))
}

/// A device that could not be read says nothing about the store: a backup is needed only if what
/// was read is wrong.
fn no_superblock(what: &str, warnings: &[String], failed: Option<Error>) -> Error {
    let all = warnings.join("; ");
    match failed {
        Some(error) => Error::new(
            error.kind(),
            format_args!(
                "{what} ({all}). Nothing was changed; see that the device can be read, then open \
                 the store again"
            ),
        ),
        None => Error::corrupt(format_args!(
            "{what} ({all}); nothing was changed: restore the directory from a backup, or use \
             another one for a new store"
        )),
    }
}

/// Reads the roots and the extent table that the superblock names.
pub(crate) fn load(
    disk: &mut dyn Disk,
    arena: &mut Arena,
    superblock: &Superblock,
) -> Result<Loaded> {
    let (store_id, checkpoint) = (superblock.store_id, superblock.checkpoint);
    let block = |file, offset| Range { file, offset, blocks: 1 };
    let vshards = (0..superblock.geometry.vshards_count as u16).map(VShard::new);
    let root_ranges = vshards.map(|vshard| block(FileId::Meta, root_offset(superblock, vshard)));
    let mut roots = Vec::with_capacity(superblock.geometry.vshards_count as usize);
    read_ranges(disk, arena, root_ranges, |i, bytes| {
        roots.push(root(superblock, VShard::new(i as u16), bytes)?);
        Ok(())
    })?;
    let table_blocks = superblock.extents_count.div_ceil(TABLE_ROWS);
    let table_ranges =
        (0..table_blocks).map(|index| block(FileId::Table, table_offset(index, checkpoint)));
    let (mut table, mut sums) = (Vec::new(), Vec::new());
    read_ranges(disk, arena, table_ranges, |i, bytes| {
        let index = i as u32;
        let (rows, sum) = decode_table(store_id, index, checkpoint, bytes).map_err(|what| {
            let offset = table_offset(index, checkpoint);
            Error::corrupt(format_args!(
                "block {index} of the extent table (byte {offset} of file extents) {what}"
            ))
        })?;
        table.extend(rows);
        sums.push(sum);
        Ok(())
    })?;
    if table_crc(sums) != superblock.table_crc && !planted!(NamedSumIgnored) {
        let from = table_offset(0, checkpoint);
        return Err(Error::corrupt(format_args!(
            "the extent table (every second block of file extents, from byte {from} on) is \
             another one than the superblock names, of the same checkpoint: a write was lost"
        )));
    }
    Ok(Loaded { roots, table })
}

fn root_offset(superblock: &Superblock, vshard: VShard) -> u64 {
    let generation = superblock.vshards[vshard.index()].root.generation;
    root::offset(vshard, generation, superblock.geometry.vshards_count)
}

/// The root of a virtual shard, in `bytes`.
fn root(
    superblock: &Superblock,
    vshard: VShard,
    bytes: &[u8],
) -> Result<(Box<[Child; VOLUMES_MAX]>, RootVersion)> {
    let (_, children) = root::decode_named(superblock, vshard, bytes).map_err(|what| {
        let (number, offset) = (vshard.get(), root_offset(superblock, vshard));
        Error::corrupt(format_args!(
            "the root of virtual shard {number} (byte {offset} of the meta file) {what}"
        ))
    })?;
    Ok((children, superblock.vshards[vshard.index()].root))
}
