//! Damages every sector of a store: it is flipped, zeroed, made stale or swapped, alone or with the
//! block around it.
//!
//! In a closed store, damage to any block that opening and reading touch must be noticed. In one
//! that was not closed, every block with contents is damaged. `COREPAGE_STORES=n` does this to n
//! stores.

use super::disk::DamageCounters;
use super::disk::{Damage, Loss, SECTOR, SECTORS};
use super::inject::Damaged;
use super::run::{Outcome, Plan, RunStats, SimRun};
use super::tests::{number, quiet, run_cases};
use super::workload::{self, Profile};
use crate::base::BLOCK;
use crate::base::mix::mix;
use crate::engine::Request;
use crate::format::superblock::{SUPERBLOCK_BYTES, SUPERBLOCK_COPIES};
use crate::io::FileId;
use crate::testing::random::Rng;

/// A store, and which part of its sectors the test damages.
#[derive(Clone, Copy, Debug)]
struct Case {
    seed: u64,
    part: u64,
    clean: bool,
}

const PARTS: u64 = 8;

fn sim(case: &Case) -> Outcome<SimRun> {
    let mut rng = Rng::new(mix(case.seed));
    let mut options = workload::options(&mut rng);
    options.geometry.segment_bytes = 64 << 10;
    options.geometry.segments_count = 4;
    let mut profile = Profile { in_flight: 4, ..Profile::random(&mut rng) };
    profile.universe.truncate(60);
    // What an opening reads depends on the number of shards, so each opening has the same number.
    let shards = 1 + (case.seed % 2) as u16;
    let plan = Plan {
        options: Some(options),
        profile: Some(profile),
        shards: shards..=shards,
        ..quiet(case.seed)
    };
    let mut sim = SimRun::new(plan);
    sim.begin()?;
    for _ in 0..500 {
        sim.step()?;
    }
    if case.clean {
        sim.close()?
    }
    sim.let_go(usize::MAX)?;
    Ok(sim)
}

/// Which blocks to damage: in a closed store those that are read, in another one those with
/// contents.
fn targets(sim: &mut SimRun, case: &Case) -> Outcome<Vec<(FileId, u64)>> {
    let image = sim.disk.crash(Loss::Everything, &mut Rng::new(case.seed));
    if case.clean {
        image.note_reads();
        let found = sim.open_damaged(image.clone())?;
        assert_eq!(found, Damaged::Harmless, "nothing is damaged yet");
        return Ok(image.take_reads().into_iter().collect());
    }
    let blocks =
        |(file, len): (FileId, u64)| (0..len / BLOCK as u64).map(move |block| (file, block));
    let is_used =
        |&(file, block): &(FileId, u64)| image.block(file, block).iter().any(|byte| *byte != 0);
    Ok(image.files().into_iter().flat_map(blocks).filter(is_used).collect())
}

/// Copies of the superblock stand in for each other: a stale one is like a missing one.
fn is_superblock(file: FileId, block: u64) -> bool {
    file == FileId::Meta && block < SUPERBLOCK_COPIES * (SUPERBLOCK_BYTES / BLOCK) as u64
}

fn run(case: &Case) -> Outcome<RunStats> {
    let mut sim = sim(case)?;
    let targets = targets(&mut sim, case)?;
    let mut rng = Rng::new(mix(case.seed ^ case.part));
    let mine = targets
        .iter()
        .enumerate()
        .filter(|(n, _)| *n as u64 % PARTS == case.part)
        .map(|(_, target)| *target);
    for (file, block) in mine {
        let first = block * SECTORS as u64;
        let places = (0..SECTORS as u64).map(|n| (first + n, 1)).chain([(first, SECTORS)]);
        for (at, count) in places {
            // Use a block that looks as if it belonged here, if there is one.
            let others: Vec<u64> =
                targets.iter().filter(|t| t.0 == file && t.1 != block).map(|t| t.1).collect();
            let other = if others.is_empty() { 0 } else { *rng.pick(&others) };
            let with = other * SECTORS as u64 + at - first;
            let bit = rng.below((count * BLOCK / SECTORS * 8) as u64) as usize;
            for damage in [Damage::Flip { bit }, Damage::Zero, Damage::Stale, Damage::Swap { with }]
            {
                let image = sim.disk.crash(Loss::Everything, &mut Rng::new(case.seed));
                if !image.damage(file, at, count, damage) {
                    continue;
                }
                let what = format!("{damage:?} of {count} sectors of {file} from {at} on");
                let found = sim.open_damaged(image).map_err(|why| format!("{what}: {why}"))?;
                let missed = matches!(found, Damaged::Harmless | Damaged::Cut);
                if case.clean && missed && !is_superblock(file, block) {
                    return Err(format!("{what}: nobody has noticed"));
                }
            }
        }
    }
    Ok(sim.run_stats)
}

/// The runs in which planted bugs are looked for.
pub(super) fn smallest() -> Outcome {
    (0..PARTS).try_for_each(|part| run(&Case { seed: 1, part, clean: true }).map(drop))
}

fn run_all(seeds: u64, clean: bool) -> DamageCounters {
    let cases: Vec<Case> = (1..=seeds)
        .flat_map(|seed| (0..PARTS).map(move |part| Case { seed, part, clean }))
        .collect();
    let damage = run_cases(&cases, run).damage;
    println!("{seeds} stores, closed: {clean}: {damage:?}");
    damage
}

