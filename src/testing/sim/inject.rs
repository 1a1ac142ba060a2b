//! Injects faults into ordinary runs: errors of the device in a life or an opening, and damage to
//! the disk after a crash.
//!
//! Invariants
//! 1. An error of the device may stop the store; it may never cost what was acknowledged, nor make
//!    an opening fail for another reason than that error.
//! 2. Damage is refused with an error that names it, unless it is in bytes that are not needed.
//!    Only damage above every watermark that the logs still record may cost commits: it can't be
//!    told from the torn end of a log. No wrong byte is ever served.
//!
//! It does *not* decide what an error or damage leaves on the disk; see `disk`.

use super::cluster::Opened;
use super::disk::{Area, Damage, ERRNOS, Fault, Loss, OpKind, SECTOR, SECTORS, SimDisk};
use super::oracle::Tolerance;
use super::run::{Outcome, SimRun};
use crate::base::error::{Error, ErrorKind};
use crate::base::{BLOCK, Lsn};
use crate::engine::recovery::{find_superblock, read_bytes};
use crate::format::group::GroupHead;
use crate::io::FileId;
use crate::memory::Arena;

/// Steps that a stopped store takes before its process ends.
const AFTER_FAILURE: u32 = 40;

/// The outcome of opening and reading a damaged store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Damaged {
    Refused,
    Named,
    Cut,
    Mended,
    Harmless,
}

impl SimRun {
    /// Plans an error of the device for this life, or for an opening.
    pub(super) fn plan_fault(&mut self, after_max: u64) {
        let kinds = [
            None,
            Some(OpKind::Read),
            Some(OpKind::Write),
            Some(OpKind::Flush),
            Some(OpKind::Allocate),
        ];
        let areas =
            [Area::Any, Area::Any, Area::Log, Area::File(FileId::Data), Area::File(FileId::Meta)];
        let fault = Fault {
            kind: *self.rng.pick(&kinds),
            area: *self.rng.pick(&areas),
            // Often soon, since some kinds of operations are few.
            after: self.rng.below(after_max.max(1)) >> self.rng.below(7),
            forever: self.rng.one_in(3),
            errno: *self.rng.pick(&ERRNOS),
        };
        self.disk.inject(fault);
        self.tolerate_errors(true);
    }

    /// Sets whether errors of the device are tolerated from now on.
    pub(super) fn tolerate_errors(&mut self, io: bool) {
        let full = io || self.options.data_bytes_max > 0;
        let tolerance = self.oracle.tolerance();
        self.oracle.tolerate(Tolerance { io, full, ..tolerance });
    }

    /// Runs a store that has stopped: every request gets an answer, and nothing more becomes
    /// durable.
    pub(super) fn after_failure(&mut self) -> Outcome {
        for _ in 0..AFTER_FAILURE {
            self.step()?;
        }
        self.publish_to_map()
    }

    /// Damages a random sector or block of the image that a power loss would leave now, and opens
    /// that image.
    pub(super) fn damage_something(&mut self, crashed: &SimDisk) -> Outcome {
        let loss =
            *self.rng.pick(&[Loss::Everything, Loss::Nothing, Loss::Sectors(50), Loss::Prefixes]);
        let image = crashed.crash(loss, &mut self.rng);
        let (file, len) = *self.rng.pick(&image.files());
        let count = *self.rng.pick(&[1, SECTORS]);
        let places = len / (count * SECTOR) as u64;
        if places == 0 {
            return Ok(());
        }
        let mut any = || self.rng.below(places) * count as u64;
        let (first, with) = (any(), any());
        let damage = match self.rng.below(4) {
            0 => Damage::Flip { bit: self.rng.below((count * SECTOR * 8) as u64) as usize },
            1 => Damage::Zero,
            2 => Damage::Stale,
            _ => Damage::Swap { with },
        };
        if image.damage(file, first, count, damage) {
            let why = |why| {
                format!(
                    "{damage:?} of {count} sectors of {file} from {first} on, after {loss:?}: \
                     {why}"
                )
            };
            self.open_damaged(image).map_err(why)?;
        }
        Ok(())
    }

    /// Opens a damaged disk and reads everything; the run continues with its own disk. The store
    /// must be closed or dead.
    pub(super) fn open_damaged(&mut self, image: SimDisk) -> Outcome<Damaged> {
        let recorded = recorded_watermark(&mut image.clone());
        let disk = std::mem::replace(&mut self.disk, image);
        let found = self.try_open().and_then(|opened| match opened {
            Err(error) => names_damage(&error).map(|()| Damaged::Refused),
            Ok(opened) => self.read_damaged(opened, recorded),
        });
        self.end_life();
        self.disk = disk;
        let counters = &mut self.run_stats.damage;
        counters.done += 1;
        *match found.as_ref() {
            Ok(Damaged::Refused) => &mut counters.refused,
            Ok(Damaged::Named) => &mut counters.named,
            Ok(Damaged::Cut) => &mut counters.cut,
            Ok(Damaged::Mended) => &mut counters.mended,
            Ok(Damaged::Harmless) | Err(_) => &mut counters.harmless,
        } += 1;
        found
    }

    fn read_damaged(&mut self, opened: Opened, recorded: Option<Lsn>) -> Outcome<Damaged> {
        let cut = opened.recovered_lsn;
        let is_cut = cut < self.oracle.durable();
        if is_cut && recorded.is_none_or(|recorded| recorded > cut) {
            return Err(format!(
                "cut at {cut:?} in silence, although a log says that {recorded:?} was durable"
            ));
        }
        let mut named = false;
        let (keys, _) = self.pick_checked();
        for key in keys {
            match self.try_read_now(&[key])? {
                Err(error) => {
                    names_damage(&error)?;
                    named = true;
                }
                Ok(pages) => self.oracle.judge_recovered(key, cut, &pages[0])?,
            }
        }
        Ok(match (named, is_cut) {
            (true, _) => Damaged::Named,
            (false, true) => Damaged::Cut,
            (false, false) if opened.warnings > 0 => Damaged::Mended,
            (false, false) => Damaged::Harmless,
        })
    }
}

fn names_damage(error: &Error) -> Outcome {
    match error.kind() {
        ErrorKind::Corrupt | ErrorKind::Unsupported if !error.to_string().is_empty() => Ok(()),
        kind => Err(format!("damage is met with {kind:?}: {error}")),
    }
}

/// The highest watermark that the superblock and the heads in the logs record. It is found in
/// another way than by recovery, which is under test.
fn recorded_watermark(disk: &mut SimDisk) -> Option<Lsn> {
    let mut arena = Arena::new(512).ok()?;
    let superblock = find_superblock(disk, &mut arena).ok()?.superblock;
    let mut highest = superblock.watermark;
    if superblock.clean {
        return Some(highest);
    }
    for (file, len) in disk.files() {
        let FileId::Log(shard, segment) = file else { continue };
        let bytes = read_bytes(disk, &mut arena, file, 0, len as usize).ok()?;
        for (block, here) in (0..).zip(bytes.chunks(BLOCK)) {
            let blocks = (len / BLOCK as u64) as u32;
            let head = GroupHead::open(
                here,
                superblock.salt,
                superblock.epoch,
                (shard, segment, block),
                blocks,
            );
            highest = head.map_or(highest, |head| highest.max(head.watermark));
        }
    }
    // Of the epoch that had just begun nothing was durable yet: the state is that before the gap.
    Some(if highest < superblock.epoch_first_lsn {
        superblock.next_lsn.before().min(highest)
    } else {
        highest
    })
}
