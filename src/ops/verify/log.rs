//! Checks the log: after a clean close up to its recorded end, group by group, otherwise as a
//! recovery reads it.

use super::{Mend, Verifier};
use crate::base::error::ErrorKind;
use crate::base::{BLOCK, ShardId, ShardMap};
use crate::engine::log::{StoredGroup, head_at};
use crate::engine::recovery::scan;
use crate::format::group::GroupHead;
use crate::format::superblock::{LogEnd, Superblock};
use crate::io::FileId;

/// Blocks of the logs to read: up to their ends after a clean close, otherwise all.
pub(super) fn blocks_to_read(superblock: &Superblock) -> u64 {
    if superblock.clean {
        return superblock.logs.iter().map(|log| u64::from(log.end.block)).sum();
    }
    superblock.segments().count() as u64 * superblock.geometry.segment_bytes / BLOCK as u64
}

impl Verifier<'_> {
    /// Checks the log of each shard.
    pub(super) fn log(&mut self, superblock: &Superblock) {
        if !superblock.clean {
            return self.unclean_log(superblock);
        }
        for (i, log) in superblock.logs.iter().enumerate().filter(|(_, log)| log.end.number > 0) {
            self.closed_log(superblock, ShardId::new(i as u16), log.end);
        }
    }

    /// Checks what the next opening would find.
    fn unclean_log(&mut self, superblock: &Superblock) {
        let shard_map =
            ShardMap::new(superblock.geometry.vshards_count, superblock.logs.len() as u16);
        match scan(self.disk, &mut self.arena, superblock, shard_map) {
            Ok(found) => {
                let (groups, torn, recovered_lsn) =
                    (found.groups.len(), found.torn, found.state(superblock));
                self.report.groups += groups as u64;
                self.meter.advance(blocks_to_read(superblock));
                let note = format!(
                    "the log holds {groups} groups to be replayed, up to commit {recovered_lsn}; \
                     {torn} are torn"
                );
                self.report.notes.push(note);
            }
            Err(error) => {
                let file = FileId::Log(ShardId::new(0), Default::default());
                let affects = match error.kind() {
                    ErrorKind::Corrupt => "commits that were durable; the store can't be opened",
                    _ => "what the log holds",
                };
                self.damaged("the log", (file, 0), error, affects, Mend::Restore);
            }
        }
    }

    /// Checks that the groups of the last segment follow one another up to the recorded end.
    fn closed_log(&mut self, superblock: &Superblock, shard: ShardId, end: LogEnd) {
        let file = FileId::Log(shard, end.segment);
        // Nothing behind the end is needed, and the segment may be shorter than a full one.
        let blocks = u64::from(end.block).min(superblock.geometry.segment_bytes / BLOCK as u64);
        let affects = "nothing that was committed: after a clean close the log is not needed, but \
                       the device lost it";
        let structure = format!("the log of shard {}", shard.get());
        let bytes = match self.read(file, 0, blocks as usize * BLOCK) {
            Ok(bytes) => bytes,
            Err(why) => return self.damaged(structure, (file, 0), why, affects, Mend::Reopen),
        };
        let mut block = 0;
        let mut before: Option<GroupHead> = None;
        while u64::from(block) < blocks {
            let here = &bytes[block as usize * BLOCK..];
            match group(superblock, (shard, end, block), here, before.as_ref()) {
                Ok(head) => {
                    block += head.blocks;
                    before = Some(head);
                    self.report.groups += 1;
                }
                Err(what) => {
                    let at = (file, u64::from(block) * BLOCK as u64);
                    let structure = format_args!("the log group at block {block}");
                    return self.damaged(structure, at, what, affects, Mend::Reopen);
                }
            }
        }
        let ends_as_recorded =
            before.as_ref().is_some_and(|b| b.number == end.number && b.head_crc == end.checksum);
        if block != end.block || !ends_as_recorded {
            let what = "does not end with the group that the superblock names";
            let at = (file, u64::from(end.block) * BLOCK as u64);
            self.damaged(structure, at, what, affects, Mend::Reopen);
        }
    }
}

/// Checks that the group at `block` is whole and follows `before`.
fn group(
    superblock: &Superblock,
    (shard, end, block): (ShardId, LogEnd, u32),
    here: &[u8],
    before: Option<&GroupHead>,
) -> Result<GroupHead, String> {
    let head = head_at(superblock, (shard, end.segment, block), here)
        .ok_or("is missing: no group of this place and epoch begins there")?;
    if head.generation != end.generation {
        return Err("is left from an earlier use of the segment: a write was lost".into());
    }
    if before.is_some_and(|b| b.number + 1 != head.number || b.head_crc != head.prev_crc) {
        return Err("does not follow the group before it".into());
    }
    let group = StoredGroup::open(&head, here);
    group.and_then(|group| group.placed()).map_err(|what| what.to_string())?;
    Ok(head)
}
