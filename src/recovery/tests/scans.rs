//! What is read of the logs after a crash, against reading all of them.

use super::*;
use crate::format::superblock::Superblock;
use crate::sim::disk::{Damage, SECTOR, SECTORS};

/// Segments of a few groups, so that logs go round in them; one block of each is looked at before it is read whole.
fn short_segments() -> Options {
    let geometry = crate::Geometry { segment_bytes: 64 << 10, segments_count: 6, ..options().geometry };
    Options { geometry, ..options() }
}

/// A disk as a crash has left it: the store has logged for a while, with checkpoints between, and some commits were under way.
fn crashed(seed: u64) -> SimDisk {
    let mut rng = Rng::new(seed);
    let shards_count = 1 + (seed % 2) as u16;
    let (mut d, _) = Driver::open_shards(SimDisk::new(seed), &short_segments(), shards_count);
    let commit = |rng: &mut Rng| {
        let pages = rng.within(1, 6);
        let changes = (0..pages).map(|_| (key(rng.below(60) << 7), put(rng.draw() as u8)));
        Commit { reads: vec![], changes: changes.collect(), durable: true }
    };
    for _ in 0..rng.below(60) {
        let count = rng.within(1, 4) as usize;
        (0..count).for_each(|_| _ = d.begin(Request::Commit(commit(&mut rng))));
        while d.all.replies.len() < count {
            d.step();
        }
        d.all.replies.clear();
        if rng.one_in(30) {
            d.ask(Request::Checkpoint).expect("a checkpoint");
        }
    }
    (0..rng.below(8)).for_each(|_| _ = d.begin(Request::Commit(commit(&mut rng))));
    (0..rng.below(12)).for_each(|_| d.step());
    let loss = *rng.pick(&[Loss::Nothing, Loss::Everything, Loss::Sectors(50), Loss::Prefixes]);
    d.disk.crash(loss, &mut rng)
}

/// Damages one log file somehow: a sector, a block or many blocks of it. The beginnings of segments more often than the rest.
fn damage(disk: &SimDisk, rng: &mut Rng) -> String {
    let logs: Vec<(FileId, u64)> =
        disk.files().into_iter().filter(|(file, _)| matches!(file, FileId::Log(..))).collect();
    let (file, len) = *rng.pick(&logs);
    let blocks = len / BLOCK as u64;
    let first = if rng.one_in(2) { 0 } else { rng.below(blocks) };
    let count = *rng.pick(&[1, 1, 2, 3, blocks]).min(&(blocks - first));
    let sectors = if count == 1 && rng.one_in(2) { 1 } else { SECTORS };
    let kind = rng.below(4);
    for block in first..first + count {
        let how = match kind {
            0 => Damage::Flip { bit: rng.below((sectors * SECTOR * 8) as u64) as usize },
            1 => Damage::Zero,
            2 => Damage::Stale,
            _ => Damage::Swap { with: rng.below(blocks) * SECTORS as u64 },
        };
        disk.damage(file, block * SECTORS as u64, sectors, how);
    }
    format!("{count} blocks of {file} from {first} on, {sectors} sectors of each, damage {kind}")
}

fn scan_it(disk: &mut SimDisk, superblock: &Superblock, reading: Reading) -> Result<Scan> {
    let mut arena = Arena::new(READ_BLOCKS).expect("memory");
    let deal = Deal::new(superblock.geometry.vshards_count, superblock.logs.len() as u16);
    scan(disk, &mut arena, superblock, deal, reading)
}

/// What must be the same, however much was read.
fn essence(scan: Result<Scan>) -> std::result::Result<(Lsn, Lsn, u64, Vec<crate::format::group::GroupHead>), String> {
    match scan {
        Ok(scan) => {
            assert!(scan.highest >= scan.cut);
            let heads = scan.groups.into_iter().map(|group| group.head).collect();
            Ok((scan.cut, scan.redo, scan.applied, heads))
        }
        Err(error) => Err(format!("{:?}", error.kind())),
    }
}

#[derive(Default, Debug)]
struct Tally {
    stores: u64,
    /// Less was read than there is.
    less: u64,
    damaged: u64,
    refused: u64,
}

fn compare(seed: u64, damages: u64, tally: &mut Tally) -> std::result::Result<(), String> {
    let (disk, mut rng) = (crashed(seed), Rng::new(seed));
    let mut arena = Arena::new(READ_BLOCKS).expect("memory");
    let superblock = find_superblock(&mut disk.clone(), &mut arena).expect("a superblock").superblock;
    let all = superblock.logs.len() as u64 * u64::from(superblock.geometry.segments_count);
    tally.stores += 1;
    for round in 0..=damages {
        let mut image = disk.crash(Loss::Everything, &mut Rng::new(seed));
        let what = if round == 0 { "nothing".into() } else { damage(&image, &mut rng) };
        let needed = scan_it(&mut image, &superblock, Reading::Needed);
        let everything = scan_it(&mut image, &superblock, Reading::Everything);
        tally.damaged += u64::from(round > 0);
        tally.refused += u64::from(everything.is_err());
        let is_less = needed.as_ref().is_ok_and(|scan| scan.bytes_read < all * superblock.geometry.segment_bytes);
        tally.less += u64::from(is_less);
        let (needed, everything) = (essence(needed), essence(everything));
        if needed != everything {
            return Err(format!("seed {seed}, damaged: {what}\nneeded {needed:?}\neverything {everything:?}"));
        }
    }
    Ok(())
}

fn compare_all(seeds: std::ops::RangeInclusive<u64>, damages: u64) -> std::result::Result<Tally, String> {
    let mut tally = Tally::default();
    seeds.into_iter().try_for_each(|seed| compare(seed, damages, &mut tally))?;
    Ok(tally)
}

/// One of the runs in which planted bugs are looked for.
pub(crate) fn compared() -> std::result::Result<(), String> {
    compare_all(1..=20, 40).map(drop)
}

/// If this fails, a store that is opened after a crash loses durable commits without a word, since a segment was not read that would
/// have shown that they are missing; or it reads more than it has to.
#[test]
fn what_is_left_unread_can_hold_nothing_that_matters() {
    let seeds = std::env::var("COREPAGE_SEEDS").ok().and_then(|text| text.parse().ok()).unwrap_or(150);
    let tally = compare_all(1..=seeds, 40).unwrap_or_else(|why| panic!("{why}"));
    println!("{tally:?}");
    assert!(tally.less * 5 > tally.damaged && tally.refused * 10 > tally.damaged, "{tally:?}");
}
