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
use smallvec::smallvec;

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
    shard.begin_redo(scan.redo, scan.cut);
    for group in &scan.groups {
        let file = FileId::Log(group.head.shard, group.head.segment);
        let len = group.head.blocks as usize * BLOCK;
        let offset = u64::from(group.head.block) * BLOCK as u64;
        let bytes = Bytes::from(read_bytes(disk, &mut arena, file, offset, len)?);
        let commits = decode(group, &bytes, scan, report).ok_or_else(|| {
            Error::corrupt(format_args!("{file}: the group at block {} changed while it was read", group.head.block))
        })?;
        redo(disk, shard, commits, now)?;
    }
    shard.end_redo();
    Ok(())
}

/// Redoes whole commits, as many at a time as fit into memory.
fn redo(disk: &mut dyn Disk, shard: &mut Shard, commits: Vec<Commit>, now: Micros) -> Result<()> {
    let batch_max = shard.redo_batch_max();
    let mut batch = Vec::new();
    let mut commits = commits.into_iter().peekable();
    while let Some(Commit { lsn, changes }) = commits.next() {
        batch.extend(changes);
        if commits.peek().is_none_or(|next| batch.len() + next.changes.len() > batch_max) {
            shard.redo(lsn, std::mem::take(&mut batch));
            pump(disk, shard, now, |shard| Ok(shard.redo_done()? && !shard.checkpoint_under_way()))?;
        }
    }
    Ok(())
}

/// A commit as the log has it.
struct Commit {
    lsn: Lsn,
    changes: Vec<RedoChange>,
}

fn decode(group: &ScannedGroup, bytes: &Bytes, scan: &Scan, report: &mut RecoveryReport) -> Option<Vec<Commit>> {
    let body = Body::open(&group.head, bytes)?;
    let wanted = |lsn: Lsn| lsn > scan.redo && lsn <= scan.cut;
    let mut commits = Vec::new();
    for record in body.records()? {
        let lsn = record.lsn;
        if !wanted(lsn) {
            report.commits_dropped += u64::from(lsn > scan.cut);
            continue;
        }
        report.commits_applied += 1;
        let mut changes = Vec::new();
        for change in record.changes {
            let (key, lsn, kind) = match change {
                LoggedChange::Patch(key, offset, patch) => {
                    let patches = smallvec![(offset, bytes.slice_ref(patch))];
                    (key, lsn, RedoKind::Patches { over_zeros: false, patches })
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
            add(&mut changes, RedoChange { lsn, key, kind })?;
        }
        commits.push(Commit { lsn, changes });
    }
    Some(commits)
}

/// Adds a change to what the commit did to the same page before, if anything: a page has one version a commit.
fn add(changes: &mut Vec<RedoChange>, change: RedoChange) -> Option<()> {
    match changes.iter().rposition(|earlier| earlier.key == change.key) {
        None => changes.push(change),
        Some(at) => {
            let earlier = changes.remove(at);
            let kind = earlier.kind.then(change.kind)?;
            changes.push(RedoChange { kind, ..change });
        }
    }
    Some(())
}
