//! Redoing what the logs hold above the roots and up to the cut, group by group, in LSN order.

use super::load::read_bytes;
use super::scan::{Scan, ScannedGroup};
use super::{RecoveryReport, pump};
use crate::disk::{Disk, FileId};
use crate::error::{Error, Result};
use crate::format::group::{Body, LoggedChange, SlotState};
use crate::pool::Arena;
use crate::shard::{RedoChange, RedoKind, Shard};
use crate::types::{BLOCK, Lsn, Micros};
use bytes::Bytes;

/// Brings the shard up to the cut.
pub(super) fn replay(
    disk: &mut dyn Disk,
    shard: &mut Shard,
    scan: &Scan,
    report: &mut RecoveryReport,
    now: Micros,
) -> Result<()> {
    let mut arena = Arena::new(64)?;
    report.commits_dropped = scan.dropped;
    for group in &scan.groups {
        let file = FileId::Log(group.head.shard, group.head.segment);
        let len = group.head.blocks as usize * BLOCK;
        let offset = u64::from(group.head.block) * BLOCK as u64;
        let bytes = Bytes::from(read_bytes(disk, &mut arena, file, offset, len)?);
        let changes = decode(group, &bytes, scan, report).ok_or_else(|| {
            Error::corrupt(format_args!("{file}: the group at block {} changed while it was read", group.head.block))
        })?;
        redo(disk, shard, changes, now)?;
    }
    Ok(())
}

fn redo(disk: &mut dyn Disk, shard: &mut Shard, changes: Vec<RedoChange>, now: Micros) -> Result<()> {
    let batch_max = shard.redo_batch_max();
    let mut changes = changes.into_iter();
    loop {
        let batch: Vec<RedoChange> = changes.by_ref().take(batch_max).collect();
        if batch.is_empty() {
            return Ok(());
        }
        shard.redo(batch);
        pump(disk, shard, now, Shard::redo_done)?;
    }
}

fn decode(group: &ScannedGroup, bytes: &Bytes, scan: &Scan, report: &mut RecoveryReport) -> Option<Vec<RedoChange>> {
    let body = Body::open(&group.head, bytes)?;
    let wanted = |lsn: Lsn| lsn > scan.redo && lsn <= scan.cut;
    let mut changes = Vec::new();
    for record in body.records()? {
        let lsn = record.lsn;
        if !wanted(lsn) {
            report.commits_dropped += u64::from(lsn > scan.cut);
            continue;
        }
        report.commits_applied += 1;
        for change in record.changes {
            let (key, lsn, kind) = match change {
                LoggedChange::Patch(key, offset, patch) => {
                    (key, lsn, RedoKind::Patch { offset, bytes: bytes.slice_ref(patch) })
                }
                LoggedChange::Free(key) => (key, lsn, RedoKind::Free),
                LoggedChange::Image(_, slot) => {
                    let slot = body.slots.get(slot as usize)?;
                    let kind = match slot.state {
                        // Freed again within the same run: the Free follows.
                        SlotState::Dead => continue,
                        SlotState::Placed => RedoKind::Placed(slot.entry),
                        SlotState::Inline(block) => {
                            let at = block as usize * BLOCK;
                            RedoKind::Image(bytes.slice(at..at + BLOCK))
                        }
                    };
                    (slot.key, slot.entry.lsn(), kind)
                }
            };
            changes.push(RedoChange { lsn, key, kind });
        }
    }
    Some(changes)
}