/// If this fails, a damaged sector is served as data, or found by a user instead of by the store.
#[test]
fn damage_to_any_sector_of_a_closed_store_is_noticed() {
    let damage = run_all(number("COREPAGE_STORES").unwrap_or(1), true);
    assert!(damage.refused > 20 && damage.named > 1000 && damage.cut == 0, "{damage:?}");
}

/// If this fails, a crash and a damaged sector together serve wrong data, or silently lose what the
/// log says was durable.
#[test]
fn damage_to_any_sector_of_a_crashed_store_is_never_served() {
    let damage = run_all(number("COREPAGE_STORES").unwrap_or(1), false);
    assert!(damage.refused > 20 && damage.named > 100, "{damage:?}");
}

/// Cuts the power at an event of a checkpoint. Returns false if it has fewer events.
fn crash_checkpoint(sim: &mut SimRun, event: u64) -> Outcome<bool> {
    sim.disk.cut_power_after(event);
    sim.ask(Request::Checkpoint);
    sim.publish_to_map()?;
    Ok(sim.disk.is_off())
}

/// Crashes a store in a checkpoint and again in the recovery after it, each at some event, and then
/// loses one copy of the superblock.
fn one_copy_lost(checkpoint_event: u64) -> Outcome<u64> {
    let plan =
        |seed| Plan { options: Some(super::small_tests::options()), shards: 1..=1, ..quiet(seed) };
    let (mut opened, mut recovery_event) = (0, 0);
    loop {
        recovery_event += 1;
        let mut sim = SimRun::new(plan(1));
        sim.begin()?;
        if !crash_checkpoint(&mut sim, checkpoint_event)? {
            return Ok(opened);
        }
        sim.crash(Loss::Nothing)?;
        sim.disk.cut_power_after(recovery_event);
        let _ = sim.try_open()?;
        if !sim.disk.is_off() {
            return Ok(opened);
        }
        sim.crash(Loss::Everything)?;
        for copy in 0..SUPERBLOCK_COPIES {
            let image = sim.disk.crash(Loss::Everything, &mut Rng::new(1));
            let sectors = (SUPERBLOCK_BYTES / SECTOR) as u64;
            if !image.damage(FileId::Meta, copy * sectors, SECTORS, Damage::Zero) {
                continue;
            }
            opened += 1;
            let found = sim.open_damaged(image)?;
            if !matches!(found, Damaged::Mended | Damaged::Harmless) {
                let at = format!("events {checkpoint_event} and {recovery_event}, copy {copy}");
                return Err(format!("{at}: {found:?}, and three copies were left"));
            }
        }
    }
}

/// If this fails, there is a time at which the store depends on a single block.
#[test]
fn any_one_copy_of_the_superblock_may_be_lost_at_any_time() {
    let mut all = 0;
    for event in 1.. {
        let opened = one_copy_lost(event).unwrap_or_else(|why| panic!("{why}"));
        all += opened;
        if opened == 0 {
            break;
        }
    }
    println!("{all} stores opened with three copies of the superblock");
    assert!(all > 1000, "{all} stores");
}

/// Crashes a store at an event of a checkpoint, opens it again, and then loses one of the writes of
/// roots and table: the old block may be one that the crashed checkpoint has written.
fn one_write_lost(seed: u64, event: u64) -> Outcome<Option<u64>> {
    let mut sim = SimRun::new(Plan {
        options: Some(super::small_tests::options()),
        shards: 1..=2,
        ..quiet(seed)
    });
    sim.begin()?;
    for _ in 0..50 {
        sim.step()?;
    }
    sim.publish_to_map()?;
    if !crash_checkpoint(&mut sim, event)? {
        return Ok(None);
    }
    sim.reopen(Loss::Nothing)?;
    sim.crash(Loss::Everything)?;
    let mut lost = 0;
    for (file, len) in sim.disk.files() {
        if !matches!(file, FileId::Meta | FileId::Table) {
            continue;
        }
        for block in (0..len / BLOCK as u64).filter(|&block| !is_superblock(file, block)) {
            let image = sim.disk.crash(Loss::Everything, &mut Rng::new(1));
            image.note_reads();
            if !image.damage(file, block * SECTORS as u64, SECTORS, Damage::Stale) {
                continue;
            }
            let found = sim
                .open_damaged(image.clone())
                .map_err(|why| format!("{file} block {block}: {why}"))?;
            if image.take_reads().contains(&(file, block)) {
                lost += 1;
                if found != Damaged::Refused {
                    return Err(format!(
                        "the last write of block {block} of {file} is lost: {found:?}"
                    ));
                }
            }
        }
    }
    Ok(Some(lost))
}

fn every_write_lost(seed: u64) -> Outcome<u64> {
    let mut all = 0;
    for event in 1.. {
        match one_write_lost(seed, event).map_err(|why| format!("event {event}: {why}"))? {
            Some(lost) => all += lost,
            None => break,
        }
    }
    Ok(all)
}

/// One of the runs in which planted bugs are looked for.
pub(super) fn all_lost() -> Outcome {
    every_write_lost(1).map(drop)
}

/// If this fails, a lost write silently brings back what an incomplete checkpoint has written.
#[test]
fn a_lost_write_does_not_bring_back_an_interrupted_checkpoint() {
    let all: u64 = (1..=3)
        .map(|seed| every_write_lost(seed).unwrap_or_else(|why| panic!("seed {seed}, {why}")))
        .sum();
    println!("{all} lost writes of roots and of the table");
    assert!(all > 500, "{all} lost writes");
}
