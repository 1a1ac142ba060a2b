//! Checks the superblock copies, the roots that the newest names, and the extent table of its
//! checkpoint.

use super::named::{Named, Trees};
use super::read::Bytes;
use super::{Mend, Verifier};
use crate::base::error::{ErrorKind, Result};
use crate::base::{BLOCK, VShard};
use crate::engine::recovery::{Copies, CopyState};
use crate::format::extent::{TABLE_ROWS, TableRow, decode_table, table_crc, table_offset};
use crate::format::root;
use crate::format::superblock::{SUPERBLOCK_BYTES, SUPERBLOCK_COPIES, Superblock};
use crate::io::FileId;

/// Whether this copy may have been being written when the store was last in use. After a crash that
/// is the second one of the newest generation, or the first one of the next. A creation, and the
/// first opening, write all of them.
fn may_have_been_written(newest: &Superblock, copy: u64) -> bool {
    let crashed = copy == Superblock::copies_of(newest.generation)[1]
        || copy == Superblock::copies_of(newest.generation + 1)[0];
    newest.generation == 1 || (!newest.clean && crashed)
}

impl Verifier<'_> {
    /// Checks all copies; returns the superblock with which the store would be opened.
    pub(super) fn superblock(&mut self) -> Result<Option<Superblock>> {
        let copies = Copies::read(self.disk, &mut self.arena)?;
        self.meter.advance(SUPERBLOCK_COPIES * (SUPERBLOCK_BYTES / BLOCK) as u64);
        let newest = match copies.choose(self.disk) {
            Ok(found) => Some(found.superblock),
            Err(error) if error.kind() == ErrorKind::Corrupt => {
                let affects = "the whole store: it can't be opened";
                self.damaged("the superblock", (FileId::Meta, 0), error, affects, Mend::Restore);
                None
            }
            Err(error) => return Err(error),
        };
        let (mend, affects) = match newest {
            Some(_) => (Mend::Reopen, "this copy only, while another of its generation is whole"),
            None => (Mend::Restore, "the whole store: it can't be opened"),
        };
        let wrong = |(copy, state)| Some((copy, state, copy_damage(copy, state, newest.as_ref())?));
        let found: Vec<(u64, &CopyState, String)> = copies.states().filter_map(wrong).collect();
        let torn = found.iter().filter(|(_, state, _)| state.may_be_torn()).count();
        for (copy, state, what) in found {
            if state.may_be_torn()
                && torn == 1
                && newest.as_ref().is_some_and(|newest| may_have_been_written(newest, copy))
            {
                let note = "as a crash leaves the one that was being written; the next opening \
                            writes it anew";
                self.report.notes.push(format!("superblock copy {copy} {what}, {note}"));
                continue;
            }
            let at = (FileId::Meta, Superblock::offset(copy));
            self.damaged(format_args!("superblock copy {copy}"), at, what, affects, mend);
        }
        Ok(newest)
    }

    /// Reads the root of every virtual shard.
    pub(super) fn roots(&mut self, superblock: &Superblock) -> Vec<Trees> {
        let vshards = (0..superblock.geometry.vshards_count as u16).map(VShard::new);
        let at = |vshard: VShard| root::named_offset(superblock, vshard);
        let places: Vec<(u64, usize)> = vshards.clone().map(|vshard| (at(vshard), BLOCK)).collect();
        let read = self.read_many(FileId::Meta, &places);
        vshards
            .zip(read)
            .map(|(vshard, bytes)| self.root(superblock, vshard, at(vshard), bytes))
            .collect()
    }

    fn root(&mut self, superblock: &Superblock, vshard: VShard, offset: u64, read: Bytes) -> Trees {
        let state = superblock.vshards[vshard.index()];
        let checked = read.and_then(|bytes| {
            let (head, trees) = root::decode_named(superblock, vshard, &bytes)?;
            if head.redo_lsn > state.redo_lsn || head.checkpoint > superblock.checkpoint {
                return Err("is newer than the superblock that names it".to_string());
            }
            Ok(trees)
        });
        checked
            .map_err(|what| {
                let (number, at) = (vshard.get(), (FileId::Meta, offset));
                let affects =
                    format!("every page of virtual shard {number}, and the store can't be opened");
                let structure = format_args!("the root of virtual shard {number}");
                self.map_is_whole = false;
                self.damaged(structure, at, what, affects, Mend::Restore);
            })
            .ok()
    }

    /// Reads the extent table.
    pub(super) fn table(&mut self, superblock: &Superblock) -> Vec<Named> {
        let count = superblock.extents_count;
        let needed = u64::from(count) * superblock.geometry.extent_bytes;
        match self.len(FileId::Data) {
            Ok(bytes) if bytes >= needed => {}
            Ok(bytes) => {
                let what = format!(
                    "has {bytes} bytes, and its {count} extents need {needed}: it was truncated"
                );
                self.damaged(
                    "the data file",
                    (FileId::Data, bytes),
                    what,
                    "what lay beyond its end",
                    Mend::Restore,
                );
            }
            Err(what) => {
                self.damaged("the data file", (FileId::Data, 0), what, "every page", Mend::Restore)
            }
        }
        let (mut extents, mut sums) = (Vec::new(), Vec::new());
        let offsets = (0..count.div_ceil(TABLE_ROWS))
            .map(|index| (table_offset(index, superblock.checkpoint), BLOCK));
        let offsets: Vec<(u64, usize)> = offsets.collect();
        let blocks = self.read_many(FileId::Table, &offsets);
        for (index, ((offset, _), read)) in (0..).zip(offsets.into_iter().zip(blocks)) {
            let decoded = read.and_then(|bytes| {
                decode_table(superblock.store_id, index, superblock.checkpoint, &bytes)
                    .map_err(str::to_string)
            });
            let rows: Vec<Option<TableRow>> = match decoded {
                Ok((rows, sum)) => {
                    sums.push(sum);
                    rows.into_iter().map(Some).collect()
                }
                Err(what) => {
                    let affects = format!(
                        "which of the extents from {} on are free, and the store can't be opened",
                        index * TABLE_ROWS
                    );
                    let structure = format!("block {index} of the extent table");
                    self.map_is_whole = false;
                    self.damaged(structure, (FileId::Table, offset), what, affects, Mend::Restore);
                    vec![None; TABLE_ROWS as usize]
                }
            };
            extents.extend(
                rows.into_iter().map(|row| Named::new(row, superblock.geometry.extent_blocks())),
            );
        }
        if sums.len() == count.div_ceil(TABLE_ROWS) as usize
            && table_crc(sums) != superblock.table_crc
        {
            self.map_is_whole = false;
            let what = "is another one than the superblock names, of the same checkpoint: a write \
                        was lost";
            let affects = "which extents are free, and the store can't be opened";
            let offset = table_offset(0, superblock.checkpoint);
            self.damaged("the extent table", (FileId::Table, offset), what, affects, Mend::Restore);
        }
        extents.truncate(count as usize);
        extents
    }
}

/// What is wrong with a copy, compared with the superblock that counts. This is stricter than
/// recovery, which opens a store whenever that is safe.
fn copy_damage(copy: u64, state: &CopyState, newest: Option<&Superblock>) -> Option<String> {
    let found = match state {
        CopyState::Whole(found) => found,
        // A store that was never opened after its creation has written only one pair.
        CopyState::Zeros if newest.is_some_and(|n| n.generation == 1) && copy < 2 => return None,
        _ => return Some(state.to_string()),
    };
    let newest = newest?;
    let own_pair = Superblock::copies_of(newest.generation).contains(&copy);
    let expected = newest.generation - u64::from(!own_pair);
    // After a crash between the writes of a pair, the second copy is two generations behind. An
    // opening writes the newest generation over copies that it can't read, also over the pair that
    // a creation leaves empty.
    let in_step = found.generation == expected
        || found.generation == newest.generation
        || (!newest.clean && (1..=2).any(|behind| found.generation + behind == expected));
    if !in_step {
        return Some(format!(
            "has generation {}, and {expected} was written here: a write was lost",
            found.generation
        ));
    }
    let differs = found.generation == newest.generation && found != newest;
    differs.then(|| "differs from the other copy of its generation".into())
}
